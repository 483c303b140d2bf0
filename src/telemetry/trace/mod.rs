//! Traces: which requests are recorded, the spans of those that are, and their way to a collector.
//!
//! A request enters with [`Tracer::start`], which reads its W3C trace context and decides once whether it
//! is recorded. The [`Span`] it gets is handed on with the request; spans of a request that is not
//! recorded are empty and cost next to nothing. Ended spans go through a bounded queue to one task
//! ([`Export`]), which alone knows the exporter. Prompts, bodies and header sets are never recorded.
//!
//! Baggage and trace state are nobody's business here: the headers stay on the request as they came.

mod batch;
pub mod context;
mod export;
pub mod names;
mod otlp;
pub mod proto;
pub mod sampler;
pub mod settings;
pub mod span;

use std::sync::Arc;

use tokio_rustls::rustls::ClientConfig;

pub use batch::{Export, FLUSH_TIMEOUT};
use batch::{Sink, queue};
use context::{SpanContext, SpanId, TraceId};
use export::Exporter;
use otlp::Otlp;
use sampler::Sampler;
use settings::{ExporterSettings, Settings};
pub use span::{Kind, Site, Span, Value};

/// Header with the trace context.
pub const TRACEPARENT: &str = "traceparent";
/// Header with what vendors add to it.
pub const TRACESTATE: &str = "tracestate";

/// The commit that was built; version of all instrumentation scopes.
const COMMIT: &str = match option_env!("PINPOD_COMMIT") {
    Some(commit) => commit,
    None => "unknown",
};

/// Starts traces, or does not: the default is off.
#[derive(Debug, Clone, Default)]
pub struct Tracer(Option<Arc<Tracing>>);

#[derive(Debug)]
struct Tracing {
    sampler: Sampler,
    sink: Sink,
}

/// A request in its trace.
#[derive(Debug, Default)]
pub struct RequestTrace {
    /// From here to the end of the request; empty when it is not recorded.
    pub span: Span,
    /// Where the request is in its trace, for those that come next. `None` when tracing is off: the
    /// request then goes on with the headers it came with.
    pub context: Option<SpanContext>,
    /// The trace began here, so a `tracestate` that came with the request belongs to none.
    pub is_root: bool,
}

impl Tracer {
    /// Records everything into a queue for so many spans.
    #[cfg(test)]
    pub(crate) fn into_queue(max: usize) -> (Self, tokio::sync::mpsc::Receiver<span::Finished>) {
        let limits = settings::BatchLimits {
            max_queue: max,
            ..settings::BatchLimits::default()
        };
        let (sink, spans) = queue(&limits);
        let sampler = Sampler::new(1.0);
        (Self(Some(Arc::new(Tracing { sampler, sink }))), spans)
    }

    /// Starts exporting; needs a tokio runtime and the metrics recorder. `tls` is for collectors that
    /// are [`settings::OtlpSettings::is_secure`].
    pub fn install(settings: Settings, tls: Option<Arc<ClientConfig>>) -> (Self, Export) {
        let Settings {
            exporter,
            sampler,
            resource,
            batch,
        } = settings;
        let (sink, spans) = queue(&batch);
        let exporter = match exporter {
            ExporterSettings::Console => Exporter::Console(resource),
            ExporterSettings::Otlp(otlp) => {
                Exporter::Otlp(Box::new(Otlp::new(otlp, tls, &resource)))
            }
        };
        let export = Export::start(spans, exporter, batch);
        (Self(Some(Arc::new(Tracing { sampler, sink }))), export)
    }

    /// A request enters with this `traceparent`, if any; one that cannot be read counts as absent.
    pub fn start(
        &self,
        traceparent: impl FnOnce() -> Option<SpanContext>,
        site: impl FnOnce() -> Site,
    ) -> RequestTrace {
        let Some(tracing) = &self.0 else {
            return RequestTrace::default();
        };
        let parent = traceparent();
        let trace = parent.map_or_else(TraceId::random, |parent| parent.trace);
        let context = SpanContext {
            trace,
            span: SpanId::random(),
            sampled: tracing.sampler.samples(trace, parent.as_ref()),
        };
        let span = if context.sampled {
            let parent = parent.map(|parent| parent.span);
            Span::root(trace, context.span, parent, site(), tracing.sink.clone())
        } else {
            Span::default()
        };
        RequestTrace {
            span,
            context: Some(context),
            is_root: parent.is_none(),
        }
    }
}
