//! Centralised mode: we listen, engines connect, and the topic says whose events they are.
//!
//! `kvEventsConfig.zmqEndpoint` of the precise prefix cache. The topic does not name a replay socket, so
//! there is no replay: a gap is a loss.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::frames::{Message, parse};
use super::stats::{SubscriberStats, count};
use super::stream::Stream;
use super::subscriber::{LossPolicy, SubscriberOptions};
use super::zmtp::{Connection, Role, ZmtpError};
use super::{EventSink, StreamState};

/// Engines connected at once; further ones wait in the listen queue.
pub const MAX_CONNECTIONS: usize = 4096;

/// Publishers remembered across connections. Beyond it batches of new ones are dropped.
pub const MAX_PUBLISHERS: usize = 16_384;

/// Bytes of a topic: an address and a model name.
const MAX_TOPIC_BYTES: usize = 1024;

/// Pause after a failed accept, which is a lack of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What a topic says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Topic<'a> {
    /// Part 2: `ip:port` of the serving endpoint, from older deployments an IP or a pod name.
    pub publisher: &'a str,
    /// Part 3, which may hold further `@`.
    pub model: Option<&'a str>,
}

impl<'a> Topic<'a> {
    /// Reads `kv@<publisher>@<model>`; `None` when there is no publisher in it.
    pub fn parse(topic: &'a [u8]) -> Option<Self> {
        let text = std::str::from_utf8(topic).ok()?;
        let mut parts = text.splitn(3, '@').skip(1);
        let publisher = parts.next().filter(|p| !p.is_empty())?;
        Some(Self {
            publisher,
            model: parts.next(),
        })
    }
}

/// Finds the sink of a topic and data-parallel rank (as the batch names it); `None` drops the batch.
/// Asked again with every batch of an unknown publisher, from several tasks, so it must be cheap.
pub type Resolver = dyn Fn(Topic<'_>, Option<u32>) -> Option<Box<dyn EventSink>> + Send + Sync;

/// A topic and a rank.
type Key = (Bytes, Option<u32>);

struct Shared {
    resolver: Box<Resolver>,
    options: SubscriberOptions,
    stats: Arc<SubscriberStats>,
    /// Sinks outlive connections. Engines publish from one connection each, so the lock is met by one
    /// task at a time but for the moment of a reconnect.
    publishers: parking_lot::Mutex<HashMap<Key, Arc<parking_lot::Mutex<Publisher>>>>,
}

struct Publisher {
    stream: Stream,
    /// Connection that last published; another one may be another process.
    connection: u64,
}

/// Accepts engines until `stop`, then resets every sink.
pub async fn serve(
    listener: TcpListener,
    resolver: Box<Resolver>,
    options: SubscriberOptions,
    stats: Arc<SubscriberStats>,
    stop: CancellationToken,
) {
    let shared = Arc::new(Shared {
        resolver,
        options,
        stats,
        publishers: parking_lot::Mutex::default(),
    });
    let tasks = TaskTracker::new();
    let permits = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let accepting = async {
        let mut connection: u64 = 0;
        // The semaphore is never closed, so this loop ends by `stop` alone.
        while let Ok(permit) = Arc::clone(&permits).acquire_owned().await {
            let stream = match listener.accept().await {
                Ok((stream, _)) => stream,
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a KV event publisher");
                    sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            };
            connection += 1;
            let (shared, stop) = (Arc::clone(&shared), stop.clone());
            tasks.spawn(async move {
                let following = shared.follow(stream, connection);
                if let Some(error) = stop.run_until_cancelled(following).await {
                    tracing::debug!(%error, "KV event publisher left");
                }
                drop(permit);
            });
        }
    };
    stop.run_until_cancelled(accepting).await;
    tasks.close();
    tasks.wait().await;
    for publisher in shared.publishers.lock().values() {
        let stream = &mut publisher.lock().stream;
        stream.set_state(StreamState::Down);
        stream.reset();
    }
}

impl Shared {
    async fn follow(&self, stream: TcpStream, connection: u64) -> ZmtpError {
        match self.receive(stream, connection).await {
            Ok(never) => match never {},
            Err(error) => {
                count(&self.stats.connection_errors);
                if matches!(error, ZmtpError::Oversize) {
                    count(&self.stats.oversize);
                }
                self.left(connection);
                error
            }
        }
    }

    async fn receive(
        &self,
        stream: TcpStream,
        connection: u64,
    ) -> Result<std::convert::Infallible, ZmtpError> {
        let open = async {
            let mut peer = Connection::open(stream, Role::Sub).await?;
            peer.subscribe_to_all().await?;
            Ok::<_, ZmtpError>(peer)
        };
        let mut peer = timeout(self.options.timing.connect, open)
            .await
            .map_err(|_| ZmtpError::Protocol("no handshake in time"))??;
        loop {
            let frames = peer.recv().await?;
            count(&self.stats.received);
            match parse(&frames) {
                Some(Message::Batch {
                    seq,
                    topic,
                    payload,
                }) => self.on_batch(connection, seq, &topic, &payload),
                Some(Message::End) | None => count(&self.stats.bad_frames),
            }
        }
    }

    fn on_batch(&self, connection: u64, seq: u64, topic: &Bytes, payload: &[u8]) {
        let Some(publisher) = self.publisher(topic, payload) else {
            count(&self.stats.unattributed);
            return;
        };
        let mut publisher = publisher.lock();
        let known = publisher.connection == connection;
        publisher.connection = connection;
        let stream = &mut publisher.stream;
        match stream.last {
            // The same connection cannot go back, nor can the same process on a new one.
            Some(mark) if seq <= mark.seq && (known || mark.is(seq, payload)) => {
                count(&stream.stats.duplicates);
                return;
            }
            Some(mark) if seq <= mark.seq => {
                count(&stream.stats.restarts);
                stream.reset();
            }
            Some(mark) if seq > mark.seq + 1 => {
                count(&stream.stats.gaps);
                count(&stream.stats.losses);
                if self.options.on_loss == LossPolicy::Reset {
                    stream.reset();
                }
            }
            _ => {}
        }
        stream.apply(seq, payload);
        stream.set_state(StreamState::Live);
    }

    fn publisher(
        &self,
        topic: &Bytes,
        payload: &[u8],
    ) -> Option<Arc<parking_lot::Mutex<Publisher>>> {
        if topic.len() > MAX_TOPIC_BYTES {
            return None;
        }
        let rank = super::wire::data_parallel_rank(payload);
        let key = (topic.clone(), rank);
        let mut publishers = self.publishers.lock();
        if let Some(known) = publishers.get(&key) {
            return Some(Arc::clone(known));
        }
        if publishers.len() >= MAX_PUBLISHERS {
            return None;
        }
        let sink = (self.resolver)(Topic::parse(topic)?, rank)?;
        let publisher = Publisher {
            stream: Stream::new(sink, Arc::clone(&self.stats)),
            connection: 0,
        };
        let publisher = Arc::new(parking_lot::Mutex::new(publisher));
        // A topic of its own, not a slice that keeps the whole message alive.
        let key = (Bytes::copy_from_slice(topic), rank);
        publishers.insert(key, Arc::clone(&publisher));
        Some(publisher)
    }

    /// A connection ended: its publishers are no longer live.
    fn left(&self, connection: u64) {
        let publishers: Vec<_> = self.publishers.lock().values().map(Arc::clone).collect();
        for publisher in publishers {
            let mut publisher = publisher.lock();
            if publisher.connection == connection {
                publisher.stream.set_state(StreamState::Down);
            }
        }
    }
}
