//! The decision: what a pick means for the request and its response.

use std::net::SocketAddr;
use std::sync::Arc;

use bytes::Bytes;
use smallvec::SmallVec;

use super::draft::Draft;
use super::{Director, Workspace};
use crate::control::RequestError;
use crate::control::intake::{Intake, headers_to_remove, request_id};
use crate::plugin::Leases;
use crate::request::rewrite::rewrite_model;
use crate::request::{ApiKind, Body, Payload};
use crate::response::Accounting;
use crate::response::accounting::RequestFacts;
use crate::response::usage::UsageFormat;
use crate::scheduling::scheduler::Scratch;
use crate::scheduling::{Candidate, Outcome, SchedulingResult};

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

impl Director {
    /// Requests without a body reveal nothing to schedule by: any endpoint of the subset will do.
    pub(super) fn any_endpoint(
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

    /// What the proxy and the response phase are told of a pick.
    pub(super) fn answer(
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
