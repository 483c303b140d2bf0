//! `endpoint-attribute-scorer`

use serde::Deserialize;

use crate::datalayer::attributes::ScalarRef;
use crate::plugin::{Build, Maturity, ParamDoc, ParamError, Plugin, PluginError};
use crate::scheduling::{Candidates, Cycle, Scorer};

/// Rates endpoints linearly by a number.
///
/// Score: `(x - min) / (max - min)` clamped to `0..=1`, or one minus that when lower is better. The
/// range is fixed or spans the candidates that have the number; all equal gives 1, missing gives 0.
/// Input: a core metric, a custom metric, or what another producer keeps on endpoints.
#[derive(Debug)]
pub struct EndpointAttributeScorer {
    attribute: ScalarRef,
    lower_is_better: bool,
    /// `None` adapts to the candidates.
    range: Option<(f64, f64)>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
struct Settings {
    attribute_key: String,
    producer: Option<String>,
    algorithm: Option<Algorithm>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Algorithm {
    #[serde(rename = "type")]
    kind: AlgorithmKind,
    #[serde(default)]
    normalization: Normalization,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
enum AlgorithmKind {
    LinearLowerIsBetter,
    LinearHigherIsBetter,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
struct Normalization {
    fixed_range: Option<FixedRange>,
    adaptive_range: Option<AdaptiveRange>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct FixedRange {
    min: f64,
    max: f64,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct AdaptiveRange {}

impl Normalization {
    fn range(&self) -> Result<Option<(f64, f64)>, ParamError> {
        let Some(FixedRange { min, max }) = self.fixed_range else {
            return Ok(None);
        };
        if self.adaptive_range.is_some() {
            let text = "normalization: takes one of fixedRange and adaptiveRange";
            return Err(ParamError(text.to_owned()));
        }
        if min >= max {
            return Err(ParamError(format!(
                "fixedRange: min {min} is not below max {max}"
            )));
        }
        Ok(Some((min, max)))
    }
}

impl Plugin for EndpointAttributeScorer {
    const TYPE: &'static str = "endpoint-attribute-scorer";
    const MATURITY: Maturity = Maturity::Alpha;
    const PARAMETERS: &'static [ParamDoc] = &[
        ParamDoc {
            name: "attributeKey",
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
            name: "algorithm",
            kind: "object",
            default: "",
            help: "{type linear_lower_is_better|linear_higher_is_better, normalization {fixedRange {min, max}} or {adaptiveRange {}}}; the type is required, the range adapts by default.",
        },
    ];
    const ABOUT: &'static str = "Rates endpoints linearly by a number.";

    fn build(build: &mut Build<'_>) -> Result<Self, PluginError> {
        let settings: Settings = build.read::<Self, _>()?;
        if settings.attribute_key.is_empty() {
            return Err(ParamError("attributeKey: is required".to_owned()).into());
        }
        let Some(algorithm) = settings.algorithm else {
            return Err(ParamError("algorithm: is required".to_owned()).into());
        };
        let range = algorithm.normalization.range()?;
        let producer = settings.producer.as_deref();
        Ok(Self {
            attribute: ScalarRef::optional(build.keys, &settings.attribute_key, producer)?,
            lower_is_better: algorithm.kind == AlgorithmKind::LinearLowerIsBetter,
            range,
        })
    }
}

impl Scorer for EndpointAttributeScorer {
    fn score(&self, _: &Cycle<'_>, candidates: Candidates<'_>, scores: &mut [f64]) {
        super::linear(
            candidates,
            scores,
            self.range,
            self.lower_is_better,
            |candidate| self.attribute.read(&candidate.endpoint, &candidate.metrics),
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scheduling::test_support::{Pool, endpoint, refusal};

    fn pool() -> Pool {
        Pool::new([
            endpoint("a").waiting(2),
            endpoint("b").waiting(4),
            endpoint("c").waiting(10),
            endpoint("new").unscraped(),
        ])
    }

    fn scorer(pool: &mut Pool, kind: &str, normalization: &str) -> EndpointAttributeScorer {
        pool.plugin(&format!(
            r#"{{"attributeKey": "WaitingQueueSize",
                "algorithm": {{"type": "{kind}", "normalization": {normalization}}}}}"#
        ))
    }

    #[test]
    fn the_range_adapts_to_the_candidates() {
        let mut pool = pool();
        // (4 - 2) / (10 - 2) = 0.25.
        let scorer_up = scorer(&mut pool, "linear_higher_is_better", "{}");
        assert_eq!(pool.scores(&scorer_up), [0.0, 0.25, 1.0, 0.0]);
        let scorer_down = scorer(
            &mut pool,
            "linear_lower_is_better",
            r#"{"adaptiveRange": {}}"#,
        );
        assert_eq!(pool.scores(&scorer_down), [1.0, 0.75, 0.0, 0.0]);
        let mut equal = Pool::new([endpoint("a").waiting(3), endpoint("b").unscraped()]);
        let scorer = scorer(&mut equal, "linear_lower_is_better", "{}");
        assert_eq!(equal.scores(&scorer), [1.0, 0.0]);
    }

    #[test]
    fn a_fixed_range_is_clamped() {
        let mut pool = pool();
        // 2 is below the range; (4 - 3) / 4 = 0.25; 10 is above.
        let range = r#"{"fixedRange": {"min": 3, "max": 7}}"#;
        let up = scorer(&mut pool, "linear_higher_is_better", range);
        assert_eq!(pool.scores(&up), [0.0, 0.25, 1.0, 0.0]);
        let down = scorer(&mut pool, "linear_lower_is_better", range);
        assert_eq!(pool.scores(&down), [1.0, 0.75, 0.0, 0.0]);
    }

    #[test]
    fn parameters_are_checked() {
        for (parameters, wanted) in [
            ("{}", "attributeKey: is required"),
            (r#"{"attributeKey": "a"}"#, "algorithm: is required"),
            (
                r#"{"attributeKey": "a", "algorithm": {"type": "cubic"}}"#,
                "unknown variant `cubic`",
            ),
            (
                r#"{"attributeKey": "a/b", "algorithm": {"type": "linear_lower_is_better"}}"#,
                "contains '/'",
            ),
            (
                r#"{"attributeKey": "a", "algorithm": {"type": "linear_lower_is_better",
                    "normalization": {"fixedRange": {"min": 1, "max": 1}}}}"#,
                "fixedRange: min 1 is not below max 1",
            ),
            (
                r#"{"attributeKey": "a", "algorithm": {"type": "linear_lower_is_better",
                    "normalization": {"fixedRange": {"max": 1}, "adaptiveRange": {}}}}"#,
                "normalization: takes one of",
            ),
        ] {
            let text = refusal::<EndpointAttributeScorer>(parameters);
            assert!(text.contains(wanted), "{parameters}: {text}");
        }
    }
}
