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
        let entry = SubscriberEntry { key, source, stats };
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
