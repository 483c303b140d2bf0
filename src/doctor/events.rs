//! KV events: subscribes to every endpoint for a while, with the picker's own subscriber.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::time::Duration;

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::finding::Report;
use crate::datalayer::{EndpointIndex, EndpointSpec};
use crate::kvcache::events::pool::{PublisherKey, SubscriberPool};
use crate::kvcache::events::stats::StatsSnapshot;
use crate::kvcache::events::subscriber::{Source, SubscriberOptions};
use crate::kvcache::events::{Batch, EventSink, StreamState};

/// How often the subscribers are looked at.
const LOOK_INTERVAL: Duration = Duration::from_millis(50);

/// Where endpoints publish, and for how long to listen.
#[derive(Debug, Clone, Copy)]
pub struct Events {
    /// PUB socket of rank 0, unless an endpoint's label says otherwise.
    pub port: u16,
    /// ROUTER socket of rank 0; 0 for none.
    pub replay_port: u16,
    /// Longest wait for the first event of every endpoint.
    pub wait: Duration,
}

/// Keeps nothing: the subscriber counts.
struct Discard;

impl EventSink for Discard {
    fn apply(&mut self, _: &Batch<'_>) {}

    fn reset(&mut self) {}

    fn set_state(&mut self, _: StreamState) {}
}

/// Listens to every rank of every endpoint until each was heard or the wait is over.
pub async fn check(endpoints: &[EndpointSpec], events: Events, report: &mut Report) {
    let pool = SubscriberPool::new(SubscriberOptions::default(), CancellationToken::new());
    let mut dialled = BTreeSet::new();
    for (index, endpoint) in (0..).zip(endpoints) {
        let name = endpoint.address.to_string();
        let source = Source::of_endpoint(endpoint, events.port, events.replay_port);
        let Some(source) = source else {
            report.error(
                "kv-events",
                format!("KV events of {name}"),
                format!(
                    "rank {} has no port: {} and the rank",
                    endpoint.rank, events.port
                ),
                "publish on a lower port: that of each rank is counted up from it",
            );
            continue;
        };
        // Endpoints without ranks of their own share the publisher of their address.
        if !dialled.insert(source.live) {
            continue;
        }
        let key = PublisherKey {
            endpoint: EndpointIndex(index),
            rank: endpoint.rank,
        };
        if let Err(full) = pool.add(key, &name, source, Box::new(Discard)) {
            report.warning(
                "kv-events",
                format!("KV events of {name}"),
                format!("not listened to: {full}"),
                "look at a part of the pool",
            );
            break;
        }
    }
    let deadline = Instant::now() + events.wait;
    while Instant::now() < deadline {
        if pool
            .entries()
            .iter()
            .all(|e| e.stats.snapshot().applied > 0)
        {
            break;
        }
        tokio::time::sleep(LOOK_INTERVAL).await;
    }
    for entry in pool.entries().iter() {
        verdict(entry.source.live, &entry.stats.snapshot(), events, report);
    }
    pool.shutdown().await;
}

fn verdict(address: SocketAddr, seen: &StatsSnapshot, events: Events, report: &mut Report) {
    let subject = format!("KV events {address}");
    let start = "start vLLM with --kv-events-config '{\"enable_kv_cache_events\":true,\"publisher\":\"zmq\",\"endpoint\":\"tcp://*:5557\",\"topic\":\"kv@<pod ip>@<model>\"}'";
    if seen.state == StreamState::Down {
        report.error("kv-events", subject, "no connection", start);
    } else if seen.bad_frames > 0 || seen.bad_payloads > 0 || seen.malformed_events > 0 {
        report.error(
            "kv-events",
            subject,
            format!(
                "{} messages and {} events cannot be read",
                seen.bad_frames + seen.bad_payloads,
                seen.malformed_events
            ),
            "the engine's release publishes another format: keep exact prefix matching off for it and report the release",
        );
    } else if seen.applied == 0 {
        report.warning(
            "kv-events",
            subject,
            format!("connected, but no event in {:?}", events.wait),
            "events come when blocks are stored: send a prompt longer than one block and look again, with --wait 30s; if none comes, prefix caching is off or enable_kv_cache_events is not set",
        );
    } else {
        report.ok(
            "kv-events",
            subject,
            format!("{} batches, {} events", seen.applied, seen.events),
        );
    }
}
