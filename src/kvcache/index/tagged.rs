//! From names to blocks: a table of block numbers by 32 bits of the name.
//!
//! A group of slots is one line of the processor's cache and filled from its front, so one look at it tells
//! that a name is new and where it goes, which is what every stored block asks. A block that finds no room
//! in its group is in the next that has some: a group that is not full ends a search. Groups are ordered
//! by tag, so the table grows in one pass from front to back.

/// Slots of a group: 64 bytes.
const GROUP: usize = 8;
/// Slots of a group that are used on average, at most: then few groups are full.
const USED: usize = 6;
/// Names looked up at once, ahead of their use.
pub(super) const WARM: usize = 64;

/// 32 bits of a name; never 0.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Tag(u32);

impl Tag {
    /// Names are hashes, but nobody says how good.
    pub(super) fn of(name: u64) -> Self {
        let product = u128::from(name ^ 0x9e37_79b9_7f4a_7c15) * 0xd6e8_feb8_6659_fd93;
        #[expect(clippy::cast_possible_truncation, reason = "all parts are used")]
        let folded = (product >> 64) as u32 ^ (product >> 32) as u32;
        Self(folded.max(1))
    }

    /// The group it belongs to, of so many.
    fn home(self, groups: usize) -> usize {
        ((u64::from(self.0) * groups as u64) >> 32) as usize
    }
}

/// Slots in use are in front; the tags of the others are 0.
#[derive(Debug, Clone, Copy, Default)]
#[repr(align(64))]
struct Group {
    tags: [u32; GROUP],
    blocks: [u32; GROUP],
}

impl Group {
    // Both without branches: the compiler looks at all tags at once.

    fn has(&self, tag: Tag) -> bool {
        self.tags.iter().filter(|other| **other == tag.0).count() > 0
    }

    fn len(&self) -> usize {
        self.tags.iter().map(|tag| usize::from(*tag != 0)).sum()
    }

    fn is_full(&self) -> bool {
        self.tags.last().is_some_and(|tag| *tag != 0)
    }

    fn slots(&self) -> impl Iterator<Item = (Tag, u32)> {
        let slots = self.tags.iter().zip(&self.blocks);
        let used = slots.take_while(|(tag, _)| **tag != 0);
        used.map(|(tag, block)| (Tag(*tag), *block))
    }

    fn put(&mut self, slot: usize, tag: Tag, block: u32) {
        if let (Some(tag_at), Some(block_at)) = (self.tags.get_mut(slot), self.blocks.get_mut(slot))
        {
            (*tag_at, *block_at) = (tag.0, block);
        }
    }

    /// Empties a slot and returns what was there; the last one in use takes its place.
    fn take(&mut self, slot: usize) -> Option<(Tag, u32)> {
        let taken = self.slots().nth(slot)?;
        let last = self.len() - 1;
        self.tags.swap(slot, last);
        self.blocks.swap(slot, last);
        self.put(last, Tag::default(), 0);
        Some(taken)
    }
}

/// Block numbers by tag; a tag may have several.
#[derive(Debug, Default)]
pub(super) struct Tagged {
    groups: Vec<Group>,
    /// Groups that tags belong to; those behind them are for what found no room.
    homes: usize,
    len: usize,
}

impl Tagged {
    /// Makes room for `n` more blocks.
    pub(super) fn reserve(&mut self, n: usize) {
        let len = self.len + n;
        if len > self.homes * USED {
            self.grow(len.div_ceil(USED).next_power_of_two());
        }
    }

    #[cold]
    #[inline(never)]
    fn grow(&mut self, homes: usize) {
        let old = std::mem::replace(&mut self.groups, vec![Group::default(); homes + 1]);
        self.homes = homes;
        // Counted aside: neighbours go to one group, and counting its tags would wait for them.
        let mut lens = vec![0_u8; homes + 1];
        for group in &old {
            for (tag, block) in group.slots() {
                let mut at = tag.home(homes);
                while lens.get(at).is_some_and(|len| usize::from(*len) == GROUP) {
                    at += 1;
                }
                if at == lens.len() {
                    lens.push(0);
                }
                if let Some(len) = lens.get_mut(at) {
                    self.put((at, usize::from(*len)), tag, block);
                    *len += 1;
                }
            }
        }
    }

    /// Brings the groups where the names may be into the processor's caches: reads that do not depend on
    /// each other wait for memory together, and the exact ones that follow do not.
    pub(super) fn warm(&self, names: &[u64]) {
        for names in names.chunks(WARM) {
            self.tags(names, &mut [Tag::default(); WARM]);
        }
    }

    /// Tags of up to [`WARM`] names, with their groups brought into the processor's caches.
    fn tags(&self, names: &[u64], tags: &mut [Tag; WARM]) {
        let tags = tags.get_mut(..names.len()).unwrap_or_default();
        // Apart from each other, so that the loops that wait for memory are short.
        for (tag, name) in tags.iter_mut().zip(names) {
            *tag = Tag::of(*name);
        }
        let full = |at: usize| self.groups.get(at).is_some_and(Group::is_full);
        let mut any = false;
        for tag in &*tags {
            any ^= full(tag.home(self.homes));
        }
        for tag in tags {
            let home = tag.home(self.homes);
            any ^= full(home + usize::from(full(home)));
        }
        std::hint::black_box(any);
    }

    /// The first group with room for the tag, and the slot; `None` when some block has the tag.
    fn room(&self, tag: Tag) -> Option<(usize, usize)> {
        let mut at = tag.home(self.homes);
        while let Some(group) = self.groups.get(at) {
            if group.has(tag) {
                return None;
            }
            if !group.is_full() {
                return Some((at, group.len()));
            }
            at += 1;
        }
        Some((at, 0))
    }

    fn put(&mut self, (at, slot): (usize, usize), tag: Tag, block: u32) {
        if at == self.groups.len() {
            self.groups.push(Group::default());
        }
        if let Some(group) = self.groups.get_mut(at) {
            group.put(slot, tag, block);
        }
    }

    /// Notes up to [`WARM`] blocks by their names, until some block has the tag of one. Returns how many.
    pub(super) fn insert_new(&mut self, names: &[u64], blocks: impl Iterator<Item = u32>) -> usize {
        self.reserve(names.len());
        let mut tags = [Tag::default(); WARM];
        self.tags(names, &mut tags);
        let mut new = 0;
        for (tag, block) in tags.iter().take(names.len()).zip(blocks) {
            match self.groups.get_mut(tag.home(self.homes)) {
                Some(group) if group.has(*tag) => break,
                Some(group) if !group.is_full() => group.put(group.len(), *tag, block),
                _ => match self.room(*tag) {
                    Some(room) => self.put(room, *tag, block),
                    None => break,
                },
            }
            new += 1;
        }
        self.len += new;
        new
    }

    /// Notes a block, whatever else has the tag.
    pub(super) fn insert(&mut self, tag: Tag, block: u32) {
        self.reserve(1);
        let home = tag.home(self.homes);
        let groups = self.groups.get(home..).unwrap_or_default();
        let full = groups.iter().take_while(|group| group.is_full()).count();
        let slot = groups.get(full).map_or(0, Group::len);
        self.put((home + full, slot), tag, block);
        self.len += 1;
    }

    /// The block with the tag that is the `right` one.
    pub(super) fn find(&self, tag: Tag, right: impl Fn(u32) -> bool) -> Option<u32> {
        let (at, slot) = self.search(tag, right)?;
        self.groups.get(at)?.blocks.get(slot).copied()
    }

    fn search(&self, tag: Tag, right: impl Fn(u32) -> bool) -> Option<(usize, usize)> {
        let home = tag.home(self.homes);
        for (at, group) in (home..).zip(self.groups.get(home..)?) {
            if group.has(tag) {
                let mut slots = group.slots();
                let slot = slots.position(|(other, block)| other == tag && right(block));
                if let Some(slot) = slot {
                    return Some((at, slot));
                }
            }
            if !group.is_full() {
                break;
            }
        }
        None
    }

    pub(super) fn remove(&mut self, tag: Tag, block: u32) {
        let Some((mut at, mut slot)) = self.search(tag, |other| other == block) else {
            return;
        };
        self.len -= 1;
        while let Some(group) = self.groups.get_mut(at) {
            let was_full = group.is_full();
            group.take(slot);
            // The block that moves here leaves a gap in turn.
            let behind = was_full.then(|| self.displaced(at)).flatten();
            let Some((from, moving)) = behind else {
                return;
            };
            let moved = self
                .groups
                .get(from)
                .and_then(|group| group.slots().nth(moving));
            if let Some((tag, block)) = moved {
                self.put((at, GROUP - 1), tag, block);
            }
            (at, slot) = (from, moving);
        }
    }

    /// The next block that found no room in the group `at` or before it.
    fn displaced(&self, at: usize) -> Option<(usize, usize)> {
        for (from, group) in (at + 1..).zip(self.groups.get(at + 1..)?) {
            let mut slots = group.slots();
            let slot = slots.position(|(tag, _)| tag.home(self.homes) <= at);
            if let Some(slot) = slot {
                return Some((from, slot));
            }
            if !group.is_full() {
                break;
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How the blocks lie: every group from a block's own to the one it is in is full, none is behind a
    /// free slot, and nothing is lost.
    fn check(table: &Tagged, blocks: &[(u64, u32)]) {
        let mut n = 0;
        for (at, group) in table.groups.iter().enumerate() {
            let used = group.slots().count();
            assert_eq!(group.len(), used, "free slots are behind the others");
            n += used;
            for (tag, _) in group.slots() {
                let home = tag.home(table.homes);
                assert!(home <= at && table.groups[home..at].iter().all(Group::is_full));
            }
        }
        assert_eq!((n, table.len), (blocks.len(), blocks.len()));
        for (name, block) in blocks {
            let found = table.find(Tag::of(*name), |other| other == *block);
            assert_eq!(found, Some(*block));
        }
    }

    #[test]
    fn blocks_are_found_until_removed_however_full_it_is() {
        let mut rng = fastrand::Rng::with_seed(1);
        let mut table = Tagged::default();
        let mut blocks: Vec<(u64, u32)> = Vec::new();
        for round in 0..40 {
            let base = round * 64;
            let names: Vec<u64> = (0..rng.u32(1..=64)).map(|_| rng.u64(1..)).collect();
            assert_eq!(table.insert_new(&names, base..), names.len());
            blocks.extend(names.iter().copied().zip(base..));
            check(&table, &blocks);
            for _ in 0..rng.usize(..40).min(blocks.len()) {
                let (name, block) = blocks.swap_remove(rng.usize(..blocks.len()));
                table.remove(Tag::of(name), block);
                check(&table, &blocks);
            }
        }
        for (name, block) in blocks.drain(..) {
            table.remove(Tag::of(name), block);
        }
        check(&table, &[]);
    }

    #[test]
    fn names_with_one_tag_fill_groups_behind_theirs() {
        let mut table = Tagged::default();
        let mut blocks = Vec::new();
        for block in 0..100 {
            table.insert(Tag::of(7), block);
            blocks.push((7, block));
        }
        check(&table, &blocks);
        for block in [0, 99, 50, 8, 16] {
            table.remove(Tag::of(7), block);
            blocks.retain(|(_, other)| *other != block);
            check(&table, &blocks);
        }
    }

    #[test]
    fn a_known_tag_ends_an_insertion() {
        let mut table = Tagged::default();
        assert_eq!(table.insert_new(&[1, 2, 3, 2, 4], 10..), 3);
        assert_eq!(table.insert_new(&[5, 3, 6], 20..), 1);
        check(&table, &[(1, 10), (2, 11), (3, 12), (5, 20)]);
    }
}
