//! The exact path beside the approximate one, on the same long prompts: two pickers over simulated engines
//! that hold these prompts and told so by KV events. Vocabulary and texts are those of the `tokens` bench.

#![expect(clippy::expect_used, reason = "a bench stops where it cannot measure")]

use std::fmt::Write;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::ensure;
use bytes::Bytes;
use pinpod::demo::client::Connections;
use pinpod::demo::processes::{Picker, Sims, free_port_range};
use pinpod::demo::scrape::get;
use pinpod::kvcache::tokens::service::{ModelSettings, Settings, TokenService};
use pinpod::request::openai::OpenAiParser;
use pinpod::request::{Body, InferenceRequest, Parser};
use serde_json::{Value, json};

use super::vocabulary::{long_text, sources, train};
use super::{ENDPOINTS, GROUPS, Load, PROMPTS, Script, Server, body};

const APPROXIMATE: &str = include_str!("../../deploy/config/recommended.yaml");
const PRECISE: &str = include_str!("../../deploy/config/precise.yaml");
const MODEL: &str = "sim-model";
/// Time for events to travel.
const SETTLE: Duration = Duration::from_secs(2);

/// Both pickers and the engines behind them.
pub(super) struct Pair {
    approximate: Picker,
    precise: Picker,
    scripts: Arc<Vec<Script>>,
    tokens: usize,
    _sims: Sims,
}

impl Pair {
    pub(super) async fn start(program: &Path, directory: &Path) -> anyhow::Result<Self> {
        let sources = sources();
        train(&sources, directory);
        let bodies: Vec<Bytes> = (0..PROMPTS).map(|n| prompt(&sources, n)).collect();
        let prompts = ids(directory, &bodies).await;

        let first = free_port_range(2 * ENDPOINTS)?;
        let replay = first + ENDPOINTS;
        let events = json!({
            "enable_kv_cache_events": true, "endpoint": format!("tcp://*:{first}"),
            "replay_endpoint": format!("tcp://*:{replay}"),
        });
        let flags = [
            "--time-scale=1000".to_owned(),
            format!("--kv-events-config={events}"),
        ];
        let sims = Sims::start(program, ENDPOINTS, &flags, directory).await?;
        let file = directory.join("endpoints.json");
        std::fs::write(&file, endpoints(&sims, first, replay).to_string())?;
        let start = async |name: &str, config: String| {
            let path = directory.join(name);
            std::fs::write(&path, config)?;
            let flags = [
                "--pool-name=pool".to_owned(),
                format!("--config-file={}", path.display()),
                "--refresh-metrics-interval=1s".to_owned(),
            ];
            Picker::start(program, &flags, directory).await
        };
        let model = directory.display().to_string();
        let precise = PRECISE
            .replace("my-model\n", &format!("{MODEL}\n"))
            .replace(&format!("/models/{MODEL}"), &model);
        let approximate = start("approximate.yaml", discover(APPROXIMATE, &file)).await?;
        let precise = start("precise.yaml", discover(&precise, &file)).await?;
        tokio::time::sleep(SETTLE).await;
        for (ids, pod) in prompts.iter().zip(sims.addresses.iter().cycle()) {
            let body = json!({"model": MODEL, "prompt": ids, "max_tokens": 1});
            let pod = Connections::new(*pod);
            pod.post("/v1/completions", body.to_string().into()).await?;
        }
        tokio::time::sleep(SETTLE).await;
        Ok(Self {
            approximate,
            precise,
            scripts: Arc::new(bodies.iter().map(Script::new).collect()),
            tokens: prompts.iter().map(Vec::len).sum::<usize>() / prompts.len(),
            _sims: sims,
        })
    }

    pub(super) fn servers(&self) -> [Server; 2] {
        let server = |name, picker: &Picker| Server::local(name, picker.grpc, &picker.process);
        [
            server("approximate", &self.approximate),
            server("precise", &self.precise),
        ]
    }

    pub(super) fn load(&self) -> Load {
        Load {
            name: format!("chat of {} tokens", self.tokens),
            response_pieces: 1,
            scripts: Arc::clone(&self.scripts),
        }
    }

    /// Every prompt was matched exactly, and most of it is held somewhere.
    pub(super) async fn check(&self) -> anyhow::Result<()> {
        let text = get(([127, 0, 0, 1], self.precise.metrics).into(), "/metrics").await?;
        let text = std::str::from_utf8(&text)?;
        let mut seen = String::new();
        for line in text.lines() {
            let counted = line.starts_with("pinpod_precise_prefix_requests_total")
                || line.starts_with("pinpod_kv_index_blocks");
            if counted {
                writeln!(seen, "{line}")?;
            }
        }
        let other = seen.lines().find(|line| {
            line.starts_with("pinpod_precise") && !line.contains("exact") && !line.ends_with(" 0")
        });
        ensure!(
            other.is_none() && seen.contains("exact"),
            "not exact:\n{seen}"
        );
        super::show(&seen);
        Ok(())
    }
}

/// Three quarters are shared by a group.
fn prompt(sources: &[String], number: usize) -> Bytes {
    let shared = long_text(sources, number % GROUPS);
    let own = long_text(sources, 1000 + number);
    let at = shared.floor_char_boundary(shared.len() / 4 * 3);
    let end = own.floor_char_boundary(own.len() / 4);
    body(&format!("{}{}", &shared[..at], &own[..end]))
}

/// Token ids of each prompt.
async fn ids(directory: &Path, bodies: &[Bytes]) -> Vec<Vec<u32>> {
    let settings = Settings {
        models: vec![ModelSettings {
            name: MODEL.to_owned(),
            directory: directory.to_owned(),
            ..ModelSettings::default()
        }],
        ..Settings::default()
    };
    let service = TokenService::load(settings).expect("the tokenizer");
    let mut all = Vec::new();
    for body in bodies {
        let body = Body::from(body.clone());
        let payload = OpenAiParser
            .parse("/v1/chat/completions", &body)
            .expect("a body");
        let mut request = InferenceRequest::new("1", payload, body);
        MODEL.clone_into(&mut request.target_model);
        let tokens = service.tokenize(&request).wait().await.expect("tokens");
        let prompt = tokens.prompts.first().expect("a prompt");
        all.push(prompt.ids.to_vec());
    }
    all
}

fn endpoints(sims: &Sims, events: u16, replay: u16) -> Value {
    let endpoints = (0..).zip(&sims.addresses).map(|(n, address): (u16, _)| {
        json!({
            "name": format!("sim-{n}"), "address": "127.0.0.1", "port": address.port().to_string(),
            "labels": {
                "pinpod.dev/kv-events-port": (events + n).to_string(),
                "pinpod.dev/kv-events-replay-port": (replay + n).to_string(),
            },
        })
    });
    json!({ "endpoints": endpoints.collect::<Vec<_>>() })
}

/// The configuration over the endpoints of a file.
fn discover(config: &str, file: &Path) -> String {
    let plugin = format!(
        "plugins:\n- {{type: file-discovery, parameters: {{path: {:?}}}}}\n",
        file.display().to_string()
    );
    config.replacen("plugins:\n", &plugin, 1)
        + "dataLayer: {discovery: {pluginRef: file-discovery}}\n"
}
