//! A large pool that changes all the time: five thousand pods, five hundred events a second from a watch.
//! How long a whole pick takes beside them, what following them costs, and how late they are.
//!
//! `cargo bench --bench pool_events`
//!
//! Picks run on a thread of their own, first without events, then with them, then without again; a pause
//! that events cause is in the second part only, what a changed pool costs is in the third too. Beside the
//! wall clock stands the
//! CPU time of the thread, which a neighbour on a shared machine does not lengthen. Engines are not
//! scraped: their metrics are set once.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a bench fails by panicking, as the scripted API server does"
)]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use parking_lot::Mutex;
use pinpod::config::{LoadOptions, builtin, load};
use pinpod::control::candidates::CandidatePool;
use pinpod::control::director::DirectorOptions;
use pinpod::control::{BodyKnowledge, Director, Intake, Step, Subset};
use pinpod::datalayer::discovery::Discovery;
use pinpod::datalayer::{Endpoint, EndpointListener, EndpointStore, EngineMetrics};
use pinpod::kubernetes::watch::ApiContact;
use pinpod::kubernetes::{KubernetesDiscovery, PoolSource};
use pinpod::telemetry::metrics::{self, Metrics};
use rustix::time::{ClockId, clock_gettime};
use serde_json::json;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// The scripted API server of the unit tests. It names rooms by `crate::`, hence the next line.
#[path = "../src/kubernetes/testing.rs"]
#[allow(dead_code, reason = "written for more than this")]
mod api_server;
use pinpod::{datalayer, kubernetes};

use api_server::{ApiServer, client_of, pod, pool};

const PODS: usize = 5_000;
const EVENTS_PER_SECOND: u32 = 500;
const QUIET: Duration = Duration::from_secs(5);
const SECONDS: u32 = 10;
/// Pause between two picks.
const PICK_INTERVAL: Duration = Duration::from_millis(1);

/// Notes how long after it was sent each event reached the pool.
#[derive(Debug)]
struct Delays {
    base: Instant,
    micros: Mutex<Vec<f64>>,
}

impl Delays {
    fn note(&self, endpoint: &Endpoint) {
        if let Some(sent) = endpoint.spec.labels.get("sent") {
            let sent: u64 = sent.parse().unwrap();
            self.micros.lock().push((self.now() - sent) as f64);
        }
    }

    fn now(&self) -> u64 {
        u64::try_from(self.base.elapsed().as_micros()).unwrap()
    }
}

impl EndpointListener for Delays {
    fn added(&self, endpoint: &Arc<Endpoint>) {
        self.note(endpoint);
    }

    fn relabelled(&self, _: &Arc<Endpoint>, endpoint: &Arc<Endpoint>) {
        self.note(endpoint);
    }

    fn removed(&self, _: &Arc<Endpoint>) {}
}

/// CPU time of this thread.
fn cpu() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(
        time.tv_sec.unsigned_abs(),
        u32::try_from(time.tv_nsec).unwrap(),
    )
}

fn resident_kib() -> u64 {
    let text = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = text.lines().find(|l| l.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[expect(clippy::print_stdout, reason = "a bench reports on stdout")]
fn show(text: &str) {
    println!("{text}");
}

/// A line of a table: how many, and the percentiles in microseconds.
fn row(name: &str, values: &mut [f64]) {
    let at = |values: &mut [f64], share| pinpod::demo::report::percentile(values, share);
    let shares = [0.5, 0.99, 0.999, 1.0].map(|share| format!("{:.0}", at(values, share)));
    show(&format!(
        "| {name} | {} | {} |",
        values.len(),
        shares.join(" | ")
    ));
}

fn numbered(n: usize) -> serde_json::Value {
    let mut value = pod(&format!("pod-{n:04}"), 1);
    value["status"]["podIP"] = json!(format!("10.1.{}.{}", n / 250, n % 250 + 1));
    value
}

/// Times of one phase, in microseconds.
#[derive(Debug, Default)]
struct Times {
    pick_wall: Vec<f64>,
    pick_cpu: Vec<f64>,
    list_wall: Vec<f64>,
    list_cpu: Vec<f64>,
}

impl Times {
    fn show(&mut self, phase: &str) {
        row(&format!("{phase}: pick, wall"), &mut self.pick_wall);
        row(&format!("{phase}: pick, CPU"), &mut self.pick_cpu);
        row(&format!("{phase}: candidates, wall"), &mut self.list_wall);
        row(&format!("{phase}: candidates, CPU"), &mut self.list_cpu);
    }
}

/// Runs `work` and returns its wall and CPU time in microseconds.
fn timed<T>(work: impl FnOnce() -> T) -> (T, f64, f64) {
    let (at, busy) = (Instant::now(), cpu());
    let made = work();
    let on_cpu = cpu().checked_sub(busy).unwrap_or_default();
    (
        made,
        at.elapsed().as_secs_f64() * 1e6,
        on_cpu.as_secs_f64() * 1e6,
    )
}

/// Picks until `over`; returns the times of each phase.
fn pick_on(
    director: &Director,
    store: &EndpointStore,
    phase: &AtomicUsize,
    over: &AtomicBool,
) -> [Times; 3] {
    let mut phases: [Times; 3] = Default::default();
    let mut own = CandidatePool::default();
    let mut number = 0u64;
    while !over.load(Ordering::Relaxed) {
        let times = &mut phases[phase.load(Ordering::Relaxed)];
        number += 1;
        let intake = intake(number);
        let (step, wall, on_cpu) = timed(|| director.decide(intake, BodyKnowledge::Complete));
        let Step::Done(decision) = step else {
            panic!("the recommended configuration never waits");
        };
        drop(decision.expect("a pick"));
        // The first ones fill buffers.
        if number > 100 {
            times.pick_wall.push(wall);
            times.pick_cpu.push(on_cpu);
        }
        // The part of it that knows the pool: the current list, with the metrics frozen.
        let (count, wall, on_cpu) = timed(|| own.collect(store, &Subset::Any).len());
        assert!(count >= PODS - 64);
        times.list_wall.push(wall);
        times.list_cpu.push(on_cpu);
        std::thread::park_timeout(PICK_INTERVAL);
    }
    phases
}

/// One of a hundred conversations.
fn intake(number: u64) -> Intake {
    let prompt = format!("conversation {} ", number % 100).repeat(100);
    let body = json!({"model": "m", "prompt": prompt}).to_string();
    let headers = [
        (":path", "/v1/completions"),
        ("content-type", "application/json"),
    ];
    Intake {
        headers: headers
            .map(|(name, value)| (name.to_owned(), Bytes::from_static(value.as_bytes())))
            .into_iter()
            .collect(),
        body: [Bytes::from(body)].into_iter().collect(),
        early: None,
        subset: Subset::Any,
        received_at: Instant::now(),
        trace: pinpod::telemetry::trace::Span::default(),
    }
}

/// Follows the server until `stop`; returns the CPU time of the first list and of what came after.
fn follow(
    server: std::net::SocketAddr,
    store: &EndpointStore,
    stop: CancellationToken,
) -> (Duration, Duration) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let source = PoolSource::Pool {
            name: "pool".to_owned(),
            legacy: false,
        };
        let contact = ApiContact::default();
        let client = client_of(server);
        let discovery = KubernetesDiscovery::new(client, "default".to_owned(), source, contact);
        let watch = discovery.watch(store, stop);
        tokio::pin!(watch);
        let listed = loop {
            tokio::select! {
                () = &mut watch => panic!("ended before it began"),
                () = tokio::time::sleep(Duration::from_millis(5)) => {}
            }
            if store.snapshot().len() == PODS {
                break cpu();
            }
        };
        watch.await;
        (listed, cpu().checked_sub(listed).unwrap())
    })
}

fn main() -> anyhow::Result<()> {
    metrics::install()?;
    let text = include_str!("../deploy/config/recommended.yaml");
    let config = load(Some(text), &LoadOptions::default(), &builtin::registry())?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let server = runtime.block_on(ApiServer::start());
    server.apply(pool(&[8000]));
    for n in 0..PODS {
        server.apply(numbered(n));
    }
    let store = Arc::new(EndpointStore::default());
    let delays = Arc::new(Delays {
        base: Instant::now(),
        micros: Mutex::default(),
    });
    store.subscribe(Arc::clone(&delays) as Arc<dyn EndpointListener>);
    for listener in &config.listeners {
        store.subscribe(Arc::clone(listener));
    }
    let options = DirectorOptions {
        ignore_subset: false,
        emit_scores: false,
        strip_control_headers: true,
        seed: None,
    };
    let director = Director::new(
        Arc::clone(&store),
        config.activate(),
        options,
        Metrics::new(),
    );
    let stop = CancellationToken::new();
    let (followed, stopped, address) = (Arc::clone(&store), stop.clone(), server.address());
    let resident = resident_kib();
    let started = Instant::now();
    let control = std::thread::spawn(move || follow(address, &followed, stopped));
    runtime.block_on(async {
        while store.snapshot().len() < PODS || server.watches("pods") == 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    });
    let (listing, grown) = (started.elapsed(), resident_kib().saturating_sub(resident));
    for (endpoint, n) in store.snapshot().iter().zip(0u32..) {
        endpoint.set_metrics(EngineMetrics {
            waiting_requests: n % 7,
            updated_at: Some(Instant::now()),
            ..EngineMetrics::default()
        });
    }
    let (phase, over) = (
        Arc::new(AtomicUsize::new(0)),
        Arc::new(AtomicBool::new(false)),
    );
    let (picked, during, ended) = (Arc::clone(&store), Arc::clone(&phase), Arc::clone(&over));
    let picks = std::thread::spawn(move || pick_on(&director, &picked, &during, &ended));
    runtime.block_on(async {
        tokio::time::sleep(QUIET).await;
        phase.store(1, Ordering::Relaxed);
        let mut tick = tokio::time::interval(Duration::from_secs(1) / EVENTS_PER_SECOND);
        // Each event gives a pod another label, every tenth one another life.
        for n in 0..EVENTS_PER_SECOND * SECONDS {
            tick.tick().await;
            let mut value = numbered(n as usize * 7 % PODS);
            if n % 10 == 0 {
                value["metadata"]["uid"] = json!(format!("life-{n}"));
            }
            value["metadata"]["labels"]["sent"] = json!(delays.now().to_string());
            server.apply(value);
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
        phase.store(2, Ordering::Relaxed);
        tokio::time::sleep(QUIET).await;
    });
    over.store(true, Ordering::Relaxed);
    let [mut before, mut during, mut after] = picks.join().unwrap();
    stop.cancel();
    let (listed, followed) = control.join().unwrap();
    let mut events = std::mem::take(&mut *delays.micros.lock());
    anyhow::ensure!(
        events.len() >= (EVENTS_PER_SECOND * SECONDS) as usize * 95 / 100,
        "{} events arrived",
        events.len()
    );
    show(&format!(
        "list of {PODS} pods: {listing:?} until in use, {listed:?} CPU, {grown} KiB"
    ));
    let share = followed.as_secs_f64() / f64::from(SECONDS) * 100.0;
    show(&format!(
        "{EVENTS_PER_SECOND} events/s: {share:.1} % of a core for following them"
    ));
    show("| us | samples | p50 | p99 | p99.9 | max |");
    show("|---|---|---|---|---|---|");
    before.show("before");
    during.show("with events");
    after.show("after");
    row("event to pool", &mut events);
    Ok(())
}
