//! `kv-cache-utilization-scorer`

use crate::plugin::{Build, Maturity, ParamDoc, Plugin, PluginError};
use crate::scheduling::{Candidates, Cycle, Scorer};

/// Prefers endpoints whose running requests hold less of the KV cache.
///
/// Score: `1 - usage`. An endpoint never scraped is unknown, not empty: beside scraped ones it gets 0.
/// Input: `kv_cache_usage`, scraped. Cost: O(candidates), no allocation.
#[derive(Debug, Default)]
pub struct KvCacheUtilizationScorer;

impl Plugin for KvCacheUtilizationScorer {
    const TYPE: &'static str = "kv-cache-utilization-scorer";
    const MATURITY: Maturity = Maturity::Beta;
    const PARAMETERS: &'static [ParamDoc] = &[];
    const LENIENT: bool = true;
    const ABOUT: &'static str = "Prefers endpoints with more free KV cache.";

    fn build(build: &mut Build<'_>) -> Result<Self, PluginError> {
        super::require_core_metric(build, "KVCacheUsagePercent");
        Ok(Self)
    }
}

impl Scorer for KvCacheUtilizationScorer {
    fn score(&self, _: &Cycle<'_>, candidates: Candidates<'_>, scores: &mut [f64]) {
        let any_known = candidates
            .iter()
            .any(|(_, c)| c.metrics.updated_at.is_some());
        for (score, (_, candidate)) in scores.iter_mut().zip(candidates.iter()) {
            let unknown = any_known && candidate.metrics.updated_at.is_none();
            *score = if unknown {
                0.0
            } else {
                1.0 - candidate.metrics.kv_cache_usage
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scheduling::test_support::{Pool, endpoint};

    #[test]
    fn the_score_is_the_free_share() {
        let pool = Pool::new([
            endpoint("a").kv(0.25),
            endpoint("b").kv(1.0),
            endpoint("c"),
            endpoint("d").unscraped(),
        ]);
        assert_eq!(
            pool.scores(&KvCacheUtilizationScorer),
            [0.75, 0.0, 1.0, 0.0]
        );
    }
}
