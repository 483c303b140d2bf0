//! When endpoints are fetched from: one task per endpoint and source, ticks spread over the interval,
//! backing off from the dead.

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;

use metrics::Counter;
use parking_lot::Mutex;
use tokio::runtime::Handle;
use tokio::time::{Instant, MissedTickBehavior};
use tokio_rustls::rustls::ClientConfig;
use tokio_util::sync::CancellationToken;

use super::client::{Connection, FetchError};
use super::tls::{TlsSettingsError, client_config};
use crate::datalayer::extractors::Extractor;
use crate::datalayer::sources::{HttpSource, Payload};
use crate::datalayer::{Endpoint, EndpointIndex, EndpointListener};
use crate::plugin::TypedName;
use crate::telemetry::metrics::{Pair, labels};

/// Shortest interval; shorter ones are raised to it.
pub const MIN_INTERVAL: Duration = Duration::from_millis(50);
/// Longest a fetch may take, connecting included.
const TIMEOUT: Duration = Duration::from_secs(1);
/// Longest pause between attempts at an endpoint that fails.
const MAX_BACKOFF: Duration = Duration::from_secs(2);
/// Slots over which first ticks are spread.
const STAGGER_SLOTS: u32 = 64;
/// Idle buffers that are kept; more fetches may run at once, each with a buffer of its own.
const MAX_IDLE_BUFFERS: usize = 32;
/// Largest buffer that is kept for the next fetch.
const MAX_IDLE_BUFFER_BYTES: usize = 1 << 20;

/// The tick all sources share: the flag's, or the smallest interval a source asks for, whichever is
/// shorter; at least [`MIN_INTERVAL`].
pub fn base_tick(flag: Duration, own: impl IntoIterator<Item = Option<Duration>>) -> Duration {
    own.into_iter()
        .flatten()
        .fold(flag, Duration::min)
        .max(MIN_INTERVAL)
}

/// Polls one source of every endpoint it is told about.
#[derive(Debug)]
pub struct Scraper {
    shared: Arc<Shared>,
    handle: Handle,
    tasks: Mutex<HashMap<EndpointIndex, CancellationToken>>,
}

/// A polling source and who reads it.
#[derive(Debug)]
pub struct Poll {
    /// The source.
    pub name: TypedName,
    /// Where it is fetched.
    pub http: HttpSource,
    /// What it delivers.
    pub payload: Payload,
    /// Each gets every body.
    pub extractors: Vec<(TypedName, Arc<dyn Extractor>)>,
}

#[derive(Debug)]
struct Shared {
    name: String,
    http: HttpSource,
    accept: &'static str,
    interval: Duration,
    tls: Option<Arc<ClientConfig>>,
    readers: Vec<Reader>,
    poll_errors: Pair<Counter>,
    buffers: Buffers,
}

#[derive(Debug)]
struct Reader {
    name: String,
    extractor: Arc<dyn Extractor>,
    errors: Pair<Counter>,
}

impl Scraper {
    /// A scraper whose tasks run on `handle`. The interval is the source's own, rounded to a multiple
    /// of `base_tick`, or the base tick.
    pub fn new(poll: Poll, base_tick: Duration, handle: Handle) -> Result<Self, TlsSettingsError> {
        let source_type = labels(&[("source_type", poll.name.type_name)]);
        let reader = |(name, extractor): (TypedName, Arc<dyn Extractor>)| {
            let mut both = source_type.clone();
            both.extend(labels(&[("extractor_type", name.type_name)]));
            Reader {
                name: name.name,
                extractor,
                errors: Pair::counter(
                    "llm_d_epp_datalayer_extract_errors_total",
                    both.clone(),
                    both,
                ),
            }
        };
        let shared = Shared {
            name: poll.name.name,
            accept: match poll.payload {
                Payload::Models => "application/json",
                _ => "text/plain",
            },
            interval: interval(poll.http.interval, base_tick),
            tls: client_config(&poll.http)?,
            http: poll.http,
            readers: poll.extractors.into_iter().map(reader).collect(),
            poll_errors: Pair::counter(
                "llm_d_epp_datalayer_poll_errors_total",
                source_type.clone(),
                source_type,
            ),
            buffers: Buffers::default(),
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
        let (shared, own, stopped) = (Arc::clone(&self.shared), Arc::clone(endpoint), stop.clone());
        self.handle.spawn(async move {
            // Dropping the poll closes its connection, wherever it is.
            stopped.run_until_cancelled(shared.poll(&own)).await;
        });
        if let Some(previous) = self.tasks.lock().insert(endpoint.index, stop) {
            previous.cancel();
        }
    }

    fn relabelled(&self, former: &Arc<Endpoint>, endpoint: &Arc<Endpoint>) {
        // The task writes to the endpoint it was started with.
        self.removed(former);
        self.added(endpoint);
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

impl Shared {
    /// Fetches and reads at every tick, forever.
    async fn poll(&self, endpoint: &Endpoint) {
        let Some((host, port)) = self.http.target(&endpoint.spec) else {
            tracing::warn!(
                source = self.name,
                endpoint = endpoint.spec.name,
                "not polled: the address of its node is not known"
            );
            return;
        };
        let mut connection =
            Connection::new(host, port, &self.http.path, self.accept, self.tls.clone());
        let phase = self.interval * (endpoint.index.0 % STAGGER_SLOTS) / STAGGER_SLOTS;
        let mut ticks = tokio::time::interval_at(Instant::now() + phase, self.interval);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut failures = 0u32;
        loop {
            ticks.tick().await;
            match self.poll_once(endpoint, &mut connection).await {
                Ok(()) => failures = 0,
                Err(reason) => {
                    self.poll_errors.increment();
                    tracing::trace!(
                        source = self.name,
                        endpoint = endpoint.spec.name,
                        %reason,
                        "fetch failed, the last values stay"
                    );
                    failures += 1;
                    ticks.reset_after(backoff(self.interval, failures));
                }
            }
        }
    }

    async fn poll_once(
        &self,
        endpoint: &Endpoint,
        connection: &mut Connection,
    ) -> Result<(), FetchError> {
        let mut buffer = self.buffers.take();
        // A timeout drops the request and, with it, the connection.
        let fetched = tokio::time::timeout(TIMEOUT, connection.fetch(&mut buffer)).await;
        let timed_out = |_| std::io::Error::from(std::io::ErrorKind::TimedOut);
        let body = fetched.map_err(timed_out)??;
        let now = Instant::now();
        for reader in &self.readers {
            reader.read(endpoint, body, now);
        }
        self.buffers.put(buffer);
        Ok(())
    }
}

impl Reader {
    /// Runs the extractor; what it gets wrong, a panic included, costs this reading only.
    fn read(&self, endpoint: &Endpoint, body: &[u8], now: Instant) {
        // Attributes and metrics are replaced whole, so a panic leaves none half written.
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            self.extractor.extract(endpoint, body, now)
        }));
        match outcome {
            Ok(outcome) if outcome.errors == 0 => {}
            Ok(_) => self.errors.increment(),
            Err(_) => {
                self.errors.increment();
                tracing::error!(
                    extractor = self.name,
                    endpoint = endpoint.spec.name,
                    "an extractor panicked, the last values stay"
                );
            }
        }
    }
}

/// Buffers between fetches. The one used last is used first: a few stay warm in the cache, instead of
/// one for each endpoint.
#[derive(Debug, Default)]
struct Buffers(Mutex<Vec<Vec<u8>>>);

impl Buffers {
    fn take(&self) -> Vec<u8> {
        self.0.lock().pop().unwrap_or_default()
    }

    fn put(&self, buffer: Vec<u8>) {
        let mut idle = self.0.lock();
        if idle.len() < MAX_IDLE_BUFFERS && buffer.capacity() <= MAX_IDLE_BUFFER_BYTES {
            idle.push(buffer);
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
mod tests;
