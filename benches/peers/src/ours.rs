//! pinpod's own index.

use pinpod::datalayer::EndpointIndex;
use pinpod::kvcache::block::{BlockHasher, BlockKey, KeySpace};
use pinpod::kvcache::events::{Batch, Event, EventSink, Removed, Stored, StreamState};
use pinpod::kvcache::index::{EndpointWriter, IndexSettings, KvIndex, Lookup};
use tokio::time::Instant;

use crate::Peer;
use crate::workload::{BLOCK, ENDPOINTS, Prompt};

pub struct Pinpod {
    index: KvIndex,
    writers: Vec<EndpointWriter>,
    lookup: Lookup,
    candidates: Vec<EndpointIndex>,
    now: Instant,
}

/// What a decoder hands to a writer, which hashes the tokens itself.
pub enum Message {
    Stored {
        endpoint: u32,
        tokens: Vec<u32>,
        hashes: Vec<u64>,
        parent: Option<u64>,
    },
    Removed {
        endpoint: u32,
        hashes: Vec<u64>,
    },
}

impl Pinpod {
    fn write(&mut self, endpoint: u32, events: &[Event<'_>]) {
        self.writers[endpoint as usize].apply(&Batch {
            ts: 0.0,
            data_parallel_rank: None,
            events,
        });
    }
}

impl Peer for Pinpod {
    const NAME: &'static str = "pinpod";
    type Event = Message;
    type Keys = Vec<BlockKey>;

    fn new() -> Self {
        let index = KvIndex::new(&IndexSettings::default(), BlockHasher::default());
        let candidates: Vec<_> = (0..ENDPOINTS).map(EndpointIndex).collect();
        let writers = candidates.iter().map(|endpoint| {
            let mut writer = index.writer(*endpoint, "m");
            writer.set_state(StreamState::Live);
            writer
        });
        Self {
            writers: writers.collect(),
            index,
            lookup: Lookup::new(),
            candidates,
            now: Instant::now(),
        }
    }

    fn stored(&mut self, endpoint: u32, prompt: &Prompt, from: u32) -> Message {
        let (tokens, hashes, parent) = prompt.tail(from);
        Message::Stored {
            endpoint,
            tokens: tokens.into(),
            hashes: hashes.into(),
            parent,
        }
    }

    fn removed(&mut self, endpoint: u32, hashes: &[u64]) -> Message {
        Message::Removed {
            endpoint,
            hashes: hashes.into(),
        }
    }

    fn apply(&mut self, message: Message) {
        match message {
            Message::Stored {
                endpoint,
                tokens,
                hashes,
                parent,
            } => {
                let event = Event::Stored(Stored {
                    hashes: &hashes,
                    parent,
                    tokens: &tokens,
                    block_size: BLOCK,
                    lora_name: None,
                    medium: "GPU",
                    extra_keys: None,
                    cache_salt: None,
                    group: Some(0),
                    kind: Some("full_attention"),
                });
                self.write(endpoint, &[event]);
            }
            Message::Removed { endpoint, hashes } => {
                let events: Vec<_> = hashes
                    .chunks(1)
                    .map(|hashes| {
                        Event::Removed(Removed {
                            hashes,
                            medium: "GPU",
                            group: Some(0),
                        })
                    })
                    .collect();
                self.write(endpoint, &events);
            }
        }
    }

    fn keys(&self, tokens: &[u32]) -> Vec<BlockKey> {
        let space = KeySpace {
            model: "m",
            lora: None,
            block_size: BLOCK,
        };
        let mut keys = Vec::new();
        let hasher = self.index.hasher();
        hasher.request_keys(&space, tokens, None, &[], &mut keys);
        keys
    }

    fn look_up(&mut self, keys: &Vec<BlockKey>) -> u32 {
        self.index
            .lookup(keys, &self.candidates, self.now, &mut self.lookup);
        let blocks = self.lookup.matches().iter().map(|found| found.blocks);
        blocks.max().unwrap_or(0)
    }
}
