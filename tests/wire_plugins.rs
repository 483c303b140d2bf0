//! Plugins around a decision, seen through the gRPC service: a real HTTP/2 connection in memory.

use std::convert::Infallible;

use futures_util::stream::poll_fn;
use http_body_util::{BodyExt, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::service::TowerToHyperService;
use metrics_exporter_prometheus::PrometheusBuilder;
use pinpod::extproc::proto::value::Kind;
use pinpod::extproc::proto::{Metadata, Struct, Value};
use pinpod::extproc::service::{MessageLimits, PATH, Processor};
use pinpod::plugin::{Hook, TypedName};
use pinpod::scheduling::{Admitter, Candidate, Cycle, Denial};
use prost::Message as _;
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout};

use super::*;

const HEAD: &str = "apiVersion: llm-d.ai/v1alpha1\nkind: EndpointPickerConfig\nplugins:\n";
const THREE: &str = "10.0.0.7:8000,10.0.0.8:8000,10.0.0.9:8000";

fn configured(plugins: &str, endpoints: &str) -> Picker {
    picker_with(Some(&format!("{HEAD}{plugins}")), endpoints)
}

/// One ext_proc call over a connection of its own.
struct Call {
    messages: mpsc::Sender<ProcessingRequest>,
    replies: Incoming,
    received: Vec<u8>,
}

fn framed(message: &ProcessingRequest) -> Bytes {
    let bytes = message.encode_to_vec();
    let length = u32::try_from(bytes.len()).unwrap().to_be_bytes();
    [&[0], &length[..], &bytes].concat().into()
}

impl Call {
    async fn open(picker: &Picker) -> Self {
        let (client, server) = tokio::io::duplex(1 << 16);
        let limits = MessageLimits {
            receive: 1 << 20,
            send: 1 << 20,
        };
        let director = Arc::clone(&picker.director);
        let service = Processor::new(director, picker.settings.clone(), limits, None);
        let server = hyper::server::conn::http2::Builder::new(TokioExecutor::new())
            .serve_connection(TokioIo::new(server), TowerToHyperService::new(service));
        tokio::spawn(server);
        let (mut sender, connection) =
            hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(client))
                .await
                .unwrap();
        tokio::spawn(connection);
        let (messages, mut queue) = mpsc::channel::<ProcessingRequest>(16);
        let frames = poll_fn(move |cx| {
            let message = queue.poll_recv(cx);
            message.map(|m| m.map(|m| Ok::<_, Infallible>(Frame::data(framed(&m)))))
        });
        let request = http::Request::post(PATH)
            .header("content-type", "application/grpc")
            .body(StreamBody::new(frames))
            .unwrap();
        let response = sender.send_request(request).await.unwrap();
        assert_eq!(response.status(), 200);
        Self {
            messages,
            replies: response.into_body(),
            received: Vec::new(),
        }
    }

    async fn send(&self, messages: impl IntoIterator<Item = ProcessingRequest>) {
        for message in messages {
            self.messages.send(message).await.unwrap();
        }
    }

    /// The next reply; panics when the call ended.
    async fn reply(&mut self) -> ProcessingResponse {
        loop {
            let length = self.received.get(1..5).map(|length| {
                usize::try_from(u32::from_be_bytes(length.try_into().unwrap())).unwrap()
            });
            if let Some(end) = length
                .map(|n| 5 + n)
                .filter(|end| self.received.len() >= *end)
            {
                let reply = ProcessingResponse::decode(&self.received[5..end]).unwrap();
                self.received.drain(..end);
                return reply;
            }
            let Some(frame) = self.replies.frame().await else {
                panic!("the call ended")
            };
            let data = frame.unwrap().into_data().unwrap();
            self.received.extend_from_slice(&data);
        }
    }

    /// A call whose request was sent completely, with these headers besides the path.
    async fn ask(picker: &Picker, more: &[(&str, &str)], body: &[u8]) -> Self {
        let call = Self::open(picker).await;
        let lines = [&[(":path", "/v1/completions")], more].concat();
        call.send([
            message(Request::RequestHeaders(headers(&lines, false))),
            request_body(body, true),
        ])
        .await;
        call
    }

    /// The destination of a request that is routed.
    async fn destination(&mut self) -> String {
        let reply = self.reply().await;
        assert_eq!(kind(&reply), "request headers");
        let set = set_headers(&reply);
        assert_eq!(kind(&self.reply().await), "request body");
        set["x-gateway-destination-endpoint"].clone()
    }

    /// Headers set on the response to a request that was routed.
    async fn answered(&mut self, metadata: Option<Metadata>) -> HashMap<String, String> {
        let mut message = response_headers(false);
        message.metadata_context = metadata;
        self.send([message]).await;
        let reply = self.reply().await;
        assert_eq!(kind(&reply), "response headers");
        set_headers(&reply)
    }
}

#[tokio::test]
async fn a_session_token_leads_back_to_its_endpoint() {
    let picker = configured(
        "- {type: random-picker}
- {type: session-affinity-filter}
schedulingProfiles: [{name: default, plugins: [{pluginRef: session-affinity-filter}, {pluginRef: random-picker}]}]
",
        THREE,
    );
    // base64 of default/endpoint-0, -1 and -2, in the order of the list.
    let tokens = HashMap::from([
        ("10.0.0.7:8000", "ZGVmYXVsdC9lbmRwb2ludC0w"),
        ("10.0.0.8:8000", "ZGVmYXVsdC9lbmRwb2ludC0x"),
        ("10.0.0.9:8000", "ZGVmYXVsdC9lbmRwb2ludC0y"),
    ]);
    let mut seen = std::collections::HashSet::new();
    for first in 0..8 {
        let id = format!("first-{first}");
        let mut call = Call::ask(&picker, &[("x-request-id", &id)], BODY).await;
        let destination = call.destination().await;
        let token = call.answered(None).await["x-session-token"].clone();
        assert_eq!(token, tokens[destination.as_str()]);
        for next in 0..4 {
            let id = format!("next-{first}-{next}");
            let more = [("x-request-id", id.as_str()), ("x-session-token", &token)];
            let mut call = Call::ask(&picker, &more, BODY).await;
            assert_eq!(call.destination().await, destination);
        }
        seen.insert(destination);
    }
    assert!(seen.len() > 1, "the first requests were spread: {seen:?}");
}

fn structure(fields: &[(&str, Kind)]) -> Struct {
    let fields = fields.iter().map(|(name, kind)| {
        let value = Value {
            kind: Some(kind.clone()),
        };
        ((*name).to_owned(), value)
    });
    Struct {
        fields: fields.collect(),
    }
}

#[tokio::test]
async fn usage_is_reported_with_the_last_body_reply() {
    let picker = configured(
        "- type: request-attribute-reporter
  parameters:
    attributes:
    - key: {name: cost}
      expression: usage.prompt_tokens + 2.0 * usage.completion_tokens
      condition: has(usage.completion_tokens)
",
        "10.0.0.7:8000",
    );
    let mut call = Call::ask(&picker, &[], BODY).await;
    call.destination().await;
    call.answered(None).await;
    let head = br#"{"choices":[],"usage":{"prompt_tokens":3,"#;
    let tail = br#""completion_tokens":4,"total_tokens":7}}"#;
    call.send([response_body(head, false), response_body(tail, true)])
        .await;
    assert_eq!(call.reply().await.dynamic_metadata, None);
    // 3 + 2 * 4.
    let cost = structure(&[("cost", Kind::NumberValue(11.0))]);
    let wanted = structure(&[("envoy.lb", Kind::StructValue(cost))]);
    let last = call.reply().await;
    assert_eq!(kind(&last), "response body");
    assert_eq!(last.dynamic_metadata, Some(wanted));
}

#[tokio::test]
async fn the_endpoint_that_served_is_shown_to_conformance_tests() {
    let picker = configured(
        "- {type: destination-endpoint-served-verifier}\n",
        "10.0.0.7:8000",
    );
    let lb = |fields: &[(&str, Kind)]| {
        let filter_metadata = [("envoy.lb".to_owned(), structure(fields))].into();
        Some(Metadata { filter_metadata })
    };
    let served = Kind::StringValue("10.0.0.7:8000".to_owned());
    for (metadata, wanted) in [
        (
            lb(&[("x-gateway-destination-endpoint-served", served)]),
            "10.0.0.7:8000",
        ),
        (
            lb(&[]),
            "fail: missing destination endpoint served metadata",
        ),
        (None, "fail: missing envoy lb metadata"),
    ] {
        let mut call = Call::ask(&picker, &[], BODY).await;
        call.destination().await;
        let set = call.answered(metadata).await;
        assert_eq!(set["x-conformance-test-served-endpoint"], wanted);
    }
}

#[tokio::test]
async fn a_rollout_screener_pins_a_revision_or_refuses_with_503() {
    let picker = configured(
        "- type: disaggregatedset-rollout-screener
  parameters:
    scope: {labelSelector: app=llm}
    headerSelectors: [{name: revision, headerName: x-revision, labelKey: rev, mode: strict}]
    revisionGating: {mode: sum, requireRoles: {values: [decode]}, revisionLabelKey: rev, roleLabelKey: role}
",
        "10.0.0.7:8000;app=llm;rev=a;role=decode,10.0.0.8:8000;app=llm;rev=b;role=decode",
    );
    for (revision, address) in [("a", "10.0.0.7:8000"), ("b", "10.0.0.8:8000")] {
        let mut call = Call::ask(&picker, &[("x-revision", revision)], BODY).await;
        assert_eq!(call.destination().await, address);
        assert_eq!(call.answered(None).await["x-revision"], revision);
    }
    let mut call = Call::ask(&picker, &[("x-revision", "c")], BODY).await;
    let reply = call.reply().await;
    assert_eq!(
        immediate(&reply),
        (
            503,
            "inference error: ServiceUnavailable - screeners eliminated all endpoint candidates"
                .to_owned()
        )
    );
    let Some(Response::ImmediateResponse(refusal)) = reply.response else {
        panic!("{reply:?}")
    };
    let set = refusal
        .headers
        .unwrap()
        .set_headers
        .remove(0)
        .header
        .unwrap();
    assert_eq!(set.key, "x-llm-d-request-dropped-reason");
    assert_eq!(set.raw_value, "rejected-no-endpoints");
}

/// Refuses every request.
#[derive(Debug)]
struct Refuse {
    saturated: bool,
}

impl Admitter for Refuse {
    fn admit(&self, _: &Cycle<'_>, _: &[Candidate]) -> Result<(), Denial> {
        Err(Denial {
            reason: "not today".to_owned(),
            saturated: self.saturated,
        })
    }
}

#[tokio::test]
async fn an_admitter_that_lacks_capacity_is_answered_429() {
    for (saturated, code, name) in [(true, 429, "ResourceExhausted"), (false, 500, "Internal")] {
        let picker = picker("10.0.0.7:8000");
        let config = load(None, &LoadOptions::default(), &builtin::registry()).unwrap();
        let mut active = config.activate();
        let own = TypedName {
            type_name: "refuse",
            name: "refuse".to_owned(),
        };
        active.admitters = vec![Hook::new("Admission", own, Arc::new(Refuse { saturated }))];
        picker.director.activate(active);
        let mut call = Call::ask(&picker, &[], BODY).await;
        let text = format!("inference error: {name} - request cannot be admitted: not today");
        assert_eq!(immediate(&call.reply().await), (code, text));
        assert_eq!(picker.in_flight(), 0);
    }
}

#[tokio::test]
async fn a_request_may_insist_on_a_cached_prefix() {
    let picker = picker("10.0.0.7:8000");
    let prefer = [("prefer", "wait=10, If-Available;x=y")];
    let mut cold = Call::ask(&picker, &prefer, BODY).await;
    assert_eq!(
        immediate(&cold.reply().await),
        (
            412,
            "inference error: PreconditionFailed - no decode worker has the requested KV cache"
                .to_owned()
        )
    );
    let mut warming = Call::ask(&picker, &[], BODY).await;
    warming.destination().await;
    let mut warm = Call::ask(&picker, &prefer, BODY).await;
    assert_eq!(warm.destination().await, "10.0.0.7:8000");
}

#[tokio::test]
async fn an_agent_is_the_fairness_id_unless_the_client_names_one() {
    let recorder = PrometheusBuilder::new().build_recorder();
    let _local = metrics::set_default_local_recorder(&recorder);
    let picker = configured("- {type: agent-identity}\n", "10.0.0.7:8000");
    for more in [
        &[("x-claude-code-session-id", "agent-7")][..],
        &[
            ("x-claude-code-session-id", "agent-8"),
            ("x-llm-d-inference-fairness-id", "tenant-1"),
        ],
        &[],
    ] {
        Call::ask(&picker, more, BODY).await.destination().await;
    }
    let text = recorder.handle().render();
    for id in ["agent-7", "tenant-1", "default-flow"] {
        let label = format!("fairness_id=\"{id}\"");
        let counted = text.lines().any(|line| {
            line.starts_with("llm_d_epp_request_total{")
                && line.contains(&label)
                && line.ends_with(" 1")
        });
        assert!(counted, "{id}: {text}");
    }
    assert!(!text.contains("agent-8"), "{text}");
}

/// A window of 100 ms for `max` requests, over `THREE`.
fn burst(max: u32) -> Picker {
    configured(
        &format!(
            "- {{type: burst-prefix-cache-producer, parameters: {{windowDurationMs: 100, maxBatchSize: {max}}}}}
- {{type: prefix-cache-scorer, parameters: {{prefixMatchInfoProducerName: burst-prefix-cache-producer}}}}
"
        ),
        THREE,
    )
}

#[tokio::test(start_paused = true)]
async fn a_burst_is_held_until_its_window_closes_and_lands_together() {
    let picker = burst(1000);
    let began = Instant::now();
    let mut calls = Vec::new();
    for n in 0..6 {
        let id = format!("request-{n}");
        calls.push(Call::ask(&picker, &[("x-request-id", &id)], BODY).await);
    }
    let early = timeout(Duration::from_millis(99), calls[0].reply()).await;
    assert!(early.is_err(), "{early:?}");
    assert_eq!(picker.in_flight(), 0, "nothing is booked yet");
    let first = calls[0].destination().await;
    assert!(began.elapsed() >= Duration::from_millis(100));
    assert!(began.elapsed() < Duration::from_millis(110));
    for call in &mut calls[1..] {
        assert_eq!(call.destination().await, first);
    }
    assert!(began.elapsed() < Duration::from_millis(110));
    assert_eq!(picker.in_flight(), 6);
}

#[tokio::test(start_paused = true)]
async fn a_burst_is_no_cached_prefix() {
    let picker = burst(1000);
    let prefer = [("prefer", "if-available")];
    let mut calls = Vec::new();
    for _ in 0..2 {
        calls.push(Call::ask(&picker, &prefer, BODY).await);
    }
    // They were placed together, where nothing is cached yet.
    for call in &mut calls {
        assert_eq!(immediate(&call.reply().await).0, 412);
    }
}

#[tokio::test(start_paused = true)]
async fn a_client_that_leaves_inside_the_window_leaks_nothing() {
    let picker = burst(1);
    let settle = || tokio::time::sleep(Duration::from_millis(10));
    let gone = Call::ask(&picker, &[], BODY).await;
    settle().await;
    // The window is full: the producer fails, and the request goes on without it at once.
    let began = Instant::now();
    Call::ask(&picker, &[], BODY).await.destination().await;
    assert!(began.elapsed() < Duration::from_millis(10));
    settle().await;
    assert_eq!(picker.in_flight(), 0, "that call was dropped, too");
    drop(gone);
    settle().await;
    // Its place is free again: the next one is held to the end of the window, opened 30 ms ago.
    let mut next = Call::ask(&picker, &[], BODY).await;
    let held = timeout(Duration::from_millis(60), next.reply()).await;
    assert!(held.is_err(), "{held:?}");
    next.destination().await;
    assert_eq!(picker.in_flight(), 1);
    drop(next);
    settle().await;
    assert_eq!(picker.in_flight(), 0);
}
