//! `token-load-scorer`

use serde::Deserialize;

use crate::plugin::{Build, Column, InFlightSlot, Maturity, ParamDoc, Plugin, PluginError};
use crate::scheduling::attributes::{IN_FLIGHT, IN_FLIGHT_PRODUCER, UNCACHED_TOKENS, producer_or};
use crate::scheduling::{Candidates, Cycle, Scorer};

/// Tokens at which an endpoint counts as full.
const DEFAULT_THRESHOLD_TOKENS: f64 = 4_194_304.0;

/// Prefers endpoints with less prompt work in flight, this request's own uncached part included.
///
/// Score: `1 - min(t, threshold) / threshold` with `t` = tokens in flight + uncached tokens of this
/// request there. Input: live counters and the uncached-tokens column.
#[derive(Debug)]
pub struct TokenLoadScorer {
    slot: InFlightSlot,
    uncached: Column<u64>,
    threshold_tokens: f64,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
struct Settings {
    queue_threshold_tokens: f64,
    in_flight_load_producer_name: String,
}

impl Plugin for TokenLoadScorer {
    const TYPE: &'static str = "token-load-scorer";
    const MATURITY: Maturity = Maturity::Beta;
    const PARAMETERS: &'static [ParamDoc] = &[
        ParamDoc {
            name: "queueThresholdTokens",
            kind: "int",
            default: "4194304",
            help: "Tokens in flight at which the score reaches 0; 0 and less mean the default.",
        },
        ParamDoc {
            name: "inFlightLoadProducerName",
            kind: "string",
            default: "inflight-load-producer",
            help: "Instance that counts tokens in flight.",
        },
    ];
    const ABOUT: &'static str = "Prefers endpoints with less uncached prompt work in flight, live.";

    fn build(build: &mut Build<'_>) -> Result<Self, PluginError> {
        let settings: Settings = build.read::<Self, _>()?;
        let producer = producer_or(&settings.in_flight_load_producer_name, IN_FLIGHT_PRODUCER);
        build.keys.require::<()>(IN_FLIGHT, producer);
        let threshold = settings.queue_threshold_tokens;
        Ok(Self {
            slot: build.keys.in_flight(producer)?,
            uncached: build.keys.require(UNCACHED_TOKENS, producer),
            threshold_tokens: if threshold > 0.0 {
                threshold
            } else {
                DEFAULT_THRESHOLD_TOKENS
            },
        })
    }
}

impl Scorer for TokenLoadScorer {
    fn score(&self, cycle: &Cycle<'_>, candidates: Candidates<'_>, scores: &mut [f64]) {
        let uncached = cycle.attributes.get(self.uncached).unwrap_or_default();
        for (score, (position, candidate)) in scores.iter_mut().zip(candidates.iter()) {
            let own = uncached.get(position).copied().unwrap_or(0);
            let tokens = candidate.endpoint.in_flight(self.slot).tokens() as f64 + own as f64;
            *score = 1.0 - tokens.min(self.threshold_tokens) / self.threshold_tokens;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scheduling::test_support::{Pool, endpoint};

    #[test]
    fn booked_and_own_tokens_count_against_the_threshold() {
        let mut pool = Pool::new([
            endpoint("idle"),
            endpoint("half").in_flight(1, 300).uncached(200),
            endpoint("full").in_flight(9, 5000),
        ]);
        let scorer: TokenLoadScorer = pool.plugin(r#"{"queueThresholdTokens": 1000}"#);
        // 1 - (300 + 200) / 1000 = 0.5.
        assert_eq!(pool.scores(&scorer), [1.0, 0.5, 0.0]);
    }
}
