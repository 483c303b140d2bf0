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
use crate::config::{self, ConfigLoader, ResolvedConfig, ResolvedSource};
use crate::control::Director;
use crate::datalayer::discovery::{self, list};
use crate::datalayer::extractors::Extractor;
use crate::datalayer::scrape::{Poll, Scraper, base_tick};
use crate::datalayer::sources::{DataSource, HttpSource, MetricsDataSource};
use crate::datalayer::{EndpointListener, EndpointStore};
use crate::plugin::Plugin;
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
    /// Discovery in Kubernetes, used when the document names none.
    pub(super) kubernetes: Option<Arc<dyn discovery::Discovery>>,
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
    source: Arc<dyn DataSource>,
    extractors: Vec<Arc<dyn Extractor>>,
    tick: Duration,
    scraper: Arc<dyn EndpointListener>,
}

#[derive(Debug)]
struct Discovery {
    plugin: Arc<dyn discovery::Discovery>,
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
        let polled: Vec<(&ResolvedSource, &HttpSource)> = sources
            .filter_map(|s| Some((s, s.source.http()?)))
            .collect();
        let own = polled.iter().map(|(_, http)| http.interval);
        let tick = base_tick(self.flags.refresh_metrics_interval, own);
        let poller = |(source, http): &(&ResolvedSource, &HttpSource)| {
            let running = self.pollers.iter().find(|p| p.serves(source, tick));
            match running {
                Some(running) => Ok(running.clone()),
                None => self.poller(source, http, tick),
            }
        };
        polled.iter().map(poller).collect()
    }

    fn poller(
        &self,
        source: &ResolvedSource,
        http: &HttpSource,
        tick: Duration,
    ) -> anyhow::Result<Poller> {
        let http = if source.name.type_name == MetricsDataSource::TYPE {
            overridden(http.clone(), &self.flags.scrape)?
        } else {
            http.clone()
        };
        let poll = Poll {
            name: source.name.clone(),
            http,
            payload: source.source.payload(),
            extractors: source.extractors.clone(),
        };
        let scraper = Scraper::new(poll, tick, tokio::runtime::Handle::current())
            .with_context(|| format!("plugin '{}'", source.name.name))?;
        let extractors = source.extractors.iter();
        Ok(Poller {
            source: Arc::clone(&source.source),
            extractors: extractors.map(|(_, e)| Arc::clone(e)).collect(),
            tick,
            scraper: Arc::new(scraper),
        })
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
        let plugin = config.discovery.clone();
        let Some(plugin) = plugin.or_else(|| self.flags.kubernetes.clone()) else {
            anyhow::bail!(
                "no endpoints: give --pool-name or --endpoint-selector (Kubernetes), --endpoints, or \
                 a file-discovery plugin in dataLayer.discovery"
            );
        };
        let running = self.discovery.as_ref().map(|d| &d.plugin);
        if running.is_some_and(|running| is(running, &plugin)) {
            return Ok(());
        }
        // Two may not write to the pool at once, so the former one stops first.
        let former = match self.discovery.take() {
            Some(former) => Some(former.stop().await),
            None => None,
        };
        let loaded = plugin
            .load(&self.store)
            .await
            .map_err(anyhow::Error::msg)
            .context("endpoint discovery");
        let next = if loaded.is_ok() { Some(plugin) } else { former };
        self.discovery = next.map(|plugin| self.watch(plugin));
        loaded
    }

    fn watch(&self, plugin: Arc<dyn discovery::Discovery>) -> Discovery {
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

impl Poller {
    /// True when it fetches the same thing for the same readers as often.
    fn serves(&self, source: &ResolvedSource, tick: Duration) -> bool {
        self.tick == tick
            && is(&self.source, &source.source)
            && self.extractors.len() == source.extractors.len()
            && self
                .extractors
                .iter()
                .zip(&source.extractors)
                .all(|(own, (_, other))| is(own, other))
    }
}

/// True for the same instance.
fn is<T: ?Sized>(one: &Arc<T>, other: &Arc<T>) -> bool {
    std::ptr::addr_eq(Arc::as_ptr(one), Arc::as_ptr(other))
}

impl Discovery {
    /// Returns once nothing writes to the pool any more.
    async fn stop(self) -> Arc<dyn discovery::Discovery> {
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
        others.any(|other| is(one, other))
    };
    all.iter().filter(|one| !among(one)).cloned().collect()
}

/// A metrics source as the flags of earlier releases want it.
fn overridden(mut source: HttpSource, flags: &ScrapeFlags) -> anyhow::Result<HttpSource> {
    if let Some(scheme) = &flags.scheme {
        source.tls = scheme == "https";
    }
    if let Some(path) = &flags.path {
        source
            .set_path(path)
            .context("--model-server-metrics-path")?;
    }
    if let Some(skip) = flags.insecure_skip_verify {
        source.insecure_skip_verify = skip;
    }
    Ok(source)
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
    /// What was decided at the start and stays.
    pub(super) populate_standbys: bool,
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
        if config.populate_standbys != self.populate_standbys {
            tracing::warn!("haPopulateNonLeaderDatastore changes with the next start only");
        }
        self.director.activate(config.activate());
        self.live.retire(&leftovers);
        self.loader.adopt(config);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{LoadOptions, builtin};
    use crate::control::director::DirectorOptions;
    use crate::control::{BodyKnowledge, Decision, Intake, Step, Subset};
    use crate::plugin::InFlightSlot;
    use crate::telemetry::metrics::Metrics;
    use bytes::Bytes;
    use std::path::Path;
    use tokio::time::Instant;

    const HEAD: &str = "apiVersion: llm-d.ai/v1alpha1\nkind: EndpointPickerConfig\n";
    /// Ports nobody listens on: scrapes fail at once.
    const POOL: &str = "127.0.0.1:1,127.0.0.1:2,127.0.0.1:3";

    fn prefix(weight: i32) -> String {
        format!(
            "{HEAD}plugins: [{{type: prefix-cache-scorer}}]\nschedulingProfiles: [{{name: p, \
             plugins: [{{pluginRef: prefix-cache-scorer, weight: {weight}}}]}}]\n"
        )
    }

    struct Running {
        director: Arc<Director>,
        store: Arc<EndpointStore>,
        reloader: Reloader,
        shutdown: CancellationToken,
    }

    async fn start(path: &Path, text: &str, endpoints: Option<&str>) -> Running {
        let store = Arc::new(EndpointStore::default());
        let shutdown = CancellationToken::new();
        let mut loader = ConfigLoader::new(LoadOptions::default(), builtin::registry());
        let config = loader.load(Some(text)).unwrap();
        let flags = LiveFlags {
            endpoints: endpoints.map(str::to_owned),
            kubernetes: None,
            scrape: ScrapeFlags::default(),
            refresh_metrics_interval: Duration::from_mins(1),
        };
        let tasks = TaskTracker::new();
        let mut live = Live::new(flags, Arc::clone(&store), tasks, shutdown.clone());
        live.apply(&config).await.unwrap();
        let options = DirectorOptions {
            ignore_subset: false,
            emit_scores: false,
            strip_control_headers: true,
            seed: Some(1),
        };
        let director = Director::new(
            Arc::clone(&store),
            config.activate(),
            options,
            Metrics::new(),
        );
        let director = Arc::new(director);
        let populate_standbys = config.populate_standbys;
        loader.adopt(config);
        let reloader = Reloader {
            path: path.to_owned(),
            text: text.to_owned(),
            loader,
            live,
            director: Arc::clone(&director),
            metrics: ConfigReloads::new(),
            populate_standbys,
        };
        Running {
            director,
            store,
            reloader,
            shutdown,
        }
    }

    fn decide(director: &Director, id: &str) -> Box<Decision> {
        let body = format!(
            r#"{{"model": "m", "prompt": "{}"}}"#,
            "a prompt of many blocks ".repeat(100)
        );
        let headers = [(":path", "/v1/completions"), ("x-request-id", id)];
        let intake = Intake {
            headers: headers
                .map(|(k, v)| (k.to_owned(), Bytes::copy_from_slice(v.as_bytes())))
                .into_iter()
                .collect(),
            body: [Bytes::from(body)].into_iter().collect(),
            early: None,
            subset: Subset::Any,
            received_at: Instant::now(),
            trace: crate::telemetry::trace::Span::default(),
        };
        match director.decide(intake, BodyKnowledge::Complete) {
            Step::Done(decision) => decision.unwrap(),
            Step::Wait(_) => panic!("nothing waits here"),
        }
    }

    /// Where requests with different ids, so with different random numbers, go. Ended at once.
    fn picks(director: &Director) -> Vec<String> {
        let pick = |i: i32| decide(director, &format!("{i}")).destination;
        let mut picks: Vec<String> = (0..12)
            .map(|i| String::from_utf8(pick(i).to_vec()).unwrap())
            .collect();
        picks.sort_unstable();
        picks.dedup();
        picks
    }

    async fn settle() {
        tokio::time::sleep(WATCH_INTERVAL * 3).await;
    }

    fn in_flight(store: &EndpointStore) -> i64 {
        let pool = store.snapshot();
        let load = |e: &Arc<crate::datalayer::Endpoint>| {
            let load = e.in_flight(InFlightSlot::default());
            load.requests() + load.tokens()
        };
        pool.iter().map(load).sum()
    }

    #[tokio::test(start_paused = true)]
    async fn a_changed_file_changes_picks_and_keeps_what_was_learned() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("config.yaml");
        std::fs::write(&path, prefix(1)).unwrap();
        let Running {
            director,
            store,
            reloader,
            shutdown,
        } = start(&path, &prefix(1), Some(POOL)).await;
        let task = tokio::spawn(reloader.run(shutdown.clone()));
        // The first pick is random; the prefix keeps the others there.
        let home = picks(&director);
        assert_eq!(home.len(), 1);
        let before = decide(&director, "long");
        assert!(in_flight(&store) > 0);

        // The weight is turned round: anywhere but there. Had the index been lost, all would be equal.
        std::fs::write(&path, prefix(-1)).unwrap();
        settle().await;
        let elsewhere: Vec<_> = (0..12)
            .map(|i| decide(&director, &format!("n{i}")).destination.clone())
            .collect();
        assert!(!elsewhere.is_empty() && elsewhere[0] != home[0].as_bytes());

        // The request that began before is still booked, and then it is not.
        assert!(in_flight(&store) > 0);
        drop(before);
        assert_eq!(in_flight(&store), 0);
        shutdown.cancel();
        task.await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn a_broken_file_keeps_the_old_configuration() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("config.yaml");
        std::fs::write(&path, prefix(1)).unwrap();
        let running = start(&path, &prefix(1), Some(POOL)).await;
        let (director, shutdown) = (running.director, running.shutdown);
        let task = tokio::spawn(running.reloader.run(shutdown.clone()));
        let home = picks(&director);
        for broken in [
            "plugins: [",
            "",
            "kind: Pod",
            &prefix(1).replace("prefix-cache-scorer}}", "nobody}}"),
        ] {
            std::fs::write(&path, broken).unwrap();
            settle().await;
            assert_eq!(picks(&director), home, "{broken:?}");
        }
        std::fs::remove_file(&path).unwrap();
        settle().await;
        assert_eq!(picks(&director), home, "removed");
        // A mounted ConfigMap: the file is a link into a directory that is a link, which is replaced.
        for (version, text) in [("v1", prefix(1)), ("v2", prefix(-1))] {
            let data = directory.path().join(version);
            std::fs::create_dir(&data).unwrap();
            std::fs::write(data.join("config.yaml"), text).unwrap();
        }
        let link = directory.path().join("..data");
        std::os::unix::fs::symlink("v1", &link).unwrap();
        std::os::unix::fs::symlink("..data/config.yaml", &path).unwrap();
        settle().await;
        assert_eq!(picks(&director), home);
        let next = directory.path().join("..next");
        std::os::unix::fs::symlink("v2", &next).unwrap();
        std::fs::rename(&next, &link).unwrap();
        settle().await;
        assert_ne!(picks(&director), home);
        shutdown.cancel();
        task.await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn what_did_not_change_goes_on_and_what_did_is_replaced() {
        let mut running = start(Path::new("unused"), &prefix(1), Some(POOL)).await;
        let reloader = &mut running.reloader;
        let index = |live: &Live| Arc::downgrade(&live.listeners[0]);
        let scraper = |live: &Live| Arc::downgrade(&live.pollers[0].scraper);
        let (index_before, scraper_before) = (index(&reloader.live), scraper(&reloader.live));

        reloader.reload(&prefix(5)).await.unwrap();
        assert!(index_before.ptr_eq(&index(&reloader.live)));
        assert!(scraper_before.ptr_eq(&scraper(&reloader.live)));

        // Other parameters make another source: its scraper is replaced, the index stays.
        let other = prefix(5).replace(
            "plugins: [{type",
            "plugins: [{type: metrics-data-source, parameters: {interval: 90s}}, {type",
        );
        reloader.reload(&other).await.unwrap();
        assert!(index_before.ptr_eq(&index(&reloader.live)));
        assert!(scraper_before.upgrade().is_none(), "stopped and dropped");

        // An index with other settings starts empty, and the old one is forgotten.
        let other = prefix(5).replace(
            "plugins: [{type",
            "plugins: [{type: approx-prefix-cache-producer, parameters: {lruCapacityPerServer: 7}}, {type",
        );
        reloader.reload(&other).await.unwrap();
        assert!(!index_before.ptr_eq(&index(&reloader.live)));
        running.director.activate(
            running
                .reloader
                .loader
                .load(Some(&other))
                .unwrap()
                .activate(),
        );
        assert_eq!(running.reloader.live.listeners.len(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn names_of_producers_may_change() {
        let mut running = start(Path::new("unused"), &prefix(1), Some(POOL)).await;
        let renamed = |name: &str| {
            prefix(1).replace(
                "plugins: [{type: prefix-cache-scorer}",
                &format!(
                    "plugins: [{{name: {name}, type: approx-prefix-cache-producer}}, {{type: \
                     prefix-cache-scorer, parameters: {{prefixMatchInfoProducerName: {name}}}}}"
                ),
            )
        };
        for round in 0..3 {
            running
                .reloader
                .reload(&renamed(&format!("index-{round}")))
                .await
                .unwrap();
            let home = picks(&running.director);
            assert_eq!(home.len(), 1, "{home:?}");
        }
        // A consumer whose producer is gone is refused, as at start, and everything stays.
        let orphan =
            renamed("index").replace("{name: index, type: approx-prefix-cache-producer}, ", "");
        let error = running.reloader.reload(&orphan).await.unwrap_err();
        assert!(
            error
                .to_string()
                .contains("PrefixCacheMatchInfoDataKey/index"),
            "{error}"
        );
        let home = picks(&running.director);
        assert_eq!(home.len(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn another_endpoint_file_is_followed_if_it_can_be_read() {
        let directory = tempfile::tempdir().unwrap();
        let file = |name: &str, port: u16| {
            let path = directory.path().join(name);
            std::fs::write(
                &path,
                format!("endpoints: [{{name: {name}, address: 127.0.0.1, port: \"{port}\"}}]\n"),
            )
            .unwrap();
            path
        };
        let document = |path: &Path| {
            format!(
                "{HEAD}plugins: [{{type: random-picker}}, {{type: file-discovery, parameters: {{path: {}, watchFile: true}}}}]\n\
                 dataLayer: {{discovery: {{pluginRef: file-discovery}}}}\n",
                path.display()
            )
        };
        let names = |store: &EndpointStore| -> Vec<String> {
            store
                .snapshot()
                .iter()
                .map(|e| e.spec.name.clone())
                .collect()
        };
        let (a, b) = (file("a", 1), file("b", 2));
        let mut running = start(Path::new("unused"), &document(&a), None).await;
        assert_eq!(names(&running.store), ["a"]);
        running.reloader.reload(&document(&b)).await.unwrap();
        assert_eq!(names(&running.store), ["b"]);
        let gone = directory.path().join("gone");
        assert!(running.reloader.reload(&document(&gone)).await.is_err());
        assert_eq!(names(&running.store), ["b"]);
        settle().await;
        // The file in use is still followed, the former one is not.
        file("a", 7);
        std::fs::write(
            &b,
            "endpoints: [{name: c, address: 127.0.0.1, port: \"3\"}]\n",
        )
        .unwrap();
        settle().await;
        assert_eq!(names(&running.store), ["c"]);
        running.shutdown.cancel();
    }

    #[tokio::test]
    async fn requests_go_on_while_configurations_change() {
        let mut running = start(Path::new("unused"), &prefix(1), Some(POOL)).await;
        let stop = CancellationToken::new();
        let workers: Vec<_> = (0..3)
            .map(|worker| {
                let (director, stop) = (Arc::clone(&running.director), stop.clone());
                tokio::task::spawn_blocking(move || {
                    let mut decided = 0u32;
                    while !stop.is_cancelled() {
                        // Refused, or left behind by a swap, it would panic.
                        drop(decide(&director, &format!("{worker}-{decided}")));
                        decided += 1;
                    }
                    decided
                })
            })
            .collect();
        for round in 0..20 {
            let text = if round % 2 == 0 {
                prefix(-1)
            } else {
                format!("{HEAD}plugins: [{{type: random-picker}}]\n")
            };
            running.reloader.reload(&text).await.unwrap();
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        stop.cancel();
        for worker in workers {
            assert!(worker.await.unwrap() > 0);
        }
        assert_eq!(in_flight(&running.store), 0);
    }
}
