//! What tokenization costs and how it ends, as plain counters for whoever exports them.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use super::service::TokenizeError;

/// Upper bounds of the buckets of [`Durations`] in seconds; one more bucket takes the rest.
pub const DURATION_BOUNDS_SECONDS: [f64; 12] = [
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0,
];

/// Durations by buckets. Each observation is three relaxed additions at most.
#[derive(Debug, Default)]
pub struct Durations {
    buckets: [AtomicU64; DURATION_BOUNDS_SECONDS.len() + 1],
    nanoseconds: AtomicU64,
}

impl Durations {
    /// Adds one.
    pub fn observe(&self, duration: Duration) {
        let seconds = duration.as_secs_f64();
        let bucket = DURATION_BOUNDS_SECONDS.partition_point(|bound| *bound < seconds);
        if let Some(counter) = self.buckets.get(bucket) {
            counter.fetch_add(1, Ordering::Relaxed);
        }
        let nanoseconds = u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
        self.nanoseconds.fetch_add(nanoseconds, Ordering::Relaxed);
    }

    /// Observations up to each bound of [`DURATION_BOUNDS_SECONDS`], then all: cumulative, as
    /// Prometheus wants them.
    pub fn cumulative(&self) -> [u64; DURATION_BOUNDS_SECONDS.len() + 1] {
        let mut sum = 0;
        std::array::from_fn(|at| {
            let own = self.buckets.get(at).map(|b| b.load(Ordering::Relaxed));
            sum += own.unwrap_or(0);
            sum
        })
    }

    /// Number of observations.
    pub fn count(&self) -> u64 {
        let buckets = self.buckets.iter();
        buckets.map(|bucket| bucket.load(Ordering::Relaxed)).sum()
    }

    /// Their sum in seconds.
    pub fn sum_seconds(&self) -> f64 {
        self.nanoseconds.load(Ordering::Relaxed) as f64 / 1e9
    }
}

/// Counters of one [`super::service::TokenService`], all since its start unless called a gauge. Read
/// them with `Relaxed`; they are not a snapshot of one moment.
#[derive(Debug, Default)]
pub struct TokenStats {
    /// Gauge: jobs waiting for a worker.
    pub waiting: AtomicUsize,
    /// Gauge: workers busy with a job.
    pub running: AtomicUsize,
    /// Jobs run to their end.
    pub done: AtomicU64,
    /// Jobs refused because the queue was full; their requests went on without ids.
    pub refused: AtomicU64,
    /// Jobs whose request had gone before a worker came to them.
    pub abandoned: AtomicU64,
    /// Jobs that panicked.
    pub panicked: AtomicU64,
    /// Time jobs waited for a worker, abandoned ones included.
    pub wait: Durations,
    /// Time workers took for a job.
    pub work: Durations,
    /// Changed files that were taken into use.
    pub reloads: AtomicU64,
    /// Changed files that could not be; the model before them stays in use.
    pub reload_failures: AtomicU64,
    /// Gauge: models whose newest files are not in use.
    pub stale_models: AtomicUsize,
    /// Gauge: models without a tokenizer, because their files are not here yet.
    pub missing_models: AtomicUsize,
    /// Revisions of the hub that were resolved and are in the cache.
    pub hub_resolved: AtomicU64,
    /// Attempts at one that failed; the model goes on as it is, or is missing.
    pub hub_failures: AtomicU64,
    /// Files downloaded from the hub.
    pub hub_downloads: AtomicU64,
    fallbacks: [AtomicU64; FallbackReason::ALL.len()],
}

/// Why a request went on without ids, few enough to be a label.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FallbackReason {
    /// No tokenizer for its model, or not yet.
    Model,
    /// Something in it only an engine renders.
    Unsupported,
    /// Media whose place among the tokens only an engine knows.
    Media,
    /// The engine will refuse it.
    Malformed,
    /// Larger than what is read.
    TooLarge,
    /// The chat template failed.
    Template,
    /// Workers were busy.
    Busy,
    /// Anything else.
    Other,
}

impl FallbackReason {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::Model,
        Self::Unsupported,
        Self::Media,
        Self::Malformed,
        Self::TooLarge,
        Self::Template,
        Self::Busy,
        Self::Other,
    ];

    /// As a label value.
    pub fn label(self) -> &'static str {
        match self {
            Self::Model => "model",
            Self::Unsupported => "unsupported",
            Self::Media => "media",
            Self::Malformed => "malformed",
            Self::TooLarge => "too_large",
            Self::Template => "template",
            Self::Busy => "busy",
            Self::Other => "other",
        }
    }

    /// The reason in an error.
    pub fn of(error: &TokenizeError) -> Self {
        match error {
            TokenizeError::UnknownModel(_) | TokenizeError::NotLoaded(_) => Self::Model,
            TokenizeError::Unsupported(_) => Self::Unsupported,
            TokenizeError::Media => Self::Media,
            TokenizeError::Malformed(_) => Self::Malformed,
            TokenizeError::TooLarge => Self::TooLarge,
            TokenizeError::Render(_) => Self::Template,
            TokenizeError::Pool(_) | TokenizeError::Late(_) => Self::Busy,
            TokenizeError::Encode(_) | TokenizeError::Remote(_) => Self::Other,
        }
    }
}

impl TokenStats {
    /// Requests that went on without ids, by reason.
    pub fn fallbacks(&self) -> impl Iterator<Item = (FallbackReason, u64)> {
        let counters = FallbackReason::ALL.into_iter().zip(&self.fallbacks);
        counters.map(|(reason, counter)| (reason, counter.load(Ordering::Relaxed)))
    }

    /// Counts one more.
    pub(super) fn fell_back(&self, reason: FallbackReason) {
        if let Some(counter) = self.fallbacks.get(reason as usize) {
            Self::add(counter);
        }
    }

    pub(super) fn add(counter: &AtomicU64) {
        Self::add_n(counter, 1);
    }

    pub(super) fn add_n(counter: &AtomicU64, n: u64) {
        counter.fetch_add(n, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fallbacks_are_counted_by_their_reason() {
        let stats = TokenStats::default();
        stats.fell_back(FallbackReason::Other);
        stats.fell_back(FallbackReason::of(&TokenizeError::Media));
        stats.fell_back(FallbackReason::Media);
        let counted: Vec<_> = stats.fallbacks().filter(|(_, count)| *count > 0).collect();
        assert_eq!(
            counted,
            [(FallbackReason::Media, 2), (FallbackReason::Other, 1)]
        );
    }

    #[test]
    fn buckets_are_cumulative_and_the_last_has_all() {
        let durations = Durations::default();
        for milliseconds in [1, 3, 600, 60_000] {
            durations.observe(Duration::from_millis(milliseconds));
        }
        // 1 ms falls on a bound and belongs to its bucket, 3 ms below 5 ms, 0.6 s below 1 s, a minute
        // above all.
        let expected = [0, 1, 1, 2, 2, 2, 2, 2, 2, 2, 3, 3, 4];
        assert_eq!(durations.cumulative(), expected);
        assert_eq!(durations.count(), 4);
        // 0.001 + 0.003 + 0.6 + 60
        assert!((durations.sum_seconds() - 60.604).abs() < 1e-9);
    }
}
