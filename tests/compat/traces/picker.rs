//! Spans of the picker, held against the table of the contract.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;

use bytes::Bytes;
use futures_util::stream;
use pinpod::demo::processes::free_ports;
use pinpod::doctor::grpc::{Channel, origin};
use pinpod::extproc::proto::external_processor_client::ExternalProcessorClient;
use pinpod::extproc::proto::processing_request::Request;
use pinpod::extproc::proto::processing_response::Response;
use pinpod::extproc::proto::{
    BodySendMode, HeaderMap, HeaderValue, HttpBody, HttpHeaders, ProcessingRequest,
    ProcessingResponse, ProtocolConfiguration,
};
use serde_json::{Value, json};
use tokio::time::Instant;

use super::collector::{Collector, Moods, Received, Running, until};

/// The example of the W3C recommendation.
const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const PARENT: &str = "00f067aa0ba902b7";

const PD: &str = r#"apiVersion: llm-d.ai/v1alpha1
kind: EndpointPickerConfig
plugins:
- {type: file-discovery, parameters: {path: "ENDPOINTS"}}
- {type: prefill-filter}
- {type: decode-filter}
- {type: queue-scorer, name: shortest}
- {type: prefix-cache-scorer, parameters: {prefixMatchInfoProducerName: precise-prefix-cache-producer}}
- {type: token-producer}
- {type: precise-prefix-cache-producer, parameters: {kvEventsConfig: {discoverPods: false}}}
- {type: prefix-based-pd-decider, parameters: {nonCachedTokens: 16}}
- {type: disagg-profile-handler, parameters: {deciders: {prefill: prefix-based-pd-decider}}}
dataLayer: {discovery: {pluginRef: file-discovery}}
schedulingProfiles:
- {name: prefill, plugins: [{pluginRef: prefill-filter}, {pluginRef: shortest, weight: 2}]}
- {name: decode, plugins: [{pluginRef: decode-filter}, {pluginRef: shortest, weight: 2}, {pluginRef: prefix-cache-scorer}]}
"#;

/// Six endpoints to decode on, so that the five best are fewer, and one to prefill on.
fn endpoints() -> Value {
    let endpoint = |name: String, port: u16, role: &str| {
        json!({
            "name": name, "namespace": "ns", "address": "127.0.0.1", "port": port.to_string(),
            "labels": {"llm-d.ai/role": role},
        })
    };
    let decode = (1..=6).map(|n| endpoint(format!("d{n}"), n, "decode"));
    let all: Vec<_> = decode
        .chain([endpoint("p".to_owned(), 7, "prefill")])
        .collect();
    json!({ "endpoints": all })
}

struct Picker {
    process: Running,
    grpc: u16,
    metrics: u16,
}

impl Picker {
    async fn start(flags: &[String], environment: &[(&str, &str)]) -> Self {
        let [grpc, health, metrics] = free_ports().unwrap();
        let mut arguments = vec![
            "serve".to_owned(),
            format!("--grpc-port={grpc}"),
            format!("--grpc-health-port={health}"),
            format!("--metrics-port={metrics}"),
            "--drain-timeout=0s".to_owned(),
            "--secure-serving=false".to_owned(),
        ];
        arguments.extend_from_slice(flags);
        let process = Running::start(&arguments, environment, &[grpc, metrics]).await;
        Self {
            process,
            grpc,
            metrics,
        }
    }

    /// Over one endpoint.
    async fn simple(environment: &[(&str, &str)]) -> Self {
        Self::start(&["--endpoints=127.0.0.1:1".to_owned()], environment).await
    }

    async fn channel(&self) -> Channel {
        Channel::connect(([127, 0, 0, 1], self.grpc).into(), false)
            .await
            .unwrap()
    }

    async fn total(&self, result: &str) -> u64 {
        let address = ([127, 0, 0, 1], self.metrics).into();
        let (_, body) = pinpod::doctor::http::get(address, false, "/metrics")
            .await
            .unwrap();
        let text = String::from_utf8(body.to_vec()).unwrap();
        let name = format!("pinpod_trace_spans_total{{result=\"{result}\"}} ");
        let line = text.lines().find_map(|line| line.strip_prefix(&name));
        line.map_or(0, |number| number.parse().unwrap())
    }
}

fn header(key: &str, value: &str) -> HeaderValue {
    HeaderValue {
        key: key.to_owned(),
        raw_value: Bytes::copy_from_slice(value.as_bytes()),
        value: Bytes::new(),
    }
}

fn message(request: Request) -> ProcessingRequest {
    let full_duplex = BodySendMode::FullDuplexStreamed.into();
    ProcessingRequest {
        request: Some(request),
        protocol_config: Some(ProtocolConfiguration {
            request_body_mode: full_duplex,
            response_body_mode: full_duplex,
            send_body_without_waiting_for_header_response: false,
        }),
        ..ProcessingRequest::default()
    }
}

fn headers(lines: &[(&str, &str)], end_of_stream: bool) -> HttpHeaders {
    HttpHeaders {
        headers: Some(HeaderMap {
            headers: lines
                .iter()
                .map(|(key, value)| header(key, value))
                .collect(),
        }),
        end_of_stream,
    }
}

/// An exchange with these request headers, body and response status; all replies.
async fn exchange(
    channel: &Channel,
    more: &[(&str, &str)],
    body: &str,
    status: &str,
) -> Vec<ProcessingResponse> {
    let mut lines = vec![
        (":path", "/v1/completions"),
        (":method", "POST"),
        ("x-request-id", "the-request"),
    ];
    lines.extend_from_slice(more);
    let piece = |body: &str| HttpBody {
        body: Bytes::copy_from_slice(body.as_bytes()),
        end_of_stream: true,
    };
    let messages = [
        message(Request::RequestHeaders(headers(&lines, false))),
        message(Request::RequestBody(piece(body))),
        message(Request::ResponseHeaders(headers(
            &[(":status", status)],
            false,
        ))),
        message(Request::ResponseBody(piece("{}"))),
    ];
    let mut client = ExternalProcessorClient::with_origin(channel.clone(), origin());
    let mut replies = client
        .process(stream::iter(messages))
        .await
        .unwrap()
        .into_inner();
    let mut all = Vec::new();
    while let Some(reply) = replies.message().await.unwrap() {
        all.push(reply);
    }
    all
}

/// What the first reply sets a request header to.
fn set_header(replies: &[ProcessingResponse], name: &str) -> Option<String> {
    let Some(Response::RequestHeaders(headers)) = &replies[0].response else {
        panic!("{replies:?}");
    };
    let mutation = headers.response.clone().unwrap().header_mutation.unwrap();
    let mut values = mutation.set_headers.iter().filter_map(|option| {
        let header = option.header.as_ref()?;
        (header.key == name).then(|| String::from_utf8(header.raw_value.to_vec()).unwrap())
    });
    let first = values.next();
    assert!(values.next().is_none(), "{name} is set twice");
    first
}

fn removed(replies: &[ProcessingResponse], name: &str) -> bool {
    let Some(Response::RequestHeaders(headers)) = &replies[0].response else {
        panic!("{replies:?}");
    };
    let mutation = headers.response.clone().unwrap().header_mutation.unwrap();
    mutation
        .remove_headers
        .iter()
        .any(|removed| removed == name)
}

fn named<'a>(spans: &'a [Received], name: &str) -> Vec<&'a Received> {
    spans.iter().filter(|span| span.name == name).collect()
}

fn only<'a>(spans: &'a [Received], name: &str) -> &'a Received {
    match named(spans, name).as_slice() {
        [only] => only,
        all => panic!("{} spans {name}: {spans:#?}", all.len()),
    }
}

/// Names of the attributes that most spans have beside their own.
const REQUEST: [&str; 4] = [
    "gen_ai.request.id",
    "gen_ai.request.model",
    "mm.hash_count",
    "mm.modality",
];

/// `span` has exactly `own` and [`REQUEST`].
fn assert_attributes(span: &Received, own: &[&str]) {
    let wanted: BTreeSet<_> = own.iter().chain(&REQUEST).copied().collect();
    let keys: BTreeSet<_> = span.keys().into_iter().collect();
    assert_eq!(keys, wanted, "{}", span.name);
    assert_eq!(span.text("gen_ai.request.id"), "the-request");
    assert_eq!(span.text("gen_ai.request.model"), "m");
    assert_eq!(span.text("mm.modality"), "none");
}

#[tokio::test]
async fn spans_of_a_request_are_those_of_the_table() {
    let collector = Collector::start();
    let endpoint = collector.endpoint();
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("endpoints.json");
    std::fs::write(&file, endpoints().to_string()).unwrap();
    let config = PD.replace("ENDPOINTS", file.to_str().unwrap());
    let picker = Picker::start(
        &[
            "--pool-name=p".to_owned(),
            format!("--config-text={config}"),
        ],
        &[
            ("OTEL_EXPORTER_OTLP_ENDPOINT", &endpoint),
            ("OTEL_EXPORTER_OTLP_HEADERS", "x-tenant=a%20b"),
            ("OTEL_RESOURCE_ATTRIBUTES", "zone=eu"),
            ("OTEL_BSP_SCHEDULE_DELAY", "10"),
            ("OTEL_TRACES_SAMPLER_ARG", "0"),
        ],
    )
    .await;
    let traceparent = format!("00-{TRACE}-{PARENT}-01");
    let secret = "nobody-may-see-this ".repeat(20);
    let body = json!({"model": "m", "prompt": secret}).to_string();
    let lines = [("traceparent", traceparent.as_str()), ("tracestate", "a=1")];
    let replies = exchange(&picker.channel().await, &lines, &body, "200").await;
    let spans = collector.trace(TRACE, "gateway.request", 1).await;

    let root = only(&spans, "gateway.request");
    assert!(root.server && root.parent == PARENT && root.error.is_none());
    assert_eq!(root.keys(), Vec::<&str>::new());
    assert_eq!(
        set_header(&replies, "traceparent").unwrap(),
        format!("00-{TRACE}-{}-01", root.id)
    );
    assert!(!removed(&replies, "tracestate"));
    assert_eq!(root.resource["service.name"], "llm-d-epp");
    assert_eq!(root.resource["zone"], "eu");
    assert!(root.resource.contains_key("service.version"));
    assert_eq!(collector.metadata()["x-tenant"], "a b");

    let orchestration = only(&spans, "gateway.request_orchestration");
    assert!(orchestration.server && orchestration.parent == root.id);
    assert_eq!(orchestration.attributes["target_model"], "m");
    assert_eq!(orchestration.attributes["request_prio"], 0);

    // Decode first, then prefill elsewhere, as nothing is cached.
    let profiles = named(&spans, "run_scheduler_profile");
    let ran: Vec<_> = profiles
        .iter()
        .map(|p| p.text("llm_d.epp.scheduling.profile.name"))
        .collect();
    assert_eq!(ran, ["decode", "prefill"]);
    for profile in &profiles {
        assert_eq!(profile.parent, orchestration.id);
        assert_attributes(profile, &["llm_d.epp.scheduling.profile.name"]);
    }
    let in_decode = |name: &str| -> Received {
        let mut found = named(&spans, name);
        found.retain(|span| span.parent == profiles[0].id);
        assert_eq!(found.len(), 1, "{name}: {spans:#?}");
        found[0].clone()
    };
    let filters = in_decode("filter_endpoints");
    assert_attributes(
        &filters,
        &[
            "llm_d.epp.filter.candidate_endpoints",
            "llm_d.epp.filter.filtered_endpoints",
        ],
    );
    assert_eq!(
        filters.attributes["llm_d.epp.filter.candidate_endpoints"],
        7
    );
    assert_eq!(filters.attributes["llm_d.epp.filter.filtered_endpoints"], 6);

    let scoring = in_decode("llm_d.epp.scoring");
    assert_eq!(
        scoring.keys(),
        [
            "llm_d.epp.scorer.count",
            "llm_d.epp.scoring.candidate_endpoints"
        ]
    );
    assert_eq!(scoring.attributes["llm_d.epp.scorer.count"], 2);
    let own = [
        "llm_d.epp.scorer.candidate_endpoints",
        "llm_d.epp.scorer.endpoints_scored",
        "llm_d.epp.scorer.name",
        "llm_d.epp.scorer.score.avg",
        "llm_d.epp.scorer.score.max",
        "llm_d.epp.scorer.type",
        "llm_d.epp.scorer.weight",
    ];
    let mut queue = named(&spans, "llm_d.epp.scorer.queue-scorer");
    queue.retain(|span| span.parent == scoring.id);
    let queue = queue[0];
    assert_attributes(queue, &own);
    assert_eq!(queue.text("llm_d.epp.scorer.name"), "shortest");
    assert_eq!(queue.text("llm_d.epp.scorer.type"), "queue-scorer");
    // Equal queues: 1.0 for all six.
    for (name, value) in [("weight", 2.0), ("score.max", 1.0), ("score.avg", 1.0)] {
        let name = format!("llm_d.epp.scorer.{name}");
        assert_eq!(queue.attributes[&name], json!({"float": value}), "{name}");
    }
    assert_eq!(queue.attributes["llm_d.epp.scorer.endpoints_scored"], 6);
    let prefix = only(&spans, "llm_d.epp.scorer.prefix-cache-scorer");
    let inner = only(&spans, "score_prefix_cache");
    assert!(prefix.parent == scoring.id && inner.parent == prefix.id);
    assert_attributes(inner, &own);

    let picker_span = in_decode("pick_endpoints");
    assert_attributes(
        &picker_span,
        &[
            "llm_d.epp.picker.candidate_endpoints",
            "llm_d.epp.picker.top_endpoints",
            "llm_d.epp.picker.top_scores",
        ],
    );
    assert_eq!(
        picker_span.attributes["llm_d.epp.picker.candidate_endpoints"],
        6
    );
    // The five best: all have 2 x 1.0 + 1 x 0.0, so the names decide.
    assert_eq!(
        picker_span.attributes["llm_d.epp.picker.top_endpoints"],
        json!(["ns/d1", "ns/d2", "ns/d3", "ns/d4", "ns/d5"])
    );
    assert_eq!(
        picker_span.attributes["llm_d.epp.picker.top_scores"],
        json!(vec![json!({"float": 2.0}); 5])
    );

    let precise = only(&spans, "produce_precise_prefix_cache");
    assert_eq!(precise.parent, orchestration.id);
    assert_attributes(
        precise,
        &[
            "llm_d.epp.producer.candidate_endpoints",
            "llm_d.epp.producer.max_match_blocks",
            "llm_d.epp.producer.result",
            "llm_d.epp.producer.total_blocks",
        ],
    );
    // There is no tokenizer.
    assert_eq!(
        precise.text("llm_d.epp.producer.result"),
        "skipped_no_tokens"
    );
    assert_eq!(
        precise.attributes["llm_d.epp.producer.candidate_endpoints"],
        7
    );

    let steps = named(&spans, "pick_disagg_profile");
    assert_eq!(
        decisions(&steps),
        ["run_decode", "run_prefill", "complete_prefill-decode"]
    );
    let counts: Vec<_> = steps
        .iter()
        .map(|s| {
            assert_eq!(s.parent, orchestration.id);
            assert_eq!(s.attributes["llm_d.epp.profile_handler.total_profiles"], 2);
            s.attributes["llm_d.epp.profile_handler.executed_profiles"]
                .as_i64()
                .unwrap()
        })
        .collect();
    assert_eq!(counts, [0, 1, 2]);
    assert_eq!(
        steps[1].text("llm_d.epp.profile_handler.selected_profile"),
        "prefill"
    );

    let prepared = only(&spans, "prepare_disaggregation");
    assert_attributes(
        prepared,
        &[
            "llm_d.epp.encode.disaggregation_used",
            "llm_d.epp.encode.reason",
            "llm_d.epp.pd.disaggregation_used",
            "llm_d.epp.pd.prefill_pod_address",
            "llm_d.epp.pd.prefill_pod_port",
        ],
    );
    assert_eq!(
        prepared.attributes["llm_d.epp.pd.disaggregation_used"],
        true
    );
    assert_eq!(
        prepared.text("llm_d.epp.pd.prefill_pod_address"),
        "127.0.0.1"
    );
    assert_eq!(prepared.text("llm_d.epp.pd.prefill_pod_port"), "7");
    assert_eq!(
        prepared.text("llm_d.epp.encode.reason"),
        "no_encode_profile_result"
    );

    for span in &spans {
        let parent = spans.iter().find(|other| other.id == span.parent);
        assert!(parent.is_some() || span.id == root.id, "{span:?}");
        if let Some(parent) = parent {
            assert!(
                parent.start <= span.start && span.end <= parent.end,
                "{span:?} {parent:?}"
            );
        }
        assert!(
            span.scope.starts_with("llm-d-router/pkg/epp/"),
            "{}",
            span.scope
        );
        assert!(!format!("{span:?}").contains("nobody-may-see"), "{span:?}");
    }
    let all = spans.len() as u64;
    until("all are counted", || async {
        picker.total("exported").await == all
    })
    .await;

    // A short prompt is prefilled where it is decoded.
    let trace = "5bf92f3577b34da6a3ce929d0e0e4736";
    let traceparent = format!("00-{trace}-{PARENT}-01");
    let body = r#"{"model":"m","prompt":"short"}"#;
    let lines = [("traceparent", traceparent.as_str())];
    exchange(&picker.channel().await, &lines, body, "200").await;
    let spans = collector.trace(trace, "gateway.request", 1).await;
    assert_eq!(
        decisions(&named(&spans, "pick_disagg_profile")),
        ["run_decode", "skip_prefill", "complete_decode-only"]
    );
    let prepared = only(&spans, "prepare_disaggregation");
    assert_eq!(
        prepared.attributes["llm_d.epp.pd.disaggregation_used"],
        false
    );
    assert_eq!(
        prepared.text("llm_d.epp.pd.reason"),
        "no_prefill_profile_result"
    );
    assert_eq!(named(&spans, "run_scheduler_profile").len(), 1);
}

fn decisions<'a>(steps: &[&'a Received]) -> Vec<&'a str> {
    let decision = |step: &&'a Received| step.text("llm_d.epp.profile_handler.decision");
    steps.iter().map(decision).collect()
}

#[tokio::test]
async fn the_deprecated_handler_has_a_span_of_its_own() {
    let collector = Collector::start();
    let endpoint = collector.endpoint();
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("endpoints.json");
    std::fs::write(&file, endpoints().to_string()).unwrap();
    let disagg = "{type: disagg-profile-handler, parameters: {deciders: {prefill: prefix-based-pd-decider}}}";
    assert!(PD.contains(disagg));
    let deprecated = "{type: pd-profile-handler}\n- {type: disagg-headers-handler}";
    let config = PD
        .replace(disagg, deprecated)
        .replace("ENDPOINTS", file.to_str().unwrap());
    let flags = [
        "--pool-name=p".to_owned(),
        format!("--config-text={config}"),
    ];
    let environment = [
        ("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint.as_str()),
        ("OTEL_BSP_SCHEDULE_DELAY", "10"),
    ];
    let picker = Picker::start(&flags, &environment).await;
    let traceparent = format!("00-{TRACE}-{PARENT}-01");
    let body = json!({"model": "m", "prompt": "a long prompt ".repeat(20)}).to_string();
    let lines = [("traceparent", traceparent.as_str())];
    exchange(&picker.channel().await, &lines, &body, "200").await;
    let spans = collector.trace(TRACE, "gateway.request", 1).await;
    assert_eq!(
        decisions(&named(&spans, "pick_pd_profile")),
        ["run_decode", "run_prefill", "complete_prefill-decode"]
    );
    let prepared = only(&spans, "prepare_disaggregation");
    assert_eq!(prepared.text("llm_d.epp.pd.prefill_pod_port"), "7");
}

#[tokio::test]
async fn a_profile_that_finds_no_endpoint_is_an_error() {
    let collector = Collector::start();
    let endpoint = collector.endpoint();
    let config = "apiVersion: llm-d.ai/v1alpha1\nkind: EndpointPickerConfig\nplugins: [{type: prefill-filter}]\n\
        schedulingProfiles: [{name: default, plugins: [{pluginRef: prefill-filter}]}]\n";
    // An endpoint without a role is none to prefill on.
    let flags = [
        "--endpoints=127.0.0.1:1".to_owned(),
        format!("--config-text={config}"),
    ];
    let environment = [
        ("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint.as_str()),
        ("OTEL_BSP_SCHEDULE_DELAY", "10"),
    ];
    let picker = Picker::start(&flags, &environment).await;
    let traceparent = format!("00-{TRACE}-{PARENT}-01");
    let lines = [("traceparent", traceparent.as_str())];
    let body = r#"{"model":"m","prompt":"p"}"#;
    exchange(&picker.channel().await, &lines, body, "200").await;
    let spans = collector.trace(TRACE, "gateway.request", 1).await;
    let filters = only(&spans, "filter_endpoints");
    assert_eq!(filters.attributes["llm_d.epp.filter.filtered_endpoints"], 0);
    for (name, error) in [
        ("filter_endpoints", "no endpoint is left"),
        ("run_scheduler_profile", "no endpoint is left"),
        ("gateway.request_orchestration", "ResourceExhausted"),
        ("gateway.request", "ResourceExhausted"),
    ] {
        assert_eq!(only(&spans, name).error.as_deref(), Some(error), "{name}");
    }
    assert!(named(&spans, "pick_endpoints").is_empty());
}

#[tokio::test]
async fn a_parent_decides_and_new_traces_are_sampled() {
    let collector = Collector::start();
    let endpoint = collector.endpoint();
    for ratio in ["0", "1"] {
        let picker = Picker::simple(&[
            ("OTEL_EXPORTER_OTLP_ENDPOINT", &endpoint),
            ("OTEL_BSP_SCHEDULE_DELAY", "10"),
            ("OTEL_TRACES_SAMPLER_ARG", ratio),
        ])
        .await;
        let channel = picker.channel().await;
        let body = r#"{"model":"m","prompt":"p"}"#;
        // The client's wish comes before the ratio.
        let trace = format!("{ratio}bf92f3577b34da6a3ce929d0e0e4736");
        for (flags, sampled) in [("01", true), ("00", false)] {
            let given = format!("00-{trace}-{PARENT}-{flags}");
            let replies = exchange(&channel, &[("traceparent", &given)], body, "200").await;
            let told = set_header(&replies, "traceparent").unwrap();
            assert!(
                told.starts_with(&format!("00-{trace}-")) && told.ends_with(&format!("-{flags}")),
                "{told}"
            );
            assert!(!told.contains(PARENT));
            if sampled {
                let spans = collector.trace(&trace, "gateway.request", 1).await;
                assert_eq!(only(&spans, "gateway.request").parent, PARENT);
            }
        }
        // A new trace, also where what came cannot be read; state of no trace goes.
        let one = format!("00-{TRACE}-{PARENT}-01");
        for given in [&[][..], &["00-nonsense"], &[&one, &one]] {
            let mut lines = vec![("tracestate", "a=1"), ("baggage", "k=v")];
            lines.extend(given.iter().map(|given| ("traceparent", *given)));
            let replies = exchange(&channel, &lines, body, "200").await;
            let told = set_header(&replies, "traceparent").unwrap();
            assert!(
                told.ends_with(if ratio == "1" { "-01" } else { "-00" }),
                "{told}"
            );
            assert!(removed(&replies, "tracestate") && !removed(&replies, "baggage"));
            if ratio == "1" {
                let spans = collector.trace(&told[3..35], "gateway.request", 1).await;
                let root = only(&spans, "gateway.request");
                assert_eq!(
                    (root.parent.as_str(), root.id.as_str()),
                    ("", &told[36..52])
                );
            }
        }
        let log = picker.process.terminate().await;
        assert!(log.contains("recording traces"), "{log}");
    }
    // Per picker one request of a sampled parent; with the ratio 1 three more.
    let roots = named(&collector.spans(), "gateway.request").len();
    assert_eq!(roots, 1 + 4);
}

#[tokio::test]
async fn without_an_exporter_nothing_changes() {
    let named_collector = [("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")];
    let off = [
        "--endpoints=127.0.0.1:1".to_owned(),
        "--tracing=false".to_owned(),
    ];
    let given = format!("00-{TRACE}-{PARENT}-01");
    for picker in [
        Picker::simple(&[("OTEL_TRACES_SAMPLER_ARG", "1")]).await,
        Picker::start(&off, &named_collector).await,
    ] {
        let body = r#"{"model":"m","prompt":"p"}"#;
        let lines = [("traceparent", given.as_str()), ("tracestate", "a=1")];
        let replies = exchange(&picker.channel().await, &lines, body, "200").await;
        assert_eq!(set_header(&replies, "traceparent"), None);
        assert!(!removed(&replies, "traceparent") && !removed(&replies, "tracestate"));
    }
}

#[tokio::test]
async fn failures_are_seen_in_their_spans() {
    let collector = Collector::start();
    let endpoint = collector.endpoint();
    let picker = Picker::simple(&[
        ("OTEL_EXPORTER_OTLP_ENDPOINT", &endpoint),
        ("OTEL_TRACES_SAMPLER_ARG", "1"),
        ("OTEL_BSP_SCHEDULE_DELAY", "10"),
    ])
    .await;
    let channel = picker.channel().await;
    let good = r#"{"model":"m","prompt":"p"}"#;
    for (n, body, status, at_root, at_decision) in [
        (
            1,
            "{broken secret",
            "200",
            Some("BadRequest"),
            Some("BadRequest"),
        ),
        (2, good, "503", Some("status 503"), None),
        (3, good, "404", None, None),
    ] {
        let trace = format!("{n}bf92f3577b34da6a3ce929d0e0e4736");
        let given = format!("00-{trace}-{PARENT}-01");
        exchange(&channel, &[("traceparent", &given)], body, status).await;
        let spans = collector.trace(&trace, "gateway.request", 1).await;
        let errors = ["gateway.request", "gateway.request_orchestration"]
            .map(|name| only(&spans, name).error.as_deref());
        assert_eq!(errors, [at_root, at_decision], "{body}");
        assert!(!format!("{spans:?}").contains("secret"));
    }
    // Nothing is decided by what a request without a body wants.
    let trace = "8bf92f3577b34da6a3ce929d0e0e4736";
    let given = format!("00-{trace}-{PARENT}-01");
    let lines = [(":path", "/v1/models"), ("traceparent", given.as_str())];
    let whole = message(Request::RequestHeaders(headers(&lines, true)));
    let answered = message(Request::ResponseHeaders(headers(
        &[(":status", "200")],
        true,
    )));
    let mut client = ExternalProcessorClient::with_origin(channel.clone(), origin());
    let messages = stream::iter([whole, answered]);
    let mut replies = client.process(messages).await.unwrap().into_inner();
    let first = replies.message().await.unwrap().unwrap();
    while replies.message().await.unwrap().is_some() {}
    let spans = collector.trace(trace, "gateway.request", 1).await;
    assert_eq!(spans.len(), 1);
    assert_eq!(
        set_header(&[first], "traceparent").unwrap(),
        format!("00-{trace}-{}-01", spans[0].id)
    );
    assert_eq!(spans[0].error, None);
    // Given up by the proxy before the body was there.
    let trace = "4bf92f3577b34da6a3ce929d0e0e4736";
    let given = format!("00-{trace}-{PARENT}-01");
    let lines = [
        (":path", "/v1/completions"),
        ("traceparent", given.as_str()),
    ];
    let first = message(Request::RequestHeaders(headers(&lines, false)));
    let mut client = ExternalProcessorClient::with_origin(channel, origin());
    let replies = client.process(stream::iter([first])).await.unwrap();
    drop(replies);
    let spans = collector.trace(trace, "gateway.request", 1).await;
    assert_eq!(
        only(&spans, "gateway.request").error.as_deref(),
        Some("upload")
    );
}

#[tokio::test]
async fn a_collector_that_hangs_holds_nobody_up() {
    // The system accepts connections that nobody serves.
    let silent = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let endpoint = format!("http://{}", silent.local_addr().unwrap());
    let picker = Picker::simple(&[
        ("OTEL_EXPORTER_OTLP_ENDPOINT", &endpoint),
        ("OTEL_TRACES_SAMPLER_ARG", "1"),
        ("OTEL_BSP_MAX_QUEUE_SIZE", "20"),
        ("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "10"),
        ("OTEL_BSP_SCHEDULE_DELAY", "10"),
    ])
    .await;
    let channel = picker.channel().await;
    for _ in 0..50 {
        let body = r#"{"model":"m","prompt":"p"}"#;
        let replies = exchange(&channel, &[], body, "200").await;
        assert!(
            set_header(&replies, "traceparent")
                .unwrap()
                .ends_with("-01")
        );
    }
    // 50 requests of at least seven spans; one batch under way and a full queue behind it.
    let dropped = picker.total("dropped").await;
    assert!(dropped >= 50 * 7 - 10 - 20, "{dropped}");
    assert_eq!(picker.total("exported").await, 0);
    let began = Instant::now();
    let log = picker.process.terminate().await;
    // The flush is given 5 s.
    assert!(began.elapsed().as_secs() < 20, "{log}");
    assert!(log.contains("not all spans could be exported"), "{log}");
}

#[tokio::test]
async fn a_collector_that_is_briefly_unable_gets_its_spans_again() {
    let collector = Collector::with(Moods {
        unavailable: 1,
        rejects: 2,
    });
    let endpoint = collector.endpoint();
    let picker = Picker::simple(&[
        ("OTEL_EXPORTER_OTLP_ENDPOINT", &endpoint),
        ("OTEL_TRACES_SAMPLER_ARG", "1"),
        ("OTEL_BSP_SCHEDULE_DELAY", "300"),
    ])
    .await;
    let channel = picker.channel().await;
    exchange(&channel, &[], r#"{"model":"m","prompt":"p"}"#, "200").await;
    until("all are counted", || async {
        picker.total("exported").await > 0
    })
    .await;
    let sent = collector.spans().len() as u64;
    assert!(sent >= 7, "{sent}");
    // In one batch or two, of each of which two are refused.
    let rejected = picker.total("rejected").await;
    assert!(rejected == 2 || rejected == 4, "{rejected}");
    until("every span is counted", || async {
        picker.total("exported").await + picker.total("rejected").await
            == collector.spans().len() as u64
    })
    .await;
    assert_eq!(picker.total("failed").await, 0);
    let log = picker.process.terminate().await;
    assert!(
        log.contains("spans cannot be exported") && log.contains("spans are exported again"),
        "{log}"
    );
}

#[tokio::test]
async fn what_is_queued_at_the_end_is_exported() {
    let collector = Collector::start();
    let endpoint = collector.endpoint();
    let picker = Picker::simple(&[
        ("OTEL_TRACES_EXPORTER", "otlp"),
        ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", &endpoint),
        ("OTEL_TRACES_SAMPLER_ARG", "1"),
        ("OTEL_BSP_SCHEDULE_DELAY", "3600000"),
        ("OTEL_SERVICE_NAME", "mine"),
    ])
    .await;
    let channel = picker.channel().await;
    exchange(&channel, &[], r#"{"model":"m","prompt":"p"}"#, "200").await;
    assert!(collector.spans().is_empty());
    picker.process.terminate().await;
    let spans = collector.spans();
    let root = only(&spans, "gateway.request");
    assert_eq!(root.resource["service.name"], "mine");
    assert_eq!(
        only(&spans, "gateway.request_orchestration").parent,
        root.id
    );
}

#[tokio::test]
async fn the_console_gets_a_line_for_each_span() {
    let picker = Picker::simple(&[
        ("OTEL_TRACES_EXPORTER", "console"),
        ("OTEL_TRACES_SAMPLER_ARG", "1"),
        ("OTEL_BSP_SCHEDULE_DELAY", "10"),
    ])
    .await;
    exchange(
        &picker.channel().await,
        &[],
        r#"{"model":"m","prompt":"p"}"#,
        "200",
    )
    .await;
    until("a line comes", || async {
        picker.process.log().contains(r#""name":"gateway.request""#)
    })
    .await;
    let log = picker.process.terminate().await;
    let lines = log
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let spans: Vec<_> = lines.filter(|line| line.get("span_id").is_some()).collect();
    let root = spans
        .iter()
        .find(|span| span["name"] == "gateway.request")
        .unwrap();
    assert_eq!(root["kind"], "SERVER");
    assert_eq!(root["resource"]["service.name"], "llm-d-epp");
    assert!(
        spans
            .iter()
            .any(|span| span["parent_span_id"] == root["span_id"])
    );
}

#[tokio::test]
async fn a_collector_is_believed_by_its_certificate() {
    let directory = tempfile::tempdir().unwrap();
    let made = rcgen::generate_simple_self_signed(["127.0.0.1".to_owned()]).unwrap();
    let certificate = directory.path().join("tls.crt");
    std::fs::write(&certificate, made.cert.pem()).unwrap();
    let key = made.signing_key.serialize_pem();
    std::fs::write(directory.path().join("tls.key"), key).unwrap();
    let collector = Collector::over_tls(directory.path());
    let stranger = rcgen::generate_simple_self_signed(["127.0.0.1".to_owned()]).unwrap();
    let strange = directory.path().join("strange.crt");
    std::fs::write(&strange, stranger.cert.pem()).unwrap();
    // Without a scheme the way is TLS.
    let endpoint = collector.address().to_string();
    for (believed, exported) in [(&strange, false), (&certificate, true)] {
        let picker = Picker::simple(&[
            ("OTEL_EXPORTER_OTLP_ENDPOINT", &endpoint),
            ("OTEL_EXPORTER_OTLP_CERTIFICATE", believed.to_str().unwrap()),
            ("OTEL_TRACES_SAMPLER_ARG", "1"),
            ("OTEL_BSP_SCHEDULE_DELAY", "10"),
        ])
        .await;
        exchange(
            &picker.channel().await,
            &[],
            r#"{"model":"m","prompt":"p"}"#,
            "200",
        )
        .await;
        let log = picker.process.terminate().await;
        assert_eq!(log.contains("spans cannot be exported"), !exported, "{log}");
        assert_eq!(!collector.spans().is_empty(), exported);
    }
}

#[test]
fn an_endpoint_that_is_none_is_refused_at_the_start() {
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_pinpod"))
        .args([
            "serve",
            "--endpoints=127.0.0.1:1",
            "--grpc-port=0",
            "--metrics-port=0",
        ])
        .env("OTEL_EXPORTER_OTLP_ENDPOINT", "ftp://collector")
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(
        text.contains("OTEL_EXPORTER_OTLP_ENDPOINT: \"ftp://collector\" is neither http nor https"),
        "{text}"
    );
}
