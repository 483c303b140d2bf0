//! Tokenization in process: cold, with a known prefix, and what it does to other requests.
//!
//! `cargo bench --bench tokens`
//!
//! The tokenizer is a byte-level BPE of 32,768 entries trained on this crate's sources with the word
//! expression of Llama 3, or the one in the directory `PINPOD_TOKENIZER`. Texts are those sources in
//! another order each time.

#![expect(clippy::expect_used, reason = "a bench stops where it cannot measure")]

#[path = "tokens/vocabulary.rs"]
mod vocabulary;

use std::path::PathBuf;

use bytes::Bytes;
use pinpod::kvcache::block::{BlockHasher, KeySpace};
use pinpod::kvcache::tokens::service::{Answer, ModelSettings, Settings, TokenService};
use pinpod::request::openai::OpenAiParser;
use pinpod::request::{Body, InferenceRequest, Parser};
use tokio::time::{Duration, Instant};

use vocabulary::{long_text, sources, train};

const COLD_TEXTS: usize = 8;
const WARM_ROUNDS: usize = 60;
const PICKS: usize = 2000;

#[expect(clippy::print_stdout, reason = "a bench reports on stdout")]
fn show(text: &str) {
    println!("{text}");
}

fn main() {
    let sources = sources();
    let own = tempfile::tempdir().expect("a directory");
    let directory = std::env::var_os("PINPOD_TOKENIZER").map_or_else(
        || {
            let entries = train(&sources, own.path());
            show(&format!("vocabulary of {entries} entries"));
            own.path().to_owned()
        },
        PathBuf::from,
    );
    let settings = Settings {
        models: vec![ModelSettings {
            name: "m".to_owned(),
            directory,
            ..ModelSettings::default()
        }],
        ..Settings::default()
    };
    let service = TokenService::load(settings).expect("the tokenizer");
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .expect("a runtime");
    runtime.block_on(async {
        cold(&service, &sources).await;
        warm(&service, &sources).await;
        others(&service, &sources).await;
    });
}

fn request(path: &str, body: &serde_json::Value) -> InferenceRequest {
    let body = Body::from(Bytes::from(body.to_string()));
    let payload = OpenAiParser.parse(path, &body).expect("a body");
    let mut request = InferenceRequest::new("1", payload, body);
    "m".clone_into(&mut request.target_model);
    request
}

fn completion(prompt: &str) -> InferenceRequest {
    let body = serde_json::json!({"model": "m", "prompt": prompt});
    request("/v1/completions", &body)
}

fn chat(prompt: &str) -> InferenceRequest {
    let messages = serde_json::json!([
        {"role": "system", "content": prompt},
        {"role": "user", "content": "What does it do?"},
    ]);
    let body = serde_json::json!({"model": "m", "messages": messages});
    request("/v1/chat/completions", &body)
}

async fn ids(service: &TokenService, request: &InferenceRequest) -> usize {
    let tokens = service.tokenize(request).wait().await.expect("tokens");
    tokens.prompts.iter().map(|prompt| prompt.ids.len()).sum()
}

async fn cold(service: &TokenService, sources: &[String]) {
    let (mut bytes, mut tokens) = (0, 0);
    let before = service.memo_stats("m").expect("the model").tokenized_bytes;
    let started = Instant::now();
    for number in 0..COLD_TEXTS {
        let text = long_text(sources, number);
        bytes += text.len();
        tokens += ids(service, &completion(&text)).await;
    }
    let seconds = started.elapsed().as_secs_f64();
    let new = service.memo_stats("m").expect("the model").tokenized_bytes - before;
    show(&format!(
        "cold: {:.1} MB/s ({:.1} MB of {:.1} MB were new, {tokens} tokens, {seconds:.2} s)",
        new as f64 / 1e6 / seconds,
        new as f64 / 1e6,
        bytes as f64 / 1e6,
    ));
}

async fn warm(service: &TokenService, sources: &[String]) {
    let text = long_text(sources, 0);
    let hasher = BlockHasher::default();
    let space = KeySpace {
        model: "",
        lora: None,
        block_size: 16,
    };
    for (what, request) in [("completion", completion(&text)), ("chat", chat(&text))] {
        let mut keys = Vec::new();
        let mut times = Vec::new();
        ids(service, &request).await;
        for _ in 0..WARM_ROUNDS {
            let started = Instant::now();
            let tokens = service.tokenize(&request).wait().await.expect("tokens");
            for prompt in &tokens.prompts {
                hasher.request_keys(&space, &prompt.ids, None, &[], &mut keys);
            }
            times.push(started.elapsed());
        }
        show(&format!(
            "warm: {what} of {} KB to {} block keys: {}",
            request.body.len() >> 10,
            keys.len(),
            quantiles(&mut times)
        ));
    }
}

/// Small requests that are answered at once, alone and while a worker is busy with long new ones.
async fn others(service: &TokenService, sources: &[String]) {
    let small: Vec<InferenceRequest> = (0..PICKS)
        .map(|n| chat(&format!("How deep is berth {n}?")))
        .collect();
    for (what, busy) in [("idle", false), ("with long new prompts", true)] {
        let mut work = Vec::new();
        for number in (0..COLD_TEXTS).filter(|_| busy) {
            let text = format!(
                "// {what}\n{}",
                long_text(sources, 100 + number).replace("fn ", "function ")
            );
            if let Answer::Pending(pending) = service.tokenize(&completion(&text)) {
                work.push(pending);
            }
        }
        let mut times = Vec::new();
        let mut late = 0;
        for request in &small {
            let started = Instant::now();
            if matches!(service.tokenize(request), Answer::Pending(_)) {
                late += 1;
            }
            times.push(started.elapsed());
        }
        let still = service.pool_stats().queued;
        show(&format!(
            "small requests, {what}: {}, {late} had to wait, {still} long ones still queued",
            quantiles(&mut times)
        ));
        for pending in work {
            pending.await.expect("tokens");
        }
    }
}

fn quantiles(times: &mut [Duration]) -> String {
    times.sort();
    let at = |part: usize| {
        times
            .get(times.len() * part / 100)
            .copied()
            .unwrap_or_default()
    };
    format!("p50 {:.3?}, p99 {:.3?}", at(50), at(99))
}
