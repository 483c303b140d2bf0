//! The other ways of splitting a request.

use serde_json::{Value, json};

use super::super::settings::{EcConnector, KvConnector, MoriIo};
use super::*;

fn with(kv_connector: KvConnector) -> Settings {
    Settings {
        kv_connector,
        prefill_timeout: Some(Duration::from_millis(300)),
        ..Settings::default()
    }
}

fn read(text: &str) -> Value {
    serde_json::from_str(text).unwrap()
}

async fn split(sidecar: &Running, prefill: &Engine, body: &str) -> Answered {
    let target = prefill.address.to_string();
    let answer = sidecar
        .ask(CHAT, &[("x-prefiller-host-port", &target)], body)
        .await;
    sidecar.nothing_left().await;
    answer
}

#[tokio::test]
async fn shared_storage_says_only_that_anything_cached_will_do() {
    let prefill = Engine::start([Act::json("{}")]).await;
    let decode = Engine::start([Act::json("{}")]).await;
    let sidecar = Running::start(&decode, with(KvConnector::SharedStorage)).await;
    split(&sidecar, &prefill, r#"{"stream":true,"max_tokens":9}"#).await;
    assert_eq!(
        prefill.only().body,
        r#"{"stream":false,"max_tokens":1,"cache_hit_threshold":0,"max_completion_tokens":1}"#
    );
    assert_eq!(
        decode.only().body,
        r#"{"stream":true,"max_tokens":9,"cache_hit_threshold":0}"#
    );
}

#[tokio::test]
async fn shared_storage_decodes_at_once_what_is_cached() {
    let answered = r#"{"choices":[{"finish_reason":"stop","message":{"content":"x"}}]}"#;
    let gave_up = r#"{"choices":[{"finish_reason":"cache_threshold"}]}"#;
    let role = "data: {\"choices\":[{\"delta\":{\"role\":\"assistant\",\"content\":\"\"},\"finish_reason\":null}]}\n\n";
    let word = "data: {\"choices\":[{\"delta\":{\"content\":\"x\"},\"finish_reason\":null}]}\n\n";
    let event = format!("data: {gave_up}\n\n");
    for (first, prefills) in [
        (Act::json(answered), 0),
        (Act::json(gave_up), 1),
        (Act::Stream(vec![role.into(), word.into()]), 0),
        (Act::Stream(vec![role.into(), event.clone()]), 1),
        (Act::Stream(vec![event]), 1),
    ] {
        let prefill = Engine::start([Act::json("{}")]).await;
        let decode = Engine::start([first.clone(), Act::json("{}")]).await;
        let sidecar = Running::start(&decode, with(KvConnector::SharedStorage)).await;
        let body = r#"{"cache_hit_threshold":0.8}"#;
        let answer = split(&sidecar, &prefill, body).await;
        assert_eq!(prefill.seen().len(), prefills, "{first:?}");
        assert_eq!(decode.seen()[0].body, body);
        assert_eq!(decode.seen().len(), 1 + prefills);
        if prefills == 1 {
            assert_eq!(answer.body, "{}");
            assert_eq!(decode.seen()[1].body, r#"{"cache_hit_threshold":0}"#);
        } else if let Act::Stream(pieces) = first {
            assert_eq!(answer.body, pieces.concat());
        } else {
            assert_eq!(answer.body, answered);
        }
    }
}

#[tokio::test]
async fn sglang_engines_meet_in_one_room() {
    let prefill = Engine::start([Act::json("{}")]).await;
    let decode = Engine::start([Act::json(r#"{"a":1}"#)]).await;
    let settings = Settings {
        sglang_bootstrap_port: 9100,
        ..with(KvConnector::Sglang)
    };
    let sidecar = Running::start(&decode, settings).await;
    let answer = split(&sidecar, &prefill, r#"{"x":1,"bootstrap_host":"evil"}"#).await;
    assert_eq!(answer.body, r#"{"a":1}"#);
    prefill.saw(1).await;
    assert_eq!(prefill.only().body, decode.only().body);
    let body = read(&decode.only().body);
    assert_eq!(body["bootstrap_host"], "127.0.0.1");
    assert_eq!(body["bootstrap_port"], 9100);
    assert!(body["bootstrap_room"].as_u64().unwrap() > 1_600_000_000_000_000_000);
    // Nobody asks for a room where there is no prefill.
    sidecar
        .ask(CHAT, &[], r#"{"x":1,"bootstrap_room":5}"#)
        .await;
    assert_eq!(decode.seen()[1].body, r#"{"x":1}"#);
}

#[tokio::test]
async fn a_failed_half_ends_the_other() {
    // The prefill fails: the decode that waits for it is given up.
    let prefill = Engine::start([Act::Reply(500, "text/plain", "no".into())]).await;
    let decode = Engine::start([Act::Hang]).await;
    let sidecar = Running::start(&decode, with(KvConnector::Sglang)).await;
    assert_eq!(split(&sidecar, &prefill, "{}").await.status, 500);
    until(|| decode.open() == 0).await;
    // The decode fails: so is the prefill.
    let prefill = Engine::start([Act::Hang]).await;
    let decode = Engine::start([Act::Reply(400, "text/plain", "no".into())]).await;
    let sidecar = Running::start(&decode, with(KvConnector::Sglang)).await;
    assert_eq!(split(&sidecar, &prefill, "{}").await.status, 400);
    until(|| prefill.open() == 0).await;
    // Neither says anything: the prefill's time is up.
    let decode = Engine::start([Act::Hang]).await;
    let sidecar = Running::start(&decode, with(KvConnector::Sglang)).await;
    assert_eq!(split(&sidecar, &prefill, "{}").await.status, 504);
    until(|| prefill.open() + decode.open() == 0).await;
}

#[tokio::test]
async fn a_client_that_leaves_ends_both_halves() {
    let prefill = Engine::start([Act::Stream(vec!["data: p\n\n".into(), "...".into()])]).await;
    let decode = Engine::start([Act::Stream(vec!["data: d\n\n".into(), "...".into()])]).await;
    let sidecar = Running::start(&decode, with(KvConnector::Sglang)).await;
    let target = prefill.address.to_string();
    let mut answer = sidecar
        .send(CHAT, &[("x-prefiller-host-port", &target)], "{}")
        .await;
    assert_eq!(answer.piece().await.unwrap().unwrap(), "data: d\n\n");
    assert_eq!(sidecar.legs(), [0, 1, 1]);
    answer.abort();
    sidecar.nothing_left().await;
    until(|| prefill.open() + decode.open() == 0).await;
}

#[tokio::test]
async fn mooncake_engines_are_told_of_each_other() {
    let bootstrap = Engine::start([Act::json(r#"{"2":{"engine_id":"abc"}}"#)]).await;
    let prefill = Engine::start([
        Act::json("{}"),
        Act::Reply(500, "text/plain", String::new()),
    ])
    .await;
    let decode = Engine::start([Act::json("{}")]).await;
    let settings = Settings {
        mooncake_bootstrap_port: bootstrap.address.port(),
        ..with(KvConnector::Mooncake)
    };
    let sidecar = Running::start(&decode, settings).await;
    split(&sidecar, &prefill, r#"{"max_tokens":9}"#).await;
    prefill.saw(1).await;
    assert_eq!(bootstrap.only().path, "/query");
    let first = prefill.only();
    assert_eq!(first.headers["x-data-parallel-rank"], "2");
    let body = read(&first.body);
    let id = body["kv_transfer_params"]["transfer_id"].clone();
    assert!(id.as_str().unwrap().starts_with("xfer-"));
    assert_eq!(
        body,
        json!({"max_tokens": 1, "stream": false, "kv_transfer_params":
            {"do_remote_prefill": false, "do_remote_decode": true, "transfer_id": id}})
    );
    let second = decode.only();
    assert!(!second.headers.contains_key("x-data-parallel-rank"));
    assert_eq!(
        read(&second.body),
        json!({"max_tokens": 9, "kv_transfer_params": {
            "do_remote_prefill": true, "do_remote_decode": false, "transfer_id": id,
            "remote_bootstrap_addr": format!("http://{}", bootstrap.address),
            "remote_engine_id": "abc"}})
    );
    // A failure makes the id be asked for again, and is done here meanwhile.
    assert_eq!(split(&sidecar, &prefill, "{}").await.status, 200);
    assert_eq!(bootstrap.seen().len(), 1, "the id was known");
    split(&sidecar, &prefill, "{}").await;
    assert_eq!(bootstrap.seen().len(), 2);
}

#[tokio::test]
async fn offloading_names_the_blocks_by_one_id() {
    let prefill = Engine::start([Act::json("{}")]).await;
    let decode = Engine::start([Act::json("{}")]).await;
    let settings = Settings {
        p2p_connector_port: 7000,
        port: prefill.address.port() - 1,
        data_parallel_size: 2,
        ..with(KvConnector::Offloading)
    };
    let sidecar = Running::start(&decode, settings).await;
    let target = prefill.address.to_string();
    let source = "10.0.0.9:1";
    sidecar
        .ask(
            CHAT,
            &[
                ("x-prefiller-host-port", &target),
                ("x-kv-cache-source-host-port", source),
            ],
            r#"{"max_completion_tokens":9}"#,
        )
        .await;
    let body = read(&prefill.only().body);
    let id = body["kv_transfer_params"]["remote_decoder"]["kv_request_id"].clone();
    let source_id = body["kv_transfer_params"]["remote_kv_source"]["kv_request_id"].clone();
    assert_eq!(
        body,
        json!({"max_completion_tokens": 1, "max_tokens": 1, "stream": false,
            "kv_transfer_params": {
                "remote_decoder": {"kv_request_id": id},
                "remote_kv_source": {"kv_request_id": source_id, "remote_host": "10.0.0.9", "remote_port": 7000}}})
    );
    // The prefill endpoint's port is that of rank 1.
    assert_eq!(
        read(&decode.only().body),
        json!({"max_completion_tokens": 9, "kv_transfer_params": {"remote_prefiller":
            {"kv_request_id": id, "remote_host": "127.0.0.1", "remote_port": 7001}}})
    );
    // Without prefill the local engine fetches the prefix.
    sidecar
        .ask(CHAT, &[("x-kv-cache-source-host-port", source)], "{}")
        .await;
    let body = read(&decode.seen()[1].body);
    assert_eq!(
        body["kv_transfer_params"]["remote_kv_source"]["remote_host"],
        "10.0.0.9"
    );
}

#[tokio::test]
async fn nixl_engines_fetch_a_prefix_only_when_told_to() {
    for enable_p2p_pull in [false, true] {
        let prefill = Engine::start([prefilled(1)]).await;
        let decode = Engine::start([Act::json("{}")]).await;
        let settings = Settings {
            enable_p2p_pull,
            ..Settings::default()
        };
        let sidecar = Running::start(&decode, settings).await;
        let target = prefill.address.to_string();
        let source = ("x-kv-cache-source-host-port", "10.0.0.9:1");
        sidecar
            .ask(CHAT, &[("x-prefiller-host-port", &target), source], "{}")
            .await;
        let body = read(&prefill.only().body);
        assert_eq!(body["kv_transfer_params"]["do_remote_decode"], true);
        let named = body["kv_transfer_params"].get("remote_kv_source").is_some();
        assert_eq!(named, enable_p2p_pull);
        sidecar.ask(CHAT, &[source], "{}").await;
        let named = decode.seen()[1].body.contains("remote_kv_source");
        assert_eq!(named, enable_p2p_pull);
    }
}

const MEDIA: &str = r#"{"model":"m","messages":[{"role":"user","content":[{"type":"text","text":"t"},{"type":"image_url","image_url":{"url":"http://a/1"}},{"type":"image_url","image_url":{"url":"http://a/2"}}]}],"max_tokens":9}"#;

#[tokio::test]
async fn every_media_item_is_encoded() {
    let encoded = |hash: &str| {
        Act::json(format!(
            r#"{{"ec_transfer_params":{{"{hash}":{{"peer_port":1}}}}}}"#
        ))
    };
    let (one, two) = (
        Engine::start([encoded("h1")]).await,
        Engine::start([encoded("h2")]).await,
    );
    let prefill = Engine::start([prefilled(1)]).await;
    let decode = Engine::start([Act::json("{}")]).await;
    let settings = Settings {
        ec_connector: Some(EcConnector::EcNixl),
        ..Settings::default()
    };
    let sidecar = Running::start(&decode, settings).await;
    let encoders = format!("{},{}", one.address, two.address);
    let target = prefill.address.to_string();
    sidecar
        .ask(
            CHAT,
            &[
                ("x-encoder-hosts-ports", &encoders),
                ("x-prefiller-host-port", &target),
                ("x-request-id", "id"),
            ],
            MEDIA,
        )
        .await;
    sidecar.nothing_left().await;
    for (index, engine) in [one, two].iter().enumerate() {
        let seen = engine.only();
        assert_eq!(seen.path, CHAT);
        assert_eq!(seen.headers["x-request-id"], format!("id-enc-{index}"));
        let url = format!("http://a/{}", index + 1);
        assert_eq!(
            read(&seen.body),
            json!({"model": "m", "max_tokens": 1, "stream": false, "messages": [{"role": "user",
                "content": [{"type": "image_url", "image_url": {"url": url}}]}]})
        );
    }
    for seen in [prefill.only(), decode.only()] {
        let body = read(&seen.body);
        assert_eq!(body["cache_hit_threshold"], 0);
        assert_eq!(
            body["ec_transfer_params"],
            json!({"h1": {"peer_port": 1}, "h2": {"peer_port": 1}})
        );
    }
}

/// Sends two images to these encode endpoints.
async fn encode(decode: &Engine, encoders: &[&Engine]) -> Answered {
    let settings = Settings {
        ec_connector: Some(EcConnector::EcExample),
        encode_timeout: Some(Duration::from_millis(300)),
        ..Settings::default()
    };
    let sidecar = Running::start(decode, settings).await;
    let encoders: Vec<String> = encoders.iter().map(|e| e.address.to_string()).collect();
    let encoders = encoders.join(",");
    let answer = sidecar
        .ask(CHAT, &[("x-encoder-hosts-ports", &encoders)], MEDIA)
        .await;
    sidecar.nothing_left().await;
    answer
}

#[tokio::test]
async fn what_an_encode_endpoint_fails_at_is_done_by_the_next() {
    for act in [
        Act::Reply(500, "text/plain", String::new()),
        Act::Reply(429, "text/plain", String::new()),
        Act::Die,
        Act::Hang,
        Act::Break(vec!["{".into()]),
    ] {
        let bad = Engine::start([act.clone()]).await;
        let good = Engine::start([Act::json("{}")]).await;
        let decode = Engine::start([Act::json("{}")]).await;
        let answer = encode(&decode, &[&bad, &good]).await;
        assert_eq!(answer.status, 200, "{act:?}");
        assert_eq!(decode.seen().len(), 1, "{act:?}");
        // Its own item, and the one that the other could not do.
        assert_eq!((bad.seen().len(), good.seen().len()), (1, 2), "{act:?}");
        let ids: std::collections::BTreeSet<u8> = good
            .seen()
            .iter()
            .map(|seen| *seen.headers["x-request-id"].as_bytes().last().unwrap())
            .collect();
        assert_eq!(ids, [b'0', b'1'].into(), "{act:?}: both items");
        until(|| bad.open() == 0).await;
    }
}

#[tokio::test]
async fn an_item_that_nobody_encodes_ends_the_others() {
    let failing = || Engine::start([Act::Reply(500, "text/plain", String::new())]);
    let (one, two) = (failing().await, failing().await);
    let decode = Engine::start([Act::json("{}")]).await;
    assert_eq!(encode(&decode, &[&one, &two]).await.status, 502);
    assert!(decode.seen().is_empty());
    // A refused item is refused everywhere: nobody else is asked, and who works for others stops.
    let refusing = Engine::start([Act::Reply(400, "text/plain", String::new())]).await;
    let slow = Engine::start([Act::Hang]).await;
    assert_eq!(encode(&decode, &[&refusing, &slow]).await.status, 502);
    assert!(slow.seen().len() <= 1);
    until(|| slow.open() == 0).await;
    assert!(decode.seen().is_empty());
    // Without items encode endpoints are not asked.
    let settings = Settings {
        ec_connector: Some(EcConnector::EcExample),
        ..Settings::default()
    };
    let sidecar = Running::start(&decode, settings).await;
    let target = one.address.to_string();
    let asked = one.seen().len();
    sidecar
        .ask(CHAT, &[("x-encoder-hosts-ports", &target)], "{}")
        .await;
    assert_eq!(decode.only().body, "{}");
    assert_eq!(one.seen().len(), asked);
}

fn chat(text: &str, finish: &str, prompt: u64, made: u64) -> Act {
    Act::json(
        json!({"id": "i", "object": "chat.completion", "created": 1, "model": "m",
            "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}],
            "usage": {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made}})
        .to_string(),
    )
}

fn chunks() -> [Act; 3] {
    [
        chat("a\"b", "length", 10, 2),
        chat("c", "length", 12, 2),
        chat("d", "stop", 14, 1),
    ]
}

#[tokio::test]
async fn a_decode_in_chunks_continues_one_message() {
    let decode = Engine::start(chunks()).await;
    let prefill = Engine::start([prefilled(1)]).await;
    let settings = Settings {
        decode_chunk_size: 2,
        ..Settings::default()
    };
    let sidecar = Running::start(&decode, settings).await;
    let answer = split(
        &sidecar,
        &prefill,
        r#"{"messages":[{"role":"user","content":"q"}],"max_tokens":5}"#,
    )
    .await;
    let body = read(&answer.body);
    assert_eq!(body["choices"][0]["message"]["content"], "a\"bcd");
    assert_eq!(body["choices"][0]["finish_reason"], "stop");
    // The client's prompt once, and what all calls made: 2 + 2 + 1.
    assert_eq!(
        body["usage"],
        json!({"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15})
    );
    let seen = decode.seen();
    assert_eq!(
        seen[0].body,
        format!(
            r#"{{"messages":[{{"role":"user","content":"q"}}],"max_tokens":2,"max_completion_tokens":2,"stream":false,"kv_transfer_params":{PARAMS}}}"#
        )
    );
    assert_eq!(
        seen[2].body,
        r#"{"messages":[{"role":"user","content":"q"},{"role":"assistant","content":"a\"bc"}],"max_tokens":1,"max_completion_tokens":1,"stream":false,"continue_final_message":true,"add_generation_prompt":false}"#
    );
}

#[tokio::test]
async fn a_stream_in_chunks_has_one_event_for_each() {
    let decode = Engine::start(chunks()).await;
    let settings = Settings {
        decode_chunk_size: 2,
        ..Settings::default()
    };
    let sidecar = Running::start(&decode, settings).await;
    let answer = sidecar
        .ask(
            CHAT,
            &[],
            r#"{"messages":[{"role":"user","content":"q"}],"stream":true,"stream_options":{"include_usage":true}}"#,
        )
        .await;
    let events: Vec<&str> = answer
        .body
        .split_terminator("\n\n")
        .map(|event| event.strip_prefix("data: ").unwrap())
        .collect();
    assert_eq!(events.len(), 5);
    assert_eq!(events[4], "[DONE]");
    for (event, (text, finish)) in events.iter().zip([
        ("a\"b", Value::Null),
        ("c", Value::Null),
        ("d", json!("stop")),
    ]) {
        let event = read(event);
        assert_eq!(event["object"], "chat.completion.chunk");
        let choice = &event["choices"][0];
        assert_eq!(
            choice["delta"],
            json!({"role": "assistant", "content": text})
        );
        assert_eq!(choice["finish_reason"], finish);
    }
    let last = read(events[3]);
    assert_eq!(last["choices"], json!([]));
    assert_eq!(last["usage"]["completion_tokens"], 5);
    sidecar.nothing_left().await;
}

#[tokio::test]
async fn what_cannot_be_continued_is_decoded_in_one_call() {
    let decode = Engine::start([Act::json("{}")]).await;
    let settings = Settings {
        decode_chunk_size: 8,
        ..Settings::default()
    };
    let sidecar = Running::start(&decode, settings).await;
    for (at, body) in [
        r#"{"messages":[],"max_tokens":8}"#,
        r#"{"messages":[],"tools":[{}]}"#,
        r#"{"messages":[],"n":2}"#,
        r#"{"messages":[],"logprobs":true}"#,
        r#"{"messages":[],"continue_final_message":true}"#,
    ]
    .into_iter()
    .enumerate()
    {
        sidecar.ask(CHAT, &[], body).await;
        assert_eq!(decode.seen()[at].body, body);
    }
}

fn moriio(parallel_dispatch: bool) -> Settings {
    Settings {
        moriio: Some(MoriIo {
            local_pod_ip: "10.0.0.7".to_owned(),
            decode_notify_port: 61005,
            decode_handshake_port: 6301,
            prefill_notify_port: 61006,
            prefill_handshake_port: 6302,
            tp_size: 8,
            dp_size: 4,
            dp_size_local: 2,
            remote_hosts: vec!["10.1.0.1".to_owned(), "10.1.0.2".to_owned()],
            decode_hosts: Vec::new(),
            parallel_dispatch,
            parallel_decode_wait_timeout: Duration::from_millis(300),
        }),
        ..Settings::default()
    }
}

#[tokio::test]
async fn moriio_prefill_engines_are_told_where_to_write() {
    let returned = r#"{"kv_transfer_params":{"do_remote_prefill":true,"remote_dp_rank":3,"remote_notify_port":5}}"#;
    let prefill = Engine::start([Act::json(returned)]).await;
    let decode = Engine::start([Act::json("{}")]).await;
    let sidecar = Running::start(&decode, moriio(false)).await;
    assert_eq!(split(&sidecar, &prefill, "{}").await.status, 200);
    let first = prefill.only();
    let params = read(&first.body)["kv_transfer_params"].clone();
    let id = params["transfer_id"].clone();
    let rank = params["remote_dp_rank"].as_u64().unwrap();
    assert!(id.as_str().unwrap().starts_with("tx") && rank < 4);
    assert_eq!(first.headers["x-data-parallel-rank"], rank.to_string());
    assert_eq!(
        params,
        json!({"do_remote_decode": true, "do_remote_prefill": false, "remote_engine_id": null,
            "remote_block_ids": null, "remote_host": "10.0.0.7", "remote_port": null,
            "remote_notify_port": 61005, "remote_dp_rank": rank, "remote_dp_rank_override": true,
            "remote_handshake_port": 6301, "transfer_id": id, "tp_size": 8, "remote_dp_size": 4})
    );
    // The prefill's own rank and port stay, what it left out is filled in.
    let second = decode.only();
    assert_eq!(second.headers["x-data-parallel-rank"], "3");
    assert_eq!(
        read(&second.body)["kv_transfer_params"],
        json!({"do_remote_prefill": true, "remote_dp_rank": 3, "remote_notify_port": 5,
            "remote_dp_rank_override": true, "transfer_id": id, "remote_handshake_port": 6302,
            "remote_dp_size": 4, "remote_hosts": ["10.1.0.1", "10.1.0.2"], "remote_dp_size_local": 2})
    );
}

#[tokio::test]
async fn moriio_in_parallel_waits_for_the_prefill() {
    let prefill = Engine::start([Act::json("{}")]).await;
    let decode = Engine::start([Act::json("{}")]).await;
    let sidecar = Running::start(&decode, moriio(true)).await;
    assert_eq!(split(&sidecar, &prefill, "{}").await.status, 200);
    prefill.saw(1).await;
    let sent = read(&prefill.only().body)["kv_transfer_params"].clone();
    assert_eq!(
        read(&decode.only().body)["kv_transfer_params"],
        json!({"do_remote_prefill": true, "do_remote_decode": false,
            "remote_engine_id": "127.0.0.1:6302", "remote_block_ids": [], "remote_host": "127.0.0.1",
            "remote_port": 6302, "remote_notify_port": 61006, "remote_dp_rank": sent["remote_dp_rank"],
            "remote_dp_rank_override": true, "remote_handshake_port": 6302,
            "transfer_id": sent["transfer_id"], "tp_size": 8, "remote_dp_size": 4,
            "remote_hosts": ["10.1.0.1", "10.1.0.2"], "remote_dp_size_local": 2})
    );
    // A prefill that hangs: the decode is ended, and done here alone.
    let prefill = Engine::start([Act::Hang]).await;
    let decode = Engine::start([Act::Hang, Act::json("{}")]).await;
    let sidecar = Running::start(&decode, moriio(true)).await;
    assert_eq!(split(&sidecar, &prefill, r#"{"a":1}"#).await.status, 200);
    assert_eq!(decode.seen()[1].body, r#"{"a":1}"#);
    until(|| prefill.open() + decode.open() == 0).await;
}
