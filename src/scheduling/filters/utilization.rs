//! `utilization-filter`

use serde::Deserialize;

use crate::plugin::{Build, InFlightSlot, Maturity, ParamDoc, ParamError, Plugin, PluginError};
use crate::scheduling::attributes::{IN_FLIGHT, IN_FLIGHT_PRODUCER, producer_or};
use crate::scheduling::{Candidate, Candidates, Cycle, Filter};

/// Drops endpoints on which any listed metric is above its limit.
///
/// Input: scraped metrics, or the live request count for `active-requests`. An endpoint never scraped
/// counts 0: only what is known to be busy is dropped. Nothing left: an empty set, or with
/// `fallbackOnEmpty` the set that came in.
#[derive(Debug)]
pub struct UtilizationFilter {
    limits: Vec<(Measure, f64)>,
    fallback_on_empty: bool,
}

#[derive(Debug, Clone, Copy)]
enum Measure {
    ActiveRequests(InFlightSlot),
    RunningRequests,
    WaitingQueue,
    KvCacheUtilization,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
struct Settings {
    conditions: Vec<Condition>,
    fallback_on_empty: bool,
    in_flight_load_producer_name: String,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct Condition {
    metric: Metric,
    max_value: f64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Metric {
    ActiveRequests,
    RunningRequests,
    WaitingQueue,
    KvCacheUtilization,
}

impl Condition {
    fn check(&self) -> Result<(), ParamError> {
        let value = self.max_value;
        if value < 0.0 {
            return Err(ParamError(format!(
                "conditions: maxValue {value} is below 0"
            )));
        }
        if self.metric == Metric::KvCacheUtilization && value > 1.0 {
            return Err(ParamError(format!(
                "conditions: maxValue {value} of kv-cache-utilization is above 1"
            )));
        }
        Ok(())
    }
}

impl Plugin for UtilizationFilter {
    const TYPE: &'static str = "utilization-filter";
    const MATURITY: Maturity = Maturity::Alpha;
    const PARAMETERS: &'static [ParamDoc] = &[
        ParamDoc {
            name: "conditions",
            kind: "list",
            default: "",
            help: "At least one {metric active-requests|running-requests|waiting-queue|kv-cache-utilization, maxValue}; an endpoint above any maxValue is dropped.",
        },
        ParamDoc {
            name: "fallbackOnEmpty",
            kind: "bool",
            default: "false",
            help: "Keep all when all would be dropped.",
        },
        ParamDoc {
            name: "inFlightLoadProducerName",
            kind: "string",
            default: "inflight-load-producer",
            help: "Instance that counts requests in flight, for active-requests.",
        },
    ];
    const ABOUT: &'static str = "Drops endpoints on which a metric is above its limit.";

    fn build(build: &mut Build<'_>) -> Result<Self, PluginError> {
        let settings: Settings = build.read::<Self, _>()?;
        if settings.conditions.is_empty() {
            return Err(ParamError("conditions: at least one is required".to_owned()).into());
        }
        let producer = producer_or(&settings.in_flight_load_producer_name, IN_FLIGHT_PRODUCER);
        let mut limits = Vec::with_capacity(settings.conditions.len());
        for condition in &settings.conditions {
            condition.check()?;
            let measure = match condition.metric {
                Metric::ActiveRequests => {
                    build.keys.require::<()>(IN_FLIGHT, producer);
                    Measure::ActiveRequests(build.keys.in_flight(producer)?)
                }
                Metric::RunningRequests => Measure::RunningRequests,
                Metric::WaitingQueue => Measure::WaitingQueue,
                Metric::KvCacheUtilization => Measure::KvCacheUtilization,
            };
            limits.push((measure, condition.max_value));
        }
        Ok(Self {
            limits,
            fallback_on_empty: settings.fallback_on_empty,
        })
    }
}

impl Measure {
    fn of(self, candidate: &Candidate) -> f64 {
        let metrics = &candidate.metrics;
        match self {
            Self::ActiveRequests(slot) => candidate.endpoint.in_flight(slot).requests() as f64,
            Self::RunningRequests => f64::from(metrics.running_requests),
            Self::WaitingQueue => f64::from(metrics.waiting_requests),
            Self::KvCacheUtilization => metrics.kv_cache_usage,
        }
    }
}

impl Filter for UtilizationFilter {
    fn filter(&self, _: &Cycle<'_>, candidates: Candidates<'_>, keep: &mut Vec<u32>) {
        super::keep_where(candidates, keep, |_, candidate| {
            let mut limits = self.limits.iter();
            limits.all(|(measure, max)| measure.of(candidate) <= *max)
        });
        if keep.is_empty() && self.fallback_on_empty {
            super::keep_all(candidates, keep);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scheduling::test_support::{Pool, endpoint, refusal};

    #[test]
    fn one_value_above_its_limit_drops_an_endpoint() {
        let mut pool = Pool::new([
            endpoint("idle"),
            endpoint("edge")
                .waiting(3)
                .running(8)
                .kv(0.5)
                .in_flight(2, 0),
            endpoint("queued").waiting(4),
            endpoint("running").running(9),
            endpoint("full").kv(0.51),
            endpoint("sent").in_flight(3, 0),
            endpoint("unknown").unscraped(),
        ]);
        let filter: UtilizationFilter = pool.plugin(
            r#"{"conditions": [
                {"metric": "waiting-queue", "maxValue": 3},
                {"metric": "running-requests", "maxValue": 8},
                {"metric": "kv-cache-utilization", "maxValue": 0.5},
                {"metric": "active-requests", "maxValue": 2}
            ]}"#,
        );
        assert_eq!(pool.kept(&filter), ["idle", "edge", "unknown"]);
    }

    #[test]
    fn all_may_stay_when_none_would() {
        let mut pool = Pool::new([endpoint("a").waiting(1), endpoint("b").waiting(2)]);
        let conditions = r#""conditions": [{"metric": "waiting-queue", "maxValue": 0}]"#;
        let filter: UtilizationFilter = pool.plugin(&format!("{{{conditions}}}"));
        assert!(pool.kept(&filter).is_empty());
        let filter: UtilizationFilter =
            pool.plugin(&format!(r#"{{{conditions}, "fallbackOnEmpty": true}}"#));
        assert_eq!(pool.kept(&filter), ["a", "b"]);
    }

    #[test]
    fn conditions_are_checked() {
        for (parameters, wanted) in [
            ("{}", "conditions: at least one"),
            (
                r#"{"conditions": [{"metric": "waiting-queue"}]}"#,
                "missing field `maxValue`",
            ),
            (
                r#"{"conditions": [{"metric": "queue", "maxValue": 1}]}"#,
                "unknown variant `queue`",
            ),
            (
                r#"{"conditions": [{"metric": "waiting-queue", "maxValue": -1}]}"#,
                "maxValue -1 is below 0",
            ),
            (
                r#"{"conditions": [{"metric": "kv-cache-utilization", "maxValue": 80}]}"#,
                "maxValue 80 of kv-cache-utilization is above 1",
            ),
        ] {
            let text = refusal::<UtilizationFilter>(parameters);
            assert!(text.contains(wanted), "{parameters}: {text}");
        }
    }
}
