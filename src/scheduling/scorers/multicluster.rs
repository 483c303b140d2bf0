//! `multicluster-queue-scorer` and `multicluster-kv-cache-utilization-scorer`: the load scorers over
//! whole clusters.

use crate::datalayer::extractors::{MULTICLUSTER_KV_CACHE, MULTICLUSTER_QUEUE};
use crate::plugin::{Build, EndpointColumn, Maturity, ParamDoc, Plugin, PluginError};
use crate::scheduling::{Candidates, Cycle, Scorer};

/// Prefers clusters with shorter mean queues.
///
/// Score: `(max - x) / (max - min)` over the candidates whose value is known; 1 for all of them when
/// equal, 0 for the others. Input: what `multicluster-metrics-extractor` keeps on endpoints.
#[derive(Debug)]
pub struct MulticlusterQueueScorer {
    queue_size: EndpointColumn<f64>,
}

impl Plugin for MulticlusterQueueScorer {
    const TYPE: &'static str = "multicluster-queue-scorer";
    const MATURITY: Maturity = Maturity::Alpha;
    const PARAMETERS: &'static [ParamDoc] = &[];
    const LENIENT: bool = true;
    const ABOUT: &'static str = "Prefers clusters with shorter mean queues.";

    fn build(build: &mut Build<'_>) -> Result<Self, PluginError> {
        Ok(Self {
            queue_size: build.keys.endpoint_require(MULTICLUSTER_QUEUE, "")?,
        })
    }
}

impl Scorer for MulticlusterQueueScorer {
    fn score(&self, _: &Cycle<'_>, candidates: Candidates<'_>, scores: &mut [f64]) {
        super::linear(candidates, scores, None, true, |candidate| {
            candidate.endpoint.attribute_value(self.queue_size)
        });
    }
}

/// Prefers clusters with more free KV cache.
///
/// Score: `1 - x`; 0 where the value is unknown. Input: what `multicluster-metrics-extractor` keeps on
/// endpoints.
#[derive(Debug)]
pub struct MulticlusterKvCacheUtilizationScorer {
    usage: EndpointColumn<f64>,
}

impl Plugin for MulticlusterKvCacheUtilizationScorer {
    const TYPE: &'static str = "multicluster-kv-cache-utilization-scorer";
    const MATURITY: Maturity = Maturity::Alpha;
    const PARAMETERS: &'static [ParamDoc] = &[];
    const LENIENT: bool = true;
    const ABOUT: &'static str = "Prefers clusters with more free KV cache.";

    fn build(build: &mut Build<'_>) -> Result<Self, PluginError> {
        Ok(Self {
            usage: build.keys.endpoint_require(MULTICLUSTER_KV_CACHE, "")?,
        })
    }
}

impl Scorer for MulticlusterKvCacheUtilizationScorer {
    fn score(&self, _: &Cycle<'_>, candidates: Candidates<'_>, scores: &mut [f64]) {
        for (score, (_, candidate)) in scores.iter_mut().zip(candidates.iter()) {
            let usage = candidate.endpoint.attribute_value(self.usage);
            *score = usage.map_or(0.0, |usage| 1.0 - usage);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::scheduling::test_support::{Pool, endpoint};

    /// Three clusters; the last one has not reported.
    fn pool(column: EndpointColumn<f64>, values: [f64; 2], pool: &Pool) {
        for (candidate, value) in pool.candidates.iter().zip(values) {
            candidate.endpoint.set_attribute(column, Arc::new(value));
        }
    }

    #[test]
    fn a_cluster_that_did_not_report_scores_nothing() {
        let mut clusters = Pool::new(["a", "b", "c"].map(endpoint));
        let queue: MulticlusterQueueScorer = clusters.plugin("{}");
        let kv: MulticlusterKvCacheUtilizationScorer = clusters.plugin("{}");
        assert_eq!(clusters.scores(&queue), [0.0; 3], "nothing is known");
        pool(queue.queue_size, [1.5, 4.0], &clusters);
        pool(kv.usage, [0.25, 1.0], &clusters);
        // (4 - 1.5) / (4 - 1.5) and 0 / 2.5.
        assert_eq!(clusters.scores(&queue), [1.0, 0.0, 0.0]);
        assert_eq!(clusters.scores(&kv), [0.75, 0.0, 0.0]);
        pool(queue.queue_size, [4.0, 4.0], &clusters);
        assert_eq!(clusters.scores(&queue), [1.0, 1.0, 0.0]);
    }
}
