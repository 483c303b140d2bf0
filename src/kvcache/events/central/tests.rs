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
        let (_, publisher) = find(name).unwrap();
        shared.on_batch(connection, 0, &publisher, &payload(0, 0, 1, 0));
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
