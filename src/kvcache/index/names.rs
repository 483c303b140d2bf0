//! What engines call the blocks of a run.
//!
//! Engines with the same algorithm and seed agree, so one list serves all of them; an engine that calls a
//! block something else has a list of its own, from the first block it names to the last.

use std::ops::Range;

use super::run::shorten;
use super::table::short;

/// Stands for "no name". An engine may use it as a name all the same; the table sees to that.
pub(super) const NONE: u64 = 0;

/// Names of the blocks of one run.
#[derive(Debug, Default)]
pub(super) struct Names {
    /// Of each block up to the last that has one; [`NONE`] where nobody has named it.
    shared: Vec<u64>,
    /// Ordered by column.
    own: Vec<Own>,
}

/// What one column calls blocks that others call differently.
#[derive(Debug)]
struct Own {
    column: u32,
    /// Block of the first name.
    start: u32,
    /// How many are names.
    live: u32,
    names: Vec<u64>,
}

impl Own {
    fn slot(&self, offset: u32) -> Option<usize> {
        Some(offset.checked_sub(self.start)? as usize)
    }
}

impl Names {
    /// The run is cut to `len` blocks. Calls `shared` and `own` with the names that go.
    pub(super) fn cut(
        &mut self,
        len: usize,
        mut shared: impl FnMut(u32, u64),
        mut own: impl FnMut(u32, u32, u64),
    ) {
        let gone = self.shared.get(len..).unwrap_or_default();
        for (n, name) in gone.iter().enumerate() {
            if *name != NONE {
                shared(short(len + n), *name);
            }
        }
        shorten(&mut self.shared, len);
        self.own.retain_mut(|list| {
            let kept = len.saturating_sub(list.start as usize);
            if kept >= list.names.len() {
                return true;
            }
            let gone = list.names.get(kept..).unwrap_or_default();
            for (n, name) in gone.iter().enumerate() {
                if *name != NONE {
                    own(list.column, list.start + short(kept + n), *name);
                    list.live -= 1;
                }
            }
            shorten(&mut list.names, kept);
            list.live > 0
        });
    }

    /// The name most engines use.
    pub(super) fn shared(&self, offset: u32) -> Option<u64> {
        let name = self.shared.get(offset as usize).copied()?;
        (name != NONE).then_some(name)
    }

    /// The shared names of `n` blocks from `offset` on are just these.
    pub(super) fn agree(&self, offset: u32, names: &[u64]) -> bool {
        let at = offset as usize;
        self.shared.get(at..at + names.len()) == Some(names) && !names.contains(&NONE)
    }

    /// How many of the `n` blocks from `offset` on have no shared name, up to the first that has.
    pub(super) fn unshared(&self, offset: u32, n: usize) -> usize {
        let names = self.shared.get(offset as usize..).unwrap_or_default();
        let named = names.iter().take(n).position(|name| *name != NONE);
        named.unwrap_or(n)
    }

    /// Names the blocks from `offset` on for everybody.
    pub(super) fn share(&mut self, offset: u32, names: &[u64]) {
        let at = offset as usize;
        let end = at + names.len();
        if self.shared.len() < end {
            self.shared.resize(end, NONE);
        }
        if let Some(places) = self.shared.get_mut(at..end) {
            places.copy_from_slice(names);
        }
    }

    /// The name that only the column uses.
    pub(super) fn own(&self, column: u32, offset: u32) -> Option<u64> {
        let list = self.own.get(self.find(column).ok()?)?;
        let name = list.names.get(list.slot(offset)?).copied()?;
        (name != NONE).then_some(name)
    }

    /// The column may have own names for some of the blocks.
    pub(super) fn has_own(&self, column: u32, blocks: Range<u32>) -> bool {
        let list = self.find(column).ok().and_then(|at| self.own.get(at));
        list.is_some_and(|list| {
            let end = u64::from(list.start) + list.names.len() as u64;
            blocks.start < blocks.end && u64::from(blocks.start) < end && list.start < blocks.end
        })
    }

    /// Names the blocks from `offset` on for the column alone, which has no own names for them; `more`
    /// tells how many of the following blocks will be named too.
    pub(super) fn add_own(&mut self, column: u32, offset: u32, names: &[u64], more: usize) {
        let at = self.find(column).unwrap_or_else(|at| {
            if self.own.is_empty() {
                // Most runs are one endpoint's; a vector by itself begins with room for four.
                self.own.reserve_exact(1);
            }
            self.own.insert(
                at,
                Own {
                    column,
                    start: offset,
                    live: 0,
                    names: Vec::with_capacity(names.len() + more),
                },
            );
            at
        });
        let Some(list) = self.own.get_mut(at) else {
            return;
        };
        if let Some(missing) = list.start.checked_sub(offset) {
            let missing = std::iter::repeat_n(NONE, missing as usize);
            list.names.splice(0..0, missing);
            list.start = offset;
        }
        let slot = (offset - list.start) as usize;
        let end = slot + names.len();
        if list.names.len() < end {
            list.names.resize(end, NONE);
        }
        if let Some(places) = list.names.get_mut(slot..end) {
            places.copy_from_slice(names);
            list.live += short(names.len());
        }
    }

    /// The column has no own name for the block any more; returns the one it had.
    pub(super) fn remove_own(&mut self, column: u32, offset: u32) -> Option<u64> {
        if self.own.is_empty() {
            return None;
        }
        let at = self.find(column).ok()?;
        let list = self.own.get_mut(at)?;
        let slot = list.slot(offset)?;
        let name = std::mem::replace(list.names.get_mut(slot)?, NONE);
        if name == NONE {
            return None;
        }
        list.live -= 1;
        if list.live == 0 {
            self.own.remove(at);
        } else if slot + 1 == list.names.len() {
            let used = list.names.iter().rposition(|name| *name != NONE);
            shorten(&mut list.names, used.map_or(0, |last| last + 1));
        }
        Some(name)
    }

    /// Forgets the column's own names; returns how many there were.
    pub(super) fn clear(&mut self, column: u32) -> usize {
        self.find(column)
            .map_or(0, |at| self.own.remove(at).live as usize)
    }

    fn find(&self, column: u32) -> Result<usize, usize> {
        // Columns often come in the order they were made.
        if self.own.last().is_none_or(|last| last.column < column) {
            return Err(self.own.len());
        }
        self.own.binary_search_by_key(&column, |list| list.column)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_names_may_start_anywhere_and_grow_both_ways() {
        let mut names = Names::default();
        names.add_own(3, 5, &[55], 0);
        names.add_own(3, 7, &[77], 0);
        names.add_own(3, 2, &[22], 0);
        names.add_own(1, 5, &[51], 0);
        let own: Vec<_> = (0..10).map(|offset| names.own(3, offset)).collect();
        let none = None;
        assert_eq!(
            own,
            [
                none,
                none,
                Some(22),
                none,
                none,
                Some(55),
                none,
                Some(77),
                none,
                none
            ]
        );
        assert_eq!((names.own(1, 5), names.own(2, 5)), (Some(51), None));
        assert!(names.has_own(3, 7..9) && names.has_own(3, 0..3) && !names.has_own(3, 8..10));
        assert!(!names.has_own(3, 0..2) && !names.has_own(2, 0..10));
        assert_eq!(names.remove_own(3, 7), Some(77));
        assert_eq!(names.remove_own(3, 7), None);
        assert_eq!(names.clear(3), 2);
        assert_eq!(names.remove_own(1, 5), Some(51));
        assert!(names.own.is_empty());
    }

    #[test]
    fn a_shorter_run_gives_up_the_names_behind_its_end() {
        let mut names = Names::default();
        for offset in 0..4 {
            names.share(offset, &[10 + u64::from(offset)]);
        }
        names.add_own(3, 1, &[91], 2);
        names.add_own(3, 3, &[93], 0);
        names.add_own(5, 2, &[52], 0);
        assert!(names.agree(1, &[11, 12]) && !names.agree(1, &[11, 13]));
        assert!(!names.agree(3, &[13, 14]), "longer than the list");
        assert_eq!((names.unshared(0, 4), names.unshared(4, 9)), (0, 9));
        let (mut shared, mut own) = (Vec::new(), Vec::new());
        names.cut(
            2,
            |offset, name| shared.push((offset, name)),
            |column, offset, name| own.push((column, offset, name)),
        );
        assert_eq!(shared, [(2, 12), (3, 13)]);
        assert_eq!(own, [(3, 3, 93), (5, 2, 52)]);
        assert_eq!((names.own(3, 1), names.own.len()), (Some(91), 1));
    }
}
