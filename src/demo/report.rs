//! What the runs measured, and the text that compares them.

use std::fmt::Write;

use serde::Serialize;

use super::table::{Better, MEAN, P50, P90, P99, Table, whole};
use super::workload::{Pacing, Workload};

/// Everything a demonstration says. Times are virtual seconds unless a name says otherwise.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// Always true: no GPU is involved.
    pub simulated: bool,
    /// Model of the simulated engines, in words.
    pub engine: String,
    /// Simulated pods.
    pub pods: u16,
    /// KV cache of each, tokens.
    pub kv_tokens: usize,
    /// How much faster than real engines the simulated ones run.
    pub time_scale: f64,
    /// Virtual seconds after the last arrival of a stage at which the rest counts as failed.
    pub patience_seconds: f64,
    /// The traffic.
    pub workload: Workload,
    /// One for each configuration.
    pub runs: Vec<Measured>,
}

/// Measurements of one configuration. Totals are over every rung, the warm-up included.
#[derive(Debug, Clone, Serialize)]
pub struct Measured {
    /// Name of the configuration.
    pub name: String,
    /// Requests sent.
    pub requests: usize,
    /// Of them, not answered whole with 200 in time.
    pub failed: usize,
    /// Time to first token of the answered.
    pub ttft: Times,
    /// How output flowed; only where each token comes in an event of its own.
    pub flow: Option<Flow>,
    /// What pods computed for each other.
    pub handover: Handover,
    /// Output tokens per second: all that the engines made, over the time from the start of each
    /// stage until its last request ended.
    pub output_tokens_per_second: f64,
    /// The rungs of the ladder, in their order.
    pub rungs: Vec<RungMeasured>,
    /// Prompt tokens found in engine caches, of all prompt tokens.
    pub hit_rate: f64,
    /// Requests that each endpoint finished; of those that answer, where others only compute prompts.
    pub spread: Spread,
    /// Those of the others.
    pub prefill_spread: Option<Spread>,
    /// Time pinpod took to decide, wall clock.
    pub decision: Decision,
    /// 99th percentile of how late the client sent.
    pub client_lag_p99: f64,
    /// Time by which simulated engines fell behind their own clocks, summed over pods.
    pub engine_lag: f64,
}

/// Distribution of times, seconds; zeros without any.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Times {
    /// Mean.
    pub mean: f64,
    /// Median.
    pub p50: f64,
    /// 90th percentile.
    pub p90: f64,
    /// 99th percentile.
    pub p99: f64,
}

impl Times {
    /// Of `values`, which it sorts.
    pub fn of(values: &mut [f64]) -> Self {
        Self {
            mean: values.iter().sum::<f64>() / (values.len() as f64).max(1.0),
            p50: percentile(values, 0.5),
            p90: percentile(values, 0.9),
            p99: percentile(values, 0.99),
        }
    }
}

/// How the output of answers flowed, by the events of their streams.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Flow {
    /// Between two tokens, of all answers together.
    pub between_tokens: Times,
    /// Mean of that over an answer.
    pub per_output_token: Times,
    /// Longest of an answer.
    pub longest_pause: Times,
}

impl Flow {
    /// Of answers, given as the times between their tokens.
    pub fn of<'a>(answers: impl Iterator<Item = &'a [f64]> + Clone) -> Self {
        let answers = answers.filter(|gaps| !gaps.is_empty());
        let distribution = |of: fn(&[f64]) -> f64| {
            let values = answers.clone().map(of);
            Times::of(&mut values.collect::<Vec<_>>())
        };
        let all = answers.clone().flatten().copied();
        Self {
            between_tokens: Times::of(&mut all.collect::<Vec<_>>()),
            per_output_token: distribution(|gaps| gaps.iter().sum::<f64>() / gaps.len() as f64),
            longest_pause: distribution(|gaps| gaps.iter().copied().fold(0.0, f64::max)),
        }
    }
}

/// Prompts whose KV came from another pod, as the engines that answered count them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Handover {
    /// Requests whose prompt was computed by another pod.
    pub apart: u64,
    /// Requests whose prompt was computed by the pod that answered.
    pub local: u64,
    /// Bytes of KV that moved.
    pub bytes: f64,
    /// Mean time of a transfer.
    pub seconds: f64,
}

/// How evenly requests were spread over endpoints.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub struct Spread {
    /// Fewest requests of an endpoint.
    pub least: u64,
    /// Most.
    pub most: u64,
    /// Standard deviation.
    pub deviation: f64,
}

impl Spread {
    /// Fewest and most.
    pub fn range(&self) -> String {
        format!("{}-{}", self.least, self.most)
    }

    /// Of the requests that each endpoint finished.
    pub fn of(finished: &[u64]) -> Self {
        let n = (finished.len() as f64).max(1.0);
        let mean = finished.iter().sum::<u64>() as f64 / n;
        let squares = finished.iter().map(|&count| (count as f64 - mean).powi(2));
        Self {
            least: finished.iter().copied().min().unwrap_or(0),
            most: finished.iter().copied().max().unwrap_or(0),
            deviation: (squares.sum::<f64>() / n).sqrt(),
        }
    }
}

/// Latency that pinpod itself adds: from the complete request to its decision, microseconds of wall
/// clock. Percentiles are upper bounds of histogram buckets; `None` above the last bound.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Decision {
    /// Mean.
    pub mean_us: f64,
    /// The median is at most this.
    pub p50_us: Option<f64>,
    /// The 99th percentile is at most this.
    pub p99_us: Option<f64>,
}

/// One rung of the ladder.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct RungMeasured {
    /// Requests per second that were sent.
    pub rate: f64,
    /// It is the warm-up.
    pub warm_up: bool,
    /// Requests sent.
    pub requests: usize,
    /// Of them, not answered whole with 200 in time.
    pub failed: usize,
    /// From its start until its last request ended; the time of its arrivals when rungs do not drain.
    pub seconds: f64,
    /// Answers per second of that time; when rungs do not drain, answers to its requests, whenever
    /// they came.
    pub requests_per_second: f64,
    /// Output tokens of all pods per second of that time.
    pub output_tokens_per_second: f64,
    /// Time to first token of its requests.
    pub ttft: Times,
    /// As in the total.
    pub flow: Option<Flow>,
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

impl Report {
    /// What is about to run, and what it can and cannot show.
    pub fn head(&self) -> String {
        let workload = &self.workload;
        let rates = workload.ladder.iter().map(|rung| {
            let name = if rung.warm_up { " (warm-up)" } else { "" };
            format!("{}/s for {} s{name}", rung.rate, rung.seconds)
        });
        let pacing = match workload.pacing {
            Pacing::Draining => format!(
                "Each rate starts once all requests of the one before have ended, as in the published run; what is\n\
                 unanswered {} s after a rate's last arrival counts as failed.",
                self.patience_seconds
            ),
            Pacing::Continuous => {
                "Rates follow each other at once: a backlog carries over to the next.".to_owned()
            }
        };
        format!(
            "Real Envoy and pinpod in front of {} SIMULATED pods of {} KV tokens; no GPU and no model is involved.\n\
             Engine: {}.\n\
             Traffic: {} groups of {} prompts, {} + {} tokens in, {} out; {}.\n\
             {pacing}\n\
             Times are those of the simulated engines, which run {} times faster than real ones.\n",
            self.pods,
            self.kv_tokens,
            self.engine,
            workload.groups,
            workload.prompts_per_group,
            workload.prefix_tokens,
            workload.question_tokens,
            workload.output_tokens,
            rates.collect::<Vec<_>>().join(", "),
            self.time_scale,
        )
    }

    /// The comparison.
    pub fn table(&self) -> String {
        let with_warm_up = self.workload.ladder.iter().any(|rung| rung.warm_up);
        let mut out = totals(&self.runs, with_warm_up);
        rungs(&mut out, &self.runs, self.workload.pacing);
        out
    }
}

fn totals(runs: &[Measured], with_warm_up: bool) -> String {
    let title = if with_warm_up {
        "all rates, the warm-up included"
    } else {
        "all rates"
    };
    let mut table = Table::new(title, runs);
    table.times("TTFT", &[MEAN, P50, P90, P99], |run| Some(run.ttft));
    let throughput = |run: &Measured| Some(run.output_tokens_per_second);
    table.number("output tokens/s", Better::Higher, throughput, whole);
    table.text("prefix hit rate", |run| {
        format!("{:.1} %", run.hit_rate * 100.0)
    });
    table.text("requests per endpoint, least-most", |run| {
        run.spread.range()
    });
    table.text("  standard deviation", |run| {
        format!("{:.1}", run.spread.deviation)
    });
    table.requests();
    table.measurement();
    table.text
}

/// Columns of a run in the table of rungs: answers/s, output tokens/s, TTFT p90, failed.
const RUNG_COLUMNS: usize = 12 + 10 + 10 + 8;

fn rungs(out: &mut String, runs: &[Measured], pacing: Pacing) {
    let Some(first) = runs.first() else { return };
    let until = match pacing {
        Pacing::Draining => "until the last answer",
        Pacing::Continuous => "while its requests arrive",
    };
    let _ = writeln!(out, "\nby arrival rate, {until}");
    let _ = write!(out, "{:<21}", "");
    for run in runs {
        let _ = write!(out, "{:>RUNG_COLUMNS$}", run.name);
    }
    if runs.len() == 2 {
        let _ = write!(out, "{:>20}", "better by");
    }
    let _ = write!(out, "\n{:<12}{:>9}", "requests/s", "requests");
    for _ in runs {
        let _ = write!(
            out,
            "{:>12}{:>10}{:>10}{:>8}",
            "answers/s", "tokens/s", "TTFT p90", "failed"
        );
    }
    if runs.len() == 2 {
        let _ = write!(out, "{:>10}{:>10}", "tokens/s", "TTFT p90");
    }
    out.push('\n');
    for (position, rung) in first.rungs.iter().enumerate() {
        let name = if rung.warm_up { " warm-up" } else { "" };
        let _ = write!(
            out,
            "{:<12}{:>9}",
            format!("{}{name}", rung.rate),
            rung.requests
        );
        let of_runs: Vec<&RungMeasured> = runs
            .iter()
            .filter_map(|run| run.rungs.get(position))
            .collect();
        rung_row(out, &of_runs);
        out.push('\n');
    }
}

fn rung_row(out: &mut String, of_runs: &[&RungMeasured]) {
    for rung in of_runs {
        let _ = write!(
            out,
            "{:>12.1}{:>10.0}{:>10.2}{:>8}",
            rung.requests_per_second, rung.output_tokens_per_second, rung.ttft.p90, rung.failed
        );
    }
    if let [base, other] = of_runs {
        let throughput = Better::Higher.factor(
            base.output_tokens_per_second,
            other.output_tokens_per_second,
        );
        let ttft = Better::Lower.factor(base.ttft.p90, other.ttft.p90);
        let _ = write!(out, "{throughput:>10}{ttft:>10}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(name: &str, ttft_p90: f64, tokens: f64) -> Measured {
        let ttft = Times {
            p90: ttft_p90,
            ..Times::default()
        };
        let rung = RungMeasured {
            rate: 15.0,
            warm_up: true,
            requests: 750,
            failed: 0,
            seconds: 50.0,
            requests_per_second: 15.0,
            output_tokens_per_second: tokens,
            ttft,
            flow: None,
        };
        Measured {
            name: name.to_owned(),
            requests: 750,
            failed: 0,
            ttft,
            flow: None,
            handover: Handover::default(),
            output_tokens_per_second: tokens,
            rungs: vec![rung],
            hit_rate: 0.5,
            spread: Spread::default(),
            prefill_spread: None,
            decision: Decision {
                mean_us: 31.0,
                p50_us: Some(30.0),
                p99_us: None,
            },
            client_lag_p99: 0.0,
            engine_lag: 0.0,
        }
    }

    fn report(pacing: Pacing) -> Report {
        Report {
            simulated: true,
            engine: "a model".to_owned(),
            pods: 4,
            kv_tokens: 1000,
            time_scale: 5.0,
            patience_seconds: 120.0,
            workload: Workload {
                pacing,
                ..Workload::small()
            },
            runs: vec![run("random", 92.6, 4429.0), run("recommended", 0.5, 8858.0)],
        }
    }

    #[test]
    fn percentiles_are_nearest_ranks() {
        let mut values = [4.0, 1.0, 3.0, 2.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0];
        assert_eq!(percentile(&mut values, 0.5), 5.0);
        assert_eq!(percentile(&mut values, 0.9), 9.0);
        assert_eq!(percentile(&mut values, 0.91), 10.0);
        assert_eq!(percentile(&mut [], 0.9), 0.0);
        assert_eq!(Times::of(&mut values).mean, 5.5);
    }

    #[test]
    fn flow_is_of_all_tokens_and_of_each_answer() {
        let answers: [&[f64]; 3] = [&[1.0, 2.0, 9.0], &[], &[2.0, 4.0]];
        let flow = Flow::of(answers.into_iter());
        // 1, 2, 2, 4, 9; 12 / 3 and 6 / 2; 9 and 4.
        let between = flow.between_tokens;
        assert_eq!((between.mean, between.p50, between.p99), (3.6, 2.0, 9.0));
        assert_eq!(flow.per_output_token.mean, 3.5);
        let pause = flow.longest_pause;
        assert_eq!((pause.mean, pause.p50, pause.p90), (6.5, 4.0, 9.0));
        assert_eq!(Flow::of(std::iter::empty()), Flow::default());
    }

    #[test]
    fn spread_is_range_and_standard_deviation() {
        // Mean 20, squares 100 + 0 + 100, over 3: sqrt(66.7).
        let spread = Spread::of(&[10, 20, 30]);
        assert_eq!((spread.least, spread.most), (10, 30));
        assert!((spread.deviation - 8.165).abs() < 1e-3);
    }

    #[test]
    fn the_head_says_what_is_simulated_and_how_rungs_follow_each_other() {
        let head = report(Pacing::Draining).head();
        assert!(
            head.contains("4 SIMULATED pods") && head.contains("Engine: a model."),
            "{head}"
        );
        assert!(
            head.contains("10/s for 20 s (warm-up), 5/s for 20 s"),
            "{head}"
        );
        assert!(
            head.contains("once all requests of the one before have ended"),
            "{head}"
        );
        assert!(head.contains("120 s after"), "{head}");
        let head = report(Pacing::Continuous).head();
        assert!(head.contains("carries over"), "{head}");
    }

    #[test]
    fn two_runs_are_compared_in_total_and_by_rung() {
        let table = report(Pacing::Draining).table();
        let line = |name: &str| {
            table
                .lines()
                .find(|l| l.starts_with(name))
                .unwrap()
                .to_owned()
        };
        assert!(line("all rates, the warm-up included").ends_with("better by"));
        // 92.6 / 0.5 and 8858 / 4429.
        assert!(line("TTFT p90").ends_with("185.20x"), "{table}");
        assert!(line("output tokens/s").ends_with("2.00x"), "{table}");
        let rung: Vec<String> = line("15 warm-up")
            .split_whitespace()
            .map(str::to_owned)
            .collect();
        assert_eq!(rung[rung.len() - 2..], ["2.00x", "185.20x"], "{table}");
        assert!(
            line("  p50").contains("<= 30") && line("  p99").contains("> 100000"),
            "{table}"
        );
    }

    #[test]
    fn one_run_is_shown_without_a_comparison() {
        let mut report = report(Pacing::Draining);
        report.runs.truncate(1);
        assert!(!report.table().contains("better by"));
        assert!(
            serde_json::to_string(&report)
                .unwrap()
                .contains("\"simulated\":true")
        );
    }
}
