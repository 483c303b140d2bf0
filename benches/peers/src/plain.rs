//! One hash map entry a block, for scale.

use pinpod::kvcache::block::{BlockHasher, BlockKey, KeySpace};
use rustc_hash::FxHashMap;

use crate::Peer;
use crate::workload::{BLOCK, ENDPOINTS, Prompt};

pub struct Plain {
    hasher: BlockHasher,
    /// One bit for each of 64 endpoints.
    holders: FxHashMap<BlockKey, u64>,
    /// Of each endpoint, by the engine's hash.
    names: Vec<FxHashMap<u64, BlockKey>>,
}

pub enum Message {
    Stored(u32, Vec<(u64, BlockKey)>),
    Removed(u32, Vec<u64>),
}

const SPACE: KeySpace<'static> = KeySpace {
    model: "m",
    lora: None,
    block_size: BLOCK,
};

impl Peer for Plain {
    const NAME: &'static str = "plain";
    const LOOKUPS: usize = 1_000;
    type Event = Message;
    type Keys = Vec<BlockKey>;

    fn new() -> Self {
        Self {
            hasher: BlockHasher::default(),
            holders: FxHashMap::default(),
            names: (0..ENDPOINTS).map(|_| FxHashMap::default()).collect(),
        }
    }

    fn stored(&mut self, endpoint: u32, prompt: &Prompt, from: u32) -> Message {
        let (tokens, hashes, parent) = prompt.tail(from);
        let names = &self.names[endpoint as usize];
        let parent = parent.and_then(|hash| names.get(&hash).copied());
        let parent = parent.unwrap_or_else(|| self.hasher.start(&SPACE));
        let mut keys = Vec::new();
        self.hasher
            .extend(parent, tokens, BLOCK as usize, &mut keys, |_, _| {});
        Message::Stored(endpoint, hashes.iter().copied().zip(keys).collect())
    }

    fn removed(&mut self, endpoint: u32, hashes: &[u64]) -> Message {
        Message::Removed(endpoint, hashes.into())
    }

    fn apply(&mut self, message: Message) {
        match message {
            Message::Stored(endpoint, blocks) => {
                for (hash, key) in blocks {
                    *self.holders.entry(key).or_default() |= 1 << endpoint;
                    self.names[endpoint as usize].insert(hash, key);
                }
            }
            Message::Removed(endpoint, hashes) => {
                for hash in hashes {
                    let Some(key) = self.names[endpoint as usize].remove(&hash) else {
                        continue;
                    };
                    if let Some(holders) = self.holders.get_mut(&key) {
                        *holders &= !(1 << endpoint);
                        if *holders == 0 {
                            self.holders.remove(&key);
                        }
                    }
                }
            }
        }
    }

    fn keys(&self, tokens: &[u32]) -> Vec<BlockKey> {
        let mut keys = Vec::new();
        self.hasher.request_keys(&SPACE, tokens, None, &[], &mut keys);
        keys
    }

    fn look_up(&mut self, keys: &Vec<BlockKey>) -> u32 {
        let mut scores = [0_u32; ENDPOINTS as usize];
        let mut alive = u64::MAX;
        for key in keys {
            alive &= self.holders.get(key).copied().unwrap_or(0);
            if alive == 0 {
                break;
            }
            let mut left = alive;
            while left != 0 {
                scores[left.trailing_zeros() as usize] += 1;
                left &= left - 1;
            }
        }
        scores.into_iter().max().unwrap_or(0)
    }
}
