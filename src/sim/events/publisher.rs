//! Numbers the batches of an engine, publishes them and keeps the newest for replay.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::time::SystemTime;

use bytes::Bytes;
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use super::config::EventsConfig;
use super::event::{Event, HashForm, payload};
use super::socket::{Hub, Replay};
use super::zmtp;

/// Requests for replay that wait; their senders wait with them.
const MAX_REPLAYS: usize = 64;
/// Answers queued between two looks at what else is to do, so that peers can take them meanwhile.
const REPLAY_STRETCH: usize = 100;
/// Stands for a sequence number at the end of a replay.
const END: [u8; 8] = [0xFF; 8];

/// How a publisher writes.
#[derive(Debug, Clone, Copy)]
pub struct Encoding {
    /// Of hashes.
    pub hashes: HashForm,
    /// Told in every batch.
    pub rank: u32,
}

/// The changes of an engine step.
#[derive(Debug)]
struct Batch {
    /// Life of the engine that they belong to.
    life: u64,
    /// Unix seconds.
    time: f64,
    events: Vec<Event>,
}

/// What the engine holds of a publisher.
#[derive(Debug)]
pub struct Publisher {
    batches: mpsc::Sender<Batch>,
    life: watch::Sender<u64>,
    sources: EventsConfig,
}

impl Publisher {
    /// Binds the sockets of `config`, which has been checked, and publishes until `shutdown`.
    /// `host` is told for a port that the system chooses.
    pub async fn start(
        config: EventsConfig,
        encoding: Encoding,
        host: &str,
        shutdown: CancellationToken,
    ) -> io::Result<Self> {
        let invalid = |error| io::Error::new(io::ErrorKind::InvalidInput, error);
        let place = config.place().map_err(invalid)?;
        let replay_place = config.replay_place().map_err(invalid)?;
        let mut sources = config.clone();
        let (replays, requests) = mpsc::channel(MAX_REPLAYS);
        let hub = Hub::new(config.hwm, replays, shutdown.clone());
        if config.binds() {
            let listener = TcpListener::bind(place.address()).await?;
            let bound = listener.local_addr()?;
            sources.endpoint = EventsConfig::resolved(&config.endpoint, bound, host);
            tokio::spawn(Arc::clone(&hub).publish_on(listener));
        } else {
            let (host, port) = place.address();
            tokio::spawn(Arc::clone(&hub).publish_to(host.to_owned(), port));
        }
        if let Some((place, endpoint)) = replay_place.zip(config.replay_endpoint.as_deref()) {
            let listener = TcpListener::bind(place.address()).await?;
            let bound = listener.local_addr()?;
            sources.replay_endpoint = Some(EventsConfig::resolved(endpoint, bound, host));
            tokio::spawn(Arc::clone(&hub).replay_on(listener));
        }
        let (batches, queue) = mpsc::channel(config.max_queue_size);
        let (life, lives) = watch::channel(0);
        let stream = Stream {
            topic: config.topic.into_bytes(),
            encoding,
            buffer_steps: config.buffer_steps,
            hub,
            life: 0,
            next: 0,
            buffer: VecDeque::new(),
        };
        tokio::spawn(stream.run(queue, lives, requests, shutdown));
        Ok(Self {
            batches,
            life,
            sources,
        })
    }

    /// Publishes the changes of a step of the engine's life `life`. Waits while the queue is full.
    pub async fn publish(&self, life: u64, events: Vec<Event>) {
        let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        let time = since.unwrap_or_default().as_secs_f64();
        // Fails only after shutdown.
        let _ = self.batches.send(Batch { life, time, events }).await;
    }

    /// The engine begins its life `life`: all connections close, numbers begin at 0 again, and
    /// nothing of earlier lives is sent any more.
    pub fn restart(&self, life: u64) {
        self.life.send_replace(life);
    }

    /// The configuration with the ports that are really used.
    pub fn sources(&self) -> &EventsConfig {
        &self.sources
    }
}

/// The numbered stream of one engine life after the other.
struct Stream {
    topic: Vec<u8>,
    encoding: Encoding,
    buffer_steps: usize,
    hub: Arc<Hub>,
    life: u64,
    /// Sequence number of the next batch.
    next: u64,
    /// Payloads of the newest batches, the last of them with number `next - 1`.
    buffer: VecDeque<Bytes>,
}

impl Stream {
    async fn run(
        mut self,
        mut batches: mpsc::Receiver<Batch>,
        mut lives: watch::Receiver<u64>,
        mut replays: mpsc::Receiver<Replay>,
        shutdown: CancellationToken,
    ) {
        loop {
            tokio::select! {
                () = shutdown.cancelled() => return,
                Ok(()) = lives.changed() => {
                    let life = *lives.borrow_and_update();
                    self.live(life);
                }
                Some(batch) = batches.recv() => self.publish(&batch),
                Some(replay) = replays.recv() => self.replay(&replay).await,
            }
        }
    }

    /// Begins life `life` unless it has begun.
    fn live(&mut self, life: u64) {
        if life > self.life {
            self.life = life;
            self.next = 0;
            self.buffer.clear();
            self.hub.disconnect();
        }
    }

    fn publish(&mut self, batch: &Batch) {
        // Its news may come before that of the restart itself.
        self.live(batch.life);
        if batch.life < self.life {
            return;
        }
        let Encoding { hashes, rank } = self.encoding;
        let payload = Bytes::from(payload(batch.time, &batch.events, rank, hashes));
        let number = self.next.to_be_bytes();
        let message = zmtp::message(&[&self.topic, &number, &payload]);
        self.hub.send(&self.topic, &message);
        self.next += 1;
        self.buffer.push_back(payload);
        if self.buffer.len() > self.buffer_steps {
            self.buffer.pop_front();
        }
    }

    /// Answers with every batch kept from the wanted one on, and the end. What the queue of the peer
    /// cannot take is lost, the end included.
    async fn replay(&self, replay: &Replay) {
        let first = self.next - self.buffer.len() as u64;
        let skip = usize::try_from(replay.start.saturating_sub(first)).unwrap_or(usize::MAX);
        for (index, (number, payload)) in (first..).zip(&self.buffer).skip(skip).enumerate() {
            let answer = zmtp::message(&[b"", &self.topic, &number.to_be_bytes(), payload]);
            let _ = replay.queue.try_send(answer);
            if index % REPLAY_STRETCH == REPLAY_STRETCH - 1 {
                tokio::task::yield_now().await;
            }
        }
        let _ = replay.queue.try_send(zmtp::message(&[b"", b"", &END, b""]));
    }
}
