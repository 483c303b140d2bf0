//! Wiring of the process, and shutdown.

use std::sync::Arc;

use anyhow::{Context, bail};
use arc_swap::ArcSwap;
use tokio::net::TcpListener;
use tokio_rustls::rustls::ClientConfig;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::allow_list::{AllowList, Targets};
use super::engines::EngineSettings;
use super::metrics::SidecarMetrics;
use super::options::SidecarOptions;
use super::proxy::Sidecar;
use super::server::{ListenerTls, RankServer};
use super::settings::Settings;
use super::state;
use crate::datalayer::scrape::tls::client_config;
use crate::datalayer::sources::HttpSource;
use crate::epp::run::{Signals, any, wait_for_signal};
use crate::epp::{tls, tracing as traces};
use crate::kubernetes;
use crate::telemetry::server::{Explained, IndexView, Pages, Refusal};
use crate::telemetry::{self, log};

/// Runs the sidecar until SIGTERM or Ctrl-C.
pub fn run(options: SidecarOptions) -> anyhow::Result<()> {
    log::install(options.log_format, options.log_level);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(options.workers)
        .thread_name("sidecar")
        .enable_all()
        .build()
        .context("starting the runtime")?;
    runtime.block_on(serve(options))
}

async fn serve(options: SidecarOptions) -> anyhow::Result<()> {
    for warning in &options.warnings {
        tracing::warn!("{warning}");
    }
    let exposition = telemetry::metrics::install()?;
    let (tracer, export) = traces::install("llm-d-pd-proxy", options.settings.tracing)?;
    let tasks = TaskTracker::new();
    let connections = TaskTracker::new();
    let (stop, cancel) = (CancellationToken::new(), CancellationToken::new());

    let engines = EngineSettings {
        connect_timeout: options.connect_timeout,
        max_idle_per_host: options.max_idle_per_host,
        tls: engine_tls(&options)?,
    };
    let allowed = Arc::new(allow_list(&options, &tasks, &stop).await?);
    let settings = Settings {
        tracer,
        ..options.settings.clone()
    };
    let sidecar = Arc::new(Sidecar::new(
        settings,
        engines,
        allowed,
        SidecarMetrics::new(),
    ));
    let tls = listener_tls(&options, &tasks, &stop)?;
    if let Some(port) = options.metrics_port {
        let listener = TcpListener::bind(any(port))
            .await
            .with_context(|| format!("--metrics-port {port}"))?;
        let state = state::reader(Arc::clone(&sidecar), connections.clone());
        let pages = Pages::new(exposition, state, Arc::new(NoIndex));
        tasks.spawn(telemetry::server::serve(
            listener,
            None,
            pages,
            stop.clone(),
        ));
    }
    // Before anybody can send a request: from here on a signal drains.
    let mut signals = Signals::catch()?;
    for rank in 0..options.settings.data_parallel_size {
        let port = options
            .settings
            .port
            .checked_add(rank)
            .context("--port and --data-parallel-size run past 65535")?;
        let listener = TcpListener::bind(any(port))
            .await
            .with_context(|| format!("listening on port {port}"))?;
        let server = Arc::new(RankServer {
            rank,
            sidecar: Arc::clone(&sidecar),
            tls: tls.clone(),
            connections: connections.clone(),
        });
        tasks.spawn(server.serve(listener, stop.clone(), cancel.clone()));
        tracing::info!(port, rank, tls = tls.is_some(), "serving");
    }

    signals.next().await;
    tracing::info!(drain_timeout = ?options.drain_timeout, "draining");
    stop.cancel();
    connections.close();
    tokio::select! {
        () = connections.wait() => {}
        () = tokio::time::sleep(options.drain_timeout) => {}
        _ = wait_for_signal() => {}
    }
    cancel.cancel();
    connections.wait().await;
    if let Some(export) = export {
        export.finish().await;
    }
    tasks.close();
    tasks.wait().await;
    Ok(())
}

async fn allow_list(
    options: &SidecarOptions,
    tasks: &TaskTracker,
    stop: &CancellationToken,
) -> anyhow::Result<AllowList> {
    if !options.protect {
        tracing::warn!("SSRF protection is off: any host that a header names is called");
        return Ok(AllowList::new(Targets::anything()));
    }
    if options.allowed_targets.is_none() && options.inference_pool.is_none() {
        bail!(
            "nothing says which endpoints may be called: give --allowed-targets or \
             --inference-pool, or --enable-ssrf-protection=false to believe every header"
        );
    }
    let entries = options.allowed_targets.iter().flatten();
    let listed = Targets::listed(entries.map(String::as_str)).context("--allowed-targets")?;
    let list = AllowList::new(listed);
    let Some(pool) = &options.inference_pool else {
        return Ok(list);
    };
    let client = kubernetes::client(&kubernetes::ClientOptions::default())
        .await
        .context("--inference-pool needs Kubernetes")?;
    let members = kubernetes::AllowList::start(
        client,
        pool.namespace.clone(),
        (pool.name.clone(), pool.legacy),
        tasks,
        stop.clone(),
    );
    Ok(list.with_pool(Box::new(members)))
}

fn listener_tls(
    options: &SidecarOptions,
    tasks: &TaskTracker,
    stop: &CancellationToken,
) -> anyhow::Result<ListenerTls> {
    let Some(wanted) = &options.listener_tls else {
        return Ok(None);
    };
    let shared = Arc::new(ArcSwap::from_pointee(tls::load(wanted)?));
    if wanted.cert_path.is_some() {
        tasks.spawn(tls::watch(
            wanted.clone(),
            Arc::clone(&shared),
            stop.clone(),
        ));
    }
    Ok(Some(shared))
}

fn engine_tls(options: &SidecarOptions) -> anyhow::Result<[Option<Arc<ClientConfig>>; 3]> {
    let mut out = [None, None, None];
    let wanted = options.engine_tls.iter().zip(options.skip_verify);
    for (slot, (wanted, skip_verify)) in out.iter_mut().zip(wanted) {
        *slot = client_tls(*wanted, skip_verify)?;
    }
    Ok(out)
}

/// TLS towards engines of one stage, as towards their metrics.
pub(super) fn client_tls(
    wanted: bool,
    insecure_skip_verify: bool,
) -> anyhow::Result<Option<Arc<ClientConfig>>> {
    let source = HttpSource {
        tls: wanted,
        insecure_skip_verify,
        path: String::new(),
        port: None,
        use_node_address: false,
        ca_cert_path: None,
        client_pair: None,
        interval: None,
    };
    client_config(&source).context("TLS towards engines")
}

/// The metrics port has a page about the block index, which is the picker's.
struct NoIndex;

impl IndexView for NoIndex {
    fn totals(&self) -> serde_json::Value {
        serde_json::json!({})
    }

    fn explain(&self, _: String, _: bytes::Bytes) -> Explained {
        Box::pin(std::future::ready(Err(Refusal {
            status: 404,
            text: "a sidecar has no block index".to_owned(),
        })))
    }
}
