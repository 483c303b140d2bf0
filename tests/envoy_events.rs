//! Exact prefix routing over simulated pods that publish KV events, tokens asked of one of them.

use std::net::SocketAddr;
use std::time::Duration;

use pinpod::demo::envoy::ORIGINAL_DST;
use pinpod::demo::processes::{Envoy, Picker, Sims, free_port_range};
use serde_json::{Value, json};

use super::COMPLETIONS;
use super::support::{Gateway, completion, post_to, program};

const CONFIG: &str = r#"
apiVersion: llm-d.ai/v1alpha1
kind: EndpointPickerConfig
plugins:
- {type: token-producer, parameters: {modelName: sim-model, vllm: {url: "http://ENGINE"}}}
- type: precise-prefix-cache-producer
  parameters: {kvEventsConfig: {podDiscoveryConfig: {replaySocketPort: 5657}}}
- {type: prefix-cache-scorer, parameters: {prefixMatchInfoProducerName: precise-prefix-cache-producer}}
- {type: file-discovery, parameters: {path: "ENDPOINTS"}}
- type: max-score-picker
dataLayer:
  discovery: {pluginRef: file-discovery}
schedulingProfiles:
- {name: default, plugins: [{pluginRef: prefix-cache-scorer, weight: 1}, {pluginRef: max-score-picker}]}
"#;

/// Time for events to travel, and for a subscriber to come back.
const SETTLE: Duration = Duration::from_millis(1500);

async fn gateway() -> Gateway {
    let directory = tempfile::tempdir().unwrap();
    // Two for events, two for replay.
    let first = free_port_range(4).unwrap();
    let events = json!({
        "enable_kv_cache_events": true, "endpoint": format!("tcp://*:{first}"),
        "replay_endpoint": format!("tcp://*:{}", first + 2),
    });
    let flags = [
        "--time-scale=50".to_owned(),
        "--enable-scale-out".to_owned(),
        format!("--kv-events-config={events}"),
    ];
    let sims = Sims::start(program(), 2, &flags, directory.path())
        .await
        .unwrap();
    let endpoint = |(number, address): (u16, &SocketAddr)| {
        json!({
            "name": format!("sim-{number}"), "address": "127.0.0.1", "port": address.port().to_string(),
            "labels": {
                "pinpod.dev/kv-events-port": (first + number).to_string(),
                "pinpod.dev/kv-events-replay-port": (first + 2 + number).to_string(),
            },
        })
    };
    let endpoints: Vec<Value> = (0..).zip(&sims.addresses).map(endpoint).collect();
    let file = directory.path().join("endpoints.json");
    std::fs::write(&file, json!({ "endpoints": endpoints }).to_string()).unwrap();
    let config = CONFIG
        .replace("ENGINE", &sims.addresses[0].to_string())
        .replace("ENDPOINTS", &file.display().to_string());
    let flags = [
        "--pool-name=pool".to_owned(),
        format!("--config-text={config}"),
    ];
    let picker = Picker::start(program(), &flags, directory.path())
        .await
        .unwrap();
    let endpoints = sims.addresses.clone();
    let envoy = Envoy::start(ORIGINAL_DST, picker.grpc, true, endpoints, directory.path())
        .await
        .unwrap();
    let gateway = Gateway {
        envoy,
        picker,
        sims,
        directory,
    };
    gateway.wait_until_healthy().await;
    gateway
}

/// 256 tokens of its own, and a few more.
fn prompt(name: &str, end: usize) -> String {
    completion(
        &format!("{}{end}", name.repeat(1024 / name.len())),
        1,
        false,
    )
}

impl Gateway {
    /// Sends a prompt straight to pod `number`, so that the picker can know of it by events alone.
    async fn warm(&self, number: usize, name: &str) {
        let pod = self.sims.addresses[number];
        let answer = post_to(pod, COMPLETIONS, prompt(name, 0)).await;
        assert_eq!(answer.status, 200, "{}", answer.text());
    }

    /// Every request with that prefix is served by pod `number`, from its cache.
    async fn expect(&self, number: usize, name: &str) {
        tokio::time::sleep(SETTLE).await;
        for end in 1..=8 {
            let answer = self.post(COMPLETIONS, prompt(name, end)).await;
            assert_eq!(answer.pod(), format!("sim-{number}"), "{name} {end}");
            let body: Value = serde_json::from_slice(&answer.body).unwrap();
            assert_eq!(
                body["usage"]["prompt_tokens_details"]["cached_tokens"], 256,
                "{name} {end}"
            );
        }
    }
}

#[tokio::test]
async fn a_prompt_meets_the_pod_whose_events_told_of_it() {
    let gateway = gateway().await;
    let second = gateway.sims.addresses[1];
    tokio::time::sleep(SETTLE).await;

    for (number, name) in [(0, "abcd"), (1, "efgh"), (1, "ijkl"), (0, "mnop")] {
        gateway.warm(number, name).await;
        gateway.expect(number, name).await;
    }

    // What a pod forgot must be looked for elsewhere. It tells with its next step.
    gateway.warm(1, "qrst").await;
    let reset = post_to(second, "/reset_prefix_cache", "").await;
    assert_eq!(reset.text(), r#"{"success":true}"#);
    gateway.warm(1, "step").await;
    gateway.warm(0, "qrst").await;
    gateway.expect(0, "qrst").await;

    // So must what a restarted pod had, whose numbers begin anew; and its new events are followed.
    gateway.warm(1, "uvwx").await;
    tokio::time::sleep(SETTLE).await;
    assert_eq!(post_to(second, "/sim/restart", "").await.status, 200);
    gateway.warm(0, "uvwx").await;
    gateway.expect(0, "uvwx").await;
    gateway.warm(1, "yzab").await;
    gateway.expect(1, "yzab").await;
    gateway.wait_until_idle().await;
}
