//! Metrics of a tokenizer's workers, brought up to date when they are asked for.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use metrics::Gauge;
use parking_lot::Mutex;

use crate::kvcache::tokens::stats::{DURATION_BOUNDS_SECONDS, Durations, TokenStats};
use crate::telemetry::metrics::{Collect, Follow, labels};

/// Finds a number among a tokenizer's counters.
type Read = fn(&TokenStats) -> &AtomicU64;

/// Reads the counters of one instance's tokenizer.
pub(super) struct TokenObserver {
    stats: Arc<TokenStats>,
    gauges: [Gauge; 4],
    counters: Mutex<Counters>,
}

struct Counters {
    plain: Vec<(Follow, Read)>,
    fallbacks: Vec<Follow>,
    /// Of waiting and of working, by bucket.
    durations: [Vec<Follow>; 2],
}

impl std::fmt::Debug for TokenObserver {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TokenObserver").finish_non_exhaustive()
    }
}

impl TokenObserver {
    /// Label sets are closed: results, reasons and buckets of one instance.
    pub(super) fn new(plugin_name: &str, stats: Arc<TokenStats>) -> Self {
        let own = ("plugin_name", plugin_name);
        let gauge = |name: &'static str| metrics::gauge!(name, labels(&[own]));
        let counter = |name: &'static str, label: &'static str, value: &str| {
            Follow::new(metrics::counter!(name, labels(&[own, (label, value)])))
        };
        let jobs: [(&str, Read); 4] = [
            ("done", |s| &s.done),
            ("refused", |s| &s.refused),
            ("abandoned", |s| &s.abandoned),
            ("panicked", |s| &s.panicked),
        ];
        let reloads: [(&str, Read); 2] =
            [("ok", |s| &s.reloads), ("error", |s| &s.reload_failures)];
        let jobs = jobs.into_iter().map(|(result, read)| {
            (
                counter("pinpod_tokenizer_jobs_total", "result", result),
                read,
            )
        });
        let reloads = reloads.into_iter().map(|(result, read)| {
            (
                counter("pinpod_tokenizer_reloads_total", "result", result),
                read,
            )
        });
        let hub: [(&str, Read); 2] = [("ok", |s| &s.hub_resolved), ("error", |s| &s.hub_failures)];
        let hub = hub.into_iter().map(|(result, read)| {
            (
                counter("pinpod_tokenizer_hub_fetches_total", "result", result),
                read,
            )
        });
        let reasons = stats.fallbacks().map(|(reason, _)| reason.label());
        let fallback = |reason| counter("pinpod_tokenizer_fallbacks_total", "reason", reason);
        let counters = Counters {
            plain: jobs.chain(reloads).chain(hub).collect(),
            fallbacks: reasons.map(fallback).collect(),
            durations: ["wait", "work"].map(|phase| buckets(plugin_name, phase)),
        };
        Self {
            gauges: [
                gauge("pinpod_tokenizer_queue_depth"),
                gauge("pinpod_tokenizer_busy_workers"),
                gauge("pinpod_tokenizer_stale_models"),
                gauge("pinpod_tokenizer_missing_models"),
            ],
            counters: Mutex::new(counters),
            stats,
        }
    }
}

/// One counter for each bound and one for all: a histogram whose observations are kept elsewhere.
fn buckets(plugin_name: &str, phase: &str) -> Vec<Follow> {
    let bounds = DURATION_BOUNDS_SECONDS.iter().map(ToString::to_string);
    let bounds = bounds.chain(["+Inf".to_owned()]);
    bounds
        .map(|bound| {
            let list = labels(&[
                ("plugin_name", plugin_name),
                ("phase", phase),
                ("le", &bound),
            ]);
            Follow::new(metrics::counter!(
                "pinpod_tokenizer_job_duration_seconds_bucket",
                list
            ))
        })
        .collect()
}

impl Collect for TokenObserver {
    fn collect(&self) {
        let stats = &self.stats;
        let now = [
            &stats.waiting,
            &stats.running,
            &stats.stale_models,
            &stats.missing_models,
        ];
        for (gauge, value) in self.gauges.iter().zip(now) {
            gauge.set(value.load(Relaxed) as f64);
        }
        let mut counters = self.counters.lock();
        for (counter, read) in &mut counters.plain {
            counter.to(read(stats).load(Relaxed));
        }
        for (counter, (_, total)) in counters.fallbacks.iter_mut().zip(stats.fallbacks()) {
            counter.to(total);
        }
        let [wait, work] = &mut counters.durations;
        follow(wait, &stats.wait);
        follow(work, &stats.work);
    }
}

fn follow(buckets: &mut [Follow], durations: &Durations) {
    for (bucket, total) in buckets.iter_mut().zip(durations.cumulative()) {
        bucket.to(total);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn the_queue_its_outcomes_and_durations_are_shown() {
        let text = crate::telemetry::metrics::recorded(|| {
            let stats = Arc::new(TokenStats::default());
            let observer = TokenObserver::new("t", Arc::clone(&stats));
            stats.waiting.store(3, Relaxed);
            stats.done.store(2, Relaxed);
            stats.refused.store(1, Relaxed);
            // 3 ms are within the bound of 5 ms and not within that of 2.5 ms.
            stats.work.observe(Duration::from_millis(3));
            observer.collect();
            observer.collect();
        });
        for line in [
            r#"pinpod_tokenizer_queue_depth{plugin_name="t"} 3"#,
            r#"pinpod_tokenizer_jobs_total{plugin_name="t",result="done"} 2"#,
            r#"pinpod_tokenizer_jobs_total{plugin_name="t",result="refused"} 1"#,
            r#"pinpod_tokenizer_fallbacks_total{plugin_name="t",reason="media"} 0"#,
            r#"pinpod_tokenizer_job_duration_seconds_bucket{plugin_name="t",phase="work",le="0.0025"} 0"#,
            r#"pinpod_tokenizer_job_duration_seconds_bucket{plugin_name="t",phase="work",le="0.005"} 1"#,
            r#"pinpod_tokenizer_job_duration_seconds_bucket{plugin_name="t",phase="work",le="+Inf"} 1"#,
            r#"pinpod_tokenizer_job_duration_seconds_bucket{plugin_name="t",phase="wait",le="+Inf"} 0"#,
        ] {
            assert!(
                text.contains(&format!("{line}\n")),
                "missing {line}\nin\n{text}"
            );
        }
    }
}
