//! Matching by an index that replicas share.

use std::any::Any;
use std::sync::Arc;
use std::time::Duration;

use super::{PRODUCER_RESULT, PrecisePrefixProducer, Prediction, Trust, record_matches};
use crate::datalayer::EndpointIndex;
use crate::kvcache::events::wire::without_adapter;
use crate::kvcache::redis::{Found, LOOKUP_LIMIT, SharedError, SharedIndex, TIERS};
use crate::kvcache::tokens::service::PromptTokens;
use crate::plugin::Attributes;
use crate::request::InferenceRequest;
use crate::scheduling::attributes::PrefixMatch;
use crate::scheduling::{Candidate, Preparation, ProducerError, SchedulingResult};
use crate::telemetry::trace::Span;

/// What the preparation may take beyond its own limit before it counts as failed.
const MARGIN: Duration = Duration::from_millis(100);

/// What a look-up ended with.
struct Answer {
    /// Keys of each prompt.
    keys: Vec<Vec<u64>>,
    found: Result<Vec<Vec<Found>>, SharedError>,
}

impl PrecisePrefixProducer {
    /// Starts the look-up of a request that has ids.
    pub(super) fn prepare_shared(
        &self,
        index: &Arc<SharedIndex>,
        request: &InferenceRequest,
        candidates: &[Candidate],
        attributes: &Attributes,
    ) -> Option<Preparation> {
        let prompts = attributes.get(self.ids).filter(|ids| !ids.is_empty())?;
        let keys: Vec<_> = prompts
            .iter()
            .map(|prompt| shared_keys(index, request, prompt))
            .collect();
        let names: Vec<_> = candidates
            .iter()
            .map(|c| c.endpoint.host_port_str().to_owned())
            .collect();
        let index = Arc::clone(index);
        let work = async move {
            let found = index.lookup(keys.clone(), names).await;
            Box::new(Answer { keys, found }) as Box<dyn Any + Send>
        };
        Some(Preparation {
            work: Box::pin(work),
            timeout: LOOKUP_LIMIT + MARGIN,
        })
    }

    /// Publishes what was found; where nothing is known, what the approximate producer knows.
    pub(super) fn produce_shared(
        &self,
        index: &SharedIndex,
        prepared: Box<dyn Any + Send>,
        candidates: &[Candidate],
        (attributes, span): (&mut Attributes, &mut Span),
    ) -> Result<(), ProducerError> {
        let Answer { keys, found } = *prepared
            .downcast::<Answer>()
            .map_err(|_| ProducerError("not prepared by this producer".to_owned()))?;
        let guesses = attributes.get(self.approximate).unwrap_or_default();
        let guess = |at: usize| guesses.get(at).copied().unwrap_or_default();
        let block_tokens = index.scheme().block_tokens();
        let prompts = attributes.get(self.ids).unwrap_or_default();
        let total: usize = prompts
            .iter()
            .map(|p| p.ids.len() / block_tokens.max(1))
            .sum();
        let whole = prompts.iter().all(PromptTokens::is_whole);
        let held: Vec<Found> = match &found {
            Ok(prompts) => (0..candidates.len()).map(|at| sum(prompts, at)).collect(),
            Err(_) => Vec::new(),
        };
        let mut known = 0;
        let matches: Vec<_> = if let Err(error) = &found {
            self.shared_failed.increment(1);
            span.record(|| [(PRODUCER_RESULT, "shared_failed".into())]);
            tracing::debug!(%error, "prompt matched approximately");
            (0..candidates.len()).map(guess).collect()
        } else {
            let heard = self.publishers.heard();
            let on = |(at, candidate): (usize, &Candidate)| {
                let sum = held.get(at).copied().unwrap_or_default();
                if sum.blocks == 0 && !heard.contains(&candidate.endpoint.index) {
                    return guess(at);
                }
                known += 1;
                shared_match(&sum, total, block_tokens)
            };
            candidates.iter().enumerate().map(on).collect()
        };
        if found.is_ok() {
            self.count(whole, known, candidates.len(), span);
        }
        record_matches(span, &matches);
        attributes.write(self.matches).extend(matches);
        // What other replicas wrote is no claim of ours to hold an engine to.
        attributes
            .write(self.predictions)
            .resize(candidates.len(), Prediction::default());
        attributes.write(self.shared_keys).extend(keys);
        attributes.write(self.shared_found).extend(held);
        Ok(())
    }

    /// Lets the picks count as holding the prompt for a while.
    pub(super) fn expect_shared(
        index: &SharedIndex,
        keys: &[Vec<u64>],
        candidates: &[Candidate],
        result: &SchedulingResult,
        ttl: Duration,
    ) {
        let prefill = result.others.iter().filter(|p| &*p.profile == "prefill");
        for picks in std::iter::once(&result.primary).chain(prefill) {
            let first = picks.picks.first();
            if let Some(candidate) = first.and_then(|&pick| candidates.get(pick as usize)) {
                let name = candidate.endpoint.host_port_str();
                index.expect(name, keys.concat(), ttl);
            }
        }
    }

    /// Matches as the request would be scheduled by; the layout tells no times.
    pub(super) fn explain_shared(
        &self,
        index: &SharedIndex,
        candidates: &[Candidate],
        attributes: &Attributes,
    ) -> Option<serde_json::Value> {
        let prompts = attributes.get(self.ids)?;
        let matches = attributes.get(self.matches)?;
        let held = attributes.get(self.shared_found).unwrap_or_default();
        let endpoints = candidates.iter().zip(matches).enumerate();
        let endpoints = endpoints.map(|(at, (candidate, found))| {
            let by_tier = held.get(at).map(|found| found.by_tier).unwrap_or_default();
            let tiers = TIERS.iter().zip(by_tier).filter(|(_, blocks)| *blocks > 0);
            let tiers = tiers.map(|(name, blocks)| ((*name).to_owned(), blocks.into()));
            serde_json::json!({
                "tiers": tiers.collect::<serde_json::Map<_, _>>(),
                "since": null,
                "endpoint": candidate.endpoint.host_port_str(),
                "name": candidate.endpoint.spec.name,
                "trust": "shared",
                "blockSize": found.block_size_tokens,
                "matchedBlocks": found.matched_blocks,
                "totalBlocks": found.total_blocks,
            })
        });
        let tokens: usize = prompts.iter().map(|prompt| prompt.ids.len()).sum();
        Some(serde_json::json!({
            "shared": index.stats().up.load(std::sync::atomic::Ordering::Relaxed),
            "prompts": [{"tokens": tokens, "endpoints": endpoints.collect::<Vec<_>>()}],
        }))
    }

    /// How far what is known of an endpoint can be relied on.
    pub(super) fn trust(&self, endpoint: EndpointIndex) -> Trust {
        let mut lookup = crate::kvcache::index::Lookup::new();
        let now = tokio::time::Instant::now();
        self.index.lookup(&[], &[endpoint], now, &mut lookup);
        let found = lookup.matches().first();
        found.map_or(Trust::Unknown, |found| found.trust)
    }
}

/// What a candidate holds of all prompts.
fn sum(prompts: &[Vec<Found>], candidate: usize) -> Found {
    let own = prompts.iter().filter_map(|prompt| prompt.get(candidate));
    own.fold(Found::default(), |mut sum, found| {
        sum.blocks += found.blocks;
        sum.stored += found.stored;
        sum.score += found.score;
        for (sum, blocks) in sum.by_tier.iter_mut().zip(found.by_tier) {
            *sum += blocks;
        }
        sum
    })
}

fn shared_match(found: &Found, total: usize, block_tokens: usize) -> PrefixMatch {
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "at most the number of keys times a weight, and saturating"
    )]
    let matched_blocks = found.score.max(0.0) as u32;
    let short = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
    PrefixMatch {
        matched_blocks,
        total_blocks: short(total),
        block_size_tokens: short(block_tokens),
        cached_blocks: found.blocks,
        host_blocks: TIERS
            .iter()
            .zip(found.by_tier)
            .find_map(|(name, blocks)| (*name == "cpu").then_some(blocks)),
    }
}

/// Keys of one prompt: the model the request names starts the chain, media that overlap a block and, in
/// the first, the salt are part of its key.
fn shared_keys(index: &SharedIndex, request: &InferenceRequest, prompt: &PromptTokens) -> Vec<u64> {
    let scheme = index.scheme();
    let size = scheme.block_tokens();
    let salt = request.payload.cache_salt.as_deref();
    let salt = salt.filter(|salt| !salt.is_empty());
    let mut extras: Vec<Vec<String>> = Vec::new();
    let (ids, media) = (prompt.keyed_ids(), prompt.named_media());
    if salt.is_some() || !media.is_empty() {
        extras.resize(ids.len() / size, Vec::new());
    }
    for (item, identifier) in media {
        let start = item.token_offset.unwrap_or(0) as usize;
        let end = start + item.tokens.unwrap_or(1).max(1) as usize;
        let blocks = extras.iter_mut().enumerate().skip(start / size);
        for (_, extras) in blocks.take_while(|(block, _)| block * size < end) {
            extras.push(without_adapter(identifier, Some(&request.target_model)).to_owned());
        }
    }
    if let (Some(salt), Some(first)) = (salt, extras.first_mut()) {
        first.push(salt.to_owned());
    }
    let of = |block: usize| extras.get(block).map_or(&[][..], Vec::as_slice);
    scheme.keys(scheme.start(&request.target_model), ids, of)
}
