//! `offloading`: vLLM's OffloadingConnector with its peer-to-peer tier. Prefill first; both engines
//! know the blocks by one id.

use bytes::Bytes;

use super::super::answer::Answer;
use super::super::body::AnswerBody;
use super::super::exchange::{Exchange, Refusal};
use super::super::host_port::HostPort;
use super::super::json::{Field, quoted};
use super::super::metrics::Path;
use super::super::prompt::Limits;
use super::super::settings::{KvConnector, Settings};

/// Prefill at the first candidate that can, then decode here.
pub(super) async fn serve(exchange: &Exchange) -> Result<Answer, Refusal> {
    let settings = &exchange.sidecar.settings;
    let mut attempts = exchange.attempts();
    while let Some(target) = attempts.next() {
        let id = uuid::Uuid::new_v4();
        let source = source_for(exchange, target).map_or_else(String::new, |source| {
            format!(",\"remote_kv_source\":{source}")
        });
        let sending = format!(r#"{{"remote_decoder":{{"kv_request_id":"{id}"}}{source}}}"#);
        let body = exchange.prompt.single_token(
            Limits::Present,
            &[(Field::KvTransferParams, Some(sending.into()))],
        );
        match exchange.prefill(target, &body, &[]).await {
            Ok(_) => {
                let peer = peer(settings, target, &id.to_string());
                let fetching = format!(r#"{{"remote_prefiller":{peer}}}"#);
                return decode(exchange, fetching.into(), Path::PrefillDecode).await;
            }
            Err(failure) => attempts.failed(target, failure)?,
        }
    }
    attempts.or_local()?;
    decode_alone(exchange, Path::LocalPrefill).await
}

/// Decode here, with a prefix from the peer that the picker named if it is another than this one.
pub(super) async fn decode_alone(exchange: &Exchange, path: Path) -> Result<Answer, Refusal> {
    let settings = &exchange.sidecar.settings;
    let here = |source: &HostPort| {
        settings.pod_ip.as_deref() == Some(source.host())
            && settings.port.checked_add(exchange.rank) == Some(source.port())
    };
    match exchange.kv_source.as_ref().filter(|source| !here(source)) {
        Some(source) if pulls(settings) => {
            let peer = peer(settings, source, &uuid::Uuid::new_v4().to_string());
            let params = format!(r#"{{"remote_kv_source":{peer}}}"#);
            decode(exchange, params.into(), path).await
        }
        _ => exchange.decode_alone(path).await,
    }
}

/// Whether engines can fetch from a peer.
fn pulls(settings: &Settings) -> bool {
    match settings.kv_connector {
        KvConnector::Offloading => true,
        KvConnector::Nixlv2 => settings.enable_p2p_pull,
        KvConnector::SharedStorage | KvConnector::Sglang | KvConnector::Mooncake => false,
    }
}

/// What a prefill at `target` is told of the peer that has the prefix.
pub(super) fn source_for(exchange: &Exchange, target: &HostPort) -> Option<String> {
    let settings = &exchange.sidecar.settings;
    let source = exchange
        .kv_source
        .as_ref()
        .filter(|source| *source != target)?;
    pulls(settings).then(|| peer(settings, source, &uuid::Uuid::new_v4().to_string()))
}

/// An engine's peer-to-peer tier: each rank has its own port.
fn peer(settings: &Settings, target: &HostPort, id: &str) -> String {
    let rank = target
        .port()
        .checked_sub(settings.port)
        .filter(|rank| *rank < settings.data_parallel_size)
        .unwrap_or(0);
    let port = settings.p2p_connector_port.saturating_add(rank);
    let host = quoted(target.host());
    format!(
        r#"{{"kv_request_id":"{id}","remote_host":{},"remote_port":{port}}}"#,
        String::from_utf8_lossy(&host)
    )
}

async fn decode(exchange: &Exchange, params: Bytes, path: Path) -> Result<Answer, Refusal> {
    let body = exchange
        .prompt
        .with(&[(Field::KvTransferParams, Some(params))]);
    let response = exchange.decode(body, &[]).await?;
    exchange.sidecar.metrics().served(path);
    Ok(response.map(AnswerBody::leg))
}
