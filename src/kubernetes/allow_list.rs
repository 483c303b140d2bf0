//! The addresses of a pool, for those who must not talk to anything else.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use hashbrown::HashMap;
use kube::Client;
use parking_lot::RwLock;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::discovery::{KubernetesDiscovery, PoolSource};
use super::watch::ApiContact;
use crate::datalayer::discovery::Discovery;
use crate::datalayer::{Endpoint, EndpointListener, EndpointStore};

/// The `ip:port` of every ready pod of an InferencePool, kept up to date.
#[derive(Debug)]
pub struct AllowList {
    store: Arc<EndpointStore>,
    addresses: Arc<Addresses>,
}

/// Endpoints by address: while one pod takes over from another, both may have the same.
#[derive(Debug, Default)]
struct Addresses(RwLock<HashMap<IpAddr, Vec<u16>>>);

impl AllowList {
    /// Follows the pool until `shutdown`. Empty until the API server answered. A `legacy` pool is one of
    /// the group before v1; otherwise that of v1 counts, and while there is none, the older one.
    pub fn start(
        client: Client,
        namespace: String,
        (pool, legacy): (String, bool),
        tasks: &TaskTracker,
        shutdown: CancellationToken,
    ) -> Self {
        let store = Arc::new(EndpointStore::default());
        let addresses = Arc::new(Addresses::default());
        store.subscribe(Arc::clone(&addresses) as Arc<dyn EndpointListener>);
        let source = PoolSource::Pool { name: pool, legacy };
        let discovery = KubernetesDiscovery::new(client, namespace, source, ApiContact::default());
        let followed = Arc::clone(&store);
        tasks.spawn(async move { discovery.watch(&followed, shutdown).await });
        Self { store, addresses }
    }

    /// True when `address` is a ready endpoint of the pool.
    pub fn contains(&self, address: SocketAddr) -> bool {
        let addresses = self.addresses.0.read();
        let ports = addresses.get(&address.ip());
        ports.is_some_and(|ports| ports.contains(&address.port()))
    }

    /// True once the pool was seen, and while it exists.
    pub fn is_synced(&self) -> bool {
        self.store.is_synced()
    }
}

impl EndpointListener for Addresses {
    fn added(&self, endpoint: &Arc<Endpoint>) {
        let address = endpoint.spec.address;
        self.0
            .write()
            .entry(address.ip())
            .or_default()
            .push(address.port());
    }

    fn removed(&self, endpoint: &Arc<Endpoint>) {
        let address = endpoint.spec.address;
        let mut addresses = self.0.write();
        let Some(ports) = addresses.get_mut(&address.ip()) else {
            return;
        };
        if let Some(at) = ports.iter().position(|port| *port == address.port()) {
            ports.swap_remove(at);
        }
        if ports.is_empty() {
            addresses.remove(&address.ip());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kubernetes::testing::{ApiServer, eventually, pod, pool};

    #[tokio::test]
    async fn ready_endpoints_are_allowed_by_address_and_port() {
        let server = ApiServer::start().await;
        server.apply(pool(&[8000]));
        server.apply(pod("a", 1));
        server.apply(pod("b", 2));
        let (tasks, shutdown) = (TaskTracker::new(), CancellationToken::new());
        let list = AllowList::start(
            server.client(),
            "default".to_owned(),
            ("pool".to_owned(), false),
            &tasks,
            shutdown.clone(),
        );
        let allows = |text: &str| list.contains(text.parse().unwrap());
        eventually("both pods", || {
            allows("10.0.0.1:8000") && allows("10.0.0.2:8000")
        })
        .await;
        assert!(list.is_synced());
        assert!(!allows("10.0.0.1:8001") && !allows("10.0.0.3:8000"));
        server.delete("pods", "a");
        eventually("one pod", || !allows("10.0.0.1:8000")).await;
        assert!(allows("10.0.0.2:8000"));
        shutdown.cancel();
        tasks.close();
        tasks.wait().await;
    }

    #[tokio::test]
    async fn a_legacy_pool_is_not_one_of_v1() {
        let server = ApiServer::start().await;
        server.apply(pool(&[8000]));
        server.apply(serde_json::json!({
            "apiVersion": "inference.networking.x-k8s.io/v1alpha2", "kind": "InferencePool",
            "metadata": {"name": "pool", "namespace": "default", "uid": "older"},
            "spec": {"selector": {"app": "llm"}, "targetPortNumber": 9000},
        }));
        server.apply(pod("a", 1));
        let (tasks, shutdown) = (TaskTracker::new(), CancellationToken::new());
        for (legacy, port) in [(false, 8000), (true, 9000)] {
            let list = AllowList::start(
                server.client(),
                "default".to_owned(),
                ("pool".to_owned(), legacy),
                &tasks,
                shutdown.clone(),
            );
            let allows = |port: u16| list.contains(([10, 0, 0, 1], port).into());
            eventually("its endpoint", || allows(port)).await;
            assert!(!allows(17_000 - port), "{legacy}");
        }
        shutdown.cancel();
        tasks.close();
        tasks.wait().await;
    }
}
