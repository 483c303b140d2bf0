//! Hooks around scheduling: before it, after it, and the measure that admission asks for.

use std::fmt::Debug;

use super::{Candidate, Cycle, SchedulingResult};
use crate::plugin::{Attributes, Leases};
use crate::request::InferenceRequest;

/// Computes data about the request or its candidates before scheduling.
pub trait DataProducer: Send + Sync + Debug {
    /// Fills the columns this instance declared, one value for each of `candidates`. An error is
    /// logged and skips the producers after it; the request goes on without their data.
    fn produce(
        &self,
        request: &InferenceRequest,
        candidates: &[Candidate],
        attributes: &mut Attributes,
    ) -> Result<(), ProducerError>;
}

/// A producer could not do its work.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct ProducerError(pub String);

/// Runs after scheduling and before the answer leaves: books load, learns prefixes.
pub trait PreRequest: Send + Sync + Debug {
    /// Records the decision. State that must be released later goes into `leases`.
    fn on_pick(
        &self,
        cycle: &Cycle<'_>,
        candidates: &[Candidate],
        result: &SchedulingResult,
        leases: &mut Leases,
    );
}

/// How full the pool is.
pub trait SaturationDetector: Send + Sync + Debug {
    /// 0 is idle, 1 and above is saturated; an empty pool is 1.
    fn saturation(&self, candidates: &[Candidate], now: tokio::time::Instant) -> f64;
}
