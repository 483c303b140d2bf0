//! The metrics port over plain HTTP/1.1: `/metrics`, `/debug/plugins/state`, and `/debug/kv-index`, which
//! answers a GET with totals and a POST to `/debug/kv-index/<path of a request>` with what each endpoint
//! holds of the prompt in its body.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt, Full, Limited};
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use super::metrics::Exposition;

/// Connections served at once; further ones wait in the accept queue.
const MAX_CONNECTIONS: usize = 256;
/// Body of a prompt that is asked about; as long as the tokenizer reads.
const MAX_PROMPT_BYTES: usize = 32 << 20;
/// Prompts worked on at once; further ones are refused, for requests come first.
const MAX_PROMPTS: usize = 2;
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
        }
    }
}

/// Serves until `shutdown`. An accept error is logged and survived.
pub async fn serve(listener: TcpListener, pages: Pages, shutdown: CancellationToken) {
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
        let pages = pages.clone();
        let shutdown = shutdown.clone();
        tokio::spawn(async move {
            let service = service_fn(move |request: Request<hyper::body::Incoming>| {
                let pages = pages.clone();
                async move { Ok::<_, Infallible>(answer(request, &pages).await) }
            });
            let connection = hyper::server::conn::http1::Builder::new()
                .serve_connection(TokioIo::new(stream), service);
            tokio::select! {
                // A scraper that hangs up is none of our business.
                _ = connection => {}
                () = shutdown.cancelled() => {}
            }
            drop(permit);
        });
    }
}

async fn answer<B>(request: Request<B>, pages: &Pages) -> Response<Full<Bytes>>
where
    B: hyper::body::Body<Data = Bytes>,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let (head, body) = request.into_parts();
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
