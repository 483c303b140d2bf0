//! What engines call blocks: from a name to a place, and the names of blocks that were stored.

use hashbrown::HashTable;
use smallvec::SmallVec;

use super::{Column, Named, Place, Table, View, holds, short};
use crate::kvcache::index::names::NONE;
use crate::kvcache::index::run::{Plane, Span};
use crate::kvcache::index::view::Draft;

/// Names looked up ahead of their use.
pub(in super::super) const WARM: usize = 64;

/// Blocks of a run that a column stored, being named one after the other.
struct Naming<'a> {
    id: u32,
    first: Place,
    names: &'a [u64],
    /// The column may have other names for some of them.
    renamed: bool,
    /// Some block had to be given up, maybe one of these.
    left: bool,
}

impl Table {
    /// Where a name of the column's engine stands, if the column holds the block.
    pub(in super::super) fn resolve(&self, view: &View, id: u32, name: u64) -> Option<Place> {
        let place = self.place_of(id, name)?;
        holds(view, id, place).then_some(place)
    }

    /// Where a name of the column's engine stands, whoever holds the block.
    pub(super) fn place_of(&self, id: u32, name: u64) -> Option<Place> {
        let column = self.columns.get(id as usize)?.as_ref()?;
        if name == NONE {
            let (place, generation) = column.none?;
            return (self.meta(place.run)?.generation == generation).then_some(place);
        }
        if let Some(place) = self.own_place(column, id, name) {
            return Some(place);
        }
        self.if_shared(id, self.shared_place(name))
    }

    /// As [`Table::resolve`], for a name that everybody else uses for the block at `shared`.
    fn resolve_known(
        &self,
        view: &View,
        id: u32,
        name: u64,
        shared: Option<Place>,
    ) -> Option<Place> {
        if name == NONE {
            return self.resolve(view, id, name);
        }
        let column = self.columns.get(id as usize)?.as_ref()?;
        let own = self.own_place(column, id, name);
        let place = own.or_else(|| self.if_shared(id, shared))?;
        holds(view, id, place).then_some(place)
    }

    /// The block at `place`, if the column calls it what everybody does.
    fn if_shared(&self, id: u32, place: Option<Place>) -> Option<Place> {
        let place = place?;
        let own = self.meta(place.run)?.names.own(id, place.offset);
        own.is_none().then_some(place)
    }

    /// Brings what the tables have for these names into the processor's caches: look-ups that do not
    /// depend on each other wait for memory together, and the exact ones that follow do not.
    pub(in super::super) fn warm(&self, id: u32, names: &[u64]) {
        let Some(Some(column)) = self.columns.get(id as usize) else {
            return;
        };
        let found = names
            .iter()
            .filter(|name| self.may_know(column, tag(**name)));
        std::hint::black_box(found.count());
    }

    /// Which of the first [`WARM`] names are certainly new, as bits: no table has one with such a tag, and
    /// no name before it either.
    fn new_names(&self, id: u32, names: &[u64]) -> u64 {
        let Some(Some(column)) = self.columns.get(id as usize) else {
            return 0;
        };
        let mut before = [0_u64; 16];
        let mut new = 0;
        for (at, name) in names.iter().take(WARM).enumerate() {
            let tag = tag(*name);
            let known = self.may_know(column, tag);
            let mark = 1 << (tag & 63);
            let marks = before.get_mut((tag >> 6 & 15) as usize);
            let repeated = marks.is_none_or(|marks| {
                let repeated = *marks & mark != 0;
                *marks |= mark;
                repeated
            });
            let is_new = !(known || repeated || *name == NONE);
            new |= u64::from(is_new) << at;
        }
        new
    }

    /// Some name with the tag is known.
    fn may_know(&self, column: &Column, tag: u32) -> bool {
        let same = |named: &Named| named.tag == tag;
        let own = column.own.find(spread(tag), same).is_some();
        own | self.by_name.find(spread(tag), same).is_some()
    }

    /// The block only this column calls by the name.
    fn own_place(&self, column: &Column, id: u32, name: u64) -> Option<Place> {
        let tag = tag(name);
        let same = |named: &Named| {
            let Place { run, offset } = named.place;
            let meta = (named.tag == tag).then(|| self.meta(run)).flatten();
            meta.and_then(|meta| meta.names.own(id, offset)) == Some(name)
        };
        Some(column.own.find(spread(tag), same)?.place)
    }

    /// The block everybody calls by the name.
    fn shared_place(&self, name: u64) -> Option<Place> {
        let tag = tag(name);
        let same = |named: &Named| {
            let Place { run, offset } = named.place;
            let meta = (named.tag == tag).then(|| self.meta(run)).flatten();
            meta.and_then(|meta| meta.names.shared(offset)) == Some(name)
        };
        Some(self.by_name.find(spread(tag), same)?.place)
    }

    /// Notes what the column's engine calls the blocks from `first` on.
    pub(super) fn name(&mut self, draft: &mut Draft<'_>, id: u32, first: Place, names: &[u64]) {
        let Some(meta) = self.meta(first.run) else {
            return;
        };
        let agree = meta.names.agree(first.offset, names);
        let Some(column) = self.column(id) else {
            return;
        };
        if agree && column.own.is_empty() {
            return;
        }
        let renamed = column.none.is_some() || {
            let end = first.offset + short(names.len());
            self.meta(first.run)
                .is_some_and(|meta| meta.names.has_own(id, first.offset..end))
        };
        let mut naming = Naming {
            id,
            first,
            names,
            renamed,
            left: false,
        };
        let mut at = 0;
        while let Some(ahead) = names.get(at..).filter(|ahead| !ahead.is_empty()) {
            let chunk = ahead.get(..WARM).unwrap_or(ahead);
            let mut new = self.new_names(id, chunk);
            let end = at + chunk.len();
            while at < end {
                let n = if naming.renamed || naming.left {
                    0
                } else {
                    new.trailing_ones()
                };
                if n == 0 {
                    self.name_one(draft, &mut naming, at);
                    at += 1;
                    new >>= 1;
                } else {
                    self.name_new(&naming, at, n as usize);
                    at += n as usize;
                    new = new.unbounded_shr(n);
                }
            }
        }
    }

    /// The `n` blocks from number `at` on are called by their names now, which nobody has used and which
    /// are all different; the column has no names for them.
    fn name_new(&mut self, naming: &Naming<'_>, at: usize, n: usize) {
        let Self {
            metas,
            columns,
            by_name,
            own_names,
            ..
        } = self;
        let Naming {
            id, first, names, ..
        } = *naming;
        let meta = metas.get_mut(first.run as usize);
        let column = columns.get_mut(id as usize).and_then(Option::as_mut);
        let (Some(meta), Some(column)) = (meta, column) else {
            return;
        };
        let mut place = Place {
            run: first.run,
            offset: first.offset + short(at),
        };
        let mut rest = names.get(at..at + n).unwrap_or_default();
        let behind = names.len() - at - n;
        while !rest.is_empty() {
            let (same, shared) = meta.names.alike(place.offset, rest.len());
            let (now, later) = rest.split_at(same);
            let table = if shared {
                meta.names
                    .add_own(id, place.offset, now, later.len() + behind);
                *own_names += same;
                &mut column.own
            } else {
                meta.names.share(place.offset, now);
                &mut *by_name
            };
            table.reserve(same, |named| spread(named.tag));
            for name in now {
                insert(table, place, *name);
                place.offset += 1;
            }
            rest = later;
        }
    }

    /// Block number `at` is called by its name now; those behind it will be.
    fn name_one(&mut self, draft: &mut Draft<'_>, naming: &mut Naming<'_>, at: usize) {
        let Naming {
            id, first, names, ..
        } = *naming;
        let Some(&name) = names.get(at) else {
            return;
        };
        let place = Place {
            run: first.run,
            offset: first.offset + short(at),
        };
        let known = self.shared_place(name);
        let previous = self.resolve_known(draft.view, id, name, known);
        if previous == Some(place) {
            return;
        }
        if let Some(previous) = previous {
            let behind = previous.offset.checked_sub(first.offset);
            let behind = behind.filter(|n| previous.run == first.run && *n as usize > at);
            let next = behind.and_then(|n| names.get(n as usize));
            if next.is_none_or(|next| *next == name) {
                self.leave(draft, id, previous);
                naming.left = true;
            }
        }
        if naming.renamed {
            self.unname(id, place);
        }
        let Some(meta) = self.meta(place.run) else {
            return;
        };
        let generation = meta.generation;
        let shared = meta.names.shared(place.offset);
        if naming.left && !holds(draft.view, id, place) {
            // The event names two blocks alike.
        } else if name == NONE {
            if let Some(column) = self.column(id) {
                column.none = Some((place, generation));
            }
            naming.renamed = true;
        } else if shared == Some(name) {
            // As everybody.
        } else if shared.is_none() && self.is_free(name, known, naming.left) {
            self.share(place, name);
        } else {
            self.add_own(id, place, name, names.len() - at - 1);
        }
    }

    /// Nobody calls a block by the name; `known` was who did, until something was `left`.
    fn is_free(&self, name: u64, known: Option<Place>, left: bool) -> bool {
        known.is_none() || left && self.shared_place(name).is_none()
    }

    fn share(&mut self, place: Place, name: u64) {
        if let Some(meta) = self.meta_mut(place.run) {
            meta.names.share(place.offset, &[name]);
        }
        insert(&mut self.by_name, place, name);
    }

    fn add_own(&mut self, id: u32, place: Place, name: u64, more: usize) {
        if let Some(meta) = self.meta_mut(place.run) {
            meta.names.add_own(id, place.offset, &[name], more);
        }
        if let Some(column) = self.column(id) {
            insert(&mut column.own, place, name);
            self.own_names += 1;
        }
    }

    /// The column has no name of its own for the block any more.
    pub(super) fn unname(&mut self, id: u32, place: Place) {
        let meta = self.meta_mut(place.run);
        let name = meta.and_then(|meta| meta.names.remove_own(id, place.offset));
        let Some(column) = self.column(id) else {
            return;
        };
        if column.none.is_some_and(|(none, _)| none == place) {
            column.none = None;
        }
        if let Some(name) = name {
            remove(&mut column.own, place, name);
            self.own_names -= 1;
        }
    }

    /// The column's engine gave the block's name to another block: the copies can no longer be named.
    pub(super) fn leave(&mut self, draft: &mut Draft<'_>, id: u32, place: Place) {
        let run = draft.view.run(place.run);
        let spans = run.map_or(&[][..], |run| run.of_column(id));
        let planes: SmallVec<[Plane; 4]> = spans.iter().map(Span::plane).collect();
        for plane in planes {
            while draft
                .view
                .run(place.run)
                .is_some_and(|run| run.has(plane, place.offset))
            {
                self.remove_copy(draft, plane, place);
            }
        }
        self.unname(id, place);
        self.forget_if_absent(draft.view, id, place.run);
        self.trim(draft, place.run);
    }
}

fn insert(table: &mut HashTable<Named>, place: Place, name: u64) {
    let tag = tag(name);
    table.insert_unique(spread(tag), Named { place, tag }, |named| spread(named.tag));
}

pub(super) fn remove(table: &mut HashTable<Named>, place: Place, name: u64) {
    let same = |named: &Named| named.place == place;
    if let Ok(entry) = table.find_entry(spread(tag(name)), same) {
        entry.remove();
    }
}

/// 32 bits of a name. Names are hashes, but nobody says how good.
fn tag(name: u64) -> u32 {
    let product = u128::from(name ^ 0x9e37_79b9_7f4a_7c15) * 0xd6e8_feb8_6659_fd93;
    #[expect(clippy::cast_possible_truncation, reason = "all parts are used")]
    let folded = (product >> 64) as u32 ^ (product >> 32) as u32;
    folded
}

/// A tag as hash tables want it, with bits at both ends.
fn spread(tag: u32) -> u64 {
    u64::from(tag)
        .wrapping_mul(0x9e37_79b9_7f4a_7c15)
        .rotate_left(32)
        ^ u64::from(tag)
}
