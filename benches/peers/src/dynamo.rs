//! Dynamo's compressed radix tree, the single-threaded one: no channels, no locks.

use dynamo_kv_router::RadixTree;
use dynamo_kv_router::protocols::{
    BlockHashOptions, ExternalSequenceBlockHash, KvCacheEvent, KvCacheEventData, KvCacheRemoveData,
    KvCacheStoreData, KvCacheStoredBlockData, LocalBlockHash, RouterEvent,
    compute_block_hash_for_seq,
};

use crate::Peer;
use crate::workload::{BLOCK, Prompt};

pub struct Radix {
    tree: RadixTree,
    events: u64,
}

impl Radix {
    fn event(&mut self, endpoint: u32, data: KvCacheEventData) -> RouterEvent {
        self.events += 1;
        let event = KvCacheEvent {
            event_id: self.events,
            data,
            dp_rank: 0,
        };
        RouterEvent::new(u64::from(endpoint), event)
    }
}

impl Peer for Radix {
    const NAME: &'static str = "dynamo";
    type Event = Vec<RouterEvent>;
    type Keys = Vec<LocalBlockHash>;

    fn new() -> Self {
        Self {
            tree: RadixTree::new(),
            events: 0,
        }
    }

    fn stored(&mut self, endpoint: u32, prompt: &Prompt, from: u32) -> Vec<RouterEvent> {
        let (tokens, hashes, parent) = prompt.tail(from);
        let locals = compute_block_hash_for_seq(tokens, BLOCK, BlockHashOptions::default());
        let blocks = locals.into_iter().zip(hashes);
        let blocks = blocks.map(|(tokens_hash, hash)| KvCacheStoredBlockData {
            block_hash: ExternalSequenceBlockHash(*hash),
            tokens_hash,
            mm_extra_info: None,
        });
        let data = KvCacheEventData::Stored(KvCacheStoreData {
            parent_hash: parent.map(ExternalSequenceBlockHash),
            start_position: Some(from),
            blocks: blocks.collect(),
        });
        vec![self.event(endpoint, data)]
    }

    fn removed(&mut self, endpoint: u32, hashes: &[u64]) -> Vec<RouterEvent> {
        let one = |hash: &u64| {
            KvCacheEventData::Removed(KvCacheRemoveData {
                block_hashes: vec![ExternalSequenceBlockHash(*hash)],
            })
        };
        let events = hashes.iter().map(|hash| self.event(endpoint, one(hash)));
        events.collect()
    }

    fn apply(&mut self, events: Vec<RouterEvent>) {
        for event in events {
            self.tree.apply_event(event).expect("a known parent");
        }
    }

    fn keys(&self, tokens: &[u32]) -> Vec<LocalBlockHash> {
        compute_block_hash_for_seq(tokens, BLOCK, BlockHashOptions::default())
    }

    fn look_up(&mut self, keys: &Vec<LocalBlockHash>) -> u32 {
        let found = self.tree.find_matches(keys.clone(), false);
        found.scores.values().copied().max().unwrap_or(0)
    }
}
