//! A prompt computed by one pod and continued by another, against what two vLLM 0.32 servers said to
//! each other.

use std::time::Duration;

use super::super::fixtures::recording;
use super::super::transfer::{Role, TransferSetup};
use super::*;

/// Two pods that hand over, the lease of kept blocks in seconds.
async fn pods(lease: u64) -> (Pod, Pod) {
    let pod = |engine: &str, role| {
        let setup = TransferSetup {
            role,
            engine_id: engine.to_owned(),
            host: "127.0.0.1".to_owned(),
            port: 0,
            lease: Duration::from_secs(lease),
            // Two layers of two heads of 32, keys and values, two bytes each, as recorded.
            token_bytes: 512.0,
            bytes_per_second: 1e9,
        };
        SimConfig {
            transfer: Some(setup),
            ..Pod::config(true)
        }
    };
    (
        Pod::with(pod("prefill", Role::Prefill)).await,
        Pod::with(pod("decode", Role::Decode)).await,
    )
}

/// A recorded exchange.
fn step(name: &str, server: &str) -> Value {
    let file: Value = serde_json::from_str(&recording("pd/steps.json")).unwrap();
    let steps = file["steps"].as_array().unwrap();
    let found = steps
        .iter()
        .find(|step| step["step"] == name && step["server"] == server);
    found.unwrap().clone()
}

/// The names and kinds of an object's values.
fn kinds(object: &Value) -> Vec<(String, std::mem::Discriminant<Value>)> {
    let fields = object.as_object().unwrap().iter();
    let kind = |(name, value): (&String, &Value)| (name.clone(), std::mem::discriminant(value));
    let mut kinds: Vec<_> = fields.map(kind).collect();
    kinds.sort_by(|a, b| a.0.cmp(&b.0));
    kinds
}

fn prefill(more: &Value) -> Value {
    let params = step("completion", "prefill")["request"]["kv_transfer_params"].clone();
    extended(
        more.clone(),
        json!({"max_tokens": 1, "stream": false, "kv_transfer_params": params}),
    )
}

#[tokio::test]
async fn a_completion_is_handed_over_as_recorded() {
    let (prefill_pod, decode_pod) = pods(30).await;
    let body = completion(json!({"max_tokens": 6}));
    // The recorded run did the same twice; the second time both had the first 128 tokens.
    for (name, cached) in [("completion", 0), ("completion-same-again", 128)] {
        let first = prefill_pod.value(COMPLETIONS, prefill(&body)).await;
        let recorded = step(name, "prefill")["response"].clone();
        let params = first["kv_transfer_params"].clone();
        assert_eq!(kinds(&params), kinds(&recorded["kv_transfer_params"]));
        assert_eq!(first["usage"], recorded["usage"]);
        // 137 tokens are in 9 blocks.
        assert_eq!(
            params["remote_block_ids"][0].as_array().map(Vec::len),
            Some(9)
        );
        let told = &recorded["kv_transfer_params"];
        for field in [
            "remote_num_tokens",
            "remote_prefill_cached_tokens",
            "transfer_mode",
            "tp_size",
        ] {
            assert_eq!(params[field], told[field], "{field}");
        }
        let request = params["remote_request_id"].as_str().unwrap();
        assert!(
            request.starts_with("cmpl-fixture-request-1-0-"),
            "{request}"
        );
        assert!(
            prefill_pod.metric("vllm:kv_cache_usage_perc").await > 0.0,
            "kept"
        );

        let second = extended(body.clone(), json!({"kv_transfer_params": params}));
        let second = decode_pod.value(COMPLETIONS, second).await;
        assert_eq!(second["kv_transfer_params"], Value::Null);
        assert_eq!(second["usage"], step(name, "decode")["response"]["usage"]);
        assert_eq!(
            second["usage"]["prompt_tokens_details"]["cached_tokens"],
            cached
        );
        assert_eq!(
            prefill_pod.metric("vllm:kv_cache_usage_perc").await,
            0.0,
            "freed once they were pulled"
        );
    }
    // 137 tokens came from the other pod, then 9 behind the 128 that were cached. Of each the last is
    // computed: 136 + 8.
    for (series, value) in [
        ("vllm:external_prefix_cache_queries_total", 146.0),
        ("vllm:external_prefix_cache_hits_total", 146.0),
        ("vllm:prefix_cache_hits_total", 128.0),
        (
            "vllm:prompt_tokens_by_source_total{engine=\"0\",model_name=\"tiny\",source=\"external_kv_transfer\"}",
            144.0,
        ),
        (
            "vllm:prompt_tokens_by_source_total{engine=\"0\",model_name=\"tiny\",source=\"local_compute\"}",
            2.0,
        ),
    ] {
        assert_eq!(decode_pod.metric(series).await, value, "{series}");
    }
    assert_eq!(
        prefill_pod
            .metric("vllm:external_prefix_cache_hits_total")
            .await,
        0.0
    );
    // Nine blocks of 16 tokens, then the one that the cache lacked. Each time they are neighbours.
    for (series, value) in [
        ("vllm:nixl_xfer_time_seconds_count", 2.0),
        ("vllm:nixl_post_time_seconds_count", 2.0),
        ("vllm:nixl_bytes_transferred_count", 2.0),
        ("vllm:nixl_bytes_transferred_sum", 10.0 * 8192.0),
        (
            "vllm:nixl_bytes_transferred_bucket{engine=\"0\",le=\"8192.0\",model_name=\"tiny\"}",
            1.0,
        ),
        ("vllm:nixl_num_descriptors_sum", 2.0),
        ("vllm:nixl_num_failed_transfers_total", 0.0),
    ] {
        assert_eq!(decode_pod.metric(series).await, value, "{series}");
    }
    for pod in [&prefill_pod, &decode_pod] {
        assert_eq!(pod.metric("vllm:nixl_num_kv_expired_reqs_total").await, 0.0);
        let late = "vllm:nixl_num_notifications_after_expiry_total";
        assert_eq!(pod.metric(late).await, 0.0);
    }
    // The side that is pulled from counts no transfer.
    let transfers = "vllm:nixl_xfer_time_seconds_count";
    assert_eq!(prefill_pod.metric(transfers).await, 0.0);
}

#[tokio::test]
async fn a_stream_after_a_handover_has_the_recorded_form() {
    let (prefill_pod, decode_pod) = pods(30).await;
    let body = chat(json!({"max_tokens": 6}));
    let first = prefill_pod.value(CHAT, prefill(&body)).await;
    let recorded = step("chat-stream", "prefill")["response"].clone();
    assert_eq!(first["usage"], recorded["usage"]);
    let request = first["kv_transfer_params"]["remote_request_id"]
        .as_str()
        .unwrap();
    assert!(
        request.starts_with("chatcmpl-fixture-request-1-"),
        "{request}"
    );
    let stream = json!({
        "stream": true, "stream_options": {"include_usage": true},
        "kv_transfer_params": first["kv_transfer_params"],
    });
    let (status, text) = decode_pod.post(CHAT, extended(body, stream)).await;
    let recorded = step("chat-stream", "decode");
    assert_eq!(
        (status, skeleton(&text)),
        (200, skeleton(recorded["response"].as_str().unwrap()))
    );
    assert!(text.contains(r#"{"cached_tokens":0,"created_cache_tokens":0}"#));
}

#[tokio::test]
async fn what_is_not_there_is_refused_as_recorded() {
    let (prefill_pod, decode_pod) = pods(30).await;
    let recorded = step("unreachable-prefill", "decode");
    let gone = completion(json!({
        "kv_transfer_params": recorded["request"]["kv_transfer_params"],
    }));
    let refused = (500, recorded["response"].clone());
    let answer =
        |(status, text): (u16, String)| (status, serde_json::from_str::<Value>(&text).unwrap());
    assert_eq!(answer(decode_pod.post(COMPLETIONS, gone).await), refused);

    let body = completion(json!({"max_tokens": 6}));
    let first = prefill_pod.value(COMPLETIONS, prefill(&body)).await;
    let params = &first["kv_transfer_params"];
    for (field, value) in [
        ("remote_request_id", "other"),
        ("remote_engine_id", "restarted"),
    ] {
        let wrong = extended(params.clone(), json!({field: value}));
        let wrong = extended(body.clone(), json!({"kv_transfer_params": wrong}));
        assert_eq!(
            answer(decode_pod.post(COMPLETIONS, wrong).await),
            refused,
            "{field}"
        );
    }
    // A restart loses what was kept.
    prefill_pod.post("/sim/restart", json!({})).await;
    let late = extended(body.clone(), json!({"kv_transfer_params": params}));
    assert_eq!(answer(decode_pod.post(COMPLETIONS, late).await), refused);
    // Without an address it is served as if nothing had been said.
    let half = json!({"do_remote_prefill": true, "remote_block_ids": [[1]]});
    let half = extended(body, json!({"kv_transfer_params": half}));
    decode_pod.value(COMPLETIONS, half).await;
    for (series, value) in [
        // Nobody there, two names that are unknown, one that was lost.
        ("vllm:nixl_num_failed_transfers_total", 4.0),
        ("vllm:nixl_xfer_time_seconds_count", 0.0),
        ("vllm:nixl_num_failed_notifications_total", 0.0),
    ] {
        assert_eq!(decode_pod.metric(series).await, value, "{series}");
    }
}

#[tokio::test]
async fn blocks_that_nobody_pulls_are_freed_when_their_lease_ends() {
    let (prefill_pod, decode_pod) = pods(0).await;
    let body = completion(json!({"max_tokens": 6}));
    let first = prefill_pod.value(COMPLETIONS, prefill(&body)).await;
    assert_eq!(prefill_pod.metric("vllm:kv_cache_usage_perc").await, 0.0);
    let late = extended(
        body,
        json!({"kv_transfer_params": first["kv_transfer_params"]}),
    );
    assert_eq!(decode_pod.post(COMPLETIONS, late).await.0, 500);
    let expired = "vllm:nixl_num_kv_expired_reqs_total";
    assert_eq!(prefill_pod.metric(expired).await, 1.0);
    assert_eq!(decode_pod.metric(expired).await, 0.0);
}

#[tokio::test]
async fn parameters_without_blocks_end_the_engine_as_recorded() {
    let recorded: Value = serde_json::from_str(&recording("pd/half-params.json")).unwrap();
    let (_, decode_pod) = pods(30).await;
    let half = completion(json!({
        "kv_transfer_params": recorded["request"]["kv_transfer_params"],
    }));
    let (status, text) = decode_pod.post(COMPLETIONS, half.clone()).await;
    assert_eq!(status, 500);
    assert_eq!(
        serde_json::from_str::<Value>(&text).unwrap(),
        recorded["response"]
    );
    // "ConnectError" afterwards.
    let deadline = tokio::time::Instant::now() + Duration::from_secs(10);
    while TcpStream::connect(decode_pod.address).await.is_ok() {
        assert!(tokio::time::Instant::now() < deadline, "it still listens");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    // A pod that hands over nothing ignores them.
    Pod::start(true).await.value(COMPLETIONS, half).await;
}

#[tokio::test]
async fn faults_break_answers_in_the_middle_or_make_them_garbage() {
    let (pod, _) = pods(30).await;
    let fault = async |mode: &str| {
        assert_eq!(pod.post("/sim/fault", json!({"mode": mode})).await.0, 200);
    };
    fault("garbage").await;
    let (status, text) = pod.post(COMPLETIONS, completion(json!({}))).await;
    assert!(status == 200 && serde_json::from_str::<Value>(&text).is_err());
    fault("drop-mid-response").await;
    for stream in [false, true] {
        let body = completion(json!({"stream": stream})).to_string();
        let request = format!(
            "POST {COMPLETIONS} HTTP/1.1\r\nhost: pod\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        );
        let mut stream = TcpStream::connect(pod.address).await.unwrap();
        tokio::io::AsyncWriteExt::write_all(&mut stream, request.as_bytes())
            .await
            .unwrap();
        let mut bytes = Vec::new();
        let _ = tokio::io::AsyncReadExt::read_to_end(&mut stream, &mut bytes).await;
        let text = String::from_utf8(bytes).unwrap();
        assert!(
            text.starts_with("HTTP/1.1 200") && text.contains("cmpl-"),
            "{text}"
        );
        assert!(
            !text.ends_with("0\r\n\r\n"),
            "the last chunk is missing: {text}"
        );
    }
}
