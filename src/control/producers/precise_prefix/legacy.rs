//! `precise-prefix-cache-scorer`: producer and scorer in one, as configurations of before name it.

use std::any::Any;
use std::sync::Arc;

use super::settings::Raw;
use super::{PARAMETERS, PrecisePrefixProducer};
use crate::datalayer::{Endpoint, EndpointListener};
use crate::plugin::{Attributes, Build, Maturity, ParamDoc, Plugin, PluginError};
use crate::request::InferenceRequest;
use crate::scheduling::attributes::PrefixMatch;
use crate::scheduling::{
    Candidate, Candidates, Cycle, DataProducer, Outcome, PreRequest, Preparation, ProducerError,
    SchedulingResult, Scorer,
};

/// The legacy form: producer and scorer in one. Score: the matched share of the prompt's blocks.
#[derive(Debug)]
pub struct PrecisePrefixScorer(PrecisePrefixProducer);

impl Plugin for PrecisePrefixScorer {
    const TYPE: &'static str = "precise-prefix-cache-scorer";
    const MATURITY: Maturity = Maturity::Beta;
    const PARAMETERS: &'static [ParamDoc] = PARAMETERS;
    const ABOUT: &'static str = "Prefers endpoints that hold more of the prompt, by KV events.";

    fn build(build: &mut Build<'_>) -> Result<Self, PluginError> {
        let raw: Raw = build.read::<Self, _>()?;
        PrecisePrefixProducer::new(&raw.resolve()?, build).map(Self)
    }
}

impl Scorer for PrecisePrefixScorer {
    fn score(&self, cycle: &Cycle<'_>, candidates: Candidates<'_>, scores: &mut [f64]) {
        let Some(matches) = cycle.attributes.get(self.0.matches) else {
            return;
        };
        for (score, (position, _)) in scores.iter_mut().zip(candidates.iter()) {
            *score = matches.get(position).map_or(0.0, PrefixMatch::ratio);
        }
    }
}

impl DataProducer for PrecisePrefixScorer {
    fn produce(
        &self,
        request: &InferenceRequest,
        candidates: &[Candidate],
        attributes: &mut Attributes,
    ) -> Result<(), ProducerError> {
        self.0.produce(request, candidates, attributes)
    }

    fn prepare(
        &self,
        request: &InferenceRequest,
        candidates: &[Candidate],
        attributes: &Attributes,
    ) -> Option<Preparation> {
        self.0.prepare(request, candidates, attributes)
    }

    fn produce_prepared(
        &self,
        prepared: Box<dyn Any + Send>,
        request: &InferenceRequest,
        candidates: &[Candidate],
        attributes: &mut Attributes,
    ) -> Result<(), ProducerError> {
        self.0
            .produce_prepared(prepared, request, candidates, attributes)
    }

    fn explain(
        &self,
        request: &InferenceRequest,
        candidates: &[Candidate],
        attributes: &Attributes,
    ) -> Option<serde_json::Value> {
        self.0.explain(request, candidates, attributes)
    }

    fn overview(&self, pool: &[Arc<Endpoint>]) -> Option<serde_json::Value> {
        self.0.overview(pool)
    }
}

impl PreRequest for PrecisePrefixScorer {
    fn on_pick(
        &self,
        cycle: &Cycle<'_>,
        candidates: &[Candidate],
        result: &SchedulingResult,
        outcome: &mut Outcome,
    ) {
        self.0.on_pick(cycle, candidates, result, outcome);
    }
}

impl EndpointListener for PrecisePrefixScorer {
    fn added(&self, endpoint: &Arc<Endpoint>) {
        self.0.added(endpoint);
    }

    fn relabelled(&self, former: &Arc<Endpoint>, endpoint: &Arc<Endpoint>) {
        self.0.relabelled(former, endpoint);
    }

    fn removed(&self, endpoint: &Arc<Endpoint>) {
        self.0.removed(endpoint);
    }
}
