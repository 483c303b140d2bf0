//! `dcgm-extractor`

use std::sync::Arc;

use tokio::time::Instant;

use super::{Extraction, Extractor};
use crate::datalayer::Endpoint;
use crate::datalayer::scrape::exposition::{Findings, MetricSpec, Wanted};
use crate::datalayer::sources::Payload;
use crate::plugin::{Build, EndpointColumn, Maturity, ParamDoc, Plugin, PluginError};

/// Attribute that is published: busy share of the busiest GPU, `0..=1`.
pub const GPU_UTILIZATION: &str = "GPUUtilization";
const FAMILY: &str = "DCGM_FI_DEV_GPU_UTIL";

/// Reads how busy the endpoint's GPUs are: the maximum over the series of its pod, in percent there.
///
/// A node's exporter serves all its pods and labels their series with `pod`; a series without that
/// label comes from an exporter of the endpoint's own.
#[derive(Debug)]
pub struct DcgmExtractor {
    wanted: Wanted,
    column: EndpointColumn<f64>,
}

impl Plugin for DcgmExtractor {
    const TYPE: &'static str = "dcgm-extractor";
    const MATURITY: Maturity = Maturity::Alpha;
    const PARAMETERS: &'static [ParamDoc] = &[];
    const LENIENT: bool = true;
    const ABOUT: &'static str = "Reads GPU utilization from a DCGM exporter.";

    fn build(build: &mut Build<'_>) -> Result<Self, PluginError> {
        let spec: MetricSpec = FAMILY.parse().map_err(PluginError::Invalid)?;
        Ok(Self {
            wanted: Wanted::new(vec![spec]),
            // Under the type's name whatever the instance is called, as the reference does.
            column: build
                .keys
                .endpoint_produce_as(GPU_UTILIZATION, Self::TYPE)?,
        })
    }
}

impl Extractor for DcgmExtractor {
    fn reads(&self) -> Payload {
        Payload::Exposition
    }

    fn extract(&self, endpoint: &Endpoint, body: &[u8], _: Instant) -> Extraction {
        let pod = endpoint.spec.pod_name().as_bytes();
        let mut busiest: Option<f64> = None;
        let mut found = Findings::new();
        self.wanted.scan(body, &mut found, |_, sample| {
            if sample.label("pod").is_none_or(|own| own == pod) {
                busiest = Some(busiest.map_or(sample.value, |b| b.max(sample.value)));
            }
        });
        let rejected = found.iter().any(|f| f.rejected > 0);
        let Some(percent) = busiest else {
            return Extraction {
                errors: 1,
                refreshed: false,
            };
        };
        let share = (percent / 100.0).min(1.0);
        if endpoint.attribute_value(self.column) != Some(share) {
            endpoint.set_attribute(self.column, Arc::new(share));
        }
        Extraction {
            errors: u32::from(rejected),
            refreshed: true,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::datalayer::extractors::test_support::{build, endpoint};
    use crate::plugin::DataKeys;

    #[test]
    fn the_busiest_gpu_of_the_pod_counts() {
        let mut keys = DataKeys::default();
        let extractor: DcgmExtractor = build(&mut keys, "gpu", "{}").unwrap();
        let column = keys
            .endpoint_require::<f64>("GPUUtilization", "dcgm-extractor")
            .unwrap();
        let endpoint = endpoint("vllm-0-rank-0", &[]);
        let read = |text: &str| {
            let outcome = extractor.extract(&endpoint, text.as_bytes(), Instant::now());
            (outcome.errors, endpoint.attribute_value(column))
        };
        let series = |pod: &str, value: &str| {
            format!("DCGM_FI_DEV_GPU_UTIL{{gpu=\"0\",pod=\"{pod}\"}} {value}\n")
        };
        let node = series("vllm-0", "35") + &series("vllm-0", "80") + &series("vllm-1", "95");
        assert_eq!(read(&node), (0, Some(0.8)));
        assert_eq!(read("DCGM_FI_DEV_GPU_UTIL{gpu=\"0\"} 20\n"), (0, Some(0.2)));
        assert_eq!(read(&series("vllm-1", "95")), (1, Some(0.2)), "not ours");
        assert_eq!(read("other 1\n"), (1, Some(0.2)));
        let lying = series("vllm-0", "250") + &series("vllm-0", "NaN");
        assert_eq!(read(&lying), (1, Some(1.0)));
    }
}
