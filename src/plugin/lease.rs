//! What a request holds until it ends, whatever ends it.

use std::fmt::Debug;

use bytes::Bytes;

/// Something a request holds until it ends; `Drop` releases it, whatever the cause.
pub trait Lease: Send + Debug {
    /// The first byte of the response body arrived.
    fn on_first_chunk(&mut self) {}

    /// Not the first of the picks answers but the one at `rank`: the proxy tried again.
    fn on_served_by(&mut self, _rank: usize) {}

    /// The response ended naturally and the picked endpoint reported what the prompt took.
    fn on_usage(&mut self, _usage: PromptUsage) {}

    /// The response headers arrived; adds to the headers to set.
    fn on_response_headers(&mut self, _set: &mut Vec<(String, Bytes)>) {}
}

/// What an engine says about the prompt of one request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PromptUsage {
    /// Prompt tokens.
    pub prompt_tokens: u64,
    /// Those it found in its cache; `None` when it did not say.
    pub cached_tokens: Option<u64>,
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

    /// Tells every lease that the pick at `rank` answers instead of the first.
    pub fn on_served_by(&mut self, rank: usize) {
        for lease in &mut self.0 {
            lease.on_served_by(rank);
        }
    }

    /// Tells every lease what the engine reported.
    pub fn on_usage(&mut self, usage: PromptUsage) {
        for lease in &mut self.0 {
            lease.on_usage(usage);
        }
    }

    /// Tells every lease that the response headers arrived.
    pub fn on_response_headers(&mut self, set: &mut Vec<(String, Bytes)>) {
        for lease in &mut self.0 {
            lease.on_response_headers(set);
        }
    }

    /// Releases everything.
    pub fn release(&mut self) {
        self.0.clear();
    }
}
