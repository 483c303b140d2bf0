//! `burst-prefix-cache-producer`: sends a burst of similar prompts to one endpoint.

mod assign;
mod window;

use std::any::Any;
use std::time::Duration;

use serde::Deserialize;

use super::block_hash::{Cut, hash_request};
use crate::plugin::{
    Attributes, Build, Column, Maturity, ParamDoc, ParamError, Plugin, PluginError,
};
use crate::request::InferenceRequest;
use crate::scheduling::attributes::{
    MEDIA_FEATURES, MediaFeature, PREFIX_MATCH, PrefixMatch, TOKEN_PRODUCER, TOKENIZED_PROMPT,
};
use crate::scheduling::{Candidate, DataProducer, Preparation, ProducerError};
use assign::Rules;
use window::{Placing, Windows};

/// Longest window: every request waits for its end.
const MAX_WINDOW_MS: i64 = 10_000;
/// What a producer may need besides the window.
const TIMEOUT_MARGIN: Duration = Duration::from_millis(300);
/// Blocks of a prompt that are matched unless configured.
const DEFAULT_MAX_BLOCKS: usize = 2048;

/// Lets requests wait for the end of a window and places those with equal or similar prompts together,
/// so that a prefix which no endpoint holds yet is computed once.
///
/// Publishes a full match on the endpoint a request was placed on and none elsewhere; no match at all
/// for a request that shares nothing. A request without a prompt does not wait. One that finds the
/// window full, or is not placed in time, fails this producer.
#[derive(Debug)]
pub struct BurstPrefixProducer {
    windows: Windows,
    window: Duration,
    block_tokens: u32,
    max_blocks: usize,
    max_requests: Option<usize>,
    media: Column<MediaFeature>,
    matches: Column<PrefixMatch>,
}

#[derive(Debug, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
struct Settings {
    window_duration_ms: i64,
    max_per_replica: i64,
    block_size_tokens: i64,
    max_prefix_tokens_to_match: i64,
    min_colocate_blocks: i64,
    max_batch_size: i64,
    balance_by: BalanceBy,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum BalanceBy {
    #[default]
    #[serde(alias = "")]
    Requests,
    Tokens,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            window_duration_ms: 100,
            max_per_replica: -1,
            block_size_tokens: 64,
            max_prefix_tokens_to_match: 0,
            min_colocate_blocks: 0,
            max_batch_size: 1000,
            balance_by: BalanceBy::Requests,
        }
    }
}

/// `value`, or `None` for -1.
fn limit(name: &str, value: i64) -> Result<Option<usize>, ParamError> {
    match usize::try_from(value) {
        Ok(n) if n > 0 => Ok(Some(n)),
        _ if value == -1 => Ok(None),
        _ => Err(ParamError(format!(
            "{name}: {value} is neither -1 nor at least 1"
        ))),
    }
}

fn at_least_0(name: &str, value: i64) -> Result<usize, ParamError> {
    usize::try_from(value).map_err(|_| ParamError(format!("{name}: {value} is below 0")))
}

impl Settings {
    fn window(&self) -> Result<Duration, ParamError> {
        let ms = self.window_duration_ms;
        let window = u64::try_from(ms).map(Duration::from_millis).ok();
        window
            .filter(|_| (1..=MAX_WINDOW_MS).contains(&ms))
            .ok_or_else(|| {
                ParamError(format!(
                    "windowDurationMs: {ms} is not within 1 and {MAX_WINDOW_MS}"
                ))
            })
    }

    fn block_tokens(&self) -> Result<u32, ParamError> {
        let tokens = self.block_size_tokens;
        let block = u32::try_from(tokens).ok().filter(|n| *n > 0);
        block.ok_or_else(|| ParamError(format!("blockSizeTokens: {tokens} is not above 0")))
    }

    fn max_blocks(&self, block_tokens: u32) -> Result<usize, ParamError> {
        let tokens = at_least_0("maxPrefixTokensToMatch", self.max_prefix_tokens_to_match)?;
        match tokens / block_tokens as usize {
            0 if tokens > 0 => Err(ParamError(format!(
                "maxPrefixTokensToMatch: {tokens} is less than a block of {block_tokens}"
            ))),
            0 => Ok(DEFAULT_MAX_BLOCKS),
            blocks => Ok(blocks),
        }
    }
}

impl Plugin for BurstPrefixProducer {
    const TYPE: &'static str = "burst-prefix-cache-producer";
    const MATURITY: Maturity = Maturity::Alpha;
    const PARAMETERS: &'static [ParamDoc] = &[
        ParamDoc {
            name: "windowDurationMs",
            kind: "int",
            default: "100",
            help: "How long the first request of a window waits for others, in ms; 1 to 10000.",
        },
        ParamDoc {
            name: "maxPerReplica",
            kind: "int",
            default: "-1",
            help: "Requests with one prompt that an endpoint gets from a window; at least 1, or -1 for all.",
        },
        ParamDoc {
            name: "blockSizeTokens",
            kind: "int",
            default: "64",
            help: "Tokens of a block; above 0.",
        },
        ParamDoc {
            name: "maxPrefixTokensToMatch",
            kind: "int",
            default: "0",
            help: "Tokens of a prompt that are compared, at least a block; 0 compares 2048 blocks.",
        },
        ParamDoc {
            name: "minColocateBlocks",
            kind: "int",
            default: "0",
            help: "Leading blocks that different prompts must share to be placed together; 0 places only equal ones.",
        },
        ParamDoc {
            name: "maxBatchSize",
            kind: "int",
            default: "1000",
            help: "Requests that may wait in a window; -1 and more than 65536 mean 65536.",
        },
        ParamDoc {
            name: "balanceBy",
            kind: "string",
            default: "requests",
            help: "What is spread evenly: requests, or tokens that must be computed.",
        },
    ];
    const ABOUT: &'static str = "Places bursts of similar prompts on one endpoint.";

    fn build(build: &mut Build<'_>) -> Result<Self, PluginError> {
        let settings: Settings = build.read::<Self, _>()?;
        let window = settings.window()?;
        let block_tokens = settings.block_tokens()?;
        let max_requests = limit("maxBatchSize", settings.max_batch_size)?;
        let rules = Rules {
            max_per_replica: limit("maxPerReplica", settings.max_per_replica)?,
            min_colocate_blocks: at_least_0("minColocateBlocks", settings.min_colocate_blocks)?,
            by_tokens: settings.balance_by == BalanceBy::Tokens,
        };
        build.keys.require::<u64>(TOKENIZED_PROMPT, TOKEN_PRODUCER);
        Ok(Self {
            windows: Windows::new(window, max_requests, rules),
            window,
            block_tokens,
            max_blocks: settings.max_blocks(block_tokens)?,
            max_requests,
            media: build.keys.require(MEDIA_FEATURES, TOKEN_PRODUCER),
            matches: build.keys.produce(PREFIX_MATCH),
        })
    }
}

impl BurstPrefixProducer {
    /// Block hashes of the prompts, one after the other.
    fn chain(&self, request: &InferenceRequest, attributes: &Attributes) -> Vec<u64> {
        let media = attributes.get(self.media).unwrap_or_default();
        let (mut chain, mut ends) = (Vec::new(), Vec::new());
        hash_request(
            request,
            media,
            Cut {
                block_tokens: self.block_tokens as usize,
                max_blocks: self.max_blocks,
            },
            &mut chain,
            &mut ends,
        );
        chain
    }

    fn publish(
        &self,
        blocks: usize,
        endpoint: Option<&str>,
        candidates: &[Candidate],
        attributes: &mut Attributes,
    ) {
        let total_blocks = u32::try_from(blocks).unwrap_or(u32::MAX);
        let matches = candidates.iter().map(|candidate| {
            let spec = &candidate.endpoint.spec;
            let name = endpoint.and_then(|e| e.strip_prefix(spec.namespace.as_str()));
            let placed = name.and_then(|n| n.strip_prefix('/')) == Some(spec.name.as_str());
            let blocks = if placed { total_blocks } else { 0 };
            PrefixMatch {
                matched_blocks: blocks,
                total_blocks,
                block_size_tokens: self.block_tokens,
                cached_blocks: blocks,
                host_blocks: None,
            }
        });
        attributes.write(self.matches).extend(matches);
    }
}

/// What a request waited for, and how long its chain is.
#[derive(Debug)]
struct Waited {
    placing: Placing,
    blocks: usize,
}

impl DataProducer for BurstPrefixProducer {
    /// Without a window nothing is placed.
    fn produce(
        &self,
        request: &InferenceRequest,
        candidates: &[Candidate],
        attributes: &mut Attributes,
    ) -> Result<(), ProducerError> {
        let blocks = self.chain(request, attributes).len();
        self.publish(blocks, None, candidates, attributes);
        Ok(())
    }

    /// A request joins the window it is prepared for.
    fn is_pure(&self) -> bool {
        false
    }

    fn prepare(
        &self,
        request: &InferenceRequest,
        candidates: &[Candidate],
        attributes: &Attributes,
    ) -> Option<Preparation> {
        let chain = self.chain(request, attributes);
        if chain.is_empty() {
            return None;
        }
        let blocks = chain.len();
        let placing = self.windows.wait(chain, candidates);
        let work = async move {
            let placing = placing.await;
            Box::new(Waited { placing, blocks }) as Box<dyn Any + Send>
        };
        Some(Preparation {
            work: Box::pin(work),
            timeout: self.window + TIMEOUT_MARGIN,
        })
    }

    fn produce_prepared(
        &self,
        prepared: Box<dyn Any + Send>,
        _: &InferenceRequest,
        candidates: &[Candidate],
        attributes: &mut Attributes,
    ) -> Result<(), ProducerError> {
        let waited = prepared
            .downcast::<Waited>()
            .map_err(|_| ProducerError("not prepared by this producer".to_owned()))?;
        match waited.placing {
            Placing::Full => Err(ProducerError(format!(
                "burst window full: maxBatchSize {} reached",
                self.max_requests.unwrap_or(window::MAX_WAITING)
            ))),
            Placing::Placed(endpoint) => {
                self.publish(waited.blocks, endpoint.as_deref(), candidates, attributes);
                Ok(())
            }
        }
    }
}

#[cfg(test)]
mod tests;
