//! smg's chain index, `kv-index`.

use kv_index::{
    ChainBlockMap, ChainIndex, ContentHash, SequenceHash, StoredBlock,
    compute_request_content_hashes,
};

use crate::Peer;
use crate::workload::{BLOCK, ENDPOINTS, Prompt};

pub struct Smg {
    index: ChainIndex,
    workers: Vec<(u32, ChainBlockMap)>,
}

pub enum Message {
    Stored(u32, Vec<StoredBlock>, Option<SequenceHash>),
    Removed(u32, Vec<SequenceHash>),
}

impl Peer for Smg {
    const NAME: &'static str = "smg";
    type Event = Message;
    type Keys = Vec<ContentHash>;

    fn new() -> Self {
        let index = ChainIndex::with_max_workers(ENDPOINTS as usize);
        let workers = (0..ENDPOINTS).map(|e| {
            let id = index.intern_worker(&format!("10.0.0.{e}:8000"));
            (id.expect("room for all"), ChainBlockMap::new())
        });
        Self {
            workers: workers.collect(),
            index,
        }
    }

    fn stored(&mut self, endpoint: u32, prompt: &Prompt, from: u32) -> Message {
        let (tokens, hashes, parent) = prompt.tail(from);
        let contents = compute_request_content_hashes(tokens, BLOCK as usize);
        let blocks = contents.iter().zip(hashes);
        let blocks = blocks.map(|(&content_hash, &hash)| StoredBlock {
            seq_hash: SequenceHash(hash),
            content_hash,
        });
        Message::Stored(endpoint, blocks.collect(), parent.map(SequenceHash))
    }

    fn removed(&mut self, endpoint: u32, hashes: &[u64]) -> Message {
        Message::Removed(endpoint, hashes.iter().copied().map(SequenceHash).collect())
    }

    fn apply(&mut self, message: Message) {
        match message {
            Message::Stored(endpoint, blocks, parent) => {
                let (id, map) = &mut self.workers[endpoint as usize];
                let stored = self.index.apply_stored(*id, &blocks, parent, map);
                stored.expect("the parent is known");
            }
            Message::Removed(endpoint, hashes) => {
                let (id, map) = &mut self.workers[endpoint as usize];
                for hash in hashes.chunks(1) {
                    self.index.apply_removed(*id, hash, map);
                }
            }
        }
    }

    fn keys(&self, tokens: &[u32]) -> Vec<ContentHash> {
        compute_request_content_hashes(tokens, BLOCK as usize)
    }

    fn look_up(&mut self, keys: &Vec<ContentHash>) -> u32 {
        let mut best = 0;
        self.index
            .score_into(keys, |key| key.0, false, |_, score| best = best.max(score));
        best
    }
}
