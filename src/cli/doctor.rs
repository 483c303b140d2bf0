//! `pinpod doctor`

use std::net::{SocketAddr, ToSocketAddrs};
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;

use crate::config::{LoadOptions, builtin, load, read_file};
use crate::datalayer::discovery::list;
use crate::doctor::kubernetes::{Installation, Target};
use crate::doctor::{self, Plan, Report, Severity, endpoints, events, picker};
use crate::kubernetes::{self, ClientOptions};
use crate::plugin::duration::GoDuration;

/// Flags of `doctor`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Looks only at what it is told about. Everything is read, nothing is changed.

  pinpod doctor --picker localhost:9002 --picker-metrics localhost:9090 \\
      --envoy-admin localhost:19000 --endpoints 10.0.0.1:8000,10.0.0.2:8000 --kv-events-port 5557

Exit status: 0 nothing is broken (there may be warnings), 1 something is, 2 bad usage.")]
#[expect(
    clippy::struct_excessive_bools,
    reason = "independent switches of a command line"
)]
pub(super) struct DoctorArgs {
    /// ext_proc port of a picker: host:port
    #[arg(long, value_name = "ADDRESS", value_parser = address, help_heading = "Picker")]
    picker: Option<SocketAddr>,
    /// Its gRPC health port
    #[arg(long, value_name = "ADDRESS", value_parser = address, help_heading = "Picker")]
    picker_health: Option<SocketAddr>,
    /// Its metrics port
    #[arg(long, value_name = "ADDRESS", value_parser = address, help_heading = "Picker")]
    picker_metrics: Option<SocketAddr>,
    /// Its EndpointPickerConfig
    #[arg(long, value_name = "FILE", help_heading = "Picker")]
    config_file: Option<PathBuf>,
    /// Accept plugins marked alpha in it
    #[arg(long, help_heading = "Picker")]
    allow_experimental_plugins: bool,
    /// Model servers: host:port,...
    #[arg(
        long,
        value_name = "LIST",
        default_value = "",
        hide_default_value = true,
        help_heading = "Model servers"
    )]
    endpoints: String,
    /// They speak https
    #[arg(long, help_heading = "Model servers")]
    endpoints_tls: bool,
    /// Path of their metrics
    #[arg(
        long,
        value_name = "PATH",
        default_value = "/metrics",
        help_heading = "Model servers"
    )]
    metrics_path: String,
    /// Port on which they publish KV events
    #[arg(long, value_name = "PORT", help_heading = "Model servers")]
    kv_events_port: Option<u16>,
    /// Port on which they replay them
    #[arg(
        long,
        value_name = "PORT",
        requires = "kv_events_port",
        default_value_t = 0,
        hide_default_value = true,
        help_heading = "Model servers"
    )]
    kv_replay_port: u16,
    /// Longest wait for a KV event
    #[arg(
        long,
        value_name = "DURATION",
        default_value = "5s",
        help_heading = "Model servers"
    )]
    wait: GoDuration,
    /// Admin interface of Envoy: host:port
    #[arg(long, value_name = "ADDRESS", value_parser = address, help_heading = "Proxy")]
    envoy_admin: Option<SocketAddr>,
    /// InferencePool to look at in the cluster
    #[arg(
        long,
        value_name = "NAME",
        conflicts_with = "endpoint_selector",
        help_heading = "Kubernetes"
    )]
    pool_name: Option<String>,
    /// Label selector of the model servers, where there is no pool
    #[arg(
        long,
        value_name = "SELECTOR",
        requires = "endpoint_target_ports",
        help_heading = "Kubernetes"
    )]
    endpoint_selector: Option<String>,
    /// Their ports, comma-separated
    #[arg(
        long,
        value_name = "PORTS",
        value_delimiter = ',',
        help_heading = "Kubernetes"
    )]
    endpoint_target_ports: Vec<u16>,
    /// Namespace of all of it
    #[arg(
        long,
        visible_alias = "pool-namespace",
        env = "NAMESPACE",
        default_value = "default",
        help_heading = "Kubernetes"
    )]
    namespace: String,
    /// Account of the picker, if no Service leads to it
    #[arg(long, value_name = "NAME", help_heading = "Kubernetes")]
    service_account: Option<String>,
    /// Ask the pods themselves too; they answer only inside the cluster's network
    #[arg(long, help_heading = "Kubernetes")]
    probe_pods: bool,
    /// Another kubeconfig than KUBECONFIG or ~/.kube/config
    #[arg(long, value_name = "FILE", help_heading = "Kubernetes")]
    kubeconfig: Option<PathBuf>,
    /// Another context of it than the current one
    #[arg(long, value_name = "NAME", help_heading = "Kubernetes")]
    context: Option<String>,
    /// Print the findings as JSON
    #[arg(long)]
    json: bool,
}

/// Looks, prints, and says by its exit code whether something is broken.
#[expect(clippy::print_stdout, reason = "the output that was asked for")]
pub(super) fn run(args: &DoctorArgs) -> anyhow::Result<ExitCode> {
    let mut plan = plan(args)?;
    let mut report = Report::default();
    if let Some(path) = &args.config_file {
        configuration(path, args.allow_experimental_plugins, &mut report);
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()?;
    report.append(runtime.block_on(async {
        plan.installation = installation(args).await?;
        anyhow::Ok(doctor::examine(&plan).await)
    })?);
    anyhow::ensure!(
        !report.findings.is_empty(),
        "nothing to look at: give --picker, --endpoints, --envoy-admin, --pool-name or --config-file"
    );
    let text = if args.json {
        let (errors, warnings) = (
            report.count(Severity::Error),
            report.count(Severity::Warning),
        );
        let findings = &report.findings;
        let document =
            serde_json::json!({"errors": errors, "warnings": warnings, "findings": findings});
        format!("{document:#}\n")
    } else {
        report.to_string()
    };
    print!("{text}");
    Ok(if report.count(Severity::Error) > 0 {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    })
}

fn plan(args: &DoctorArgs) -> anyhow::Result<Plan> {
    let endpoints = list::parse(&args.endpoints).map_err(anyhow::Error::msg)?;
    let events = args.kv_events_port.map(|port| events::Events {
        port,
        replay_port: args.kv_replay_port,
        wait: args.wait.0,
    });
    Ok(Plan {
        picker: picker::Ports {
            extproc: args.picker,
            health: args.picker_health,
            metrics: args.picker_metrics,
        },
        endpoints,
        scrape: endpoints::Scrape {
            tls: args.endpoints_tls,
            path: args.metrics_path.clone(),
        },
        events,
        envoy_admin: args.envoy_admin,
        installation: None,
        probe_pods: args.probe_pods,
    })
}

/// The cluster, when asked about a pool or a selector.
async fn installation(args: &DoctorArgs) -> anyhow::Result<Option<Installation>> {
    let target = match (&args.pool_name, &args.endpoint_selector) {
        (Some(name), _) => Target::Pool(name.clone()),
        (None, Some(selector)) => {
            Target::Selector(selector.clone(), args.endpoint_target_ports.clone())
        }
        (None, None) => return Ok(None),
    };
    let options = ClientOptions {
        kubeconfig: args.kubeconfig.clone(),
        context: args.context.clone(),
    };
    Ok(Some(Installation {
        client: kubernetes::client(&options).await?,
        namespace: args.namespace.clone(),
        target,
        service_account: args.service_account.clone(),
    }))
}

/// What `check-config` would say.
fn configuration(path: &std::path::Path, allow_experimental: bool, report: &mut Report) {
    let subject = path.display().to_string();
    let loaded = read_file(path)
        .map_err(|error| error.to_string())
        .and_then(|text| {
            let options = LoadOptions { allow_experimental };
            load(Some(&text), &options, &builtin::registry()).map_err(|e| e.to_string())
        });
    match loaded {
        Ok(config) if config.warnings.is_empty() => report.ok("configuration", subject, "loads"),
        Ok(config) => {
            for warning in &config.warnings {
                let fix = "pinpod check-config shows what the document resolves to";
                report.warning("configuration", &subject, warning.to_string(), fix);
            }
        }
        Err(error) => {
            let fix = "correct the line; pinpod plugins lists types and parameters";
            report.error("configuration", subject, error, fix);
        }
    }
}

/// `host:port`; a name is resolved once, its first address is used.
fn address(text: &str) -> Result<SocketAddr, String> {
    let resolved = text
        .to_socket_addrs()
        .with_context(|| format!("{text:?} is not host:port"))
        .map_err(|error| format!("{error:#}"))?
        .next();
    resolved.ok_or_else(|| format!("{text:?} has no address"))
}
