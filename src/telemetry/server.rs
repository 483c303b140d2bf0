//! The metrics port over HTTP/1.1, plain or in TLS, open or behind a [`Gate`]: `/metrics`,
//! `/debug/plugins/state`, and `/debug/kv-index`, which answers a GET with totals and a POST to
//! `/debug/kv-index/<path of a request>` with what each endpoint holds of the prompt in its body.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;

use arc_swap::ArcSwap;
use bytes::Bytes;
use futures_util::future::BoxFuture;
use http::{HeaderMap, Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt, Full, Limited};
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_util::sync::CancellationToken;

use super::metrics::Exposition;

/// Connections served at once; further ones wait in the accept queue.
const MAX_CONNECTIONS: usize = 256;
/// Body of a prompt that is asked about; as long as the tokenizer reads.
const MAX_PROMPT_BYTES: usize = 32 << 20;
/// Prompts worked on at once; further ones are refused, for requests come first.
const MAX_PROMPTS: usize = 2;
/// How long a TLS handshake may take.
const HANDSHAKE_TIMEOUT: std::time::Duration = std::time::Duration::from_secs(5);
/// Where the block index is looked at.
const KV_INDEX: &str = "/debug/kv-index";

/// Makes the body of `/debug/plugins/state`.
pub type PluginState = Arc<dyn Fn() -> serde_json::Value + Send + Sync>;

/// Why a prompt was not looked up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// HTTP status.
    pub status: u16,
    /// For the one who asked.
    pub text: String,
}

/// An answer about a prompt, in time.
pub type Explained = Pin<Box<dyn Future<Output = Result<serde_json::Value, Refusal>> + Send>>;

/// Looks at the block index.
pub trait IndexView: Send + Sync {
    /// Totals of each endpoint and publisher.
    fn totals(&self) -> serde_json::Value;

    /// What each endpoint holds of the prompt in `body`, a request to `path`.
    fn explain(&self, path: String, body: Bytes) -> Explained;
}

/// Why a request may not pass.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Refused {
    /// Nobody vouches for it.
    Unauthenticated,
    /// This user may not.
    Denied(String),
    /// It could not be found out.
    Failed,
}

/// Lets requests pass or not.
pub trait Gate: Send + Sync + std::fmt::Debug {
    /// Whether a request may pass.
    fn check<'a>(
        &'a self,
        method: &'a Method,
        path: &'a str,
        headers: &'a HeaderMap,
    ) -> BoxFuture<'a, Result<(), Refused>>;
}

/// What the port serves beside metrics.
#[derive(Clone)]
pub struct Pages {
    /// Of `/metrics`.
    pub exposition: Exposition,
    /// Of `/debug/plugins/state`.
    pub state: PluginState,
    /// Of `/debug/kv-index`.
    pub index: Arc<dyn IndexView>,
    prompts: Arc<Semaphore>,
    gate: Option<Arc<dyn Gate>>,
}

impl std::fmt::Debug for Pages {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pages").finish_non_exhaustive()
    }
}

impl Pages {
    /// These pages.
    pub fn new(exposition: Exposition, state: PluginState, index: Arc<dyn IndexView>) -> Self {
        Self {
            exposition,
            state,
            index,
            prompts: Arc::new(Semaphore::new(MAX_PROMPTS)),
            gate: None,
        }
    }

    /// Everything but `/healthz` only for those that `gate` lets pass.
    #[must_use]
    pub fn behind(mut self, gate: Option<Arc<dyn Gate>>) -> Self {
        self.gate = gate;
        self
    }
}

/// Serves until `shutdown`. An accept error is logged and survived.
pub async fn serve(
    listener: TcpListener,
    tls: Option<Arc<ArcSwap<ServerConfig>>>,
    pages: Pages,
    shutdown: CancellationToken,
) {
    let permits = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let Ok(permit) = Arc::clone(&permits).acquire_owned().await else {
            return;
        };
        let accepted = tokio::select! {
            () = shutdown.cancelled() => return,
            accepted = listener.accept() => accepted,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "metrics port: accept failed");
                tokio::time::sleep(std::time::Duration::from_millis(50)).await;
                continue;
            }
        };
        let conversation = converse(stream, tls.as_ref().map(|t| t.load_full()), pages.clone());
        let shutdown = shutdown.clone();
        tokio::spawn(async move {
            // A scraper that hangs up is none of our business.
            shutdown.run_until_cancelled(conversation).await;
            drop(permit);
        });
    }
}

/// One connection, to its end.
async fn converse(stream: TcpStream, tls: Option<Arc<ServerConfig>>, pages: Pages) {
    let Some(config) = tls else {
        return respond_on(stream, pages).await;
    };
    let handshake = TlsAcceptor::from(config).accept(stream);
    match tokio::time::timeout(HANDSHAKE_TIMEOUT, handshake).await {
        Ok(Ok(stream)) => respond_on(stream, pages).await,
        Ok(Err(error)) => tracing::debug!(%error, "metrics port: handshake failed"),
        Err(_) => tracing::debug!("metrics port: handshake not in time"),
    }
}

async fn respond_on<S: AsyncRead + AsyncWrite + Unpin>(stream: S, pages: Pages) {
    let service = service_fn(move |request: Request<hyper::body::Incoming>| {
        let pages = pages.clone();
        async move { Ok::<_, Infallible>(answer(request, &pages).await) }
    });
    let connection =
        hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service);
    if let Err(error) = connection.await {
        tracing::trace!(%error, "metrics port");
    }
}

/// The answer to a request that may not pass, in the reference's words.
fn refuse(refused: Refused) -> Response<Full<Bytes>> {
    let (status, text) = match refused {
        Refused::Unauthenticated => (StatusCode::UNAUTHORIZED, "Unauthorized".to_owned()),
        Refused::Denied(user) => (
            StatusCode::FORBIDDEN,
            format!("Authorization denied for user {user}"),
        ),
        Refused::Failed => (
            StatusCode::INTERNAL_SERVER_ERROR,
            "Authentication failed".to_owned(),
        ),
    };
    reply(status, "text/plain", text + "\n")
}

async fn answer<B>(request: Request<B>, pages: &Pages) -> Response<Full<Bytes>>
where
    B: hyper::body::Body<Data = Bytes>,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let (head, body) = request.into_parts();
    let gate = pages
        .gate
        .as_ref()
        .filter(|_| head.uri.path() != "/healthz");
    if let Some(gate) = gate {
        let checked = gate.check(&head.method, head.uri.path(), &head.headers);
        if let Err(refused) = checked.await {
            return refuse(refused);
        }
    }
    let prompt = head.uri.path().strip_prefix(KV_INDEX);
    match prompt.filter(|path| path.len() > 1 && path.starts_with('/')) {
        Some(path) if head.method == Method::POST => explain(path.to_owned(), body, pages).await,
        Some(_) => only("POST"),
        None => respond(&head.method, head.uri.path(), pages),
    }
}

async fn explain<B>(path: String, body: B, pages: &Pages) -> Response<Full<Bytes>>
where
    B: hyper::body::Body<Data = Bytes>,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let text = |status, text: String| reply(status, "text/plain", text + "\n");
    let Ok(_permit) = pages.prompts.try_acquire() else {
        return text(
            StatusCode::TOO_MANY_REQUESTS,
            format!("{MAX_PROMPTS} prompts are being looked up already"),
        );
    };
    let Ok(body) = Limited::new(body, MAX_PROMPT_BYTES).collect().await else {
        return text(
            StatusCode::PAYLOAD_TOO_LARGE,
            format!("the body does not end within {MAX_PROMPT_BYTES} bytes"),
        );
    };
    match pages.index.explain(path, body.to_bytes()).await {
        Ok(value) => reply(StatusCode::OK, "application/json", value.to_string()),
        Err(refusal) => text(
            StatusCode::from_u16(refusal.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR),
            refusal.text,
        ),
    }
}

fn respond(method: &Method, path: &str, pages: &Pages) -> Response<Full<Bytes>> {
    let known = matches!(
        path,
        "/metrics" | "/debug/plugins/state" | "/healthz" | KV_INDEX
    );
    if !known {
        return reply(StatusCode::NOT_FOUND, "text/plain", "not found\n".into());
    }
    if method != Method::GET {
        return only("GET");
    }
    match path {
        "/metrics" => reply(
            StatusCode::OK,
            "text/plain; version=0.0.4; charset=utf-8",
            pages.exposition.render(),
        ),
        "/healthz" => reply(StatusCode::OK, "text/plain", "ok\n".into()),
        KV_INDEX => reply(
            StatusCode::OK,
            "application/json",
            pages.index.totals().to_string(),
        ),
        _ => reply(
            StatusCode::OK,
            "application/json",
            (pages.state)().to_string(),
        ),
    }
}

fn only(method: &'static str) -> Response<Full<Bytes>> {
    let mut response = reply(
        StatusCode::METHOD_NOT_ALLOWED,
        "text/plain",
        format!("only {method}\n"),
    );
    response
        .headers_mut()
        .insert(header::ALLOW, header::HeaderValue::from_static(method));
    response
}

fn reply(status: StatusCode, content_type: &'static str, body: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    response.headers_mut().insert(
        header::CONTENT_TYPE,
        header::HeaderValue::from_static(content_type),
    );
    response
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    struct View;

    impl IndexView for View {
        fn totals(&self) -> Value {
            json!({"totals": 1})
        }

        fn explain(&self, path: String, body: Bytes) -> Explained {
            Box::pin(async move {
                if body.is_empty() {
                    return Err(Refusal {
                        status: 400,
                        text: "empty".to_owned(),
                    });
                }
                Ok(json!({"path": path, "bytes": body.len()}))
            })
        }
    }

    fn pages() -> Pages {
        Pages::new(Exposition::empty(), Arc::new(|| json!({})), Arc::new(View))
    }

    async fn ask(pages: &Pages, method: Method, path: &str, body: Vec<u8>) -> (u16, String) {
        let request = Request::builder().method(method).uri(path);
        let request = request.body(Full::new(Bytes::from(body))).unwrap();
        let response = answer(request, pages).await;
        let status = response.status().as_u16();
        let body = response.into_body().collect().await.unwrap().to_bytes();
        (status, String::from_utf8(body.to_vec()).unwrap())
    }

    /// Lets GETs with a header pass.
    #[derive(Debug)]
    struct Door;

    impl Gate for Door {
        fn check<'a>(
            &'a self,
            method: &'a Method,
            path: &'a str,
            _: &'a HeaderMap,
        ) -> BoxFuture<'a, Result<(), Refused>> {
            let verdict = match path {
                _ if method == Method::POST => Err(Refused::Failed),
                "/metrics" => Ok(()),
                "/debug/kv-index" => Err(Refused::Denied("eve".to_owned())),
                _ => Err(Refused::Unauthenticated),
            };
            Box::pin(std::future::ready(verdict))
        }
    }

    #[tokio::test]
    async fn a_gate_stands_before_everything_but_health() {
        let pages = pages().behind(Some(Arc::new(Door)));
        for (method, path, status, text) in [
            (Method::GET, "/metrics", 200, ""),
            (Method::GET, "/healthz", 200, "ok\n"),
            (Method::GET, "/debug/plugins/state", 401, "Unauthorized\n"),
            (Method::GET, "/nothing", 401, "Unauthorized\n"),
            (
                Method::GET,
                "/debug/kv-index",
                403,
                "Authorization denied for user eve\n",
            ),
            (Method::POST, "/metrics", 500, "Authentication failed\n"),
        ] {
            let (got, body) = ask(&pages, method, path, Vec::new()).await;
            assert_eq!((got, body.as_str()), (status, text), "{path}");
        }
    }

    #[tokio::test]
    async fn only_get_and_only_known_paths() {
        let pages = pages();
        let status = async |method, path| ask(&pages, method, path, Vec::new()).await.0;
        assert_eq!(status(Method::GET, "/metrics").await, 200);
        assert_eq!(status(Method::GET, "/nothing").await, 404);
        assert_eq!(status(Method::POST, "/metrics").await, 405);
        assert_eq!(status(Method::GET, "/debug/kv-indexes").await, 404);
    }

    #[tokio::test]
    async fn the_index_is_asked_in_total_and_for_a_prompt() {
        let pages = pages();
        let (status, totals) = ask(&pages, Method::GET, "/debug/kv-index", Vec::new()).await;
        assert_eq!((status, totals.as_str()), (200, r#"{"totals":1}"#));
        let prompt = "/debug/kv-index/v1/completions";
        let (status, answer) = ask(&pages, Method::POST, prompt, b"{}".to_vec()).await;
        assert_eq!(
            (status, answer.as_str()),
            (200, r#"{"bytes":2,"path":"/v1/completions"}"#)
        );
        assert_eq!(
            ask(&pages, Method::POST, prompt, Vec::new()).await,
            (400, "empty\n".to_owned())
        );
        assert_eq!(ask(&pages, Method::GET, prompt, Vec::new()).await.0, 405);
    }

    #[tokio::test]
    async fn prompts_are_bounded_in_size_and_number() {
        let pages = pages();
        let prompt = "/debug/kv-index/v1/completions";
        let size = async |n| ask(&pages, Method::POST, prompt, vec![b' '; n]).await.0;
        assert_eq!(size(MAX_PROMPT_BYTES).await, 200);
        assert_eq!(size(MAX_PROMPT_BYTES + 1).await, 413);
        let _busy = pages.prompts.acquire_many(2).await.unwrap();
        assert_eq!(size(1).await, 429);
    }
}
