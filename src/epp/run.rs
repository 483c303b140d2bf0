//! Wiring, in the order things must happen, and shutdown in reverse.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use arc_swap::ArcSwap;
use bytes::Bytes;
use k8s_openapi::jiff::Timestamp;
use serde_json::json;
use tokio::net::TcpListener;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::control_plane::{ControlPlane, follow_rules};
use super::health::{HealthService, HealthState};
use super::options::ServeOptions;
use super::reload::{Live, LiveFlags, Reloader};
use super::{tls, tracing as traces};
use crate::config::{self, ConfigLoader, LoadOptions, ResolvedConfig};
use crate::control::Director;
use crate::control::director::DirectorOptions;
use crate::control::producers::inflight_load::InFlightLoadProducer;
use crate::control::rules::SharedRules;
use crate::datalayer::EndpointStore;
use crate::datalayer::pool_gauges::PoolGauges;
use crate::extproc::proto::health::health_server::HealthServer;
use crate::extproc::server::{Routes, Server, ServerConfigs};
use crate::extproc::service::{MessageLimits, Processor};
use crate::extproc::stream::StreamSettings;
use crate::plugin::{InFlightSlot, Plugin};
use crate::telemetry::metrics::{ConfigReloads, ExtProcStreams, Metrics};
use crate::telemetry::server::{Explained, IndexView, Pages, Refusal};
use crate::telemetry::trace::Tracer;
use crate::telemetry::{self, log};

/// Room of a gRPC message around a body piece.
const MESSAGE_OVERHEAD_BYTES: usize = 1 << 20;

/// Runs the endpoint picker until SIGTERM or Ctrl-C.
pub fn run(options: ServeOptions) -> anyhow::Result<()> {
    log::install(options.log_format, options.log_level);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .thread_name("background")
        .enable_all()
        .build()
        .context("starting the background runtime")?;
    runtime.block_on(serve(options))
}

async fn serve(options: ServeOptions) -> anyhow::Result<()> {
    for warning in &options.warnings {
        tracing::warn!("{warning}");
    }
    let exposition = telemetry::metrics::install()?;
    let metrics = Metrics::new();
    metrics.announce_build();
    let (tracer, export) = traces::install("llm-d-epp", options.tracing)?;
    let (mut loader, config, text) = load_config(&options)?;

    let store = Arc::new(EndpointStore::default());
    let shutdown = CancellationToken::new();
    let tasks = TaskTracker::new();
    // Ends before anything else: another replica shall lead while this one serves what it has.
    let candidacy = shutdown.child_token();
    let mut control_plane = ControlPlane::connect(&options, &config, &candidacy).await?;
    let flags = LiveFlags {
        endpoints: options.endpoints.clone(),
        kubernetes: control_plane.as_ref().map(ControlPlane::discovery),
        scrape: options.scrape.clone(),
        refresh_metrics_interval: options.refresh_metrics_interval,
    };
    let mut live = Live::new(flags, Arc::clone(&store), tasks.clone(), shutdown.clone());
    live.apply(&config).await?;

    let rules = SharedRules::default();
    if let Some(path) = &options.rules_file {
        follow_rules(path, &rules, &tasks, &shutdown)?;
    } else if let Some(plane) = &control_plane {
        plane.follow_rules(&rules, &tasks, &shutdown);
    }
    let director = Director::new(
        Arc::clone(&store),
        config.activate(),
        DirectorOptions {
            ignore_subset: options.disable_endpoint_subset_filter,
            emit_scores: options.emit_endpoint_scores,
            strip_control_headers: options.strip_routing_headers,
            seed: options.seed,
        },
        metrics,
    );
    let director = Arc::new(director.with_rules(rules));
    let populate_standbys = config.populate_standbys;
    loader.adopt(config);
    let mut health = HealthState::new(Arc::clone(&store));
    if let Some(plane) = &mut control_plane {
        health = health
            .elected(plane.take_part_in_election(&tasks, &candidacy))
            .in_kubernetes(plane.protocol_check(&director), plane.contact());
    }
    let health = Arc::new(health);
    // A pipe is read once.
    let document = options.config_file.clone().filter(|path| path.is_file());
    if let Some((path, text)) = document.zip(text) {
        let reloader = Reloader {
            path,
            text,
            loader,
            live,
            director: Arc::clone(&director),
            metrics: ConfigReloads::new(),
            populate_standbys,
        };
        tasks.spawn(reloader.run(shutdown.clone()));
    }
    // Before anybody can send a request: from here on a signal drains.
    let mut signals = Signals::catch()?;
    let requests = (Arc::clone(&director), tracer);
    let servers = start_servers(&options, requests, &health, &tasks, &shutdown)?;
    let pages = Pages::new(
        exposition,
        plugin_state(Arc::clone(&store)),
        Arc::new(IndexPages(director)),
    );
    let gate = control_plane.as_ref().and_then(ControlPlane::metrics_gate);
    let pages = pages.behind(gate);
    start_metrics(&options, &store, pages, &tasks, &shutdown).await?;
    tracing::info!(extproc = %servers[0].address(), health = %servers[1].address(), "serving");

    signals.next().await;
    candidacy.cancel();
    drain(&options, &health, servers, &mut signals).await;
    shutdown.cancel();
    // The spans of the last requests ended with their streams.
    if let Some(export) = export {
        export.finish().await;
    }
    tasks.close();
    tasks.wait().await;
    Ok(())
}

/// The loader, what it loaded, and the text of it.
fn load_config(
    options: &ServeOptions,
) -> anyhow::Result<(ConfigLoader, ResolvedConfig, Option<String>)> {
    let text = match (&options.config_file, &options.config_text) {
        (Some(path), _) => {
            let text = config::read_file(path)
                .with_context(|| format!("--config-file {}", path.display()))?;
            Some(text)
        }
        (None, text) => text.clone(),
    };
    let load = LoadOptions {
        allow_experimental: options.allow_experimental_plugins,
    };
    let loader = ConfigLoader::new(load, config::builtin::registry());
    let config = loader.load(text.as_deref())?;
    for warning in &config.warnings {
        tracing::warn!("{warning}");
    }
    Ok((loader, config, text))
}

fn start_servers(
    options: &ServeOptions,
    (director, tracer): (Arc<Director>, Tracer),
    health: &Arc<HealthState>,
    tasks: &TaskTracker,
    shutdown: &CancellationToken,
) -> anyhow::Result<[Server; 2]> {
    let settings = StreamSettings {
        max_body_bytes: options.max_request_body_bytes,
        max_chunk_bytes: options.max_body_chunk_bytes,
        decision_timeout: options.decision_timeout,
        tracer,
    };
    let streams = options
        .enable_grpc_stream_metrics
        .then(|| Arc::new(ExtProcStreams::default()));
    // A body may arrive as one message when a buffering filter stands before us.
    let limits = MessageLimits {
        receive: options
            .grpc_max_recv_msg_size
            .unwrap_or(options.max_request_body_bytes + MESSAGE_OVERHEAD_BYTES),
        send: options.grpc_max_send_msg_size.unwrap_or(usize::MAX),
    };
    let processor = Processor::new(director, settings, limits, streams);
    let health_service = HealthServer::new(HealthService(Arc::clone(health)));
    let routes = Routes {
        processor,
        health: health_service.clone(),
    };
    let tls = if options.secure_serving {
        let shared = Arc::new(ArcSwap::from_pointee(tls::load(&options.tls)?));
        if options.tls.cert_path.is_some() {
            tasks.spawn(tls::watch(
                options.tls.clone(),
                Arc::clone(&shared),
                shutdown.clone(),
            ));
        }
        Some(shared)
    } else {
        None
    };
    let extproc = ServerConfigs {
        address: any(options.grpc_port),
        workers: options.workers,
        tls,
    };
    let health = ServerConfigs {
        address: any(options.grpc_health_port),
        workers: 1,
        tls: None,
    };
    Ok([
        Server::start(&extproc, &routes)
            .with_context(|| format!("--grpc-port {}", options.grpc_port))?,
        Server::start(&health, &health_service)
            .with_context(|| format!("--grpc-health-port {}", options.grpc_health_port))?,
    ])
}

async fn start_metrics(
    options: &ServeOptions,
    store: &Arc<EndpointStore>,
    pages: Pages,
    tasks: &TaskTracker,
    shutdown: &CancellationToken,
) -> anyhow::Result<()> {
    let listener = TcpListener::bind(any(options.metrics_port))
        .await
        .with_context(|| format!("--metrics-port {}", options.metrics_port))?;
    tracing::info!(metrics = %listener.local_addr()?, "serving metrics");
    let tls = match &options.metrics_tls {
        Some(tls_options) => {
            let loaded = tls::load(tls_options).context("--metrics-cert-dir")?;
            let shared = Arc::new(ArcSwap::from_pointee(loaded));
            let watch = tls::watch(tls_options.clone(), Arc::clone(&shared), shutdown.clone());
            tasks.spawn(watch);
            Some(shared)
        }
        None => None,
    };
    let serve = telemetry::server::serve(listener, tls, pages, shutdown.clone());
    tasks.spawn(serve);
    let gauges = PoolGauges::new(
        Arc::clone(store),
        &options.pool_name,
        options.metrics_staleness_threshold,
    );
    tasks.spawn(gauges.run(
        options.refresh_prometheus_metrics_interval,
        shutdown.clone(),
    ));
    Ok(())
}

/// The block index, as the producers of the configuration in use see it.
struct IndexPages(Arc<Director>);

impl IndexView for IndexPages {
    fn totals(&self) -> serde_json::Value {
        self.0.overview()
    }

    fn explain(&self, path: String, body: Bytes) -> Explained {
        let director = Arc::clone(&self.0);
        Box::pin(async move {
            let found = director.explain(&path, body).await;
            found.map_err(|error| Refusal {
                status: error.http_status(),
                text: error.to_string(),
            })
        })
    }
}

/// What plugins hold right now, for `/debug/plugins/state`: the load booked on each endpoint.
fn plugin_state(store: Arc<EndpointStore>) -> telemetry::server::PluginState {
    Arc::new(move || {
        let pool = store.snapshot();
        let endpoints: serde_json::Map<String, serde_json::Value> = pool
            .iter()
            .map(|endpoint| {
                let load = endpoint.in_flight(InFlightSlot::default());
                let state = json!({"requests": load.requests(), "tokens": load.tokens()});
                (endpoint.host_port_str().to_owned(), state)
            })
            .collect();
        let name = InFlightLoadProducer::TYPE;
        json!({
            "timestamp": Timestamp::now().to_string(),
            "plugins": {name: {"name": name, "type": name, "state": endpoints}},
        })
    })
}

/// All interfaces, as the reference listens: of IPv6 and IPv4 where the host has both.
pub(crate) fn any(port: u16) -> SocketAddr {
    if UdpSocket::bind((Ipv6Addr::UNSPECIFIED, 0)).is_ok() {
        (Ipv6Addr::UNSPECIFIED, port).into()
    } else {
        (Ipv4Addr::UNSPECIFIED, port).into()
    }
}

/// SIGTERM and SIGINT, which do not end the process by themselves once they are caught.
#[derive(Debug)]
pub(crate) struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    /// Catches both; one that comes before [`Self::next`] is not lost.
    pub(crate) fn catch() -> std::io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
        })
    }

    /// Returns at either.
    pub(crate) async fn next(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}

/// Returns at SIGTERM or SIGINT.
pub async fn wait_for_signal() -> anyhow::Result<()> {
    Signals::catch()?.next().await;
    Ok(())
}

/// Not ready at once, serving on while proxies notice, then only open streams, then nothing. A second
/// signal skips the waiting.
async fn drain(
    options: &ServeOptions,
    health: &HealthState,
    servers: [Server; 2],
    signals: &mut Signals,
) {
    health.drain();
    tracing::info!(
        drain_timeout = ?options.drain_timeout,
        "Shutdown signal received: draining (NotServing) while finishing in-flight requests"
    );
    let mut rest = options.drain_timeout;
    tokio::select! {
        () = tokio::time::sleep(options.drain_timeout) => {}
        () = signals.next() => rest = Duration::ZERO,
    }
    let cuts = servers.each_ref().map(Server::cut);
    let mut stop = tokio::task::spawn_blocking(move || {
        for server in servers {
            server.stop(rest);
        }
    });
    let stopped = tokio::select! {
        stopped = &mut stop => stopped,
        () = signals.next() => {
            cuts.iter().for_each(CancellationToken::cancel);
            stop.await
        }
    };
    if stopped.is_err() {
        tracing::error!("stopping the servers failed");
    }
}
