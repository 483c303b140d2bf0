//! Who publishes the events of which endpoint, and the ways they come in: we dial each endpoint, or
//! engines connect to one socket of ours.

use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::{Mutex, RwLock};
use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;

use super::BASE_MODEL;
use super::sink::{Slot, Tap, Totals};
use crate::datalayer::{Endpoint, EndpointIndex};
use crate::kvcache::events::EventSink;
use crate::kvcache::events::central::{self, Attributed, Topic};
use crate::kvcache::events::pool::{PublisherKey, SubscriberPool};
use crate::kvcache::events::stats::SubscriberStats;
use crate::kvcache::events::subscriber::{Source, SubscriberOptions};
use crate::kvcache::index::KvIndex;
use crate::kvcache::redis::{Queue, SharedIndex};

/// Ranks of one endpoint that publish; batches of further ones are dropped.
const MAX_RANKS: usize = 128;

/// All publishers of one instance.
#[derive(Debug)]
pub(super) struct Publishers {
    shared: Arc<Shared>,
    central: Option<Central>,
    stop: CancellationToken,
}

/// One publisher, for metrics and the admin endpoint.
#[derive(Debug, Clone)]
pub(super) struct Publisher {
    /// The endpoint's `address:port`.
    pub(super) name: Arc<str>,
    /// Its data-parallel rank.
    pub(super) rank: u32,
    /// Where we dial; `None` for one that connected to us.
    pub(super) source: Option<Source>,
    pub(super) stats: Arc<SubscriberStats>,
}

/// Where events go.
#[derive(Debug)]
pub(super) enum Backend {
    /// This process's index.
    Local(KvIndex),
    /// An index that replicas share, and what waits for its server until the task that writes takes it.
    Remote(Arc<SharedIndex>, Mutex<Option<Queue>>),
}

/// Ends a sink when its endpoint leaves the pool.
#[derive(Debug, Clone)]
enum End {
    /// By taking its part of the index away.
    Local(Slot),
    /// By telling it.
    Remote(Arc<AtomicBool>),
}

impl End {
    fn end(&self) {
        match self {
            Self::Local(slot) => drop(slot.lock().take()),
            Self::Remote(gone) => gone.store(true, Ordering::Relaxed),
        }
    }

    fn is_over(&self) -> bool {
        match self {
            Self::Local(slot) => slot.lock().is_none(),
            Self::Remote(gone) => gone.load(Ordering::Relaxed),
        }
    }
}

/// The socket that engines connect to.
#[derive(Debug)]
struct Central {
    address: SocketAddr,
    stats: Arc<SubscriberStats>,
    started: AtomicBool,
}

/// What the tasks of publishers need.
#[derive(Debug)]
struct Shared {
    backend: Backend,
    totals: Arc<Totals>,
    subscribers: SubscriberPool,
    /// Event and replay port of rank 0, where every endpoint is dialled.
    dial: Option<(u16, u16)>,
    endpoints: Mutex<HashMap<EndpointIndex, Followed>>,
    /// Endpoints by everything a topic may call them: address with port, address, pod.
    names: RwLock<HashMap<String, Vec<Arc<Endpoint>>>>,
    /// Those that connected to us, with what tells whether they still count.
    connected: Mutex<Vec<(Publisher, End)>>,
}

/// An endpoint of the pool and the sinks of its publishers.
#[derive(Debug)]
struct Followed {
    endpoint: Arc<Endpoint>,
    ends: Vec<End>,
}

impl Publishers {
    pub(super) fn new(
        backend: Backend,
        dial: Option<(u16, u16)>,
        listen: Option<SocketAddr>,
        stop: CancellationToken,
    ) -> Self {
        Self {
            shared: Arc::new(Shared {
                backend,
                totals: Arc::default(),
                subscribers: SubscriberPool::new(SubscriberOptions::default(), stop.clone()),
                dial,
                endpoints: Mutex::default(),
                names: RwLock::default(),
                connected: Mutex::default(),
            }),
            central: listen.map(|address| Central {
                address,
                stats: Arc::default(),
                started: AtomicBool::new(false),
            }),
            stop,
        }
    }

    pub(super) fn totals(&self) -> &Totals {
        &self.shared.totals
    }

    #[cfg(test)]
    pub(super) fn totals_for_test(&self) -> Arc<Totals> {
        Arc::clone(&self.shared.totals)
    }

    /// The index that replicas share, where that is configured.
    pub(super) fn remote(&self) -> Option<&Arc<SharedIndex>> {
        match &self.shared.backend {
            Backend::Local(_) => None,
            Backend::Remote(index, _) => Some(index),
        }
    }

    /// Counters of the socket that engines connect to, if there is one.
    pub(super) fn listener(&self) -> Option<(SocketAddr, &Arc<SubscriberStats>)> {
        let central = self.central.as_ref()?;
        Some((central.address, &central.stats))
    }

    /// Everybody who publishes or is dialled, in no particular order.
    pub(super) fn all(&self) -> Vec<Publisher> {
        let entries = self.shared.subscribers.entries();
        let mut all: Vec<_> = entries
            .iter()
            .map(|entry| Publisher {
                name: Arc::clone(&entry.name),
                rank: entry.key.rank,
                source: Some(entry.source),
                stats: Arc::clone(&entry.stats),
            })
            .collect();
        let mut connected = self.shared.connected.lock();
        connected.retain(|(_, end)| !end.is_over());
        all.extend(connected.iter().map(|(publisher, _)| publisher.clone()));
        all
    }

    /// Endpoints whose engine is known to publish: what it did not announce, it does not hold.
    pub(super) fn heard(&self) -> HashSet<EndpointIndex> {
        let entries = self.shared.subscribers.entries();
        let dialled = entries
            .iter()
            .filter(|entry| entry.stats.has_events())
            .map(|entry| entry.key.endpoint);
        let names = self.shared.names.read();
        let connected = self.shared.connected.lock();
        let connected = connected
            .iter()
            .filter(|(publisher, end)| publisher.stats.has_events() && !end.is_over())
            .filter_map(|(publisher, _)| names.get(&*publisher.name)?.first())
            .map(|endpoint| endpoint.index);
        dialled.chain(connected).collect()
    }

    /// Whether the events of an endpoint's publishers tell all that its engine can hold. Cost: O(publishers).
    pub(super) fn is_complete(&self, endpoint: &Endpoint) -> bool {
        let entries = self.shared.subscribers.entries();
        let mut dialled = entries.iter().filter(|e| e.key.endpoint == endpoint.index);
        let connected = self.shared.connected.lock();
        let name = endpoint.host_port_str();
        let mut connected = connected
            .iter()
            .filter(|(of, end)| *of.name == *name && !end.is_over());
        dialled.all(|entry| entry.stats.is_complete())
            && connected.all(|(publisher, _)| publisher.stats.is_complete())
    }

    /// An endpoint joined the pool.
    pub(super) fn added(&self, endpoint: &Arc<Endpoint>) {
        let Ok(runtime) = Handle::try_current() else {
            tracing::warn!(endpoint = endpoint.spec.name, "no KV events: no runtime");
            return;
        };
        let followed = Followed {
            endpoint: Arc::clone(endpoint),
            ends: Vec::new(),
        };
        let former = self
            .shared
            .endpoints
            .lock()
            .insert(endpoint.index, followed);
        for end in former.iter().flat_map(|former| &former.ends) {
            end.end();
        }
        self.start_writer(&runtime);
        if let Some(central) = &self.central {
            self.shared.name(endpoint);
            central.start(&self.shared, &runtime, &self.stop);
        }
        let _entered = runtime.enter();
        self.shared.dial(endpoint);
    }

    /// The task that writes to the shared index; once.
    fn start_writer(&self, runtime: &Handle) {
        let Backend::Remote(index, queue) = &self.shared.backend else {
            return;
        };
        if let Some(queue) = queue.lock().take() {
            let shared = Arc::downgrade(&self.shared);
            let resync = move || {
                if let Some(shared) = shared.upgrade() {
                    shared.resync();
                }
            };
            runtime.spawn(Arc::clone(index).run(queue, resync, self.stop.clone()));
        }
    }

    /// An endpoint left the pool; nothing of it is in this process's index when this returns.
    pub(super) fn removed(&self, endpoint: &Arc<Endpoint>) {
        // The tasks end on their own.
        self.shared
            .subscribers
            .remove_endpoint(endpoint.index)
            .into_iter()
            .for_each(drop);
        self.shared.forget(endpoint);
    }
}

impl Central {
    fn start(&self, shared: &Arc<Shared>, runtime: &Handle, stop: &CancellationToken) {
        if self.started.swap(true, Ordering::Relaxed) {
            return;
        }
        let shared = Arc::clone(shared);
        let resolver = move |topic: Topic<'_>, rank| shared.attribute(topic.publisher, rank);
        runtime.spawn(central::listen(
            self.address,
            Box::new(resolver),
            SubscriberOptions::default(),
            Arc::clone(&self.stats),
            stop.clone(),
        ));
    }
}

impl Shared {
    /// Connects to the endpoint's publisher, on the runtime of the caller.
    fn dial(&self, endpoint: &Arc<Endpoint>) {
        let Some((live, replay)) = self.dial else {
            return;
        };
        let spec = &endpoint.spec;
        let Some(source) = Source::of_endpoint(spec, live, replay) else {
            tracing::warn!(endpoint = spec.name, "no KV events: no such port");
            return;
        };
        let key = PublisherKey {
            endpoint: endpoint.index,
            rank: spec.rank,
        };
        let (sink, _) = self.tap(endpoint);
        let name = endpoint.host_port_str();
        if let Err(error) = self.subscribers.add(key, name, source, sink) {
            tracing::warn!(endpoint = spec.name, %error, "no KV events");
        }
    }

    /// A sink for the endpoint, which ends when it leaves.
    fn tap(&self, endpoint: &Arc<Endpoint>) -> (Box<dyn EventSink>, End) {
        let (sink, end): (Box<dyn EventSink>, _) = match &self.backend {
            Backend::Local(index) => {
                let writer = index.writer(endpoint.index, BASE_MODEL);
                let tap = Tap::new(writer, Arc::clone(&self.totals));
                let end = End::Local(tap.slot());
                (Box::new(tap), end)
            }
            Backend::Remote(index, _) => {
                let gone = Arc::new(AtomicBool::new(false));
                let sink = index.sink(endpoint.host_port_str(), Arc::clone(&gone));
                (Box::new(sink), End::Remote(gone))
            }
        };
        match self.endpoints.lock().get_mut(&endpoint.index) {
            Some(followed) if Arc::ptr_eq(&followed.endpoint, endpoint) => {
                followed.ends.retain(|end| !end.is_over());
                followed.ends.push(end.clone());
            }
            // It left meanwhile.
            _ => end.end(),
        }
        (sink, end)
    }

    /// The shared index may say what is not so: everything of our endpoints is written anew, as far as
    /// their engines can replay it.
    fn resync(&self) {
        let Backend::Remote(index, _) = &self.backend else {
            return;
        };
        let endpoints: Vec<_> = {
            let mut followed = self.endpoints.lock();
            let all = followed.values_mut().map(|followed| {
                followed.ends.drain(..).for_each(|end| end.end());
                Arc::clone(&followed.endpoint)
            });
            all.collect()
        };
        tracing::info!(
            endpoints = endpoints.len(),
            "the shared index may be wrong about our endpoints, they are written anew"
        );
        let names = endpoints.iter().map(|e| Arc::from(e.host_port_str()));
        index.clear(names.collect());
        for endpoint in &endpoints {
            self.subscribers
                .remove_endpoint(endpoint.index)
                .into_iter()
                .for_each(drop);
            self.dial(endpoint);
        }
    }

    fn name(&self, endpoint: &Arc<Endpoint>) {
        let mut names = self.names.write();
        for name in names_of(endpoint) {
            names.entry(name).or_default().push(Arc::clone(endpoint));
        }
    }

    fn forget(&self, endpoint: &Arc<Endpoint>) {
        let mut names = self.names.write();
        for name in names_of(endpoint) {
            if let Some(named) = names.get_mut(&name) {
                named.retain(|other| !Arc::ptr_eq(other, endpoint));
                if named.is_empty() {
                    names.remove(&name);
                }
            }
        }
        drop(names);
        let followed = self.endpoints.lock().remove(&endpoint.index);
        for end in followed.iter().flat_map(|followed| &followed.ends) {
            end.end();
        }
        if let Backend::Remote(index, _) = &self.backend {
            index.clear(vec![endpoint.host_port_str().into()]);
        }
    }

    /// Whose events a topic brings. A topic that names the address of one rank may bring the batches of
    /// another: engines give all their ranks the same text.
    fn find(&self, publisher: &str, rank: Option<u32>) -> Option<Arc<Endpoint>> {
        let names = self.names.read();
        let named = names.get(publisher)?;
        let first = named.first()?;
        let rank = rank.unwrap_or(first.spec.rank);
        let siblings = names.get(first.spec.pod_name()).into_iter().flatten();
        let mut all = named.iter().chain(siblings);
        let same_pod = |other: &&Arc<Endpoint>| {
            other.spec.rank == rank
                && other.spec.address.ip() == first.spec.address.ip()
                && other.spec.pod_name() == first.spec.pod_name()
        };
        Some(Arc::clone(all.find(same_pod).unwrap_or(first)))
    }

    /// A sink for a publisher that connected to us. It takes the place of the one that published as the
    /// same rank of the endpoint under another topic: an engine has one topic, so that was another process.
    fn attribute(&self, publisher: &str, rank: Option<u32>) -> Option<Attributed> {
        let endpoint = self.find(publisher, rank)?;
        let (name, rank) = (endpoint.host_port_str(), rank.unwrap_or(endpoint.spec.rank));
        let mut connected = self.connected.lock();
        connected.retain(|(former, end)| {
            if *former.name == *name && former.rank == rank {
                end.end();
            }
            !end.is_over()
        });
        let ranks = connected.iter().filter(|(other, _)| *other.name == *name);
        if ranks.count() >= MAX_RANKS {
            return None;
        }
        let (sink, end) = self.tap(&endpoint);
        let stats: Arc<SubscriberStats> = Arc::default();
        let publisher = Publisher {
            name: name.into(),
            rank,
            source: None,
            stats: Arc::clone(&stats),
        };
        connected.push((publisher, end));
        Some(Attributed { sink, stats })
    }
}

/// What a topic may call an endpoint: in current deployments its address with port, in older ones the
/// address or the pod.
fn names_of(endpoint: &Endpoint) -> Vec<String> {
    let spec = &endpoint.spec;
    let mut names = vec![
        endpoint.host_port_str().to_owned(),
        spec.address.ip().to_string(),
        spec.pod_name().to_owned(),
        spec.name.clone(),
    ];
    names.sort_unstable();
    names.dedup();
    names
}

impl Drop for Publishers {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}
