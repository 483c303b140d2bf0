//! A scripted publisher over real sockets. It writes ZMTP and msgpack by hand, so that a mistake in
//! our reader is not repeated here.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{broadcast, watch};
use tokio::task::AbortHandle;

use super::{Batch, Event, EventSink, StreamState};

/// What a sink was told, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Told {
    /// The hash of the batch's single event.
    Batch(u64),
    Reset,
}

#[derive(Debug, Default)]
pub(super) struct Log {
    pub(super) told: Vec<Told>,
    pub(super) states: Vec<StreamState>,
}

/// A sink that writes down.
#[derive(Debug, Clone, Default)]
pub(super) struct Recorder(pub(super) Arc<Mutex<Log>>);

impl EventSink for Recorder {
    fn apply(&mut self, batch: &Batch<'_>) {
        for event in batch.events {
            if let Event::Removed(removed) = event {
                self.0.lock().told.push(Told::Batch(removed.hashes[0]));
            }
        }
    }

    fn reset(&mut self) {
        self.0.lock().told.push(Told::Reset);
    }

    fn set_state(&mut self, state: StreamState) {
        self.0.lock().states.push(state);
    }
}

impl Recorder {
    pub(super) fn told(&self) -> Vec<Told> {
        self.0.lock().told.clone()
    }

    /// What is left after the last reset.
    pub(super) fn known(&self) -> Vec<u64> {
        let mut known = Vec::new();
        for told in self.told() {
            match told {
                Told::Batch(hash) => known.push(hash),
                Told::Reset => known.clear(),
            }
        }
        known
    }

    pub(super) fn state(&self) -> Option<StreamState> {
        self.0.lock().states.last().copied()
    }

    pub(super) async fn until_known(&self, expected: &[u64]) {
        until(&format!("known {expected:?}"), || self.known() == expected).await;
    }
}

/// Waits for a condition, or fails after ten seconds with what was waited for.
pub(crate) async fn until(what: &str, condition: impl Fn() -> bool) {
    for _ in 0..2000 {
        if condition() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    panic!("never: {what}");
}

/// `[process + seq, [["BlockRemoved", [hash], nil]], rank]`: the clock tells processes apart, the hash
/// tells batches apart.
pub(super) fn payload(process: u32, seq: u64, hash: u64, rank: u8) -> Vec<u8> {
    let mut bytes = vec![0x93, 0xcb];
    bytes.extend((f64::from(process) * 1e6 + seq as f64).to_be_bytes());
    bytes.extend([0x91, 0x93, 0xac]);
    bytes.extend(b"BlockRemoved");
    bytes.extend([0x91, 0xcf]);
    bytes.extend(hash.to_be_bytes());
    bytes.extend([0xc0, rank]);
    bytes
}

/// A multipart message in short and long frames.
pub(crate) fn message(frames: &[&[u8]]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (i, frame) in frames.iter().enumerate() {
        let more = u8::from(i + 1 < frames.len());
        if let Ok(len) = u8::try_from(frame.len()) {
            bytes.extend([more, len]);
        } else {
            bytes.push(more | 2);
            bytes.extend((frame.len() as u64).to_be_bytes());
        }
        bytes.extend(*frame);
    }
    bytes
}

/// Shakes hands as libzmq does, with greeting 3.1.
pub(crate) async fn shake(stream: &mut TcpStream, socket_type: &[u8]) -> std::io::Result<()> {
    let mut greeting = [0_u8; 64];
    greeting[0] = 0xff;
    greeting[9] = 0x7f;
    greeting[10] = 3;
    greeting[11] = 1;
    greeting[12..16].copy_from_slice(b"NULL");
    stream.write_all(&greeting).await?;
    let mut theirs = [0_u8; 64];
    stream.read_exact(&mut theirs).await?;
    assert_eq!((theirs[0], theirs[9], theirs[10]), (0xff, 0x7f, 3));
    assert_eq!(&theirs[12..17], b"NULL\0");
    let mut body = b"\x05READY\x0bSocket-Type".to_vec();
    body.extend(u32::try_from(socket_type.len()).unwrap().to_be_bytes());
    body.extend(socket_type);
    stream
        .write_all(&[4, u8::try_from(body.len()).unwrap()])
        .await?;
    stream.write_all(&body).await?;
    let (flags, ready) = read_short_frame(stream).await?;
    assert_eq!((flags, &ready[..6]), (4, &b"\x05READY"[..]));
    Ok(())
}

pub(crate) async fn read_short_frame(stream: &mut TcpStream) -> std::io::Result<(u8, Vec<u8>)> {
    let mut head = [0_u8; 2];
    stream.read_exact(&mut head).await?;
    let mut body = vec![0; usize::from(head[1])];
    stream.read_exact(&mut body).await?;
    Ok((head[0], body))
}

#[derive(Debug, Clone)]
enum Live {
    Send(Arc<Vec<u8>>),
    Close,
}

/// What to do with one replay request instead of answering it in full.
#[derive(Debug, Clone, Default)]
pub(super) struct Flaw {
    /// Numbers to leave out, but for the first of the answer, which a publisher never drops: its queue is
    /// empty then.
    pub(super) without: Vec<u64>,
    /// Whether the end marker is lost.
    pub(super) no_end: bool,
    /// Whether to write a frame header beyond the limit.
    pub(super) oversize: bool,
}

#[derive(Debug, Default)]
struct State {
    process: u32,
    /// What can be replayed: number and hash.
    kept: Vec<(u64, u64)>,
    requests: Vec<u64>,
    flaws: VecDeque<Flaw>,
    replays_held: bool,
}

/// The scripted publisher.
#[derive(Debug)]
pub(super) struct Engine {
    pub(super) live: SocketAddr,
    pub(super) replay: SocketAddr,
    state: Arc<Mutex<State>>,
    to: broadcast::Sender<Live>,
    subscriptions: watch::Receiver<usize>,
    replay_task: AbortHandle,
    live_task: AbortHandle,
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.replay_task.abort();
        self.live_task.abort();
    }
}

impl Engine {
    pub(super) async fn start() -> Self {
        let live = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let replay = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (live_address, replay_address) =
            (live.local_addr().unwrap(), replay.local_addr().unwrap());
        let state = Arc::new(Mutex::new(State::default()));
        let (to, _) = broadcast::channel(1 << 16);
        let (subscribed, subscriptions) = watch::channel(0);
        let subscribed = Arc::new(subscribed);
        let live_task = tokio::spawn(accept_live(live, to.clone(), subscribed)).abort_handle();
        let replay_task = tokio::spawn(accept_replays(replay, Arc::clone(&state))).abort_handle();
        Self {
            live: live_address,
            replay: replay_address,
            state,
            to,
            subscriptions,
            replay_task,
            live_task,
        }
    }

    /// Waits for the `n`th subscription since the start.
    pub(super) async fn subscribed(&mut self, n: usize) {
        let wait = self.subscriptions.wait_for(|seen| *seen >= n);
        tokio::time::timeout(Duration::from_secs(10), wait)
            .await
            .expect("a subscription")
            .unwrap();
    }

    /// Keeps and sends a batch.
    pub(super) fn publish(&self, seq: u64, hash: u64) {
        self.keep(seq, hash);
        self.send(seq, hash);
    }

    /// Keeps a batch that the live socket loses.
    pub(super) fn keep(&self, seq: u64, hash: u64) {
        self.state.lock().kept.push((seq, hash));
    }

    /// Sends a batch that is not kept (or was before).
    pub(super) fn send(&self, seq: u64, hash: u64) {
        let bytes = payload(self.state.lock().process, seq, hash, 0);
        self.send_raw(message(&[
            b"kv@10.0.0.1:8000@m",
            &seq.to_be_bytes(),
            &bytes,
        ]));
    }

    pub(super) fn send_raw(&self, bytes: Vec<u8>) {
        let _ = self.to.send(Live::Send(Arc::new(bytes)));
    }

    /// Forgets kept batches below `seq`.
    pub(super) fn forget_below(&self, seq: u64) {
        self.state.lock().kept.retain(|(s, _)| *s >= seq);
    }

    /// Closes the live connections.
    pub(super) fn close(&self) {
        let _ = self.to.send(Live::Close);
    }

    /// Another process: nothing kept, another clock.
    pub(super) fn restart(&self) {
        let mut state = self.state.lock();
        state.process += 1;
        state.kept.clear();
    }

    pub(super) fn flaw(&self, flaw: Flaw) {
        self.state.lock().flaws.push_back(flaw);
    }

    pub(super) fn hold_replays(&self, held: bool) {
        self.state.lock().replays_held = held;
    }

    pub(super) fn requests(&self) -> Vec<u64> {
        self.state.lock().requests.clone()
    }
}

async fn accept_live(
    listener: TcpListener,
    to: broadcast::Sender<Live>,
    subscribed: Arc<watch::Sender<usize>>,
) {
    loop {
        let (stream, _) = listener.accept().await.unwrap();
        // Messages sent from here on are this connection's.
        let from = to.subscribe();
        let subscribed = Arc::clone(&subscribed);
        tokio::spawn(async move {
            let _ = publish_to(stream, from, &subscribed).await;
        });
    }
}

async fn publish_to(
    mut stream: TcpStream,
    mut from: broadcast::Receiver<Live>,
    subscribed: &watch::Sender<usize>,
) -> std::io::Result<()> {
    shake(&mut stream, b"PUB").await?;
    assert_eq!(read_short_frame(&mut stream).await?, (0, vec![1]));
    subscribed.send_modify(|n| *n += 1);
    while let Ok(live) = from.recv().await {
        match live {
            Live::Send(bytes) => stream.write_all(&bytes).await?,
            Live::Close => break,
        }
    }
    Ok(())
}

async fn accept_replays(listener: TcpListener, state: Arc<Mutex<State>>) {
    loop {
        let (stream, _) = listener.accept().await.unwrap();
        let state = Arc::clone(&state);
        tokio::spawn(async move {
            let _ = answer(stream, &state).await;
        });
    }
}

async fn answer(mut stream: TcpStream, state: &Mutex<State>) -> std::io::Result<()> {
    shake(&mut stream, b"ROUTER").await?;
    loop {
        assert_eq!(read_short_frame(&mut stream).await?, (1, vec![]));
        let (_, start) = read_short_frame(&mut stream).await?;
        let start = u64::from_be_bytes(start.try_into().unwrap());
        state.lock().requests.push(start);
        while state.lock().replays_held {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        let (process, kept, flaw) = {
            let mut state = state.lock();
            let flaw = state.flaws.pop_front().unwrap_or_default();
            (state.process, state.kept.clone(), flaw)
        };
        if flaw.oversize {
            stream.write_all(&[2]).await?;
            stream.write_all(&u64::MAX.to_be_bytes()).await?;
        }
        let mut first = true;
        for (seq, hash) in kept {
            if seq >= start && (std::mem::take(&mut first) || !flaw.without.contains(&seq)) {
                let bytes = payload(process, seq, hash, 0);
                let frames = message(&[b"", b"topic", &seq.to_be_bytes(), &bytes]);
                stream.write_all(&frames).await?;
            }
        }
        if !flaw.no_end {
            let end = message(&[b"", b"", &[0xff; 8], b""]);
            stream.write_all(&end).await?;
        }
    }
}
