//! The block index that replicas share, on a real Redis, which is killed on the way.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

#[path = "support/events.rs"]
mod events;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use events::{BLOCK, frame, message, shake, stored};
use pinpod::config::{LoadOptions, builtin, load};
use pinpod::control::Director;
use pinpod::control::director::DirectorOptions;
use pinpod::datalayer::EndpointStore;
use pinpod::datalayer::discovery::list;
use pinpod::kvcache::events::{Batch, Cleared, Event, EventSink, Removed, Stored, StreamState};
use pinpod::kvcache::redis::{
    Algorithm, Entry, Found, KeyScheme, LOOKUP_LIMIT, SharedError, SharedIndex, SharedSettings,
    SharedSink, TlsFiles,
};
use pinpod::telemetry::metrics::Metrics;
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpListener;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// A server of our own, without a file to remember by.
struct Redis {
    port: u16,
    directory: tempfile::TempDir,
    process: Child,
    tls: bool,
}

/// `.tools/redis-server`, or the machine's.
fn program() -> PathBuf {
    let own = Path::new(env!("CARGO_MANIFEST_DIR")).join(".tools/redis-server");
    if own.exists() {
        return own;
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path)
        .map(|directory| directory.join("redis-server"))
        .find(|program| program.exists());
    found.expect("these tests need a Redis server: run `make .tools/redis-server`")
}

fn free_port() -> u16 {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().port()
}

fn spawn(port: u16, directory: &Path) -> Child {
    Command::new(program())
        .args(["--bind", "127.0.0.1", "--save", "", "--appendonly", "no"])
        .args(["--port", &port.to_string()])
        .arg("--dir")
        .arg(directory)
        .stdout(Stdio::null())
        .spawn()
        .unwrap()
}

/// Who issues certificates.
struct Authority {
    certificate: rcgen::Certificate,
    issuer: rcgen::Issuer<'static, rcgen::KeyPair>,
}

impl Authority {
    fn new() -> Self {
        let mut params = rcgen::CertificateParams::default();
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let key = rcgen::KeyPair::generate().unwrap();
        Self {
            certificate: params.self_signed(&key).unwrap(),
            issuer: rcgen::Issuer::new(params, key),
        }
    }

    /// Writes `<file>.crt` and `<file>.key`.
    fn issue(&self, name: &str, directory: &Path, file: &str) {
        let mut params = rcgen::CertificateParams::new([name.to_owned()]).unwrap();
        // With the default, the issuer's, it would pass for self-signed.
        params
            .distinguished_name
            .push(rcgen::DnType::CommonName, name);
        let key = rcgen::KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        let path = |extension: &str| directory.join(format!("{file}.{extension}"));
        std::fs::write(path("crt"), certificate.pem()).unwrap();
        std::fs::write(path("key"), key.serialize_pem()).unwrap();
    }
}

impl Redis {
    fn start() -> Self {
        let port = free_port();
        let directory = tempfile::tempdir().unwrap();
        Self {
            port,
            process: spawn(port, directory.path()),
            directory,
            tls: false,
        }
    }

    /// One that speaks TLS as `localhost` and asks its clients who they are if `auth` is yes.
    fn start_with_tls(auth: &str) -> Self {
        let port = free_port();
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        let authority = Authority::new();
        std::fs::write(path("ca.crt"), authority.certificate.pem()).unwrap();
        authority.issue("localhost", directory.path(), "tls");
        authority.issue("picker", directory.path(), "client");
        Authority::new().issue("picker", directory.path(), "stranger");
        let process = Command::new(program())
            .args(["--bind", "127.0.0.1", "--save", "", "--appendonly", "no"])
            .args(["--port", "0", "--tls-auth-clients", auth, "--tls-port"])
            .arg(port.to_string())
            .arg("--tls-cert-file")
            .arg(path("tls.crt"))
            .arg("--tls-key-file")
            .arg(path("tls.key"))
            .arg("--tls-ca-cert-file")
            .arg(path("ca.crt"))
            .arg("--dir")
            .arg(directory.path())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        Self {
            port,
            process,
            directory,
            tls: true,
        }
    }

    fn address(&self) -> String {
        if self.tls {
            format!("rediss://localhost:{}", self.port)
        } else {
            format!("redis://127.0.0.1:{}", self.port)
        }
    }

    /// Whom a client believes, and which of our certificates it shows.
    fn tls_files(&self, identity: Option<&str>) -> TlsFiles {
        let path = |name: String| self.directory.path().join(name);
        TlsFiles {
            authorities: self.tls.then(|| path("ca.crt".to_owned())),
            identity: identity.map(|id| (path(format!("{id}.crt")), path(format!("{id}.key")))),
        }
    }

    fn kill(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }

    fn restart(&mut self) {
        self.process = spawn(self.port, self.directory.path());
    }

    /// What another program sees.
    async fn ask<T: redis::FromRedisValue>(&self, command: &[&str]) -> T {
        let client = redis::Client::open(self.address()).unwrap();
        let mut connection = loop {
            match client.get_multiplexed_async_connection().await {
                Ok(connection) => break connection,
                Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
            }
        };
        let mut asked = redis::cmd(command[0]);
        for argument in &command[1..] {
            asked.arg(*argument);
        }
        asked.query_async(&mut connection).await.unwrap()
    }
}

impl Drop for Redis {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// One process that shares the index.
struct Replica {
    index: Arc<SharedIndex>,
    resyncs: Arc<AtomicUsize>,
    stop: CancellationToken,
}

impl Drop for Replica {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

impl Replica {
    async fn start(redis: &Redis, block_tokens: usize) -> Self {
        Self::start_with(redis, redis.tls_files(None), block_tokens).await
    }

    async fn start_with(redis: &Redis, tls: TlsFiles, block_tokens: usize) -> Self {
        let settings = SharedSettings {
            address: redis.address(),
            tls,
            scheme: KeyScheme::new(Algorithm::CborFnv, "", block_tokens),
            tier_weights: vec![("gpu".to_owned(), 1.0), ("cpu".to_owned(), 0.8)],
        };
        let (index, queue) = SharedIndex::new(&settings).unwrap();
        let resyncs = Arc::new(AtomicUsize::new(0));
        let stop = CancellationToken::new();
        let count = Arc::clone(&resyncs);
        let resync = move || {
            count.fetch_add(1, Ordering::Relaxed);
        };
        tokio::spawn(Arc::clone(&index).run(queue, resync, stop.clone()));
        let replica = Self {
            index,
            resyncs,
            stop,
        };
        until("a connection", async || replica.is_up()).await;
        replica
    }

    fn is_up(&self) -> bool {
        self.index.stats().up.load(Ordering::Relaxed)
    }

    fn engine(&self, endpoint: &str) -> SharedSink {
        let mut sink = self.index.sink(endpoint, Arc::default());
        sink.on_topic(format!("kv@{endpoint}@m").as_bytes());
        sink.set_state(StreamState::Live);
        sink
    }

    fn keys(&self, ids: &[u32]) -> Vec<u64> {
        let scheme = self.index.scheme();
        scheme.keys(scheme.start("m"), ids, |_| &[])
    }

    /// What `a` and `b` hold of a prompt.
    async fn look_up(&self, ids: &[u32]) -> Result<[Found; 2], SharedError> {
        let names = vec!["a".to_owned(), "b".to_owned()];
        let found = self.index.lookup(vec![self.keys(ids)], names).await?;
        Ok([found[0][0], found[0][1]])
    }

    async fn until_blocks(&self, ids: &[u32], expected: [u32; 2]) {
        until(&format!("{expected:?} blocks"), async || {
            let found = self.look_up(ids).await;
            found.is_ok_and(|found| found.map(|f| f.blocks) == expected)
        })
        .await;
    }
}

/// Waits for a condition, or fails after ten seconds with what was waited for.
async fn until(what: &str, condition: impl AsyncFn() -> bool) {
    for _ in 0..1000 {
        if condition().await {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("never: {what}");
}

fn apply(sink: &mut SharedSink, event: Event<'_>) {
    sink.apply(&Batch {
        ts: 1.0,
        data_parallel_rank: None,
        events: &[event],
    });
}

fn store<'a>(hashes: &'a [u64], parent: Option<u64>, tokens: &'a [u32], size: u32) -> Event<'a> {
    Event::Stored(Stored {
        hashes,
        parent,
        tokens,
        block_size: size,
        lora_name: None,
        medium: "GPU",
        extra_keys: None,
        cache_salt: None,
        group: None,
        kind: None,
    })
}

fn remove<'a>(hashes: &'a [u64], medium: &'a str) -> Event<'a> {
    Event::Removed(Removed {
        hashes,
        medium,
        group: None,
    })
}

fn ids(n: u32) -> Vec<u32> {
    (1..=n).collect()
}

#[tokio::test]
async fn replicas_share_keys_and_layout() {
    let redis = Redis::start();
    let (writer, reader) = (
        Replica::start(&redis, 4).await,
        Replica::start(&redis, 4).await,
    );
    let prompt = ids(12);
    apply(
        &mut writer.engine("a"),
        store(&[71, 72], None, &prompt[..8], 4),
    );
    reader.until_blocks(&prompt, [2, 0]).await;
    // The layout, as the reference's program reads it.
    let keys = reader.keys(&prompt);
    let first = keys[0].to_string();
    let fields: Vec<String> = redis.ask(&["HKEYS", &first]).await;
    assert_eq!(
        fields,
        [
            r#"{"PodIdentifier":"a","DeviceTier":"gpu","Speculative":false,"HasGroup":false,"GroupIdx":0}"#
        ]
    );
    let named: Vec<String> = redis.ask(&["ZRANGE", "engine:71", "0", "-1"]).await;
    assert_eq!(named, std::slice::from_ref(&first));
    // And as it writes it: another endpoint, which holds the first block in host memory.
    let field = Entry::copy("b", "cpu", Some(0)).field();
    let _: i64 = redis.ask(&["HSET", &first, &field, ""]).await;
    let found = reader.look_up(&prompt).await.unwrap();
    assert_eq!(
        found,
        [
            // By the names of `TIERS`: gpu, cpu, storage, speculative, other.
            Found {
                blocks: 2,
                stored: 2,
                score: 2.0,
                by_tier: [2, 0, 0, 0, 0],
            },
            Found {
                blocks: 1,
                stored: 1,
                score: 0.8,
                by_tier: [0, 1, 0, 0, 0],
            },
        ]
    );
    // The other replica goes on from a block it never saw stored.
    apply(
        &mut reader.engine("a"),
        store(&[73], Some(72), &prompt[8..], 4),
    );
    writer.until_blocks(&prompt, [3, 1]).await;
    // A block nobody knows has no place.
    apply(
        &mut reader.engine("a"),
        store(&[75], Some(74), &prompt[8..], 4),
    );
    until("no parent", async || {
        reader.index.stats().without_parent.load(Ordering::Relaxed) == 1
    })
    .await;
}

#[tokio::test]
async fn the_server_may_speak_tls_and_has_to_be_believed() {
    let redis = Redis::start_with_tls("no");
    let replica = Replica::start(&redis, 4).await;
    let prompt = ids(8);
    apply(&mut replica.engine("a"), store(&[1, 2], None, &prompt, 4));
    replica.until_blocks(&prompt, [2, 0]).await;
    // Nobody the system trusts issued its certificate.
    assert!(!connects(&redis, TlsFiles::default()).await);
}

#[tokio::test]
async fn the_server_may_ask_who_we_are() {
    let redis = Redis::start_with_tls("yes");
    let replica = Replica::start_with(&redis, redis.tls_files(Some("client")), 4).await;
    let prompt = ids(8);
    apply(&mut replica.engine("a"), store(&[1, 2], None, &prompt, 4));
    replica.until_blocks(&prompt, [2, 0]).await;
    for identity in [None, Some("stranger")] {
        assert!(
            !connects(&redis, redis.tls_files(identity)).await,
            "{identity:?}"
        );
    }
}

#[tokio::test]
async fn a_certificate_that_is_renewed_is_shown_from_the_next_connection_on() {
    let redis = Redis::start_with_tls("yes");
    let file = |name: &str| redis.directory.path().join(name);
    let files = redis.tls_files(Some("current"));
    for extension in ["crt", "key"] {
        let [from, to] = ["stranger", "current"].map(|name| file(&format!("{name}.{extension}")));
        std::fs::copy(from, to).unwrap();
    }
    let settings = SharedSettings {
        address: redis.address(),
        tls: files,
        scheme: KeyScheme::new(Algorithm::CborFnv, "", 4),
        tier_weights: Vec::new(),
    };
    let (index, queue) = SharedIndex::new(&settings).unwrap();
    let stop = CancellationToken::new();
    let task = tokio::spawn(Arc::clone(&index).run(queue, || {}, stop.clone()));
    for extension in ["crt", "key"] {
        let [from, to] = ["client", "current"].map(|name| file(&format!("{name}.{extension}")));
        std::fs::copy(from, to).unwrap();
    }
    until("a connection", async || {
        index.stats().up.load(Ordering::Relaxed)
    })
    .await;
    stop.cancel();
    task.await.unwrap();
}

/// Whether one gets in within a second, which is long enough for several attempts; that they fail cannot
/// be waited for.
async fn connects(redis: &Redis, tls: TlsFiles) -> bool {
    let settings = SharedSettings {
        address: redis.address(),
        tls,
        scheme: KeyScheme::new(Algorithm::CborFnv, "", 4),
        tier_weights: Vec::new(),
    };
    let (index, queue) = SharedIndex::new(&settings).unwrap();
    let stop = CancellationToken::new();
    let task = tokio::spawn(Arc::clone(&index).run(queue, || {}, stop.clone()));
    let connected = tokio::time::timeout(Duration::from_secs(1), async {
        while !index.stats().up.load(Ordering::Relaxed) {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    });
    let connected = connected.await.is_ok();
    stop.cancel();
    task.await.unwrap();
    connected
}

#[tokio::test]
async fn blocks_go_with_their_last_copy() {
    let redis = Redis::start();
    let replica = Replica::start(&redis, 4).await;
    let prompt = ids(12);
    let mut a = replica.engine("a");
    apply(&mut a, store(&[1, 2, 3], None, &prompt, 4));
    apply(&mut a, store(&[1, 2, 3], None, &prompt, 4));
    apply(
        &mut replica.engine("b"),
        store(&[1, 2, 3], None, &prompt, 4),
    );
    apply(&mut a, remove(&[3], "GPU"));
    replica.until_blocks(&prompt, [3, 3]).await;
    apply(&mut a, remove(&[3], "GPU"));
    replica.until_blocks(&prompt, [2, 3]).await;
    let names: i64 = redis.ask(&["EXISTS", "engine:3"]).await;
    assert_eq!(names, 1, "b holds it");
    // A copy in host memory outlives the one in the GPU's.
    let offloaded = Event::Stored(Stored {
        medium: "CPU",
        block_size: 0,
        hashes: &[2],
        parent: None,
        tokens: &[],
        lora_name: None,
        extra_keys: None,
        cache_salt: None,
        group: None,
        kind: None,
    });
    apply(&mut a, offloaded);
    apply(&mut a, remove(&[2], "GPU"));
    apply(&mut a, remove(&[2], "GPU"));
    until("host memory", async || {
        let [a, _] = replica.look_up(&prompt).await.unwrap();
        a == Found {
            blocks: 2,
            stored: 2,
            score: 1.8,
            by_tier: [1, 0, 0, 0, 0],
        }
    })
    .await;
    apply(&mut replica.engine("b"), Event::Cleared(Cleared));
    replica.until_blocks(&prompt, [2, 0]).await;
    let gone = async || {
        redis
            .ask::<i64>(&["EXISTS", &replica.keys(&prompt)[2].to_string()])
            .await
    };
    assert_eq!(gone().await, 0);
}

#[tokio::test]
async fn blocks_of_other_sizes_are_paired_by_ratio() {
    let redis = Redis::start();
    // Keys of 8 tokens, blocks of 4.
    let replica = Replica::start(&redis, 8).await;
    let prompt = ids(16);
    let mut a = replica.engine("a");
    apply(&mut a, store(&[1, 2, 3, 4], None, &prompt, 4));
    replica.until_blocks(&prompt, [2, 0]).await;
    let named: Vec<u64> = redis.ask(&["ZRANGE", "engine:4", "0", "-1"]).await;
    assert_eq!(named, [replica.keys(&prompt)[1]]);
    // Half of a key's block is gone, so all of it is.
    apply(&mut a, remove(&[4], "GPU"));
    replica.until_blocks(&prompt, [1, 0]).await;
}

#[tokio::test]
async fn an_expectation_counts_until_its_last_deadline() {
    let redis = Redis::start();
    let replica = Replica::start(&redis, 4).await;
    let prompt = ids(8);
    let keys = replica.keys(&prompt);
    let expect = |ttl| {
        replica
            .index
            .expect("a", keys.clone(), Duration::from_millis(ttl));
    };
    let started = Instant::now();
    expect(300);
    expect(900);
    replica.until_blocks(&prompt, [2, 0]).await;
    let [found, _] = replica.look_up(&prompt).await.unwrap();
    assert_eq!(
        (found.stored, found.score),
        (0, 2.0),
        "expected, not stored"
    );
    until("the first deadline", async || {
        started.elapsed().as_millis() > 400
    })
    .await;
    let [found, _] = replica.look_up(&prompt).await.unwrap();
    assert_eq!(found.blocks, 2, "renewed");
    replica.until_blocks(&prompt, [0, 0]).await;
}

#[tokio::test]
async fn a_process_that_ends_leaves_what_others_use() {
    let redis = Redis::start();
    let (leaving, staying) = (
        Replica::start(&redis, 4).await,
        Replica::start(&redis, 4).await,
    );
    let prompt = ids(8);
    let mut a = leaving.engine("a");
    apply(&mut a, store(&[1, 2], None, &prompt, 4));
    staying.until_blocks(&prompt, [2, 0]).await;
    // As a subscriber ends.
    a.set_state(StreamState::Down);
    a.reset();
    apply(&mut leaving.engine("b"), store(&[1, 2], None, &prompt, 4));
    staying.until_blocks(&prompt, [2, 2]).await;
    // An engine that restarts does lose its cache, and an endpoint that left says nothing any more.
    a.set_state(StreamState::Live);
    a.reset();
    staying.until_blocks(&prompt, [0, 2]).await;
    let gone = Arc::new(AtomicBool::new(false));
    let mut left = leaving.index.sink("a", Arc::clone(&gone));
    left.on_topic(b"kv@a@m");
    gone.store(true, Ordering::Relaxed);
    apply(&mut left, store(&[1, 2], None, &prompt, 4));
    apply(&mut leaving.engine("b"), remove(&[2], "GPU"));
    staying.until_blocks(&prompt, [0, 1]).await;
}

#[tokio::test]
async fn look_ups_are_bounded_while_the_server_hangs_or_is_gone() {
    let mut redis = Redis::start();
    let replica = Replica::start(&redis, 4).await;
    let prompt = ids(8);
    apply(&mut replica.engine("a"), store(&[1, 2], None, &prompt, 4));
    replica.until_blocks(&prompt, [2, 0]).await;
    let signal = |name: &str| {
        let process = redis.process.id().to_string();
        let status = Command::new("kill").args([name, &process]).status();
        assert!(status.unwrap().success());
    };
    signal("-STOP");
    let started = Instant::now();
    assert_eq!(replica.look_up(&prompt).await, Err(SharedError::Late));
    let took = started.elapsed();
    assert!(took < LOOKUP_LIMIT * 10, "{took:?}, the machine being busy");
    // The others do not wait for what is known to hang.
    assert_eq!(replica.look_up(&prompt).await, Err(SharedError::Down));
    signal("-CONT");
    replica.until_blocks(&prompt, [2, 0]).await;
    assert_eq!(
        replica.resyncs.load(Ordering::Relaxed),
        0,
        "nothing was lost"
    );

    redis.kill();
    until("down", async || {
        !replica.is_up() || replica.look_up(&prompt).await.is_err()
    })
    .await;
    redis.restart();
    until("a resync", async || {
        replica.resyncs.load(Ordering::Relaxed) == 1
    })
    .await;
    replica.until_blocks(&prompt, [0, 0]).await;
}

/// An engine that listens: it keeps what it published and replays it.
struct Engine {
    live: SocketAddr,
    replay: SocketAddr,
}

impl Engine {
    async fn start(ids: Vec<u32>) -> Self {
        let hashes: Vec<u64> = (1..).take(ids.len() / BLOCK).collect();
        let payload = stored(0, &hashes, &ids, None, None);
        let (live, replay) = (
            TcpListener::bind("127.0.0.1:0").await.unwrap(),
            TcpListener::bind("127.0.0.1:0").await.unwrap(),
        );
        let engine = Self {
            live: live.local_addr().unwrap(),
            replay: replay.local_addr().unwrap(),
        };
        tokio::spawn(async move {
            loop {
                let (mut stream, _) = live.accept().await.unwrap();
                tokio::spawn(async move {
                    shake(&mut stream, "PUB").await?;
                    // The subscription, then nothing until the picker hangs up.
                    while frame(&mut stream).await.is_ok() {}
                    Ok::<_, std::io::Error>(())
                });
            }
        });
        tokio::spawn(async move {
            loop {
                let (mut stream, _) = replay.accept().await.unwrap();
                let payload = payload.clone();
                tokio::spawn(async move {
                    shake(&mut stream, "ROUTER").await?;
                    loop {
                        frame(&mut stream).await?;
                        frame(&mut stream).await?;
                        let seq = 0_u64.to_be_bytes();
                        let kept = message(&[b"", b"kv@10.2.0.1:8000@m", &seq, &payload]);
                        stream.write_all(&kept).await?;
                        let end = message(&[b"", b"", &[0xff; 8], b""]);
                        stream.write_all(&end).await?;
                    }
                    #[allow(unreachable_code, reason = "tells the type")]
                    Ok::<_, std::io::Error>(())
                });
            }
        });
        engine
    }
}

/// Tiers of the first endpoint's match, by name.
async fn tiers(director: &Director, ids: &[u32]) -> Value {
    let body = json!({"model": "m", "prompt": ids}).to_string();
    let answer = director.explain("/v1/completions", Bytes::from(body)).await;
    let producer = &answer.unwrap()["producers"]["precise-prefix-cache-producer"];
    producer["prompts"][0]["endpoints"][0]["tiers"].clone()
}

/// (trust, matched, total) of each endpoint for a prompt.
async fn matched(director: &Director, ids: &[u32]) -> Vec<(Value, Value, Value)> {
    let body = json!({"model": "m", "prompt": ids}).to_string();
    let answer = director.explain("/v1/completions", Bytes::from(body)).await;
    let answer = answer.unwrap();
    let producer = &answer["producers"]["precise-prefix-cache-producer"];
    let endpoints = producer["prompts"][0]["endpoints"].as_array().unwrap();
    let shown = ["trust", "matchedBlocks", "totalBlocks"];
    endpoints
        .iter()
        .map(|on| shown.map(|field| on[field].clone()).into())
        .collect()
}

#[tokio::test]
async fn requests_go_on_while_the_server_is_killed_and_find_it_whole_afterwards() {
    let mut redis = Redis::start();
    let prompt = ids(64);
    let engine = Engine::start(prompt.clone()).await;
    let config = format!(
        "apiVersion: llm-d.ai/v1alpha1\nkind: EndpointPickerConfig\nplugins:\n\
         - type: precise-prefix-cache-producer\n  parameters:\n    indexerConfig:\n      \
         kvBlockIndexConfig: {{redisConfig: {{address: '{}'}}}}\n\
         - {{type: prefix-cache-scorer, parameters: {{prefixMatchInfoProducerName: precise-prefix-cache-producer}}}}\n\
         schedulingProfiles: [{{name: p, plugins: [{{pluginRef: prefix-cache-scorer}}]}}]\n",
        redis.address()
    );
    let config = load(Some(&config), &LoadOptions::default(), &builtin::registry()).unwrap();
    let store = Arc::new(EndpointStore::default());
    for listener in &config.listeners {
        store.subscribe(Arc::clone(listener));
    }
    let mut specs = list::parse("127.0.0.1:8000").unwrap();
    for (label, address) in [
        ("pinpod.dev/kv-events-port", engine.live),
        ("pinpod.dev/kv-events-replay-port", engine.replay),
    ] {
        let port = address.port().to_string();
        specs[0].labels.insert(label.to_owned(), port);
    }
    store.replace(specs);
    let options = DirectorOptions {
        ignore_subset: false,
        emit_scores: false,
        strip_control_headers: true,
        seed: Some(1),
    };
    let director = Director::new(store, config.activate(), options, Metrics::new());
    let whole = [(json!("shared"), json!(4), json!(4))];
    until("four blocks", async || {
        matched(&director, &prompt).await == whole
    })
    .await;
    assert_eq!(tiers(&director, &prompt).await, json!({"gpu": 4}));

    redis.kill();
    // The approximate producer knows nothing of this prompt: its one block of 64 tokens is not matched.
    let guessed = [(json!("shared"), json!(0), json!(1))];
    until("a guess", async || {
        matched(&director, &prompt).await == guessed
    })
    .await;
    redis.restart();
    // The server lost everything; what the engine replays is written again.
    until("four blocks again", async || {
        matched(&director, &prompt).await == whole
    })
    .await;
}
