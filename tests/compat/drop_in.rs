//! Swapping the image: the command lines, environments and probes of installations as they are, against
//! the real binary under the name `/app/epp`.
//!
//! Ports are the only thing changed, because several tests run at once: the flags that set them are
//! appended, and the last of repeated flags counts. Endpoints come from a list, but for the lines that
//! elect a leader: those meet an API server of a few answers.

use std::convert::Infallible;
use std::net::{Ipv6Addr, SocketAddr};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::stream;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Empty};
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use pinpod::demo::processes::free_ports;
use pinpod::doctor::grpc::{Channel, origin};
use pinpod::extproc::proto::body_mutation::Mutation;
use pinpod::extproc::proto::external_processor_client::ExternalProcessorClient;
use pinpod::extproc::proto::health::health_check_response::ServingStatus;
use pinpod::extproc::proto::processing_request::Request;
use pinpod::extproc::proto::processing_response::Response;
use pinpod::extproc::proto::{
    BodySendMode, HeaderMap, HeaderValue, HttpBody, HttpHeaders, ProcessingRequest,
    ProtocolConfiguration,
};
use serde_json::{Value, json};
use tokio::time::Instant;

const EXT_PROC: &str = "envoy.service.ext_proc.v3.ExternalProcessor";

/// The one endpoint of the pool; nothing listens there, and nothing needs to.
const ENDPOINT: &str = "127.0.0.1:9";

/// What a consumer does with the image.
struct Consumer {
    name: &'static str,
    /// Behind `/app/epp`. `@config` stands for the file below, as the consumer mounts it.
    arguments: &'static [&'static str],
    environment: &'static [(&'static str, &'static str)],
    config_file: Option<&'static str>,
    /// Services its liveness and readiness probes ask for on the health port.
    probes: &'static [&'static str],
    tls: bool,
}

const CHART_CONFIG: &str = include_str!("../data/configs/chart-default.yaml");
const LEGACY_CONFIG: &str = "\
apiVersion: inference.networking.x-k8s.io/v1alpha1
kind: EndpointPickerConfig
plugins:
- type: queue-scorer
- type: kv-cache-utilization-scorer
- type: prefix-cache-scorer
schedulingProfiles:
- name: default
  plugins:
  - pluginRef: queue-scorer
  - pluginRef: kv-cache-utilization-scorer
  - pluginRef: prefix-cache-scorer
";
/// The operator's preset without prefill, as the raw JSON it passes.
const PRESET: &str = r#"{"apiVersion":"llm-d.ai/v1alpha1","kind":"EndpointPickerConfig","plugins":[{"type":"single-profile-handler"},{"type":"queue-scorer"},{"type":"kv-cache-utilization-scorer"},{"type":"prefix-cache-scorer"},{"type":"no-hit-lru-scorer"},{"type":"max-score-picker"}],"schedulingProfiles":[{"name":"default","plugins":[{"pluginRef":"queue-scorer","weight":2},{"pluginRef":"kv-cache-utilization-scorer","weight":2},{"pluginRef":"prefix-cache-scorer","weight":3},{"pluginRef":"no-hit-lru-scorer","weight":2},{"pluginRef":"max-score-picker"}]}]}"#;

const CONSUMERS: &[Consumer] = &[
    Consumer {
        name: "gateway chart, one replica",
        arguments: &[
            "--pool-name",
            "demo",
            "--pool-namespace",
            "llm",
            "--pool-group",
            "inference.networking.k8s.io",
            "--zap-encoder",
            "json",
            "--config-file",
            "@config",
            "--grpc-health-port",
            "9003",
            "--tracing=false",
            "--metrics-endpoint-auth=false",
        ],
        environment: &[
            ("NAMESPACE", "llm"),
            ("POD_NAME", "demo-epp-7d9f8c6b5-x2x9z"),
        ],
        config_file: Some(CHART_CONFIG),
        probes: &["inference-extension"],
        tls: true,
    },
    Consumer {
        name: "standalone chart with a selector, agentgateway beside it",
        arguments: &[
            "--endpoint-selector",
            "app=vllm,llm-d.ai/role in (decode,both)",
            "--endpoint-target-ports",
            "8000,8001",
            "--zap-encoder",
            "json",
            "--config-file",
            "@config",
            "--grpc-health-port",
            "9003",
            "--tracing=true",
            "--v=1",
            "--secure-serving=false",
        ],
        environment: &[
            ("NAMESPACE", "llm"),
            ("POD_NAME", "demo-epp-7d9f8c6b5-x2x9z"),
            ("OTEL_SERVICE_NAME", "llm-d-router/epp"),
            ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9"),
            ("OTEL_TRACES_EXPORTER", "otlp"),
            ("OTEL_TRACES_SAMPLER", "parentbased_traceidratio"),
            ("OTEL_TRACES_SAMPLER_ARG", "0.1"),
            (
                "PREDICTION_SERVER_URL",
                "http://localhost:8001,http://localhost:8002",
            ),
            ("TRAINING_SERVER_URL", "http://localhost:8000"),
            ("LATENCY_MAX_SAMPLE_SIZE", "10000"),
        ],
        config_file: Some(CHART_CONFIG),
        probes: &["inference-extension"],
        tls: false,
    },
    Consumer {
        name: "operator without TLS: four empty strings, the document as JSON",
        arguments: &[
            "--pool-name",
            "svc-inference-pool",
            "--pool-namespace",
            "llm",
            "--zap-encoder",
            "json",
            "--grpc-port",
            "9002",
            "--grpc-health-port",
            "9003",
            "",
            "",
            "",
            "",
            "--config-text",
            PRESET,
        ],
        environment: &[(
            "SSL_CERT_DIR",
            "/var/run/kserve/tls:/var/run/secrets/kubernetes.io/serviceaccount:/etc/pki/tls/certs",
        )],
        config_file: None,
        probes: &["liveness", "readiness"],
        // Nothing sets --secure-serving: the port is TLS with a certificate of our own.
        tls: true,
    },
    Consumer {
        name: "operator with TLS",
        arguments: &[
            "--pool-name",
            "svc-inference-pool",
            "--pool-namespace",
            "llm",
            "--zap-encoder",
            "json",
            "--grpc-port",
            "9002",
            "--grpc-health-port",
            "9003",
            "--enable-cert-reload=true",
            "--secure-serving=true",
            "--model-server-metrics-scheme=https",
            "--cert-path=@certs",
            "--config-text",
            PRESET,
            "--tracing=true",
        ],
        environment: &[("SSL_CERT_DIR", "/nowhere:/etc/pki/tls/certs")],
        config_file: None,
        probes: &["liveness", "readiness"],
        tls: true,
    },
    Consumer {
        name: "kustomize component",
        arguments: &[
            "--pool-name",
            "demo",
            "--pool-namespace",
            "llm",
            "--v",
            "4",
            "--zap-encoder",
            "json",
            "--grpc-port",
            "9002",
            "--grpc-health-port",
            "9003",
            "--config-file",
            "@config",
            "--allow-experimental-plugins=true",
            "--metrics-endpoint-auth=false",
            "--ha-enable-leader-election=false",
        ],
        environment: &[],
        config_file: Some(CHART_CONFIG),
        probes: &[EXT_PROC],
        tls: true,
    },
    Consumer {
        name: "early releases: one dash, camel case",
        arguments: &[
            "-poolName",
            "vllm-llama3-8b-instruct",
            "-poolNamespace",
            "default",
            "-v",
            "4",
            "--zap-encoder",
            "json",
            "-grpcPort",
            "9002",
            "-grpcHealthPort",
            "9003",
            "-configFile",
            "@config",
        ],
        environment: &[],
        config_file: Some(LEGACY_CONFIG),
        probes: &["inference-extension"],
        tls: true,
    },
    Consumer {
        name: "AI gateway example",
        arguments: &[
            "--pool-name",
            "mistral",
            "--pool-namespace",
            "default",
            "--v",
            "4",
            "--zap-encoder",
            "json",
            "--grpc-port",
            "9002",
            "--grpc-health-port",
            "9003",
            "--config-file",
            "@config",
        ],
        environment: &[],
        config_file: Some(LEGACY_CONFIG),
        probes: &["inference-extension"],
        tls: true,
    },
];

/// A cluster with one pool `demo` of one ready pod, in namespace `llm`: just what a picker asks for. Keeps
/// the leases it is given.
struct TinyCluster {
    address: SocketAddr,
    leases: Arc<Mutex<Vec<Value>>>,
}

impl TinyCluster {
    async fn start() -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let cluster = Self {
            address: listener.local_addr().unwrap(),
            leases: Arc::default(),
        };
        let leases = Arc::clone(&cluster.leases);
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let leases = Arc::clone(&leases);
                let service = service_fn(move |request| answer(request, Arc::clone(&leases)));
                let connection = hyper::server::conn::http1::Builder::new()
                    .serve_connection(TokioIo::new(stream), service);
                tokio::spawn(connection);
            }
        });
        cluster
    }

    fn kubeconfig(&self, directory: &Path) -> PathBuf {
        let path = directory.join("kubeconfig");
        let text = format!(
            "apiVersion: v1\nkind: Config\ncurrent-context: c\ncontexts: [{{name: c, context: {{cluster: c, user: u}}}}]\nclusters: [{{name: c, cluster: {{server: \"http://{}\"}}}}]\nusers: [{{name: u, user: {{token: t}}}}]\n",
            self.address
        );
        std::fs::write(&path, text).unwrap();
        path
    }
}

type Answer = http::Response<UnsyncBoxBody<Bytes, Infallible>>;

async fn answer(
    request: http::Request<hyper::body::Incoming>,
    leases: Arc<Mutex<Vec<Value>>>,
) -> Result<Answer, Infallible> {
    let (head, body) = request.into_parts();
    let path = head.uri.path().to_owned();
    let watches = head.uri.query().is_some_and(|q| q.contains("watch=true"));
    let list = |items: &[Value]| json!({"kind": "List", "metadata": {"resourceVersion": "1"}, "items": items});
    let respond = |status: u16, value: &Value| {
        let body = http_body_util::Full::new(Bytes::from(value.to_string()));
        let response = http::Response::builder().status(status);
        response.body(body.boxed_unsync()).unwrap()
    };
    if watches {
        // Nothing ever changes.
        let silence = stream::pending::<Result<hyper::body::Frame<Bytes>, Infallible>>();
        let body = http_body_util::StreamBody::new(silence).boxed_unsync();
        return Ok(http::Response::new(body));
    }
    let namespaced = "/namespaces/llm/";
    let known = path.split_once(namespaced).map(|(_, rest)| rest);
    let meta = |name: &str| {
        json!({"name": name, "namespace": "llm", "uid": name, "resourceVersion": "1",
               "labels": {"app": "vllm"}, "creationTimestamp": "2026-01-01T00:00:00Z"})
    };
    Ok(match known {
        Some("inferencepools") if path.starts_with("/apis/inference.networking.k8s.io/v1/") => {
            let pool = json!({"metadata": meta("demo"), "spec": {
                "selector": {"matchLabels": {"app": "vllm"}}, "targetPorts": [{"number": 9}],
                "endpointPickerRef": {"name": "demo-epp", "port": {"number": 9002}}}});
            respond(200, &list(&[pool]))
        }
        Some("pods") => {
            let pod = json!({"metadata": meta("vllm-0"), "spec": {"containers": []}, "status": {
                "podIP": "127.0.0.1", "conditions": [{"type": "Ready", "status": "True"}]}});
            respond(200, &list(&[pod]))
        }
        Some(rest) if rest.starts_with("leases") => {
            let body = body.collect().await.unwrap().to_bytes();
            match serde_json::from_slice::<Value>(&body) {
                Ok(mut lease) => {
                    let mut held = leases.lock();
                    lease["metadata"]["resourceVersion"] = json!((held.len() + 1).to_string());
                    held.push(lease.clone());
                    respond(if head.method == "POST" { 201 } else { 200 }, &lease)
                }
                Err(_) => match leases.lock().last() {
                    Some(lease) => respond(200, lease),
                    None => respond(404, &missing()),
                },
            }
        }
        _ => respond(404, &missing()),
    })
}

fn missing() -> Value {
    json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "NotFound", "code": 404, "message": "not found"})
}

/// The gateway chart's line with several replicas, the operator's with its own.
const ELECTED: &[Consumer] = &[
    Consumer {
        name: "gateway chart, several replicas",
        arguments: &[
            "--pool-name",
            "demo",
            "--pool-namespace",
            "llm",
            "--pool-group",
            "inference.networking.k8s.io",
            "--zap-encoder",
            "json",
            "--config-file",
            "@config",
            "--grpc-health-port",
            "9003",
            "--tracing=false",
            "--ha-enable-leader-election",
            "--metrics-endpoint-auth=false",
        ],
        environment: &[
            ("NAMESPACE", "llm"),
            ("POD_NAME", "demo-epp-7d9f8c6b5-x2x9z"),
        ],
        config_file: Some(CHART_CONFIG),
        probes: &["liveness", "readiness"],
        tls: true,
    },
    Consumer {
        name: "operator, the election asked for twice",
        arguments: &[
            "--pool-name",
            "demo",
            "--pool-namespace",
            "llm",
            "--zap-encoder",
            "json",
            "--grpc-port",
            "9002",
            "--grpc-health-port",
            "9003",
            "",
            "",
            "",
            "",
            "--ha-enable-leader-election",
            "--ha-enable-leader-election",
            "--config-text",
            PRESET,
        ],
        environment: &[],
        config_file: None,
        probes: &["liveness", "readiness"],
        tls: true,
    },
];

#[tokio::test]
async fn in_a_cluster_the_pool_is_followed_and_a_leader_elected() {
    for consumer in ELECTED {
        let cluster = TinyCluster::start().await;
        let directory = tempfile::tempdir().unwrap();
        let kubeconfig = cluster.kubeconfig(directory.path());
        let environment = [("KUBECONFIG", kubeconfig.to_str().unwrap())];
        let mut container = Container::launch(consumer, &["--drain-timeout=0s"], &environment);
        for probe in consumer.probes {
            container.wait_until(probe, ServingStatus::Serving).await;
        }
        let channel = Channel::connect(local(container.grpc), consumer.tls)
            .await
            .unwrap();
        assert_eq!(destination(&channel).await, ENDPOINT, "{}", consumer.name);
        let name = cluster.leases.lock()[0]["metadata"]["name"].clone();
        assert_eq!(name, "epp-llm-demo.llm-d.ai", "{}", consumer.name);
        // With an election unknown names are no service of ours.
        let unknown = container
            .health(container.health, false, "inference-extension")
            .await;
        assert_ne!(unknown, Some(ServingStatus::Serving), "{}", consumer.name);
        // The lease is given up at once, for the next to take.
        let pid = container.child.id().to_string();
        Command::new("kill").args(["-TERM", &pid]).status().unwrap();
        for _ in 0..400 {
            if container.child.try_wait().unwrap().is_some() {
                break;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        let last = cluster.leases.lock().last().unwrap()["spec"]["holderIdentity"].clone();
        assert!(last.is_null() || last == "", "{}: {last}", consumer.name);
    }
}

/// The binary as an image lays it out: `app/epp`.
fn image(directory: &Path) -> PathBuf {
    let app = directory.join("app");
    std::fs::create_dir(&app).unwrap();
    let epp = app.join("epp");
    symlink(env!("CARGO_BIN_EXE_pinpod"), &epp).unwrap();
    epp
}

/// A started container; killed when dropped.
struct Container {
    child: Child,
    log: PathBuf,
    grpc: u16,
    health: u16,
    metrics: u16,
    _directory: tempfile::TempDir,
}

impl Drop for Container {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Container {
    fn start(consumer: &Consumer, further: &[&str]) -> Self {
        let endpoints = format!("--endpoints={ENDPOINT}");
        let further: Vec<&str> = std::iter::once(endpoints.as_str())
            .chain(further.iter().copied())
            .collect();
        Self::launch(consumer, &further, &[])
    }

    /// With nothing but its ports changed.
    fn launch(consumer: &Consumer, further: &[&str], environment: &[(&str, &str)]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let epp = image(directory.path());
        let [grpc, health, metrics] = free_ports().unwrap();
        let config = directory.path().join("plugins.yaml");
        let certs = directory.path().join("certs");
        if let Some(text) = consumer.config_file {
            std::fs::write(&config, text).unwrap();
        }
        certificate(&certs);
        let arguments = consumer.arguments.iter().map(|argument| {
            argument
                .replace("@config", config.to_str().unwrap())
                .replace("@certs", certs.to_str().unwrap())
        });
        let log = directory.path().join("log");
        let file = std::fs::File::create(&log).unwrap();
        let child = Command::new(epp)
            .args(arguments)
            .args([
                format!("--grpc-port={grpc}"),
                format!("--grpc-health-port={health}"),
                format!("--metrics-port={metrics}"),
            ])
            .args(further)
            .env_clear()
            .envs(consumer.environment.iter().copied())
            .envs(environment.iter().copied())
            // Of a read-only root nothing can be used but reading.
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(file)
            .spawn()
            .unwrap();
        Self {
            child,
            log,
            grpc,
            health,
            metrics,
            _directory: directory,
        }
    }

    fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap()
    }

    fn signal(&self, name: &str) {
        let pid = self.child.id().to_string();
        let status = Command::new("kill").args([name, &pid]).status().unwrap();
        assert!(status.success());
    }

    async fn health(&self, port: u16, tls: bool, service: &str) -> Option<ServingStatus> {
        let channel = Channel::connect(local(port), tls).await.ok()?;
        channel.health(service).await.ok()
    }

    async fn wait_until(&mut self, service: &str, wanted: ServingStatus) {
        for _ in 0..600 {
            if self.health(self.health, false, service).await == Some(wanted) {
                return;
            }
            if let Some(status) = self.child.try_wait().unwrap() {
                panic!("ended with {status}:\n{}", self.log());
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        panic!("{service:?} is not {wanted:?}:\n{}", self.log());
    }
}

pub(super) fn local(port: u16) -> SocketAddr {
    ([127, 0, 0, 1], port).into()
}

/// The volume of a TLS secret.
fn certificate(directory: &Path) {
    std::fs::create_dir(directory).unwrap();
    let made = rcgen::generate_simple_self_signed(["svc-epp-service.llm.svc".to_owned()]).unwrap();
    std::fs::write(directory.join("tls.crt"), made.cert.pem()).unwrap();
    std::fs::write(directory.join("tls.key"), made.signing_key.serialize_pem()).unwrap();
}

/// One completion in full duplex; the value of the destination header.
pub(super) async fn destination(channel: &Channel) -> String {
    let header = |key: &str, value: &str| HeaderValue {
        key: key.to_owned(),
        raw_value: Bytes::copy_from_slice(value.as_bytes()),
        value: Bytes::new(),
    };
    let headers = HttpHeaders {
        headers: Some(HeaderMap {
            headers: vec![
                header(":path", "/v1/completions"),
                header(":method", "POST"),
                header("content-type", "application/json"),
            ],
        }),
        end_of_stream: false,
    };
    let full_duplex = BodySendMode::FullDuplexStreamed.into();
    let first = ProcessingRequest {
        request: Some(Request::RequestHeaders(headers)),
        protocol_config: Some(ProtocolConfiguration {
            request_body_mode: full_duplex,
            response_body_mode: full_duplex,
            send_body_without_waiting_for_header_response: false,
        }),
        ..ProcessingRequest::default()
    };
    let body = ProcessingRequest {
        request: Some(Request::RequestBody(HttpBody {
            body: Bytes::from_static(br#"{"model":"m","prompt":"hello"}"#),
            end_of_stream: true,
        })),
        ..ProcessingRequest::default()
    };
    let mut client = ExternalProcessorClient::with_origin(channel.clone(), origin());
    let messages = stream::iter([first, body]);
    let mut replies = client.process(messages).await.unwrap().into_inner();
    let reply = replies.message().await.unwrap().unwrap();
    let Some(Response::RequestHeaders(headers)) = reply.response else {
        panic!("{reply:?}");
    };
    let set = headers.response.unwrap().header_mutation.unwrap();
    let option = set.set_headers.iter().find_map(|option| {
        let header = option.header.as_ref()?;
        (header.key == "x-gateway-destination-endpoint").then(|| header.raw_value.clone())
    });
    let body = replies.message().await.unwrap().unwrap();
    let Some(Response::RequestBody(body)) = body.response else {
        panic!("{body:?}");
    };
    let piece = body.response.unwrap().body_mutation.unwrap().mutation;
    assert!(matches!(piece, Some(Mutation::StreamedResponse(_))));
    String::from_utf8(option.unwrap().to_vec()).unwrap()
}

pub(super) async fn get(port: u16, path: &str) -> (u16, String) {
    let stream = tokio::net::TcpStream::connect(local(port)).await.unwrap();
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
        .await
        .unwrap();
    tokio::spawn(connection);
    let request = http::Request::get(path)
        .header("host", "picker")
        .body(Empty::<Bytes>::new())
        .unwrap();
    let response = sender.send_request(request).await.unwrap();
    let status = response.status().as_u16();
    let body = response.into_body().collect().await.unwrap().to_bytes();
    (status, String::from_utf8(body.to_vec()).unwrap())
}

#[tokio::test]
async fn every_consumers_command_line_starts_and_serves() {
    for consumer in CONSUMERS {
        let mut container = Container::start(consumer, &[]);
        for probe in consumer.probes {
            container.wait_until(probe, ServingStatus::Serving).await;
        }
        // Envoy's and the gateways' health check goes to the ext_proc port itself.
        for service in ["", EXT_PROC] {
            let status = container
                .health(container.grpc, consumer.tls, service)
                .await;
            assert_eq!(status, Some(ServingStatus::Serving), "{}", consumer.name);
        }
        let channel = Channel::connect(local(container.grpc), consumer.tls)
            .await
            .unwrap();
        assert_eq!(destination(&channel).await, ENDPOINT, "{}", consumer.name);
        let (status, exposition) = get(container.metrics, "/metrics").await;
        assert_eq!(status, 200, "{}", consumer.name);
        for series in [
            "llm_d_epp_request_total{",
            "inference_objective_request_total{",
        ] {
            assert!(exposition.contains(series), "{}: {series}", consumer.name);
        }
        let (status, state) = get(container.metrics, "/debug/plugins/state").await;
        assert_eq!(status, 200, "{}", consumer.name);
        let state: Value = serde_json::from_str(&state).unwrap();
        let taken = state["timestamp"].as_str().unwrap();
        assert!(taken.starts_with("20") && taken.ends_with('Z'), "{taken}");
        // In a cluster of IPv6 alone nobody has another address to ask at.
        if std::net::UdpSocket::bind((Ipv6Addr::LOCALHOST, 0)).is_ok() {
            for port in [container.grpc, container.health, container.metrics] {
                let address = (Ipv6Addr::LOCALHOST, port);
                assert!(tokio::net::TcpStream::connect(address).await.is_ok());
            }
        }
        assert!(!container.log().contains("panicked"), "{}", container.log());
    }
}

#[tokio::test]
async fn the_port_is_tls_unless_told_otherwise() {
    let operator = &CONSUMERS[2];
    let mut container = Container::start(operator, &[]);
    container
        .wait_until("readiness", ServingStatus::Serving)
        .await;
    assert_eq!(container.health(container.grpc, false, "").await, None);
    let made = Channel::connect(local(container.grpc), true).await.unwrap();
    assert_eq!(made.certificates().len(), 1, "made at start");
    let mut given = Container::start(&CONSUMERS[3], &[]);
    given.wait_until("readiness", ServingStatus::Serving).await;
    let shown = Channel::connect(local(given.grpc), true).await.unwrap();
    let name = b"svc-epp-service.llm.svc";
    let has_name = |der: &[u8]| der.windows(name.len()).any(|w| w == name);
    assert!(has_name(&shown.certificates()[0]), "the mounted one");
    assert!(!has_name(&made.certificates()[0]));
}

#[tokio::test]
async fn termination_reports_not_serving_serves_on_and_then_ends_well() {
    let consumer = &CONSUMERS[2];
    let mut container = Container::start(consumer, &["--drain-timeout=2s"]);
    container
        .wait_until("readiness", ServingStatus::Serving)
        .await;
    let open = Channel::connect(local(container.grpc), true).await.unwrap();
    container.signal("-TERM");
    for service in ["readiness", "inference-extension", "", EXT_PROC] {
        container
            .wait_until(service, ServingStatus::NotServing)
            .await;
    }
    // A process that is draining must not be killed for it, and proxies that have not noticed yet
    // still get their answers.
    let liveness = container.health(container.health, false, "liveness").await;
    assert_eq!(liveness, Some(ServingStatus::Serving));
    assert_eq!(destination(&open).await, ENDPOINT);
    drop(open);
    for _ in 0..400 {
        if let Some(status) = container.child.try_wait().unwrap() {
            assert_eq!(status.code(), Some(0), "{}", container.log());
            return;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("does not end:\n{}", container.log());
}

#[tokio::test]
async fn a_second_signal_drops_the_streams_that_a_drain_waits_for() {
    let drain = Duration::from_secs(3);
    let mut container = Container::start(&CONSUMERS[2], &["--drain-timeout=3s"]);
    container
        .wait_until("readiness", ServingStatus::Serving)
        .await;
    let channel = Channel::connect(local(container.grpc), true).await.unwrap();
    // A stream that never sends anything.
    let mut client = ExternalProcessorClient::with_origin(channel, origin());
    let mut held = client.process(stream::pending()).await.unwrap();
    container.signal("-TERM");
    // It accepts connections as long as it serves on.
    while tokio::net::TcpStream::connect(local(container.grpc))
        .await
        .is_ok()
    {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(
        container.child.try_wait().unwrap(),
        None,
        "waits for the stream"
    );
    let again = Instant::now();
    container.signal("-INT");
    assert!(held.get_mut().message().await.is_err());
    while container.child.try_wait().unwrap().is_none() {
        assert!(again.elapsed() < drain, "{}", container.log());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
