//! The state machine of one HTTP request: every message Envoy may send, in every body mode.
//!
//! It does no I/O: [`Exchange::on_message`] takes a message and queues replies, [`Exchange::pop`]
//! hands them out in order. [`super::service`] moves them over gRPC. Dropping an exchange at any
//! point releases everything its request holds.
//!
//! Envoy ends every exchange with a reset or an end of input, after success and after an abort alike
//! (observed with 1.40), so what an end means is decided by the phase it finds.

use std::borrow::Cow;
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use tokio::time::Instant;
use tonic::Status;

use super::immediate::immediate;
use super::mutation::{self, Direction};
use super::proto::body_mutation::Mutation;
use super::proto::processing_request::Request;
use super::proto::value::Kind;
use super::proto::{
    BodySendMode, CommonResponse, HeaderMap, HttpHeaders, Metadata, ProcessingResponse,
    ProtocolConfiguration, Struct, Value,
};
use super::reply::{EncodedMetadata, HeaderChanges, Reply};
use super::wire::{Incoming, Slices, join};
use crate::control::{
    BodyKnowledge, Decision, Director, Intake, RequestError, Step, Subset, Waiting, received_id,
};
use crate::request::{Body, Early, Headers};
use crate::response::{Accounting, MetadataNumber, ModelNameRewriter, Served};
use crate::telemetry::trace::context::SpanContext;
use crate::telemetry::trace::{RequestTrace, Span, TRACEPARENT, TRACESTATE, Tracer, names};

/// Destination key in headers and metadata.
pub const DESTINATION: &str = "x-gateway-destination-endpoint";
/// Metadata namespace of the destination.
const DESTINATION_NAMESPACE: &str = "envoy.lb";
/// Scores by endpoint, beside the destination, with `--emit-endpoint-scores`.
const SCORES: &str = "x-gateway-destination-endpoint-scores";
/// The endpoint that answered, reported by the proxy.
const SERVED: &str = "x-gateway-destination-endpoint-served";
/// Metadata namespace of the subset hint.
const SUBSET_NAMESPACE: &str = "envoy.lb.subset_hint";
/// Key of the subset hint.
const SUBSET: &str = "x-gateway-destination-endpoint-subset";
/// Attributes namespace of the filter, and its attribute with the upstream address.
const FILTER_ATTRIBUTES: &str = "envoy.filters.http.ext_proc";
const UPSTREAM_ADDRESS: &str = "upstream.address";

/// In STREAMED mode Envoy stops reading the client once its buffer is full of unanswered pieces, so
/// a decision cannot wait for the end of a long body: past this many bytes it is made without the
/// prompt. The smallest buffer seen in published gateway configurations is 32 KiB.
const STREAMED_DECISION_BYTES: usize = 32 * 1024;

/// Bytes of an incomplete body from which on it is read as it arrives. A shorter one is still in the
/// processor's cache when its end comes.
const READ_AHEAD_BYTES: usize = 8 * 1024;

/// Limits of an exchange; the same for all.
#[derive(Debug, Clone)]
pub struct StreamSettings {
    /// Longest request body, `--max-request-body-bytes`; 413 past it.
    pub max_body_bytes: usize,
    /// Longest body piece sent back, `--max-body-chunk-bytes`. Some managed proxies refuse pieces
    /// over 64 KiB; the reference cuts at 62,000.
    pub max_chunk_bytes: usize,
    /// From the first message to the decision, `--decision-timeout`; 503 past it. Envoy sets no
    /// timer of its own in full duplex mode.
    pub decision_timeout: Duration,
    /// `--tracing`, and what the environment says.
    pub tracer: Tracer,
}

impl Default for StreamSettings {
    fn default() -> Self {
        Self {
            max_body_bytes: 64 << 20,
            max_chunk_bytes: 62_000,
            decision_timeout: Duration::from_mins(2),
            tracer: Tracer::default(),
        }
    }
}

/// How far the exchange is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// Nothing received.
    Start,
    /// Request headers received, no decision yet.
    Undecided,
    /// The decision is sent; what remains of the request passes through.
    Routed,
    /// Response headers were answered.
    Responding,
    /// The last message of the exchange was answered.
    Ended,
    /// `observability_mode`: Envoy ignores replies, so none is made.
    Passive,
}

/// STREAMED: messages that get their own replies once the headers are answered.
#[derive(Debug, Default)]
struct Unanswered {
    pieces: usize,
    trailers: bool,
}

/// A body that is read while it arrives.
#[derive(Debug, Default)]
enum ReadAhead {
    #[default]
    NotBegun,
    /// Its parser wants it whole.
    Unwanted,
    Begun(Early),
}

/// One HTTP request and its response.
#[derive(Debug)]
pub struct Exchange {
    director: Arc<Director>,
    settings: Arc<StreamSettings>,
    phase: Phase,
    request_mode: BodySendMode,
    response_mode: BodySendMode,
    /// STREAMED: the headers reply may wait for body pieces.
    headers_may_wait: bool,
    received_at: Instant,
    headers: Headers,
    body: Body,
    early: ReadAhead,
    subset: Subset,
    unanswered: Unanswered,
    request_ended: bool,
    /// A decision that waits for a data producer.
    waiting: Option<Box<Waiting>>,
    account: Option<Accounting>,
    model_names: Option<ModelNameRewriter>,
    /// From the request headers to the end of the stream.
    trace: RequestTrace,
    out: VecDeque<Reply>,
    closed: bool,
}

impl Exchange {
    /// An exchange before its first message.
    pub fn new(director: Arc<Director>, settings: Arc<StreamSettings>) -> Self {
        Self {
            director,
            settings,
            phase: Phase::Start,
            request_mode: BodySendMode::FullDuplexStreamed,
            response_mode: BodySendMode::FullDuplexStreamed,
            headers_may_wait: true,
            received_at: Instant::now(),
            headers: Headers::default(),
            body: Body::default(),
            early: ReadAhead::NotBegun,
            subset: Subset::Any,
            unanswered: Unanswered::default(),
            request_ended: false,
            waiting: None,
            account: None,
            model_names: None,
            trace: RequestTrace::default(),
            out: VecDeque::new(),
            closed: false,
        }
    }

    /// The next reply, if one is ready.
    pub fn pop(&mut self) -> Option<Reply> {
        self.out.pop_front()
    }

    /// True when the stream should be closed with OK once all replies are out.
    pub fn is_closed(&self) -> bool {
        self.closed
    }

    /// When the decision is due; `None` once it was made.
    pub fn deadline(&self) -> Option<Instant> {
        (self.phase == Phase::Undecided).then(|| self.received_at + self.settings.decision_timeout)
    }

    /// Goes on with a decision that waits. True when that brought it further.
    pub fn poll_decision(&mut self, cx: &mut Context<'_>) -> bool {
        let Some(waiting) = &mut self.waiting else {
            return false;
        };
        let Poll::Ready(prepared) = waiting.poll(cx) else {
            return false;
        };
        if let Some(waiting) = self.waiting.take() {
            let step = self.director.resume(*waiting, prepared);
            self.on_step(step);
        }
        true
    }

    /// The decision did not come in time.
    pub fn on_deadline(&mut self) {
        let seconds = self.settings.decision_timeout.as_secs();
        self.refuse_early(&RequestError::DecisionTimeout { seconds });
    }

    /// The stream ended or was reset. Returns true when that is the normal end.
    pub fn on_end(&mut self) -> bool {
        // In these modes the end of the response is never shown.
        let unseen = match self.response_mode {
            BodySendMode::None => matches!(self.phase, Phase::Routed | Phase::Responding),
            BodySendMode::BufferedPartial => self.phase == Phase::Responding,
            _ => false,
        };
        let over = matches!(self.phase, Phase::Ended | Phase::Start | Phase::Passive);
        let normal = self.closed || over || unseen;
        if !normal {
            let phase = self.phase_name();
            self.director.note_abort(phase);
            self.trace.span.fail(phase);
        }
        self.trace.span = Span::default();
        self.waiting = None;
        self.account = None;
        normal
    }

    /// The stream ends with an error of ours, called `code`.
    pub fn note_failure(&mut self, code: &'static str) {
        self.trace.span.fail(code);
    }

    /// Handles one message. An error ends the RPC; Envoy then applies its failure mode.
    pub fn on_message(&mut self, incoming: Incoming) -> Result<(), Status> {
        let Incoming { message, body } = incoming;
        if self.phase == Phase::Start {
            if message.observability_mode {
                self.phase = Phase::Passive;
            }
            self.read_modes(message.protocol_config);
        }
        if self.closed || self.phase == Phase::Passive {
            return Ok(());
        }
        let metadata = message.metadata_context;
        match message.request {
            Some(Request::RequestHeaders(headers)) => {
                self.on_request_headers(headers, metadata.as_ref())
            }
            Some(Request::RequestBody(piece)) => {
                self.on_request_body(body, piece.end_of_stream, metadata.as_ref())
            }
            Some(Request::RequestTrailers(_)) => self.on_request_trailers(metadata.as_ref()),
            Some(Request::ResponseHeaders(headers)) => {
                self.on_response_headers(headers, metadata.as_ref(), &message.attributes);
                Ok(())
            }
            Some(Request::ResponseBody(piece)) => {
                self.on_response_body(body, piece.end_of_stream);
                Ok(())
            }
            Some(Request::ResponseTrailers(_)) => {
                self.on_response_trailers();
                Ok(())
            }
            // A message kind newer than our protos: nothing to answer.
            None => Ok(()),
        }
    }

    fn read_modes(&mut self, config: Option<ProtocolConfiguration>) {
        if let Some(config) = config {
            self.request_mode = config.request_body_mode();
            self.response_mode = config.response_body_mode();
            self.headers_may_wait = config.send_body_without_waiting_for_header_response;
        }
    }

    // -- request ------------------------------------------------------------------------------

    fn on_request_headers(
        &mut self,
        message: HttpHeaders,
        metadata: Option<&Metadata>,
    ) -> Result<(), Status> {
        if self.phase != Phase::Start {
            return Err(Status::invalid_argument("request headers arrived twice"));
        }
        self.phase = Phase::Undecided;
        self.received_at = Instant::now();
        self.headers = read_headers(message.headers);
        self.trace = self
            .settings
            .tracer
            .start(|| trace_context(&self.headers), || names::GATEWAY_REQUEST);
        self.read_subset(metadata);
        if message.end_of_stream {
            self.request_ended = true;
            self.decide(BodyKnowledge::Absent);
            return Ok(());
        }
        if self.announced_length() > self.settings.max_body_bytes {
            self.refuse_too_large();
            return Ok(());
        }
        match self.request_mode {
            BodySendMode::FullDuplexStreamed => {}
            BodySendMode::Streamed if self.headers_may_wait => {}
            BodySendMode::Buffered | BodySendMode::BufferedPartial => {
                self.send(mutation::headers(
                    Direction::Request,
                    CommonResponse::default(),
                    None,
                ));
            }
            // The body comes only after the headers were answered, or not at all.
            BodySendMode::Streamed | BodySendMode::None | BodySendMode::Grpc => {
                self.decide(BodyKnowledge::Unseen);
            }
        }
        Ok(())
    }

    fn on_request_body(
        &mut self,
        slices: Slices,
        end_of_stream: bool,
        metadata: Option<&Metadata>,
    ) -> Result<(), Status> {
        match self.phase {
            Phase::Start => {
                return Err(Status::invalid_argument(
                    "request body arrived before its headers",
                ));
            }
            Phase::Undecided if self.waiting.is_some() => {
                return self.hold_request_piece(end_of_stream);
            }
            Phase::Undecided => {}
            _ => {
                self.pass_request_piece(slices, end_of_stream);
                return Ok(());
            }
        }
        self.read_subset(metadata);
        let received: usize = slices.iter().map(Bytes::len).sum();
        if self.body.len() + received > self.settings.max_body_bytes {
            self.refuse_too_large();
            return Ok(());
        }
        slices.into_iter().for_each(|slice| self.body.push(slice));
        self.unanswered.pieces += 1;
        self.request_ended = end_of_stream;
        match self.request_mode {
            BodySendMode::Buffered => self.decide(BodyKnowledge::Complete),
            BodySendMode::BufferedPartial => self.decide(BodyKnowledge::MaybeCut),
            BodySendMode::Streamed
                if !end_of_stream && self.body.len() >= STREAMED_DECISION_BYTES =>
            {
                self.decide(BodyKnowledge::Unseen);
            }
            _ if end_of_stream => self.decide(BodyKnowledge::Complete),
            _ => self.read_ahead(),
        }
        Ok(())
    }

    /// More of the body is to come: reads what is there while it is hot.
    fn read_ahead(&mut self) {
        if self.body.len() < READ_AHEAD_BYTES {
            return;
        }
        if let ReadAhead::NotBegun = self.early {
            let early = self.director.read_early(&self.headers);
            self.early = early.map_or(ReadAhead::Unwanted, ReadAhead::Begun);
        }
        if let ReadAhead::Begun(early) = &mut self.early {
            early.advance(&self.body);
        }
    }

    /// Trailers end the body: its last piece came without an end-of-stream mark.
    fn on_request_trailers(&mut self, metadata: Option<&Metadata>) -> Result<(), Status> {
        if self.phase == Phase::Start {
            return Err(Status::invalid_argument(
                "request trailers arrived before headers",
            ));
        }
        if self.phase == Phase::Undecided {
            self.unanswered.trailers = true;
            if self.waiting.is_none() {
                self.read_subset(metadata);
                self.decide(BodyKnowledge::Complete);
            }
        } else {
            self.send(mutation::trailers(Direction::Request));
        }
        Ok(())
    }

    /// A piece that arrives while the decision waits. Only STREAMED decides before the end of the
    /// body; there Envoy keeps the piece and wants nothing but a reply.
    fn hold_request_piece(&mut self, end_of_stream: bool) -> Result<(), Status> {
        if self.request_mode == BodySendMode::FullDuplexStreamed {
            return Err(Status::invalid_argument(
                "request body arrived after its end",
            ));
        }
        self.unanswered.pieces += 1;
        self.request_ended |= end_of_stream;
        Ok(())
    }

    /// A piece that arrives after the decision goes back as it is.
    fn pass_request_piece(&mut self, slices: Slices, end_of_stream: bool) {
        match self.request_mode {
            BodySendMode::FullDuplexStreamed => {
                self.stream_back(Direction::Request, slices, end_of_stream);
            }
            _ => self.send(mutation::body(
                Direction::Request,
                CommonResponse::default(),
                None,
            )),
        }
    }

    fn decide(&mut self, knowledge: BodyKnowledge) {
        let intake = Intake {
            headers: std::mem::take(&mut self.headers),
            body: std::mem::take(&mut self.body),
            early: match std::mem::take(&mut self.early) {
                ReadAhead::Begun(early) => Some(early),
                ReadAhead::NotBegun | ReadAhead::Unwanted => None,
            },
            subset: std::mem::take(&mut self.subset),
            received_at: self.received_at,
            trace: match knowledge {
                // Nothing is decided by what such a request wants.
                BodyKnowledge::Absent => Span::default(),
                _ => self.trace.span.child(names::ORCHESTRATION),
            },
        };
        let step = self.director.decide(intake, knowledge);
        self.on_step(step);
    }

    fn on_step(&mut self, step: Step) {
        match step {
            Step::Wait(waiting) => self.waiting = Some(waiting),
            Step::Done(Ok(decision)) => self.route(*decision),
            Step::Done(Err(error)) => self.refuse(&error),
        }
    }

    fn route(&mut self, decision: Decision) {
        self.phase = Phase::Routed;
        let Decision {
            destination,
            scores,
            set_headers,
            remove_headers,
            body,
            rewritten,
            account,
            skip_response,
        } = decision;
        let metadata = routing_metadata(&destination, scores);
        let mut set = Vec::with_capacity(set_headers.len() + 3);
        set.push((Cow::Borrowed(DESTINATION), destination));
        set.extend(
            set_headers
                .into_iter()
                .map(|(name, value)| (Cow::Borrowed(name), value)),
        );
        let mut remove = remove_headers;
        self.propagate(&mut set, &mut remove);
        let mut changes = HeaderChanges {
            direction: Direction::Request,
            set,
            remove,
            clear_route_cache: true,
            metadata: Some(metadata),
        };
        match self.request_mode {
            BodySendMode::FullDuplexStreamed => {
                if !body.is_empty() {
                    changes.set.push(content_length(body.len()));
                }
                self.send(changes);
                // A header-only request has no body to return; one with trailers ends with them.
                if self.unanswered.pieces > 0 {
                    self.stream_back(Direction::Request, body.into_pieces(), self.request_ended);
                }
            }
            BodySendMode::Buffered | BodySendMode::BufferedPartial
                if self.unanswered.pieces > 0 =>
            {
                if rewritten {
                    changes.set.push(content_length(body.len()));
                }
                let whole = rewritten.then(|| Bytes::from(body.copy_range(0..body.len())));
                self.send(changes.with_whole_body(whole));
            }
            // Trailers and no body: the headers were answered, only metadata can still be sent.
            BodySendMode::Buffered | BodySendMode::BufferedPartial if self.unanswered.trailers => {
                self.unanswered.trailers = false;
                self.send(changes.with_trailers());
            }
            _ => {
                self.send(changes);
                let mut whole = rewritten.then_some(body);
                for _ in 0..self.unanswered.pieces {
                    self.send(streamed_piece(rewritten, whole.take()));
                }
            }
        }
        self.unanswered.pieces = 0;
        if std::mem::take(&mut self.unanswered.trailers) {
            self.send(mutation::trailers(Direction::Request));
        }
        // Leaving is safe only once the whole request was given back and before the response starts.
        if skip_response && self.request_ended {
            self.phase = Phase::Ended;
            self.closed = true;
            return;
        }
        // A body that kept its model name gets that name back from the engine. In a gRPC response
        // another name would also make the lengths around it wrong.
        self.model_names = rewritten.then(|| account.model_name_rewriter()).flatten();
        self.account = Some(account);
    }

    /// Tells those behind us where in the trace the request is, also when it is not recorded: they are
    /// not to decide anew. Trace state and baggage stay as they came, unless the state is of no trace.
    fn propagate(&self, set: &mut Vec<(Cow<'static, str>, Bytes)>, remove: &mut Vec<String>) {
        let Some(context) = &self.trace.context else {
            return;
        };
        set.push((
            Cow::Borrowed(TRACEPARENT),
            Bytes::from(context.traceparent()),
        ));
        if self.trace.is_root {
            remove.push(TRACESTATE.to_owned());
        }
    }

    fn announced_length(&self) -> usize {
        self.headers
            .get_str("content-length")
            .and_then(|v| v.trim().parse().ok())
            .unwrap_or(0)
    }

    fn refuse_too_large(&mut self) {
        let limit = self.settings.max_body_bytes;
        self.refuse_early(&RequestError::BodyTooLarge { limit });
    }

    /// Refuses before the director saw the request.
    fn refuse_early(&mut self, error: &RequestError) {
        let id = received_id(&self.headers).unwrap_or_default();
        self.director.note_refusal(error, self.received_at, id);
        self.refuse(error);
    }

    fn refuse(&mut self, error: &RequestError) {
        self.trace.span.fail(error.code());
        self.send(immediate(error));
        self.phase = Phase::Ended;
        self.closed = true;
        self.body = Body::default();
        self.waiting = None;
    }

    /// The hint is attached to every message; the latest one that carries it counts.
    fn read_subset(&mut self, metadata: Option<&Metadata>) {
        let hint = metadata
            .and_then(|m| m.filter_metadata.get(SUBSET_NAMESPACE))
            .and_then(|s| s.fields.get(SUBSET))
            .and_then(read_subset);
        if let Some(subset) = hint {
            self.subset = subset;
        }
    }

    // -- response -----------------------------------------------------------------------------

    fn on_response_headers(
        &mut self,
        message: HttpHeaders,
        metadata: Option<&Metadata>,
        attributes: &BTreeMap<String, Struct>,
    ) {
        let headers = read_headers(message.headers);
        let status = headers.get_str(":status").and_then(|s| s.parse().ok());
        if let Some(status @ 500u16..) = status {
            self.trace.span.fail(format!("status {status}"));
        }
        let mut set = vec![(
            Cow::Borrowed("x-went-into-resp-headers"),
            Bytes::from_static(b"true"),
        )];
        if let Some(account) = &mut self.account {
            let added =
                account.on_response_headers(&headers, served_endpoint(metadata, attributes));
            set.extend(added.into_iter().map(|(name, value)| (name.into(), value)));
        }
        self.send(HeaderChanges {
            direction: Direction::Response,
            set,
            remove: Vec::new(),
            clear_route_cache: false,
            metadata: None,
        });
        self.phase = Phase::Responding;
        if message.end_of_stream {
            self.end_response();
        }
    }

    fn on_response_body(&mut self, slices: Slices, end_of_stream: bool) {
        if let Some(account) = &mut self.account {
            account.on_response_piece(&slices);
        }
        if self.response_mode == BodySendMode::FullDuplexStreamed {
            match &mut self.model_names {
                None => self.stream_back(Direction::Response, slices, end_of_stream),
                Some(rewriter) => {
                    let pieces = rewriter.push(join(&slices), end_of_stream);
                    self.stream_back(Direction::Response, pieces, end_of_stream);
                }
            }
        } else {
            let common = self.rewritten_piece(&join(&slices), end_of_stream);
            self.send(mutation::body(Direction::Response, common, None));
        }
        if end_of_stream {
            self.end_response();
        }
    }

    /// STREAMED and BUFFERED: one reply a message, with the body only where a model name changed.
    fn rewritten_piece(&mut self, piece: &Bytes, last: bool) -> CommonResponse {
        let Some(rewriter) = &mut self.model_names else {
            return CommonResponse::default();
        };
        // Neither buffered mode brings a second piece.
        let buffered = matches!(
            self.response_mode,
            BodySendMode::Buffered | BodySendMode::BufferedPartial
        );
        let pieces: Body = rewriter
            .push(piece.clone(), last || buffered)
            .into_iter()
            .collect();
        let whole = Bytes::from(pieces.copy_range(0..pieces.len()));
        if whole == *piece {
            return CommonResponse::default();
        }
        let length = whole.len();
        let mut common = mutation::with_body(Mutation::Body(whole));
        if self.response_mode == BodySendMode::Buffered {
            let (name, value) = content_length(length);
            let set = vec![mutation::set_header(&name, value)];
            common.header_mutation = mutation::with_headers(set, Vec::new(), false).header_mutation;
        }
        common
    }

    fn on_response_trailers(&mut self) {
        if let Some(rewriter) = &mut self.model_names
            && self.response_mode == BodySendMode::FullDuplexStreamed
        {
            let rest = rewriter.push(Bytes::new(), true);
            self.stream_back(Direction::Response, rest, false);
        }
        self.send(mutation::trailers(Direction::Response));
        self.end_response();
    }

    /// Ends the exchange; what plugins report travels with the last reply.
    fn end_response(&mut self) {
        let metadata = self.account.take().map(Accounting::complete);
        if let (Some(numbers), Some(last)) = (metadata, self.out.back_mut())
            && !numbers.is_empty()
        {
            last.set_metadata(&response_metadata(numbers));
        }
        self.phase = Phase::Ended;
    }

    // -- shared -------------------------------------------------------------------------------

    fn send(&mut self, reply: impl Into<Reply>) {
        self.out.push_back(reply.into());
    }

    fn stream_back(
        &mut self,
        direction: Direction,
        pieces: impl IntoIterator<Item = Bytes>,
        end: bool,
    ) {
        let out = &mut self.out;
        mutation::stream_pieces(
            direction,
            pieces,
            self.settings.max_chunk_bytes,
            end,
            &mut |reply| {
                out.push_back(reply);
            },
        );
    }

    fn phase_name(&self) -> &'static str {
        match self.phase {
            Phase::Start => "start",
            Phase::Undecided => "upload",
            Phase::Routed => "upstream",
            Phase::Responding => "response",
            Phase::Ended => "ended",
            Phase::Passive => "passive",
        }
    }
}

/// Where in a trace the request is; two contexts are none.
fn trace_context(headers: &Headers) -> Option<SpanContext> {
    let mut given = headers.iter().filter(|h| h.name == TRACEPARENT);
    let only = given.next().filter(|_| given.next().is_none())?;
    SpanContext::parse(std::str::from_utf8(&only.value).ok()?)
}

fn content_length(bytes: usize) -> (Cow<'static, str>, Bytes) {
    (
        Cow::Borrowed("Content-Length"),
        Bytes::from(bytes.to_string()),
    )
}

/// Values come in `raw_value` from Envoy and, for pseudo headers, in `value` from agentgateway.
fn read_headers(map: Option<HeaderMap>) -> Headers {
    let lines = map.map(|m| m.headers).unwrap_or_default();
    lines
        .into_iter()
        .map(|h| {
            (
                h.key,
                if h.raw_value.is_empty() {
                    h.value
                } else {
                    h.raw_value
                },
            )
        })
        .collect()
}

/// STREAMED: the reply to one of the pieces that were held. Of a rewritten body the first takes all.
fn streamed_piece(rewritten: bool, whole: Option<Body>) -> ProcessingResponse {
    let mutation = match whole {
        Some(body) => Mutation::Body(Bytes::from(body.copy_range(0..body.len()))),
        None => Mutation::ClearBody(true),
    };
    let common = if rewritten {
        mutation::with_body(mutation)
    } else {
        CommonResponse::default()
    };
    mutation::body(Direction::Request, common, None)
}

/// A list of `ip:port` or one comma-separated string; another type is no hint.
fn read_subset<'a>(value: &'a Value) -> Option<Subset> {
    let text = |value: &'a Value| match &value.kind {
        Some(Kind::StringValue(text)) => Some(text.as_str()),
        _ => None,
    };
    let entries = |text: &'a str| text.split(',').map(str::trim);
    match value.kind.as_ref()? {
        Kind::ListValue(list) => {
            let texts = list.values.iter().filter_map(text);
            Some(Subset::only(texts.flat_map(entries)))
        }
        Kind::StringValue(text) => Some(Subset::only(entries(text))),
        _ => None,
    }
}

fn served_endpoint<'a>(
    metadata: Option<&'a Metadata>,
    attributes: &'a BTreeMap<String, Struct>,
) -> Served<'a> {
    let string = |value: &'a Value| match &value.kind {
        Some(Kind::StringValue(text)) => Some(text.as_str()),
        _ => None,
    };
    let namespace = metadata.and_then(|m| m.filter_metadata.get(DESTINATION_NAMESPACE));
    let reported = namespace
        .and_then(|s| s.fields.get(SERVED))
        .and_then(string);
    let attribute = || {
        attributes
            .get(FILTER_ATTRIBUTES)
            .and_then(|s| s.fields.get(UPSTREAM_ADDRESS))
            .and_then(string)
    };
    match (reported.or_else(attribute), namespace) {
        (Some(served), _) => Served::By(served),
        (None, Some(_)) => Served::NoKey,
        (None, None) => Served::NoNamespace,
    }
}

/// Numbers by namespace and name.
fn response_metadata(numbers: Vec<MetadataNumber>) -> Struct {
    let mut namespaces: Vec<(String, Vec<(String, Value)>)> = Vec::new();
    for number in numbers {
        let field = (number.name, mutation::number_value(number.value));
        match namespaces.iter_mut().find(|(n, _)| *n == number.namespace) {
            Some((_, fields)) => fields.push(field),
            None => namespaces.push((number.namespace, vec![field])),
        }
    }
    mutation::structure(namespaces.into_iter().map(|(namespace, fields)| {
        (
            namespace,
            mutation::struct_value(mutation::structure(fields)),
        )
    }))
}

fn routing_metadata(destination: &Bytes, scores: Option<Vec<(String, f64)>>) -> EncodedMetadata {
    let Some(scores) = scores else {
        return EncodedMetadata::of_text(DESTINATION_NAMESPACE, DESTINATION, destination);
    };
    let numbers = scores
        .into_iter()
        .map(|(endpoint, score)| (endpoint, mutation::number_value(score)));
    let fields = [
        (
            DESTINATION.to_owned(),
            mutation::string_value(&String::from_utf8_lossy(destination)),
        ),
        (
            SCORES.to_owned(),
            mutation::struct_value(mutation::structure(numbers)),
        ),
    ];
    let routing = mutation::struct_value(mutation::structure(fields));
    (&mutation::structure([(DESTINATION_NAMESPACE.to_owned(), routing)])).into()
}
