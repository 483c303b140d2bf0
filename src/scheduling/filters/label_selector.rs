//! `label-selector-filter`

use std::collections::BTreeMap;

use serde::Deserialize;

use crate::plugin::{Build, Maturity, ParamDoc, ParamError, Plugin, PluginError};
use crate::scheduling::{Candidates, Cycle, Filter};

/// Keeps endpoints whose labels a Kubernetes label selector matches; an empty selector matches all.
#[derive(Debug)]
pub struct LabelSelectorFilter {
    settings: Settings,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
struct Settings {
    match_labels: BTreeMap<String, String>,
    match_expressions: Vec<Expression>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Expression {
    key: String,
    operator: Operator,
    #[serde(default)]
    values: Vec<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
enum Operator {
    In,
    NotIn,
    Exists,
    DoesNotExist,
}

impl Expression {
    fn check(&self) -> Result<(), ParamError> {
        let needs_values = matches!(self.operator, Operator::In | Operator::NotIn);
        if needs_values == self.values.is_empty() {
            let expected = if needs_values {
                "at least one value"
            } else {
                "no values"
            };
            let text = format!(
                "matchExpressions: {:?} of key {:?} takes {expected}",
                self.operator, self.key
            );
            return Err(ParamError(text));
        }
        Ok(())
    }

    fn matches(&self, labels: &BTreeMap<String, String>) -> bool {
        let value = labels.get(&self.key);
        match self.operator {
            Operator::In => value.is_some_and(|v| self.values.contains(v)),
            Operator::NotIn => value.is_none_or(|v| !self.values.contains(v)),
            Operator::Exists => value.is_some(),
            Operator::DoesNotExist => value.is_none(),
        }
    }
}

impl Plugin for LabelSelectorFilter {
    const TYPE: &'static str = "label-selector-filter";
    const MATURITY: Maturity = Maturity::Beta;
    const PARAMETERS: &'static [ParamDoc] = &[
        ParamDoc {
            name: "matchLabels",
            kind: "object",
            default: "{}",
            help: "Labels an endpoint must have with exactly these values.",
        },
        ParamDoc {
            name: "matchExpressions",
            kind: "list",
            default: "[]",
            help: "Conditions {key, operator In|NotIn|Exists|DoesNotExist, values}; all must hold.",
        },
    ];
    const ABOUT: &'static str = "Keeps endpoints whose labels match a selector.";

    fn build(build: &mut Build<'_>) -> Result<Self, PluginError> {
        let settings: Settings = build.read::<Self, _>()?;
        settings
            .match_expressions
            .iter()
            .try_for_each(Expression::check)?;
        Ok(Self { settings })
    }
}

impl Filter for LabelSelectorFilter {
    fn filter(&self, _: &Cycle<'_>, candidates: Candidates<'_>, keep: &mut Vec<u32>) {
        super::keep_where(candidates, keep, |_, candidate| {
            let labels = &candidate.endpoint.spec.labels;
            self.settings
                .match_labels
                .iter()
                .all(|(key, value)| labels.get(key) == Some(value))
                && self
                    .settings
                    .match_expressions
                    .iter()
                    .all(|e| e.matches(labels))
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scheduling::test_support::{Pool, endpoint};

    #[test]
    fn labels_and_expressions_must_all_hold() {
        let mut pool = Pool::new([
            endpoint("gold-a").label("tier", "gold").label("zone", "a"),
            endpoint("gold-b").label("tier", "gold").label("zone", "b"),
            endpoint("plain"),
        ]);
        for (selector, kept) in [
            ("{}", &["gold-a", "gold-b", "plain"][..]),
            (
                r#"{"matchLabels": {"tier": "gold"}}"#,
                &["gold-a", "gold-b"],
            ),
            (
                r#"{"matchExpressions": [{"key": "zone", "operator": "In", "values": ["b"]}]}"#,
                &["gold-b"],
            ),
            (
                r#"{"matchExpressions": [{"key": "zone", "operator": "NotIn", "values": ["b"]}]}"#,
                &["gold-a", "plain"],
            ),
            (
                r#"{"matchExpressions": [{"key": "zone", "operator": "Exists"}]}"#,
                &["gold-a", "gold-b"],
            ),
            (
                r#"{"matchExpressions": [{"key": "zone", "operator": "DoesNotExist"}]}"#,
                &["plain"],
            ),
        ] {
            let filter: LabelSelectorFilter = pool.plugin(selector);
            assert_eq!(pool.kept(&filter), kept, "{selector}");
        }
    }

    #[test]
    fn an_expression_without_values_is_refused_where_it_needs_them() {
        let expression = |operator, values: &[&str]| Expression {
            key: "k".to_owned(),
            operator,
            values: values.iter().map(|v| (*v).to_owned()).collect(),
        };
        assert!(expression(Operator::In, &[]).check().is_err());
        assert!(expression(Operator::Exists, &["v"]).check().is_err());
        assert!(expression(Operator::NotIn, &["v"]).check().is_ok());
    }
}
