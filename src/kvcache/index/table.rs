//! All runs, the tables that find them, and the columns of the endpoints. One lock's content.

use std::collections::VecDeque;

use hashbrown::HashMap;

use super::run::{Expected, Plane, Run};
use super::tier::{MAX_TIERS, SPECULATIVE};
use crate::kvcache::block::BlockKey;
use crate::kvcache::events::StreamState;

/// Cache groups told apart on one endpoint; engines have a handful.
pub(super) const MAX_GROUPS: u32 = 32;
/// Predictions waiting for their deadline at most; at 2 s each, 32,000 requests a second.
pub(super) const MAX_EXPECTED: usize = 1 << 16;

// Memory at the worst fill: vectors half empty, hash tables just grown (7 in 16 slots used).
/// One block: its key and hash (16, twice), its entry in `by_hash` (17 a slot).
const BLOCK_BYTES: usize = 72;
/// One span (16, twice) and the run's entry in its column (9 a slot).
const SPAN_BYTES: usize = 53;
/// A run beside its blocks: itself (136, twice) and its entry in `heads` (17 a slot).
const RUN_BYTES: usize = 312;
/// One hash an endpoint does not share with the others (25 a slot).
const PRIVATE_BYTES: usize = 58;
/// Stands for the time of the first store where there was none.
pub(super) const PREDICTED: u32 = u32::MAX;
/// Private hashes are looked through for dead ones from this many on.
const FIRST_SWEEP: usize = 1024;

/// A block's place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) run: u32,
    pub(super) offset: u32,
}

/// What one publisher holds: one data-parallel rank of an endpoint.
#[derive(Debug)]
pub(super) struct Column {
    /// Endpoint's dense number.
    endpoint: u32,
    /// Dense groups seen in each tier; a block counts where all of them have it.
    pub(super) groups: [u32; MAX_TIERS],
    /// Tokens per block; 0 until the first dense store.
    pub(super) block_size: u32,
    /// Runs it has spans or predictions in, and when it first stored to each, in seconds since the index
    /// began; [`PREDICTED`] until it did.
    pub(super) runs: HashMap<u32, u32>,
    /// Hashes that mean another block here than in `by_hash`, or are not there.
    private: HashMap<u64, (BlockKey, Place)>,
    sweep_at: usize,
}

/// What a look-up needs of every candidate's column, packed so that thousands lie in a few pages.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Brief {
    pub(super) state: StreamState,
    /// Some tier has several dense groups, so that having one span is not having the block.
    pub(super) many_groups: bool,
}

/// Counters of the table; those below `predictions` only grow.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TableStats {
    /// Estimated memory.
    pub used_bytes: usize,
    /// Distinct blocks.
    pub blocks: usize,
    /// Runs they lie in.
    pub runs: usize,
    /// Publishers with a part in it: ranks of endpoints.
    pub columns: usize,
    /// Predictions that wait for events or their deadline.
    pub predictions: usize,
    /// Runs dropped because the memory bound was reached.
    pub evicted_runs: u64,
    /// Blocks that were in them.
    pub evicted_blocks: u64,
    /// Blocks not taken in because nothing could be dropped for them.
    pub refused_blocks: u64,
    /// Predictions not taken in because too many wait.
    pub refused_predictions: u64,
}

#[derive(Debug)]
pub(super) struct Table {
    pub(super) runs: Vec<Run>,
    pub(super) columns: Vec<Option<Column>>,
    /// In the order of `columns`.
    pub(super) briefs: Vec<Brief>,
    /// Columns of each endpoint; more than one when ranks share an endpoint.
    pub(super) by_endpoint: Vec<smallvec::SmallVec<[u32; 1]>>,
    /// First key of each run.
    pub(super) heads: HashMap<BlockKey, u32>,
    /// Engine hash of each block whose run names one.
    by_hash: HashMap<u64, Place>,
    free_runs: Vec<u32>,
    free_columns: Vec<u32>,
    /// Deadline, run and its generation, oldest first.
    expiry: VecDeque<(u64, u32, u32)>,
    /// Where the clock hand of eviction stands.
    hand: usize,
    blocks: usize,
    spans: usize,
    privates: usize,
    max_bytes: usize,
    idempotent: bool,
    stats: TableStats,
}

/// What became of a removal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Removal {
    /// The column has no such copy.
    Unknown,
    /// Another copy stays, there or in another tier.
    Kept,
    /// The column holds the block no longer.
    Gone,
}

/// How stored blocks are held.
#[derive(Debug, Clone, Copy)]
pub(super) enum Hold<'a> {
    /// A copy in a tier; one hash for each key.
    Copy {
        tier: u8,
        group: u8,
        hashes: &'a [u64],
        /// Now, in seconds since the index began.
        at_s: u32,
    },
    /// A prediction.
    Until(u64),
}

impl Table {
    pub(super) fn new(max_bytes: usize, idempotent: bool) -> Self {
        Self {
            runs: Vec::new(),
            columns: Vec::new(),
            briefs: Vec::new(),
            by_endpoint: Vec::new(),
            heads: HashMap::new(),
            by_hash: HashMap::new(),
            free_runs: Vec::new(),
            free_columns: Vec::new(),
            expiry: VecDeque::new(),
            hand: 0,
            blocks: 0,
            spans: 0,
            privates: 0,
            max_bytes,
            idempotent,
            stats: TableStats::default(),
        }
    }

    pub(super) fn stats(&self) -> TableStats {
        TableStats {
            used_bytes: self.used_bytes(),
            blocks: self.blocks,
            runs: self.heads.len(),
            columns: self.columns.len() - self.free_columns.len(),
            predictions: self.expiry.len(),
            ..self.stats
        }
    }

    pub(super) fn add_column(&mut self, endpoint: u32) -> u32 {
        let column = Column {
            endpoint,
            groups: [0; MAX_TIERS],
            block_size: 0,
            runs: HashMap::new(),
            private: HashMap::new(),
            sweep_at: FIRST_SWEEP,
        };
        let id = self.free_columns.pop().unwrap_or_else(|| {
            self.columns.push(None);
            self.briefs.push(Brief::default());
            short(self.columns.len() - 1)
        });
        if let Some(slot) = self.columns.get_mut(id as usize) {
            *slot = Some(column);
        }
        let endpoint = endpoint as usize;
        if self.by_endpoint.len() <= endpoint {
            self.by_endpoint.resize_with(endpoint + 1, Default::default);
        }
        if let Some(columns) = self.by_endpoint.get_mut(endpoint) {
            columns.push(id);
        }
        id
    }

    pub(super) fn drop_column(&mut self, id: u32) {
        self.clear(id);
        self.set_state(id, StreamState::Down);
        let Some(column) = self.columns.get_mut(id as usize).and_then(Option::take) else {
            return;
        };
        if let Some(columns) = self.by_endpoint.get_mut(column.endpoint as usize) {
            columns.retain(|other| *other != id);
        }
        self.free_columns.push(id);
    }

    pub(super) fn set_state(&mut self, id: u32, state: StreamState) {
        if let Some(brief) = self.briefs.get_mut(id as usize) {
            brief.state = state;
        }
    }

    /// Blocks of the plane's tier need a copy in its group from now on.
    pub(super) fn add_group(&mut self, plane: Plane) {
        self.change_groups(plane.column, |groups| {
            if let Some(groups) = groups.get_mut(usize::from(plane.tier)) {
                *groups |= 1 << plane.group;
            }
        });
    }

    /// The group turned out not to be dense: blocks need no copy in it.
    pub(super) fn drop_group(&mut self, id: u32, group: u8) {
        self.change_groups(id, |groups| {
            for groups in groups {
                *groups &= !(1 << group);
            }
        });
    }

    fn change_groups(&mut self, id: u32, change: impl FnOnce(&mut [u32; MAX_TIERS])) {
        let column = self.columns.get_mut(id as usize).and_then(Option::as_mut);
        let (Some(column), Some(brief)) = (column, self.briefs.get_mut(id as usize)) else {
            return;
        };
        change(&mut column.groups);
        brief.many_groups = column.groups.iter().any(|groups| groups.count_ones() > 1);
    }

    pub(super) fn column(&mut self, id: u32) -> Option<&mut Column> {
        self.columns.get_mut(id as usize)?.as_mut()
    }

    /// Forgets what the column holds. Cost: its runs, whatever the size of the table.
    pub(super) fn clear(&mut self, id: u32) {
        let Some(column) = self.column(id) else {
            return;
        };
        let runs = std::mem::take(&mut column.runs);
        let privates = std::mem::take(&mut column.private).len();
        column.block_size = 0;
        column.sweep_at = FIRST_SWEEP;
        self.privates -= privates;
        self.change_groups(id, |groups| *groups = [0; MAX_TIERS]);
        for run in runs.into_keys() {
            self.change(run, |run| run.clear(id));
            self.trim(run);
        }
    }

    /// Where a hash of the column's engine stands, if the column holds the block.
    pub(super) fn resolve(&self, id: u32, hash: u64) -> Option<Place> {
        let column = self.columns.get(id as usize)?.as_ref()?;
        let place = match column.private.get(&hash) {
            Some((key, place)) if self.key(*place) == Some(*key) => *place,
            _ => *self.by_hash.get(&hash)?,
        };
        self.holds(id, place).then_some(place)
    }

    pub(super) fn key(&self, place: Place) -> Option<BlockKey> {
        let run = self.runs.get(place.run as usize)?;
        run.keys.get(place.offset as usize).copied()
    }

    fn holds(&self, id: u32, place: Place) -> bool {
        let run = self.runs.get(place.run as usize);
        run.is_some_and(|run| run.holds(id, place.offset))
    }

    /// Stores `keys`, which follow the block at `parent`. Blocks beyond the memory bound are refused
    /// from the tail.
    pub(super) fn store(
        &mut self,
        id: u32,
        parent: Option<Place>,
        keys: &[BlockKey],
        hold: Hold<'_>,
    ) {
        let mut at = parent;
        let mut done = 0;
        while let Some(&next) = keys.get(done) {
            let rest = keys.get(done..).unwrap_or_default();
            let Some(place) = self.find(at, next).or_else(|| self.append(at, rest)) else {
                self.stats.refused_blocks += rest.len() as u64;
                return;
            };
            let Some(run) = self.runs.get(place.run as usize) else {
                return;
            };
            let n = run.common(place.offset as usize, rest);
            if n == 0 {
                return;
            }
            self.hold(id, place, n, done, hold);
            done += n;
            at = Some(Place {
                run: place.run,
                offset: place.offset + short(n) - 1,
            });
        }
    }

    /// One more copy of a known block.
    pub(super) fn add_copy(&mut self, plane: Plane, place: Place) {
        let idempotent = self.idempotent;
        self.change(place.run, |run| {
            run.store(plane, place.offset, place.offset + 1, idempotent);
        });
    }

    /// One copy less.
    pub(super) fn remove(&mut self, plane: Plane, hash: u64) -> Removal {
        let id = plane.column;
        let Some(place) = self.resolve(id, hash) else {
            return Removal::Unknown;
        };
        if !self.change(place.run, |run| run.remove(plane, place.offset)) {
            return Removal::Unknown;
        }
        if self.holds(id, place) {
            Removal::Kept
        } else {
            if let Some(column) = self.column(id)
                && !column.private.is_empty()
                && column.private.remove(&hash).is_some()
            {
                self.privates -= 1;
            }
            self.forget_if_absent(id, place.run);
            self.trim(place.run);
            Removal::Gone
        }
    }

    /// Predicts that the column will hold `keys` until `deadline_ms`.
    pub(super) fn expect(&mut self, id: u32, keys: &[BlockKey], deadline_ms: u64) {
        if self.expiry.len() >= MAX_EXPECTED {
            self.stats.refused_predictions += 1;
            return;
        }
        self.store(id, None, keys, Hold::Until(deadline_ms));
    }

    /// Drops predictions whose deadline has passed. Look-ups leave them out by themselves; this frees
    /// their memory.
    pub(super) fn expire(&mut self, now_ms: u64) {
        while let Some(&(deadline, run, generation)) = self.expiry.front()
            && deadline <= now_ms
        {
            self.expiry.pop_front();
            let Some(expired) = self.runs.get_mut(run as usize) else {
                continue;
            };
            if expired.generation != generation {
                continue;
            }
            let mut columns: smallvec::SmallVec<[u32; 4]> = smallvec::SmallVec::new();
            expired.expected.retain(|expected| {
                let live = expected.deadline_ms > now_ms;
                if !live {
                    columns.push(expected.column);
                }
                live
            });
            for column in columns {
                self.forget_if_absent(column, run);
            }
            self.trim(run);
        }
    }

    /// The place of the key behind `at`, or at the start of a prompt.
    fn find(&self, at: Option<Place>, key: BlockKey) -> Option<Place> {
        if let Some(at) = at {
            let next = Place {
                run: at.run,
                offset: at.offset + 1,
            };
            if self.key(next) == Some(key) {
                return Some(next);
            }
        }
        let run = *self.heads.get(&key)?;
        Some(Place { run, offset: 0 })
    }

    /// Makes room for the unknown keys at the front of `keys`: behind `at` if that is the end of its
    /// run, else in a run of their own. Stops before a key that is known as the head of a run.
    fn append(&mut self, at: Option<Place>, keys: &[BlockKey]) -> Option<Place> {
        let known = |key: &BlockKey| self.heads.contains_key(key);
        let n = keys.iter().position(known).unwrap_or(keys.len());
        let n = self.make_room(n, at.map(|at| at.run))?;
        let keys = keys.get(..n)?;
        let end = at.filter(|at| {
            let run = self.runs.get(at.run as usize);
            run.is_some_and(|run| run.keys.len() == at.offset as usize + 1)
        });
        let place = match end {
            Some(at) => Place {
                run: at.run,
                offset: at.offset + 1,
            },
            None => Place {
                run: self.new_run(at, *keys.first()?),
                offset: 0,
            },
        };
        let run = self.runs.get_mut(place.run as usize)?;
        run.keys.extend_from_slice(keys);
        run.hashes.resize(run.keys.len(), 0);
        self.blocks += n;
        Some(place)
    }

    fn new_run(&mut self, at: Option<Place>, head: BlockKey) -> u32 {
        let parent = at.and_then(|at| {
            let parent = self.runs.get_mut(at.run as usize)?;
            parent.children += 1;
            Some((at.run, parent.generation))
        });
        let id = self.free_runs.pop().unwrap_or_else(|| {
            self.runs.push(Run::default());
            short(self.runs.len() - 1)
        });
        if let Some(run) = self.runs.get_mut(id as usize) {
            run.parent = parent;
        }
        self.heads.insert(head, id);
        id
    }

    /// Marks `n` blocks from `place` on as held; the first is number `done` of the store.
    fn hold(&mut self, id: u32, place: Place, n: usize, done: usize, hold: Hold<'_>) {
        let (start, end) = (place.offset, place.offset + short(n));
        if let Some(column) = self.column(id) {
            let since = column.runs.entry(place.run).or_insert(PREDICTED);
            if let Hold::Copy { at_s, .. } = hold
                && *since == PREDICTED
            {
                *since = at_s;
            }
        }
        match hold {
            Hold::Copy {
                tier,
                group,
                hashes,
                at_s: _,
            } => {
                let plane = Plane {
                    column: id,
                    tier,
                    group,
                };
                let idempotent = self.idempotent;
                self.change(place.run, |run| {
                    run.referenced = true;
                    run.store(plane, start, end, idempotent);
                    if !run.expected.is_empty() {
                        run.confirm(id, start, end);
                    }
                });
                // Held first: a name that moves here may empty the run it moves from.
                if let Some(hashes) = hashes.get(done..done + n) {
                    self.name(id, place, hashes);
                }
            }
            Hold::Until(deadline_ms) => {
                let Some(run) = self.runs.get_mut(place.run as usize) else {
                    return;
                };
                run.referenced = true;
                run.expect(Expected {
                    column: id,
                    start,
                    end,
                    deadline_ms,
                });
                let generation = run.generation;
                self.expiry.push_back((deadline_ms, place.run, generation));
            }
        }
    }

    /// Notes what the column's engine calls the blocks from `place` on.
    fn name(&mut self, id: u32, place: Place, hashes: &[u64]) {
        let first = place.offset as usize;
        let named = |table: &Self, i: usize, n: usize| {
            let run = table.runs.get(place.run as usize);
            run.and_then(|run| run.hashes.get(first + i..first + i + n)) == hashes.get(i..i + n)
        };
        let private = self.column(id).is_some_and(|c| !c.private.is_empty());
        if !private && named(self, 0, hashes.len()) {
            return;
        }
        for (i, &hash) in hashes.iter().enumerate() {
            let place = Place {
                run: place.run,
                offset: place.offset + short(i),
            };
            if named(self, i, 1) {
                self.drop_private(id, hash, place);
            } else {
                self.name_one(id, place, hash);
            }
        }
    }

    fn name_one(&mut self, id: u32, place: Place, hash: u64) {
        let (Some(key), previous) = (self.key(place), self.resolve(id, hash)) else {
            return;
        };
        if previous == Some(place) {
            return;
        }
        if let Some(previous) = previous {
            self.leave(id, previous);
        }
        let run = self.runs.get_mut(place.run as usize);
        let own = run.and_then(|run| run.hashes.get_mut(place.offset as usize));
        if let Some(own) = own
            && *own == 0
            && hash != 0
            && !self.by_hash.contains_key(&hash)
        {
            *own = hash;
            self.by_hash.insert(hash, place);
            self.drop_private(id, hash, place);
            return;
        }
        self.sweep_private(id);
        if let Some(column) = self.column(id)
            && column.private.insert(hash, (key, place)).is_none()
        {
            self.privates += 1;
        }
    }

    /// The hash means the same here as for everybody else; what it meant before is given up.
    fn drop_private(&mut self, id: u32, hash: u64, place: Place) {
        let Some((key, old)) = self.column(id).and_then(|c| c.private.remove(&hash)) else {
            return;
        };
        self.privates -= 1;
        if old != place && self.key(old) == Some(key) {
            self.leave(id, old);
        }
    }

    /// The column's engine gave the block's hash to another block: the copies can no longer be named.
    fn leave(&mut self, id: u32, place: Place) {
        self.change(place.run, |run| {
            let planes: smallvec::SmallVec<[Plane; 4]> = run
                .of_column(id)
                .iter()
                .map(super::run::Span::plane)
                .collect();
            for plane in planes {
                while run.remove(plane, place.offset) {}
            }
        });
        self.forget_if_absent(id, place.run);
        self.trim(place.run);
    }

    /// Drops private hashes of blocks the column no longer holds; amortised O(1) a hash.
    fn sweep_private(&mut self, id: u32) {
        let Some(column) = self.column(id) else {
            return;
        };
        if column.private.len() < column.sweep_at {
            return;
        }
        let mut private = std::mem::take(&mut column.private);
        let before = private.len();
        private.retain(|_, (key, place)| self.key(*place) == Some(*key) && self.holds(id, *place));
        self.privates -= before - private.len();
        if let Some(column) = self.column(id) {
            column.sweep_at = (2 * private.len()).max(FIRST_SWEEP);
            column.private = private;
        }
    }

    /// Changes a run's spans and keeps their number.
    fn change<R: Default>(&mut self, run: u32, change: impl FnOnce(&mut Run) -> R) -> R {
        let Some(run) = self.runs.get_mut(run as usize) else {
            return R::default();
        };
        self.spans -= run.spans.len();
        let result = change(run);
        self.spans += run.spans.len();
        result
    }

    fn forget_if_absent(&mut self, column: u32, run: u32) {
        let lacks = self
            .runs
            .get(run as usize)
            .is_some_and(|run| run.lacks(column));
        if lacks && let Some(column) = self.column(column) {
            column.runs.remove(&run);
        }
    }

    /// Cuts the blocks nobody holds off the end of a run; frees it when none is left.
    fn trim(&mut self, id: u32) {
        let Some(run) = self.runs.get_mut(id as usize) else {
            return;
        };
        let held = run.held();
        if held >= run.keys.len() {
            return;
        }
        if held == 0 {
            self.free(id);
            return;
        }
        self.blocks -= run.keys.len() - held;
        for hash in run.hashes.get(held..).unwrap_or_default() {
            if *hash != 0 {
                self.by_hash.remove(hash);
            }
        }
        run.truncate(held);
    }

    fn free(&mut self, id: u32) {
        let Some(slot) = self.runs.get_mut(id as usize) else {
            return;
        };
        let run = std::mem::take(slot);
        slot.generation = run.generation.wrapping_add(1);
        if let Some(head) = run.keys.first() {
            self.heads.remove(head);
        }
        for hash in run.hashes.iter().filter(|hash| **hash != 0) {
            self.by_hash.remove(hash);
        }
        self.blocks -= run.keys.len();
        self.spans -= run.spans.len();
        let spans = run.spans.iter().map(|span| span.column);
        for column in spans.chain(run.expected.iter().map(|e| e.column)) {
            if let Some(column) = self.column(column) {
                column.runs.remove(&id);
            }
        }
        if let Some((parent, generation)) = run.parent
            && let Some(parent) = self.runs.get_mut(parent as usize)
            && parent.generation == generation
        {
            parent.children = parent.children.saturating_sub(1);
        }
        self.free_runs.push(id);
    }

    fn used_bytes(&self) -> usize {
        self.blocks * BLOCK_BYTES
            + self.spans * SPAN_BYTES
            + self.heads.len() * RUN_BYTES
            + self.privates * PRIVATE_BYTES
    }

    /// Evicts until `n` blocks fit, or as many of them as can; `None` when not even one does. `pinned`
    /// stays.
    fn make_room(&mut self, n: usize, pinned: Option<u32>) -> Option<usize> {
        let need = |n: usize| n * BLOCK_BYTES + RUN_BYTES + SPAN_BYTES;
        while self.used_bytes() + need(n) > self.max_bytes {
            if !self.evict(pinned) {
                break;
            }
        }
        let left = self.max_bytes.saturating_sub(self.used_bytes());
        let fits = left.saturating_sub(need(0)) / BLOCK_BYTES;
        (fits > 0).then_some(n.min(fits))
    }

    /// Drops the next run the clock hand finds that was not stored to since it came by last, ends of
    /// prompts first.
    fn evict(&mut self, pinned: Option<u32>) -> bool {
        let n = self.runs.len();
        for step in 0..3 * n {
            let id = self.hand;
            self.hand = (id + 1) % n.max(1);
            let Some(run) = self.runs.get_mut(id) else {
                continue;
            };
            let id = short(id);
            if run.keys.is_empty() || pinned == Some(id) {
                continue;
            }
            let spared = std::mem::take(&mut run.referenced) || run.children > 0;
            if spared && step < 2 * n {
                continue;
            }
            self.stats.evicted_blocks += run.keys.len() as u64;
            self.free(id);
            self.stats.evicted_runs += 1;
            return true;
        }
        false
    }
}

/// Numbers of runs, columns and offsets fit 32 bits long after memory has run out.
pub(super) fn short(n: usize) -> u32 {
    u32::try_from(n).unwrap_or(u32::MAX)
}

const _: () = assert!((SPECULATIVE as usize) < MAX_TIERS);
