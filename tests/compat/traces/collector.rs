//! A collector that keeps what it is sent, and processes that send to it.

use std::collections::BTreeMap;
use std::future::Future;
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use parking_lot::Mutex;
use pinpod::epp::tls::{self, TlsOptions};
use pinpod::extproc::server::{Server, ServerConfigs};
use pinpod::telemetry::trace::proto::any_value::Value as Any;
use pinpod::telemetry::trace::proto::span::SpanKind;
use pinpod::telemetry::trace::proto::status::StatusCode;
use pinpod::telemetry::trace::proto::trace_service_server::{TraceService, TraceServiceServer};
use pinpod::telemetry::trace::proto::{
    AnyValue, ExportTracePartialSuccess, ExportTraceServiceRequest, ExportTraceServiceResponse,
    KeyValue,
};
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio::time::Instant;

/// Longest wait for anything.
const PATIENCE: Duration = Duration::from_secs(30);

/// A span as it arrived.
#[derive(Debug, Clone)]
pub(super) struct Received {
    pub(super) resource: BTreeMap<String, Value>,
    pub(super) scope: String,
    pub(super) name: String,
    pub(super) trace: String,
    pub(super) id: String,
    /// Empty at a root.
    pub(super) parent: String,
    pub(super) server: bool,
    pub(super) start: u64,
    pub(super) end: u64,
    pub(super) attributes: BTreeMap<String, Value>,
    pub(super) error: Option<String>,
}

impl Received {
    pub(super) fn text(&self, name: &str) -> &str {
        let value = self.attributes.get(name).and_then(Value::as_str);
        value.unwrap_or_else(|| panic!("no text {name} in {self:#?}"))
    }

    pub(super) fn keys(&self) -> Vec<&str> {
        self.attributes.keys().map(String::as_str).collect()
    }
}

type Metadata = BTreeMap<String, String>;

/// How a collector misbehaves.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Moods {
    /// Calls that it is too busy for, before it takes any.
    pub(super) unavailable: usize,
    /// Spans that it says it refused of each call.
    pub(super) rejects: i64,
}

#[derive(Clone, Default)]
struct Taken {
    spans: Arc<Mutex<Vec<Received>>>,
    metadata: Arc<Mutex<Metadata>>,
    moods: Arc<Mutex<Moods>>,
}

#[tonic::async_trait]
impl TraceService for Taken {
    async fn export(
        &self,
        request: tonic::Request<ExportTraceServiceRequest>,
    ) -> Result<tonic::Response<ExportTraceServiceResponse>, tonic::Status> {
        for entry in request.metadata().iter() {
            if let tonic::metadata::KeyAndValueRef::Ascii(name, value) = entry {
                let value = value.to_str().unwrap().to_owned();
                self.metadata.lock().insert(name.to_string(), value);
            }
        }
        let rejects = {
            let mut moods = self.moods.lock();
            if let Some(left) = moods.unavailable.checked_sub(1) {
                moods.unavailable = left;
                return Err(tonic::Status::unavailable("busy"));
            }
            moods.rejects
        };
        let mut spans = self.spans.lock();
        for of_resource in request.into_inner().resource_spans {
            let resource = attributes(of_resource.resource.unwrap().attributes);
            for of_scope in of_resource.scope_spans {
                let scope = of_scope.scope.unwrap().name;
                for span in of_scope.spans {
                    let status = span.status.clone().unwrap_or_default();
                    spans.push(Received {
                        resource: resource.clone(),
                        scope: scope.clone(),
                        name: span.name.clone(),
                        trace: hex(&span.trace_id),
                        id: hex(&span.span_id),
                        parent: hex(&span.parent_span_id),
                        server: span.kind() == SpanKind::Server,
                        start: span.start_time_unix_nano,
                        end: span.end_time_unix_nano,
                        attributes: attributes(span.attributes),
                        error: (status.code() == StatusCode::Error).then_some(status.message),
                    });
                }
            }
        }
        Ok(tonic::Response::new(ExportTraceServiceResponse {
            partial_success: (rejects > 0).then(|| ExportTracePartialSuccess {
                rejected_spans: rejects,
                error_message: "no".to_owned(),
            }),
        }))
    }
}

fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::new(), |mut text, byte| {
        write!(text, "{byte:02x}").unwrap();
        text
    })
}

fn attributes(pairs: Vec<KeyValue>) -> BTreeMap<String, Value> {
    let count = pairs.len();
    let all: BTreeMap<_, _> = pairs
        .into_iter()
        .map(|pair| (pair.key, value(pair.value.unwrap())))
        .collect();
    assert_eq!(all.len(), count, "each name once");
    all
}

fn value(value: AnyValue) -> Value {
    match value.value.unwrap() {
        Any::StringValue(text) => text.into(),
        Any::BoolValue(value) => value.into(),
        Any::IntValue(number) => number.into(),
        Any::DoubleValue(number) => json!({"float": number}),
        Any::ArrayValue(list) => list.values.into_iter().map(self::value).collect(),
    }
}

pub(super) struct Collector {
    server: Server,
    taken: Taken,
}

impl Collector {
    pub(super) fn start() -> Self {
        Self::serve(None)
    }

    pub(super) fn with(moods: Moods) -> Self {
        let collector = Self::start();
        *collector.taken.moods.lock() = moods;
        collector
    }

    /// With the certificate of this directory.
    pub(super) fn over_tls(directory: &Path) -> Self {
        let options = TlsOptions {
            cert_path: Some(directory.to_owned()),
            ..TlsOptions::default()
        };
        Self::serve(Some(tls::load(&options).unwrap()))
    }

    fn serve(tls: Option<tokio_rustls::rustls::ServerConfig>) -> Self {
        let taken = Taken::default();
        let configs = ServerConfigs {
            address: ([127, 0, 0, 1], 0).into(),
            workers: 1,
            tls: tls.map(|config| Arc::new(ArcSwap::from_pointee(config))),
        };
        let service = TraceServiceServer::new(taken.clone());
        Self {
            server: Server::start(&configs, &service).unwrap(),
            taken,
        }
    }

    pub(super) fn endpoint(&self) -> String {
        format!("http://{}", self.address())
    }

    pub(super) fn address(&self) -> SocketAddr {
        self.server.address()
    }

    /// What came so far.
    pub(super) fn spans(&self) -> Vec<Received> {
        self.taken.spans.lock().clone()
    }

    /// gRPC metadata of the exports.
    pub(super) fn metadata(&self) -> Metadata {
        self.taken.metadata.lock().clone()
    }

    /// The spans of `trace`, once `last` and at least so many are there.
    pub(super) async fn trace(&self, trace: &str, last: &str, count: usize) -> Vec<Received> {
        let of_trace = || -> Vec<_> {
            let mut spans = self.spans();
            spans.retain(|span| span.trace == trace);
            spans
        };
        until(&format!("{last} comes"), || async {
            let spans = of_trace();
            spans.len() >= count && spans.iter().any(|span| span.name == last)
        })
        .await;
        of_trace()
    }
}

pub(super) async fn until<F: Future<Output = bool>>(what: &str, condition: impl Fn() -> F) {
    let deadline = Instant::now() + PATIENCE;
    while !condition().await {
        assert!(Instant::now() < deadline, "timed out waiting until {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// A process of ours; killed when dropped.
pub(super) struct Running {
    child: Child,
    log: std::path::PathBuf,
    directory: tempfile::TempDir,
}

impl Running {
    /// Starts `pinpod` with nothing in its environment but `environment`, and waits for its ports.
    pub(super) async fn start(
        arguments: &[String],
        environment: &[(&str, &str)],
        ports: &[u16],
    ) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let log = directory.path().join("log");
        let file = std::fs::File::create(&log).unwrap();
        let child = Command::new(Path::new(env!("CARGO_BIN_EXE_pinpod")))
            .args(arguments)
            .env_clear()
            .envs(environment.iter().copied())
            .stdin(Stdio::null())
            .stdout(file.try_clone().unwrap())
            .stderr(file)
            .spawn()
            .unwrap();
        let mut running = Self {
            child,
            log,
            directory,
        };
        let deadline = Instant::now() + PATIENCE;
        for port in ports {
            while TcpStream::connect(("127.0.0.1", *port)).await.is_err() {
                let ended = running.child.try_wait().unwrap();
                assert!(ended.is_none(), "{ended:?}: {}", running.log());
                assert!(Instant::now() < deadline, "{}", running.log());
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
        // It listens itself, not another process on a port that was free a moment ago.
        while !running.log().contains("\"msg\":\"serving\"") {
            let ended = running.child.try_wait().unwrap();
            assert!(ended.is_none(), "{ended:?}: {}", running.log());
            assert!(Instant::now() < deadline, "{}", running.log());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        running
    }

    /// What it wrote to stdout and stderr.
    pub(super) fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap()
    }

    /// Asks it to end, and waits.
    pub(super) async fn terminate(mut self) -> String {
        let pid = self.child.id().to_string();
        Command::new("kill").args(["-TERM", &pid]).status().unwrap();
        let deadline = Instant::now() + PATIENCE;
        while self.child.try_wait().unwrap().is_none() {
            assert!(Instant::now() < deadline, "{}", self.log());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        assert!(self.directory.path().exists());
        self.log()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
