//! `prefix-cache-scorer`

use serde::Deserialize;

use crate::plugin::{Build, Column, Maturity, ParamDoc, ParamError, Plugin, PluginError};
use crate::scheduling::attributes::{
    APPROX_PREFIX_PRODUCER, PREFIX_MATCH, PrefixMatch, producer_or,
};
use crate::scheduling::{Candidates, Cycle, Scorer};

/// Prefers endpoints that hold more of the prompt's prefix.
///
/// Score: `w * min(1, matched_tokens / L)^2 + (1 - w) * matched / total` with `w` =
/// `matchLengthWeight` and `L` = `matchLengthScaleTokens`; 0 without a match.
/// Input: the prefix match column of the named producer, computed for this request.
#[derive(Debug)]
pub struct PrefixCacheScorer {
    matches: Column<PrefixMatch>,
    length_weight: f64,
    length_scale_tokens: f64,
}

#[derive(Debug, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
struct Settings {
    prefix_match_info_producer_name: String,
    match_length_weight: f64,
    match_length_scale_tokens: f64,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            prefix_match_info_producer_name: String::new(),
            match_length_weight: 0.0,
            match_length_scale_tokens: 8192.0,
        }
    }
}

impl Plugin for PrefixCacheScorer {
    const TYPE: &'static str = "prefix-cache-scorer";
    const MATURITY: Maturity = Maturity::Beta;
    const PARAMETERS: &'static [ParamDoc] = &[
        ParamDoc {
            name: "prefixMatchInfoProducerName",
            kind: "string",
            default: "approx-prefix-cache-producer",
            help: "Instance that says how much of the prefix each endpoint holds.",
        },
        ParamDoc {
            name: "matchLengthWeight",
            kind: "float",
            default: "0",
            help: "Share of the score that rates the matched length instead of the matched share; 0 to 1.",
        },
        ParamDoc {
            name: "matchLengthScaleTokens",
            kind: "float",
            default: "8192",
            help: "Matched tokens at which the length part reaches 1; above 0.",
        },
    ];
    const ABOUT: &'static str = "Prefers endpoints that hold more of the prompt's prefix.";

    fn build(build: &mut Build<'_>) -> Result<Self, PluginError> {
        let settings: Settings = build.read::<Self, _>()?;
        let Settings {
            match_length_weight: weight,
            match_length_scale_tokens: scale,
            ..
        } = settings;
        if !(0.0..=1.0).contains(&weight) {
            return Err(
                ParamError(format!("matchLengthWeight: {weight} is not within 0 and 1")).into(),
            );
        }
        if weight > 0.0 && scale <= 0.0 {
            return Err(
                ParamError(format!("matchLengthScaleTokens: {scale} is not above 0")).into(),
            );
        }
        let producer = producer_or(
            &settings.prefix_match_info_producer_name,
            APPROX_PREFIX_PRODUCER,
        );
        Ok(Self {
            matches: build.keys.require(PREFIX_MATCH, producer),
            length_weight: weight,
            length_scale_tokens: scale,
        })
    }
}

impl Scorer for PrefixCacheScorer {
    fn score(&self, cycle: &Cycle<'_>, candidates: Candidates<'_>, scores: &mut [f64]) {
        let Some(matches) = cycle.attributes.get(self.matches) else {
            return;
        };
        for (score, (position, _)) in scores.iter_mut().zip(candidates.iter()) {
            let Some(found) = matches.get(position).filter(|m| m.total_blocks > 0) else {
                continue;
            };
            let tokens = f64::from(found.matched_blocks) * f64::from(found.block_size_tokens);
            let length = (tokens / self.length_scale_tokens).min(1.0).powi(2);
            *score = (1.0 - self.length_weight) * found.ratio();
            if self.length_weight > 0.0 {
                *score += self.length_weight * length;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scheduling::test_support::{Pool, endpoint};

    #[test]
    fn the_score_is_the_matched_share() {
        let mut pool = Pool::new([0, 3, 10].map(|n| endpoint("e").matched_blocks(n)));
        let scorer: PrefixCacheScorer = pool.plugin("{}");
        assert_eq!(pool.scores(&scorer), [0.0, 0.3, 1.0]);
    }

    #[test]
    fn length_can_be_rated_beside_the_share() {
        let mut pool = Pool::new([5, 10].map(|n| endpoint("e").matched_blocks(n)));
        let scorer: PrefixCacheScorer =
            pool.plugin(r#"{"matchLengthWeight": 0.5, "MATCHLENGTHSCALETOKENS": 640}"#);
        // 5 blocks of 64 are 320 of 640 tokens: 0.5 * 0.5^2 + 0.5 * 0.5 = 0.375; 10 blocks: 1.
        assert_eq!(pool.scores(&scorer), [0.375, 1.0]);
    }

    #[test]
    fn another_producer_has_its_own_column() {
        let mut pool = Pool::new([endpoint("e").matched_blocks(10)]);
        let scorer: PrefixCacheScorer = pool.plugin(r#"{"prefixMatchInfoProducerName": "exact"}"#);
        assert_eq!(pool.scores(&scorer), [0.0]);
    }

    #[test]
    fn ranges_and_names_are_checked() {
        use crate::plugin::{Build, DataKeys, Parameters};
        for bad in [
            r#"{"matchLengthWeight": 2}"#,
            r#"{"matchLengthWeight": 1, "matchLengthScaleTokens": 0}"#,
            r#"{"x": 1}"#,
        ] {
            let parameters = Parameters(serde_json::from_str(bad).unwrap());
            let mut keys = DataKeys::default();
            let mut build = Build {
                name: "p",
                parameters: &parameters,
                keys: &mut keys,
            };
            assert!(PrefixCacheScorer::build(&mut build).is_err(), "{bad}");
        }
    }
}
