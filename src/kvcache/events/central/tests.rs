use std::net::SocketAddr;

use tokio::io::AsyncWriteExt;

use super::super::testing::{Recorder, Told, message, payload, read_short_frame, shake, until};
use super::*;

/// An engine that dials in.
struct Dialled(TcpStream);

impl Dialled {
    async fn new(address: SocketAddr) -> Self {
        let mut stream = TcpStream::connect(address).await.unwrap();
        shake(&mut stream, b"PUB").await.unwrap();
        let subscription = read_short_frame(&mut stream).await.unwrap();
        assert_eq!(subscription, (0, vec![1]));
        Self(stream)
    }

    async fn send(&mut self, topic: &[u8], process: u32, seq: u64, hash: u64, rank: u8) {
        let bytes = payload(process, seq, hash, rank);
        let frames = message(&[topic, &seq.to_be_bytes(), &bytes]);
        self.0.write_all(&frames).await.unwrap();
    }
}

struct Fixture {
    address: SocketAddr,
    /// Sinks of ranks 0 and 1 of the only known endpoint.
    sinks: [Recorder; 2],
    listener: Arc<SubscriberStats>,
    publisher: [Arc<SubscriberStats>; 2],
    stop: CancellationToken,
    task: tokio::task::JoinHandle<()>,
}

const TOPIC: &[u8] = b"kv@10.0.0.1:8000@model";

async fn start() -> Fixture {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let sinks: [Recorder; 2] = <[Recorder; 2]>::default();
    let publisher: [Arc<SubscriberStats>; 2] = <[Arc<SubscriberStats>; 2]>::default();
    let resolver = {
        let (sinks, publisher) = (sinks.clone(), publisher.clone());
        move |topic: Topic<'_>, rank: Option<u32>| {
            let rank = rank? as usize;
            (topic.publisher == "10.0.0.1:8000").then_some(())?;
            Some(Attributed {
                sink: Box::new(sinks.get(rank)?.clone()),
                stats: Arc::clone(&publisher[rank]),
            })
        }
    };
    let stats = Arc::new(SubscriberStats::default());
    let stop = CancellationToken::new();
    let task = tokio::spawn(serve(
        listener,
        Box::new(resolver),
        SubscriberOptions::default(),
        Arc::clone(&stats),
        stop.clone(),
    ));
    Fixture {
        address,
        sinks,
        listener: stats,
        publisher,
        stop,
        task,
    }
}

#[tokio::test]
async fn topics_and_ranks_find_their_sinks() {
    let f = start().await;
    let (mut zero, mut one) = (Dialled::new(f.address).await, Dialled::new(f.address).await);
    zero.send(TOPIC, 0, 0, 10, 0).await;
    one.send(TOPIC, 0, 0, 20, 1).await;
    zero.send(b"kv@10.9.9.9:1@model", 0, 0, 30, 0).await;
    zero.send(b"", 0, 0, 31, 0).await;
    zero.send(TOPIC, 0, 1, 11, 0).await;
    f.sinks[0].until_known(&[10, 11]).await;
    f.sinks[1].until_known(&[20]).await;
    assert_eq!(f.listener.snapshot().unattributed, 2);
    assert_eq!(f.publisher[0].snapshot().last_seq, Some(1));
    f.stop.cancel();
    f.task.await.unwrap();
    assert_eq!(f.sinks[0].known(), [] as [u64; 0]);
}

#[tokio::test]
async fn a_new_connection_with_lower_numbers_is_a_restart() {
    let f = start().await;
    let mut engine = Dialled::new(f.address).await;
    engine.send(TOPIC, 0, 4, 10, 0).await;
    f.sinks[0].until_known(&[10]).await;
    drop(engine);
    until("down", || f.sinks[0].state() == Some(StreamState::Down)).await;
    let mut engine = Dialled::new(f.address).await;
    engine.send(TOPIC, 1, 0, 20, 0).await;
    f.sinks[0].until_known(&[20]).await;
    assert_eq!(f.sinks[0].state(), Some(StreamState::Live));
    assert_eq!(f.publisher[0].snapshot().restarts, 1);
}

#[tokio::test]
async fn the_same_process_goes_on_after_a_reconnect() {
    let f = start().await;
    let mut engine = Dialled::new(f.address).await;
    engine.send(TOPIC, 0, 4, 10, 0).await;
    f.sinks[0].until_known(&[10]).await;
    drop(engine);
    let mut engine = Dialled::new(f.address).await;
    engine.send(TOPIC, 0, 4, 10, 0).await;
    engine.send(TOPIC, 0, 5, 11, 0).await;
    f.sinks[0].until_known(&[10, 11]).await;
    assert_eq!(f.publisher[0].snapshot().duplicates, 1);
}

#[tokio::test]
async fn a_gap_forgets_the_publisher() {
    let f = start().await;
    let mut engine = Dialled::new(f.address).await;
    engine.send(TOPIC, 0, 0, 10, 0).await;
    engine.send(TOPIC, 0, 2, 12, 0).await;
    f.sinks[0].until_known(&[12]).await;
    assert!(f.sinks[0].told().contains(&Told::Reset));
    assert_eq!(f.publisher[0].snapshot().losses, 1);
}

#[tokio::test]
async fn what_was_missed_between_connections_is_lost() {
    let f = start().await;
    let mut engine = Dialled::new(f.address).await;
    engine.send(TOPIC, 0, 4, 10, 0).await;
    f.sinks[0].until_known(&[10]).await;
    drop(engine);
    until("down", || f.sinks[0].state() == Some(StreamState::Down)).await;
    // Numbers 5 and 6 were sent to nobody.
    let mut engine = Dialled::new(f.address).await;
    engine.send(TOPIC, 0, 7, 13, 0).await;
    f.sinks[0].until_known(&[13]).await;
    let stats = f.publisher[0].snapshot();
    assert_eq!((stats.gaps, stats.losses, stats.restarts), (1, 1, 0));
    assert_eq!(f.sinks[0].state(), Some(StreamState::Live));
}

#[tokio::test]
async fn a_new_process_is_known_by_its_first_numbers_even_if_they_follow() {
    let f = start().await;
    let mut engine = Dialled::new(f.address).await;
    engine.send(TOPIC, 0, 0, 10, 0).await;
    f.sinks[0].until_known(&[10]).await;
    drop(engine);
    until("down", || f.sinks[0].state() == Some(StreamState::Down)).await;
    // Its batch 0 went before it had connected.
    let mut engine = Dialled::new(f.address).await;
    engine.send(TOPIC, 1, 1, 21, 0).await;
    f.sinks[0].until_known(&[21]).await;
    assert_eq!(f.publisher[0].snapshot().restarts, 1);
}

/// The host went without a word: its connection stays open here.
#[tokio::test]
async fn a_process_that_took_over_is_not_disturbed_by_the_old_connection() {
    let f = start().await;
    let mut old = Dialled::new(f.address).await;
    old.send(TOPIC, 0, 4, 10, 0).await;
    f.sinks[0].until_known(&[10]).await;
    let mut new = Dialled::new(f.address).await;
    new.send(TOPIC, 1, 0, 20, 0).await;
    f.sinks[0].until_known(&[20]).await;
    drop(old);
    until("closed", || f.listener.snapshot().receive_errors == 1).await;
    new.send(TOPIC, 1, 1, 21, 0).await;
    f.sinks[0].until_known(&[20, 21]).await;
    let states = f.sinks[0].0.lock().states.clone();
    assert_eq!(states, [StreamState::Live]);
}

#[tokio::test]
async fn of_two_engines_under_one_name_the_later_counts_until_it_leaves() {
    let f = start().await;
    let mut first = Dialled::new(f.address).await;
    first.send(TOPIC, 0, 4, 10, 0).await;
    f.sinks[0].until_known(&[10]).await;
    let mut second = Dialled::new(f.address).await;
    second.send(TOPIC, 1, 0, 20, 0).await;
    f.sinks[0].until_known(&[20]).await;
    // What follows the newest number, and what does not.
    first.send(TOPIC, 0, 1, 11, 0).await;
    first.send(TOPIC, 0, 5, 15, 0).await;
    until("refused", || f.listener.snapshot().unattributed == 2).await;
    second.send(TOPIC, 1, 1, 21, 0).await;
    f.sinks[0].until_known(&[20, 21]).await;
    drop(second);
    until("down", || f.sinks[0].state() == Some(StreamState::Down)).await;
    first.send(TOPIC, 0, 6, 16, 0).await;
    f.sinks[0].until_known(&[16]).await;
    assert_eq!(f.publisher[0].snapshot().restarts, 1);
}

#[tokio::test]
async fn a_forwarder_brings_several_ranks_and_topics_on_one_connection() {
    let f = start().await;
    let mut forwarder = Dialled::new(f.address).await;
    for (seq, rank) in [(0, 0), (0, 1), (1, 1), (1, 0), (2, 0), (2, 1)] {
        let hash = 10 * (u64::from(rank) + 1) + seq;
        forwarder.send(TOPIC, 0, seq, hash, rank).await;
        forwarder
            .send(b"kv@10.9.9.9:1@model", 0, seq, 99, rank)
            .await;
    }
    f.sinks[0].until_known(&[10, 11, 12]).await;
    f.sinks[1].until_known(&[20, 21, 22]).await;
    for publisher in &f.publisher {
        let stats = publisher.snapshot();
        assert_eq!((stats.duplicates, stats.gaps, stats.restarts), (0, 0, 0));
    }
    assert_eq!(f.listener.snapshot().unattributed, 6);
}

#[tokio::test]
async fn a_payload_that_does_not_decode_is_its_publishers() {
    let f = start().await;
    let mut engine = Dialled::new(f.address).await;
    engine.send(TOPIC, 0, 0, 10, 0).await;
    let cut = &payload(0, 1, 11, 0)[..20];
    let frames = message(&[TOPIC, &1_u64.to_be_bytes(), cut]);
    engine.0.write_all(&frames).await.unwrap();
    engine.send(TOPIC, 0, 2, 12, 0).await;
    f.sinks[0].until_known(&[10, 12]).await;
    assert_eq!(f.publisher[0].snapshot().bad_payloads, 1);
    until("a gap", || f.sinks[0].state() == Some(StreamState::Gap)).await;
    assert_eq!(f.listener.snapshot().unattributed, 0);
}

/// What is no batch, no message, no peer: counted, and nobody else is disturbed.
#[tokio::test]
async fn nonsense_costs_at_most_its_own_connection() {
    let f = start().await;
    let mut good = Dialled::new(f.address).await;
    good.send(TOPIC, 0, 0, 10, 0).await;
    f.sinks[0].until_known(&[10]).await;
    let mut bad = Dialled::new(f.address).await;
    let seq = 0_u64.to_be_bytes();
    for frames in [
        message(&[TOPIC]),
        message(&[TOPIC, b"short", b"x"]),
        message(&[TOPIC, &seq, b"", b"", b""]),
    ] {
        bad.0.write_all(&frames).await.unwrap();
    }
    until("bad frames", || f.listener.snapshot().bad_frames == 3).await;
    // A payload whose header claims 4 billion events, of another rank.
    let claims = [
        0x93, 0xcb, 0, 0, 0, 0, 0, 0, 0, 0, 0xdd, 0xff, 0xff, 0xff, 0xff,
    ];
    let frames = message(&[TOPIC, &seq, &claims]);
    bad.0.write_all(&frames).await.unwrap();
    until("no rank in it", || f.listener.snapshot().unattributed == 1).await;
    bad.0
        .write_all(&[2, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff])
        .await
        .unwrap();
    until("oversize", || f.listener.snapshot().oversize == 1).await;
    let mut other = TcpStream::connect(f.address).await.unwrap();
    other.write_all(&[0; 64]).await.unwrap();
    until("no peer", || f.listener.snapshot().receive_errors == 2).await;
    good.send(TOPIC, 0, 1, 11, 0).await;
    f.sinks[0].until_known(&[10, 11]).await;
}

#[test]
fn publishers_are_bounded_and_those_without_a_connection_make_room() {
    let sink = Recorder::default();
    let resolver = {
        let sink = sink.clone();
        move |_: Topic<'_>, _: Option<u32>| {
            Some(Attributed {
                sink: Box::new(sink.clone()),
                stats: Arc::default(),
            })
        }
    };
    let shared = Shared {
        resolver: Box::new(resolver),
        options: SubscriberOptions::default(),
        stats: Arc::default(),
        max_publishers: 2,
        publishers: parking_lot::Mutex::default(),
    };
    let find =
        |name: &'static [u8]| shared.publisher(&Bytes::from_static(name), &payload(0, 0, 1, 0));
    for (connection, name) in [(1, b"kv@a@m"), (2, b"kv@b@m")] {
        let from = find(name).unwrap();
        shared.on_batch(connection, 0, &from, &payload(0, 0, 1, 0));
    }
    assert!(find(b"kv@c@m").is_none(), "two are connected");
    shared.left(1);
    assert!(find(b"kv@c@m").is_some());
    assert_eq!(shared.publishers.lock().len(), 2);
    assert!(sink.told().contains(&Told::Reset));
}

#[test]
fn topics_are_read_in_all_published_forms() {
    let full = Topic::parse(b"kv@10.0.0.1:8000@org/model@v2").unwrap();
    assert_eq!(
        (full.publisher, full.model),
        ("10.0.0.1:8000", Some("org/model@v2"))
    );
    assert_eq!(Topic::parse(b"kv@pod-1@m").unwrap().publisher, "pod-1");
    assert_eq!(Topic::parse(b"kv@pod-1").unwrap().model, None);
    assert_eq!(Topic::parse(b""), None);
    assert_eq!(Topic::parse(b"kv@"), None);
    assert_eq!(Topic::parse(b"\xff@x"), None);
}
