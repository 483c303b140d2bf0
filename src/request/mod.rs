//! Bytes to [`InferenceRequest`]: which API was called, where the prompt lies, which model is wanted.
//!
//! The body is read once, forward, as the slices it arrived in; nothing of the prompt is copied and
//! no document tree is built. Does not know Envoy, endpoints or scheduling.
//! Entry points: [`parsers::ParserSet::resolve`] (path to parser) and [`Parser::parse`].

pub mod anthropic;
pub mod body;
pub mod early;
mod fields;
pub mod grpc;
pub mod headers;
pub mod keys;
mod media;
pub mod openai;
pub mod parsers;
pub mod passthrough;
pub mod payload;
pub mod protobuf;
pub mod rewrite;
pub mod scan;
pub mod sglang_http;
mod spans;
pub mod text;
pub mod vertexai;
pub mod vllm_grpc;
pub mod vllm_http;

pub use body::Body;
pub use early::{Early, EarlyBlocks, EarlyPrompt, EarlyText, EarlyWork, Reading, Settled};
pub use headers::{Header, Headers};
pub use payload::{
    ApiKind, Extent, MediaItem, ModelField, ParseError, Payload, Prompt, Segment, TextEncoding,
};

use crate::telemetry::trace::Span;

/// A parser turns the body of one API family into a [`Payload`]. Cost: one scan of the body.
pub trait Parser: Send + Sync + std::fmt::Debug {
    /// Plugin type, for example `openai-parser`.
    fn type_name(&self) -> &'static str;

    /// Path suffixes this parser claims, without leading slash. Empty: the parser is the fallback.
    fn path_suffixes(&self) -> &'static [&'static str];

    /// Application protocols the parser can read; empty means any.
    fn app_protocols(&self) -> &'static [AppProtocol];

    /// Reads a complete body that was sent to `path` (no query string, no trailing slash).
    fn parse(&self, path: &str, body: &Body) -> Result<Payload, ParseError>;

    /// Begins to read a body that will be sent to `path`, so that it is read while it arrives. `None`,
    /// the default, waits for the whole body.
    fn begin(&self, _path: &str) -> Option<Box<dyn Reading>> {
        None
    }
}

/// `InferencePool.spec.appProtocol`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AppProtocol {
    /// `http`.
    Http,
    /// `kubernetes.io/h2c`.
    H2c,
}

/// One request as the rooms behind `extproc` see it.
#[derive(Debug)]
pub struct InferenceRequest {
    /// `x-request-id`, or a UUIDv4 made here when the client sent none.
    pub id: String,
    /// Path without query string, after `x-original-path` and `x-forwarded-path` were considered.
    pub path: String,
    /// Request headers in arrival order, names in lower case.
    pub headers: Headers,
    /// Model named in the body; empty when the payload names none.
    pub model: String,
    /// Model that will be forwarded; differs from `model` after a rewrite.
    pub target_model: String,
    /// Priority of the objective; below zero means the request may be shed.
    pub priority: i32,
    /// Flow-control fairness id.
    pub fairness_id: String,
    /// Name of the objective header, empty when absent.
    pub objective: String,
    /// What the parser found.
    pub payload: Payload,
    /// The body as received.
    pub body: Body,
    /// What was made of the first prompt's text while the body arrived; `None` for short bodies and
    /// wherever the order of the prompt was not what it seemed.
    pub early: Option<Box<EarlyPrompt>>,
    /// The decision on this request; empty unless its trace is recorded.
    pub trace: Span,
}

impl InferenceRequest {
    /// A request with neutral values around `payload`; for producers, benches and tests.
    pub fn new(id: impl Into<String>, payload: Payload, body: Body) -> Self {
        let model = payload
            .model
            .as_ref()
            .map(|m| m.name.clone())
            .unwrap_or_default();
        Self {
            id: id.into(),
            path: "/v1/completions".to_owned(),
            headers: Headers::default(),
            target_model: model.clone(),
            model,
            priority: 0,
            fairness_id: "default-flow".to_owned(),
            objective: String::new(),
            payload,
            body,
            early: None,
            trace: Span::default(),
        }
    }
}
