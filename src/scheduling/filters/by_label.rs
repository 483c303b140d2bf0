//! `by-label`, the predecessor of `label-selector-filter`.

use serde::Deserialize;

use crate::plugin::{Build, Maturity, ParamDoc, ParamError, Plugin, PluginError};
use crate::scheduling::{Candidates, Cycle, Filter};

/// Keeps endpoints whose value of one label is listed, or that lack the label where that is allowed.
#[derive(Debug)]
pub struct ByLabelFilter {
    settings: Settings,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
struct Settings {
    label: String,
    valid_values: Vec<String>,
    allows_no_label: bool,
}

impl Plugin for ByLabelFilter {
    const TYPE: &'static str = "by-label";
    const MATURITY: Maturity = Maturity::Beta;
    const PARAMETERS: &'static [ParamDoc] = &[
        ParamDoc {
            name: "label",
            kind: "string",
            default: "",
            help: "Label to look at; required.",
        },
        ParamDoc {
            name: "validValues",
            kind: "list",
            default: "[]",
            help: "Values that are kept; may be empty only with allowsNoLabel.",
        },
        ParamDoc {
            name: "allowsNoLabel",
            kind: "bool",
            default: "false",
            help: "Keep endpoints without the label too.",
        },
    ];
    const ABOUT: &'static str = "Keeps endpoints by the value of one label.";

    fn build(build: &mut Build<'_>) -> Result<Self, PluginError> {
        let settings: Settings = build.read::<Self, _>()?;
        if settings.label.is_empty() {
            return Err(ParamError("label: is required".to_owned()).into());
        }
        if settings.valid_values.is_empty() && !settings.allows_no_label {
            let text = "validValues: must not be empty unless allowsNoLabel is true";
            return Err(ParamError(text.to_owned()).into());
        }
        Ok(Self { settings })
    }
}

impl Filter for ByLabelFilter {
    fn filter(&self, _: &Cycle<'_>, candidates: Candidates<'_>, keep: &mut Vec<u32>) {
        let Settings {
            label,
            valid_values,
            allows_no_label,
        } = &self.settings;
        super::keep_where(candidates, keep, |_, candidate| {
            let value = candidate.endpoint.spec.labels.get(label);
            value.map_or(*allows_no_label, |v| valid_values.contains(v))
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scheduling::test_support::{Pool, endpoint, refusal};

    #[test]
    fn the_label_decides_and_its_absence_where_allowed() {
        let mut pool = Pool::new([
            endpoint("gold").label("tier", "gold"),
            endpoint("lead").label("tier", "lead"),
            endpoint("none"),
        ]);
        for (parameters, kept) in [
            (
                r#"{"label": "tier", "validValues": ["gold"]}"#,
                &["gold"][..],
            ),
            (
                r#"{"label": "tier", "validValues": ["gold"], "allowsNoLabel": true}"#,
                &["gold", "none"],
            ),
            (r#"{"label": "tier", "allowsNoLabel": true}"#, &["none"]),
            (r#"{"label": "tier", "validValues": ["tin"]}"#, &[]),
        ] {
            let filter: ByLabelFilter = pool.plugin(parameters);
            assert_eq!(pool.kept(&filter), kept, "{parameters}");
        }
    }

    #[test]
    fn a_filter_that_can_keep_nothing_is_refused() {
        for (parameters, wanted) in [
            ("{}", "label: is required"),
            (r#"{"label": "tier"}"#, "validValues"),
        ] {
            let text = refusal::<ByLabelFilter>(parameters);
            assert!(text.contains(wanted), "{text}");
        }
    }
}
