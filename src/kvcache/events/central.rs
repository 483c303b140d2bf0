//! Centralised mode: we listen, engines connect, and the topic says whose events they are.
//!
//! `kvEventsConfig.zmqEndpoint` of the precise prefix cache. The topic does not name a replay socket, so
//! there is no replay: a gap is a loss.

use std::collections::HashMap;
use std::net::SocketAddr;
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
use super::stream::{FIRST_SEQ, Stream};
use super::subscriber::{LossPolicy, SubscriberOptions};
use super::wire::{data_parallel_rank, timestamp};
use super::zmtp::{Connection, Role, ZmtpError};
use super::{EventSink, StreamState};

/// Engines connected at once; further ones wait in the listen queue.
pub const MAX_CONNECTIONS: usize = 4096;

/// Publishers remembered across connections. Beyond it those without a connection are forgotten, and
/// then batches of new ones are dropped.
pub const MAX_PUBLISHERS: usize = 16_384;

/// Bytes of a topic: an address and a model name.
const MAX_TOPIC_BYTES: usize = 1024;

/// Pause after a failed accept, which is a lack of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Pause before trying again to listen: after a reload the former instance may still hold the port.
const BIND_PAUSE: Duration = Duration::from_millis(500);

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

/// Whose events a topic brings.
pub struct Attributed {
    /// Takes the events.
    pub sink: Box<dyn EventSink>,
    /// Counters of this publisher; connections are counted by the listener.
    pub stats: Arc<SubscriberStats>,
}

impl std::fmt::Debug for Attributed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Attributed").finish_non_exhaustive()
    }
}

/// Finds the sink of a topic and data-parallel rank (as the batch names it); `None` drops the batch.
/// Asked again with every batch of an unknown publisher, from several tasks, so it must be cheap.
pub type Resolver = dyn Fn(Topic<'_>, Option<u32>) -> Option<Attributed> + Send + Sync;

/// A topic and a rank.
type Key = (Bytes, Option<u32>);

struct Shared {
    resolver: Box<Resolver>,
    options: SubscriberOptions,
    stats: Arc<SubscriberStats>,
    max_publishers: usize,
    /// Sinks outlive connections. Looked up when a connection's topic changes, not for every batch.
    publishers: parking_lot::Mutex<HashMap<Key, SharedPublisher>>,
}

/// An engine publishes on one connection, so the lock is met by one task but for the moment of a
/// reconnect.
type SharedPublisher = Arc<parking_lot::Mutex<Publisher>>;

struct Publisher {
    stream: Stream,
    /// Connection that last published; another one may be another process.
    connection: u64,
    /// An older connection went on under the same name.
    contested: bool,
}

/// Whose batches a connection brings.
struct Current {
    topic: Bytes,
    rank: Option<u32>,
    /// Last byte of the payload, which of a batch in the usual form is the rank.
    tail: Option<u8>,
    publisher: SharedPublisher,
}

impl Current {
    /// Whether a batch is of the same publisher as the one before. A forwarder brings several topics and
    /// ranks on one connection; a payload without a rank is that publisher's, whatever is wrong with it.
    fn goes_on(&self, topic: &[u8], payload: &[u8]) -> bool {
        let same_rank = || data_parallel_rank(payload).is_none_or(|rank| self.rank == Some(rank));
        self.topic == topic
            && (self.tail == payload.last().copied() || same_rank())
            && !self.publisher.lock().stream.is_gone()
    }
}

/// Listens on `address`, trying again until it can, and then does as [`serve`]. The first failure is
/// logged, all are counted.
pub async fn listen(
    address: SocketAddr,
    resolver: Box<Resolver>,
    options: SubscriberOptions,
    stats: Arc<SubscriberStats>,
    stop: CancellationToken,
) {
    let bind = async {
        let mut told = false;
        loop {
            match TcpListener::bind(address).await {
                Ok(listener) => return listener,
                Err(error) => {
                    count(&stats.bind_errors);
                    if !std::mem::replace(&mut told, true) {
                        tracing::warn!(%address, %error, "cannot listen for KV events yet");
                    }
                    sleep(BIND_PAUSE).await;
                }
            }
        }
    };
    let Some(listener) = stop.run_until_cancelled(bind).await else {
        return;
    };
    stats.set_state(StreamState::Live);
    tracing::info!(%address, "listening for KV events");
    serve(listener, resolver, options, Arc::clone(&stats), stop).await;
    stats.set_state(StreamState::Down);
}

/// Accepts engines until `stop`, then resets every sink. `stats` counts connections, messages and what
/// could not be attributed.
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
        max_publishers: MAX_PUBLISHERS,
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

impl Publisher {
    fn is_connected(&self) -> bool {
        self.stream.stats.state() != StreamState::Down
    }

    /// Whether it is connected and counts; if not, what is known of it is forgotten.
    fn connected_or_reset(&mut self) -> bool {
        let connected = self.is_connected() && !self.stream.is_gone();
        if !connected {
            self.stream.reset();
        }
        connected
    }
}

impl Shared {
    async fn follow(&self, stream: TcpStream, connection: u64) -> ZmtpError {
        match self.receive(stream, connection).await {
            Ok(never) => match never {},
            Err(error) => {
                count(&self.stats.receive_errors);
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
        let mut current: Option<Current> = None;
        loop {
            let frames = peer.recv().await?;
            count(&self.stats.received);
            let Some(Message::Batch {
                seq,
                topic,
                payload,
            }) = parse(&frames)
            else {
                count(&self.stats.bad_frames);
                continue;
            };
            if !current
                .as_ref()
                .is_some_and(|known| known.goes_on(&topic, &payload))
            {
                current = self.publisher(&topic, &payload);
            }
            match &current {
                Some(known) => self.on_batch(connection, seq, known, &payload),
                None => count(&self.stats.unattributed),
            }
        }
    }

    fn on_batch(&self, connection: u64, seq: u64, from: &Current, payload: &[u8]) {
        let mut publisher = from.publisher.lock();
        if connection < publisher.connection && publisher.is_connected() {
            count(&self.stats.unattributed);
            if !std::mem::replace(&mut publisher.contested, true) {
                tracing::warn!(
                    topic = %String::from_utf8_lossy(&from.topic),
                    rank = from.rank,
                    "two engines publish KV events under one name; the one that connected last counts"
                );
            }
            return;
        }
        let known = publisher.connection == connection;
        publisher.connection = connection;
        let stream = &mut publisher.stream;
        count(&stream.stats.received);
        if let Some(ts) = timestamp(payload) {
            stream.stats.arrived(ts);
        }
        match stream.last {
            // The same connection cannot go back, nor can the same process on a new one.
            Some(mark) if seq <= mark.seq && (known || mark.is(seq, payload)) => {
                count(&stream.stats.duplicates);
                return;
            }
            // The number after the newest one would look as if it followed: a process that connects while
            // it sends its first batch loses it.
            Some(mark) if seq <= mark.seq || (!known && seq <= FIRST_SEQ) => {
                count(&stream.stats.restarts);
                stream.reset();
            }
            Some(mark) if seq > mark.seq + 1 => {
                count(&stream.stats.gaps);
                count(&stream.stats.losses);
                match self.options.on_loss {
                    LossPolicy::Reset => stream.reset(),
                    LossPolicy::Keep => stream.lose(),
                }
            }
            _ => {}
        }
        stream.apply(seq, payload);
        let settled = stream.settled();
        stream.set_state(settled);
    }

    fn publisher(&self, topic: &Bytes, payload: &[u8]) -> Option<Current> {
        if topic.len() > MAX_TOPIC_BYTES {
            return None;
        }
        let rank = data_parallel_rank(payload);
        // A topic of its own, not a slice that keeps the whole message alive.
        let topic = Bytes::copy_from_slice(topic);
        let key = (topic.clone(), rank);
        let current = |publisher| Current {
            topic: topic.clone(),
            rank,
            tail: payload.last().copied(),
            publisher,
        };
        let mut publishers = self.publishers.lock();
        if let Some(known) = publishers.get(&key) {
            if !known.lock().stream.is_gone() {
                return Some(current(Arc::clone(known)));
            }
            publishers.remove(&key);
        }
        if publishers.len() >= self.max_publishers {
            publishers.retain(|_, publisher| publisher.lock().connected_or_reset());
            if publishers.len() >= self.max_publishers {
                return None;
            }
        }
        let Attributed { sink, stats } = (self.resolver)(Topic::parse(&topic)?, rank)?;
        let mut stream = Stream::new(sink, stats);
        stream.on_topic(&topic);
        let publisher = Publisher {
            stream,
            connection: 0,
            contested: false,
        };
        let publisher = Arc::new(parking_lot::Mutex::new(publisher));
        publishers.insert(key, Arc::clone(&publisher));
        Some(current(publisher))
    }

    /// A connection ended: its publishers are no longer live, and those that do not count are dropped.
    fn left(&self, connection: u64) {
        let mut publishers = self.publishers.lock();
        // One that is busy counts.
        publishers.retain(|_, known| known.try_lock().is_none_or(|known| !known.stream.is_gone()));
        let all: Vec<_> = publishers.values().map(Arc::clone).collect();
        drop(publishers);
        for publisher in all {
            let mut publisher = publisher.lock();
            if publisher.connection == connection {
                publisher.stream.set_state(StreamState::Down);
            }
        }
    }
}

#[cfg(test)]
mod tests;
