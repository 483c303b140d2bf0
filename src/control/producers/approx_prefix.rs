//! `approx-prefix-cache-producer`: how much of a prompt each endpoint was sent before.

use std::cell::RefCell;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use metrics::{Gauge, Histogram};
use serde::Deserialize;

use super::block_hash::{Cut, hash_request};
use super::prefix_index::{DEFAULT_BUDGET_BYTES, PrefixIndex, WalkScratch};
use crate::datalayer::{Endpoint, EndpointListener};
use crate::plugin::{
    Attributes, Build, Column, Maturity, ParamDoc, ParamError, Plugin, PluginError,
};
use crate::request::{EarlyBlocks, EarlyWork, InferenceRequest};
use crate::scheduling::attributes::{
    APPROX_PREFIX_PRODUCER, MEDIA_FEATURES, MediaFeature, PREFIX_MATCH, PrefixMatch,
    TOKEN_PRODUCER, TOKENIZED_PROMPT,
};
use crate::scheduling::{
    Candidate, Cycle, DataProducer, Outcome, PreRequest, ProducerError, SchedulingResult,
};
use crate::telemetry::metrics::{Pair, labels};

/// Smallest block in tokens; the reference raises every smaller one to it.
const MIN_BLOCK_TOKENS: u32 = 64;
/// Blocks remembered per endpoint unless configured or reported.
const DEFAULT_CAPACITY: u32 = 31_250;
/// Internal column with the request's block hashes, so that a pick does not hash again.
const CHAIN: &str = "approx-prefix-chain";

/// Guesses which endpoint holds which prefix from what it was sent; a pick counts at once.
///
/// The whole prompt is matched unless `maxPrefixTokensToMatch` caps it: here a block costs some
/// 50 ns, so the reference's cap of 131,072 tokens would only lose long prefixes.
#[derive(Debug)]
pub struct ApproxPrefixProducer {
    index: PrefixIndex,
    auto_tune: bool,
    block_tokens: u32,
    /// Block size of the last request, which the next one most likely has too.
    last_block_tokens: AtomicU32,
    /// Cap in tokens, or in blocks when only the deprecated parameter is set.
    cap: Cap,
    capacity: u32,
    media: Column<MediaFeature>,
    matches: Column<PrefixMatch>,
    chain: Column<Chain>,
    size: Pair<Gauge>,
    hit_ratio: Pair<Histogram>,
    hit_bytes: Pair<Histogram>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Cap {
    None,
    Tokens(usize),
    Blocks(usize),
}

impl Cap {
    fn blocks(self, block_tokens: u32) -> usize {
        match self {
            Self::None => usize::MAX,
            Self::Blocks(blocks) => blocks,
            Self::Tokens(tokens) => tokens / block_tokens.max(1) as usize,
        }
    }
}

/// Hashes of one request: the chains of its prompts one after the other.
#[derive(Debug, Default)]
struct Chain {
    hashes: Vec<u64>,
    /// End of each prompt's chain.
    ends: Vec<usize>,
    /// (prompt, endpoint, leading blocks) that the index need not be told again.
    young: Vec<(u32, u32, u32)>,
    block_tokens: u32,
}

#[derive(Debug, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
struct Settings {
    auto_tune: bool,
    block_size_tokens: i64,
    block_size: i64,
    max_prefix_tokens_to_match: Option<i64>,
    max_prefix_blocks_to_match: Option<i64>,
    lru_capacity_per_server: i64,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            auto_tune: true,
            block_size_tokens: 16,
            block_size: 0,
            max_prefix_tokens_to_match: None,
            max_prefix_blocks_to_match: None,
            lru_capacity_per_server: i64::from(DEFAULT_CAPACITY),
        }
    }
}

thread_local! {
    static SCRATCH: RefCell<(Vec<u32>, WalkScratch)> = RefCell::default();
}

impl Plugin for ApproxPrefixProducer {
    const TYPE: &'static str = APPROX_PREFIX_PRODUCER;
    const MATURITY: Maturity = Maturity::Beta;
    const PARAMETERS: &'static [ParamDoc] = &[
        ParamDoc {
            name: "autoTune",
            kind: "bool",
            default: "true",
            help: "Take the block size from the first candidate's metrics and the capacity from the chosen endpoint's.",
        },
        ParamDoc {
            name: "blockSizeTokens",
            kind: "int",
            default: "16",
            help: "Tokens of a block without autoTune; above 0, raised to at least 64.",
        },
        ParamDoc {
            name: "blockSize",
            kind: "int",
            default: "",
            help: "Deprecated name of blockSizeTokens.",
        },
        ParamDoc {
            name: "maxPrefixTokensToMatch",
            kind: "int",
            default: "none",
            help: "Tokens of a prompt that are matched; 0 leaves the cap to maxPrefixBlocksToMatch. Without either the whole prompt is.",
        },
        ParamDoc {
            name: "maxPrefixBlocksToMatch",
            kind: "int",
            default: "none",
            help: "Deprecated: the cap in blocks, used when maxPrefixTokensToMatch is 0.",
        },
        ParamDoc {
            name: "lruCapacityPerServer",
            kind: "int",
            default: "31250",
            help: "Blocks remembered per endpoint unless its metrics tell; 0 and less mean the default.",
        },
    ];
    const ABOUT: &'static str = "Matches prompts against what was sent to each endpoint.";

    fn build(build: &mut Build<'_>) -> Result<Self, PluginError> {
        let settings: Settings = build.read::<Self, _>()?;
        let own = labels(&[("plugin_name", build.name), ("plugin_type", Self::TYPE)]);
        build.keys.require::<u64>(TOKENIZED_PROMPT, TOKEN_PRODUCER);
        let block_tokens = settings.block_tokens()?;
        Ok(Self {
            index: PrefixIndex::new(DEFAULT_BUDGET_BYTES),
            auto_tune: settings.auto_tune,
            block_tokens,
            last_block_tokens: AtomicU32::new(block_tokens),
            cap: settings.cap()?,
            capacity: u32::try_from(settings.lru_capacity_per_server)
                .ok()
                .filter(|n| *n > 0)
                .unwrap_or(DEFAULT_CAPACITY),
            media: build.keys.require(MEDIA_FEATURES, TOKEN_PRODUCER),
            matches: build.keys.produce(PREFIX_MATCH),
            chain: build.keys.produce(CHAIN),
            size: Pair::gauge("llm_d_epp_prefix_indexer_size", own.clone(), Vec::new()),
            hit_ratio: Pair::histogram(
                "llm_d_epp_prefix_indexer_hit_ratio",
                own.clone(),
                Vec::new(),
            ),
            hit_bytes: Pair::histogram("llm_d_epp_prefix_indexer_hit_bytes", own, Vec::new()),
        })
    }
}

impl Settings {
    fn block_tokens(&self) -> Result<u32, ParamError> {
        let size = if self.block_size_tokens == 16 && self.block_size > 0 {
            self.block_size
        } else {
            self.block_size_tokens
        };
        match u32::try_from(size) {
            Ok(tokens) if tokens > 0 => Ok(tokens.max(MIN_BLOCK_TOKENS)),
            _ if self.auto_tune => Ok(MIN_BLOCK_TOKENS),
            _ => Err(ParamError(format!(
                "blockSizeTokens: {size} is not above 0"
            ))),
        }
    }

    fn cap(&self) -> Result<Cap, ParamError> {
        let read = |name: &str, value: Option<i64>| match value.map(usize::try_from) {
            None => Ok(None),
            Some(Ok(n)) => Ok(Some(n)),
            Some(Err(_)) => Err(ParamError(format!("{name}: must be at least 0"))),
        };
        let tokens = read("maxPrefixTokensToMatch", self.max_prefix_tokens_to_match)?;
        let blocks = read("maxPrefixBlocksToMatch", self.max_prefix_blocks_to_match)?;
        Ok(match (tokens, blocks) {
            (Some(tokens), _) if tokens > 0 => Cap::Tokens(tokens),
            // As in the reference, whose token cap has a default, only beside a token cap of 0.
            (Some(_), Some(blocks)) if blocks > 0 => Cap::Blocks(blocks),
            _ => Cap::None,
        })
    }
}

impl ApproxPrefixProducer {
    fn block_tokens(&self, candidates: &[Candidate]) -> u32 {
        let reported = candidates
            .first()
            .and_then(|c| c.metrics.block_size_tokens)
            .filter(|_| self.auto_tune);
        reported.map_or(self.block_tokens, |tokens| tokens.max(MIN_BLOCK_TOKENS))
    }

    /// Blocks of ours that fit into the endpoint's cache. The reference takes the engine's number of
    /// blocks as it is, which overestimates the cache by the ratio of the block sizes.
    fn capacity(&self, candidate: &Candidate, block_tokens: u32) -> u32 {
        let metrics = &candidate.metrics;
        let reported = metrics
            .kv_blocks
            .zip(metrics.block_size_tokens)
            .filter(|_| self.auto_tune);
        let blocks = reported
            .map(|(blocks, size)| u64::from(blocks) * u64::from(size) / u64::from(block_tokens));
        blocks
            .and_then(|n| u32::try_from(n).ok())
            .filter(|n| *n > 0)
            .unwrap_or(self.capacity)
    }

    fn hash(
        &self,
        request: &InferenceRequest,
        media: &[MediaFeature],
        block_tokens: u32,
        chain: &mut Chain,
    ) {
        let max_blocks = self.cap.blocks(block_tokens);
        chain.block_tokens = block_tokens;
        chain
            .hashes
            .reserve((request.body.len() / (block_tokens as usize * 4)).min(max_blocks) + 1);
        hash_request(
            request,
            media,
            Cut {
                block_tokens: block_tokens as usize,
                max_blocks,
            },
            &mut chain.hashes,
            &mut chain.ends,
        );
    }
}

impl Chain {
    fn clear(&mut self) {
        self.hashes.clear();
        self.ends.clear();
        self.young.clear();
    }

    /// The leading blocks of prompt number `prompt` that the index need not be told of for `endpoint`.
    fn young(&self, prompt: u32, endpoint: u32) -> u32 {
        let mut known = self.young.iter();
        known
            .find(|(p, e, _)| (*p, *e) == (prompt, endpoint))
            .map_or(0, |(.., young)| *young)
    }

    fn prompts(&self) -> impl Iterator<Item = &[u64]> {
        prompts(&self.hashes, &self.ends)
    }
}

fn prompts<'a>(hashes: &'a [u64], ends: &'a [usize]) -> impl Iterator<Item = &'a [u64]> {
    let starts = std::iter::once(0).chain(ends.iter().copied());
    starts
        .zip(ends)
        .filter_map(|(from, to)| hashes.get(from..*to))
}

impl DataProducer for ApproxPrefixProducer {
    fn produce(
        &self,
        request: &InferenceRequest,
        candidates: &[Candidate],
        attributes: &mut Attributes,
    ) -> Result<(), ProducerError> {
        let block_tokens = self.block_tokens(candidates);
        if self.last_block_tokens.load(Ordering::Relaxed) != block_tokens {
            self.last_block_tokens
                .store(block_tokens, Ordering::Relaxed);
        }
        // Last request's chain lends its memory.
        let mut chain = attributes.reuse(self.chain).pop().unwrap_or_default();
        chain.clear();
        let media = attributes.get(self.media).unwrap_or_default();
        self.hash(request, media, block_tokens, &mut chain);
        let total_blocks = u32::try_from(chain.hashes.len()).unwrap_or(u32::MAX);
        let best = SCRATCH.with_borrow_mut(|(matched, walk)| {
            let largest = candidates
                .iter()
                .map(|c| c.endpoint.index.0 as usize + 1)
                .max()
                .unwrap_or(0);
            matched.clear();
            matched.resize(largest, 0);
            let Chain {
                hashes,
                ends,
                young,
                ..
            } = &mut chain;
            for (blocks, prompt) in prompts(hashes, ends).zip(0..) {
                for found in self.index.match_chain(blocks, walk) {
                    young.push((prompt, found.endpoint, found.young));
                    if let Some(total) = matched.get_mut(found.endpoint as usize) {
                        *total += found.blocks;
                    }
                }
            }
            let found = candidates.iter().map(|c| {
                let blocks = matched.get(c.endpoint.index.0 as usize);
                let blocks = blocks.copied().unwrap_or(0);
                PrefixMatch {
                    matched_blocks: blocks,
                    total_blocks,
                    block_size_tokens: block_tokens,
                    cached_blocks: blocks,
                    host_blocks: None,
                }
            });
            let column = attributes.write(self.matches);
            column.extend(found);
            column.iter().map(|m| m.matched_blocks).max().unwrap_or(0)
        });
        if total_blocks > 0 {
            self.hit_ratio
                .record(f64::from(best) / f64::from(total_blocks));
            // Four bytes a token, as the estimate counts them.
            self.hit_bytes
                .record(f64::from(best) * f64::from(block_tokens) * 4.0);
        }
        attributes.reuse(self.chain).push(chain);
        Ok(())
    }

    fn early_work(&self) -> EarlyWork {
        let tokens = self.last_block_tokens.load(Ordering::Relaxed);
        let max = self.cap.blocks(tokens);
        EarlyWork {
            blocks: Some(EarlyBlocks { tokens, max }),
            texts: false,
        }
    }
}

impl PreRequest for ApproxPrefixProducer {
    /// Learns the prompt for the primary pick and the `prefill` pick.
    fn on_pick(
        &self,
        cycle: &Cycle<'_>,
        candidates: &[Candidate],
        result: &SchedulingResult,
        _: &mut Outcome,
    ) {
        let Some(chain) = cycle.attributes.get(self.chain).and_then(<[Chain]>::first) else {
            return;
        };
        let prefill = result.others.iter().filter(|p| &*p.profile == "prefill");
        for picks in std::iter::once(&result.primary).chain(prefill) {
            let first = picks
                .picks
                .first()
                .and_then(|&p| candidates.get(p as usize));
            let Some(candidate) = first else { continue };
            let capacity = self.capacity(candidate, chain.block_tokens);
            let endpoint = &candidate.endpoint;
            for (blocks, prompt) in chain.prompts().zip(0..) {
                let young = chain.young(prompt, endpoint.index.0);
                self.index
                    .insert(endpoint.index.0, blocks, young, capacity, || {
                        endpoint.is_removed()
                    });
            }
        }
        self.size.set(self.index.len() as f64);
    }
}

impl EndpointListener for ApproxPrefixProducer {
    fn added(&self, _: &Arc<Endpoint>) {}

    fn removed(&self, endpoint: &Arc<Endpoint>) {
        self.index.forget(endpoint.index.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::producers::token::TokenProducer;
    use crate::request::openai::OpenAiParser;
    use crate::request::{Body, Parser};
    use crate::scheduling::ProfilePicks;
    use crate::scheduling::test_support::{Pool, endpoint};

    fn ask(pool: &mut Pool, text: &str) {
        let body = Body::from(
            serde_json::json!({"model": "m", "prompt": text})
                .to_string()
                .as_str(),
        );
        let payload = OpenAiParser.parse("/v1/completions", &body).unwrap();
        pool.request = InferenceRequest::new("r", payload, body);
    }

    /// Matched and total blocks per endpoint, then books the prompt on `pick`.
    fn round(producer: &ApproxPrefixProducer, pool: &Pool, pick: u32) -> Vec<(u32, u32)> {
        let mut attributes = pool.keys.new_attributes();
        producer
            .produce(&pool.request, &pool.candidates, &mut attributes)
            .unwrap();
        let found = attributes
            .get(producer.matches)
            .unwrap()
            .iter()
            .map(|m| (m.matched_blocks, m.total_blocks));
        let found = found.collect();
        let result = SchedulingResult {
            primary: ProfilePicks {
                profile: "default".into(),
                picks: [pick].into_iter().collect(),
            },
            others: smallvec::SmallVec::new(),
        };
        let cycle = Cycle {
            request: &pool.request,
            attributes: &attributes,
            now: tokio::time::Instant::now(),
            rng: &pool.rng,
        };
        producer.on_pick(&cycle, &pool.candidates, &result, &mut Outcome::default());
        found
    }

    #[test]
    fn a_pick_is_known_to_the_next_request() {
        let mut pool = Pool::new([endpoint("a"), endpoint("b")]);
        let producer: ApproxPrefixProducer = pool.plugin("{}");
        // 64 tokens are 256 bytes: 1000 bytes are 3 full blocks and a partial one.
        let text = "x".repeat(1000);
        ask(&mut pool, &text);
        assert_eq!(round(&producer, &pool, 1), [(0, 4), (0, 4)]);
        assert_eq!(round(&producer, &pool, 1), [(0, 4), (4, 4)]);
        // A longer prompt shares the three full blocks; the partial one had other bytes.
        ask(&mut pool, &format!("{text}{}", "y".repeat(300)));
        assert_eq!(round(&producer, &pool, 0), [(0, 6), (3, 6)]);
        producer.removed(&pool.candidates[1].endpoint);
        assert_eq!(round(&producer, &pool, 0), [(6, 6), (0, 6)]);
    }

    #[test]
    fn model_and_salt_separate_prefixes() {
        let mut pool = Pool::new([endpoint("a")]);
        let producer: ApproxPrefixProducer = pool.plugin("{}");
        ask(&mut pool, &"x".repeat(256));
        round(&producer, &pool, 0);
        pool.request.payload.cache_salt = Some("tenant".to_owned());
        assert_eq!(round(&producer, &pool, 0), [(0, 1)]);
        pool.request.payload.cache_salt = None;
        pool.request.target_model = "adapter".to_owned();
        assert_eq!(round(&producer, &pool, 0), [(0, 1)]);
    }

    #[test]
    fn media_are_as_long_as_the_token_producer_says() {
        let mut pool = Pool::new([endpoint("a")]);
        let producer: ApproxPrefixProducer = pool.plugin("{}");
        let body = r#"{"messages":[{"role":"user","content":[{"type":"image_url","image_url":{"url":"u"}}]}]}"#;
        let body = Body::from(body);
        let payload = OpenAiParser.parse("/v1/chat/completions", &body).unwrap();
        pool.request = InferenceRequest::new("r", payload, body);
        let blocks = |pool: &mut Pool, tokens: &str| {
            let estimate = format!(
                r#"{{"estimate": {{"image": {{"mode": "static", "static": {{"staticToken": {tokens}}}}}}}}}"#
            );
            let counter: TokenProducer = pool.plugin(&estimate);
            let mut attributes = pool.keys.new_attributes();
            for step in [&counter as &dyn DataProducer, &producer] {
                step.produce(&pool.request, &pool.candidates, &mut attributes)
                    .unwrap();
            }
            attributes.get(producer.matches).unwrap()[0].total_blocks
        };
        // One token of role and the image, in blocks of 64.
        assert_eq!(blocks(&mut pool, "63"), 1);
        assert_eq!(blocks(&mut pool, "64"), 2);
        assert_eq!(blocks(&mut pool, "1000"), 16);
    }

    #[test]
    fn caps_and_block_sizes_are_honoured() {
        let mut pool = Pool::new([endpoint("a")]);
        let blocks = |pool: &mut Pool, parameters: &str| {
            let producer: ApproxPrefixProducer = pool.plugin(parameters);
            ask(pool, &"x".repeat(256 * 10));
            round(&producer, pool, 0)[0].1
        };
        assert_eq!(blocks(&mut pool, "{}"), 10);
        assert_eq!(blocks(&mut pool, r#"{"maxPrefixTokensToMatch": 200}"#), 3);
        assert_eq!(blocks(&mut pool, r#"{"maxPrefixTokensToMatch": 10}"#), 0);
        assert_eq!(
            blocks(
                &mut pool,
                r#"{"maxPrefixTokensToMatch": 0, "maxPrefixBlocksToMatch": 2}"#
            ),
            2
        );
        assert_eq!(
            blocks(&mut pool, r#"{"autoTune": false, "blockSizeTokens": 128}"#),
            5
        );
        assert_eq!(blocks(&mut pool, r#"{"blockSize": 128}"#), 5);
        assert_eq!(blocks(&mut pool, r#"{"blockSizeTokens": 8}"#), 10);
    }

    #[test]
    fn the_capacity_is_the_engines_in_blocks_of_ours() {
        let mut pool = Pool::new([endpoint("a")]);
        let producer: ApproxPrefixProducer = pool.plugin("{}");
        let mut candidate = pool.candidates[0].clone();
        assert_eq!(producer.capacity(&candidate, 64), 31_250);
        let mut metrics = (*candidate.metrics).clone();
        (metrics.kv_blocks, metrics.block_size_tokens) = (Some(1000), Some(16));
        candidate.metrics = Arc::new(metrics);
        // 1000 blocks of 16 tokens are 250 blocks of 64.
        assert_eq!(producer.capacity(&candidate, 64), 250);
    }
}
