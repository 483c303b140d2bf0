//! The subscribers of a pool: one for each endpoint and data-parallel rank, added and removed while
//! others run.

use std::collections::HashMap;
use std::sync::Arc;

use arc_swap::ArcSwap;
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::EventSink;
use super::replay::MAX_REPLAYS;
use super::stats::SubscriberStats;
use super::subscriber::{Source, Subscriber, SubscriberOptions};
use crate::datalayer::EndpointIndex;

/// Subscribers at once; beyond it [`SubscriberPool::add`] refuses.
pub const MAX_SUBSCRIBERS: usize = 16_384;

/// One publisher: an endpoint has one for each data-parallel rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PublisherKey {
    /// The endpoint.
    pub endpoint: EndpointIndex,
    /// Its data-parallel rank.
    pub rank: u32,
}

/// [`MAX_SUBSCRIBERS`] run already.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{MAX_SUBSCRIBERS} KV event subscribers run already")]
pub struct PoolFull;

/// Counters of a running subscriber.
#[derive(Debug, Clone)]
pub struct SubscriberEntry {
    /// Whose.
    pub key: PublisherKey,
    /// The endpoint's `address:port`, for people and labels.
    pub name: Arc<str>,
    /// Where it listens.
    pub source: Source,
    /// Its counters.
    pub stats: Arc<SubscriberStats>,
}

#[derive(Debug)]
struct Running {
    entry: SubscriberEntry,
    stop: CancellationToken,
    task: JoinHandle<()>,
}

/// A subscriber on its way out; its sink is reset when it ends. Need not be awaited.
#[derive(Debug)]
#[must_use = "await it before the key's sink is used by someone else, or drop it"]
pub struct Stopping(Option<JoinHandle<()>>);

impl Stopping {
    /// Waits until the task has ended and told its sink.
    pub async fn wait(self) {
        if let Some(task) = self.0 {
            // A panic in the sink ended it earlier; the panic hook has told.
            let _ = task.await;
        }
    }
}

/// All subscribers of the process.
#[derive(Debug)]
pub struct SubscriberPool {
    options: SubscriberOptions,
    permits: Arc<Semaphore>,
    stop: CancellationToken,
    running: parking_lot::Mutex<HashMap<PublisherKey, Running>>,
    entries: ArcSwap<Vec<SubscriberEntry>>,
}

impl SubscriberPool {
    /// An empty pool; cancelling `stop` ends every subscriber.
    pub fn new(options: SubscriberOptions, stop: CancellationToken) -> Self {
        Self {
            options,
            permits: Arc::new(Semaphore::new(MAX_REPLAYS)),
            stop,
            running: parking_lot::Mutex::default(),
            entries: ArcSwap::default(),
        }
    }

    /// Starts a subscriber, on the runtime of the caller. One under the same key is stopped and its
    /// sink reset before the new one begins; the same source again under a key changes nothing.
    pub fn add(
        &self,
        key: PublisherKey,
        name: &str,
        source: Source,
        sink: Box<dyn EventSink>,
    ) -> Result<(), PoolFull> {
        let mut running = self.running.lock();
        if running.get(&key).is_some_and(|r| r.entry.source == source) {
            return Ok(());
        }
        if running.len() >= MAX_SUBSCRIBERS && !running.contains_key(&key) {
            return Err(PoolFull);
        }
        let before = running.remove(&key).map(|old| {
            old.stop.cancel();
            old.task
        });
        let stats = Arc::new(SubscriberStats::default());
        let subscriber = Subscriber::new(
            source,
            sink,
            Arc::clone(&stats),
            self.options,
            Arc::clone(&self.permits),
        );
        let stop = self.stop.child_token();
        let task = tokio::spawn({
            let stop = stop.clone();
            async move {
                Stopping(before).wait().await;
                subscriber.run(stop).await;
            }
        });
        let name = name.into();
        let entry = SubscriberEntry {
            key,
            name,
            source,
            stats,
        };
        running.insert(key, Running { entry, stop, task });
        self.publish(&running);
        Ok(())
    }

    /// Stops a subscriber: its socket closes and its sink is reset.
    pub fn remove(&self, key: PublisherKey) -> Stopping {
        let mut running = self.running.lock();
        let Some(old) = running.remove(&key) else {
            return Stopping(None);
        };
        old.stop.cancel();
        self.publish(&running);
        Stopping(Some(old.task))
    }

    /// Stops every rank of an endpoint.
    pub fn remove_endpoint(&self, endpoint: EndpointIndex) -> Vec<Stopping> {
        let entries = self.entries();
        entries
            .iter()
            .filter(|entry| entry.key.endpoint == endpoint)
            .map(|entry| self.remove(entry.key))
            .collect()
    }

    /// The running subscribers in key order, without a lock; at most one change old.
    pub fn entries(&self) -> Arc<Vec<SubscriberEntry>> {
        self.entries.load_full()
    }

    /// Stops all and waits for them.
    pub async fn shutdown(&self) {
        self.stop.cancel();
        let all: Vec<_> = {
            let mut running = self.running.lock();
            let all = running.drain().map(|(_, r)| r.task).collect();
            self.publish(&running);
            all
        };
        for task in all {
            Stopping(Some(task)).wait().await;
        }
    }

    fn publish(&self, running: &HashMap<PublisherKey, Running>) {
        let mut entries: Vec<_> = running.values().map(|r| r.entry.clone()).collect();
        entries.sort_unstable_by_key(|entry| entry.key);
        self.entries.store(Arc::new(entries));
    }
}

#[cfg(test)]
mod tests {
    use super::super::StreamState;
    use super::super::testing::{Engine, Recorder, until};
    use super::*;

    fn key(endpoint: u32, rank: u32) -> PublisherKey {
        PublisherKey {
            endpoint: EndpointIndex(endpoint),
            rank,
        }
    }

    fn source(engine: &Engine) -> Source {
        Source {
            live: engine.live,
            replay: Some(engine.replay),
        }
    }

    fn pool() -> SubscriberPool {
        SubscriberPool::new(SubscriberOptions::default(), CancellationToken::new())
    }

    #[tokio::test]
    async fn subscribers_come_and_go_without_touching_others() {
        let (a, b) = (Engine::start().await, Engine::start().await);
        a.keep(0, 10);
        b.keep(0, 20);
        let (to_a, to_b) = (Recorder::default(), Recorder::default());
        let pool = pool();
        pool.add(key(1, 0), "e", source(&a), Box::new(to_a.clone()))
            .unwrap();
        pool.add(key(1, 1), "e", source(&b), Box::new(to_b.clone()))
            .unwrap();
        to_a.until_known(&[10]).await;
        to_b.until_known(&[20]).await;
        let entries = pool.entries();
        let keys: Vec<_> = entries.iter().map(|entry| entry.key).collect();
        assert_eq!(keys, [key(1, 0), key(1, 1)]);
        assert_eq!(entries[0].stats.snapshot().last_seq, Some(0));

        pool.remove(key(1, 0)).wait().await;
        assert_eq!(to_a.known(), [] as [u64; 0]);
        assert_eq!(to_a.state(), Some(StreamState::Down));
        assert_eq!(pool.entries().len(), 1);
        until("b live", || to_b.state() == Some(StreamState::Live)).await;
        assert_eq!(to_b.known(), [20]);

        for stopping in pool.remove_endpoint(EndpointIndex(1)) {
            stopping.wait().await;
        }
        assert!(pool.entries().is_empty());
        assert_eq!(to_b.known(), [] as [u64; 0]);
    }

    #[tokio::test]
    async fn another_source_replaces_and_the_same_changes_nothing() {
        let (old, new) = (Engine::start().await, Engine::start().await);
        old.keep(0, 10);
        new.keep(0, 20);
        let (first, second, third) = <(Recorder, Recorder, Recorder)>::default();
        let pool = pool();
        pool.add(key(1, 0), "e", source(&old), Box::new(first.clone()))
            .unwrap();
        first.until_known(&[10]).await;
        pool.add(key(1, 0), "e", source(&old), Box::new(second.clone()))
            .unwrap();
        pool.add(key(1, 0), "e", source(&new), Box::new(third.clone()))
            .unwrap();
        third.until_known(&[20]).await;
        assert_eq!(first.known(), [] as [u64; 0]);
        assert_eq!(second.told(), []);
        pool.shutdown().await;
        assert_eq!(third.known(), [] as [u64; 0]);
    }
}
