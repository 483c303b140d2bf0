//! OTLP over gRPC: the messages, and a connection to a collector that is made when it is needed.
//!
//! The messages are our own prost types (`proto/otlp_trace.proto`) and the client is what tonic generates
//! for them, over hyper as everywhere here. The OpenTelemetry SDK is not used: it records while code runs
//! under its context, while a decision here is written down once it is made; it does not tell how many
//! spans its queue dropped; and its exporter needs tonic's transport, which nothing else does.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response, Uri};
use hyper::body::Incoming;
use hyper::client::conn::http2::{self, SendRequest};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::ClientConfig;
use tokio_rustls::rustls::pki_types::ServerName;
use tokio_util::task::AbortOnDropHandle;
use tonic::body::Body;
use tonic::{Code, Status};

use super::proto::trace_service_client::TraceServiceClient;
use super::proto::{
    self, AnyValue, ArrayValue, ExportTraceServiceRequest, InstrumentationScope, KeyValue,
    Resource, ResourceSpans, ScopeSpans, Span, any_value, span, status,
};
use super::settings::OtlpSettings;
use super::span::{Finished, Kind, Value};

/// Longest wait for a connection and its handshakes.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Why a collector did not take a batch.
#[derive(Debug, thiserror::Error)]
pub(super) enum OtlpError {
    /// Nobody listens, or nothing answers.
    #[error("connecting to {0}: {1}")]
    Connect(String, std::io::Error),
    /// It answered with an error.
    #[error("the collector answers {:?}: {}", .0.code(), .0.message())]
    Status(Box<Status>),
    /// Nothing came in time.
    #[error("the collector does not answer within {0:?}")]
    Timeout(Duration),
}

impl OtlpError {
    /// What the protocol calls retryable.
    pub(super) fn is_passing(&self) -> bool {
        match self {
            Self::Connect(..) | Self::Timeout(_) => true,
            Self::Status(status) => matches!(
                status.code(),
                Code::Cancelled
                    | Code::DeadlineExceeded
                    | Code::Aborted
                    | Code::OutOfRange
                    | Code::Unavailable
                    | Code::DataLoss
                    // A connection that broke.
                    | Code::Unknown
            ),
        }
    }
}

/// A collector.
#[derive(Debug)]
pub(super) struct Otlp {
    settings: OtlpSettings,
    tls: Option<Arc<ClientConfig>>,
    resource: Resource,
    /// The connection of the last batch, while it is good.
    kept: Option<Channel>,
}

impl Otlp {
    /// `tls` is given for `https`.
    pub(super) fn new(
        settings: OtlpSettings,
        tls: Option<Arc<ClientConfig>>,
        resource: &[(String, String)],
    ) -> Self {
        let attributes = resource.iter();
        let attributes = attributes.map(|(name, value)| key_value(name, value.clone().into()));
        Self {
            settings,
            tls,
            resource: Resource {
                attributes: attributes.collect(),
            },
            kept: None,
        }
    }

    /// Returns how many spans the collector refused.
    pub(super) async fn export(&mut self, batch: &[Finished]) -> Result<u64, OtlpError> {
        let limit = self.settings.timeout;
        let message = request(&self.resource, batch);
        let sent = tokio::time::timeout(limit, self.send(message)).await;
        let sent = sent.unwrap_or(Err(OtlpError::Timeout(limit)));
        if sent.is_err() {
            self.kept = None;
        }
        sent
    }

    async fn send(&mut self, message: ExportTraceServiceRequest) -> Result<u64, OtlpError> {
        let channel = match &self.kept {
            Some(channel) if !channel.sender.is_closed() => channel.clone(),
            _ => {
                let connecting = tokio::time::timeout(CONNECT_TIMEOUT, self.connect());
                let connected = connecting
                    .await
                    .unwrap_or(Err(std::io::ErrorKind::TimedOut.into()));
                let refused = |error| OtlpError::Connect(self.settings.endpoint.to_string(), error);
                self.kept.insert(connected.map_err(refused)?).clone()
            }
        };
        let mut client = TraceServiceClient::with_origin(channel, self.settings.endpoint.clone());
        let mut request = tonic::Request::new(message);
        for (name, value) in &self.settings.headers {
            request.metadata_mut().append(name.clone(), value.clone());
        }
        let answer = client
            .export(request)
            .await
            .map_err(|status| OtlpError::Status(Box::new(status)))?;
        let partial = answer.into_inner().partial_success.unwrap_or_default();
        if partial.rejected_spans > 0 {
            tracing::debug!(
                rejected = partial.rejected_spans,
                reason = partial.error_message,
                "the collector refused spans"
            );
        }
        Ok(u64::try_from(partial.rejected_spans).unwrap_or(0))
    }

    async fn connect(&self) -> std::io::Result<Channel> {
        let endpoint = &self.settings.endpoint;
        let host = endpoint.host().unwrap_or_default();
        let host = host.trim_start_matches('[').trim_end_matches(']');
        let port = endpoint.port_u16().unwrap_or(super::settings::DEFAULT_PORT);
        let stream = TcpStream::connect((host, port)).await?;
        stream.set_nodelay(true)?;
        let Some(tls) = &self.tls else {
            return Channel::over(stream).await;
        };
        let name = ServerName::try_from(host.to_owned()).map_err(std::io::Error::other)?;
        let connector = TlsConnector::from(Arc::clone(tls));
        Channel::over(connector.connect(name, stream).await?).await
    }
}

/// A connection; the last copy closes it.
#[derive(Debug, Clone)]
struct Channel {
    sender: SendRequest<Body>,
    _driver: Arc<AbortOnDropHandle<()>>,
}

impl Channel {
    async fn over<S>(stream: S) -> std::io::Result<Self>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let (sender, connection) = http2::handshake(TokioExecutor::new(), TokioIo::new(stream))
            .await
            .map_err(std::io::Error::other)?;
        let driver = tokio::spawn(async move {
            // Its error reaches the call that waits for an answer.
            let _ = connection.await;
        });
        Ok(Self {
            sender,
            _driver: Arc::new(AbortOnDropHandle::new(driver)),
        })
    }
}

impl tower_service::Service<Request<Body>> for Channel {
    type Response = Response<Incoming>;
    type Error = hyper::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.sender.poll_ready(context)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        Box::pin(self.sender.send_request(request))
    }
}

/// A batch as a message, grouped by scope.
fn request(resource: &Resource, batch: &[Finished]) -> ExportTraceServiceRequest {
    let mut scopes: Vec<ScopeSpans> = Vec::new();
    for finished in batch {
        let name = finished.site.scope;
        let known = scopes.iter_mut().find(|s| {
            let scope = s.scope.as_ref();
            scope.is_some_and(|scope| scope.name == name)
        });
        let message = span_message(finished);
        match known {
            Some(scope) => scope.spans.push(message),
            None => scopes.push(ScopeSpans {
                scope: Some(InstrumentationScope {
                    name: name.to_owned(),
                    version: super::COMMIT.to_owned(),
                }),
                spans: vec![message],
            }),
        }
    }
    ExportTraceServiceRequest {
        resource_spans: vec![ResourceSpans {
            resource: Some(resource.clone()),
            scope_spans: scopes,
        }],
    }
}

fn span_message(finished: &Finished) -> Span {
    let id = |bytes: &[u8]| Bytes::copy_from_slice(bytes);
    let attributes = finished.attributes.iter();
    Span {
        trace_id: id(&finished.trace.bytes()),
        span_id: id(&finished.id.bytes()),
        parent_span_id: finished.parent.map(|p| id(&p.bytes())).unwrap_or_default(),
        name: finished.site.name.clone().into_owned(),
        kind: match finished.site.kind {
            Kind::Internal => span::SpanKind::Internal,
            Kind::Server => span::SpanKind::Server,
        }
        .into(),
        start_time_unix_nano: finished.start_unix_nanos,
        end_time_unix_nano: finished.end_unix_nanos,
        attributes: attributes
            .map(|(name, value)| key_value(name, value.clone()))
            .collect(),
        status: finished.error.as_ref().map(|reason| proto::Status {
            message: reason.clone().into_owned(),
            code: status::StatusCode::Error.into(),
        }),
        // The trace is recorded.
        flags: 1,
    }
}

fn key_value(name: &str, value: Value) -> KeyValue {
    KeyValue {
        key: name.to_owned(),
        value: Some(any_value(value)),
    }
}

fn any_value(value: Value) -> AnyValue {
    use any_value::Value as Any;
    let list = |values: Vec<Any>| {
        let values = values
            .into_iter()
            .map(|value| AnyValue { value: Some(value) });
        Any::ArrayValue(ArrayValue {
            values: values.collect(),
        })
    };
    let value = match value {
        Value::Text(text) => Any::StringValue(text.into_owned()),
        Value::Int(number) => Any::IntValue(number),
        Value::Float(number) => Any::DoubleValue(number),
        Value::Bool(value) => Any::BoolValue(value),
        Value::Texts(texts) => list(texts.into_iter().map(Any::StringValue).collect()),
        Value::Floats(numbers) => list(numbers.into_iter().map(Any::DoubleValue).collect()),
    };
    AnyValue { value: Some(value) }
}

/// `text` as an endpoint, with `scheme` if it has none.
pub(super) fn endpoint(text: &str, scheme: &str) -> Result<Uri, String> {
    let whole = if text.contains("://") {
        text.to_owned()
    } else {
        format!("{scheme}://{text}")
    };
    let uri: Uri = whole
        .parse()
        .map_err(|error| format!("{text:?}: {error}"))?;
    let authority = uri.authority().filter(|a| !a.host().is_empty());
    let authority = authority.ok_or_else(|| format!("{text:?} names no host"))?;
    if authority.port_u16().is_none() && authority.as_str() != authority.host() {
        return Err(format!("{text:?} has no usable port"));
    }
    match uri.scheme_str() {
        Some(scheme @ ("http" | "https")) => Uri::builder()
            .scheme(scheme)
            .authority(authority.clone())
            .path_and_query("/")
            .build()
            .map_err(|error| format!("{text:?}: {error}")),
        _ => Err(format!("{text:?} is neither http nor https")),
    }
}

#[cfg(test)]
mod tests {
    use std::borrow::Cow;

    use prost::Message;

    use super::super::context::SpanContext;
    use super::super::span::Site;
    use super::*;

    /// Made by the Python package opentelemetry-proto 1.45.2 from a request with these values.
    const REFERENCE: &str = "0ae5010a150a130a0c736572766963652e6e616d6512030a017312cb010a100a0574657374731207\
        756e6b6e6f776e12b6010a104bf92f3577b34da6a3ce929d0e0e4736120800f067aa0ba902b72208b9c7c989f97918e1\
        2a0e7069636b5f656e64706f696e747330023901002a36fe9c97174102002a36fe9c97174a080a017412030a01784a10\
        0a0169120b18f9ffffffffffffffff014a0e0a0166120921000000000000f43f4a070a0162120210014a120a02747312\
        0c2a0a0a030a01610a030a01624a130a026673120d2a0b0a0921000000000000e03f7a0612026e6f1802850101000000";

    #[test]
    fn a_batch_is_encoded_as_the_reference_encodes_it() {
        let context = |text: &str| SpanContext::parse(text).unwrap();
        let own = context("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01");
        let parent = context("00-4bf92f3577b34da6a3ce929d0e0e4736-b9c7c989f97918e1-01");
        let finished = Finished {
            trace: own.trace,
            id: own.span,
            parent: Some(parent.span),
            site: Site::server("tests", "pick_endpoints"),
            start_unix_nanos: 1_700_000_000_000_000_001,
            end_unix_nanos: 1_700_000_000_000_000_002,
            attributes: vec![
                ("t", "x".into()),
                ("i", (-7i64).into()),
                ("f", 1.25.into()),
                ("b", true.into()),
                ("ts", Value::Texts(vec!["a".to_owned(), "b".to_owned()])),
                ("fs", Value::Floats(vec![0.5])),
            ],
            error: Some(Cow::Borrowed("no")),
        };
        let resource = Resource {
            attributes: vec![key_value("service.name", "s".into())],
        };
        let mut message = request(&resource, &[finished]);
        for of_resource in &mut message.resource_spans {
            for of_scope in &mut of_resource.scope_spans {
                // That of the build.
                of_scope.scope.as_mut().unwrap().version = "unknown".to_owned();
            }
        }
        let hex = message
            .encode_to_vec()
            .iter()
            .fold(String::new(), |mut text, byte| {
                use std::fmt::Write;
                write!(text, "{byte:02x}").unwrap();
                text
            });
        assert_eq!(hex, REFERENCE);
    }

    #[test]
    fn what_the_protocol_calls_retryable_is_tried_again() {
        // The list of the OTLP specification; RESOURCE_EXHAUSTED only with a delay that nobody gives.
        for (code, again) in [
            (Code::Cancelled, true),
            (Code::DeadlineExceeded, true),
            (Code::Aborted, true),
            (Code::OutOfRange, true),
            (Code::Unavailable, true),
            (Code::DataLoss, true),
            (Code::ResourceExhausted, false),
            (Code::InvalidArgument, false),
            (Code::Unauthenticated, false),
            (Code::Unimplemented, false),
            (Code::Internal, false),
        ] {
            let error = OtlpError::Status(Box::new(Status::new(code, "x")));
            assert_eq!(error.is_passing(), again, "{code:?}");
        }
    }
}
