//! Stores whose parent is not known yet, kept for a while in case it comes.

use std::collections::VecDeque;
use std::time::Duration;

use hashbrown::HashMap;
use tokio::time::Instant;

use super::writer::Dense;
use crate::kvcache::block::BlockContent;

/// Events kept for one endpoint.
pub(super) const MAX_EVENTS: usize = 1024;
/// Blocks kept for one endpoint: 1 MiB.
pub(super) const MAX_BLOCKS: usize = 1 << 16;
/// Time an event is kept.
pub(super) const MAX_AGE: Duration = Duration::from_secs(30);

/// A store that owns its parts.
#[derive(Debug)]
pub(super) struct ParkedStore {
    since: Instant,
    parent: u64,
    hashes: Vec<u64>,
    contents: Vec<BlockContent>,
    block_size: u32,
    tier: u8,
    group: u8,
}

impl ParkedStore {
    fn new(store: &Dense<'_>, parent: u64, since: Instant) -> Self {
        Self {
            since,
            parent,
            hashes: store.hashes.to_vec(),
            contents: store.contents.to_vec(),
            block_size: store.block_size,
            tier: store.tier,
            group: store.group,
        }
    }

    /// The store as it came. Its adapter is its parent's.
    pub(super) fn store(&self) -> Dense<'_> {
        Dense {
            hashes: &self.hashes,
            contents: &self.contents,
            parent: Some(self.parent),
            block_size: self.block_size,
            lora: None,
            tier: self.tier,
            group: self.group,
        }
    }
}

/// Parked events in the order they came.
#[derive(Debug, Default)]
pub(super) struct Parked {
    events: VecDeque<ParkedStore>,
    blocks: usize,
    /// Events that wait for each hash, so that a store nobody waits for costs a probe a block.
    waiting: Names,
    /// Events that bring each hash.
    coming: Names,
}

/// Hashes and how often each is there.
type Names = HashMap<u64, u32>;

impl Parked {
    pub(super) fn is_empty(&self) -> bool {
        self.events.is_empty()
    }

    pub(super) fn clear(&mut self) {
        *self = Self::default();
    }

    /// Keeps the event; returns how many had to go for it, itself included.
    pub(super) fn park(&mut self, store: &Dense<'_>, parent: u64, now: Instant) -> u64 {
        if store.hashes.len() > MAX_BLOCKS {
            return 1;
        }
        self.blocks += store.hashes.len();
        add(&mut self.waiting, &[parent]);
        add(&mut self.coming, store.hashes);
        self.events.push_back(ParkedStore::new(store, parent, now));
        let mut dropped = 0;
        while let Some(oldest) = self.events.front()
            && (self.events.len() > MAX_EVENTS
                || self.blocks > MAX_BLOCKS
                || now.saturating_duration_since(oldest.since) > MAX_AGE)
        {
            self.take_at(0);
            dropped += 1;
        }
        dropped
    }

    /// Takes the oldest event that goes on from one of `hashes`.
    pub(super) fn take(&mut self, hashes: &[u64]) -> Option<ParkedStore> {
        let parent = hashes
            .iter()
            .find(|hash| self.waiting.contains_key(*hash))?;
        let at = self
            .events
            .iter()
            .position(|event| event.parent == *parent)?;
        self.take_at(at)
    }

    /// A block was removed before its store could be applied: the store ends in front of it.
    pub(super) fn remove(&mut self, hash: u64) {
        if !self.coming.contains_key(&hash) {
            return;
        }
        let place = |event: &ParkedStore| event.hashes.iter().position(|other| *other == hash);
        let mut events = self.events.iter().enumerate();
        let found = events.find_map(|(index, event)| Some((index, place(event)?)));
        let Some((index, at)) = found else {
            return;
        };
        let Some(event) = self.events.get_mut(index) else {
            return;
        };
        sub(&mut self.coming, event.hashes.get(at..).unwrap_or_default());
        self.blocks -= event.hashes.len() - at;
        event.hashes.truncate(at);
        event.contents.truncate(at);
        if event.hashes.is_empty() {
            self.take_at(index);
        }
    }

    fn take_at(&mut self, index: usize) -> Option<ParkedStore> {
        let event = self.events.remove(index)?;
        self.blocks -= event.hashes.len();
        sub(&mut self.waiting, &[event.parent]);
        sub(&mut self.coming, &event.hashes);
        Some(event)
    }
}

fn add(names: &mut Names, hashes: &[u64]) {
    for hash in hashes {
        *names.entry(*hash).or_default() += 1;
    }
}

fn sub(names: &mut Names, hashes: &[u64]) {
    for hash in hashes {
        if let Some(n) = names.get_mut(hash) {
            *n -= 1;
            if *n == 0 {
                names.remove(hash);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kvcache::block::BlockHasher;

    fn dense<'a>(hashes: &'a [u64], contents: &'a [BlockContent]) -> Dense<'a> {
        Dense {
            hashes,
            contents,
            parent: Some(1),
            block_size: 1,
            lora: None,
            tier: 0,
            group: 0,
        }
    }

    fn contents(n: usize) -> Vec<BlockContent> {
        let mut contents = Vec::new();
        BlockHasher::with_seed(1).contents(&vec![0; n], 1, &mut contents, |_, _| {});
        contents
    }

    #[test]
    fn bounded_by_events_blocks_and_age() {
        let start = Instant::now();
        let mut parked = Parked::default();
        let one = contents(1);
        let store = dense(&[9], &one);
        for n in 0..MAX_EVENTS {
            assert_eq!(parked.park(&store, n as u64, start), 0);
        }
        assert_eq!(parked.park(&store, 0, start), 1);
        let (names, many) = (vec![9; MAX_BLOCKS + 1], contents(MAX_BLOCKS + 1));
        let n = MAX_BLOCKS - 10;
        let dropped = parked.park(&dense(&names[..n], &many[..n]), 0, start);
        assert_eq!(
            dropped,
            MAX_EVENTS as u64 - 10,
            "the newest ten and this one fit"
        );
        let late = start + MAX_AGE + Duration::from_millis(1);
        assert_eq!(parked.park(&store, 5, late), 11);
        assert_eq!((parked.events.len(), parked.blocks), (1, 1));
        assert_eq!(parked.park(&dense(&names, &many), 0, late), 1);
        assert_eq!(
            parked.events.len(),
            1,
            "one event too large pushes nothing out"
        );
    }

    #[test]
    fn a_removed_block_ends_its_store() {
        let mut parked = Parked::default();
        let contents = contents(3);
        parked.park(&dense(&[7, 8, 9], &contents), 1, Instant::now());
        parked.remove(8);
        let event = parked.take(&[1]).unwrap();
        assert_eq!(
            (event.store().hashes, event.store().contents),
            (&[7][..], &contents[..1])
        );
        assert!(parked.is_empty() && parked.blocks == 0);
        assert!(parked.waiting.is_empty() && parked.coming.is_empty());
        parked.park(&dense(&[7], &contents[..1]), 1, Instant::now());
        parked.remove(7);
        assert!(
            parked.is_empty() && parked.waiting.is_empty(),
            "nothing is left to wait for"
        );
    }
}
