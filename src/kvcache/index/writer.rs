//! Applies the events of one publisher to the index.

use std::ops::Range;

use tokio::time::Instant;

use super::KvIndex;
use super::extras;
use super::parked::Parked;
use super::run::Plane;
use super::table::{Hold, MAX_GROUPS, Removal, Table, key};
use super::tagged::WARM;
use super::view::{Draft, Op, stamp};
use crate::kvcache::block::{BlockContent, BlockHasher, BlockKey, KeySpace};
use crate::kvcache::events::wire::extra_keys;
use crate::kvcache::events::{Batch, Event, EventSink, Removed, Stored, StreamState};

/// Blocks whose contents and keys a writer keeps room for between batches.
const KEPT_BLOCKS: usize = 1 << 16;

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
    part: Part,
    hashed: Hashed,
}

/// A publisher as its writer knows it.
#[derive(Debug)]
struct Part {
    hasher: BlockHasher,
    column: u32,
    model: String,
    groups: [Group; MAX_GROUPS as usize],
    parked: Parked,
    stats: WriterStats,
    keys: Vec<BlockKey>,
    /// Names of removals to come.
    names: Vec<u64>,
}

/// What can be computed of a batch before it is this writer's turn.
#[derive(Debug, Default)]
struct Hashed {
    contents: Vec<BlockContent>,
    /// One for each event.
    events: Vec<Contents>,
}

#[derive(Debug, Clone)]
enum Contents {
    /// Not needed.
    None,
    /// Part of [`Hashed::contents`].
    At(Range<usize>),
    /// The event's extra keys cannot be read.
    Malformed,
}

/// A store of whole blocks, hashed.
#[derive(Debug, Clone, Copy)]
pub(super) struct Dense<'a> {
    pub(super) hashes: &'a [u64],
    /// One for each hash.
    pub(super) contents: &'a [BlockContent],
    pub(super) parent: Option<u64>,
    pub(super) block_size: u32,
    pub(super) lora: Option<&'a str>,
    pub(super) tier: u8,
    pub(super) group: u8,
}

impl EndpointWriter {
    pub(super) fn new(index: KvIndex, column: u32, model: &str) -> Self {
        let part = Part {
            hasher: index.hasher(),
            column,
            model: model.into(),
            groups: [Group::Unknown; MAX_GROUPS as usize],
            parked: Parked::default(),
            stats: WriterStats::default(),
            keys: Vec::new(),
            names: Vec::new(),
        };
        Self {
            index,
            part,
            hashed: Hashed::default(),
        }
    }

    /// Counters since the writer was made.
    pub fn stats(&self) -> WriterStats {
        self.part.stats
    }
}

impl EventSink for EndpointWriter {
    fn apply(&mut self, batch: &Batch<'_>) {
        self.hashed.clear();
        for event in batch.events {
            self.hashed.event(self.part.hasher, event);
            if let Event::Stored(Stored {
                lora_name: Some(name),
                ..
            }) = event
                && !name.is_empty()
            {
                self.index.note_adapter(name);
            }
        }
        let now = Instant::now();
        let now_s = self.index.seconds(now);
        let Self {
            index,
            part,
            hashed,
        } = self;
        index.change(|table, draft| {
            table.age(draft, part.column, now_s);
            let mut ahead = batch.events.chunks(WARM);
            for (at, (event, contents)) in batch.events.iter().zip(&hashed.events).enumerate() {
                if at % WARM == 0 {
                    part.warm(table, ahead.next().unwrap_or_default());
                }
                match event {
                    Event::Stored(event) => {
                        let contents = hashed.of(contents);
                        part.stored(table, draft, event, contents, now);
                    }
                    Event::Removed(event) => part.removed(table, draft, event),
                    Event::Cleared(_) => part.clear(table, draft),
                }
            }
        });
    }

    fn reset(&mut self) {
        let Self { index, part, .. } = self;
        index.change(|table, draft| part.clear(table, draft));
        part.groups = [Group::Unknown; MAX_GROUPS as usize];
    }

    fn set_state(&mut self, state: StreamState) {
        let id = self.part.column;
        self.index.change(|_, draft| {
            let stamp = stamp();
            draft.apply(Op::State { id, state, stamp });
        });
    }
}

impl Drop for EndpointWriter {
    fn drop(&mut self) {
        let id = self.part.column;
        self.index
            .change(|table, draft| table.drop_column(draft, id));
    }
}

impl Hashed {
    fn clear(&mut self) {
        self.contents.clear();
        self.contents.shrink_to(KEPT_BLOCKS);
        self.events.clear();
        self.events.shrink_to(KEPT_BLOCKS);
    }

    fn event(&mut self, hasher: BlockHasher, event: &Event<'_>) {
        let contents = match event {
            Event::Stored(event) if is_dense(event) && may_feed(event) => self.store(hasher, event),
            _ => Contents::None,
        };
        self.events.push(contents);
    }

    fn store(&mut self, hasher: BlockHasher, event: &Stored<'_>) -> Contents {
        let start = self.contents.len();
        let block_size = event.block_size as usize;
        let salt = event
            .cache_salt
            .filter(|salt| event.parent.is_none() && !salt.is_empty());
        let read = |raw| extra_keys(raw, event.hashes.len(), event.lora_name);
        let Ok(keys) = event.extra_keys.map(read).transpose() else {
            return Contents::Malformed;
        };
        let Some(mut keys) = keys.flatten() else {
            if salt.is_none() {
                // The usual engine; the compiler leaves extras out of this loop.
                hasher.contents(event.tokens, block_size, &mut self.contents, |_, _| {});
                return Contents::At(start..self.contents.len());
            }
            hasher.contents(event.tokens, block_size, &mut self.contents, |at, parts| {
                if let Some(salt) = salt.filter(|_| at == 0) {
                    parts.salt(salt);
                }
            });
            return Contents::At(start..self.contents.len());
        };
        let mut malformed = false;
        hasher.contents(event.tokens, block_size, &mut self.contents, |at, parts| {
            let first = event.parent.is_none() && at == 0;
            malformed |= keys
                .next_block(|key| extras::add(key, first, parts))
                .is_err();
            if let Some(salt) = salt.filter(|_| first) {
                parts.salt(salt);
            }
        });
        if malformed {
            return Contents::Malformed;
        }
        Contents::At(start..self.contents.len())
    }

    /// `None` when they could not be computed.
    fn of(&self, contents: &Contents) -> Option<&[BlockContent]> {
        match contents {
            Contents::None => Some(&[]),
            Contents::At(range) => self.contents.get(range.clone()),
            Contents::Malformed => None,
        }
    }
}

impl Part {
    fn stored(
        &mut self,
        table: &mut Table,
        draft: &mut Draft<'_>,
        event: &Stored<'_>,
        contents: Option<&[BlockContent]>,
        now: Instant,
    ) {
        if event.hashes.is_empty() {
            return;
        }
        if event.tokens.is_empty() {
            self.located(table, draft, event);
            return;
        }
        let Some(group) = self.dense_group(draft, event) else {
            return;
        };
        let Some(contents) = contents else {
            self.stats.malformed_extra_keys += 1;
            return;
        };
        let store = Dense {
            hashes: event.hashes,
            contents,
            parent: event.parent,
            block_size: event.block_size,
            lora: event.lora_name.filter(|name| !name.is_empty()),
            tier: draft.tier(event.medium),
            group,
        };
        if !self.store(table, draft, &store, now) || self.parked.is_empty() {
            return;
        }
        // A parent may have been waited for; so may its children.
        let mut news = event.hashes.to_vec();
        while !self.parked.is_empty()
            && let Some(parked) = self.parked.take(&news)
        {
            let child = parked.store();
            let group = self.groups.get(usize::from(child.group));
            if group == Some(&Group::Dense) && self.store(table, draft, &child, now) {
                news.extend_from_slice(child.hashes);
            }
        }
    }

    /// Stores dense blocks; false when they were dropped or parked.
    fn store(
        &mut self,
        table: &mut Table,
        draft: &mut Draft<'_>,
        store: &Dense<'_>,
        now: Instant,
    ) -> bool {
        let known = draft.view.column(self.column);
        let known = known.map_or(0, |column| column.block_size);
        if known != 0 && known != store.block_size {
            self.stats.block_size += 1;
            return false;
        }
        let mut at = None;
        let parent = match store.parent {
            None => self.hasher.start(&KeySpace {
                model: &self.model,
                lora: store.lora,
                block_size: store.block_size,
            }),
            Some(name) => {
                at = table.resolve(draft.view, self.column, name);
                let Some(parent) = at.and_then(|at| key(draft.view, at)) else {
                    self.stats.parked += 1;
                    self.stats.parked_dropped += self.parked.park(store, name, now);
                    return false;
                };
                parent
            }
        };
        self.chain(parent, store.contents);
        if known == 0 {
            draft.apply(Op::BlockSize {
                id: self.column,
                block_size: store.block_size,
            });
        }
        self.add_group(
            draft,
            Plane {
                column: self.column,
                tier: store.tier,
                group: store.group,
            },
        );
        let hold = Hold::Copy {
            tier: store.tier,
            group: store.group,
            names: store.hashes,
        };
        table.store(draft, self.column, at, &self.keys, hold);
        self.stats.stored_blocks += store.hashes.len() as u64;
        true
    }

    fn chain(&mut self, parent: BlockKey, contents: &[BlockContent]) {
        let mut key = parent;
        self.keys.clear();
        self.keys.shrink_to(KEPT_BLOCKS);
        self.keys.extend(contents.iter().map(|content| {
            key = self.hasher.chain(key, *content);
            key
        }));
    }

    /// Blocks of the plane's tier need a copy in its group from now on.
    #[expect(clippy::unused_self, reason = "a step of a store")]
    fn add_group(&self, draft: &mut Draft<'_>, plane: Plane) {
        let column = draft.view.column(plane.column);
        let groups = column.and_then(|column| column.groups.get(usize::from(plane.tier)));
        if groups.is_some_and(|groups| groups & 1 << plane.group == 0) {
            draft.apply(Op::AddGroup(plane));
        }
    }

    /// The event's group, if it tells something about prefixes: attention over the whole prompt, every
    /// block named.
    fn dense_group(&mut self, draft: &mut Draft<'_>, event: &Stored<'_>) -> Option<u8> {
        let dense = is_dense(event);
        let number = group_number(event.group);
        let slot = number.and_then(|number| self.groups.get_mut(usize::from(number)));
        let (Some(number), Some(slot)) = (number, slot) else {
            self.stats.unsupported_group += 1;
            return None;
        };
        match event.kind {
            Some(kind) if is_full(kind) => *slot = Group::Dense,
            None | Some("unknown") => {
                if *slot == Group::Unknown && dense {
                    *slot = Group::Dense;
                }
            }
            Some(_) => {
                if *slot == Group::Dense {
                    draft.apply(Op::DropGroup {
                        id: self.column,
                        group: number,
                    });
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

    /// Known blocks have a copy in another tier now.
    fn located(&mut self, table: &mut Table, draft: &mut Draft<'_>, event: &Stored<'_>) {
        let Some(plane) = self.plane(draft, event.group, event.medium) else {
            self.stats.unsupported_group += 1;
            return;
        };
        for hash in event.hashes {
            let Some(place) = table.resolve(draft.view, self.column, *hash) else {
                self.stats.unknown_hashes += 1;
                continue;
            };
            table.add_copy(draft, plane, place);
            self.stats.located_blocks += 1;
        }
        self.add_group(draft, plane);
    }

    /// Looks up what the events will remove.
    fn warm(&mut self, table: &Table, events: &[Event<'_>]) {
        self.names.clear();
        for event in events {
            if let Event::Removed(event) = event {
                let names = event.hashes.get(..WARM).unwrap_or(event.hashes);
                self.names.extend_from_slice(names);
            }
        }
        if self.names.len() > 1 {
            table.warm(self.column, &self.names);
        }
    }

    fn removed(&mut self, table: &mut Table, draft: &mut Draft<'_>, event: &Removed<'_>) {
        let Some(plane) = self.plane(draft, event.group, event.medium) else {
            self.stats.unsupported_group += 1;
            return;
        };
        for hash in event.hashes {
            match table.remove(draft, plane, *hash) {
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
    fn plane(&self, draft: &mut Draft<'_>, group: Option<u32>, medium: &str) -> Option<Plane> {
        let number = group_number(group)?;
        let known = self.groups.get(usize::from(number))?;
        let feeds = match group {
            None => *known != Group::Unsupported,
            Some(_) => *known == Group::Dense,
        };
        feeds.then(|| Plane {
            column: self.column,
            tier: draft.tier(medium),
            group: number,
        })
    }

    fn clear(&mut self, table: &mut Table, draft: &mut Draft<'_>) {
        self.parked.clear();
        table.clear(draft, self.column);
    }
}

/// The event's tokens may be worth hashing, as far as its kind tells.
fn may_feed(event: &Stored<'_>) -> bool {
    event
        .kind
        .is_none_or(|kind| kind == "unknown" || is_full(kind))
}

/// Kinds of groups that attend to the whole prompt.
fn is_full(kind: &str) -> bool {
    matches!(
        kind,
        "full_attention" | "mla_attention" | "sink_full_attention"
    )
}

/// Every block of the event's tokens has a hash.
fn is_dense(event: &Stored<'_>) -> bool {
    let block_size = event.block_size as usize;
    block_size > 0 && block_size.checked_mul(event.hashes.len()) == Some(event.tokens.len())
}

/// Dense number of a group; engines with a single group may not name it.
fn group_number(group: Option<u32>) -> Option<u8> {
    let group = group.unwrap_or(0);
    (group < MAX_GROUPS).then_some(u8::try_from(group).ok()?)
}
