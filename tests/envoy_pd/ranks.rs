//! One sidecar with a listener for each data-parallel rank, before an engine for each.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::time::Duration;

use pinpod::demo::envoy::ORIGINAL_DST;
use pinpod::demo::processes::{Envoy, Picker, Process, Sims, free_port_range};
use serde_json::Value;

use super::super::support::{
    Answer, Gateway, completion, get, post_to, post_with, program, send_signal,
};
use super::pods::{text, until};

const RANKS: u16 = 3;
const CONFIG: &str = "
apiVersion: llm-d.ai/v1alpha1
kind: EndpointPickerConfig
plugins:
- {type: data-parallel-profile-handler, parameters: {primaryPort: PRIMARY}}
- {type: active-request-scorer}
- {type: prefix-cache-scorer}
- {type: max-score-picker}
schedulingProfiles:
- name: default
  plugins: [{pluginRef: active-request-scorer, weight: 1}, {pluginRef: prefix-cache-scorer, weight: 2}, {pluginRef: max-score-picker}]
";

fn local(port: u16) -> SocketAddr {
    ([127, 0, 0, 1], port).into()
}

async fn stats(engine: SocketAddr) -> Value {
    let answer = get(engine, "/sim/stats").await.unwrap();
    serde_json::from_slice(&answer.body).unwrap()
}

#[tokio::test]
async fn every_rank_has_a_listener_and_the_first_speaks_for_all() {
    let directory = tempfile::tempdir().unwrap();
    let at = directory.path();
    let engine = |role: &str| {
        [
            "--time-scale=50",
            "--kv-side-channel-port=0",
            "--data-parallel",
        ]
        .map(str::to_owned)
        .into_iter()
        .chain([format!("--kv-role={role}")])
        .collect::<Vec<_>>()
    };
    let ranks = Sims::start(program(), RANKS, &engine("decode"), at)
        .await
        .unwrap();
    let prefill = Sims::start(program(), 1, &engine("prefill"), at)
        .await
        .unwrap();
    let port = free_port_range(RANKS + 1).unwrap();
    let flags = [
        "sidecar".to_owned(),
        format!("--port={port}"),
        format!("--data-parallel-size={RANKS}"),
        format!("--model-server-port={}", ranks.addresses[0].port()),
        format!("--metrics-port={}", port + RANKS),
        format!("--allowed-targets={}", prefill.addresses[0]),
        "--secure-proxy=false".to_owned(),
        "--pod-ip=127.0.0.1".to_owned(),
    ];
    let mut sidecar = Process::start("sidecar", program(), &flags, at).unwrap();
    for rank in 0..RANKS {
        sidecar.wait_for_port(port + rank).await.unwrap();
    }
    let ask = async |rank: u16, headers: &[(&str, &str)]| -> Answer {
        let body = completion(&text("rivers", 600), 1, false);
        post_with(local(port + rank), super::super::COMPLETIONS, body, headers).await
    };

    // Each listener has its own engine; a header may name another one to the first listener only.
    for rank in 0..RANKS {
        assert_eq!(ask(rank, &[]).await.pod(), format!("sim-{rank}"));
        let named = format!("127.0.0.1:{}", port + 2);
        let served = if rank == 0 { 2 } else { rank };
        let answer = ask(rank, &[("x-data-parallel-host-port", &named)]).await;
        assert_eq!(answer.pod(), format!("sim-{served}"));
    }
    for stranger in [
        format!("127.0.0.1:{}", port + RANKS),
        format!("10.0.0.1:{port}"),
    ] {
        let refused = ask(0, &[("x-data-parallel-host-port", &stranger)]).await;
        assert_eq!(refused.status, 400, "{stranger}");
        assert!(refused.text().contains("unknown data parallel endpoint"));
    }

    // A prompt that is prefilled elsewhere ends up on the rank that was meant.
    let target = prefill.addresses[0].to_string();
    for rank in 0..RANKS {
        let body = completion(&text(&format!("lamps {rank}"), 600), 1, false);
        let headers = [("x-prefiller-host-port", target.as_str())];
        let answer = post_with(
            local(port + rank),
            super::super::COMPLETIONS,
            body,
            &headers,
        )
        .await;
        assert_eq!(answer.pod(), format!("sim-{rank}"), "{}", answer.text());
        let stats = stats(ranks.addresses[usize::from(rank)]).await;
        assert_eq!(stats["pulled_prompt_tokens"], 599, "{rank}: {stats}");
    }
    // One rank in trouble is no trouble of the others.
    let set = post_to(ranks.addresses[1], "/sim/fault", r#"{"mode":"error503"}"#).await;
    assert_eq!(set.status, 200);
    assert_eq!(ask(0, &[]).await.status, 200);
    assert_eq!(ask(1, &[]).await.status, 503);
    let set = post_to(ranks.addresses[1], "/sim/fault", r#"{"mode":"none"}"#).await;
    assert_eq!(set.status, 200);

    // A gateway that knows one port of the pod reaches every rank through it.
    let addresses: Vec<String> = (0..RANKS).map(|r| local(port + r).to_string()).collect();
    let flags = [
        format!("--endpoints={}", addresses.join(",")),
        format!(
            "--config-text={}",
            CONFIG.replace("PRIMARY", &port.to_string())
        ),
    ];
    let picker = Picker::start(program(), &flags, at).await.unwrap();
    let envoy = Envoy::start(ORIGINAL_DST, picker.grpc, true, Vec::new(), at)
        .await
        .unwrap();
    let gateway = Gateway {
        envoy,
        picker,
        sims: ranks,
        directory,
    };
    gateway.wait_until_healthy().await;
    let mut served = BTreeSet::new();
    for number in 0..60 {
        let body = completion(&text(&format!("boats {number}"), 600), 1, false);
        let answer = gateway.post(super::super::COMPLETIONS, body).await;
        assert_eq!(answer.status, 200, "{}", answer.text());
        served.insert(answer.pod().to_owned());
        if served.len() == usize::from(RANKS) {
            break;
        }
    }
    assert_eq!(served.len(), usize::from(RANKS), "{served:?}");
    gateway.wait_until_idle().await;
    until("nothing is left", async || {
        let state = get(local(port + RANKS), "/debug/plugins/state")
            .await
            .unwrap()
            .text();
        let legs = r#""legs":{"bootstrap":0,"decode":0,"encode":0,"prefill":0}"#;
        state.contains(legs).then_some(()).ok_or(state)
    })
    .await;

    // All listeners end together.
    send_signal("TERM", &sidecar.id().to_string());
    let ended = async {
        while sidecar.check().is_ok() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(30), ended)
        .await
        .unwrap();
    for rank in 0..RANKS {
        assert!(get(local(port + rank), "/health").await.is_err(), "{rank}");
    }
}
