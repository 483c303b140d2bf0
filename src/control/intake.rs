//! What a request says before it is scheduled: id, headers for the picker, parsed body.

use bytes::Bytes;
use tokio::time::Instant;

use std::cell::RefCell;

use super::RequestError;
use super::candidates::Subset;
use super::rules::TrafficRules;
use crate::request::parsers::{ParserSet, request_path};
use crate::request::{Body, Early, Headers, InferenceRequest, Payload};
use crate::scheduling::stages::{ENCODE_HEADER, PREFILL_HEADER, RANK_HEADER, SOURCE_HEADER};
use crate::telemetry::trace::Span;

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
pub(super) const DEFAULT_FLOW: &str = "default-flow";
/// Longest value of a header that becomes a label or a model name; longer ones count as absent.
const MAX_NAME_BYTES: usize = 1024;

/// Headers by which the picker steers a sidecar: what a client sends of them must not reach one. Removed
/// from every request unless set for it, also when the picker saw none: a gateway may forward only some
/// headers to it.
const STEERING_HEADERS: [&str; 4] = [PREFILL_HEADER, ENCODE_HEADER, RANK_HEADER, SOURCE_HEADER];

/// Headers that belong to the gateway; removed when a client sends them.
const GATEWAY_HEADERS: [&str; 3] = [
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
    /// What was read of the body while it arrived.
    pub early: Option<Early>,
    /// The proxy's subset hint.
    pub subset: Subset,
    /// When the first message arrived.
    pub received_at: Instant,
    /// The decision, where the request is recorded.
    pub trace: Span,
}

/// Where a request's id came from.
#[derive(Debug)]
pub(super) enum RequestId {
    Received(String),
    Generated(String),
}

impl RequestId {
    pub(super) fn as_str(&self) -> &str {
        match self {
            Self::Received(id) | Self::Generated(id) => id,
        }
    }

    /// The header is set only when the client sent none.
    pub(super) fn header(&self) -> Option<(&'static str, Bytes)> {
        match self {
            Self::Received(_) => None,
            Self::Generated(id) => Some(("x-request-id", Bytes::copy_from_slice(id.as_bytes()))),
        }
    }
}

/// The client's own id of the request.
pub fn received_id(headers: &Headers) -> Option<&str> {
    headers.get_str("x-request-id").filter(|id| !id.is_empty())
}

pub(super) fn request_id(headers: &Headers) -> RequestId {
    match received_id(headers) {
        Some(id) => RequestId::Received(id.to_owned()),
        None => RequestId::Generated(uuid::Uuid::new_v4().to_string()),
    }
}

fn named<'a>(headers: &'a Headers, names: &[&str]) -> Option<&'a str> {
    headers
        .first_present(names)
        .filter(|v| !v.is_empty() && v.len() <= MAX_NAME_BYTES)
}

/// A request as its client means it, and what operators make of it.
#[derive(Debug)]
pub(super) struct Read {
    pub(super) request: InferenceRequest,
    /// The rewrite that chose the model, and whether it names the incoming one.
    pub(super) rewritten_by: Option<(String, bool)>,
}

/// Parses the body, finds the model to ask for and the priority. A rewrite for the incoming model
/// comes before the rewrite header.
pub(super) fn read_request(
    parsers: &ParserSet,
    id: &RequestId,
    (headers, body, early): (Headers, Body, Option<Early>),
    knowledge: BodyKnowledge,
    (rules, rng): (&TrafficRules, &RefCell<fastrand::Rng>),
) -> Result<Read, RequestError> {
    let path = request_path(&headers).to_owned();
    let mut first_blocks = None;
    let payload = match knowledge {
        BodyKnowledge::Complete => match early {
            Some(early) => {
                let (payload, blocks) = early.finish(&body)?;
                first_blocks = blocks;
                payload
            }
            None => parsers.resolve(&path)?.parse(&path, &body)?,
        },
        // What cannot be read in full is routed by load alone.
        BodyKnowledge::MaybeCut => parsers
            .resolve(&path)?
            .parse(&path, &body)
            .unwrap_or_else(|_| Payload::raw(false)),
        BodyKnowledge::Unseen | BodyKnowledge::Absent => Payload::raw(false),
    };
    let mut request = InferenceRequest::new(id.as_str(), payload, body);
    request.first_blocks = first_blocks;
    if let Some(target) = named(&headers, &MODEL_REWRITE) {
        target.clone_into(&mut request.target_model);
    }
    let mut rewritten_by = None;
    if request.payload.rewritable {
        if let Some(rewrite) = rules.rewrite(&request.model, &mut rng.borrow_mut()) {
            rewrite.target.clone_into(&mut request.target_model);
            rewritten_by = Some((rewrite.rule.to_owned(), rewrite.exact));
        }
        if request.target_model.is_empty() {
            return Err(RequestError::NoModel);
        }
    }
    if let Some(objective) = named(&headers, &OBJECTIVE) {
        objective.clone_into(&mut request.objective);
        request.priority = rules.priority(objective);
    }
    request.path = path;
    // Empty until the plugins that read headers have run.
    request.fairness_id = named(&headers, &FAIRNESS).unwrap_or_default().to_owned();
    request.headers = headers;
    Ok(Read {
        request,
        rewritten_by,
    })
}

/// `Prefer: if-available` (RFC 7240, parameters ignored): serve only from a cached prefix.
pub(super) fn wants_cached_prefix(headers: &Headers) -> bool {
    headers
        .iter()
        .filter(|h| h.name == "prefer")
        .filter_map(|h| std::str::from_utf8(&h.value).ok())
        .flat_map(|value| value.split(','))
        .filter_map(|preference| preference.split(';').next())
        .any(|token| token.trim().eq_ignore_ascii_case("if-available"))
}

/// Names of the headers that must not go on: what steers sidecars, unless it is among `own`, what belongs
/// to the gateway and, with `control`, what speaks to the picker only.
pub(super) fn headers_to_remove(
    headers: &Headers,
    control: bool,
    own: &[(&'static str, Bytes)],
) -> Vec<String> {
    let control: &[&str] = if control { &CONTROL_HEADERS } else { &[] };
    let is_own = |name: &&str| own.iter().any(|(set, _)| set == name);
    let steering = STEERING_HEADERS.into_iter().filter(|name| !is_own(name));
    let mut remove: Vec<String> = steering.map(str::to_owned).collect();
    for header in headers.iter().filter(|h| h.name.starts_with("x-")) {
        let name = header.name.as_str();
        if GATEWAY_HEADERS.contains(&name) || control.contains(&name) {
            remove.push(name.to_owned());
        }
    }
    remove
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::rules::parse_file;
    use crate::request::openai::OpenAiParser;
    use std::sync::Arc;

    const RULES: &str = "\
kind: InferenceObjective
metadata: {name: batch}
spec: {priority: -3}
---
kind: InferenceModelRewrite
metadata: {name: canary}
spec: {rules: [{matches: [{model: {value: food}}], targets: [{modelRewrite: food-v2}]}]}
";
    const GENERIC: &str = "\
kind: InferenceModelRewrite
metadata: {name: any}
spec: {rules: [{targets: [{modelRewrite: house}]}]}
";

    fn read(
        rules: &str,
        body: &'static str,
        headers: &[(&str, &str)],
    ) -> Result<Read, RequestError> {
        let parsers = ParserSet::new([Arc::new(OpenAiParser) as Arc<dyn crate::request::Parser>]);
        let mut lines = Headers::default();
        lines.push(":path".to_owned(), Bytes::from_static(b"/v1/completions"));
        for (name, value) in headers {
            lines.push((*name).to_owned(), Bytes::copy_from_slice(value.as_bytes()));
        }
        let body: Body = [Bytes::from_static(body.as_bytes())].into_iter().collect();
        let rules = parse_file(rules).unwrap();
        let with = (&rules, &RefCell::default());
        let id = RequestId::Received("id".to_owned());
        let request = (lines, body, None);
        read_request(&parsers, &id, request, BodyKnowledge::Complete, with)
    }

    fn target(rules: &str, body: &'static str, headers: &[(&str, &str)]) -> String {
        read(rules, body, headers).unwrap().request.target_model
    }

    #[test]
    fn a_rewrite_for_the_incoming_model_comes_before_the_header() {
        let food = r#"{"model":"food","prompt":"p"}"#;
        let other = r#"{"model":"other","prompt":"p"}"#;
        let header = [("x-llm-d-model-name-rewrite", "named")];
        assert_eq!(target(RULES, food, &header), "food-v2");
        assert_eq!(target(RULES, other, &header), "named");
        assert_eq!(target(RULES, other, &[]), "other");
        let read = read(RULES, food, &header).unwrap();
        assert_eq!(read.rewritten_by, Some(("canary".to_owned(), true)));
        assert_eq!(read.request.model, "food");
    }

    #[test]
    fn a_generic_rewrite_gives_a_model_to_requests_without_one() {
        let body = r#"{"prompt":"p"}"#;
        assert_eq!(target(GENERIC, body, &[]), "house");
        assert!(matches!(read(RULES, body, &[]), Err(RequestError::NoModel)));
    }

    #[test]
    fn an_objective_gives_its_priority() {
        let body = r#"{"model":"m","prompt":"p"}"#;
        let priority = |name: &str, value: &str| {
            read(RULES, body, &[(name, value)])
                .unwrap()
                .request
                .priority
        };
        assert_eq!(priority("x-llm-d-inference-objective", "batch"), -3);
        assert_eq!(priority("x-gateway-inference-objective", "batch"), -3);
        assert_eq!(priority("x-llm-d-inference-objective", "unknown"), 0);
        assert_eq!(priority("x-other", "batch"), 0);
    }
}
