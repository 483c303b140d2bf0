//! A publisher's events on their way into the queue.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use super::{Op, SharedIndex, StoredBlocks};
use crate::kvcache::events::central::Topic;
use crate::kvcache::events::wire::{BadExtraKeys, ExtraKey, extra_keys};
use crate::kvcache::events::{Batch, Event, EventSink, Removed, Stored, StreamState};

/// Groups whose kind is remembered.
const MAX_GROUPS: usize = 32;

/// Queues the events of one publisher.
#[derive(Debug)]
pub struct SharedSink {
    index: Arc<SharedIndex>,
    endpoint: Arc<str>,
    gone: Arc<AtomicBool>,
    /// As the topic names it; events before the first topic cannot be keyed.
    model: Option<Arc<str>>,
    topic: Vec<u8>,
    state: StreamState,
    /// Whether a group holds every block of a prefix.
    groups: HashMap<u32, bool>,
}

impl SharedIndex {
    /// A sink for the events of `endpoint`, called by its `address:port`. `gone` says that it left the
    /// pool.
    pub fn sink(self: &Arc<Self>, endpoint: &str, gone: Arc<AtomicBool>) -> SharedSink {
        SharedSink {
            index: Arc::clone(self),
            endpoint: endpoint.into(),
            gone,
            model: None,
            topic: Vec::new(),
            state: StreamState::Down,
            groups: HashMap::new(),
        }
    }
}

impl SharedSink {
    fn stored(&mut self, event: &Stored<'_>) {
        if event.hashes.is_empty() || !self.is_dense(event) {
            return;
        }
        let adapter = event.lora_name.filter(|name| !name.is_empty());
        let Some(model) = adapter.map(Arc::from).or_else(|| self.model.clone()) else {
            self.index.stats.without_model.fetch_add(1, Relaxed);
            return;
        };
        let Ok(extras) = extras(event) else {
            self.index.stats.malformed.fetch_add(1, Relaxed);
            return;
        };
        self.index.push(Op::Stored(Box::new(StoredBlocks {
            endpoint: Arc::clone(&self.endpoint),
            model,
            hashes: event.hashes.to_vec(),
            parent: event.parent,
            tokens: event.tokens.to_vec(),
            extras,
            medium: event.medium.to_owned(),
            group: event.group,
        })));
    }

    /// Only attention over the whole prompt, with every block named, says something about prefixes.
    fn is_dense(&mut self, event: &Stored<'_>) -> bool {
        if let (Some(group), Some(kind)) = (event.group, event.kind) {
            let dense = matches!(
                kind,
                "full_attention" | "mla_attention" | "sink_full_attention" | "unknown"
            );
            if self.groups.len() < MAX_GROUPS || self.groups.contains_key(&group) {
                self.groups.insert(group, dense);
            }
        }
        let supported = event.group.is_none_or(|group| self.supports(group));
        let size = event.block_size as usize;
        supported && (event.tokens.is_empty() || event.tokens.len() == size * event.hashes.len())
    }

    fn supports(&self, group: u32) -> bool {
        self.groups.get(&group).copied().unwrap_or(false)
    }

    fn removed(&self, event: &Removed<'_>) {
        if event.group.is_none_or(|group| self.supports(group)) {
            self.index.push(Op::Removed {
                endpoint: Arc::clone(&self.endpoint),
                hashes: event.hashes.to_vec(),
                medium: event.medium.to_owned(),
                group: event.group,
            });
        }
    }

    fn clear(&self) {
        self.index.clear(vec![Arc::clone(&self.endpoint)]);
    }
}

/// What each block's key depends on beside its tokens: media by their identifiers, then the salt. The
/// adapter stands for the model and is left out. What no request can have becomes a text that none has.
fn extras(event: &Stored<'_>) -> Result<Vec<Vec<String>>, BadExtraKeys> {
    let read = |raw| extra_keys(raw, event.hashes.len(), event.lora_name);
    let Some(mut keys) = event.extra_keys.map(read).transpose()?.flatten() else {
        return Ok(Vec::new());
    };
    let block = |_| {
        let mut named = Vec::new();
        keys.next_block(|key| {
            named.push(match key {
                ExtraKey::Str(text)
                | ExtraKey::Mm {
                    identifier: text, ..
                } => text.to_owned(),
                ExtraKey::Bytes(bytes) | ExtraKey::Unknown(bytes) => format!("\0{bytes:02x?}"),
            });
        })?;
        Ok(named)
    };
    event.hashes.iter().map(block).collect()
}

impl EventSink for SharedSink {
    fn apply(&mut self, batch: &Batch<'_>) {
        if self.is_gone() {
            return;
        }
        for event in batch.events {
            match event {
                Event::Stored(stored) => self.stored(stored),
                Event::Removed(removed) => self.removed(removed),
                Event::Cleared(_) => self.clear(),
            }
        }
    }

    /// A publisher that ends because this process does has not lost its cache: others go on using what
    /// it says. Endpoints that leave are cleared by who knows that they do.
    fn reset(&mut self) {
        self.groups.clear();
        if self.state != StreamState::Down && !self.is_gone() {
            self.clear();
        }
    }

    fn set_state(&mut self, state: StreamState) {
        self.state = state;
    }

    fn is_gone(&self) -> bool {
        self.gone.load(Relaxed)
    }

    fn on_topic(&mut self, topic: &[u8]) {
        if self.topic != topic {
            self.topic = topic.to_vec();
            self.model = Topic::parse(topic).and_then(|topic| topic.model.map(Arc::from));
        }
    }
}
