//! `endpoint-attribute-filter`

use serde::Deserialize;

use crate::datalayer::attributes::ScalarRef;
use crate::plugin::{Build, Maturity, ParamDoc, ParamError, Plugin, PluginError};
use crate::scheduling::{Candidates, Cycle, Filter};

/// Keeps endpoints of which a number compares as configured: `attribute operator value`.
///
/// Input: a core metric, a custom metric, or what another producer keeps on endpoints. An endpoint
/// without it passes unless `onMissing` is `Fail`. Nothing left: an empty set, or with
/// `fallbackOnEmpty` the set that came in.
#[derive(Debug)]
pub struct EndpointAttributeFilter {
    attribute: ScalarRef,
    threshold: Threshold,
    on_missing: OnMissing,
    fallback_on_empty: bool,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
struct Settings {
    attribute: String,
    producer: Option<String>,
    on_missing: OnMissing,
    fallback_on_empty: bool,
    algorithm: Option<Algorithm>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
enum OnMissing {
    #[default]
    Pass,
    Fail,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Algorithm {
    #[serde(rename = "type")]
    kind: AlgorithmKind,
    threshold: Threshold,
}

#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(rename_all = "lowercase")]
enum AlgorithmKind {
    Threshold,
}

#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(deny_unknown_fields)]
struct Threshold {
    operator: Operator,
    value: f64,
}

#[derive(Debug, Clone, Copy, Deserialize)]
enum Operator {
    LessThan,
    LessThanOrEqual,
    GreaterThan,
    GreaterThanOrEqual,
    Equal,
    NotEqual,
}

impl Threshold {
    fn holds(self, attribute: f64) -> bool {
        match self.operator {
            Operator::LessThan => attribute < self.value,
            Operator::LessThanOrEqual => attribute <= self.value,
            Operator::GreaterThan => attribute > self.value,
            Operator::GreaterThanOrEqual => attribute >= self.value,
            Operator::Equal => attribute == self.value,
            Operator::NotEqual => attribute != self.value,
        }
    }
}

impl Plugin for EndpointAttributeFilter {
    const TYPE: &'static str = "endpoint-attribute-filter";
    const MATURITY: Maturity = Maturity::Alpha;
    const PARAMETERS: &'static [ParamDoc] = &[
        ParamDoc {
            name: "attribute",
            kind: "string",
            default: "",
            help: "Name of the number; required. A / in it needs producer.",
        },
        ParamDoc {
            name: "producer",
            kind: "string",
            default: "core-metrics-extractor",
            help: "Instance that keeps it on endpoints; empty for an attribute without producer.",
        },
        ParamDoc {
            name: "onMissing",
            kind: "string",
            default: "Pass",
            help: "What happens to endpoints without it: Pass or Fail.",
        },
        ParamDoc {
            name: "fallbackOnEmpty",
            kind: "bool",
            default: "false",
            help: "Keep all when all would be dropped.",
        },
        ParamDoc {
            name: "algorithm",
            kind: "object",
            default: "",
            help: "{type threshold, threshold {operator LessThan|LessThanOrEqual|GreaterThan|GreaterThanOrEqual|Equal|NotEqual, value}}; required.",
        },
    ];
    const ABOUT: &'static str = "Keeps endpoints of which a number compares as configured.";

    fn build(build: &mut Build<'_>) -> Result<Self, PluginError> {
        let settings: Settings = build.read::<Self, _>()?;
        if settings.attribute.is_empty() {
            return Err(ParamError("attribute: is required".to_owned()).into());
        }
        let Some(Algorithm {
            kind: AlgorithmKind::Threshold,
            threshold,
        }) = settings.algorithm
        else {
            return Err(ParamError("algorithm: is required".to_owned()).into());
        };
        let producer = settings.producer.as_deref();
        Ok(Self {
            attribute: ScalarRef::optional(build.keys, &settings.attribute, producer)?,
            threshold,
            on_missing: settings.on_missing,
            fallback_on_empty: settings.fallback_on_empty,
        })
    }
}

impl Filter for EndpointAttributeFilter {
    fn filter(&self, _: &Cycle<'_>, candidates: Candidates<'_>, keep: &mut Vec<u32>) {
        super::keep_where(candidates, keep, |_, candidate| {
            let number = self.attribute.read(&candidate.endpoint, &candidate.metrics);
            number.map_or(self.on_missing == OnMissing::Pass, |number| {
                self.threshold.holds(number)
            })
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

    fn filter(pool: &mut Pool, operator: &str, value: f64, more: &str) -> EndpointAttributeFilter {
        pool.plugin(&format!(
            r#"{{"attribute": "KVCacheUsagePercent", {more} "algorithm": {{"type": "threshold",
                "threshold": {{"operator": "{operator}", "value": {value}}}}}}}"#
        ))
    }

    #[test]
    fn each_operator_compares_the_attribute_with_the_value() {
        let mut pool = Pool::new([
            endpoint("low").kv(0.25),
            endpoint("mid").kv(0.5),
            endpoint("high").kv(0.75),
        ]);
        for (operator, kept) in [
            ("LessThan", &["low"][..]),
            ("LessThanOrEqual", &["low", "mid"]),
            ("GreaterThan", &["high"]),
            ("GreaterThanOrEqual", &["mid", "high"]),
            ("Equal", &["mid"]),
            ("NotEqual", &["low", "high"]),
        ] {
            let filter = filter(&mut pool, operator, 0.5, "");
            assert_eq!(pool.kept(&filter), kept, "{operator}");
        }
    }

    #[test]
    fn a_missing_number_passes_or_fails_as_told() {
        let mut pool = Pool::new([endpoint("known").kv(0.9), endpoint("new").unscraped()]);
        let pass = filter(&mut pool, "LessThan", 0.5, "");
        assert_eq!(pool.kept(&pass), ["new"]);
        let fail = filter(&mut pool, "LessThan", 0.5, r#""onMissing": "Fail","#);
        assert!(pool.kept(&fail).is_empty());
        let fallback = r#""onMissing": "Fail", "fallbackOnEmpty": true,"#;
        let fallback = filter(&mut pool, "LessThan", 0.5, fallback);
        assert_eq!(pool.kept(&fallback), ["known", "new"]);
    }

    #[test]
    fn an_attribute_of_another_producer_is_read_from_the_endpoint() {
        let mut pool = Pool::new([endpoint("busy"), endpoint("idle"), endpoint("unknown")]);
        let filter: EndpointAttributeFilter = pool.plugin(
            r#"{"attribute": "GPUUtilization", "producer": "dcgm-extractor", "onMissing": "Fail",
                "algorithm": {"type": "threshold", "threshold": {"operator": "LessThan", "value": 0.9}}}"#,
        );
        pool.keys.enter("dcgm-extractor");
        let column = pool.keys.endpoint_produce::<f64>("GPUUtilization").unwrap();
        for (candidate, value) in pool.candidates.iter().zip([0.95, 0.1]) {
            candidate
                .endpoint
                .set_attribute(column, std::sync::Arc::new(value));
        }
        assert_eq!(pool.kept(&filter), ["idle"]);
    }

    #[test]
    fn parameters_are_checked() {
        let algorithm = |operator: &str| {
            format!(
                r#""algorithm": {{"type": "threshold", "threshold": {{"operator": "{operator}", "value": 1}}}}"#
            )
        };
        let good = algorithm("Equal");
        for (parameters, wanted) in [
            (format!("{{{good}}}"), "attribute: is required"),
            (r#"{"attribute": "a"}"#.to_owned(), "algorithm: is required"),
            (format!(r#"{{"attribute": "a/b", {good}}}"#), "contains '/'"),
            (
                format!(r#"{{"attribute": "a", "onMissing": "drop", {good}}}"#),
                "unknown variant `drop`",
            ),
            (
                format!(r#"{{"attribute": "a", {}}}"#, algorithm("Near")),
                "unknown variant `Near`",
            ),
            (
                r#"{"attribute": "a", "algorithm": {"type": "threshold"}}"#.to_owned(),
                "missing field `threshold`",
            ),
            (
                r#"{"attribute": "a", "algorithm": {"type": "rank"}}"#.to_owned(),
                "unknown variant `rank`",
            ),
        ] {
            let text = refusal::<EndpointAttributeFilter>(&parameters);
            assert!(text.contains(wanted), "{parameters}: {text}");
        }
    }
}
