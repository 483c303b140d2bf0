//! Between a publisher and the index: counts for metrics, and an end that takes effect at once.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use parking_lot::Mutex;

use crate::kvcache::events::{Batch, Event, EventSink, StreamState};
use crate::kvcache::index::{EndpointWriter, WriterStats};

/// Kinds of cache as metrics name them; the last stands for all others.
pub(super) const KINDS: [&str; 10] = [
    "full_attention",
    "mla_attention",
    "sink_full_attention",
    "sliding_window",
    "sliding_window_mla",
    "mamba",
    "chunked_local_attention",
    "encoder_only_attention",
    "cross_attention",
    "unknown",
];
/// Those before this one hold every block of a prefix.
const FIRST_SPARSE: usize = 3;
const UNKNOWN: usize = KINDS.len() - 1;
/// Why a store is skipped.
pub(super) const STORE_REASONS: [&str; 3] = [
    "unsupported_cache_kind",
    "invalid_block_size",
    "non_dense_block_span",
];
/// Why a removal is skipped.
pub(super) const REMOVAL_REASONS: [&str; 2] = ["unsupported_cache_kind", "unknown_group"];
/// Groups whose kind is remembered; further ones count as unknown.
const MAX_GROUPS: usize = 32;

/// What happened to the events of all publishers of one instance. All only grow.
#[derive(Debug, Default)]
pub(super) struct Totals {
    pub(super) stored: AtomicU64,
    pub(super) located: AtomicU64,
    pub(super) removed: AtomicU64,
    pub(super) kept: AtomicU64,
    pub(super) parked: AtomicU64,
    pub(super) parked_dropped: AtomicU64,
    /// Stores dropped because their extra keys cannot be read.
    pub(super) malformed: AtomicU64,
    /// By kind and reason.
    pub(super) stores_skipped: [[AtomicU64; STORE_REASONS.len()]; KINDS.len()],
    /// By kind and reason.
    pub(super) removals_skipped: [[AtomicU64; REMOVAL_REASONS.len()]; KINDS.len()],
}

/// The writer of one publisher, until its endpoint leaves the pool. Met by two tasks only when it does.
pub(super) type Slot = Arc<Mutex<Option<EndpointWriter>>>;

/// Passes events on to the index.
#[derive(Debug)]
pub(super) struct Tap {
    slot: Slot,
    totals: Arc<Totals>,
    seen: WriterStats,
    kinds: [Option<usize>; MAX_GROUPS],
}

impl Tap {
    pub(super) fn new(writer: EndpointWriter, totals: Arc<Totals>) -> Self {
        Self {
            slot: Arc::new(Mutex::new(Some(writer))),
            totals,
            seen: WriterStats::default(),
            kinds: [None; MAX_GROUPS],
        }
    }

    /// Emptying it ends the publisher's part of the index at once, whatever its task is doing.
    pub(super) fn slot(&self) -> Slot {
        Arc::clone(&self.slot)
    }

    fn count(&mut self, now: WriterStats, batch: &Batch<'_>) {
        let before = std::mem::replace(&mut self.seen, now);
        let totals = &self.totals;
        for (total, now, before) in [
            (&totals.stored, now.stored_blocks, before.stored_blocks),
            (&totals.located, now.located_blocks, before.located_blocks),
            (&totals.removed, now.removed_blocks, before.removed_blocks),
            (&totals.kept, now.kept_blocks, before.kept_blocks),
            (&totals.parked, now.parked, before.parked),
            (
                &totals.parked_dropped,
                now.parked_dropped,
                before.parked_dropped,
            ),
            (
                &totals.malformed,
                now.malformed_extra_keys,
                before.malformed_extra_keys,
            ),
        ] {
            if now != before {
                total.fetch_add(now - before, Relaxed);
            }
        }
        let skipped = Skipped {
            unsupported: now.unsupported_group - before.unsupported_group,
            block_size: now.block_size - before.block_size,
            not_dense: now.not_dense - before.not_dense,
        };
        if skipped != Skipped::default() {
            self.count_skipped(skipped, batch);
        }
    }

    /// Finds kinds for what the index skipped: it tells the reason but not the kind of cache.
    fn count_skipped(&mut self, mut skipped: Skipped, batch: &Batch<'_>) {
        let mut dense_kind = UNKNOWN;
        for event in batch.events {
            match event {
                Event::Stored(stored) => {
                    let kind = kind_number(stored.kind);
                    if let Some(slot) = self.group(stored.group)
                        && (slot.is_none() || stored.kind.is_some())
                    {
                        *slot = Some(kind);
                    }
                    if (FIRST_SPARSE..UNKNOWN).contains(&kind) {
                        if skipped.take_unsupported() {
                            add(&self.totals.stores_skipped, kind, 0, 1);
                        }
                    } else if dense_kind == UNKNOWN {
                        dense_kind = kind;
                    }
                }
                Event::Removed(removed) => {
                    let kind = self.group(removed.group).and_then(|slot| *slot);
                    let (kind, reason) = match kind {
                        Some(kind) if (FIRST_SPARSE..UNKNOWN).contains(&kind) => (kind, 0),
                        None if removed.group.is_some() => (UNKNOWN, 1),
                        _ => continue,
                    };
                    if skipped.take_unsupported() {
                        add(&self.totals.removals_skipped, kind, reason, 1);
                    }
                }
                Event::Cleared(_) => {}
            }
        }
        let stores = &self.totals.stores_skipped;
        add(stores, UNKNOWN, 0, skipped.unsupported);
        add(stores, dense_kind, 1, skipped.block_size);
        add(stores, dense_kind, 2, skipped.not_dense);
    }

    fn group(&mut self, group: Option<u32>) -> Option<&mut Option<usize>> {
        self.kinds.get_mut(group.unwrap_or(0) as usize)
    }
}

/// Events skipped of one batch, by reason.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Skipped {
    unsupported: u64,
    block_size: u64,
    not_dense: u64,
}

impl Skipped {
    fn take_unsupported(&mut self) -> bool {
        let some = self.unsupported > 0;
        self.unsupported -= u64::from(some);
        some
    }
}

fn add<const R: usize>(table: &[[AtomicU64; R]], kind: usize, reason: usize, n: u64) {
    if n > 0
        && let Some(cell) = table.get(kind).and_then(|row| row.get(reason))
    {
        cell.fetch_add(n, Relaxed);
    }
}

fn kind_number(kind: Option<&str>) -> usize {
    let known = kind.and_then(|kind| KINDS.iter().position(|known| *known == kind));
    known.unwrap_or(UNKNOWN)
}

impl EventSink for Tap {
    fn apply(&mut self, batch: &Batch<'_>) {
        let stats = self.slot.lock().as_mut().map(|writer| {
            writer.apply(batch);
            writer.stats()
        });
        if let Some(stats) = stats {
            self.count(stats, batch);
        }
    }

    fn reset(&mut self) {
        if let Some(writer) = self.slot.lock().as_mut() {
            writer.reset();
        }
        self.kinds = [None; MAX_GROUPS];
    }

    fn set_state(&mut self, state: StreamState) {
        if let Some(writer) = self.slot.lock().as_mut() {
            writer.set_state(state);
        }
    }

    fn is_gone(&self) -> bool {
        self.slot.lock().is_none()
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        self.slot.lock().take();
    }
}
