//! Metrics of what publishers send and the index holds, brought up to date when they are asked for.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use metrics::{Counter, Gauge, Histogram};
use parking_lot::Mutex;
use tokio::time::Instant;

use super::publishers::{Publisher, Publishers};
use super::sink::{KINDS, REMOVAL_REASONS, STORE_REASONS};
use crate::kvcache::events::StreamState;
use crate::kvcache::events::pool::MAX_SUBSCRIBERS;
use crate::kvcache::events::stats::{StatsSnapshot, SubscriberStats};
use crate::kvcache::events::subscriber::MAX_BUFFERED_BATCHES;
use crate::kvcache::index::{KvIndex, TableStats};
use crate::kvcache::redis::SharedStats;
use crate::telemetry::metrics::table::twin_of;
use crate::telemetry::metrics::{Collect, Follow, Pair, labels};

/// Publishers that get a label value of their own over the life of an instance; later ones share one.
const MAX_NAMES: usize = MAX_SUBSCRIBERS;
/// Label value of publishers past [`MAX_NAMES`].
const OVERFLOW: &str = "other";
/// States in the order of their numbers.
const STATES: [StreamState; 4] = [
    StreamState::Down,
    StreamState::Joining,
    StreamState::Live,
    StreamState::Gap,
];

/// Counters of look-ups, kept only with `enableMetrics`.
pub(super) struct LookupSeries {
    requests: Pair<Counter>,
    hits: [Total; 2],
    latency: Pair<Histogram>,
}

/// A counter that grows by more than one, and its legacy twin.
struct Total([Option<Counter>; 2]);

impl Total {
    fn new(name: &'static str) -> Self {
        let twin = twin_of(name).map(|twin| metrics::counter!(twin));
        Self([Some(metrics::counter!(name)), twin])
    }

    fn add(&self, n: u64) {
        for counter in self.0.iter().flatten() {
            counter.increment(n);
        }
    }
}

impl std::fmt::Debug for LookupSeries {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LookupSeries").finish_non_exhaustive()
    }
}

impl LookupSeries {
    pub(super) fn new() -> Self {
        let none = Vec::new;
        Self {
            requests: Pair::counter(
                "llm_d_epp_kv_cache_index_lookup_requests_total",
                none(),
                none(),
            ),
            hits: [
                Total::new("llm_d_epp_kv_cache_index_lookup_hits_total"),
                Total::new("llm_d_epp_kv_cache_index_max_pod_hit_count_total"),
            ],
            latency: Pair::histogram(
                "llm_d_epp_kv_cache_index_lookup_latency_seconds",
                none(),
                none(),
            ),
        }
    }

    /// A look-up that began at `started` found `best` blocks on the endpoint that has most.
    pub(super) fn record(&self, started: Instant, best: u32) {
        self.latency.record(started.elapsed().as_secs_f64());
        self.requests.increment();
        for total in &self.hits {
            total.add(best.into());
        }
    }
}

/// Reads publishers and the index of one instance.
pub(super) struct Observer {
    index: KvIndex,
    max_bytes: usize,
    publishers: Arc<Publishers>,
    state: Mutex<Series>,
}

impl std::fmt::Debug for Observer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Observer").finish_non_exhaustive()
    }
}

struct Series {
    names: HashSet<Arc<str>>,
    /// By the address of their counters, which stay put while they are kept here.
    by_publisher: HashMap<usize, PublisherSeries>,
    listener: Option<PublisherSeries>,
    subscribers: [Gauge; STATES.len()],
    active: Gauge,
    queue: [Gauge; 2],
    index: IndexSeries,
    /// Only with `enableMetrics`.
    admissions: Option<[Vec<Follow>; 2]>,
    dedup: [Vec<Follow>; 2],
    skipped: HashMap<(&'static str, usize, usize), Follow>,
    remote: Option<RemoteSeries>,
}

/// Finds a number among the counters of a shared index.
type ReadShared = fn(&SharedStats) -> &AtomicU64;

/// Of an index that replicas share.
struct RemoteSeries {
    up: Gauge,
    counters: Vec<(Follow, ReadShared)>,
}

impl RemoteSeries {
    fn new() -> Self {
        let lookups: [(&'static str, ReadShared); 4] = [
            ("found", |s| &s.found),
            ("down", |s| &s.down),
            ("late", |s| &s.late),
            ("failed", |s| &s.failed),
        ];
        let events: [(&'static str, ReadShared); 6] = [
            ("written", |s| &s.written),
            ("overflowed", |s| &s.overflowed),
            ("lost", |s| &s.lost),
            ("without_model", |s| &s.without_model),
            ("without_parent", |s| &s.without_parent),
            ("malformed", |s| &s.malformed),
        ];
        let connections = metrics::counter!("pinpod_kv_shared_index_connections_total");
        let mut counters: Vec<(Follow, ReadShared)> =
            vec![(Follow::new(connections), |s| &s.connections)];
        for (result, read) in lookups {
            let counter =
                metrics::counter!("pinpod_kv_shared_index_lookups_total", "result" => result);
            counters.push((Follow::new(counter), read));
        }
        for (result, read) in events {
            let counter =
                metrics::counter!("pinpod_kv_shared_index_events_total", "result" => result);
            counters.push((Follow::new(counter), read));
        }
        Self {
            up: metrics::gauge!("pinpod_kv_shared_index_up"),
            counters,
        }
    }

    fn update(&mut self, stats: &SharedStats) {
        self.up.set(f64::from(u8::from(stats.up.load(Relaxed))));
        for (counter, read) in &mut self.counters {
            counter.to(read(stats).load(Relaxed));
        }
    }
}

struct IndexSeries {
    gauges: [Gauge; 6],
    evicted: Follow,
    refused: [Follow; 2],
    parked: [Follow; 2],
    malformed: Follow,
}

impl Observer {
    pub(super) fn new(
        index: KvIndex,
        max_bytes: usize,
        publishers: Arc<Publishers>,
        enable_metrics: bool,
    ) -> Self {
        let gauge = |name: &'static str| metrics::gauge!(name);
        let series = Series {
            names: HashSet::new(),
            by_publisher: HashMap::new(),
            listener: None,
            subscribers: STATES
                .map(|state| metrics::gauge!("pinpod_kv_subscribers", "state" => state.name())),
            active: gauge("llm_d_epp_kv_cache_events_active_subscribers"),
            queue: [
                gauge("llm_d_epp_kv_cache_events_pool_queue_depth"),
                gauge("llm_d_epp_kv_cache_events_pool_capacity"),
            ],
            index: IndexSeries::new(),
            admissions: enable_metrics.then(|| {
                [
                    follow_pair("llm_d_epp_kv_cache_index_admissions_total"),
                    follow_pair("llm_d_epp_kv_cache_index_evictions_total"),
                ]
            }),
            dedup: [
                follow_pair("llm_d_epp_kv_cache_events_dedup_removed_hashes_suppressed_total"),
                follow_pair("llm_d_epp_kv_cache_events_dedup_removed_hashes_forwarded_total"),
            ],
            skipped: HashMap::new(),
            remote: publishers.remote().map(|_| RemoteSeries::new()),
        };
        Self {
            index,
            max_bytes,
            publishers,
            state: Mutex::new(series),
        }
    }
}

/// A counter and its legacy twin.
fn follow_pair(name: &'static str) -> Vec<Follow> {
    let current = Follow::new(metrics::counter!(name));
    let twin = twin_of(name).map(|twin| Follow::new(metrics::counter!(twin)));
    std::iter::once(current).chain(twin).collect()
}

fn follow_all(counters: &mut [Follow], total: u64) {
    for counter in counters {
        counter.to(total);
    }
}

impl Collect for Observer {
    fn collect(&self) {
        let mut series = self.state.lock();
        let all = self.publishers.all();
        series.publishers(&all);
        if let Some((address, stats)) = self.publishers.listener() {
            let listener = series
                .listener
                .get_or_insert_with(|| PublisherSeries::new(&address.to_string(), stats));
            listener.update();
        }
        if let (Some(index), Some(remote)) = (self.publishers.remote(), &mut series.remote) {
            remote.update(index.stats());
        }
        let stats = self.index.stats();
        series.index.update(&stats, self.max_bytes);
        series.totals(&self.publishers, &stats);
    }
}

impl Series {
    fn publishers(&mut self, all: &[Publisher]) {
        let place = |publisher: &Publisher| Arc::as_ptr(&publisher.stats).addr();
        let alive: HashSet<usize> = all.iter().map(place).collect();
        for publisher in all {
            let names = &mut self.names;
            let series = self.by_publisher.entry(place(publisher));
            series.or_insert_with(|| {
                let known = names.contains(&publisher.name) || names.len() < MAX_NAMES;
                if known {
                    names.insert(Arc::clone(&publisher.name));
                }
                let name = if known { &publisher.name } else { OVERFLOW };
                PublisherSeries::new(name, &publisher.stats)
            });
        }
        let mut by_state = [0_usize; STATES.len()];
        let mut waiting = 0;
        self.by_publisher.retain(|place, series| {
            let now = series.update();
            if !alive.contains(place) {
                series.leave();
                return false;
            }
            if let Some(n) = by_state.get_mut(now.state as usize) {
                *n += 1;
            }
            waiting += now.waiting;
            true
        });
        for (gauge, n) in self.subscribers.iter().zip(by_state) {
            gauge.set(n as f64);
        }
        self.active.set(all.len() as f64);
        let [depth, capacity] = &self.queue;
        depth.set(waiting as f64);
        capacity.set((all.len() * MAX_BUFFERED_BATCHES) as f64);
    }

    fn totals(&mut self, publishers: &Publishers, stats: &TableStats) {
        let totals = publishers.totals();
        let read = |total: &AtomicU64| total.load(Relaxed);
        let (removed, kept) = (read(&totals.removed), read(&totals.kept));
        if let Some([admissions, evictions]) = &mut self.admissions {
            follow_all(admissions, read(&totals.stored) + read(&totals.located));
            follow_all(
                evictions,
                removed.saturating_sub(kept) + stats.evicted_blocks,
            );
        }
        let [suppressed, forwarded] = &mut self.dedup;
        follow_all(suppressed, kept);
        follow_all(forwarded, removed.saturating_sub(kept));
        let [parked, dropped] = &mut self.index.parked;
        parked.to(read(&totals.parked));
        dropped.to(read(&totals.parked_dropped));
        self.index.malformed.to(read(&totals.malformed));
        self.skipped(
            "llm_d_epp_kv_cache_events_stores_skipped_total",
            &totals.stores_skipped,
            STORE_REASONS,
        );
        self.skipped(
            "llm_d_epp_kv_cache_events_removals_skipped_total",
            &totals.removals_skipped,
            REMOVAL_REASONS,
        );
    }

    /// Series of a closed set that are there once something was counted in them.
    fn skipped<const R: usize>(
        &mut self,
        name: &'static str,
        cells: &[[AtomicU64; R]; KINDS.len()],
        reasons: [&'static str; R],
    ) {
        for (k, (kind, row)) in KINDS.iter().zip(cells).enumerate() {
            for (r, (reason, cell)) in reasons.iter().zip(row).enumerate() {
                let total = cell.load(Relaxed);
                if total == 0 {
                    continue;
                }
                let series = self.skipped.entry((name, k, r)).or_insert_with(|| {
                    let list = labels(&[("cache_kind", kind), ("reason", reason)]);
                    Follow::new(metrics::counter!(name, list))
                });
                series.to(total);
            }
        }
    }
}

impl IndexSeries {
    fn new() -> Self {
        let refused = |what: &'static str| {
            Follow::new(metrics::counter!("pinpod_kv_index_refused_blocks_total", "what" => what))
        };
        let parked = |result: &'static str| {
            Follow::new(
                metrics::counter!("pinpod_kv_index_parked_stores_total", "result" => result),
            )
        };
        Self {
            gauges: [
                metrics::gauge!("pinpod_kv_index_endpoints"),
                metrics::gauge!("pinpod_kv_index_blocks"),
                metrics::gauge!("pinpod_kv_index_runs"),
                metrics::gauge!("pinpod_kv_index_bytes"),
                metrics::gauge!("pinpod_kv_index_max_bytes"),
                metrics::gauge!("pinpod_kv_index_speculative_entries"),
            ],
            evicted: Follow::new(metrics::counter!("pinpod_kv_index_evicted_runs_total")),
            refused: [refused("block"), refused("prediction")],
            parked: [parked("parked"), parked("dropped")],
            malformed: Follow::new(metrics::counter!("pinpod_kv_index_malformed_stores_total")),
        }
    }

    fn update(&mut self, stats: &TableStats, max_bytes: usize) {
        let now = [
            stats.columns,
            stats.blocks,
            stats.runs,
            stats.used_bytes,
            max_bytes,
            stats.predictions,
        ];
        for (gauge, value) in self.gauges.iter().zip(now) {
            gauge.set(value as f64);
        }
        self.evicted.to(stats.evicted_runs);
        let [blocks, predictions] = &mut self.refused;
        blocks.to(stats.refused_blocks);
        predictions.to(stats.refused_predictions);
    }
}

/// Finds a number among a publisher's counters.
type Read = fn(&StatsSnapshot) -> u64;

/// Everything counted for one publisher.
struct PublisherSeries {
    /// Kept, so that its place in memory is not another's meanwhile.
    stats: Arc<SubscriberStats>,
    counters: Vec<(Follow, Read)>,
    lag: Gauge,
    live: Gauge,
}

impl PublisherSeries {
    fn new(name: &str, stats: &Arc<SubscriberStats>) -> Self {
        let plain: [(&'static str, Read); 8] = [
            (
                "llm_d_epp_kv_cache_events_subscriber_reconnections_total",
                |s| s.reconnects,
            ),
            ("llm_d_epp_kv_cache_events_messages_received_total", |s| {
                s.received
            }),
            ("pinpod_kv_events_total", |s| s.events),
            ("pinpod_kv_event_gaps_total", |s| s.gaps),
            ("pinpod_kv_event_losses_total", |s| s.losses),
            ("pinpod_kv_event_restarts_total", |s| s.restarts),
            ("pinpod_kv_event_replays_total", |s| s.replays),
            ("pinpod_kv_event_replayed_messages_total", |s| s.replayed),
        ];
        let with: [(&'static str, &'static str, &'static str, Read); 12] = [
            // The spelling of the operations is the reference's, as far as they exist here.
            (ZMQ_ERRORS, "operation", "bind", |s| s.bind_errors),
            (ZMQ_ERRORS, "operation", "connect", |s| s.connect_errors),
            (ZMQ_ERRORS, "operation", "recv", |s| s.receive_errors),
            (ZMQ_ERRORS, "operation", "replay-incomplete", |s| {
                s.replay_failures
            }),
            (DROPPED, "reason", "duplicate", |s| s.duplicates),
            (DROPPED, "reason", "buffer_full", |s| s.buffer_dropped),
            (DROPPED, "reason", "oversize", |s| s.oversize),
            (DROPPED, "reason", "bad_frames", |s| s.bad_frames),
            (DROPPED, "reason", "unattributed", |s| s.unattributed),
            (DECODE_ERRORS, "reason", "payload", |s| s.bad_payloads),
            (DECODE_ERRORS, "reason", "malformed_event", |s| {
                s.malformed_events
            }),
            (DECODE_ERRORS, "reason", "unknown_event", |s| {
                s.unknown_events
            }),
        ];
        let own = ("pod_identifier", name);
        let mut counters = Vec::with_capacity(plain.len() + with.len());
        for (name, read) in plain {
            let counter = metrics::counter!(name, labels(&[own]));
            counters.push((Follow::new(counter), read));
        }
        for (name, label, value, read) in with {
            let counter = metrics::counter!(name, labels(&[own, (label, value)]));
            counters.push((Follow::new(counter), read));
        }
        Self {
            stats: Arc::clone(stats),
            counters,
            lag: metrics::gauge!("pinpod_kv_event_lag_seconds", labels(&[own])),
            live: metrics::gauge!("pinpod_kv_subscriber_live", labels(&[own])),
        }
    }

    fn update(&mut self) -> StatsSnapshot {
        let now = self.stats.snapshot();
        for (counter, read) in &mut self.counters {
            counter.to(read(&now));
        }
        self.lag.set(now.lag_ms as f64 / 1000.0);
        self.live
            .set(f64::from(u8::from(now.state == StreamState::Live)));
        now
    }

    /// Its endpoint left the pool. No number would be true, and a 0 would raise alarms for ever.
    fn leave(&self) {
        self.lag.set(f64::NAN);
        self.live.set(f64::NAN);
    }
}

const ZMQ_ERRORS: &str = "llm_d_epp_kv_cache_events_zmq_errors_total";
const DROPPED: &str = "pinpod_kv_event_dropped_total";
const DECODE_ERRORS: &str = "pinpod_kv_event_decode_errors_total";
