//! The use case, top to bottom: one request in, one decision out.
//!
//! Nothing here waits. When a data producer has to (a window that must close, a remote tokenizer),
//! the decision is handed back as [`Step::Wait`] and goes on with [`Director::resume`] where it
//! stopped.

mod explain;

use std::any::Any;
use std::cell::RefCell;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use arc_swap::ArcSwap;
use bytes::Bytes;
use smallvec::SmallVec;
use tokio::time::Instant;
use xxhash_rust::xxh3::{Xxh3, xxh3_64};

use super::RequestError;
use super::candidates::{CandidatePool, Lent, Subset};
use super::intake::{
    BodyKnowledge, DEFAULT_FLOW, Intake, Read, RequestId, headers_to_remove, read_request,
    received_id, request_id, wants_cached_prefix,
};
use super::rules::SharedRules;
use crate::datalayer::EndpointStore;
use crate::plugin::{Attributes, Column, Hook, Lap, Leases};
use crate::request::parsers::{ParserSet, request_path};
use crate::request::rewrite::rewrite_model;
use crate::request::{ApiKind, AppProtocol, Body, Early, Headers, InferenceRequest, Payload};
use crate::response::accounting::RequestFacts;
use crate::response::usage::UsageFormat;
use crate::response::{Accounting, ResponseHooks};
use crate::scheduling::attributes::PrefixMatch;
use crate::scheduling::scheduler::{Scheduler, Scratch};
use crate::scheduling::{
    Admitter, Candidate, Cycle, DataProducer, Outcome, PreRequest, Preparation, ProducerError,
    RequestHeaderProcessor, SaturationDetector, SchedulingResult, Screener,
};
use crate::telemetry::metrics::Metrics;

/// Where the request goes and what changes on the way.
#[derive(Debug)]
pub struct Decision {
    /// `ip:port` of the picks, best first, joined by commas.
    pub destination: Bytes,
    /// Totals of every endpoint the primary profile scored, with `--emit-endpoint-scores`.
    pub scores: Option<Vec<(String, f64)>>,
    /// Further request headers to set.
    pub set_headers: Vec<(&'static str, Bytes)>,
    /// Request headers to remove.
    pub remove_headers: Vec<String>,
    /// The body to forward.
    pub body: Body,
    /// True when `body` is not the body that was received.
    pub rewritten: bool,
    /// What the request holds and measures from now on.
    pub account: Accounting,
    /// The response is not looked at.
    pub skip_response: bool,
}

/// One loaded configuration, as requests use it, in the order of use. Replaced whole.
#[derive(Debug)]
pub struct ActiveConfig {
    /// Path to parser.
    pub parsers: ParserSet,
    /// Read request headers.
    pub header_processors: Vec<Hook<dyn RequestHeaderProcessor>>,
    /// Fairness id of requests whose headers name none.
    pub agent_identity: Option<Column<String>>,
    /// Decides when requests with a negative priority are shed.
    pub saturation: Arc<dyn SaturationDetector>,
    /// Restrict the candidates.
    pub screeners: Vec<Hook<dyn Screener>>,
    /// In dependency order.
    pub producers: Vec<Hook<dyn DataProducer>>,
    /// May refuse.
    pub admitters: Vec<Hook<dyn Admitter>>,
    /// Filter, score, pick.
    pub scheduler: Scheduler,
    /// Prefix matches that `Prefer: if-available` asks for; any of them will do.
    pub prefix_matches: Vec<Column<PrefixMatch>>,
    /// Run after the pick.
    pub pre_request: Vec<Hook<dyn PreRequest>>,
    /// Plugins of the response phase; `None` without any.
    pub response_hooks: Option<Arc<ResponseHooks>>,
}

/// Settings that do not come from the configuration document.
#[derive(Debug, Clone)]
pub struct DirectorOptions {
    /// `--disable-endpoint-subset-filter`.
    pub ignore_subset: bool,
    /// `--emit-endpoint-scores`.
    pub emit_scores: bool,
    /// `--strip-routing-headers`.
    pub strip_control_headers: bool,
    /// Makes picks reproducible for equal requests in an equal state of the pool.
    pub seed: Option<u64>,
}

/// Decides for every request.
#[derive(Debug)]
pub struct Director {
    store: Arc<EndpointStore>,
    active: ArcSwap<ActiveConfig>,
    options: DirectorOptions,
    metrics: Metrics,
    rules: SharedRules,
}

/// What became of a request that was handed to the director.
#[derive(Debug)]
pub enum Step {
    /// It is decided.
    Done(Result<Box<Decision>, RequestError>),
    /// A data producer works on it; goes on with [`Director::resume`].
    Wait(Box<Waiting>),
}

/// A decision that waits for a data producer. It keeps the configuration it began with.
pub struct Waiting {
    draft: Draft,
    work: Work,
}

/// What a producer's preparation ended with.
type Prepared = Box<dyn Any + Send>;
/// A preparation under its timeout.
type Work = Pin<Box<dyn Future<Output = Result<Prepared, ProducerError>> + Send>>;

impl std::fmt::Debug for Waiting {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Waiting")
            .field("draft", &self.draft)
            .finish_non_exhaustive()
    }
}

impl Waiting {
    /// Ready when the producer is done or out of time. Poll again only after `Pending`.
    pub fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<Prepared, ProducerError>> {
        self.work.as_mut().poll(cx)
    }
}

/// A decision on its way: the request and what is known so far.
#[derive(Debug)]
struct Draft {
    config: Arc<ActiveConfig>,
    request: InferenceRequest,
    id: RequestId,
    received_at: Instant,
    candidates: Lent,
    attributes: Attributes,
    /// Producers that are done.
    produced: usize,
}

thread_local! {
    static WORKSPACE: RefCell<Workspace> = RefCell::default();
}

/// Buffers of a worker thread, so that a warm decision reuses its memory.
#[derive(Debug, Default)]
struct Workspace {
    pool: CandidatePool,
    attributes: Attributes,
    scratch: Scratch,
    keep: Vec<u32>,
    rng: RefCell<fastrand::Rng>,
}

impl Director {
    /// A director over `store`.
    pub fn new(
        store: Arc<EndpointStore>,
        active: ActiveConfig,
        options: DirectorOptions,
        metrics: Metrics,
    ) -> Self {
        Self {
            store,
            active: ArcSwap::from_pointee(active),
            options,
            metrics,
            rules: SharedRules::default(),
        }
    }

    /// Objectives and rewrites to decide by, which may change at any time.
    #[must_use]
    pub fn with_rules(mut self, rules: SharedRules) -> Self {
        self.rules = rules;
        self
    }

    /// True when every parser in use reads what an engine of this protocol is sent.
    pub fn accepts(&self, protocol: AppProtocol) -> bool {
        self.active.load().parsers.accept(protocol)
    }

    /// Replaces the configuration between requests.
    pub fn activate(&self, config: ActiveConfig) {
        self.active.store(Arc::new(config));
    }

    /// Begins to read a body whose end is still to come. `None` when its parser wants it whole.
    pub fn read_early(&self, headers: &Headers) -> Option<Early> {
        let config = self.active.load();
        let path = request_path(headers);
        let reading = config.parsers.resolve(path).ok()?.begin(path)?;
        let mut producers = config.producers.iter();
        let block_tokens = producers.find_map(|hook| hook.plugin.early_block_tokens());
        Some(Early::new(reading, block_tokens))
    }

    /// Decides, as far as possible without waiting.
    pub fn decide(&self, intake: Intake, knowledge: BodyKnowledge) -> Step {
        let started = Instant::now();
        WORKSPACE.with_borrow_mut(|workspace| {
            if knowledge == BodyKnowledge::Absent {
                let decision = self.any_endpoint(intake, workspace);
                return Step::Done(decision.map(Box::new));
            }
            let step = self.begin(intake, knowledge, workspace);
            self.metrics.decision(started.elapsed());
            step
        })
    }

    /// Goes on with a decision whose producer is done.
    pub fn resume(&self, waiting: Waiting, prepared: Result<Prepared, ProducerError>) -> Step {
        let Waiting { mut draft, .. } = waiting;
        let Draft {
            config,
            request,
            candidates,
            attributes,
            produced,
            ..
        } = &mut draft;
        if let Some(producer) = config.producers.get(*produced) {
            let result = producer.timed(|plugin| {
                plugin.produce_prepared(prepared?, request, &candidates.list, attributes)
            });
            *produced += 1;
            if let Err(error) = result {
                give_up_on_producers(&producer.name.name, &error);
                *produced = config.producers.len();
            }
        }
        WORKSPACE.with_borrow_mut(|workspace| {
            // Other requests drew from these numbers while this one waited.
            let request = &draft.request;
            self.seed(&workspace.rng, &request.headers, &request.body);
            self.go_on(draft, workspace)
        })
    }

    /// A request that was received at this time was refused before its body was understood.
    pub fn note_refusal(&self, error: &RequestError, received_at: Instant, request_id: &str) {
        self.metrics.request_processed(received_at.elapsed());
        self.count_refusal(error, request_id);
    }

    fn count_refusal(&self, error: &RequestError, request_id: &str) {
        tracing::debug!(request_id, %error, "refused");
        self.metrics
            .request_series("", "", DEFAULT_FLOW, 0)
            .error(error.code());
    }

    /// The proxy gave a request up in `phase`.
    pub fn note_abort(&self, phase: &'static str) {
        self.metrics.aborted(phase);
    }

    /// Requests without a body reveal nothing to schedule by: any endpoint of the subset will do.
    fn any_endpoint(
        &self,
        intake: Intake,
        workspace: &mut Workspace,
    ) -> Result<Decision, RequestError> {
        let id = request_id(&intake.headers);
        self.seed(&workspace.rng, &intake.headers, &intake.body);
        let candidates = self.collect(&intake.subset, &mut workspace.pool);
        let count = candidates.len();
        if count == 0 {
            let error = RequestError::NoEndpoints;
            self.count_refusal(&error, id.as_str());
            return Err(error);
        }
        let chosen = workspace.rng.borrow_mut().usize(..count);
        let endpoint = &candidates[chosen].endpoint;
        let facts = RequestFacts {
            received_at: intake.received_at,
            model: String::new(),
            target_model: String::new(),
            stream: false,
            usage: None,
            picks: SmallVec::from_iter([Arc::clone(endpoint)]),
            request_id: id.as_str().to_owned(),
            hooks: self.active.load().response_hooks.clone(),
        };
        Ok(Decision {
            destination: endpoint.host_port.clone(),
            scores: None,
            set_headers: id.header().into_iter().collect(),
            remove_headers: headers_to_remove(
                &intake.headers,
                self.options.strip_control_headers,
                &[],
            ),
            body: intake.body,
            rewritten: false,
            account: Accounting::new(facts, Leases::default(), None),
            skip_response: false,
        })
    }

    /// Reads the request, admits it and finds its candidates.
    fn begin(&self, intake: Intake, knowledge: BodyKnowledge, workspace: &mut Workspace) -> Step {
        let config = self.active.load_full();
        let Intake {
            headers,
            body,
            early,
            subset,
            received_at,
            mut trace,
        } = intake;
        self.seed(&workspace.rng, &headers, &body);
        let rules = self.rules.load();
        let with = (&**rules, &workspace.rng);
        let id = request_id(&headers);
        let request = (headers, body, early);
        let read = match read_request(&config.parsers, &id, request, knowledge, with) {
            Ok(read) => read,
            Err(error) => {
                trace.fail(error.code());
                self.note_refusal(&error, received_at, id.as_str());
                return Step::Done(Err(error));
            }
        };
        let Read {
            mut request,
            rewritten_by,
        } = read;
        trace.record(|| {
            [
                ("target_model", request.target_model.clone().into()),
                ("request_prio", i64::from(request.priority).into()),
            ]
        });
        request.trace = trace;
        if let Some((rule, exact)) = rewritten_by {
            let target = &request.target_model;
            self.metrics.rewritten(&rule, &request.model, target, exact);
        }
        let mut attributes = std::mem::take(&mut workspace.attributes);
        attributes.clear();
        for hook in &config.header_processors {
            hook.timed(|plugin| plugin.process(&request, &mut attributes));
        }
        if request.fairness_id.is_empty() {
            let agent = config.agent_identity.and_then(|c| attributes.get(c));
            request.fairness_id = agent
                .and_then(|values| values.first())
                .map_or_else(|| DEFAULT_FLOW.to_owned(), Clone::clone);
        }
        let admitted = self.admit(&config, &request, &subset, &attributes, workspace);
        let draft = Draft {
            config,
            request,
            id,
            received_at,
            candidates: workspace.pool.take(),
            attributes,
            produced: 0,
        };
        match admitted {
            Ok(()) => self.go_on(draft, workspace),
            Err(error) => self.refuse(draft, error, workspace),
        }
    }

    /// Legacy admission, then the candidates.
    fn admit(
        &self,
        config: &ActiveConfig,
        request: &InferenceRequest,
        subset: &Subset,
        attributes: &Attributes,
        workspace: &mut Workspace,
    ) -> Result<(), RequestError> {
        let now = Instant::now();
        self.seed(&workspace.rng, &request.headers, &request.body);
        if request.priority < 0 {
            let all = self.collect(&Subset::Any, &mut workspace.pool);
            if config.saturation.saturation(all, now) >= 1.0 {
                return Err(RequestError::Shed);
            }
        }
        let candidates = self.collect(subset, &mut workspace.pool);
        if candidates.is_empty() {
            return Err(RequestError::NoCandidates);
        }
        if !config.screeners.is_empty() {
            let cycle = Cycle {
                request,
                attributes,
                now,
                rng: &workspace.rng,
            };
            screen(&config.screeners, &cycle, candidates, &mut workspace.keep);
        }
        if candidates.is_empty() {
            return Err(RequestError::Screened);
        }
        Ok(())
    }

    /// Producers, admitters, profiles, hooks.
    fn go_on(&self, mut draft: Draft, workspace: &mut Workspace) -> Step {
        if let Some(work) = draft.produce() {
            return Step::Wait(Box::new(Waiting { draft, work }));
        }
        let picked = draft.pick(workspace);
        let step = match picked {
            Ok((result, outcome)) => {
                let decision = self.answer(&mut draft, &result, outcome, &workspace.scratch);
                Step::Done(Ok(Box::new(decision)))
            }
            Err(error) => return self.refuse(draft, error, workspace),
        };
        workspace.take_back(draft);
        step
    }

    fn refuse(&self, mut draft: Draft, error: RequestError, workspace: &mut Workspace) -> Step {
        draft.request.trace.fail(error.code());
        let request = &draft.request;
        self.metrics.request_processed(draft.received_at.elapsed());
        self.series(request).error(error.code());
        self.metrics.scheduled(&request.target_model, None);
        tracing::debug!(request_id = request.id, %error, "refused");
        workspace.take_back(draft);
        Step::Done(Err(error))
    }

    fn answer(
        &self,
        draft: &mut Draft,
        result: &SchedulingResult,
        outcome: Outcome,
        scratch: &Scratch,
    ) -> Decision {
        let Draft {
            config,
            request,
            id,
            received_at,
            candidates,
            ..
        } = draft;
        let candidates = &candidates.list;
        let picks: SmallVec<[_; 1]> = result
            .primary
            .picks
            .iter()
            .filter_map(|&p| Some(Arc::clone(&candidates.get(p as usize)?.endpoint)))
            .collect();
        let destination = match (outcome.primary_port, picks.first()) {
            // The header beside it names a rank of the first pick's address only.
            (Some(port), Some(first)) => SocketAddr::new(first.spec.address.ip(), port)
                .to_string()
                .into(),
            _ => join(picks.iter().map(|e| &e.host_port)),
        };
        let spec = picks.first().map(|e| &e.spec);
        let labels = spec.map(|s| (s.name.as_str(), s.namespace.as_str(), s.address.port()));
        self.metrics.scheduled(&request.target_model, labels);
        let received = std::mem::take(&mut request.body);
        let rewritten = request.payload.rewritable && request.target_model != request.model;
        let body = if rewritten {
            rewrite_model(&received, &request.payload, &request.target_model)
        } else {
            received
        };
        let series = self.series(request);
        series.scheduled(body.len() as u64);
        self.metrics.request_processed(received_at.elapsed());
        tracing::debug!(
            request_id = request.id,
            model = request.model,
            target_model = request.target_model,
            endpoint = %String::from_utf8_lossy(&destination),
            "picked"
        );
        let hooks = config.response_hooks.clone();
        let facts = RequestFacts {
            received_at: *received_at,
            stream: request.payload.stream,
            usage: usage_format(&request.payload),
            picks,
            request_id: hooks
                .as_ref()
                .map(|_| request.id.clone())
                .unwrap_or_default(),
            hooks,
            model: std::mem::take(&mut request.model),
            target_model: std::mem::take(&mut request.target_model),
        };
        let Outcome {
            leases,
            mut set_headers,
            primary_port,
        } = outcome;
        let remove_headers = headers_to_remove(
            &request.headers,
            self.options.strip_control_headers,
            &set_headers,
        );
        set_headers.extend(id.header());
        Decision {
            destination,
            scores: (self.options.emit_scores && primary_port.is_none())
                .then(|| named_scores(candidates, scratch)),
            set_headers,
            remove_headers,
            body,
            rewritten,
            account: Accounting::new(facts, leases, Some(series)),
            skip_response: request.payload.skip_response,
        }
    }

    fn collect<'w>(&self, subset: &Subset, pool: &'w mut CandidatePool) -> &'w mut Vec<Candidate> {
        let subset = if self.options.ignore_subset {
            &Subset::Any
        } else {
            subset
        };
        pool.collect(&self.store, subset)
    }

    /// With `--seed`, makes this request's random numbers depend on its id alone, or on its body when
    /// the client sent no id.
    fn seed(&self, rng: &RefCell<fastrand::Rng>, headers: &Headers, body: &Body) {
        let Some(seed) = self.options.seed else {
            return;
        };
        let input = if let Some(id) = received_id(headers) {
            xxh3_64(id.as_bytes())
        } else {
            let mut hash = Xxh3::new();
            for piece in body.pieces() {
                hash.update(piece);
            }
            hash.digest()
        };
        rng.borrow_mut().seed(seed ^ input);
    }

    fn series(&self, request: &InferenceRequest) -> Arc<crate::telemetry::metrics::RequestSeries> {
        self.metrics.request_series(
            &request.model,
            &request.target_model,
            &request.fairness_id,
            request.priority,
        )
    }
}

impl Workspace {
    /// Keeps the buffers of a decision that ended; its span ends with it.
    fn take_back(&mut self, draft: Draft) {
        self.pool.put_back(draft.candidates);
        self.attributes = draft.attributes;
    }
}

impl Draft {
    /// Runs producers until all are done or one has to wait.
    fn produce(&mut self) -> Option<Work> {
        let Self {
            config,
            request,
            candidates,
            attributes,
            produced,
            ..
        } = self;
        let candidates = &candidates.list;
        let mut lap = Lap::start();
        while let Some(producer) = config.producers.get(*produced) {
            if let Some(preparation) = producer.plugin.prepare(request, candidates, attributes) {
                return Some(Box::pin(in_time(preparation)));
            }
            let result = producer.timed_after(&mut lap, |plugin| {
                plugin.produce(request, candidates, attributes)
            });
            *produced += 1;
            if let Err(error) = result {
                give_up_on_producers(&producer.name.name, &error);
                *produced = config.producers.len();
            }
        }
        None
    }

    /// Admitters, profiles, hooks.
    fn pick(&self, workspace: &mut Workspace) -> Result<(SchedulingResult, Outcome), RequestError> {
        let Draft {
            config,
            request,
            candidates,
            attributes,
            ..
        } = self;
        let candidates = &candidates.list;
        let cycle = Cycle {
            request,
            attributes,
            now: Instant::now(),
            rng: &workspace.rng,
        };
        for hook in &config.admitters {
            hook.timed(|plugin| plugin.admit(&cycle, candidates))?;
        }
        let result = config
            .scheduler
            .schedule(&cycle, candidates, &mut workspace.scratch)?;
        if wants_cached_prefix(&request.headers)
            && !holds_prefix(&config.prefix_matches, attributes, &result)
        {
            return Err(RequestError::NoCachedPrefix);
        }
        let mut outcome = Outcome::default();
        let mut lap = Lap::start();
        for hook in &config.pre_request {
            hook.timed_after(&mut lap, |plugin| {
                plugin.on_pick(&cycle, candidates, &result, &mut outcome);
            });
        }
        Ok((result, outcome))
    }
}

async fn in_time(preparation: Preparation) -> Result<Prepared, ProducerError> {
    let Preparation { work, timeout } = preparation;
    tokio::time::timeout(timeout, work)
        .await
        .map_err(|_| ProducerError(format!("not ready within {timeout:?}")))
}

fn give_up_on_producers(name: &str, error: &ProducerError) {
    tracing::warn!(producer = name, %error, "data producer failed, the rest is skipped");
}

/// Keeps the candidates that every screener keeps.
fn screen(
    screeners: &[Hook<dyn Screener>],
    cycle: &Cycle<'_>,
    candidates: &mut Vec<Candidate>,
    keep: &mut Vec<u32>,
) {
    // Each sees the full list, so the verdicts are collected before anything is dropped.
    let mut kept_by = vec![0usize; candidates.len()];
    for hook in screeners {
        keep.clear();
        hook.timed(|plugin| plugin.screen(cycle, candidates, keep));
        keep.sort_unstable();
        keep.dedup();
        for &position in keep.iter() {
            if let Some(count) = kept_by.get_mut(position as usize) {
                *count += 1;
            }
        }
    }
    let mut counts = kept_by.into_iter();
    candidates.retain(|_| counts.next() == Some(screeners.len()));
}

/// True when the first pick holds at least one block of the prompt.
fn holds_prefix(
    columns: &[Column<PrefixMatch>],
    attributes: &Attributes,
    result: &SchedulingResult,
) -> bool {
    let Some(&pick) = result.primary.picks.first() else {
        return false;
    };
    columns
        .iter()
        .filter_map(|column| attributes.get(*column)?.get(pick as usize))
        .any(|found| found.matched_blocks > 0)
}

fn usage_format(payload: &Payload) -> Option<UsageFormat> {
    match payload.api {
        ApiKind::Raw => None,
        ApiKind::Messages => Some(UsageFormat::Anthropic),
        ApiKind::SglangGenerate => Some(UsageFormat::Sglang),
        ApiKind::GrpcGenerate => Some(UsageFormat::VllmGenerate),
        ApiKind::GrpcEmbed => Some(UsageFormat::VllmEmbed),
        ApiKind::VertexAi => Some(UsageFormat::VertexAi),
        _ => Some(UsageFormat::OpenAi),
    }
}

fn join<'a>(addresses: impl Iterator<Item = &'a Bytes>) -> Bytes {
    let mut addresses = addresses.peekable();
    let Some(first) = addresses.next() else {
        return Bytes::new();
    };
    if addresses.peek().is_none() {
        return first.clone();
    }
    let mut list = first.to_vec();
    for address in addresses {
        list.push(b',');
        list.extend_from_slice(address);
    }
    list.into()
}

fn named_scores(candidates: &[Candidate], scratch: &Scratch) -> Vec<(String, f64)> {
    let scored = scratch.primary_scores().iter();
    scored
        .filter_map(|s| {
            Some((
                candidates
                    .get(s.position as usize)?
                    .endpoint
                    .host_port_str()
                    .to_owned(),
                s.total,
            ))
        })
        .collect()
}
