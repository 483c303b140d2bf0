//! The room at its boundary: HTTP in, scripted engines that keep the exact bytes they were sent.

mod connectors;
mod failures;
mod nixl;
mod surface;
mod upgrade;

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, Request, Response, StatusCode};
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio_rustls::rustls::ClientConfig;
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;

use super::allow_list::{AllowList, Targets};
use super::engines::EngineSettings;
use super::metrics::{SidecarMetrics, Stage};
use super::proxy::Sidecar;
use super::server::{ListenerTls, RankServer};
use super::settings::Settings;

/// Longest wait for a condition.
const PATIENCE: Duration = Duration::from_secs(20);

/// What an engine does with a request.
#[derive(Debug, Clone)]
pub(super) enum Act {
    /// Answers.
    Reply(u16, &'static str, String),
    /// Sends these pieces as an event stream, each when the last was taken.
    Stream(Vec<String>),
    /// Sends the pieces and breaks the connection.
    Break(Vec<String>),
    /// Reads the request and closes the connection.
    Die,
    /// Reads the request and says nothing.
    Hang,
}

impl Act {
    pub(super) fn json(text: impl Into<String>) -> Self {
        Self::Reply(200, "application/json", text.into())
    }
}

/// A request as an engine saw it.
#[derive(Debug, Clone)]
pub(super) struct Seen {
    pub(super) path: String,
    pub(super) headers: HeaderMap,
    pub(super) body: String,
}

/// An engine that does what it is told, in order, and the last thing from then on.
pub(super) struct Engine {
    pub(super) address: SocketAddr,
    script: Arc<Script>,
    _stop: DropGuard,
}

#[derive(Default)]
struct Script {
    acts: Mutex<Vec<Act>>,
    seen: Mutex<Vec<Seen>>,
    /// Requests whose connection is open.
    open: Arc<()>,
}

impl Engine {
    pub(super) async fn start(acts: impl IntoIterator<Item = Act>) -> Self {
        Self::listen("127.0.0.1:0".parse().unwrap(), acts).await
    }

    pub(super) async fn listen(address: SocketAddr, acts: impl IntoIterator<Item = Act>) -> Self {
        let listener = TcpListener::bind(address).await.unwrap();
        let address = listener.local_addr().unwrap();
        let mut acts: Vec<Act> = acts.into_iter().collect();
        acts.reverse();
        let script = Arc::new(Script {
            acts: Mutex::new(acts),
            ..Script::default()
        });
        let stop = CancellationToken::new();
        let (accepting, cancelled) = (Arc::clone(&script), stop.clone());
        tokio::spawn(async move {
            loop {
                let (stream, _) = tokio::select! {
                    () = cancelled.cancelled() => return,
                    accepted = listener.accept() => accepted.unwrap(),
                };
                let (script, cancelled) = (Arc::clone(&accepting), cancelled.clone());
                tokio::spawn(async move {
                    let dead = CancellationToken::new();
                    let kill = dead.clone();
                    let service =
                        service_fn(move |request| play(Arc::clone(&script), request, kill.clone()));
                    let connection = hyper::server::conn::http1::Builder::new()
                        .serve_connection(TokioIo::new(stream), service);
                    tokio::select! {
                        _ = connection => {}
                        () = dead.cancelled() => {}
                        () = cancelled.cancelled() => {}
                    }
                });
            }
        });
        Self {
            address,
            script,
            _stop: stop.drop_guard(),
        }
    }

    pub(super) fn seen(&self) -> Vec<Seen> {
        self.script.seen.lock().clone()
    }

    /// The one request it saw.
    pub(super) fn only(&self) -> Seen {
        let seen = self.seen();
        assert_eq!(seen.len(), 1, "{seen:?}");
        seen[0].clone()
    }

    /// Requests that are being answered.
    pub(super) fn open(&self) -> usize {
        Arc::strong_count(&self.script.open) - 1
    }

    pub(super) async fn saw(&self, requests: usize) {
        until(|| self.seen().len() >= requests).await;
    }
}

type EngineReply = Response<BoxBody<Bytes, std::io::Error>>;

async fn play(
    script: Arc<Script>,
    request: Request<Incoming>,
    kill: CancellationToken,
) -> Result<EngineReply, Infallible> {
    let open = Arc::clone(&script.open);
    let (head, body) = request.into_parts();
    let body = body.collect().await.unwrap().to_bytes();
    script.seen.lock().push(Seen {
        path: head.uri.to_string(),
        headers: head.headers,
        body: String::from_utf8(body.to_vec()).unwrap(),
    });
    let act = {
        let mut acts = script.acts.lock();
        if acts.len() > 1 {
            acts.pop().unwrap()
        } else {
            acts.last().cloned().unwrap()
        }
    };
    let stream = |open: Arc<()>, pieces: Vec<String>, breaks: bool| {
        let (sender, mut receiver) = mpsc::channel(1);
        tokio::spawn(async move {
            #[expect(clippy::no_effect_underscore_binding, reason = "held until the end")]
            let _open = open;
            for piece in pieces {
                if piece == "..." {
                    // Goes on only while somebody listens.
                    sender.closed().await;
                    return;
                }
                let frame = Ok(Frame::data(Bytes::from(piece)));
                if sender.send(frame).await.is_err() {
                    return;
                }
            }
            if breaks {
                let _ = sender.send(Err(std::io::Error::other("broken"))).await;
            }
        });
        let body = StreamBody::new(futures_util::stream::poll_fn(move |cx| {
            receiver.poll_recv(cx)
        }));
        Response::builder()
            .header("content-type", "text/event-stream")
            .body(BodyExt::boxed(body))
            .unwrap()
    };
    Ok(match act {
        Act::Reply(status, content_type, body) => Response::builder()
            .status(status)
            .header("content-type", content_type)
            .header("x-engine", "kept")
            .body(Full::new(Bytes::from(body)).map_err(|e| match e {}).boxed())
            .unwrap(),
        Act::Stream(pieces) => stream(open, pieces, false),
        Act::Break(pieces) => stream(open, pieces, true),
        Act::Die => {
            kill.cancel();
            std::future::pending().await
        }
        Act::Hang => {
            #[expect(clippy::no_effect_underscore_binding, reason = "held until the end")]
            let _open = open;
            std::future::pending().await
        }
    })
}

/// A sidecar in front of a decode engine.
pub(super) struct Running {
    pub(super) address: SocketAddr,
    pub(super) metrics: SidecarMetrics,
    _stop: DropGuard,
}

impl Running {
    pub(super) async fn start(decode: &Engine, settings: Settings) -> Self {
        Self::with_targets(decode.address.port(), settings, Targets::anything()).await
    }

    pub(super) async fn with_targets(
        model_server_port: u16,
        settings: Settings,
        targets: Targets,
    ) -> Self {
        Self::launch(model_server_port, settings, targets, None, None).await
    }

    /// With TLS on the listener, or towards the decode engine.
    pub(super) async fn launch(
        model_server_port: u16,
        settings: Settings,
        targets: Targets,
        tls: ListenerTls,
        decode_tls: Option<Arc<ClientConfig>>,
    ) -> Self {
        let settings = Settings {
            model_server_port,
            model_server_host: "127.0.0.1".to_owned(),
            ..settings
        };
        let metrics = SidecarMetrics::new();
        let engines = EngineSettings {
            connect_timeout: Duration::from_secs(5),
            max_idle_per_host: 16,
            tls: [None, None, decode_tls],
        };
        let allowed = Arc::new(AllowList::new(targets));
        let sidecar = Sidecar::new(settings, engines, allowed, metrics.clone());
        let server = Arc::new(RankServer {
            rank: 0,
            sidecar: Arc::new(sidecar),
            tls,
            connections: TaskTracker::new(),
        });
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let stop = CancellationToken::new();
        tokio::spawn(server.serve(listener, stop.clone(), stop.clone()));
        Self {
            address,
            metrics,
            _stop: stop.drop_guard(),
        }
    }

    /// Sends a request and returns the answer once its head is there.
    pub(super) async fn send(&self, path: &str, headers: &[(&str, &str)], body: &str) -> Open {
        let stream = TcpStream::connect(self.address).await.unwrap();
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .unwrap();
        let driver = tokio::spawn(async move {
            let _ = connection.await;
        });
        let method = if body.is_empty() { "GET" } else { "POST" };
        let mut request = Request::builder()
            .method(method)
            .uri(path)
            .header("host", "client")
            .header("content-type", "application/json");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let request = request
            .body(Full::new(Bytes::copy_from_slice(body.as_bytes())))
            .unwrap();
        let response = tokio::time::timeout(PATIENCE, sender.send_request(request))
            .await
            .unwrap()
            .unwrap();
        Open { response, driver }
    }

    /// Sends a request and reads the whole answer.
    pub(super) async fn ask(&self, path: &str, headers: &[(&str, &str)], body: &str) -> Answered {
        self.send(path, headers, body).await.whole().await
    }

    pub(super) fn legs(&self) -> [usize; 3] {
        [Stage::Encode, Stage::Prefill, Stage::Decode].map(|stage| self.metrics.active(stage))
    }

    pub(super) async fn nothing_left(&self) {
        until(|| self.legs() == [0, 0, 0]).await;
    }
}

/// An answer that is still coming.
pub(super) struct Open {
    pub(super) response: Response<Incoming>,
    driver: tokio::task::JoinHandle<()>,
}

impl Open {
    /// The next piece; `None` at the end, an error when it is cut off.
    pub(super) async fn piece(&mut self) -> Option<Result<String, hyper::Error>> {
        let frame = tokio::time::timeout(PATIENCE, self.response.frame())
            .await
            .unwrap()?;
        Some(frame.map(|f| String::from_utf8(f.into_data().unwrap().to_vec()).unwrap()))
    }

    /// Hangs up.
    pub(super) fn abort(self) {
        self.driver.abort();
    }

    pub(super) async fn whole(self) -> Answered {
        let (head, body) = self.response.into_parts();
        let body = tokio::time::timeout(PATIENCE, body.collect())
            .await
            .unwrap()
            .unwrap()
            .to_bytes();
        Answered {
            status: head.status,
            headers: head.headers,
            body: String::from_utf8(body.to_vec()).unwrap(),
        }
    }
}

/// A whole answer.
#[derive(Debug)]
pub(super) struct Answered {
    pub(super) status: StatusCode,
    pub(super) headers: HeaderMap,
    pub(super) body: String,
}

pub(super) async fn until(condition: impl Fn() -> bool) {
    let waiting = async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    tokio::time::timeout(PATIENCE, waiting)
        .await
        .expect("the condition holds in time");
}

pub(super) const CHAT: &str = "/v1/chat/completions";

/// A prefill answer with usable parameters.
pub(super) fn prefilled(cached: u64) -> Act {
    Act::json(format!(
        r#"{{"usage":{{"prompt_tokens_details":{{"cached_tokens":{cached}}}}},"kv_transfer_params":{PARAMS}}}"#
    ))
}

pub(super) const PARAMS: &str = r#"{"do_remote_prefill":true,"do_remote_decode":false,"remote_block_ids":[[1,2]],"remote_engine_id":"e","remote_request_id":"r","remote_host":"10.0.0.1","remote_port":5600,"unknown":9007199254740993}"#;
