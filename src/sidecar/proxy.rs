//! One request's way, top to bottom.

use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use http::{HeaderMap, Method, Request, StatusCode, Uri, header};
use http_body::Body as _;
use http_body_util::BodyExt;
use hyper::body::Incoming;
use tokio::time::Instant;

use super::allow_list::AllowList;
use super::answer::{self, Answer, strip_hop_by_hop};
use super::api::Api;
use super::body::{AnswerBody, EngineBody};
use super::connectors;
use super::engines::{EngineSettings, Engines};
use super::exchange::{CONNECTOR, Exchange, Refusal, set_host};
use super::health;
use super::host_port::HostPort;
use super::metrics::{Path, SidecarMetrics, Stage};
use super::prompt::Prompt;
use super::routing::{PREFILL, Routing};
use super::settings::Settings;
use super::spans::{FORWARD, LegSpan, RequestSpan};
use super::trace;
use super::upgrade;
use crate::telemetry::trace::{Span, Value};

/// Everything that requests share.
#[derive(Debug)]
pub struct Sidecar {
    pub(super) settings: Settings,
    pub(super) engines: Engines,
    pub(super) connectors: connectors::State,
    allowed: Arc<AllowList>,
}

impl Sidecar {
    /// A sidecar that calls who is `allowed`.
    pub fn new(
        settings: Settings,
        engines: EngineSettings,
        allowed: Arc<AllowList>,
        metrics: SidecarMetrics,
    ) -> Self {
        Self {
            engines: Engines::new(engines, metrics),
            connectors: connectors::State::default(),
            settings,
            allowed,
        }
    }

    /// What it counts.
    pub fn metrics(&self) -> &SidecarMetrics {
        self.engines.metrics()
    }

    /// The engine of a rank; `None` when its port does not exist.
    pub(super) fn local_engine(&self, rank: u16) -> Option<HostPort> {
        let port = self.settings.model_server_port.checked_add(rank)?;
        HostPort::new(&self.settings.model_server_host, port)
    }

    /// Answers one request that came in on the listener of `rank`. Dropped, it ends every call that
    /// was made for it.
    pub async fn answer(self: &Arc<Self>, rank: u16, mut request: Request<Incoming>) -> Answer {
        let began = Instant::now();
        let Some(local) = self.local_engine(rank) else {
            return answer::bad_gateway("The decode node failed.");
        };
        let (method, path) = (request.method(), request.uri().path());
        if method == Method::GET && path == "/health" {
            return health::probe(self, &local).await;
        }
        let api = Api::of(method, path);
        let span = RequestSpan::start(&self.settings.tracer, &mut request);
        let outcome = match api {
            Some(api) => {
                let since = (began, span.clone());
                Box::pin(self.infer(api, rank, local, request, since)).await
            }
            None => self.pass_through(&local, request, &span).await,
        };
        let answer = outcome.unwrap_or_else(|refusal| {
            self.metrics().served(Path::Error);
            *refusal
        });
        span.answered(answer.status());
        answer.map(|body| body.with_span(span))
    }

    /// Anything but inference, as it comes and goes.
    async fn pass_through(
        &self,
        local: &HostPort,
        mut request: Request<Incoming>,
        span: &RequestSpan,
    ) -> Result<Answer, Refusal> {
        let mut leg = LegSpan::new(span.child(FORWARD));
        let upgrade = upgrade::Wanted::take(&mut request);
        let (mut head, body) = request.into_parts();
        // Nobody to tell apart here: the headers just have to go.
        Routing::take(&mut head.headers, &self.allowed, self.metrics());
        strip_hop_by_hop(&mut head.headers);
        set_host(&mut head.headers, local);
        leg.inject(&mut head.headers);
        let body = if body.is_end_stream() {
            EngineBody::empty()
        } else {
            EngineBody::Stream(body)
        };
        let mut out = Request::new(body);
        *out.method_mut() = head.method;
        *out.uri_mut() = origin_form(&head.uri);
        *out.headers_mut() = head.headers;
        if let Some(wanted) = &upgrade {
            wanted.ask(out.headers_mut());
        }
        let limit = self.settings.decode_timeout;
        let called = self.engines.call(Stage::Decode, local, out, limit).await;
        let response = match called {
            Ok(response) => response,
            Err(error) => {
                tracing::warn!(decode_target = %local, %error, "the decode engine failed");
                leg.fail(|| error.to_string());
                return Err(Box::new(answer::decode_failed(&error)));
            }
        };
        leg.answered(None, response.status());
        let mut response = response.map(|body| body.with_span(leg));
        let switched = response.status() == StatusCode::SWITCHING_PROTOCOLS;
        if let Some(wanted) = upgrade.filter(|_| switched) {
            return wanted.switch(self, local, response);
        }
        strip_hop_by_hop(response.headers_mut());
        self.metrics().served(Path::Plain);
        Ok(response.map(AnswerBody::leg))
    }

    /// An inference request: who is named, what is in the body, and then the connector's part.
    async fn infer(
        self: &Arc<Self>,
        api: Api,
        rank: u16,
        local: HostPort,
        request: Request<Incoming>,
        (began, span): (Instant, RequestSpan),
    ) -> Result<Answer, Refusal> {
        let (head, body) = request.into_parts();
        let mut headers = head.headers;
        let named = headers
            .get(PREFILL)
            .filter(|_| span.is_recording())
            .cloned();
        let mut routing = Routing::take(&mut headers, &self.allowed, self.metrics());
        self.describe(&span, head.uri.path(), &routing);
        let length = content_length(&headers);
        clean(&mut headers);
        if routing.prefill_denied {
            span.record(|| {
                let named = named.as_ref().and_then(|v| v.to_str().ok());
                [(
                    "llm_d.pd_proxy.denied_target",
                    named.unwrap_or_default().to_owned().into(),
                )]
            });
            self.discard(body).await;
            return Err(Box::new(answer::text(
                StatusCode::FORBIDDEN,
                "Forbidden: prefill target not allowed by SSRF protection\n",
            )));
        }
        if self.settings.prefiller_sampling && !routing.prefill.is_empty() {
            let first = fastrand::usize(..routing.prefill.len());
            routing.prefill.rotate_left(first);
        }
        let text = self.read(body, length).await?;
        let prompt = Prompt::parse(api, text)
            .map_err(|error| Box::new(answer::bad_request(&error.to_string())))?;
        let decode = self.decode_target(rank, local, &routing)?;
        let request_id = trace::request_id(&mut headers);
        trace::context(&mut headers, self.settings.tracing);
        tracing::debug!(
            request_id = ?request_id,
            trace = headers.get(trace::TRACEPARENT).and_then(|v| v.to_str().ok()),
            connector = ?self.settings.kv_connector,
            request_path = head.uri.path(),
            prefill_candidates = routing.prefill.len(),
            encoder_candidates = routing.encode.len(),
            disaggregation_used = !routing.prefill.is_empty(),
            "request"
        );
        let exchange = Exchange {
            sidecar: Arc::clone(self),
            prompt,
            uri: origin_form(&head.uri),
            headers,
            request_id,
            decode,
            candidates: routing.prefill,
            kv_source: routing.kv_source,
            rank,
            began,
            span,
            decoding: Span::default(),
        };
        Box::pin(connectors::serve(exchange, &routing.encode)).await
    }

    /// What is known of a recorded request before its body is read.
    fn describe(&self, span: &RequestSpan, path: &str, routing: &Routing) {
        if !span.is_recording() {
            return;
        }
        let connector = self.settings.kv_connector.name();
        let disaggregated = !routing.prefill.is_empty();
        span.record(|| {
            [
                ("llm_d.pd_proxy.connector", connector.into()),
                (CONNECTOR, connector.into()),
                ("llm_d.pd_proxy.request_path", path.to_owned().into()),
                ("llm_d.pd_proxy.disaggregation_used", disaggregated.into()),
                (
                    "llm_d.pd_proxy.prefill_candidates",
                    routing.prefill.len().into(),
                ),
            ]
        });
        if !disaggregated {
            let reason = if routing.prefill_denied {
                "ssrf_protection_denied"
            } else {
                "no_prefill_header"
            };
            span.record(|| [("llm_d.pd_proxy.reason", reason.into())]);
        }
        if let Some(source) = &routing.kv_source {
            span.record(|| [("llm_d.pd_proxy.kv_cache_source", source.to_string().into())]);
        }
        if let Some(connector) = self.settings.ec_connector {
            let encoders = routing.encode.iter().map(HostPort::to_string);
            span.record(|| {
                [
                    ("llm_d.pd_proxy.ec_connector", connector.name().into()),
                    (
                        "llm_d.ec_proxy.encode_disaggregation_used",
                        (!routing.encode.is_empty()).into(),
                    ),
                    ("llm_d.ec_proxy.encoder_count", routing.encode.len().into()),
                    (
                        "llm_d.ec_proxy.encoder_candidates",
                        Value::Texts(encoders.collect()),
                    ),
                ]
            });
        }
    }

    /// The local engine, or the rank that a header names; only rank 0 listens to it, and SGLang has
    /// its own way.
    fn decode_target(
        &self,
        rank: u16,
        local: HostPort,
        routing: &Routing,
    ) -> Result<HostPort, Refusal> {
        let Some(named) = &routing.data_parallel else {
            return Ok(local);
        };
        let ignored = rank != 0 || connectors::ignores_ranks(&self.settings, routing);
        if ignored {
            return Ok(local);
        }
        let of_pod = |target: &HostPort| {
            let pod = self.settings.pod_ip.as_deref();
            pod.is_none_or(|pod| target.host() == pod)
        };
        let target = named.parse::<HostPort>().ok().filter(of_pod);
        let rank = target.and_then(|target| target.port().checked_sub(self.settings.port));
        rank.filter(|rank| *rank < self.settings.data_parallel_size)
            .and_then(|rank| self.local_engine(rank))
            .ok_or_else(|| Box::new(answer::bad_request("unknown data parallel endpoint")))
    }

    /// Reads a body that nobody needs: a client that still sends when its connection is closed may not
    /// see the answer.
    async fn discard(&self, mut body: Incoming) {
        let mut left = self.settings.max_request_body_bytes;
        while let Some(Ok(frame)) = body.frame().await {
            let read = frame.data_ref().map_or(0, Bytes::len);
            let Some(rest) = left.checked_sub(read) else {
                return;
            };
            left = rest;
        }
    }

    /// The body, which must be known whole before any of it can be sent on.
    async fn read(&self, mut body: Incoming, length: Option<usize>) -> Result<Bytes, Refusal> {
        let limit = self.settings.max_request_body_bytes;
        let too_long = || {
            Box::new(answer::error(
                StatusCode::PAYLOAD_TOO_LARGE,
                "BadRequestError",
                "request body too large",
            ))
        };
        if length.is_some_and(|length| length > limit) {
            return Err(too_long());
        }
        let mut first = Bytes::new();
        let mut rest = BytesMut::new();
        while let Some(frame) = body.frame().await {
            let frame =
                frame.map_err(|_| Box::new(answer::bad_request("incomplete request body")))?;
            let Ok(piece) = frame.into_data() else {
                continue;
            };
            if first.is_empty() {
                first = piece;
                continue;
            }
            if rest.is_empty() {
                rest.reserve(length.unwrap_or(first.len() + piece.len()));
                rest.extend_from_slice(&first);
            }
            if rest.len() + piece.len() > limit {
                return Err(too_long());
            }
            rest.extend_from_slice(&piece);
        }
        if first.len() > limit {
            return Err(too_long());
        }
        Ok(if rest.is_empty() {
            first
        } else {
            rest.freeze()
        })
    }
}

fn content_length(headers: &HeaderMap) -> Option<usize> {
    headers
        .get(header::CONTENT_LENGTH)?
        .to_str()
        .ok()?
        .parse()
        .ok()
}

/// Removes what belongs to the client's connection and to the body as it came.
fn clean(headers: &mut HeaderMap) {
    strip_hop_by_hop(headers);
    headers.remove(header::CONTENT_LENGTH);
    headers.remove(header::EXPECT);
}

/// Path and query, as a server is asked.
fn origin_form(uri: &Uri) -> Uri {
    uri.path_and_query()
        .cloned()
        .map_or_else(|| Uri::from_static("/"), Uri::from)
}
