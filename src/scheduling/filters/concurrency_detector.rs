//! `concurrency-detector`: how full the pool is by what we sent to it, and a filter over the same
//! limits.

use serde::Deserialize;
use tokio::time::Instant;

use crate::plugin::{Build, InFlightSlot, Maturity, ParamDoc, ParamError, Plugin, PluginError};
use crate::scheduling::attributes::{IN_FLIGHT, IN_FLIGHT_PRODUCER, producer_or};
use crate::scheduling::{Candidate, Candidates, Cycle, Filter, SaturationDetector};

/// Saturation: requests (or tokens) in flight by the pool's capacity of `maxConcurrency` (or
/// `maxTokenConcurrency`) for each endpoint; `hybrid` is the mean of each endpoint's larger share. An
/// empty pool is 1. Not clamped. As a filter it keeps endpoints below the limit widened by `headroom`,
/// possibly none. Input: live counters, so nothing can be stale.
#[derive(Debug)]
pub struct ConcurrencyDetector {
    slot: InFlightSlot,
    mode: Mode,
    max_requests: i64,
    max_tokens: i64,
    headroom: f64,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Mode {
    #[default]
    Requests,
    Tokens,
    Hybrid,
}

#[derive(Debug, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
struct Settings {
    concurrency_mode: Mode,
    max_concurrency: i64,
    max_token_concurrency: i64,
    headroom: f64,
    in_flight_load_producer_name: String,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            concurrency_mode: Mode::Requests,
            max_concurrency: 100,
            max_token_concurrency: 1_000_000,
            headroom: 0.0,
            in_flight_load_producer_name: String::new(),
        }
    }
}

impl Settings {
    fn check(&self) -> Result<(), ParamError> {
        let limits = [
            ("maxConcurrency", self.max_concurrency),
            ("maxTokenConcurrency", self.max_token_concurrency),
        ];
        for (name, limit) in limits {
            if limit <= 0 {
                return Err(ParamError(format!("{name}: {limit} is not above 0")));
            }
        }
        if self.headroom < 0.0 {
            return Err(ParamError(format!(
                "headroom: {} is below 0",
                self.headroom
            )));
        }
        Ok(())
    }
}

impl Plugin for ConcurrencyDetector {
    const TYPE: &'static str = "concurrency-detector";
    const MATURITY: Maturity = Maturity::Beta;
    const PARAMETERS: &'static [ParamDoc] = &[
        ParamDoc {
            name: "concurrencyMode",
            kind: "string",
            default: "requests",
            help: "What counts: requests, tokens, or hybrid for the fuller of both.",
        },
        ParamDoc {
            name: "maxConcurrency",
            kind: "int",
            default: "100",
            help: "Requests in flight at which an endpoint is full; above 0.",
        },
        ParamDoc {
            name: "maxTokenConcurrency",
            kind: "int",
            default: "1000000",
            help: "Tokens in flight at which an endpoint is full; above 0.",
        },
        ParamDoc {
            name: "headroom",
            kind: "float",
            default: "0",
            help: "Share by which the filter exceeds the limits; at least 0.",
        },
        ParamDoc {
            name: "inFlightLoadProducerName",
            kind: "string",
            default: "inflight-load-producer",
            help: "Instance that counts what is in flight.",
        },
    ];
    const ABOUT: &'static str =
        "Measures pool saturation by requests and tokens in flight; also a filter.";

    fn build(build: &mut Build<'_>) -> Result<Self, PluginError> {
        let settings: Settings = build.read::<Self, _>()?;
        settings.check()?;
        let producer = producer_or(&settings.in_flight_load_producer_name, IN_FLIGHT_PRODUCER);
        build.keys.require::<()>(IN_FLIGHT, producer);
        Ok(Self {
            slot: build.keys.in_flight(producer)?,
            mode: settings.concurrency_mode,
            max_requests: settings.max_concurrency,
            max_tokens: settings.max_token_concurrency,
            headroom: settings.headroom,
        })
    }
}

impl ConcurrencyDetector {
    /// Shares of the request and token capacity in use.
    fn shares(&self, candidate: &Candidate) -> (f64, f64) {
        let load = candidate.endpoint.in_flight(self.slot);
        (
            load.requests() as f64 / self.max_requests as f64,
            load.tokens() as f64 / self.max_tokens as f64,
        )
    }

    /// `limit` with the headroom, rounded down to a whole number.
    fn widened(&self, limit: i64) -> f64 {
        (limit as f64 * (1.0 + self.headroom)).floor()
    }
}

impl SaturationDetector for ConcurrencyDetector {
    fn saturation(&self, candidates: &[Candidate], _: Instant) -> f64 {
        if candidates.is_empty() {
            return 1.0;
        }
        // All endpoints have the same capacity, so the pool's share is the mean of theirs.
        let load = |candidate: &Candidate| {
            let (requests, tokens) = self.shares(candidate);
            match self.mode {
                Mode::Requests => requests,
                Mode::Tokens => tokens,
                Mode::Hybrid => requests.max(tokens),
            }
        };
        candidates.iter().map(load).sum::<f64>() / candidates.len() as f64
    }
}

impl Filter for ConcurrencyDetector {
    fn filter(&self, _: &Cycle<'_>, candidates: Candidates<'_>, keep: &mut Vec<u32>) {
        let max_requests = self.widened(self.max_requests);
        let max_tokens = self.widened(self.max_tokens);
        super::keep_where(candidates, keep, |_, candidate| {
            let load = candidate.endpoint.in_flight(self.slot);
            let requests_fit = (load.requests() as f64) < max_requests;
            let tokens_fit = (load.tokens() as f64) < max_tokens;
            match self.mode {
                Mode::Requests => requests_fit,
                Mode::Tokens => tokens_fit,
                Mode::Hybrid => requests_fit && tokens_fit,
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scheduling::test_support::{Pool, endpoint, refusal};

    fn pool() -> Pool {
        Pool::new([
            endpoint("a").in_flight(5, 100),
            endpoint("b").in_flight(10, 0),
            endpoint("c").in_flight(0, 500),
        ])
    }

    fn detector(pool: &mut Pool, mode: &str, headroom: f64) -> ConcurrencyDetector {
        pool.plugin(&format!(
            r#"{{"concurrencyMode": "{mode}", "maxConcurrency": 10, "maxTokenConcurrency": 400, "headroom": {headroom}}}"#
        ))
    }

    #[test]
    fn saturation_is_the_load_by_the_capacity() {
        for (mode, wanted) in [
            // (5 + 10 + 0) / (3 * 10).
            ("requests", 0.5),
            // (100 + 0 + 500) / (3 * 400).
            ("tokens", 0.5),
            // max(0.5, 0.25), max(1, 0), max(0, 1.25): 2.75 / 3.
            ("hybrid", 2.75 / 3.0),
        ] {
            let mut pool = pool();
            let detector = detector(&mut pool, mode, 0.0);
            let saturation = pool.with_cycle(|cycle, all| detector.saturation(all, cycle.now));
            assert!((saturation - wanted).abs() < 1e-12, "{mode}: {saturation}");
            assert_eq!(detector.saturation(&[], Instant::now()), 1.0);
        }
    }

    #[test]
    fn the_filter_keeps_what_is_below_the_widened_limit() {
        for (mode, headroom, kept) in [
            ("requests", 0.0, &["a", "c"][..]),
            // floor(10 * 1.05) is still 10.
            ("requests", 0.05, &["a", "c"]),
            ("requests", 0.1, &["a", "b", "c"]),
            ("tokens", 0.0, &["a", "b"]),
            ("hybrid", 0.0, &["a"]),
        ] {
            let mut pool = pool();
            let detector = detector(&mut pool, mode, headroom);
            assert_eq!(pool.kept(&detector), kept, "{mode} {headroom}");
        }
        let mut full = Pool::new([endpoint("a").in_flight(100, 0)]);
        let detector: ConcurrencyDetector = full.plugin("{}");
        assert!(full.kept(&detector).is_empty(), "no fallback");
    }

    #[test]
    fn limits_are_checked() {
        for (parameters, wanted) in [
            (
                r#"{"maxConcurrency": 0}"#,
                "maxConcurrency: 0 is not above 0",
            ),
            (
                r#"{"maxTokenConcurrency": -1}"#,
                "maxTokenConcurrency: -1 is not above 0",
            ),
            (r#"{"headroom": -0.5}"#, "headroom: -0.5 is below 0"),
            (r#"{"concurrencyMode": "x"}"#, "unknown variant `x`"),
        ] {
            let text = refusal::<ConcurrencyDetector>(parameters);
            assert!(text.contains(wanted), "{text}");
        }
    }
}
