//! `pinpod demo`

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context;
use tokio::signal::unix::{Signal, SignalKind, signal};

use super::Interrupted;
use crate::demo::parts::{KV_BYTES_PER_SECOND, KV_TOKEN_BYTES, Layout};
use crate::demo::pd_report::PdReport;
use crate::demo::processes::PartFailed;
use crate::demo::report::{Measured, Report};
use crate::demo::run::Demo;
use crate::demo::workload::{Pacing, Rung, Workload};
use crate::sim::Profile;

/// The baseline of the first demonstration, as shipped.
const RANDOM: &str = include_str!("../../deploy/config/random.yaml");
/// The configuration we recommend for pods that do everything.
const RECOMMENDED: &str = include_str!("../../deploy/config/recommended.yaml");
/// The one for prefill and decode apart.
const PD: &str = include_str!("../../deploy/config/pd.yaml");

/// Engines of the simulated pods.
const PROFILE: &str = "h100-32b";
/// Pods of both runs of `--pd`.
const PD_PODS: u16 = 4;

/// Flags of `demo`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Starts simulated pods, pinpod and Envoy on loopback; no GPU is involved. The small ladder takes about 75 \
seconds for both configurations together, the published one (--full) about ten minutes.

With --pd: first four pods that compute prompts and output, with the recommended configuration; then as many, \
of which some only compute prompts and the others, each behind a `pinpod sidecar`, the output, with \
deploy/config/pd.yaml. Every prompt is long and new. What to expect: output flows evenly, since no prompt \
interrupts it; first tokens come later, since fewer pods compute prompts and the KV cache has to travel. About \
100 seconds for both.

Exit status: 0 done, 1 a part failed (its logs are kept, the message says where), 130 after Ctrl-C, 143 after \
SIGTERM, 129 after SIGHUP; then every part is stopped and nothing is left behind.")]
#[expect(
    clippy::struct_excessive_bools,
    reason = "independent switches of a command line"
)]
pub(super) struct DemoArgs {
    /// The published workload on 8 pods instead of a small one on 4
    #[arg(long)]
    full: bool,
    /// Prefill and decode apart against pods that do both: as many pods, the same long, new prompts
    #[arg(long, conflicts_with_all = ["full", "continuous"])]
    pd: bool,
    /// With --pd: of the four pods, those that only compute prompts
    #[arg(long, value_name = "PODS", default_value_t = 2, requires = "pd", value_parser = clap::value_parser!(u16).range(1..=3))]
    prefill_pods: u16,
    /// With --pd: most tokens of an engine step, running requests and pieces of prompts together
    #[arg(long, value_name = "TOKENS", default_value_t = 8192, requires = "pd", value_parser = clap::value_parser!(u32).range(64..))]
    max_num_batched_tokens: u32,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
    /// Begin each rate when the one before has lasted its time, not when its requests have ended
    #[arg(long)]
    continuous: bool,
    /// Other rates: requests/s x seconds, such as 5x20,30x60
    #[arg(long, value_name = "RATExSECONDS", value_delimiter = ',', value_parser = rung)]
    ladder: Vec<Rung>,
    /// Simulated seconds after a rate's last arrival at which unanswered requests count as failed
    /// [default: 120, with --full 600]
    #[arg(long, value_name = "SECONDS")]
    patience: Option<f64>,
    /// Times faster than real time [default: 5, with --full 8, with --pd 2.5]
    #[arg(long)]
    time_scale: Option<f64>,
    /// Output tokens in one SSE event; the time between tokens is measured only where it is 1
    /// [default: 25, with --full 100, with --pd 1]
    #[arg(long)]
    tokens_per_event: Option<usize>,
    /// Another EndpointPickerConfig for the second run
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Only the second run, without what it is compared to
    #[arg(long, alias = "skip-random")]
    skip_baseline: bool,
    /// Of arrivals
    #[arg(long, default_value_t = 42)]
    seed: u64,
}

/// Longest a signal may lag behind the end of a part that it ended too.
const SIGNAL_GRACE: Duration = Duration::from_millis(300);

/// Runs both configurations and prints the comparison. Ctrl-C, SIGTERM and SIGHUP end the parts.
pub(super) fn run(args: &DemoArgs) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let mut signals = Signals::new()?;
        let mut scratch = Scratch::new()?;
        let failure = tokio::select! {
            biased;
            interrupted = signals.next() => return Err(interrupted.into()),
            result = demonstrate(args, &scratch.directory) => match result {
                Ok(()) => return Ok(()),
                Err(failure) => failure,
            },
        };
        // Either way, leaving the select dropped, and so killed, every part. A terminal sends Ctrl-C
        // to them too: one may end before the signal is seen here.
        if let Ok(interrupted) = tokio::time::timeout(SIGNAL_GRACE, signals.next()).await {
            return Err(interrupted.into());
        }
        scratch.keep = failure.is::<PartFailed>();
        Err(failure)
    })
}

/// The signals that end a demonstration.
struct Signals {
    interrupt: Signal,
    terminate: Signal,
    hangup: Signal,
}

impl Signals {
    fn new() -> std::io::Result<Self> {
        Ok(Self {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
            hangup: signal(SignalKind::hangup())?,
        })
    }

    /// Waits for one of them.
    async fn next(&mut self) -> Interrupted {
        let kind = tokio::select! {
            _ = self.interrupt.recv() => SignalKind::interrupt(),
            _ = self.terminate.recv() => SignalKind::terminate(),
            _ = self.hangup.recv() => SignalKind::hangup(),
        };
        Interrupted(kind)
    }
}

/// `5x20` as five requests/s for twenty seconds.
fn rung(text: &str) -> Result<Rung, String> {
    let number = |text: &str| {
        text.trim()
            .parse()
            .ok()
            .filter(|n: &f64| *n > 0.0 && n.is_finite())
    };
    let parts = text.split_once('x');
    match parts.map(|(rate, seconds)| (number(rate), number(seconds))) {
        Some((Some(rate), Some(seconds))) => Ok(Rung::new(rate, seconds)),
        _ => Err("expected requests/s x seconds, both above 0, such as 5x20".to_owned()),
    }
}

/// What differs between the demonstrations.
struct Defaults {
    workload: Workload,
    kv_tokens: usize,
    time_scale: f64,
    tokens_per_event: usize,
    patience_seconds: f64,
}

impl Defaults {
    fn of(args: &DemoArgs) -> Self {
        if args.full {
            return Self {
                workload: Workload::published(),
                kv_tokens: 307_328,
                time_scale: 8.0,
                tokens_per_event: 100,
                patience_seconds: 600.0,
            };
        }
        if args.pd {
            return Self {
                workload: Workload::long_prompts(),
                kv_tokens: 307_328,
                time_scale: 2.5,
                tokens_per_event: 1,
                patience_seconds: 120.0,
            };
        }
        Self {
            workload: Workload::small(),
            // Four pods hold a third of the groups in a third less cache each.
            kv_tokens: 204_800,
            time_scale: 5.0,
            tokens_per_event: 25,
            patience_seconds: 120.0,
        }
    }
}

fn demo(args: &DemoArgs) -> anyhow::Result<Demo> {
    let defaults = Defaults::of(args);
    let mut workload = defaults.workload;
    workload.seed = args.seed;
    if args.continuous {
        workload.pacing = Pacing::Continuous;
    }
    if !args.ladder.is_empty() {
        workload.ladder.clone_from(&args.ladder);
    }
    if args.pd {
        workload = workload.without_repetition();
    }
    let positive = |name: &str, value: f64| {
        anyhow::ensure!(value > 0.0 && value.is_finite(), "{name} must be above 0");
        Ok(value)
    };
    let time_scale = args.time_scale.unwrap_or(defaults.time_scale);
    let patience = args.patience.unwrap_or(defaults.patience_seconds);
    Ok(Demo {
        program: std::env::current_exe().context("finding this program")?,
        profile: PROFILE.to_owned(),
        kv_tokens: defaults.kv_tokens,
        max_num_batched_tokens: args.max_num_batched_tokens as usize,
        time_scale: positive("--time-scale", time_scale)?,
        tokens_per_event: args.tokens_per_event.unwrap_or(defaults.tokens_per_event),
        workload,
        patience_seconds: positive("--patience", patience)?,
        progress: !args.json,
    })
}

/// One run: its name, the layout of its pods, its configuration.
type Run<'a> = (&'a str, Layout, &'a str);

/// The two runs, or the second alone.
async fn measure(
    args: &DemoArgs,
    demo: &Demo,
    [baseline, (name, layout, config)]: [Run<'_>; 2],
    directory: &Path,
) -> anyhow::Result<Vec<Measured>> {
    let own = match &args.config {
        Some(path) => {
            Some(std::fs::read_to_string(path).with_context(|| path.display().to_string())?)
        }
        None => None,
    };
    let config = own.as_deref().unwrap_or(config);
    let mut runs = Vec::new();
    if !args.skip_baseline {
        let (name, layout, config) = baseline;
        runs.push(demo.run(name, layout, config, directory).await?);
    }
    runs.push(demo.run(name, layout, config, directory).await?);
    Ok(runs)
}

fn engine() -> String {
    Profile::named(PROFILE).map_or_else(String::new, |profile| profile.to_string())
}

#[expect(clippy::print_stdout, reason = "the output that was asked for")]
async fn demonstrate_pd(args: &DemoArgs, directory: &Path) -> anyhow::Result<()> {
    let demo = demo(args)?;
    let mut report = PdReport {
        simulated: true,
        engine: engine(),
        pods: PD_PODS,
        prefill_pods: args.prefill_pods,
        kv_tokens: demo.kv_tokens,
        max_num_batched_tokens: demo.max_num_batched_tokens,
        kv_token_bytes: KV_TOKEN_BYTES,
        kv_bytes_per_second: KV_BYTES_PER_SECOND,
        time_scale: demo.time_scale,
        patience_seconds: demo.patience_seconds,
        workload: demo.workload.clone(),
        runs: Vec::new(),
    };
    if !args.json {
        println!("{}", report.head());
    }
    let apart = Layout::Disaggregated {
        prefill: args.prefill_pods,
        decode: PD_PODS - args.prefill_pods,
    };
    let runs = [
        ("aggregated", Layout::Aggregated(PD_PODS), RECOMMENDED),
        ("disaggregated", apart, PD),
    ];
    report.runs = measure(args, &demo, runs, directory).await?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        println!("\n{}", report.table());
    }
    Ok(())
}

#[expect(clippy::print_stdout, reason = "the output that was asked for")]
async fn demonstrate(args: &DemoArgs, directory: &Path) -> anyhow::Result<()> {
    if args.pd {
        return demonstrate_pd(args, directory).await;
    }
    let demo = demo(args)?;
    let pods = if args.full { 8 } else { 4 };
    let mut report = Report {
        simulated: true,
        engine: engine(),
        pods,
        kv_tokens: demo.kv_tokens,
        time_scale: demo.time_scale,
        patience_seconds: demo.patience_seconds,
        workload: demo.workload.clone(),
        runs: Vec::new(),
    };
    if !args.json {
        println!("{}", report.head());
    }
    let layout = Layout::Aggregated(pods);
    let runs = [
        ("random", layout, RANDOM),
        ("recommended", layout, RECOMMENDED),
    ];
    report.runs = measure(args, &demo, runs, directory).await?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        println!("\n{}", report.table());
    }
    Ok(())
}

/// A directory that is removed with everything in it, unless an error names a log in it.
struct Scratch {
    directory: PathBuf,
    keep: bool,
}

impl Scratch {
    fn new() -> anyhow::Result<Self> {
        let directory = std::env::temp_dir().join(format!("pinpod-demo-{}", std::process::id()));
        std::fs::create_dir_all(&directory).with_context(|| directory.display().to_string())?;
        Ok(Self {
            directory,
            keep: false,
        })
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if !self.keep {
            // What cannot be removed is left to the system's own cleaning.
            let _ = std::fs::remove_dir_all(&self.directory);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rungs_are_rate_and_seconds() {
        assert_eq!(rung("2.5x20"), Ok(Rung::new(2.5, 20.0)));
        for wrong in ["5", "x", "5x", "0x5", "5x-1", "5xinf", "NaNx5"] {
            assert!(rung(wrong).is_err(), "{wrong}");
        }
    }
}
