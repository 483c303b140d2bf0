//! Endpoints from Kubernetes: the pods of an InferencePool, or those a selector finds.

use std::time::Duration;

use futures_util::future::BoxFuture;
use kube::Client;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use super::objects::{InferencePool, LEGACY_GROUP, Object, POOL_GROUP, Pod};
use super::pods::{Delta, PodTable};
use super::pool::{self, PoolSpec};
use super::watch::{ApiContact, Collection, UPDATE_QUEUE, Update, Watcher};
use crate::datalayer::EndpointStore;
use crate::datalayer::discovery::Discovery;

/// Least time between two changes of the pool. The first event after a pause counts at once; a storm
/// of them costs requests a new snapshot a hundred times a second at most.
const LEAST_INTERVAL: Duration = Duration::from_millis(10);

/// Which pods are endpoints.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PoolSource {
    /// Those of an InferencePool.
    Pool {
        /// Its name.
        name: String,
        /// True for the group before v1 only. Otherwise v1 counts, and while there is no such pool,
        /// one of that name in the older group, where the cluster has it and lets us see it.
        legacy: bool,
    },
    /// Those that a label selector finds; needs no custom resource.
    Selector {
        /// The selector in its text form.
        selector: String,
        /// Ports of each pod.
        ports: Vec<u16>,
    },
}

/// Keeps a store equal to the ready pods of one namespace.
pub struct KubernetesDiscovery {
    client: Client,
    namespace: String,
    source: PoolSource,
    contact: ApiContact,
    pool: watch::Sender<Option<PoolSpec>>,
}

impl std::fmt::Debug for KubernetesDiscovery {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("KubernetesDiscovery")
            .field("namespace", &self.namespace)
            .field("source", &self.source)
            .finish_non_exhaustive()
    }
}

impl KubernetesDiscovery {
    /// Discovery in `namespace`; `contact` learns how the watches fare.
    pub fn new(client: Client, namespace: String, source: PoolSource, contact: ApiContact) -> Self {
        Self {
            client,
            namespace,
            source,
            contact,
            pool: watch::Sender::new(None),
        }
    }

    /// The pool as it is now; `None` while there is none.
    pub fn pool(&self) -> watch::Receiver<Option<PoolSpec>> {
        self.pool.subscribe()
    }

    /// Starts a watcher that ends when the receiver is dropped.
    fn start<K: Object>(&self, collection: Collection) -> mpsc::Receiver<Update<K>> {
        let (updates, receiver) = mpsc::channel(UPDATE_QUEUE);
        let watcher = Watcher::new(self.client.clone(), collection, &self.contact);
        tokio::spawn(watcher.run(updates));
        receiver
    }

    async fn follow(&self, store: &EndpointStore) {
        // May not be the first time: what an earlier one followed is followed no longer.
        self.pool.send_replace(None);
        match &self.source {
            PoolSource::Selector { selector, ports } => {
                let spec = PoolSpec {
                    selector: selector.clone(),
                    ports: ports.clone(),
                    app_protocol: None,
                };
                let mut pods = self.pods(&spec);
                self.pool.send_replace(Some(spec));
                while pods.apply_next(store).await {}
            }
            PoolSource::Pool { name, legacy } => self.follow_pool(name, *legacy, store).await,
        }
    }

    async fn follow_pool(&self, name: &str, legacy: bool, store: &EndpointStore) {
        let group = if legacy { LEGACY_GROUP } else { POOL_GROUP };
        let mut first = Versions::new(self.start(pool::collection(group, &self.namespace, name)));
        let older = (!legacy).then(|| Collection {
            optional: true,
            ..pool::collection(LEGACY_GROUP, &self.namespace, name)
        });
        let mut second = Versions::new(match older {
            Some(older) => self.start(older),
            None => mpsc::channel(1).1,
        });
        let mut pods: Option<Pods> = None;
        loop {
            tokio::select! {
                more = first.next() => if !more { return },
                more = second.next(), if !second.ended => second.ended = !more,
                more = next_of(pods.as_mut(), store) => if !more { return },
            }
            let current = first
                .pool
                .as_ref()
                .or(second.pool.as_ref().filter(|_| first.listed));
            let wanted = current.and_then(read);
            if *self.pool.borrow() == wanted {
                continue;
            }
            let followed = pods.as_ref().map(|pods| &pods.spec);
            let same_pods = followed
                .zip(wanted.as_ref())
                .is_some_and(|(a, b)| a.selector == b.selector && a.ports == b.ports);
            if !same_pods {
                pods = wanted.as_ref().map(|spec| self.pods(spec));
                if wanted.is_none() {
                    tracing::warn!(pool = name, "the InferencePool is gone, no endpoints");
                    store.clear();
                }
            }
            self.pool.send_replace(wanted);
        }
    }

    fn pods(&self, spec: &PoolSpec) -> Pods {
        tracing::info!(selector = spec.selector, ports = ?spec.ports, "following pods");
        let collection = Collection {
            resource: "pods",
            group: "",
            version: "v1",
            namespace: self.namespace.clone(),
            // The server selects: pods of others cost nothing here, and one that loses its labels
            // arrives as deleted.
            labels: Some(spec.selector.clone()),
            fields: None,
            optional: false,
        };
        Pods {
            spec: spec.clone(),
            updates: self.start(collection),
            batch: Vec::new(),
            table: PodTable::new(spec.ports.clone()),
            quiet_until: tokio::time::Instant::now(),
        }
    }
}

impl Discovery for KubernetesDiscovery {
    /// Nothing is known before the API server answers, which may be long after the start.
    fn load<'a>(&'a self, _: &'a EndpointStore) -> BoxFuture<'a, Result<(), String>> {
        Box::pin(std::future::ready(Ok(())))
    }

    fn watch<'a>(
        &'a self,
        store: &'a EndpointStore,
        shutdown: CancellationToken,
    ) -> BoxFuture<'a, ()> {
        Box::pin(async move {
            shutdown.run_until_cancelled(self.follow(store)).await;
        })
    }
}

fn read(pool: &InferencePool) -> Option<PoolSpec> {
    if pool.metadata.is_leaving() {
        return None;
    }
    PoolSpec::read(pool)
        .inspect_err(|problem| {
            tracing::error!(
                pool = pool.metadata.name,
                problem,
                "the InferencePool cannot be used"
            );
        })
        .ok()
}

/// The pool in one group.
#[derive(Debug)]
struct Versions {
    updates: mpsc::Receiver<Update<InferencePool>>,
    pool: Option<InferencePool>,
    /// Whether the server answered for this group, be it that it has no such resource.
    listed: bool,
    ended: bool,
}

impl Versions {
    fn new(updates: mpsc::Receiver<Update<InferencePool>>) -> Self {
        Self {
            updates,
            pool: None,
            listed: false,
            ended: false,
        }
    }

    /// Takes the next update; false when there will be none. Cancel-safe.
    async fn next(&mut self) -> bool {
        let Some(update) = self.updates.recv().await else {
            return false;
        };
        match update {
            Update::Listed(pools) => self.pool = pools.into_iter().next(),
            Update::Applied(pool) => self.pool = Some(pool),
            Update::Deleted(_) => self.pool = None,
            Update::Absent => {}
        }
        self.listed = true;
        true
    }
}

/// The pods of one selector.
#[derive(Debug)]
struct Pods {
    spec: PoolSpec,
    updates: mpsc::Receiver<Update<Pod>>,
    batch: Vec<Update<Pod>>,
    table: PodTable,
    quiet_until: tokio::time::Instant,
}

impl Pods {
    /// Waits for updates and applies all there are; false when there will be none. Cancel-safe: what
    /// was received is either still in the queue or in the store.
    async fn apply_next(&mut self, store: &EndpointStore) -> bool {
        tokio::time::sleep_until(self.quiet_until).await;
        let received = self.updates.recv_many(&mut self.batch, UPDATE_QUEUE).await;
        self.quiet_until = tokio::time::Instant::now() + LEAST_INTERVAL;
        let mut delta = Delta::default();
        for update in self.batch.drain(..) {
            match update {
                Update::Listed(pods) => {
                    delta = Delta::default();
                    store.replace(self.table.replace(&pods));
                }
                Update::Applied(pod) => self.table.apply(&pod, &mut delta),
                Update::Deleted(pod) => self.table.delete(pod.meta(), &mut delta),
                // Pods always exist; what is known of them stands.
                Update::Absent => {}
            }
        }
        let (gone, specs) = delta.into_parts();
        store.update(&gone, specs);
        received > 0
    }
}

/// The next change of the pods, if any are followed.
async fn next_of(pods: Option<&mut Pods>, store: &EndpointStore) -> bool {
    match pods {
        Some(pods) => pods.apply_next(store).await,
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests;
