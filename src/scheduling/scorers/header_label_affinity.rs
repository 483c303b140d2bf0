//! `header-label-affinity-scorer`

use serde::Deserialize;

use crate::plugin::{Build, Maturity, ParamDoc, ParamError, Plugin, PluginError};
use crate::scheduling::{Candidates, Cycle, Scorer};

/// Prefers endpoints whose label has the value of a request header.
///
/// Score: 1 when they are equal, else 0; 0 for all without the header or with an empty one.
#[derive(Debug)]
pub struct HeaderLabelAffinityScorer {
    header: String,
    label: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
struct Settings {
    header_name: String,
    label_key: String,
}

impl Plugin for HeaderLabelAffinityScorer {
    const TYPE: &'static str = "header-label-affinity-scorer";
    const MATURITY: Maturity = Maturity::Alpha;
    const PARAMETERS: &'static [ParamDoc] = &[
        ParamDoc {
            name: "headerName",
            kind: "string",
            default: "",
            help: "Request header with the wanted value; required.",
        },
        ParamDoc {
            name: "labelKey",
            kind: "string",
            default: "",
            help: "Endpoint label that should have it; required.",
        },
    ];
    const ABOUT: &'static str = "Prefers endpoints whose label has the value of a request header.";

    fn build(build: &mut Build<'_>) -> Result<Self, PluginError> {
        let settings: Settings = build.read::<Self, _>()?;
        let header = settings.header_name.trim().to_ascii_lowercase();
        if header.is_empty() {
            return Err(ParamError("headerName: is required".to_owned()).into());
        }
        if settings.label_key.is_empty() {
            return Err(ParamError("labelKey: is required".to_owned()).into());
        }
        Ok(Self {
            header,
            label: settings.label_key,
        })
    }
}

impl Scorer for HeaderLabelAffinityScorer {
    fn score(&self, cycle: &Cycle<'_>, candidates: Candidates<'_>, scores: &mut [f64]) {
        let wanted = cycle.request.headers.get_str(&self.header);
        let Some(wanted) = wanted.filter(|v| !v.is_empty()) else {
            return;
        };
        for (score, (_, candidate)) in scores.iter_mut().zip(candidates.iter()) {
            let label = candidate.endpoint.spec.labels.get(&self.label);
            *score = f64::from(u8::from(label.is_some_and(|v| v == wanted)));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scheduling::test_support::{Pool, endpoint, refusal};

    #[test]
    fn equal_values_score_one() {
        for (header, wanted) in [
            (Some("blue"), [1.0, 0.0, 0.0]),
            (Some(""), [0.0; 3]),
            (Some("Blue"), [0.0; 3]),
            (None, [0.0; 3]),
        ] {
            let mut pool = Pool::new([
                endpoint("a").label("slice", "blue"),
                endpoint("b").label("slice", ""),
                endpoint("c"),
            ]);
            let scorer: HeaderLabelAffinityScorer =
                pool.plugin(r#"{"headerName": "X-Slice", "labelKey": "slice"}"#);
            if let Some(value) = header {
                pool.header("x-slice", value);
            }
            assert_eq!(pool.scores(&scorer), wanted, "{header:?}");
        }
    }

    #[test]
    fn both_names_are_required() {
        let refused = refusal::<HeaderLabelAffinityScorer>;
        assert!(refused(r#"{"labelKey": "a"}"#).contains("headerName: is required"));
        assert!(refused(r#"{"headerName": "a"}"#).contains("labelKey: is required"));
    }
}
