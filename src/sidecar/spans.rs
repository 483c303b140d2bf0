//! Spans of a request and of the calls made for it, under the names that the reference publishes. All of
//! them are empty for a request that is not recorded.

use std::sync::Arc;

use http::{HeaderMap, HeaderValue, Request, StatusCode};
use parking_lot::Mutex;
use tokio::time::Instant;

use super::trace::TRACEPARENT;
use crate::telemetry::trace::context::SpanContext;
use crate::telemetry::trace::{Kind, Site, Span, TRACESTATE, Tracer, Value};

const SCOPE: &str = "llm-d-router/pkg/sidecar/proxy";
/// Longest path in the name of a span, in bytes.
const MAX_PATH_BYTES: usize = 256;

/// A request that is passed on as it came.
pub(super) const FORWARD: Site = Site::internal(SCOPE, "forward_request");
/// A media item at an encode endpoint.
pub(super) const ENCODE: Site = Site::internal(SCOPE, "encode");
/// Prefill, with the decode behind it.
pub(super) const PREFILL: Site = Site::internal(SCOPE, "prefill");
/// Prefill while the decode waits for it.
pub(super) const CONCURRENT_PREFILL: Site = Site::internal(SCOPE, "llm_d.pd_proxy.prefill");
/// Decode, with or without a prefill before it.
pub(super) const DECODE: Site = Site::internal(SCOPE, "decode");
/// Decode beside a prefill.
pub(super) const CONCURRENT_DECODE: Site = Site::internal(SCOPE, "llm_d.pd_proxy.decode");
/// Decode in several calls, each of them a [`DECODE`] inside.
pub(super) const CHUNKED_DECODE: Site = Site::internal(SCOPE, "chunked_decode");

/// Spans of calls to an engine by what they measure their time as.
const PREFILL_MS: &str = "llm_d.pd_proxy.prefill.duration_ms";
const DECODE_MS: &str = "llm_d.pd_proxy.decode.duration_ms";

/// One request, from its head to the end of its answer; the last copy ends it.
#[derive(Debug, Clone, Default)]
pub(super) struct RequestSpan(Option<Arc<Shared>>);

#[derive(Debug)]
struct Shared {
    span: Mutex<Span>,
    began: Instant,
    marks: Mutex<Marks>,
}

#[derive(Debug, Default)]
struct Marks {
    prefilled_at: Option<Instant>,
    decoding: bool,
}

impl RequestSpan {
    /// A request comes in. With tracing its headers tell from now on where in the trace it is, recorded
    /// or not; without, they stay as they came.
    pub(super) fn start<B>(tracer: &Tracer, request: &mut Request<B>) -> Self {
        let (method, path) = (request.method(), request.uri().path());
        let parent = |headers: &HeaderMap| {
            let mut given = headers.get_all(TRACEPARENT).iter();
            let only = given.next().filter(|_| given.next().is_none())?;
            SpanContext::parse(only.to_str().ok()?)
        };
        let trace = tracer.start(
            || parent(request.headers()),
            || {
                let path = path.get(..path.floor_char_boundary(MAX_PATH_BYTES));
                Site {
                    scope: SCOPE,
                    name: format!("llm_d.pd_proxy.{method} {}", path.unwrap_or_default()).into(),
                    kind: Kind::Server,
                }
            },
        );
        let Some(context) = trace.context else {
            return Self::default();
        };
        let headers = request.headers_mut();
        put(headers, &context);
        if trace.is_root {
            headers.remove(TRACESTATE);
        }
        Self(trace.span.is_recording().then(|| {
            Arc::new(Shared {
                span: Mutex::new(trace.span),
                began: Instant::now(),
                marks: Mutex::default(),
            })
        }))
    }

    pub(super) fn is_recording(&self) -> bool {
        self.0.is_some()
    }

    /// A span inside of it.
    pub(super) fn child(&self, site: Site) -> Span {
        let shared = self.0.as_ref();
        shared.map_or_else(Span::default, |shared| shared.span.lock().child(site))
    }

    /// See [`Span::record`].
    pub(super) fn record<const N: usize>(
        &self,
        attributes: impl FnOnce() -> [(&'static str, Value); N],
    ) {
        if let Some(shared) = &self.0 {
            shared.span.lock().record(attributes);
        }
    }

    /// The client gets this status.
    pub(super) fn answered(&self, status: StatusCode) {
        if let Some(shared) = self.0.as_ref().filter(|_| status.is_server_error()) {
            shared
                .span
                .lock()
                .fail(format!("status {}", status.as_u16()));
        }
    }

    /// A prefill ended well.
    pub(super) fn prefilled(&self) {
        if let Some(shared) = &self.0 {
            shared.marks.lock().prefilled_at = Some(Instant::now());
        }
    }

    /// A decode begins. The first one tells how long the client waited for it, and how much of that is
    /// our own doing.
    pub(super) fn decoding(&self) {
        let Some(shared) = &self.0 else {
            return;
        };
        let mut marks = shared.marks.lock();
        if std::mem::replace(&mut marks.decoding, true) {
            return;
        }
        let now = Instant::now();
        let waited = now.saturating_duration_since(shared.began);
        let mut span = shared.span.lock();
        span.record(|| [("llm_d.pd_proxy.true_ttft_ms", millis(waited).into())]);
        if let Some(at) = marks.prefilled_at {
            let between = millis(now.saturating_duration_since(at));
            span.record(|| [("llm_d.pd_proxy.coordinator_overhead_ms", between.into())]);
        }
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        let took = millis(self.began.elapsed());
        let span = self.span.get_mut();
        span.record(|| [("llm_d.pd_proxy.total_duration_ms", took.into())]);
    }
}

/// A call to an engine. Dropped before [`Self::end`], it was cut off.
#[derive(Debug)]
pub(super) struct LegSpan(Option<Leg>);

#[derive(Debug)]
struct Leg {
    span: Span,
    began: Instant,
    millis: Option<&'static str>,
}

impl LegSpan {
    /// A call that is measured by its span alone.
    pub(super) fn new(span: Span) -> Self {
        Self::measured(span, None)
    }

    pub(super) fn prefill(span: Span) -> Self {
        Self::measured(span, Some(PREFILL_MS))
    }

    pub(super) fn decode(span: Span) -> Self {
        Self::measured(span, Some(DECODE_MS))
    }

    fn measured(span: Span, millis: Option<&'static str>) -> Self {
        Self(span.is_recording().then(|| Leg {
            span,
            began: Instant::now(),
            millis,
        }))
    }

    /// Says in `headers` where in the trace the call is.
    pub(super) fn inject(&self, headers: &mut HeaderMap) {
        let context = self.0.as_ref().and_then(|leg| leg.span.context());
        if let Some(context) = context {
            put(headers, &context);
        }
    }

    /// See [`Span::record`].
    pub(super) fn record<const N: usize>(
        &mut self,
        attributes: impl FnOnce() -> [(&'static str, Value); N],
    ) {
        if let Some(leg) = &mut self.0 {
            leg.span.record(attributes);
        }
    }

    /// The engine answered with this status.
    pub(super) fn answered(&mut self, name: Option<&'static str>, status: StatusCode) {
        let Some(leg) = &mut self.0 else {
            return;
        };
        if let Some(name) = name {
            leg.span.record(|| [(name, status.as_u16().into())]);
        }
        if status.is_client_error() || status.is_server_error() {
            leg.span.fail(format!("status {}", status.as_u16()));
        }
    }

    /// It failed.
    pub(super) fn fail(mut self, reason: impl FnOnce() -> String) {
        if let Some(leg) = &mut self.0 {
            leg.span.fail(reason());
        }
        self.end();
    }

    /// It is done.
    pub(super) fn end(mut self) {
        self.close();
    }

    fn close(&mut self) {
        if let Some(Leg {
            mut span,
            began,
            millis: Some(name),
        }) = self.0.take()
        {
            span.record(|| [(name, millis(began.elapsed()).into())]);
        }
    }
}

impl Drop for LegSpan {
    fn drop(&mut self) {
        if let Some(leg) = &mut self.0 {
            leg.span.fail("cut off");
            self.close();
        }
    }
}

fn put(headers: &mut HeaderMap, context: &SpanContext) {
    if let Ok(value) = HeaderValue::from_str(&context.traceparent()) {
        headers.insert(TRACEPARENT, value);
    }
}

fn millis(duration: std::time::Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}
