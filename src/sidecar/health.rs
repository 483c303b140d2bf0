//! `GET /health`: whether the engine beside us would answer, which is what a probe wants to know.

use std::time::Duration;

use http::{Request, StatusCode, Uri};

use super::answer::{self, Answer};
use super::body::{AnswerBody, EngineBody};
use super::exchange::set_host;
use super::host_port::HostPort;
use super::metrics::Stage;
use super::proxy::Sidecar;

/// Longest wait for the engine; Kubernetes gives a probe one second by default.
const PROBE_TIMEOUT: Duration = Duration::from_millis(900);

/// Asks the engine for its health and answers the same, or 503 when it does not say.
pub(super) async fn probe(sidecar: &Sidecar, engine: &HostPort) -> Answer {
    let mut request = Request::new(EngineBody::empty());
    *request.uri_mut() = Uri::from_static("/health");
    set_host(request.headers_mut(), engine);
    let asking = async {
        let response = sidecar
            .engines
            .call(Stage::Decode, engine, request, None)
            .await
            .ok()?;
        let status = response.status();
        // Read to the end, so that the connection is kept.
        response.into_body().whole().await.ok()?;
        Some(status)
    };
    match tokio::time::timeout(PROBE_TIMEOUT, asking).await {
        Ok(Some(status)) if status.is_success() => {
            let mut answer = Answer::new(AnswerBody::whole("{}"));
            *answer.status_mut() = StatusCode::OK;
            answer
        }
        _ => answer::error(
            StatusCode::SERVICE_UNAVAILABLE,
            "ServiceUnavailable",
            "The engine is not healthy.",
        ),
    }
}
