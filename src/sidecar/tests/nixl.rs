//! `nixlv2`: the bodies of both engines, and the answer.

use std::path::PathBuf;

use serde::Deserialize;
use serde_json::value::RawValue;
use serde_json::{Value, json};

use super::*;

#[tokio::test]
async fn bodies_of_both_engines_are_exact() {
    let prefill = Engine::start([prefilled(64)]).await;
    let decode = Engine::start([Act::json(
        r#"{"choices":[],"usage":{"prompt_tokens":99,"prompt_tokens_details":{"cached_tokens":96}}}"#,
    )])
    .await;
    let sidecar = Running::start(&decode, Settings::default()).await;
    let target = prefill.address.to_string();
    let answer = sidecar
        .ask(
            CHAT,
            &[
                ("x-prefiller-host-port", &target),
                ("x-request-id", "mine"),
                ("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"),
                ("x-data-parallel-rank", "3"),
                ("authorization", "Bearer k"),
            ],
            r#"{ "model":"m","seed":9007199254740993,"a":1,"a":2,"stream_options":{"include_usage":true},"max_tokens":50,"kv_transfer_params":{"do_remote_prefill":true} }"#,
        )
        .await;
    assert_eq!(answer.status, 200);
    assert_eq!(
        answer.body,
        r#"{"choices":[],"usage":{"prompt_tokens":99,"prompt_tokens_details":{"cached_tokens":64}}}"#
    );
    let keep = r#"{"do_remote_decode":true,"do_remote_prefill":false,"remote_engine_id":null,"remote_block_ids":null,"remote_host":null,"remote_port":null}"#;
    let first = prefill.only();
    assert_eq!(
        first.body,
        format!(
            r#"{{ "model":"m","seed":9007199254740993,"a":1,"a":2,"max_tokens":1,"kv_transfer_params":{keep} ,"stream":false,"max_completion_tokens":1,"min_tokens":1}}"#
        )
    );
    let second = decode.only();
    assert_eq!(
        second.body,
        format!(
            r#"{{ "model":"m","seed":9007199254740993,"a":1,"a":2,"stream_options":{{"include_usage":true}},"max_tokens":50,"kv_transfer_params":{PARAMS} }}"#
        )
    );
    for seen in [&first, &second] {
        assert_eq!(seen.path, CHAT);
        assert_eq!(seen.headers["x-request-id"], "mine");
        assert!(
            seen.headers["traceparent"]
                .to_str()
                .unwrap()
                .starts_with("00-0af7")
        );
        assert_eq!(seen.headers["authorization"], "Bearer k");
        assert!(!seen.headers.contains_key("x-prefiller-host-port"));
    }
    assert!(!first.headers.contains_key("x-data-parallel-rank"));
    assert_eq!(second.headers["x-data-parallel-rank"], "3");
    assert_eq!(first.headers["host"], target.as_str());
    sidecar.nothing_left().await;
}

#[tokio::test]
async fn a_stream_passes_piece_by_piece() {
    let prefill = Engine::start([prefilled(7)]).await;
    let event =
        |n: u32| format!("data: {{\"choices\":[{{\"delta\":{{\"content\":\"{n}\"}}}}]}}\n\n");
    let usage =
        "data: {\"choices\":[],\"usage\":{\"prompt_tokens_details\":{\"cached_tokens\":0}}}\n\n";
    let decode = Engine::start([Act::Stream(vec![
        event(1),
        event(2),
        usage.to_owned(),
        "data: [DONE]\n\n".to_owned(),
    ])])
    .await;
    let sidecar = Running::start(&decode, Settings::default()).await;
    let target = prefill.address.to_string();
    let mut answer = sidecar
        .send(
            CHAT,
            &[("x-prefiller-host-port", &target)],
            r#"{"stream":true}"#,
        )
        .await;
    assert_eq!(
        answer.response.headers()["content-type"],
        "text/event-stream"
    );
    let mut text = String::new();
    while let Some(piece) = answer.piece().await {
        text.push_str(&piece.unwrap());
    }
    let expected = usage.replace(":0}", ":7}");
    assert_eq!(
        text,
        format!("{}{}{expected}data: [DONE]\n\n", event(1), event(2))
    );
    assert!(decode.only().body.starts_with(r#"{"stream":true,"#));
}

#[tokio::test]
async fn without_routing_headers_only_forgeries_are_removed() {
    let decode = Engine::start([Act::json("{}")]).await;
    let sidecar = Running::start(&decode, Settings::default()).await;
    let body = r#"{ "x" : 1.50 }"#;
    sidecar.ask("/v1/completions?a=b", &[], body).await;
    sidecar
        .ask(
            "/inference/v1/generate",
            &[],
            r#"{"token_ids":[1],"kv\u005ftransfer_params":{"do_remote_prefill":true}}"#,
        )
        .await;
    let seen = decode.seen();
    assert_eq!(
        (seen[0].path.as_str(), seen[0].body.as_str()),
        ("/v1/completions?a=b", body)
    );
    assert_eq!(seen[1].body, r#"{"token_ids":[1]}"#);
    assert_eq!(
        seen[0].headers["x-request-id"].len(),
        36,
        "made when missing"
    );
}

#[derive(Deserialize)]
struct Recording {
    steps: Vec<Step>,
}

#[derive(Deserialize)]
struct Step {
    #[serde(rename = "step")]
    name: String,
    server: String,
    path: String,
    request: Box<RawValue>,
    response: Box<RawValue>,
    status: u16,
}

fn recording() -> Recording {
    let directory = std::env::var_os("PINPOD_FIXTURES").map_or_else(
        || PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/vllm-0.32")),
        PathBuf::from,
    );
    let text = std::fs::read_to_string(directory.join("pd/steps.json")).unwrap();
    serde_json::from_str(&text).unwrap()
}

/// Genuine engines took these exchanges: what was sent to them by hand, the sidecar sends too.
#[tokio::test]
async fn genuine_engines_are_asked_as_they_were_when_recorded() {
    let steps = recording().steps;
    let pairs: Vec<&[Step]> = steps
        .windows(2)
        .filter(|pair| {
            pair[0].server == "prefill"
                && pair[1].server == "decode"
                && pair[0].name == pair[1].name
        })
        .collect();
    assert_eq!(pairs.len(), 4);
    for pair in pairs {
        let (first, second) = (&pair[0], &pair[1]);
        assert_eq!((first.status, second.status), (200, 200));
        let prefill = Engine::start([Act::json(first.response.get())]).await;
        let streamed = serde_json::from_str::<String>(second.response.get());
        let decode = Engine::start([match &streamed {
            Ok(events) => Act::Stream(vec![events.clone()]),
            Err(_) => Act::json(second.response.get()),
        }])
        .await;
        let sidecar = Running::start(&decode, Settings::default()).await;
        // The client's body is the decode engine's without what the sidecar added.
        let mut body: Value = serde_json::from_str(second.request.get()).unwrap();
        body.as_object_mut().unwrap().remove("kv_transfer_params");
        let target = prefill.address.to_string();
        let answer = sidecar
            .ask(
                &first.path,
                &[("x-prefiller-host-port", &target)],
                &body.to_string(),
            )
            .await;

        let sent: Value = serde_json::from_str(&prefill.only().body).unwrap();
        let mut recorded: Value = serde_json::from_str(first.request.get()).unwrap();
        // Set on every prefill; the recorded bodies were made without.
        recorded["max_completion_tokens"] = json!(1);
        recorded["min_tokens"] = json!(1);
        assert_eq!(sent, recorded, "{}", first.name);
        let sent: Value = serde_json::from_str(&decode.only().body).unwrap();
        let recorded: Value = serde_json::from_str(second.request.get()).unwrap();
        assert_eq!(sent, recorded, "{}", second.name);
        // Both engines had the same blocks cached when this was recorded, but for the longer prompt.
        let expected = streamed.unwrap_or_else(|_| second.response.get().to_owned());
        let cached = |text: &str| {
            let at = text.find("\"cached_tokens\":").unwrap() + 16;
            let rest = text[at..].trim_start().to_owned();
            rest.chars()
                .take_while(char::is_ascii_digit)
                .collect::<String>()
        };
        assert_eq!(
            cached(&answer.body),
            cached(first.response.get()),
            "{}",
            first.name
        );
        let blank = |text: &str| {
            text.replace(&format!("\"cached_tokens\": {}", cached(text)), "")
                .replace(&format!("\"cached_tokens\":{}", cached(text)), "")
        };
        assert_eq!(blank(&answer.body), blank(&expected));
    }
}
