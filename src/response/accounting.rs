//! What one routed request holds and measures until it ends.
//!
//! Dropping an [`Accounting`] releases its leases (in-flight counts, reservations) and its running
//! gauge, whatever ended the request; [`Accounting::complete`] also records the measurements that
//! only a natural end may record.

use std::sync::Arc;

use tokio::time::Instant;

use super::ModelNameRewriter;
use super::usage::{ResponseReader, UsageFormat};
use crate::plugin::Leases;
use crate::request::Headers;
use crate::telemetry::metrics::{Completion, RequestSeries, RunningGuard};

/// Facts about the request that the response phase needs.
#[derive(Debug)]
pub struct RequestFacts {
    /// Where the request started, for durations.
    pub received_at: Instant,
    /// Model the client named; empty when none.
    pub model: String,
    /// Model that was forwarded.
    pub target_model: String,
    /// The request asked for a stream.
    pub stream: bool,
    /// How usage is written in the response; `None` when it cannot be read.
    pub usage: Option<UsageFormat>,
    /// `ip:port` of the first pick.
    pub endpoint: String,
}

/// One routed request, from the decision to its end.
#[derive(Debug)]
pub struct Accounting {
    facts: RequestFacts,
    leases: Leases,
    /// `None` for requests without a body, which are not counted.
    series: Option<Arc<RequestSeries>>,
    _running: Option<RunningGuard>,
    reader: Option<ResponseReader>,
    streaming: bool,
    response_bytes: u64,
    headers_at: Option<Instant>,
    first_piece_at: Option<Instant>,
    last_piece_at: Option<Instant>,
}

impl Accounting {
    /// Takes over `leases`. `series` is `None` for a request without a body.
    pub fn new(facts: RequestFacts, leases: Leases, series: Option<Arc<RequestSeries>>) -> Self {
        Self {
            streaming: facts.stream,
            _running: series.as_ref().and_then(RequestSeries::running_guard),
            facts,
            leases,
            series,
            reader: None,
            response_bytes: 0,
            headers_at: None,
            first_piece_at: None,
            last_piece_at: None,
        }
    }

    /// Puts the client's model name back into the response; `None` when nothing was rewritten.
    pub fn model_name_rewriter(&self) -> Option<ModelNameRewriter> {
        let RequestFacts {
            model,
            target_model,
            ..
        } = &self.facts;
        (model != target_model && !model.is_empty() && !target_model.is_empty())
            .then(|| ModelNameRewriter::new(target_model, model))
    }

    /// The proxy reported which endpoint answers; it differs from the pick after a retry or fallback.
    pub fn on_served(&mut self, served: &str) {
        if served != self.facts.endpoint {
            tracing::debug!(
                picked = self.facts.endpoint,
                served,
                "another endpoint answered"
            );
        }
    }

    /// Response headers arrived.
    pub fn on_response_headers(&mut self, headers: &Headers) {
        self.headers_at = Some(Instant::now());
        self.streaming |= headers
            .get_str("content-type")
            .is_some_and(|v| v.contains("text/event-stream"));
        let status = headers
            .get_str(":status")
            .or_else(|| headers.get_str("status"))
            .unwrap_or("200");
        if let Some(series) = &self.series {
            if status != "200" {
                series.error("ModelServerError");
            }
            self.reader = self
                .facts
                .usage
                .map(|format| ResponseReader::new(format, self.streaming));
        }
    }

    /// A piece of the response body arrived.
    pub fn on_response_piece(&mut self, piece: &[u8]) {
        if piece.is_empty() {
            return;
        }
        let now = Instant::now();
        match (self.first_piece_at, self.last_piece_at) {
            (None, _) => {
                self.first_piece_at = Some(now);
                self.leases.on_first_chunk();
            }
            (Some(_), Some(last)) if self.streaming => {
                if let Some(series) = &self.series {
                    series.itl(now.saturating_duration_since(last));
                }
            }
            _ => {}
        }
        self.last_piece_at = Some(now);
        self.response_bytes += piece.len() as u64;
        if let Some(reader) = &mut self.reader {
            reader.on_chunk(piece);
        }
    }

    /// The response ended naturally: records usage and durations, then releases everything.
    pub fn complete(mut self) {
        let Some(series) = self.series.take() else {
            return;
        };
        let end = Instant::now();
        let usage = self.reader.as_mut().and_then(ResponseReader::finish);
        if let Some(usage) = usage {
            series.usage(
                usage.prompt_tokens,
                usage.completion_tokens,
                usage.cached_tokens,
            );
        }
        let received = self.facts.received_at;
        series.complete(&Completion {
            duration: end.saturating_duration_since(received),
            response_bytes: self.response_bytes,
            ttft: self
                .first_piece_at
                .map(|at| at.saturating_duration_since(received)),
            generation: self
                .first_piece_at
                .map(|at| end.saturating_duration_since(at)),
            response_phase: self.headers_at.map(|at| end.saturating_duration_since(at)),
            streaming: self.streaming,
            output_tokens: usage.map_or(0, |u| u.completion_tokens),
        });
    }
}
