//! Who publishes the events of which endpoint, and the ways they come in: we dial each endpoint, or
//! engines connect to one socket of ours.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::{Mutex, RwLock};
use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;

use super::sink::{Slot, Tap, Totals};
use super::{BASE_MODEL, EVENTS_PORT, REPLAY_PORT};
use crate::datalayer::{Endpoint, EndpointIndex};
use crate::kvcache::events::central::{self, Attributed, Topic};
use crate::kvcache::events::pool::{PublisherKey, SubscriberPool};
use crate::kvcache::events::stats::SubscriberStats;
use crate::kvcache::events::subscriber::{Source, SubscriberOptions};
use crate::kvcache::index::KvIndex;

/// All publishers of one instance.
#[derive(Debug)]
pub(super) struct Publishers {
    shared: Arc<Shared>,
    subscribers: SubscriberPool,
    /// Event and replay port of rank 0, where every endpoint is dialled.
    dial: Option<(u16, u16)>,
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
    index: KvIndex,
    totals: Arc<Totals>,
    /// Writers of each endpoint, to end them when it leaves.
    slots: Mutex<HashMap<EndpointIndex, Vec<Slot>>>,
    /// Endpoints by everything a topic may call them: address with port, address, pod.
    names: RwLock<HashMap<String, Vec<Arc<Endpoint>>>>,
    /// Those that connected to us, with the slot that tells whether they still count.
    connected: Mutex<Vec<(Publisher, Slot)>>,
}

impl Publishers {
    pub(super) fn new(
        index: KvIndex,
        dial: Option<(u16, u16)>,
        listen: Option<SocketAddr>,
        stop: CancellationToken,
    ) -> Self {
        Self {
            shared: Arc::new(Shared {
                index,
                totals: Arc::default(),
                slots: Mutex::default(),
                names: RwLock::default(),
                connected: Mutex::default(),
            }),
            subscribers: SubscriberPool::new(SubscriberOptions::default(), stop.clone()),
            dial,
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

    /// Counters of the socket that engines connect to, if there is one.
    pub(super) fn listener(&self) -> Option<(SocketAddr, &Arc<SubscriberStats>)> {
        let central = self.central.as_ref()?;
        Some((central.address, &central.stats))
    }

    /// Everybody who publishes or is dialled, in no particular order.
    pub(super) fn all(&self) -> Vec<Publisher> {
        let entries = self.subscribers.entries();
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
        connected.retain(|(_, slot)| slot.lock().is_some());
        all.extend(connected.iter().map(|(publisher, _)| publisher.clone()));
        all
    }

    /// An endpoint joined the pool.
    pub(super) fn added(&self, endpoint: &Arc<Endpoint>) {
        let Ok(runtime) = Handle::try_current() else {
            tracing::warn!(endpoint = endpoint.spec.name, "no KV events: no runtime");
            return;
        };
        if let Some(central) = &self.central {
            self.shared.name(endpoint);
            central.start(&self.shared, &runtime, &self.stop);
        }
        if let Some((live, replay)) = self.dial {
            self.dial(endpoint, live, replay, &runtime);
        }
    }

    fn dial(&self, endpoint: &Arc<Endpoint>, live: u16, replay: u16, runtime: &Handle) {
        let spec = &endpoint.spec;
        let port = |label: &str, default| {
            let own = spec.labels.get(label).and_then(|port| port.parse().ok());
            own.unwrap_or(default)
        };
        let (live, replay) = (port(EVENTS_PORT, live), port(REPLAY_PORT, replay));
        let Some(source) = Source::of_rank(spec.address.ip(), live, replay, spec.rank) else {
            tracing::warn!(endpoint = spec.name, "no KV events: no such port");
            return;
        };
        let key = PublisherKey {
            endpoint: endpoint.index,
            rank: spec.rank,
        };
        let sink = Box::new(self.shared.tap(endpoint));
        let name = endpoint.host_port_str();
        let _entered = runtime.enter();
        if let Err(error) = self.subscribers.add(key, name, source, sink) {
            tracing::warn!(endpoint = spec.name, %error, "no KV events");
        }
    }

    /// An endpoint left the pool; nothing of it is in the index when this returns.
    pub(super) fn removed(&self, endpoint: &Arc<Endpoint>) {
        // The tasks end on their own.
        self.subscribers
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
    /// A sink for the endpoint, which ends when it leaves.
    fn tap(&self, endpoint: &Arc<Endpoint>) -> Tap {
        let writer = self.index.writer(endpoint.index, BASE_MODEL);
        let tap = Tap::new(writer, Arc::clone(&self.totals));
        let mut slots = self.slots.lock();
        let own = slots.entry(endpoint.index).or_default();
        own.retain(|slot| slot.lock().is_some());
        own.push(tap.slot());
        tap
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
        let slots = self.slots.lock().remove(&endpoint.index);
        for slot in slots.into_iter().flatten() {
            slot.lock().take();
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

    fn attribute(&self, publisher: &str, rank: Option<u32>) -> Option<Attributed> {
        let endpoint = self.find(publisher, rank)?;
        let tap = self.tap(&endpoint);
        if endpoint.is_removed() {
            // It left between the two lines above, and `forget` may have come too early for the sink.
            return None;
        }
        let stats: Arc<SubscriberStats> = Arc::default();
        let publisher = Publisher {
            name: endpoint.host_port_str().into(),
            rank: rank.unwrap_or(endpoint.spec.rank),
            source: None,
            stats: Arc::clone(&stats),
        };
        self.connected.lock().push((publisher, tap.slot()));
        Some(Attributed {
            sink: Box::new(tap),
            stats,
        })
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
