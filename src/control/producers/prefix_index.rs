//! The approximate prefix index: which endpoints were sent which block hashes.
//!
//! A block hash stands for its whole prefix, so one entry per hash with the endpoints that hold it
//! stores a shared prefix once. Entries live in `SHARDS` tables; consecutive runs of
//! `SEGMENT_BLOCKS` of a chain share a shard, so that a walk takes few locks. Lookups and refreshes
//! take a shard's read lock for well under a microsecond; only blocks new to an endpoint write.
//!
//! A walk looks at the last block of each segment: whoever was sent that one was sent the whole chain
//! before it, and its engine used those blocks no earlier. Only the segment in which an endpoint drops
//! out is walked block by block.
//!
//! Recency is a clock per endpoint that ticks when a block enters, or returns to, the younger half
//! of its capacity. A holder is live while its stamp is less than `capacity` ticks old, so an
//! endpoint never has more than `capacity` live blocks, exactly, and the least recently sent go
//! first, up to half a capacity of slack. Dead holders are removed when a shard fills up.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};

use arc_swap::ArcSwap;
use hashbrown::HashTable;
use parking_lot::RwLock;
use smallvec::SmallVec;

/// Tables, each with a lock of its own.
const SHARDS: usize = 64;
/// Consecutive blocks of a chain that share a shard.
const SEGMENT_BLOCKS: usize = 64;
/// Bytes of an entry: key, holders, and the table's control byte, at the table's load of 7/8.
const ENTRY_BYTES: usize = 40;
/// Bytes of a holder past the first one of an entry.
const EXTRA_HOLDER_BYTES: usize = 8;

/// Default bound on the whole index.
pub const DEFAULT_BUDGET_BYTES: usize = 64 << 20;

/// Index of block hashes by endpoint.
#[derive(Debug)]
pub struct PrefixIndex {
    shards: Vec<RwLock<Shard>>,
    clocks: ArcSwap<Vec<Arc<EndpointClock>>>,
    /// Bytes a shard may use before it is swept.
    shard_budget: usize,
    entries: AtomicUsize,
}

/// Recency of one endpoint index.
#[derive(Debug)]
struct EndpointClock {
    now: AtomicU32,
    capacity: AtomicU32,
}

#[derive(Debug, Default)]
struct Shard {
    table: HashTable<Entry>,
    extra_holders: usize,
}

#[derive(Debug)]
struct Entry {
    hash: u64,
    /// Sorted by endpoint; never empty.
    holders: SmallVec<[Holder; 2]>,
}

#[derive(Debug)]
struct Holder {
    endpoint: u32,
    stamp: AtomicU32,
}

impl EndpointClock {
    fn age(&self, stamp: u32) -> u32 {
        self.now.load(Ordering::Relaxed).wrapping_sub(stamp)
    }

    fn capacity(&self) -> u32 {
        self.capacity.load(Ordering::Relaxed)
    }

    fn tick(&self) -> u32 {
        self.now.fetch_add(1, Ordering::Relaxed).wrapping_add(1)
    }
}

/// Buffers of a walk; reused between lookups.
#[derive(Debug, Default)]
pub struct WalkScratch {
    alive: Vec<Walker>,
    dropping: Vec<Walker>,
    found: Vec<Found>,
}

/// What an endpoint holds of a chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Found {
    /// The endpoint.
    pub endpoint: u32,
    /// Consecutive blocks from the first.
    pub blocks: u32,
    /// Leading ones, in whole segments, that need no refreshing when the chain is sent there again.
    pub young: u32,
}

/// An endpoint that holds every block so far, with its clock as of the start of the walk.
#[derive(Debug, Clone, Copy)]
struct Walker {
    endpoint: u32,
    now: u32,
    capacity: u32,
    /// Leading blocks of segments whose last block is in the younger half.
    young: u32,
    all_young: bool,
}

impl Walker {
    fn new(endpoint: u32, clocks: &[Arc<EndpointClock>]) -> Option<Self> {
        let clock = clocks.get(endpoint as usize)?;
        Some(Self {
            endpoint,
            now: clock.now.load(Ordering::Relaxed),
            capacity: clock.capacity(),
            young: 0,
            all_young: true,
        })
    }

    /// Age of its holder in an entry, while that is live.
    fn age(&self, holders: &[Holder]) -> Option<u32> {
        let at = holders.binary_search_by_key(&self.endpoint, |h| h.endpoint);
        let holder = holders.get(at.ok()?)?;
        let age = self.now.wrapping_sub(holder.stamp.load(Ordering::Relaxed));
        (age < self.capacity).then_some(age)
    }

    /// It holds a segment of `blocks`, whose last one is `age` old.
    fn pass(&mut self, blocks: u32, age: u32) {
        self.all_young &= age < self.capacity / 2;
        if self.all_young {
            self.young += blocks;
        }
    }

    fn found(&self, depth: u32) -> Found {
        Found {
            endpoint: self.endpoint,
            blocks: depth,
            young: self.young,
        }
    }
}

impl PrefixIndex {
    /// An empty index that uses at most about `budget_bytes`.
    pub fn new(budget_bytes: usize) -> Self {
        Self {
            shards: (0..SHARDS).map(|_| RwLock::default()).collect(),
            clocks: ArcSwap::default(),
            shard_budget: (budget_bytes / SHARDS).max(ENTRY_BYTES * 16),
            entries: AtomicUsize::new(0),
        }
    }

    /// Entries over all shards.
    pub fn len(&self) -> usize {
        self.entries.load(Ordering::Relaxed)
    }

    /// True when nothing is stored.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// How many consecutive blocks of `chain`, from its first, each endpoint holds; endpoints that
    /// hold none are not listed. `chain` must be whole, from a prompt's first block. One walk, whatever
    /// the number of endpoints that do not match; stops when nobody does.
    pub fn match_chain<'s>(&self, chain: &[u64], scratch: &'s mut WalkScratch) -> &'s [Found] {
        let WalkScratch {
            alive,
            dropping,
            found,
        } = scratch;
        alive.clear();
        found.clear();
        let mut depth = 0;
        for segment in chain.chunks(SEGMENT_BLOCKS) {
            let (Some(shard), Some((last, front))) = (self.shard(segment), segment.split_last())
            else {
                break;
            };
            let shard = shard.read();
            let holders = shard.holders(*last);
            if depth == 0 {
                let first = front.first().map(|hash| shard.holders(*hash));
                self.begin_walk(first.unwrap_or_default(), holders, alive);
            }
            let blocks = u32::try_from(segment.len()).unwrap_or(u32::MAX);
            dropping.clear();
            alive.retain_mut(|walker| {
                let age = walker.age(holders);
                match age {
                    Some(age) => walker.pass(blocks, age),
                    None => dropping.push(*walker),
                }
                age.is_some()
            });
            shard.walk_blocks(front, depth, dropping, found);
            if alive.is_empty() {
                return found;
            }
            depth += blocks;
        }
        found.extend(alive.iter().map(|walker| walker.found(depth)));
        found
    }

    /// Everyone who holds the first block or the last one of the first segment starts.
    fn begin_walk(&self, first: &[Holder], last: &[Holder], alive: &mut Vec<Walker>) {
        let clocks = self.clocks.load();
        let start = |holder: &Holder| Walker::new(holder.endpoint, &clocks);
        alive.extend(first.iter().filter_map(start));
        let known = |holder: &&Holder| {
            first
                .binary_search_by_key(&holder.endpoint, |h| h.endpoint)
                .is_err()
        };
        alive.extend(last.iter().filter(known).filter_map(start));
    }

    /// Records that `endpoint` was sent `chain`, of which the first `young` blocks need no refreshing
    /// ([`Found::young`]), and that it keeps `capacity` blocks; those of a longer chain that it cannot keep are
    /// left out. Nothing is recorded once `is_gone` says so; it is asked under the lock that [`Self::forget`]
    /// takes.
    pub fn insert(
        &self,
        endpoint: u32,
        chain: &[u64],
        young: u32,
        capacity: u32,
        is_gone: impl Fn() -> bool,
    ) {
        let capacity = capacity.max(1);
        let clock = self.clock(endpoint);
        clock.capacity.store(capacity, Ordering::Relaxed);
        let end = chain.len().min(capacity as usize);
        let new = chain.get(young as usize..end).unwrap_or_default();
        // Tail first: the head ends up youngest, as engines evict tails before heads.
        for segment in new.chunks(SEGMENT_BLOCKS).rev() {
            let Some(shard) = self.shard(segment) else {
                return;
            };
            if shard.read().refresh(endpoint, &clock, segment) {
                continue;
            }
            let mut shard = shard.write();
            if is_gone() {
                return;
            }
            let before = shard.table.len();
            shard.add(endpoint, &clock, segment);
            if shard.bytes() > self.shard_budget {
                shard.sweep(&self.clocks.load(), self.shard_budget);
            }
            let after = shard.table.len();
            drop(shard);
            self.entries.fetch_add(after, Ordering::Relaxed);
            self.entries.fetch_sub(before, Ordering::Relaxed);
        }
    }

    /// Removes everything recorded for `endpoint`. O(index).
    pub fn forget(&self, endpoint: u32) {
        for shard in &self.shards {
            let mut shard = shard.write();
            let before = shard.table.len();
            shard.retain(|holder| holder.endpoint != endpoint);
            self.entries
                .fetch_sub(before - shard.table.len(), Ordering::Relaxed);
        }
    }

    fn shard(&self, segment: &[u64]) -> Option<&RwLock<Shard>> {
        // The table uses the low and the top seven bits of a hash; take others.
        let first = *segment.first()?;
        self.shards.get((first >> 32) as usize % SHARDS)
    }

    fn clock(&self, endpoint: u32) -> Arc<EndpointClock> {
        let position = endpoint as usize;
        if let Some(clock) = self.clocks.load().get(position) {
            return Arc::clone(clock);
        }
        let new = || {
            Arc::new(EndpointClock {
                now: AtomicU32::new(0),
                capacity: AtomicU32::new(1),
            })
        };
        self.clocks.rcu(|clocks| {
            let mut clocks = Vec::clone(clocks);
            while clocks.len() <= position {
                clocks.push(new());
            }
            clocks
        });
        self.clocks
            .load()
            .get(position)
            .map_or_else(new, Arc::clone)
    }
}

impl Shard {
    fn bytes(&self) -> usize {
        self.table.capacity() * ENTRY_BYTES + self.extra_holders * EXTRA_HOLDER_BYTES
    }

    /// Who holds the block `hash`, by endpoint.
    fn holders(&self, hash: u64) -> &[Holder] {
        let entry = self.table.find(hash, |entry| entry.hash == hash);
        entry.map(|e| e.holders.as_slice()).unwrap_or_default()
    }

    /// Finds out where in a segment, whose last block is not in `front`, each of `walkers` drops out.
    fn walk_blocks(
        &self,
        front: &[u64],
        mut depth: u32,
        walkers: &mut Vec<Walker>,
        found: &mut Vec<Found>,
    ) {
        let mut drop_out = |walker: &Walker, depth: u32| {
            if depth > 0 {
                found.push(walker.found(depth));
            }
        };
        for hash in front {
            if walkers.is_empty() {
                return;
            }
            let holders = self.holders(*hash);
            walkers.retain(|walker| {
                let stays = walker.age(holders).is_some();
                if !stays {
                    drop_out(walker, depth);
                }
                stays
            });
            depth += 1;
        }
        for walker in walkers.iter() {
            drop_out(walker, depth);
        }
    }

    /// Refreshes the stamps of `segment`; false when the endpoint lacks one of its blocks.
    fn refresh(&self, endpoint: u32, clock: &EndpointClock, segment: &[u64]) -> bool {
        segment.iter().rev().all(|hash| {
            let entry = self.table.find(*hash, |entry| entry.hash == *hash);
            let holder = entry.and_then(|entry| {
                let at = entry
                    .holders
                    .binary_search_by_key(&endpoint, |h| h.endpoint)
                    .ok()?;
                entry.holders.get(at)
            });
            holder.map(|holder| touch(holder, clock)).is_some()
        })
    }

    fn add(&mut self, endpoint: u32, clock: &EndpointClock, segment: &[u64]) {
        for hash in segment.iter().rev() {
            let entry = self
                .table
                .entry(*hash, |entry| entry.hash == *hash, |entry| entry.hash);
            let entry = entry
                .or_insert_with(|| Entry {
                    hash: *hash,
                    holders: SmallVec::new(),
                })
                .into_mut();
            match entry
                .holders
                .binary_search_by_key(&endpoint, |h| h.endpoint)
            {
                Ok(at) => {
                    if let Some(holder) = entry.holders.get(at) {
                        touch(holder, clock);
                    }
                }
                Err(at) => {
                    if !entry.holders.is_empty() {
                        self.extra_holders += 1;
                    }
                    entry.holders.insert(
                        at,
                        Holder {
                            endpoint,
                            stamp: AtomicU32::new(clock.tick()),
                        },
                    );
                }
            }
        }
    }

    /// Makes room: removes dead holders, then ever younger ones, until a quarter of the budget is
    /// free. Amortised over the insertions that filled it.
    fn sweep(&mut self, clocks: &[Arc<EndpointClock>], budget: usize) {
        let mut share = 1.0;
        while share > 0.01 {
            self.retain(|holder| {
                clocks.get(holder.endpoint as usize).is_some_and(|clock| {
                    let age = clock.age(holder.stamp.load(Ordering::Relaxed));
                    f64::from(age) < f64::from(clock.capacity()) * share
                })
            });
            self.table.shrink_to_fit(|entry| entry.hash);
            let used = self.table.len() * ENTRY_BYTES + self.extra_holders * EXTRA_HOLDER_BYTES;
            if used <= budget / 4 * 3 && self.bytes() <= budget {
                return;
            }
            share *= 0.75;
        }
        self.table.clear();
        self.table.shrink_to_fit(|entry| entry.hash);
        self.extra_holders = 0;
    }

    fn retain(&mut self, keep: impl Fn(&Holder) -> bool) {
        let mut extra = 0;
        self.table.retain(|entry| {
            entry.holders.retain(|holder| keep(holder));
            extra += entry.holders.len().saturating_sub(1);
            !entry.holders.is_empty()
        });
        self.extra_holders = extra;
    }
}

/// A block in the older half moves to the front; a young one is left alone, which saves the write.
fn touch(holder: &Holder, clock: &EndpointClock) {
    if clock.age(holder.stamp.load(Ordering::Relaxed)) >= clock.capacity() / 2 {
        holder.stamp.store(clock.tick(), Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A chain of `n` blocks whose hashes follow from `root`.
    fn chain(root: u64, n: usize) -> Vec<u64> {
        let mut rng = fastrand::Rng::with_seed(root);
        (0..n).map(|_| rng.u64(..)).collect()
    }

    fn matched(index: &PrefixIndex, chain: &[u64], endpoints: usize) -> Vec<u32> {
        let mut matched = vec![0; endpoints];
        for found in index.match_chain(chain, &mut WalkScratch::default()) {
            matched[found.endpoint as usize] = found.blocks;
        }
        matched
    }

    fn insert(index: &PrefixIndex, endpoint: u32, chain: &[u64], capacity: u32) {
        index.insert(endpoint, chain, 0, capacity, || false);
    }

    #[test]
    fn the_longest_consecutive_prefix_counts() {
        let index = PrefixIndex::new(DEFAULT_BUDGET_BYTES);
        let blocks = chain(1, 200);
        insert(&index, 0, &blocks[..150], 1000);
        insert(&index, 2, &blocks, 1000);
        insert(&index, 1, &blocks[..1], 1000);
        assert_eq!(matched(&index, &blocks, 4), [150, 1, 200, 0]);
        assert_eq!(matched(&index, &chain(2, 5), 3), [0, 0, 0]);
        assert_eq!(index.len(), 200, "shared blocks are stored once");
    }

    #[test]
    fn only_segments_in_the_older_half_need_refreshing() {
        let index = PrefixIndex::new(DEFAULT_BUDGET_BYTES);
        let young = |chain: &[u64]| index.match_chain(chain, &mut WalkScratch::default())[0].young;
        let blocks = chain(8, 10);
        insert(&index, 0, &blocks, 40);
        // Ticks 1 to 10, the tail first: the tail is 9 ticks old.
        assert_eq!(young(&blocks), 10);
        // 15 ticks later it is 24 old, over half of 40.
        insert(&index, 0, &chain(9, 15), 40);
        assert_eq!(young(&blocks), 0);
        // Sent again, the blocks of 20 ticks and more move to the front: 5 to 9, at ticks 30 to 26.
        insert(&index, 0, &blocks, 40);
        assert_eq!(young(&blocks), 10);
    }

    #[test]
    fn a_prefix_lives_as_long_as_a_chain_through_it_is_used() {
        let index = PrefixIndex::new(DEFAULT_BUDGET_BYTES);
        let shared = chain(20, 10);
        let session = |i: u64| [shared.clone(), chain(100 + i, 54)].concat();
        // Each session is told only what is not young, as a pick does; 40 of them are 2,560 blocks.
        for round in 0..200 {
            let blocks = session(round % 40);
            let found = index
                .match_chain(&blocks, &mut WalkScratch::default())
                .first()
                .copied();
            let young = found.map_or(0, |f| f.young);
            index.insert(0, &blocks, young, 3000, || false);
            assert_eq!(
                matched(&index, &session(1000 + round), 1),
                [10],
                "round {round}"
            );
        }
    }

    #[test]
    fn endpoints_drop_out_in_any_segment() {
        let index = PrefixIndex::new(DEFAULT_BUDGET_BYTES);
        let blocks = chain(3, 300);
        let lengths = [0, 1, 63, 64, 65, 127, 128, 129, 299, 300];
        for (endpoint, length) in (0..).zip(lengths) {
            insert(&index, endpoint, &blocks[..length], 1000);
        }
        let wanted: Vec<u32> = lengths.map(|n| u32::try_from(n).unwrap()).to_vec();
        assert_eq!(matched(&index, &blocks, lengths.len()), wanted);
    }

    #[test]
    fn an_endpoint_keeps_at_most_its_capacity_and_forgets_the_oldest() {
        let index = PrefixIndex::new(DEFAULT_BUDGET_BYTES);
        let chains: Vec<_> = (0..10).map(|i| chain(i + 10, 10)).collect();
        for blocks in &chains {
            insert(&index, 0, blocks, 50);
        }
        let held: Vec<u32> = chains.iter().map(|c| matched(&index, c, 1)[0]).collect();
        assert_eq!(held, [0, 0, 0, 0, 0, 10, 10, 10, 10, 10]);
        // Chain 5 is the oldest; used again, it outlives chain 6.
        insert(&index, 0, &chains[5], 50);
        insert(&index, 0, &chain(99, 10), 50);
        assert_eq!(matched(&index, &chains[5], 1), [10]);
        assert_eq!(matched(&index, &chains[6], 1), [0]);
    }

    #[test]
    fn a_chain_loses_its_tail_before_its_head() {
        let index = PrefixIndex::new(DEFAULT_BUDGET_BYTES);
        let blocks = chain(4, 10);
        insert(&index, 0, &blocks, 12);
        insert(&index, 0, &chain(5, 6), 12);
        // 16 blocks into 12: the four oldest are the last four of the first chain.
        assert_eq!(matched(&index, &blocks, 1), [6]);
    }

    #[test]
    fn a_chain_longer_than_the_capacity_leaves_its_tail_out() {
        let index = PrefixIndex::new(DEFAULT_BUDGET_BYTES);
        let blocks = chain(7, 1000);
        for _ in 0..2 {
            insert(&index, 0, &blocks, 100);
            assert_eq!(matched(&index, &blocks, 1), [100]);
            assert_eq!(index.len(), 100);
        }
    }

    #[test]
    fn a_removed_endpoint_is_forgotten_and_cannot_come_back_late() {
        let index = PrefixIndex::new(DEFAULT_BUDGET_BYTES);
        let blocks = chain(6, 100);
        insert(&index, 0, &blocks, 1000);
        insert(&index, 1, &blocks[..40], 1000);
        index.forget(0);
        assert_eq!(matched(&index, &blocks, 2), [0, 40]);
        assert_eq!(index.len(), 40);
        index.insert(0, &blocks, 0, 1000, || true);
        assert_eq!(matched(&index, &blocks, 2), [0, 40]);
    }

    #[test]
    fn the_budget_holds_and_the_youngest_stay() {
        let budget = 1 << 20;
        let index = PrefixIndex::new(budget);
        for i in 0..2000 {
            insert(
                &index,
                u32::try_from(i % 8).unwrap(),
                &chain(i, 100),
                u32::MAX,
            );
        }
        let used: usize = index.shards.iter().map(|s| s.read().bytes()).sum();
        assert!(used <= budget, "{used}");
        assert!(index.len() > budget / ENTRY_BYTES / 8, "{}", index.len());
        assert!(index.len() * ENTRY_BYTES <= budget);
        let youngest = matched(&index, &chain(1999, 100), 8);
        assert!(youngest[7] >= 64, "{youngest:?}");
    }

    #[test]
    fn it_agrees_with_a_naive_model() {
        let seed = fastrand::u64(..);
        let mut rng = fastrand::Rng::with_seed(seed);
        let index = PrefixIndex::new(DEFAULT_BUDGET_BYTES);
        let chains: Vec<_> = (0..20).map(|i| chain(seed ^ i, 150)).collect();
        let mut naive: Vec<std::collections::HashSet<u64>> =
            vec![std::collections::HashSet::new(); 6];
        for step in 0..500 {
            let blocks = rng.choice(&chains).unwrap();
            let cut = &blocks[..rng.usize(..=blocks.len())];
            let endpoint = rng.usize(..naive.len());
            match rng.u8(..10) {
                0 => {
                    index.forget(u32::try_from(endpoint).unwrap());
                    naive[endpoint].clear();
                }
                1..=4 => {
                    insert(&index, u32::try_from(endpoint).unwrap(), cut, u32::MAX);
                    naive[endpoint].extend(cut);
                }
                _ => {}
            }
            let wanted: Vec<u32> = naive
                .iter()
                .map(|held| {
                    u32::try_from(blocks.iter().take_while(|b| held.contains(b)).count()).unwrap()
                })
                .collect();
            assert_eq!(
                matched(&index, blocks, naive.len()),
                wanted,
                "seed {seed}, step {step}"
            );
        }
    }
}
