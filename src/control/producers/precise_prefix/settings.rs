//! Parameters of `precise-prefix-cache-producer`.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use serde::Deserialize;

use crate::kvcache::index::IndexSettings;
use crate::kvcache::redis::{Algorithm, KeyScheme, SharedIndex, SharedSettings, TlsFiles};
use crate::plugin::duration::GoDuration;
use crate::plugin::{ParamError, PluginError};

/// Port of an engine's event socket unless configured.
const DEFAULT_SOCKET_PORT: u16 = 5557;
/// Server of the shared index unless configured.
const DEFAULT_REDIS: &str = "redis://127.0.0.1:6379";
/// Tokens of a block of the shared index unless configured.
const DEFAULT_BLOCK_TOKENS: i64 = 16;
/// How long a prediction counts unless configured.
const DEFAULT_TTL: Duration = Duration::from_secs(2);

/// As written.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub(super) struct Raw {
    token_processor_config: TokenProcessor,
    indexer_config: Indexer,
    kv_events_config: KvEvents,
    speculative_indexing: bool,
    #[serde(rename = "speculativeTTL")]
    speculative_ttl: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
struct TokenProcessor {
    block_size_tokens: i64,
    block_size: i64,
    hash_seed: String,
    hash_algorithm: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
struct Indexer {
    kv_block_index_config: BlockIndex,
    kv_cache_backend_configs: Option<Vec<Backend>>,
    tokenizers_pool_config: Option<serde_json::Value>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
struct BlockIndex {
    in_memory_config: Option<InMemory>,
    cost_aware_memory_config: Option<CostAware>,
    redis_config: Option<Redis>,
    enable_metrics: bool,
    metrics_logging_interval: i64,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
struct InMemory {
    size: i64,
    pod_cache_size: i64,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
struct CostAware {
    size: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
struct Redis {
    address: String,
    ca_cert_path: Option<PathBuf>,
    client_cert_path: Option<PathBuf>,
    client_key_path: Option<PathBuf>,
    backend_type: String,
    #[serde(rename = "enableRDMA")]
    enable_rdma: bool,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Backend {
    name: String,
    weight: f64,
}

#[derive(Debug, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
struct KvEvents {
    zmq_endpoint: String,
    topic_filter: String,
    concurrency: i64,
    engine_type: String,
    discover_pods: Option<bool>,
    pod_discovery_config: PodDiscovery,
}

impl Default for KvEvents {
    fn default() -> Self {
        Self {
            zmq_endpoint: String::new(),
            topic_filter: String::new(),
            concurrency: 0,
            engine_type: "vllm".into(),
            discover_pods: None,
            pod_discovery_config: PodDiscovery::default(),
        }
    }
}

#[derive(Debug, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
struct PodDiscovery {
    pod_label_selector: String,
    pod_namespace: String,
    socket_port: i64,
    replay_socket_port: i64,
}

impl Default for PodDiscovery {
    fn default() -> Self {
        Self {
            pod_label_selector: String::new(),
            pod_namespace: String::new(),
            socket_port: i64::from(DEFAULT_SOCKET_PORT),
            replay_socket_port: 0,
        }
    }
}

/// Checked.
#[derive(Debug)]
pub(super) struct Settings {
    pub(super) index: IndexSettings,
    /// Event and replay port of rank 0, where every endpoint is dialled; 0 means no replay.
    pub(super) dial: Option<(u16, u16)>,
    /// The index that replicas share, instead of one of our own.
    pub(super) shared: Option<SharedSettings>,
    /// Where engines connect to us.
    pub(super) listen: Option<SocketAddr>,
    /// Count look-ups, admissions and evictions.
    pub(super) enable_metrics: bool,
    /// How long a pick counts before events confirm it; `None` when it does not.
    pub(super) speculative_ttl: Option<Duration>,
}

impl Raw {
    pub(super) fn resolve(self) -> Result<Settings, PluginError> {
        let invalid = |text: String| Err(PluginError::from(ParamError(text)));
        let processor = &self.token_processor_config;
        if !matches!(processor.hash_algorithm.as_str(), "" | "cbor-fnv" | "xxh64") {
            return invalid(format!(
                "tokenProcessorConfig.hashAlgorithm: {:?} is neither cbor-fnv nor xxh64",
                processor.hash_algorithm
            ));
        }
        let indexer = self.indexer_config;
        if indexer.tokenizers_pool_config.is_some() {
            return invalid(
                "indexerConfig.tokenizersPoolConfig is not supported; configure a token-producer \
                 plugin instead"
                    .to_owned(),
            );
        }
        let block_index = indexer.kv_block_index_config;
        let mut index = IndexSettings::default();
        if let Some(cost_aware) = &block_index.cost_aware_memory_config
            && !cost_aware.size.is_empty()
        {
            index.max_bytes = bytes(&cost_aware.size).ok_or_else(|| {
                ParamError(format!(
                    "indexerConfig.kvBlockIndexConfig.costAwareMemoryConfig.size: {:?} is no size \
                     such as 2GiB",
                    cost_aware.size
                ))
            })?;
        }
        if let Some(backends) = indexer.kv_cache_backend_configs {
            let weights = backends.into_iter();
            index.tier_weights = weights
                .map(|backend| (backend.name.to_lowercase(), backend.weight))
                .collect();
        }
        // A configured size wins over a server, as the contract has it.
        let redis = block_index.redis_config.as_ref();
        let redis = redis.filter(|_| block_index.cost_aware_memory_config.is_none());
        let shared = redis
            .map(|redis| shared(redis, processor, &index.tier_weights))
            .transpose()?;
        let events = self.kv_events_config;
        if !matches!(events.engine_type.as_str(), "" | "vllm" | "sglang") {
            return invalid(format!(
                "kvEventsConfig.engineType: {:?} is neither vllm nor sglang",
                events.engine_type
            ));
        }
        let listen = match events.zmq_endpoint.as_str() {
            "" => None,
            text => Some(listen_address(text).ok_or_else(|| {
                ParamError(format!(
                    "kvEventsConfig.zmqEndpoint: {text:?} is no address to listen on such as \
                     tcp://*:5557"
                ))
            })?),
        };
        let pods = events.pod_discovery_config;
        let port = |name: &str, value: i64| {
            u16::try_from(value).map_err(|_| {
                ParamError(format!(
                    "kvEventsConfig.podDiscoveryConfig.{name}: {value} is no port"
                ))
            })
        };
        let live = match port("socketPort", pods.socket_port)? {
            0 => DEFAULT_SOCKET_PORT,
            live => live,
        };
        let replay = port("replaySocketPort", pods.replay_socket_port)?;
        let ttl = match self.speculative_ttl.as_deref() {
            None | Some("") => DEFAULT_TTL,
            Some(text) => {
                let parsed = text.parse::<GoDuration>();
                parsed
                    .map_err(|error| ParamError(format!("speculativeTTL: {error}")))?
                    .0
            }
        };
        let ttl = if ttl.is_zero() { DEFAULT_TTL } else { ttl };
        Ok(Settings {
            index,
            // Engines that connect to us do not listen, so both ways are used only when both are asked for.
            dial: events
                .discover_pods
                .unwrap_or(listen.is_none())
                .then_some((live, replay)),
            shared,
            listen,
            enable_metrics: block_index.enable_metrics,
            speculative_ttl: self.speculative_indexing.then_some(ttl),
        })
    }
}

/// Where the shared index is, and how its keys are made.
fn shared(
    redis: &Redis,
    processor: &TokenProcessor,
    tier_weights: &[(String, f64)],
) -> Result<SharedSettings, ParamError> {
    const FIELD: &str = "indexerConfig.kvBlockIndexConfig.redisConfig";
    if !matches!(redis.backend_type.as_str(), "" | "redis" | "valkey") || redis.enable_rdma {
        return Err(ParamError(format!(
            "{FIELD}: backendType is redis or valkey, and RDMA is not available"
        )));
    }
    let address = match redis.address.as_str() {
        "" => DEFAULT_REDIS,
        address => address,
    };
    let identity = match (&redis.client_cert_path, &redis.client_key_path) {
        (Some(certificate), Some(key)) => Some((certificate.clone(), key.clone())),
        (None, None) => None,
        _ => {
            let both = "clientCertPath and clientKeyPath go together";
            return Err(ParamError(format!("{FIELD}: {both}")));
        }
    };
    let algorithm = match processor.hash_algorithm.as_str() {
        "xxh64" => Algorithm::Xxh64,
        _ => Algorithm::CborFnv,
    };
    let sizes = [processor.block_size_tokens, processor.block_size];
    let size = sizes.into_iter().find(|size| *size != 0);
    let size = size.unwrap_or(DEFAULT_BLOCK_TOKENS);
    let block_tokens = usize::try_from(size).map_err(|_| {
        ParamError(format!(
            "tokenProcessorConfig.blockSizeTokens: {size} is below 0"
        ))
    })?;
    let settings = SharedSettings {
        address: address.to_owned(),
        tls: TlsFiles {
            authorities: redis.ca_cert_path.clone(),
            identity,
        },
        scheme: KeyScheme::new(algorithm, &processor.hash_seed, block_tokens),
        tier_weights: tier_weights.to_vec(),
    };
    match SharedIndex::new(&settings) {
        Ok(_) => Ok(settings),
        Err(error) => Err(ParamError(format!("{FIELD}.{error}"))),
    }
}

/// `tcp://` with an address of this machine, `*` for all of them, and a port.
fn listen_address(text: &str) -> Option<SocketAddr> {
    let (host, port) = text.strip_prefix("tcp://")?.rsplit_once(':')?;
    let port = port.parse().ok()?;
    let ip = match host {
        "*" => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        "localhost" => IpAddr::V4(Ipv4Addr::LOCALHOST),
        host => host
            .trim_start_matches('[')
            .trim_end_matches(']')
            .parse()
            .ok()?,
    };
    Some(SocketAddr::new(ip, port))
}

/// A size as `2GiB`, `500MB` or `1048576`.
fn bytes(text: &str) -> Option<usize> {
    let text = text.trim();
    let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    let (number, unit) = text.split_at(digits);
    let factor: usize = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "k" | "kb" => 1_000,
        "m" | "mb" => 1_000_000,
        "g" | "gb" => 1_000_000_000,
        "ki" | "kib" => 1 << 10,
        "mi" | "mib" => 1 << 20,
        "gi" | "gib" => 1 << 30,
        _ => return None,
    };
    number.parse::<usize>().ok()?.checked_mul(factor)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Settings, String> {
        let raw: Raw = serde_json::from_str(text).map_err(|e| e.to_string())?;
        raw.resolve().map_err(|e| e.to_string())
    }

    #[test]
    fn parameters_are_read_as_the_contract_says() {
        let settings = read("{}").unwrap();
        assert_eq!(settings.dial, Some((5557, 0)));
        assert_eq!(settings.speculative_ttl, None);
        let settings = read(
            r#"{"speculativeIndexing": true, "speculativeTTL": "500ms",
                "indexerConfig": {"kvCacheBackendConfigs": [{"name": "GPU", "weight": 2}],
                  "kvBlockIndexConfig": {"costAwareMemoryConfig": {"size": "3MiB"}}},
                "kvEventsConfig": {"podDiscoveryConfig": {"socketPort": 6000, "replaySocketPort": 6100}}}"#,
        )
        .unwrap();
        assert_eq!(settings.dial, Some((6000, 6100)));
        assert_eq!(settings.speculative_ttl, Some(Duration::from_millis(500)));
        assert_eq!(settings.index.max_bytes, 3 << 20);
        assert_eq!(settings.index.tier_weights, [("gpu".to_owned(), 2.0)]);
        let settings = read(r#"{"kvEventsConfig": {"discoverPods": false}, "speculativeTTL": "0s", "speculativeIndexing": true}"#).unwrap();
        assert_eq!(settings.dial, None);
        assert_eq!(settings.speculative_ttl, Some(DEFAULT_TTL));
    }

    #[test]
    fn engines_connect_to_us_or_are_dialled_or_both() {
        let ways = |text: &str| {
            let events = format!(r#"{{"kvEventsConfig": {text}}}"#);
            let settings = read(&events).unwrap();
            (
                settings.listen.map(|address| address.to_string()),
                settings.dial,
            )
        };
        let at = |address: &str| Some(address.to_owned());
        assert_eq!(
            ways(r#"{"zmqEndpoint": "tcp://*:5557"}"#),
            (at("0.0.0.0:5557"), None)
        );
        assert_eq!(
            ways(r#"{"zmqEndpoint": "tcp://[::]:6000", "discoverPods": false}"#),
            (at("[::]:6000"), None)
        );
        assert_eq!(
            ways(r#"{"zmqEndpoint": "tcp://127.0.0.1:1", "discoverPods": true}"#),
            (at("127.0.0.1:1"), Some((5557, 0)))
        );
    }

    #[test]
    fn errors_name_the_parameter() {
        for (text, error) in [
            (
                r#"{"indexerConfig": {"kvBlockIndexConfig": {"redisConfig": {"address": "rediss://h?skip_verify=true"}}}}"#,
                "redisConfig.address: skip_verify is not available: give caCertPath",
            ),
            (
                r#"{"indexerConfig": {"kvBlockIndexConfig": {"redisConfig": {"address": "rediss://h", "caCertPath": "/no/such"}}}}"#,
                "redisConfig.caCertPath: No such file or directory (os error 2)",
            ),
            (
                r#"{"indexerConfig": {"kvBlockIndexConfig": {"redisConfig": {"caCertPath": "/no/such"}}}}"#,
                "redisConfig.address: certificates are for rediss:// only",
            ),
            (
                r#"{"indexerConfig": {"kvBlockIndexConfig": {"redisConfig": {"address": "rediss://h", "clientCertPath": "/c"}}}}"#,
                "redisConfig: clientCertPath and clientKeyPath go together",
            ),
            (
                r#"{"tokenProcessorConfig": {"hashAlgorithm": "md5"}}"#,
                "tokenProcessorConfig.hashAlgorithm: \"md5\" is neither cbor-fnv nor xxh64",
            ),
            (
                r#"{"indexerConfig": {"tokenizersPoolConfig": {}}}"#,
                "indexerConfig.tokenizersPoolConfig is not supported; configure a token-producer plugin instead",
            ),
            (
                r#"{"kvEventsConfig": {"engineType": "tgi"}}"#,
                "kvEventsConfig.engineType: \"tgi\" is neither vllm nor sglang",
            ),
            (
                r#"{"kvEventsConfig": {"podDiscoveryConfig": {"socketPort": 70000}}}"#,
                "kvEventsConfig.podDiscoveryConfig.socketPort: 70000 is no port",
            ),
            (
                r#"{"kvEventsConfig": {"zmqEndpoint": "ipc:///run/events"}}"#,
                "kvEventsConfig.zmqEndpoint: \"ipc:///run/events\" is no address to listen on such as tcp://*:5557",
            ),
            (
                r#"{"indexerConfig": {"kvBlockIndexConfig": {"costAwareMemoryConfig": {"size": "2 apples"}}}}"#,
                "indexerConfig.kvBlockIndexConfig.costAwareMemoryConfig.size: \"2 apples\" is no size such as 2GiB",
            ),
        ] {
            let found = read(text).unwrap_err();
            assert!(found.ends_with(error), "{found}");
        }
    }
}
