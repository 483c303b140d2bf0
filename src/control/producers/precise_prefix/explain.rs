//! What the admin endpoint shows: matches of one prompt, and totals.

use std::sync::Arc;
use std::time::SystemTime;

use serde_json::{Map, Value, json};
use tokio::time::Instant;

use super::{Keys, PrecisePrefixProducer};
use crate::datalayer::{Endpoint, EndpointIndex};
use crate::kvcache::index::{Lookup, Match, Trust};
use crate::kvcache::tokens::service::PromptTokens;
use crate::request::InferenceRequest;
use crate::scheduling::Candidate;

impl PrecisePrefixProducer {
    /// Every prompt of the request on every candidate.
    pub(super) fn explain_request(
        &self,
        request: &InferenceRequest,
        prompts: &[PromptTokens],
        keys: &[Arc<Keys>],
        candidates: &[Candidate],
    ) -> Value {
        let explained = prompts.iter().enumerate().map(|(number, prompt)| {
            let on = |candidate| self.explain_on(candidate, number, keys);
            json!({
                "tokens": prompt.ids.len(),
                "exactTokens": prompt.keyed_ids().len(),
                "endpoints": candidates.iter().map(on).collect::<Vec<_>>(),
            })
        });
        let salt = request.payload.cache_salt.as_deref();
        json!({
            "adapter": self.adapter(request, candidates),
            "salted": salt.is_some_and(|salt| !salt.is_empty()),
            "prompts": explained.collect::<Vec<_>>(),
        })
    }

    fn explain_on(&self, candidate: &Candidate, prompt: usize, keys: &[Arc<Keys>]) -> Value {
        let endpoint = candidate.endpoint.index;
        let size = self.index.block_size(endpoint);
        let own = keys.iter().find(|keys| Some(keys.block_size) == size);
        let blocks = own.and_then(|keys| keys.prompts().nth(prompt));
        let now = Instant::now();
        let mut lookup = Lookup::new();
        self.index
            .lookup(blocks.unwrap_or_default(), &[endpoint], now, &mut lookup);
        let found = lookup.matches().first().copied().unwrap_or_default();
        let mut shown = json!({
            "endpoint": candidate.endpoint.host_port_str(),
            "name": candidate.endpoint.spec.name,
            "trust": trust_name(found.trust),
            "blockSize": size,
        });
        if let (Some(fields), Some(blocks)) = (shown.as_object_mut(), blocks) {
            fields.extend(self.describe(endpoint, blocks, &found, now));
        }
        shown
    }

    fn describe(
        &self,
        endpoint: EndpointIndex,
        blocks: &[crate::kvcache::block::BlockKey],
        found: &Match,
        now: Instant,
    ) -> Map<String, Value> {
        let held = self
            .index
            .held_since(endpoint, blocks, found.blocks as usize);
        let ago = |at: Instant| now.saturating_duration_since(at).as_secs();
        let times = || held.iter().filter_map(|part| part.since);
        let parts = held.iter().map(
            |part| json!({"blocks": part.blocks, "since": part.since.map(|at| unix(at, now))}),
        );
        let mut fields = Map::new();
        let mut put = |name: &str, value: Value| fields.insert(name.to_owned(), value);
        put("matchedBlocks", found.blocks.into());
        put("totalBlocks", blocks.len().into());
        put("score", found.score.into());
        put("tiers", self.by_tier(found.by_tier.map(u64::from)));
        put("since", times().min().map(|at| unix(at, now)).into());
        put("sinceSecondsAgo", times().min().map(ago).into());
        put("newestSecondsAgo", times().max().map(ago).into());
        put("parts", parts.collect());
        fields
    }

    /// Numbers above 0 by the names of their tiers.
    fn by_tier<const N: usize>(&self, blocks: [u64; N]) -> Value {
        let names = self.index.tiers();
        let named = blocks.iter().enumerate().filter(|(_, n)| **n > 0);
        let name = |tier: usize| {
            let known = names.get(tier).map(ToString::to_string);
            known.unwrap_or_else(|| "other".to_owned())
        };
        named
            .map(|(tier, n)| (name(tier), Value::from(*n)))
            .collect::<Map<_, _>>()
            .into()
    }

    /// The index, endpoints and publishers.
    pub(super) fn overview_of(&self, pool: &[Arc<Endpoint>]) -> Value {
        let numbers: Vec<_> = pool.iter().map(|endpoint| endpoint.index).collect();
        let holdings = self.index.holdings(&numbers);
        let endpoints = pool.iter().zip(holdings).map(|(endpoint, held)| {
            let (parity, broken) = self.parity.overview(endpoint.index).unzip();
            json!({
                "endpoint": endpoint.host_port_str(),
                "name": endpoint.spec.name,
                "blockSize": held.block_size,
                "runs": held.runs,
                "blocks": self.by_tier(held.blocks),
                "parity": parity,
                "parityBroken": broken,
            })
        });
        let mut publishers = self.publishers.all();
        publishers.sort_by(|a, b| (&a.name, a.rank).cmp(&(&b.name, b.rank)));
        let publishers = publishers.iter().map(|publisher| {
            let source = publisher.source;
            json!({
                "endpoint": &*publisher.name,
                "rank": publisher.rank,
                "live": source.map(|s| s.live.to_string()),
                "replay": source.and_then(|s| s.replay).map(|r| r.to_string()),
                "stats": publisher.stats.snapshot(),
            })
        });
        let stats = self.index.stats();
        json!({
            "index": {
                "blocks": stats.blocks,
                "runs": stats.runs,
                "publishers": stats.columns,
                "bytes": stats.used_bytes,
                "maxBytes": self.max_bytes,
                "predictions": stats.predictions,
                "evictedRuns": stats.evicted_runs,
                "refusedBlocks": stats.refused_blocks,
            },
            "endpoints": endpoints.collect::<Vec<_>>(),
            "publishers": publishers.collect::<Vec<_>>(),
            "listener": self.publishers.listener().map(|(address, stats)| {
                json!({"address": address.to_string(), "stats": stats.snapshot()})
            }),
        })
    }
}

fn trust_name(trust: Trust) -> &'static str {
    match trust {
        Trust::Unknown => "unknown",
        Trust::LowerBound => "lower bound",
        Trust::Exact => "exact",
    }
}

/// Seconds since 1970.
fn unix(at: Instant, now: Instant) -> u64 {
    let wall = SystemTime::now().checked_sub(now.saturating_duration_since(at));
    let since = wall.and_then(|wall| wall.duration_since(SystemTime::UNIX_EPOCH).ok());
    since.map_or(0, |since| since.as_secs())
}
