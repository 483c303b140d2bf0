//! `pinpod doctor` as a process: a whole installation with the real Envoy, well and broken.

use std::net::SocketAddr;
use std::process::Output;

use pinpod::demo::client::Connections;
use pinpod::demo::envoy::ORIGINAL_DST;
use pinpod::demo::processes::{Envoy, Picker, Sims, free_port_range, free_ports};
use serde_json::Value;

use super::process::{program, run, text};

fn doctor(arguments: &[String]) -> Output {
    let arguments: Vec<String> = std::iter::once("doctor".to_owned())
        .chain(arguments.iter().cloned())
        .collect();
    let borrowed: Vec<&str> = arguments.iter().map(String::as_str).collect();
    run(&borrowed)
}

/// Checks of everything that is not as it should be.
fn bad(output: &Output) -> Vec<(String, String)> {
    let document: Value = serde_json::from_slice(&output.stdout).unwrap();
    let findings = document["findings"].as_array().unwrap();
    let own = |value: &Value| value.as_str().unwrap().to_owned();
    findings
        .iter()
        .filter(|f| f["severity"] != "ok")
        .map(|f| (own(&f["severity"]), own(&f["check"])))
        .collect()
}

fn pairs(list: &[(&str, &str)]) -> Vec<(String, String)> {
    list.iter()
        .map(|(a, b)| ((*a).to_owned(), (*b).to_owned()))
        .collect()
}

async fn until_envoy_is_content(admin: u16) {
    for _ in 0..400 {
        let line = format!("--envoy-admin=127.0.0.1:{admin}");
        if doctor(&[line]).status.success() {
            return;
        }
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
    panic!("Envoy does not find its picker healthy");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_installation_that_works_is_told_so_and_one_that_does_not_how_to_mend_it() {
    let directory = tempfile::tempdir().unwrap();
    let [live, replay] = [2; 2].map(|count| free_port_range(count).unwrap());
    let events = format!(
        r#"--kv-events-config={{"enable_kv_cache_events":true,"publisher":"zmq","endpoint":"tcp://*:{live}","replay_endpoint":"tcp://*:{replay}"}}"#
    );
    let sims = Sims::start(program(), 2, &[events], directory.path())
        .await
        .unwrap();
    let flags = [sims.endpoints_flag(), "--secure-serving=true".to_owned()];
    let mut picker = Picker::start(program(), &flags, directory.path())
        .await
        .unwrap();
    let pods: Vec<SocketAddr> = sims.addresses.clone();
    let envoy = Envoy::start(ORIGINAL_DST, picker.grpc, false, pods, directory.path())
        .await
        .unwrap();
    until_envoy_is_content(envoy.admin).await;
    // A prompt of more than one block, so that there is something to replay.
    let body =
        serde_json::json!({"model": "sim-model", "max_tokens": 1, "prompt": "word ".repeat(200)});
    Connections::new(sims.addresses[0])
        .post("/v1/completions", body.to_string().into())
        .await
        .unwrap();
    let line = [
        "--json".to_owned(),
        format!("--kv-events-port={live}"),
        format!("--kv-replay-port={replay}"),
        format!("--picker=127.0.0.1:{}", picker.grpc),
        format!("--picker-metrics=127.0.0.1:{}", picker.metrics),
        format!("--envoy-admin=127.0.0.1:{}", envoy.admin),
        sims.endpoints_flag(),
    ];
    let well = doctor(&line);
    assert_eq!(bad(&well), [], "{}", text(&well.stdout));
    assert_eq!(well.status.code(), Some(0));
    let document: Value = serde_json::from_slice(&well.stdout).unwrap();
    let checks: Vec<&str> = document["findings"]
        .as_array()
        .unwrap()
        .iter()
        .map(|f| f["check"].as_str().unwrap())
        .collect();
    for check in [
        "envoy-processing-mode",
        "envoy-destination",
        "envoy-route-timeout",
        "envoy-picker-host",
        "picker-port",
        "picker-certificate",
        "pool",
        "endpoint-metrics",
        "pool-models",
        "kv-events",
    ] {
        assert!(checks.contains(&check), "{check} in {checks:?}");
    }

    // An Envoy that speaks plaintext to this picker, and one endpoint that is not there.
    let plaintext = Envoy::start(ORIGINAL_DST, picker.grpc, true, vec![], directory.path())
        .await
        .unwrap();
    let [nobody] = free_ports().unwrap();
    let line = [
        "--json".to_owned(),
        format!("--picker=127.0.0.1:{}", picker.grpc),
        format!("--envoy-admin=127.0.0.1:{}", plaintext.admin),
        format!("--endpoints=127.0.0.1:{nobody}"),
        format!("--kv-events-port={nobody}"),
        "--wait=500ms".to_owned(),
    ];
    let ill = doctor(&line);
    assert_eq!(ill.status.code(), Some(1));
    let found = bad(&ill);
    for pair in pairs(&[
        ("error", "envoy-picker-tls"),
        ("error", "endpoint"),
        ("error", "kv-events"),
    ]) {
        assert!(found.contains(&pair), "{pair:?} in {found:?}");
    }

    // The picker goes.
    picker.process.kill();
    let line = [format!("--picker=127.0.0.1:{}", picker.grpc)];
    let gone = doctor(&line);
    assert_eq!(gone.status.code(), Some(1));
    let shown = text(&gone.stdout);
    assert!(shown.starts_with("ERROR    picker-port"), "{shown}");
    assert!(shown.contains("-> start the picker"), "{shown}");
    assert!(shown.ends_with("1 errors, 0 warnings, 0 as they should be\n"));
}

#[test]
fn usage_is_told_apart_from_findings() {
    assert_eq!(run(&["doctor", "--nonsense"]).status.code(), Some(2));
    assert_eq!(run(&["doctor", "--picker=nowhere"]).status.code(), Some(2));
    let nothing = run(&["doctor"]);
    assert_eq!(nothing.status.code(), Some(1));
    assert!(text(&nothing.stderr).contains("nothing to look at"));
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("config.yaml");
    std::fs::write(&path, "plugins: [").unwrap();
    let file = format!("--config-file={}", path.display());
    let broken = run(&["doctor", &file]);
    assert_eq!(broken.status.code(), Some(1));
    assert!(text(&broken.stdout).contains("configuration"));
    let shipped = concat!(
        "--config-file=",
        env!("CARGO_MANIFEST_DIR"),
        "/deploy/config/recommended.yaml"
    );
    assert_eq!(run(&["doctor", shipped]).status.code(), Some(0));
}
