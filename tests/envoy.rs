//! The real Envoy, pinpod and simulated pods: routing, failure modes, and nothing leaked.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::too_many_lines,
    reason = "a test fails by panicking, and its tables are long"
)]

#[path = "envoy_demo.rs"]
mod demo;
#[path = "envoy_grpc.rs"]
mod grpc;
#[path = "envoy_events.rs"]
mod kv_events;
#[path = "envoy_pd.rs"]
mod pd;
mod support;

use std::io::Write;
use std::net::{Shutdown, TcpStream};
use std::time::Duration;

use pinpod::demo::envoy::OVERRIDE_HOST;
use pinpod::demo::processes::Picker;
use support::{Gateway, Setup, completion, eventually, program};

const MODELS: &str = "/v1/models";
const COMPLETIONS: &str = "/v1/completions";

#[tokio::test]
async fn every_shape_of_request_is_routed_and_answered() {
    // TLS towards the picker, as shipped.
    let gateway = Setup {
        plaintext: false,
        ..Setup::default()
    }
    .start()
    .await;

    let models = gateway.get(MODELS).await;
    assert_eq!(models.status, 200);
    assert!(models.text().contains("sim-model"));
    assert_eq!(models.headers["x-went-into-resp-headers"], "true");

    let body = completion("hello", 5, false);
    let answer = gateway.post(COMPLETIONS, body.clone()).await;
    assert_eq!(answer.status, 200, "{}", answer.text());
    let json: serde_json::Value = serde_json::from_slice(&answer.body).unwrap();
    assert_eq!(json["usage"]["completion_tokens"], 5);

    let over_h2 = gateway.post_h2(COMPLETIONS, body).await;
    assert_eq!(over_h2.status, 200, "{}", over_h2.text());

    let stream = gateway
        .post(COMPLETIONS, completion("hello", 5, true))
        .await
        .text();
    // Five tokens one by one, usage, and the end mark.
    assert_eq!(stream.matches("data: ").count(), 7, "{stream}");
    assert!(stream.ends_with("data: [DONE]\n\n"));

    // 1.2 MB are 300,000 tokens of the simulated 430,000.
    let long = "x".repeat(1_200_000);
    let answer = gateway.post(COMPLETIONS, completion(&long, 1, false)).await;
    assert_eq!(answer.status, 200, "{}", answer.text());
    let json: serde_json::Value = serde_json::from_slice(&answer.body).unwrap();
    assert_eq!(
        json["usage"]["prompt_tokens"], 300_000,
        "the body arrived unaltered"
    );

    gateway.wait_until_idle().await;
    assert_eq!(
        gateway.metric("llm_d_epp_request_total").await,
        4.0,
        "a GET is not counted"
    );
    assert_eq!(
        gateway.metric("llm_d_epp_request_input_tokens_count").await,
        4.0,
        "usage was read four times"
    );
}

#[tokio::test]
async fn five_megabytes_pass_unaltered() {
    let gateway = Setup {
        pods: 1,
        sim_flags: &["--time-scale=1000", "--kv-tokens=2000000"],
        ..Setup::default()
    }
    .start()
    .await;
    // 5,000,000 bytes are 1,250,000 tokens.
    let body = completion(&"0123456789".repeat(500_000), 1, false);
    for answer in [
        gateway.post(COMPLETIONS, body.clone()).await,
        gateway.post_h2(COMPLETIONS, body).await,
    ] {
        let json: serde_json::Value = serde_json::from_slice(&answer.body).unwrap();
        assert_eq!(
            json["usage"]["prompt_tokens"],
            1_250_000,
            "{}",
            answer.text()
        );
    }
    gateway.wait_until_idle().await;
}

#[tokio::test]
async fn equal_prompts_meet_the_same_endpoint() {
    let gateway = Setup::default().start().await;
    let mut pods = std::collections::HashSet::new();
    for prompt in 0..4 {
        let body = completion(&format!("{prompt}").repeat(4000), 1, false);
        let first = gateway
            .post(COMPLETIONS, body.clone())
            .await
            .pod()
            .to_owned();
        for _ in 0..3 {
            assert_eq!(gateway.post(COMPLETIONS, body.clone()).await.pod(), first);
        }
        pods.insert(first);
    }
    assert!(pods.len() > 1, "different prompts spread: {pods:?}");
}

#[tokio::test]
async fn refusals_reach_the_client_with_status_and_text() {
    let config = "apiVersion: llm-d.ai/v1alpha1\nkind: EndpointPickerConfig\nplugins:\n- {type: label-selector-filter, parameters: {matchLabels: {no: one}}}\n- {type: openai-parser}\nrequestHandler: {parsers: [{pluginRef: openai-parser}]}\n";
    let gateway = Setup {
        config: Some(config),
        serve_flags: &["--max-request-body-bytes=100k"],
        ..Setup::default()
    }
    .start()
    .await;

    let bad = gateway
        .post("/v1/chat/completions", r#"{"model":"m"}"#)
        .await;
    assert_eq!(bad.status, 400);
    assert_eq!(
        bad.text(),
        "inference error: BadRequest - invalid chat completions request: must have valid messages field"
    );

    let path = gateway.post("/v1/rerank", "{}").await;
    assert_eq!(
        path.text(),
        "inference error: BadRequest - no parser registered matching path suffix for: /v1/rerank"
    );

    let model = gateway.post(COMPLETIONS, r#"{"prompt":"x"}"#).await;
    assert_eq!(
        model.text(),
        "inference error: BadRequest - model not found in request body"
    );

    let filtered = gateway.post(COMPLETIONS, completion("x", 1, false)).await;
    assert_eq!(filtered.status, 429);
    assert_eq!(
        filtered.text(),
        "inference error: ResourceExhausted - no endpoints available for the given request"
    );
    assert_eq!(
        filtered.headers["x-llm-d-request-dropped-reason"],
        "rejected-saturated"
    );

    let large = gateway
        .post(COMPLETIONS, completion(&"x".repeat(200_000), 1, false))
        .await;
    assert_eq!(large.status, 413);
    assert!(
        large.text().contains("limit of 100000 bytes"),
        "{}",
        large.text()
    );
    gateway.wait_until_idle().await;
    assert_eq!(gateway.metric("llm_d_epp_request_error_total").await, 5.0);
    // Refusals are answers too.
    let processed = "llm_d_epp_request_processing_duration_seconds_count";
    assert_eq!(gateway.metric(processed).await, 5.0);
}

#[tokio::test]
async fn an_empty_pool_is_503() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("endpoints.yaml");
    std::fs::write(&file, "endpoints: []\n").unwrap();
    let config = format!(
        "apiVersion: llm-d.ai/v1alpha1\nkind: EndpointPickerConfig\nplugins:\n- {{name: f, type: file-discovery, parameters: {{path: {}, watchFile: true}}}}\ndataLayer: {{discovery: {{pluginRef: f}}}}\n",
        file.display()
    );
    let gateway = Setup {
        config: Some(&config),
        serve_flags: &["--pool-name=p"],
        ..Setup::default()
    }
    .start()
    .await;
    let refused = gateway.post(COMPLETIONS, completion("x", 1, false)).await;
    assert_eq!(refused.status, 503);
    assert_eq!(
        refused.headers["x-llm-d-request-dropped-reason"],
        "rejected-no-endpoints"
    );
    assert_eq!(gateway.get(MODELS).await.status, 503);
    // The file gains an endpoint; the next requests find it.
    let address = gateway.sims.addresses[0];
    let entry = format!(
        "endpoints:\n- {{name: a, address: {}, port: \"{}\"}}\n",
        address.ip(),
        address.port()
    );
    std::fs::write(&file, entry).unwrap();
    eventually("the new endpoint serves", || async {
        gateway
            .post(COMPLETIONS, completion("x", 1, false))
            .await
            .status
            == 200
    })
    .await;
}

#[tokio::test]
async fn a_dead_endpoint_is_retried_on_the_second_of_the_list() {
    let config = "apiVersion: llm-d.ai/v1alpha1\nkind: EndpointPickerConfig\nplugins:\n- {type: prefix-cache-scorer}\n- {type: max-score-picker, parameters: {maxNumOfEndpoints: 2}}\n";
    let directory = tempfile::tempdir().unwrap();
    let setup = Setup {
        template: OVERRIDE_HOST,
        config: Some(config),
        ..Setup::default()
    };
    let mut gateway = setup.start().await;
    let body = completion(&"retry".repeat(400), 1, false);
    assert_eq!(gateway.post(COMPLETIONS, body.clone()).await.status, 200);
    // The pods die; another process takes two of the three ports.
    let first = gateway.sims.addresses[0].port();
    let home = gateway
        .post(COMPLETIONS, body.clone())
        .await
        .pod()
        .to_owned();
    gateway.sims.process.kill();
    let dead = home
        .rsplit('-')
        .next()
        .and_then(|n| n.parse::<u16>().ok())
        .unwrap();
    let mut replacements = Vec::new();
    for number in (0..3).filter(|n| *n != dead) {
        let port = first + number;
        let flags = [
            "sim".to_owned(),
            format!("--port={port}"),
            format!("--name=new{number}"),
            "--time-scale=50".to_owned(),
        ];
        let mut sim = pinpod::demo::processes::Process::start(
            &format!("new-{port}"),
            program(),
            &flags,
            directory.path(),
        )
        .unwrap();
        sim.wait_for_port(port).await.unwrap();
        replacements.push(sim);
    }
    let answer = gateway.post(COMPLETIONS, body).await;
    assert_eq!(answer.status, 200, "{}", answer.text());
    assert!(answer.pod().starts_with("new"), "{:?}", answer.headers);
    gateway.wait_until_idle().await;
}

#[tokio::test]
async fn a_subset_hint_is_obeyed() {
    let hinted = |list: &str| {
        let filter = format!(
            "                  - name: envoy.filters.http.set_metadata\n                    typed_config:\n                      \"@type\": type.googleapis.com/envoy.extensions.filters.http.set_metadata.v3.Config\n                      metadata:\n                        - metadata_namespace: envoy.lb.subset_hint\n                          value: {{ x-gateway-destination-endpoint-subset: [{list}] }}\n                  - name: envoy.filters.http.ext_proc\n"
        );
        let template = pinpod::demo::envoy::ORIGINAL_DST;
        template.replace(
            "                  - name: envoy.filters.http.ext_proc\n",
            &filter,
        )
    };
    let none = Setup {
        template: &hinted("\"192.0.2.1:1\""),
        ..Setup::default()
    }
    .start()
    .await;
    assert_eq!(
        none.post(COMPLETIONS, completion("x", 1, false))
            .await
            .status,
        503
    );
    assert_eq!(
        none.get(MODELS).await.status,
        503,
        "header-only requests obey too"
    );

    let all = Setup {
        template: &hinted("\"127.0.0.1\""),
        ..Setup::default()
    }
    .start()
    .await;
    assert_eq!(
        all.post(COMPLETIONS, completion("x", 1, false))
            .await
            .status,
        200
    );
}

#[tokio::test]
async fn routing_headers_of_the_client_do_not_steer() {
    let gateway = Setup::default().start().await;
    let forged = [
        ("x-gateway-destination-endpoint", "192.0.2.1:1"),
        ("x-prefiller-host-port", "192.0.2.1:1"),
    ];
    let answer = gateway
        .post_with(COMPLETIONS, completion("x", 1, false), &forged)
        .await;
    assert_eq!(answer.status, 200, "{}", answer.text());
}

#[tokio::test]
async fn the_model_is_rewritten_and_put_back() {
    let gateway = Setup::default().start().await;
    let body = r#"{"model":"alias","prompt":"x","max_tokens":1,"seed":9007199254740993}"#;
    let answer = gateway
        .post_with(
            COMPLETIONS,
            body,
            &[("x-llm-d-model-name-rewrite", "sim-model")],
        )
        .await;
    assert_eq!(answer.status, 200, "{}", answer.text());
    assert!(
        answer.text().contains(r#""model":"alias""#),
        "{}",
        answer.text()
    );
}

#[tokio::test]
async fn a_killed_picker_fails_closed_and_comes_back() {
    let mut gateway = Setup::default().start().await;
    assert_eq!(gateway.get(MODELS).await.status, 200);
    gateway.picker.process.kill();
    let down = gateway.post(COMPLETIONS, completion("x", 1, false)).await;
    assert_eq!(down.status, 503, "fail closed, as the file says");
    let ports = [
        gateway.picker.grpc,
        pinpod::demo::processes::free_ports::<1>().unwrap()[0],
        gateway.picker.metrics,
    ];
    let flags = [gateway.sims.endpoints_flag()];
    gateway.picker = Picker::start_on(program(), ports, &flags, gateway.directory.path())
        .await
        .unwrap();
    eventually("the restarted picker serves", || async {
        gateway
            .post(COMPLETIONS, completion("x", 1, false))
            .await
            .status
            == 200
    })
    .await;
}

/// Opens a connection to the gateway and sends the beginning of a request.
fn begin(gateway: &Gateway, body: &str, sent: usize) -> TcpStream {
    let mut stream = TcpStream::connect(gateway.address()).unwrap();
    let head = format!(
        "POST {COMPLETIONS} HTTP/1.1\r\nhost: t\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).unwrap();
    stream.write_all(&body.as_bytes()[..sent]).unwrap();
    stream
}

#[tokio::test]
async fn aborts_in_every_phase_release_everything() {
    // Slow engines: a request is in flight until its client leaves.
    let gateway = Setup {
        sim_flags: &["--time-scale=0.2"],
        ..Setup::default()
    }
    .start()
    .await;
    let body = completion(&"abort".repeat(1000), 500, true);
    // During the upload: after the headers, in the middle, one byte before the end.
    for sent in [0, body.len() / 2, body.len() - 1] {
        let stream = begin(&gateway, &body, sent);
        stream.shutdown(Shutdown::Both).unwrap();
    }
    // While the engine thinks, and while it streams.
    let waiting = begin(&gateway, &body, body.len());
    eventually("the request is booked", || async {
        gateway.in_flight().await.0 == 1
    })
    .await;
    waiting.shutdown(Shutdown::Both).unwrap();
    gateway.wait_until_idle().await;
    let mut streaming = begin(&gateway, &body, body.len());
    streaming
        .set_read_timeout(Some(Duration::from_secs(20)))
        .unwrap();
    let read = tokio::task::spawn_blocking(move || {
        use std::io::Read;
        let mut buffer = [0; 4096];
        let n = streaming.read(&mut buffer).unwrap();
        (
            streaming,
            String::from_utf8_lossy(&buffer[..n]).into_owned(),
        )
    });
    let (streaming, begun) = read.await.unwrap();
    assert!(begun.starts_with("HTTP/1.1 200"), "{begun}");
    streaming.shutdown(Shutdown::Both).unwrap();
    gateway.wait_until_idle().await;
    eventually("the engines dropped their work", || async {
        let mut running = 0;
        for pod in &gateway.sims.addresses {
            let stats = support::get(*pod, "/sim/stats").await.unwrap();
            let stats: serde_json::Value = serde_json::from_slice(&stats.body).unwrap();
            running += stats["running"].as_i64().unwrap() + stats["waiting"].as_i64().unwrap();
        }
        running == 0
    })
    .await;
    assert!(gateway.metric("pinpod_aborted_requests_total").await >= 2.0);
}

#[tokio::test]
async fn a_burst_inside_one_scrape_interval_spreads() {
    let config = include_str!("../deploy/config/recommended.yaml");
    let setup = Setup {
        pods: 4,
        sim_flags: &["--time-scale=0.5"],
        serve_flags: &["--refresh-metrics-interval=60s"],
        config: Some(config),
        ..Setup::default()
    };
    let gateway = std::sync::Arc::new(setup.start().await);
    let body = completion(&"burst".repeat(2000), 20, false);
    let tasks: Vec<_> = (0..100)
        .map(|_| {
            let (gateway, body) = (std::sync::Arc::clone(&gateway), body.clone());
            tokio::spawn(async move { gateway.post(COMPLETIONS, body).await.pod().to_owned() })
        })
        .collect();
    let mut counts = std::collections::HashMap::new();
    for task in tasks {
        *counts.entry(task.await.unwrap()).or_insert(0) += 1;
    }
    // 25 each if spread evenly; an endpoint counts as idle up to 16 and may run ahead by its share.
    assert_eq!(counts.len(), 4, "{counts:?}");
    assert!(counts.values().all(|n| (10..=40).contains(n)), "{counts:?}");
    gateway.wait_until_idle().await;
}

/// Mixed traffic with random aborts; afterwards nothing is booked and memory is back.
async fn soak(requests: usize) {
    let gateway = std::sync::Arc::new(
        Setup {
            sim_flags: &["--time-scale=100"],
            ..Setup::default()
        }
        .start()
        .await,
    );
    let resident = |pid: u32| {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let line = status.lines().find(|l| l.starts_with("VmRSS")).unwrap();
        line.split_whitespace()
            .nth(1)
            .unwrap()
            .parse::<usize>()
            .unwrap()
    };
    let one = |number: usize| {
        let gateway = std::sync::Arc::clone(&gateway);
        async move {
            let mut rng = fastrand::Rng::with_seed(number as u64);
            let body = completion(
                &format!("{}", rng.u8(..20)).repeat(rng.usize(1..8000)),
                rng.usize(1..40),
                rng.bool(),
            );
            match rng.u8(..6) {
                0 => drop(gateway.get(MODELS).await),
                1 => drop(begin(&gateway, &body, rng.usize(..body.len()))),
                2 => drop(begin(&gateway, &body, body.len())),
                3 => drop(gateway.post_h2(COMPLETIONS, body).await),
                _ => assert_eq!(gateway.post(COMPLETIONS, body).await.status, 200),
            }
        }
    };
    let mut warm = 0;
    let mut next = 0;
    while next < requests {
        let wave: Vec<_> = (next..(next + 50).min(requests))
            .map(|number| tokio::spawn(one(number)))
            .collect();
        next += wave.len();
        for task in wave {
            task.await.unwrap();
        }
        if warm == 0 && next >= requests / 4 {
            gateway.wait_until_idle().await;
            warm = resident(gateway.picker.process.id());
        }
    }
    gateway.wait_until_idle().await;
    let after = resident(gateway.picker.process.id());
    assert!(
        after < warm + 30_000,
        "resident memory grew from {warm} to {after} KiB"
    );
}

#[tokio::test]
async fn a_soak_of_twenty_thousand_leaves_nothing_behind() {
    soak(20_000).await;
}
