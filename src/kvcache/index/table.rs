//! Decides what an event does to the index, and keeps what only writers need: names, who is where, what
//! to drop next. One lock's content.

mod naming;
mod room;

use std::collections::VecDeque;

use hashbrown::HashMap;
use smallvec::SmallVec;

use super::lookup::Trust;
use super::names::Names;
use super::numbers::{Numbers, Sheets};
use super::run::{Expected, Plane, Span};
use super::tagged::{Tag, Tagged};
use super::tier::{GPU, MAX_TIERS, SPECULATIVE};
use super::view::{Draft, Op, View, stamp};
use crate::kvcache::block::BlockKey;
use room::{BLOCK_BYTES, RUN_BYTES, SPAN_BYTES};

/// Cache groups told apart on one endpoint; engines have a handful.
pub(super) const MAX_GROUPS: u32 = 32;
/// Predictions waiting for their deadline at most; at 2 s each, 32,000 requests a second.
pub(super) const MAX_EXPECTED: usize = 1 << 16;

/// Stands for the time of the first store where there was none.
pub(super) const PREDICTED: u32 = u32::MAX;

/// A block's place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) run: u32,
    pub(super) offset: u32,
}

/// Of a publisher, what look-ups do not need.
#[derive(Debug, Default)]
struct Column {
    /// Runs it has spans or predictions in, and when it first stored to each, in seconds since the index
    /// began; [`PREDICTED`] until it did.
    runs: HashMap<u32, u32>,
    /// Its names are kept for it alone.
    apart: bool,
    /// If so, the blocks it has names for.
    own: Tagged,
    /// The block it calls [`super::names::NONE`], with its run's generation.
    none: Option<(Place, u32)>,
    /// Tiers with a store and without any removal, as bits.
    silent_tiers: u8,
    /// Tiers with a removal.
    removed_tiers: u8,
    /// Minute in which silent tiers were looked through last.
    swept: u32,
}

/// Of a run, what look-ups do not need.
#[derive(Debug, Default)]
struct Meta {
    names: Names,
    sheets: Sheets,
    /// Run and generation this one goes on from.
    parent: Option<(u32, u32)>,
    /// Runs that go on from this one.
    children: u32,
    /// Tells a run from the one that had its number before.
    generation: u32,
    /// Minute of the newest store.
    stored: u32,
    /// Stored to since the clock hand passed.
    referenced: bool,
}

/// Counters of the table; those below `predictions` only grow.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TableStats {
    /// Estimated memory.
    pub used_bytes: usize,
    /// Distinct blocks.
    pub blocks: usize,
    /// Runs they lie in.
    pub runs: usize,
    /// Publishers with a part in it: ranks of endpoints.
    pub columns: usize,
    /// Predictions that wait for events or their deadline.
    pub predictions: usize,
    /// Runs dropped because the memory bound was reached.
    pub evicted_runs: u64,
    /// Blocks that were in them.
    pub evicted_blocks: u64,
    /// Blocks not taken in because nothing could be dropped for them.
    pub refused_blocks: u64,
    /// Predictions not taken in because too many wait.
    pub refused_predictions: u64,
    /// Times an endpoint's part of a run was dropped because its tier never reports removals.
    pub aged_out: u64,
}

#[derive(Debug)]
pub(super) struct Table {
    metas: Vec<Meta>,
    columns: Vec<Option<Column>>,
    /// Blocks with a shared name.
    by_name: Tagged,
    numbers: Numbers,
    free_runs: Vec<u32>,
    free_columns: Vec<u32>,
    /// Deadline, run and its generation, oldest first.
    expiry: VecDeque<(u64, u32, u32)>,
    /// Where the clock hand of eviction stands.
    hand: usize,
    blocks: usize,
    spans: usize,
    own_names: usize,
    max_bytes: usize,
    /// Minutes after which what a silent tier stored is dropped.
    silent_minutes: u32,
    /// Seconds since the index was made.
    now_s: u32,
    stats: TableStats,
}

/// What became of a removal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Removal {
    /// The column has no such copy.
    Unknown,
    /// Another copy stays, there or in another tier.
    Kept,
    /// The column holds the block no longer.
    Gone,
}

/// How stored blocks are held.
#[derive(Debug, Clone, Copy)]
pub(super) enum Hold<'a> {
    /// A copy in a tier; one name for each key.
    Copy {
        tier: u8,
        group: u8,
        names: &'a [u64],
    },
    /// A prediction.
    Until(u64),
}

impl Table {
    pub(super) fn new(max_bytes: usize, silent_minutes: u32) -> Self {
        Self {
            metas: Vec::new(),
            columns: Vec::new(),
            by_name: Tagged::default(),
            numbers: Numbers::default(),
            free_runs: Vec::new(),
            free_columns: Vec::new(),
            expiry: VecDeque::new(),
            hand: 0,
            blocks: 0,
            spans: 0,
            own_names: 0,
            max_bytes,
            silent_minutes,
            now_s: 0,
            stats: TableStats::default(),
        }
    }

    pub(super) fn stats(&self, view: &View) -> TableStats {
        TableStats {
            used_bytes: self.used_bytes(view),
            blocks: self.blocks,
            runs: view.heads.len(),
            columns: self.columns.len() - self.free_columns.len(),
            predictions: self.expiry.len(),
            ..self.stats
        }
    }

    pub(super) fn add_column(&mut self, draft: &mut Draft<'_>, endpoint: u32) -> u32 {
        let id = self.free_columns.pop().unwrap_or_else(|| {
            self.columns.push(None);
            short(self.columns.len() - 1)
        });
        let swept = self.minute();
        if let Some(slot) = self.columns.get_mut(id as usize) {
            *slot = Some(Column {
                swept,
                ..Column::default()
            });
        }
        let stamp = stamp();
        draft.apply(Op::AddColumn {
            id,
            endpoint,
            stamp,
        });
        id
    }

    pub(super) fn drop_column(&mut self, draft: &mut Draft<'_>, id: u32) {
        self.clear(draft, id);
        if let Some(column) = self.columns.get_mut(id as usize) {
            *column = None;
            self.free_columns.push(id);
        }
        let stamp = stamp();
        draft.apply(Op::DropColumn { id, stamp });
    }

    /// Forgets what the column holds. Cost: its runs, whatever the size of the table.
    pub(super) fn clear(&mut self, draft: &mut Draft<'_>, id: u32) {
        let Some(column) = self.column(id) else {
            return;
        };
        let old = std::mem::take(column);
        column.swept = old.swept;
        column.removed_tiers = old.removed_tiers;
        draft.apply(Op::ResetColumn { id });
        for run in old.runs.into_keys() {
            if let Some(meta) = self.meta_mut(run) {
                let names = meta.names.clear(id);
                self.own_names -= names;
            }
            self.change(draft, run, Op::Clear { run, column: id });
            self.trim(draft, run);
        }
    }

    /// Stores `keys`, which follow the block at `parent`. Blocks beyond the memory bound are refused
    /// from the tail.
    pub(super) fn store(
        &mut self,
        draft: &mut Draft<'_>,
        id: u32,
        parent: Option<Place>,
        keys: &[BlockKey],
        hold: Hold<'_>,
    ) {
        let mut at = parent;
        let mut done = 0;
        while let Some(&next) = keys.get(done) {
            let rest = keys.get(done..).unwrap_or_default();
            let place = find(draft.view, at, next).or_else(|| self.append(draft, id, at, rest));
            let Some(place) = place else {
                self.stats.refused_blocks += rest.len() as u64;
                return;
            };
            let run = draft.view.run(place.run);
            let n = run.map_or(0, |run| run.common(place.offset as usize, rest));
            let names = self.name_bytes(id);
            let fits = self.make_room(draft, n, names, SPAN_BYTES, Some(place.run));
            let Some(n) = fits.filter(|n| *n > 0) else {
                self.stats.refused_blocks += rest.len() as u64;
                return;
            };
            self.hold(draft, id, place, n, done, hold);
            done += n;
            // It may have names of its own now; when they do not fit with the run alone, that goes too.
            let pinned = Some(place.run);
            if names == 0 && self.make_room(draft, 0, 0, 0, pinned).is_none() {
                self.make_room(draft, 0, 0, 0, None);
                self.stats.refused_blocks += (keys.len() - done) as u64;
                return;
            }
            at = Some(Place {
                run: place.run,
                offset: place.offset + short(n) - 1,
            });
        }
    }

    /// One more copy of a known block.
    pub(super) fn add_copy(&mut self, draft: &mut Draft<'_>, plane: Plane, place: Place) {
        self.stored_in(plane, place.run);
        let (start, end) = (place.offset, place.offset + 1);
        let run = place.run;
        self.change(
            draft,
            run,
            Op::Store {
                run,
                plane,
                start,
                end,
            },
        );
    }

    /// One copy less.
    pub(super) fn remove(&mut self, draft: &mut Draft<'_>, plane: Plane, name: u64) -> Removal {
        let id = plane.column;
        let Some(place) = self.place_of(id, name) else {
            return Removal::Unknown;
        };
        let Some(run) = draft.view.run(place.run) else {
            return Removal::Unknown;
        };
        if !run.has(plane, place.offset) {
            return Removal::Unknown;
        }
        let last = run.keys.len() == place.offset as usize + 1;
        if let Some(column) = self.column(id) {
            let tier = 1 << plane.tier;
            column.removed_tiers |= tier;
            column.silent_tiers &= !tier;
        }
        self.remove_copy(draft, plane, place);
        if holds(draft.view, id, place) {
            return Removal::Kept;
        }
        self.unname(id, place);
        self.forget_if_absent(draft.view, id, place.run);
        // The last block of a run is always held; in front of it nothing ends.
        if last {
            self.trim(draft, place.run);
        }
        Removal::Gone
    }

    /// Predicts that `endpoint` will hold `keys` until `deadline_ms`: the rank of it that already holds
    /// most of them, of those best known.
    pub(super) fn expect(
        &mut self,
        draft: &mut Draft<'_>,
        endpoint: u32,
        keys: &[BlockKey],
        deadline_ms: u64,
    ) {
        let view = &draft.view;
        let rank = match view.ranks(endpoint) {
            [] => return,
            [only] => *only,
            ranks => {
                let worth = |id: &&u32| {
                    let state = view.column(**id).map(|column| column.state);
                    (state.map(Trust::from), view.depth(**id, keys))
                };
                // Of equals, the first.
                ranks.iter().rev().max_by_key(worth).copied().unwrap_or(0)
            }
        };
        if self.expiry.len() >= MAX_EXPECTED {
            self.stats.refused_predictions += 1;
            return;
        }
        self.store(draft, rank, None, keys, Hold::Until(deadline_ms));
    }

    /// Predictions that were turned away before they got here.
    pub(super) fn refuse_predictions(&mut self, n: u64) {
        self.stats.refused_predictions += n;
    }

    /// Drops predictions whose deadline has passed. Look-ups leave them out by themselves; this frees
    /// their memory.
    pub(super) fn expire(&mut self, draft: &mut Draft<'_>, now_ms: u64) {
        while let Some(&(deadline, id, generation)) = self.expiry.front()
            && deadline <= now_ms
        {
            self.expiry.pop_front();
            if self.meta(id).map(|meta| meta.generation) != Some(generation) {
                continue;
            }
            let expected = draft.view.run(id).map_or(&[][..], |run| &*run.expected);
            let expired = expected.iter().filter(|e| e.deadline_ms <= now_ms);
            let columns: SmallVec<[u32; 4]> = expired.map(|e| e.column).collect();
            if columns.is_empty() {
                continue;
            }
            draft.apply(Op::Expire { run: id, now_ms });
            for column in columns {
                self.forget_if_absent(draft.view, column, id);
            }
            self.trim(draft, id);
        }
    }

    /// It is so many seconds after the index was made. Once a minute, what the column's silent tiers
    /// stored long ago is dropped: a tier that never reports a removal is taken for a connector that does
    /// not (LMCache's), unless it is the GPU.
    pub(super) fn age(&mut self, draft: &mut Draft<'_>, id: u32, now_s: u32) {
        self.now_s = now_s;
        let minute = self.minute();
        let Some(newest_old) = minute.checked_sub(self.silent_minutes) else {
            return;
        };
        let Some(column) = self.column(id) else {
            return;
        };
        if column.swept == minute || column.silent_tiers == 0 {
            return;
        }
        column.swept = minute;
        let tiers = column.silent_tiers;
        let runs: Vec<u32> = column.runs.keys().copied().collect();
        for run in runs {
            if self.meta(run).is_some_and(|meta| meta.stored <= newest_old) {
                self.age_run(draft, id, run, tiers);
            }
        }
    }

    fn age_run(&mut self, draft: &mut Draft<'_>, id: u32, run: u32, tiers: u8) {
        let spans = draft.view.run(run).map_or(&[][..], |run| run.of_column(id));
        let old = spans.iter().filter(|span| tiers & 1 << span.tier != 0);
        let old: SmallVec<[Span; 4]> = old.copied().collect();
        for span in &old {
            let tier = span.tier;
            let column = id;
            self.change(draft, run, Op::ClearTier { run, column, tier });
            self.stats.aged_out += 1;
        }
        for offset in old.iter().flat_map(|span| span.start..span.end) {
            let place = Place { run, offset };
            if !holds(draft.view, id, place) {
                self.unname(id, place);
            }
        }
        self.forget_if_absent(draft.view, id, run);
        self.trim(draft, run);
    }

    /// Makes room for the unknown keys at the front of `keys`: behind `at` if that is the end of its
    /// run, else in a run of their own. Stops before a key that is known as the head of a run.
    fn append(
        &mut self,
        draft: &mut Draft<'_>,
        id: u32,
        at: Option<Place>,
        keys: &[BlockKey],
    ) -> Option<Place> {
        let known = |key: &BlockKey| draft.view.heads.contains_key(key);
        let n = keys.iter().position(known).unwrap_or(keys.len());
        let each = BLOCK_BYTES + self.name_bytes(id);
        let n = self.make_room(draft, n, each, RUN_BYTES + SPAN_BYTES, at.map(|at| at.run))?;
        let keys = keys.get(..n)?;
        let end = at.filter(|at| {
            let run = draft.view.run(at.run);
            run.is_some_and(|run| run.keys.len() == at.offset as usize + 1)
        });
        let place = match end {
            Some(at) => Place {
                run: at.run,
                offset: at.offset + 1,
            },
            None => Place {
                run: self.new_run(at),
                offset: 0,
            },
        };
        draft.append(place.run, keys);
        let meta = self.metas.get_mut(place.run as usize)?;
        let len = place.offset as usize + n;
        self.numbers.resize(place.run, &mut meta.sheets, len);
        self.blocks += n;
        Some(place)
    }

    fn new_run(&mut self, at: Option<Place>) -> u32 {
        let parent = at.and_then(|at| {
            let parent = self.meta_mut(at.run)?;
            parent.children += 1;
            Some((at.run, parent.generation))
        });
        let id = self.free_runs.pop().unwrap_or_else(|| {
            self.metas.push(Meta::default());
            short(self.metas.len() - 1)
        });
        if let Some(meta) = self.meta_mut(id) {
            meta.parent = parent;
        }
        id
    }

    /// Marks `n` blocks from `place` on as held; the first is number `done` of the store.
    fn hold(
        &mut self,
        draft: &mut Draft<'_>,
        id: u32,
        place: Place,
        n: usize,
        done: usize,
        hold: Hold<'_>,
    ) {
        let run = place.run;
        let (start, end) = (place.offset, place.offset + short(n));
        let now_s = self.now_s;
        if let Some(column) = self.column(id) {
            let since = column.runs.entry(run).or_insert(PREDICTED);
            if matches!(hold, Hold::Copy { .. }) && *since == PREDICTED {
                *since = now_s;
            }
        }
        match hold {
            Hold::Copy { tier, group, names } => {
                let plane = Plane {
                    column: id,
                    tier,
                    group,
                };
                self.stored_in(plane, run);
                self.change(
                    draft,
                    run,
                    Op::Store {
                        run,
                        plane,
                        start,
                        end,
                    },
                );
                let expected = draft.view.run(run).map(|run| run.expected_of(id));
                if expected.is_some_and(|expected| !expected.is_empty()) {
                    draft.apply(Op::Confirm {
                        run,
                        column: id,
                        start,
                        end,
                    });
                }
                // Held first: a name that moves here may empty the run it moves from.
                if let Some(names) = names.get(done..done + n) {
                    self.name(draft, id, place, names);
                }
            }
            Hold::Until(deadline_ms) => {
                let Some(meta) = self.meta_mut(run) else {
                    return;
                };
                meta.referenced = true;
                let generation = meta.generation;
                self.expiry.push_back((deadline_ms, run, generation));
                let expected = Expected {
                    column: id,
                    start,
                    end,
                    deadline_ms,
                };
                draft.apply(Op::Expect { run, expected });
            }
        }
    }

    /// A copy came to the run.
    fn stored_in(&mut self, plane: Plane, run: u32) {
        let minute = self.minute();
        if let Some(meta) = self.meta_mut(run) {
            meta.referenced = true;
            meta.stored = minute;
        }
        if plane.tier != GPU
            && let Some(column) = self.column(plane.column)
        {
            column.silent_tiers |= 1 << plane.tier & !column.removed_tiers;
        }
    }

    fn remove_copy(&mut self, draft: &mut Draft<'_>, plane: Plane, place: Place) {
        let Place { run, offset } = place;
        self.change(draft, run, Op::Remove { run, plane, offset });
    }

    /// Changes a run's spans and keeps their number.
    fn change(&mut self, draft: &mut Draft<'_>, run: u32, op: Op) {
        let spans = |draft: &Draft<'_>| draft.view.run(run).map_or(0, |run| run.spans.len());
        self.spans -= spans(draft);
        draft.apply(op);
        self.spans += spans(draft);
    }

    fn forget_if_absent(&mut self, view: &View, column: u32, run: u32) {
        let lacks = view.run(run).is_some_and(|run| run.lacks(column));
        if lacks && let Some(column) = self.column(column) {
            column.runs.remove(&run);
        }
    }

    /// Cuts the blocks nobody holds off the end of a run; frees it when none is left.
    fn trim(&mut self, draft: &mut Draft<'_>, id: u32) {
        let Some(run) = draft.view.run(id) else {
            return;
        };
        let held = run.held();
        if held >= run.keys.len() {
            return;
        }
        if held == 0 {
            self.free(draft, id);
            return;
        }
        self.blocks -= run.keys.len() - held;
        self.cut_names(id, held);
        draft.apply(Op::Truncate { run: id, len: held });
    }

    fn free(&mut self, draft: &mut Draft<'_>, id: u32) {
        let Some(run) = draft.view.run(id) else {
            return;
        };
        self.blocks -= run.keys.len();
        self.spans -= run.spans.len();
        let spans = run.spans.iter().map(|span| span.column);
        for column in spans.chain(run.expected.iter().map(|e| e.column)) {
            if let Some(column) = self.column(column) {
                column.runs.remove(&id);
            }
        }
        self.cut_names(id, 0);
        draft.apply(Op::Free { run: id });
        let Some(slot) = self.meta_mut(id) else {
            return;
        };
        let old = std::mem::take(slot);
        slot.generation = old.generation.wrapping_add(1);
        if let Some((parent, generation)) = old.parent
            && let Some(parent) = self.meta_mut(parent)
            && parent.generation == generation
        {
            parent.children = parent.children.saturating_sub(1);
        }
        self.free_runs.push(id);
    }

    /// Gives up the names of all but the first `len` blocks.
    fn cut_names(&mut self, run: u32, len: usize) {
        let Self {
            metas,
            columns,
            by_name,
            numbers,
            own_names,
            ..
        } = self;
        let Some(Meta { names, sheets, .. }) = metas.get_mut(run as usize) else {
            return;
        };
        names.cut(
            len,
            |offset, name| {
                if let Some(block) = sheets.number(offset) {
                    by_name.remove(Tag::of(name), block);
                }
            },
            |column, offset, name| {
                if let Some(Some(column)) = columns.get_mut(column as usize)
                    && let Some(block) = sheets.number(offset)
                {
                    column.own.remove(Tag::of(name), block);
                }
                *own_names -= 1;
            },
        );
        numbers.resize(run, sheets, len);
    }

    /// When the column first stored to the run, [`PREDICTED`] if it has not; `None` when nothing of it is
    /// there.
    pub(super) fn since(&self, id: u32, run: u32) -> Option<u32> {
        let column = self.columns.get(id as usize)?.as_ref()?;
        column.runs.get(&run).copied()
    }

    /// Runs that hold something of the column.
    pub(super) fn runs_of(&self, id: u32) -> impl Iterator<Item = u32> {
        let column = self.columns.get(id as usize).and_then(Option::as_ref);
        column
            .into_iter()
            .flat_map(|column| column.runs.keys().copied())
    }

    fn minute(&self) -> u32 {
        self.now_s / 60
    }

    fn meta(&self, run: u32) -> Option<&Meta> {
        self.metas.get(run as usize)
    }

    fn meta_mut(&mut self, run: u32) -> Option<&mut Meta> {
        self.metas.get_mut(run as usize)
    }

    fn column(&mut self, id: u32) -> Option<&mut Column> {
        self.columns.get_mut(id as usize)?.as_mut()
    }
}

fn holds(view: &View, id: u32, place: Place) -> bool {
    let run = view.run(place.run);
    run.is_some_and(|run| run.holds(id, place.offset))
}

/// The key of a block.
pub(super) fn key(view: &View, place: Place) -> Option<BlockKey> {
    let run = view.run(place.run)?;
    run.keys.get(place.offset as usize).copied()
}

/// The place of the key behind `at`, or at the start of a prompt.
fn find(view: &View, at: Option<Place>, wanted: BlockKey) -> Option<Place> {
    if let Some(at) = at {
        let next = Place {
            run: at.run,
            offset: at.offset + 1,
        };
        if key(view, next) == Some(wanted) {
            return Some(next);
        }
    }
    let run = *view.heads.get(&wanted)?;
    Some(Place { run, offset: 0 })
}

/// Numbers of runs, columns and offsets fit 32 bits long after memory has run out.
pub(super) fn short(n: usize) -> u32 {
    u32::try_from(n).unwrap_or(u32::MAX)
}

const _: () = assert!((SPECULATIVE as usize) < MAX_TIERS);
