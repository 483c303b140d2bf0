//! `multicluster-metrics-extractor`

use std::sync::Arc;

use serde::Deserialize;
use tokio::time::Instant;

use super::{Extraction, Extractor};
use crate::datalayer::Endpoint;
use crate::datalayer::scrape::exposition::{Findings, MetricSpec, Wanted};
use crate::datalayer::sources::Payload;
use crate::plugin::{Build, EndpointColumn, Maturity, ParamDoc, ParamError, Plugin, PluginError};

/// Attribute: average KV cache use of a peer cluster. Has no producer in its key.
pub const MULTICLUSTER_KV_CACHE: &str = "llm-d.ai/multicluster-kv-cache-utilization";
/// Attribute: average queue of a peer cluster. Has no producer in its key.
pub const MULTICLUSTER_QUEUE: &str = "llm-d.ai/multicluster-queue-size";

/// Reads the averages that a peer cluster's picker publishes; of several pools, their mean.
#[derive(Debug)]
pub struct MulticlusterMetricsExtractor {
    wanted: Wanted,
    columns: [EndpointColumn<f64>; 2],
}

#[derive(Debug, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
struct Settings {
    kv_cache_utilization_metric: String,
    queue_size_metric: String,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            kv_cache_utilization_metric: "llm_d_epp_average_kv_cache_utilization".to_owned(),
            queue_size_metric: "llm_d_epp_average_queue_size".to_owned(),
        }
    }
}

impl Plugin for MulticlusterMetricsExtractor {
    const TYPE: &'static str = "multicluster-metrics-extractor";
    const MATURITY: Maturity = Maturity::Alpha;
    const PARAMETERS: &'static [ParamDoc] = &[
        ParamDoc {
            name: "kvCacheUtilizationMetric",
            kind: "string",
            default: "llm_d_epp_average_kv_cache_utilization",
            help: "Series of the cluster's average KV cache use.",
        },
        ParamDoc {
            name: "queueSizeMetric",
            kind: "string",
            default: "llm_d_epp_average_queue_size",
            help: "Series of the cluster's average queue.",
        },
    ];
    const ABOUT: &'static str = "Reads the load averages of peer clusters.";

    fn build(build: &mut Build<'_>) -> Result<Self, PluginError> {
        let settings: Settings = build.read::<Self, _>()?;
        let spec = |field: &str, text: &str, default: String| {
            let text = if text.is_empty() { &default } else { text };
            text.parse::<MetricSpec>()
                .map_err(|problem| ParamError(format!("{field}: {problem}")))
        };
        let defaults = Settings::default();
        let specs = vec![
            spec(
                "kvCacheUtilizationMetric",
                &settings.kv_cache_utilization_metric,
                defaults.kv_cache_utilization_metric,
            )?,
            spec(
                "queueSizeMetric",
                &settings.queue_size_metric,
                defaults.queue_size_metric,
            )?,
        ];
        Ok(Self {
            wanted: Wanted::new(specs),
            columns: [
                build.keys.endpoint_produce_as(MULTICLUSTER_KV_CACHE, "")?,
                build.keys.endpoint_produce_as(MULTICLUSTER_QUEUE, "")?,
            ],
        })
    }
}

impl Extractor for MulticlusterMetricsExtractor {
    fn reads(&self) -> Payload {
        Payload::Exposition
    }

    fn extract(&self, endpoint: &Endpoint, body: &[u8], _: Instant) -> Extraction {
        let mut found = Findings::new();
        self.wanted.scan(body, &mut found, |_, _| {});
        let mut outcome = Extraction::default();
        for (column, found) in self.columns.iter().zip(&found) {
            let Some(mean) = found.mean() else {
                outcome.errors += 1;
                continue;
            };
            outcome.errors += found.rejected.min(1);
            outcome.refreshed = true;
            if endpoint.attribute_value(*column) != Some(mean) {
                endpoint.set_attribute(*column, Arc::new(mean));
            }
        }
        outcome
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::datalayer::extractors::test_support::{build, endpoint};
    use crate::plugin::DataKeys;

    #[test]
    fn averages_are_read_under_keys_without_producer() {
        let mut keys = DataKeys::default();
        let parameters = r#"{"queueSizeMetric": "own_queue{name=a}"}"#;
        let extractor: MulticlusterMetricsExtractor =
            build(&mut keys, "peers", parameters).unwrap();
        let kv = keys.endpoint_require(MULTICLUSTER_KV_CACHE, "").unwrap();
        let queue = keys.endpoint_require(MULTICLUSTER_QUEUE, "").unwrap();
        let endpoint = endpoint("cluster", &[]);
        let read = |text: &[u8]| {
            let outcome = extractor.extract(&endpoint, text, Instant::now());
            let value = |column| endpoint.attribute_value(column);
            (outcome.errors, value(kv), value(queue))
        };
        // Mean of two pools: (0.2 + 0.6) / 2 = 0.4.
        let text = b"llm_d_epp_average_kv_cache_utilization{name=\"a\"} 0.2\nllm_d_epp_average_kv_cache_utilization{name=\"b\"} 0.6\nown_queue{name=\"a\"} 3\nown_queue{name=\"b\"} 9\n";
        assert_eq!(read(text), (0, Some(0.4), Some(3.0)));
        assert_eq!(
            read(b"own_queue{name=\"a\"} 4\n"),
            (1, Some(0.4), Some(4.0)),
            "what is missing keeps its value"
        );
        let bad = build::<MulticlusterMetricsExtractor>(
            &mut DataKeys::default(),
            "p",
            r#"{"queueSizeMetric": "a b"}"#,
        );
        assert!(bad.unwrap_err().to_string().contains("queueSizeMetric"));
    }
}
