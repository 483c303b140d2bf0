//! One subscriber: a live connection, a replay when one is needed, and the order between them.
//!
//! On every connection the older history is asked for first, while live batches wait in a bounded
//! buffer; then the buffer is applied without what the replay already brought. After a reconnect the
//! replay starts at the last known batch itself, to see whether it is still the same process.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::Semaphore;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::frames::{Message, parse};
use super::replay::{Replay, Step};
use super::stats::{SubscriberStats, count};
use super::stream::Stream;
use super::zmtp::{Connection, Role, ZmtpError};
use super::{EventSink, StreamState};
use crate::datalayer::EndpointSpec;

/// Live batches kept while a replay runs. Beyond it the oldest goes: the replay brings it again.
pub const MAX_BUFFERED_BATCHES: usize = 4096;

/// Payload bytes kept while a replay runs.
pub const MAX_BUFFERED_BYTES: usize = 64 << 20;

/// Label of an endpoint whose PUB socket is not where the others' are, such as several engines behind one
/// address.
pub const EVENTS_PORT: &str = "pinpod.dev/kv-events-port";

/// The same for its ROUTER socket.
pub const REPLAY_PORT: &str = "pinpod.dev/kv-events-replay-port";

/// Replays in a row for one gap before it counts as lost.
const MAX_ROUNDS: u32 = 3;

/// Where a publisher listens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Source {
    /// PUB socket.
    pub live: SocketAddr,
    /// ROUTER socket; `None` when the engine keeps nothing to replay.
    pub replay: Option<SocketAddr>,
}

impl Source {
    /// The sockets of an endpoint: at these ports unless its labels [`EVENTS_PORT`] and [`REPLAY_PORT`]
    /// say otherwise, counted up by its rank.
    pub fn of_endpoint(endpoint: &EndpointSpec, live_port: u16, replay_port: u16) -> Option<Self> {
        let port = |label: &str, default| {
            let own = endpoint
                .labels
                .get(label)
                .and_then(|port| port.parse().ok());
            own.unwrap_or(default)
        };
        let (live, replay) = (port(EVENTS_PORT, live_port), port(REPLAY_PORT, replay_port));
        Self::of_rank(endpoint.address.ip(), live, replay, endpoint.rank)
    }

    /// The sockets of a data-parallel rank: both ports are counted up by the rank. `replay_port` 0 is
    /// none. `None` when a port leaves its range.
    pub fn of_rank(ip: IpAddr, live_port: u16, replay_port: u16, rank: u32) -> Option<Self> {
        let rank = u16::try_from(rank).ok()?;
        let replay = match replay_port {
            0 => None,
            port => Some(SocketAddr::new(ip, port.checked_add(rank)?)),
        };
        Some(Self {
            live: SocketAddr::new(ip, live_port.checked_add(rank)?),
            replay,
        })
    }
}

/// What to do with an endpoint's part of the index when events are lost for good.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum LossPolicy {
    /// Forget it: nothing false is claimed.
    #[default]
    Reset,
    /// Keep it, in [`StreamState::Gap`] until the engine restarts.
    Keep,
}

/// Time limits.
#[derive(Debug, Clone, Copy)]
pub struct Timing {
    /// Connection and handshake.
    pub connect: Duration,
    /// First pause before connecting again; doubles, with jitter.
    pub backoff_min: Duration,
    /// Longest pause before connecting again.
    pub backoff_max: Duration,
    /// Silence in a replay before asking again. A publisher looks for requests every 0.1 s.
    pub replay_idle: Duration,
    /// Pause before asking again.
    pub replay_pause: Duration,
    /// A whole replay.
    pub replay_total: Duration,
    /// After a failed replay none is tried for so long.
    pub replay_cooldown: Duration,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(5),
            backoff_min: Duration::from_millis(200),
            backoff_max: Duration::from_secs(5),
            replay_idle: Duration::from_secs(2),
            replay_pause: Duration::from_millis(100),
            replay_total: Duration::from_mins(2),
            replay_cooldown: Duration::from_secs(30),
        }
    }
}

/// Settings all subscribers of a pool share.
#[derive(Debug, Clone, Copy, Default)]
pub struct SubscriberOptions {
    /// What a definite loss does.
    pub on_loss: LossPolicy,
    /// Time limits.
    pub timing: Timing,
}

/// Why a replay runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Purpose {
    /// To fill in what is missing.
    Fill,
    /// To see whether the remembered batch is still there; the next step tells.
    Recognise,
}

/// Receives the events of one publisher until it is stopped.
#[derive(Debug)]
pub(super) struct Subscriber {
    source: Source,
    options: SubscriberOptions,
    permits: Arc<Semaphore>,
    stream: Stream,
    buffer: Buffer,
    replay: Option<(Replay, Purpose)>,
    /// Number of the newest batch when the replay started.
    replay_base: Option<u64>,
    rounds: u32,
    no_replay_before: Option<Instant>,
    /// This connection's publisher was not yet recognised as the one `stream.last` is from.
    unrecognised: bool,
    /// Batches may have been missed before this connection: neither a replay nor a batch that follows the
    /// newest one has told otherwise.
    unsure: bool,
    /// A message came on this connection.
    heard: bool,
}

impl Subscriber {
    pub(super) fn new(
        source: Source,
        sink: Box<dyn EventSink>,
        stats: Arc<SubscriberStats>,
        options: SubscriberOptions,
        permits: Arc<Semaphore>,
    ) -> Self {
        Self {
            source,
            options,
            permits,
            stream: Stream::new(sink, stats),
            buffer: Buffer::default(),
            replay: None,
            replay_base: None,
            rounds: 0,
            no_replay_before: None,
            unrecognised: false,
            unsure: false,
            heard: false,
        }
    }

    /// Runs until `stop`; then everything of this publisher is forgotten.
    pub(super) async fn run(mut self, stop: CancellationToken) {
        // Every await below is between batches, so the sink is whole wherever this is dropped.
        stop.run_until_cancelled(self.connect_for_ever()).await;
        self.stream.set_state(StreamState::Down);
        self.stream.reset();
    }

    async fn connect_for_ever(&mut self) {
        let timing = self.options.timing;
        let mut pause = timing.backoff_min;
        let mut first = true;
        loop {
            self.heard = false;
            let error = match connect(self.source.live, timing.connect).await {
                Ok(connection) => {
                    if !std::mem::take(&mut first) {
                        count(&self.stream.stats.reconnects);
                    }
                    let error = self.follow(connection).await;
                    count(&self.stream.stats.receive_errors);
                    error
                }
                Err(error) => {
                    count(&self.stream.stats.connect_errors);
                    error
                }
            };
            if matches!(error, ZmtpError::Oversize) {
                count(&self.stream.stats.oversize);
            }
            tracing::debug!(live = %self.source.live, %error, "KV event stream ended");
            self.disconnected();
            if self.heard {
                pause = timing.backoff_min;
            }
            // Half to all of the pause: engines that went together do not come back together.
            sleep(pause.mul_f64(0.5 + fastrand::f64() / 2.0)).await;
            pause = (pause * 2).min(timing.backoff_max);
        }
    }

    fn disconnected(&mut self) {
        self.replay = None;
        self.rounds = 0;
        // What waits here was not applied; the next connection's replay brings it, or it is lost.
        self.buffer = Buffer::default();
        self.stream.stats.set_waiting(0);
        self.stream.set_state(StreamState::Down);
    }

    async fn follow(&mut self, mut connection: Connection) -> ZmtpError {
        self.unrecognised = self.stream.last.is_some();
        self.unsure = self.unrecognised;
        let start = match self.stream.last {
            Some(mark) => self.start_replay(mark.seq, Purpose::Recognise),
            None => self.start_replay(0, Purpose::Fill),
        };
        if !start {
            self.set_settled_state();
        }
        loop {
            // Both arms are cancel-safe.
            tokio::select! {
                frames = connection.recv() => match frames {
                    Ok(frames) => self.on_live(&frames),
                    Err(error) => return error,
                },
                step = next_step(&mut self.replay) => self.on_step(step),
            }
        }
    }

    /// Whether a replay was started.
    fn start_replay(&mut self, start: u64, purpose: Purpose) -> bool {
        let Some(address) = self.source.replay else {
            return false;
        };
        if self.no_replay_before.is_some_and(|t| Instant::now() < t) {
            return false;
        }
        count(&self.stream.stats.replays);
        self.replay_base = self.stream.last.map(|mark| mark.seq);
        let permits = Arc::clone(&self.permits);
        let replay = Replay::start(address, start, self.options.timing, permits);
        self.replay = Some((replay, purpose));
        self.stream.set_state(if self.stream.last.is_some() {
            StreamState::Gap
        } else {
            StreamState::Joining
        });
        true
    }

    fn on_live(&mut self, frames: &[Bytes]) {
        count(&self.stream.stats.received);
        self.heard = true;
        let Some(Message::Batch {
            seq,
            topic,
            payload,
        }) = parse(frames)
        else {
            count(&self.stream.stats.bad_frames);
            return;
        };
        self.stream.on_topic(&topic);
        if let Some(ts) = super::wire::timestamp(&payload) {
            self.stream.stats.arrived(ts);
        }
        let dropped = self.buffer.insert(seq, payload);
        super::stats::count_n(&self.stream.stats.buffer_dropped, dropped);
        if self.replay.is_none() {
            self.drain();
        }
        self.stream.stats.set_waiting(self.buffer.batches.len());
    }

    fn on_step(&mut self, step: Step) {
        match step {
            Step::Batch {
                seq,
                topic,
                payload,
            } => {
                self.stream.on_topic(&topic);
                self.on_replayed(seq, &payload);
            }
            Step::Complete => {
                let purpose = self.replay.take().map(|(_, purpose)| purpose);
                if purpose == Some(Purpose::Recognise) {
                    // Not even the remembered batch: these numbers were never reached.
                    self.restarted();
                } else {
                    self.unsure = false;
                    self.drain();
                }
            }
            Step::Failed(error) => {
                self.replay = None;
                count(&self.stream.stats.replay_failures);
                self.no_replay_before = Some(Instant::now() + self.options.timing.replay_cooldown);
                tracing::debug!(live = %self.source.live, %error, "KV event replay failed");
                self.drain();
            }
        }
        self.stream.stats.set_waiting(self.buffer.batches.len());
    }

    fn on_replayed(&mut self, seq: u64, payload: &[u8]) {
        count(&self.stream.stats.replayed);
        if let Some((_, purpose @ Purpose::Recognise)) = &mut self.replay {
            *purpose = Purpose::Fill;
            self.unrecognised = false;
            if self.stream.last.is_some_and(|mark| mark.is(seq, payload)) {
                return;
            }
            if self.stream.last.is_some_and(|mark| mark.seq == seq) {
                self.restarted();
                return;
            }
            // The remembered batch has left the publisher's memory: it restarted, or went on for so
            // long that events are lost. This answer is all there is either way.
            count(&self.stream.stats.restarts);
            self.stream.reset();
        }
        match self.stream.last {
            Some(mark) if seq <= mark.seq => count(&self.stream.stats.duplicates),
            Some(mark) if seq > mark.seq + 1 => {
                self.lose();
                self.stream.apply(seq, payload);
            }
            _ => self.stream.apply(seq, payload),
        }
    }

    /// Another process answers: forget the old one and join the new one.
    fn restarted(&mut self) {
        count(&self.stream.stats.restarts);
        tracing::info!(live = %self.source.live, "engine restarted, its KV blocks are forgotten");
        self.stream.reset();
        self.unrecognised = false;
        self.unsure = false;
        self.replay = None;
        if !self.start_replay(0, Purpose::Fill) {
            self.drain();
        }
    }

    /// Events are gone for good.
    fn lose(&mut self) {
        count(&self.stream.stats.losses);
        match self.options.on_loss {
            LossPolicy::Reset => self.stream.reset(),
            LossPolicy::Keep => self.stream.lose(),
        }
    }

    /// Applies what waits, up to a gap that a replay can still fill.
    fn drain(&mut self) {
        while let Some((seq, payload)) = self.buffer.pop_first() {
            let Some(mark) = self.stream.last else {
                // It joined before the first batch, and this is not it: that one was lost on the way
                // or comes late. A publisher that forgot it answers with what it has.
                if seq > 0 && self.rounds == 0 {
                    self.rounds = 1;
                    if self.start_replay(0, Purpose::Fill) {
                        self.buffer.insert(seq, payload);
                        return;
                    }
                }
                self.unrecognised = false;
                self.unsure = false;
                self.stream.apply(seq, &payload);
                continue;
            };
            if seq <= mark.seq {
                if std::mem::take(&mut self.unrecognised) && !mark.is(seq, &payload) {
                    self.buffer.insert(seq, payload);
                    self.restarted();
                    return;
                }
                count(&self.stream.stats.duplicates);
                continue;
            }
            if seq > mark.seq + 1 {
                if self.rounds == 0 {
                    count(&self.stream.stats.gaps);
                }
                let replayed = self.replay_base == Some(mark.seq) && self.rounds > 0;
                if !replayed && self.rounds < MAX_ROUNDS {
                    self.rounds += 1;
                    let purpose = if self.unrecognised {
                        Purpose::Recognise
                    } else {
                        Purpose::Fill
                    };
                    let start = if self.unrecognised {
                        mark.seq
                    } else {
                        mark.seq + 1
                    };
                    if self.start_replay(start, purpose) {
                        self.buffer.insert(seq, payload);
                        return;
                    }
                }
                self.lose();
            }
            self.unrecognised = false;
            // It follows, or what is missing was accounted for just now.
            self.unsure = false;
            self.stream.apply(seq, &payload);
        }
        self.rounds = 0;
        self.set_settled_state();
    }

    fn set_settled_state(&mut self) {
        self.stream.set_state(if self.unsure {
            StreamState::Gap
        } else {
            self.stream.settled()
        });
    }
}

async fn connect(live: SocketAddr, limit: Duration) -> Result<Connection, ZmtpError> {
    let open = async {
        let mut connection = Connection::connect(live, Role::Sub).await?;
        connection.subscribe_to_all().await?;
        Ok(connection)
    };
    match timeout(limit, open).await {
        Ok(result) => result,
        Err(_) => Err(ZmtpError::Protocol("no handshake in time")),
    }
}

async fn next_step(replay: &mut Option<(Replay, Purpose)>) -> Step {
    match replay {
        Some((replay, _)) => replay.next().await,
        None => std::future::pending().await,
    }
}

/// Live batches by number, bounded in count and bytes.
#[derive(Debug, Default)]
struct Buffer {
    batches: BTreeMap<u64, Bytes>,
    bytes: usize,
}

impl Buffer {
    /// Keeps a batch and returns how many of the oldest had to go.
    fn insert(&mut self, seq: u64, payload: Bytes) -> usize {
        self.bytes += payload.len();
        if let Some(old) = self.batches.insert(seq, payload) {
            self.bytes -= old.len();
        }
        let mut dropped = 0;
        while self.batches.len() > MAX_BUFFERED_BATCHES || self.bytes > MAX_BUFFERED_BYTES {
            self.pop_first();
            dropped += 1;
        }
        dropped
    }

    fn pop_first(&mut self) -> Option<(u64, Bytes)> {
        let (seq, payload) = self.batches.pop_first()?;
        self.bytes -= payload.len();
        Some((seq, payload))
    }
}

#[cfg(test)]
mod tests;
