//! Extractors: what a fetched body, or an endpoint's own description, says about the endpoint.

pub mod core_metrics;
mod dcgm;
mod models;
mod multicluster_metrics;
mod topology;

use std::fmt::Debug;

use tokio::time::Instant;

pub use core_metrics::CoreMetricsExtractor;
pub use dcgm::{DcgmExtractor, GPU_UTILIZATION};
pub use models::{MODELS, MODELS_PRODUCER, ModelEntry, ModelsDataExtractor};
pub use multicluster_metrics::{
    MULTICLUSTER_KV_CACHE, MULTICLUSTER_QUEUE, MulticlusterMetricsExtractor,
};
pub use topology::{TOPOLOGY, Topology, TopologyExtractor};

use super::Endpoint;
use super::sources::Payload;

/// Reads bodies that a polling source fetched. One body is handed to every extractor of its source.
pub trait Extractor: Send + Sync + Debug {
    /// What it can read.
    fn reads(&self) -> Payload;

    /// Reads `body`, fetched from `endpoint` and complete at `now`, into the endpoint's metrics or
    /// attributes. What the body does not say keeps its last value.
    fn extract(&self, endpoint: &Endpoint, body: &[u8], now: Instant) -> Extraction;
}

/// What one reading came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Extraction {
    /// Things that should have been there and were not, or cannot be true. Any counts as one error
    /// of the extractor.
    pub errors: u32,
    /// Something was refreshed.
    pub refreshed: bool,
}

/// Builders for tests of extractors.
#[cfg(test)]
pub(crate) mod test_support {
    use crate::datalayer::{Endpoint, EndpointDetails, EndpointIndex, EndpointSpec};
    use crate::plugin::{Build, DataKeys, Parameters, Plugin, PluginError};

    /// `P` called `name`, from JSON parameters.
    pub(crate) fn build<P: Plugin>(
        keys: &mut DataKeys,
        name: &str,
        parameters: &str,
    ) -> Result<P, PluginError> {
        keys.enter(name);
        P::build(&mut Build {
            name,
            parameters: &Parameters(Some(serde_json::from_str(parameters).unwrap())),
            keys,
        })
    }

    /// An endpoint of that name with these labels.
    pub(crate) fn endpoint(name: &str, labels: &[(&str, &str)]) -> Endpoint {
        let own = |(k, v): &(&str, &str)| ((*k).to_owned(), (*v).to_owned());
        let spec = EndpointSpec {
            name: name.to_owned(),
            namespace: "default".to_owned(),
            address: ([10, 0, 0, 1], 8000).into(),
            labels: labels.iter().map(own).collect(),
            rank: 0,
            details: EndpointDetails::default(),
        };
        Endpoint::new(spec, EndpointIndex(0))
    }
}
