//! `active-request-scorer`

use serde::Deserialize;

use crate::plugin::{Build, InFlightSlot, Maturity, ParamDoc, Plugin, PluginError};
use crate::scheduling::attributes::{IN_FLIGHT, IN_FLIGHT_PRODUCER, producer_or};
use crate::scheduling::{Candidates, Cycle, Scorer};

/// Prefers endpoints with fewer requests of ours in flight.
///
/// Score: 1 for `n <= idleThreshold`, else `(max - n) / max * maxBusyScore` with `max` over this
/// request's candidates. Input: live counters, exact to the last pick.
#[derive(Debug)]
pub struct ActiveRequestScorer {
    slot: InFlightSlot,
    idle_threshold: i64,
    max_busy_score: f64,
}

#[derive(Debug, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
struct Settings {
    idle_threshold: i64,
    max_busy_score: f64,
    request_timeout: serde_json::Value,
    in_flight_load_producer_name: String,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            idle_threshold: 0,
            max_busy_score: 1.0,
            request_timeout: serde_json::Value::Null,
            in_flight_load_producer_name: String::new(),
        }
    }
}

impl Plugin for ActiveRequestScorer {
    const TYPE: &'static str = "active-request-scorer";
    const MATURITY: Maturity = Maturity::Beta;
    const PARAMETERS: &'static [ParamDoc] = &[
        ParamDoc {
            name: "idleThreshold",
            kind: "int",
            default: "0",
            help: "Requests in flight up to which an endpoint counts as idle; negative values are ignored.",
        },
        ParamDoc {
            name: "maxBusyScore",
            kind: "float",
            default: "1.0",
            help: "Upper end of the score of busy endpoints; values outside 0 to 1 are ignored.",
        },
        ParamDoc {
            name: "requestTimeout",
            kind: "duration",
            default: "",
            help: "Accepted and ignored.",
        },
        ParamDoc {
            name: "inFlightLoadProducerName",
            kind: "string",
            default: "inflight-load-producer",
            help: "Instance that counts requests in flight.",
        },
    ];
    const ABOUT: &'static str = "Prefers endpoints with fewer requests in flight, live.";

    fn build(build: &mut Build<'_>) -> Result<Self, PluginError> {
        let settings: Settings = build.read::<Self, _>()?;
        let producer = producer_or(&settings.in_flight_load_producer_name, IN_FLIGHT_PRODUCER);
        build.keys.require::<()>(IN_FLIGHT, producer);
        Ok(Self {
            slot: build.keys.in_flight(producer)?,
            idle_threshold: settings.idle_threshold.max(0),
            max_busy_score: Some(settings.max_busy_score)
                .filter(|s| (0.0..=1.0).contains(s))
                .unwrap_or(1.0),
        })
    }
}

impl Scorer for ActiveRequestScorer {
    fn score(&self, _: &Cycle<'_>, candidates: Candidates<'_>, scores: &mut [f64]) {
        // Counters move while we read: take each once.
        for (score, (_, candidate)) in scores.iter_mut().zip(candidates.iter()) {
            *score = candidate.endpoint.in_flight(self.slot).requests() as f64;
        }
        let max = scores.iter().copied().fold(0.0, f64::max);
        for score in scores.iter_mut() {
            let requests = *score;
            let idle = requests <= self.idle_threshold as f64 || max <= 0.0;
            *score = if idle {
                1.0
            } else {
                (max - requests) / max * self.max_busy_score
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scheduling::test_support::{Pool, endpoint};

    #[test]
    fn fewer_requests_score_higher() {
        let mut pool = Pool::new([0, 2, 8].map(|n| endpoint("e").in_flight(n, 0)));
        let scorer: ActiveRequestScorer = pool.plugin("{}");
        // (8 - 2) / 8 = 0.75; (8 - 8) / 8 = 0.
        assert_eq!(pool.scores(&scorer), [1.0, 0.75, 0.0]);
        let scorer: ActiveRequestScorer =
            pool.plugin(r#"{"idleThreshold": 2, "maxBusyScore": 0.5}"#);
        assert_eq!(pool.scores(&scorer), [1.0, 1.0, 0.0]);
        let scorer: ActiveRequestScorer =
            pool.plugin(r#"{"maxBusyScore": 0.5, "requestTimeout": "2m"}"#);
        assert_eq!(pool.scores(&scorer), [1.0, 0.375, 0.0]);
    }

    #[test]
    fn an_idle_pool_is_neutral() {
        let mut pool = Pool::new([endpoint("a"), endpoint("b")]);
        let scorer: ActiveRequestScorer = pool.plugin("{}");
        assert_eq!(pool.scores(&scorer), [1.0, 1.0]);
    }
}
