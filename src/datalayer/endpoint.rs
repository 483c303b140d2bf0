//! One `ip:port` that serves a model, what its engine last reported, and what was sent to it since.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::time::Duration;

use arc_swap::ArcSwap;
use bytes::Bytes;
use tokio::time::Instant;

use super::attributes::EndpointAttributes;
use crate::plugin::{EndpointColumn, InFlightSlot, MAX_IN_FLIGHT_PRODUCERS};

/// What discovery says about an endpoint. Two specs with equal fields describe the same endpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EndpointSpec {
    /// Unique within the namespace; for Kubernetes `<pod>-rank-<port index>`.
    pub name: String,
    /// Namespace, `default` outside Kubernetes.
    pub namespace: String,
    /// Where requests go.
    pub address: SocketAddr,
    /// Labels, for role and label filters and the engine type.
    pub labels: BTreeMap<String, String>,
    /// Data-parallel rank: index of the port among the pool's target ports.
    pub rank: u32,
    /// What else discovery knows; all absent for a plain address.
    pub details: EndpointDetails,
}

/// Facts about an endpoint that only some kinds of discovery know.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct EndpointDetails {
    /// Address of the node it runs on, for exporters that serve a whole node.
    pub node_address: Option<IpAddr>,
    /// Host name it was given (`spec.hostname` of a pod).
    pub hostname: Option<String>,
    /// The name that `address` was resolved from; scrapes over TLS check the certificate against it.
    pub dns_name: Option<String>,
    /// IP address or name that serves its metrics, instead of its own.
    pub metrics_host: Option<String>,
    /// Port that serves its metrics, instead of its own.
    pub metrics_port: Option<u16>,
    /// Tells one life of the engine from the next under the same name and address: its caches are
    /// empty after a restart. `None` when discovery cannot know.
    pub incarnation: Option<String>,
}

impl EndpointSpec {
    /// The pod behind the endpoint: the name without its rank.
    pub fn pod_name(&self) -> &str {
        let suffix = format!("-rank-{}", self.rank);
        self.name.strip_suffix(&suffix).unwrap_or(&self.name)
    }
}

/// Dense number of a live endpoint: at most the pool size, reused only after every
/// [`super::EndpointListener`] has forgotten the previous holder.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct EndpointIndex(pub u32);

/// An endpoint while it is in the pool. Shared by the store, requests and background tasks.
#[derive(Debug)]
pub struct Endpoint {
    /// As discovered.
    pub spec: EndpointSpec,
    /// Dense index for per-endpoint tables.
    pub index: EndpointIndex,
    /// `ip:port` (IPv6 bracketed), ready to be a header value.
    pub host_port: Bytes,
    /// Last scrape; [`EngineMetrics::default`] before the first.
    metrics: ArcSwap<EngineMetrics>,
    attributes: EndpointAttributes,
    /// Outlives a change of labels, which makes a new `Endpoint`.
    shared: Arc<Shared>,
}

/// What an endpoint has in common with its former self under other labels: bookings made on the one
/// are released on the other.
#[derive(Debug, Default)]
struct Shared {
    in_flight: [InFlightLoad; MAX_IN_FLIGHT_PRODUCERS],
    removed: AtomicBool,
}

impl Endpoint {
    /// A new endpoint without metrics or load. Called by the store; public for benches and tests.
    pub fn new(spec: EndpointSpec, index: EndpointIndex) -> Self {
        Self {
            host_port: Bytes::from(spec.address.to_string()),
            spec,
            index,
            metrics: ArcSwap::from_pointee(EngineMetrics::default()),
            attributes: EndpointAttributes::default(),
            shared: Arc::default(),
        }
    }

    /// The same engine with the labels of `spec`: same index and load, metrics and attributes as they
    /// are now.
    pub(super) fn relabelled(&self, spec: EndpointSpec) -> Self {
        Self {
            host_port: self.host_port.clone(),
            spec,
            index: self.index,
            metrics: ArcSwap::new(self.metrics()),
            attributes: self.attributes.copied(),
            shared: Arc::clone(&self.shared),
        }
    }

    /// `ip:port` as text.
    pub fn host_port_str(&self) -> &str {
        std::str::from_utf8(&self.host_port).unwrap_or_default()
    }

    /// The last scrape.
    pub fn metrics(&self) -> Arc<EngineMetrics> {
        self.metrics.load_full()
    }

    /// Makes `held` the last scrape.
    pub fn refresh_metrics(&self, held: &mut Arc<EngineMetrics>) {
        let current = self.metrics.load();
        if !Arc::ptr_eq(&current, held) {
            *held = Arc::clone(&current);
        }
    }

    /// Publishes a scrape.
    pub fn set_metrics(&self, metrics: EngineMetrics) {
        self.metrics.store(Arc::new(metrics));
    }

    /// What its producer last put under `column`; `None` before the first time. No lock.
    pub fn attribute<T: Send + Sync + 'static>(&self, column: EndpointColumn<T>) -> Option<Arc<T>> {
        self.attributes.get(column)
    }

    /// A copy of a small value, without touching its reference count.
    pub fn attribute_value<T: Copy + Send + Sync + 'static>(
        &self,
        column: EndpointColumn<T>,
    ) -> Option<T> {
        self.attributes.value(column)
    }

    /// Replaces the value under `column`. Readers see either the old one or the new one.
    pub fn set_attribute<T: Send + Sync + 'static>(
        &self,
        column: EndpointColumn<T>,
        value: Arc<T>,
    ) {
        self.attributes.set(column, value);
    }

    /// Live load booked by the producer that owns `slot`.
    pub fn in_flight(&self, slot: InFlightSlot) -> &InFlightLoad {
        &self.shared.in_flight[slot.position() % MAX_IN_FLIGHT_PRODUCERS]
    }

    /// True once discovery dropped the endpoint: nothing new may be recorded under its index.
    pub fn is_removed(&self) -> bool {
        self.shared.removed.load(Ordering::Acquire)
    }

    /// Marks the endpoint as gone; called by the store before listeners are told.
    pub(super) fn mark_removed(&self) {
        self.shared.removed.store(true, Ordering::Release);
    }
}

/// Requests and prompt tokens sent to an endpoint and not yet answered.
#[derive(Debug, Default)]
pub struct InFlightLoad {
    requests: AtomicI64,
    tokens: AtomicI64,
}

impl InFlightLoad {
    /// Adds; paired with exactly one [`Self::release`] by a guard.
    pub fn book(&self, requests: i64, tokens: i64) {
        self.requests.fetch_add(requests, Ordering::Relaxed);
        self.tokens.fetch_add(tokens, Ordering::Relaxed);
    }

    /// Takes back what was booked.
    pub fn release(&self, requests: i64, tokens: i64) {
        self.requests.fetch_sub(requests, Ordering::Relaxed);
        self.tokens.fetch_sub(tokens, Ordering::Relaxed);
    }

    /// Requests in flight, never below zero.
    pub fn requests(&self) -> i64 {
        self.requests.load(Ordering::Relaxed).max(0)
    }

    /// Tokens in flight, never below zero.
    pub fn tokens(&self) -> i64 {
        self.tokens.load(Ordering::Relaxed).max(0)
    }
}

/// What one scrape told. Fields an engine does not report keep their previous value.
#[derive(Debug, Clone, Default)]
pub struct EngineMetrics {
    /// Requests waiting in the engine's queue.
    pub waiting_requests: u32,
    /// Requests the engine is running.
    pub running_requests: u32,
    /// Share of KV blocks held by running requests, `0..=1`.
    pub kv_cache_usage: f64,
    /// Tokens per engine KV block, when reported.
    pub block_size_tokens: Option<u32>,
    /// KV blocks of the engine, when reported.
    pub kv_blocks: Option<u32>,
    /// LoRA adapters, when reported.
    pub lora: Option<Arc<LoraState>>,
    /// When a core field was last refreshed; `None` before the first successful scrape.
    pub updated_at: Option<Instant>,
}

impl EngineMetrics {
    /// True when the last refresh is at most `threshold` before `now`.
    pub fn is_fresh(&self, now: Instant, threshold: Duration) -> bool {
        self.updated_at
            .is_some_and(|at| now.saturating_duration_since(at) <= threshold)
    }
}

/// LoRA adapters of an engine.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LoraState {
    /// Loaded and serving.
    pub active: Vec<String>,
    /// Requested, not loaded yet.
    pub waiting: Vec<String>,
    /// How many fit at once.
    pub max_active: u32,
}
