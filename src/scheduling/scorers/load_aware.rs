//! `load-aware-scorer`

use serde::Deserialize;

use crate::plugin::{Build, Maturity, ParamDoc, Plugin, PluginError};
use crate::scheduling::{Candidates, Cycle, Scorer};

/// Requests at which an endpoint counts as full.
const DEFAULT_THRESHOLD: f64 = 128.0;

/// Prefers short queues on an absolute scale.
///
/// Score: `0.5 * (1 - min(x, threshold) / threshold)`; an empty queue gives 0.5.
#[derive(Debug)]
pub struct LoadAwareScorer {
    threshold: f64,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
struct Settings {
    threshold: f64,
}

impl Plugin for LoadAwareScorer {
    const TYPE: &'static str = "load-aware-scorer";
    const MATURITY: Maturity = Maturity::Beta;
    const PARAMETERS: &'static [ParamDoc] = &[ParamDoc {
        name: "threshold",
        kind: "int",
        default: "128",
        help: "Waiting requests at which the score reaches 0; 0 and less mean the default.",
    }];
    const ABOUT: &'static str = "Prefers short queues on an absolute scale.";

    fn build(build: &mut Build<'_>) -> Result<Self, PluginError> {
        super::require_core_metric(build, "WaitingQueueSize");
        let settings: Settings = build.read::<Self, _>()?;
        Ok(Self {
            threshold: if settings.threshold > 0.0 {
                settings.threshold
            } else {
                DEFAULT_THRESHOLD
            },
        })
    }
}

impl Scorer for LoadAwareScorer {
    fn score(&self, _: &Cycle<'_>, candidates: Candidates<'_>, scores: &mut [f64]) {
        for (score, (_, candidate)) in scores.iter_mut().zip(candidates.iter()) {
            let waiting = f64::from(candidate.metrics.waiting_requests);
            *score = 0.5 * (1.0 - waiting.min(self.threshold) / self.threshold);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scheduling::test_support::{Pool, endpoint};

    #[test]
    fn half_a_point_falls_to_zero_at_the_threshold() {
        let mut pool = Pool::new([0, 64, 128, 500].map(|n| endpoint("e").waiting(n)));
        let scorer: LoadAwareScorer = pool.plugin("{}");
        // 0.5 * (1 - 64/128) = 0.25.
        assert_eq!(pool.scores(&scorer), [0.5, 0.25, 0.0, 0.0]);
        let scorer: LoadAwareScorer = pool.plugin(r#"{"threshold": 256}"#);
        // 0.5 * (1 - 128/256) = 0.25.
        assert_eq!(pool.scores(&scorer), [0.5, 0.375, 0.25, 0.0]);
    }
}
