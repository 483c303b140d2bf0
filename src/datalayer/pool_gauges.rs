//! Gauges of the whole pool, refreshed at an interval.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use metrics::Gauge;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::{EndpointStore, EngineMetrics};
use crate::telemetry::metrics::{Collect, Pair, forget_departed, labels, register, write_gauge};

/// Averages, deviations and counts of one pool.
#[derive(Debug)]
pub struct PoolGauges {
    store: Arc<EndpointStore>,
    staleness: Duration,
    ready: Pair<Gauge>,
    measures: [Measure; 3],
    _queues: Arc<Queues>,
}

/// The queue of each endpoint, for as long as it is in the pool.
#[derive(Debug)]
struct Queues {
    store: Arc<EndpointStore>,
    pool: String,
}

/// One quantity: its mean and sample standard deviation.
#[derive(Debug)]
struct Measure {
    value: fn(&EngineMetrics) -> f64,
    average: Pair<Gauge>,
    deviation: Pair<Gauge>,
}

impl PoolGauges {
    /// Gauges labelled `pool`, over endpoints scraped within `staleness`.
    pub fn new(store: Arc<EndpointStore>, pool: &str, staleness: Duration) -> Self {
        let gauge = |name| Pair::gauge(name, labels(&[("name", pool)]), labels(&[("name", pool)]));
        let measure = |average, deviation, value| Measure {
            value,
            average: gauge(average),
            deviation: gauge(deviation),
        };
        Self {
            ready: gauge("llm_d_epp_ready_endpoints"),
            measures: [
                measure(
                    "llm_d_epp_average_kv_cache_utilization",
                    "llm_d_epp_std_dev_kv_cache_utilization",
                    |m| m.kv_cache_usage,
                ),
                measure(
                    "llm_d_epp_average_queue_size",
                    "llm_d_epp_std_dev_queue_size",
                    |m| f64::from(m.waiting_requests),
                ),
                measure(
                    "llm_d_epp_average_running_requests",
                    "llm_d_epp_std_dev_running_requests",
                    |m| f64::from(m.running_requests),
                ),
            ],
            _queues: Queues::registered(&store, pool),
            store,
            staleness,
        }
    }

    /// Refreshes until `shutdown`.
    pub async fn run(mut self, interval: Duration, shutdown: CancellationToken) {
        loop {
            self.refresh();
            tokio::select! {
                () = shutdown.cancelled() => return,
                () = tokio::time::sleep(interval.max(Duration::from_millis(10))) => {}
            }
        }
    }

    fn refresh(&mut self) {
        self.store.forget_former();
        let pool = self.store.snapshot();
        let now = Instant::now();
        let names: HashSet<(&str, &str)> = pool
            .iter()
            .map(|e| (e.spec.name.as_str(), e.spec.namespace.as_str()))
            .collect();
        let bare: HashSet<&str> = names.iter().map(|(name, _)| *name).collect();
        forget_departed(&|name, namespace| match namespace {
            Some(namespace) => names.contains(&(name, namespace)),
            None => bare.contains(name),
        });
        self.ready.set(pool.len() as f64);
        let mut fresh = Vec::with_capacity(pool.len());
        for endpoint in pool.iter() {
            let metrics = endpoint.metrics();
            if metrics.is_fresh(now, self.staleness) {
                fresh.push(metrics);
            }
        }
        if fresh.is_empty() {
            return;
        }
        for measure in &self.measures {
            let (mean, deviation) = spread(fresh.iter().map(|m| (measure.value)(m)));
            measure.average.set(mean);
            measure.deviation.set(deviation);
        }
    }
}

impl Queues {
    fn registered(store: &Arc<EndpointStore>, pool: &str) -> Arc<Self> {
        let queues = Arc::new(Self {
            store: Arc::clone(store),
            pool: pool.to_owned(),
        });
        register(&queues);
        queues
    }
}

impl Collect for Queues {
    fn expose(&self, out: &mut String) {
        let pool = self.store.snapshot();
        // Names are unique in their namespace only, which is no label.
        let mut waiting: BTreeMap<&str, f64> = BTreeMap::new();
        for endpoint in pool.iter() {
            let own = f64::from(endpoint.metrics().waiting_requests);
            *waiting.entry(&endpoint.spec.name).or_default() += own;
        }
        for (name, endpoint_label) in [
            ("llm_d_epp_per_endpoint_queue_size", "model_server_endpoint"),
            ("inference_pool_per_pod_queue_size", "model_server_pod"),
        ] {
            let row = |(endpoint, waiting): (&&str, &f64)| {
                let list = labels(&[("name", &self.pool), (endpoint_label, *endpoint)]);
                (list, *waiting)
            };
            let rows: Vec<_> = waiting.iter().map(row).collect();
            write_gauge(name, &rows, out);
        }
    }
}

/// Mean and sample standard deviation (n - 1; 0 for one value), rounded to two decimals.
fn spread(values: impl Iterator<Item = f64> + Clone) -> (f64, f64) {
    let n = values.clone().count() as f64;
    let mean = values.clone().sum::<f64>() / n;
    let squares: f64 = values.map(|v| (v - mean).powi(2)).sum();
    let deviation = if n > 1.0 {
        (squares / (n - 1.0)).sqrt()
    } else {
        0.0
    };
    let round = |v: f64| (v * 100.0).round() / 100.0;
    (round(mean), round(deviation))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::datalayer::discovery::list;

    #[test]
    fn a_queue_is_shown_while_its_endpoint_is_in_the_pool() {
        let store = Arc::new(EndpointStore::default());
        let queues = Queues::registered(&store, "p");
        let shown = || {
            let mut text = String::new();
            queues.expose(&mut text);
            let lines = text
                .lines()
                .filter(|l| !l.starts_with('#') && !l.is_empty());
            lines.map(str::to_owned).collect::<Vec<_>>()
        };
        store.replace(list::parse("10.0.0.1:1,10.0.0.2:1").unwrap());
        store.snapshot()[1].set_metrics(EngineMetrics {
            waiting_requests: 7,
            ..EngineMetrics::default()
        });
        let current = r#"llm_d_epp_per_endpoint_queue_size{name="p",model_server_endpoint="#;
        let legacy = r#"inference_pool_per_pod_queue_size{name="p",model_server_pod="#;
        assert_eq!(
            shown(),
            [
                format!("{current}\"endpoint-0\"}} 0"),
                format!("{current}\"endpoint-1\"}} 7"),
                format!("{legacy}\"endpoint-0\"}} 0"),
                format!("{legacy}\"endpoint-1\"}} 7"),
            ]
        );
        let mut namesakes = list::parse("10.0.0.1:1,10.0.0.2:1").unwrap();
        namesakes[0].namespace = "other".to_owned();
        namesakes[1].name = "endpoint-0".to_owned();
        store.replace(namesakes);
        assert_eq!(shown().len(), 2, "one series under each name");
    }

    #[test]
    fn the_spread_is_rounded_and_unbiased() {
        // mean (2 + 4 + 9) / 3 = 5; deviation sqrt((9 + 1 + 16) / 2) = 3.605...
        assert_eq!(spread([2.0, 4.0, 9.0].into_iter()), (5.0, 3.61));
        assert_eq!(spread([0.333].into_iter()), (0.33, 0.0));
    }
}
