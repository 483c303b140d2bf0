//! The series of one request label set.

use std::sync::Arc;
use std::time::Duration;

use metrics::{Counter, Gauge, Histogram};

use super::{Pair, labels};

/// Handles for one (model, target model, fairness id, priority).
#[derive(Debug)]
pub struct RequestSeries {
    total: Pair<Counter>,
    request_bytes: Pair<Histogram>,
    running: Option<Pair<Gauge>>,
    input_tokens: Pair<Histogram>,
    output_tokens: Pair<Histogram>,
    cached_tokens: Pair<Histogram>,
    duration: Pair<Histogram>,
    response_bytes: Pair<Histogram>,
    ntpot: Pair<Histogram>,
    ttft: [Pair<Histogram>; 2],
    tpot: Pair<Histogram>,
    itl: Pair<Histogram>,
    response_phase: Histogram,
    names: [String; 4],
}

/// What is known when a response ended naturally.
#[derive(Debug, Clone, Default)]
pub struct Completion {
    /// From the request's arrival to the end of the response.
    pub duration: Duration,
    /// Bytes of the response body.
    pub response_bytes: u64,
    /// To the first non-empty piece of the response body.
    pub ttft: Option<Duration>,
    /// From that piece to the end.
    pub generation: Option<Duration>,
    /// From the response headers to the end.
    pub response_phase: Option<Duration>,
    /// The response was a stream.
    pub streaming: bool,
    /// Output tokens the engine reported; 0 when unknown.
    pub output_tokens: u64,
}

impl RequestSeries {
    pub(super) fn new(model: &str, target: &str, fairness_id: &str, priority: i32) -> Self {
        let priority = priority.to_string();
        let model_labels = || labels(&[("model_name", model), ("target_model_name", target)]);
        let full = || {
            labels(&[
                ("model_name", model),
                ("target_model_name", target),
                ("fairness_id", fairness_id),
                ("priority", &priority),
            ])
        };
        let histogram = |name| Pair::histogram(name, full(), model_labels());
        let ttft = |streaming| {
            let mut list = full();
            list.extend(labels(&[("streaming", streaming)]));
            Pair::histogram("llm_d_epp_request_ttft_seconds", list, Vec::new())
        };
        let mut with_priority = model_labels();
        with_priority.extend(labels(&[("priority", &priority)]));
        Self {
            total: Pair::counter("llm_d_epp_request_total", full(), with_priority),
            request_bytes: histogram("llm_d_epp_request_size_bytes"),
            running: (!model.is_empty()).then(|| {
                Pair::gauge(
                    "llm_d_epp_request_running",
                    full(),
                    labels(&[("model_name", model)]),
                )
            }),
            input_tokens: histogram("llm_d_epp_request_input_tokens"),
            output_tokens: histogram("llm_d_epp_request_output_tokens"),
            cached_tokens: histogram("llm_d_epp_request_cached_tokens"),
            duration: histogram("llm_d_epp_request_duration_seconds"),
            response_bytes: histogram("llm_d_epp_response_size_bytes"),
            ntpot: histogram("llm_d_epp_request_ntpot_seconds"),
            ttft: [ttft("false"), ttft("true")],
            tpot: histogram("llm_d_epp_request_streaming_tpot_seconds"),
            itl: histogram("llm_d_epp_request_streaming_itl_seconds"),
            response_phase: metrics::histogram!("llm_d_epp_response_processing_duration_seconds"),
            names: [model, target, fairness_id, &priority].map(str::to_owned),
        }
    }

    /// The request was routed; `body_bytes` were forwarded.
    pub fn scheduled(&self, body_bytes: u64) {
        self.total.increment();
        self.request_bytes.record(body_bytes as f64);
    }

    /// The request ended with an error; `code` is one of the contract's codes.
    pub fn error(&self, code: &'static str) {
        let [model, target, fairness_id, priority] = &self.names;
        let twin = labels(&[
            ("model_name", model),
            ("target_model_name", target),
            ("error_code", code),
        ]);
        let full = labels(&[
            ("model_name", model),
            ("target_model_name", target),
            ("fairness_id", fairness_id),
            ("priority", priority),
            ("error_code", code),
        ]);
        Pair::counter("llm_d_epp_request_error_total", full, twin).increment();
    }

    /// Counts the request as running until the guard drops; `None` without a model name.
    pub fn running_guard(self: &Arc<Self>) -> Option<RunningGuard> {
        self.running.as_ref()?.add(1.0);
        Some(RunningGuard(Arc::clone(self)))
    }

    /// Usage as the engine reported it; `cached` is `None` when it gave no prompt details.
    pub fn usage(&self, prompt_tokens: u64, output_tokens: u64, cached: Option<u64>) {
        if prompt_tokens > 0 {
            self.input_tokens.record(prompt_tokens as f64);
        }
        if output_tokens > 0 {
            self.output_tokens.record(output_tokens as f64);
        }
        if let Some(cached) = cached {
            self.cached_tokens.record(cached as f64);
        }
    }

    /// A further piece of a stream came `gap` after the one before.
    pub fn itl(&self, gap: Duration) {
        self.itl.record(gap.as_secs_f64());
    }

    /// The response ended naturally. TPOT = generation / (tokens - 1), NTPOT = duration / tokens.
    pub fn complete(&self, end: &Completion) {
        self.duration.record(end.duration.as_secs_f64());
        self.response_bytes.record(end.response_bytes as f64);
        if let Some(ttft) = end.ttft {
            self.ttft[usize::from(end.streaming)].record(ttft.as_secs_f64());
        }
        if let Some(phase) = end.response_phase {
            self.response_phase.record(phase.as_secs_f64());
        }
        if end.output_tokens > 0 {
            self.ntpot
                .record(end.duration.as_secs_f64() / end.output_tokens as f64);
        }
        if let Some(generation) = end.generation
            && end.streaming
            && end.output_tokens > 1
        {
            self.tpot
                .record(generation.as_secs_f64() / (end.output_tokens - 1) as f64);
        }
    }
}

/// A running request.
#[derive(Debug)]
pub struct RunningGuard(Arc<RequestSeries>);

impl Drop for RunningGuard {
    fn drop(&mut self) {
        if let Some(running) = &self.0.running {
            running.add(-1.0);
        }
    }
}
