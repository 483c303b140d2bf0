//! How a request is split: one file per way of handing a KV cache on.
//!
//! A connector makes the bodies, decides who is asked in which order, and what a failure means. It
//! knows nothing of sockets or headers of routing; calls are made through the
//! [`Exchange`](super::exchange::Exchange).

mod blake2s;
mod chunked;
mod encode;
mod mooncake;
mod moriio;
mod nixl;
mod offloading;
mod opening;
mod resolver;
mod sglang;
mod shared_storage;

use super::answer::Answer;
use super::exchange::{Exchange, Refusal};
use super::host_port::HostPort;
use super::metrics::Path;
use super::routing::Routing;
use super::settings::{KvConnector, Settings};

/// What connectors remember between requests.
#[derive(Debug, Default)]
pub(super) struct State {
    engine_ids: mooncake::EngineIds,
    resolver: resolver::Resolver,
}

/// Whether the choice of a local rank is the engine's own affair on this request.
pub(super) fn ignores_ranks(settings: &Settings, routing: &Routing) -> bool {
    settings.kv_connector == KvConnector::Sglang && !routing.prefill.is_empty()
}

/// Serves a request by the stages that its routing headers ask for: encode, then prefill, then decode.
pub(super) async fn serve(
    mut exchange: Exchange,
    encoders: &[HostPort],
) -> Result<Answer, Refusal> {
    if let Some(connector) = exchange.sidecar.settings.ec_connector
        && !encoders.is_empty()
    {
        encode::serve(&mut exchange, connector, encoders).await?;
    }
    if exchange.candidates.is_empty() {
        if exchange.kv_source.is_some() {
            return offloading::decode_alone(&exchange, Path::DecodeOnly).await;
        }
        if let Some(plan) = chunked::plan(&exchange) {
            return chunked::serve(exchange, plan, Path::DecodeOnly, Vec::new()).await;
        }
        return exchange.decode_alone(Path::DecodeOnly).await;
    }
    let sidecar = std::sync::Arc::clone(&exchange.sidecar);
    if let Some(moriio) = &sidecar.settings.moriio {
        return moriio::serve(&exchange, moriio).await;
    }
    match sidecar.settings.kv_connector {
        KvConnector::Nixlv2 => nixl::serve(exchange).await,
        KvConnector::SharedStorage => shared_storage::serve(&exchange).await,
        KvConnector::Sglang => sglang::serve(&exchange).await,
        KvConnector::Mooncake => mooncake::serve(&exchange).await,
        KvConnector::Offloading => offloading::serve(&exchange).await,
    }
}
