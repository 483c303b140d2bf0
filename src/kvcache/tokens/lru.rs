//! A map bounded by the bytes of its values, least recently used out first.

use std::hash::Hash;

use hashbrown::HashMap;

/// No neighbour.
const NONE: usize = usize::MAX;

#[derive(Debug)]
struct Slot<K, V> {
    key: K,
    value: V,
    bytes: usize,
    newer: usize,
    older: usize,
}

/// Least-recently-used map whose entries each weigh some bytes. All operations are O(1), evictions
/// apart.
#[derive(Debug)]
pub struct ByteLru<K, V> {
    index: HashMap<K, usize>,
    slots: Vec<Slot<K, V>>,
    newest: usize,
    oldest: usize,
    bytes: usize,
    capacity_bytes: usize,
}

impl<K: Copy + Eq + Hash, V> ByteLru<K, V> {
    /// An empty map; entries together never weigh more than `capacity_bytes`.
    pub fn new(capacity_bytes: usize) -> Self {
        Self {
            index: HashMap::new(),
            slots: Vec::new(),
            newest: NONE,
            oldest: NONE,
            bytes: 0,
            capacity_bytes,
        }
    }

    /// What the entries weigh.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Number of entries.
    pub fn len(&self) -> usize {
        self.slots.len()
    }

    /// True without entries.
    pub fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }

    /// The value, which becomes the most recently used.
    pub fn get(&mut self, key: &K) -> Option<&V> {
        let at = *self.index.get(key)?;
        self.unlink(at);
        self.link_newest(at);
        self.slots.get(at).map(|slot| &slot.value)
    }

    /// Puts a value that weighs `bytes` and returns how many others had to leave. One heavier than
    /// the whole map is not kept.
    pub fn insert(&mut self, key: K, value: V, bytes: usize) -> usize {
        if let Some(&at) = self.index.get(&key) {
            self.remove_at(at);
        }
        if bytes > self.capacity_bytes {
            return 0;
        }
        let mut evicted = 0;
        while self.bytes + bytes > self.capacity_bytes && self.oldest != NONE {
            self.remove_at(self.oldest);
            evicted += 1;
        }
        let at = self.slots.len();
        self.slots.push(Slot {
            key,
            value,
            bytes,
            newer: NONE,
            older: NONE,
        });
        self.index.insert(key, at);
        self.bytes += bytes;
        self.link_newest(at);
        evicted
    }

    fn remove_at(&mut self, at: usize) {
        self.unlink(at);
        let slot = self.slots.swap_remove(at);
        self.bytes -= slot.bytes;
        self.index.remove(&slot.key);
        // The last slot took the free place: whoever pointed at it must follow.
        let moved_from = self.slots.len();
        if at == moved_from {
            return;
        }
        let Some(moved) = self.slots.get(at) else {
            return;
        };
        let (key, newer, older) = (moved.key, moved.newer, moved.older);
        self.index.insert(key, at);
        self.set_older(newer, at);
        self.set_newer(older, at);
    }

    fn unlink(&mut self, at: usize) {
        let Some(slot) = self.slots.get(at) else {
            return;
        };
        let (newer, older) = (slot.newer, slot.older);
        self.set_older(newer, older);
        self.set_newer(older, newer);
    }

    fn link_newest(&mut self, at: usize) {
        let second = self.newest;
        if let Some(slot) = self.slots.get_mut(at) {
            slot.newer = NONE;
            slot.older = second;
        }
        self.set_newer(second, at);
        self.newest = at;
    }

    /// Makes `older` the older neighbour of `at`, where no `at` stands for the newest end.
    fn set_older(&mut self, at: usize, older: usize) {
        match self.slots.get_mut(at) {
            Some(slot) => slot.older = older,
            None => self.newest = older,
        }
    }

    /// Makes `newer` the newer neighbour of `at`, where no `at` stands for the oldest end.
    fn set_newer(&mut self, at: usize, newer: usize) {
        match self.slots.get_mut(at) {
            Some(slot) => slot.newer = newer,
            None => self.oldest = newer,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_least_recently_used_leaves_at_the_bound() {
        let mut lru = ByteLru::new(10);
        assert_eq!(lru.insert(1, "a", 4), 0);
        assert_eq!(lru.insert(2, "b", 4), 0);
        assert_eq!(lru.get(&1), Some(&"a"));
        // 4 + 4 + 4 > 10: 2 was used longer ago than 1.
        assert_eq!(lru.insert(3, "c", 4), 1);
        assert_eq!(lru.get(&2), None);
        assert_eq!((lru.bytes(), lru.len()), (8, 2));
    }

    #[test]
    fn what_weighs_more_than_the_map_is_not_kept() {
        let mut lru = ByteLru::new(10);
        lru.insert(1, "a", 4);
        assert_eq!(lru.insert(2, "b", 11), 0);
        assert_eq!(lru.get(&2), None);
        assert_eq!(lru.get(&1), Some(&"a"));
    }

    proptest! {
        /// Against a list in order of use.
        #[test]
        fn agrees_with_a_naive_list(steps in prop::collection::vec((0u8..12, 0usize..7, any::<bool>()), 0..200)) {
            let mut lru = ByteLru::new(15);
            let mut naive: Vec<(u8, usize)> = Vec::new();
            for (key, bytes, insert) in steps {
                let known = naive.iter().position(|&(k, _)| k == key);
                if insert {
                    lru.insert(key, bytes, bytes);
                    known.map(|at| naive.remove(at));
                    while naive.iter().map(|&(_, b)| b).sum::<usize>() + bytes > 15 {
                        naive.remove(0);
                    }
                    naive.push((key, bytes));
                } else {
                    let entry = known.map(|at| naive.remove(at));
                    prop_assert_eq!(lru.get(&key).copied(), entry.map(|(_, b)| b));
                    naive.extend(entry);
                }
                prop_assert_eq!(lru.len(), naive.len());
                prop_assert_eq!(lru.bytes(), naive.iter().map(|&(_, b)| b).sum::<usize>());
            }
        }
    }
}
