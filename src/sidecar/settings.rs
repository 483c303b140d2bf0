//! What the sidecar was told, checked: what a request's way reads.

use std::time::Duration;

use crate::telemetry::trace::Tracer;

/// How prefill hands its KV cache to decode.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, clap::ValueEnum)]
#[value(rename_all = "kebab-case")]
pub enum KvConnector {
    /// vLLM's NIXL connector: prefill first, its answer says where the blocks are
    #[default]
    Nixlv2,
    /// A store that both engines use
    SharedStorage,
    /// SGLang: both at once, meeting in a bootstrap room
    Sglang,
    /// vLLM's Mooncake connector: both at once
    Mooncake,
    /// vLLM's OffloadingConnector with its peer-to-peer tier
    Offloading,
}

impl KvConnector {
    /// As flags and traces spell it.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Nixlv2 => "nixlv2",
            Self::SharedStorage => "shared-storage",
            Self::Sglang => "sglang",
            Self::Mooncake => "mooncake",
            Self::Offloading => "offloading",
        }
    }
}

/// How encode endpoints hand their embeddings on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
#[value(rename_all = "kebab-case")]
pub enum EcConnector {
    /// A store that all engines use
    EcExample,
    /// NIXL: answers say where the embeddings are
    EcNixl,
}

impl EcConnector {
    /// As flags and traces spell it.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::EcExample => "ec-example",
            Self::EcNixl => "ec-nixl",
        }
    }
}

/// What happens when no prefill endpoint could do its part.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, clap::ValueEnum)]
#[value(rename_all = "kebab-case")]
pub enum PrefillFallback {
    /// The local engine reads the prompt itself
    #[default]
    Local,
    /// The client gets the failure
    Error,
}

/// MoRI-IO in WRITE mode, as the engines are set up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MoriIo {
    /// Where prefill engines write to.
    pub local_pod_ip: String,
    /// Ports of decode engines.
    pub decode_notify_port: u16,
    /// The same.
    pub decode_handshake_port: u16,
    /// Ports of prefill engines.
    pub prefill_notify_port: u16,
    /// The same.
    pub prefill_handshake_port: u16,
    /// Tensor parallel size.
    pub tp_size: u64,
    /// Data parallel size, over all hosts.
    pub dp_size: u64,
    /// The same on one host.
    pub dp_size_local: u64,
    /// Hosts of a prefill engine that spans several.
    pub remote_hosts: Vec<String>,
    /// Hosts of a decode engine that spans several.
    pub decode_hosts: Vec<String>,
    /// Both engines at once.
    pub parallel_dispatch: bool,
    /// How long a decode waits for its prefill then.
    pub parallel_decode_wait_timeout: Duration,
}

/// What requests are served by.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Listen port of rank 0.
    pub port: u16,
    /// Engine port of rank 0.
    pub model_server_port: u16,
    /// Where the engines are; `localhost` outside tests.
    pub model_server_host: String,
    /// Ranks, each with its own two ports.
    pub data_parallel_size: u16,
    /// Address of this pod, if known.
    pub pod_ip: Option<String>,
    /// Handing over of KV caches.
    pub kv_connector: KvConnector,
    /// Handing over of embeddings; encode endpoints are not used without.
    pub ec_connector: Option<EcConnector>,
    /// Bootstrap port of Mooncake prefill engines.
    pub mooncake_bootstrap_port: u16,
    /// Bootstrap port of SGLang prefill engines.
    pub sglang_bootstrap_port: u16,
    /// Peer-to-peer port of the OffloadingConnector on rank 0.
    pub p2p_connector_port: u16,
    /// NIXL engines may fetch a prefix from a peer.
    pub enable_p2p_pull: bool,
    /// Only with `nixlv2`.
    pub moriio: Option<MoriIo>,
    /// A random prefill endpoint first instead of the first.
    pub prefiller_sampling: bool,
    /// Further calls to the same prefill endpoint.
    pub prefill_max_retries: u32,
    /// Time before each.
    pub prefill_retry_backoff: Duration,
    /// When all fail.
    pub prefill_fallback: PrefillFallback,
    /// Tokens of a decode chunk; 0 for one call.
    pub decode_chunk_size: u64,
    /// Time for one prefill.
    pub prefill_timeout: Option<Duration>,
    /// Time for one encode.
    pub encode_timeout: Option<Duration>,
    /// Time to the head of the decode engine's answer.
    pub decode_timeout: Option<Duration>,
    /// Longest request body that is read.
    pub max_request_body_bytes: usize,
    /// Give requests a trace context that have none.
    pub tracing: bool,
    /// Records requests, if an exporter is asked for.
    pub tracer: Tracer,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            port: 8000,
            model_server_port: 8200,
            model_server_host: "localhost".to_owned(),
            data_parallel_size: 1,
            pod_ip: None,
            kv_connector: KvConnector::default(),
            ec_connector: None,
            mooncake_bootstrap_port: 8998,
            sglang_bootstrap_port: 8998,
            p2p_connector_port: 7777,
            enable_p2p_pull: false,
            moriio: None,
            prefiller_sampling: false,
            prefill_max_retries: 0,
            prefill_retry_backoff: Duration::from_millis(200),
            prefill_fallback: PrefillFallback::default(),
            decode_chunk_size: 0,
            prefill_timeout: Some(Duration::from_mins(2)),
            encode_timeout: Some(Duration::from_mins(1)),
            decode_timeout: None,
            max_request_body_bytes: 64 << 20,
            tracing: false,
            tracer: Tracer::default(),
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::ValueEnum;

    use super::*;

    #[test]
    fn traces_name_connectors_as_flags_do() {
        fn spelled<T: ValueEnum>(value: &T) -> String {
            value.to_possible_value().unwrap().get_name().to_owned()
        }
        for connector in KvConnector::value_variants() {
            assert_eq!(connector.name(), spelled(connector));
        }
        for connector in EcConnector::value_variants() {
            assert_eq!(connector.name(), spelled(connector));
        }
    }
}
