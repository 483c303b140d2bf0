//! Which endpoints hold which blocks, exactly: built from the events their engines publish.
//!
//! Prompts share long stretches, so blocks lie in runs: a stretch that several endpoints hold
//! is stored once, and how far an endpoint holds it is one span. A key commits to the prompt before
//! it, so a run and a prompt are compared by a handful of keys, and a look-up costs the runs along the
//! prompt and their holders, not its blocks. An engine's own hashes are stored once for all endpoints
//! that use the same; an endpoint that calls one block something else has a list and a table of its own
//! for all of its blocks.
//!
//! Entry points: [`KvIndex::writer`] for the task that reads a publisher, [`KvIndex::lookup`] for a
//! request, [`KvIndex::expect`] after a pick. The index does not know what a request is, does no I/O
//! and never awaits.
//!
//! A look-up waits for nobody. What it reads (`view`) exists in two `copies`: one is published, the
//! other is changed by one writer at a time and published when a message has been applied, so a look-up
//! sees messages whole. Two copies rather than structures that are read while they change, because then
//! every answer comes from one state, nothing needs unsafe code, and the part that exists twice is small:
//! keys and spans, a few bytes an entry. Everything else a writer needs (`table`) exists once. Tokens
//! are hashed before a writer takes its turn.

mod copies;
mod extras;
mod lookup;
mod names;
mod numbers;
mod parked;
mod run;
mod since;
mod table;
mod tagged;
mod tier;
mod view;
mod writer;

#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use parking_lot::Mutex;
use tokio::time::Instant;

pub use lookup::{Lookup, Match, Trust};
pub use since::{Held, Holding};
pub use table::TableStats;
pub use tier::{CPU, GPU, MAX_TIERS, SPECULATIVE};
pub use writer::{EndpointWriter, WriterStats};

use self::copies::Copies;
use self::table::Table;
use self::view::{Draft, Log, View};
use super::block::{BlockHasher, BlockKey};
use crate::datalayer::EndpointIndex;

/// Memory the index may use unless told otherwise. About 15 million distinct blocks.
pub const DEFAULT_MAX_BYTES: usize = 1 << 30;

/// How long a tier that never reports a removal is believed unless told otherwise.
pub const DEFAULT_SILENT_TIER_TTL: Duration = Duration::from_hours(1);

/// Adapter names remembered; blocks of further ones are kept, but requests for them are not told from
/// requests for the base model.
pub const MAX_ADAPTERS: usize = 4096;

/// Keys of predictions that wait while a writer is at work: 8 MiB.
pub const MAX_WAITING_KEYS: usize = 1 << 20;

/// Settings of an index.
#[derive(Debug, Clone)]
pub struct IndexSettings {
    /// Estimated memory that is never exceeded; past it the runs not stored to for longest are dropped.
    pub max_bytes: usize,
    /// Weight of a tier by lower-case name; 1.0 where none is given.
    pub tier_weights: Vec<(String, f64)>,
    /// A block stored again is the same copy announced again, not another copy. For engines that
    /// report reused prefixes in full.
    pub idempotent_stores: bool,
    /// Blocks in a tier other than the GPU's, on an endpoint that has never reported a removal from that
    /// tier, count for so long after the newest store to their run, in whole minutes and at least one: a
    /// store by any endpoint that shares the run, since the run and not its holders has that time. LMCache's
    /// connector reports stores only.
    pub silent_tier_ttl: Duration,
}

impl Default for IndexSettings {
    fn default() -> Self {
        Self {
            max_bytes: DEFAULT_MAX_BYTES,
            tier_weights: vec![("gpu".into(), 1.0), ("cpu".into(), 0.8)],
            idempotent_stores: false,
            silent_tier_ttl: DEFAULT_SILENT_TIER_TTL,
        }
    }
}

/// The block index of one pool, shared by requests and the tasks that read events.
#[derive(Clone)]
pub struct KvIndex {
    shared: Arc<Shared>,
}

impl std::fmt::Debug for KvIndex {
    /// Without its content, which can be large.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("KvIndex").finish_non_exhaustive()
    }
}

#[derive(Debug)]
struct Shared {
    hasher: BlockHasher,
    views: Copies<View>,
    /// Held by the writer whose turn it is. No look-up takes it.
    writer: Mutex<Writer>,
    /// Predictions nobody has applied yet.
    waiting: Mutex<Waiting>,
    /// Adapters that events named.
    adapters: ArcSwap<BTreeSet<Box<str>>>,
    started: Instant,
}

#[derive(Debug)]
struct Writer {
    table: Table,
    log: Log,
}

#[derive(Debug, Default)]
struct Waiting {
    predictions: Vec<Prediction>,
    keys: usize,
    refused: u64,
}

/// A request was sent to an endpoint.
#[derive(Debug)]
struct Prediction {
    endpoint: u32,
    keys: Vec<BlockKey>,
    now_ms: u64,
    deadline_ms: u64,
}

impl KvIndex {
    /// An empty index. Requests must make their keys with the same `hasher`.
    pub fn new(settings: &IndexSettings, hasher: BlockHasher) -> Self {
        let view = || View::new(&settings.tier_weights, settings.idempotent_stores);
        let silent_minutes = minutes(settings.silent_tier_ttl).max(1);
        let writer = Writer {
            table: Table::new(settings.max_bytes, silent_minutes),
            log: Log::default(),
        };
        Self {
            shared: Arc::new(Shared {
                hasher,
                views: Copies::new(view(), view()),
                writer: Mutex::new(writer),
                waiting: Mutex::default(),
                adapters: ArcSwap::default(),
                started: Instant::now(),
            }),
        }
    }

    /// What makes this index's keys.
    pub fn hasher(&self) -> BlockHasher {
        self.shared.hasher
    }

    /// A sink for one publisher of `endpoint`. Its part is in state down until it says otherwise, and is
    /// forgotten when the writer is dropped. Several writers of one endpoint are its data-parallel
    /// ranks: the one that holds most answers for it.
    pub fn writer(&self, endpoint: EndpointIndex, model: &str) -> EndpointWriter {
        let column = self.change(|table, draft| table.add_column(draft, endpoint.0));
        EndpointWriter::new(self.clone(), column, model)
    }

    /// Finds what each candidate holds of the prompt with these keys; the answers are in
    /// [`Lookup::matches`]. `now` decides which predictions still count. Candidates are distinct and use
    /// one block size, that of the keys: ask [`KvIndex::block_sizes`] and look up once for each size.
    pub fn lookup(
        &self,
        keys: &[BlockKey],
        candidates: &[EndpointIndex],
        now: Instant,
        lookup: &mut Lookup,
    ) {
        let now_ms = self.millis(now);
        lookup.run(&self.shared.views.read(), keys, candidates, now_ms);
    }

    /// A request with these keys was sent to `endpoint`: for `ttl` its blocks count there in tier
    /// [`SPECULATIVE`], until events of the endpoint take their place. Each request has a deadline of
    /// its own. Does nothing for an endpoint without a writer. Does not wait: when a writer is at work,
    /// that writer applies the prediction next.
    pub fn expect(&self, endpoint: EndpointIndex, keys: &[BlockKey], now: Instant, ttl: Duration) {
        let mut waiting = self.shared.waiting.lock();
        if waiting.keys + keys.len() > MAX_WAITING_KEYS {
            waiting.refused += 1;
        } else {
            waiting.keys += keys.len();
            waiting.predictions.push(Prediction {
                endpoint: endpoint.0,
                keys: keys.into(),
                now_ms: self.millis(now),
                deadline_ms: self.millis(now + ttl),
            });
        }
        drop(waiting);
        self.settle();
    }

    /// Frees predictions whose deadline has passed. Look-ups do not count them in any case; call it now
    /// and then on an index that gets no new ones.
    pub fn expire(&self, now: Instant) {
        let now_ms = self.millis(now);
        self.change(|table, draft| table.expire(draft, now_ms));
    }

    /// Some engine stored blocks of an adapter called `name`. A name no event mentioned is the base
    /// model's, or an adapter's without a block anywhere.
    pub fn is_adapter(&self, name: &str) -> bool {
        self.shared.adapters.load().contains(name)
    }

    fn note_adapter(&self, name: &str) {
        if self.is_adapter(name) {
            return;
        }
        self.shared.adapters.rcu(|adapters| {
            let mut more = BTreeSet::clone(adapters);
            if more.len() < MAX_ADAPTERS {
                more.insert(name.into());
            }
            more
        });
    }

    /// Tokens per block on `endpoint`; `None` before its first store.
    pub fn block_size(&self, endpoint: EndpointIndex) -> Option<u32> {
        self.shared.views.read().block_size(endpoint.0)
    }

    /// Tokens per block on each endpoint, in place of what `out` held: one state of the index for all.
    pub fn block_sizes(
        &self,
        endpoints: impl IntoIterator<Item = EndpointIndex>,
        out: &mut Vec<Option<u32>>,
    ) {
        let view = self.shared.views.read();
        out.clear();
        let sizes = endpoints.into_iter();
        out.extend(sizes.map(|endpoint| view.block_size(endpoint.0)));
    }

    /// Names of the tiers seen so far, by number.
    pub fn tiers(&self) -> Vec<Arc<str>> {
        self.shared.views.read().tiers.names()
    }

    /// Size and counters. Waits for a writer at work.
    pub fn stats(&self) -> TableStats {
        let writer = self.shared.writer.lock();
        writer.table.stats(&self.shared.views.read())
    }

    /// Changes the index when it is this caller's turn, and publishes the outcome.
    fn change<R>(&self, change: impl FnOnce(&mut Table, &mut Draft<'_>) -> R) -> R {
        let result = self.publish(&mut self.shared.writer.lock(), change);
        self.settle();
        result
    }

    /// Applies waiting predictions unless a writer is at work; then that one does it on its way out.
    fn settle(&self) {
        loop {
            if self.shared.waiting.lock().is_empty() {
                return;
            }
            let Some(mut writer) = self.shared.writer.try_lock() else {
                return;
            };
            let waiting = std::mem::take(&mut *self.shared.waiting.lock());
            self.publish(&mut writer, |table, draft| {
                table.refuse_predictions(waiting.refused);
                for prediction in &waiting.predictions {
                    table.expire(draft, prediction.now_ms);
                    let Prediction {
                        endpoint,
                        keys,
                        deadline_ms,
                        ..
                    } = prediction;
                    table.expect(draft, *endpoint, keys, *deadline_ms);
                }
            });
        }
    }

    fn publish<R>(
        &self,
        writer: &mut Writer,
        change: impl FnOnce(&mut Table, &mut Draft<'_>) -> R,
    ) -> R {
        let Writer { table, log } = writer;
        self.shared.views.publish(|view| {
            log.replay(view);
            change(table, &mut Draft { view, log })
        })
    }

    /// Stretches of the first `blocks` of a prompt with these keys that `endpoint` has stored blocks of,
    /// and when it began to: for people, not for requests.
    pub fn held_since(
        &self,
        endpoint: EndpointIndex,
        keys: &[BlockKey],
        blocks: usize,
    ) -> Vec<Held> {
        let keys = keys.get(..blocks.min(keys.len())).unwrap_or_default();
        let writer = self.shared.writer.lock();
        let view = self.shared.views.read();
        let found = since::held_since(&writer.table, &view, endpoint, keys);
        let at = |seconds: u32| self.shared.started + Duration::from_secs(seconds.into());
        let held = found.into_iter().map(|(blocks, seconds)| Held {
            blocks,
            since: seconds.map(at),
        });
        held.collect()
    }

    /// Blocks and runs that each of `endpoints` holds, over all its ranks; a block counts once for each
    /// tier and group it lies in. Cost: the runs of these endpoints.
    pub fn holdings(&self, endpoints: &[EndpointIndex]) -> Vec<Holding> {
        let writer = self.shared.writer.lock();
        let view = self.shared.views.read();
        let of = |endpoint: &EndpointIndex| since::holding(&writer.table, &view, *endpoint);
        endpoints.iter().map(of).collect()
    }

    fn seconds(&self, at: Instant) -> u32 {
        u32::try_from(self.millis(at) / 1000).unwrap_or(u32::MAX - 1)
    }

    fn millis(&self, at: Instant) -> u64 {
        let since = at.saturating_duration_since(self.shared.started);
        u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
    }
}

impl Waiting {
    fn is_empty(&self) -> bool {
        self.predictions.is_empty() && self.refused == 0
    }
}

/// Whole minutes.
fn minutes(time: Duration) -> u32 {
    u32::try_from(time.as_secs() / 60).unwrap_or(u32::MAX)
}
