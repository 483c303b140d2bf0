//! Our ext_proc stream in process: messages in, messages out, every order and body mode.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::too_many_lines,
    reason = "a test fails by panicking, and its tables are long"
)]

#[path = "wire_disagg.rs"]
mod disagg;
#[path = "wire_grpc.rs"]
mod grpc;
#[path = "wire_plugins.rs"]
mod plugins;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt;
use pinpod::config::{LoadOptions, builtin, load};
use pinpod::control::Director;
use pinpod::control::director::DirectorOptions;
use pinpod::datalayer::EndpointStore;
use pinpod::datalayer::discovery::list;
use pinpod::extproc::proto::body_mutation::Mutation;
use pinpod::extproc::proto::processing_request::Request;
use pinpod::extproc::proto::processing_response::Response;
use pinpod::extproc::proto::{
    BodySendMode, CommonResponse, HeaderMap, HeaderValue, HttpBody, HttpHeaders, HttpTrailers,
    ProcessingRequest, ProcessingResponse, ProtocolConfiguration,
};
use pinpod::extproc::service::ReplyStream;
use pinpod::extproc::stream::{Exchange, StreamSettings};
use pinpod::plugin::InFlightSlot;
use pinpod::telemetry::metrics::Metrics;
use proptest::prelude::*;

/// Reads no body.
const ANY_BODY: &str = "
apiVersion: llm-d.ai/v1alpha1
kind: EndpointPickerConfig
plugins:
- type: passthrough-parser
requestHandler: {parsers: [{pluginRef: passthrough-parser}]}
";

struct Picker {
    director: Arc<Director>,
    store: Arc<EndpointStore>,
    settings: StreamSettings,
}

fn picker(endpoints: &str) -> Picker {
    picker_with(None, endpoints)
}

fn picker_with(config: Option<&str>, endpoints: &str) -> Picker {
    let allowed = LoadOptions {
        allow_experimental: true,
    };
    let config = load(config, &allowed, &builtin::registry()).unwrap();
    let store = Arc::new(EndpointStore::default());
    for listener in &config.listeners {
        store.subscribe(Arc::clone(listener));
    }
    store.replace(list::parse(endpoints).unwrap());
    let options = DirectorOptions {
        ignore_subset: false,
        emit_scores: true,
        strip_control_headers: true,
        seed: Some(1),
    };
    let director = Director::new(
        Arc::clone(&store),
        config.activate(),
        options,
        Metrics::new(),
    );
    Picker {
        director: Arc::new(director),
        store,
        settings: StreamSettings::default(),
    }
}

impl Picker {
    fn exchange(&self) -> Exchange {
        Exchange::new(Arc::clone(&self.director), Arc::new(self.settings.clone()))
    }

    fn in_flight(&self) -> i64 {
        self.store
            .snapshot()
            .iter()
            .map(|e| e.in_flight(InFlightSlot::default()).requests())
            .sum()
    }
}

fn message(request: Request) -> ProcessingRequest {
    ProcessingRequest {
        request: Some(request),
        ..ProcessingRequest::default()
    }
}

fn with_modes(
    mut first: ProcessingRequest,
    request: BodySendMode,
    response: BodySendMode,
    early: bool,
) -> ProcessingRequest {
    first.protocol_config = Some(ProtocolConfiguration {
        request_body_mode: request.into(),
        response_body_mode: response.into(),
        send_body_without_waiting_for_header_response: early,
    });
    first
}

fn headers(lines: &[(&str, &str)], end_of_stream: bool) -> HttpHeaders {
    let headers = lines.iter().map(|(key, value)| HeaderValue {
        key: (*key).to_owned(),
        value: Bytes::new(),
        raw_value: Bytes::copy_from_slice(value.as_bytes()),
    });
    HttpHeaders {
        headers: Some(HeaderMap {
            headers: headers.collect(),
        }),
        end_of_stream,
    }
}

fn request_headers(end_of_stream: bool) -> ProcessingRequest {
    let lines = [
        (":path", "/v1/completions"),
        ("x-request-id", "id"),
        ("x-prefiller-host-port", "192.0.2.1:1"),
        ("x-slo-ttft-ms", "5"),
    ];
    message(Request::RequestHeaders(headers(&lines, end_of_stream)))
}

fn body(piece: &[u8], end_of_stream: bool) -> HttpBody {
    HttpBody {
        body: Bytes::copy_from_slice(piece),
        end_of_stream,
    }
}

fn request_body(piece: &[u8], end: bool) -> ProcessingRequest {
    message(Request::RequestBody(body(piece, end)))
}

fn response_headers(end: bool) -> ProcessingRequest {
    message(Request::ResponseHeaders(headers(
        &[(":status", "200")],
        end,
    )))
}

fn response_body(piece: &[u8], end: bool) -> ProcessingRequest {
    message(Request::ResponseBody(body(piece, end)))
}

fn drain(exchange: &mut Exchange) -> Vec<ProcessingResponse> {
    std::iter::from_fn(|| exchange.pop().map(ProcessingResponse::from)).collect()
}

/// Feeds messages and returns all replies.
fn run(
    exchange: &mut Exchange,
    messages: impl IntoIterator<Item = ProcessingRequest>,
) -> Vec<ProcessingResponse> {
    let mut replies = Vec::new();
    for message in messages {
        exchange.on_message(message.into()).unwrap();
        replies.extend(drain(exchange));
    }
    replies
}

fn kind(reply: &ProcessingResponse) -> &'static str {
    match reply.response.as_ref().unwrap() {
        Response::RequestHeaders(_) => "request headers",
        Response::ResponseHeaders(_) => "response headers",
        Response::RequestBody(_) => "request body",
        Response::ResponseBody(_) => "response body",
        Response::RequestTrailers(_) => "request trailers",
        Response::ResponseTrailers(_) => "response trailers",
        Response::ImmediateResponse(_) => "immediate",
    }
}

fn kinds(replies: &[ProcessingResponse]) -> Vec<&'static str> {
    replies.iter().map(kind).collect()
}

fn common(reply: &ProcessingResponse) -> CommonResponse {
    match reply.response.clone().unwrap() {
        Response::RequestHeaders(h) | Response::ResponseHeaders(h) => h.response.unwrap(),
        Response::RequestBody(b) | Response::ResponseBody(b) => b.response.unwrap(),
        other => panic!("{other:?} has no common response"),
    }
}

fn set_headers(reply: &ProcessingResponse) -> HashMap<String, String> {
    let mutation = common(reply).header_mutation.unwrap_or_default();
    let pairs = mutation.set_headers.into_iter().filter_map(|h| h.header);
    pairs
        .map(|h| (h.key, String::from_utf8(h.raw_value.to_vec()).unwrap()))
        .collect()
}

/// Body bytes sent back, and whether the last piece ended the stream.
fn streamed(replies: &[ProcessingResponse], wanted: &str) -> (Vec<u8>, bool) {
    let mut bytes = Vec::new();
    let mut ended = false;
    for reply in replies.iter().filter(|r| kind(r) == wanted) {
        assert!(!ended, "a piece after the end");
        let Some(Mutation::StreamedResponse(piece)) = common(reply).body_mutation.unwrap().mutation
        else {
            panic!("not streamed")
        };
        assert!(piece.body.len() <= 62_000);
        bytes.extend_from_slice(&piece.body);
        ended = piece.end_of_stream;
    }
    (bytes, ended)
}

fn immediate(reply: &ProcessingResponse) -> (i32, String) {
    let Some(Response::ImmediateResponse(reply)) = reply.response.clone() else {
        panic!("not immediate: {reply:?}")
    };
    (
        reply.status.unwrap().code,
        String::from_utf8(reply.body.to_vec()).unwrap(),
    )
}

const BODY: &[u8] = br#"{"model":"m","prompt":"hello"}"#;

#[test]
fn full_duplex_answers_headers_then_body_once_the_request_is_complete() {
    let picker = picker("10.0.0.7:8000");
    let mut exchange = picker.exchange();
    assert!(
        run(
            &mut exchange,
            [request_headers(false), request_body(BODY, false)]
        )
        .is_empty(),
        "deferred"
    );
    let replies = run(&mut exchange, [request_body(b"", true)]);
    assert_eq!(kinds(&replies), ["request headers", "request body"]);
    let set = set_headers(&replies[0]);
    assert_eq!(set["x-gateway-destination-endpoint"], "10.0.0.7:8000");
    assert_eq!(set["Content-Length"], BODY.len().to_string());
    assert_eq!(
        set.len(),
        2,
        "an id the client sent is not set again: {set:?}"
    );
    assert!(common(&replies[0]).clear_route_cache);
    let mut removed = common(&replies[0]).header_mutation.unwrap().remove_headers;
    removed.sort();
    // What steers sidecars is removed, sent or not; a gateway may keep headers from the picker.
    assert_eq!(
        removed,
        [
            "x-data-parallel-host-port",
            "x-encoder-hosts-ports",
            "x-kv-cache-source-host-port",
            "x-prefiller-host-port",
            "x-slo-ttft-ms"
        ]
    );
    let metadata = format!("{:?}", replies[0].dynamic_metadata);
    assert!(
        metadata.contains("envoy.lb") && metadata.contains("x-gateway-destination-endpoint-scores"),
        "{metadata}"
    );
    assert_eq!(streamed(&replies, "request body"), (BODY.to_vec(), true));
    assert_eq!(picker.in_flight(), 1);

    let replies = run(
        &mut exchange,
        [response_headers(false), response_body(b"{}", false)],
    );
    assert_eq!(kinds(&replies), ["response headers", "response body"]);
    assert_eq!(set_headers(&replies[0])["x-went-into-resp-headers"], "true");
    let replies = run(&mut exchange, [response_body(b"", true)]);
    assert_eq!(streamed(&replies, "response body"), (Vec::new(), true));
    assert_eq!(picker.in_flight(), 0);
    assert!(exchange.on_end());
}

#[test]
fn request_trailers_end_the_body() {
    let picker = picker("10.0.0.7:8000");
    let trailers = message(Request::RequestTrailers(HttpTrailers::default()));
    let replies = run(
        &mut picker.exchange(),
        [request_headers(false), request_body(BODY, false), trailers],
    );
    assert_eq!(
        kinds(&replies),
        ["request headers", "request body", "request trailers"]
    );
    assert_eq!(
        streamed(&replies, "request body"),
        (BODY.to_vec(), false),
        "trailers carry the end"
    );
}

#[test]
fn header_only_requests_and_responses() {
    let picker = picker("10.0.0.7:8000");
    let mut exchange = picker.exchange();
    let replies = run(&mut exchange, [request_headers(true)]);
    assert_eq!(kinds(&replies), ["request headers"]);
    assert!(!set_headers(&replies[0]).contains_key("Content-Length"));
    assert_eq!(picker.in_flight(), 0);
    assert_eq!(
        kinds(&run(&mut exchange, [response_headers(true)])),
        ["response headers"]
    );
    assert!(exchange.on_end());
}

#[test]
fn grpc_responses_end_with_trailers() {
    let picker = picker("10.0.0.7:8000");
    let mut exchange = picker.exchange();
    run(
        &mut exchange,
        [request_headers(false), request_body(BODY, true)],
    );
    let trailers = message(Request::ResponseTrailers(HttpTrailers::default()));
    let replies = run(
        &mut exchange,
        [
            response_headers(false),
            response_body(b"frame", false),
            trailers,
        ],
    );
    assert_eq!(
        kinds(&replies),
        ["response headers", "response body", "response trailers"]
    );
    assert_eq!(
        streamed(&replies, "response body"),
        (b"frame".to_vec(), false)
    );
    assert_eq!(picker.in_flight(), 0);
}

#[test]
fn buffered_mode_answers_each_message_once() {
    let picker = picker("10.0.0.7:8000");
    let mut exchange = picker.exchange();
    let first = with_modes(
        request_headers(false),
        BodySendMode::Buffered,
        BodySendMode::Buffered,
        false,
    );
    let replies = run(&mut exchange, [first]);
    assert_eq!(kinds(&replies), ["request headers"], "Envoy waits for it");
    assert_eq!(common(&replies[0]), CommonResponse::default());
    let replies = run(&mut exchange, [request_body(BODY, true)]);
    assert_eq!(kinds(&replies), ["request body"]);
    assert_eq!(
        set_headers(&replies[0])["x-gateway-destination-endpoint"],
        "10.0.0.7:8000"
    );
    assert!(
        common(&replies[0]).body_mutation.is_none(),
        "an unchanged body is not sent back"
    );
    let replies = run(
        &mut exchange,
        [response_headers(false), response_body(b"{}", true)],
    );
    assert_eq!(common(&replies[1]), CommonResponse::default());
    assert_eq!(picker.in_flight(), 0);
}

#[test]
fn streamed_mode_acknowledges_every_piece() {
    let picker = picker("10.0.0.7:8000");
    // Pieces may come before the headers are answered: the decision waits for the body.
    let first = with_modes(
        request_headers(false),
        BodySendMode::Streamed,
        BodySendMode::Streamed,
        true,
    );
    let mut exchange = picker.exchange();
    let (head, tail) = BODY.split_at(9);
    assert!(run(&mut exchange, [first, request_body(head, false)]).is_empty());
    let replies = run(&mut exchange, [request_body(tail, true)]);
    assert_eq!(
        kinds(&replies),
        ["request headers", "request body", "request body"]
    );
    // They may not: the decision is made by the headers alone.
    let first = with_modes(
        request_headers(false),
        BodySendMode::Streamed,
        BodySendMode::None,
        false,
    );
    let mut exchange = picker.exchange();
    assert_eq!(kinds(&run(&mut exchange, [first])), ["request headers"]);
    assert_eq!(
        kinds(&run(&mut exchange, [request_body(BODY, true)])),
        ["request body"]
    );
    // A body longer than Envoy may hold back is not waited for.
    let first = with_modes(
        request_headers(false),
        BodySendMode::Streamed,
        BodySendMode::Streamed,
        true,
    );
    let mut exchange = picker.exchange();
    let replies = run(
        &mut exchange,
        [first, request_body(&vec![b'x'; 40_000], false)],
    );
    assert_eq!(kinds(&replies), ["request headers", "request body"]);
}

#[test]
fn buffered_trailers_without_a_body_are_answered_with_the_destination_as_metadata() {
    let picker = picker_with(Some(ANY_BODY), "10.0.0.7:8000");
    let first = with_modes(
        request_headers(false),
        BodySendMode::Buffered,
        BodySendMode::Buffered,
        false,
    );
    let trailers = message(Request::RequestTrailers(HttpTrailers::default()));
    let replies = run(&mut picker.exchange(), [first, trailers]);
    // A second answer to the headers would be spurious.
    assert_eq!(kinds(&replies), ["request headers", "request trailers"]);
    let metadata = replies[1].dynamic_metadata.as_ref().unwrap();
    assert!(metadata.fields.contains_key("envoy.lb"));
}

#[test]
fn in_streamed_mode_the_first_piece_takes_a_rewritten_body() {
    let picker = picker("10.0.0.7:8000");
    let first = with_modes(
        message(Request::RequestHeaders(headers(
            &[
                (":path", "/v1/completions"),
                ("x-llm-d-model-name-rewrite", "other"),
            ],
            false,
        ))),
        BodySendMode::Streamed,
        BodySendMode::Streamed,
        true,
    );
    let (head, tail) = br#"{"model":"m","prompt":"p"}"#.split_at(9);
    let replies = run(
        &mut picker.exchange(),
        [
            first,
            request_body(head, false),
            request_body(tail, false),
            request_body(b"", true),
        ],
    );
    let pieces: Vec<_> = replies[1..]
        .iter()
        .map(|reply| common(reply).body_mutation.unwrap().mutation.unwrap())
        .collect();
    let whole = Bytes::from_static(br#"{"model":"other","prompt":"p"}"#);
    assert_eq!(
        pieces,
        [
            Mutation::Body(whole),
            Mutation::ClearBody(true),
            Mutation::ClearBody(true)
        ]
    );
}

#[test]
fn an_end_that_the_proxy_never_shows_is_no_abort() {
    let picker = picker("10.0.0.7:8000");
    // The mode of the response, what of it is shown, and whether its end is.
    for (mode, shown, normal) in [
        (BodySendMode::None, 0, true),
        (BodySendMode::None, 1, true),
        (BodySendMode::BufferedPartial, 0, false),
        (BodySendMode::BufferedPartial, 2, true),
        (BodySendMode::Streamed, 2, false),
    ] {
        let mut exchange = picker.exchange();
        let first = with_modes(
            request_headers(false),
            BodySendMode::FullDuplexStreamed,
            mode,
            false,
        );
        run(&mut exchange, [first, request_body(BODY, true)]);
        let response = [response_headers(false), response_body(b"{}", false)];
        run(&mut exchange, response.into_iter().take(shown));
        assert_eq!(exchange.on_end(), normal, "{mode:?} {shown}");
        assert_eq!(picker.in_flight(), 0);
    }
}

#[test]
fn bodies_over_the_limit_are_413_and_at_the_limit_pass() {
    let mut picker = picker("10.0.0.7:8000");
    picker.settings.max_body_bytes = BODY.len();
    let replies = run(
        &mut picker.exchange(),
        [request_headers(false), request_body(BODY, true)],
    );
    assert_eq!(kind(&replies[0]), "request headers");
    let mut exchange = picker.exchange();
    let replies = run(
        &mut exchange,
        [
            request_headers(false),
            request_body(BODY, false),
            request_body(b" ", true),
        ],
    );
    assert_eq!(immediate(&replies[0]).0, 413);
    assert!(exchange.is_closed());
    let announced = message(Request::RequestHeaders(headers(
        &[("content-length", "9999")],
        false,
    )));
    assert_eq!(
        immediate(&run(&mut picker.exchange(), [announced])[0]).0,
        413,
        "refused before the upload"
    );
}

#[test]
fn a_refusal_is_logged_with_the_id_of_its_request() {
    let (mut read, write) = std::io::pipe().unwrap();
    let subscriber = tracing_subscriber::fmt()
        .with_max_level(tracing::Level::DEBUG)
        .with_ansi(false)
        .with_writer(Arc::new(write))
        .finish();
    let mut picker = picker("10.0.0.7:8000");
    picker.settings.max_body_bytes = 5;
    tracing::subscriber::with_default(subscriber, || {
        for body in [&b"{"[..], b"too long"] {
            let messages = [request_headers(false), request_body(body, true)];
            assert_eq!(kinds(&run(&mut picker.exchange(), messages)), ["immediate"]);
        }
    });
    let mut log = String::new();
    std::io::Read::read_to_string(&mut read, &mut log).unwrap();
    assert_eq!(log.matches("request_id=\"id\"").count(), 2, "{log}");
}

#[test]
fn messages_out_of_order_end_the_stream_with_an_error() {
    let picker = picker("10.0.0.7:8000");
    assert!(
        picker
            .exchange()
            .on_message(request_body(BODY, true).into())
            .is_err()
    );
    let mut exchange = picker.exchange();
    exchange.on_message(request_headers(false).into()).unwrap();
    assert!(exchange.on_message(request_headers(false).into()).is_err());
    assert_eq!(picker.in_flight(), 0);
}

#[test]
fn an_abort_in_any_phase_releases_the_request() {
    let picker = picker("10.0.0.7:8000");
    let messages = [
        request_headers(false),
        request_body(BODY, true),
        response_headers(false),
        response_body(b"data: x\n\n", false),
    ];
    for phase in 0..=messages.len() {
        let mut exchange = picker.exchange();
        run(&mut exchange, messages[..phase].to_vec());
        drop(exchange);
        assert_eq!(picker.in_flight(), 0, "after {phase} messages");
    }
}

#[test]
fn observability_mode_gets_no_replies() {
    let picker = picker("10.0.0.7:8000");
    let first = ProcessingRequest {
        observability_mode: true,
        ..request_headers(false)
    };
    assert!(run(&mut picker.exchange(), [first, request_body(BODY, true)]).is_empty());
    assert_eq!(picker.in_flight(), 0);
}

#[tokio::test(start_paused = true)]
async fn an_upload_that_never_ends_is_refused_at_the_deadline() {
    let picker = picker("10.0.0.7:8000");
    let never = futures_util::stream::iter([Ok(request_headers(false).into())])
        .chain(futures_util::stream::pending());
    let mut replies = ReplyStream::new(Box::pin(never), Box::new(picker.exchange()), None);
    let started = tokio::time::Instant::now();
    let reply = replies.next().await.unwrap().unwrap().into();
    assert_eq!(started.elapsed().as_secs(), 120);
    assert_eq!(
        immediate(&reply),
        (
            503,
            "inference error: ServiceUnavailable - no decision within 120 s".to_owned()
        )
    );
    assert!(replies.next().await.is_none(), "closed with OK");
    assert_eq!(started.elapsed(), Duration::from_mins(2));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_chunking_forwards_the_same_bytes(
        prompt in "[a-z\"\\\\\u{e9}]{0,200}",
        cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..6),
        empty_end in any::<bool>(),
    ) {
        let picker = picker("10.0.0.7:8000,10.0.0.8:8000");
        let text = serde_json::json!({"model": "m", "prompt": format!("p{prompt}")}).to_string().into_bytes();
        let mut at: Vec<usize> = cuts.iter().map(|c| c.index(text.len())).collect();
        at.extend([0, text.len()]);
        at.sort_unstable();
        let mut messages = vec![request_headers(false)];
        messages.extend(at.windows(2).map(|w| request_body(&text[w[0]..w[1]], false)));
        if empty_end {
            messages.push(request_body(b"", true));
        } else if let Some(Request::RequestBody(last)) = messages.last_mut().and_then(|m| m.request.as_mut()) {
            last.end_of_stream = true;
        }
        let replies = run(&mut picker.exchange(), messages);
        prop_assert_eq!(streamed(&replies, "request body"), (text, true));
    }
}
