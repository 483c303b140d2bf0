//! The two sockets of a publisher: PUB, which sends to whoever subscribed, and ROUTER, which takes
//! requests for replay.
//!
//! Each connection has a bounded queue of messages to write; what does not fit is dropped silently,
//! as ZeroMQ does. A restart of the engine closes them all.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::io::AsyncWriteExt;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc};
use tokio_util::sync::CancellationToken;

use super::zmtp::{Frame, handshake, pong, read_frame};

/// Peers of a socket at a time; one more is closed at once.
pub(super) const MAX_PEERS: usize = 256;
/// Subscriptions of a peer; it is closed when it wants more.
pub(super) const MAX_SUBSCRIPTIONS: usize = 1024;
/// Messages queued for a peer that replays: ZeroMQ's default, which vLLM leaves as it is.
pub(super) const REPLAY_HWM: usize = 1000;
/// Time between attempts to connect: ZeroMQ's default.
const RECONNECT_INTERVAL: Duration = Duration::from_millis(100);

type Topics = Arc<Mutex<Vec<Vec<u8>>>>;

/// A connected subscriber.
#[derive(Debug)]
struct Subscriber {
    topics: Topics,
    queue: mpsc::Sender<Bytes>,
}

/// A request to replay.
#[derive(Debug)]
pub(super) struct Replay {
    /// First sequence number wanted.
    pub(super) start: u64,
    /// Takes the answers.
    pub(super) queue: mpsc::Sender<Bytes>,
}

/// What the connections of a publisher share.
#[derive(Debug)]
pub(super) struct Hub {
    hwm: usize,
    subscribers: Mutex<Vec<Subscriber>>,
    replays: mpsc::Sender<Replay>,
    /// Cancelled by a restart, and then another one.
    life: Mutex<CancellationToken>,
    shutdown: CancellationToken,
}

impl Hub {
    pub(super) fn new(
        hwm: usize,
        replays: mpsc::Sender<Replay>,
        shutdown: CancellationToken,
    ) -> Arc<Self> {
        Arc::new(Self {
            hwm,
            subscribers: Mutex::new(Vec::new()),
            replays,
            life: Mutex::new(shutdown.child_token()),
            shutdown,
        })
    }

    fn add(&self, subscriber: Subscriber) {
        let mut subscribers = self.subscribers.lock();
        subscribers.retain(|known| !known.queue.is_closed());
        subscribers.push(subscriber);
    }

    /// Queues a message for everyone who subscribed to its topic.
    pub(super) fn send(&self, topic: &[u8], message: &Bytes) {
        self.subscribers.lock().retain(|subscriber| {
            let wants = subscriber
                .topics
                .lock()
                .iter()
                .any(|prefix| topic.starts_with(prefix));
            if wants {
                // A full queue loses the message, and only the sequence number will tell.
                let _ = subscriber.queue.try_send(message.clone());
            }
            !subscriber.queue.is_closed()
        });
    }

    /// Closes every connection, as the end of a process does.
    pub(super) fn disconnect(&self) {
        let next = self.shutdown.child_token();
        std::mem::replace(&mut *self.life.lock(), next).cancel();
        self.subscribers.lock().clear();
    }

    /// Accepts subscribers until shutdown.
    pub(super) async fn publish_on(self: Arc<Self>, listener: TcpListener) {
        let hub = Arc::clone(&self);
        self.accept(listener, move |stream| subscriber(stream, Arc::clone(&hub)))
            .await;
    }

    /// Connects to a subscriber that listens, again and again, until shutdown.
    pub(super) async fn publish_to(self: Arc<Self>, host: String, port: u16) {
        while !self.shutdown.is_cancelled() {
            let life = self.life.lock().clone();
            let hub = Arc::clone(&self);
            let connection = async {
                let stream = TcpStream::connect((host.as_str(), port)).await?;
                subscriber(stream, hub).await
            };
            tokio::select! {
                () = life.cancelled() => {}
                // A peer that is not there yet, or left.
                _ = connection => tokio::time::sleep(RECONNECT_INTERVAL).await,
            }
        }
    }

    /// Accepts peers that ask for replay until shutdown.
    pub(super) async fn replay_on(self: Arc<Self>, listener: TcpListener) {
        let hub = Arc::clone(&self);
        self.accept(listener, move |stream| replayer(stream, Arc::clone(&hub)))
            .await;
    }

    async fn accept<F>(&self, listener: TcpListener, serve: impl Fn(TcpStream) -> F)
    where
        F: Future<Output = io::Result<()>> + Send + 'static,
    {
        let peers = Arc::new(Semaphore::new(MAX_PEERS));
        loop {
            let accepted = tokio::select! {
                () = self.shutdown.cancelled() => return,
                accepted = listener.accept() => accepted,
            };
            let Ok((stream, _)) = accepted else {
                tokio::time::sleep(RECONNECT_INTERVAL).await;
                continue;
            };
            let Ok(place) = Arc::clone(&peers).try_acquire_owned() else {
                continue;
            };
            let life = self.life.lock().clone();
            let connection = serve(stream);
            tokio::spawn(async move {
                tokio::select! {
                    () = life.cancelled() => {}
                    // Its end, whatever the reason, is what the peer wanted.
                    _ = connection => {}
                }
                drop(place);
            });
        }
    }
}

async fn subscriber(mut stream: TcpStream, hub: Arc<Hub>) -> io::Result<()> {
    let _ = stream.set_nodelay(true);
    handshake(&mut stream, "PUB", &["SUB", "XSUB"]).await?;
    let (reader, writer) = stream.into_split();
    let (queue, messages) = mpsc::channel(hub.hwm);
    let topics = Topics::default();
    hub.add(Subscriber {
        topics: Arc::clone(&topics),
        queue: queue.clone(),
    });
    tokio::select! {
        result = read_subscriptions(reader, &topics, &queue) => result,
        result = write(writer, messages) => result,
    }
}

async fn replayer(mut stream: TcpStream, hub: Arc<Hub>) -> io::Result<()> {
    let _ = stream.set_nodelay(true);
    handshake(&mut stream, "ROUTER", &["DEALER", "REQ", "ROUTER"]).await?;
    let (reader, writer) = stream.into_split();
    let (queue, messages) = mpsc::channel(REPLAY_HWM);
    tokio::select! {
        result = read_requests(reader, &queue, &hub.replays) => result,
        result = write(writer, messages) => result,
    }
}

async fn write(mut writer: OwnedWriteHalf, mut messages: mpsc::Receiver<Bytes>) -> io::Result<()> {
    while let Some(message) = messages.recv().await {
        writer.write_all(&message).await?;
    }
    Ok(())
}

/// Follows subscriptions, which come as messages or, from ZMTP 3.1 on, as commands.
async fn read_subscriptions(
    mut reader: OwnedReadHalf,
    topics: &Topics,
    queue: &mpsc::Sender<Bytes>,
) -> io::Result<()> {
    loop {
        let (subscribe, topic) = match read_frame(&mut reader).await? {
            Frame::Part(body, _) => match body.split_first() {
                Some((1, topic)) => (true, topic.to_vec()),
                Some((0, topic)) => (false, topic.to_vec()),
                _ => continue,
            },
            Frame::Command(name, topic) => match name.as_slice() {
                b"SUBSCRIBE" => (true, topic),
                b"CANCEL" => (false, topic),
                b"PING" => {
                    answer_ping(&topic, queue);
                    continue;
                }
                _ => continue,
            },
        };
        let mut topics = topics.lock();
        if subscribe {
            if topics.len() >= MAX_SUBSCRIPTIONS {
                return Err(io::ErrorKind::QuotaExceeded.into());
            }
            topics.push(topic);
        } else if let Some(index) = topics.iter().position(|known| *known == topic) {
            topics.swap_remove(index);
        }
    }
}

/// Passes on requests: an empty part and the first sequence number. Anything else is ignored.
async fn read_requests(
    mut reader: OwnedReadHalf,
    queue: &mpsc::Sender<Bytes>,
    replays: &mpsc::Sender<Replay>,
) -> io::Result<()> {
    /// Parts that are looked at.
    const KEPT: usize = 3;
    let mut parts: Vec<Vec<u8>> = Vec::new();
    loop {
        match read_frame(&mut reader).await? {
            Frame::Part(part, more) => {
                if parts.len() < KEPT {
                    parts.push(part);
                }
                if more {
                    continue;
                }
            }
            Frame::Command(name, rest) => {
                if name == b"PING" {
                    answer_ping(&rest, queue);
                }
                continue;
            }
        }
        if let [empty, start] = parts.as_slice()
            && empty.is_empty()
            && let Ok(start) = <[u8; 8]>::try_from(start.as_slice())
        {
            let replay = Replay {
                start: u64::from_be_bytes(start),
                queue: queue.clone(),
            };
            if replays.send(replay).await.is_err() {
                return Ok(());
            }
        }
        parts.clear();
    }
}

fn answer_ping(ping: &[u8], queue: &mpsc::Sender<Bytes>) {
    // Two bytes say how long the peer will wait.
    let context = ping.get(2..).unwrap_or_default();
    let _ = queue.try_send(pong(context));
}
