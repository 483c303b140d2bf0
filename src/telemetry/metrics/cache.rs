//! Resolved handles by label values, and the caps that keep label sets finite.

use std::collections::HashSet;
use std::hash::{Hash, Hasher};
use std::sync::Arc;

use arc_swap::ArcSwap;
use hashbrown::HashTable;
use parking_lot::Mutex;
use xxhash_rust::xxh3::Xxh3Default;

/// Distinct model names (incoming and target together) that get a label value of their own.
pub(super) const MAX_MODEL_NAMES: usize = 1000;
/// Distinct fairness ids that get a label value of their own.
pub(super) const MAX_FAIRNESS_IDS: usize = 1000;
/// Label sets whose handles are kept. Past it handles are resolved per use: slower, never wrong.
const MAX_CACHED: usize = 8192;
/// Label value of names past a cap.
const OVERFLOW: &str = "other";

/// Hash of a borrowed key.
pub(super) fn hash(key: &impl Hash) -> u64 {
    let mut hasher = Xxh3Default::new();
    key.hash(&mut hasher);
    hasher.finish()
}

/// Handles by key. Readers take a snapshot; a new key copies the table, which happens once per key.
#[derive(Debug)]
pub(super) struct HandleCache<K, V> {
    table: ArcSwap<HashTable<Entry<K, V>>>,
    writer: Mutex<()>,
}

#[derive(Debug)]
struct Entry<K, V> {
    hash: u64,
    key: Arc<K>,
    value: Arc<V>,
}

impl<K, V> Clone for Entry<K, V> {
    fn clone(&self) -> Self {
        Self {
            hash: self.hash,
            key: Arc::clone(&self.key),
            value: Arc::clone(&self.value),
        }
    }
}

impl<K, V> Default for HandleCache<K, V> {
    fn default() -> Self {
        Self {
            table: ArcSwap::from_pointee(HashTable::new()),
            writer: Mutex::new(()),
        }
    }
}

impl<K, V> HandleCache<K, V> {
    /// The value whose key `same` accepts, or the one `make` builds.
    pub(super) fn get_or_make(
        &self,
        hash: u64,
        same: impl Fn(&K) -> bool,
        make: impl FnOnce() -> (K, V),
    ) -> Arc<V> {
        let find = |table: &HashTable<Entry<K, V>>| {
            table
                .find(hash, |entry| same(&entry.key))
                .map(|entry| Arc::clone(&entry.value))
        };
        if let Some(found) = find(&self.table.load()) {
            return found;
        }
        let _writer = self.writer.lock();
        let table = self.table.load();
        if let Some(found) = find(&table) {
            return found;
        }
        let (key, value) = make();
        let value = Arc::new(value);
        if table.len() < MAX_CACHED {
            let mut next = HashTable::clone(&table);
            let entry = Entry {
                hash,
                key: Arc::new(key),
                value: Arc::clone(&value),
            };
            next.insert_unique(hash, entry, |entry| entry.hash);
            self.table.store(Arc::new(next));
        }
        value
    }
}

impl<K, V> HandleCache<K, V> {
    /// Drops the handles of all keys but those that `keep` wants.
    pub(super) fn retain(&self, keep: impl Fn(&K) -> bool) {
        let _writer = self.writer.lock();
        let table = self.table.load();
        if table.iter().all(|entry| keep(&entry.key)) {
            return;
        }
        let mut next = HashTable::clone(&table);
        next.retain(|entry| keep(&entry.key));
        self.table.store(Arc::new(next));
    }
}

/// Caps on label values that clients choose.
#[derive(Debug, Default)]
pub(super) struct NameCaps {
    models: Mutex<HashSet<String>>,
    fairness: Mutex<HashSet<String>>,
}

impl NameCaps {
    /// `name`, or `other` past the cap.
    pub(super) fn model(&self, name: &str) -> String {
        admit(&self.models, name, MAX_MODEL_NAMES)
    }

    /// `id`, or `other` past the cap.
    pub(super) fn fairness(&self, id: &str) -> String {
        admit(&self.fairness, id, MAX_FAIRNESS_IDS)
    }
}

fn admit(known: &Mutex<HashSet<String>>, name: &str, cap: usize) -> String {
    let mut known = known.lock();
    if name.is_empty() || known.contains(name) {
        return name.to_owned();
    }
    if known.len() >= cap {
        return OVERFLOW.to_owned();
    }
    known.insert(name.to_owned());
    name.to_owned()
}
