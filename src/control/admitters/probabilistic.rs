//! `probabilistic-admitter`: sheds more, the fuller the pool.

use serde::Deserialize;

use crate::plugin::{Build, Maturity, ParamDoc, ParamError, Plugin, PluginError};
use crate::scheduling::{Admitter, Candidate, Cycle, Denial};

/// Refuses sheddable requests (priority below 0) with probability `min(1, k * s^power)`.
///
/// `s` is the mean over the candidates of `max(waiting / queueDepthThreshold, usage /
/// kvCacheUtilThreshold)`; an endpoint never scraped counts 1. With the defaults everything sheddable
/// is refused from `s = (1/300)^(1/5)`, about 0.32.
#[derive(Debug)]
pub struct ProbabilisticAdmitter {
    settings: Settings,
}

#[derive(Debug, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
struct Settings {
    queue_depth_threshold: f64,
    kv_cache_util_threshold: f64,
    power: f64,
    k: f64,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            queue_depth_threshold: 5.0,
            kv_cache_util_threshold: 0.8,
            power: 5.0,
            k: 300.0,
        }
    }
}

impl Plugin for ProbabilisticAdmitter {
    const TYPE: &'static str = "probabilistic-admitter";
    const MATURITY: Maturity = Maturity::Beta;
    const PARAMETERS: &'static [ParamDoc] = &[
        ParamDoc {
            name: "queueDepthThreshold",
            kind: "int",
            default: "5",
            help: "Waiting requests that count as a saturation of 1; above 0.",
        },
        ParamDoc {
            name: "kvCacheUtilThreshold",
            kind: "float",
            default: "0.8",
            help: "KV cache use that counts as a saturation of 1; above 0.",
        },
        ParamDoc {
            name: "power",
            kind: "float",
            default: "5",
            help: "Exponent of the saturation; above 0. Larger values shed later and more steeply.",
        },
        ParamDoc {
            name: "k",
            kind: "float",
            default: "300",
            help: "Factor of the saturation's power; above 0. Larger values shed earlier.",
        },
    ];
    const ABOUT: &'static str =
        "Refuses sheddable requests with a probability that grows with the load.";

    fn build(build: &mut Build<'_>) -> Result<Self, PluginError> {
        let settings: Settings = build.read::<Self, _>()?;
        for (name, value) in [
            ("queueDepthThreshold", settings.queue_depth_threshold),
            ("kvCacheUtilThreshold", settings.kv_cache_util_threshold),
            ("power", settings.power),
            ("k", settings.k),
        ] {
            if value <= 0.0 {
                return Err(ParamError(format!("{name}: {value} is not above 0")).into());
            }
        }
        Ok(Self { settings })
    }
}

impl ProbabilisticAdmitter {
    fn saturation(&self, candidates: &[Candidate]) -> f64 {
        let load = |candidate: &Candidate| {
            let metrics = &candidate.metrics;
            if metrics.updated_at.is_none() {
                return 1.0;
            }
            let queue = f64::from(metrics.waiting_requests) / self.settings.queue_depth_threshold;
            queue.max(metrics.kv_cache_usage / self.settings.kv_cache_util_threshold)
        };
        candidates.iter().map(load).sum::<f64>() / candidates.len() as f64
    }
}

impl Admitter for ProbabilisticAdmitter {
    fn admit(&self, cycle: &Cycle<'_>, candidates: &[Candidate]) -> Result<(), Denial> {
        if cycle.request.priority >= 0 || candidates.is_empty() {
            return Ok(());
        }
        let saturation = self.saturation(candidates);
        let probability = (saturation.powf(self.settings.power) * self.settings.k).min(1.0);
        if cycle.rng.borrow_mut().f64() >= probability {
            return Ok(());
        }
        Err(Denial {
            reason: format!(
                "probabilistic-admitter: rejected, saturation={saturation:.3} prob={probability:.2}"
            ),
            saturated: true,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scheduling::test_support::{Pool, endpoint, refusal};

    /// Share of 1000 requests of `priority` that are refused.
    fn refused(pool: &mut Pool, parameters: &str, priority: i32) -> f64 {
        let admitter: ProbabilisticAdmitter = pool.plugin(parameters);
        pool.request.priority = priority;
        let denials = (0..1000)
            .filter(|_| {
                pool.with_cycle(|cycle, all| admitter.admit(cycle, all))
                    .is_err()
            })
            .count();
        f64::from(u32::try_from(denials).unwrap()) / 1000.0
    }

    #[test]
    fn the_refused_share_follows_the_formula() {
        // (max(1/5, 0.08/0.8) + max(0, 0.16/0.8)) / 2 = 0.2; 300 * 0.2^5 = 0.096.
        let mut light = Pool::new([endpoint("a").waiting(1).kv(0.08), endpoint("b").kv(0.16)]);
        let share = refused(&mut light, "{}", -1);
        assert!((share - 0.096).abs() < 0.03, "{share}");
        // 2 * 0.2^1 = 0.4.
        let share = refused(&mut light, r#"{"power": 1, "k": 2}"#, -1);
        assert!((share - 0.4).abs() < 0.05, "{share}");
        assert_eq!(refused(&mut light, "{}", 0), 0.0, "not sheddable");
        let mut unknown = Pool::new([endpoint("a").unscraped()]);
        assert_eq!(refused(&mut unknown, "{}", -1), 1.0, "counts as full");
        assert_eq!(refused(&mut Pool::new([endpoint("a")]), "{}", -1), 0.0);
        assert_eq!(refused(&mut Pool::new([]), "{}", -1), 0.0);
    }

    #[test]
    fn a_denial_is_a_lack_of_capacity_and_says_how_large() {
        let mut pool = Pool::new([endpoint("a").waiting(10)]);
        let admitter: ProbabilisticAdmitter = pool.plugin("{}");
        pool.request.priority = -1;
        let denial = pool.with_cycle(|cycle, all| admitter.admit(cycle, all));
        let denial = denial.unwrap_err();
        assert!(denial.saturated);
        assert_eq!(
            denial.reason,
            "probabilistic-admitter: rejected, saturation=2.000 prob=1.00"
        );
    }

    #[test]
    fn parameters_are_above_zero() {
        for name in ["queueDepthThreshold", "kvCacheUtilThreshold", "power", "k"] {
            let text = refusal::<ProbabilisticAdmitter>(&format!(r#"{{"{name}": 0}}"#));
            assert_eq!(text, format!("{name}: 0 is not above 0"));
        }
    }
}
