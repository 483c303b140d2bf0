//! The pool as requests see it: an immutable list that discovery, the only writer, replaces whole.

use std::collections::HashMap;
use std::sync::Arc;

use arc_swap::ArcSwap;
use parking_lot::Mutex;

use super::endpoint::{Endpoint, EndpointIndex, EndpointSpec};

/// Told about endpoints as they come and go, on the discovery task, one call at a time.
pub trait EndpointListener: Send + Sync + std::fmt::Debug {
    /// `endpoint` is about to join the pool and no request can see it yet: the time to set attributes
    /// that follow from its description.
    fn joining(&self, _endpoint: &Arc<Endpoint>) {}

    /// `endpoint` joined the pool; requests may already see it.
    fn added(&self, endpoint: &Arc<Endpoint>);

    /// `endpoint` left the pool. Its index is reused after this returns, so everything recorded
    /// under it must be gone by then. [`Endpoint::is_removed`] is already true.
    fn removed(&self, endpoint: &Arc<Endpoint>);
}

/// The pool as requests see it. A request decides on one snapshot.
#[derive(Debug, Default)]
pub struct EndpointStore {
    snapshot: ArcSwap<Vec<Arc<Endpoint>>>,
    writer: Mutex<Writer>,
}

#[derive(Debug, Default)]
struct Writer {
    listeners: Vec<Arc<dyn EndpointListener>>,
    free: Vec<EndpointIndex>,
    next: u32,
    synced: bool,
}

impl EndpointStore {
    /// The current pool, in discovery order.
    pub fn snapshot(&self) -> Arc<Vec<Arc<Endpoint>>> {
        self.snapshot.load_full()
    }

    /// Makes `held` the current pool; true when it is already.
    pub fn refresh(&self, held: &mut Arc<Vec<Arc<Endpoint>>>) -> bool {
        let current = self.snapshot.load();
        let same = Arc::ptr_eq(&current, held);
        if !same {
            *held = Arc::clone(&current);
        }
        same
    }

    /// Adds a listener and tells it of every endpoint already present.
    pub fn subscribe(&self, listener: Arc<dyn EndpointListener>) {
        let mut writer = self.writer.lock();
        for endpoint in self.snapshot.load().iter() {
            listener.joining(endpoint);
            listener.added(endpoint);
        }
        writer.listeners.push(listener);
    }

    /// Takes a listener off the list. It is told nothing more, not even that endpoints are removed, so
    /// nothing that requests use may depend on it any longer.
    pub fn unsubscribe(&self, listener: &Arc<dyn EndpointListener>) {
        let mut writer = self.writer.lock();
        let same = |other: &Arc<dyn EndpointListener>| {
            std::ptr::addr_eq(Arc::as_ptr(other), Arc::as_ptr(listener))
        };
        writer.listeners.retain(|other| !same(other));
    }

    /// True once discovery delivered a first set, even an empty one.
    pub fn is_synced(&self) -> bool {
        self.writer.lock().synced
    }

    /// Makes the pool equal to `specs`. An endpoint whose spec is unchanged keeps its identity,
    /// metrics and load; one whose address or labels changed is replaced by a new one. Of specs with
    /// the same namespace and name the last wins.
    pub fn replace(&self, specs: Vec<EndpointSpec>) {
        let mut writer = self.writer.lock();
        let old = self.snapshot.load_full();
        let mut wanted: Vec<EndpointSpec> = Vec::with_capacity(specs.len());
        let mut position: HashMap<(String, String), usize> = HashMap::with_capacity(specs.len());
        for spec in specs {
            match position.entry((spec.namespace.clone(), spec.name.clone())) {
                std::collections::hash_map::Entry::Occupied(at) => wanted[*at.get()] = spec,
                std::collections::hash_map::Entry::Vacant(slot) => {
                    slot.insert(wanted.len());
                    wanted.push(spec);
                }
            }
        }
        let mut kept: HashMap<(String, String), &Arc<Endpoint>> = old
            .iter()
            .map(|e| ((e.spec.namespace.clone(), e.spec.name.clone()), e))
            .collect();
        let mut added = Vec::new();
        let next: Vec<Arc<Endpoint>> = wanted
            .into_iter()
            .map(|spec| {
                let key = (spec.namespace.clone(), spec.name.clone());
                if let Some(same) = kept.get(&key).filter(|e| e.spec == spec) {
                    let same = Arc::clone(same);
                    kept.remove(&key);
                    return same;
                }
                let index = writer.take_index();
                let endpoint = Arc::new(Endpoint::new(spec, index));
                for listener in &writer.listeners {
                    listener.joining(&endpoint);
                }
                added.push(Arc::clone(&endpoint));
                endpoint
            })
            .collect();
        let removed: Vec<Arc<Endpoint>> = kept.into_values().map(Arc::clone).collect();
        self.snapshot.store(Arc::new(next));
        writer.synced = true;
        for endpoint in &removed {
            endpoint.mark_removed();
            for listener in &writer.listeners {
                listener.removed(endpoint);
            }
            writer.free.push(endpoint.index);
        }
        for endpoint in &added {
            for listener in &writer.listeners {
                listener.added(endpoint);
            }
        }
    }
}

impl Writer {
    fn take_index(&mut self) -> EndpointIndex {
        self.free.pop().unwrap_or_else(|| {
            let index = EndpointIndex(self.next);
            self.next += 1;
            index
        })
    }
}
