//! Exact prefix matching against an engine that publishes its events and reports what it found in its
//! cache: what the picker says of a prompt, and the alarm when both sides stop agreeing.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

#[path = "parity_apis.rs"]
mod apis;
#[path = "parity_central.rs"]
mod central;
#[path = "support/events.rs"]
mod events;
#[path = "parity_tiers.rs"]
mod tiers;

use std::collections::HashSet;
use std::future::poll_fn;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bytes::Bytes;
use events::{BLOCK, frame, message, shake, stored};
use pinpod::config::{LoadOptions, builtin, load};
use pinpod::control::director::DirectorOptions;
use pinpod::control::{BodyKnowledge, Decision, Director, Intake, Step, Subset};
use pinpod::datalayer::EndpointStore;
use pinpod::datalayer::discovery::list;
use pinpod::request::{Body, Headers};
use pinpod::response::Served;
use pinpod::telemetry::metrics::{Exposition, Metrics, install};
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::time::Instant;

/// One recorder for all tests of this file, which use an endpoint each.
fn exposition() -> &'static Exposition {
    static EXPOSITION: OnceLock<Exposition> = OnceLock::new();
    EXPOSITION.get_or_init(|| install().unwrap())
}

/// What a request is made of.
#[derive(Clone, Hash)]
struct Prompt {
    model: &'static str,
    ids: Vec<u32>,
    salt: Option<&'static str>,
}

/// 4 full blocks, of which an engine can reuse three: it computes the last token in any case.
fn prompt(first: u32) -> Prompt {
    Prompt {
        model: "base",
        ids: (first..).take(4 * BLOCK).collect(),
        salt: None,
    }
}

/// An engine as the picker sees it: caches whole blocks, publishes what it stores, reports what it
/// reused. What it makes of a request, and what it says of it, can be bent.
struct Engine {
    stream: TcpStream,
    topic: String,
    rank: Option<u8>,
    /// Tells its batches from those of other processes.
    clock: u64,
    seq: u64,
    /// Batches so far.
    sent: u64,
    cached: HashSet<u64>,
    /// The prompt as the engine computes it.
    computes: fn(&Prompt) -> Prompt,
    /// The prompt as its events describe it.
    publishes: fn(&Prompt) -> Prompt,
}

impl Engine {
    async fn start(picker: SocketAddr, endpoint: &str) -> Self {
        let mut stream = loop {
            match TcpStream::connect(picker).await {
                Ok(stream) => break stream,
                Err(_) => tokio::time::sleep(Duration::from_millis(5)).await,
            }
        };
        shake(&mut stream, "PUB").await.unwrap();
        assert_eq!(frame(&mut stream).await.unwrap(), (0, vec![1]));
        Self {
            stream,
            topic: format!("kv@{endpoint}@base"),
            rank: Some(0),
            clock: CLOCK.fetch_add(1_000_000, Relaxed),
            seq: 0,
            sent: 0,
            cached: HashSet::new(),
            computes: Clone::clone,
            publishes: Clone::clone,
        }
    }

    /// Names of the prompt's blocks: each stands for all before it.
    fn blocks(prompt: &Prompt) -> Vec<u64> {
        let full = prompt.ids.len() / BLOCK;
        let name = |blocks: usize| {
            let mut hasher = DefaultHasher::new();
            (prompt.model, prompt.salt, &prompt.ids[..blocks * BLOCK]).hash(&mut hasher);
            hasher.finish()
        };
        (1..=full).map(name).collect()
    }

    /// Computes a prompt; returns its tokens and those that were cached.
    async fn serve(&mut self, prompt: &Prompt) -> (usize, usize) {
        let prompt = (self.computes)(prompt);
        let blocks = Self::blocks(&prompt);
        let held = blocks
            .iter()
            .take_while(|block| self.cached.contains(block));
        let cached = held.count().min((prompt.ids.len() - 1) / BLOCK);
        let fresh = blocks.iter().any(|block| !self.cached.contains(block));
        if fresh {
            self.publish(&blocks, &(self.publishes)(&prompt)).await;
        }
        self.cached.extend(blocks);
        (prompt.ids.len(), cached * BLOCK)
    }

    async fn publish(&mut self, hashes: &[u64], said: &Prompt) {
        let adapter = (said.model != "base").then_some(said.model);
        let full = &said.ids[..hashes.len() * BLOCK];
        let ts = self.clock + self.seq;
        let mut payload = stored(ts, hashes, full, adapter, said.salt);
        payload.pop();
        match self.rank {
            None => payload.push(0xc0),
            Some(rank) if rank < 128 => payload.push(rank),
            Some(rank) => payload.extend([0xcc, rank]),
        }
        self.publish_raw(&payload).await;
    }

    async fn publish_raw(&mut self, payload: &[u8]) {
        let seq = self.seq.to_be_bytes();
        let frames = message(&[self.topic.as_bytes(), &seq, payload]);
        self.stream.write_all(&frames).await.unwrap();
        self.seq += 1;
        self.sent += 1;
    }
}

static CLOCK: AtomicU64 = AtomicU64::new(0);

/// A picker in front of one engine.
struct Gateway {
    director: Director,
    store: Arc<EndpointStore>,
    /// Where engines connect.
    socket: SocketAddr,
    engine: Engine,
    endpoint: &'static str,
}

impl Gateway {
    async fn start(endpoint: &'static str) -> Self {
        Self::start_with(endpoint, "").await
    }

    /// With further plugins, one a line.
    async fn start_with(endpoint: &'static str, plugins: &str) -> Self {
        exposition();
        let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let socket = free.local_addr().unwrap();
        drop(free);
        let config = format!(
            "apiVersion: llm-d.ai/v1alpha1\nkind: EndpointPickerConfig\nplugins:\n{plugins}\
             - {{type: precise-prefix-cache-producer, parameters: {{kvEventsConfig: {{zmqEndpoint: 'tcp://{socket}'}}}}}}\n\
             - {{type: prefix-cache-scorer, parameters: {{prefixMatchInfoProducerName: precise-prefix-cache-producer}}}}\n\
             schedulingProfiles: [{{name: p, plugins: [{{pluginRef: prefix-cache-scorer}}]}}]\n"
        );
        let config = load(Some(&config), &LoadOptions::default(), &builtin::registry()).unwrap();
        let store = Arc::new(EndpointStore::default());
        for listener in &config.listeners {
            store.subscribe(Arc::clone(listener));
        }
        let mut specs = list::parse(endpoint).unwrap();
        endpoint.clone_into(&mut specs[0].name);
        store.replace(specs);
        let options = DirectorOptions {
            ignore_subset: false,
            emit_scores: false,
            strip_control_headers: true,
            seed: Some(1),
        };
        let director = Director::new(
            Arc::clone(&store),
            config.activate(),
            options,
            Metrics::new(),
        );
        Self {
            director,
            store,
            socket,
            engine: Engine::start(socket, endpoint).await,
            endpoint,
        }
    }

    fn body(prompt: &Prompt) -> Value {
        let mut body = json!({"model": prompt.model, "prompt": prompt.ids});
        if let Some(salt) = prompt.salt {
            body["cache_salt"] = salt.into();
        }
        body
    }

    async fn decide(&self, path: &'static str, body: &Value) -> Box<Decision> {
        let mut headers = Headers::default();
        headers.push(":path".to_owned(), Bytes::from_static(path.as_bytes()));
        let intake = Intake {
            headers,
            body: Body::from(body.to_string().as_str()),
            early: None,
            subset: Subset::Any,
            received_at: Instant::now(),
            trace: pinpod::telemetry::trace::Span::default(),
        };
        let mut step = self.director.decide(intake, BodyKnowledge::Complete);
        loop {
            match step {
                Step::Done(decision) => return decision.unwrap(),
                Step::Wait(mut waiting) => {
                    let prepared = poll_fn(|cx| waiting.poll(cx)).await;
                    step = self.director.resume(*waiting, prepared);
                }
            }
        }
    }

    /// A request from the decision to the end of its answer. The picker has seen the engine's events
    /// by then, as an answer of more than a token gives it time to.
    async fn ask(&mut self, prompt: &Prompt) -> usize {
        let body = Self::body(prompt);
        let usage = |tokens, cached| {
            json!({
                "prompt_tokens": tokens, "completion_tokens": 1, "total_tokens": tokens + 1,
                "prompt_tokens_details": {"cached_tokens": cached},
            })
        };
        self.exchange("/v1/completions", &body, prompt, usage).await
    }

    /// As [`Self::ask`], of any API: `usage` is what it tells of prompt and cached tokens.
    async fn exchange(
        &mut self,
        path: &'static str,
        body: &Value,
        prompt: &Prompt,
        usage: impl Fn(usize, usize) -> Value,
    ) -> usize {
        let decision = self.decide(path, body).await;
        assert_eq!(decision.destination, self.endpoint.as_bytes());
        let (tokens, cached) = self.engine.serve(prompt).await;
        self.wait_for_events().await;
        let answer = json!({"usage": usage(tokens, cached)});
        let mut account = decision.account;
        account.on_response_headers(&Headers::default(), Served::NoNamespace);
        account.on_response_piece(&[Bytes::from(answer.to_string())]);
        account.complete();
        cached
    }

    fn overview(&self) -> Value {
        self.director.overview()["producers"]["precise-prefix-cache-producer"].take()
    }

    async fn wait_for_events(&self) {
        for _ in 0..2000 {
            let received = self.overview()["publishers"][0]["stats"]["applied"].as_u64();
            if received.unwrap_or(0) >= self.engine.sent {
                return;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        panic!("events do not arrive: {}", self.overview());
    }

    /// Value of the alarm for one class of requests; `None` when no such request was compared.
    fn broken(&self, model: &str, salted: bool, reason: &str) -> Option<String> {
        self.broken_prompts("tokens", model, salted, reason)
    }

    fn broken_prompts(
        &self,
        prompt: &str,
        model: &str,
        salted: bool,
        reason: &str,
    ) -> Option<String> {
        let series = format!(
            "pinpod_kv_hit_parity_broken{{endpoint_name=\"{}\",model_name=\"{model}\",\
             prompt=\"{prompt}\",salted=\"{salted}\",reason=\"{reason}\"}} ",
            self.endpoint
        );
        let text = exposition().render();
        let line = text.lines().find_map(|line| line.strip_prefix(&series));
        line.map(str::to_owned)
    }

    /// Asks until the alarm is at `value`; returns how many answers it took.
    async fn ask_until(&mut self, prompt: &Prompt, reason: &str, value: &str) -> u32 {
        for asked in 1..20 {
            self.ask(prompt).await;
            if self
                .broken(prompt.model, prompt.salt.is_some(), reason)
                .as_deref()
                == Some(value)
            {
                return asked;
            }
        }
        panic!("the alarm stays: {}", exposition().render());
    }
}

const MISSES: &str = "engine_misses";
const MORE: &str = "engine_hits_more";

#[tokio::test]
async fn both_sides_agree_while_nothing_is_broken() {
    let mut gateway = Gateway::start("10.1.0.1:8000").await;
    let salted = Prompt {
        salt: Some("tenant"),
        ..prompt(1)
    };
    let adapter = Prompt {
        model: "poet",
        ..prompt(1)
    };
    for prompt in [prompt(1), salted, adapter] {
        for asked in 0..8 {
            let cached = gateway.ask(&prompt).await;
            assert_eq!(cached, if asked == 0 { 0 } else { 48 });
        }
        for reason in [MISSES, MORE] {
            let alarm = gateway.broken(prompt.model, prompt.salt.is_some(), reason);
            assert_eq!(alarm.as_deref(), Some("0"));
        }
    }
    let text = exposition().render();
    // 7 repetitions of each of 3 kinds, 48 tokens each, are 1008. An adapter that no event named yet is
    // taken for the base model once, whose 48 tokens it does not find: 1056. The gauge is 1008 / 1056.
    for line in [
        r#"pinpod_kv_hit_parity{endpoint_name="10.1.0.1:8000"} 0.9545454545454546"#,
        r#"pinpod_kv_hit_predicted_tokens_total{endpoint_name="10.1.0.1:8000"} 1056"#,
        r#"pinpod_kv_hit_reported_tokens_total{endpoint_name="10.1.0.1:8000"} 1008"#,
        r#"pinpod_kv_hit_compared_total{endpoint_name="10.1.0.1:8000",result="agree"} 21"#,
        r#"pinpod_kv_hit_compared_total{endpoint_name="10.1.0.1:8000",result="engine_misses"} 1"#,
    ] {
        assert!(text.contains(&format!("{line}\n")), "{line}\nin\n{text}");
    }
}

#[tokio::test]
async fn an_engine_that_ignores_the_salt_is_noticed_and_its_repair_as_well() {
    let mut gateway = Gateway::start("10.1.0.2:8000").await;
    gateway.engine.computes = |prompt| Prompt {
        salt: None,
        ..prompt.clone()
    };
    let salted = Prompt {
        salt: Some("tenant"),
        ..prompt(1)
    };
    // The first is computed, five find what the picker does not know.
    assert_eq!(gateway.ask_until(&salted, MORE, "1").await, 6);
    for _ in 0..3 {
        gateway.ask(&prompt(1)).await;
    }
    assert_eq!(gateway.broken("base", false, MORE).as_deref(), Some("0"));
    gateway.engine.computes = Clone::clone;
    // Computed once under its salt, then three agree.
    assert_eq!(gateway.ask_until(&salted, MORE, "0").await, 4);
}

#[tokio::test]
async fn a_salt_the_events_do_not_mention_is_noticed() {
    let mut gateway = Gateway::start("10.1.0.3:8000").await;
    gateway.engine.publishes = |prompt| Prompt {
        salt: None,
        ..prompt.clone()
    };
    let salted = |first| Prompt {
        salt: Some("tenant"),
        ..prompt(first)
    };
    for first in [1, 101, 201, 301, 401] {
        assert_eq!(gateway.ask(&salted(first)).await, 0);
        // The events claimed it for everybody.
        assert_eq!(gateway.ask(&prompt(first)).await, 0);
    }
    assert_eq!(gateway.broken("base", false, MISSES).as_deref(), Some("1"));
}

#[tokio::test]
async fn another_chat_template_is_noticed() {
    let mut gateway = Gateway::start("10.1.0.4:8000").await;
    gateway.engine.computes = |prompt| {
        let mut other = prompt.clone();
        other.ids.insert(0, 151_644);
        other
    };
    assert_eq!(gateway.ask_until(&prompt(1), MORE, "1").await, 6);
    let broken = &gateway.overview()["endpoints"][0]["parityBroken"];
    assert_eq!(
        *broken,
        json!([{"model": "base", "prompt": "tokens", "salted": false, "reason": MORE}])
    );
    gateway.engine.computes = Clone::clone;
    assert_eq!(gateway.ask_until(&prompt(1), MORE, "0").await, 4);
}

#[tokio::test]
async fn a_template_that_differs_behind_the_system_prompt_is_noticed() {
    let mut gateway = Gateway::start("10.1.0.5:8000").await;
    gateway.engine.computes = |prompt| {
        let mut other = prompt.clone();
        other.ids.insert(BLOCK, 151_644);
        other
    };
    let long = Prompt {
        ids: (1..).take(20 * BLOCK).collect(),
        ..prompt(1)
    };
    // One block is predicted, twenty are found.
    assert_eq!(gateway.ask_until(&long, MORE, "1").await, 6);
}

#[tokio::test]
async fn an_adapter_under_another_name_is_noticed() {
    let mut gateway = Gateway::start("10.1.0.6:8000").await;
    gateway.engine.publishes = |prompt| Prompt {
        model: if prompt.model == "poet" {
            "poet-2"
        } else {
            prompt.model
        },
        ..prompt.clone()
    };
    let poet = |first| Prompt {
        model: "poet",
        ..prompt(first)
    };
    assert_eq!(gateway.ask_until(&poet(1), MORE, "1").await, 6);
    // The base model's blocks stand for an unknown adapter's: predicted, and not found.
    for first in [101, 201, 301, 401, 501] {
        gateway.ask(&prompt(first)).await;
        assert_eq!(gateway.ask(&poet(first)).await, 0);
    }
    assert_eq!(gateway.broken("poet", false, MISSES).as_deref(), Some("1"));
    assert_eq!(gateway.broken("poet", false, MORE).as_deref(), Some("0"));
    assert_eq!(gateway.broken("base", false, MISSES).as_deref(), Some("0"));
}

#[tokio::test]
async fn the_picker_tells_what_it_knows_of_a_prompt() {
    let mut gateway = Gateway::start("10.1.0.7:8000").await;
    gateway.ask(&prompt(1)).await;
    let mut other = prompt(1);
    other.ids[2 * BLOCK] = 7;
    let explain = async |prompt: &Prompt| {
        let body = Gateway::body(prompt).to_string();
        let answer = gateway
            .director
            .explain("/v1/completions", body.into())
            .await;
        let mut answer = answer.unwrap();
        answer["producers"]["precise-prefix-cache-producer"].take()
    };
    let known = explain(&other).await;
    assert_eq!(
        (&known["adapter"], &known["salted"]),
        (&Value::Null, &json!(false))
    );
    let on = &known["prompts"][0]["endpoints"][0];
    let shown = [
        "endpoint",
        "trust",
        "blockSize",
        "matchedBlocks",
        "totalBlocks",
        "tiers",
    ];
    assert_eq!(
        shown.map(|field| on[field].clone()),
        [
            json!("10.1.0.7:8000"),
            json!("exact"),
            json!(16),
            json!(2),
            json!(4),
            json!({"gpu": 2}),
        ]
    );
    let now = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap()
        .as_secs();
    let since = on["since"].as_u64().unwrap();
    assert!(
        (now - 60..=now).contains(&since),
        "{since} is not about {now}"
    );
    assert!(on["sinceSecondsAgo"].as_u64().unwrap() < 60);
    let unknown = explain(&prompt(5000)).await;
    assert_eq!(unknown["prompts"][0]["endpoints"][0]["matchedBlocks"], 0);
    assert_eq!(unknown["prompts"][0]["endpoints"][0]["since"], Value::Null);

    let overview = gateway.overview();
    assert_eq!(overview["index"]["blocks"], 4);
    assert_eq!(overview["endpoints"][0]["blocks"], json!({"gpu": 4}));
    let publisher = &overview["publishers"][0];
    let stats =
        ["state", "events", "gaps", "lastSeq"].map(|field| publisher["stats"][field].clone());
    assert_eq!(stats, [json!("live"), json!(1), json!(0), json!(0)]);
    let refused = gateway
        .director
        .explain("/v1/completions", Bytes::from_static(b"{"))
        .await;
    assert_eq!(refused.unwrap_err().http_status(), 400);
}
