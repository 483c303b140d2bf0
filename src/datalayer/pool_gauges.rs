//! Gauges of the whole pool, refreshed at an interval.

use std::sync::Arc;
use std::time::Duration;

use hashbrown::HashSet;
use metrics::Gauge;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::{EndpointStore, EngineMetrics};
use crate::telemetry::metrics::{Pair, labels};

/// Averages, deviations and counts of one pool.
#[derive(Debug)]
pub struct PoolGauges {
    store: Arc<EndpointStore>,
    pool: String,
    staleness: Duration,
    ready: Pair<Gauge>,
    measures: [Measure; 3],
    /// Endpoints whose queue gauge was set last time; cleared to 0 once they leave.
    shown: HashSet<String>,
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
            store,
            pool: pool.to_owned(),
            staleness,
            shown: HashSet::new(),
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
        self.ready.set(pool.len() as f64);
        let mut shown = HashSet::with_capacity(pool.len());
        let mut fresh = Vec::with_capacity(pool.len());
        for endpoint in pool.iter() {
            let metrics = endpoint.metrics();
            self.queue_gauge(&endpoint.spec.name)
                .set(f64::from(metrics.waiting_requests));
            shown.insert(endpoint.spec.name.clone());
            if metrics.is_fresh(now, self.staleness) {
                fresh.push(metrics);
            }
        }
        for gone in self.shown.difference(&shown) {
            self.queue_gauge(gone).set(0.0);
        }
        self.shown = shown;
        if fresh.is_empty() {
            return;
        }
        for measure in &self.measures {
            let (mean, deviation) = spread(fresh.iter().map(|m| (measure.value)(m)));
            measure.average.set(mean);
            measure.deviation.set(deviation);
        }
    }

    fn queue_gauge(&self, endpoint: &str) -> Pair<Gauge> {
        Pair::gauge(
            "llm_d_epp_per_endpoint_queue_size",
            labels(&[("name", &self.pool), ("model_server_endpoint", endpoint)]),
            labels(&[("name", &self.pool), ("model_server_pod", endpoint)]),
        )
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

    #[test]
    fn the_spread_is_rounded_and_unbiased() {
        // mean (2 + 4 + 9) / 3 = 5; deviation sqrt((9 + 1 + 16) / 2) = 3.605...
        assert_eq!(spread([2.0, 4.0, 9.0].into_iter()), (5.0, 3.61));
        assert_eq!(spread([0.333].into_iter()), (0.33, 0.0));
    }
}
