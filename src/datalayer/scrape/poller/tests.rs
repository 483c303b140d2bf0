use std::net::SocketAddr;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};

use super::*;
use crate::datalayer::extractors::test_support::{build, endpoint};
use crate::datalayer::extractors::{CoreMetricsExtractor, Extraction};
use crate::datalayer::sources::{DataSource, MetricsDataSource};
use crate::datalayer::{EndpointSpec, EndpointStore};
use crate::plugin::{DataKeys, Plugin};

const PATIENCE: Duration = Duration::from_secs(20);

/// Waits until `done`.
async fn until(done: impl Fn() -> bool) {
    let wait = async {
        while !done() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(PATIENCE, wait).await.unwrap();
}

fn spec(name: &str, address: SocketAddr) -> EndpointSpec {
    let mut spec = endpoint(name, &[]).spec;
    spec.address = address;
    spec
}

fn named(type_name: &'static str) -> TypedName {
    TypedName {
        type_name,
        name: type_name.to_owned(),
    }
}

fn subscribe(store: &EndpointStore, extractors: Vec<Arc<dyn Extractor>>) {
    let source: MetricsDataSource = build(&mut DataKeys::default(), "source", "{}").unwrap();
    let poll = Poll {
        name: named(MetricsDataSource::TYPE),
        http: source.http().unwrap().clone(),
        payload: source.payload(),
        extractors: extractors
            .into_iter()
            .map(|e| (named("extractor"), e))
            .collect(),
    };
    let scraper = Scraper::new(poll, MIN_INTERVAL, Handle::current()).unwrap();
    store.subscribe(Arc::new(scraper));
}

fn core() -> Arc<dyn Extractor> {
    let extractor: CoreMetricsExtractor = build(&mut DataKeys::default(), "core", "{}").unwrap();
    Arc::new(extractor)
}

fn waiting(requests: u32) -> Vec<u8> {
    let body = format!("vllm:num_requests_waiting {requests}\n");
    format!(
        "HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )
    .into_bytes()
}

/// An engine whose queue grows by one with each answer.
struct Engine {
    address: SocketAddr,
    connections: Arc<AtomicUsize>,
    requests: Arc<AtomicU32>,
}

impl Engine {
    async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let engine = Self {
            address: listener.local_addr().unwrap(),
            connections: Arc::default(),
            requests: Arc::default(),
        };
        let (connections, requests) = (
            Arc::clone(&engine.connections),
            Arc::clone(&engine.requests),
        );
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                connections.fetch_add(1, Ordering::SeqCst);
                let requests = Arc::clone(&requests);
                tokio::spawn(async move {
                    let mut buffer = [0; 2048];
                    while let Ok(1..) = stream.read(&mut buffer).await {
                        let number = requests.fetch_add(1, Ordering::SeqCst) + 1;
                        stream.write_all(&waiting(number)).await.unwrap();
                    }
                });
            }
        });
        engine
    }
}

/// A server whose connections, each after its first request, are handed to the test.
async fn held() -> (SocketAddr, mpsc::Receiver<TcpStream>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (send, receive) = mpsc::channel(8);
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let send = send.clone();
            tokio::spawn(async move {
                let mut buffer = [0; 2048];
                if let Ok(1..) = stream.read(&mut buffer).await {
                    let _ = send.send(stream).await;
                }
            });
        }
    });
    (address, receive)
}

async fn next(held: &mut mpsc::Receiver<TcpStream>) -> TcpStream {
    let next = tokio::time::timeout(PATIENCE, held.recv()).await;
    next.unwrap().unwrap()
}

/// Waits until the peer of `stream` hangs up.
async fn hung_up(stream: &mut TcpStream) {
    let end = async {
        let mut buffer = [0; 2048];
        while let Ok(1..) = stream.read(&mut buffer).await {}
    };
    tokio::time::timeout(PATIENCE, end).await.unwrap();
}

#[test]
fn intervals_are_multiples_of_the_tick() {
    let ms = Duration::from_millis;
    assert_eq!(interval(None, ms(10)), ms(50));
    assert_eq!(interval(Some(ms(120)), ms(50)), ms(100));
    assert_eq!(interval(Some(ms(1)), ms(50)), ms(50));
    assert_eq!(backoff(ms(50), 1), ms(100));
    assert_eq!(backoff(ms(50), 60), MAX_BACKOFF);
    assert_eq!(backoff(ms(5000), 3), ms(5000));
    assert_eq!(
        base_tick(ms(1000), [None, Some(ms(200)), Some(ms(300))]),
        ms(200)
    );
    assert_eq!(base_tick(ms(100), [Some(ms(10))]), ms(50));
    assert_eq!(base_tick(ms(100), [None, Some(ms(500))]), ms(100));
}

#[tokio::test]
async fn live_endpoints_are_read_beside_dead_and_silent_ones() {
    let engine = Engine::start().await;
    let (silent, _held) = held().await;
    let dead = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let gone = dead.local_addr().unwrap();
    drop(dead);
    let store = EndpointStore::default();
    subscribe(&store, vec![core()]);
    store.replace(vec![
        spec("live", engine.address),
        spec("silent", silent),
        spec("dead", gone),
    ]);
    let pool = store.snapshot();
    until(|| pool[0].metrics().waiting_requests >= 5).await;
    assert!(pool[1].metrics().updated_at.is_none() && pool[2].metrics().updated_at.is_none());
    assert_eq!(engine.connections.load(Ordering::SeqCst), 1, "kept");
}

#[tokio::test]
async fn an_endpoint_removed_while_it_answers_is_let_go() {
    let (address, mut connections) = held().await;
    let store = EndpointStore::default();
    subscribe(&store, vec![core()]);
    store.replace(vec![spec("a", address)]);
    let old = store.snapshot();
    let mut stream = next(&mut connections).await;
    let answer = waiting(7);
    stream.write_all(&answer[..answer.len() - 2]).await.unwrap();
    store.replace(Vec::new());
    hung_up(&mut stream).await;
    assert!(old[0].metrics().updated_at.is_none());
    assert!(connections.try_recv().is_err(), "nobody comes again");
}

#[tokio::test]
async fn a_late_answer_is_not_taken_for_the_successors() {
    let (first, mut first_connections) = held().await;
    let (second, mut second_connections) = held().await;
    let store = EndpointStore::default();
    subscribe(&store, vec![core()]);
    store.replace(vec![spec("a", first)]);
    let mut late = next(&mut first_connections).await;
    // Same name, other address: another endpoint, in the same place of the pool.
    store.replace(vec![spec("a", second)]);
    let pool = store.snapshot();
    let _ = late.write_all(&waiting(99)).await;
    let mut own = next(&mut second_connections).await;
    assert!(pool[0].metrics().updated_at.is_none());
    own.write_all(&waiting(3)).await.unwrap();
    until(|| pool[0].metrics().updated_at.is_some()).await;
    assert_eq!(pool[0].metrics().waiting_requests, 3);
}

#[tokio::test]
async fn a_dripping_answer_is_given_up_and_the_last_one_stays() {
    let (address, mut connections) = held().await;
    let store = EndpointStore::default();
    subscribe(&store, vec![core()]);
    store.replace(vec![spec("a", address)]);
    let pool = store.snapshot();
    let mut stream = next(&mut connections).await;
    stream.write_all(&waiting(4)).await.unwrap();
    until(|| pool[0].metrics().waiting_requests == 4).await;
    let before = pool[0].metrics().updated_at;
    // The next answer on the same connection comes a byte at a time and never ends.
    let drip = async {
        let mut head = b"HTTP/1.1 200 OK\r\n\r\n".to_vec();
        head.extend([b'x'; 64]);
        for byte in head.iter().cycle() {
            if stream.write_all(&[*byte]).await.is_err() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(PATIENCE, drip).await.unwrap();
    // Another connection is tried after that.
    next(&mut connections).await;
    assert_eq!(pool[0].metrics().updated_at, before);
}

#[tokio::test]
async fn an_endless_answer_is_cut_off() {
    let (address, mut connections) = held().await;
    let store = EndpointStore::default();
    subscribe(&store, vec![core()]);
    store.replace(vec![spec("a", address)]);
    let mut stream = next(&mut connections).await;
    let flood = async {
        let _ = stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await;
        let piece = vec![b'x'; 65_536];
        while stream.write_all(&piece).await.is_ok() {}
    };
    tokio::time::timeout(PATIENCE, flood).await.unwrap();
    next(&mut connections).await;
    assert!(store.snapshot()[0].metrics().updated_at.is_none());
}

/// Counts bodies, and panics on every one if told to.
#[derive(Debug)]
struct Counting {
    panics: bool,
    bodies: watch::Sender<u32>,
}

impl Extractor for Counting {
    fn reads(&self) -> Payload {
        Payload::Exposition
    }

    fn extract(&self, _: &Endpoint, _: &[u8], _: Instant) -> Extraction {
        self.bodies.send_modify(|n| *n += 1);
        assert!(!self.panics, "as told");
        Extraction::default()
    }
}

#[tokio::test]
async fn one_fetch_feeds_all_extractors_and_a_panic_spares_the_others() {
    let engine = Engine::start().await;
    let counting = |panics| {
        let bodies = watch::Sender::new(0);
        let seen = bodies.subscribe();
        (
            Arc::new(Counting { panics, bodies }) as Arc<dyn Extractor>,
            seen,
        )
    };
    let (bad, bad_seen) = counting(true);
    let (good, good_seen) = counting(false);
    let store = EndpointStore::default();
    subscribe(&store, vec![bad, core(), good]);
    store.replace(vec![spec("a", engine.address)]);
    let pool = store.snapshot();
    until(|| *good_seen.borrow() >= 3).await;
    store.replace(Vec::new());
    until(|| *good_seen.borrow() == *bad_seen.borrow()).await;
    assert!(pool[0].metrics().waiting_requests >= 3);
    // The last request may have been cut off by the removal.
    let requests = engine.requests.load(Ordering::SeqCst);
    assert!(requests <= *good_seen.borrow() + 1, "{requests}");
    assert_eq!(engine.connections.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn an_endpoint_on_an_unknown_node_is_not_polled() {
    let engine = Engine::start().await;
    let mut keys = DataKeys::default();
    let source: MetricsDataSource = build(&mut keys, "source", "{}").unwrap();
    let mut http = source.http().unwrap().clone();
    http.use_node_address = true;
    let poll = Poll {
        name: named(MetricsDataSource::TYPE),
        http,
        payload: Payload::Exposition,
        extractors: vec![(named("core"), core())],
    };
    let store = EndpointStore::default();
    store.subscribe(Arc::new(
        Scraper::new(poll, MIN_INTERVAL, Handle::current()).unwrap(),
    ));
    let mut known = spec("known", engine.address);
    known.address.set_ip([192, 0, 2, 1].into());
    known.details.node_address = Some(engine.address.ip());
    store.replace(vec![spec("unknown", engine.address), known]);
    let pool = store.snapshot();
    until(|| pool[1].metrics().waiting_requests >= 3).await;
    assert!(pool[0].metrics().updated_at.is_none());
}

#[test]
fn few_and_small_buffers_are_kept() {
    let buffers = Buffers::default();
    for _ in 0..MAX_IDLE_BUFFERS + 3 {
        buffers.put(Vec::with_capacity(10));
    }
    assert_eq!(buffers.0.lock().len(), MAX_IDLE_BUFFERS);
    buffers.0.lock().clear();
    buffers.put(Vec::with_capacity(MAX_IDLE_BUFFER_BYTES + 1));
    assert!(buffers.0.lock().is_empty());
    buffers.put(Vec::with_capacity(100));
    assert!(buffers.take().capacity() >= 100);
}
