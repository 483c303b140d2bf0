//! `core-metrics-extractor`: which series mean what, per engine.

use std::collections::HashMap;
use std::sync::Arc;

use serde::Deserialize;
use tokio::time::Instant;

use super::{Extraction, Extractor};
use crate::datalayer::attributes::{
    ACTIVE_MODELS, CORE_METRICS_PRODUCER, KV_CACHE_USAGE, RUNNING_REQUESTS_SIZE, WAITING_MODELS,
    WAITING_QUEUE_SIZE,
};
use crate::datalayer::scrape::exposition::{Findings, Found, MetricSpec, Sample, Wanted};
use crate::datalayer::sources::Payload;
use crate::datalayer::{Endpoint, EndpointSpec, EngineMetrics, LoraState};
use crate::plugin::{
    Build, DataKeys, EndpointColumn, Maturity, ParamDoc, ParamError, Plugin, PluginError,
};

/// Label that names an endpoint's engine, current and legacy spelling.
const ENGINE_LABEL: &str = "llm-d.ai/engine-type";
const LEGACY_ENGINE_LABEL: &str = "inference.networking.k8s.io/engine-type";
const RUNNING_ADAPTERS: &str = "running_lora_adapters";
const WAITING_ADAPTERS: &str = "waiting_lora_adapters";
/// Adapters that are read of one series; further ones are ignored.
const MAX_ADAPTERS: usize = 1024;

/// Reads load, cache and LoRA state out of an engine's exposition.
///
/// Series of several data-parallel engines of one endpoint are summed (requests, blocks) or averaged
/// (cache use). A family that is announced but has no sample yet reads as 0: vLLM creates its gauges
/// with the first request.
#[derive(Debug)]
pub struct CoreMetricsExtractor {
    engine_label: String,
    default_engine: String,
    engines: HashMap<String, Mapping>,
}

#[derive(Debug, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
struct Settings {
    engine_label_key: String,
    default_engine: String,
    engine_configs: Vec<EngineConfig>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            engine_label_key: ENGINE_LABEL.to_owned(),
            default_engine: "vllm".to_owned(),
            engine_configs: Vec::new(),
        }
    }
}

/// One engine's series; an empty spec is not collected.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
struct EngineConfig {
    name: String,
    queued_requests_spec: String,
    running_requests_spec: String,
    kv_usage_spec: String,
    lora_spec: String,
    cache_info_spec: String,
    cache_block_size_label_name: String,
    cache_num_blocks_label_name: String,
    cache_block_size_spec: String,
    cache_num_blocks_spec: String,
    custom_metrics: Vec<CustomMetric>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct CustomMetric {
    attribute_key: String,
    metric_spec: String,
}

/// What a spec is for.
#[derive(Debug, Clone, Copy)]
enum Use {
    Waiting,
    Running,
    KvUsage,
    Lora,
    CacheInfo,
    BlockSize,
    Blocks,
    Custom(EndpointColumn<f64>),
}

/// A resolved engine.
#[derive(Debug, Clone)]
struct Mapping {
    wanted: Wanted,
    /// What each of the specs is for.
    uses: Vec<Use>,
    block_size_label: String,
    blocks_label: String,
}

fn built_in() -> Vec<EngineConfig> {
    let engine = |name: &str, waiting: &str, running: &str, kv: &str| EngineConfig {
        name: name.to_owned(),
        queued_requests_spec: waiting.to_owned(),
        running_requests_spec: running.to_owned(),
        kv_usage_spec: kv.to_owned(),
        ..EngineConfig::default()
    };
    let own = str::to_owned;
    vec![
        EngineConfig {
            lora_spec: own("vllm:lora_requests_info"),
            cache_info_spec: own("vllm:cache_config_info"),
            ..engine(
                "vllm",
                "vllm:num_requests_waiting",
                "vllm:num_requests_running",
                "vllm:kv_cache_usage_perc",
            )
        },
        EngineConfig {
            cache_info_spec: own("sglang:cache_config_info"),
            cache_block_size_label_name: own("page_size"),
            cache_num_blocks_label_name: own("num_pages"),
            ..engine(
                "sglang",
                "sglang:num_queue_reqs",
                "sglang:num_running_reqs",
                "sglang:token_usage",
            )
        },
        EngineConfig {
            cache_block_size_spec: own("trtllm_kv_cache_tokens_per_block"),
            cache_num_blocks_spec: own("trtllm_kv_cache_max_blocks"),
            ..engine(
                "trtllm-serve",
                "trtllm_num_requests_waiting",
                "trtllm_num_requests_running",
                "trtllm_kv_cache_utilization",
            )
        },
        EngineConfig {
            cache_block_size_spec: own(
                "nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type=tokens_per}",
            ),
            cache_num_blocks_spec: own(
                "nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type=max}",
            ),
            ..engine(
                "triton-tensorrt-llm",
                "nv_trt_llm_request_metrics{request_type=waiting}",
                "nv_trt_llm_request_metrics{request_type=scheduled}",
                "nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type=fraction}",
            )
        },
        engine(
            "triton",
            "nv_inference_pending_request_count",
            "nv_inference_exec_count",
            "",
        ),
    ]
}

/// Series that a built-in engine is expected to expose.
#[derive(Debug, Clone)]
pub struct EngineSeries {
    /// Engine, as `llm-d.ai/engine-type` names it.
    pub engine: String,
    /// Without these the load scorers are blind: waiting and running requests, cache use.
    pub load: Vec<String>,
    /// Without these defaults are used: adapters, block size and number of blocks.
    pub optional: Vec<String>,
}

/// What the built-in engines expose, by family name.
pub fn engine_series() -> Vec<EngineSeries> {
    let family = |spec: &String| spec.split('{').next().unwrap_or_default().to_owned();
    let families = |specs: [&String; 3]| -> Vec<String> {
        let mut names: Vec<String> = specs.into_iter().map(family).collect();
        names.retain(|name| !name.is_empty());
        names.dedup();
        names
    };
    let series = |engine: EngineConfig| EngineSeries {
        load: families([
            &engine.queued_requests_spec,
            &engine.running_requests_spec,
            &engine.kv_usage_spec,
        ]),
        optional: families([
            &engine.lora_spec,
            &engine.cache_info_spec,
            &engine.cache_num_blocks_spec,
        ]),
        engine: engine.name,
    };
    built_in().into_iter().map(series).collect()
}

impl Plugin for CoreMetricsExtractor {
    const TYPE: &'static str = CORE_METRICS_PRODUCER;
    const MATURITY: Maturity = Maturity::Beta;
    const PARAMETERS: &'static [ParamDoc] = &[
        ParamDoc {
            name: "engineLabelKey",
            kind: "string",
            default: ENGINE_LABEL,
            help: "Endpoint label that names its engine.",
        },
        ParamDoc {
            name: "defaultEngine",
            kind: "string",
            default: "vllm",
            help: "Engine of endpoints without the label or with an unknown value.",
        },
        ParamDoc {
            name: "engineConfigs",
            kind: "list",
            default: "[]",
            help: "Engines {name, queuedRequestsSpec, runningRequestsSpec, kvUsageSpec, loraSpec, cacheInfoSpec, cacheBlockSizeLabelName, cacheNumBlocksLabelName, cacheBlockSizeSpec, cacheNumBlocksSpec, customMetrics}; one with a built-in name replaces it.",
        },
    ];
    const ABOUT: &'static str =
        "Reads load and cache metrics of vLLM, SGLang, TensorRT-LLM and Triton.";

    fn build(build: &mut Build<'_>) -> Result<Self, PluginError> {
        let settings: Settings = build.read::<Self, _>()?;
        for key in [
            KV_CACHE_USAGE,
            WAITING_QUEUE_SIZE,
            RUNNING_REQUESTS_SIZE,
            ACTIVE_MODELS,
            WAITING_MODELS,
        ] {
            build.keys.produce_as::<()>(key, Self::TYPE);
        }
        Self::new(settings, build.keys)
    }
}

impl CoreMetricsExtractor {
    fn new(settings: Settings, keys: &mut DataKeys) -> Result<Self, PluginError> {
        let mut engines = HashMap::new();
        for engine in built_in().into_iter().chain(settings.engine_configs) {
            if engine.name.is_empty() || engine.name == "default" {
                return Err(ParamError(format!(
                    "engineConfigs: name {:?} is reserved or empty",
                    engine.name
                ))
                .into());
            }
            let mapping = Mapping::new(&engine, keys).map_err(|error| {
                PluginError::Invalid(format!("engineConfigs[{}]: {error}", engine.name))
            })?;
            engines.insert(engine.name, mapping);
        }
        if !engines.contains_key(&settings.default_engine) {
            return Err(ParamError(format!(
                "defaultEngine: {:?} is not a known engine",
                settings.default_engine
            ))
            .into());
        }
        Ok(Self {
            engine_label: settings.engine_label_key,
            default_engine: settings.default_engine,
            engines,
        })
    }

    fn mapping(&self, endpoint: &EndpointSpec) -> Option<&Mapping> {
        let label = endpoint
            .labels
            .get(&self.engine_label)
            .or_else(|| endpoint.labels.get(LEGACY_ENGINE_LABEL));
        label
            .and_then(|name| self.engines.get(name))
            .or_else(|| self.engines.get(&self.default_engine))
    }
}

impl Extractor for CoreMetricsExtractor {
    fn reads(&self) -> Payload {
        Payload::Exposition
    }

    fn extract(&self, endpoint: &Endpoint, body: &[u8], now: Instant) -> Extraction {
        self.mapping(&endpoint.spec)
            .map(|mapping| mapping.extract(endpoint, body, now))
            .unwrap_or_default()
    }
}

impl Mapping {
    fn new(engine: &EngineConfig, keys: &mut DataKeys) -> Result<Self, PluginError> {
        let label = |name: &str, default: &str| {
            if name.is_empty() {
                default.to_owned()
            } else {
                name.to_owned()
            }
        };
        let core = [
            (
                Use::Waiting,
                "queuedRequestsSpec",
                &engine.queued_requests_spec,
            ),
            (
                Use::Running,
                "runningRequestsSpec",
                &engine.running_requests_spec,
            ),
            (Use::KvUsage, "kvUsageSpec", &engine.kv_usage_spec),
            (Use::Lora, "loraSpec", &engine.lora_spec),
            (Use::CacheInfo, "cacheInfoSpec", &engine.cache_info_spec),
            (
                Use::BlockSize,
                "cacheBlockSizeSpec",
                &engine.cache_block_size_spec,
            ),
            (
                Use::Blocks,
                "cacheNumBlocksSpec",
                &engine.cache_num_blocks_spec,
            ),
        ];
        let mut specs = Vec::new();
        let mut uses = Vec::new();
        for (purpose, field, spec) in core.into_iter().filter(|(_, _, spec)| !spec.is_empty()) {
            specs.push(parse_spec(field, spec)?);
            uses.push(purpose);
        }
        for metric in &engine.custom_metrics {
            if metric.attribute_key.is_empty() {
                return Err(ParamError("customMetrics: attributeKey is empty".to_owned()).into());
            }
            let column =
                keys.endpoint_produce_as(metric.attribute_key.clone(), CORE_METRICS_PRODUCER)?;
            specs.push(parse_spec("customMetrics", &metric.metric_spec)?.signed());
            uses.push(Use::Custom(column));
        }
        Ok(Self {
            wanted: Wanted::new(specs),
            uses,
            block_size_label: label(&engine.cache_block_size_label_name, "block_size"),
            blocks_label: label(&engine.cache_num_blocks_label_name, "num_gpu_blocks"),
        })
    }

    fn extract(&self, endpoint: &Endpoint, body: &[u8], now: Instant) -> Extraction {
        let mut cache = CacheInfo::default();
        let mut newest_lora: Option<Sample<'_>> = None;
        let mut findings = Findings::new();
        self.wanted.scan(body, &mut findings, |position, sample| {
            match self.uses.get(position) {
                // vLLM stores the time in the value.
                Some(Use::Lora) if newest_lora.is_none_or(|n| sample.value > n.value) => {
                    newest_lora = Some(sample);
                }
                Some(Use::CacheInfo) => cache.add(&sample, self),
                _ => {}
            }
        });
        let mut metrics = EngineMetrics::clone(&endpoint.metrics());
        let mut outcome = Extraction::default();
        for (purpose, found) in self.uses.iter().zip(&findings) {
            let known = found.samples > 0 || (found.declared && found.rejected == 0);
            // Engines without adapters have no LoRA family at all.
            let may_be_missing = matches!(purpose, Use::Lora);
            outcome.errors += u32::from(found.rejected > 0 || !(known || may_be_missing));
            match purpose {
                Use::Custom(column) => set_number(endpoint, *column, found),
                _ if known => {
                    outcome.refreshed = true;
                    apply(*purpose, found, &mut metrics, &mut cache);
                }
                _ => {}
            }
        }
        cache.store(&mut metrics);
        if let Some(sample) = newest_lora
            && !metrics
                .lora
                .as_deref()
                .is_some_and(|old| is_same(&sample, old))
        {
            metrics.lora = Some(Arc::new(lora_state(&sample)));
        }
        if outcome.refreshed {
            metrics.updated_at = Some(now);
            endpoint.set_metrics(metrics);
        }
        outcome
    }
}

fn parse_spec(field: &str, spec: &str) -> Result<MetricSpec, ParamError> {
    spec.parse()
        .map_err(|text| ParamError(format!("{field}: {text}")))
}

fn apply(purpose: Use, found: &Found, metrics: &mut EngineMetrics, cache: &mut CacheInfo) {
    // Announced without a sample: not counted yet, so 0.
    let mean = found.mean().unwrap_or(0.0);
    match purpose {
        Use::Waiting => metrics.waiting_requests = saturating_u32(found.sum),
        Use::Running => metrics.running_requests = saturating_u32(found.sum),
        Use::KvUsage => metrics.kv_cache_usage = mean.min(1.0),
        Use::BlockSize => cache.block_size = Some(u64::from(saturating_u32(mean))),
        Use::Blocks => cache.blocks = Some(u64::from(saturating_u32(found.sum))),
        Use::Lora | Use::CacheInfo | Use::Custom(_) => {}
    }
}

/// A number of the user's choice; kept while it has no sample.
fn set_number(endpoint: &Endpoint, column: EndpointColumn<f64>, found: &Found) {
    if found.samples > 0 && endpoint.attribute_value(column) != Some(found.sum) {
        endpoint.set_attribute(column, Arc::new(found.sum));
    }
}

/// KV cache size, summed over the engines of one endpoint.
#[derive(Debug, Default)]
struct CacheInfo {
    block_size: Option<u64>,
    blocks: Option<u64>,
}

impl CacheInfo {
    fn add(&mut self, sample: &Sample<'_>, mapping: &Mapping) {
        if self.block_size.is_none() {
            self.block_size = integer_label(sample, &mapping.block_size_label);
        }
        if let Some(own) = integer_label(sample, &mapping.blocks_label) {
            self.blocks = Some(self.blocks.unwrap_or(0).saturating_add(own));
        }
    }

    /// What is unknown, 0 or absurd keeps the last value.
    fn store(&self, metrics: &mut EngineMetrics) {
        let narrow = |n: u64| u32::try_from(n).ok().filter(|n| *n > 0);
        let block_size = self.block_size.and_then(narrow);
        metrics.block_size_tokens = block_size.or(metrics.block_size_tokens);
        metrics.kv_blocks = self.blocks.and_then(narrow).or(metrics.kv_blocks);
    }
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a float cast saturates"
)]
fn saturating_u32(value: f64) -> u32 {
    value as u32
}

fn integer_label(sample: &Sample<'_>, name: &str) -> Option<u64> {
    std::str::from_utf8(sample.label(name)?)
        .ok()?
        .trim()
        .parse()
        .ok()
}

/// Names of a comma list.
fn adapters<'t>(sample: &Sample<'t>, label: &str) -> impl Iterator<Item = &'t [u8]> {
    let list = sample.label(label).unwrap_or_default();
    list.split(|b| *b == b',')
        .map(<[u8]>::trim_ascii)
        .filter(|name| !name.is_empty())
        .take(MAX_ADAPTERS)
}

fn max_adapters(sample: &Sample<'_>) -> u32 {
    integer_label(sample, "max_lora")
        .and_then(|n| u32::try_from(n).ok())
        .unwrap_or(0)
}

fn lora_state(sample: &Sample<'_>) -> LoraState {
    let list = |label| -> Vec<String> {
        adapters(sample, label)
            .map(|name| String::from_utf8_lossy(name).into_owned())
            .collect()
    };
    LoraState {
        active: list(RUNNING_ADAPTERS),
        waiting: list(WAITING_ADAPTERS),
        max_active: max_adapters(sample),
    }
}

/// Whether the sample says what is already known; nearly every scrape does.
fn is_same(sample: &Sample<'_>, known: &LoraState) -> bool {
    let same =
        |label, names: &[String]| adapters(sample, label).eq(names.iter().map(String::as_bytes));
    same(RUNNING_ADAPTERS, &known.active)
        && same(WAITING_ADAPTERS, &known.waiting)
        && max_adapters(sample) == known.max_active
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::datalayer::extractors::test_support::endpoint;

    const UNDER_LOAD: &[u8] =
        include_bytes!("../../../tests/data/vllm-0.32/metrics/3-under-load-1.txt");
    const DP_FRESH: &[u8] = include_bytes!("../../../tests/data/vllm-0.32/metrics/6-dp2-fresh.txt");
    const DP_LOADED: &[u8] =
        include_bytes!("../../../tests/data/vllm-0.32/metrics/8-dp2-under-load.txt");

    fn extractor(settings: &str) -> Result<CoreMetricsExtractor, PluginError> {
        let settings = serde_json::from_str(settings).unwrap();
        CoreMetricsExtractor::new(settings, &mut DataKeys::default())
    }

    fn extract(
        settings: &str,
        labels: &[(&str, &str)],
        text: &[u8],
    ) -> (EngineMetrics, Extraction) {
        let endpoint = endpoint("e", labels);
        let outcome = extractor(settings)
            .unwrap()
            .extract(&endpoint, text, Instant::now());
        ((*endpoint.metrics()).clone(), outcome)
    }

    #[test]
    fn a_recorded_vllm_is_read() {
        let (metrics, outcome) = extract("{}", &[], UNDER_LOAD);
        // Figures of the recording, as its README states them.
        assert_eq!(
            (metrics.running_requests, metrics.waiting_requests),
            (16, 24)
        );
        assert!(
            (metrics.kv_cache_usage - 0.248).abs() < 0.001,
            "{}",
            metrics.kv_cache_usage
        );
        assert_eq!(
            (metrics.block_size_tokens, metrics.kv_blocks),
            (Some(16), Some(1024))
        );
        let lora = metrics.lora.unwrap();
        assert!(!lora.active.is_empty() && lora.max_active > 0, "{lora:?}");
        assert_eq!(
            outcome,
            Extraction {
                errors: 0,
                refreshed: true
            }
        );
    }

    #[test]
    fn engines_of_one_endpoint_are_summed_and_averaged() {
        let text = b"# TYPE vllm:num_requests_waiting gauge\nvllm:num_requests_waiting{engine=\"0\"} 3\nvllm:num_requests_waiting{engine=\"1\"} 4\nvllm:num_requests_running{engine=\"0\"} 1\nvllm:kv_cache_usage_perc{engine=\"0\"} 0.2\nvllm:kv_cache_usage_perc{engine=\"1\"} 0.6\nvllm:cache_config_info{block_size=\"16\",num_gpu_blocks=\"100\",engine=\"0\"} 1\nvllm:cache_config_info{block_size=\"16\",num_gpu_blocks=\"50\",engine=\"1\"} 1\n";
        let (metrics, _) = extract("{}", &[], text);
        assert_eq!((metrics.waiting_requests, metrics.running_requests), (7, 1));
        assert!((metrics.kv_cache_usage - 0.4).abs() < 1e-12);
        assert_eq!(metrics.kv_blocks, Some(150));
        let (loaded, outcome) = extract("{}", &[], DP_LOADED);
        assert!(
            loaded.running_requests > 0 && outcome.errors == 0,
            "{loaded:?}"
        );
    }

    #[test]
    fn a_fresh_engine_reads_as_idle() {
        let (metrics, outcome) = extract("{}", &[], DP_FRESH);
        assert_eq!((metrics.waiting_requests, metrics.running_requests), (0, 0));
        assert!(
            metrics.updated_at.is_some() && outcome.refreshed,
            "{outcome:?}"
        );
    }

    #[test]
    fn the_label_selects_the_engine() {
        let text = b"sglang:num_queue_reqs 5\nsglang:num_running_reqs 6\nsglang:token_usage 0.5\nsglang:cache_config_info{page_size=\"1\",num_pages=\"9\"} 1\n";
        for labels in [
            &[(ENGINE_LABEL, "sglang")],
            &[(LEGACY_ENGINE_LABEL, "sglang")],
        ] {
            let (metrics, outcome) = extract("{}", labels, text);
            assert_eq!(
                (
                    metrics.waiting_requests,
                    metrics.running_requests,
                    metrics.kv_blocks
                ),
                (5, 6, Some(9))
            );
            assert_eq!(outcome.errors, 0);
        }
        let (metrics, outcome) = extract("{}", &[(ENGINE_LABEL, "unknown")], text);
        assert_eq!((metrics.waiting_requests, outcome.refreshed), (0, false));
        assert_eq!(
            outcome.errors, 4,
            "four vLLM families are missing; LoRA may be"
        );
    }

    #[test]
    fn the_newest_lora_series_counts() {
        let text = b"vllm:lora_requests_info{max_lora=\"4\",running_lora_adapters=\"old\",waiting_lora_adapters=\"\"} 10\nvllm:lora_requests_info{max_lora=\"2\",running_lora_adapters=\"sql, fr,\",waiting_lora_adapters=\"x\"} 20\n";
        let lora = extract("{}", &[], text).0.lora.unwrap();
        assert_eq!(
            (lora.active.clone(), lora.waiting.clone(), lora.max_active),
            (
                vec!["sql".to_owned(), "fr".to_owned()],
                vec!["x".to_owned()],
                2
            )
        );
    }

    #[test]
    fn settings_are_checked() {
        assert!(extractor(r#"{"defaultEngine": "tgi"}"#).is_err());
        assert!(extractor(r#"{"engineConfigs": [{"name": "default"}]}"#).is_err());
        assert!(extractor(r#"{"engineConfigs": [{"name": "x", "kvUsageSpec": "a{b"}]}"#).is_err());
    }

    #[test]
    fn engines_and_numbers_of_ones_own_are_read() {
        let settings = r#"{"defaultEngine": "tgi", "engineConfigs": [{"name": "tgi", "queuedRequestsSpec": "tgi_queue_size", "customMetrics": [{"attributeKey": "k", "metricSpec": "m{x=1}"}, {"attributeKey": "absent", "metricSpec": "n"}]}]}"#;
        let mut keys = DataKeys::default();
        let extractor =
            CoreMetricsExtractor::new(serde_json::from_str(settings).unwrap(), &mut keys).unwrap();
        let mut column = |key: &'static str| {
            keys.endpoint_require::<f64>(key, CORE_METRICS_PRODUCER)
                .unwrap()
        };
        let (k, absent) = (column("k"), column("absent"));
        let endpoint = endpoint("e", &[]);
        let read = |text: &[u8]| extractor.extract(&endpoint, text, Instant::now());
        let outcome = read(b"tgi_queue_size 8\nm{x=\"1\"} 2.5\nm{x=\"2\"} 9\n");
        assert_eq!(endpoint.metrics().waiting_requests, 8);
        assert_eq!(endpoint.attribute_value(k), Some(2.5));
        assert_eq!(endpoint.attribute_value(absent), None);
        assert_eq!(outcome.errors, 1, "n is missing");
        // What is gone from the exposition keeps its last value.
        assert_eq!(read(b"tgi_queue_size 9\n").errors, 2);
        assert_eq!(endpoint.attribute_value(k), Some(2.5));
    }

    #[test]
    fn numbers_that_cannot_be_true_change_nothing() {
        let endpoint = endpoint("e", &[]);
        let extractor = extractor("{}").unwrap();
        let read = |text: &str| extractor.extract(&endpoint, text.as_bytes(), Instant::now());
        let true_ones = "vllm:num_requests_waiting 3\nvllm:num_requests_running 2\nvllm:kv_cache_usage_perc 0.5\nvllm:cache_config_info{block_size=\"16\",num_gpu_blocks=\"100\"} 1\n";
        assert_eq!(read(true_ones).errors, 0);
        let before = endpoint.metrics();
        let lies = "vllm:num_requests_waiting NaN\nvllm:num_requests_running -4\nvllm:kv_cache_usage_perc +Inf\nvllm:cache_config_info{block_size=\"0\",num_gpu_blocks=\"18446744073709551615\"} 1\nvllm:cache_config_info{block_size=\"0\",num_gpu_blocks=\"9\"} 1\n";
        assert_eq!(read(lies).errors, 3, "waiting, running, use");
        let after = endpoint.metrics();
        assert_eq!(
            (
                after.waiting_requests,
                after.running_requests,
                after.kv_cache_usage
            ),
            (3, 2, 0.5)
        );
        assert_eq!(
            (after.block_size_tokens, after.kv_blocks),
            (before.block_size_tokens, before.kv_blocks)
        );
        // Too large to be meant, still a number: the largest that fits, and a full cache.
        read("vllm:num_requests_waiting 1e300\nvllm:kv_cache_usage_perc 97\n");
        let after = endpoint.metrics();
        assert_eq!(
            (after.waiting_requests, after.kv_cache_usage),
            (u32::MAX, 1.0)
        );
        let wholly_wrong = read("vllm:num_requests_waiting x\n");
        assert!(!wholly_wrong.refreshed);
        assert_eq!(
            endpoint.metrics().updated_at,
            after.updated_at,
            "no news, not fresher"
        );
    }
}
