//! Random events of many endpoints against a plain model: a map from hash to copies for each endpoint.

use hashbrown::HashMap;
use tokio::time::Instant;

use super::super::{EndpointWriter, IndexSettings, KvIndex, Lookup};
use super::stored;
use crate::datalayer::EndpointIndex;
use crate::kvcache::block::{BlockHasher, BlockKey, KeySpace};
use crate::kvcache::events::{Batch, Cleared, Event, EventSink, Removed, Stored};

const ENDPOINTS: usize = 64;
/// Stores, removals, clears and restarts.
const OPERATIONS: usize = 1_000_000;
/// Conversations; each is a path in a tree that forks often.
const PROMPTS: usize = 60;
const LONGEST: usize = 40;
/// Every so many operations one prompt is looked up on all endpoints.
const LOOK_EVERY: usize = 500;
/// Every so many a whole endpoint is emptied.
const CLEAR_EVERY: usize = 3_000;

/// Copies by hash and tier.
type Copies = HashMap<(u64, bool), u32>;

struct Model {
    index: KvIndex,
    writers: Vec<EndpointWriter>,
    copies: Vec<Copies>,
    prompts: Vec<Vec<u32>>,
    keys: Vec<Vec<BlockKey>>,
    rng: fastrand::Rng,
}

/// What endpoint `e` calls a block: two in four use the same hashes, one for all but a few blocks, one has
/// its own.
fn hash(e: usize, key: BlockKey) -> u64 {
    let alone = match e % 4 {
        3 => true,
        2 => key.0.is_multiple_of(32),
        _ => false,
    };
    let seed = if alone { e as u64 } else { 0 };
    (key.0 ^ seed.wrapping_mul(0x9e37_79b9_7f4a_7c15)).wrapping_mul(0xd6e8_feb8_6659_fd93)
}

impl Model {
    fn new(seed: u64) -> Self {
        let mut rng = fastrand::Rng::with_seed(seed);
        let index = KvIndex::new(&IndexSettings::default(), BlockHasher::with_seed(seed));
        let mut prompts: Vec<Vec<u32>> = Vec::new();
        for n in 0..PROMPTS {
            let mut prompt = match prompts.get(rng.usize(..=n)) {
                Some(other) => other[..rng.usize(..other.len())].to_vec(),
                None => Vec::new(),
            };
            prompt.resize_with(rng.usize(prompt.len() + 1..=LONGEST), || rng.u32(..1000));
            prompts.push(prompt);
        }
        let space = KeySpace {
            model: "m",
            lora: None,
            block_size: 1,
        };
        let keys = prompts.iter().map(|prompt| {
            let mut keys = Vec::new();
            index
                .hasher()
                .request_keys(&space, prompt, None, &[], &mut keys);
            keys
        });
        Self {
            keys: keys.collect(),
            writers: (0..ENDPOINTS)
                .map(|e| index.writer(EndpointIndex(u32::try_from(e).unwrap()), "m"))
                .collect(),
            copies: vec![Copies::new(); ENDPOINTS],
            index,
            prompts,
            rng,
        }
    }

    fn held(&self, e: usize, key: BlockKey) -> bool {
        let hash = hash(e, key);
        self.copies[e].contains_key(&(hash, false)) || self.copies[e].contains_key(&(hash, true))
    }

    fn apply(&mut self, e: usize, event: Event<'_>) {
        self.writers[e].apply(&Batch {
            ts: 0.0,
            data_parallel_rank: None,
            events: &[event],
        });
    }

    /// Stores a stretch of a prompt from its start or from any block the endpoint holds.
    fn store(&mut self, e: usize) {
        let prompt = self.rng.usize(..PROMPTS);
        let keys = self.keys[prompt].clone();
        let from = self.rng.usize(..keys.len());
        let from = if from > 0 && self.held(e, keys[from - 1]) {
            from
        } else {
            0
        };
        let to = self.rng.usize(from + 1..=keys.len());
        let cpu = self.rng.u8(..5) == 0;
        let hashes: Vec<_> = keys[from..to].iter().map(|key| hash(e, *key)).collect();
        let parent = (from > 0).then(|| hash(e, keys[from - 1]));
        let tokens = self.prompts[prompt][from..to].to_vec();
        self.apply(
            e,
            Event::Stored(Stored {
                medium: if cpu { "CPU" } else { "GPU" },
                ..stored(&hashes, parent, &tokens, 1)
            }),
        );
        for hash in hashes {
            *self.copies[e].entry((hash, cpu)).or_default() += 1;
        }
    }

    /// Removes a few blocks from the end of a prompt, or one anywhere.
    fn remove(&mut self, e: usize) {
        let keys = self.keys[self.rng.usize(..PROMPTS)].clone();
        let at = self.rng.usize(..keys.len());
        let cpu = self.rng.u8(..5) == 0;
        let n = if self.rng.bool() { keys.len() - at } else { 1 };
        let removed = keys[at..at + n].iter().rev();
        let hashes: Vec<_> = removed.map(|key| hash(e, *key)).collect();
        self.apply(
            e,
            Event::Removed(Removed {
                hashes: &hashes,
                medium: if cpu { "CPU" } else { "GPU" },
                group: Some(0),
            }),
        );
        for hash in hashes {
            if let Some(copies) = self.copies[e].get_mut(&(hash, cpu)) {
                *copies -= 1;
                if *copies == 0 {
                    self.copies[e].remove(&(hash, cpu));
                }
            }
        }
    }

    fn empty(&mut self, e: usize) {
        match self.rng.u8(..3) {
            0 => self.apply(e, Event::Cleared(Cleared)),
            1 => self.writers[e].reset(),
            _ => {
                let endpoint = EndpointIndex(u32::try_from(e).unwrap());
                // Two writers for a moment, as when an endpoint comes back before its old task ended.
                self.writers[e] = self.index.writer(endpoint, "m");
            }
        }
        self.copies[e].clear();
    }

    fn check(&mut self, lookup: &mut Lookup) {
        let keys = self.keys[self.rng.usize(..PROMPTS)].clone();
        let keys = &keys[..self.rng.usize(1..=keys.len())];
        let candidates: Vec<_> = (0..64).map(EndpointIndex).collect();
        self.index.lookup(keys, &candidates, Instant::now(), lookup);
        for (e, found) in lookup.matches().iter().enumerate() {
            let copies = &self.copies[e];
            let has = |tier: bool| {
                let has = |key: &&BlockKey| copies.contains_key(&(hash(e, **key), tier));
                keys.iter().take_while(has).count()
            };
            let any = keys.iter().take_while(|key| self.held(e, **key));
            let score: f64 = any
                .clone()
                .map(|key| {
                    if self.copies[e].contains_key(&(hash(e, *key), false)) {
                        1.0
                    } else {
                        0.8
                    }
                })
                .sum();
            assert_eq!(found.blocks as usize, any.count());
            assert_eq!(found.by_tier[0] as usize, has(false));
            assert_eq!(found.by_tier[1] as usize, has(true));
            assert!((found.score - score).abs() < 1e-9);
        }
    }
}

#[test]
fn random_events_agree_with_a_plain_model() {
    let seed =
        std::env::var("PINPOD_SEED").map_or_else(|_| fastrand::u64(..), |s| s.parse().unwrap());
    eprintln!("PINPOD_SEED={seed}");
    let mut model = Model::new(seed);
    let mut lookup = Lookup::new();
    for n in 1..=OPERATIONS {
        let e = model.rng.usize(..ENDPOINTS);
        if n % CLEAR_EVERY == 0 {
            model.empty(e);
        } else if model.rng.u8(..5) < 2 {
            model.store(e);
        } else {
            model.remove(e);
        }
        if n % LOOK_EVERY == 0 {
            model.check(&mut lookup);
        }
    }
    for e in 0..ENDPOINTS {
        model.empty(e);
    }
    let stats = model.index.stats();
    assert_eq!(
        (stats.blocks, stats.runs, stats.used_bytes),
        (0, 0, 0),
        "nothing leaks"
    );
}
