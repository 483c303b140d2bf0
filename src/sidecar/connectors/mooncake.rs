//! `mooncake`: both engines at once, told of each other by an id and the prefill engine's bootstrap
//! server.

use std::time::Duration;

use bytes::Bytes;
use hashbrown::HashMap;
use http::{HeaderValue, Request, Uri};
use parking_lot::Mutex;
use serde::Deserialize;
use tokio::time::Instant;

use super::super::answer::Answer;
use super::super::body::EngineBody;
use super::super::engines::CallError;
use super::super::exchange::{Exchange, LegFailure, Refusal, set_host};
use super::super::host_port::HostPort;
use super::super::json::{Field, quoted};
use super::super::metrics::{Path, Stage};
use super::super::prompt::Limits;
use super::super::routing::DATA_PARALLEL_RANK;

/// Time for a bootstrap server's answer.
const QUERY_TIMEOUT: Duration = Duration::from_secs(5);
/// Age at which ids are asked for again: a pod that restarted has new ones.
const ID_AGE: Duration = Duration::from_secs(30);
/// Prefill endpoints whose ids are kept.
const MAX_KNOWN: usize = 1024;

/// Engine ids by rank.
type Ids = Vec<(u32, String)>;

/// Engine ids of prefill endpoints.
#[derive(Debug, Default)]
pub(super) struct EngineIds(Mutex<HashMap<HostPort, (Instant, Ids)>>);

impl EngineIds {
    fn get(&self, target: &HostPort) -> Option<Ids> {
        let known = self.0.lock();
        let (asked, ids) = known.get(target)?;
        (asked.elapsed() < ID_AGE).then(|| ids.clone())
    }

    fn put(&self, target: &HostPort, ids: Ids) {
        let mut known = self.0.lock();
        if known.len() >= MAX_KNOWN && !known.contains_key(target) {
            let oldest = known.iter().min_by_key(|(_, (asked, _))| *asked);
            if let Some(oldest) = oldest.map(|(target, _)| target.clone()) {
                known.remove(&oldest);
            }
        }
        known.insert(target.clone(), (Instant::now(), ids));
    }

    fn forget(&self, target: &HostPort) {
        self.0.lock().remove(target);
    }
}

#[derive(Deserialize)]
struct Described {
    engine_id: String,
}

/// Tries the candidates in turn.
pub(super) async fn serve(exchange: &Exchange) -> Result<Answer, Refusal> {
    let mut attempts = exchange.attempts();
    while let Some(target) = attempts.next() {
        let failure = match ids(exchange, target).await {
            Ok(ids) => match attempt(exchange, target, &ids).await? {
                Ok(answer) => {
                    exchange.sidecar.metrics().served(Path::PrefillDecode);
                    return Ok(answer);
                }
                Err(failure) => {
                    exchange.sidecar.connectors.engine_ids.forget(target);
                    failure
                }
            },
            Err(failure) => failure,
        };
        attempts.failed(target, failure)?;
    }
    attempts.or_local()?;
    exchange.decode_alone(Path::LocalPrefill).await
}

async fn attempt(
    exchange: &Exchange,
    target: &HostPort,
    ids: &[(u32, String)],
) -> Result<Result<Answer, LegFailure>, Refusal> {
    let Some((rank, id)) = ids.get(fastrand::usize(..ids.len().max(1))) else {
        return Ok(Err(LegFailure::Garbage(
            "the bootstrap server knows no engine",
        )));
    };
    let transfer = format!("\"xfer-{}\"", uuid::Uuid::new_v4());
    let sending = format!(
        r#"{{"do_remote_prefill":false,"do_remote_decode":true,"transfer_id":{transfer}}}"#
    );
    let bootstrap = target.with_port(exchange.sidecar.settings.mooncake_bootstrap_port);
    let mut fetching = format!(
        r#"{{"do_remote_prefill":true,"do_remote_decode":false,"transfer_id":{transfer},"remote_bootstrap_addr":"http://{bootstrap}","remote_engine_id":"#
    )
    .into_bytes();
    fetching.extend_from_slice(&quoted(id));
    fetching.push(b'}');
    let prefill = exchange.prompt.single_token(
        Limits::Present,
        &[(Field::KvTransferParams, Some(sending.into()))],
    );
    let decode = exchange
        .prompt
        .with(&[(Field::KvTransferParams, Some(fetching.into()))]);
    let rank = [(DATA_PARALLEL_RANK, HeaderValue::from(*rank))];
    exchange
        .both(target, (&prefill, &rank), (decode, &[]))
        .await
}

async fn ids(exchange: &Exchange, target: &HostPort) -> Result<Ids, LegFailure> {
    let known = &exchange.sidecar.connectors.engine_ids;
    if let Some(ids) = known.get(target) {
        return Ok(ids);
    }
    let bootstrap = target.with_port(exchange.sidecar.settings.mooncake_bootstrap_port);
    let asking = query(exchange, &bootstrap);
    let answer = tokio::time::timeout(QUERY_TIMEOUT, asking)
        .await
        .unwrap_or(Err(CallError::Timeout(QUERY_TIMEOUT).into()))?;
    let described: std::collections::BTreeMap<u32, Described> = serde_json::from_slice(&answer)
        .map_err(|_| LegFailure::Garbage("the bootstrap answer has another form"))?;
    let ids: Ids = described
        .into_iter()
        .map(|(rank, engine)| (rank, engine.engine_id))
        .collect();
    known.put(target, ids.clone());
    Ok(ids)
}

async fn query(exchange: &Exchange, bootstrap: &HostPort) -> Result<Bytes, LegFailure> {
    let mut request = Request::new(EngineBody::empty());
    *request.uri_mut() = Uri::from_static("/query");
    set_host(request.headers_mut(), bootstrap);
    let engines = &exchange.sidecar.engines;
    let response = engines
        .call(Stage::Bootstrap, bootstrap, request, None)
        .await?;
    if !response.status().is_success() {
        return Err(LegFailure::Garbage("the bootstrap server refused"));
    }
    Ok(response.into_body().whole().await?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn ids_grow_old_and_are_bounded() {
        let ids = EngineIds::default();
        let target = |n: usize| HostPort::new(&format!("host-{n}"), 1).unwrap();
        ids.put(&target(0), vec![(0, "a".to_owned())]);
        tokio::time::advance(ID_AGE / 2).await;
        assert!(ids.get(&target(0)).is_some());
        for n in 1..=MAX_KNOWN {
            ids.put(&target(n), Vec::new());
        }
        assert_eq!(ids.0.lock().len(), MAX_KNOWN);
        assert!(ids.get(&target(0)).is_none(), "the oldest went");
        tokio::time::advance(ID_AGE).await;
        assert!(ids.get(&target(1)).is_none());
    }
}
