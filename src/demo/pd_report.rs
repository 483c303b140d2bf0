//! What the runs with and without pods for prompts alone measured, and the text that compares them.

use std::fmt::Write;

use serde::Serialize;

use super::report::{Flow, Measured, RungMeasured, Times};
use super::table::{Better, MEAN, P50, P90, P99, Table, whole};
use super::workload::Workload;

/// Everything the demonstration of disaggregation says. Times are virtual seconds unless a name says
/// otherwise.
#[derive(Debug, Clone, Serialize)]
pub struct PdReport {
    /// Always true: no GPU is involved.
    pub simulated: bool,
    /// Model of the simulated engines, in words.
    pub engine: String,
    /// Simulated pods of each run.
    pub pods: u16,
    /// Of them, those that only compute prompts in the second run.
    pub prefill_pods: u16,
    /// KV cache of each, tokens.
    pub kv_tokens: usize,
    /// Most tokens of an engine step.
    pub max_num_batched_tokens: usize,
    /// KV of a token, bytes.
    pub kv_token_bytes: u32,
    /// Bytes a second that a pod can pull.
    pub kv_bytes_per_second: f64,
    /// How much faster than real engines the simulated ones run.
    pub time_scale: f64,
    /// Virtual seconds after the last arrival of a stage at which the rest counts as failed.
    pub patience_seconds: f64,
    /// The traffic.
    pub workload: Workload,
    /// The aggregated run, then the disaggregated one.
    pub runs: Vec<Measured>,
}

impl PdReport {
    /// What is about to run, and what it can and cannot show.
    pub fn head(&self) -> String {
        let workload = &self.workload;
        let rates = workload.ladder.iter();
        let rates = rates.map(|rung| format!("{}/s for {} s", rung.rate, rung.seconds));
        let (pods, prefill) = (self.pods, self.prefill_pods);
        let prompt = workload.prefix_tokens + workload.question_tokens;
        let transfer_ms =
            1e3 * prompt as f64 * f64::from(self.kv_token_bytes) / self.kv_bytes_per_second;
        format!(
            "Real Envoy, pinpod and routing sidecars in front of {pods} SIMULATED pods of {} KV tokens; no GPU and no\n\
             model is involved.\n\
             aggregated: {pods} pods, each computes prompts and output.\n\
             disaggregated: {prefill} compute prompts; {} compute output, each behind a sidecar, and pull the KV cache:\n\
             {:.0} GB/s to a pod, so a prompt takes {transfer_ms:.0} ms.\n\
             Engine: {}.\n\
             A step computes up to {} tokens: one for each request that generates, the others of prompts, cut where\n\
             they do not fit; all wait for its end.\n\
             Traffic: prompts of {prompt} tokens that nobody has seen, {} out; {}.\n\
             Each rate starts once all requests of the one before have ended; what is unanswered {} s after a rate's last\n\
             arrival counts as failed.\n\
             Times are those of the simulated engines, which run {} times faster than real ones; what Envoy, pinpod and\n\
             sidecars take counts as often.\n",
            self.kv_tokens,
            pods - prefill,
            self.kv_bytes_per_second / 1e9,
            self.engine,
            self.max_num_batched_tokens,
            workload.output_tokens,
            rates.collect::<Vec<_>>().join(", "),
            self.patience_seconds,
            self.time_scale,
        )
    }

    /// The comparison.
    pub fn table(&self) -> String {
        let mut out = self.totals();
        self.rungs(&mut out);
        self.verdict(&mut out);
        out
    }

    fn totals(&self) -> String {
        let mut table = Table::new("all rates", &self.runs);
        let parts = [MEAN, P50, P90, P99];
        table.times("TTFT", &parts, |run| Some(run.ttft));
        let flow = |of: fn(Flow) -> Times| move |run: &Measured| run.flow.map(of);
        let between_tokens = flow(|flow| flow.between_tokens);
        table.times("between tokens", &parts, between_tokens);
        let per_token = flow(|flow| flow.per_output_token);
        table.times("per output token", &parts, per_token);
        let pause = flow(|flow| flow.longest_pause);
        table.times("longest pause of an answer", &[MEAN, P50, P90], pause);
        let throughput = |run: &Measured| Some(run.output_tokens_per_second);
        table.number("output tokens/s", Better::Higher, throughput, whole);
        table.text("answers per endpoint, least-most", |run| run.spread.range());
        table.text("prompts per prefill endpoint", |run| {
            let range = run.prefill_spread.map(|spread| spread.range());
            range.unwrap_or_else(|| "-".to_owned())
        });
        table.text("prompts computed apart", |run| {
            run.handover.apart.to_string()
        });
        table.text("  by the pod that answered", |run| {
            run.handover.local.to_string()
        });
        table.text("KV moved, GB", |run| {
            format!("{:.1}", run.handover.bytes / 1e9)
        });
        table.text("  mean time, s", |run| {
            format!("{:.3}", run.handover.seconds)
        });
        table.requests();
        table.measurement();
        table.text
    }

    fn rungs(&self, out: &mut String) {
        let Some(first) = self.runs.first() else {
            return;
        };
        let _ = write!(out, "\nby arrival rate\n{:<21}", "");
        for run in &self.runs {
            let _ = write!(out, "{:>COLUMNS$}", run.name);
        }
        if self.runs.len() == 2 {
            let _ = write!(out, "{:>COMPARED$}", "better by");
        }
        let _ = write!(out, "\n{:<12}{:>9}", "requests/s", "requests");
        for _ in &self.runs {
            let _ = write!(
                out,
                "{:>10}{:>14}{:>10}{:>8}",
                "TTFT p90", "b. tokens p99", "tokens/s", "failed"
            );
        }
        if self.runs.len() == 2 {
            let _ = write!(
                out,
                "{:>10}{:>14}{:>10}",
                "TTFT p90", "b. tokens p99", "tokens/s"
            );
        }
        out.push('\n');
        for (position, rung) in first.rungs.iter().enumerate() {
            let _ = write!(out, "{:<12}{:>9}", rung.rate, rung.requests);
            let of_runs: Vec<&RungMeasured> = self
                .runs
                .iter()
                .filter_map(|run| run.rungs.get(position))
                .collect();
            rung_row(out, &of_runs);
            out.push('\n');
        }
    }

    /// What the second run did better and what worse, whichever it was.
    fn verdict(&self, out: &mut String) {
        let [base, other] = &self.runs[..] else {
            return;
        };
        let _ = writeln!(out, "\n{} against {}", other.name, base.name);
        for (name, better, value) in VERDICT {
            let words = match better.ratio(value(base), value(other)) {
                Some(ratio) if ratio >= SAME => format!("better by {ratio:.2}x"),
                Some(ratio) if ratio > 0.0 && ratio <= 1.0 / SAME => {
                    format!("worse by {:.2}x", 1.0 / ratio)
                }
                Some(ratio) if ratio > 0.0 => "the same within 2 %".to_owned(),
                _ => "-".to_owned(),
            };
            let _ = writeln!(out, "  {name:<35}{words}");
        }
    }
}

/// A measurement: its name, which values of it are better, and how it is read.
type Compared = (&'static str, Better, fn(&Measured) -> f64);

/// What a user of the gateway notices.
const VERDICT: [Compared; 6] = [
    ("time between tokens, p99", Better::Lower, |run| {
        flow(run).between_tokens.p99
    }),
    ("time per output token, mean", Better::Lower, |run| {
        flow(run).per_output_token.mean
    }),
    ("longest pause of an answer, mean", Better::Lower, |run| {
        flow(run).longest_pause.mean
    }),
    ("TTFT, mean", Better::Lower, |run| run.ttft.mean),
    ("TTFT, p90", Better::Lower, |run| run.ttft.p90),
    ("output tokens/s", Better::Higher, |run| {
        run.output_tokens_per_second
    }),
];

/// Zeros, of which nothing can be said, when it was not measured.
fn flow(run: &Measured) -> Flow {
    run.flow.unwrap_or_default()
}

/// Ratios below this are no difference.
const SAME: f64 = 1.02;
/// Width of a run in the table of rates.
const COLUMNS: usize = 10 + 14 + 10 + 8;
/// Width of the comparison there.
const COMPARED: usize = 10 + 14 + 10;

fn rung_row(out: &mut String, of_runs: &[&RungMeasured]) {
    let p99 = |rung: &RungMeasured| rung.flow.map(|flow| flow.between_tokens.p99);
    for rung in of_runs {
        let between = p99(rung).map_or_else(|| "-".to_owned(), |seconds| format!("{seconds:.3}"));
        let _ = write!(
            out,
            "{:>10.3}{between:>14}{:>10.0}{:>8}",
            rung.ttft.p90, rung.output_tokens_per_second, rung.failed
        );
    }
    if let [base, other] = of_runs {
        let ttft = Better::Lower.factor(base.ttft.p90, other.ttft.p90);
        let between = match (p99(base), p99(other)) {
            (Some(base), Some(other)) => Better::Lower.factor(base, other),
            _ => "-".to_owned(),
        };
        let throughput = Better::Higher.factor(
            base.output_tokens_per_second,
            other.output_tokens_per_second,
        );
        let _ = write!(out, "{ttft:>10}{between:>14}{throughput:>10}");
    }
}

#[cfg(test)]
mod tests {
    use super::super::report::{Decision, Handover, Spread};
    use super::*;

    fn times(all: f64) -> Times {
        Times {
            mean: all,
            p50: all,
            p90: all,
            p99: all,
        }
    }

    fn run(name: &str, ttft: f64, between: f64, tokens: f64) -> Measured {
        let flow = Some(Flow {
            between_tokens: times(between),
            per_output_token: times(2.0 * between),
            longest_pause: times(3.0 * between),
        });
        let rung = RungMeasured {
            rate: 2.0,
            warm_up: false,
            requests: 60,
            failed: 0,
            seconds: 30.0,
            requests_per_second: 2.0,
            output_tokens_per_second: tokens,
            ttft: times(ttft),
            flow,
        };
        Measured {
            name: name.to_owned(),
            requests: 60,
            failed: 0,
            ttft: times(ttft),
            flow,
            handover: Handover::default(),
            output_tokens_per_second: tokens,
            rungs: vec![rung],
            hit_rate: 0.0,
            spread: Spread {
                least: 14,
                most: 16,
                deviation: 0.7,
            },
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

    fn report() -> PdReport {
        let apart = Measured {
            prefill_spread: Some(Spread {
                least: 29,
                most: 31,
                deviation: 1.0,
            }),
            handover: Handover {
                apart: 58,
                local: 2,
                bytes: 91.2e9,
                seconds: 0.064,
            },
            ..run("disaggregated", 0.9, 0.02, 606.0)
        };
        PdReport {
            simulated: true,
            engine: "a model".to_owned(),
            pods: 4,
            prefill_pods: 1,
            kv_tokens: 1000,
            max_num_batched_tokens: 8192,
            kv_token_bytes: 262_144,
            kv_bytes_per_second: 2.5e10,
            time_scale: 2.0,
            patience_seconds: 120.0,
            workload: Workload::long_prompts(),
            runs: vec![run("aggregated", 0.6, 0.4, 600.0), apart],
        }
    }

    fn line(text: &str, name: &str) -> String {
        let found = text.lines().find(|line| line.starts_with(name));
        found.unwrap_or_else(|| panic!("{name}: {text}")).to_owned()
    }

    #[test]
    fn the_head_says_what_is_simulated_and_who_does_what() {
        let head = report().head();
        for text in [
            "4 SIMULATED pods",
            "disaggregated: 1 compute prompts; 3 compute output",
            // 6,000 tokens of 256 KiB at 25 GB/s.
            "25 GB/s to a pod, so a prompt takes 63 ms.",
            "up to 8192 tokens",
        ] {
            assert!(head.contains(text), "{text}: {head}");
        }
    }

    #[test]
    fn what_is_better_and_what_is_worse_is_said_as_it_is() {
        let table = report().table();
        // 0.4 / 0.02 and 0.6 / 0.9.
        assert!(
            line(&table, "between tokens p99").ends_with("20.00x"),
            "{table}"
        );
        assert!(line(&table, "TTFT p90").ends_with("0.67x"), "{table}");
        assert!(line(&table, "prompts computed apart").ends_with("58"));
        assert!(line(&table, "  by the pod that answered").ends_with('2'));
        assert!(line(&table, "prompts per prefill endpoint").ends_with("29-31"));
        assert!(line(&table, "KV moved, GB").ends_with("91.2"));
        assert!(line(&table, "  time between tokens, p99").ends_with("better by 20.00x"));
        // 3 * 0.4 against 3 * 0.02.
        assert!(line(&table, "longest pause of an answer p90").ends_with("20.00x"));
        assert!(line(&table, "per output token mean").contains("0.040"));
        assert!(line(&table, "  TTFT, mean").ends_with("worse by 1.50x"));
        assert!(line(&table, "  output tokens/s").ends_with("the same within 2 %"));
        let rung: Vec<String> = line(&table, "2  ")
            .split_whitespace()
            .map(str::to_owned)
            .collect();
        assert_eq!(
            rung[rung.len() - 3..],
            ["0.67x", "20.00x", "1.01x"],
            "{table}"
        );
    }

    #[test]
    fn one_run_or_events_of_several_tokens_are_shown_without_comparison() {
        let mut report = report();
        for run in &mut report.runs {
            run.flow = None;
        }
        let table = report.table();
        for name in ["between tokens p99", "  time between tokens, p99"] {
            assert!(line(&table, name).ends_with('-'), "{table}");
        }
        report.runs.remove(0);
        assert!(!report.table().contains("better"), "{}", report.table());
    }
}
