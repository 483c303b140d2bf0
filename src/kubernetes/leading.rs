//! Work that only the leader does, for replicas that keep nothing while they stand by.

use std::sync::Arc;

use futures_util::future::BoxFuture;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::datalayer::EndpointStore;
use crate::datalayer::discovery::Discovery;

/// Whether this process leads, and whether it is about to end.
#[derive(Debug, Clone)]
pub struct Leadership {
    leads: watch::Receiver<bool>,
    leaving: CancellationToken,
}

impl Leadership {
    /// `leaving` is cancelled before `leads` turns false when the lease is given back because the
    /// process ends.
    pub fn new(leads: watch::Receiver<bool>, leaving: CancellationToken) -> Self {
        Self { leads, leaving }
    }

    /// Runs what `work` makes for as long as this process leads, and `after` when it ceases to. One
    /// that is about to end goes on with what it has: requests are still coming while it drains.
    pub async fn run<F: Future<Output = ()>>(
        mut self,
        mut work: impl FnMut() -> F,
        mut after: impl FnMut(),
    ) {
        // The election is over when its sender is gone.
        while self.leads.wait_for(|leads| *leads).await.is_ok() {
            let leaving = self.leaving.clone();
            let ceased = async {
                let over = self.leads.wait_for(|leads| !*leads).await.is_err();
                if over || leaving.is_cancelled() {
                    std::future::pending::<()>().await;
                }
            };
            tokio::select! {
                () = work() => return,
                () = ceased => after(),
            }
        }
    }
}

/// A discovery that fills the pool of the leader only.
#[derive(Debug)]
pub struct LeaderDiscovery {
    inner: Arc<dyn Discovery>,
    leadership: Leadership,
}

impl LeaderDiscovery {
    /// `inner`, while `leadership` lasts.
    pub fn new(inner: Arc<dyn Discovery>, leadership: Leadership) -> Self {
        Self { inner, leadership }
    }
}

impl Discovery for LeaderDiscovery {
    /// Nothing: the election has not begun.
    fn load<'a>(&'a self, _: &'a EndpointStore) -> BoxFuture<'a, Result<(), String>> {
        Box::pin(std::future::ready(Ok(())))
    }

    fn watch<'a>(
        &'a self,
        store: &'a EndpointStore,
        shutdown: CancellationToken,
    ) -> BoxFuture<'a, ()> {
        Box::pin(async move {
            let follow = || self.inner.watch(store, shutdown.clone());
            let leading = self.leadership.clone().run(follow, || {
                tracing::info!("standing by without endpoints");
                store.clear();
            });
            shutdown.run_until_cancelled(leading).await;
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kubernetes::testing::{ApiServer, eventually, pod, pool};
    use crate::kubernetes::watch::ApiContact;
    use crate::kubernetes::{KubernetesDiscovery, PoolSource};

    #[tokio::test]
    async fn the_pool_is_filled_while_leading_and_kept_while_leaving() {
        let server = ApiServer::start().await;
        server.apply(pool(&[8000]));
        server.apply(pod("a", 1));
        let source = PoolSource::Pool {
            name: "pool".to_owned(),
            legacy: false,
        };
        let contact = ApiContact::default();
        let inner = KubernetesDiscovery::new(
            server.client(),
            "default".to_owned(),
            source,
            contact.clone(),
        );
        let (leads, leaving) = (watch::Sender::new(false), CancellationToken::new());
        let leadership = Leadership::new(leads.subscribe(), leaving.clone());
        let discovery = LeaderDiscovery::new(Arc::new(inner), leadership);
        let (store, shutdown) = (Arc::new(EndpointStore::default()), CancellationToken::new());
        let (followed, stopped) = (Arc::clone(&store), shutdown.clone());
        let task = tokio::spawn(async move {
            discovery.load(&followed).await.unwrap();
            discovery.watch(&followed, stopped).await;
        });
        let filled = || store.is_synced() && store.snapshot().len() == 1;
        let idle = || {
            !store.is_synced()
                && store.snapshot().is_empty()
                && server.watches("pods") == 0
                && contact.is_complete()
        };
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        assert!(idle() && server.requests().is_empty());
        for _ in 0..2 {
            leads.send_replace(true);
            eventually("the leader has endpoints", filled).await;
            leads.send_replace(false);
            eventually("a standby has none and asks nothing", idle).await;
        }
        leads.send_replace(true);
        eventually("leading again", filled).await;
        // The lease is given back first; requests still come.
        leaving.cancel();
        leads.send_replace(false);
        server.apply(pod("b", 2));
        eventually("it is followed on", || store.snapshot().len() == 2).await;
        shutdown.cancel();
        task.await.unwrap();
        assert_eq!(store.snapshot().len(), 2);
    }
}
