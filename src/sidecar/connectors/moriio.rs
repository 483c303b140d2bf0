//! `nixlv2` with MoRI-IO in WRITE mode: the prefill engine writes its blocks into the decode engine,
//! so it is told where that is; both engines agree on a data parallel rank by a hash.

use std::fmt::Write;

use bytes::Bytes;
use http::{HeaderName, HeaderValue};
use serde::Deserialize;
use serde_json::value::RawValue;
use uuid::Uuid;

use super::super::answer::Answer;
use super::super::body::AnswerBody;
use super::super::exchange::{Exchange, LegFailure, Refusal};
use super::super::host_port::HostPort;
use super::super::json::{Change, Field, Object, quoted, splice};
use super::super::metrics::Path;
use super::super::prompt::Limits;
use super::super::routing::DATA_PARALLEL_RANK;
use super::super::settings::MoriIo;
use super::blake2s;

/// What one transfer is known by.
struct Transfer {
    id: Uuid,
    rank: u64,
}

impl Transfer {
    fn new(moriio: &MoriIo) -> Self {
        let id = Uuid::new_v4();
        Self {
            rank: rank_of(&id.to_string(), moriio.dp_size),
            id,
        }
    }

    /// The rank, for engines that have several.
    fn headers(&self, moriio: &MoriIo) -> Vec<(HeaderName, HeaderValue)> {
        let several = moriio.dp_size > 1;
        let header = (DATA_PARALLEL_RANK, HeaderValue::from(self.rank));
        several.then_some(header).into_iter().collect()
    }
}

/// The rank of a transfer: the first eight bytes of its hash, modulo their number.
fn rank_of(id: &str, dp_size: u64) -> u64 {
    if dp_size <= 1 {
        return 0;
    }
    let hash = blake2s::hash(id.as_bytes());
    let first = hash.first_chunk::<8>().copied().unwrap_or_default();
    u64::from_be_bytes(first) % dp_size
}

/// Tries the candidates in turn.
pub(super) async fn serve(exchange: &Exchange, moriio: &MoriIo) -> Result<Answer, Refusal> {
    let mut attempts = exchange.attempts();
    while let Some(target) = attempts.next() {
        let transfer = Transfer::new(moriio);
        let params = (
            Field::KvTransferParams,
            Some(sending(exchange, moriio, &transfer).await),
        );
        let body = exchange.prompt.single_token(Limits::Exact, &[params]);
        let headers = transfer.headers(moriio);
        let outcome = if moriio.parallel_dispatch {
            let fetching = receiving(exchange, moriio, target, &transfer).await;
            let decode = exchange
                .prompt
                .with(&[(Field::KvTransferParams, Some(fetching))]);
            let limit = Some(moriio.parallel_decode_wait_timeout);
            exchange
                .both_within(limit, target, (&body, &headers), (decode, &headers))
                .await?
        } else {
            match exchange.prefill(target, &body, &headers).await {
                Ok(answer) => match completed(exchange, moriio, &transfer, &answer).await {
                    Ok((params, rank)) => Ok(decode(exchange, moriio, params, rank).await?),
                    Err(failure) => Err(failure),
                },
                Err(failure) => Err(failure),
            }
        };
        match outcome {
            Ok(answer) => {
                exchange.sidecar.metrics().served(Path::PrefillDecode);
                return Ok(answer);
            }
            Err(failure) => attempts.failed(target, failure)?,
        }
    }
    attempts.or_local()?;
    exchange.decode_alone(Path::LocalPrefill).await
}

async fn decode(
    exchange: &Exchange,
    moriio: &MoriIo,
    params: Bytes,
    rank: u64,
) -> Result<Answer, Refusal> {
    let body = exchange
        .prompt
        .with(&[(Field::KvTransferParams, Some(params))]);
    let header = (DATA_PARALLEL_RANK, HeaderValue::from(rank));
    let headers: &[_] = if moriio.dp_size > 1 { &[header] } else { &[] };
    let response = exchange.decode(body, headers).await?;
    Ok(response.map(AnswerBody::leg))
}

/// `,"remote_hosts":[...],"remote_dp_size_local":n` where engines span hosts.
async fn spread(exchange: &Exchange, moriio: &MoriIo, hosts: &[String]) -> String {
    if hosts.len() < 2 {
        return String::new();
    }
    format!(
        ",\"remote_hosts\":{},\"remote_dp_size_local\":{}",
        host_list(exchange, hosts).await,
        moriio.dp_size_local
    )
}

async fn host_list(exchange: &Exchange, hosts: &[String]) -> String {
    let mut out = String::from("[");
    for host in hosts {
        let address = exchange.sidecar.connectors.resolver.address(host).await;
        let comma = if out.len() == 1 { "" } else { "," };
        let _ = write!(out, "{comma}{}", text(&address));
    }
    out.push(']');
    out
}

fn text(value: &str) -> String {
    serde_json::Value::from(value).to_string()
}

/// What the prefill engine is told: where to write.
async fn sending(exchange: &Exchange, moriio: &MoriIo, transfer: &Transfer) -> Bytes {
    format!(
        r#"{{"do_remote_decode":true,"do_remote_prefill":false,"remote_engine_id":null,"remote_block_ids":null,"remote_host":{},"remote_port":null,"remote_notify_port":{},"remote_dp_rank":{},"remote_dp_rank_override":true,"remote_handshake_port":{},"transfer_id":"tx{}","tp_size":{},"remote_dp_size":{}{}}}"#,
        text(&moriio.local_pod_ip),
        moriio.decode_notify_port,
        transfer.rank,
        moriio.decode_handshake_port,
        transfer.id,
        moriio.tp_size,
        moriio.dp_size,
        spread(exchange, moriio, &moriio.decode_hosts).await,
    )
    .into()
}

/// What the decode engine is told when nothing is known of the prefill yet.
async fn receiving(
    exchange: &Exchange,
    moriio: &MoriIo,
    target: &HostPort,
    transfer: &Transfer,
) -> Bytes {
    let host = exchange
        .sidecar
        .connectors
        .resolver
        .address(target.host())
        .await;
    let port = moriio.prefill_handshake_port;
    format!(
        r#"{{"do_remote_prefill":true,"do_remote_decode":false,"remote_engine_id":{},"remote_block_ids":[],"remote_host":{},"remote_port":{port},"remote_notify_port":{},"remote_dp_rank":{},"remote_dp_rank_override":true,"remote_handshake_port":{port},"transfer_id":"tx{}","tp_size":{},"remote_dp_size":{}{}}}"#,
        text(&format!("{host}:{port}")),
        text(&host),
        moriio.prefill_notify_port,
        transfer.rank,
        transfer.id,
        moriio.tp_size,
        moriio.dp_size,
        spread(exchange, moriio, &moriio.remote_hosts).await,
    )
    .into()
}

#[derive(Deserialize)]
struct PrefillAnswer<'a> {
    #[serde(borrow)]
    kv_transfer_params: Option<&'a RawValue>,
}

/// The prefill's parameters with what they leave out, and the rank they settle on.
async fn completed(
    exchange: &Exchange,
    moriio: &MoriIo,
    transfer: &Transfer,
    answer: &[u8],
) -> Result<(Bytes, u64), LegFailure> {
    let answer: PrefillAnswer<'_> = serde_json::from_slice(answer)
        .map_err(|_| LegFailure::Garbage("the prefill answer is not JSON"))?;
    let params = answer
        .kv_transfer_params
        .ok_or(LegFailure::Garbage("no kv_transfer_params"))?;
    let params = Bytes::copy_from_slice(params.get().as_bytes());
    let object = Object::parse(&params)
        .map_err(|_| LegFailure::Garbage("kv_transfer_params is not an object"))?;
    let told = object
        .value(Field::RemoteDpRank)
        .and_then(|range| std::str::from_utf8(params.get(range)?).ok()?.parse().ok());
    let rank = told
        .filter(|rank| *rank < moriio.dp_size.max(1))
        .unwrap_or(transfer.rank);
    let mut changes: Vec<Change> = vec![
        (Field::RemoteDpRank, Some(rank.to_string().into())),
        (
            Field::RemoteDpRankOverride,
            Some(Bytes::from_static(b"true")),
        ),
    ];
    let mut absent = vec![
        (Field::TransferId, quoted(&format!("tx{}", transfer.id))),
        (
            Field::RemoteNotifyPort,
            moriio.prefill_notify_port.to_string().into(),
        ),
        (
            Field::RemoteHandshakePort,
            moriio.prefill_handshake_port.to_string().into(),
        ),
        (Field::RemoteDpSize, moriio.dp_size.to_string().into()),
    ];
    if moriio.remote_hosts.len() > 1 {
        let hosts = host_list(exchange, &moriio.remote_hosts).await;
        absent.push((Field::RemoteHosts, hosts.into()));
        absent.push((
            Field::RemoteDpSizeLocal,
            moriio.dp_size_local.to_string().into(),
        ));
    }
    for (field, value) in absent {
        if object.value(field).is_none() {
            changes.push((field, Some(value)));
        }
    }
    let mut splices = Vec::new();
    object.change(&changes, &mut splices);
    Ok((splice(&params, splices).concat().into(), rank))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rank_is_a_hash_of_the_transfer() {
        // BLAKE2s-256("abc") begins 50 8c 5e 8c 32 7c 14 e2: 0x508c5e8c327c14e2 mod 7.
        assert_eq!(rank_of("abc", 7), 0x508c_5e8c_327c_14e2 % 7);
        assert_eq!(rank_of("abc", 1), 0);
        assert_eq!(rank_of("abc", 0), 0);
    }
}
