//! One inference request while it is served: calls made for it, and what their failures mean.

use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{
    HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode, Uri, header,
};
use tokio::time::Instant;
use tokio_util::task::AbortOnDropHandle;

use super::answer::{self, Answer, strip_hop_by_hop};
use super::body::{AnswerBody, EngineBody};
use super::engines::{CallError, LegBody};
use super::host_port::HostPort;
use super::json::Field;
use super::metrics::{Path, Stage};
use super::prompt::Prompt;
use super::proxy::Sidecar;
use super::routing::DATA_PARALLEL_RANK;
use super::settings::PrefillFallback;
use super::spans::{
    CONCURRENT_DECODE, CONCURRENT_PREFILL, DECODE, ENCODE, LegSpan, PREFILL, RequestSpan,
};
use crate::telemetry::trace::{Site, Span};

/// `x-request-id`
pub(super) const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// How a request's prefill is handed on.
pub(super) const CONNECTOR: &str = "llm_d.pd_proxy.kv_connector";
/// What a prefill engine answered.
const PREFILL_STATUS: &str = "llm_d.pd_proxy.prefill.status_code";

/// An answer that ends the request early.
pub(super) type Refusal = Box<Answer>;

/// Why a prefill or encode call has no usable answer.
#[derive(Debug)]
pub(super) enum LegFailure {
    /// No answer.
    Call(CallError),
    /// An answer that is not a success.
    Status(Box<Response<Bytes>>),
    /// A success that makes no sense.
    Garbage(&'static str),
}

impl From<CallError> for LegFailure {
    fn from(error: CallError) -> Self {
        Self::Call(error)
    }
}

impl std::fmt::Display for LegFailure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Call(error) => error.fmt(f),
            Self::Status(response) => write!(f, "status {}", response.status().as_u16()),
            Self::Garbage(what) => f.write_str(what),
        }
    }
}

impl LegFailure {
    /// Another endpoint would say the same: the request itself is refused.
    pub(super) fn is_final(&self) -> bool {
        let Self::Status(response) = self else {
            return false;
        };
        let status = response.status();
        status.is_client_error()
            && status != StatusCode::TOO_MANY_REQUESTS
            && status != StatusCode::REQUEST_TIMEOUT
    }

    /// The same endpoint may do better in a moment.
    fn is_passing(&self) -> bool {
        match self {
            Self::Call(CallError::Connect(_)) => true,
            Self::Call(_) | Self::Garbage(_) => false,
            Self::Status(response) => matches!(response.status().as_u16(), 502..=504),
        }
    }

    /// What the client is told when nothing else can be tried.
    pub(super) fn into_answer(self) -> Answer {
        match self {
            Self::Status(response) => {
                let (mut head, body) = response.into_parts();
                strip_hop_by_hop(&mut head.headers);
                head.headers.remove(header::CONTENT_LENGTH);
                Response::from_parts(head, AnswerBody::whole(body))
            }
            Self::Call(CallError::Timeout(_)) => answer::error(
                StatusCode::GATEWAY_TIMEOUT,
                "GatewayTimeout",
                "The prefill node did not answer in time.",
            ),
            Self::Call(_) | Self::Garbage(_) => answer::bad_gateway("The prefill node failed."),
        }
    }
}

/// A request being served.
#[derive(Debug)]
pub(super) struct Exchange {
    pub(super) sidecar: Arc<Sidecar>,
    pub(super) prompt: Prompt,
    /// Path and query of the client.
    pub(super) uri: Uri,
    /// Without routing, hop-by-hop and length headers.
    pub(super) headers: HeaderMap,
    /// The client's, or one of ours.
    pub(super) request_id: HeaderValue,
    /// The engine that decodes.
    pub(super) decode: HostPort,
    /// Prefill endpoints, best first.
    pub(super) candidates: Vec<HostPort>,
    /// Where the prefix may be fetched from.
    pub(super) kv_source: Option<HostPort>,
    /// Of the listener.
    pub(super) rank: u16,
    pub(super) began: Instant,
    /// Of the whole request.
    pub(super) span: RequestSpan,
    /// What decode calls are a part of, when it is not the request itself.
    pub(super) decoding: Span,
}

impl Exchange {
    /// A call with the client's headers.
    fn request(
        &self,
        stage: Stage,
        target: &HostPort,
        uri: &Uri,
        body: Vec<Bytes>,
        (extra, leg): (&[(HeaderName, HeaderValue)], &LegSpan),
    ) -> Request<EngineBody> {
        let mut request = Request::new(EngineBody::pieces(body));
        *request.method_mut() = Method::POST;
        *request.uri_mut() = uri.clone();
        let headers = request.headers_mut();
        headers.clone_from(&self.headers);
        headers.insert(REQUEST_ID, self.request_id.clone());
        if stage != Stage::Decode {
            // Ranks are numbered by each engine for itself.
            headers.remove(DATA_PARALLEL_RANK);
            // Read here, so it must come as plain text.
            headers.remove(header::ACCEPT_ENCODING);
        }
        for (name, value) in extra {
            headers.insert(name, value.clone());
        }
        leg.inject(headers);
        set_host(headers, target);
        request
    }

    /// Asks a prefill endpoint, again while it is only briefly unable to answer.
    pub(super) async fn prefill(
        &self,
        target: &HostPort,
        body: &[Bytes],
        extra: &[(HeaderName, HeaderValue)],
    ) -> Result<Bytes, LegFailure> {
        let settings = &self.sidecar.settings;
        let mut retries = settings.prefill_max_retries;
        loop {
            let began = Instant::now();
            let answered = self.prefill_once(target, body, extra).await;
            tracing::debug!(
                prefill_target = %target,
                duration_ms = began.elapsed().as_secs_f64() * 1e3,
                ok = answered.is_ok(),
                "prefill"
            );
            match answered {
                Err(failure) if retries > 0 && failure.is_passing() => {
                    retries -= 1;
                    tokio::time::sleep(settings.prefill_retry_backoff).await;
                }
                other => return other,
            }
        }
    }

    async fn prefill_once(
        &self,
        target: &HostPort,
        body: &[Bytes],
        extra: &[(HeaderName, HeaderValue)],
    ) -> Result<Bytes, LegFailure> {
        let leg = self.prefill_span(PREFILL, target);
        let extra = (extra, &leg);
        let request = self.request(Stage::Prefill, target, &self.uri, body.to_vec(), extra);
        let limit = self.sidecar.settings.prefill_timeout;
        let answered = self.whole(Stage::Prefill, target, request, limit).await;
        answered_by(leg, Some(PREFILL_STATUS), &answered);
        if answered.is_ok() {
            self.span.prefilled();
        }
        answered
    }

    fn prefill_span(&self, site: Site, target: &HostPort) -> LegSpan {
        let mut leg = LegSpan::prefill(self.span.child(site));
        leg.record(|| {
            [
                ("llm_d.pd_proxy.prefill_target", target.to_string().into()),
                (CONNECTOR, self.sidecar.settings.kv_connector.name().into()),
            ]
        });
        leg
    }

    /// Sends one media item to an encode endpoint.
    pub(super) async fn encode(
        &self,
        target: &HostPort,
        body: Vec<Bytes>,
        id: HeaderValue,
    ) -> Result<Bytes, LegFailure> {
        let uri = Uri::from_static("/v1/chat/completions");
        let leg = LegSpan::new(self.span.child(ENCODE));
        let extra = (&[(REQUEST_ID, id)][..], &leg);
        let request = self.request(Stage::Encode, target, &uri, body, extra);
        let limit = self.sidecar.settings.encode_timeout;
        let answered = self.whole(Stage::Encode, target, request, limit).await;
        answered_by(leg, None, &answered);
        answered
    }

    /// The whole answer, if it is a success.
    async fn whole(
        &self,
        stage: Stage,
        target: &HostPort,
        request: Request<EngineBody>,
        limit: Option<Duration>,
    ) -> Result<Bytes, LegFailure> {
        let reading = async {
            let response = self
                .sidecar
                .engines
                .call(stage, target, request, None)
                .await?;
            let (head, body) = response.into_parts();
            let body = body.whole().await?;
            if head.status.is_success() {
                return Ok(body);
            }
            self.sidecar.metrics().failed(stage);
            Err(LegFailure::Status(Box::new(Response::from_parts(
                head, body,
            ))))
        };
        let Some(limit) = limit else {
            return reading.await;
        };
        if let Ok(answered) = tokio::time::timeout(limit, reading).await {
            answered
        } else {
            self.sidecar.engines.metrics().failed(stage);
            Err(CallError::Timeout(limit).into())
        }
    }

    /// Begins a call to a prefill endpoint whose answer is read while the decode goes on.
    async fn begin_prefill(
        &self,
        limit: Option<Duration>,
        target: &HostPort,
        body: &[Bytes],
        extra: &[(HeaderName, HeaderValue)],
    ) -> Result<Response<LegBody>, LegFailure> {
        let mut leg = self.prefill_span(CONCURRENT_PREFILL, target);
        let extra = (extra, &leg);
        let request = self.request(Stage::Prefill, target, &self.uri, body.to_vec(), extra);
        let engines = &self.sidecar.engines;
        let called = engines.call(Stage::Prefill, target, request, limit).await;
        let response = match called {
            Ok(response) => response,
            Err(error) => {
                leg.fail(|| error.to_string());
                return Err(error.into());
            }
        };
        leg.answered(Some(PREFILL_STATUS), response.status());
        let response = response.map(|body| body.with_span(leg));
        if response.status().is_success() {
            return Ok(response);
        }
        let (head, body) = response.into_parts();
        let whole = Response::from_parts(head, body.whole().await?);
        engines.metrics().failed(Stage::Prefill);
        Err(LegFailure::Status(Box::new(whole)))
    }

    /// Asks the engine beside us.
    pub(super) async fn decode(
        &self,
        body: Vec<Bytes>,
        extra: &[(HeaderName, HeaderValue)],
    ) -> Result<Response<LegBody>, Refusal> {
        self.decode_as(DECODE, body, extra).await
    }

    async fn decode_as(
        &self,
        site: Site,
        body: Vec<Bytes>,
        extra: &[(HeaderName, HeaderValue)],
    ) -> Result<Response<LegBody>, Refusal> {
        let mut leg = self.decode_span(site);
        let extra = (extra, &leg);
        let request = self.request(Stage::Decode, &self.decode, &self.uri, body, extra);
        tracing::debug!(
            true_ttft_ms = self.began.elapsed().as_secs_f64() * 1e3,
            decode_target = %self.decode,
            "decode begins"
        );
        let limit = self.sidecar.settings.decode_timeout;
        let engines = &self.sidecar.engines;
        let called = engines
            .call(Stage::Decode, &self.decode, request, limit)
            .await;
        let mut response = match called {
            Ok(response) => response,
            Err(error) => {
                tracing::warn!(decode_target = %self.decode, %error, "the decode engine failed");
                leg.fail(|| error.to_string());
                return Err(Box::new(answer::decode_failed(&error)));
            }
        };
        leg.answered(None, response.status());
        strip_hop_by_hop(response.headers_mut());
        Ok(response.map(|body| body.with_span(leg)))
    }

    /// A decode call begins.
    fn decode_span(&self, site: Site) -> LegSpan {
        self.span.decoding();
        let span = if self.decoding.is_recording() {
            self.decoding.child(site)
        } else {
            self.span.child(site)
        };
        let mut leg = LegSpan::decode(span);
        leg.record(|| {
            let own = self.sidecar.local_engine(self.rank);
            [
                (
                    "llm_d.pd_proxy.decode.target",
                    self.decode.to_string().into(),
                ),
                (
                    "llm_d.pd_proxy.decode.streaming",
                    self.prompt.is_true(Field::Stream).into(),
                ),
                (
                    "llm_d.pd_proxy.decode.data_parallel",
                    (own.as_ref() != Some(&self.decode)).into(),
                ),
            ]
        });
        leg
    }

    /// Calls both engines at once. The decode's answer counts once the prefill is known to go well:
    /// whichever fails first ends the other.
    pub(super) async fn both(
        &self,
        target: &HostPort,
        prefill: (&[Bytes], &[(HeaderName, HeaderValue)]),
        decode: (Vec<Bytes>, &[(HeaderName, HeaderValue)]),
    ) -> Result<Result<Answer, LegFailure>, Refusal> {
        let limit = self.sidecar.settings.prefill_timeout;
        self.both_within(limit, target, prefill, decode).await
    }

    /// The same with a limit to the time of the prefill.
    pub(super) async fn both_within(
        &self,
        limit: Option<Duration>,
        target: &HostPort,
        prefill: (&[Bytes], &[(HeaderName, HeaderValue)]),
        decode: (Vec<Bytes>, &[(HeaderName, HeaderValue)]),
    ) -> Result<Result<Answer, LegFailure>, Refusal> {
        self.span
            .record(|| [("llm_d.pd_proxy.concurrent_pd", true.into())]);
        let mut prefilling = pin!(self.begin_prefill(limit, target, prefill.0, prefill.1));
        let mut decoding = pin!(self.decode_as(CONCURRENT_DECODE, decode.0, decode.1));
        let mut decoded = None;
        let prefilled = loop {
            tokio::select! {
                prefilled = &mut prefilling => match prefilled {
                    Ok(response) => break response,
                    Err(failure) => return Ok(Err(failure)),
                },
                answered = &mut decoding, if decoded.is_none() => {
                    let response = answered?;
                    if !response.status().is_success() {
                        return Ok(Ok(response.map(AnswerBody::leg)));
                    }
                    decoded = Some(response);
                }
            }
        };
        let mut rest = AbortOnDropHandle::new(tokio::spawn(async move {
            let read = prefilled.into_body().whole().await;
            read.map(drop).map_err(io::Error::other)
        }));
        let response = loop {
            if let Some(response) = decoded {
                break response;
            }
            tokio::select! {
                answered = &mut decoding => decoded = Some(answered?),
                read = &mut rest => match read {
                    Ok(Ok(())) => {
                        let response = decoding.await?;
                        return Ok(Ok(response.map(AnswerBody::leg)));
                    }
                    _ => return Ok(Err(LegFailure::Garbage("the prefill answer broke off"))),
                },
            }
        };
        Ok(Ok(response.map(|leg| AnswerBody::paired(leg, rest))))
    }

    /// Whether the local engine may read a prompt that a prefill endpoint could not hand over.
    pub(super) fn may_prefill_here(&self) -> bool {
        self.sidecar.settings.prefill_fallback == PrefillFallback::Local
    }

    /// Lets the engine beside us do all of it.
    pub(super) async fn decode_alone(&self, path: Path) -> Result<Answer, Refusal> {
        let response = self.decode(self.prompt.with(&[]), &[]).await?;
        self.sidecar.metrics().served(path);
        Ok(response.map(AnswerBody::leg))
    }

    /// The prefill endpoints to try.
    pub(super) fn attempts(&self) -> Attempts<'_> {
        Attempts {
            exchange: self,
            next: 0,
            last: None,
        }
    }
}

/// Ends the span of a call whose answer was read whole.
fn answered_by(mut leg: LegSpan, name: Option<&'static str>, answered: &Result<Bytes, LegFailure>) {
    match answered {
        Ok(_) => leg.answered(name, StatusCode::OK),
        Err(LegFailure::Status(response)) => leg.answered(name, response.status()),
        Err(failure) => return leg.fail(|| failure.to_string()),
    }
    leg.end();
}

/// Names the engine in `host`.
pub(super) fn set_host(headers: &mut HeaderMap, target: &HostPort) {
    if let Ok(host) = HeaderValue::from_str(&target.to_string()) {
        headers.insert(header::HOST, host);
    }
}

/// Prefill endpoints in order, and what became of those tried.
#[derive(Debug)]
pub(super) struct Attempts<'a> {
    exchange: &'a Exchange,
    next: usize,
    last: Option<LegFailure>,
}

impl<'a> Attempts<'a> {
    pub(super) fn next(&mut self) -> Option<&'a HostPort> {
        let target = self.exchange.candidates.get(self.next);
        self.next += 1;
        target
    }

    /// Notes a failure; an error when trying others is no use.
    pub(super) fn failed(&mut self, target: &HostPort, failure: LegFailure) -> Result<(), Refusal> {
        tracing::warn!(prefill_target = %target, %failure, "prefill failed");
        if matches!(failure, LegFailure::Garbage(_)) {
            // All other failures are counted where they happen.
            self.exchange.sidecar.metrics().failed(Stage::Prefill);
        }
        if failure.is_final() {
            return Err(Box::new(failure.into_answer()));
        }
        self.last = Some(failure);
        Ok(())
    }

    /// After the last one: an error unless the local engine may do it all.
    pub(super) fn or_local(self) -> Result<(), Refusal> {
        match (self.exchange.sidecar.settings.prefill_fallback, self.last) {
            (PrefillFallback::Error, Some(failure)) => Err(Box::new(failure.into_answer())),
            _ => Ok(()),
        }
    }

    /// After the last one, where the local engine cannot do without.
    pub(super) fn or_error(self) -> Refusal {
        let failure = self
            .last
            .unwrap_or(LegFailure::Garbage("no prefill endpoint"));
        Box::new(failure.into_answer())
    }
}
