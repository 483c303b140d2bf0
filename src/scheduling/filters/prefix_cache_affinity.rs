//! `prefix-cache-affinity-filter`

use serde::Deserialize;

use crate::plugin::{
    Build, Column, InFlightSlot, Maturity, ParamDoc, ParamError, Plugin, PluginError,
};
use crate::scheduling::attributes::{
    APPROX_PREFIX_PRODUCER, IN_FLIGHT, IN_FLIGHT_PRODUCER, PREFIX_MATCH, PrefixMatch, producer_or,
};
use crate::scheduling::{Candidate, Candidates, Cycle, Filter};

/// Keeps the endpoints that hold most of the prefix, unless waiting for them costs too much.
///
/// Sticky endpoints match at least `affinityThreshold` of the request's blocks. They are kept alone
/// unless the best of them needs over `maxTTFTPenaltyMs` longer than the best other one, where the
/// time to first token is taken as tokens in flight / `peakPrefillThroughput`.
#[derive(Debug)]
pub struct PrefixCacheAffinityFilter {
    matches: Column<PrefixMatch>,
    /// `None` when the penalty is 0: stickiness is never broken.
    in_flight: Option<InFlightSlot>,
    threshold: f64,
    exploration: f64,
    max_penalty_ms: f64,
    tokens_per_ms: f64,
}

#[derive(Debug, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
struct Settings {
    affinity_threshold: f64,
    exploration_probability: f64,
    #[serde(rename = "maxTTFTPenaltyMs")]
    max_ttft_penalty_ms: f64,
    ttft_source: String,
    peak_prefill_throughput: f64,
    prefix_match_info_producer_name: String,
    latency_prediction_info_producer_name: String,
    in_flight_load_producer_name: String,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            affinity_threshold: 0.8,
            exploration_probability: 0.0,
            max_ttft_penalty_ms: 18_000.0,
            ttft_source: "prefillThroughput".to_owned(),
            peak_prefill_throughput: 15_928.0,
            prefix_match_info_producer_name: String::new(),
            latency_prediction_info_producer_name: String::new(),
            in_flight_load_producer_name: String::new(),
        }
    }
}

impl Settings {
    fn check(&self) -> Result<(), PluginError> {
        let refuse = |text: String| Err(PluginError::Parameter(ParamError(text)));
        if self.affinity_threshold > 1.0 {
            return refuse(format!(
                "affinityThreshold: {} is above 1",
                self.affinity_threshold
            ));
        }
        if !(0.0..=1.0).contains(&self.exploration_probability) {
            return refuse(format!(
                "explorationProbability: {} is not within 0 and 1",
                self.exploration_probability
            ));
        }
        if self.max_ttft_penalty_ms < 0.0 {
            return refuse(format!(
                "maxTTFTPenaltyMs: {} is below 0",
                self.max_ttft_penalty_ms
            ));
        }
        match self.ttft_source.as_str() {
            "prefillThroughput" if self.peak_prefill_throughput < 0.0 => refuse(format!(
                "peakPrefillThroughput: {} is below 0",
                self.peak_prefill_throughput
            )),
            "prefillThroughput"
                if self.max_ttft_penalty_ms > 0.0 && self.peak_prefill_throughput == 0.0 =>
            {
                refuse(
                    "peakPrefillThroughput: must be above 0 while maxTTFTPenaltyMs is".to_owned(),
                )
            }
            "prefillThroughput" => Ok(()),
            "latencyPredictor" => Err(PluginError::Invalid(
                "ttftSource: latencyPredictor is known but not yet available in this version"
                    .to_owned(),
            )),
            other => refuse(format!(
                "ttftSource: {other:?} is not one of prefillThroughput, latencyPredictor"
            )),
        }
    }
}

impl Plugin for PrefixCacheAffinityFilter {
    const TYPE: &'static str = "prefix-cache-affinity-filter";
    const MATURITY: Maturity = Maturity::Beta;
    const PARAMETERS: &'static [ParamDoc] = &[
        ParamDoc {
            name: "affinityThreshold",
            kind: "float",
            default: "0.80",
            help: "Share of the prompt an endpoint must hold to be sticky; 0 and less turn the filter off, at most 1.",
        },
        ParamDoc {
            name: "explorationProbability",
            kind: "float",
            default: "0",
            help: "Probability of ignoring stickiness; 0 to 1.",
        },
        ParamDoc {
            name: "maxTTFTPenaltyMs",
            kind: "float",
            default: "18000",
            help: "How much longer, in ms, the best sticky endpoint may take than the best other; 0 never breaks stickiness.",
        },
        ParamDoc {
            name: "ttftSource",
            kind: "string",
            default: "prefillThroughput",
            help: "Where the time to first token comes from: prefillThroughput or latencyPredictor.",
        },
        ParamDoc {
            name: "peakPrefillThroughput",
            kind: "float",
            default: "15928",
            help: "Prompt tokens an endpoint computes per second.",
        },
        ParamDoc {
            name: "prefixMatchInfoProducerName",
            kind: "string",
            default: "approx-prefix-cache-producer",
            help: "Instance that says how much of the prefix each endpoint holds.",
        },
        ParamDoc {
            name: "latencyPredictionInfoProducerName",
            kind: "string",
            default: "predicted-latency-producer",
            help: "Instance that predicts latencies.",
        },
        ParamDoc {
            name: "inFlightLoadProducerName",
            kind: "string",
            default: "inflight-load-producer",
            help: "Instance that counts tokens in flight.",
        },
    ];
    const ABOUT: &'static str =
        "Keeps endpoints that hold most of the prefix while that is not too slow.";

    fn build(build: &mut Build<'_>) -> Result<Self, PluginError> {
        let settings: Settings = build.read::<Self, _>()?;
        settings.check()?;
        let producer = producer_or(
            &settings.prefix_match_info_producer_name,
            APPROX_PREFIX_PRODUCER,
        );
        let matches = build.keys.require(PREFIX_MATCH, producer);
        let in_flight = if settings.max_ttft_penalty_ms > 0.0 {
            let producer = producer_or(&settings.in_flight_load_producer_name, IN_FLIGHT_PRODUCER);
            build.keys.require::<()>(IN_FLIGHT, producer);
            Some(build.keys.in_flight(producer)?)
        } else {
            None
        };
        Ok(Self {
            matches,
            in_flight,
            threshold: settings.affinity_threshold,
            exploration: settings.exploration_probability,
            max_penalty_ms: settings.max_ttft_penalty_ms,
            tokens_per_ms: settings.peak_prefill_throughput / 1000.0,
        })
    }
}

impl PrefixCacheAffinityFilter {
    /// True when the best sticky candidate is too much slower than the best other one.
    fn too_slow(&self, candidates: Candidates<'_>, sticky: impl Fn(usize) -> bool) -> bool {
        let Some(slot) = self.in_flight else {
            return false;
        };
        let ttft_ms =
            |c: &Candidate| c.endpoint.in_flight(slot).tokens() as f64 / self.tokens_per_ms;
        let mut best_sticky = f64::INFINITY;
        let mut best_other = f64::INFINITY;
        for (position, candidate) in candidates.iter() {
            let best = if sticky(position) {
                &mut best_sticky
            } else {
                &mut best_other
            };
            *best = best.min(ttft_ms(candidate));
        }
        best_other.is_finite() && best_sticky - best_other > self.max_penalty_ms
    }
}

impl Filter for PrefixCacheAffinityFilter {
    fn filter(&self, cycle: &Cycle<'_>, candidates: Candidates<'_>, keep: &mut Vec<u32>) {
        let matches = cycle.attributes.get(self.matches).unwrap_or_default();
        let sticky = |position: usize| {
            matches
                .get(position)
                .is_some_and(|m| m.ratio() >= self.threshold)
        };
        let off = self.threshold <= 0.0 || candidates.len() <= 1;
        let explore = || self.exploration > 0.0 && cycle.rng.borrow_mut().f64() < self.exploration;
        if off
            || explore()
            || !candidates.iter().any(|(p, _)| sticky(p))
            || self.too_slow(candidates, sticky)
        {
            super::keep_all(candidates, keep);
        } else {
            super::keep_where(candidates, keep, |position, _| sticky(position));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scheduling::test_support::{Pool, endpoint};

    fn pool(sticky_tokens: i64, other_tokens: i64) -> Pool {
        Pool::new([
            endpoint("warm")
                .matched_blocks(8)
                .in_flight(1, sticky_tokens),
            endpoint("luke").matched_blocks(7),
            endpoint("cold").in_flight(1, other_tokens),
        ])
    }

    #[test]
    fn endpoints_at_the_threshold_stay_alone() {
        // 8 of 10 blocks are 0.8, the default threshold.
        let mut pool = pool(0, 0);
        let filter: PrefixCacheAffinityFilter = pool.plugin("{}");
        assert_eq!(pool.kept(&filter), ["warm"]);
        let filter: PrefixCacheAffinityFilter = pool.plugin(r#"{"affinityThreshold": 0.9}"#);
        assert_eq!(pool.kept(&filter).len(), 3, "nobody is sticky");
        let filter: PrefixCacheAffinityFilter = pool.plugin(r#"{"affinityThreshold": 0}"#);
        assert_eq!(pool.kept(&filter).len(), 3, "off");
    }

    #[test]
    fn stickiness_breaks_when_it_costs_more_than_the_penalty() {
        // 20000 tokens at 1000 tokens/s are 20 s; the best other (luke) needs 0 s.
        let settings = r#"{"peakPrefillThroughput": 1000, "maxTTFTPenaltyMs": 19999}"#;
        let mut busy = pool(20_000, 0);
        let filter: PrefixCacheAffinityFilter = busy.plugin(settings);
        assert_eq!(busy.kept(&filter).len(), 3);
        let mut fine = pool(19_999, 0);
        let filter: PrefixCacheAffinityFilter = fine.plugin(settings);
        assert_eq!(fine.kept(&filter), ["warm"]);
        let mut never = pool(1 << 40, 0);
        let filter: PrefixCacheAffinityFilter = never.plugin(r#"{"maxTTFTPenaltyMs": 0}"#);
        assert_eq!(never.kept(&filter), ["warm"]);
    }

    #[test]
    fn exploration_ignores_stickiness() {
        let mut pool = pool(0, 0);
        let filter: PrefixCacheAffinityFilter = pool.plugin(r#"{"explorationProbability": 1}"#);
        assert_eq!(pool.kept(&filter).len(), 3);
    }
}
