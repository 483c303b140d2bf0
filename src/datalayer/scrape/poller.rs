//! When endpoints are scraped: one task each, ticks spread over the interval, backing off from the
//! dead.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use metrics::Counter;
use parking_lot::Mutex;
use tokio::runtime::Handle;
use tokio::time::{Instant, MissedTickBehavior};
use tokio_rustls::rustls::ClientConfig;
use tokio_util::sync::CancellationToken;

use super::client::{Connection, ScrapeError, tls_config};
use super::extractor::Scratch;
use super::{CoreMetricsExtractor, MetricsDataSource};
use crate::datalayer::{Endpoint, EndpointIndex, EndpointListener};
use crate::plugin::Plugin;
use crate::telemetry::metrics::{Pair, labels};

/// Shortest interval; shorter ones are raised to it.
pub const MIN_INTERVAL: Duration = Duration::from_millis(50);
/// Longest a scrape may take, connecting included.
const TIMEOUT: Duration = Duration::from_secs(1);
/// Longest pause between attempts at an endpoint that fails.
const MAX_BACKOFF: Duration = Duration::from_secs(2);
/// Slots over which first ticks are spread.
const STAGGER_SLOTS: u32 = 64;

/// Scrapes the endpoints it is told about.
#[derive(Debug)]
pub struct Scraper {
    shared: Arc<Shared>,
    handle: Handle,
    tasks: Mutex<HashMap<EndpointIndex, CancellationToken>>,
}

#[derive(Debug)]
struct Shared {
    source: Arc<MetricsDataSource>,
    extractor: Arc<CoreMetricsExtractor>,
    interval: Duration,
    tls: Option<Arc<ClientConfig>>,
    poll_errors: Pair<Counter>,
    extract_errors: Pair<Counter>,
}

impl Scraper {
    /// A scraper whose tasks run on `handle`. The interval is the source's own, rounded to a multiple
    /// of `base_tick`, or the base tick; at least [`MIN_INTERVAL`].
    pub fn new(
        source: Arc<MetricsDataSource>,
        extractor: Arc<CoreMetricsExtractor>,
        base_tick: Duration,
        handle: Handle,
    ) -> Result<Self, ScrapeError> {
        let source_type = labels(&[("source_type", MetricsDataSource::TYPE)]);
        let mut both = source_type.clone();
        both.extend(labels(&[("extractor_type", CoreMetricsExtractor::TYPE)]));
        let shared = Shared {
            interval: interval(source.interval, base_tick),
            tls: tls_config(&source)?,
            source,
            extractor,
            poll_errors: Pair::counter(
                "llm_d_epp_datalayer_poll_errors_total",
                source_type.clone(),
                source_type,
            ),
            extract_errors: Pair::counter(
                "llm_d_epp_datalayer_extract_errors_total",
                both.clone(),
                both,
            ),
        };
        Ok(Self {
            shared: Arc::new(shared),
            handle,
            tasks: Mutex::default(),
        })
    }
}

fn interval(own: Option<Duration>, base_tick: Duration) -> Duration {
    let base = base_tick.max(MIN_INTERVAL);
    let Some(own) = own else { return base };
    let multiple = (own.as_secs_f64() / base.as_secs_f64()).round().max(1.0);
    base.mul_f64(multiple)
}

impl EndpointListener for Scraper {
    fn added(&self, endpoint: &Arc<Endpoint>) {
        let stop = CancellationToken::new();
        let task = poll(Arc::clone(&self.shared), Arc::clone(endpoint), stop.clone());
        self.handle.spawn(task);
        if let Some(previous) = self.tasks.lock().insert(endpoint.index, stop) {
            previous.cancel();
        }
    }

    fn removed(&self, endpoint: &Arc<Endpoint>) {
        if let Some(stop) = self.tasks.lock().remove(&endpoint.index) {
            stop.cancel();
        }
    }
}

impl Drop for Scraper {
    fn drop(&mut self) {
        self.tasks
            .lock()
            .values()
            .for_each(CancellationToken::cancel);
    }
}

async fn poll(shared: Arc<Shared>, endpoint: Arc<Endpoint>, stop: CancellationToken) {
    let port = shared.source.port.unwrap_or(endpoint.spec.address.port());
    let address = SocketAddr::new(endpoint.spec.address.ip(), port);
    let mut connection = Connection::new(address, shared.source.path.clone(), shared.tls.clone());
    let mut body = Vec::new();
    let mut scratch = Scratch::default();
    let phase = shared.interval * (endpoint.index.0 % STAGGER_SLOTS) / STAGGER_SLOTS;
    let mut ticks = tokio::time::interval_at(Instant::now() + phase, shared.interval);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut failures = 0u32;
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            _ = ticks.tick() => {}
        }
        // A timeout drops the request and, with it, the connection.
        let fetched = tokio::select! {
            () = stop.cancelled() => return,
            fetched = tokio::time::timeout(TIMEOUT, connection.fetch(&mut body)) => fetched,
        };
        match fetched {
            Ok(Ok(())) => {
                failures = 0;
                let outcome =
                    shared
                        .extractor
                        .extract(&endpoint, &body, Instant::now(), &mut scratch);
                if outcome.errors > 0 {
                    shared.extract_errors.increment();
                }
            }
            failed => {
                shared.poll_errors.increment();
                let reason = failed.map_or_else(
                    |_| "timed out".to_owned(),
                    |f| f.err().map(|e| e.to_string()).unwrap_or_default(),
                );
                tracing::trace!(
                    endpoint = endpoint.spec.name,
                    reason,
                    "scrape failed, the last metrics stay"
                );
                failures += 1;
                ticks.reset_after(backoff(shared.interval, failures));
            }
        }
    }
}

/// Doubles with each failure, up to [`MAX_BACKOFF`] or the interval, whichever is longer.
fn backoff(interval: Duration, failures: u32) -> Duration {
    interval
        .saturating_mul(1 << failures.min(10))
        .min(MAX_BACKOFF.max(interval))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::datalayer::{EndpointSpec, EndpointStore};
    use crate::plugin::{Build, DataKeys, Parameters};
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    fn plugin<P: Plugin>() -> Arc<P> {
        let mut keys = DataKeys::default();
        Arc::new(
            P::build(&mut Build {
                name: "p",
                parameters: &Parameters::default(),
                keys: &mut keys,
            })
            .unwrap(),
        )
    }

    fn spec(address: SocketAddr) -> EndpointSpec {
        EndpointSpec {
            name: address.to_string(),
            namespace: "default".to_owned(),
            address,
            labels: std::collections::BTreeMap::new(),
            rank: 0,
            details: crate::datalayer::EndpointDetails::default(),
        }
    }

    #[test]
    fn intervals_are_multiples_of_the_tick() {
        let ms = Duration::from_millis;
        assert_eq!(interval(None, ms(10)), ms(50));
        assert_eq!(interval(Some(ms(120)), ms(50)), ms(100));
        assert_eq!(interval(Some(ms(1)), ms(50)), ms(50));
        assert_eq!(backoff(ms(50), 1), ms(100));
        assert_eq!(backoff(ms(50), 60), MAX_BACKOFF);
        assert_eq!(backoff(ms(5000), 3), ms(5000));
    }

    #[tokio::test]
    async fn live_endpoints_are_read_beside_dead_and_silent_ones() {
        let live = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let dead = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addresses = [&live, &silent, &dead].map(|l| l.local_addr().unwrap());
        drop(dead);
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = live.accept().await {
                tokio::spawn(async move {
                    let mut waiting = 0;
                    let mut buffer = [0; 2048];
                    while let Ok(1..) = stream.read(&mut buffer).await {
                        waiting += 1;
                        let body = format!("vllm:num_requests_waiting {waiting}\n");
                        let reply = format!(
                            "HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{body}",
                            body.len()
                        );
                        stream.write_all(reply.as_bytes()).await.unwrap();
                    }
                });
            }
        });
        let store = EndpointStore::default();
        let scraper = Scraper::new(plugin(), plugin(), MIN_INTERVAL, Handle::current()).unwrap();
        store.subscribe(Arc::new(scraper));
        store.replace(addresses.map(spec).to_vec());
        let pool = store.snapshot();
        let read_twice = async {
            while pool[0].metrics().waiting_requests < 2 {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(10), read_twice)
            .await
            .unwrap();
        assert!(pool[1].metrics().updated_at.is_none() && pool[2].metrics().updated_at.is_none());
        drop(silent);
    }
}
