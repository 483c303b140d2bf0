//! The command line of `serve`: the reference's whole flag table, in all its spellings, and ours.
//!
//! Arguments are put into one form first (`normalise`): charts and operators pass single dashes,
//! camelCase names of early releases, empty strings, repeats, and flags that were removed.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, CommandFactory, FromArgMatches, Parser};

use super::tls::TlsOptions;
use crate::config::quantity::Quantity;
use crate::datalayer::selector::Selector;
use crate::kubernetes::client::{DEFAULT_NAMESPACE, is_object_name};
use crate::kubernetes::objects::{LEGACY_GROUP, POOL_GROUP};
use crate::kubernetes::pool::MAX_TARGET_PORTS;
use crate::kubernetes::{ClientOptions, PoolSource};
use crate::plugin::duration::GoDuration;
use crate::telemetry::log;

/// Flags that a later release of the reference removed: accepted, without effect.
const REMOVED: &[&str] = &[
    "grpc-enable-compression",
    "model-server-metrics-port",
    "destination-endpoint-hint-key",
    "destination-endpoint-hint-metadata-namespace",
    "target-endpoint-key",
    "zap-devel",
    "zap-stacktrace-level",
    "zap-time-encoding",
];
/// Removed flags without a value of their own.
const REMOVED_BOOLEAN: &[&str] = &["grpc-enable-compression", "zap-devel"];
/// Flags whose work moved into the configuration document; setting one is an error.
const MOVED: &[&str] = &[
    "total-queued-requests-metric",
    "total-running-requests-metric",
    "kv-cache-usage-percentage-metric",
    "lora-info-metric",
    "cache-info-metric",
];
/// Shortest `--refresh-metrics-interval`.
const MIN_REFRESH: Duration = Duration::from_millis(50);

/// What `serve` was asked to do; validated.
#[derive(Debug, Clone)]
#[expect(clippy::struct_excessive_bools, reason = "a flag table")]
pub struct ServeOptions {
    /// `--endpoints`.
    pub endpoints: Option<String>,
    /// Pool name for metrics.
    pub pool_name: String,
    /// The pool in Kubernetes; not used when endpoints come from elsewhere.
    pub kubernetes: Option<KubernetesOptions>,
    /// `--rules-file`.
    pub rules_file: Option<PathBuf>,
    /// `--config-file`.
    pub config_file: Option<PathBuf>,
    /// `--config-text`.
    pub config_text: Option<String>,
    /// `--allow-experimental-plugins`.
    pub allow_experimental_plugins: bool,
    /// `--grpc-port`.
    pub grpc_port: u16,
    /// `--grpc-health-port`.
    pub grpc_health_port: u16,
    /// `--metrics-port`.
    pub metrics_port: u16,
    /// `--secure-serving`.
    pub secure_serving: bool,
    /// Certificate, versions, suites.
    pub tls: TlsOptions,
    /// `--workers`.
    pub workers: usize,
    /// `--max-request-body-bytes`.
    pub max_request_body_bytes: usize,
    /// `--max-body-chunk-bytes`.
    pub max_body_chunk_bytes: usize,
    /// `--grpc-max-recv-msg-size`.
    pub grpc_max_recv_msg_size: Option<usize>,
    /// `--grpc-max-send-msg-size`.
    pub grpc_max_send_msg_size: Option<usize>,
    /// `--decision-timeout`.
    pub decision_timeout: Duration,
    /// `--drain-timeout`.
    pub drain_timeout: Duration,
    /// `--refresh-metrics-interval`, at least 50 ms.
    pub refresh_metrics_interval: Duration,
    /// `--refresh-prometheus-metrics-interval`.
    pub refresh_prometheus_metrics_interval: Duration,
    /// `--metrics-staleness-threshold`.
    pub metrics_staleness_threshold: Duration,
    /// `--disable-endpoint-subset-filter`.
    pub disable_endpoint_subset_filter: bool,
    /// `--emit-endpoint-scores`.
    pub emit_endpoint_scores: bool,
    /// `--strip-routing-headers`.
    pub strip_routing_headers: bool,
    /// `--metrics-endpoint-auth`.
    pub metrics_endpoint_auth: bool,
    /// `--metrics-cert-dir` and `--metrics-client-ca-file`; without the first the port is plain.
    pub metrics_tls: Option<TlsOptions>,
    /// `--enable-grpc-stream-metrics`.
    pub enable_grpc_stream_metrics: bool,
    /// `--tracing`.
    pub tracing: bool,
    /// The scrape flags of releases before 0.10.
    pub scrape: ScrapeFlags,
    /// `--seed`.
    pub seed: Option<u64>,
    /// `--zap-encoder`.
    pub log_format: log::Format,
    /// `-v` or `--zap-log-level`.
    pub log_level: tracing::Level,
    /// What was accepted without effect; logged at start.
    pub warnings: Vec<String>,
}

/// Where the pool is in Kubernetes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KubernetesOptions {
    /// `--kubeconfig`.
    pub client: ClientOptions,
    /// `--pool-namespace`, or `NAMESPACE`, or `default`.
    pub namespace: String,
    /// `--pool-group`, which references to the pool must name.
    pub pool_group: String,
    /// `--pool-name`, or `--endpoint-selector` and `--endpoint-target-ports`.
    pub source: PoolSource,
    /// `--ha-enable-leader-election`.
    pub leader_election: bool,
    /// Name of our own pod; empty outside of one.
    pub pod_name: String,
}

/// `--model-server-metrics-*`: what they say overrides every metrics source of the document.
#[derive(Debug, Clone, Default, Args)]
pub struct ScrapeFlags {
    /// Scheme of the engines' metrics, http or https (a parameter of metrics-data-source)
    #[arg(long = "model-server-metrics-scheme", hide = true)]
    pub scheme: Option<String>,
    /// Path of the engines' metrics
    #[arg(long = "model-server-metrics-path", hide = true)]
    pub path: Option<String>,
    /// Accept any certificate of the engines
    #[arg(long = "model-server-metrics-https-insecure-skip-verify", hide = true, action = clap::ArgAction::Set, num_args = 0..=1, default_missing_value = "true")]
    pub insecure_skip_verify: Option<bool>,
}

/// The endpoint picker: answers Envoy's ext_proc calls with the endpoint each request should go to.
#[derive(Debug, Clone, Parser)]
#[command(
    name = "pinpod serve",
    args_override_self = true,
    disable_version_flag = true
)]
struct Flags {
    #[command(flatten, next_help_heading = "Endpoints and configuration")]
    pool: PoolFlags,
    #[command(flatten, next_help_heading = "Ports and TLS")]
    ports: PortFlags,
    #[command(flatten, next_help_heading = "Requests")]
    requests: RequestFlags,
    #[command(flatten, next_help_heading = "Metrics and logs")]
    telemetry: TelemetryFlags,
    #[command(flatten)]
    scrape: ScrapeFlags,
}

#[derive(Debug, Clone, Args)]
struct PoolFlags {
    /// Endpoints as host:port[;label=value...],... instead of any discovery
    #[arg(long, value_name = "LIST")]
    endpoints: Option<String>,
    /// Name of the InferencePool
    #[arg(long, default_value = "", hide_default_value = true)]
    pool_name: String,
    /// Namespace of the pool
    #[arg(long, env = "NAMESPACE", default_value = DEFAULT_NAMESPACE)]
    pool_namespace: String,
    /// API group of the pool; inference.networking.x-k8s.io for v1alpha2 only
    #[arg(long, default_value = POOL_GROUP)]
    pool_group: String,
    /// Kubeconfig file [default: KUBECONFIG, the pod's service account, ~/.kube/config]
    #[arg(
        long,
        value_name = "PATH",
        default_value = "",
        hide_default_value = true
    )]
    kubeconfig: String,
    /// Name of this pod, from which that of its Deployment is cut with --endpoint-selector
    #[arg(long, env = "POD_NAME", default_value = "", hide = true)]
    pod_name: String,
    /// Pods by label selector instead of a pool; needs no custom resource
    #[arg(long, default_value = "", hide_default_value = true)]
    endpoint_selector: String,
    /// Ports of the pods selected, 1 to 8 of them, comma-separated
    #[arg(long, default_value = "", hide_default_value = true)]
    endpoint_target_ports: String,
    /// EndpointPickerConfig document, YAML or JSON
    #[arg(
        long,
        value_name = "PATH",
        default_value = "",
        hide_default_value = true
    )]
    config_file: String,
    /// The document itself
    #[arg(
        long,
        value_name = "TEXT",
        default_value = "",
        hide_default_value = true
    )]
    config_text: String,
    /// Permit plugins marked alpha
    #[arg(long, action = clap::ArgAction::Set, num_args = 0..=1, default_missing_value = "true", default_value_t = false)]
    allow_experimental_plugins: bool,
    /// Objectives and model rewrites as YAML documents, instead of those in Kubernetes
    #[arg(
        long,
        value_name = "PATH",
        default_value = "",
        hide_default_value = true
    )]
    rules_file: String,
    /// Be ready only as the elected leader
    #[arg(long, action = clap::ArgAction::Set, num_args = 0..=1, default_missing_value = "true", default_value_t = false)]
    ha_enable_leader_election: bool,
}

#[derive(Debug, Clone, Args)]
struct PortFlags {
    /// ext_proc (gRPC)
    #[arg(long, default_value_t = 9002)]
    grpc_port: u16,
    /// gRPC health, plaintext
    #[arg(long, default_value_t = 9003)]
    grpc_health_port: u16,
    /// Prometheus metrics (HTTP)
    #[arg(long, default_value_t = 9090)]
    metrics_port: u16,
    /// TLS on the ext_proc port
    #[arg(long, action = clap::ArgAction::Set, num_args = 0..=1, default_missing_value = "true", default_value_t = true)]
    secure_serving: bool,
    /// Directory with tls.crt and tls.key, followed as they change; without it a certificate is made
    #[arg(
        long,
        value_name = "DIR",
        default_value = "",
        hide_default_value = true
    )]
    cert_path: String,
    /// Accepted: a given certificate is always followed
    #[arg(long, action = clap::ArgAction::Set, num_args = 0..=1, default_missing_value = "true", default_value_t = false)]
    enable_cert_reload: bool,
    /// Lowest TLS version, VersionTLS12 or VersionTLS13 (lower ones mean 1.2)
    #[arg(long, default_value = "", hide_default_value = true)]
    tls_min_version: String,
    /// TLS 1.2 cipher suites by their Go names, comma-separated
    #[arg(long, default_value = "", hide_default_value = true)]
    tls_cipher_suites: String,
    /// Accepted: health is always served on the ext_proc port too
    #[arg(long, action = clap::ArgAction::Set, num_args = 0..=1, default_missing_value = "true", default_value_t = false)]
    health_checking: bool,
    /// Threads that serve ext_proc [default: one per core]
    #[arg(long, default_value_t = 0, hide_default_value = true)]
    workers: usize,
}

#[derive(Debug, Clone, Args)]
struct RequestFlags {
    /// Longest request body; longer ones are refused with 413
    #[arg(long, value_name = "SIZE", default_value = "64Mi")]
    max_request_body_bytes: String,
    /// Longest body piece sent back to the proxy, in bytes
    #[arg(long, default_value_t = 62_000)]
    max_body_chunk_bytes: usize,
    /// Longest gRPC message received [default: the longest body and 1 MiB]
    #[arg(
        long,
        value_name = "SIZE",
        default_value = "",
        hide_default_value = true
    )]
    grpc_max_recv_msg_size: String,
    /// Longest gRPC message sent [default: no limit]
    #[arg(
        long,
        value_name = "SIZE",
        default_value = "",
        hide_default_value = true
    )]
    grpc_max_send_msg_size: String,
    /// Longest time from a request's first message to its decision, upload included; 503 past it
    #[arg(long, value_name = "DURATION", default_value = "120s")]
    decision_timeout: GoDuration,
    /// After SIGTERM: how long to serve on while not ready
    #[arg(long, value_name = "DURATION", default_value = "30s")]
    drain_timeout: GoDuration,
    /// Ignore the proxy's subset hint
    #[arg(long, action = clap::ArgAction::Set, num_args = 0..=1, default_missing_value = "true", default_value_t = false)]
    disable_endpoint_subset_filter: bool,
    /// Report every endpoint's score in dynamic metadata
    #[arg(long, action = clap::ArgAction::Set, num_args = 0..=1, default_missing_value = "true", default_value_t = false)]
    emit_endpoint_scores: bool,
    /// Remove headers that speak to the picker before the request reaches an engine
    #[arg(long, action = clap::ArgAction::Set, num_args = 0..=1, default_missing_value = "true", default_value_t = true)]
    strip_routing_headers: bool,
    /// Make random choices reproducible for equal request ids
    #[arg(long, hide = true)]
    seed: Option<u64>,
}

#[derive(Debug, Clone, Args)]
#[expect(clippy::struct_excessive_bools, reason = "a flag table")]
struct TelemetryFlags {
    /// Time between scrapes of one endpoint, at least 50ms
    #[arg(long, value_name = "DURATION", default_value = "50ms")]
    refresh_metrics_interval: GoDuration,
    /// Time between refreshes of the pool gauges
    #[arg(long, value_name = "DURATION", default_value = "5s")]
    refresh_prometheus_metrics_interval: GoDuration,
    /// Age from which an endpoint's metrics are left out of the pool gauges
    #[arg(long, value_name = "DURATION", default_value = "2s")]
    metrics_staleness_threshold: GoDuration,
    /// Count ext_proc streams
    #[arg(long, action = clap::ArgAction::Set, num_args = 0..=1, default_missing_value = "true", default_value_t = false)]
    enable_grpc_stream_metrics: bool,
    /// Ask Kubernetes about bearer tokens on the metrics port (without Kubernetes: no effect)
    #[arg(long, action = clap::ArgAction::Set, num_args = 0..=1, default_missing_value = "true", default_value_t = true)]
    metrics_endpoint_auth: bool,
    /// Directory with tls.crt and tls.key: TLS on the metrics port
    #[arg(long, default_value = "", hide_default_value = true)]
    metrics_cert_dir: String,
    /// CA of the certificates that clients of the metrics port must show
    #[arg(long, default_value = "", hide_default_value = true)]
    metrics_client_ca_file: String,
    /// Accepted: there is no pprof here
    #[arg(long, action = clap::ArgAction::Set, num_args = 0..=1, default_missing_value = "true", default_value_t = true)]
    enable_pprof: bool,
    /// Record traces, if OTEL_TRACES_EXPORTER or OTEL_EXPORTER_OTLP_ENDPOINT says where to
    #[arg(long, action = clap::ArgAction::Set, num_args = 0..=1, default_missing_value = "true", default_value_t = true)]
    tracing: bool,
    /// Verbosity: up to 3 info, 4 debug, 5 trace
    #[arg(
        short = 'v',
        long = "v",
        default_value_t = 2,
        allow_negative_numbers = true
    )]
    verbosity: i32,
    /// Level by name or number instead of -v: debug, info, error, or a number
    #[arg(long, default_value = "", hide_default_value = true)]
    zap_log_level: String,
    /// Log lines as json or console (text)
    #[arg(long, default_value = "json")]
    zap_encoder: String,
}

/// Why the command line cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum OptionsError {
    /// clap's own message, help included; it knows its exit code.
    #[error(transparent)]
    Clap(#[from] clap::Error),
    /// A rule of the flag table is broken.
    #[error("{0}")]
    Invalid(String),
}

/// Reads the arguments behind the program (and subcommand) name.
pub fn parse(arguments: impl IntoIterator<Item = String>) -> Result<ServeOptions, OptionsError> {
    let (arguments, mut warnings) = normalise(arguments.into_iter().collect())?;
    let command = Flags::command();
    let matches = command
        .try_get_matches_from(std::iter::once("pinpod serve".to_owned()).chain(arguments))?;
    let flags = Flags::from_arg_matches(&matches)?;
    flags.validate(&mut warnings)
}

fn invalid<T>(text: impl Into<String>) -> Result<T, OptionsError> {
    Err(OptionsError::Invalid(text.into()))
}

/// Puts arguments into the form `--name=value`, dropping what has no effect, with warnings.
fn normalise(arguments: Vec<String>) -> Result<(Vec<String>, Vec<String>), OptionsError> {
    let command = Flags::command();
    let is_boolean = |name: &str| {
        command
            .get_arguments()
            .find(|a| a.get_long() == Some(name))
            .map(|a| {
                a.get_num_args()
                    .is_some_and(|range| range.min_values() == 0)
            })
    };
    let is_flag = |argument: &String| {
        let name = argument
            .strip_prefix('-')
            .map(|a| a.trim_start_matches('-'));
        let name = name.map(|name| kebab(name.split('=').next().unwrap_or_default()));
        name.is_some_and(|name| {
            is_boolean(&name).is_some()
                || REMOVED.contains(&name.as_str())
                || MOVED.contains(&name.as_str())
        })
    };
    let mut out = Vec::new();
    let mut warnings = Vec::new();
    let mut rest = arguments.into_iter().peekable();
    while let Some(argument) = rest.next() {
        if argument == "-h" || argument == "--help" {
            out.push("--help".to_owned());
            continue;
        }
        let body = argument
            .strip_prefix("--")
            .or_else(|| argument.strip_prefix('-'));
        let Some(body) = body.filter(|b| !b.is_empty()) else {
            if !argument.is_empty() {
                warnings.push(format!("argument {argument:?} is ignored"));
            }
            continue;
        };
        let (name, value) = match body.split_once('=') {
            Some((name, value)) => (kebab(name), Some(value.to_owned())),
            None => match body.strip_prefix('v') {
                Some(number) if number.parse::<u32>().is_ok() => {
                    ("v".to_owned(), Some(number.to_owned()))
                }
                _ => (kebab(body), None),
            },
        };
        let has_value = value.is_some();
        // Of a flag nobody knows it cannot be said whether it takes a value.
        let mut likely_value =
            || rest.next_if(|next| !next.starts_with('-') || next.parse::<f64>().is_ok());
        if MOVED.contains(&name.as_str()) {
            return invalid(format!(
                "flag {name:?} is deprecated and cannot be used; configure metrics via engineConfigs in EndpointPickerConfig instead"
            ));
        }
        if REMOVED.contains(&name.as_str()) {
            if !has_value && !REMOVED_BOOLEAN.contains(&name.as_str()) {
                likely_value();
            }
            warnings.push(format!("flag --{name} has no effect"));
            continue;
        }
        match is_boolean(&name) {
            None => {
                warnings.push(format!("flag --{name} is unknown and ignored"));
                if !has_value {
                    likely_value();
                }
            }
            Some(true) => out.push(format!(
                "--{name}={}",
                go_bool(&name, value.as_deref().unwrap_or("true"))?
            )),
            // A value may begin with a dash, as a YAML document does, but it is no flag of ours.
            Some(false) => match value.or_else(|| rest.next_if(|next| !is_flag(next))) {
                Some(value) => out.push(format!("--{name}={value}")),
                None => return invalid(format!("flag --{name} needs a value")),
            },
        }
    }
    Ok((out, warnings))
}

/// `poolName` and `pool-name` alike.
pub(crate) fn kebab(name: &str) -> String {
    let mut out = String::with_capacity(name.len() + 4);
    for c in name.chars() {
        if c.is_ascii_uppercase() {
            out.push('-');
        }
        out.push(c.to_ascii_lowercase());
    }
    out
}

pub(crate) fn go_bool(name: &str, text: &str) -> Result<bool, OptionsError> {
    match text {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Ok(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Ok(false),
        other => invalid(format!("flag --{name}: {other:?} is not true or false")),
    }
}

/// A Kubernetes quantity in bytes; a trailing `B` is dropped, so that `10MiB` works, and `K` is read as
/// `k`.
pub(crate) fn quantity(name: &str, text: &str) -> Result<usize, OptionsError> {
    let body = text.trim().trim_end_matches(['B', 'b']);
    let body = match body.strip_suffix('K') {
        Some(number) => format!("{number}k"),
        None => body.to_owned(),
    };
    let amount = body.parse::<Quantity>().ok();
    match amount.and_then(|amount| usize::try_from(amount.0).ok()) {
        Some(bytes) => Ok(bytes),
        None => invalid(format!(
            "flag --{name}: {text:?} is not a size such as 64Mi or 10MB"
        )),
    }
}

pub(crate) fn list(text: &str) -> Vec<String> {
    text.split(',')
        .map(str::trim)
        .filter(|s| !s.is_empty())
        .map(str::to_owned)
        .collect()
}

impl PoolFlags {
    /// The pool in Kubernetes, if the flags name one.
    fn kubernetes(
        &self,
        warnings: &mut Vec<String>,
    ) -> Result<Option<KubernetesOptions>, OptionsError> {
        let namespace = match self.pool_namespace.as_str() {
            "" => DEFAULT_NAMESPACE,
            other => other,
        };
        if !is_object_name(namespace, false) {
            return invalid(format!(
                "flag --pool-namespace: {namespace:?} is no namespace"
            ));
        }
        let source = if !self.pool_name.is_empty() {
            if !is_object_name(&self.pool_name, true) {
                let name = &self.pool_name;
                return invalid(format!("flag --pool-name: {name:?} is no object name"));
            }
            let legacy = self.pool_group == LEGACY_GROUP;
            if !legacy && self.pool_group != POOL_GROUP {
                let group = &self.pool_group;
                warnings.push(format!(
                    "--pool-group {group:?} is not known, the pool is looked for in {POOL_GROUP}"
                ));
            }
            PoolSource::Pool {
                name: self.pool_name.clone(),
                legacy,
            }
        } else if !self.endpoint_selector.is_empty() {
            PoolSource::Selector {
                selector: self.endpoint_selector.clone(),
                ports: self.selected()?,
            }
        } else {
            return Ok(None);
        };
        let kubeconfig = Some(&self.kubeconfig).filter(|path| !path.is_empty());
        Ok(Some(KubernetesOptions {
            client: ClientOptions {
                kubeconfig: kubeconfig.map(Into::into),
                context: None,
            },
            namespace: namespace.to_owned(),
            pool_group: self.pool_group.clone(),
            source,
            leader_election: self.ha_enable_leader_election,
            pod_name: self.pod_name.clone(),
        }))
    }

    /// Checks the selector; the ports that go with it, each once.
    fn selected(&self) -> Result<Vec<u16>, OptionsError> {
        if let Err(problem) = Selector::parse(&self.endpoint_selector) {
            return invalid(format!("flag --endpoint-selector: {problem}"));
        }
        let mut ports = Vec::new();
        for text in list(&self.endpoint_target_ports) {
            match text.parse::<u16>() {
                Ok(port) if port > 0 && ports.contains(&port) => {}
                Ok(port) if port > 0 => ports.push(port),
                _ => {
                    return invalid(format!(
                        "flag --endpoint-target-ports: {text:?} is not within 1 and 65535"
                    ));
                }
            }
        }
        if ports.is_empty() || ports.len() > MAX_TARGET_PORTS {
            return invalid(format!(
                "flag --endpoint-target-ports: 1 to {MAX_TARGET_PORTS} ports are needed with --endpoint-selector"
            ));
        }
        Ok(ports)
    }

    /// What the pool is called in metrics and leases.
    fn identity(&self, warnings: &mut Vec<String>) -> String {
        if !self.pool_name.is_empty() {
            return self.pool_name.clone();
        }
        if self.endpoint_selector.is_empty() {
            return "epp".to_owned();
        }
        workload(&self.pod_name).map_or_else(
            || {
                warnings.push(format!(
                    "POD_NAME {:?} names no pod of a Deployment or StatefulSet: the pool is called epp",
                    self.pod_name
                ));
                "epp".to_owned()
            },
            str::to_owned,
        )
    }
}

/// The Deployment (`<name>-<hash>-<suffix>`) or StatefulSet (`<name>-<ordinal>`) that a pod is of.
fn workload(pod: &str) -> Option<&str> {
    let is_word = |text: &str| {
        let word = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
        !text.is_empty() && text.bytes().all(word)
    };
    let (rest, last) = pod.rsplit_once('-')?;
    if last.bytes().all(|b| b.is_ascii_digit()) && !last.is_empty() && last.len() < 4 {
        return Some(rest).filter(|name| !name.is_empty());
    }
    let (name, hash) = rest.rsplit_once('-')?;
    (is_word(last) && is_word(hash) && !name.is_empty()).then_some(name)
}

impl TelemetryFlags {
    /// TLS of the metrics port.
    fn tls(&self) -> Result<Option<TlsOptions>, OptionsError> {
        let ca = Some(&self.metrics_client_ca_file).filter(|path| !path.is_empty());
        if self.metrics_cert_dir.is_empty() {
            return match ca {
                Some(_) => invalid("flag --metrics-client-ca-file needs --metrics-cert-dir"),
                None => Ok(None),
            };
        }
        if ca.is_none() && !self.metrics_endpoint_auth {
            return invalid(
                "flag --metrics-cert-dir needs --metrics-client-ca-file or --metrics-endpoint-auth",
            );
        }
        Ok(Some(TlsOptions {
            cert_path: Some((&self.metrics_cert_dir).into()),
            client_ca: ca.map(Into::into),
            alpn: &[b"http/1.1"],
            ..TlsOptions::default()
        }))
    }
}

impl Flags {
    fn validate(self, warnings: &mut Vec<String>) -> Result<ServeOptions, OptionsError> {
        let Self {
            pool,
            ports,
            requests,
            telemetry,
            scrape,
        } = self;
        if !pool.config_file.is_empty() && !pool.config_text.is_empty() {
            return invalid(
                r#"both the "config-file" and "config-text" flags cannot be set at the same time"#,
            );
        }
        let (named, selected) = (
            !pool.pool_name.is_empty(),
            !pool.endpoint_selector.is_empty(),
        );
        // A static list needs no pool; everything else is held to the reference's rule.
        if named && selected || !named && !selected && pool.endpoints.is_none() {
            return invalid(
                "exactly one of --pool-name and --endpoint-selector must be set (or --endpoints given)",
            );
        }
        let kubernetes = pool.kubernetes(warnings)?;
        if scrape
            .scheme
            .as_deref()
            .is_some_and(|s| s != "http" && s != "https")
        {
            return invalid("flag --model-server-metrics-scheme: expected http or https");
        }
        let metrics_tls = telemetry.tls()?;
        let mut refresh = telemetry.refresh_metrics_interval.0;
        if refresh < MIN_REFRESH {
            warnings.push(format!(
                "--refresh-metrics-interval {refresh:?} is raised to {MIN_REFRESH:?}"
            ));
            refresh = MIN_REFRESH;
        }
        if requests.max_body_chunk_bytes == 0 {
            return invalid("flag --max-body-chunk-bytes must be above 0");
        }
        let optional = |text: &str| Some(text.to_owned()).filter(|t| !t.is_empty());
        let size = |name, text: &str| optional(text).map(|t| quantity(name, &t)).transpose();
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        Ok(ServeOptions {
            pool_name: pool.identity(warnings),
            endpoints: pool.endpoints.filter(|e| !e.is_empty()),
            kubernetes,
            rules_file: optional(&pool.rules_file).map(Into::into),
            config_file: optional(&pool.config_file).map(Into::into),
            config_text: optional(&pool.config_text),
            allow_experimental_plugins: pool.allow_experimental_plugins,
            grpc_port: ports.grpc_port,
            grpc_health_port: ports.grpc_health_port,
            metrics_port: ports.metrics_port,
            secure_serving: ports.secure_serving,
            tls: TlsOptions {
                cert_path: optional(&ports.cert_path).map(Into::into),
                min_version: ports.tls_min_version,
                cipher_suites: list(&ports.tls_cipher_suites),
                ..TlsOptions::default()
            },
            workers: if ports.workers == 0 {
                cores
            } else {
                ports.workers
            },
            max_request_body_bytes: quantity(
                "max-request-body-bytes",
                &requests.max_request_body_bytes,
            )?,
            max_body_chunk_bytes: requests.max_body_chunk_bytes,
            grpc_max_recv_msg_size: size(
                "grpc-max-recv-msg-size",
                &requests.grpc_max_recv_msg_size,
            )?,
            grpc_max_send_msg_size: size(
                "grpc-max-send-msg-size",
                &requests.grpc_max_send_msg_size,
            )?,
            decision_timeout: requests.decision_timeout.0,
            drain_timeout: requests.drain_timeout.0,
            refresh_metrics_interval: refresh,
            refresh_prometheus_metrics_interval: telemetry.refresh_prometheus_metrics_interval.0,
            metrics_staleness_threshold: telemetry.metrics_staleness_threshold.0,
            disable_endpoint_subset_filter: requests.disable_endpoint_subset_filter,
            emit_endpoint_scores: requests.emit_endpoint_scores,
            strip_routing_headers: requests.strip_routing_headers,
            metrics_endpoint_auth: telemetry.metrics_endpoint_auth,
            metrics_tls,
            enable_grpc_stream_metrics: telemetry.enable_grpc_stream_metrics,
            tracing: telemetry.tracing,
            scrape,
            seed: requests.seed,
            log_format: log_format(&telemetry.zap_encoder)?,
            log_level: log_level(telemetry.verbosity, &telemetry.zap_log_level)?,
            warnings: std::mem::take(warnings),
        })
    }
}

pub(crate) fn log_format(encoder: &str) -> Result<log::Format, OptionsError> {
    match encoder {
        "json" => Ok(log::Format::Json),
        "console" => Ok(log::Format::Text),
        other => invalid(format!(
            "flag --zap-encoder: {other:?} is not json or console"
        )),
    }
}

pub(crate) fn log_level(verbosity: i32, named: &str) -> Result<tracing::Level, OptionsError> {
    match named {
        "" => Ok(log::level(verbosity)),
        "debug" => Ok(tracing::Level::DEBUG),
        "info" => Ok(tracing::Level::INFO),
        "error" | "panic" => Ok(tracing::Level::ERROR),
        number => match number.parse() {
            Ok(number) => Ok(log::level(number)),
            Err(_) => invalid(format!(
                "flag --zap-log-level: {number:?} is not debug, info, error or a number"
            )),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(line: &[&str]) -> Result<ServeOptions, String> {
        parse(line.iter().map(|a| (*a).to_owned())).map_err(|e| e.to_string())
    }

    #[test]
    fn defaults_are_the_references() {
        let options = options(&["--pool-name", "p"]).unwrap();
        assert_eq!(
            (
                options.grpc_port,
                options.grpc_health_port,
                options.metrics_port
            ),
            (9002, 9003, 9090)
        );
        assert!(options.secure_serving && options.strip_routing_headers);
        assert_eq!(options.drain_timeout, Duration::from_secs(30));
        assert_eq!(options.refresh_metrics_interval, Duration::from_millis(50));
        assert_eq!(options.max_request_body_bytes, 64 << 20);
        assert_eq!(options.log_level, tracing::Level::INFO);
        assert!(options.warnings.is_empty(), "{:?}", options.warnings);
    }

    #[test]
    fn every_published_command_line_is_understood() {
        // Chart, operator (with its empty strings) and early releases.
        for line in [
            &[
                "--pool-name",
                "p",
                "--pool-namespace",
                "n",
                "--pool-group",
                "g",
                "--zap-encoder",
                "json",
                "--config-text={}x",
                "--grpc-health-port",
                "9003",
                "--tracing=true",
            ][..],
            &[
                "--pool-name=p",
                "",
                "",
                "--grpc-port",
                "9002",
                "",
                "--enable-cert-reload=true",
                "--model-server-metrics-scheme=https",
                "--secure-serving=false",
            ],
            &[
                "-poolName",
                "p",
                "-poolNamespace",
                "n",
                "-grpcPort",
                "9002",
                "-v",
                "4",
                "-configText",
                "x",
            ],
            &[
                "--poolName=p",
                "--refreshMetricsInterval=100ms",
                "--destinationEndpointHintKey",
                "k",
                "-v=5",
            ],
            &[
                "--pool-name",
                "p",
                "--health-checking",
                "--metrics-endpoint-auth=false",
                "--v=3",
                "stray",
                "--pool-name",
                "q",
            ],
            &["--pool-name", "p", "--config-text", "---\nkind: x\n", "-v4"],
            &[
                "--endpoint-selector",
                "app=x,tier in (a,b)",
                "--endpoint-target-ports",
                "8000,8001",
            ],
        ] {
            assert!(options(line).is_ok(), "{line:?}: {:?}", options(line));
        }
        let last = options(&["--pool-name", "p", "--pool-name", "q"]).unwrap();
        assert_eq!(last.pool_name, "q", "the last of repeated flags counts");
        let dashes = options(&["--pool-name=p", "-v4", "--config-text", "---\na: b"]).unwrap();
        assert_eq!(dashes.log_level, tracing::Level::DEBUG);
        assert_eq!(dashes.config_text.as_deref(), Some("---\na: b"));
    }

    #[test]
    fn what_has_no_effect_is_named() {
        let options = options(&[
            "--pool-name=p",
            "--grpc-enable-compression",
            "--model-server-metrics-port",
            "8000",
            "--new-flag",
            "x",
            "stray",
            "--refresh-metrics-interval=1ms",
        ])
        .unwrap();
        assert_eq!(
            options.warnings,
            [
                "flag --grpc-enable-compression has no effect",
                "flag --model-server-metrics-port has no effect",
                "flag --new-flag is unknown and ignored",
                "argument \"stray\" is ignored",
                "--refresh-metrics-interval 1ms is raised to 50ms",
            ]
        );
    }

    #[test]
    fn broken_rules_are_refused() {
        for (line, text) in [
            (&[][..], "exactly one of --pool-name"),
            (
                &["--pool-name=p", "--endpoint-selector=a=b"],
                "exactly one of --pool-name",
            ),
            (
                &["--pool-name=p", "--config-file=a", "--config-text=b"],
                "cannot be set at the same time",
            ),
            (
                &["--pool-name=p", "--lora-info-metric=x"],
                "configure metrics via engineConfigs",
            ),
            (&["--pool-name=p", "--grpc-port=x"], "invalid value"),
            (
                &["--pool-name=p", "--secure-serving=maybe"],
                "not true or false",
            ),
            (&["--pool-name=p", "--drain-timeout=5"], "not a duration"),
            (
                &["--pool-name=p", "--max-request-body-bytes=5x"],
                "not a size",
            ),
            (
                &["--pool-name=p", "--max-request-body-bytes=-5"],
                "not a size",
            ),
            (
                &["--pool-name=p", "--zap-encoder=xml"],
                "not json or console",
            ),
            (&["--pool-name"], "needs a value"),
            (&["--pool-name", "--secureServing=false"], "needs a value"),
            (&["--pool-name", "--lora-info-metric=x"], "needs a value"),
            (
                &["--pool-name=p", "--metrics-client-ca-file=ca"],
                "needs --metrics-cert-dir",
            ),
            (
                &[
                    "--pool-name=p",
                    "--metrics-cert-dir=d",
                    "--metrics-endpoint-auth=false",
                ],
                "needs --metrics-client-ca-file",
            ),
        ] {
            let error = options(line).unwrap_err();
            assert!(error.contains(text), "{line:?}: {error}");
        }
    }

    #[test]
    fn a_pool_is_named_or_selected() {
        let kubernetes = |line: &[&str]| options(line).unwrap().kubernetes.unwrap();
        let named = kubernetes(&["--pool-name=p", "--pool-namespace=models"]);
        assert_eq!(named.namespace, "models");
        let pool = |legacy| PoolSource::Pool {
            name: "p".to_owned(),
            legacy,
        };
        assert_eq!(named.source, pool(false));
        let legacy = kubernetes(&[
            "--pool-name=p",
            "--pool-group=inference.networking.x-k8s.io",
        ]);
        assert_eq!(legacy.source, pool(true));
        let line = [
            "--endpoint-selector=a=b,!c",
            "--endpoint-target-ports=8001,8000,8001",
        ];
        let selected = PoolSource::Selector {
            selector: "a=b,!c".to_owned(),
            ports: vec![8001, 8000],
        };
        assert_eq!(kubernetes(&line).source, selected);
        for (line, text) in [
            (&["--pool-name=P"][..], "is no object name"),
            (
                &["--pool-name=p", "--pool-namespace=a.b"],
                "is no namespace",
            ),
            (&["--endpoint-selector=a=b"], "1 to 8 ports are needed"),
            (
                &["--endpoint-selector=a=b", "--endpoint-target-ports=0"],
                "is not within",
            ),
            (
                &[
                    "--endpoint-selector=a=b",
                    "--endpoint-target-ports=1,2,3,4,5,6,7,8,9",
                ],
                "1 to 8",
            ),
            (
                &["--endpoint-selector=a b", "--endpoint-target-ports=1"],
                "not a label requirement",
            ),
        ] {
            let error = options(line).unwrap_err();
            assert!(error.contains(text), "{line:?}: {error}");
        }
    }

    #[test]
    fn the_workload_is_cut_out_of_the_pod_name() {
        for (pod, name) in [
            ("llm-epp-7d9f8b6c5-x2x4z", Some("llm-epp")),
            ("epp-5c-abcde", Some("epp")),
            ("llm-epp-0", Some("llm-epp")),
            ("epp", None),
            ("epp-abc", None),
            ("-a-b", None),
            ("", None),
        ] {
            assert_eq!(workload(pod), name, "{pod}");
        }
    }

    #[test]
    fn sizes_take_kubernetes_suffixes() {
        assert_eq!(quantity("f", "10MiB").unwrap(), 10 << 20);
        assert_eq!(quantity("f", "25MB").unwrap(), 25_000_000);
        assert_eq!(quantity("f", "1.5Gi").unwrap(), 3 << 29);
        assert_eq!(quantity("f", "500").unwrap(), 500);
        assert_eq!(quantity("f", "4KB").unwrap(), 4000);
        assert_eq!(quantity("f", "1Ti").unwrap(), 1 << 40);
        // More than any machine has; room for a message is added to it.
        assert_eq!(
            quantity("f", "99999999999999999999").unwrap(),
            usize::MAX / 2
        );
    }
}
