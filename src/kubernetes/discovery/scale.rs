//! How a large pool behaves: five thousand pods, five hundred events a second.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use serde_json::json;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::*;
use crate::control::Subset;
use crate::control::candidates::CandidatePool;
use crate::datalayer::{Endpoint, EndpointListener};
use crate::kubernetes::testing::{ApiServer, pod, pool};

const PODS: usize = 5_000;
const EVENTS_PER_SECOND: u32 = 500;
const SECONDS: u32 = 10;

/// Notes how long after it was sent each event reached the pool.
#[derive(Debug)]
struct Delays {
    base: Instant,
    micros: Mutex<Vec<u64>>,
}

impl Delays {
    fn note(&self, endpoint: &Endpoint) {
        if let Some(sent) = endpoint.spec.labels.get("sent") {
            let sent: u64 = sent.parse().unwrap();
            self.micros.lock().push(self.now() - sent);
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
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap();
    Duration::from_nanos(text.split(' ').next().unwrap().parse().unwrap())
}

fn resident_kib() -> u64 {
    let text = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = text.lines().find(|l| l.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

fn shown(name: &str, mut micros: Vec<u64>) -> String {
    micros.sort_unstable();
    let at = |percent: usize| micros[(micros.len() - 1) * percent / 100];
    let (half, most, last) = (at(50), at(99), at(100));
    format!(
        "{name}: {} samples, p50 {half} us, p99 {most} us, max {last} us",
        micros.len()
    )
}

fn numbered(n: usize) -> serde_json::Value {
    let mut value = pod(&format!("pod-{n:04}"), 1);
    value["status"]["podIP"] = json!(format!("10.1.{}.{}", n / 250, n % 250 + 1));
    value
}

/// Prints what README quotes. Each event gives a pod another label, every tenth one another life.
#[test]
#[ignore = "a measurement of ten seconds, to be run alone"]
fn five_thousand_pods_and_five_hundred_events_a_second() {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
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
    let stop = CancellationToken::new();
    let (followed, stopped, client) = (Arc::clone(&store), stop.clone(), server.address());
    let before = resident_kib();
    let started = Instant::now();
    let control = std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async {
            let source = PoolSource::Pool {
                name: "pool".to_owned(),
                legacy: false,
            };
            let client = crate::kubernetes::testing::client_of(client);
            let discovery = KubernetesDiscovery::new(
                client,
                "default".to_owned(),
                source,
                ApiContact::default(),
            );
            let watch = discovery.watch(&followed, stopped);
            tokio::pin!(watch);
            let listed = loop {
                tokio::select! {
                    () = &mut watch => unreachable!(),
                    () = tokio::time::sleep(Duration::from_millis(5)) => {}
                }
                if followed.snapshot().len() == PODS {
                    break cpu();
                }
            };
            watch.await;
            (listed, cpu().checked_sub(listed).unwrap())
        })
    });
    runtime.block_on(async {
        while store.snapshot().len() < PODS || server.watches("pods") == 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    });
    let (listing, grown) = (started.elapsed(), resident_kib().saturating_sub(before));
    let done = Arc::new(AtomicBool::new(false));
    let (picked, ended) = (Arc::clone(&store), Arc::clone(&done));
    // What a request does with the pool before any plugin: take the snapshot, freeze the metrics.
    let picks = std::thread::spawn(move || {
        let (mut wall, mut on_cpu, mut own) = (Vec::new(), Vec::new(), CandidatePool::default());
        while !ended.load(Ordering::Relaxed) {
            let (at, busy) = (Instant::now(), cpu());
            let count = own.collect(&picked, &Subset::Any).len();
            on_cpu.push(u64::try_from(cpu().checked_sub(busy).unwrap().as_micros()).unwrap());
            wall.push(u64::try_from(at.elapsed().as_micros()).unwrap());
            assert!(count >= PODS - 64);
            std::thread::park_timeout(Duration::from_millis(1));
        }
        (wall, on_cpu)
    });
    runtime.block_on(async {
        let mut tick = tokio::time::interval(Duration::from_secs(1) / EVENTS_PER_SECOND);
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
    });
    done.store(true, Ordering::Relaxed);
    let (wall, on_cpu) = picks.join().unwrap();
    stop.cancel();
    let (listed, followed) = control.join().unwrap();
    let events = delays.micros.lock().clone();
    assert!(events.len() >= (EVENTS_PER_SECOND * SECONDS) as usize * 95 / 100);
    println!("list of {PODS} pods: {listing:?} until in use, {listed:?} CPU, {grown} KiB");
    let share = followed.as_secs_f64() / f64::from(SECONDS) * 100.0;
    println!("{EVENTS_PER_SECOND} events/s: {share:.1} % of a core for following them");
    println!("{}", shown("event to pool", events));
    println!("{}", shown("snapshot of a pick, wall", wall));
    println!("{}", shown("snapshot of a pick, CPU", on_cpu));
}
