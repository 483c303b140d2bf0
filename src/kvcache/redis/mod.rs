//! A block index that several replicas share in Redis or Valkey, in the keys and layout of the program
//! we stand in for, so that its replicas and ours use one.
//!
//! Entry points: [`SharedIndex::lookup`] for a request, [`SharedIndex::sink`] for a publisher's events,
//! [`SharedIndex::run`], the one task that keeps the connection and writes. A look-up never waits for a
//! writer, nor longer than [`LOOKUP_LIMIT`]; while there is no connection it fails at once. Events wait
//! in a bounded queue; where that overflows or a write fails, everything of the endpoints is forgotten
//! and asked for again once the connection is back, so that the index claims nothing that is not so.

mod apply;
mod keys;
mod layout;
mod lookup;
mod sink;

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

use arc_swap::ArcSwapOption;
use redis::aio::MultiplexedConnection;
use redis::{AsyncConnectionConfig, Client, ClientTlsConfig, RedisError, TlsCertificates};
use tokio::sync::{Notify, mpsc};
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;

pub use keys::{Algorithm, KeyScheme, standard_hashes};
pub use layout::Entry;
pub use lookup::{Found, TIERS};
pub use sink::SharedSink;

use self::apply::Applier;

/// Time a request waits for its matches. A local server answers 256 keys in under a millisecond.
pub const LOOKUP_LIMIT: Duration = Duration::from_millis(50);
/// Events that wait to be written.
pub const MAX_QUEUED: usize = 8192;
/// Tokens of the events that wait: 64 MiB.
pub const MAX_QUEUED_TOKENS: usize = 16 << 20;
/// Events written with one round trip or a few.
const MAX_BATCH: usize = 256;
/// A connection attempt, and an answer to the task that writes.
const PATIENCE: Duration = Duration::from_secs(2);
/// First pause before connecting again; doubles.
const BACKOFF_MIN: Duration = Duration::from_millis(100);
/// Longest pause before connecting again.
const BACKOFF_MAX: Duration = Duration::from_secs(5);

/// Where the index is and how its keys are made.
#[derive(Debug, Clone)]
pub struct SharedSettings {
    /// `redis://`, `valkey://` or `unix:` address; `host:port` is taken for the first. `rediss://` and
    /// `valkeys://` speak TLS.
    pub address: String,
    /// For those that do.
    pub tls: TlsFiles,
    /// Makes keys.
    pub scheme: KeyScheme,
    /// Weight of a tier by lower-case name; 1.0 where none is given.
    pub tier_weights: Vec<(String, f64)>,
}

/// PEM files, read for every connection, so that new ones may take their place.
#[derive(Debug, Clone, Default)]
pub struct TlsFiles {
    /// Whom to believe; the system's when absent.
    pub authorities: Option<PathBuf>,
    /// Who we are: certificates and their key.
    pub identity: Option<(PathBuf, PathBuf)>,
}

/// Why there is no answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SharedError {
    /// The server cannot be reached; connecting is tried again and again.
    #[error("no connection to the shared index")]
    Down,
    /// No answer within [`LOOKUP_LIMIT`].
    #[error("the shared index did not answer in time")]
    Late,
    /// The server refused, or the connection broke.
    #[error("shared index: {0}")]
    Failed(String),
}

/// What happened so far; all but `up` only grow.
#[derive(Debug, Default)]
pub struct SharedStats {
    /// There is a connection.
    pub up: AtomicBool,
    /// Connections made.
    pub connections: AtomicU64,
    /// Look-ups answered.
    pub found: AtomicU64,
    /// Look-ups refused for lack of a connection.
    pub down: AtomicU64,
    /// Look-ups that took too long.
    pub late: AtomicU64,
    /// Look-ups that failed.
    pub failed: AtomicU64,
    /// Events written.
    pub written: AtomicU64,
    /// Events dropped: the queue was full.
    pub overflowed: AtomicU64,
    /// Events lost with a write that failed.
    pub lost: AtomicU64,
    /// Events dropped: their topic names no model.
    pub without_model: AtomicU64,
    /// Stores dropped: their parent block is unknown.
    pub without_parent: AtomicU64,
    /// Stores whose extra keys cannot be read.
    pub malformed: AtomicU64,
}

/// The shared index, as every request and publisher of this process uses it.
pub struct SharedIndex {
    address: String,
    tls: TlsFiles,
    scheme: KeyScheme,
    weights: HashMap<String, f64>,
    connection: ArcSwapOption<MultiplexedConnection>,
    /// Rung when the connection turned out to be of no use.
    broken: Notify,
    queue: mpsc::Sender<Op>,
    queued_tokens: AtomicUsize,
    /// Events were lost: what the index says of our endpoints may be wrong.
    gap: AtomicBool,
    stats: SharedStats,
}

impl std::fmt::Debug for SharedIndex {
    /// Without the address, which may hold a password.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SharedIndex")
            .field("scheme", &self.scheme)
            .finish_non_exhaustive()
    }
}

/// Events on their way to the server.
#[derive(Debug)]
pub struct Queue(mpsc::Receiver<Op>);

/// One change.
#[derive(Debug)]
enum Op {
    Stored(Box<StoredBlocks>),
    Removed {
        endpoint: Arc<str>,
        hashes: Vec<u64>,
        medium: String,
        group: Option<u32>,
    },
    /// Everything of these endpoints is gone.
    Cleared(Vec<Arc<str>>),
    /// A request with these keys was sent to the endpoint.
    Expected {
        endpoint: Arc<str>,
        keys: Vec<u64>,
        ttl: Duration,
    },
}

/// Blocks that were stored; without tokens, another place of known ones.
#[derive(Debug)]
struct StoredBlocks {
    endpoint: Arc<str>,
    /// Adapter, or the model.
    model: Arc<str>,
    hashes: Vec<u64>,
    parent: Option<u64>,
    tokens: Vec<u32>,
    /// Of each of the engine's blocks; empty when no block has any.
    extras: Vec<Vec<String>>,
    medium: String,
    group: Option<u32>,
}

impl Op {
    fn tokens(&self) -> usize {
        match self {
            Self::Stored(stored) => stored.tokens.len(),
            Self::Expected { keys, .. } => keys.len(),
            Self::Removed { .. } | Self::Cleared(_) => 0,
        }
    }
}

impl SharedIndex {
    /// An index that is not connected yet; [`SharedIndex::run`] does that and takes the queue.
    pub fn new(settings: &SharedSettings) -> Result<(Arc<Self>, Queue), String> {
        client(&settings.address, &settings.tls)?;
        let (queue, receiver) = mpsc::channel(MAX_QUEUED);
        let weights = settings.tier_weights.iter();
        let index = Self {
            address: settings.address.clone(),
            tls: settings.tls.clone(),
            scheme: settings.scheme.clone(),
            weights: weights.map(|(tier, w)| (tier.to_lowercase(), *w)).collect(),
            connection: ArcSwapOption::empty(),
            broken: Notify::new(),
            queue,
            queued_tokens: AtomicUsize::new(0),
            gap: AtomicBool::new(false),
            stats: SharedStats::default(),
        };
        Ok((Arc::new(index), Queue(receiver)))
    }

    /// What makes this index's keys.
    pub fn scheme(&self) -> &KeyScheme {
        &self.scheme
    }

    /// Counters.
    pub fn stats(&self) -> &SharedStats {
        &self.stats
    }

    /// Everything of these endpoints is to be forgotten.
    pub fn clear(&self, endpoints: Vec<Arc<str>>) {
        self.push(Op::Cleared(endpoints));
    }

    /// A request whose blocks have these keys was sent to `endpoint`, which counts as holding them for
    /// `ttl`.
    pub fn expect(&self, endpoint: &str, keys: Vec<u64>, ttl: Duration) {
        self.push(Op::Expected {
            endpoint: endpoint.into(),
            keys,
            ttl,
        });
    }

    /// Queues a change; what does not fit is dropped and leaves a gap.
    fn push(&self, op: Op) {
        let tokens = op.tokens();
        let waiting = self.queued_tokens.fetch_add(tokens, Relaxed);
        if waiting + tokens > MAX_QUEUED_TOKENS || self.queue.try_send(op).is_err() {
            self.queued_tokens.fetch_sub(tokens, Relaxed);
            self.stats.overflowed.fetch_add(1, Relaxed);
            self.gap.store(true, Relaxed);
        }
    }

    /// Connects, writes what is queued, and connects again, until `stop`. `resync` is called when what the
    /// server holds of our endpoints may not be what they hold: it must forget and replay them.
    pub async fn run(
        self: Arc<Self>,
        queue: Queue,
        resync: impl Fn() + Send + Sync,
        stop: CancellationToken,
    ) {
        stop.run_until_cancelled(self.serve(queue, resync)).await;
        self.hang_up();
    }

    async fn serve(&self, Queue(mut queue): Queue, resync: impl Fn() + Send + Sync) {
        let mut applier = Applier::new(self.scheme.clone());
        let mut server = None;
        let mut pause = BACKOFF_MIN;
        let mut told = false;
        loop {
            match self.connect().await {
                Ok((connection, id)) => {
                    tracing::info!("connected to the shared index");
                    (pause, told) = (BACKOFF_MIN, false);
                    // Another process may have lost what the former one held.
                    let same = server.replace(id.clone()).is_none_or(|former| former == id);
                    if !same || self.gap.swap(false, Relaxed) {
                        applier.forget();
                        resync();
                    }
                    self.stats.connections.fetch_add(1, Relaxed);
                    self.stats.up.store(true, Relaxed);
                    self.connection.store(Some(Arc::new(connection.clone())));
                    let error = self
                        .write(&mut queue, &mut applier, connection, &resync)
                        .await;
                    self.hang_up();
                    tracing::warn!(%error, "lost the shared index, prompts are matched approximately");
                }
                Err(error) => {
                    if !std::mem::replace(&mut told, true) {
                        tracing::warn!(%error, "cannot reach the shared index, prompts are matched \
                            approximately");
                    }
                }
            }
            // Half to all of the pause: replicas do not come back together.
            sleep(pause.mul_f64(0.5 + fastrand::f64() / 2.0)).await;
            pause = (pause * 2).min(BACKOFF_MAX);
        }
    }

    /// A connection and the id of the server process behind it.
    async fn connect(&self) -> Result<(MultiplexedConnection, String), String> {
        let config = AsyncConnectionConfig::new()
            .set_connection_timeout(Some(PATIENCE))
            .set_response_timeout(Some(PATIENCE));
        let client = client(&self.address, &self.tls)?;
        let connecting = client.get_multiplexed_async_connection_with_config(&config);
        let text = |error: RedisError| error.to_string();
        let connected = timeout(PATIENCE, connecting).await;
        let mut connection = connected
            .map_err(|_| "no answer in time".to_owned())?
            .map_err(text)?;
        let info: String = redis::cmd("INFO")
            .arg("server")
            .query_async(&mut connection)
            .await
            .map_err(text)?;
        let id = info.lines().find_map(|line| line.strip_prefix("run_id:"));
        Ok((connection, id.unwrap_or_default().to_owned()))
    }

    fn hang_up(&self) {
        self.connection.store(None);
        self.stats.up.store(false, Relaxed);
    }

    /// Writes until that fails.
    async fn write(
        &self,
        queue: &mut mpsc::Receiver<Op>,
        applier: &mut Applier,
        mut connection: MultiplexedConnection,
        resync: &(impl Fn() + Send + Sync),
    ) -> String {
        let mut batch = Vec::with_capacity(MAX_BATCH);
        loop {
            // Every arm is cancel-safe.
            tokio::select! {
                n = queue.recv_many(&mut batch, MAX_BATCH) => if n == 0 {
                    return "the queue is closed".to_owned();
                },
                () = applier.next_expiry() => {}
                () = self.broken.notified() => return "a look-up had no answer".to_owned(),
            }
            let (events, tokens) = (batch.len(), batch.iter().map(Op::tokens).sum());
            self.queued_tokens.fetch_sub(tokens, Relaxed);
            let now = Instant::now();
            let applied = applier
                .apply(&mut batch, &mut connection, now, &self.stats)
                .await;
            batch.clear();
            if let Err(error) = applied {
                self.stats.lost.fetch_add(events as u64, Relaxed);
                self.gap.store(true, Relaxed);
                return error.to_string();
            }
            self.stats.written.fetch_add(events as u64, Relaxed);
            if self.gap.swap(false, Relaxed) {
                applier.forget();
                resync();
            }
        }
    }
}

/// Errors begin with the parameter they are about.
fn client(text: &str, tls: &TlsFiles) -> Result<Client, String> {
    let address = address(text).map_err(|error| format!("address: {error}"))?;
    if tls.authorities.is_none() && tls.identity.is_none() {
        return Client::open(address).map_err(|error| format!("address: {error}"));
    }
    if !address.starts_with("rediss://") {
        return Err("address: certificates are for rediss:// only".to_owned());
    }
    let read = |path: &PathBuf, name: &str| {
        std::fs::read(path).map_err(|error| format!("{name}: {error}"))
    };
    let authorities = tls.authorities.as_ref();
    let identity = tls.identity.as_ref().map(|(certificate, key)| {
        Ok::<_, String>(ClientTlsConfig {
            client_cert: read(certificate, "clientCertPath")?,
            client_key: read(key, "clientKeyPath")?,
        })
    });
    let certificates = TlsCertificates {
        root_cert: authorities
            .map(|path| read(path, "caCertPath"))
            .transpose()?,
        client_tls: identity.transpose()?,
    };
    Client::build_with_tls(address, certificates).map_err(|error| format!("certificates: {error}"))
}

/// The address as the client library reads it.
fn address(text: &str) -> Result<String, String> {
    if text.contains("skip_verify") {
        return Err("skip_verify is not available: give caCertPath".to_owned());
    }
    let (scheme, rest) = text.split_once("://").unwrap_or(("", text));
    match scheme {
        "redis" | "rediss" | "unix" => Ok(text.to_owned()),
        "" if text.starts_with("unix:") => Ok(text.to_owned()),
        "" | "valkey" => Ok(format!("redis://{rest}")),
        "valkeys" => Ok(format!("rediss://{rest}")),
        _ => Err(format!("{scheme}:// is neither redis:// nor unix:")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings() -> SharedSettings {
        SharedSettings {
            address: "127.0.0.1:1".to_owned(),
            tls: TlsFiles::default(),
            scheme: KeyScheme::new(Algorithm::CborFnv, "", 16),
            tier_weights: Vec::new(),
        }
    }

    #[test]
    fn addresses_are_read_as_the_contract_says() {
        assert_eq!(address("h:6379").unwrap(), "redis://h:6379");
        assert_eq!(address("valkey://h:1/2").unwrap(), "redis://h:1/2");
        assert_eq!(address("redis://h").unwrap(), "redis://h");
        assert_eq!(address("unix:///run/r").unwrap(), "unix:///run/r");
        assert_eq!(address("rediss://h").unwrap(), "rediss://h");
        assert_eq!(address("valkeys://h:1").unwrap(), "rediss://h:1");
        assert!(address("http://h").is_err());
        let lax = address("rediss://h?skip_verify=true").unwrap_err();
        assert!(lax.contains("caCertPath"), "{lax}");
        let identity = TlsFiles {
            identity: Some(("crt".into(), "key".into())),
            ..TlsFiles::default()
        };
        let refused = client("redis://h", &identity).unwrap_err();
        assert!(refused.contains("rediss"), "{refused}");
    }

    #[test]
    fn what_does_not_fit_the_queue_leaves_a_gap() {
        let (index, _queue) = SharedIndex::new(&settings()).unwrap();
        for _ in 0..MAX_QUEUED {
            index.clear(Vec::new());
        }
        assert!(!index.gap.load(Relaxed));
        index.clear(Vec::new());
        assert!(index.gap.load(Relaxed));
        assert_eq!(index.stats.overflowed.load(Relaxed), 1);
    }

    #[test]
    fn queued_tokens_are_bounded() {
        let (index, _queue) = SharedIndex::new(&settings()).unwrap();
        let ttl = Duration::from_secs(1);
        index.expect("a", vec![0; MAX_QUEUED_TOKENS], ttl);
        assert_eq!(index.stats.overflowed.load(Relaxed), 0);
        index.expect("a", vec![0; 1], ttl);
        assert_eq!(index.stats.overflowed.load(Relaxed), 1);
        assert_eq!(index.queued_tokens.load(Relaxed), MAX_QUEUED_TOKENS);
    }

    #[tokio::test]
    async fn without_a_server_look_ups_fail_at_once() {
        let (index, queue) = SharedIndex::new(&settings()).unwrap();
        let stop = CancellationToken::new();
        let task = tokio::spawn(Arc::clone(&index).run(queue, || {}, stop.clone()));
        let found = index.lookup(vec![vec![1]], vec!["a".to_owned()]).await;
        assert_eq!(found, Err(SharedError::Down));
        stop.cancel();
        task.await.unwrap();
    }
}
