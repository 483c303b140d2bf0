//! Hooks around scheduling: before it, after it, and the measure that admission asks for.
//!
//! In the order a request meets them: [`RequestHeaderProcessor`], [`SaturationDetector`] (legacy
//! admission), [`Screener`], [`DataProducer`], [`Admitter`], then the profiles, then [`PreRequest`].

use std::any::Any;
use std::fmt::Debug;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;

use super::{Candidate, Cycle, SchedulingResult};
use crate::datalayer::Endpoint;
use crate::plugin::{Attributes, Leases};
use crate::request::{EarlyWork, InferenceRequest};

/// Reads the request's headers before anything is decided.
pub trait RequestHeaderProcessor: Send + Sync + Debug {
    /// Publishes request attributes: columns with one value.
    fn process(&self, request: &InferenceRequest, attributes: &mut Attributes);
}

/// Restricts the candidates before any data is computed. Every screener sees the full list; what is
/// left is the intersection. Nothing left is a 503.
pub trait Screener: Send + Sync + Debug {
    /// Writes the positions to keep into `keep` (given empty).
    fn screen(&self, cycle: &Cycle<'_>, candidates: &[Candidate], keep: &mut Vec<u32>);
}

/// Work that must end before a producer can [`DataProducer::produce`].
pub struct Preparation {
    /// Ends with what [`DataProducer::produce_prepared`] is given.
    pub work: Pin<Box<dyn Future<Output = Box<dyn Any + Send>> + Send>>,
    /// After this the producer counts as failed.
    pub timeout: Duration,
}

impl Debug for Preparation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Preparation")
            .field("timeout", &self.timeout)
            .finish_non_exhaustive()
    }
}

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

    /// Starts work that cannot be done at once, such as waiting for a window to close. `None`, the
    /// default, calls [`Self::produce`] without leaving the thread.
    fn prepare(
        &self,
        _request: &InferenceRequest,
        _candidates: &[Candidate],
        _attributes: &Attributes,
    ) -> Option<Preparation> {
        None
    }

    /// As [`Self::produce`], with the result of what [`Self::prepare`] started.
    fn produce_prepared(
        &self,
        _prepared: Box<dyn Any + Send>,
        request: &InferenceRequest,
        candidates: &[Candidate],
        attributes: &mut Attributes,
    ) -> Result<(), ProducerError> {
        self.produce(request, candidates, attributes)
    }

    /// What it found out about the request, for people; called after it produced.
    fn explain(
        &self,
        _request: &InferenceRequest,
        _candidates: &[Candidate],
        _attributes: &Attributes,
    ) -> Option<serde_json::Value> {
        None
    }

    /// What it knows about the endpoints of the pool, for people.
    fn overview(&self, _pool: &[Arc<Endpoint>]) -> Option<serde_json::Value> {
        None
    }

    /// False when producing for one request changes what others get, so that it must not be done for a
    /// request that nobody sent.
    fn is_pure(&self) -> bool {
        true
    }

    /// What this producer is glad to find done with the text of a prompt while the body arrives.
    fn early_work(&self) -> EarlyWork {
        EarlyWork::default()
    }
}

/// A producer could not do its work.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct ProducerError(pub String);

/// Refuses requests once their data is known.
pub trait Admitter: Send + Sync + Debug {
    /// The first denial ends the request.
    fn admit(&self, cycle: &Cycle<'_>, candidates: &[Candidate]) -> Result<(), Denial>;
}

/// Why an admitter refuses.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("request cannot be admitted: {reason}")]
pub struct Denial {
    /// What the client is told.
    pub reason: String,
    /// True for a lack of capacity (429), false for a failure of ours (500).
    pub saturated: bool,
}

/// Runs after scheduling and before the answer leaves: books load, learns prefixes, sets headers.
pub trait PreRequest: Send + Sync + Debug {
    /// Records the decision.
    fn on_pick(
        &self,
        cycle: &Cycle<'_>,
        candidates: &[Candidate],
        result: &SchedulingResult,
        outcome: &mut Outcome,
    );
}

/// What hooks add to a decision.
#[derive(Debug, Default)]
pub struct Outcome {
    /// Released when the request ends, whatever ends it.
    pub leases: Leases,
    /// Request headers to set towards the endpoint; see [`Self::set_header`].
    pub set_headers: Vec<(&'static str, Bytes)>,
    /// Send the request to this port of the picked address instead: the picked endpoint is a rank behind
    /// it, and a header says which.
    pub primary_port: Option<u16>,
}

impl Outcome {
    /// Sets a request header, instead of what another hook set.
    pub fn set_header(&mut self, name: &'static str, value: Bytes) {
        self.set_headers.retain(|(own, _)| *own != name);
        self.set_headers.push((name, value));
    }

    /// Sets a request header unless another hook did.
    pub fn set_header_if_absent(&mut self, name: &'static str, value: Bytes) {
        if !self.set_headers.iter().any(|(own, _)| *own == name) {
            self.set_headers.push((name, value));
        }
    }
}

/// How full the pool is.
pub trait SaturationDetector: Send + Sync + Debug {
    /// 0 is idle, 1 and above is saturated; an empty pool is 1.
    fn saturation(&self, candidates: &[Candidate], now: tokio::time::Instant) -> f64;
}
