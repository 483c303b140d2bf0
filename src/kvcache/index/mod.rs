//! Which endpoints hold which blocks, exactly: built from the events their engines publish.
//!
//! Prompts share long stretches, so blocks lie in runs: a stretch that several endpoints hold
//! is stored once, and how far an endpoint holds it is one span. A key commits to the prompt before
//! it, so a run and a prompt are compared by a handful of keys, and a look-up costs the runs along the
//! prompt and their holders, not its blocks. An engine's own hashes are stored once for all endpoints
//! that use the same; where an endpoint's differ, they are kept for it alone.
//!
//! Entry points: [`KvIndex::writer`] for the task that reads a publisher, [`KvIndex::lookup`] for a
//! request, [`KvIndex::expect`] after a pick. The index does not know what a request is, does no I/O
//! and never awaits. One lock guards it: a look-up holds it shared for about a microsecond, a writer
//! alone for one event; keys are hashed outside.

mod extras;
mod lookup;
mod parked;
mod run;
mod since;
mod table;
mod tier;
mod writer;

#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::RwLock;
use tokio::time::Instant;

pub use lookup::{Lookup, Match, Trust};
pub use since::{Held, Holding};
pub use table::TableStats;
pub use tier::{CPU, GPU, MAX_TIERS, SPECULATIVE};
pub use writer::{EndpointWriter, WriterStats};

use self::table::Table;
use self::tier::Tiers;
use super::block::{BlockHasher, BlockKey};
use crate::datalayer::EndpointIndex;

/// Memory the index may use unless told otherwise. About 14 million distinct blocks.
pub const DEFAULT_MAX_BYTES: usize = 1 << 30;

/// Adapter names remembered; blocks of further ones are kept, but requests for them are not told from
/// requests for the base model.
pub const MAX_ADAPTERS: usize = 4096;

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
}

impl Default for IndexSettings {
    fn default() -> Self {
        Self {
            max_bytes: DEFAULT_MAX_BYTES,
            tier_weights: vec![("gpu".into(), 1.0), ("cpu".into(), 0.8)],
            idempotent_stores: false,
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
    inner: RwLock<Inner>,
    /// Adapters that events named.
    adapters: RwLock<BTreeSet<Box<str>>>,
    started: Instant,
}

#[derive(Debug)]
struct Inner {
    table: Table,
    tiers: Tiers,
}

impl KvIndex {
    /// An empty index. Requests must make their keys with the same `hasher`.
    pub fn new(settings: &IndexSettings, hasher: BlockHasher) -> Self {
        let inner = Inner {
            table: Table::new(settings.max_bytes, settings.idempotent_stores),
            tiers: Tiers::new(&settings.tier_weights),
        };
        Self {
            shared: Arc::new(Shared {
                hasher,
                inner: RwLock::new(inner),
                adapters: RwLock::default(),
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
        let column = self.shared.inner.write().table.add_column(endpoint.0);
        EndpointWriter::new(self.clone(), column, model)
    }

    /// Finds what each candidate holds of the prompt with these keys; the answers are in
    /// [`Lookup::matches`]. `now` decides which predictions still count. Candidates are distinct and use
    /// one block size, that of the keys: ask [`KvIndex::block_size`] and look up once for each size.
    pub fn lookup(
        &self,
        keys: &[BlockKey],
        candidates: &[EndpointIndex],
        now: Instant,
        lookup: &mut Lookup,
    ) {
        let now_ms = self.millis(now);
        let inner = self.shared.inner.read();
        lookup.run(
            &inner.table,
            &inner.tiers.by_number,
            keys,
            candidates,
            now_ms,
        );
    }

    /// A request with these keys was sent to `endpoint`: for `ttl` its blocks count there in tier
    /// [`SPECULATIVE`], until events of the endpoint take their place. Each request has a deadline of
    /// its own. Does nothing for an endpoint without a writer.
    pub fn expect(&self, endpoint: EndpointIndex, keys: &[BlockKey], now: Instant, ttl: Duration) {
        let now_ms = self.millis(now);
        let deadline_ms = self.millis(now + ttl);
        let mut inner = self.shared.inner.write();
        inner.table.expire(now_ms);
        let columns = inner.table.by_endpoint.get(endpoint.0 as usize);
        if let Some(column) = columns.and_then(|columns| columns.first().copied()) {
            inner.table.expect(column, keys, deadline_ms);
        }
    }

    /// Frees predictions whose deadline has passed. Look-ups do not count them in any case; call it now
    /// and then on an index that gets no new ones.
    pub fn expire(&self, now: Instant) {
        let now_ms = self.millis(now);
        self.shared.inner.write().table.expire(now_ms);
    }

    /// Some engine stored blocks of an adapter called `name`. A name no event mentioned is the base
    /// model's, or an adapter's without a block anywhere.
    pub fn is_adapter(&self, name: &str) -> bool {
        self.shared.adapters.read().contains(name)
    }

    fn note_adapter(&self, name: &str) {
        if self.is_adapter(name) {
            return;
        }
        let mut adapters = self.shared.adapters.write();
        if adapters.len() < MAX_ADAPTERS {
            adapters.insert(name.into());
        }
    }

    /// Tokens per block on `endpoint`; `None` before its first store.
    pub fn block_size(&self, endpoint: EndpointIndex) -> Option<u32> {
        let inner = self.shared.inner.read();
        let columns = inner.table.by_endpoint.get(endpoint.0 as usize)?;
        let sizes = columns.iter().filter_map(|id| {
            let column = inner.table.columns.get(*id as usize)?.as_ref()?;
            (column.block_size > 0).then_some(column.block_size)
        });
        sizes.max()
    }

    /// Names of the tiers seen so far, by number.
    pub fn tiers(&self) -> Vec<Arc<str>> {
        self.shared.inner.read().tiers.names()
    }

    /// Size and counters.
    pub fn stats(&self) -> TableStats {
        self.shared.inner.read().table.stats()
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
        let found = since::held_since(&self.shared.inner.read().table, endpoint, keys);
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
        let inner = self.shared.inner.read();
        let of = |endpoint: &EndpointIndex| since::holding(&inner.table, *endpoint);
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
