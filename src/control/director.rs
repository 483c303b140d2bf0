//! The use case, top to bottom: one request in, one decision out.
//!
//! Nothing here waits. When a data producer has to (a window that must close, a remote tokenizer),
//! the decision is handed back as [`Step::Wait`] and goes on with [`Director::resume`] where it
//! stopped.

mod answer;
mod draft;
mod explain;

use std::cell::RefCell;
use std::sync::Arc;

use arc_swap::ArcSwap;
use tokio::time::Instant;
use xxhash_rust::xxh3::{Xxh3, xxh3_64};

use super::RequestError;
use super::candidates::{CandidatePool, Subset};
use super::intake::{
    BodyKnowledge, DEFAULT_FLOW, Intake, Read, read_request, received_id, request_id,
};
use super::rules::SharedRules;
use crate::datalayer::EndpointStore;
use crate::plugin::{Attributes, Column, Hook};
use crate::request::parsers::{ParserSet, request_path};
use crate::request::{AppProtocol, Body, Early, EarlyWork, Headers, InferenceRequest};
use crate::response::ResponseHooks;
use crate::scheduling::attributes::PrefixMatch;
use crate::scheduling::scheduler::{Scheduler, Scratch};
use crate::scheduling::{
    Admitter, Candidate, Cycle, DataProducer, PreRequest, ProducerError, RequestHeaderProcessor,
    SaturationDetector, Screener,
};
use crate::telemetry::metrics::{Metrics, RequestSeries};
pub use answer::Decision;
pub use draft::Waiting;
use draft::{Draft, Prepared, screen};

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
        let works = config.producers.iter().map(|hook| hook.plugin.early_work());
        let work = works.fold(EarlyWork::default(), EarlyWork::and);
        Some(Early::new(reading, work))
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
        draft.take(prepared);
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

    fn series(&self, request: &InferenceRequest) -> Arc<RequestSeries> {
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
