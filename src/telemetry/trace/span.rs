//! One timed piece of work on a request that is recorded, or nothing.

use std::borrow::Cow;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use tokio::time::Instant;

use super::batch::Sink;
use super::context::{SpanContext, SpanId, TraceId};

/// Longest text of an attribute, in bytes; the rest is cut off.
pub const MAX_TEXT_BYTES: usize = 1024;

/// Which side of a call a span is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Neither.
    Internal,
    /// The one that is called.
    Server,
}

/// What kind of span: its name and the instrumentation scope it belongs to.
#[derive(Debug, Clone)]
pub struct Site {
    /// Name of the scope, published by package.
    pub scope: &'static str,
    /// Name of the span.
    pub name: Cow<'static, str>,
    /// Which side.
    pub kind: Kind,
}

impl Site {
    /// A span inside of another.
    pub const fn internal(scope: &'static str, name: &'static str) -> Self {
        Self {
            scope,
            name: Cow::Borrowed(name),
            kind: Kind::Internal,
        }
    }

    /// A span for a call from outside.
    pub const fn server(scope: &'static str, name: &'static str) -> Self {
        Self {
            scope,
            name: Cow::Borrowed(name),
            kind: Kind::Server,
        }
    }
}

/// Value of an attribute.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// Text.
    Text(Cow<'static, str>),
    /// A whole number.
    Int(i64),
    /// A number.
    Float(f64),
    /// Yes or no.
    Bool(bool),
    /// A list of texts.
    Texts(Vec<String>),
    /// A list of numbers.
    Floats(Vec<f64>),
}

/// A span that ended.
#[derive(Debug)]
pub struct Finished {
    /// The trace.
    pub trace: TraceId,
    /// Its own id.
    pub id: SpanId,
    /// `None` at the root of a trace.
    pub parent: Option<SpanId>,
    /// Name, scope, kind.
    pub site: Site,
    /// Nanoseconds since 1970.
    pub start_unix_nanos: u64,
    /// Nanoseconds since 1970, not before the start.
    pub end_unix_nanos: u64,
    /// Each name once.
    pub attributes: Vec<(&'static str, Value)>,
    /// Why it failed, if it did.
    pub error: Option<Cow<'static, str>>,
}

/// A span while it lasts; dropped, it ends. Recorded or not is decided where a request enters, and all
/// spans of a request that is not recorded are empty: they cost a test for null, and nothing is
/// evaluated or stored for them.
#[derive(Debug, Default)]
pub struct Span(Option<Box<Live>>);

#[derive(Debug)]
struct Live {
    of: Arc<Recorded>,
    id: SpanId,
    parent: Option<SpanId>,
    site: Site,
    start: Instant,
    attributes: Vec<(&'static str, Value)>,
    error: Option<Cow<'static, str>>,
}

/// What the spans of a recorded request share.
#[derive(Debug)]
struct Recorded {
    trace: TraceId,
    sink: Sink,
    /// The same moment on both clocks, so that a step of the wall clock bends no span.
    began: Instant,
    began_unix_nanos: u64,
}

impl Span {
    /// The first span of a recorded request.
    pub(super) fn root(
        trace: TraceId,
        id: SpanId,
        parent: Option<SpanId>,
        site: Site,
        sink: Sink,
    ) -> Self {
        let since = SystemTime::now().duration_since(UNIX_EPOCH);
        let began = Instant::now();
        Self(Some(Box::new(Live {
            of: Arc::new(Recorded {
                trace,
                sink,
                began,
                began_unix_nanos: nanos(since.unwrap_or_default()),
            }),
            id,
            parent,
            site,
            start: began,
            attributes: Vec::new(),
            error: None,
        })))
    }

    /// True when what is set is kept.
    pub fn is_recording(&self) -> bool {
        self.0.is_some()
    }

    /// A span inside of this one, from now on.
    #[must_use]
    pub fn child(&self, site: Site) -> Self {
        self.0
            .as_ref()
            .map_or(Self(None), |live| live.child(site, Instant::now()))
    }

    /// A span inside of this one that began with it.
    #[must_use]
    pub fn child_from_start(&self, site: Site) -> Self {
        self.0
            .as_ref()
            .map_or(Self(None), |live| live.child(site, live.start))
    }

    /// Adds attributes; `attributes` runs only when they are kept. One that is there already is
    /// replaced.
    pub fn record<const N: usize>(
        &mut self,
        attributes: impl FnOnce() -> [(&'static str, Value); N],
    ) {
        let Some(live) = &mut self.0 else {
            return;
        };
        for (name, value) in attributes() {
            let value = value.bounded();
            match live.attributes.iter_mut().find(|(n, _)| *n == name) {
                Some((_, old)) => *old = value,
                None => live.attributes.push((name, value)),
            }
        }
    }

    /// Marks it as failed; the first reason stays. `reason` must be fixed text or of a closed set: it
    /// leaves the process.
    pub fn fail(&mut self, reason: impl Into<Cow<'static, str>>) {
        if let Some(live) = &mut self.0 {
            live.error.get_or_insert_with(|| reason.into());
        }
    }

    /// For those who go on from here; `None` when nothing is recorded.
    pub fn context(&self) -> Option<SpanContext> {
        let live = self.0.as_ref()?;
        Some(SpanContext {
            trace: live.of.trace,
            span: live.id,
            sampled: true,
        })
    }
}

impl Drop for Span {
    fn drop(&mut self) {
        if let Some(live) = self.0.take() {
            let of = Arc::clone(&live.of);
            of.sink.take(live.finish());
        }
    }
}

impl Live {
    fn child(&self, site: Site, start: Instant) -> Span {
        Span(Some(Box::new(Self {
            of: Arc::clone(&self.of),
            id: SpanId::random(),
            parent: Some(self.id),
            site,
            start,
            attributes: Vec::new(),
            error: None,
        })))
    }

    fn finish(self) -> Finished {
        let at = |moment: Instant| {
            let since = moment.saturating_duration_since(self.of.began);
            self.of.began_unix_nanos.saturating_add(nanos(since))
        };
        let (start, end) = (at(self.start), at(Instant::now()));
        Finished {
            trace: self.of.trace,
            id: self.id,
            parent: self.parent,
            site: self.site,
            start_unix_nanos: start,
            end_unix_nanos: end.max(start),
            attributes: self.attributes,
            error: self.error,
        }
    }
}

fn nanos(since: std::time::Duration) -> u64 {
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

impl Value {
    fn bounded(self) -> Self {
        match self {
            Self::Text(text) if text.len() > MAX_TEXT_BYTES => {
                let end = text.floor_char_boundary(MAX_TEXT_BYTES);
                Self::Text(text.get(..end).unwrap_or_default().to_owned().into())
            }
            other => other,
        }
    }
}

impl From<&'static str> for Value {
    fn from(text: &'static str) -> Self {
        Self::Text(text.into())
    }
}

impl From<String> for Value {
    fn from(text: String) -> Self {
        Self::Text(text.into())
    }
}

impl From<bool> for Value {
    fn from(value: bool) -> Self {
        Self::Bool(value)
    }
}

impl From<f64> for Value {
    fn from(value: f64) -> Self {
        Self::Float(value)
    }
}

impl From<i64> for Value {
    fn from(value: i64) -> Self {
        Self::Int(value)
    }
}

impl From<u16> for Value {
    fn from(value: u16) -> Self {
        Self::Int(value.into())
    }
}

impl From<usize> for Value {
    fn from(value: usize) -> Self {
        Self::Int(i64::try_from(value).unwrap_or(i64::MAX))
    }
}

impl From<u32> for Value {
    fn from(value: u32) -> Self {
        Self::Int(value.into())
    }
}
