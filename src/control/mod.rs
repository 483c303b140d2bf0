//! The use case, top to bottom: rewrite, objective, admission, candidates, producers, schedule,
//! book. Entry point: the director. Does not know ext_proc messages.

use std::fmt::Debug;

use crate::plugin::Attributes;
use crate::request::InferenceRequest;
use crate::scheduling::{Candidate, Cycle, SchedulingResult};

pub mod producers;

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

/// Something a request holds until it ends; `Drop` releases it, whatever the cause.
pub trait Lease: Send + Debug {
    /// The first byte of the response body arrived.
    fn on_first_chunk(&mut self) {}
}

/// Everything one request holds.
#[derive(Debug, Default)]
pub struct Leases(Vec<Box<dyn Lease>>);

impl Leases {
    /// Adds a lease.
    pub fn push(&mut self, lease: Box<dyn Lease>) {
        self.0.push(lease);
    }

    /// Tells every lease that the first byte of the response body arrived.
    pub fn on_first_chunk(&mut self) {
        for lease in &mut self.0 {
            lease.on_first_chunk();
        }
    }

    /// Releases everything.
    pub fn release(&mut self) {
        self.0.clear();
    }
}

/// How full the pool is.
pub trait SaturationDetector: Send + Sync + Debug {
    /// 0 is idle, 1 and above is saturated; an empty pool is 1.
    fn saturation(&self, candidates: &[Candidate], now: tokio::time::Instant) -> f64;
}
