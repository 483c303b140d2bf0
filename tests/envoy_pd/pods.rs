//! Prefill and decode pods in processes of their own, so that each can be killed, behind picker and Envoy.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use pinpod::demo::envoy::ORIGINAL_DST;
use pinpod::demo::processes::{Envoy, Picker, Process, Sims, free_port_range};
use serde_json::{Value, json};
use tokio::time::Instant;

use super::super::support::{Answer, Gateway, get, post_to, program, send_signal};

/// Longest wait for a condition.
const PATIENCE: Duration = Duration::from_secs(30);
/// Connections that a process may keep for later, beyond those it had when it was idle before, when
/// requests came one by one.
const KEPT: usize = 6;

/// A process that can die and come back on its port.
pub(super) struct Pod {
    pub(super) port: u16,
    process: Option<Process>,
    name: String,
    arguments: Vec<String>,
    directory: PathBuf,
    lives: u32,
    /// Of a sidecar.
    metrics: u16,
}

impl Pod {
    async fn start(name: String, port: u16, arguments: Vec<String>, directory: &Path) -> Self {
        let mut pod = Self {
            port,
            process: None,
            name,
            arguments,
            directory: directory.to_owned(),
            lives: 0,
            metrics: 0,
        };
        pod.again().await;
        pod
    }

    async fn engine(role: &str, number: usize, flags: &[&str], directory: &Path) -> Self {
        let name = format!("{role}{number}");
        let port = free_port_range(1).unwrap();
        let mut arguments = vec![
            "sim".to_owned(),
            format!("--port={port}"),
            format!("--name={name}"),
            format!("--kv-role={}", if role == "encode" { "both" } else { role }),
            "--kv-side-channel-port=0".to_owned(),
        ];
        arguments.extend(flags.iter().map(|flag| (*flag).to_owned()));
        Self::start(name, port, arguments, directory).await
    }

    /// In front of `engine`.
    pub(super) async fn sidecar(
        number: usize,
        engine: u16,
        allowed: &str,
        flags: &[&str],
        directory: &Path,
    ) -> Self {
        let port = free_port_range(2).unwrap();
        let mut arguments = vec![
            "sidecar".to_owned(),
            format!("--port={port}"),
            format!("--metrics-port={}", port + 1),
            format!("--model-server-port={engine}"),
            "--secure-proxy=false".to_owned(),
            format!("--allowed-targets={allowed}"),
        ];
        arguments.extend(flags.iter().map(|flag| (*flag).to_owned()));
        let name = format!("sidecar{number}");
        let mut pod = Self::start(name, port, arguments, directory).await;
        pod.metrics = port + 1;
        pod
    }

    /// Kills it at once; what it held is gone.
    pub(super) fn kill(&mut self) {
        self.process = None;
    }

    /// Signals it while others look at it.
    pub(super) fn signal(&self, name: &str) {
        let process = self.process.as_ref().unwrap();
        send_signal(name, &process.id().to_string());
    }

    /// Waits until it ended by itself.
    pub(super) async fn ended(&mut self) {
        let ending = async {
            while self.process.as_mut().is_some_and(|p| p.check().is_ok()) {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::time::timeout(PATIENCE, ending).await.unwrap();
        self.process = None;
    }

    /// Starts it anew on its port.
    pub(super) async fn again(&mut self) {
        self.lives += 1;
        let log = format!("{}-{}-{}", self.name, self.port, self.lives);
        let started = Process::start(&log, program(), &self.arguments, &self.directory);
        let mut process = started.unwrap();
        process.wait_for_port(self.port).await.unwrap();
        self.process = Some(process);
    }

    pub(super) fn address(&self) -> SocketAddr {
        ([127, 0, 0, 1], self.port).into()
    }

    /// Makes an engine misbehave; `none` ends it.
    pub(super) async fn fault(&self, mode: &str) {
        let body = json!({ "mode": mode }).to_string();
        let set = post_to(self.address(), "/sim/fault", body).await;
        assert_eq!(set.status, 200, "{}", set.text());
    }

    /// What an engine counted; nothing while it is away.
    pub(super) async fn stats(&self) -> Value {
        if self.process.is_none() {
            return Value::Null;
        }
        let answer = get(self.address(), "/sim/stats").await.unwrap();
        serde_json::from_slice(&answer.body).unwrap()
    }

    /// What a sidecar holds.
    pub(super) async fn state(&self) -> Value {
        let address = ([127, 0, 0, 1], self.metrics).into();
        let answer = get(address, "/debug/plugins/state").await.unwrap();
        serde_json::from_slice(&answer.body).unwrap()
    }

    /// A series of a sidecar.
    pub(super) async fn metric(&self, series: &str) -> f64 {
        let address = ([127, 0, 0, 1], self.metrics).into();
        let text = get(address, "/metrics").await.unwrap().text();
        let line = text.lines().find_map(|line| line.strip_prefix(series));
        line.map_or(0.0, |value| value.trim().parse().unwrap())
    }

    fn sockets(&self) -> Option<usize> {
        self.process.as_ref().map(|process| sockets(process.id()))
    }
}

/// Open sockets of a process.
fn sockets(pid: u32) -> usize {
    let open = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
    let links = open.filter_map(|entry| std::fs::read_link(entry.ok()?.path()).ok());
    links
        .filter(|link| link.to_string_lossy().starts_with("socket:"))
        .count()
}

/// What to start.
pub(super) struct Layout<'a> {
    /// The shipped document that the picker follows.
    pub(super) document: &'a str,
    pub(super) encode: usize,
    pub(super) prefill: usize,
    pub(super) decode: usize,
    /// Of all engines.
    pub(super) engine_flags: &'a [&'a str],
    /// Of decode engines besides.
    pub(super) decode_flags: &'a [&'a str],
    pub(super) sidecar_flags: &'a [&'a str],
    /// Numbers of the prefill engines that sidecars may call, beside all that encode.
    pub(super) allowed: &'a [usize],
}

impl Default for Layout<'_> {
    fn default() -> Self {
        Self {
            document: PD,
            encode: 0,
            prefill: 2,
            decode: 2,
            engine_flags: &["--time-scale=50", "--kv-lease-seconds=3"],
            decode_flags: &[],
            sidecar_flags: &[],
            allowed: &[0, 1],
        }
    }
}

/// Everything that runs. The gateway's own simulated pod is in no pool: it says what one engine alone
/// answers.
pub(super) struct Split {
    pub(super) gateway: Gateway,
    pub(super) encode: Vec<Pod>,
    pub(super) prefill: Vec<Pod>,
    pub(super) decode: Vec<Pod>,
    pub(super) sidecars: Vec<Pod>,
}

/// Prefill and decode.
pub(super) const PD: &str = include_str!("../../deploy/config/pd.yaml");
/// Encode, prefill and decode.
pub(super) const EPD: &str = include_str!("../../deploy/config/epd.yaml");

/// A shipped configuration, with endpoints from a file.
fn config(shipped: &str, endpoints: &Path) -> String {
    let discovery = format!(
        "\ndataLayer: {{discovery: {{pluginRef: file-discovery}}}}\nplugins:\n- type: file-discovery\n  parameters: {{path: {}, watchFile: true}}\n",
        endpoints.display()
    );
    assert_eq!(shipped.matches("\nplugins:\n").count(), 1);
    shipped.replace("\nplugins:\n", &discovery)
}

impl Layout<'_> {
    pub(super) async fn start(self) -> Split {
        let directory = tempfile::tempdir().unwrap();
        let at = directory.path();
        let mut prefill = Vec::new();
        for number in 0..self.prefill {
            prefill.push(Pod::engine("prefill", number, self.engine_flags, at).await);
        }
        let mut encode = Vec::new();
        for number in 0..self.encode {
            encode.push(Pod::engine("encode", number, self.engine_flags, at).await);
        }
        let allowed = self.allowed.iter().filter_map(|n| prefill.get(*n));
        let allowed = allowed.chain(&encode);
        let allowed: Vec<String> = allowed.map(|pod| pod.address().to_string()).collect();
        let (mut decode, mut sidecars) = (Vec::new(), Vec::new());
        let decode_flags = [self.engine_flags, self.decode_flags].concat();
        for number in 0..self.decode {
            let engine = Pod::engine("decode", number, &decode_flags, at).await;
            let allowed = allowed.join(",");
            let front = Pod::sidecar(number, engine.port, &allowed, self.sidecar_flags, at).await;
            sidecars.push(front);
            decode.push(engine);
        }
        let engine_flags: Vec<String> = self.engine_flags.iter().map(|f| (*f).to_owned()).collect();
        let alone = Sims::start(program(), 1, &engine_flags, at).await.unwrap();
        let endpoints = at.join("endpoints.json");
        write_endpoints(&endpoints, [&encode, &prefill, &sidecars]);
        let flags = [
            "--pool-name=pool".to_owned(),
            format!("--config-text={}", config(self.document, &endpoints)),
        ];
        let picker = Picker::start(program(), &flags, at).await.unwrap();
        let envoy = Envoy::start(ORIGINAL_DST, picker.grpc, true, Vec::new(), at)
            .await
            .unwrap();
        let gateway = Gateway {
            envoy,
            picker,
            sims: alone,
            directory,
        };
        gateway.wait_until_healthy().await;
        Split {
            gateway,
            encode,
            prefill,
            decode,
            sidecars,
        }
    }
}

/// Pods for encode, prefill and decode.
fn write_endpoints(file: &Path, pods: [&[Pod]; 3]) {
    let roles = ["encode", "prefill", "decode"].into_iter().zip(pods);
    let endpoints = roles.flat_map(|(role, pods)| {
        pods.iter().map(move |pod| {
            json!({
                "name": pod.name, "address": "127.0.0.1", "port": pod.port.to_string(),
                "labels": {"llm-d.ai/role": role},
            })
        })
    });
    let endpoints: Vec<Value> = endpoints.collect();
    let whole = json!({ "endpoints": endpoints }).to_string();
    // In one step: whoever watches the file never sees half of it.
    let new = file.with_extension("new");
    std::fs::write(&new, whole).unwrap();
    std::fs::rename(&new, file).unwrap();
}

/// A request and how it is sent.
#[derive(Debug, Clone)]
pub(super) struct Ask {
    pub(super) prompt: String,
    pub(super) chat: bool,
    pub(super) streamed: bool,
    pub(super) max_tokens: usize,
    /// In front of a chat's text.
    pub(super) images: &'static [&'static str],
    pub(super) headers: &'static [(&'static str, &'static str)],
}

impl Ask {
    pub(super) fn new(prompt: impl Into<String>) -> Self {
        Self {
            prompt: prompt.into(),
            chat: false,
            streamed: false,
            max_tokens: 8,
            images: &[],
            headers: &[],
        }
    }

    pub(super) fn path(&self) -> &'static str {
        if self.chat {
            "/v1/chat/completions"
        } else {
            super::super::COMPLETIONS
        }
    }

    pub(super) fn body(&self) -> String {
        let mut body = json!({
            "model": "sim-model", "max_tokens": self.max_tokens, "stream": self.streamed,
        });
        if self.chat {
            let image = |url| json!({"type": "image_url", "image_url": {"url": url}});
            let text = json!({"type": "text", "text": self.prompt});
            let parts: Vec<Value> = self.images.iter().map(image).chain([text]).collect();
            body["messages"] = json!([{"role": "user", "content": parts}]);
        } else {
            body["prompt"] = json!(self.prompt);
        }
        if self.streamed {
            body["stream_options"] = json!({"include_usage": true});
        }
        body.to_string()
    }
}

/// Some `tokens` tokens about `topic`, which no other topic begins like.
pub(super) fn text(topic: &str, tokens: usize) -> String {
    let mut text = String::new();
    let mut number = 0;
    while text.len() < tokens * 4 {
        write!(text, "{topic} {number}, ").unwrap();
        number += 1;
    }
    text.truncate(tokens * 4);
    text
}

/// What an answer says, streamed or not.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Said {
    pub(super) text: String,
    pub(super) finish: String,
    pub(super) prompt_tokens: u64,
    completion_tokens: u64,
}

impl Said {
    pub(super) fn of(answer: &Answer, ask: &Ask) -> Self {
        let whole = answer.text();
        assert_eq!(answer.status, 200, "{whole}");
        let parts: Vec<&str> = if ask.streamed {
            let events = whole.strip_suffix("data: [DONE]\n\n");
            let events = events.unwrap_or_else(|| panic!("the stream does not end: {whole}"));
            events.split_terminator("\n\n").collect()
        } else {
            vec![&whole]
        };
        let mut said = Self {
            text: String::new(),
            finish: String::new(),
            prompt_tokens: 0,
            completion_tokens: 0,
        };
        for part in parts {
            let part: Value =
                serde_json::from_str(part.strip_prefix("data: ").unwrap_or(part)).unwrap();
            let choice = &part["choices"][0];
            for place in ["/text", "/message/content", "/delta/content"] {
                let piece = choice.pointer(place).and_then(Value::as_str);
                said.text += piece.unwrap_or_default();
            }
            said.finish += choice["finish_reason"].as_str().unwrap_or_default();
            if let Some(usage) = part.get("usage").filter(|usage| !usage.is_null()) {
                let count = |name: &str| usage[name].as_u64().unwrap();
                said.prompt_tokens = count("prompt_tokens");
                said.completion_tokens = count("completion_tokens");
            }
        }
        said
    }
}

/// What idle processes hold.
#[derive(Debug)]
pub(super) struct Held {
    sockets: BTreeMap<String, usize>,
    /// Of each sidecar, besides those of its connections.
    tasks: Vec<i64>,
}

impl Split {
    /// Through Envoy.
    pub(super) async fn ask(&self, ask: &Ask) -> Answer {
        let gateway = &self.gateway;
        gateway.post_with(ask.path(), ask.body(), ask.headers).await
    }

    /// Through Envoy, and as one engine alone would have it.
    pub(super) async fn ask_well(&self, ask: &Ask) -> Said {
        let said = Said::of(&self.ask(ask).await, ask);
        assert_eq!(said, self.alone(ask).await);
        said
    }

    /// Of an engine that nobody splits requests for.
    pub(super) async fn alone(&self, ask: &Ask) -> Said {
        let engine = self.gateway.sims.addresses[0];
        Said::of(&post_to(engine, ask.path(), ask.body()).await, ask)
    }

    /// Tells the picker that only these prefill endpoints exist.
    pub(super) fn keep_prefill(&self, numbers: std::ops::Range<usize>) {
        let file = self.gateway.directory.path().join("endpoints.json");
        let prefill = &self.prefill[numbers];
        write_endpoints(&file, [&self.encode, prefill, &self.sidecars]);
    }

    fn engines(&self) -> impl Iterator<Item = &Pod> {
        self.encode.iter().chain(&self.prefill).chain(&self.decode)
    }

    /// A count of each encode engine.
    pub(super) async fn encode(&self, name: &str) -> Vec<i64> {
        counts(&self.encode, name).await
    }

    /// A count of each prefill engine.
    pub(super) async fn prefill(&self, name: &str) -> Vec<i64> {
        counts(&self.prefill, name).await
    }

    /// A count of each decode engine.
    pub(super) async fn decode(&self, name: &str) -> Vec<i64> {
        counts(&self.decode, name).await
    }

    /// A series of all sidecars together.
    pub(super) async fn sidecar_metric(&self, series: &str) -> f64 {
        let mut sum = 0.0;
        for sidecar in &self.sidecars {
            sum += sidecar.metric(series).await;
        }
        sum
    }

    /// Requests that sidecars served in a way.
    pub(super) async fn served(&self, path: &str) -> f64 {
        let series = format!("pinpod_sidecar_requests_total{{path=\"{path}\"}}");
        self.sidecar_metric(&series).await
    }

    /// Waits until no process works for anybody, and no engine holds blocks.
    pub(super) async fn nothing_left(&self) {
        self.gateway.wait_until_idle().await;
        until("nothing is left", async || {
            let admin = SocketAddr::from(([127, 0, 0, 1], self.gateway.envoy.admin));
            let text = get(admin, "/stats?filter=rq_active$").await.unwrap().text();
            for name in [
                "cluster.picked_endpoint.upstream_rq_active",
                "cluster.epp.upstream_rq_active",
                "http.inference.downstream_rq_active",
            ] {
                if !text.contains(&format!("{name}: 0\n")) {
                    return Err(text);
                }
            }
            for sidecar in self.sidecars.iter().filter(|s| s.process.is_some()) {
                let state = sidecar.state().await;
                let mut legs = state["legs"].as_object().unwrap().values();
                if legs.any(|n| n != 0) {
                    return Err(format!("{}: {state}", sidecar.name));
                }
            }
            for engine in self.engines() {
                let stats = engine.stats().await;
                let left = ["running", "waiting", "unanswered", "kept", "held_blocks"];
                if left
                    .iter()
                    .any(|name| stats.get(name).is_some_and(|n| n != 0))
                {
                    return Err(format!("{}: {stats}", engine.name));
                }
            }
            Ok(())
        })
        .await;
    }

    /// What everybody holds; to be asked when nothing is under way.
    pub(super) async fn held(&self) -> Held {
        let pods = self.engines().chain(&self.sidecars);
        let pods = pods.filter_map(|pod| Some((pod.name.clone(), pod.sockets()?)));
        let picker = sockets(self.gateway.picker.process.id());
        let mut tasks = Vec::new();
        for sidecar in &self.sidecars {
            let state = sidecar.state().await;
            let count = |name: &str| state[name].as_i64().unwrap();
            tasks.push(count("tasks") - count("connections") - count("kept_engine_connections"));
        }
        Held {
            sockets: pods.chain([("picker".to_owned(), picker)]).collect(),
            tasks,
        }
    }

    /// Waits until everybody holds what it did `before`, but for some connections that are kept.
    pub(super) async fn back_to(&self, before: &Held) {
        self.back_to_within(before, KEPT).await;
    }

    /// The same for a number of connections that are kept.
    pub(super) async fn back_to_within(&self, before: &Held, kept: usize) {
        self.nothing_left().await;
        until("everything is given back", async || {
            let now = self.held().await;
            let more = |(name, sockets): (&String, &usize)| {
                *sockets
                    > before
                        .sockets
                        .get(name)
                        .map_or(kept, |before| before + kept)
            };
            let mut tasks = now.tasks.iter().zip(&before.tasks);
            if now.sockets.iter().any(more) || tasks.any(|(now, before)| now > before) {
                return Err(format!("{before:?} became {now:?}"));
            }
            Ok(())
        })
        .await;
    }
}

async fn counts(pods: &[Pod], name: &str) -> Vec<i64> {
    let mut counts = Vec::new();
    for pod in pods {
        counts.push(pod.stats().await[name].as_i64().unwrap_or(0));
    }
    counts
}

/// Waits for a condition; what it said last is in the panic.
pub(super) async fn until(what: &str, condition: impl AsyncFn() -> Result<(), String>) {
    let deadline = Instant::now() + PATIENCE;
    while let Err(still) = condition().await {
        assert!(
            Instant::now() < deadline,
            "timed out waiting until {what}: {still}"
        );
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Waits until a count of engines, all together, is `wanted`.
pub(super) async fn until_count(pods: &[Pod], name: &str, wanted: i64) {
    until(name, async || {
        let now = counts(pods, name).await;
        let sum: i64 = now.iter().sum();
        (sum == wanted).then_some(()).ok_or(format!("{now:?}"))
    })
    .await;
}

/// By how much counts grew.
pub(super) fn grown(before: &[i64], after: &[i64]) -> Vec<i64> {
    before.iter().zip(after).map(|(b, a)| a - b).collect()
}
