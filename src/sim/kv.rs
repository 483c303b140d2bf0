//! The block pool: prefix caching and eviction as vLLM does them (`vllm/v1/core/block_pool.py`).
//!
//! A block is held by running requests (counted) or free. Free blocks keep their content until they
//! are taken: the free queue is in order of release, a request releases its blocks last to first, so
//! the tail of a prompt is lost before its head. A hit takes a free block out of the queue.

use std::collections::HashMap;

use xxhash_rust::xxh3::{xxh3_64, xxh3_64_with_seed};

const NONE: u32 = u32::MAX;

/// Number of a block.
pub type BlockId = u32;

#[derive(Debug, Clone)]
struct Block {
    hash: Option<u64>,
    references: u32,
    previous: u32,
    next: u32,
}

/// All blocks of one engine.
#[derive(Debug)]
pub struct BlockPool {
    blocks: Vec<Block>,
    cached: HashMap<u64, BlockId>,
    free_head: u32,
    free_tail: u32,
    free: usize,
}

impl BlockPool {
    /// `count` empty blocks.
    pub fn new(count: usize) -> Self {
        let mut pool = Self {
            blocks: Vec::new(),
            cached: HashMap::new(),
            free_head: NONE,
            free_tail: NONE,
            free: 0,
        };
        pool.blocks.resize(
            count,
            Block {
                hash: None,
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
    pub fn cached_prefix(&self, hashes: &[u64]) -> usize {
        hashes
            .iter()
            .take_while(|hash| self.cached.contains_key(hash))
            .count()
    }

    /// Takes the first `hits` cached blocks of `hashes` and `fresh` empty ones; `None`, with nothing
    /// changed, when there are not enough.
    pub fn allocate(&mut self, hashes: &[u64], hits: usize, fresh: usize) -> Option<Vec<BlockId>> {
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

    /// Block `id` now holds the full block `hash`. A second copy of the same content stays uncached.
    pub fn fill(&mut self, id: BlockId, hash: u64) {
        if self.cached.contains_key(&hash) {
            return;
        }
        if let Some(block) = self.blocks.get_mut(id as usize) {
            block.hash = Some(hash);
            self.cached.insert(hash, id);
        }
    }

    /// Gives up `blocks` of one request, last first.
    pub fn release(&mut self, blocks: &[BlockId]) {
        for &id in blocks.iter().rev() {
            let Some(block) = self.blocks.get_mut(id as usize) else {
                continue;
            };
            block.references = block.references.saturating_sub(1);
            if block.references == 0 {
                self.append_free(id);
            }
        }
    }

    /// Forgets all content; what is held stays held.
    pub fn reset(&mut self) {
        self.cached.clear();
        self.blocks.iter_mut().for_each(|block| block.hash = None);
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
        let hash = self
            .blocks
            .get_mut(id as usize)
            .and_then(|block| block.hash.take());
        if let Some(hash) = hash {
            self.cached.remove(&hash);
        }
        Some(id)
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

/// Hashes of the full blocks of a token stream given as bytes (`token_bytes` each), chained from the
/// model and salt.
pub fn block_hashes(model: &str, salt: &str, bytes: &[u8], block_bytes: usize) -> Vec<u64> {
    let mut parent = xxh3_64_with_seed(salt.as_bytes(), xxh3_64(model.as_bytes()));
    bytes
        .chunks_exact(block_bytes.max(1))
        .map(|block| {
            parent = xxh3_64_with_seed(block, parent);
            parent
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs a request to its end: `n` blocks, all of them full.
    fn run(pool: &mut BlockPool, hashes: &[u64]) -> usize {
        let hits = pool.cached_prefix(hashes);
        let blocks = pool.allocate(hashes, hits, hashes.len() - hits).unwrap();
        for (&id, &hash) in blocks.iter().zip(hashes) {
            pool.fill(id, hash);
        }
        pool.release(&blocks);
        hits
    }

    #[test]
    fn a_repeated_prompt_hits_and_a_shared_prefix_is_held_once() {
        let mut pool = BlockPool::new(10);
        assert_eq!(run(&mut pool, &[1, 2, 3]), 0);
        assert_eq!(run(&mut pool, &[1, 2, 9]), 2);
        let a = pool.allocate(&[1, 2], 2, 1).unwrap();
        let b = pool.allocate(&[1, 2], 2, 1).unwrap();
        assert_eq!(pool.held_blocks(), 4, "two shared, one own each");
        pool.release(&a);
        assert_eq!(pool.held_blocks(), 3);
        pool.release(&b);
        assert_eq!((pool.held_blocks(), pool.free_blocks()), (0, 10));
    }

    #[test]
    fn the_oldest_request_is_evicted_first_and_each_tail_before_its_head() {
        let mut pool = BlockPool::new(6);
        run(&mut pool, &[1, 2, 3]);
        run(&mut pool, &[4, 5, 6]);
        // One new block evicts 3, the tail of the older request.
        run(&mut pool, &[7]);
        assert_eq!(
            (
                pool.cached_prefix(&[1, 2, 3]),
                pool.cached_prefix(&[4, 5, 6])
            ),
            (2, 3)
        );
        // A hit on 1 and 2 makes them youngest: the next two evictions take 6 and 5.
        run(&mut pool, &[1, 2]);
        run(&mut pool, &[8, 9]);
        assert_eq!(
            (pool.cached_prefix(&[1, 2]), pool.cached_prefix(&[4, 5, 6])),
            (2, 1)
        );
    }

    #[test]
    fn a_request_that_does_not_fit_changes_nothing() {
        let mut pool = BlockPool::new(3);
        run(&mut pool, &[1, 2]);
        let held = pool.allocate(&[], 0, 1).unwrap();
        // Hits 1 and 2 (both free) need two of the two free blocks: none is left for a fresh one.
        assert_eq!(pool.allocate(&[1, 2], 2, 1), None);
        assert_eq!(pool.free_blocks(), 2);
        assert_eq!(pool.cached_prefix(&[1, 2]), 2);
        pool.release(&held);
        assert!(pool.allocate(&[1, 2], 2, 1).is_some());
        assert_eq!(pool.usage(), 1.0);
    }

    #[test]
    fn a_second_copy_of_a_block_is_not_cached_twice() {
        let mut pool = BlockPool::new(4);
        let a = pool.allocate(&[], 0, 1).unwrap();
        let b = pool.allocate(&[], 0, 1).unwrap();
        pool.fill(a[0], 1);
        pool.fill(b[0], 1);
        pool.release(&a);
        pool.release(&b);
        assert_eq!(pool.allocate(&[1], 1, 0), Some(a));
    }

    #[test]
    fn model_salt_and_parent_separate_hashes() {
        let hash = |model, salt| block_hashes(model, salt, b"aaaabbbbaaaacc", 4);
        let plain = hash("m", "");
        assert_eq!(plain.len(), 3, "the partial block has no hash");
        assert_ne!(plain[0], plain[2], "same content, other parent");
        assert!(hash("n", "")[0] != plain[0] && hash("m", "s")[0] != plain[0]);
    }
}
