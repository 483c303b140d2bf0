//! What one routed request holds and measures until it ends.
//!
//! Dropping an [`Accounting`] releases its leases (in-flight counts, reservations) and its running
//! gauge, whatever ended the request; [`Accounting::complete`] also records the measurements that
//! only a natural end may record.

use std::sync::Arc;

use bytes::Bytes;
use smallvec::SmallVec;
use tokio::time::Instant;

use super::usage::{ResponseReader, UsageFormat};
use super::{MetadataNumber, ModelNameRewriter, ResponseHooks, ResponseView, Served};
use crate::datalayer::Endpoint;
use crate::plugin::{Leases, PromptUsage};
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
    /// The picks, best first.
    pub picks: SmallVec<[Arc<Endpoint>; 1]>,
    /// Request id, for hooks; empty when there are none.
    pub request_id: String,
    /// Plugins of the response phase; `None` when the configuration has none.
    pub hooks: Option<Arc<ResponseHooks>>,
}

impl RequestFacts {
    /// The endpoint that answers, as far as is known.
    fn endpoint(&self, served: Served<'_>) -> Option<&Arc<Endpoint>> {
        let reported = match served {
            Served::By(address) => self.picks.iter().find(|e| e.host_port_str() == address),
            Served::NoKey | Served::NoNamespace => None,
        };
        reported.or_else(|| self.picks.first())
    }
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
    /// The proxy does not say that another endpoint than the first pick answers.
    pick_answers: bool,
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
            pick_answers: true,
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

    /// Response headers arrived, with the proxy's report of who answers. Returns headers to set.
    pub fn on_response_headers(
        &mut self,
        headers: &Headers,
        served: Served<'_>,
    ) -> Vec<(String, Bytes)> {
        self.headers_at = Some(Instant::now());
        if let (Served::By(served), Some(picked)) = (served, self.facts.picks.first())
            && served != picked.host_port_str()
        {
            self.pick_answers = false;
            let rank = |e: &Arc<Endpoint>| e.host_port_str() == served;
            if let Some(rank) = self.facts.picks.iter().position(rank) {
                self.leases.on_served_by(rank);
            }
            // After a retry or the proxy's own fallback.
            tracing::debug!(
                picked = picked.host_port_str(),
                served,
                "another endpoint answered"
            );
        }
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
        let mut set = Vec::new();
        self.leases.on_response_headers(&mut set);
        if let (Some(hooks), Some(endpoint)) = (&self.facts.hooks, self.facts.endpoint(served)) {
            let view = ResponseView {
                request_id: &self.facts.request_id,
                endpoint,
                served,
                headers,
            };
            for hook in &hooks.headers {
                hook.timed(|plugin| plugin.on_response_headers(&view, &mut set));
            }
        }
        set
    }

    /// A piece of the response body arrived, in slices none of which is empty.
    pub fn on_response_piece(&mut self, slices: &[Bytes]) {
        if slices.is_empty() {
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
        for slice in slices {
            self.response_bytes += slice.len() as u64;
            if let Some(reader) = &mut self.reader {
                reader.on_chunk(slice);
            }
        }
    }

    /// The response ended naturally: records usage and durations, then releases everything. Returns
    /// what plugins report in the dynamic metadata of the last reply.
    pub fn complete(mut self) -> Vec<MetadataNumber> {
        let mut metadata = Vec::new();
        let Some(series) = self.series.take() else {
            return metadata;
        };
        let end = Instant::now();
        let usage = self.reader.as_mut().and_then(ResponseReader::finish);
        if let Some(hooks) = &self.facts.hooks {
            for hook in &hooks.complete {
                hook.timed(|plugin| plugin.on_complete(usage.as_ref(), &mut metadata));
            }
        }
        if let Some(usage) = usage {
            if self.pick_answers {
                self.leases.on_usage(PromptUsage {
                    prompt_tokens: usage.prompt_tokens,
                    cached_tokens: usage.cached_tokens,
                });
            }
            series.usage(
                usage.prompt_tokens,
                usage.completion_tokens,
                usage.cached_or_zero(),
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
        metadata
    }
}
