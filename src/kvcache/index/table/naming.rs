//! What engines call blocks: from a name to a place, and the names of blocks that were stored.
//!
//! A column uses the names everybody uses until it calls a block something else; from then on all its
//! names are kept for it alone. So a name is looked for in one table, and columns whose engine hashes in
//! its own way do not touch what the others share.

use smallvec::SmallVec;

use super::{Column, Place, Table, View, holds, short};
use crate::kvcache::index::names::NONE;
use crate::kvcache::index::run::{Plane, Span};
use crate::kvcache::index::tagged::{Tag, Tagged, WARM};
use crate::kvcache::index::view::Draft;

/// Blocks of a run that a column stored, being named one after the other.
struct Naming<'a> {
    id: u32,
    first: Place,
    names: &'a [u64],
    /// The column may have names of its own for some of them.
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
        if column.apart {
            self.own_place(column, id, name)
        } else {
            self.shared_place(name)
        }
    }

    /// Looks for these names ahead of their use.
    pub(in super::super) fn warm(&self, id: u32, names: &[u64]) {
        if let Some(Some(column)) = self.columns.get(id as usize) {
            self.table_of(column).warm(names);
        }
    }

    /// The table with the column's names.
    fn table_of<'a>(&'a self, column: &'a Column) -> &'a Tagged {
        if column.apart {
            &column.own
        } else {
            &self.by_name
        }
    }

    /// The block only this column calls by the name.
    fn own_place(&self, column: &Column, id: u32, name: u64) -> Option<Place> {
        let own = |Place { run, offset }| self.meta(run)?.names.own(id, offset);
        let same = |block| self.numbers.place(block).and_then(own) == Some(name);
        self.numbers.place(column.own.find(Tag::of(name), same)?)
    }

    /// The block everybody calls by the name.
    fn shared_place(&self, name: u64) -> Option<Place> {
        let shared = |Place { run, offset }| self.meta(run)?.names.shared(offset);
        let same = |block| self.numbers.place(block).and_then(shared) == Some(name);
        self.numbers.place(self.by_name.find(Tag::of(name), same)?)
    }

    /// Notes what the column's engine calls the blocks from `first` on.
    pub(super) fn name(&mut self, draft: &mut Draft<'_>, id: u32, first: Place, names: &[u64]) {
        let column = self.columns.get(id as usize).and_then(Option::as_ref);
        let (Some(column), Some(meta)) = (column, self.meta(first.run)) else {
            return;
        };
        if !column.apart && meta.names.agree(first.offset, names) {
            return;
        }
        let end = first.offset + short(names.len());
        let mut naming = Naming {
            id,
            first,
            names,
            renamed: column.none.is_some()
                || names.contains(&NONE)
                || meta.names.has_own(id, first.offset..end),
            left: false,
        };
        let mut at = 0;
        while let Some(ahead) = names.get(at..).filter(|ahead| !ahead.is_empty()) {
            let chunk = ahead.get(..WARM).unwrap_or(ahead);
            let end = at + chunk.len();
            while at < end {
                let n = if naming.renamed || naming.left {
                    0
                } else {
                    self.name_new(&naming, at, end - at)
                };
                at += n;
                if n == 0 {
                    self.name_one(draft, &mut naming, at);
                    at += 1;
                }
            }
        }
    }

    /// The blocks from number `at` on, `n` at most, are called by their names now, up to the first whose
    /// name somebody may know or which others call something else. The column has no names for them yet.
    /// Returns how many.
    fn name_new(&mut self, naming: &Naming<'_>, at: usize, n: usize) -> usize {
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
            return 0;
        };
        let names = names.get(at..).unwrap_or_default();
        let offset = first.offset + short(at);
        let (n, table) = if column.apart {
            (n, &mut column.own)
        } else {
            (meta.names.unshared(offset, n), by_name)
        };
        let asked = names.get(..n).unwrap_or_default();
        let n = table.insert_new(asked, meta.sheets.numbers(offset));
        let (new, behind) = names.split_at_checked(n).unwrap_or_default();
        if column.apart {
            meta.names.add_own(id, offset, new, behind.len());
            *own_names += n;
        } else {
            meta.names.share(offset, new);
        }
        n
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
        let previous = self.resolve(draft.view, id, name);
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
        if naming.left && !holds(draft.view, id, place) {
            // The event names two blocks alike.
            return;
        }
        if self.share_one(id, place, name) {
            return;
        }
        if self.set_apart(draft.view, id) {
            naming.renamed = true;
        }
        if naming.renamed {
            self.unname(id, place);
        }
        if name != NONE {
            self.add_own(id, place, name, names.len() - at - 1);
        } else if let Some(generation) = self.meta(place.run).map(|meta| meta.generation)
            && let Some(column) = self.column(id)
        {
            column.none = Some((place, generation));
            naming.renamed = true;
        }
    }

    /// The column calls the block as everybody does or will. False when it cannot.
    fn share_one(&mut self, id: u32, place: Place, name: u64) -> bool {
        let apart = self.column(id).is_none_or(|column| column.apart);
        let Some(meta) = self.meta(place.run).filter(|_| !apart && name != NONE) else {
            return false;
        };
        match (
            meta.names.shared(place.offset),
            meta.sheets.number(place.offset),
        ) {
            (Some(shared), _) => shared == name,
            (None, Some(block)) if self.shared_place(name).is_none() => {
                if let Some(meta) = self.meta_mut(place.run) {
                    meta.names.share(place.offset, &[name]);
                }
                self.by_name.insert(Tag::of(name), block);
                true
            }
            _ => false,
        }
    }

    /// The column's names are kept for it alone from now on; false when they are already. Cost: the blocks
    /// it holds.
    fn set_apart(&mut self, view: &View, id: u32) -> bool {
        let Some(column) = self.column(id).filter(|column| !column.apart) else {
            return false;
        };
        column.apart = true;
        let runs: Vec<u32> = column.runs.keys().copied().collect();
        for run in runs {
            let spans = view.run(run).map_or(&[][..], |run| run.of_column(id));
            for span in spans {
                let Some(names) = self.meta(run).map(|meta| &meta.names) else {
                    continue;
                };
                // What it holds in another tier has a name already.
                let unnamed = (span.start..span.end).filter(|at| names.own(id, *at).is_none());
                let (offsets, names): (Vec<u32>, Vec<u64>) = unnamed
                    .filter_map(|at| Some((at, names.shared(at)?)))
                    .unzip();
                if let Some(column) = self.column(id) {
                    column.own.reserve(names.len());
                    column.own.warm(&names);
                }
                let behind = (0..offsets.len()).rev();
                for ((offset, name), behind) in offsets.iter().zip(&names).zip(behind) {
                    let offset = *offset;
                    self.add_own(id, Place { run, offset }, *name, behind);
                }
            }
        }
        true
    }

    /// The column has no name for the block; `more` of the following blocks will be named too.
    fn add_own(&mut self, id: u32, place: Place, name: u64, more: usize) {
        let Some(meta) = self.meta_mut(place.run) else {
            return;
        };
        let Some(block) = meta.sheets.number(place.offset) else {
            return;
        };
        meta.names.add_own(id, place.offset, &[name], more);
        self.own_names += 1;
        if let Some(column) = self.column(id) {
            column.own.insert(Tag::of(name), block);
        }
    }

    /// The column has no name of its own for the block any more.
    pub(super) fn unname(&mut self, id: u32, place: Place) {
        let Self {
            metas,
            columns,
            own_names,
            ..
        } = self;
        let Some(column) = columns.get_mut(id as usize).and_then(Option::as_mut) else {
            return;
        };
        if column.none.is_some_and(|(none, _)| none == place) {
            column.none = None;
        }
        let Some(meta) = metas.get_mut(place.run as usize).filter(|_| column.apart) else {
            return;
        };
        if let Some(name) = meta.names.remove_own(id, place.offset)
            && let Some(block) = meta.sheets.number(place.offset)
        {
            column.own.remove(Tag::of(name), block);
            *own_names -= 1;
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
