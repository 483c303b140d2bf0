//! The metrics port: `/metrics` and `/debug/plugins/state` over plain HTTP/1.1.

use std::convert::Infallible;
use std::sync::Arc;

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use super::metrics::Exposition;

/// Connections served at once; further ones wait in the accept queue.
const MAX_CONNECTIONS: usize = 256;

/// Makes the body of `/debug/plugins/state`.
pub type PluginState = Arc<dyn Fn() -> serde_json::Value + Send + Sync>;

/// Serves until `shutdown`. An accept error is logged and survived.
pub async fn serve(
    listener: TcpListener,
    exposition: Exposition,
    state: PluginState,
    shutdown: CancellationToken,
) {
    let permits = Arc::new(tokio::sync::Semaphore::new(MAX_CONNECTIONS));
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
        let (exposition, state) = (exposition.clone(), Arc::clone(&state));
        let shutdown = shutdown.clone();
        tokio::spawn(async move {
            let service = service_fn(move |request: Request<hyper::body::Incoming>| {
                let response = respond(request.method(), request.uri().path(), &exposition, &state);
                std::future::ready(Ok::<_, Infallible>(response))
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

fn respond(
    method: &Method,
    path: &str,
    exposition: &Exposition,
    state: &PluginState,
) -> Response<Full<Bytes>> {
    let known = matches!(path, "/metrics" | "/debug/plugins/state" | "/healthz");
    if !known {
        return reply(StatusCode::NOT_FOUND, "text/plain", "not found\n".into());
    }
    if method != Method::GET {
        let mut response = reply(
            StatusCode::METHOD_NOT_ALLOWED,
            "text/plain",
            "only GET\n".into(),
        );
        response
            .headers_mut()
            .insert(header::ALLOW, header::HeaderValue::from_static("GET"));
        return response;
    }
    match path {
        "/metrics" => reply(
            StatusCode::OK,
            "text/plain; version=0.0.4; charset=utf-8",
            exposition.render(),
        ),
        "/healthz" => reply(StatusCode::OK, "text/plain", "ok\n".into()),
        _ => reply(StatusCode::OK, "application/json", state().to_string()),
    }
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

    #[test]
    fn only_get_and_only_known_paths() {
        let exposition = Exposition::empty();
        let state: PluginState = Arc::new(|| serde_json::json!({}));
        let status = |method: Method, path| {
            respond(&method, path, &exposition, &state)
                .status()
                .as_u16()
        };
        assert_eq!(status(Method::GET, "/metrics"), 200);
        assert_eq!(status(Method::GET, "/nothing"), 404);
        assert_eq!(status(Method::POST, "/metrics"), 405);
    }
}
