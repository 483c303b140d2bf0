//! The pool as requests see it: an immutable list that discovery, the only writer, replaces whole.

use std::collections::VecDeque;
use std::sync::Arc;

use arc_swap::ArcSwap;
use hashbrown::{Equivalent, HashMap};
use parking_lot::Mutex;

use super::endpoint::{Endpoint, EndpointIndex, EndpointSpec};

/// Told about endpoints as they come and go, on the discovery task, one call at a time.
pub trait EndpointListener: Send + Sync + std::fmt::Debug {
    /// `endpoint` is about to join the pool and no request can see it yet: the time to set attributes
    /// that follow from its description.
    fn joining(&self, _endpoint: &Arc<Endpoint>) {}

    /// `endpoint` joined the pool; requests may already see it.
    fn added(&self, endpoint: &Arc<Endpoint>);

    /// `endpoint` took the place of `former`: the same engine with other labels, under the same index
    /// and with the same load, metrics and attributes. `joining` was called for it. What was recorded
    /// under the index stays true, so only listeners that hold the endpoint itself or read its labels
    /// have something to do.
    fn relabelled(&self, _former: &Arc<Endpoint>, _endpoint: &Arc<Endpoint>) {}

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

/// What an endpoint is called: unique in the pool.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct EndpointName {
    /// Namespace.
    pub namespace: String,
    /// Name within the namespace.
    pub name: String,
}

/// A borrowed [`EndpointName`]; hashes as the owned one does.
#[derive(Hash)]
struct Named<'a> {
    namespace: &'a str,
    name: &'a str,
}

impl Equivalent<EndpointName> for Named<'_> {
    fn equivalent(&self, other: &EndpointName) -> bool {
        self.namespace == other.namespace && self.name == other.name
    }
}

#[derive(Debug, Default)]
struct Writer {
    listeners: Vec<Arc<dyn EndpointListener>>,
    free: Vec<EndpointIndex>,
    next: u32,
    synced: bool,
    /// Where each endpoint is in the current snapshot.
    positions: HashMap<EndpointName, usize>,
    /// Former snapshots that somebody may still hold, the oldest first. The last one to let go of a
    /// snapshot gives back each of its pointers; kept here, that is never a request.
    former: VecDeque<Arc<Vec<Arc<Endpoint>>>>,
}

/// Former snapshots kept. Each thread that decides holds one at most, and lets go at its next request.
const MAX_FORMER: usize = 256;

/// What listeners will be told.
#[derive(Debug, Default)]
struct Changes {
    added: Vec<Arc<Endpoint>>,
    relabelled: Vec<(Arc<Endpoint>, Arc<Endpoint>)>,
    removed: Vec<Arc<Endpoint>>,
}

impl EndpointStore {
    /// The current pool. In discovery order after [`Self::replace`]; [`Self::update`] puts the last
    /// endpoint where one left.
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

    /// True once discovery delivered a first set, even an empty one, and while it stands by it.
    pub fn is_synced(&self) -> bool {
        self.writer.lock().synced
    }

    /// Empties the pool and takes back that it was ever known: what the endpoints belonged to is gone.
    pub fn clear(&self) {
        self.replace(Vec::new());
        self.writer.lock().synced = false;
    }

    /// Makes the pool equal to `specs`. An endpoint whose spec is unchanged keeps its identity,
    /// metrics and load, and so does one that got other labels and nothing else; one that changed
    /// otherwise is replaced by a new one. Of specs with the same namespace and name the last wins.
    pub fn replace(&self, specs: Vec<EndpointSpec>) {
        let mut writer = self.writer.lock();
        let old = self.snapshot.load_full();
        let mut wanted: Vec<EndpointSpec> = Vec::with_capacity(specs.len());
        let mut positions: HashMap<EndpointName, usize> = HashMap::with_capacity(specs.len());
        for spec in specs {
            match positions.entry(spec.endpoint_name()) {
                hashbrown::hash_map::Entry::Occupied(at) => wanted[*at.get()] = spec,
                hashbrown::hash_map::Entry::Vacant(slot) => {
                    slot.insert(wanted.len());
                    wanted.push(spec);
                }
            }
        }
        let mut changes = Changes::default();
        for endpoint in old.iter() {
            if !positions.contains_key(&endpoint.spec.named()) {
                changes.removed.push(Arc::clone(endpoint));
            }
        }
        let next: Vec<Arc<Endpoint>> = wanted
            .into_iter()
            .map(|spec| {
                let current = writer.positions.get(&spec.named());
                let current = current.and_then(|&at| old.get(at));
                writer.place(current.cloned(), spec, &mut changes)
            })
            .collect();
        writer.positions = positions;
        drop(old);
        self.publish(&mut writer, next, &changes);
    }

    /// Changes a part of the pool, as [`Self::replace`] would: the endpoints called `gone` leave,
    /// `specs` join or take the place of their namesakes. Costs the endpoints named and one copy of
    /// the list of pointers; nothing at all when nothing changes.
    pub fn update(&self, gone: &[EndpointName], specs: Vec<EndpointSpec>) {
        let mut writer = self.writer.lock();
        let mut next: Option<Vec<Arc<Endpoint>>> = None;
        let old = self.snapshot.load_full();
        let mut changes = Changes::default();
        for name in gone {
            let Some(position) = writer.positions.remove(name) else {
                continue;
            };
            let next = next.get_or_insert_with(|| Vec::clone(&old));
            changes.removed.push(next.swap_remove(position));
            if let Some(moved) = next.get(position) {
                writer
                    .positions
                    .insert(moved.spec.endpoint_name(), position);
            }
        }
        for spec in specs {
            let position = writer.positions.get(&spec.named()).copied();
            let list: &[Arc<Endpoint>] = next.as_deref().unwrap_or(&old);
            let current = position.and_then(|at| list.get(at)).cloned();
            if current.as_ref().is_some_and(|c| c.spec == spec) {
                continue;
            }
            let name = spec.endpoint_name();
            let endpoint = writer.place(current, spec, &mut changes);
            let next = next.get_or_insert_with(|| Vec::clone(&old));
            if let Some(slot) = position.and_then(|at| next.get_mut(at)) {
                *slot = endpoint;
            } else {
                writer.positions.insert(name, next.len());
                next.push(endpoint);
            }
        }
        drop(old);
        if let Some(next) = next {
            self.publish(&mut writer, next, &changes);
        }
    }

    /// Lets go of snapshots that no request holds any more. Happens with every change too; after the
    /// last one, somebody has to ask for it.
    pub fn forget_former(&self) {
        self.writer.lock().forget_former();
    }

    fn publish(&self, writer: &mut Writer, next: Vec<Arc<Endpoint>>, changes: &Changes) {
        let former = self.snapshot.swap(Arc::new(next));
        writer.former.push_back(former);
        writer.forget_former();
        writer.synced = true;
        for endpoint in &changes.removed {
            endpoint.mark_removed();
            for listener in &writer.listeners {
                listener.removed(endpoint);
            }
            writer.free.push(endpoint.index);
        }
        for (former, endpoint) in &changes.relabelled {
            for listener in &writer.listeners {
                listener.relabelled(former, endpoint);
            }
        }
        for endpoint in &changes.added {
            for listener in &writer.listeners {
                listener.added(endpoint);
            }
        }
    }
}

impl Writer {
    fn forget_former(&mut self) {
        // None that is only here can be taken by a request: those take the current one.
        self.former.retain(|list| Arc::strong_count(list) > 1);
        let excess = self.former.len().saturating_sub(MAX_FORMER);
        self.former.drain(..excess);
    }

    /// The endpoint that `spec` describes: `current` when it is that very one, else one that goes on
    /// with the same index and load, or a new one.
    fn place(
        &mut self,
        current: Option<Arc<Endpoint>>,
        spec: EndpointSpec,
        changes: &mut Changes,
    ) -> Arc<Endpoint> {
        if let Some(current) = current {
            if current.spec == spec {
                return current;
            }
            if current.spec.is_same_engine(&spec) {
                let endpoint = Arc::new(current.relabelled(spec));
                self.announce(&endpoint);
                changes.relabelled.push((current, Arc::clone(&endpoint)));
                return endpoint;
            }
            changes.removed.push(current);
        }
        let index = self.take_index();
        let endpoint = Arc::new(Endpoint::new(spec, index));
        self.announce(&endpoint);
        changes.added.push(Arc::clone(&endpoint));
        endpoint
    }

    fn announce(&self, endpoint: &Arc<Endpoint>) {
        for listener in &self.listeners {
            listener.joining(endpoint);
        }
    }

    fn take_index(&mut self) -> EndpointIndex {
        self.free.pop().unwrap_or_else(|| {
            let index = EndpointIndex(self.next);
            self.next += 1;
            index
        })
    }
}

impl EndpointSpec {
    /// Its name in the pool.
    pub fn endpoint_name(&self) -> EndpointName {
        EndpointName {
            namespace: self.namespace.clone(),
            name: self.name.clone(),
        }
    }

    fn named(&self) -> Named<'_> {
        Named {
            namespace: &self.namespace,
            name: &self.name,
        }
    }

    /// True when `other` differs in labels only.
    fn is_same_engine(&self, other: &Self) -> bool {
        self.address == other.address
            && self.rank == other.rank
            && self.details == other.details
            && self.endpoint_name() == other.endpoint_name()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::datalayer::{EngineMetrics, discovery::list};
    use crate::plugin::InFlightSlot;

    /// Writes down what it is told.
    #[derive(Debug, Default)]
    struct Log(Mutex<Vec<String>>);

    impl Log {
        fn take(&self) -> Vec<String> {
            std::mem::take(&mut self.0.lock())
        }

        fn note(&self, what: &str, endpoint: &Endpoint) {
            let Endpoint { spec, index, .. } = endpoint;
            self.0
                .lock()
                .push(format!("{what} {}#{}", spec.name, index.0));
        }
    }

    impl EndpointListener for Log {
        fn joining(&self, endpoint: &Arc<Endpoint>) {
            self.note("joining", endpoint);
        }

        fn added(&self, endpoint: &Arc<Endpoint>) {
            self.note("added", endpoint);
        }

        fn relabelled(&self, former: &Arc<Endpoint>, endpoint: &Arc<Endpoint>) {
            assert_ne!(former.spec.labels, endpoint.spec.labels);
            self.note("relabelled", endpoint);
        }

        fn removed(&self, endpoint: &Arc<Endpoint>) {
            assert!(endpoint.is_removed());
            self.note("removed", endpoint);
        }
    }

    fn spec(name: &str, last: u8) -> EndpointSpec {
        let mut spec = list::parse(&format!("10.0.0.{last}:8000"))
            .unwrap()
            .remove(0);
        name.clone_into(&mut spec.name);
        spec
    }

    fn name(name: &str) -> EndpointName {
        spec(name, 1).endpoint_name()
    }

    fn started(names: &[&str]) -> (EndpointStore, Arc<Log>) {
        let store = EndpointStore::default();
        let log = Arc::new(Log::default());
        store.subscribe(Arc::clone(&log) as Arc<dyn EndpointListener>);
        let specs = names.iter().zip(1..).map(|(name, last)| spec(name, last));
        store.replace(specs.collect());
        log.take();
        (store, log)
    }

    fn pool(store: &EndpointStore) -> Vec<String> {
        let pool = store.snapshot();
        let writer = store.writer.lock();
        assert_eq!(writer.positions.len(), pool.len());
        for (at, endpoint) in pool.iter().enumerate() {
            assert_eq!(writer.positions[&endpoint.spec.named()], at);
        }
        let shown = pool
            .iter()
            .map(|e| format!("{}#{}", e.spec.name, e.index.0));
        shown.collect()
    }

    #[test]
    fn an_update_touches_only_what_it_names() {
        let (store, log) = started(&["a", "b", "c", "d"]);
        let before = store.snapshot();
        store.update(
            &[name("b"), name("nobody")],
            vec![spec("e", 5), spec("a", 1)],
        );
        // d takes the place of b; e gets a new index because b's is freed only after the update.
        assert_eq!(pool(&store), ["a#0", "d#3", "c#2", "e#4"]);
        assert_eq!(log.take(), ["joining e#4", "removed b#1", "added e#4"]);
        assert!(Arc::ptr_eq(&before[0], &store.snapshot()[0]));
        store.update(&[name("d")], vec![spec("f", 6)]);
        assert_eq!(pool(&store), ["a#0", "e#4", "c#2", "f#1"]);
        let same = store.snapshot();
        store.update(&[name("b")], vec![spec("a", 1), spec("f", 6)]);
        assert!(Arc::ptr_eq(&same, &store.snapshot()), "nothing changed");
    }

    #[test]
    fn other_labels_keep_index_load_and_metrics() {
        let (store, log) = started(&["a", "b"]);
        let former = Arc::clone(&store.snapshot()[1]);
        former.set_metrics(EngineMetrics {
            waiting_requests: 7,
            ..EngineMetrics::default()
        });
        let slot = InFlightSlot::default();
        former.in_flight(slot).book(2, 30);
        let mut labelled = spec("b", 2);
        labelled.labels.insert("x".to_owned(), "y".to_owned());
        store.update(&[], vec![labelled.clone()]);
        assert_eq!(pool(&store), ["a#0", "b#1"]);
        assert_eq!(log.take(), ["joining b#1", "relabelled b#1"]);
        let endpoint = Arc::clone(&store.snapshot()[1]);
        assert_eq!(endpoint.spec.labels["x"], "y");
        assert_eq!(endpoint.metrics().waiting_requests, 7);
        // A request that was picked before the change ends after it.
        former.in_flight(slot).release(1, 10);
        let load = endpoint.in_flight(slot);
        assert_eq!((load.requests(), load.tokens()), (1, 20));
        // The same by a whole set, and gone means gone for everyone who holds it.
        store.replace(vec![spec("b", 2)]);
        assert_eq!(log.take(), ["joining b#1", "removed a#0", "relabelled b#1"]);
        assert!(!former.is_removed());
        store.replace(Vec::new());
        assert!(former.is_removed() && endpoint.is_removed());
    }

    #[test]
    fn another_address_or_incarnation_is_another_endpoint() {
        let (store, log) = started(&["a"]);
        store.update(&[], vec![spec("a", 9)]);
        assert_eq!(log.take(), ["joining a#1", "removed a#0", "added a#1"]);
        let mut restarted = spec("a", 9);
        restarted.details.incarnation = Some("uid-2".to_owned());
        store.update(&[], vec![restarted]);
        assert_eq!(log.take(), ["joining a#0", "removed a#1", "added a#0"]);
        assert_eq!(pool(&store), ["a#0"]);
    }

    #[test]
    fn leaving_and_joining_in_one_update_is_a_new_endpoint() {
        let (store, log) = started(&["a", "b"]);
        store.update(&[name("a")], vec![spec("a", 1)]);
        assert_eq!(log.take(), ["joining a#2", "removed a#0", "added a#2"]);
        assert_eq!(pool(&store), ["b#1", "a#2"]);
    }

    #[test]
    fn the_last_to_hold_a_snapshot_is_the_store() {
        let (store, _log) = started(&["a"]);
        let kept = |store: &EndpointStore| store.writer.lock().former.len();
        assert_eq!(kept(&store), 0, "nobody held the empty pool");
        let mut held = Vec::new();
        for n in 0..MAX_FORMER + 2 {
            held.push(store.snapshot());
            store.update(&[], vec![spec("b", u8::try_from(n % 200 + 2).unwrap())]);
        }
        assert_eq!(kept(&store), MAX_FORMER);
        let left = Arc::downgrade(&held.pop().unwrap());
        assert!(left.upgrade().is_some(), "the store has it still");
        store.forget_former();
        assert!(left.upgrade().is_none());
        assert_eq!(kept(&store), MAX_FORMER - 1);
        held.clear();
        store.forget_former();
        assert_eq!(kept(&store), 0);
    }

    #[test]
    fn a_cleared_pool_is_not_synced() {
        let (store, _) = started(&["a"]);
        assert!(store.is_synced());
        store.clear();
        assert!(!store.is_synced() && store.snapshot().is_empty());
        store.update(&[], Vec::new());
        assert!(!store.is_synced());
        store.replace(Vec::new());
        assert!(store.is_synced());
    }
}
