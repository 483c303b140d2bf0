//! A pod over HTTP against what vLLM 0.32 answered to the same requests.

use std::net::SocketAddr;

use bytes::Bytes;
use http::Request;
use http_body_util::{BodyExt, Full};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::{CancellationToken, DropGuard};

use super::server::{EventsSetup, Fault};
use super::{EngineConfig, Profile, SimConfig, serve};

mod handover;

/// A recorded body.
macro_rules! recorded {
    ($name:literal) => {
        include_str!(concat!("../../tests/data/vllm-0.32/http/", $name, ".body"))
    };
}

/// The engine that was recorded: model `tiny`, context 8,192, blocks of 16, two adapters.
struct Pod {
    address: SocketAddr,
    _shutdown: DropGuard,
}

impl Pod {
    async fn start(prompt_tokens_details: bool) -> Self {
        Self::with(Self::config(prompt_tokens_details)).await
    }

    fn config(prompt_tokens_details: bool) -> SimConfig {
        SimConfig {
            name: "pod".to_owned(),
            model: "tiny".to_owned(),
            loras: vec!["lora-0".to_owned(), "lora-1".to_owned()],
            engine: EngineConfig {
                profile: Profile::H100_8B,
                time_scale: 1000.0,
                blocks: 1024,
                block_tokens: 16,
                max_num_seqs: 16,
                max_num_batched_tokens: 8192,
                steps_per_tick: 1,
                max_loras: 2,
                max_model_len: 8192,
                kv_role: None,
            },
            tokens_per_event: 1,
            prompt_tokens_details,
            fault: Fault::None,
            events: EventsSetup::default(),
            enable_scale_out: true,
            transfer: None,
        }
    }

    async fn with(config: SimConfig) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let shutdown = CancellationToken::new();
        tokio::spawn(serve(config, listener, shutdown.clone()));
        Self {
            address,
            _shutdown: shutdown.drop_guard(),
        }
    }

    async fn send(&self, method: &str, path: &str, body: String) -> (u16, String) {
        let stream = TcpStream::connect(self.address).await.unwrap();
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .unwrap();
        tokio::spawn(connection);
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("host", "pod")
            .header("x-request-id", "fixture-request-1")
            .body(Full::new(Bytes::from(body)))
            .unwrap();
        let response = sender.send_request(request).await.unwrap();
        let status = response.status().as_u16();
        let body = response.into_body().collect().await.unwrap().to_bytes();
        (status, String::from_utf8(body.to_vec()).unwrap())
    }

    async fn get(&self, path: &str) -> (u16, String) {
        self.send("GET", path, String::new()).await
    }

    async fn post(&self, path: &str, body: Value) -> (u16, String) {
        self.send("POST", path, body.to_string()).await
    }

    async fn value(&self, path: &str, body: Value) -> Value {
        let (status, text) = self.post(path, body).await;
        assert_eq!(status, 200, "{text}");
        serde_json::from_str(&text).unwrap()
    }

    /// A series of the exposition.
    async fn metric(&self, series: &str) -> f64 {
        let page = self.get("/metrics").await.1;
        let line = page.lines().find(|line| line.starts_with(series)).unwrap();
        line.rsplit_once(' ').unwrap().1.parse().unwrap()
    }
}

/// JSON or a stream of it with every value but its kind taken out: `"s"` for strings, `0` for numbers.
fn skeleton(text: &str) -> String {
    let mut out = String::new();
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        if first == '"' {
            let mut escaped = false;
            let end = rest[1..]
                .find(|c| {
                    let ends = c == '"' && !escaped;
                    escaped = c == '\\' && !escaped;
                    ends
                })
                .unwrap();
            let (string, behind) = rest.split_at(end + 2);
            out.push_str(if behind.starts_with(':') {
                string
            } else {
                "\"s\""
            });
            rest = behind;
        } else if first.is_ascii_digit() || first == '-' {
            out.push('0');
            rest = rest.trim_start_matches(|c: char| c.is_ascii_digit() || "+-.eE".contains(c));
        } else {
            out.push(first);
            rest = &rest[first.len_utf8()..];
        }
    }
    out
}

/// Prompt of as many tokens as the recorded one: 137.
fn completion(more: Value) -> Value {
    let body = json!({"model": "tiny", "prompt": "port".repeat(137), "max_tokens": 12});
    extended(body, more)
}

/// Messages of as many tokens as the recorded ones: 180, of which 1 names the user and 3 the assistant.
fn chat(more: Value) -> Value {
    let messages = json!([{"role": "user", "content": "ship".repeat(176)}]);
    extended(
        json!({"model": "tiny", "messages": messages, "max_tokens": 12}),
        more,
    )
}

fn extended(mut body: Value, more: Value) -> Value {
    let (Value::Object(fields), Value::Object(more)) = (&mut body, more) else {
        panic!("a request is an object");
    };
    fields.extend(more);
    body
}

const COMPLETIONS: &str = "/v1/completions";
const CHAT: &str = "/v1/chat/completions";

#[tokio::test]
async fn whole_answers_have_the_recorded_form_and_usage() {
    let pod = Pod::start(true).await;
    for (path, body, recorded) in [
        (
            COMPLETIONS,
            completion(json!({})),
            recorded!("completion-cold"),
        ),
        (
            COMPLETIONS,
            completion(json!({})),
            recorded!("completion-cached"),
        ),
        (CHAT, chat(json!({})), recorded!("chat-cold")),
        (CHAT, chat(json!({})), recorded!("chat-cached")),
    ] {
        let (status, text) = pod.post(path, body).await;
        assert_eq!((status, skeleton(&text)), (200, skeleton(recorded)));
        let usage = |text: &str| serde_json::from_str::<Value>(text).unwrap()["usage"].clone();
        assert_eq!(usage(&text), usage(recorded));
    }
}

#[tokio::test]
async fn streams_have_the_recorded_events_and_usage() {
    let pod = Pod::start(true).await;
    // The recorded streams found their prompts cached.
    pod.value(COMPLETIONS, completion(json!({}))).await;
    pod.value(CHAT, chat(json!({}))).await;
    let usage = |more: bool| json!({"include_usage": true, "continuous_usage_stats": more});
    let plain = json!({"stream": true});
    let at_the_end = json!({"stream": true, "stream_options": usage(false)});
    let in_each = json!({"stream": true, "stream_options": usage(true)});
    for (path, body, recorded) in [
        (
            COMPLETIONS,
            completion(plain.clone()),
            recorded!("completion-stream"),
        ),
        (
            COMPLETIONS,
            completion(at_the_end.clone()),
            recorded!("completion-stream-usage"),
        ),
        (
            COMPLETIONS,
            completion(in_each),
            recorded!("completion-stream-usage-each-chunk"),
        ),
        (CHAT, chat(plain), recorded!("chat-stream")),
        (CHAT, chat(at_the_end), recorded!("chat-stream-usage")),
    ] {
        let (status, text) = pod.post(path, body).await;
        assert_eq!((status, skeleton(&text)), (200, skeleton(recorded)));
        let usages = |text: &str| -> Vec<Value> {
            let events = text.lines().filter_map(|l| l.strip_prefix("data: {"));
            events
                .map(|event| serde_json::from_str::<Value>(&format!("{{{event}")).unwrap())
                .map(|event| event["usage"].clone())
                .collect()
        };
        assert_eq!(usages(&text), usages(recorded));
    }
}

#[tokio::test]
async fn cached_tokens_are_told_only_when_enabled() {
    let pod = Pod::start(false).await;
    let whole = pod.value(CHAT, chat(json!({}))).await;
    assert_eq!(whole["usage"]["prompt_tokens_details"], Value::Null);
    let options = json!({"stream": true, "stream_options": {"include_usage": true}});
    let (_, stream) = pod.post(COMPLETIONS, completion(options)).await;
    assert!(stream.contains("\"completion_tokens\":12}") && !stream.contains("cached_tokens"));
}

#[tokio::test]
async fn errors_are_the_recorded_ones() {
    let pod = Pod::start(true).await;
    let long = completion(json!({"prompt": vec![5; 9000]}));
    let options = json!({"stream_options": {"include_usage": true}});
    for (path, body, status, recorded) in [
        (
            COMPLETIONS,
            completion(json!({"model": "no-such-model"})),
            404,
            recorded!("error-unknown-model-completion"),
        ),
        (
            COMPLETIONS,
            completion(json!({"max_tokens": -1})),
            400,
            recorded!("error-bad-max-tokens"),
        ),
        (
            CHAT,
            json!({"model": "tiny", "messages": []}),
            400,
            recorded!("error-empty-messages"),
        ),
        (
            COMPLETIONS,
            json!({"model": "tiny"}),
            400,
            recorded!("error-no-prompt"),
        ),
        (
            COMPLETIONS,
            completion(options),
            400,
            recorded!("error-stream-options-without-stream"),
        ),
        (COMPLETIONS, long, 400, recorded!("error-too-long")),
        (
            "/v1/nothing-here",
            json!({"model": "tiny"}),
            404,
            recorded!("error-path"),
        ),
    ] {
        let (own_status, own) = pod.post(path, body).await;
        let value = |text: &str| serde_json::from_str::<Value>(text).unwrap();
        assert_eq!((own_status, value(&own)), (status, value(recorded)));
    }
    assert_eq!(
        pod.get(CHAT).await,
        (405, recorded!("error-method").to_owned())
    );
    // One token more than fits, output included.
    let (status, text) = pod
        .post(COMPLETIONS, completion(json!({"max_tokens": 8192 - 136})))
        .await;
    assert_eq!(status, 400, "{text}");
    assert!(
        text.contains("maximum context length is 8192 tokens"),
        "{text}"
    );
}

#[tokio::test]
async fn adapters_come_and_go_as_recorded() {
    let pod = Pod::start(true).await;
    let load = "/v1/load_lora_adapter";
    // The recorded path exists where it was recorded; here a repository's name stands for it.
    let late = json!({"lora_name": "late-adapter", "lora_path": "tiny/lora-1"});
    assert_eq!(
        pod.post(load, late.clone()).await,
        (200, recorded!("lora-load").to_owned())
    );
    let (status, text) = pod.get("/v1/models").await;
    let value = |text: &str| serde_json::from_str::<Value>(text).unwrap();
    let shape = |text: &str| skeleton(&value(text).to_string());
    assert_eq!(
        (status, shape(&text)),
        (200, shape(recorded!("models-after-lora-load")))
    );
    let models = value(&text);
    let names = |key: &str| -> Vec<&str> {
        let models = models["data"].as_array().unwrap().iter();
        models.filter_map(|model| model[key].as_str()).collect()
    };
    assert_eq!(names("id"), ["tiny", "lora-0", "lora-1", "late-adapter"]);
    assert_eq!(names("parent"), ["tiny"; 3]);

    let answer = pod
        .value(COMPLETIONS, completion(json!({"model": "late-adapter"})))
        .await;
    assert_eq!(answer["model"], "late-adapter");
    let (status, again) = pod.post(load, late).await;
    assert_eq!(
        (status, value(&again)),
        (400, value(recorded!("lora-load-again")))
    );
    let ghost = json!({"lora_name": "ghost", "lora_path": "/nonexistent"});
    let (status, missing) = pod.post(load, ghost).await;
    assert_eq!(
        (status, value(&missing)),
        (404, value(recorded!("lora-load-missing")))
    );

    let unload = "/v1/unload_lora_adapter";
    let name = json!({"lora_name": "late-adapter"});
    assert_eq!(
        pod.post(unload, name.clone()).await,
        (200, recorded!("lora-unload").to_owned())
    );
    assert_eq!(pod.post(unload, name).await.0, 404);
    let gone = completion(json!({"model": "late-adapter"}));
    assert_eq!(pod.post(COMPLETIONS, gone).await.0, 404);
}

#[tokio::test]
async fn tokens_go_out_and_come_in_as_text_and_as_ids() {
    let pod = Pod::start(true).await;
    let (status, text) = pod.post("/tokenize", chat(json!({}))).await;
    let tokens: Value = serde_json::from_str(&text).unwrap();
    let recorded: Value = serde_json::from_str(recorded!("tokenize-chat")).unwrap();
    assert_eq!((status, &tokens["count"]), (200, &recorded["count"]));
    assert_eq!(
        skeleton(&tokens.to_string()),
        skeleton(&recorded.to_string())
    );

    let prompt = "The tide turns at four";
    let tokens = pod.value("/tokenize", json!({"prompt": prompt})).await["tokens"].clone();
    let (_, text) = pod.post("/detokenize", json!({"tokens": tokens})).await;
    assert_eq!(skeleton(&text), skeleton(recorded!("detokenize")));
    assert_eq!(
        serde_json::from_str::<Value>(&text).unwrap()["prompt"],
        prompt
    );

    // Text fills the cache for its ids: 64 tokens are 4 blocks, the last of which is computed again.
    let prompt = "wave".repeat(64);
    let tokens = pod.value("/tokenize", json!({"prompt": prompt})).await["tokens"].clone();
    pod.value(COMPLETIONS, json!({"prompt": prompt, "max_tokens": 1}))
        .await;
    let answer = pod
        .value(COMPLETIONS, json!({"prompt": tokens, "max_tokens": 1}))
        .await;
    assert_eq!(
        answer["usage"]["prompt_tokens_details"]["cached_tokens"],
        48
    );
}

#[tokio::test]
async fn a_follow_up_finds_the_answer_before_it() {
    let pod = Pod::start(true).await;
    // user, 172 of content, assistant: 176 tokens are 11 blocks. 33 more of output: 32 have KV, 2 blocks.
    let question = json!({"role": "user", "content": "ship".repeat(172)});
    let first = pod
        .value(CHAT, json!({"messages": [question], "max_tokens": 33}))
        .await;
    let answer = first["choices"][0]["message"]["content"].clone();
    let messages = json!([question, {"role": "assistant", "content": answer}, {"role": "user", "content": "and?"}]);
    let next = pod
        .value(CHAT, json!({"messages": messages, "max_tokens": 1}))
        .await;
    let cached = &next["usage"]["prompt_tokens_details"]["cached_tokens"];
    assert_eq!(cached, 13 * 16);
}

#[tokio::test]
async fn requests_are_counted_observed_and_named() {
    let pod = Pod::start(true).await;
    let answer = pod.value(CHAT, chat(json!({}))).await;
    assert_eq!(answer["id"], "chatcmpl-fixture-request-1");
    pod.value(CHAT, chat(json!({}))).await;
    for (series, value) in [
        ("vllm:prefix_cache_queries_total", 360.0),
        ("vllm:prefix_cache_hits_total", 176.0),
        (
            "vllm:prompt_tokens_by_source_total{engine=\"0\",model_name=\"tiny\",source=\"local_compute\"}",
            184.0,
        ),
        ("vllm:prompt_tokens_cached_total", 176.0),
        ("vllm:generation_tokens_total", 24.0),
        (
            "vllm:request_success_total{engine=\"0\",finished_reason=\"length\"",
            2.0,
        ),
        ("vllm:time_to_first_token_seconds_count", 2.0),
        ("vllm:inter_token_latency_seconds_count", 22.0),
        ("vllm:request_prompt_tokens_sum", 360.0),
        ("vllm:request_prefill_kv_computed_tokens_sum", 184.0),
        ("vllm:num_requests_running", 0.0),
        ("vllm:kv_cache_usage_perc", 0.0),
    ] {
        assert_eq!(pod.metric(series).await, value, "{series}");
    }
    assert_eq!(pod.get("/load").await, (200, recorded!("load").to_owned()));
}

#[tokio::test]
async fn renders_have_the_recorded_form_and_the_ids_of_tokenize() {
    let pod = Pod::start(true).await;
    for (path, body, recorded) in [
        (
            "/v1/completions/render",
            completion(json!({})),
            recorded!("render-completion"),
        ),
        (
            "/v1/chat/completions/render",
            chat(json!({"tools": [{"type": "function", "function": {"name": "tide"}}]})),
            recorded!("render-chat"),
        ),
    ] {
        let (status, text) = pod.post(path, body.clone()).await;
        // The number of ids differs, so lists are compared as one.
        let shape = |text: &str| skeleton(text).replace(",0", "");
        assert_eq!((status, shape(&text)), (200, shape(recorded)));
        let rendered: Value = serde_json::from_str(&text).unwrap();
        let first = rendered.get(0).unwrap_or(&rendered);
        let tokens = pod.value("/tokenize", body).await;
        assert_eq!(first["token_ids"], tokens["tokens"]);
        assert_eq!(first["sampling_params"]["max_tokens"], 12);
    }
    let unknown = completion(json!({"model": "no-such-model"}));
    assert_eq!(pod.post("/tokenize", unknown.clone()).await.0, 404);
    assert_eq!(pod.post("/v1/completions/render", unknown).await.0, 404);
    let long = completion(json!({"max_tokens": 8192}));
    assert_eq!(pod.post("/v1/completions/render", long).await.0, 400);
    let strings = pod.value(
        "/tokenize",
        json!({"prompt": "abcde", "return_token_strs": true}),
    );
    assert_eq!(strings.await["token_strs"], json!(["abcd", "e"]));
    assert_eq!(pod.get("/kv_event_sources").await, (200, "{}".to_owned()));
}
