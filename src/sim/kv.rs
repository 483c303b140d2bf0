//! The block pool: prefix caching and eviction as vLLM does them (`vllm/v1/core/block_pool.py`).
//!
//! A block is held by running requests (counted) or free. Free blocks keep their content until they
//! are taken: the free queue is in order of release, a request releases its blocks last to first, so
//! the tail of a prompt is lost before its head, and blocks without content go to the front. A hit takes a free block out of the queue. Several
//! blocks may have the same content; it is lost with the last of them. One block is set aside, as
//! vLLM's null block.
//!
//! A pool that is watched writes down what it stores, loses and clears, in that order.

use std::collections::HashMap;

use smallvec::SmallVec;
use xxhash_rust::xxh3::{xxh3_64, xxh3_64_with_seed};

use super::events::Event;
use super::hash::BlockHash;

const NONE: u32 = u32::MAX;

/// Number of a block.
pub type BlockId = u32;

#[derive(Debug, Clone)]
struct Block {
    hash: Option<BlockHash>,
    /// The next block of the same content.
    copy: u32,
    references: u32,
    previous: u32,
    next: u32,
}

/// All blocks of one engine.
#[derive(Debug)]
pub struct BlockPool {
    blocks: Vec<Block>,
    /// The first block of a content; the others hang on its `copy`.
    cached: HashMap<BlockHash, BlockId>,
    free_head: u32,
    free_tail: u32,
    free: usize,
    /// What happened since it was last taken; `None` when nobody watches.
    log: Option<Vec<Event>>,
}

impl BlockPool {
    /// `count` empty blocks, one of them set aside.
    pub fn new(count: usize) -> Self {
        let count = count.saturating_sub(1);
        let mut pool = Self {
            blocks: Vec::new(),
            cached: HashMap::new(),
            free_head: NONE,
            free_tail: NONE,
            free: 0,
            log: None,
        };
        pool.blocks.resize(
            count,
            Block {
                hash: None,
                copy: NONE,
                references: 0,
                previous: NONE,
                next: NONE,
            },
        );
        for id in (0..).take(count) {
            pool.append_free(id);
        }
        pool
    }

    /// The same, watched from the start.
    pub fn watched(count: usize) -> Self {
        Self {
            log: Some(Vec::new()),
            ..Self::new(count)
        }
    }

    /// True when it writes down what happens.
    pub fn is_watched(&self) -> bool {
        self.log.is_some()
    }

    /// Writes down what the pool cannot know itself: which blocks were filled with what.
    pub fn write_down(&mut self, event: Event) {
        if let Some(log) = &mut self.log {
            log.push(event);
        }
    }

    /// What happened since the last call, in order.
    pub fn take_events(&mut self) -> Vec<Event> {
        self.log.as_mut().map(std::mem::take).unwrap_or_default()
    }

    /// Blocks that no running request holds.
    pub fn free_blocks(&self) -> usize {
        self.free
    }

    /// Share of blocks that running requests hold.
    pub fn usage(&self) -> f64 {
        if self.blocks.is_empty() {
            0.0
        } else {
            1.0 - self.free as f64 / self.blocks.len() as f64
        }
    }

    /// Blocks held by running requests, each counted once however many share it.
    pub fn held_blocks(&self) -> usize {
        self.blocks.len() - self.free
    }

    /// How many blocks of `hashes`, from the first, are cached.
    pub fn cached_prefix(&self, hashes: &[BlockHash]) -> usize {
        hashes
            .iter()
            .take_while(|hash| self.cached.contains_key(hash))
            .count()
    }

    /// Takes the first `hits` cached blocks of `hashes` and `fresh` empty ones; `None`, with nothing
    /// changed, when there are not enough.
    pub fn allocate(
        &mut self,
        hashes: &[BlockHash],
        hits: usize,
        fresh: usize,
    ) -> Option<Vec<BlockId>> {
        let found: Vec<BlockId> = hashes
            .iter()
            .take(hits)
            .filter_map(|h| self.cached.get(h).copied())
            .collect();
        let revived = found
            .iter()
            .filter(|&&id| self.block(id).is_some_and(|b| b.references == 0))
            .count();
        if found.len() < hits || self.free < revived + fresh {
            return None;
        }
        for &id in &found {
            self.hold(id);
        }
        let mut all = found;
        for _ in 0..fresh {
            all.push(self.take_free()?);
        }
        Some(all)
    }

    /// One empty block for further output.
    pub fn extend(&mut self) -> Option<BlockId> {
        self.take_free()
    }

    /// Block `id` now holds the full block `hash`, perhaps as a further copy.
    pub fn fill(&mut self, id: BlockId, hash: BlockHash) {
        let Some(block) = self.blocks.get_mut(id as usize) else {
            return;
        };
        // A second time would leave the first content's entry behind.
        debug_assert!(block.hash.is_none(), "block {id} is filled twice");
        block.hash = Some(hash);
        let Some(mut last) = self.cached.get(&hash).copied() else {
            self.cached.insert(hash, id);
            return;
        };
        while let Some(next) = self
            .block(last)
            .map(|b| b.copy)
            .filter(|&next| next != NONE)
        {
            last = next;
        }
        if let Some(block) = self.blocks.get_mut(last as usize) {
            block.copy = id;
        }
    }

    /// Gives up `blocks` of one request, last first. Those without content are used next, those with
    /// content when all others are.
    pub fn release(&mut self, blocks: &[BlockId]) {
        let mut empty: SmallVec<[BlockId; 4]> = SmallVec::new();
        for &id in blocks.iter().rev() {
            let Some(block) = self.blocks.get_mut(id as usize) else {
                continue;
            };
            block.references = block.references.saturating_sub(1);
            match (block.references, block.hash) {
                (0, None) => empty.push(id),
                (0, Some(_)) => self.append_free(id),
                _ => {}
            }
        }
        empty.iter().rev().for_each(|id| self.prepend_free(*id));
    }

    /// Forgets all content, unless a request holds blocks: then nothing changes, and it says so.
    pub fn reset(&mut self) -> bool {
        if self.held_blocks() > 0 {
            return false;
        }
        self.cached.clear();
        for block in &mut self.blocks {
            (block.hash, block.copy) = (None, NONE);
        }
        // Nothing happens between two clears, so the second says nothing new.
        let said = self
            .log
            .as_ref()
            .is_some_and(|log| log.last() == Some(&Event::Cleared));
        if !said {
            self.write_down(Event::Cleared);
        }
        true
    }

    fn block(&self, id: BlockId) -> Option<&Block> {
        self.blocks.get(id as usize)
    }

    fn hold(&mut self, id: BlockId) {
        if self.block(id).is_some_and(|b| b.references == 0) {
            self.unlink(id);
        }
        if let Some(block) = self.blocks.get_mut(id as usize) {
            block.references += 1;
        }
    }

    fn take_free(&mut self) -> Option<BlockId> {
        let id = self.free_head;
        if id == NONE {
            return None;
        }
        self.hold(id);
        self.forget(id);
        Some(id)
    }

    /// The content of block `id` is gone; its copies stay.
    fn forget(&mut self, id: BlockId) {
        let Some(block) = self.blocks.get_mut(id as usize) else {
            return;
        };
        let next = std::mem::replace(&mut block.copy, NONE);
        let Some(hash) = block.hash.take() else {
            return;
        };
        self.write_down(Event::Removed(hash));
        let first = self.cached.get(&hash).copied();
        if first == Some(id) {
            if next == NONE {
                self.cached.remove(&hash);
            } else {
                self.cached.insert(hash, next);
            }
            return;
        }
        let mut previous = first;
        while let Some(block) = previous.and_then(|at| self.blocks.get_mut(at as usize)) {
            if block.copy == id {
                block.copy = next;
                return;
            }
            previous = Some(block.copy);
        }
    }

    fn append_free(&mut self, id: BlockId) {
        let tail = self.free_tail;
        if let Some(block) = self.blocks.get_mut(id as usize) {
            (block.previous, block.next) = (tail, NONE);
        }
        match self.blocks.get_mut(tail as usize) {
            Some(last) => last.next = id,
            None => self.free_head = id,
        }
        self.free_tail = id;
        self.free += 1;
    }

    fn prepend_free(&mut self, id: BlockId) {
        let head = self.free_head;
        if let Some(block) = self.blocks.get_mut(id as usize) {
            (block.previous, block.next) = (NONE, head);
        }
        match self.blocks.get_mut(head as usize) {
            Some(first) => first.previous = id,
            None => self.free_tail = id,
        }
        self.free_head = id;
        self.free += 1;
    }

    fn unlink(&mut self, id: BlockId) {
        let Some((previous, next)) = self.block(id).map(|b| (b.previous, b.next)) else {
            return;
        };
        match self.blocks.get_mut(previous as usize) {
            Some(block) => block.next = next,
            None => self.free_head = next,
        }
        match self.blocks.get_mut(next as usize) {
            Some(block) => block.previous = previous,
            None => self.free_tail = previous,
        }
        self.free -= 1;
    }
}

/// Hashes of the full blocks of a token stream given as bytes, chained from the model and salt. Cheap
/// ones, for a pool that nobody watches.
pub fn block_hashes(model: &str, salt: &str, bytes: &[u8], block_bytes: usize) -> Vec<BlockHash> {
    let mut parent = xxh3_64_with_seed(salt.as_bytes(), xxh3_64(model.as_bytes()));
    bytes
        .chunks_exact(block_bytes.max(1))
        .map(|block| {
            parent = xxh3_64_with_seed(block, parent);
            parent.into()
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys(numbers: &[u64]) -> Vec<BlockHash> {
        numbers
            .iter()
            .map(|number| BlockHash::from(*number))
            .collect()
    }

    /// Runs a request to its end: `n` blocks, all of them full.
    fn run(pool: &mut BlockPool, numbers: &[u64]) -> usize {
        let hashes = &keys(numbers)[..];
        let hits = pool.cached_prefix(hashes);
        let blocks = pool.allocate(hashes, hits, hashes.len() - hits).unwrap();
        for (&id, &hash) in blocks.iter().zip(hashes).skip(hits) {
            pool.fill(id, hash);
        }
        pool.release(&blocks);
        hits
    }

    #[test]
    fn a_repeated_prompt_hits_and_a_shared_prefix_is_held_once() {
        let mut pool = BlockPool::new(11);
        assert_eq!(run(&mut pool, &[1, 2, 3]), 0);
        assert_eq!(run(&mut pool, &[1, 2, 9]), 2);
        let a = pool.allocate(&keys(&[1, 2]), 2, 1).unwrap();
        let b = pool.allocate(&keys(&[1, 2]), 2, 1).unwrap();
        assert_eq!(pool.held_blocks(), 4, "two shared, one own each");
        pool.release(&a);
        assert_eq!(pool.held_blocks(), 3);
        pool.release(&b);
        assert_eq!((pool.held_blocks(), pool.free_blocks()), (0, 10));
    }

    #[test]
    fn the_oldest_request_is_evicted_first_and_each_tail_before_its_head() {
        let mut pool = BlockPool::new(7);
        run(&mut pool, &[1, 2, 3]);
        run(&mut pool, &[4, 5, 6]);
        // One new block evicts 3, the tail of the older request.
        run(&mut pool, &[7]);
        assert_eq!(
            (
                pool.cached_prefix(&keys(&[1, 2, 3])),
                pool.cached_prefix(&keys(&[4, 5, 6]))
            ),
            (2, 3)
        );
        // A hit on 1 and 2 makes them youngest: the next two evictions take 6 and 5.
        run(&mut pool, &[1, 2]);
        run(&mut pool, &[8, 9]);
        assert_eq!(
            (
                pool.cached_prefix(&keys(&[1, 2])),
                pool.cached_prefix(&keys(&[4, 5, 6]))
            ),
            (2, 1)
        );
    }

    #[test]
    fn a_request_that_does_not_fit_changes_nothing() {
        let mut pool = BlockPool::new(4);
        run(&mut pool, &[1, 2]);
        let held = pool.allocate(&keys(&[]), 0, 1).unwrap();
        // Hits 1 and 2 (both free) need two of the two free blocks: none is left for a fresh one.
        assert_eq!(pool.allocate(&keys(&[1, 2]), 2, 1), None);
        assert_eq!(pool.free_blocks(), 2);
        assert_eq!(pool.cached_prefix(&keys(&[1, 2])), 2);
        pool.release(&held);
        assert!(pool.allocate(&keys(&[1, 2]), 2, 1).is_some());
        assert_eq!(pool.usage(), 1.0);
    }

    #[test]
    fn content_is_lost_with_its_last_copy() {
        let mut pool = BlockPool::new(4);
        let copies: Vec<Vec<BlockId>> = (0..3)
            .map(|_| {
                let own = pool.allocate(&keys(&[]), 0, 1).unwrap();
                pool.fill(own[0], 1.into());
                own
            })
            .collect();
        // Released 1, 0, 2: blocks are taken in that order, and the content moves on.
        for index in [1, 0, 2] {
            pool.release(&copies[index]);
        }
        assert_eq!(pool.extend(), Some(copies[1][0]));
        assert_eq!(pool.cached_prefix(&keys(&[1])), 1);
        assert_eq!(pool.extend(), Some(copies[0][0]));
        assert_eq!(pool.allocate(&keys(&[1]), 1, 0), Some(copies[2].clone()));
        pool.release(&copies[2]);
        assert_eq!(pool.extend(), Some(copies[2][0]));
        assert_eq!(pool.cached_prefix(&keys(&[1])), 0);
    }

    #[test]
    fn copies_are_forgotten_by_a_reset() {
        let mut pool = BlockPool::new(3);
        let both = pool.allocate(&keys(&[]), 0, 2).unwrap();
        for &id in &both {
            pool.fill(id, 1.into());
        }
        assert!(!pool.reset(), "blocks are held");
        assert_eq!(pool.cached_prefix(&keys(&[1])), 1);
        pool.release(&both);
        assert!(pool.reset());
        assert_eq!(pool.cached_prefix(&keys(&[1])), 0);
        run(&mut pool, &[1]);
        assert_eq!(pool.cached_prefix(&keys(&[1])), 1);
    }

    #[test]
    fn model_salt_and_parent_separate_hashes() {
        let hash = |model, salt| block_hashes(model, salt, b"aaaabbbbaaaacc", 4);
        let plain = hash("m", "");
        assert_eq!(plain.len(), 3, "the partial block has no hash");
        assert_ne!(plain[0], plain[2], "same content, other parent");
        assert!(hash("n", "")[0] != plain[0] && hash("m", "s")[0] != plain[0]);
    }

    #[test]
    fn a_watched_pool_tells_each_copy_that_it_loses_and_clears_once() {
        let mut pool = BlockPool::watched(3);
        for _ in 0..2 {
            let own = pool.allocate(&[], 0, 1).unwrap();
            pool.fill(own[0], 1.into());
            pool.release(&own);
        }
        assert!(pool.take_events().is_empty(), "empty blocks were taken");
        let both = pool.allocate(&[], 0, 2).unwrap();
        assert_eq!(
            pool.take_events(),
            [Event::Removed(1.into()), Event::Removed(1.into())]
        );
        pool.release(&both);
        assert!(pool.reset() && pool.reset());
        assert_eq!(pool.take_events(), [Event::Cleared]);
        assert!(BlockPool::new(3).log.is_none());
    }
}
