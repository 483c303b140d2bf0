//! What a run measured, and the table that compares runs.

use std::fmt::Write;

use serde::Serialize;

/// Measurements of one configuration. Times are virtual seconds.
#[derive(Debug, Clone, Serialize)]
pub struct Measured {
    /// Name of the configuration.
    pub name: String,
    /// Requests sent.
    pub requests: usize,
    /// Of them, not answered with 200 in time.
    pub failed: usize,
    /// Mean time to first token of the answered.
    pub ttft_mean: f64,
    /// Median.
    pub ttft_p50: f64,
    /// 90th percentile.
    pub ttft_p90: f64,
    /// 99th percentile.
    pub ttft_p99: f64,
    /// Output tokens per second from the first arrival to the last end.
    pub output_tokens_per_second: f64,
    /// Output tokens per second while requests of each rung arrived.
    pub rungs: Vec<Rung>,
    /// Prompt tokens found in engine caches, of all prompt tokens.
    pub hit_rate: f64,
    /// Requests that each endpoint finished: least, most, standard deviation.
    pub spread: (u64, u64, f64),
    /// Mean time pinpod took to decide, in wall microseconds.
    pub decision_mean_us: f64,
    /// 99th percentile of the same (upper bound of its bucket).
    pub decision_p99_us: f64,
    /// 99th percentile of how late the client sent, virtual seconds.
    pub client_lag_p99: f64,
    /// Virtual seconds by which simulated engines fell behind, summed over pods.
    pub engine_lag: f64,
}

/// One rung of the ladder.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Rung {
    /// Requests per second.
    pub rate: f64,
    /// Output tokens per second over all pods.
    pub output_tokens_per_second: f64,
    /// 90th percentile of the time to first token of its requests.
    pub ttft_p90: f64,
}

/// The value below which `share` of `values` lie (nearest rank); 0 without values.
pub fn percentile(values: &mut [f64], share: f64) -> f64 {
    values.sort_by(f64::total_cmp);
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a small positive rank"
    )]
    let rank = (share * values.len() as f64).ceil() as usize;
    values.get(rank.saturating_sub(1)).copied().unwrap_or(0.0)
}

/// The comparison as text.
pub fn table(runs: &[Measured]) -> String {
    let mut out = String::new();
    let mut row = |name: &str, value: &dyn Fn(&Measured) -> String| {
        let _ = write!(out, "{name:<34}");
        for run in runs {
            let _ = write!(out, "{:>18}", value(run));
        }
        if let [base, other] = runs {
            let _ = write!(out, "{:>14}", ratio(name, base, other));
        }
        out.push('\n');
    };
    row("", &|r| r.name.clone());
    row("TTFT mean, s", &|r| format!("{:.3}", r.ttft_mean));
    row("TTFT p50, s", &|r| format!("{:.3}", r.ttft_p50));
    row("TTFT p90, s", &|r| format!("{:.3}", r.ttft_p90));
    row("TTFT p99, s", &|r| format!("{:.3}", r.ttft_p99));
    row("output tokens/s, whole run", &|r| {
        format!("{:.0}", r.output_tokens_per_second)
    });
    row("prefix hit rate", &|r| {
        format!("{:.1} %", r.hit_rate * 100.0)
    });
    row("requests per endpoint, min-max", &|r| {
        format!("{}-{}", r.spread.0, r.spread.1)
    });
    row("  standard deviation", &|r| format!("{:.1}", r.spread.2));
    row("pinpod decision mean, us (wall)", &|r| {
        format!("{:.0}", r.decision_mean_us)
    });
    row("pinpod decision p99, us (wall)", &|r| {
        format!("<= {:.0}", r.decision_p99_us)
    });
    row("requests", &|r| r.requests.to_string());
    row("  failed", &|r| r.failed.to_string());
    row("client lag p99, s", &|r| format!("{:.3}", r.client_lag_p99));
    row("engine lag, s", &|r| format!("{:.1}", r.engine_lag));
    rungs(&mut out, runs);
    out
}

fn rungs(out: &mut String, runs: &[Measured]) {
    let Some(first) = runs.first() else { return };
    let _ = writeln!(out, "\nby arrival rate: output tokens/s | TTFT p90, s");
    for (position, rung) in first.rungs.iter().enumerate() {
        let _ = write!(out, "{:>5.0} requests/s {:>18}", rung.rate, "");
        for run in runs {
            if let Some(own) = run.rungs.get(position) {
                let _ = write!(
                    out,
                    "{:>9.0} |{:>7.2}",
                    own.output_tokens_per_second, own.ttft_p90
                );
            }
        }
        if let Some(other) = runs.get(1).and_then(|run| run.rungs.get(position)) {
            let factor = other.output_tokens_per_second / rung.output_tokens_per_second.max(1e-9);
            let _ = write!(out, "{factor:>13.2}x");
        }
        out.push('\n');
    }
}

fn ratio(name: &str, base: &Measured, other: &Measured) -> String {
    let better = |base: f64, other: f64| format!("{:.1}x", base / other.max(1e-9));
    match name {
        "TTFT mean, s" => better(base.ttft_mean, other.ttft_mean),
        "TTFT p50, s" => better(base.ttft_p50, other.ttft_p50),
        "TTFT p90, s" => better(base.ttft_p90, other.ttft_p90),
        "TTFT p99, s" => better(base.ttft_p99, other.ttft_p99),
        "output tokens/s, whole run" => better(
            other.output_tokens_per_second,
            base.output_tokens_per_second,
        ),
        "" => "better by".to_owned(),
        _ => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_nearest_ranks() {
        let mut values = [4.0, 1.0, 3.0, 2.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0];
        assert_eq!(percentile(&mut values, 0.5), 5.0);
        assert_eq!(percentile(&mut values, 0.9), 9.0);
        assert_eq!(percentile(&mut values, 0.91), 10.0);
        assert_eq!(percentile(&mut [], 0.9), 0.0);
    }
}
