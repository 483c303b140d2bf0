//! What a pick means: the endpoint will hold the prompt, and its engine should find what was predicted.

use std::sync::Arc;

use tokio::time::Instant;

use super::PrecisePrefixProducer;
use super::parity::{self, HitCheck};
use crate::kvcache::index::Trust;
use crate::scheduling::{Candidate, Cycle, Outcome, PreRequest, SchedulingResult};

impl PrecisePrefixProducer {
    /// Logs what the first pick is credited with, to be held against the engine's own count.
    fn tell(&self, cycle: &Cycle<'_>, result: &SchedulingResult) {
        let picked = result.primary.picks.first();
        let matches = cycle.attributes.get(self.matches).unwrap_or_default();
        if let Some(found) = picked.and_then(|&pick| matches.get(pick as usize)) {
            tracing::debug!(
                request_id = cycle.request.id,
                matched_blocks = found.matched_blocks,
                total_blocks = found.total_blocks,
                block_size_tokens = found.block_size_tokens,
                "exact prefix"
            );
        }
    }
}

impl PreRequest for PrecisePrefixProducer {
    /// Predicts that the primary and the `prefill` pick will hold the prompt, and remembers what the
    /// primary should find in its cache.
    fn on_pick(
        &self,
        cycle: &Cycle<'_>,
        candidates: &[Candidate],
        result: &SchedulingResult,
        outcome: &mut Outcome,
    ) {
        if let Some(check) = self.hit_check(cycle, candidates, result) {
            outcome.leases.push(Box::new(check));
        }
        self.tell(cycle, result);
        let Some(ttl) = self.speculative_ttl else {
            return;
        };
        if let Some(index) = self.publishers.remote() {
            let keys = cycle.attributes.get(self.shared_keys).unwrap_or_default();
            Self::expect_shared(index, keys, candidates, result, ttl);
            return;
        }
        let keys = cycle.attributes.get(self.keys).unwrap_or_default();
        let now = Instant::now();
        let prefill = result.others.iter().filter(|p| &*p.profile == "prefill");
        for picks in std::iter::once(&result.primary).chain(prefill) {
            let first = picks.picks.first();
            let Some(candidate) = first.and_then(|&p| candidates.get(p as usize)) else {
                continue;
            };
            let endpoint = candidate.endpoint.index;
            let size = self.index.block_size(endpoint);
            let own = keys.iter().filter(|k| Some(k.block_size) == size);
            for prompt in own.flat_map(|keys| keys.prompts()) {
                self.index.expect(endpoint, prompt, now, ttl);
            }
        }
    }
}

impl PrecisePrefixProducer {
    /// What to hold the picked engine's answer against; `None` when there is nothing to compare: the
    /// engine's events are not all there, another endpoint computes the prompt, the engine must not read
    /// its cache, or there are several prompts, of which vLLM tells only what it found of the last.
    fn hit_check(
        &self,
        cycle: &Cycle<'_>,
        candidates: &[Candidate],
        result: &SchedulingResult,
    ) -> Option<HitCheck> {
        let Cycle {
            request,
            attributes,
            ..
        } = cycle;
        let prompts = attributes.get(self.ids).filter(|ids| !ids.is_empty())?;
        if !result.others.is_empty() || prompts.len() > 1 || request.payload.scores_prompt {
            return None;
        }
        let pick = *result.primary.picks.first()? as usize;
        let endpoint = &candidates.get(pick)?.endpoint;
        let size = self.index.block_size(endpoint.index);
        let mut keys = attributes.get(self.keys).unwrap_or_default().iter();
        let keys = keys.find(|keys| Some(keys.block_size) == size).cloned();
        let mut prediction = attributes.get(self.predictions)?.get(pick).copied()?;
        if keys.is_none() {
            // It never stored anything, which is all there is to predict from.
            prediction.trust = self.trust(endpoint.index);
        } else if let Some(keys) = keys.as_ref().filter(|_| self.speculative_ttl.is_some()) {
            // What is only expected of the endpoint by routing is no claim about its cache.
            let stored = parity::stored_tokens(&self.index, endpoint.index, keys);
            prediction.tokens = prediction.tokens.min(stored);
        }
        if prediction.trust != Trust::Exact {
            return None;
        }
        let salt = request.payload.cache_salt.as_deref();
        Some(HitCheck {
            parity: Arc::clone(&self.parity),
            index: self.index.clone(),
            publishers: Arc::clone(&self.publishers),
            endpoint: Arc::clone(endpoint),
            keys,
            predicted_tokens: prediction.tokens,
            own_prompt_tokens: prompts
                .iter()
                .map(|prompt| prompt.is_whole().then_some(prompt.ids.len() as u64))
                .sum(),
            model: request.target_model.clone(),
            prompt: parity::prompt_kind(request),
            salted: salt.is_some_and(|salt| !salt.is_empty()),
        })
    }
}
