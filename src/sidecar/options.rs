//! The command line of `sidecar`: the reference's flags, with the names of earlier releases, and ours.

use std::path::PathBuf;
use std::time::Duration;

use clap::{CommandFactory, FromArgMatches, Parser};

use super::settings::{EcConnector, KvConnector, MoriIo, PrefillFallback, Settings};
use crate::epp::options::{OptionsError, go_bool, kebab, list, log_format, log_level, quantity};
use crate::epp::tls::TlsOptions;
use crate::plugin::duration::GoDuration;
use crate::telemetry::log;

/// Names of earlier releases, with the current name and, for a switch that became a list entry, that
/// entry.
const RENAMED: &[(&str, &str, Option<&str>)] = &[
    ("vllm-port", "model-server-port", None),
    ("connector", "kv-connector", None),
    ("prefiller-use-tls", "enable-tls", Some("prefiller")),
    ("decoder-use-tls", "enable-tls", Some("decoder")),
    (
        "prefiller-tls-insecure-skip-verify",
        "tls-insecure-skip-verify",
        Some("prefiller"),
    ),
    (
        "decoder-tls-insecure-skip-verify",
        "tls-insecure-skip-verify",
        Some("decoder"),
    ),
];
/// Accepted without effect: how the reference's logger prints.
const WITHOUT_EFFECT: &[&str] = &["zap-devel", "zap-stacktrace-level", "zap-time-encoding"];
/// Flags whose repeats add up.
const LISTS: &[&str] = &["enable-tls", "tls-insecure-skip-verify", "allowed-targets"];
/// Ranks of one pod.
const MAX_RANKS: u16 = 64;

/// What the sidecar was asked to do; validated.
#[derive(Debug, Clone)]
pub struct SidecarOptions {
    /// What requests are served by.
    pub settings: Settings,
    /// Stages reached over TLS: encode, prefill, decode.
    pub engine_tls: [bool; 3],
    /// Stages whose certificates are not checked.
    pub skip_verify: [bool; 3],
    /// Time to connect to an engine.
    pub connect_timeout: Duration,
    /// Connections kept to one engine.
    pub max_idle_per_host: usize,
    /// TLS of the listeners, if any.
    pub listener_tls: Option<TlsOptions>,
    /// Static list; `None` without one.
    pub allowed_targets: Option<Vec<String>>,
    /// Whether headers are believed as they are.
    pub protect: bool,
    /// Pool whose endpoints are allowed.
    pub inference_pool: Option<Pool>,
    /// Prometheus metrics; `None` for no listener.
    pub metrics_port: Option<u16>,
    /// Threads that serve.
    pub workers: usize,
    /// Time for requests to end after SIGTERM.
    pub drain_timeout: Duration,
    /// Shape of log lines.
    pub log_format: log::Format,
    /// Least level logged.
    pub log_level: tracing::Level,
    /// What was accepted without effect or under an old name; logged at start.
    pub warnings: Vec<String>,
}

/// An InferencePool.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pool {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Only one of the API group before v1 counts.
    pub legacy: bool,
}

/// The routing proxy of a decode pod.
///
/// Stands before an engine and splits requests as the picker's headers say: encode and prefill go to
/// other endpoints, decode to the engine beside it; everything else passes through.
#[derive(Debug, Clone, Parser)]
#[command(
    name = "pinpod sidecar",
    args_override_self = true,
    disable_version_flag = true,
    after_help = "Prefill, encode and KV source endpoints are called only if they are allowed: give \
                  --allowed-targets or --inference-pool, or turn protection off with \
                  --enable-ssrf-protection=false."
)]
#[expect(clippy::struct_excessive_bools, reason = "a flag table")]
struct Flags {
    /// Listen port of rank 0; further ranks take the ports behind it
    #[arg(long, default_value_t = 8000, help_heading = "Ports")]
    port: u16,
    /// Port of the local engine (--vllm-port in earlier releases); further ranks behind it
    #[arg(long, default_value_t = 8200, help_heading = "Ports")]
    model_server_port: u16,
    /// Ranks, each with its own listener
    #[arg(long, default_value_t = 1, help_heading = "Ports")]
    data_parallel_size: u16,
    /// Prometheus metrics (HTTP), a port or address; 0 for none
    #[arg(
        long,
        env = "MORIIO_METRICS_ADDR",
        default_value = "0",
        help_heading = "Ports"
    )]
    metrics_port: String,
    /// Address of this pod
    #[arg(long, env = "POD_IP", default_value = "", hide = true)]
    pod_ip: String,

    /// How prefill hands its KV cache to decode
    #[arg(long, value_enum, default_value_t = KvConnector::default(), help_heading = "Connectors")]
    kv_connector: KvConnector,
    /// How encode endpoints hand their embeddings on; without it they are not used
    #[arg(
        long,
        default_value = "",
        hide_default_value = true,
        help_heading = "Connectors"
    )]
    ec_connector: String,
    /// Bootstrap port of Mooncake prefill engines
    #[arg(
        long,
        env = "MOONCAKE_BOOTSTRAP_PORT",
        default_value_t = 8998,
        help_heading = "Connectors"
    )]
    mooncake_bootstrap_port: u16,
    /// Bootstrap port of SGLang prefill engines
    #[arg(
        long,
        env = "SGLANG_BOOTSTRAP_PORT",
        default_value_t = 8998,
        help_heading = "Connectors"
    )]
    sglang_bootstrap_port: u16,
    /// Peer-to-peer port of the OffloadingConnector on rank 0
    #[arg(
        long,
        env = "P2P_CONNECTOR_PORT",
        default_value_t = 7777,
        help_heading = "Connectors"
    )]
    p2p_connector_port: u16,
    /// Let NIXL engines fetch a prefix from the peer that the picker names
    #[arg(long, action = clap::ArgAction::Set, num_args = 0..=1, default_missing_value = "true", default_value_t = false, help_heading = "Connectors")]
    enable_p2p_pull: bool,
    /// Tokens of one decode call; 0 asks for all at once
    #[arg(long, default_value_t = 0, help_heading = "Connectors")]
    decode_chunk_size: u64,

    #[command(flatten, next_help_heading = "MoRI-IO")]
    moriio: MoriIoFlags,

    /// Begin with a random one of several prefill endpoints
    #[arg(long, env = "ENABLE_PREFILLER_SAMPLING", action = clap::ArgAction::Set, num_args = 0..=1, default_missing_value = "true", default_value_t = false, help_heading = "Failures")]
    enable_prefiller_sampling: bool,
    /// Further calls to a prefill endpoint that refuses connections or answers 502, 503 or 504
    #[arg(long, default_value_t = 0, help_heading = "Failures")]
    prefill_max_retries: u32,
    /// Time before each of them
    #[arg(
        long,
        value_name = "DURATION",
        default_value = "200ms",
        help_heading = "Failures"
    )]
    prefill_retry_backoff: GoDuration,
    /// When every prefill endpoint failed: read the prompt here, or answer with the failure
    #[arg(long, value_enum, default_value_t = PrefillFallback::default(), help_heading = "Failures")]
    prefill_fallback: PrefillFallback,
    /// Time for one prefill; 0 for no limit
    #[arg(
        long,
        value_name = "DURATION",
        default_value = "120s",
        help_heading = "Failures"
    )]
    prefill_timeout: GoDuration,
    /// Time for one encode; 0 for no limit
    #[arg(
        long,
        value_name = "DURATION",
        default_value = "60s",
        help_heading = "Failures"
    )]
    encode_timeout: GoDuration,
    /// Time to the head of the local engine's answer; 0 for no limit
    #[arg(
        long,
        value_name = "DURATION",
        default_value = "0",
        help_heading = "Failures"
    )]
    decode_timeout: GoDuration,
    /// Time to connect to an engine
    #[arg(
        long,
        value_name = "DURATION",
        default_value = "5s",
        help_heading = "Failures"
    )]
    connect_timeout: GoDuration,
    /// After SIGTERM: how long requests may take to end
    #[arg(
        long,
        value_name = "DURATION",
        default_value = "60s",
        help_heading = "Failures"
    )]
    drain_timeout: GoDuration,

    /// Call only allowed prefill, encode and KV source endpoints
    #[arg(long, action = clap::ArgAction::Set, num_args = 0..=1, default_missing_value = "true", default_value_t = true, help_heading = "Protection")]
    enable_ssrf_protection: bool,
    /// Allowed endpoints: host[:port[-port]] or network/bits[:port[-port]], comma-separated
    #[arg(
        long,
        value_name = "LIST",
        default_value = "",
        hide_default_value = true,
        help_heading = "Protection"
    )]
    allowed_targets: String,
    /// Allow the endpoints of this InferencePool, namespace/name or name
    #[arg(
        long,
        env = "INFERENCE_POOL",
        default_value = "",
        hide_default_value = true,
        help_heading = "Protection"
    )]
    inference_pool: String,
    /// API group of the pool: inference.networking.x-k8s.io for v1alpha2 only; otherwise v1, and v1alpha2
    /// while there is none in v1
    #[arg(
        long,
        default_value = "inference.networking.k8s.io",
        help_heading = "Protection"
    )]
    pool_group: String,
    /// Longest inference request body; longer ones are refused with 413
    #[arg(
        long,
        value_name = "SIZE",
        default_value = "64Mi",
        help_heading = "Protection"
    )]
    max_request_body_bytes: String,

    /// TLS towards prefiller, decoder, encoder; comma-separated
    #[arg(
        long,
        value_name = "LIST",
        default_value = "",
        hide_default_value = true,
        help_heading = "TLS"
    )]
    enable_tls: String,
    /// Do not check certificates of prefiller, decoder, encoder; comma-separated
    #[arg(
        long,
        value_name = "LIST",
        default_value = "",
        hide_default_value = true,
        help_heading = "TLS"
    )]
    tls_insecure_skip_verify: String,
    /// TLS on the listeners
    #[arg(long, action = clap::ArgAction::Set, num_args = 0..=1, default_missing_value = "true", default_value_t = true, help_heading = "TLS")]
    secure_proxy: bool,
    /// Directory with tls.crt and tls.key, followed as they change; without it a certificate is made
    #[arg(
        long,
        value_name = "DIR",
        default_value = "",
        hide_default_value = true,
        help_heading = "TLS"
    )]
    cert_path: String,

    /// These flags as a YAML document, by the same names; the command line wins
    #[arg(long, value_name = "TEXT", help_heading = "Process")]
    configuration: Option<String>,
    /// A file with it
    #[arg(long, value_name = "PATH", help_heading = "Process")]
    configuration_file: Option<PathBuf>,
    /// Connections kept to one engine
    #[arg(long, default_value_t = 1024, help_heading = "Process")]
    max_idle_conns_per_host: usize,
    /// Threads that serve [default: one per core, at most 4]
    #[arg(
        long,
        default_value_t = 0,
        hide_default_value = true,
        help_heading = "Process"
    )]
    workers: usize,
    /// Record traces, if OTEL_TRACES_EXPORTER or OTEL_EXPORTER_OTLP_ENDPOINT says where to; give requests without a trace context one
    #[arg(long, action = clap::ArgAction::Set, num_args = 0..=1, default_missing_value = "true", default_value_t = false, help_heading = "Process")]
    tracing: bool,
    /// Verbosity: up to 3 info, 4 debug, 5 trace
    #[arg(
        short = 'v',
        long = "v",
        default_value_t = 2,
        allow_negative_numbers = true,
        help_heading = "Process"
    )]
    verbosity: i32,
    /// Level by name or number instead of -v: debug, info, error, or a number
    #[arg(
        long,
        default_value = "",
        hide_default_value = true,
        help_heading = "Process"
    )]
    zap_log_level: String,
    /// Log lines as json or console (text)
    #[arg(long, default_value = "json", help_heading = "Process")]
    zap_encoder: String,
}

#[derive(Debug, Clone, clap::Args)]
#[expect(clippy::struct_field_names, reason = "the names of the flags")]
struct MoriIoFlags {
    /// Prefill engines write their blocks into the decode engine (with nixlv2)
    #[arg(long, action = clap::ArgAction::Set, num_args = 0..=1, default_missing_value = "true", default_value_t = false)]
    moriio_write_mode: bool,
    /// Address to write to [default: POD_IP]
    #[arg(long, default_value = "", hide_default_value = true)]
    moriio_local_pod_ip: String,
    /// Notify port of decode engines
    #[arg(long, default_value_t = 61005)]
    moriio_decode_notify_port: u16,
    /// Handshake port of decode engines
    #[arg(long, default_value_t = 6301)]
    moriio_decode_handshake_port: u16,
    /// Notify port of prefill engines
    #[arg(long, default_value_t = 61005)]
    moriio_prefill_notify_port: u16,
    /// Handshake port of prefill engines
    #[arg(long, default_value_t = 6301)]
    moriio_prefill_handshake_port: u16,
    /// Tensor parallel size
    #[arg(long, default_value_t = 1)]
    moriio_tp_size: u64,
    /// Data parallel size over all hosts
    #[arg(long, default_value_t = 1)]
    moriio_dp_size: u64,
    /// Data parallel size of one host
    #[arg(long, default_value_t = 0)]
    moriio_dp_size_local: u64,
    /// Hosts of a prefill engine that spans several, comma-separated
    #[arg(long, default_value = "", hide_default_value = true)]
    moriio_remote_hosts: String,
    /// Hosts of a decode engine that spans several, comma-separated
    #[arg(long, default_value = "", hide_default_value = true)]
    moriio_decode_hosts: String,
    /// Call both engines at once
    #[arg(long, action = clap::ArgAction::Set, num_args = 0..=1, default_missing_value = "true", default_value_t = false)]
    moriio_parallel_dispatch: bool,
    /// How long a decode then waits for its prefill
    #[arg(long, value_name = "DURATION", default_value = "30s")]
    moriio_parallel_decode_wait_timeout: GoDuration,
}

impl MoriIoFlags {
    fn validate(
        &self,
        connector: KvConnector,
        pod_ip: &str,
    ) -> Result<Option<MoriIo>, OptionsError> {
        if !self.moriio_write_mode {
            return Ok(None);
        }
        if connector != KvConnector::Nixlv2 {
            return invalid("flag --moriio-write-mode needs --kv-connector=nixlv2");
        }
        let given = &self.moriio_local_pod_ip;
        let local = if given.is_empty() { pod_ip } else { given };
        if local.is_empty() {
            return invalid("flag --moriio-write-mode needs --moriio-local-pod-ip or POD_IP");
        }
        let (remote, decode) = (
            list(&self.moriio_remote_hosts),
            list(&self.moriio_decode_hosts),
        );
        for hosts in [&remote, &decode] {
            let count = hosts.len() as u64;
            if count > 1 && self.moriio_dp_size != self.moriio_dp_size_local.saturating_mul(count) {
                return invalid(
                    "flag --moriio-dp-size must be --moriio-dp-size-local times the number of hosts",
                );
            }
        }
        Ok(Some(MoriIo {
            local_pod_ip: local.to_owned(),
            decode_notify_port: self.moriio_decode_notify_port,
            decode_handshake_port: self.moriio_decode_handshake_port,
            prefill_notify_port: self.moriio_prefill_notify_port,
            prefill_handshake_port: self.moriio_prefill_handshake_port,
            tp_size: self.moriio_tp_size,
            dp_size: self.moriio_dp_size,
            dp_size_local: self.moriio_dp_size_local,
            remote_hosts: remote,
            decode_hosts: decode,
            parallel_dispatch: self.moriio_parallel_dispatch,
            parallel_decode_wait_timeout: self.moriio_parallel_decode_wait_timeout.0,
        }))
    }
}

/// Reads the arguments behind the program and subcommand name.
pub fn parse(arguments: impl IntoIterator<Item = String>) -> Result<SidecarOptions, OptionsError> {
    let mut warnings = Vec::new();
    let line = normalise(arguments.into_iter().collect(), &mut warnings)?;
    let flags = read(line.clone())?;
    let Some(document) = document(&flags)? else {
        return flags.validate(warnings);
    };
    let lines = from_document(&document)?.into_iter().chain(line).collect();
    read(lines)?.validate(warnings)
}

fn read(lines: Vec<(String, String)>) -> Result<Flags, OptionsError> {
    let arguments = lines.into_iter().map(|(name, value)| match name.as_str() {
        "help" => "--help".to_owned(),
        _ => format!("--{name}={value}"),
    });
    let program = std::iter::once("pinpod sidecar".to_owned());
    let matches = Flags::command().try_get_matches_from(program.chain(arguments))?;
    Ok(Flags::from_arg_matches(&matches)?)
}

fn invalid<T>(text: impl Into<String>) -> Result<T, OptionsError> {
    Err(OptionsError::Invalid(text.into()))
}

/// Whether a flag is a switch; `None` for an unknown one.
fn is_switch(name: &str) -> Option<bool> {
    let command = Flags::command();
    let flag = command
        .get_arguments()
        .find(|a| a.get_long() == Some(name))?;
    Some(
        flag.get_num_args()
            .is_some_and(|range| range.min_values() == 0),
    )
}

/// Arguments as names and values, in the spelling of today. Unknown flags are left to be refused: a
/// sidecar that guesses is none to rely on.
fn normalise(
    arguments: Vec<String>,
    warnings: &mut Vec<String>,
) -> Result<Vec<(String, String)>, OptionsError> {
    let mut out: Vec<(String, String)> = Vec::new();
    let mut rest = arguments.into_iter().peekable();
    while let Some(argument) = rest.next() {
        if argument.is_empty() {
            continue;
        }
        let Some(body) = argument
            .strip_prefix("--")
            .or_else(|| argument.strip_prefix('-'))
        else {
            return invalid(format!("unexpected argument {argument:?}"));
        };
        let (name, given) = match body.split_once('=') {
            Some((name, value)) => (kebab(name), Some(value.to_owned())),
            None => (kebab(body), None),
        };
        if name == "h" || name == "help" {
            out.push(("help".to_owned(), String::new()));
            continue;
        }
        let mut next_value =
            || rest.next_if(|next| !next.starts_with('-') || next.parse::<f64>().is_ok());
        if WITHOUT_EFFECT.contains(&name.as_str()) {
            if given.is_none() && name != "zap-devel" {
                next_value();
            }
            warnings.push(format!("flag --{name} has no effect"));
            continue;
        }
        let renamed = RENAMED.iter().find(|(old, _, _)| *old == name);
        if let Some((old, current, entry)) = renamed {
            warnings.push(match entry {
                Some(entry) => format!("flag --{old} is now --{current}={entry}"),
                None => format!("flag --{old} is now --{current}"),
            });
            let value = match entry {
                None => given.or_else(next_value),
                Some(entry) => {
                    if !go_bool(old, given.as_deref().unwrap_or("true"))? {
                        continue;
                    }
                    Some((*entry).to_owned())
                }
            };
            push(&mut out, old, current, value)?;
            continue;
        }
        let value = match is_switch(&name) {
            Some(true) => Some(go_bool(&name, given.as_deref().unwrap_or("true"))?.to_string()),
            _ => given.or_else(next_value),
        };
        push(&mut out, &name, &name, value)?;
    }
    Ok(out)
}

/// Adds a flag; entries of lists add up, otherwise the last one counts.
fn push(
    out: &mut Vec<(String, String)>,
    spelled: &str,
    name: &str,
    value: Option<String>,
) -> Result<(), OptionsError> {
    let Some(value) = value else {
        return invalid(format!("flag --{spelled} needs a value"));
    };
    let earlier = out.iter_mut().find(|(other, _)| other == name);
    match earlier {
        Some((_, list)) if LISTS.contains(&name) => {
            list.push(',');
            list.push_str(&value);
        }
        _ => out.push((name.to_owned(), value)),
    }
    Ok(())
}

fn document(flags: &Flags) -> Result<Option<String>, OptionsError> {
    match (&flags.configuration, &flags.configuration_file) {
        (Some(_), Some(_)) => {
            invalid("--configuration and --configuration-file exclude each other")
        }
        (text, None) => Ok(text.clone()),
        (None, Some(path)) => match std::fs::read_to_string(path) {
            Ok(text) => Ok(Some(text)),
            Err(error) => invalid(format!("--configuration-file {}: {error}", path.display())),
        },
    }
}

/// The members of a document as flags.
fn from_document(text: &str) -> Result<Vec<(String, String)>, OptionsError> {
    let members: std::collections::BTreeMap<String, serde_json::Value> =
        match serde_saphyr::from_str(text) {
            Ok(members) => members,
            Err(error) => return invalid(format!("configuration: {error}")),
        };
    let mut out = Vec::new();
    for (name, value) in members {
        let renamed = RENAMED
            .iter()
            .find(|(old, _, entry)| *old == name && entry.is_none());
        let name = renamed.map_or(name.as_str(), |(_, current, _)| *current);
        if is_switch(name).is_none() || name.starts_with("configuration") {
            return invalid(format!("configuration: unknown key {name:?}"));
        }
        let Some(value) = scalar(&value) else {
            return invalid(format!("configuration: {name} has no usable value"));
        };
        out.push((name.to_owned(), value));
    }
    Ok(out)
}

fn scalar(value: &serde_json::Value) -> Option<String> {
    use serde_json::Value;
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Bool(_) | Value::Number(_) => Some(value.to_string()),
        Value::Array(items) => {
            let items: Option<Vec<String>> = items.iter().map(scalar).collect();
            items.map(|items| items.join(","))
        }
        Value::Null | Value::Object(_) => None,
    }
}

/// Which of encoder, prefiller, decoder a list names.
fn stages(flag: &str, text: &str) -> Result<[bool; 3], OptionsError> {
    let mut out = [false; 3];
    for name in list(text) {
        match name.as_str() {
            "encoder" => out[0] = true,
            "prefiller" => out[1] = true,
            "decoder" => out[2] = true,
            other => {
                return invalid(format!(
                    "flag --{flag}: {other:?} is not prefiller, decoder or encoder"
                ));
            }
        }
    }
    Ok(out)
}

fn limit(duration: GoDuration) -> Option<Duration> {
    Some(duration.0).filter(|d| !d.is_zero())
}

/// The port of a text that is one, or an address that ends with one.
fn metrics_port(text: &str) -> Result<Option<u16>, OptionsError> {
    let port = text.rsplit_once(':').map_or(text, |(_, port)| port);
    match port.parse::<u16>() {
        Ok(0) => Ok(None),
        Ok(port) => Ok(Some(port)),
        Err(_) if text.is_empty() => Ok(None),
        Err(_) => invalid(format!("flag --metrics-port: {text:?} is not a port")),
    }
}

fn pool(text: &str, group: &str) -> Result<Option<Pool>, OptionsError> {
    if text.is_empty() {
        return Ok(None);
    }
    let legacy = match group {
        "inference.networking.k8s.io" => false,
        "inference.networking.x-k8s.io" => true,
        other => return invalid(format!("flag --pool-group: unknown group {other:?}")),
    };
    let (namespace, name) = text.split_once('/').unwrap_or(("default", text));
    if namespace.is_empty() || name.is_empty() || name.contains('/') {
        return invalid(format!(
            "flag --inference-pool: {text:?} is not namespace/name"
        ));
    }
    Ok(Some(Pool {
        namespace: namespace.to_owned(),
        name: name.to_owned(),
        legacy,
    }))
}

impl Flags {
    fn validate(self, warnings: Vec<String>) -> Result<SidecarOptions, OptionsError> {
        let optional = |text: &str| Some(text.to_owned()).filter(|t| !t.is_empty());
        let ranks = self.data_parallel_size;
        let fits = |port: u16| port.checked_add(ranks.saturating_sub(1)).is_some();
        if ranks == 0 || ranks > MAX_RANKS || !fits(self.port) || !fits(self.model_server_port) {
            return invalid(format!(
                "flag --data-parallel-size: expected 1 to {MAX_RANKS} ranks with ports up to 65535"
            ));
        }
        if self.prefill_max_retries > 0 && self.prefill_retry_backoff.0.is_zero() {
            return invalid("flag --prefill-retry-backoff must be above 0 with retries");
        }
        if self.enable_p2p_pull && self.kv_connector != KvConnector::Nixlv2 {
            return invalid("flag --enable-p2p-pull needs --kv-connector=nixlv2");
        }
        let ec_connector = match self.ec_connector.as_str() {
            "" => None,
            "ec-example" => Some(EcConnector::EcExample),
            "ec-nixl" => Some(EcConnector::EcNixl),
            other => {
                return invalid(format!(
                    "flag --ec-connector: {other:?} is not ec-example or ec-nixl"
                ));
            }
        };
        let moriio = self.moriio.validate(self.kv_connector, &self.pod_ip)?;
        let targets = list(&self.allowed_targets);
        let inference_pool = pool(&self.inference_pool, &self.pool_group)?;
        let engine_tls = stages("enable-tls", &self.enable_tls)?;
        let skip_verify = stages("tls-insecure-skip-verify", &self.tls_insecure_skip_verify)?;
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        Ok(SidecarOptions {
            engine_tls,
            skip_verify,
            connect_timeout: self.connect_timeout.0,
            max_idle_per_host: self.max_idle_conns_per_host,
            listener_tls: self.secure_proxy.then(|| TlsOptions {
                cert_path: optional(&self.cert_path).map(Into::into),
                alpn: &[b"h2", b"http/1.1"],
                ..TlsOptions::default()
            }),
            allowed_targets: Some(targets).filter(|t| !t.is_empty()),
            protect: self.enable_ssrf_protection,
            inference_pool,
            metrics_port: metrics_port(&self.metrics_port)?,
            workers: if self.workers == 0 {
                cores.min(4)
            } else {
                self.workers
            },
            drain_timeout: self.drain_timeout.0,
            log_format: log_format(&self.zap_encoder)?,
            log_level: log_level(self.verbosity, &self.zap_log_level)?,
            warnings,
            settings: Settings {
                port: self.port,
                model_server_port: self.model_server_port,
                data_parallel_size: ranks,
                pod_ip: optional(&self.pod_ip),
                kv_connector: self.kv_connector,
                ec_connector,
                mooncake_bootstrap_port: self.mooncake_bootstrap_port,
                sglang_bootstrap_port: self.sglang_bootstrap_port,
                p2p_connector_port: self.p2p_connector_port,
                enable_p2p_pull: self.enable_p2p_pull,
                moriio,
                prefiller_sampling: self.enable_prefiller_sampling,
                prefill_max_retries: self.prefill_max_retries,
                prefill_retry_backoff: self.prefill_retry_backoff.0,
                prefill_fallback: self.prefill_fallback,
                decode_chunk_size: self.decode_chunk_size,
                prefill_timeout: limit(self.prefill_timeout),
                encode_timeout: limit(self.encode_timeout),
                decode_timeout: limit(self.decode_timeout),
                max_request_body_bytes: quantity(
                    "max-request-body-bytes",
                    &self.max_request_body_bytes,
                )?,
                tracing: self.tracing,
                ..Settings::default()
            },
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(line: &[&str]) -> Result<SidecarOptions, String> {
        parse(line.iter().map(|a| (*a).to_owned())).map_err(|e| e.to_string())
    }

    #[test]
    fn defaults_are_the_references() {
        let options = options(&[]).unwrap();
        let settings = &options.settings;
        assert_eq!((settings.port, settings.model_server_port), (8000, 8200));
        assert_eq!(settings.kv_connector, KvConnector::Nixlv2);
        assert_eq!(settings.prefill_retry_backoff, Duration::from_millis(200));
        assert_eq!(settings.p2p_connector_port, 7777);
        assert_eq!(options.max_idle_per_host, 1024);
        assert!(options.listener_tls.is_some() && options.protect);
        assert_eq!(options.metrics_port, None);
        assert!(options.warnings.is_empty());
    }

    #[test]
    fn published_command_lines_are_understood() {
        let old = options(&[
            "--port=8000",
            "-vllm-port",
            "8100",
            "--connector",
            "sglang",
            "--secure-proxy=false",
            "--prefiller-use-tls=true",
            "--decoder-use-tls=false",
            "--prefiller-tls-insecure-skip-verify",
            "--zap-log-level=debug",
            "--zap-devel",
        ])
        .unwrap();
        assert_eq!(old.settings.model_server_port, 8100);
        assert_eq!(old.settings.kv_connector, KvConnector::Sglang);
        assert_eq!(old.engine_tls, [false, true, false]);
        assert_eq!(old.skip_verify, [false, true, false]);
        assert!(old.listener_tls.is_none());
        assert_eq!(old.warnings.len(), 6);
        let lists = options(&["--enable-tls=encoder", "--enable-tls", "decoder"]).unwrap();
        assert_eq!(lists.engine_tls, [true, false, true]);
    }

    #[test]
    fn a_document_gives_defaults_to_the_command_line() {
        let text = "port: 9000\nkv-connector: mooncake\nenable-tls: [prefiller, decoder]\nsecure-proxy: false\n";
        let options = |more: &[&str]| {
            let mut line = vec!["--configuration", text];
            line.extend_from_slice(more);
            options(&line)
        };
        let read = options(&["--port=9001"]).unwrap();
        assert_eq!(read.settings.port, 9001);
        assert_eq!(read.settings.kv_connector, KvConnector::Mooncake);
        assert_eq!(read.engine_tls, [false, true, true]);
        assert!(read.listener_tls.is_none());
        let both = options(&["--configuration-file=x"]).unwrap_err();
        assert!(both.contains("exclude each other"), "{both}");
        let unknown = super::tests::options(&["--configuration=prt: 1"]).unwrap_err();
        assert!(unknown.contains("unknown key \"prt\""), "{unknown}");
    }

    #[test]
    fn broken_rules_are_refused() {
        for (line, text) in [
            (&["--no-such-flag=1"][..], "no-such-flag"),
            (&["stray"], "unexpected argument"),
            (&["--kv-connector=x"], "invalid value"),
            (&["--ec-connector=x"], "not ec-example"),
            (&["--enable-tls=x"], "not prefiller"),
            (&["--data-parallel-size=0"], "expected 1 to 64"),
            (
                &["--port=65535", "--data-parallel-size=2"],
                "expected 1 to 64",
            ),
            (
                &["--prefill-max-retries=1", "--prefill-retry-backoff=0"],
                "above 0",
            ),
            (
                &["--enable-p2p-pull", "--kv-connector=sglang"],
                "needs --kv-connector",
            ),
            (
                &["--moriio-write-mode", "--kv-connector=sglang"],
                "needs --kv-connector",
            ),
            (
                &[
                    "--moriio-write-mode",
                    "--moriio-local-pod-ip=1.2.3.4",
                    "--moriio-dp-size=3",
                    "--moriio-dp-size-local=2",
                    "--moriio-decode-hosts=a,b",
                ],
                "times the number of hosts",
            ),
            (&["--inference-pool=a/b/c"], "not namespace/name"),
            (&["--metrics-port=x"], "not a port"),
            (&["--port"], "needs a value"),
        ] {
            let error = options(line).unwrap_err();
            assert!(error.contains(text), "{line:?}: {error}");
        }
    }

    #[test]
    fn pools_have_a_namespace() {
        let options = options(&["--inference-pool=p"]).unwrap();
        let pool = options.inference_pool.unwrap();
        assert_eq!(
            (pool.namespace.as_str(), pool.name.as_str()),
            ("default", "p")
        );
        assert!(!pool.legacy);
        assert_eq!(metrics_port("0.0.0.0:9091").unwrap(), Some(9091));
    }

    #[test]
    fn the_group_says_which_pools_count() {
        let of = |group: &str| {
            let group = format!("--pool-group={group}");
            let read = options(&["--inference-pool=ns/p", &group]);
            read.map(|options| options.inference_pool.unwrap().legacy)
        };
        assert!(!of("inference.networking.k8s.io").unwrap());
        assert!(of("inference.networking.x-k8s.io").unwrap());
        let error = of("example.com").unwrap_err();
        assert!(error.contains("unknown group \"example.com\""), "{error}");
    }
}
