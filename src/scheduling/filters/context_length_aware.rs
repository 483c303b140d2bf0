//! `context-length-aware`: endpoints by the prompt lengths they are meant for; filter and scorer.

use serde::Deserialize;

use crate::plugin::{Build, Column, Maturity, ParamDoc, ParamError, Plugin, PluginError};
use crate::scheduling::attributes::{TOKEN_PRODUCER, TOKENIZED_PROMPT};
use crate::scheduling::{Candidate, Candidates, Cycle, Filter, Scorer};

/// Label with an endpoint's range unless configured.
const DEFAULT_LABEL: &str = "llm-d.ai/context-length-range";
/// Score of an endpoint that names no range, or when the prompt's length is unknown.
const NEUTRAL: f64 = 0.5;
/// Every score inside the range lies above it, every one outside below it.
const OUTSIDE: f64 = 0.3;

/// Matches the length of the prompt against the range `min-max` (tokens, both included) in a label.
///
/// Score: no label 0.5; malformed 0. Inside, with `width = max - min`: 1 for width 0, else `0.3 +
/// 0.7 * (0.7 / (1 + width / 10000) + 0.3 * (max - length) / width)`, so narrower ranges and more
/// room above score higher. Outside: `0.3 / (1 + distance / 1000)`.
/// Filter, with `enableFiltering`: keeps endpoints without label or with the length in their range;
/// may leave none.
///
/// The length is the longest prompt's of a batch, since a range is about one sequence. The length of
/// a body that no parser reads is unknown: every readable range then scores 0.5 and stays.
/// Cost: parses one label per candidate, no allocation.
#[derive(Debug)]
pub struct ContextLengthAware {
    label: String,
    filters: bool,
    tokens: Column<u64>,
}

#[derive(Debug, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
struct Settings {
    label: String,
    enable_filtering: bool,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            label: DEFAULT_LABEL.to_owned(),
            enable_filtering: false,
        }
    }
}

impl Plugin for ContextLengthAware {
    const TYPE: &'static str = "context-length-aware";
    const MATURITY: Maturity = Maturity::Beta;
    const PARAMETERS: &'static [ParamDoc] = &[
        ParamDoc {
            name: "label",
            kind: "string",
            default: DEFAULT_LABEL,
            help: "Label whose value is the range of prompt tokens `min-max`.",
        },
        ParamDoc {
            name: "enableFiltering",
            kind: "bool",
            default: "false",
            help: "Also drop endpoints whose range does not contain the prompt's length.",
        },
    ];
    const ABOUT: &'static str =
        "Prefers endpoints meant for prompts of this length; also a filter.";

    fn build(build: &mut Build<'_>) -> Result<Self, PluginError> {
        let settings: Settings = build.read::<Self, _>()?;
        if settings.label.is_empty() {
            return Err(ParamError("label: must not be empty".to_owned()).into());
        }
        Ok(Self {
            label: settings.label,
            filters: settings.enable_filtering,
            tokens: build.keys.require(TOKENIZED_PROMPT, TOKEN_PRODUCER),
        })
    }
}

/// What an endpoint's label says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Label {
    Absent,
    Malformed,
    Range { min: u64, max: u64 },
}

impl Label {
    fn parse(text: &str) -> Self {
        let number = |text: &str| text.trim().parse::<u64>().ok();
        let bounds = text
            .split_once('-')
            .and_then(|(min, max)| Some((number(min)?, number(max)?)));
        match bounds {
            Some((min, max)) if min <= max => Self::Range { min, max },
            _ => Self::Malformed,
        }
    }

    /// Whether the filter lets a prompt of this length pass.
    fn admits(self, length: Option<u64>) -> bool {
        match self {
            Self::Absent => true,
            Self::Malformed => false,
            Self::Range { min, max } => length.is_none_or(|n| (min..=max).contains(&n)),
        }
    }

    fn score(self, length: Option<u64>) -> f64 {
        let (min, max) = match self {
            Self::Absent => return NEUTRAL,
            Self::Malformed => return 0.0,
            Self::Range { min, max } => (min, max),
        };
        let Some(length) = length else { return NEUTRAL };
        if !(min..=max).contains(&length) {
            let distance = length.saturating_sub(max).max(min.saturating_sub(length));
            return OUTSIDE / (1.0 + distance as f64 / 1000.0);
        }
        let width = (max - min) as f64;
        if width == 0.0 {
            return 1.0;
        }
        let narrow = 1.0 / (1.0 + width / 10_000.0);
        let room = (max - length) as f64 / width;
        OUTSIDE + (1.0 - OUTSIDE) * (0.7 * narrow + 0.3 * room)
    }
}

impl ContextLengthAware {
    fn label(&self, candidate: &Candidate) -> Label {
        let labels = &candidate.endpoint.spec.labels;
        labels
            .get(&self.label)
            .map_or(Label::Absent, |text| Label::parse(text))
    }

    fn length(&self, cycle: &Cycle<'_>) -> Option<u64> {
        cycle.attributes.get(self.tokens)?.iter().copied().max()
    }
}

impl Filter for ContextLengthAware {
    fn filter(&self, cycle: &Cycle<'_>, candidates: Candidates<'_>, keep: &mut Vec<u32>) {
        if !self.filters {
            return super::keep_all(candidates, keep);
        }
        let length = self.length(cycle);
        super::keep_where(candidates, keep, |_, candidate| {
            self.label(candidate).admits(length)
        });
    }
}

impl Scorer for ContextLengthAware {
    fn score(&self, cycle: &Cycle<'_>, candidates: Candidates<'_>, scores: &mut [f64]) {
        let length = self.length(cycle);
        for (score, (_, candidate)) in scores.iter_mut().zip(candidates.iter()) {
            *score = self.label(candidate).score(length);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scheduling::test_support::{Pool, endpoint};

    fn labelled(ranges: &[&str]) -> Pool {
        let endpoints = ranges.iter().map(|range| match *range {
            "" => endpoint("none"),
            range => endpoint(range).label(DEFAULT_LABEL, range),
        });
        Pool::new(endpoints)
    }

    /// Scores and kept positions for prompts of these lengths.
    fn run(pool: &mut Pool, parameters: &str, prompts: &[u64]) -> (Vec<f64>, Vec<u32>) {
        let plugin: ContextLengthAware = pool.plugin(parameters);
        let mut attributes = pool.keys.new_attributes();
        if !prompts.is_empty() {
            attributes.write(plugin.tokens).extend_from_slice(prompts);
        }
        let cycle = Cycle {
            request: &pool.request,
            attributes: &attributes,
            now: tokio::time::Instant::now(),
            rng: &pool.rng,
        };
        let all: Vec<u32> = (0..).take(pool.candidates.len()).collect();
        let mut scores = vec![0.0; all.len()];
        let mut keep = Vec::new();
        let candidates = || Candidates::new(&pool.candidates, &all);
        plugin.score(&cycle, candidates(), &mut scores);
        plugin.filter(&cycle, candidates(), &mut keep);
        (scores, keep)
    }

    #[test]
    fn ranges_score_by_the_formula() {
        let close = |a: f64, b: f64| (a - b).abs() < 1e-12;
        for (range, length, wanted) in [
            ("", 10, 0.5),
            // 0.3 + 0.7 * (0.7 / (1 + 1) + 0.3 * 7500 / 10000) = 0.3 + 0.7 * 0.575.
            ("0-10000", 2500, 0.7025),
            // Both ends belong to the range: 0.3 * 1 and 0.3 * 0 for the room above.
            ("0-10000", 0, 0.3 + 0.7 * 0.65),
            ("0-10000", 10_000, 0.3 + 0.7 * 0.35),
            // Wider is worse: 0.7 / (1 + 9) + 0.3 * 0.5 = 0.22.
            ("10000-100000", 55_000, 0.3 + 0.7 * 0.22),
            ("4096-4096", 4096, 1.0),
            // 1000 above, 500 below: 0.3 / 2 and 0.3 / 1.5.
            ("0-2048", 3048, 0.15),
            ("2000-4000", 1500, 0.2),
            (" 0 - 10000 ", 2500, 0.7025),
            ("10-5", 7, 0.0),
            ("0-10-20", 5, 0.0),
            ("-5-10", 5, 0.0),
            ("5", 5, 0.0),
            ("a-b", 5, 0.0),
            ("0-1e4", 5, 0.0),
        ] {
            let (scores, _) = run(&mut labelled(&[range]), "{}", &[length]);
            assert!(close(scores[0], wanted), "{range} {length}: {}", scores[0]);
        }
    }

    #[test]
    fn filtering_keeps_unlabelled_and_fitting_endpoints_only_when_asked() {
        let mut pool = labelled(&["", "0-100", "101-200", "x"]);
        let filtering = r#"{"enableFiltering": true}"#;
        assert_eq!(run(&mut pool, "{}", &[100]).1, [0, 1, 2, 3]);
        assert_eq!(run(&mut pool, filtering, &[100]).1, [0, 1]);
        assert_eq!(run(&mut pool, filtering, &[101]).1, [0, 2]);
        // The longest prompt of a batch decides.
        assert_eq!(run(&mut pool, filtering, &[5, 150, 7]).1, [0, 2]);
        let nobody = run(&mut labelled(&["0-100", "x"]), filtering, &[500]).1;
        assert_eq!(nobody, [0u32; 0]);
    }

    #[test]
    fn an_unknown_length_drops_malformed_labels_only() {
        let mut pool = labelled(&["", "0-100", "x"]);
        let (scores, kept) = run(&mut pool, r#"{"enableFiltering": true}"#, &[]);
        assert_eq!((scores, kept), (vec![0.5, 0.5, 0.0], vec![0, 1]));
    }

    #[test]
    fn the_label_can_be_another_but_not_none() {
        use crate::plugin::{DataKeys, Parameters};
        let mut pool = Pool::new([endpoint("a").label("tier", "0-9")]);
        let (scores, _) = run(&mut pool, r#"{"label": "tier"}"#, &[9]);
        // 0.3 + 0.7 * (0.7 / (1 + 9 / 10000) + 0).
        assert!((scores[0] - (0.3 + 0.49 / 1.0009)).abs() < 1e-12);
        let parameters = Parameters(Some(serde_json::json!({"label": ""})));
        let built = ContextLengthAware::build(&mut Build {
            name: "p",
            parameters: &parameters,
            keys: &mut DataKeys::default(),
        });
        assert_eq!(built.unwrap_err().to_string(), "label: must not be empty");
    }
}
