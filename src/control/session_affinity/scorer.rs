//! `session-affinity-scorer`

use bytes::Bytes;

use super::SessionAffinity;
use crate::plugin::{Attributes, Build, Maturity, ParamDoc, Plugin, PluginError};
use crate::request::InferenceRequest;
use crate::response::{ResponseHeaderHook, ResponseView};
use crate::scheduling::{
    Candidate, Candidates, Cycle, Outcome, PreRequest, RequestHeaderProcessor, SchedulingResult,
    Scorer,
};

/// Prefers the endpoint that the request's session is bound to.
///
/// Score: 1 for it, 0 for the others; 0 for all when the session is bound to none of them.
#[derive(Debug)]
pub struct SessionAffinityScorer(pub(super) SessionAffinity);

impl Plugin for SessionAffinityScorer {
    const TYPE: &'static str = "session-affinity-scorer";
    const MATURITY: Maturity = Maturity::Alpha;
    const PARAMETERS: &'static [ParamDoc] = super::PARAMETERS;
    const ABOUT: &'static str = "Prefers the endpoint that a session is bound to.";

    fn build(build: &mut Build<'_>) -> Result<Self, PluginError> {
        SessionAffinity::build::<Self>(build).map(Self)
    }
}

impl RequestHeaderProcessor for SessionAffinityScorer {
    fn process(&self, _: &InferenceRequest, attributes: &mut Attributes) {
        self.0.begin(attributes);
    }
}

impl Scorer for SessionAffinityScorer {
    fn score(&self, cycle: &Cycle<'_>, candidates: Candidates<'_>, scores: &mut [f64]) {
        let bound = self.0.bound(cycle, candidates);
        if let Some(score) = bound.and_then(|place| scores.get_mut(place)) {
            *score = 1.0;
        }
    }
}

impl PreRequest for SessionAffinityScorer {
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

impl ResponseHeaderHook for SessionAffinityScorer {
    fn on_response_headers(&self, view: &ResponseView<'_>, set: &mut Vec<(String, Bytes)>) {
        self.0.stamp(view, set);
    }
}
