//! `core-metrics-extractor`: which series mean what, per engine.

use std::collections::HashMap;
use std::sync::Arc;

use serde::Deserialize;
use tokio::time::Instant;

use super::exposition::{Found, MetricSpec, Sample, scan};
use crate::datalayer::attributes::{
    ACTIVE_MODELS, CORE_METRICS_PRODUCER, KV_CACHE_USAGE, RUNNING_REQUESTS_SIZE, WAITING_MODELS,
    WAITING_QUEUE_SIZE,
};
use crate::datalayer::{Endpoint, EndpointSpec, EngineMetrics, LoraState};
use crate::plugin::{
    Build, DataKeys, EndpointColumn, Maturity, ParamDoc, ParamError, Plugin, PluginError,
};

/// Label that names an endpoint's engine, current and legacy spelling.
const ENGINE_LABEL: &str = "llm-d.ai/engine-type";
const LEGACY_ENGINE_LABEL: &str = "inference.networking.k8s.io/engine-type";
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
    specs: Vec<MetricSpec>,
    uses: Vec<Use>,
    block_size_label: String,
    blocks_label: String,
}

/// Buffers of one endpoint's reader.
#[derive(Debug, Default)]
pub struct Scratch {
    found: Vec<Found>,
}

/// What went wrong while reading, for the error counter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Extraction {
    /// Configured families that are missing or whose values cannot be true.
    pub errors: u32,
    /// A core field was refreshed.
    pub refreshed: bool,
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

    /// Reads `text` into the endpoint; what has no sample keeps its value.
    pub fn extract(
        &self,
        endpoint: &Endpoint,
        text: &[u8],
        now: Instant,
        scratch: &mut Scratch,
    ) -> Extraction {
        let Some(mapping) = self.mapping(&endpoint.spec) else {
            return Extraction::default();
        };
        let mut metrics = (*endpoint.metrics()).clone();
        let outcome = mapping.extract(text, now, &mut metrics, scratch);
        endpoint.set_metrics(metrics);
        for (purpose, found) in mapping.uses.iter().zip(&scratch.found) {
            if let Use::Custom(column) = purpose
                && found.samples > 0
                && endpoint.attribute_value(*column) != Some(found.sum)
            {
                endpoint.set_attribute(*column, Arc::new(found.sum));
            }
        }
        outcome
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

impl Mapping {
    fn new(engine: &EngineConfig, keys: &mut DataKeys) -> Result<Self, PluginError> {
        let label = |name: &str, default: &str| {
            if name.is_empty() {
                default.to_owned()
            } else {
                name.to_owned()
            }
        };
        let mut mapping = Self {
            specs: Vec::new(),
            uses: Vec::new(),
            block_size_label: label(&engine.cache_block_size_label_name, "block_size"),
            blocks_label: label(&engine.cache_num_blocks_label_name, "num_gpu_blocks"),
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
        for (purpose, field, spec) in core.into_iter().filter(|(_, _, spec)| !spec.is_empty()) {
            mapping.add(purpose, field, spec)?;
        }
        for metric in &engine.custom_metrics {
            if metric.attribute_key.is_empty() {
                return Err(ParamError("customMetrics: attributeKey is empty".to_owned()).into());
            }
            let column =
                keys.endpoint_produce_as(metric.attribute_key.clone(), CORE_METRICS_PRODUCER)?;
            mapping.add(Use::Custom(column), "customMetrics", &metric.metric_spec)?;
        }
        Ok(mapping)
    }

    fn add(&mut self, purpose: Use, field: &str, spec: &str) -> Result<(), ParamError> {
        let spec = spec
            .parse()
            .map_err(|text| ParamError(format!("{field}: {text}")))?;
        self.specs.push(spec);
        self.uses.push(purpose);
        Ok(())
    }

    fn extract(
        &self,
        text: &[u8],
        now: Instant,
        metrics: &mut EngineMetrics,
        scratch: &mut Scratch,
    ) -> Extraction {
        let mut newest_lora: Option<(f64, LoraState)> = None;
        let mut blocks: Option<u64> = None;
        let mut block_size = None;
        scan(
            text,
            &self.specs,
            &mut scratch.found,
            |position, sample| match self.uses.get(position) {
                Some(Use::Lora)
                    if newest_lora
                        .as_ref()
                        .is_none_or(|(at, _)| sample.value > *at) =>
                {
                    newest_lora = Some((sample.value, lora_state(&sample)));
                }
                Some(Use::CacheInfo) => {
                    block_size =
                        block_size.or_else(|| integer_label(&sample, &self.block_size_label));
                    if let Some(own) = integer_label(&sample, &self.blocks_label) {
                        blocks = Some(blocks.unwrap_or(0) + own);
                    }
                }
                _ => {}
            },
        );
        let mut outcome = Extraction::default();
        for (purpose, found) in self.uses.iter().zip(&scratch.found) {
            outcome.errors += found.rejected.min(1);
            if found.samples == 0 && !(found.declared && found.rejected == 0) {
                // Engines without adapters have no LoRA family at all.
                outcome.errors += u32::from(!matches!(purpose, Use::Lora) && found.rejected == 0);
                continue;
            }
            outcome.refreshed = true;
            let mean = if found.samples > 0 {
                found.sum / f64::from(found.samples)
            } else {
                0.0
            };
            match purpose {
                Use::Waiting => metrics.waiting_requests = saturating_u32(found.sum),
                Use::Running => metrics.running_requests = saturating_u32(found.sum),
                Use::KvUsage => metrics.kv_cache_usage = mean.min(1.0),
                Use::BlockSize => block_size = Some(u64::from(saturating_u32(mean))),
                Use::Blocks => blocks = Some(u64::from(saturating_u32(found.sum))),
                Use::Lora | Use::CacheInfo | Use::Custom(_) => {}
            }
        }
        let narrow = |n: u64| u32::try_from(n).ok().filter(|n| *n > 0);
        metrics.block_size_tokens = block_size.and_then(narrow).or(metrics.block_size_tokens);
        metrics.kv_blocks = blocks.and_then(narrow).or(metrics.kv_blocks);
        if let Some((_, lora)) = newest_lora
            && metrics.lora.as_deref() != Some(&lora)
        {
            metrics.lora = Some(Arc::new(lora));
        }
        if outcome.refreshed {
            metrics.updated_at = Some(now);
        }
        outcome
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

fn lora_state(sample: &Sample<'_>) -> LoraState {
    let list = |name| -> Vec<String> {
        let text = String::from_utf8_lossy(sample.label(name).unwrap_or_default());
        let names = text.split(',').map(str::trim).filter(|n| !n.is_empty());
        names.take(MAX_ADAPTERS).map(str::to_owned).collect()
    };
    LoraState {
        active: list("running_lora_adapters"),
        waiting: list("waiting_lora_adapters"),
        max_active: integer_label(sample, "max_lora")
            .and_then(|n| u32::try_from(n).ok())
            .unwrap_or(0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const UNDER_LOAD: &[u8] =
        include_bytes!("../../../tests/data/vllm-0.32/metrics/3-under-load-1.txt");
    const DP_FRESH: &[u8] = include_bytes!("../../../tests/data/vllm-0.32/metrics/6-dp2-fresh.txt");
    const DP_LOADED: &[u8] =
        include_bytes!("../../../tests/data/vllm-0.32/metrics/8-dp2-under-load.txt");

    fn extractor(settings: &str) -> Result<CoreMetricsExtractor, PluginError> {
        let settings = serde_json::from_str(settings).unwrap();
        CoreMetricsExtractor::new(settings, &mut DataKeys::default())
    }

    fn endpoint(labels: &[(&str, &str)]) -> Endpoint {
        let spec = EndpointSpec {
            name: "e".to_owned(),
            namespace: "default".to_owned(),
            address: ([10, 0, 0, 1], 8000).into(),
            labels: labels
                .iter()
                .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
                .collect(),
            rank: 0,
            details: crate::datalayer::EndpointDetails::default(),
        };
        Endpoint::new(spec, crate::datalayer::EndpointIndex(0))
    }

    fn extract(
        settings: &str,
        labels: &[(&str, &str)],
        text: &[u8],
    ) -> (EngineMetrics, Extraction) {
        let endpoint = endpoint(labels);
        let outcome = extractor(settings).unwrap().extract(
            &endpoint,
            text,
            Instant::now(),
            &mut Scratch::default(),
        );
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
        let endpoint = endpoint(&[]);
        let read = |text: &[u8]| {
            extractor.extract(&endpoint, text, Instant::now(), &mut Scratch::default())
        };
        let outcome = read(b"tgi_queue_size 8\nm{x=\"1\"} 2.5\nm{x=\"2\"} 9\n");
        assert_eq!(endpoint.metrics().waiting_requests, 8);
        assert_eq!(endpoint.attribute_value(k), Some(2.5));
        assert_eq!(endpoint.attribute_value(absent), None);
        assert_eq!(outcome.errors, 1, "n is missing");
        // What is gone from the exposition keeps its last value.
        assert_eq!(read(b"tgi_queue_size 9\n").errors, 2);
        assert_eq!(endpoint.attribute_value(k), Some(2.5));
    }
}
