//! Spans of the sidecar.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;

use bytes::Bytes;
use http::{HeaderMap, Request, Response};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use pinpod::demo::processes::free_ports;
use serde_json::{Value, json};
use tokio::net::{TcpListener, TcpStream};

use super::collector::{Collector, Received, Running};

const PARENT: &str = "00f067aa0ba902b7";
const CHAT: &str = "/v1/chat/completions";

/// An engine that answers everything alike and keeps the heads of what it was asked.
struct Engine {
    address: SocketAddr,
    heads: Arc<Mutex<Vec<HeaderMap>>>,
}

impl Engine {
    async fn start(status: u16, answer: Value) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let heads = Arc::<Mutex<Vec<HeaderMap>>>::default();
        let seen = Arc::clone(&heads);
        tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let (seen, answer) = (Arc::clone(&seen), answer.to_string());
                let service = service_fn(move |request: Request<Incoming>| {
                    let (seen, answer) = (Arc::clone(&seen), answer.clone());
                    async move {
                        seen.lock().push(request.headers().clone());
                        let _ = request.into_body().collect().await;
                        let response = Response::builder().status(status);
                        let response = response.header("content-type", "application/json");
                        Ok::<_, Infallible>(response.body(Full::new(Bytes::from(answer))).unwrap())
                    }
                });
                tokio::spawn(
                    hyper::server::conn::http1::Builder::new()
                        .serve_connection(TokioIo::new(stream), service),
                );
            }
        });
        Self { address, heads }
    }

    /// Trace contexts it was given, in order.
    fn contexts(&self) -> Vec<String> {
        let heads = self.heads.lock();
        let context = |head: &HeaderMap| {
            let mut all = head.get_all("traceparent").iter();
            let first = all.next().map_or("", |v| v.to_str().unwrap()).to_owned();
            assert!(all.next().is_none());
            first
        };
        heads.iter().map(context).collect()
    }
}

struct Sidecar {
    process: Running,
    port: u16,
}

impl Sidecar {
    async fn start(engine: &Engine, more: &[&str], collector: Option<&Collector>) -> Self {
        let [port] = free_ports().unwrap();
        let mut arguments = vec![
            "sidecar".to_owned(),
            format!("--port={port}"),
            format!("--model-server-port={}", engine.address.port()),
            "--secure-proxy=false".to_owned(),
            "--enable-ssrf-protection=false".to_owned(),
        ];
        arguments.extend(more.iter().map(|flag| (*flag).to_owned()));
        let endpoint = collector.map(Collector::endpoint).unwrap_or_default();
        let environment = [
            ("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint.as_str()),
            ("OTEL_BSP_SCHEDULE_DELAY", "10"),
            ("OTEL_TRACES_SAMPLER_ARG", "0"),
        ];
        let process = Running::start(&arguments, &environment, &[port]).await;
        Self { process, port }
    }

    async fn ask(&self, method: &str, path: &str, lines: &[(&str, &str)], body: &Value) -> u16 {
        let stream = TcpStream::connect(("127.0.0.1", self.port)).await.unwrap();
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .unwrap();
        tokio::spawn(connection);
        let mut request = Request::builder()
            .method(method)
            .uri(path)
            .header("host", "sidecar");
        for (name, value) in lines {
            request = request.header(*name, *value);
        }
        let body = if method == "GET" {
            String::new()
        } else {
            body.to_string()
        };
        let response = sender.send_request(request.body(Full::new(Bytes::from(body))).unwrap());
        let response = response.await.unwrap();
        let status = response.status().as_u16();
        response.into_body().collect().await.unwrap();
        status
    }
}

fn chat() -> Value {
    json!({"model": "m", "messages": [{"role": "user", "content": "nobody-may-see-this"}]})
}

fn prefilled() -> Value {
    let params = json!({
        "do_remote_prefill": true, "remote_block_ids": [[1]], "remote_engine_id": "e",
        "remote_host": "h", "remote_port": 1,
    });
    json!({"choices": [], "kv_transfer_params": params})
}

fn answer() -> Value {
    let message = json!({"role": "assistant", "content": "yes"});
    json!({
        "choices": [{"index": 0, "message": message, "finish_reason": "length"}],
        "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5},
    })
}

fn trace_of(n: u8) -> (String, String) {
    let trace = format!("{n}bf92f3577b34da6a3ce929d0e0e4736");
    let given = format!("00-{trace}-{PARENT}-01");
    (trace, given)
}

fn only<'a>(spans: &'a [Received], name: &str) -> &'a Received {
    let mut found = spans.iter().filter(|span| span.name == name);
    let first = found
        .next()
        .unwrap_or_else(|| panic!("no {name}: {spans:#?}"));
    assert!(found.next().is_none(), "several {name}: {spans:#?}");
    first
}

fn millis(span: &Received, name: &str) -> f64 {
    let value = &span.attributes[&format!("llm_d.pd_proxy.{name}")]["float"];
    value
        .as_f64()
        .unwrap_or_else(|| panic!("no {name}: {span:#?}"))
}

#[tokio::test]
async fn a_prefill_and_a_decode_are_children_of_the_request() {
    let collector = Collector::start();
    let prefill = Engine::start(200, prefilled()).await;
    let decode = Engine::start(200, answer()).await;
    let sidecar = Sidecar::start(&decode, &["--tracing"], Some(&collector)).await;
    let (trace, given) = trace_of(1);
    let target = prefill.address.to_string();
    let lines = [
        ("traceparent", given.as_str()),
        ("tracestate", "a=1"),
        ("x-prefiller-host-port", target.as_str()),
    ];
    assert_eq!(sidecar.ask("POST", CHAT, &lines, &chat()).await, 200);
    let name = "llm_d.pd_proxy.POST /v1/chat/completions";
    let spans = collector.trace(&trace, name, 3).await;
    assert_eq!(spans.len(), 3, "{spans:#?}");
    let root = only(&spans, name);
    assert!(root.server && root.parent == PARENT && root.error.is_none());
    assert_eq!(root.resource["service.name"], "llm-d-pd-proxy");
    for (key, value) in [
        ("connector", json!("nixlv2")),
        ("kv_connector", json!("nixlv2")),
        ("request_path", json!(CHAT)),
        ("disaggregation_used", json!(true)),
        ("prefill_candidates", json!(1)),
    ] {
        assert_eq!(
            root.attributes[&format!("llm_d.pd_proxy.{key}")],
            value,
            "{key}"
        );
    }
    let (first, second) = (only(&spans, "prefill"), only(&spans, "decode"));
    assert!(first.parent == root.id && second.parent == root.id);
    assert!(first.end <= second.start);
    assert_eq!(first.text("llm_d.pd_proxy.prefill_target"), target);
    assert_eq!(first.attributes["llm_d.pd_proxy.prefill.status_code"], 200);
    assert_eq!(
        second.text("llm_d.pd_proxy.decode.target"),
        format!("localhost:{}", decode.address.port())
    );
    assert_eq!(second.attributes["llm_d.pd_proxy.decode.streaming"], false);
    assert_eq!(
        second.attributes["llm_d.pd_proxy.decode.data_parallel"],
        false
    );
    // Time to decode holds the prefill; the rest of it is ours.
    let (prefill_ms, ttft_ms) = (
        millis(first, "prefill.duration_ms"),
        millis(root, "true_ttft_ms"),
    );
    let total_ms = millis(root, "total_duration_ms");
    assert!(0.0 < prefill_ms && prefill_ms <= ttft_ms && ttft_ms <= total_ms);
    assert!(millis(root, "coordinator_overhead_ms") <= ttft_ms - prefill_ms);
    assert!(millis(second, "decode.duration_ms") <= total_ms);
    // Each engine goes on from its own call.
    assert_eq!(prefill.contexts(), [format!("00-{trace}-{}-01", first.id)]);
    assert_eq!(decode.contexts(), [format!("00-{trace}-{}-01", second.id)]);
    assert_eq!(decode.heads.lock()[0]["tracestate"], "a=1");
    for span in &spans {
        assert_eq!(span.scope, "llm-d-router/pkg/sidecar/proxy");
        assert!(!format!("{span:?}").contains("nobody-may-see"), "{span:?}");
    }
}

#[tokio::test]
async fn every_way_through_the_sidecar_has_its_spans() {
    let collector = Collector::start();
    let prefill = Engine::start(200, prefilled()).await;
    let broken = Engine::start(503, json!({})).await;
    let decode = Engine::start(200, answer()).await;
    let flags = ["--tracing", "--decode-chunk-size=2"];
    let sidecar = Sidecar::start(&decode, &flags, Some(&collector)).await;
    let target = prefill.address.to_string();
    let down = broken.address.to_string();

    // Passed on as it comes.
    let (trace, given) = trace_of(1);
    sidecar
        .ask(
            "GET",
            "/v1/models?x=secret",
            &[("traceparent", &given)],
            &json!(null),
        )
        .await;
    let root = "llm_d.pd_proxy.GET /v1/models";
    let spans = collector.trace(&trace, root, 2).await;
    assert_eq!(
        only(&spans, "forward_request").parent,
        only(&spans, root).id
    );
    assert_eq!(
        decode.contexts(),
        [format!(
            "00-{trace}-{}-01",
            only(&spans, "forward_request").id
        )]
    );

    // No prefill, decoded in calls of two tokens each: four tokens are two calls.
    let (trace, given) = trace_of(2);
    let mut body = chat();
    body["max_tokens"] = 4.into();
    sidecar
        .ask("POST", CHAT, &[("traceparent", &given)], &body)
        .await;
    let root = "llm_d.pd_proxy.POST /v1/chat/completions";
    let spans = collector.trace(&trace, root, 4).await;
    let chunked = only(&spans, "chunked_decode");
    assert_eq!(chunked.parent, only(&spans, root).id);
    let calls: Vec<_> = spans.iter().filter(|span| span.name == "decode").collect();
    assert_eq!(calls.len(), 2);
    assert!(calls.iter().all(|call| call.parent == chunked.id));
    assert_eq!(
        only(&spans, root).text("llm_d.pd_proxy.reason"),
        "no_prefill_header"
    );

    // The first prefill endpoint cannot.
    let (trace, given) = trace_of(3);
    let both = format!("{down},{target}");
    let lines = [
        ("traceparent", given.as_str()),
        ("x-prefiller-host-port", both.as_str()),
    ];
    sidecar
        .ask(
            "POST",
            "/v1/completions",
            &lines,
            &json!({"model": "m", "prompt": "p"}),
        )
        .await;
    let root = "llm_d.pd_proxy.POST /v1/completions";
    let spans = collector.trace(&trace, root, 4).await;
    let tried: Vec<_> = spans.iter().filter(|span| span.name == "prefill").collect();
    let seen = |span: &&Received| {
        let status = span.attributes["llm_d.pd_proxy.prefill.status_code"].as_i64();
        (status, span.error.clone())
    };
    assert_eq!(
        tried.iter().map(seen).collect::<Vec<_>>(),
        [
            (Some(503), Some("status 503".to_owned())),
            (Some(200), None)
        ]
    );
    assert_eq!(only(&spans, root).error, None);
    assert_eq!(
        only(&spans, root).attributes["llm_d.pd_proxy.prefill_candidates"],
        2
    );
}

#[tokio::test]
async fn prefill_and_decode_at_once_have_names_of_their_own() {
    let collector = Collector::start();
    let prefill = Engine::start(200, json!({})).await;
    let decode = Engine::start(200, answer()).await;
    let flags = ["--tracing", "--kv-connector=sglang"];
    let sidecar = Sidecar::start(&decode, &flags, Some(&collector)).await;
    let (trace, given) = trace_of(1);
    let target = prefill.address.to_string();
    let lines = [
        ("traceparent", given.as_str()),
        ("x-prefiller-host-port", target.as_str()),
    ];
    assert_eq!(sidecar.ask("POST", CHAT, &lines, &chat()).await, 200);
    let name = "llm_d.pd_proxy.POST /v1/chat/completions";
    let spans = collector.trace(&trace, name, 3).await;
    let root = only(&spans, name);
    assert_eq!(root.attributes["llm_d.pd_proxy.concurrent_pd"], true);
    let (first, second) = (
        only(&spans, "llm_d.pd_proxy.prefill"),
        only(&spans, "llm_d.pd_proxy.decode"),
    );
    assert!(first.parent == root.id && second.parent == root.id);
    assert_eq!(first.attributes["llm_d.pd_proxy.prefill.status_code"], 200);
    assert_eq!(prefill.contexts(), [format!("00-{trace}-{}-01", first.id)]);
    assert_eq!(decode.contexts(), [format!("00-{trace}-{}-01", second.id)]);
}

#[tokio::test]
async fn an_engine_that_is_gone_is_an_error_of_its_span() {
    let collector = Collector::start();
    let engine = Engine {
        address: {
            let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
            listener.local_addr().unwrap()
        },
        heads: Arc::default(),
    };
    let sidecar = Sidecar::start(&engine, &["--tracing"], Some(&collector)).await;
    let (trace, given) = trace_of(1);
    assert_eq!(
        sidecar
            .ask("POST", CHAT, &[("traceparent", &given)], &chat())
            .await,
        503
    );
    let name = "llm_d.pd_proxy.POST /v1/chat/completions";
    let spans = collector.trace(&trace, name, 2).await;
    let decode = only(&spans, "decode").error.clone().unwrap();
    assert!(decode.starts_with("connecting: "), "{decode}");
    assert_eq!(only(&spans, name).error.as_deref(), Some("status 503"));
    // Nobody asked for this one to be recorded: what comes next is told so.
    let (trace, given) = trace_of(2);
    let unsampled = given.replace("-01", "-00");
    sidecar
        .ask("POST", CHAT, &[("traceparent", &unsampled)], &chat())
        .await;
    sidecar.process.terminate().await;
    assert!(collector.spans().iter().all(|span| span.trace != trace));
}

#[tokio::test]
async fn without_the_flag_a_context_passes_as_it_is() {
    let collector = Collector::start();
    let decode = Engine::start(200, answer()).await;
    let sidecar = Sidecar::start(&decode, &[], Some(&collector)).await;
    let (_, given) = trace_of(1);
    sidecar
        .ask("POST", CHAT, &[("traceparent", &given)], &chat())
        .await;
    sidecar.ask("POST", CHAT, &[], &chat()).await;
    assert_eq!(decode.contexts(), [given, String::new()]);
    sidecar.process.terminate().await;
    assert!(collector.spans().is_empty());

    // Recorded or not, those behind a sidecar with tracing know where they are.
    let sidecar = Sidecar::start(&decode, &["--tracing"], Some(&collector)).await;
    sidecar
        .ask("POST", CHAT, &[("tracestate", "a=1")], &chat())
        .await;
    let made = decode.contexts().pop().unwrap();
    assert!(made.starts_with("00-") && made.ends_with("-00"), "{made}");
    assert!(
        !decode
            .heads
            .lock()
            .last()
            .unwrap()
            .contains_key("tracestate")
    );
}
