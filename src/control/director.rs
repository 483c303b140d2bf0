//! The use case, top to bottom: one request in, one decision out. Synchronous: nothing here waits.

use std::cell::RefCell;
use std::sync::Arc;

use arc_swap::ArcSwap;
use bytes::Bytes;
use tokio::time::Instant;
use xxhash_rust::xxh3::xxh3_64;

use super::RequestError;
use super::candidates::{self, Subset};
use crate::datalayer::EndpointStore;
use crate::plugin::{Attributes, Leases, TypedName};
use crate::request::parsers::{ParserSet, request_path};
use crate::request::rewrite::rewrite_model;
use crate::request::{ApiKind, Body, Headers, InferenceRequest, Payload};
use crate::response::Accounting;
use crate::response::accounting::RequestFacts;
use crate::response::usage::UsageFormat;
use crate::scheduling::scheduler::{Scheduler, Scratch};
use crate::scheduling::{
    Candidate, Cycle, DataProducer, PreRequest, SaturationDetector, SchedulingResult,
};
use crate::telemetry::metrics::Metrics;

/// Request header that names the objective; current spelling first.
const OBJECTIVE: [&str; 2] = [
    "x-llm-d-inference-objective",
    "x-gateway-inference-objective",
];
/// Request header with the fairness id.
const FAIRNESS: [&str; 2] = [
    "x-llm-d-inference-fairness-id",
    "x-gateway-inference-fairness-id",
];
/// Request header with the model name to forward.
const MODEL_REWRITE: [&str; 2] = ["x-llm-d-model-name-rewrite", "x-gateway-model-name-rewrite"];
/// Fairness id of requests that name none.
const DEFAULT_FLOW: &str = "default-flow";
/// Longest value of a header that becomes a label or a model name; longer ones count as absent.
const MAX_NAME_BYTES: usize = 1024;

/// Headers that steer endpoints or belong to the gateway: what a client sends of them must not reach
/// an engine or its sidecar. Removed unless this process sets them itself.
const ROUTING_HEADERS: [&str; 7] = [
    "x-prefiller-host-port",
    "x-encoder-hosts-ports",
    "x-data-parallel-host-port",
    "x-kv-cache-source-host-port",
    "x-gateway-destination-endpoint-subset",
    "x-gateway-destination-endpoint-served",
    "x-llm-d-request-dropped-reason",
];

/// Headers that speak to the picker only; removed with `--strip-routing-headers` (the default).
const CONTROL_HEADERS: [&str; 13] = [
    "x-llm-d-inference-objective",
    "x-gateway-inference-objective",
    "x-llm-d-inference-fairness-id",
    "x-gateway-inference-fairness-id",
    "x-llm-d-model-name-rewrite",
    "x-gateway-model-name-rewrite",
    "x-llm-d-slo-ttft-ms",
    "x-slo-ttft-ms",
    "x-llm-d-slo-tpot-ms",
    "x-slo-tpot-ms",
    "x-llm-d-video-fps",
    "x-llm-d-video-duration-seconds",
    "x-llm-d-video-resolution",
];

/// How much of the body the decision may rely on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BodyKnowledge {
    /// All of it was received.
    Complete,
    /// It was received but the proxy may have cut it (BUFFERED_PARTIAL).
    MaybeCut,
    /// There is one, but it cannot be waited for.
    Unseen,
    /// The request has none (GET, DELETE, an empty POST).
    Absent,
}

/// A request as the proxy delivered it.
#[derive(Debug)]
pub struct Intake {
    /// Headers, pseudo headers included.
    pub headers: Headers,
    /// What was received of the body.
    pub body: Body,
    /// The proxy's subset hint.
    pub subset: Subset,
    /// When the first message arrived.
    pub received_at: Instant,
}

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

/// One loaded configuration, as requests use it. Replaced whole.
#[derive(Debug)]
pub struct ActiveConfig {
    /// Path to parser.
    pub parsers: ParserSet,
    /// Filter, score, pick.
    pub scheduler: Scheduler,
    /// In dependency order.
    pub producers: Vec<(TypedName, Arc<dyn DataProducer>)>,
    /// Run after the pick, in configuration order.
    pub pre_request: Vec<Arc<dyn PreRequest>>,
    /// Decides when requests with a negative priority are shed.
    pub saturation: Arc<dyn SaturationDetector>,
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
    /// Makes picks reproducible for equal request ids.
    pub seed: Option<u64>,
}

/// Decides for every request.
#[derive(Debug)]
pub struct Director {
    store: Arc<EndpointStore>,
    active: ArcSwap<ActiveConfig>,
    options: DirectorOptions,
    metrics: Metrics,
}

thread_local! {
    static WORKSPACE: RefCell<Workspace> = RefCell::default();
}

/// Buffers of a worker thread, so that a warm decision reuses its memory.
#[derive(Debug, Default)]
struct Workspace {
    candidates: Vec<Candidate>,
    attributes: Attributes,
    scratch: Scratch,
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
        }
    }

    /// Replaces the configuration between requests.
    pub fn activate(&self, config: ActiveConfig) {
        self.active.store(Arc::new(config));
    }

    /// The decision for one request.
    pub fn decide(
        &self,
        intake: Intake,
        knowledge: BodyKnowledge,
    ) -> Result<Decision, RequestError> {
        let started = Instant::now();
        WORKSPACE.with_borrow_mut(|workspace| {
            let result = if knowledge == BodyKnowledge::Absent {
                self.any_endpoint(intake, workspace)
            } else {
                let result = self.decide_inference(intake, knowledge, workspace);
                self.metrics.decision(started.elapsed());
                result
            };
            // Candidates hold endpoints alive; the next request collects its own.
            workspace.candidates.clear();
            result
        })
    }

    /// A request was refused before it came here.
    pub fn note_refusal(&self, error: &RequestError) {
        tracing::debug!(%error, "refused");
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
        self.collect(&intake.subset, workspace);
        self.seed(&workspace.rng, id.as_str());
        let count = workspace.candidates.len();
        if count == 0 {
            let error = RequestError::NoEndpoints;
            self.note_refusal(&error);
            return Err(error);
        }
        let chosen = workspace.rng.borrow_mut().usize(..count);
        let endpoint = &workspace.candidates[chosen].endpoint;
        let facts = RequestFacts {
            received_at: intake.received_at,
            model: String::new(),
            target_model: String::new(),
            stream: false,
            usage: None,
            endpoint: endpoint.host_port_str().to_owned(),
        };
        Ok(Decision {
            destination: endpoint.host_port.clone(),
            scores: None,
            set_headers: id.into_header(),
            remove_headers: self.headers_to_remove(&intake.headers),
            body: intake.body,
            rewritten: false,
            account: Accounting::new(facts, Leases::default(), None),
            skip_response: false,
        })
    }

    fn decide_inference(
        &self,
        intake: Intake,
        knowledge: BodyKnowledge,
        workspace: &mut Workspace,
    ) -> Result<Decision, RequestError> {
        let config = self.active.load();
        let Intake {
            headers,
            body,
            subset,
            received_at,
        } = intake;
        let fairness = named(&headers, &FAIRNESS)
            .unwrap_or(DEFAULT_FLOW)
            .to_owned();
        let (request, id) = match read_request(&config.parsers, headers, body, knowledge, fairness)
        {
            Ok(read) => read,
            Err(error) => {
                self.note_refusal(&error);
                return Err(error);
            }
        };
        let picked = self.pick(&config, &request, &subset, workspace);
        let (result, leases) = match picked {
            Ok(picked) => picked,
            Err(error) => {
                self.series(&request).error(error.code());
                self.metrics.scheduled(&request.target_model, None);
                tracing::debug!(request_id = request.id, %error, "refused");
                return Err(error);
            }
        };
        Ok(self.answer(request, id, received_at, &result, leases, workspace))
    }

    /// Candidates, producers, profiles, hooks.
    fn pick(
        &self,
        config: &ActiveConfig,
        request: &InferenceRequest,
        subset: &Subset,
        workspace: &mut Workspace,
    ) -> Result<(SchedulingResult, Leases), RequestError> {
        let now = Instant::now();
        self.seed(&workspace.rng, &request.id);
        if request.priority < 0 {
            self.collect(&Subset::Any, workspace);
            if config.saturation.saturation(&workspace.candidates, now) >= 1.0 {
                return Err(RequestError::Shed);
            }
        }
        self.collect(subset, workspace);
        let Workspace {
            candidates,
            attributes,
            scratch,
            rng,
        } = workspace;
        if candidates.is_empty() {
            return Err(RequestError::NoCandidates);
        }
        attributes.clear();
        for (name, producer) in &config.producers {
            if let Err(error) = producer.produce(request, candidates, attributes) {
                tracing::warn!(producer = name.name, %error, "data producer failed, the rest is skipped");
                break;
            }
        }
        let cycle = Cycle {
            request,
            attributes,
            now,
            rng,
        };
        let result = config.scheduler.schedule(&cycle, candidates, scratch)?;
        let mut leases = Leases::default();
        for hook in &config.pre_request {
            hook.on_pick(&cycle, candidates, &result, &mut leases);
        }
        Ok((result, leases))
    }

    fn answer(
        &self,
        request: InferenceRequest,
        id: RequestId,
        received_at: Instant,
        result: &SchedulingResult,
        leases: Leases,
        workspace: &Workspace,
    ) -> Decision {
        let candidates = &workspace.candidates;
        let picks = result
            .primary
            .picks
            .iter()
            .filter_map(|&p| candidates.get(p as usize));
        let first = picks.clone().next().map(|c| Arc::clone(&c.endpoint));
        let destination = join(picks.map(|c| &c.endpoint.host_port));
        let spec = first.as_ref().map(|e| &e.spec);
        let labels = spec.map(|s| (s.name.as_str(), s.namespace.as_str(), s.address.port()));
        self.metrics.scheduled(&request.target_model, labels);
        let rewritten = request.payload.rewritable && request.target_model != request.model;
        let body = if rewritten {
            rewrite_model(&request.body, &request.payload, &request.target_model)
        } else {
            request.body.clone()
        };
        let series = self.series(&request);
        series.scheduled(body.len() as u64);
        self.metrics.request_processed(received_at.elapsed());
        tracing::debug!(
            request_id = request.id,
            model = request.model,
            target_model = request.target_model,
            endpoint = %String::from_utf8_lossy(&destination),
            "picked"
        );
        let facts = RequestFacts {
            received_at,
            stream: request.payload.stream,
            usage: usage_format(&request.payload),
            endpoint: first
                .map(|e| e.host_port_str().to_owned())
                .unwrap_or_default(),
            model: request.model,
            target_model: request.target_model,
        };
        Decision {
            destination,
            scores: self
                .options
                .emit_scores
                .then(|| named_scores(candidates, &workspace.scratch)),
            set_headers: id.into_header(),
            remove_headers: self.headers_to_remove(&request.headers),
            body,
            rewritten,
            account: Accounting::new(facts, leases, Some(series)),
            skip_response: request.payload.skip_response,
        }
    }

    fn collect(&self, subset: &Subset, workspace: &mut Workspace) {
        let subset = if self.options.ignore_subset {
            &Subset::Any
        } else {
            subset
        };
        candidates::collect(&self.store.snapshot(), subset, &mut workspace.candidates);
    }

    fn seed(&self, rng: &RefCell<fastrand::Rng>, request_id: &str) {
        if let Some(seed) = self.options.seed {
            rng.borrow_mut().seed(seed ^ xxh3_64(request_id.as_bytes()));
        }
    }

    fn series(&self, request: &InferenceRequest) -> Arc<crate::telemetry::metrics::RequestSeries> {
        self.metrics.request_series(
            &request.model,
            &request.target_model,
            &request.fairness_id,
            request.priority,
        )
    }

    fn headers_to_remove(&self, headers: &Headers) -> Vec<String> {
        let control: &[&str] = if self.options.strip_control_headers {
            &CONTROL_HEADERS
        } else {
            &[]
        };
        let mut remove = Vec::new();
        for header in headers.iter().filter(|h| h.name.starts_with("x-")) {
            let name = header.name.as_str();
            if ROUTING_HEADERS.contains(&name) || control.contains(&name) {
                remove.push(name.to_owned());
            }
        }
        remove
    }
}

/// Where a request's id came from.
#[derive(Debug)]
enum RequestId {
    Received(String),
    Generated(String),
}

impl RequestId {
    fn as_str(&self) -> &str {
        match self {
            Self::Received(id) | Self::Generated(id) => id,
        }
    }

    /// The header is set only when the client sent none.
    fn into_header(self) -> Vec<(&'static str, Bytes)> {
        match self {
            Self::Received(_) => Vec::new(),
            Self::Generated(id) => vec![("x-request-id", Bytes::from(id))],
        }
    }
}

fn request_id(headers: &Headers) -> RequestId {
    match headers.get_str("x-request-id").filter(|id| !id.is_empty()) {
        Some(id) => RequestId::Received(id.to_owned()),
        None => RequestId::Generated(uuid::Uuid::new_v4().to_string()),
    }
}

fn named<'a>(headers: &'a Headers, names: &[&str]) -> Option<&'a str> {
    headers
        .first_present(names)
        .filter(|v| !v.is_empty() && v.len() <= MAX_NAME_BYTES)
}

/// Parses the body and applies the model rewrite header.
fn read_request(
    parsers: &ParserSet,
    headers: Headers,
    body: Body,
    knowledge: BodyKnowledge,
    fairness_id: String,
) -> Result<(InferenceRequest, RequestId), RequestError> {
    let path = request_path(&headers).to_owned();
    let payload = match knowledge {
        BodyKnowledge::Complete => parsers.resolve(&path)?.parse(&path, &body)?,
        // What cannot be read in full is routed by load alone.
        BodyKnowledge::MaybeCut => parsers
            .resolve(&path)?
            .parse(&path, &body)
            .unwrap_or_else(|_| Payload::raw(false)),
        BodyKnowledge::Unseen | BodyKnowledge::Absent => Payload::raw(false),
    };
    let id = request_id(&headers);
    let mut request = InferenceRequest::new(id.as_str(), payload, body);
    if let Some(target) = named(&headers, &MODEL_REWRITE) {
        target.clone_into(&mut request.target_model);
    }
    if request.payload.rewritable && request.target_model.is_empty() {
        return Err(RequestError::NoModel);
    }
    if let Some(objective) = named(&headers, &OBJECTIVE) {
        objective.clone_into(&mut request.objective);
    }
    request.path = path;
    request.fairness_id = fairness_id;
    request.headers = headers;
    Ok((request, id))
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
