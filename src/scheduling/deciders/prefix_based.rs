//! `prefix-based-pd-decider`

use serde::Deserialize;

use crate::plugin::{Build, Column, Maturity, ParamDoc, ParamError, Plugin, PluginError};
use crate::scheduling::attributes::{
    APPROX_PREFIX_PRODUCER, PREFIX_MATCH, PrefixMatch, TOKEN_PRODUCER, TOKENIZED_PROMPT,
    producer_or,
};
use crate::scheduling::{Decider, Round};

/// Gives prefill an endpoint of its own when the decode endpoint would have much to compute.
///
/// Yes if and only if `prompt >= promptTokens` and `prompt - cached >= nonCachedTokens`, in tokens, where
/// `cached` is the prompt's prefix on the decode pick. What it holds is asked of the most exact producer
/// that the configuration has: KV events where there are any, else the approximate index. Without a
/// decode pick, a token count or a prefix match: no.
#[derive(Debug)]
pub struct PrefixBasedDecider {
    non_cached_tokens: u64,
    prompt_tokens: u64,
    tokens: Column<u64>,
    /// The instance that `prefixMatchInfoProducerName` names; `None` leaves the choice to the handler.
    matches: Option<Column<PrefixMatch>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
struct Settings {
    non_cached_tokens: i64,
    prompt_tokens: i64,
    prefix_match_info_producer_name: String,
}

impl Plugin for PrefixBasedDecider {
    const TYPE: &'static str = "prefix-based-pd-decider";
    const MATURITY: Maturity = Maturity::Beta;
    const PARAMETERS: &'static [ParamDoc] = &[
        ParamDoc {
            name: "nonCachedTokens",
            kind: "int",
            default: "0",
            help: "Prompt tokens missing on the decode endpoint from which prefill runs elsewhere; 0 never, at least 0.",
        },
        ParamDoc {
            name: "promptTokens",
            kind: "int",
            default: "0",
            help: "Shorter prompts are never split, in tokens; 0 sets no bound, at least 0.",
        },
        ParamDoc {
            name: "prefixMatchInfoProducerName",
            kind: "string",
            default: "the most exact one",
            help: "Instance that says how much of the prefix the decode endpoint holds.",
        },
    ];
    const ABOUT: &'static str =
        "Runs prefill on an endpoint of its own when much of the prompt is not cached.";

    fn build(build: &mut Build<'_>) -> Result<Self, PluginError> {
        let settings: Settings = build.read::<Self, _>()?;
        let count = |name: &str, value: i64| {
            u64::try_from(value).map_err(|_| ParamError(format!("{name}: {value} is below 0")))
        };
        let named = settings.prefix_match_info_producer_name;
        let producer = producer_or(&named, APPROX_PREFIX_PRODUCER);
        let column = build.keys.require(PREFIX_MATCH, producer);
        Ok(Self {
            non_cached_tokens: count("nonCachedTokens", settings.non_cached_tokens)?,
            prompt_tokens: count("promptTokens", settings.prompt_tokens)?,
            tokens: build.keys.require(TOKENIZED_PROMPT, TOKEN_PRODUCER),
            matches: (!named.is_empty()).then_some(column),
        })
    }
}

impl PrefixBasedDecider {
    fn found(&self, round: &Round<'_>, decode: u32) -> Option<PrefixMatch> {
        match self.matches {
            Some(column) => {
                let found = round.cycle.attributes.get(column)?;
                found.get(decode as usize).copied()
            }
            None => round.prefix_match(decode),
        }
    }
}

impl Decider for PrefixBasedDecider {
    fn wants_stage(&self, round: &Round<'_>, decode: Option<u32>) -> bool {
        let prompts = round.cycle.attributes.get(self.tokens).unwrap_or_default();
        let tokens: u64 = prompts.iter().sum();
        let long_enough = tokens >= self.prompt_tokens.max(self.non_cached_tokens);
        let Some(decode) = decode.filter(|_| self.non_cached_tokens > 0 && long_enough) else {
            return false;
        };
        let Some(found) = self.found(round, decode) else {
            tracing::error!(
                request_id = round.cycle.request.id,
                "no prefix match for the decode endpoint, prefill stays there"
            );
            return false;
        };
        tokens.saturating_sub(found.cached_tokens()) >= self.non_cached_tokens
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scheduling::test_support::{Pool, endpoint, refusal};

    /// The answer for a prompt of `tokens` of which the only endpoint holds `blocks` of 64 tokens.
    fn answer(parameters: &str, tokens: u64, blocks: u32, decode: Option<u32>) -> bool {
        let mut pool = Pool::new([endpoint("d").matched_blocks(blocks)]);
        pool.prompt_tokens = Some(tokens);
        let decider: PrefixBasedDecider = pool.plugin(parameters);
        pool.with_round(&[], |round| decider.wants_stage(round, decode))
    }

    #[test]
    fn the_uncached_part_decides() {
        let both = r#"{"nonCachedTokens": 512, "promptTokens": 1024}"#;
        for (parameters, tokens, blocks, wanted) in [
            // 640 - 0 >= 512, and one token less than needed: 640 - 2 * 64 = 512, 640 - 3 * 64 = 448.
            (r#"{"nonCachedTokens": 512}"#, 640, 0, true),
            (r#"{"nonCachedTokens": 512}"#, 640, 2, true),
            (r#"{"nonCachedTokens": 512}"#, 640, 3, false),
            (r#"{"nonCachedTokens": 512}"#, 511, 0, false),
            (r#"{"nonCachedTokens": 512}"#, 512, 0, true),
            // A partial last block counts whole: 600 - 10 * 64 is not below 0.
            (r#"{"nonCachedTokens": 1}"#, 600, 10, false),
            (both, 1023, 0, false),
            (both, 1024, 0, true),
            // 1024 - 9 * 64 = 448.
            (both, 1024, 9, false),
            // Zero never splits, whatever the prompt.
            ("{}", 100_000, 0, false),
            (r#"{"promptTokens": 10}"#, 100_000, 0, false),
        ] {
            let got = answer(parameters, tokens, blocks, Some(0));
            assert_eq!(got, wanted, "{parameters} {tokens} {blocks}");
        }
    }

    #[test]
    fn what_is_not_known_stays_together() {
        let settings = r#"{"nonCachedTokens": 16}"#;
        assert!(!answer(settings, 640, 0, None), "no decode pick");
        assert!(!answer(settings, 640, 0, Some(7)), "no such candidate");
        let mut pool = Pool::new([endpoint("d")]);
        let decider: PrefixBasedDecider = pool.plugin(settings);
        let answer = pool.with_round(&[], |round| decider.wants_stage(round, Some(0)));
        assert!(!answer, "no token count");
    }

    #[test]
    fn the_most_exact_match_counts_unless_an_instance_is_named() {
        let pool = |decider: &PrefixBasedDecider, pool: &Pool, exact: u32| {
            let mut keys = pool.keys.clone();
            let precise = keys.optional::<PrefixMatch>(PREFIX_MATCH, "exact");
            let approximate = keys.optional::<PrefixMatch>(PREFIX_MATCH, APPROX_PREFIX_PRODUCER);
            let mut attributes = keys.new_attributes();
            attributes.write(decider.tokens).push(640);
            for (column, blocks) in [(precise, exact), (approximate, 0)] {
                attributes.write(column).push(PrefixMatch {
                    // Slower memory may count for less; what is cached need not be computed.
                    matched_blocks: blocks / 2,
                    total_blocks: 10,
                    block_size_tokens: 64,
                    cached_blocks: blocks,
                    host_blocks: None,
                });
            }
            pool.with_cycle(|cycle, candidates| {
                let cycle = crate::scheduling::Cycle {
                    attributes: &attributes,
                    ..*cycle
                };
                let round = Round {
                    cycle: &cycle,
                    candidates,
                    names: &[],
                    prefix_matches: &[precise, approximate],
                };
                decider.wants_stage(&round, Some(0))
            })
        };
        let mut own = Pool::new([endpoint("d")]);
        let decider: PrefixBasedDecider = own.plugin(r#"{"nonCachedTokens": 100}"#);
        // 640 - 9 * 64 = 64 tokens are missing by events, all 640 by the approximate index.
        assert!(!pool(&decider, &own, 9));
        assert!(pool(&decider, &own, 8), "640 - 512 = 128");
        let named: PrefixBasedDecider = own.plugin(
            r#"{"nonCachedTokens": 100, "prefixMatchInfoProducerName": "approx-prefix-cache-producer"}"#,
        );
        assert!(pool(&named, &own, 9));
    }

    #[test]
    fn negative_numbers_are_refused_by_name() {
        for (parameters, wanted) in [
            (
                r#"{"nonCachedTokens": -1}"#,
                "nonCachedTokens: -1 is below 0",
            ),
            (r#"{"promptTokens": -5}"#, "promptTokens: -5 is below 0"),
            (r#"{"threshold": 5}"#, "threshold: unknown field"),
        ] {
            let text = refusal::<PrefixBasedDecider>(parameters);
            assert!(text.starts_with(wanted), "{text}");
        }
    }
}
