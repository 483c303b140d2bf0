//! What the sidecar counts, by handles made once.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use metrics::{Counter, Gauge, Histogram};
use tokio::time::Instant;

/// What an engine call is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Stage {
    /// Encoding one media item.
    Encode,
    /// The prompt, elsewhere.
    Prefill,
    /// The answer, by the engine beside us.
    Decode,
    /// Asking a prefill endpoint who it is.
    Bootstrap,
}

impl Stage {
    pub(super) const ALL: [Self; 4] = [Self::Encode, Self::Prefill, Self::Decode, Self::Bootstrap];

    /// Its name in logs and labels.
    pub fn name(self) -> &'static str {
        match self {
            Self::Encode => "encode",
            Self::Prefill => "prefill",
            Self::Decode => "decode",
            Self::Bootstrap => "bootstrap",
        }
    }
}

/// How a request was served.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Path {
    /// Passed through, not an inference request.
    Plain,
    /// By the local engine alone, nothing else being asked for.
    DecodeOnly,
    /// Prefill elsewhere, decode here.
    PrefillDecode,
    /// The local engine did what prefill endpoints could not.
    LocalPrefill,
    /// Refused or failed.
    Error,
}

impl Path {
    const ALL: [Self; 5] = [
        Self::Plain,
        Self::DecodeOnly,
        Self::PrefillDecode,
        Self::LocalPrefill,
        Self::Error,
    ];

    fn name(self) -> &'static str {
        match self {
            Self::Plain => "plain",
            Self::DecodeOnly => "decode_only",
            Self::PrefillDecode => "prefill_decode",
            Self::LocalPrefill => "local_prefill",
            Self::Error => "error",
        }
    }
}

/// The sidecar's series. Cheap to clone.
#[derive(Debug, Clone)]
pub struct SidecarMetrics(Arc<Inner>);

struct Inner {
    stages: [StageSeries; 4],
    paths: [Counter; 5],
    denied: Counter,
    chunks: Counter,
}

impl std::fmt::Debug for Inner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SidecarMetrics").finish_non_exhaustive()
    }
}

struct StageSeries {
    active: AtomicUsize,
    gauge: Gauge,
    calls: Counter,
    failures: Counter,
    duration: Histogram,
}

impl SidecarMetrics {
    /// Handles of the installed recorder; without one they record nothing.
    pub fn new() -> Self {
        let stage = |stage: Stage| {
            let series = StageSeries {
                active: AtomicUsize::new(0),
                gauge: metrics::gauge!("pinpod_sidecar_active_legs", "stage" => stage.name()),
                calls: metrics::counter!("pinpod_sidecar_legs_total", "stage" => stage.name()),
                failures: metrics::counter!("pinpod_sidecar_leg_failures_total", "stage" => stage.name()),
                duration: metrics::histogram!("pinpod_sidecar_leg_duration_seconds", "stage" => stage.name()),
            };
            series.gauge.set(0.0);
            series.calls.increment(0);
            series.failures.increment(0);
            series
        };
        let path = |path: Path| {
            let counter = metrics::counter!("pinpod_sidecar_requests_total", "path" => path.name());
            counter.increment(0);
            counter
        };
        Self(Arc::new(Inner {
            stages: Stage::ALL.map(stage),
            paths: Path::ALL.map(path),
            denied: metrics::counter!("pinpod_sidecar_denied_targets_total"),
            chunks: metrics::counter!("pinpod_sidecar_decode_chunks_total"),
        }))
    }

    /// Engine calls of `stage` that have not ended.
    pub fn active(&self, stage: Stage) -> usize {
        self.0.stages[stage as usize].active.load(Ordering::Relaxed)
    }

    /// Books a call until the guard is dropped.
    pub(super) fn begin(&self, stage: Stage) -> ActiveLeg {
        let series = &self.0.stages[stage as usize];
        series.active.fetch_add(1, Ordering::Relaxed);
        series.gauge.increment(1.0);
        series.calls.increment(1);
        ActiveLeg {
            metrics: self.clone(),
            stage,
            began: Instant::now(),
        }
    }

    pub(super) fn failed(&self, stage: Stage) {
        self.0.stages[stage as usize].failures.increment(1);
    }

    pub(super) fn served(&self, path: Path) {
        self.0.paths[path as usize].increment(1);
    }

    pub(super) fn denied(&self) {
        self.0.denied.increment(1);
    }

    pub(super) fn decoded_chunk(&self) {
        self.0.chunks.increment(1);
    }
}

impl Default for SidecarMetrics {
    fn default() -> Self {
        Self::new()
    }
}

/// A call in progress, from its beginning to the last byte of its answer.
#[derive(Debug)]
pub(super) struct ActiveLeg {
    metrics: SidecarMetrics,
    stage: Stage,
    began: Instant,
}

impl ActiveLeg {
    /// It ends without a usable answer.
    pub(super) fn failed(&self) {
        self.metrics.failed(self.stage);
    }
}

impl Drop for ActiveLeg {
    fn drop(&mut self) {
        let series = &self.metrics.0.stages[self.stage as usize];
        series.active.fetch_sub(1, Ordering::Relaxed);
        series.gauge.decrement(1.0);
        series.duration.record(self.began.elapsed().as_secs_f64());
    }
}
