//! `lora-affinity-scorer`

use crate::plugin::{Build, Maturity, ParamDoc, Plugin, PluginError};
use crate::scheduling::{Candidates, Cycle, Scorer};

/// Prefers endpoints where the request's adapter is loaded, then those with room for it.
///
/// Score: active 1.0; else room left (`active + waiting < max`) 0.8; else waiting 0.6; else 0.
/// Input: the LoRA series of the last scrape. Ignores parameters.
#[derive(Debug, Default)]
pub struct LoraAffinityScorer;

impl Plugin for LoraAffinityScorer {
    const TYPE: &'static str = "lora-affinity-scorer";
    const MATURITY: Maturity = Maturity::Beta;
    const PARAMETERS: &'static [ParamDoc] = &[];
    const LENIENT: bool = true;
    const ABOUT: &'static str = "Prefers endpoints that have the LoRA adapter loaded.";

    fn build(build: &mut Build<'_>) -> Result<Self, PluginError> {
        super::require_core_metric(build, "ActiveModels");
        super::require_core_metric(build, "WaitingModels");
        Ok(Self)
    }
}

impl Scorer for LoraAffinityScorer {
    fn score(&self, cycle: &Cycle<'_>, candidates: Candidates<'_>, scores: &mut [f64]) {
        let model = &cycle.request.target_model;
        for (score, (_, candidate)) in scores.iter_mut().zip(candidates.iter()) {
            let Some(lora) = &candidate.metrics.lora else {
                continue;
            };
            *score = if lora.active.contains(model) {
                1.0
            } else if lora.active.len() + lora.waiting.len() < lora.max_active as usize {
                0.8
            } else if lora.waiting.contains(model) {
                0.6
            } else {
                0.0
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scheduling::test_support::{Pool, endpoint};

    #[test]
    fn loaded_beats_room_beats_waiting_beats_full() {
        let mut pool = Pool::new([
            endpoint("active").lora(&["x"], &[], 1),
            endpoint("room").lora(&["y"], &[], 2),
            endpoint("waiting").lora(&["y"], &["x"], 2),
            endpoint("full").lora(&["y"], &["z"], 2),
            endpoint("none"),
        ]);
        pool.request.target_model = "x".to_owned();
        assert_eq!(pool.scores(&LoraAffinityScorer), [1.0, 0.8, 0.6, 0.0, 0.0]);
    }
}
