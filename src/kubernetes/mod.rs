//! The Kubernetes control plane: which endpoints a pool has ([`discovery`]) and what operators say about
//! requests ([`rules`]), both from the API server's watches ([`watch`]); who leads ([`lease`]) and what only
//! a leader does ([`leading`]); who may read the metrics port ([`review`]).
//!
//! Everything here writes into snapshots that requests read; no request ever waits for the API server.
//! While it is away, what was known last stands.

pub mod allow_list;
pub mod client;
pub mod discovery;
pub mod leading;
pub mod lease;
pub mod objects;
mod pods;
pub mod pool;
pub mod review;
pub mod rules;
#[cfg(test)]
pub(crate) mod testing;
pub mod watch;

pub use allow_list::AllowList;
pub use client::{ClientError, ClientOptions, client};
pub use discovery::{KubernetesDiscovery, PoolSource};
pub use pods::endpoints as endpoints_of;

use http::{Request, StatusCode};
use http_body_util::{BodyExt, Limited};
use kube::Client;
use kube::client::Body;
use serde_json::Value;

/// Longest answer to a small request: a lease, a review.
const MAX_ANSWER_BYTES: usize = 1 << 20;

/// Sends a small request and reads the answer as JSON, whatever its status.
async fn ask(
    client: &Client,
    method: &str,
    path: &str,
    body: Vec<u8>,
) -> Result<(StatusCode, Value), String> {
    let request = Request::builder()
        .method(method)
        .uri(path)
        .header("content-type", "application/json")
        .body(Body::from(body))
        .map_err(|error| error.to_string())?;
    let response = client.send(request).await.map_err(|e| e.to_string())?;
    let status = response.status();
    let body = Limited::new(response.into_body(), MAX_ANSWER_BYTES);
    let body = body.collect().await.map_err(|e| e.to_string())?;
    let value = serde_json::from_slice(&body.to_bytes()).unwrap_or(Value::Null);
    Ok((status, value))
}
