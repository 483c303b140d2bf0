//! A publisher over real sockets, read byte by byte.

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::publisher::Encoding;
use super::*;

/// Greeting of a ZMTP 3.1 peer and its READY, as the specification spells them.
fn hello(kind: &str) -> Vec<u8> {
    let mut bytes = b"\xFF\0\0\0\0\0\0\0\0\x7F\x03\x01NULL".to_vec();
    bytes.resize(64, 0);
    let length = u8::try_from(kind.len()).unwrap();
    bytes.extend_from_slice(&[4, 6 + 1 + 11 + 4 + length]);
    bytes.extend_from_slice(b"\x05READY\x0BSocket-Type\0\0\0");
    bytes.push(length);
    bytes.extend_from_slice(kind.as_bytes());
    bytes
}

struct Peer(TcpStream);

impl Peer {
    async fn connect(endpoint: &str, kind: &str) -> Self {
        let address = endpoint.strip_prefix("tcp://").unwrap();
        Self::greet(TcpStream::connect(address).await.unwrap(), kind).await
    }

    async fn greet(mut stream: TcpStream, kind: &str) -> Self {
        stream.write_all(&hello(kind)).await.unwrap();
        let mut greeting = [0; 64];
        stream.read_exact(&mut greeting).await.unwrap();
        let mut peer = Self(stream);
        let (flags, ready) = peer.frame().await.unwrap();
        assert_eq!((flags, &ready[..6]), (4, &b"\x05READY"[..]));
        peer
    }

    async fn frame(&mut self) -> Option<(u8, Vec<u8>)> {
        let flags = self.0.read_u8().await.ok()?;
        let length = if flags & 2 == 0 {
            u64::from(self.0.read_u8().await.ok()?)
        } else {
            self.0.read_u64().await.ok()?
        };
        let mut body = vec![0; usize::try_from(length).unwrap()];
        self.0.read_exact(&mut body).await.ok()?;
        Some((flags, body))
    }

    /// The frames of a message; `None` at the end of the connection.
    async fn message(&mut self) -> Option<Vec<Vec<u8>>> {
        let mut parts = Vec::new();
        loop {
            let (flags, body) = self.frame().await?;
            parts.push(body);
            if flags & 1 == 0 {
                return Some(parts);
            }
        }
    }

    async fn send(&mut self, bytes: &[u8]) {
        self.0.write_all(bytes).await.unwrap();
    }

    /// Answers to a ping, so all that was sent before has been read.
    async fn settle(&mut self) {
        self.send(b"\x04\x08\x04PING\0\0x").await;
        assert_eq!(self.frame().await.unwrap(), (4, b"\x04PONGx".to_vec()));
    }

    async fn ask(&mut self, start: u64) {
        self.send(b"\x01\0\0\x08").await;
        self.send(&start.to_be_bytes()).await;
    }
}

struct Running {
    publisher: Publisher,
    _shutdown: DropGuard,
}

async fn start(json: &str) -> Running {
    let config: EventsConfig = serde_json::from_str(json).unwrap();
    let shutdown = CancellationToken::new();
    let encoding = Encoding {
        hashes: HashForm::Integer,
        rank: 3,
    };
    let config = config.of_rank(0).unwrap();
    let publisher = Publisher::start(config, encoding, "127.0.0.1", shutdown.clone()).await;
    Running {
        publisher: publisher.unwrap(),
        _shutdown: shutdown.drop_guard(),
    }
}

const BOTH: &str = r#"{"enable_kv_cache_events":true,"endpoint":"tcp://*:0",
    "replay_endpoint":"tcp://127.0.0.1:0","topic":"kv@a","buffer_steps":2}"#;

impl Running {
    fn endpoint(&self) -> &str {
        &self.publisher.sources().endpoint
    }

    fn replay(&self) -> &str {
        self.publisher.sources().replay_endpoint.as_deref().unwrap()
    }

    async fn publish(&self, life: u64, hash: u64) {
        let events = vec![Event::Removed(hash.into())];
        self.publisher.publish(life, events).await;
    }
}

/// Topic, number and the removed hash of a live message.
fn live(parts: &[Vec<u8>]) -> (&[u8], u64, u8) {
    let [topic, number, payload] = parts else {
        panic!("{} frames", parts.len());
    };
    assert_eq!(payload.last(), Some(&3), "the rank");
    // Array of 3, float64, array of 1, map of 4, "type", "BlockRemoved", "block_hashes", array of 1.
    let hash = payload[1 + 9 + 1 + 1 + 5 + 13 + 13 + 1];
    let number = number.as_slice().try_into().unwrap();
    (topic, u64::from_be_bytes(number), hash)
}

#[tokio::test]
async fn subscribers_get_numbered_batches_of_topics_they_asked_for() {
    let running = start(BOTH).await;
    let mut all = Peer::connect(running.endpoint(), "SUB").await;
    all.send(b"\0\x01\x01").await;
    let mut command = Peer::connect(running.endpoint(), "SUB").await;
    command.send(b"\x04\x0D\x09SUBSCRIBEkv@").await;
    let mut other = Peer::connect(running.endpoint(), "SUB").await;
    other.send(b"\0\x03\x01kx").await;
    for peer in [&mut all, &mut command, &mut other] {
        peer.settle().await;
    }
    running.publish(0, 7).await;
    running.publish(0, 8).await;
    for peer in [&mut all, &mut command] {
        assert_eq!(live(&peer.message().await.unwrap()), (&b"kv@a"[..], 0, 7));
        assert_eq!(live(&peer.message().await.unwrap()), (&b"kv@a"[..], 1, 8));
    }
    // Nothing for the third but the answer to its ping; then it asks, and the second leaves.
    other.settle().await;
    other.send(b"\0\x02\x01k").await;
    command.send(b"\x04\x0A\x06CANCELkv@").await;
    other.settle().await;
    command.settle().await;
    running.publish(0, 9).await;
    assert_eq!(live(&other.message().await.unwrap()).1, 2);
    command.settle().await;
}

#[tokio::test]
async fn replay_gives_what_the_buffer_holds_and_ends() {
    let running = start(BOTH).await;
    let mut live_peer = Peer::connect(running.endpoint(), "SUB").await;
    live_peer.send(b"\0\x01\x01").await;
    live_peer.settle().await;
    for hash in 1..=3 {
        running.publish(0, hash).await;
        live_peer.message().await.unwrap();
    }
    let mut peer = Peer::connect(running.replay(), "DEALER").await;
    // Number 0 fell out of the buffer of two.
    for (start, numbers) in [
        (0, vec![1, 2]),
        (2, vec![2]),
        (3, vec![]),
        (u64::MAX, vec![]),
    ] {
        peer.ask(start).await;
        for number in numbers {
            let parts = peer.message().await.unwrap();
            assert!(parts[0].is_empty());
            assert_eq!(live(&parts[1..]).1, number);
        }
        let end: [&[u8]; 4] = [b"", b"", &[0xFF; 8], b""];
        assert_eq!(peer.message().await.unwrap(), end);
    }
    // What is no request gets no answer: one frame, a short number, three frames.
    peer.send(b"\0\0").await;
    peer.send(b"\x01\0\0\x01\0").await;
    peer.send(b"\x01\0\x01\0\0\x01\0").await;
    peer.settle().await;
}

#[tokio::test]
async fn a_restart_closes_connections_and_numbers_from_zero() {
    let running = start(BOTH).await;
    let mut peer = Peer::connect(running.endpoint(), "SUB").await;
    peer.send(b"\0\x01\x01").await;
    peer.settle().await;
    running.publish(0, 1).await;
    peer.message().await.unwrap();
    running.publisher.restart(1);
    assert!(peer.message().await.is_none(), "closed");
    // A batch of the first life comes too late.
    running.publish(0, 2).await;
    let mut peer = Peer::connect(running.endpoint(), "SUB").await;
    peer.send(b"\0\x01\x01").await;
    peer.settle().await;
    running.publish(1, 3).await;
    let ((), number, hash) = {
        let parts = peer.message().await.unwrap();
        let (_, number, hash) = live(&parts);
        ((), number, hash)
    };
    assert_eq!((number, hash), (0, 3));
    let mut replay = Peer::connect(running.replay(), "DEALER").await;
    replay.ask(0).await;
    assert_eq!(live(&replay.message().await.unwrap()[1..]).2, 3);
}

#[tokio::test]
async fn without_a_wildcard_it_dials_and_dials_again() {
    let listener = tokio::net::TcpListener::bind(("127.0.0.1", 0))
        .await
        .unwrap();
    let address = listener.local_addr().unwrap();
    let config = format!(r#"{{"enable_kv_cache_events":true,"endpoint":"tcp://{address}"}}"#);
    let running = start(&config).await;
    for round in 0..2 {
        let (stream, _) = listener.accept().await.unwrap();
        let mut peer = Peer::greet(stream, "SUB").await;
        peer.send(b"\0\x01\x01").await;
        peer.settle().await;
        running.publish(0, 5).await;
        assert_eq!(live(&peer.message().await.unwrap()), (&b""[..], round, 5));
    }
}

#[tokio::test]
async fn a_subscriber_that_does_not_read_loses_what_is_above_its_mark() {
    let running = start(r#"{"enable_kv_cache_events":true,"endpoint":"tcp://*:0","hwm":1}"#).await;
    let mut peer = Peer::connect(running.endpoint(), "SUB").await;
    peer.send(b"\0\x01\x01").await;
    peer.settle().await;
    // 64 batches of 256 KB are more than the sockets hold.
    for _ in 0..64 {
        let events = (0..4096).map(|_| Event::Removed(1.into())).collect();
        running.publisher.publish(0, events).await;
    }
    running.publish(0, 9).await;
    let mut numbers = Vec::new();
    let quiet = std::time::Duration::from_secs(2);
    while let Ok(Some(parts)) = tokio::time::timeout(quiet, peer.message()).await {
        numbers.push(u64::from_be_bytes(parts[1].as_slice().try_into().unwrap()));
    }
    assert!(!numbers.is_empty() && numbers.len() < 65, "{numbers:?}");
    assert!(numbers.is_sorted(), "lost, never reordered: {numbers:?}");
}

#[tokio::test]
async fn peers_of_other_kinds_are_turned_away() {
    let running = start(BOTH).await;
    for (endpoint, kind) in [(running.endpoint(), "DEALER"), (running.replay(), "SUB")] {
        let address = endpoint.strip_prefix("tcp://").unwrap();
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(&hello(kind)).await.unwrap();
        let mut all = Vec::new();
        // The connection ends, cleanly or not, instead of waiting for more.
        let _ = stream.read_to_end(&mut all).await;
        assert!(all.starts_with(b"\xFF"));
    }
}
