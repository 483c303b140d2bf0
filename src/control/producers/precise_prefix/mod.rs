//! `precise-prefix-cache-producer` and the legacy `precise-prefix-cache-scorer`: how much of a prompt
//! each endpoint holds, by what the engines say they hold.

mod settings;

use std::cell::RefCell;
use std::sync::Arc;
use std::time::Duration;

use metrics::Counter;
use tokio::runtime::Handle;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use self::settings::{Raw, Settings};
use crate::datalayer::{Endpoint, EndpointIndex, EndpointListener};
use crate::kvcache::block::{BlockHasher, BlockKey, KeySpace, MediaSpan};
use crate::kvcache::events::pool::{PublisherKey, SubscriberPool};
use crate::kvcache::events::subscriber::{Source, SubscriberOptions};
use crate::kvcache::index::{KvIndex, Lookup, Trust};
use crate::kvcache::tokens::service::PromptTokens;
use crate::plugin::{Attributes, Build, Column, Maturity, ParamDoc, Plugin, PluginError};
use crate::request::InferenceRequest;
use crate::scheduling::attributes::{
    APPROX_PREFIX_PRODUCER, PREFIX_MATCH, PrefixMatch, TOKEN_IDS, TOKEN_PRODUCER,
};
use crate::scheduling::{
    Candidate, Candidates, Cycle, DataProducer, Outcome, PreRequest, ProducerError,
    SchedulingResult, Scorer,
};

/// Internal column with the request's block keys, for the prediction after the pick.
const KEYS: &str = "precise-prefix-keys";
/// The pool serves one base model, whatever name a request gives it; adapters have spaces of their own.
const BASE_MODEL: &str = "";
/// Labels of an endpoint whose sockets are not where the others' are, such as several engines behind one
/// address.
const EVENTS_PORT: &str = "pinpod.dev/kv-events-port";
/// See [`EVENTS_PORT`].
const REPLAY_PORT: &str = "pinpod.dev/kv-events-replay-port";
/// Different block sizes in one pool that a request is hashed by; endpoints of further sizes count as
/// endpoints without events.
const MAX_BLOCK_SIZES: usize = 4;

/// Knows which blocks each endpoint holds, from the KV events of its engine.
///
/// Needs the ids that `token-producer` publishes with a tokenizer behind it. A request without ids, and
/// an endpoint whose engine publishes nothing, is matched by what the approximate producer knows.
#[derive(Debug)]
pub struct PrecisePrefixProducer {
    index: KvIndex,
    subscribers: SubscriberPool,
    stop: CancellationToken,
    dial: Option<(u16, u16)>,
    speculative_ttl: Option<Duration>,
    ids: Column<PromptTokens>,
    approximate: Column<PrefixMatch>,
    matches: Column<PrefixMatch>,
    keys: Column<Keys>,
    exact: Counter,
    mixed: Counter,
    without_tokens: Counter,
    without_events: Counter,
}

/// Block keys of one request for one block size, prompt after prompt.
#[derive(Debug, Default, Clone)]
struct Keys {
    block_size: u32,
    blocks: Vec<BlockKey>,
    /// End of each prompt's keys.
    ends: Vec<usize>,
}

impl Keys {
    fn prompts(&self) -> impl Iterator<Item = &[BlockKey]> {
        let starts = std::iter::once(0).chain(self.ends.iter().copied());
        let ranges = starts.zip(&self.ends);
        ranges.filter_map(|(from, to)| self.blocks.get(from..*to))
    }
}

/// Room that look-ups of one thread share.
#[derive(Debug, Default)]
struct Scratch {
    lookup: Lookup,
    candidates: Vec<EndpointIndex>,
    sizes: Vec<Option<u32>>,
    scores: Vec<f64>,
    trust: Vec<Trust>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

const PARAMETERS: &[ParamDoc] = &[
    ParamDoc {
        name: "tokenProcessorConfig",
        kind: "object",
        default: "",
        help: "Accepted and checked: block sizes are learned from each engine, and keys are the process's own, so `blockSizeTokens`, `hashSeed` and `hashAlgorithm` change nothing.",
    },
    ParamDoc {
        name: "indexerConfig",
        kind: "object",
        default: "",
        help: "`kvCacheBackendConfigs` (`name`, `weight` of a tier; gpu 1.0, cpu 0.8, others 1.0); `kvBlockIndexConfig.costAwareMemoryConfig.size` bounds the index (1GiB). `inMemoryConfig` is accepted; `redisConfig` is not yet available.",
    },
    ParamDoc {
        name: "kvEventsConfig",
        kind: "object",
        default: "",
        help: "`discoverPods` (true) dials every endpoint at `podDiscoveryConfig.socketPort` (5557) and `replaySocketPort` (0, none), each plus the rank, unless the endpoint's labels `pinpod.dev/kv-events-port` and `pinpod.dev/kv-events-replay-port` say otherwise; `engineType` vllm or sglang. Every topic is read, whatever `topicFilter` says. `zmqEndpoint` is not yet available.",
    },
    ParamDoc {
        name: "speculativeIndexing",
        kind: "bool",
        default: "false",
        help: "Count a request's blocks for its endpoint from the pick on, until events tell.",
    },
    ParamDoc {
        name: "speculativeTTL",
        kind: "duration",
        default: "2s",
        help: "How long such a prediction counts; 0 and less mean the default.",
    },
];

impl Plugin for PrecisePrefixProducer {
    const TYPE: &'static str = "precise-prefix-cache-producer";
    const MATURITY: Maturity = Maturity::Beta;
    const PARAMETERS: &'static [ParamDoc] = PARAMETERS;
    const ABOUT: &'static str = "Matches prompts against the blocks each engine says it holds.";

    fn build(build: &mut Build<'_>) -> Result<Self, PluginError> {
        let raw: Raw = build.read::<Self, _>()?;
        Ok(Self::new(&raw.resolve()?, build))
    }
}

impl PrecisePrefixProducer {
    fn new(settings: &Settings, build: &mut Build<'_>) -> Self {
        let name = build.name.to_owned();
        let requests = |result: &'static str| {
            metrics::counter!("pinpod_precise_prefix_requests_total",
                "plugin_name" => name.clone(), "result" => result)
        };
        let stop = CancellationToken::new();
        Self {
            index: KvIndex::new(&settings.index, BlockHasher::default()),
            subscribers: SubscriberPool::new(SubscriberOptions::default(), stop.clone()),
            stop,
            dial: settings.dial,
            speculative_ttl: settings.speculative_ttl,
            exact: requests("exact"),
            mixed: requests("mixed"),
            without_tokens: requests("no_tokens"),
            without_events: requests("no_events"),
            ids: build.keys.require(TOKEN_IDS, TOKEN_PRODUCER),
            approximate: build.keys.require(PREFIX_MATCH, APPROX_PREFIX_PRODUCER),
            matches: build.keys.produce(PREFIX_MATCH),
            keys: build.keys.produce(KEYS),
        }
    }

    /// Keys of the request's prompts for blocks of `block_size` tokens.
    fn hash(
        &self,
        request: &InferenceRequest,
        prompts: &[PromptTokens],
        block_size: u32,
        lora: Option<&str>,
    ) -> Keys {
        let space = KeySpace {
            model: BASE_MODEL,
            lora,
            block_size,
        };
        let salt = request.payload.cache_salt.as_deref();
        let mut all = Keys {
            block_size,
            ..Keys::default()
        };
        let mut keys = Vec::new();
        for prompt in prompts {
            let names: Vec<String> = prompt
                .media
                .iter()
                .map(|m| format!("{:016x}", m.hash))
                .collect();
            let spans: Vec<MediaSpan<'_>> = prompt
                .media
                .iter()
                .zip(&names)
                .map(|(item, identifier)| MediaSpan {
                    identifier,
                    offset: item.token_offset.unwrap_or(0),
                    length: item.tokens.unwrap_or(1),
                })
                .collect();
            let hasher = self.index.hasher();
            hasher.request_keys(&space, &prompt.ids, salt, &spans, &mut keys);
            all.blocks.append(&mut keys);
            all.ends.push(all.blocks.len());
        }
        all
    }

    /// The adapter a request asks for: a name that events or an engine's metrics give as one. Blocks of
    /// adapters and of the base model are never shared.
    fn adapter<'a>(
        &self,
        request: &'a InferenceRequest,
        candidates: &[Candidate],
    ) -> Option<&'a str> {
        let name = request.target_model.as_str();
        let listed = |candidate: &Candidate| {
            candidate.metrics.lora.as_ref().is_some_and(|lora| {
                let mut names = lora.active.iter().chain(&lora.waiting);
                names.any(|adapter| adapter == name)
            })
        };
        let known = self.index.is_adapter(name) || candidates.iter().any(listed);
        known.then_some(name)
    }

    /// Matches every candidate whose engine publishes events; the others keep `None`. Returns how many
    /// were matched.
    fn look_up(
        &self,
        request: &InferenceRequest,
        prompts: &[PromptTokens],
        candidates: &[Candidate],
        scratch: &mut Scratch,
        keys: &mut Vec<Keys>,
    ) -> usize {
        let lora = self.adapter(request, candidates);
        let sizes = candidates.iter();
        scratch.sizes.clear();
        scratch
            .sizes
            .extend(sizes.map(|c| self.index.block_size(c.endpoint.index)));
        for size in scratch.sizes.iter().flatten() {
            let known = keys.iter().any(|k| k.block_size == *size);
            if !known && keys.len() < MAX_BLOCK_SIZES {
                keys.push(self.hash(request, prompts, *size, lora));
            }
        }
        scratch.scores.clear();
        scratch.scores.resize(candidates.len(), 0.0);
        scratch.trust.clear();
        scratch.trust.resize(candidates.len(), Trust::Unknown);
        let now = Instant::now();
        let all = candidates.iter().map(|c| c.endpoint.index);
        scratch.candidates.clear();
        scratch.candidates.extend(all);
        for of_size in keys.iter() {
            for prompt in of_size.prompts() {
                let Scratch {
                    lookup, candidates, ..
                } = scratch;
                self.index.lookup(prompt, candidates, now, lookup);
                let places = scratch.sizes.iter().zip(&mut scratch.scores);
                let results = places.zip(&mut scratch.trust).zip(lookup.matches());
                for (((size, score), trust), found) in results {
                    if *size == Some(of_size.block_size) {
                        *score += found.score;
                        *trust = found.trust;
                    }
                }
            }
        }
        let known = scratch.trust.iter().filter(|t| **t != Trust::Unknown);
        known.count()
    }
}

impl DataProducer for PrecisePrefixProducer {
    fn produce(
        &self,
        request: &InferenceRequest,
        candidates: &[Candidate],
        attributes: &mut Attributes,
    ) -> Result<(), ProducerError> {
        let mut keys = Vec::new();
        let found = SCRATCH.with_borrow_mut(|scratch| {
            let prompts = attributes.get(self.ids).unwrap_or_default();
            let known = if prompts.is_empty() {
                self.without_tokens.increment(1);
                scratch.trust.clear();
                0
            } else {
                let known = self.look_up(request, prompts, candidates, scratch, &mut keys);
                let counter = match known {
                    0 => &self.without_events,
                    all if all == candidates.len() => &self.exact,
                    _ => &self.mixed,
                };
                counter.increment(1);
                known
            };
            let guesses = attributes.get(self.approximate).unwrap_or_default();
            let matches = (0..candidates.len()).map(|at| {
                let trust = scratch.trust.get(at).copied().unwrap_or_default();
                let size = scratch.sizes.get(at).copied().flatten();
                let of_size = size.and_then(|size| keys.iter().find(|k| k.block_size == size));
                match of_size.filter(|_| known > 0 && trust != Trust::Unknown) {
                    Some(of_size) => exact_match(of_size, scratch.scores.get(at).copied()),
                    None => guesses.get(at).copied().unwrap_or_default(),
                }
            });
            matches.collect::<Vec<_>>()
        });
        attributes.write(self.matches).extend(found);
        attributes.write(self.keys).append(&mut keys);
        Ok(())
    }
}

/// As the contract publishes it: the weighted sum, cut to whole blocks.
fn exact_match(keys: &Keys, score: Option<f64>) -> PrefixMatch {
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "at most the number of keys times a weight, and saturating"
    )]
    let matched_blocks = score.unwrap_or(0.0).max(0.0) as u32;
    PrefixMatch {
        matched_blocks,
        total_blocks: u32::try_from(keys.blocks.len()).unwrap_or(u32::MAX),
        block_size_tokens: keys.block_size,
    }
}

impl PreRequest for PrecisePrefixProducer {
    /// Predicts that the primary and the `prefill` pick will hold the prompt.
    fn on_pick(
        &self,
        cycle: &Cycle<'_>,
        candidates: &[Candidate],
        result: &SchedulingResult,
        _: &mut Outcome,
    ) {
        let Some(ttl) = self.speculative_ttl else {
            return;
        };
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
            for prompt in own.flat_map(Keys::prompts) {
                self.index.expect(endpoint, prompt, now, ttl);
            }
        }
    }
}

impl EndpointListener for PrecisePrefixProducer {
    fn added(&self, endpoint: &Arc<Endpoint>) {
        let Some((live, replay)) = self.dial else {
            return;
        };
        let spec = &endpoint.spec;
        let port = |label: &str, default| {
            let own = spec.labels.get(label).and_then(|port| port.parse().ok());
            own.unwrap_or(default)
        };
        let (live, replay) = (port(EVENTS_PORT, live), port(REPLAY_PORT, replay));
        let source = Source::of_rank(spec.address.ip(), live, replay, spec.rank);
        let (Some(source), Ok(runtime)) = (source, Handle::try_current()) else {
            tracing::warn!(
                endpoint = spec.name,
                "no KV events: no such port or no runtime"
            );
            return;
        };
        let key = PublisherKey {
            endpoint: endpoint.index,
            rank: spec.rank,
        };
        let sink = Box::new(self.index.writer(endpoint.index, BASE_MODEL));
        let _entered = runtime.enter();
        if let Err(error) = self.subscribers.add(key, source, sink) {
            tracing::warn!(endpoint = spec.name, %error, "no KV events");
        }
    }

    fn relabelled(&self, former: &Arc<Endpoint>, endpoint: &Arc<Endpoint>) {
        let ports = |e: &Endpoint| {
            [EVENTS_PORT, REPLAY_PORT].map(|label| e.spec.labels.get(label).cloned())
        };
        if ports(former) != ports(endpoint) {
            self.removed(former);
            self.added(endpoint);
        }
    }

    fn removed(&self, endpoint: &Arc<Endpoint>) {
        // Its part of the index goes with the task, which ends on its own.
        self.subscribers
            .remove_endpoint(endpoint.index)
            .into_iter()
            .for_each(drop);
    }
}

impl Drop for PrecisePrefixProducer {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

/// The legacy form: producer and scorer in one. Score: the matched share of the prompt's blocks.
#[derive(Debug)]
pub struct PrecisePrefixScorer(PrecisePrefixProducer);

impl Plugin for PrecisePrefixScorer {
    const TYPE: &'static str = "precise-prefix-cache-scorer";
    const MATURITY: Maturity = Maturity::Beta;
    const PARAMETERS: &'static [ParamDoc] = PARAMETERS;
    const ABOUT: &'static str = "Prefers endpoints that hold more of the prompt, by KV events.";

    fn build(build: &mut Build<'_>) -> Result<Self, PluginError> {
        let raw: Raw = build.read::<Self, _>()?;
        Ok(Self(PrecisePrefixProducer::new(&raw.resolve()?, build)))
    }
}

impl Scorer for PrecisePrefixScorer {
    fn score(&self, cycle: &Cycle<'_>, candidates: Candidates<'_>, scores: &mut [f64]) {
        let Some(matches) = cycle.attributes.get(self.0.matches) else {
            return;
        };
        for (score, (position, _)) in scores.iter_mut().zip(candidates.iter()) {
            *score = matches.get(position).map_or(0.0, PrefixMatch::ratio);
        }
    }
}

impl DataProducer for PrecisePrefixScorer {
    fn produce(
        &self,
        request: &InferenceRequest,
        candidates: &[Candidate],
        attributes: &mut Attributes,
    ) -> Result<(), ProducerError> {
        self.0.produce(request, candidates, attributes)
    }
}

impl PreRequest for PrecisePrefixScorer {
    fn on_pick(
        &self,
        cycle: &Cycle<'_>,
        candidates: &[Candidate],
        result: &SchedulingResult,
        outcome: &mut Outcome,
    ) {
        self.0.on_pick(cycle, candidates, result, outcome);
    }
}

impl EndpointListener for PrecisePrefixScorer {
    fn added(&self, endpoint: &Arc<Endpoint>) {
        self.0.added(endpoint);
    }

    fn relabelled(&self, former: &Arc<Endpoint>, endpoint: &Arc<Endpoint>) {
        self.0.relabelled(former, endpoint);
    }

    fn removed(&self, endpoint: &Arc<Endpoint>) {
        self.0.removed(endpoint);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::producers::token::TokenProducer;
    use crate::kvcache::events::{Batch, Event, EventSink, Stored, StreamState};
    use crate::request::openai::OpenAiParser;
    use crate::request::{Body, Parser};
    use crate::scheduling::attributes::PREFIX_MATCH;
    use crate::scheduling::test_support::{Pool, endpoint};

    /// An engine that stored `tokens` in blocks of four.
    fn engine(
        producer: &PrecisePrefixProducer,
        number: u32,
        tokens: &[u32],
        lora_name: Option<&str>,
    ) -> Box<dyn EventSink> {
        let mut writer = producer.index.writer(EndpointIndex(number), BASE_MODEL);
        let hashes: Vec<u64> = (1..).take(tokens.len() / 4).collect();
        let stored = Stored {
            hashes: &hashes,
            parent: None,
            tokens,
            block_size: 4,
            lora_name,
            medium: "GPU",
            extra_keys: None,
            cache_salt: None,
            group: Some(0),
            kind: Some("full_attention"),
        };
        writer.apply(&Batch {
            ts: 1.0,
            data_parallel_rank: Some(0),
            events: &[Event::Stored(stored)],
        });
        writer.set_state(StreamState::Live);
        Box::new(writer)
    }

    /// (matched, total, block size) of each endpoint for a request of `ids`.
    fn ask(
        pool: &mut Pool,
        tokens: &TokenProducer,
        producer: &PrecisePrefixProducer,
        ids: &[u32],
        model: &str,
    ) -> Vec<(u32, u32, u32)> {
        let body = serde_json::json!({"model": model, "prompt": ids}).to_string();
        let body = Body::from(body.as_str());
        let payload = OpenAiParser.parse("/v1/completions", &body).unwrap();
        pool.request = InferenceRequest::new("r", payload, body);
        let mut attributes = pool.keys.new_attributes();
        let guess = pool
            .keys
            .optional::<PrefixMatch>(PREFIX_MATCH, APPROX_PREFIX_PRODUCER);
        attributes.write(guess).extend([
            PrefixMatch {
                matched_blocks: 1,
                total_blocks: 2,
                block_size_tokens: 64,
            },
            PrefixMatch {
                matched_blocks: 1,
                total_blocks: 2,
                block_size_tokens: 64,
            },
            PrefixMatch {
                matched_blocks: 2,
                total_blocks: 2,
                block_size_tokens: 64,
            },
        ]);
        for step in [tokens as &dyn DataProducer, producer] {
            step.produce(&pool.request, &pool.candidates, &mut attributes)
                .unwrap();
        }
        let found = attributes.get(producer.matches).unwrap().iter();
        found
            .map(|m| (m.matched_blocks, m.total_blocks, m.block_size_tokens))
            .collect()
    }

    fn setting(parameters: &str) -> (Pool, TokenProducer, PrecisePrefixProducer) {
        let mut pool = Pool::new(["a", "b", "c"].map(endpoint));
        let tokens = pool.plugin("{}");
        let producer = pool.plugin(parameters);
        (pool, tokens, producer)
    }

    const PROMPT: [u32; 14] = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14];

    #[test]
    fn events_decide_and_silent_endpoints_are_guessed() {
        let (mut pool, tokens, producer) = setting("{}");
        let _a = engine(&producer, 0, &PROMPT[..12], None);
        // The first block is another one.
        let _b = engine(&producer, 1, &[9, 2, 3, 4, 5, 6, 7, 8], None);
        // 14 ids are three full blocks; c publishes nothing, so its guess stays.
        assert_eq!(
            ask(&mut pool, &tokens, &producer, &PROMPT, "m"),
            [(3, 3, 4), (0, 3, 4), (2, 2, 64)]
        );
        // Two blocks are the same, then the prompts part.
        let other = [1, 2, 3, 4, 5, 6, 7, 8, 0, 10, 11, 12];
        let found = ask(&mut pool, &tokens, &producer, &other, "m");
        assert_eq!(found[..2], [(2, 3, 4), (0, 3, 4)]);
    }

    #[test]
    fn a_request_without_ids_is_guessed() {
        let (mut pool, tokens, producer) = setting("{}");
        let _a = engine(&producer, 0, &PROMPT[..12], None);
        let body = Body::from(r#"{"prompt": "text"}"#);
        let payload = OpenAiParser.parse("/v1/completions", &body).unwrap();
        pool.request = InferenceRequest::new("r", payload, body);
        let mut attributes = pool.keys.new_attributes();
        tokens
            .produce(&pool.request, &pool.candidates, &mut attributes)
            .unwrap();
        producer
            .produce(&pool.request, &pool.candidates, &mut attributes)
            .unwrap();
        let found = attributes.get(producer.matches).unwrap();
        assert_eq!(found, [PrefixMatch::default(); 3]);
    }

    #[test]
    fn adapters_share_nothing_with_their_base() {
        let (mut pool, tokens, producer) = setting("{}");
        let _a = engine(&producer, 0, &PROMPT[..12], Some("poet"));
        let _b = engine(&producer, 1, &PROMPT[..8], None);
        let mut matched = |model| {
            let found = ask(&mut pool, &tokens, &producer, &PROMPT, model);
            [found[0].0, found[1].0]
        };
        assert_eq!(matched("poet"), [3, 0]);
        assert_eq!(matched("base"), [0, 2]);
    }

    #[test]
    fn host_memory_counts_by_its_weight() {
        let (mut pool, tokens, producer) = setting(
            r#"{"indexerConfig": {"kvCacheBackendConfigs": [{"name": "gpu", "weight": 0.5}]}}"#,
        );
        let _a = engine(&producer, 0, &PROMPT[..12], None);
        // Three blocks at 0.5 are 1.5, cut to whole blocks.
        assert_eq!(
            ask(&mut pool, &tokens, &producer, &PROMPT, "m")[0],
            (1, 3, 4)
        );
    }
}
