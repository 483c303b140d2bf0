//! A gateway for tests: simulated pods, pinpod and the real Envoy, and clients that misbehave.

#![allow(unreachable_pub, reason = "shared by test binaries as a module")]

use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, Request, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper_util::rt::{TokioExecutor, TokioIo};
use pinpod::demo::processes::{Envoy, Picker, Sims};
use tokio::net::TcpStream;
use tokio::time::Instant;

/// The binary under test.
pub fn program() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_pinpod"))
}

/// Everything a test talks to. Dropped, it is gone.
pub struct Gateway {
    pub envoy: Envoy,
    pub picker: Picker,
    pub sims: Sims,
    pub directory: tempfile::TempDir,
}

/// What to start.
pub struct Setup<'a> {
    pub template: &'a str,
    pub pods: u16,
    pub sim_flags: &'a [&'a str],
    pub serve_flags: &'a [&'a str],
    pub config: Option<&'a str>,
    pub plaintext: bool,
}

impl Default for Setup<'_> {
    fn default() -> Self {
        Self {
            template: pinpod::demo::envoy::ORIGINAL_DST,
            pods: 3,
            sim_flags: &["--time-scale=50"],
            serve_flags: &[],
            config: None,
            plaintext: true,
        }
    }
}

impl Setup<'_> {
    pub async fn start(self) -> Gateway {
        let directory = tempfile::tempdir().unwrap();
        let own = |flags: &[&str]| flags.iter().map(|f| (*f).to_owned()).collect::<Vec<_>>();
        let sims = Sims::start(program(), self.pods, &own(self.sim_flags), directory.path())
            .await
            .unwrap();
        let mut flags = own(self.serve_flags);
        if !flags
            .iter()
            .any(|f| f.starts_with("--endpoints") || f.starts_with("--pool-name"))
        {
            flags.push(sims.endpoints_flag());
        }
        flags.push(format!("--secure-serving={}", !self.plaintext));
        if let Some(config) = self.config {
            flags.push(format!("--config-text={config}"));
        }
        let picker = Picker::start(program(), &flags, directory.path())
            .await
            .unwrap();
        let endpoints = sims.addresses.clone();
        let envoy = Envoy::start(
            self.template,
            picker.grpc,
            self.plaintext,
            endpoints,
            directory.path(),
        )
        .await
        .unwrap();
        let gateway = Gateway {
            envoy,
            picker,
            sims,
            directory,
        };
        gateway.wait_until_healthy().await;
        gateway
    }
}

/// An answer.
#[derive(Debug)]
pub struct Answer {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub body: Bytes,
}

impl Answer {
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// The pod that answered.
    pub fn pod(&self) -> &str {
        self.headers
            .get("x-sim-name")
            .map_or("", |v| v.to_str().unwrap())
    }
}

impl Gateway {
    pub fn address(&self) -> SocketAddr {
        ([127, 0, 0, 1], self.envoy.port).into()
    }

    /// Waits until Envoy considers the picker healthy.
    pub async fn wait_until_healthy(&self) {
        let admin = SocketAddr::from(([127, 0, 0, 1], self.envoy.admin));
        eventually("the picker is healthy for Envoy", || async {
            let clusters = get(admin, "/clusters")
                .await
                .map(|a| a.text())
                .unwrap_or_default();
            clusters
                .lines()
                .any(|l| l.starts_with("epp::127.0.0.1") && l.ends_with("health_flags::healthy"))
        })
        .await;
    }

    pub async fn get(&self, path: &str) -> Answer {
        get(self.address(), path).await.unwrap()
    }

    pub async fn post(&self, path: &str, body: impl Into<Bytes>) -> Answer {
        self.post_with(path, body, &[]).await
    }

    pub async fn post_with(
        &self,
        path: &str,
        body: impl Into<Bytes>,
        headers: &[(&str, &str)],
    ) -> Answer {
        send(
            self.address(),
            false,
            request("POST", path, body.into(), headers),
        )
        .await
        .unwrap()
    }

    /// Over HTTP/2.
    pub async fn post_h2(&self, path: &str, body: impl Into<Bytes>) -> Answer {
        let uri = format!("http://{}{path}", self.address());
        send(
            self.address(),
            true,
            request("POST", &uri, body.into(), &[]),
        )
        .await
        .unwrap()
    }

    /// Requests and tokens booked over all endpoints.
    pub async fn in_flight(&self) -> (i64, i64) {
        let endpoints = self.load().await;
        let sum = |key: &str| endpoints.values().map(|e| e[key].as_i64().unwrap()).sum();
        (sum("requests"), sum("tokens"))
    }

    /// Requests booked on each endpoint.
    pub async fn booked(&self) -> Vec<(String, i64)> {
        let endpoints = self.load().await.into_iter();
        endpoints
            .map(|(name, load)| (name, load["requests"].as_i64().unwrap()))
            .collect()
    }

    async fn load(&self) -> serde_json::Map<String, serde_json::Value> {
        let metrics = SocketAddr::from(([127, 0, 0, 1], self.picker.metrics));
        let state = get(metrics, "/debug/plugins/state").await.unwrap();
        let mut state: serde_json::Value = serde_json::from_slice(&state.body).unwrap();
        let load = state["plugins"]["inflight-load-producer"]["state"].take();
        serde_json::from_value(load).unwrap()
    }

    /// Sum of a series of the picker over all labels.
    pub async fn metric(&self, name: &str) -> f64 {
        let metrics = SocketAddr::from(([127, 0, 0, 1], self.picker.metrics));
        let text = get(metrics, "/metrics").await.unwrap().text();
        let lines = text.lines().filter(|l| {
            l.strip_prefix(name)
                .is_some_and(|rest| rest.starts_with('{') || rest.starts_with(' '))
        });
        lines
            .filter_map(|l| l.rsplit_once(' ')?.1.parse::<f64>().ok())
            .sum()
    }

    /// Waits until nothing is in flight any more.
    pub async fn wait_until_idle(&self) {
        eventually("nothing is in flight", || async {
            self.in_flight().await == (0, 0)
                && self.metric("llm_d_epp_request_running").await == 0.0
        })
        .await;
    }
}

/// Polls a condition for at most twenty seconds.
pub async fn eventually<F: Future<Output = bool>>(what: &str, condition: impl Fn() -> F) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !condition().await {
        assert!(Instant::now() < deadline, "timed out waiting until {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

pub async fn get(address: SocketAddr, path: &str) -> anyhow::Result<Answer> {
    send(address, false, request("GET", path, Bytes::new(), &[])).await
}

/// Posts to something else than the gateway.
pub async fn post_to(address: SocketAddr, path: &str, body: impl Into<Bytes>) -> Answer {
    let request = request("POST", path, body.into(), &[]);
    send(address, false, request).await.unwrap()
}

/// The same with further headers.
pub async fn post_with(
    address: SocketAddr,
    path: &str,
    body: impl Into<Bytes>,
    headers: &[(&str, &str)],
) -> Answer {
    let request = request("POST", path, body.into(), headers);
    send(address, false, request).await.unwrap()
}

fn request(method: &str, uri: &str, body: Bytes, headers: &[(&str, &str)]) -> Request<Full<Bytes>> {
    let mut request = Request::builder()
        .method(method)
        .uri(uri)
        .header("host", "pinpod.test");
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    request.body(Full::new(body)).unwrap()
}

async fn send(
    address: SocketAddr,
    h2: bool,
    request: Request<Full<Bytes>>,
) -> anyhow::Result<Answer> {
    let io = TokioIo::new(TcpStream::connect(address).await?);
    let response = if h2 {
        let (mut sender, connection) =
            hyper::client::conn::http2::handshake(TokioExecutor::new(), io).await?;
        tokio::spawn(connection);
        sender.send_request(request).await?
    } else {
        let (mut sender, connection) = hyper::client::conn::http1::handshake(io).await?;
        tokio::spawn(connection);
        sender.send_request(request).await?
    };
    let (parts, body) = response.into_parts();
    let body = body.collect().await?.to_bytes();
    Ok(Answer {
        status: parts.status,
        headers: parts.headers,
        body,
    })
}

/// A completion request for `prompt`; a stream ends with usage.
pub fn completion(prompt: &str, max_tokens: usize, stream: bool) -> String {
    let mut body = serde_json::json!({
        "model": "sim-model", "prompt": prompt, "max_tokens": max_tokens, "stream": stream,
    });
    if stream {
        body["stream_options"] = serde_json::json!({"include_usage": true});
    }
    body.to_string()
}

/// Sends a signal to a process, or to a group when `target` begins with a minus.
pub fn send_signal(name: &str, target: &str) {
    let status = std::process::Command::new("kill")
        .args([&format!("-{name}"), "--", target])
        .status();
    assert!(status.unwrap().success());
}
