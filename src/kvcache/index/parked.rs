//! Stores whose parent is not known yet, kept for a while in case it comes.

use std::collections::VecDeque;
use std::time::Duration;

use hashbrown::HashMap;
use tokio::time::Instant;

use crate::kvcache::events::Stored;

/// Events kept for one endpoint.
pub(super) const MAX_EVENTS: usize = 1024;
/// Tokens kept for one endpoint: 4 MiB.
pub(super) const MAX_TOKENS: usize = 1 << 20;
/// Time an event is kept.
pub(super) const MAX_AGE: Duration = Duration::from_secs(30);

/// A store event that owns its parts.
#[derive(Debug)]
pub(super) struct ParkedStore {
    since: Instant,
    pub(super) parent: u64,
    hashes: Vec<u64>,
    tokens: Vec<u32>,
    block_size: u32,
    lora_name: Option<String>,
    medium: String,
    extra_keys: Option<Vec<u8>>,
    group: Option<u32>,
    kind: Option<String>,
}

impl ParkedStore {
    fn new(event: &Stored<'_>, parent: u64, since: Instant) -> Self {
        Self {
            since,
            parent,
            hashes: event.hashes.to_vec(),
            tokens: event.tokens.to_vec(),
            block_size: event.block_size,
            lora_name: event.lora_name.map(Into::into),
            medium: event.medium.into(),
            extra_keys: event.extra_keys.map(Into::into),
            group: event.group,
            kind: event.kind.map(Into::into),
        }
    }

    /// The event as it came. Only prompt starts have a salt from metadata, and they are never parked.
    pub(super) fn event(&self) -> Stored<'_> {
        Stored {
            hashes: &self.hashes,
            parent: Some(self.parent),
            tokens: &self.tokens,
            block_size: self.block_size,
            lora_name: self.lora_name.as_deref(),
            medium: &self.medium,
            extra_keys: self.extra_keys.as_deref(),
            cache_salt: None,
            group: self.group,
            kind: self.kind.as_deref(),
        }
    }
}

/// Parked events in the order they came.
#[derive(Debug, Default)]
pub(super) struct Parked {
    events: VecDeque<ParkedStore>,
    tokens: usize,
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
    pub(super) fn park(&mut self, event: &Stored<'_>, parent: u64, now: Instant) -> u64 {
        if event.tokens.len() > MAX_TOKENS {
            return 1;
        }
        self.tokens += event.tokens.len();
        add(&mut self.waiting, &[parent]);
        add(&mut self.coming, event.hashes);
        self.events.push_back(ParkedStore::new(event, parent, now));
        let mut dropped = 0;
        while let Some(oldest) = self.events.front()
            && (self.events.len() > MAX_EVENTS
                || self.tokens > MAX_TOKENS
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
        let tokens = event.tokens.len();
        event.hashes.truncate(at);
        event.tokens.truncate(at * event.block_size as usize);
        self.tokens -= tokens - event.tokens.len();
        if event.hashes.is_empty() {
            self.take_at(index);
        }
    }

    fn take_at(&mut self, index: usize) -> Option<ParkedStore> {
        let event = self.events.remove(index)?;
        self.tokens -= event.tokens.len();
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

    fn stored<'a>(hashes: &'a [u64], tokens: &'a [u32]) -> Stored<'a> {
        Stored {
            hashes,
            parent: Some(1),
            tokens,
            block_size: 1,
            lora_name: None,
            medium: "GPU",
            extra_keys: None,
            cache_salt: None,
            group: None,
            kind: None,
        }
    }

    #[test]
    fn bounded_by_events_tokens_and_age() {
        let start = Instant::now();
        let mut parked = Parked::default();
        for n in 0..MAX_EVENTS {
            assert_eq!(parked.park(&stored(&[9], &[0]), n as u64, start), 0);
        }
        assert_eq!(parked.park(&stored(&[9], &[0]), 0, start), 1);
        let many = vec![0; MAX_TOKENS - 10];
        let dropped = parked.park(&stored(&[9], &many), 0, start);
        assert_eq!(
            dropped,
            MAX_EVENTS as u64 - 10,
            "the newest ten and this one fit"
        );
        let late = start + MAX_AGE + Duration::from_millis(1);
        assert_eq!(parked.park(&stored(&[9], &[0]), 5, late), 11);
        assert_eq!((parked.events.len(), parked.tokens), (1, 1));
        let too_many = vec![0; MAX_TOKENS + 1];
        assert_eq!(parked.park(&stored(&[9], &too_many), 0, late), 1);
        assert_eq!(
            parked.events.len(),
            1,
            "one event too large pushes nothing out"
        );
    }

    #[test]
    fn a_removed_block_ends_its_store() {
        let mut parked = Parked::default();
        parked.park(&stored(&[7, 8, 9], &[0; 3]), 1, Instant::now());
        parked.remove(8);
        let event = parked.take(&[1]).unwrap();
        assert_eq!(
            (event.event().hashes, event.event().tokens),
            (&[7][..], &[0][..])
        );
        assert!(parked.is_empty() && parked.tokens == 0);
        assert!(parked.waiting.is_empty() && parked.coming.is_empty());
        parked.park(&stored(&[7], &[0]), 1, Instant::now());
        parked.remove(7);
        assert!(
            parked.is_empty() && parked.waiting.is_empty(),
            "nothing is left to wait for"
        );
    }
}
