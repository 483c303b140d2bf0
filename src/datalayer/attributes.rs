//! Values that plugins keep on endpoints, and the numbers that configuration addresses by name.

use std::any::Any;
use std::sync::Arc;

use arc_swap::ArcSwap;

use super::{Endpoint, EngineMetrics};
use crate::plugin::{DataKeys, EndpointColumn, PluginError};

/// Producer name of the core metrics and of custom scalars, whatever the extractor is called.
pub const CORE_METRICS_PRODUCER: &str = "core-metrics-extractor";
/// Share of KV blocks in use.
pub const KV_CACHE_USAGE: &str = "KVCacheUsagePercent";
/// Requests waiting in the engine.
pub const WAITING_QUEUE_SIZE: &str = "WaitingQueueSize";
/// Requests the engine runs.
pub const RUNNING_REQUESTS_SIZE: &str = "RunningRequestsSize";
/// LoRA adapters that serve.
pub const ACTIVE_MODELS: &str = "ActiveModels";
/// LoRA adapters that are asked for and not loaded.
pub const WAITING_MODELS: &str = "WaitingModels";

type Slot = Option<Arc<dyn Any + Send + Sync>>;

/// The attributes of one endpoint: a small immutable table, replaced whole by each write.
///
/// A write copies at most [`crate::plugin::MAX_ENDPOINT_COLUMNS`] pointers, a read takes no lock. The
/// table is as long as the highest slot that was ever written.
#[derive(Default)]
pub(super) struct EndpointAttributes {
    table: ArcSwap<Vec<Slot>>,
}

impl std::fmt::Debug for EndpointAttributes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let set = self.table.load().iter().flatten().count();
        write!(f, "EndpointAttributes({set} set)")
    }
}

impl EndpointAttributes {
    /// The values as they are now, in a table of their own.
    pub(super) fn copied(&self) -> Self {
        Self {
            table: ArcSwap::new(self.table.load_full()),
        }
    }

    pub(super) fn get<T: Send + Sync + 'static>(
        &self,
        column: EndpointColumn<T>,
    ) -> Option<Arc<T>> {
        let value = self.table.load().get(column.position())?.clone()?;
        value.downcast().ok()
    }

    pub(super) fn value<T: Copy + Send + Sync + 'static>(
        &self,
        column: EndpointColumn<T>,
    ) -> Option<T> {
        let table = self.table.load();
        let value = table.get(column.position())?.as_ref()?;
        value.downcast_ref().copied()
    }

    pub(super) fn set<T: Send + Sync + 'static>(&self, column: EndpointColumn<T>, value: Arc<T>) {
        let value: Arc<dyn Any + Send + Sync> = value;
        // Several sources may write at once; each retries on the other's table.
        self.table.rcu(|table| {
            let mut next = Vec::clone(table);
            if next.len() <= column.position() {
                next.resize(column.position() + 1, None);
            }
            if let Some(slot) = next.get_mut(column.position()) {
                *slot = Some(Arc::clone(&value));
            }
            next
        });
    }
}

/// A number of an endpoint, looked up by attribute and producer name once, at start.
#[derive(Debug, Clone, Copy)]
pub enum ScalarRef {
    /// A field of the scraped metrics.
    Core(CoreMetric),
    /// A number that some producer keeps on the endpoint.
    Attribute(EndpointColumn<f64>),
}

/// A core metric as a number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CoreMetric {
    /// [`KV_CACHE_USAGE`], `0..=1`.
    KvCacheUsage,
    /// [`WAITING_QUEUE_SIZE`].
    WaitingRequests,
    /// [`RUNNING_REQUESTS_SIZE`].
    RunningRequests,
    /// How many [`ACTIVE_MODELS`] there are.
    ActiveModels,
    /// How many [`WAITING_MODELS`] there are.
    WaitingModels,
}

impl CoreMetric {
    fn named(attribute: &str) -> Option<(Self, &'static str)> {
        [
            (Self::KvCacheUsage, KV_CACHE_USAGE),
            (Self::WaitingRequests, WAITING_QUEUE_SIZE),
            (Self::RunningRequests, RUNNING_REQUESTS_SIZE),
            (Self::ActiveModels, ACTIVE_MODELS),
            (Self::WaitingModels, WAITING_MODELS),
        ]
        .into_iter()
        .find(|(_, name)| *name == attribute)
    }

    /// The value; `None` before the first scrape, or when the engine reports no adapters.
    pub fn read(self, metrics: &EngineMetrics) -> Option<f64> {
        metrics.updated_at?;
        let adapters = |n: usize| u32::try_from(n).ok().map(f64::from);
        match self {
            Self::KvCacheUsage => Some(metrics.kv_cache_usage),
            Self::WaitingRequests => Some(f64::from(metrics.waiting_requests)),
            Self::RunningRequests => Some(f64::from(metrics.running_requests)),
            Self::ActiveModels => adapters(metrics.lora.as_ref()?.active.len()),
            Self::WaitingModels => adapters(metrics.lora.as_ref()?.waiting.len()),
        }
    }
}

/// What a configured attribute name stands for.
enum Named {
    Core(CoreMetric, &'static str),
    Custom(String),
}

impl ScalarRef {
    /// Looks up `attribute`, which the current instance cannot work without. `producer` absent means
    /// [`CORE_METRICS_PRODUCER`]; empty means a key without producer. A `/` in `attribute` needs the
    /// producer to be said, because the name might be meant as a whole key.
    pub fn require(
        keys: &mut DataKeys,
        attribute: &str,
        producer: Option<&str>,
    ) -> Result<Self, PluginError> {
        Self::look_up(attribute, producer, |name, producer| match name {
            Named::Core(metric, name) => {
                keys.require::<()>(name, producer);
                Ok(Self::Core(metric))
            }
            Named::Custom(name) => Ok(Self::Attribute(keys.endpoint_require(name, producer)?)),
        })
    }

    /// As [`Self::require`], for an instance that can do without.
    pub fn optional(
        keys: &mut DataKeys,
        attribute: &str,
        producer: Option<&str>,
    ) -> Result<Self, PluginError> {
        Self::look_up(attribute, producer, |name, producer| match name {
            Named::Core(metric, name) => {
                keys.optional::<()>(name, producer);
                Ok(Self::Core(metric))
            }
            Named::Custom(name) => Ok(Self::Attribute(keys.endpoint_optional(name, producer)?)),
        })
    }

    fn look_up(
        attribute: &str,
        producer: Option<&str>,
        declare: impl FnOnce(Named, &str) -> Result<Self, PluginError>,
    ) -> Result<Self, PluginError> {
        if producer.is_none() && attribute.contains('/') {
            return Err(PluginError::Invalid(format!(
                "attribute: {attribute:?} contains '/'; give the part behind it as producer"
            )));
        }
        let producer = producer.unwrap_or(CORE_METRICS_PRODUCER);
        let core = CoreMetric::named(attribute).filter(|_| producer == CORE_METRICS_PRODUCER);
        let name = match core {
            Some((metric, name)) => Named::Core(metric, name),
            None => Named::Custom(attribute.to_owned()),
        };
        declare(name, producer)
    }

    /// The number, or `None` while it is unknown. `metrics` are those frozen for the request.
    pub fn read(self, endpoint: &Endpoint, metrics: &EngineMetrics) -> Option<f64> {
        match self {
            Self::Core(metric) => metric.read(metrics),
            Self::Attribute(column) => endpoint.attribute_value(column),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::datalayer::{EndpointDetails, EndpointIndex, EndpointSpec, LoraState};

    fn endpoint() -> Endpoint {
        let spec = EndpointSpec {
            name: "pod-rank-0".to_owned(),
            namespace: "default".to_owned(),
            address: ([10, 0, 0, 1], 8000).into(),
            labels: std::collections::BTreeMap::new(),
            rank: 0,
            details: EndpointDetails::default(),
        };
        Endpoint::new(spec, EndpointIndex(0))
    }

    #[test]
    fn attributes_are_kept_by_column_until_replaced() {
        let mut keys = DataKeys::default();
        keys.enter("p");
        let name = keys.endpoint_produce::<String>("Name").unwrap();
        let load = keys.endpoint_produce::<f64>("Load").unwrap();
        let endpoint = endpoint();
        assert_eq!(endpoint.attribute_value(load), None);
        endpoint.set_attribute(load, Arc::new(0.5));
        assert_eq!(endpoint.attribute(name), None);
        endpoint.set_attribute(name, Arc::new("a".to_owned()));
        let before = endpoint.attribute(load);
        endpoint.set_attribute(load, Arc::new(0.75));
        assert_eq!(before.as_deref(), Some(&0.5), "a reader keeps what it has");
        assert_eq!(endpoint.attribute_value(load), Some(0.75));
        assert_eq!(endpoint.attribute(name).as_deref(), Some(&"a".to_owned()));
        // A user that believes in another type finds nothing.
        let wrong = keys.endpoint_require::<u8>("Load", "p").unwrap();
        assert_eq!(endpoint.attribute_value(wrong), None);
    }

    #[test]
    fn writers_of_different_columns_do_not_lose_each_other() {
        let mut keys = DataKeys::default();
        keys.enter("p");
        let columns: Vec<_> = (0..4)
            .map(|n| keys.endpoint_produce::<u32>(n.to_string()).unwrap())
            .collect();
        let endpoint = endpoint();
        std::thread::scope(|scope| {
            for column in &columns {
                scope.spawn(|| {
                    for n in 0..=1000 {
                        endpoint.set_attribute(*column, Arc::new(n));
                    }
                });
            }
        });
        for column in columns {
            assert_eq!(endpoint.attribute_value(column), Some(1000));
        }
    }

    #[test]
    fn scalars_are_core_metrics_or_attributes() {
        let mut keys = DataKeys::default();
        keys.enter("filter");
        let mut find = |attribute: &str, producer| {
            ScalarRef::require(&mut keys, attribute, producer).map_err(|e| e.to_string())
        };
        let core: Vec<_> = [
            "KVCacheUsagePercent",
            "WaitingQueueSize",
            "RunningRequestsSize",
        ]
        .map(|name| find(name, None).unwrap())
        .into_iter()
        .chain([find("ActiveModels", Some(CORE_METRICS_PRODUCER)).unwrap()])
        .collect();
        let custom = find("my/scalar", Some(CORE_METRICS_PRODUCER)).unwrap();
        let bare = find("llm-d.ai/multicluster-queue-size", Some("")).unwrap();
        assert!(find("a/b", None).unwrap_err().contains("\"a/b\""));
        let endpoint = endpoint();
        let mut metrics = EngineMetrics {
            kv_cache_usage: 0.5,
            waiting_requests: 3,
            running_requests: 4,
            lora: Some(Arc::new(LoraState {
                active: vec!["x".to_owned()],
                ..LoraState::default()
            })),
            ..EngineMetrics::default()
        };
        let read = |metrics: &EngineMetrics| -> Vec<_> {
            core.iter().map(|r| r.read(&endpoint, metrics)).collect()
        };
        assert_eq!(read(&metrics), [None; 4], "never scraped");
        metrics.updated_at = Some(tokio::time::Instant::now());
        assert_eq!(read(&metrics), [Some(0.5), Some(3.0), Some(4.0), Some(1.0)]);
        assert_eq!(custom.read(&endpoint, &metrics), None);
        let ScalarRef::Attribute(column) = custom else {
            panic!("{custom:?}")
        };
        endpoint.set_attribute(column, Arc::new(2.5));
        assert_eq!(custom.read(&endpoint, &metrics), Some(2.5));
        assert_eq!(bare.read(&endpoint, &metrics), None);
        let wanted: Vec<_> = keys
            .all()
            .map(|k| format!("{}/{}", k.data_type, k.producer))
            .collect();
        assert!(wanted.contains(&"my/scalar/core-metrics-extractor".to_owned()));
        assert!(wanted.contains(&"llm-d.ai/multicluster-queue-size/".to_owned()));
    }

    #[test]
    fn the_pod_is_the_name_without_its_rank() {
        let mut spec = endpoint().spec;
        assert_eq!(spec.pod_name(), "pod");
        spec.rank = 1;
        assert_eq!(spec.pod_name(), "pod-rank-0");
    }
}
