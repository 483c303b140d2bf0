//! Applies the events of one publisher to the index.

use tokio::time::Instant;

use super::extras::ExtraKeys;
use super::parked::Parked;
use super::run::Plane;
use super::table::{Hold, MAX_GROUPS, Removal};
use super::{CPU, GPU, KvIndex};
use crate::kvcache::block::{BlockKey, KeySpace};
use crate::kvcache::events::{Batch, Event, EventSink, Removed, Stored, StreamState};

/// What became of a publisher's events. All only grow.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct WriterStats {
    /// Blocks stored with their tokens.
    pub stored_blocks: u64,
    /// Copies removed.
    pub removed_blocks: u64,
    /// Those of them that left another copy of their block.
    pub kept_blocks: u64,
    /// Copies noted by name only.
    pub located_blocks: u64,
    /// Stores kept until their parent is known.
    pub parked: u64,
    /// Parked stores given up.
    pub parked_dropped: u64,
    /// Hashes of removals and location-only stores that name no block held here.
    pub unknown_hashes: u64,
    /// Events of cache groups that say nothing about prefixes.
    pub unsupported_group: u64,
    /// Stores whose hashes do not cover their tokens.
    pub not_dense: u64,
    /// Stores whose block size is not the endpoint's.
    pub block_size: u64,
    /// Stores whose extra keys cannot be read.
    pub malformed_extra_keys: u64,
}

/// What is known about a cache group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Group {
    Unknown,
    Dense,
    Unsupported,
}

/// The part of the index that follows one publisher; owned by the task that reads its events. Dropping
/// it forgets the part.
#[derive(Debug)]
pub struct EndpointWriter {
    index: KvIndex,
    column: u32,
    model: String,
    groups: [Group; MAX_GROUPS as usize],
    parked: Parked,
    stats: WriterStats,
    keys: Vec<BlockKey>,
    /// When the batch at hand came, in seconds since the index began.
    now_s: u32,
}

impl EndpointWriter {
    pub(super) fn new(index: KvIndex, column: u32, model: &str) -> Self {
        Self {
            index,
            column,
            model: model.into(),
            groups: [Group::Unknown; MAX_GROUPS as usize],
            parked: Parked::default(),
            stats: WriterStats::default(),
            keys: Vec::new(),
            now_s: 0,
        }
    }

    /// Counters since the writer was made.
    pub fn stats(&self) -> WriterStats {
        self.stats
    }

    fn stored(&mut self, event: &Stored<'_>) {
        if event.hashes.is_empty() {
            return;
        }
        if event.tokens.is_empty() {
            self.located(event);
            return;
        }
        if !self.store(event) {
            return;
        }
        // A parent may have been waited for; so may its children.
        let mut news = event.hashes.to_vec();
        while !self.parked.is_empty()
            && let Some(parked) = self.parked.take(&news)
        {
            let child = parked.event();
            if self.store(&child) {
                news.extend_from_slice(child.hashes);
            }
        }
    }

    /// Stores dense blocks; false when the event was dropped or parked.
    fn store(&mut self, event: &Stored<'_>) -> bool {
        let block_size = event.block_size as usize;
        let dense = block_size > 0
            && block_size.checked_mul(event.hashes.len()) == Some(event.tokens.len());
        let Some(group) = self.dense_group(event, dense) else {
            return false;
        };
        let Some(parent) = self.parent(event) else {
            return false;
        };
        if !self.hash(event, parent) {
            return false;
        }
        let plane = Plane {
            column: self.column,
            tier: self.tier(event.medium),
            group,
        };
        let mut inner = self.index.shared.inner.write();
        let table = &mut inner.table;
        if let Some(column) = table.column(self.column) {
            column.block_size = event.block_size;
        }
        table.add_group(plane);
        let at = event
            .parent
            .and_then(|hash| table.resolve(self.column, hash));
        let hold = Hold::Copy {
            tier: plane.tier,
            group,
            hashes: event.hashes,
            at_s: self.now_s,
        };
        table.store(self.column, at, &self.keys, hold);
        drop(inner);
        self.stats.stored_blocks += event.hashes.len() as u64;
        true
    }

    /// The event's group, if it tells something about prefixes: attention over the whole prompt, every
    /// block named.
    fn dense_group(&mut self, event: &Stored<'_>, dense: bool) -> Option<u8> {
        let number = group_number(event.group);
        let slot = number.and_then(|number| self.groups.get_mut(usize::from(number)));
        let (Some(number), Some(slot)) = (number, slot) else {
            self.stats.unsupported_group += 1;
            return None;
        };
        match event.kind {
            Some("full_attention" | "mla_attention" | "sink_full_attention") => {
                *slot = Group::Dense;
            }
            None | Some("unknown") => {
                if *slot == Group::Unknown && dense {
                    *slot = Group::Dense;
                }
            }
            Some(_) => {
                if *slot == Group::Dense {
                    self.index
                        .shared
                        .inner
                        .write()
                        .table
                        .drop_group(self.column, number);
                }
                *slot = Group::Unsupported;
            }
        }
        if *slot == Group::Unsupported {
            self.stats.unsupported_group += 1;
            return None;
        }
        if !dense {
            self.stats.not_dense += 1;
            return None;
        }
        Some(number)
    }

    /// Key before the event's first block. Parks the event when its parent is not known.
    fn parent(&mut self, event: &Stored<'_>) -> Option<BlockKey> {
        let lora = event.lora_name.filter(|name| !name.is_empty());
        if let Some(name) = lora {
            self.index.note_adapter(name);
        }
        let inner = self.index.shared.inner.read();
        let table = &inner.table;
        let column = table.columns.get(self.column as usize)?.as_ref()?;
        if column.block_size != 0 && column.block_size != event.block_size {
            self.stats.block_size += 1;
            return None;
        }
        let Some(parent) = event.parent else {
            return Some(self.index.hasher().start(&KeySpace {
                model: &self.model,
                lora,
                block_size: event.block_size,
            }));
        };
        let place = table.resolve(self.column, parent);
        if let Some(key) = place.and_then(|place| table.key(place)) {
            return Some(key);
        }
        drop(inner);
        self.stats.parked += 1;
        self.stats.parked_dropped += self.parked.park(event, parent, Instant::now());
        None
    }

    /// Chains the event's blocks into `keys`; false when its extra keys cannot be read.
    fn hash(&mut self, event: &Stored<'_>, parent: BlockKey) -> bool {
        let first = event.parent.is_none();
        let Ok(mut extra_keys) = event.extra_keys.map(ExtraKeys::new).transpose() else {
            self.stats.malformed_extra_keys += 1;
            return false;
        };
        let mut malformed = false;
        self.keys.clear();
        self.index.hasher().extend(
            parent,
            event.tokens,
            event.block_size as usize,
            &mut self.keys,
            |index, extras| {
                let first = first && index == 0;
                if let Some(keys) = &mut extra_keys {
                    malformed |= keys.next_block(event.lora_name, first, extras).is_err();
                }
                if first && let Some(salt) = event.cache_salt.filter(|salt| !salt.is_empty()) {
                    extras.salt(salt);
                }
            },
        );
        if malformed {
            self.stats.malformed_extra_keys += 1;
        }
        !malformed
    }

    /// Known blocks have a copy in another tier now.
    fn located(&mut self, event: &Stored<'_>) {
        let Some(plane) = self.plane(event.group, event.medium) else {
            self.stats.unsupported_group += 1;
            return;
        };
        let mut inner = self.index.shared.inner.write();
        for hash in event.hashes {
            let Some(place) = inner.table.resolve(self.column, *hash) else {
                self.stats.unknown_hashes += 1;
                continue;
            };
            inner.table.add_copy(plane, place);
            self.stats.located_blocks += 1;
        }
        inner.table.add_group(plane);
    }

    fn removed(&mut self, event: &Removed<'_>) {
        let Some(plane) = self.plane(event.group, event.medium) else {
            self.stats.unsupported_group += 1;
            return;
        };
        let mut inner = self.index.shared.inner.write();
        for hash in event.hashes {
            match inner.table.remove(plane, *hash) {
                Removal::Unknown => {}
                removal => {
                    self.stats.removed_blocks += 1;
                    self.stats.kept_blocks += u64::from(removal == Removal::Kept);
                    continue;
                }
            }
            self.stats.unknown_hashes += 1;
            if !self.parked.is_empty() {
                self.parked.remove(*hash);
            }
        }
    }

    /// Tier and group of an event without tokens; `None` for a group that feeds no prefixes.
    fn plane(&self, group: Option<u32>, medium: &str) -> Option<Plane> {
        let number = group_number(group)?;
        let known = self.groups.get(usize::from(number))?;
        let feeds = match group {
            None => *known != Group::Unsupported,
            Some(_) => *known == Group::Dense,
        };
        feeds.then(|| Plane {
            column: self.column,
            tier: self.tier(medium),
            group: number,
        })
    }

    fn tier(&self, medium: &str) -> u8 {
        if medium.is_empty() || medium.eq_ignore_ascii_case("gpu") {
            GPU
        } else if medium.eq_ignore_ascii_case("cpu") {
            CPU
        } else {
            self.index.shared.inner.write().tiers.number(medium)
        }
    }

    fn clear(&mut self) {
        self.parked.clear();
        self.index.shared.inner.write().table.clear(self.column);
    }
}

impl EventSink for EndpointWriter {
    fn apply(&mut self, batch: &Batch<'_>) {
        self.now_s = self.index.seconds(Instant::now());
        for event in batch.events {
            match event {
                Event::Stored(event) => self.stored(event),
                Event::Removed(event) => self.removed(event),
                Event::Cleared(_) => self.clear(),
            }
        }
    }

    fn reset(&mut self) {
        self.clear();
        self.groups = [Group::Unknown; MAX_GROUPS as usize];
    }

    fn set_state(&mut self, state: StreamState) {
        let mut inner = self.index.shared.inner.write();
        inner.table.set_state(self.column, state);
    }
}

impl Drop for EndpointWriter {
    fn drop(&mut self) {
        self.index
            .shared
            .inner
            .write()
            .table
            .drop_column(self.column);
    }
}

/// Dense number of a group; engines with a single group may not name it.
fn group_number(group: Option<u32>) -> Option<u8> {
    let group = group.unwrap_or(0);
    (group < MAX_GROUPS).then_some(u8::try_from(group).ok()?)
}
