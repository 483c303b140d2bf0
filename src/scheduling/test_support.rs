//! Builders for plugin tests: every field is neutral unless the test names it.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::sync::Arc;

use tokio::time::Instant;

use super::attributes::{APPROX_PREFIX_PRODUCER, PREFIX_MATCH, PrefixMatch, TOKENIZED_PROMPT};
use super::{Candidate, Candidates, Cycle, Filter, Round, Scorer};
use crate::datalayer::{Endpoint, EndpointIndex, EndpointSpec, EngineMetrics, LoraState};
use crate::plugin::{Attributes, Build, DataKeys, Parameters, Plugin};
use crate::request::{Body, InferenceRequest, Payload};

/// One endpoint of a test pool.
#[derive(Debug, Clone)]
pub(crate) struct TestEndpoint {
    name: String,
    metrics: EngineMetrics,
    labels: BTreeMap<String, String>,
    matched_blocks: u32,
    host_blocks: Option<u32>,
    in_flight: (i64, i64),
    uncached: u64,
}

/// An idle, scraped endpoint.
pub(crate) fn endpoint(name: &str) -> TestEndpoint {
    TestEndpoint {
        name: name.to_owned(),
        metrics: EngineMetrics {
            updated_at: Some(Instant::now()),
            ..EngineMetrics::default()
        },
        labels: BTreeMap::new(),
        matched_blocks: 0,
        host_blocks: None,
        in_flight: (0, 0),
        uncached: 0,
    }
}

impl TestEndpoint {
    pub(crate) fn waiting(mut self, requests: u32) -> Self {
        self.metrics.waiting_requests = requests;
        self
    }

    pub(crate) fn running(mut self, requests: u32) -> Self {
        self.metrics.running_requests = requests;
        self
    }

    pub(crate) fn kv(mut self, usage: f64) -> Self {
        self.metrics.kv_cache_usage = usage;
        self
    }

    pub(crate) fn unscraped(mut self) -> Self {
        self.metrics.updated_at = None;
        self
    }

    pub(crate) fn label(mut self, key: &str, value: &str) -> Self {
        self.labels.insert(key.to_owned(), value.to_owned());
        self
    }

    pub(crate) fn matched_blocks(mut self, blocks: u32) -> Self {
        self.matched_blocks = blocks;
        self
    }

    pub(crate) fn host_blocks(mut self, blocks: u32) -> Self {
        self.host_blocks = Some(blocks);
        self
    }

    pub(crate) fn in_flight(mut self, requests: i64, tokens: i64) -> Self {
        self.in_flight = (requests, tokens);
        self
    }

    pub(crate) fn uncached(mut self, tokens: u64) -> Self {
        self.uncached = tokens;
        self
    }

    pub(crate) fn lora(mut self, active: &[&str], waiting: &[&str], max: u32) -> Self {
        let own = |names: &[&str]| names.iter().map(|n| (*n).to_owned()).collect();
        self.metrics.lora = Some(Arc::new(LoraState {
            active: own(active),
            waiting: own(waiting),
            max_active: max,
        }));
        self
    }
}

/// Candidates with their columns, around a request of ten 64-token blocks.
pub(crate) struct Pool {
    pub(crate) candidates: Vec<Candidate>,
    pub(crate) request: InferenceRequest,
    endpoints: Vec<TestEndpoint>,
    pub(crate) keys: DataKeys,
    pub(crate) rng: RefCell<fastrand::Rng>,
    /// Tokens of the only prompt; `None` when no producer counted them.
    pub(crate) prompt_tokens: Option<u64>,
}

impl Pool {
    pub(crate) fn new(endpoints: impl IntoIterator<Item = TestEndpoint>) -> Self {
        let endpoints: Vec<_> = endpoints.into_iter().collect();
        let candidates = endpoints
            .iter()
            .zip(0..)
            .map(|(e, i)| {
                let spec = EndpointSpec {
                    name: e.name.clone(),
                    namespace: "default".to_owned(),
                    address: ([10, 0, 0, 1], 8000 + u16::try_from(i).unwrap()).into(),
                    labels: e.labels.clone(),
                    rank: 0,
                    details: crate::datalayer::EndpointDetails::default(),
                };
                let endpoint = Endpoint::new(spec, EndpointIndex(i));
                endpoint.set_metrics(e.metrics.clone());
                Candidate {
                    metrics: endpoint.metrics(),
                    endpoint: Arc::new(endpoint),
                }
            })
            .collect();
        let request = InferenceRequest::new("r", Payload::raw(false), Body::default());
        Self {
            candidates,
            request,
            endpoints,
            keys: DataKeys::default(),
            rng: RefCell::new(fastrand::Rng::with_seed(7)),
            prompt_tokens: None,
        }
    }

    /// Builds `P` with `parameters` (JSON), wired to this pool's columns.
    pub(crate) fn plugin<P: Plugin>(&mut self, parameters: &str) -> P {
        let parameters = Parameters(Some(serde_json::from_str(parameters).unwrap()));
        self.keys.enter(P::TYPE);
        P::build(&mut Build {
            name: P::TYPE,
            parameters: &parameters,
            keys: &mut self.keys,
        })
        .unwrap()
    }

    /// Adds a request header.
    pub(crate) fn header(&mut self, name: &str, value: &str) {
        let value = bytes::Bytes::copy_from_slice(value.as_bytes());
        self.request.headers.push(name.to_owned(), value);
    }

    /// Fills the columns the default producers would write and runs `f`.
    pub(crate) fn with_cycle<R>(&self, f: impl FnOnce(&Cycle<'_>, &[Candidate]) -> R) -> R {
        let mut keys = DataKeys::default();
        // Same declaration order as the plugins' own keys, so that slots agree.
        let mut attributes = Attributes::default();
        for (slot, key) in self.keys.keys().iter().cloned().enumerate() {
            debug_assert_eq!(keys.keys().len(), slot);
            match key.data_type.as_ref() {
                PREFIX_MATCH => {
                    let column = keys.require::<PrefixMatch>(key.data_type, &key.producer);
                    let known = key.producer == APPROX_PREFIX_PRODUCER;
                    let value = |e: &TestEndpoint| PrefixMatch {
                        matched_blocks: if known { e.matched_blocks } else { 0 },
                        total_blocks: 10,
                        block_size_tokens: 64,
                        cached_blocks: if known { e.matched_blocks } else { 0 },
                        host_blocks: e.host_blocks.filter(|_| known),
                    };
                    attributes
                        .write(column)
                        .extend(self.endpoints.iter().map(value));
                }
                super::attributes::UNCACHED_TOKENS => {
                    let column = keys.require::<u64>(key.data_type, &key.producer);
                    attributes
                        .write(column)
                        .extend(self.endpoints.iter().map(|e| e.uncached));
                }
                TOKENIZED_PROMPT => {
                    let column = keys.require::<u64>(key.data_type, &key.producer);
                    if let Some(tokens) = self.prompt_tokens {
                        attributes.write(column).push(tokens);
                    }
                }
                _ => {
                    keys.require::<()>(key.data_type, &key.producer);
                }
            }
        }
        let mut slots = DataKeys::default();
        let slot = slots
            .in_flight(super::attributes::IN_FLIGHT_PRODUCER)
            .unwrap();
        for (candidate, e) in self.candidates.iter().zip(&self.endpoints) {
            let load = candidate.endpoint.in_flight(slot);
            load.release(load.requests(), load.tokens());
            load.book(e.in_flight.0, e.in_flight.1);
        }
        let cycle = Cycle {
            request: &self.request,
            attributes: &attributes,
            now: Instant::now(),
            rng: &self.rng,
        };
        f(&cycle, &self.candidates)
    }

    /// As [`Self::with_cycle`], for a profile handler over profiles of these names.
    pub(crate) fn with_round<R>(&self, names: &[Arc<str>], f: impl FnOnce(&Round<'_>) -> R) -> R {
        let mut keys = self.keys.clone();
        let matches = keys.optional::<PrefixMatch>(PREFIX_MATCH, APPROX_PREFIX_PRODUCER);
        self.with_cycle(|cycle, candidates| {
            f(&Round {
                cycle,
                candidates,
                names,
                prefix_matches: &[matches],
            })
        })
    }

    /// Scores of all endpoints.
    pub(crate) fn scores(&self, scorer: &dyn Scorer) -> Vec<f64> {
        let all: Vec<u32> = (0..).take(self.candidates.len()).collect();
        let mut scores = vec![0.0; all.len()];
        self.with_cycle(|cycle, candidates| {
            scorer.score(cycle, Candidates::new(candidates, &all), &mut scores);
        });
        scores
    }

    /// Names a filter keeps, in order.
    pub(crate) fn kept(&self, filter: &dyn Filter) -> Vec<&str> {
        let all: Vec<u32> = (0..).take(self.candidates.len()).collect();
        let mut keep = Vec::new();
        self.with_cycle(|cycle, candidates| {
            filter.filter(cycle, Candidates::new(candidates, &all), &mut keep);
        });
        keep.iter()
            .map(|&i| self.endpoints[i as usize].name.as_str())
            .collect()
    }
}

/// Why `P` cannot be built with `parameters` (JSON).
pub(crate) fn refusal<P: Plugin + std::fmt::Debug>(parameters: &str) -> String {
    let parameters = Parameters(Some(serde_json::from_str(parameters).unwrap()));
    let mut keys = DataKeys::default();
    keys.enter(P::TYPE);
    let built = P::build(&mut Build {
        name: P::TYPE,
        parameters: &parameters,
        keys: &mut keys,
    });
    built.unwrap_err().to_string()
}
