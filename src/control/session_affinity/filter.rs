//! `session-affinity-filter`

use bytes::Bytes;

use super::SessionAffinity;
use crate::plugin::{Attributes, Build, Maturity, ParamDoc, Plugin, PluginError};
use crate::request::InferenceRequest;
use crate::response::{ResponseHeaderHook, ResponseView};
use crate::scheduling::{
    Candidate, Candidates, Cycle, Filter, Outcome, PreRequest, RequestHeaderProcessor,
    SchedulingResult,
};

/// Keeps only the endpoint that the request's session is bound to; all when it is bound to none of
/// them.
#[derive(Debug)]
pub struct SessionAffinityFilter(pub(super) SessionAffinity);

impl Plugin for SessionAffinityFilter {
    const TYPE: &'static str = "session-affinity-filter";
    const MATURITY: Maturity = Maturity::Alpha;
    const PARAMETERS: &'static [ParamDoc] = super::PARAMETERS;
    const ABOUT: &'static str = "Keeps only the endpoint that a session is bound to.";

    fn build(build: &mut Build<'_>) -> Result<Self, PluginError> {
        SessionAffinity::build::<Self>(build).map(Self)
    }
}

impl RequestHeaderProcessor for SessionAffinityFilter {
    fn process(&self, _: &InferenceRequest, attributes: &mut Attributes) {
        self.0.begin(attributes);
    }
}

impl Filter for SessionAffinityFilter {
    fn filter(&self, cycle: &Cycle<'_>, candidates: Candidates<'_>, keep: &mut Vec<u32>) {
        let bound = self.0.bound(cycle, candidates);
        let kept = candidates
            .iter()
            .enumerate()
            .filter(|(place, _)| bound.is_none_or(|b| b == *place));
        keep.extend(kept.filter_map(|(_, (position, _))| u32::try_from(position).ok()));
    }
}

impl PreRequest for SessionAffinityFilter {
    fn on_pick(
        &self,
        cycle: &Cycle<'_>,
        candidates: &[Candidate],
        result: &SchedulingResult,
        outcome: &mut Outcome,
    ) {
        self.0.learn(cycle, candidates, result, outcome);
    }
}

impl ResponseHeaderHook for SessionAffinityFilter {
    fn on_response_headers(&self, view: &ResponseView<'_>, set: &mut Vec<(String, Bytes)>) {
        self.0.stamp(view, set);
    }
}
