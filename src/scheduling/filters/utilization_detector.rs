//! `utilization-detector`: how full the pool is, and a filter over the same thresholds.

use std::time::Duration;

use serde::Deserialize;
use tokio::time::Instant;

use crate::plugin::duration::GoDuration;
use crate::plugin::{Build, Maturity, ParamDoc, ParamError, Plugin, PluginError};
use crate::scheduling::{Candidate, Candidates, Cycle, Filter, SaturationDetector};

/// Saturation: mean over endpoints of `max(waiting / queueDepthThreshold, usage /
/// kvCacheUtilThreshold)`; an endpoint with stale or no metrics counts 1, an empty pool is 1. Not
/// clamped. As a filter it keeps fresh endpoints below both thresholds (widened by `headroom`), or
/// all when none is.
#[derive(Debug)]
pub struct UtilizationDetector {
    queue_depth: f64,
    kv_usage: f64,
    staleness: Duration,
    headroom: f64,
}

#[derive(Debug, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
struct Settings {
    queue_depth_threshold: f64,
    kv_cache_util_threshold: f64,
    metrics_staleness_threshold: GoDuration,
    headroom: f64,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            queue_depth_threshold: 5.0,
            kv_cache_util_threshold: 0.8,
            metrics_staleness_threshold: GoDuration(Duration::from_millis(200)),
            headroom: 0.0,
        }
    }
}

impl Plugin for UtilizationDetector {
    const TYPE: &'static str = "utilization-detector";
    const MATURITY: Maturity = Maturity::Beta;
    const PARAMETERS: &'static [ParamDoc] = &[
        ParamDoc {
            name: "queueDepthThreshold",
            kind: "int",
            default: "5",
            help: "Waiting requests at which an endpoint counts as full; above 0.",
        },
        ParamDoc {
            name: "kvCacheUtilThreshold",
            kind: "float",
            default: "0.8",
            help: "KV cache use at which an endpoint counts as full; above 0, at most 1.",
        },
        ParamDoc {
            name: "metricsStalenessThreshold",
            kind: "duration",
            default: "200ms",
            help: "Age from which metrics count as missing; above 0.",
        },
        ParamDoc {
            name: "headroom",
            kind: "float",
            default: "0",
            help: "Share by which the filter exceeds the thresholds; at least 0.",
        },
    ];
    const ABOUT: &'static str =
        "Measures pool saturation by queues and KV cache use; also a filter.";

    fn build(build: &mut Build<'_>) -> Result<Self, PluginError> {
        let settings: Settings = build.read::<Self, _>()?;
        let refuse = |text: String| Err(PluginError::Parameter(ParamError(text)));
        if settings.queue_depth_threshold <= 0.0 {
            return refuse(format!(
                "queueDepthThreshold: {} is not above 0",
                settings.queue_depth_threshold
            ));
        }
        if settings.kv_cache_util_threshold <= 0.0 || settings.kv_cache_util_threshold > 1.0 {
            let value = settings.kv_cache_util_threshold;
            return refuse(format!(
                "kvCacheUtilThreshold: {value} is not above 0 and at most 1"
            ));
        }
        if settings.metrics_staleness_threshold.0.is_zero() {
            return refuse("metricsStalenessThreshold: must be above 0".to_owned());
        }
        if settings.headroom < 0.0 {
            return refuse(format!("headroom: {} is below 0", settings.headroom));
        }
        Ok(Self {
            queue_depth: settings.queue_depth_threshold,
            kv_usage: settings.kv_cache_util_threshold,
            staleness: settings.metrics_staleness_threshold.0,
            headroom: settings.headroom,
        })
    }
}

impl UtilizationDetector {
    fn is_fresh(&self, candidate: &Candidate, now: Instant) -> bool {
        candidate.metrics.is_fresh(now, self.staleness)
    }
}

impl SaturationDetector for UtilizationDetector {
    fn saturation(&self, candidates: &[Candidate], now: Instant) -> f64 {
        if candidates.is_empty() {
            return 1.0;
        }
        let load = |candidate: &Candidate| {
            if !self.is_fresh(candidate, now) {
                return 1.0;
            }
            let metrics = &candidate.metrics;
            (f64::from(metrics.waiting_requests) / self.queue_depth)
                .max(metrics.kv_cache_usage / self.kv_usage)
        };
        candidates.iter().map(load).sum::<f64>() / candidates.len() as f64
    }
}

impl Filter for UtilizationDetector {
    fn filter(&self, cycle: &Cycle<'_>, candidates: Candidates<'_>, keep: &mut Vec<u32>) {
        let slack = 1.0 + self.headroom;
        super::keep_where(candidates, keep, |_, candidate| {
            let metrics = &candidate.metrics;
            self.is_fresh(candidate, cycle.now)
                && f64::from(metrics.waiting_requests) < self.queue_depth * slack
                && metrics.kv_cache_usage < self.kv_usage * slack
        });
        if keep.is_empty() {
            super::keep_all(candidates, keep);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scheduling::test_support::{Pool, endpoint};

    #[test]
    fn saturation_is_the_mean_of_the_worse_ratio() {
        let mut pool = Pool::new([
            endpoint("a").waiting(10).kv(0.4),
            endpoint("b").kv(0.4),
            endpoint("c").unscraped(),
        ]);
        let detector: UtilizationDetector = pool.plugin("{}");
        // a: max(10/5, 0.4/0.8) = 2; b: 0.5; c: 1. (2 + 0.5 + 1) / 3.
        let saturation = detector.saturation(&pool.candidates, Instant::now());
        assert!((saturation - 3.5 / 3.0).abs() < 1e-12);
        assert_eq!(detector.saturation(&[], Instant::now()), 1.0);
        // A second later all are stale.
        let later = Instant::now() + Duration::from_secs(1);
        assert_eq!(detector.saturation(&pool.candidates, later), 1.0);
    }

    #[test]
    fn the_filter_drops_full_and_stale_endpoints_unless_all_are() {
        let mut pool = Pool::new([
            endpoint("ok").waiting(4).kv(0.7),
            endpoint("queued").waiting(5),
            endpoint("full").kv(0.8),
            endpoint("stale").unscraped(),
        ]);
        let detector: UtilizationDetector = pool.plugin("{}");
        assert_eq!(pool.kept(&detector), ["ok"]);
        let detector: UtilizationDetector = pool.plugin(r#"{"headroom": 0.5}"#);
        assert_eq!(pool.kept(&detector), ["ok", "queued", "full"]);
        let all_full = Pool::new([endpoint("a").waiting(9), endpoint("b").waiting(8)]);
        assert_eq!(all_full.kept(&detector), ["a", "b"]);
    }
}
