//! What the configuration starts besides requests, and how a changed file replaces it.
//!
//! A reload goes the way of the start: load, validate, start what is new. Only then do requests see it,
//! all at once; those that began before end on what they began with. What did not change goes on
//! unnoticed: instances with their state (see [`ConfigLoader`]), connections of the scrapers whose
//! source, extractors and tick are the same, the watch of the endpoint file. Bookings in flight live on
//! endpoints, by producer name, and stay. When anything fails, everything is as before.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::options::ScrapeFlags;
use crate::config::{self, ConfigLoader, ResolvedConfig};
use crate::control::Director;
use crate::datalayer::discovery::file::FileDiscovery;
use crate::datalayer::discovery::list;
use crate::datalayer::scrape::{CoreMetricsExtractor, MetricsDataSource, Scraper};
use crate::datalayer::{EndpointListener, EndpointStore};
use crate::telemetry::metrics::ConfigReloads;

/// How often the file is read. Reading it finds any kind of change: a write, a rename over it, or the
/// symlink swap of a Kubernetes ConfigMap. A change counts when two reads in a row agree, so that a
/// file is not taken half written.
const WATCH_INTERVAL: Duration = Duration::from_millis(500);

/// Flags that decide what a configuration starts.
#[derive(Debug, Clone)]
pub(super) struct LiveFlags {
    /// `--endpoints`; replaces discovery.
    pub(super) endpoints: Option<String>,
    /// Scrape flags of earlier releases.
    pub(super) scrape: ScrapeFlags,
    /// `--refresh-metrics-interval`.
    pub(super) refresh_metrics_interval: Duration,
}

/// What runs because the configuration says so.
#[derive(Debug)]
pub(super) struct Live {
    flags: LiveFlags,
    store: Arc<EndpointStore>,
    tasks: TaskTracker,
    shutdown: CancellationToken,
    listeners: Vec<Arc<dyn EndpointListener>>,
    pollers: Vec<Poller>,
    discovery: Option<Discovery>,
}

/// A scraper and what it was made from.
#[derive(Debug, Clone)]
struct Poller {
    source: Arc<MetricsDataSource>,
    extractor: Arc<CoreMetricsExtractor>,
    scraper: Arc<dyn EndpointListener>,
}

#[derive(Debug)]
struct Discovery {
    plugin: Arc<FileDiscovery>,
    stop: CancellationToken,
    watch: JoinHandle<()>,
}

/// What a change left over; unsubscribed once no new request can need it.
#[derive(Debug, Default)]
pub(super) struct Leftovers(Vec<Arc<dyn EndpointListener>>);

impl Live {
    /// Nothing runs yet.
    pub(super) fn new(
        flags: LiveFlags,
        store: Arc<EndpointStore>,
        tasks: TaskTracker,
        shutdown: CancellationToken,
    ) -> Self {
        Self {
            flags,
            store,
            tasks,
            shutdown,
            listeners: Vec::new(),
            pollers: Vec::new(),
            discovery: None,
        }
    }

    /// Starts what `config` needs and is not running. On an error everything is as before.
    pub(super) async fn apply(&mut self, config: &ResolvedConfig) -> anyhow::Result<Leftovers> {
        let pollers = self.pollers(config)?;
        self.follow(config).await?;
        let own = |p: &Poller| Arc::clone(&p.scraper);
        let before: Vec<_> = self
            .listeners
            .iter()
            .cloned()
            .chain(self.pollers.iter().map(own))
            .collect();
        let after: Vec<_> = config
            .listeners
            .iter()
            .cloned()
            .chain(pollers.iter().map(own))
            .collect();
        for listener in without(&after, &before) {
            self.store.subscribe(listener);
        }
        self.listeners.clone_from(&config.listeners);
        self.pollers = pollers;
        Ok(Leftovers(without(&before, &after)))
    }

    /// Lets go of what the requests of the former configuration needed.
    pub(super) fn retire(&self, leftovers: &Leftovers) {
        for listener in &leftovers.0 {
            self.store.unsubscribe(listener);
        }
    }

    /// The scrapers of `config`: running ones where nothing changed, else new ones.
    fn pollers(&self, config: &ResolvedConfig) -> anyhow::Result<Vec<Poller>> {
        let sources = config.sources.iter();
        let pollers = sources.map(|(name, source, extractor)| {
            let same = self
                .pollers
                .iter()
                .find(|p| Arc::ptr_eq(&p.source, source) && Arc::ptr_eq(&p.extractor, extractor));
            if let Some(same) = same {
                return Ok(same.clone());
            }
            let scraper = Scraper::new(
                Arc::new(overridden(source, &self.flags.scrape)),
                Arc::clone(extractor),
                self.flags.refresh_metrics_interval,
                tokio::runtime::Handle::current(),
            )
            .with_context(|| format!("plugin '{}'", name.name))?;
            Ok(Poller {
                source: Arc::clone(source),
                extractor: Arc::clone(extractor),
                scraper: Arc::new(scraper),
            })
        });
        pollers.collect()
    }

    /// Fills the pool from the configured discovery and follows it.
    async fn follow(&mut self, config: &ResolvedConfig) -> anyhow::Result<()> {
        if let Some(endpoints) = &self.flags.endpoints {
            // The flag does not change, so the pool is filled once.
            if !self.store.is_synced() {
                self.store
                    .replace(list::parse(endpoints).map_err(anyhow::Error::msg)?);
            }
            return Ok(());
        }
        let Some(plugin) = config.discovery.clone() else {
            anyhow::bail!(
                "no endpoints: give --endpoints, or a file-discovery plugin in dataLayer.discovery; \
                 Kubernetes discovery is not available in this version"
            );
        };
        let running = self.discovery.as_ref().map(|d| &d.plugin);
        if running.is_some_and(|running| Arc::ptr_eq(running, &plugin)) {
            return Ok(());
        }
        // Two may not write to the pool at once, so the former one stops first.
        let former = match self.discovery.take() {
            Some(former) => Some(former.stop().await),
            None => None,
        };
        let loaded = plugin
            .load(&self.store)
            .map_err(anyhow::Error::msg)
            .context("file-discovery");
        let next = if loaded.is_ok() { Some(plugin) } else { former };
        self.discovery = next.map(|plugin| self.watch(plugin));
        loaded
    }

    fn watch(&self, plugin: Arc<FileDiscovery>) -> Discovery {
        let stop = self.shutdown.child_token();
        let (store, watched, stopped) =
            (Arc::clone(&self.store), Arc::clone(&plugin), stop.clone());
        let watch = self
            .tasks
            .spawn(async move { watched.watch(&store, stopped).await });
        Discovery {
            plugin,
            stop,
            watch,
        }
    }
}

impl Discovery {
    /// Returns once nothing writes to the pool any more.
    async fn stop(self) -> Arc<FileDiscovery> {
        self.stop.cancel();
        if self.watch.await.is_err() {
            tracing::error!("watching the endpoints failed");
        }
        self.plugin
    }
}

/// Those of `all` that are not among `others`.
fn without(
    all: &[Arc<dyn EndpointListener>],
    others: &[Arc<dyn EndpointListener>],
) -> Vec<Arc<dyn EndpointListener>> {
    let among = |one: &Arc<dyn EndpointListener>| {
        let mut others = others.iter();
        others.any(|other| std::ptr::addr_eq(Arc::as_ptr(one), Arc::as_ptr(other)))
    };
    all.iter().filter(|one| !among(one)).cloned().collect()
}

/// A metrics source as the flags of earlier releases want it.
fn overridden(source: &MetricsDataSource, flags: &ScrapeFlags) -> MetricsDataSource {
    let mut source = source.clone();
    if let Some(scheme) = &flags.scheme {
        source.tls = scheme == "https";
    }
    if let Some(path) = &flags.path {
        source.path = if path.starts_with('/') {
            path.clone()
        } else {
            format!("/{path}")
        };
    }
    if let Some(skip) = flags.insecure_skip_verify {
        source.insecure_skip_verify = skip;
    }
    source
}

/// Follows `--config-file`.
#[derive(Debug)]
pub(super) struct Reloader {
    /// The file.
    pub(super) path: PathBuf,
    /// What was read of it last.
    pub(super) text: String,
    /// Knows the configuration in use.
    pub(super) loader: ConfigLoader,
    /// What that configuration started.
    pub(super) live: Live,
    /// Decides by it.
    pub(super) director: Arc<Director>,
    /// How reloads went.
    pub(super) metrics: ConfigReloads,
}

impl Reloader {
    /// Follows the file until `shutdown`.
    pub(super) async fn run(mut self, shutdown: CancellationToken) {
        let mut seen = Ok(std::mem::take(&mut self.text));
        let mut last = seen.clone();
        loop {
            tokio::select! {
                () = shutdown.cancelled() => return,
                () = tokio::time::sleep(WATCH_INTERVAL) => {}
            }
            let now = config::read_file(&self.path).map_err(|e| e.to_string());
            let settled = now == last;
            last.clone_from(&now);
            if !settled || now == seen {
                continue;
            }
            let outcome = match &now {
                Ok(text) => self.reload(text).await,
                Err(error) => Err(anyhow::Error::msg(error.clone())),
            };
            self.metrics.record(outcome.is_ok());
            let file = self.path.display();
            match outcome {
                Ok(()) => tracing::info!(%file, "configuration reloaded"),
                Err(error) => tracing::error!(
                    %file,
                    error = format!("{error:#}"),
                    "configuration not reloaded, the old one stays"
                ),
            }
            seen = now;
        }
    }

    async fn reload(&mut self, text: &str) -> anyhow::Result<()> {
        let config = self.loader.load(Some(text))?;
        let leftovers = self.live.apply(&config).await?;
        for warning in &config.warnings {
            tracing::warn!("{warning}");
        }
        self.director.activate(config.activate());
        self.live.retire(&leftovers);
        self.loader.adopt(config);
        Ok(())
    }
}
