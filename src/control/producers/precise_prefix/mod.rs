//! `precise-prefix-cache-producer` and the legacy `precise-prefix-cache-scorer`: how much of a prompt
//! each endpoint holds, by what the engines say they hold.

mod after_pick;
mod explain;
mod keys;
mod legacy;
mod observe;
mod parity;
mod publishers;
mod settings;
mod shared;
mod sink;

use std::any::Any;
use std::cell::RefCell;
use std::sync::Arc;
use std::time::Duration;

use metrics::Counter;
use parking_lot::Mutex;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use self::keys::{Keys, exact_match, usable_blocks};
pub use self::legacy::PrecisePrefixScorer;
use self::observe::{LookupSeries, Observer};
use self::parity::Parity;
use self::publishers::{Backend, Publishers};
use self::settings::{Raw, Settings};
use crate::datalayer::{Endpoint, EndpointIndex, EndpointListener};
use crate::kvcache::block::{BlockHasher, KeySpace, MediaSpan};
use crate::kvcache::events::subscriber::{EVENTS_PORT, REPLAY_PORT};
use crate::kvcache::events::wire::without_adapter;
use crate::kvcache::index::{CPU, KvIndex, Lookup, Trust};
use crate::kvcache::redis::{Found, SharedIndex};
use crate::kvcache::tokens::service::PromptTokens;
use crate::plugin::{
    Attributes, Build, Column, Maturity, ParamDoc, ParamError, Plugin, PluginError,
};
use crate::request::InferenceRequest;
use crate::scheduling::attributes::{
    APPROX_PREFIX_PRODUCER, PREFIX_MATCH, PrefixMatch, TOKEN_IDS, TOKEN_PRODUCER,
};
use crate::scheduling::{Candidate, DataProducer, Preparation, ProducerError};
use crate::telemetry::metrics::register;
use crate::telemetry::trace::{Span, names};

/// How a look-up went, in its span.
const PRODUCER_RESULT: &str = "llm_d.epp.producer.result";
/// Internal column with the request's block keys, for the prediction after the pick.
const KEYS: &str = "precise-prefix-keys";
/// Internal column with what each candidate should find in its cache.
const PREDICTIONS: &str = "precise-prefix-predictions";
/// Internal column with the keys of each prompt in a shared index.
const SHARED_KEYS: &str = "precise-prefix-shared-keys";
/// Internal column with what each candidate holds by a shared index.
const SHARED_FOUND: &str = "precise-prefix-shared-found";
/// The pool serves one base model, whatever name a request gives it; adapters have spaces of their own.
const BASE_MODEL: &str = "";
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
    publishers: Arc<Publishers>,
    /// Reads the two above; kept, since metrics ask it only as long as it lives.
    #[cfg_attr(not(test), expect(dead_code, reason = "kept alive"))]
    observer: Arc<Observer>,
    lookups: Option<LookupSeries>,
    speculative_ttl: Option<Duration>,
    ids: Column<PromptTokens>,
    approximate: Column<PrefixMatch>,
    matches: Column<PrefixMatch>,
    keys: Column<Arc<Keys>>,
    /// Of each candidate, for the comparison with what its engine reports.
    predictions: Column<Prediction>,
    /// Keys of each prompt in an index that replicas share.
    shared_keys: Column<Vec<u64>>,
    shared_found: Column<Found>,
    shared_failed: Counter,
    parity: Arc<Parity>,
    max_bytes: usize,
    exact: Counter,
    partial: Counter,
    mixed: Counter,
    without_tokens: Counter,
    without_events: Counter,
}

/// What a candidate's cache should yield.
#[derive(Debug, Clone, Copy, Default)]
struct Prediction {
    /// Prompt tokens it can reuse: whole blocks, and never the last token of a prompt.
    tokens: u64,
    trust: Trust,
}

/// Room that look-ups of one thread share.
#[derive(Debug, Default)]
struct Scratch {
    lookup: Lookup,
    candidates: Vec<EndpointIndex>,
    sizes: Vec<Option<u32>>,
    scores: Vec<f64>,
    /// Leading blocks in any tier, and in host memory.
    held: Vec<(u32, u32)>,
    predictions: Vec<Prediction>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

const PARAMETERS: &[ParamDoc] = &[
    ParamDoc {
        name: "tokenProcessorConfig",
        kind: "object",
        default: "",
        help: "`blockSizeTokens` (16), `hashSeed` and `hashAlgorithm` (cbor-fnv or xxh64) make the keys of an index in Redis. Without one they change nothing: block sizes are learned from each engine, and keys are the process's own.",
    },
    ParamDoc {
        name: "indexerConfig",
        kind: "object",
        default: "",
        help: "`kvCacheBackendConfigs` (`name`, `weight` of a tier; gpu 1.0, cpu 0.8, others 1.0); `kvBlockIndexConfig.costAwareMemoryConfig.size` bounds the index (1GiB). `inMemoryConfig` is accepted. `kvBlockIndexConfig.redisConfig` (`address`, redis://127.0.0.1:6379, or rediss:// checked against `caCertPath` or the system's certificates, to which `clientCertPath` and `clientKeyPath` show who the picker is; files are read for every connection) keeps the index in Redis or Valkey, shared with other replicas; while it cannot be reached prompts are matched approximately.",
    },
    ParamDoc {
        name: "kvEventsConfig",
        kind: "object",
        default: "",
        help: "`discoverPods` (true, but false with `zmqEndpoint`) dials every endpoint at `podDiscoveryConfig.socketPort` (5557) and `replaySocketPort` (0, none), each plus the rank, unless the endpoint's labels `pinpod.dev/kv-events-port` and `pinpod.dev/kv-events-replay-port` say otherwise; `engineType` vllm or sglang. Every topic is read, whatever `topicFilter` says. `zmqEndpoint` (`tcp://*:5557`) is where engines connect to the picker; the topic `kv@<ip:port>@<model>` says whose events they are.",
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
        Self::new(&raw.resolve()?, build)
    }
}

impl PrecisePrefixProducer {
    fn new(settings: &Settings, build: &mut Build<'_>) -> Result<Self, PluginError> {
        let name = build.name.to_owned();
        let requests = |result: &'static str| {
            metrics::counter!("pinpod_precise_prefix_requests_total",
                "plugin_name" => name.clone(), "result" => result)
        };
        let index = KvIndex::new(&settings.index, BlockHasher::default());
        let backend = match settings.shared.as_ref().map(SharedIndex::new) {
            None => Backend::Local(index.clone()),
            Some(shared) => {
                let (shared, queue) = shared.map_err(ParamError)?;
                Backend::Remote(shared, Mutex::new(Some(queue)))
            }
        };
        let publishers = Arc::new(Publishers::new(
            backend,
            settings.dial,
            settings.listen,
            CancellationToken::new(),
        ));
        let observer = Arc::new(Observer::new(
            index.clone(),
            settings.index.max_bytes,
            Arc::clone(&publishers),
            settings.enable_metrics,
        ));
        register(&observer);
        Ok(Self {
            index,
            publishers,
            observer,
            lookups: settings.enable_metrics.then(LookupSeries::new),
            speculative_ttl: settings.speculative_ttl,
            exact: requests("exact"),
            partial: requests("partial"),
            mixed: requests("mixed"),
            without_tokens: requests("no_tokens"),
            without_events: requests("no_events"),
            ids: build.keys.require(TOKEN_IDS, TOKEN_PRODUCER),
            approximate: build.keys.require(PREFIX_MATCH, APPROX_PREFIX_PRODUCER),
            matches: build.keys.produce(PREFIX_MATCH),
            keys: build.keys.produce(KEYS),
            predictions: build.keys.produce(PREDICTIONS),
            shared_keys: build.keys.produce(SHARED_KEYS),
            shared_found: build.keys.produce(SHARED_FOUND),
            shared_failed: requests("shared_failed"),
            parity: Arc::default(),
            max_bytes: settings.index.max_bytes,
        })
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
        let blocks = |prompt: &PromptTokens| prompt.ids.len() / block_size.max(1) as usize;
        let mut all = Keys {
            block_size,
            total_blocks: prompts.iter().map(blocks).sum(),
            whole: prompts.iter().all(PromptTokens::is_whole),
            ..Keys::default()
        };
        let mut keys = Vec::new();
        for prompt in prompts {
            let named = prompt.named_media();
            let spans = named.iter().map(|(item, identifier)| MediaSpan {
                identifier: without_adapter(identifier, lora),
                offset: item.token_offset.unwrap_or(0),
                length: item.tokens.unwrap_or(1),
            });
            let spans: Vec<MediaSpan<'_>> = spans.collect();
            let hasher = self.index.hasher();
            hasher.request_keys(&space, prompt.keyed_ids(), salt, &spans, &mut keys);
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

    /// Counts a look-up that matched `known` of so many candidates exactly, by the `whole` prompt or by
    /// the part before what has no ids.
    fn count(&self, whole: bool, known: usize, candidates: usize, span: &mut Span) {
        let (counter, result) = match known {
            0 => (&self.without_events, "no_events"),
            _ if !whole => (&self.partial, "partial"),
            all if all == candidates => (&self.exact, "exact"),
            _ => (&self.mixed, "mixed"),
        };
        counter.increment(1);
        span.record(|| [(PRODUCER_RESULT, result.into())]);
    }

    /// Matches every candidate whose engine publishes events; the others keep `None`. Returns how many
    /// were matched.
    fn look_up(
        &self,
        request: &InferenceRequest,
        prompts: &[PromptTokens],
        candidates: &[Candidate],
        scratch: &mut Scratch,
        keys: &mut Vec<Arc<Keys>>,
    ) -> usize {
        let lora = self.adapter(request, candidates);
        let endpoints = candidates.iter().map(|c| c.endpoint.index);
        self.index.block_sizes(endpoints, &mut scratch.sizes);
        for size in scratch.sizes.iter().flatten() {
            let known = keys.iter().any(|k| k.block_size == *size);
            if !known && keys.len() < MAX_BLOCK_SIZES {
                keys.push(Arc::new(self.hash(request, prompts, *size, lora)));
            }
        }
        scratch.scores.clear();
        scratch.scores.resize(candidates.len(), 0.0);
        scratch.held.clear();
        scratch.held.resize(candidates.len(), (0, 0));
        scratch.predictions.clear();
        let unknown = Prediction::default();
        scratch.predictions.resize(candidates.len(), unknown);
        let now = Instant::now();
        let all = candidates.iter().map(|c| c.endpoint.index);
        scratch.candidates.clear();
        scratch.candidates.extend(all);
        for of_size in keys.iter() {
            for (prompt, tokens) in of_size.prompts().zip(prompts) {
                let usable = usable_blocks(tokens.ids.len(), of_size.block_size);
                let Scratch {
                    lookup, candidates, ..
                } = scratch;
                let started = Instant::now();
                self.index.lookup(prompt, candidates, now, lookup);
                if let Some(series) = &self.lookups {
                    let best = lookup.matches().iter().map(|found| found.blocks).max();
                    series.record(started, best.unwrap_or(0));
                }
                let places = scratch.sizes.iter_mut().zip(&mut scratch.scores);
                let places = places.zip(&mut scratch.held).zip(&mut scratch.predictions);
                for ((((size, score), held), prediction), found) in places.zip(lookup.matches()) {
                    // An engine that has stored nothing since it started holds nothing, in any size.
                    if size.is_none() && found.trust == Trust::Exact {
                        *size = Some(of_size.block_size);
                    }
                    if *size == Some(of_size.block_size) {
                        let in_host = found.by_tier.get(usize::from(CPU));
                        *score += found.score;
                        held.0 += found.blocks;
                        held.1 += in_host.copied().unwrap_or(0);
                        let blocks = u64::from(found.blocks).min(usable);
                        prediction.tokens += blocks * u64::from(of_size.block_size);
                        prediction.trust = found.trust;
                    }
                }
            }
        }
        let known = scratch.predictions.iter();
        known.filter(|p| p.trust != Trust::Unknown).count()
    }
}

impl DataProducer for PrecisePrefixProducer {
    fn produce(
        &self,
        request: &InferenceRequest,
        candidates: &[Candidate],
        attributes: &mut Attributes,
    ) -> Result<(), ProducerError> {
        let mut span = request.span(names::PRODUCE_PRECISE_PREFIX_CACHE);
        let mut keys = Vec::new();
        let found = SCRATCH.with_borrow_mut(|scratch| {
            let prompts = attributes.get(self.ids).unwrap_or_default();
            let known = if prompts.is_empty() {
                self.without_tokens.increment(1);
                span.record(|| [(PRODUCER_RESULT, "skipped_no_tokens".into())]);
                scratch.predictions.clear();
                0
            } else {
                let known = self.look_up(request, prompts, candidates, scratch, &mut keys);
                let whole = prompts.iter().all(PromptTokens::is_whole);
                self.count(whole, known, candidates.len(), &mut span);
                known
            };
            let guesses = attributes.get(self.approximate).unwrap_or_default();
            let matches = (0..candidates.len()).map(|at| {
                let prediction = scratch.predictions.get(at).copied();
                let trust = prediction.unwrap_or_default().trust;
                let size = scratch.sizes.get(at).copied().flatten();
                let of_size = size.and_then(|size| keys.iter().find(|k| k.block_size == size));
                match of_size.filter(|_| known > 0 && trust != Trust::Unknown) {
                    Some(of_size) => {
                        let score = scratch.scores.get(at).copied();
                        let found = exact_match(of_size, score, scratch.held.get(at).copied());
                        guesses
                            .get(at)
                            .map_or(found, |guess| of_size.beyond(found, guess))
                    }
                    None => guesses.get(at).copied().unwrap_or_default(),
                }
            });
            let matches = matches.collect::<Vec<_>>();
            let predictions = attributes.write(self.predictions);
            predictions.extend_from_slice(&scratch.predictions);
            matches
        });
        record_matches(&mut span, &found);
        attributes.write(self.matches).extend(found);
        attributes.write(self.keys).append(&mut keys);
        Ok(())
    }

    fn prepare(
        &self,
        request: &InferenceRequest,
        candidates: &[Candidate],
        attributes: &Attributes,
    ) -> Option<Preparation> {
        let index = self.publishers.remote()?;
        self.prepare_shared(index, request, candidates, attributes)
    }

    fn produce_prepared(
        &self,
        prepared: Box<dyn Any + Send>,
        request: &InferenceRequest,
        candidates: &[Candidate],
        attributes: &mut Attributes,
    ) -> Result<(), ProducerError> {
        match self.publishers.remote() {
            Some(index) => {
                let mut span = request.span(names::PRODUCE_PRECISE_PREFIX_CACHE);
                self.produce_shared(index, prepared, candidates, (attributes, &mut span))
            }
            None => self.produce(request, candidates, attributes),
        }
    }

    fn explain(
        &self,
        request: &InferenceRequest,
        candidates: &[Candidate],
        attributes: &Attributes,
    ) -> Option<serde_json::Value> {
        if let Some(index) = self.publishers.remote() {
            return self.explain_shared(index, candidates, attributes);
        }
        let prompts = attributes.get(self.ids)?;
        let keys = attributes.get(self.keys).unwrap_or_default();
        Some(self.explain_request(request, prompts, keys, candidates))
    }

    fn overview(&self, pool: &[Arc<Endpoint>]) -> Option<serde_json::Value> {
        Some(self.overview_of(pool))
    }
}

/// What a recorded look-up found.
fn record_matches(span: &mut Span, matches: &[PrefixMatch]) {
    span.record(|| {
        let most = |of: fn(&PrefixMatch) -> u32| matches.iter().map(of).max().unwrap_or(0);
        [
            (
                "llm_d.epp.producer.candidate_endpoints",
                matches.len().into(),
            ),
            (
                "llm_d.epp.producer.total_blocks",
                most(|m| m.total_blocks).into(),
            ),
            (
                "llm_d.epp.producer.max_match_blocks",
                most(|m| m.matched_blocks).into(),
            ),
        ]
    });
}

impl EndpointListener for PrecisePrefixProducer {
    fn added(&self, endpoint: &Arc<Endpoint>) {
        self.publishers.added(endpoint);
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
        self.publishers.removed(endpoint);
        self.parity.forget(endpoint.index);
    }
}

#[cfg(test)]
mod tests;
