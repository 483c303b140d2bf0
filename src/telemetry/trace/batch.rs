//! From the requests' threads to the exporter: a bounded queue and the task that empties it.
//!
//! Nobody who serves a request waits here: a span that finds the queue full is dropped and counted. So is
//! a batch that the collector does not take in time; a collector that is down costs the queue's memory
//! and no more.

use std::sync::Arc;
use std::time::Duration;

use metrics::Counter;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::export::Exporter;
use super::settings::BatchLimits;
use super::span::Finished;

/// Pause before a batch is tried again; doubled each time.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
/// Time that shutdown gives to what is still queued.
pub const FLUSH_TIMEOUT: Duration = Duration::from_secs(5);

/// Where ended spans go.
#[derive(Clone)]
pub(super) struct Sink(Arc<Inner>);

struct Inner {
    queue: mpsc::Sender<Finished>,
    dropped: Counter,
}

impl std::fmt::Debug for Sink {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Sink")
    }
}

impl Sink {
    /// Queues a span if there is room.
    pub(super) fn take(&self, span: Finished) {
        if self.0.queue.try_send(span).is_err() {
            self.0.dropped.increment(1);
        }
    }
}

fn spans(result: &'static str) -> Counter {
    let counter = metrics::counter!("pinpod_trace_spans_total", "result" => result);
    counter.increment(0);
    counter
}

/// A sink with room for `limits.max_queue` spans, and what comes out of it. A span beyond is dropped.
pub(super) fn queue(limits: &BatchLimits) -> (Sink, mpsc::Receiver<Finished>) {
    let (sender, receiver) = mpsc::channel(limits.max_queue.max(1));
    let inner = Inner {
        queue: sender,
        dropped: spans("dropped"),
    };
    (Sink(Arc::new(inner)), receiver)
}

/// The export task.
#[derive(Debug)]
pub struct Export {
    stop: CancellationToken,
    task: JoinHandle<()>,
}

impl Export {
    /// Exports what `queue` brings. Needs a tokio runtime.
    pub(super) fn start(
        queue: mpsc::Receiver<Finished>,
        exporter: Exporter,
        limits: BatchLimits,
    ) -> Self {
        let stop = CancellationToken::new();
        let worker = Worker {
            queue,
            exporter,
            limits,
            stop: stop.clone(),
            failing: false,
            exported: spans("exported"),
            failed: spans("failed"),
            rejected: spans("rejected"),
        };
        Self {
            stop,
            task: tokio::spawn(worker.run()),
        }
    }

    /// Exports what is queued, for at most [`FLUSH_TIMEOUT`]. Call it once no request is served any more.
    pub async fn finish(self) {
        self.stop.cancel();
        let mut task = self.task;
        if tokio::time::timeout(FLUSH_TIMEOUT, &mut task)
            .await
            .is_err()
        {
            task.abort();
            tracing::warn!(limit = ?FLUSH_TIMEOUT, "not all spans could be exported before the end");
        }
    }
}

struct Worker {
    queue: mpsc::Receiver<Finished>,
    exporter: Exporter,
    limits: BatchLimits,
    stop: CancellationToken,
    /// The last batch could not be exported.
    failing: bool,
    exported: Counter,
    failed: Counter,
    rejected: Counter,
}

impl Worker {
    async fn run(mut self) {
        let mut batch = Vec::new();
        while self.fill(&mut batch).await {
            self.deliver(&batch).await;
            batch.clear();
        }
    }

    /// Fills an empty batch until it is full, or old enough, or nothing more can come. False when nothing
    /// came at all.
    async fn fill(&mut self, batch: &mut Vec<Finished>) -> bool {
        let max = self.limits.max_batch.max(1);
        let mut due = None;
        while batch.len() < max {
            let room = max - batch.len();
            if self.stop.is_cancelled() {
                // What is there still goes out; nothing more is let in.
                self.queue.close();
            }
            let stopped = self.stop.clone();
            let wait = async {
                match due {
                    Some(due) => tokio::time::sleep_until(due).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                received = self.queue.recv_many(batch, room) => {
                    if received == 0 {
                        break;
                    }
                    due.get_or_insert_with(|| Instant::now() + self.limits.delay);
                }
                () = wait => break,
                () = stopped.cancelled(), if !self.queue.is_closed() => {}
            }
        }
        !batch.is_empty()
    }

    /// Exports a batch, again while the collector is only briefly unable to take it.
    async fn deliver(&mut self, batch: &[Finished]) {
        let due = Instant::now() + self.limits.timeout;
        let mut pause = FIRST_PAUSE;
        loop {
            let exporting = tokio::time::timeout_at(due, self.exporter.export(batch));
            let problem = match exporting.await {
                Ok(Ok(rejected)) => {
                    self.delivered(batch.len() as u64, rejected);
                    return;
                }
                Ok(Err(error)) if error.is_passing() && Instant::now() + pause < due => {
                    self.note_failure(&error);
                    tokio::select! {
                        () = tokio::time::sleep(pause) => {
                            pause *= 2;
                            continue;
                        }
                        () = self.stop.cancelled() => error.to_string(),
                    }
                }
                Ok(Err(error)) => error.to_string(),
                Err(_) => format!("not within {:?}", self.limits.timeout),
            };
            self.note_failure(&problem);
            self.failed.increment(batch.len() as u64);
            return;
        }
    }

    fn delivered(&mut self, spans: u64, rejected: u64) {
        let rejected = rejected.min(spans);
        self.exported.increment(spans - rejected);
        self.rejected.increment(rejected);
        if std::mem::take(&mut self.failing) {
            tracing::info!("spans are exported again");
        }
    }

    fn note_failure(&mut self, problem: &dyn std::fmt::Display) {
        if !std::mem::replace(&mut self.failing, true) {
            tracing::warn!(%problem, "spans cannot be exported");
        }
    }
}

#[cfg(test)]
#[path = "batch_tests.rs"]
mod tests;
