//! `pinpod demo`

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context;
use tokio::signal::unix::{Signal, SignalKind, signal};

use super::Interrupted;
use crate::demo::processes::PartFailed;
use crate::demo::report::Report;
use crate::demo::run::Demo;
use crate::demo::workload::{Pacing, Rung, Workload};
use crate::sim::Profile;

/// The baseline and the configuration we recommend, as shipped.
const CONFIGS: [(&str, &str); 2] = [
    ("random", include_str!("../../deploy/config/random.yaml")),
    (
        "recommended",
        include_str!("../../deploy/config/recommended.yaml"),
    ),
];

/// Engines of the simulated pods.
const PROFILE: &str = "h100-32b";

/// Flags of `demo`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Starts simulated pods, pinpod and Envoy on loopback; no GPU is involved. The small ladder takes about 75
seconds for both configurations together, the published one (--full) about ten minutes.

Exit status: 0 done, 1 a part failed (its logs are kept, the message says where), 130 after Ctrl-C,
143 after SIGTERM, 129 after SIGHUP; then every part is stopped and nothing is left behind.")]
#[expect(
    clippy::struct_excessive_bools,
    reason = "independent switches of a command line"
)]
pub(super) struct DemoArgs {
    /// The published workload on 8 pods instead of a small one on 4
    #[arg(long)]
    full: bool,
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
    /// Times faster than real time [default: 5, with --full 8]
    #[arg(long)]
    time_scale: Option<f64>,
    /// Output tokens in one SSE event [default: 25, with --full 100]
    #[arg(long)]
    tokens_per_event: Option<usize>,
    /// Another EndpointPickerConfig in place of the recommended one
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Only the second run, without the random baseline
    #[arg(long)]
    skip_random: bool,
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

fn demo(args: &DemoArgs) -> anyhow::Result<Demo> {
    let mut workload = if args.full {
        Workload::published()
    } else {
        Workload::small()
    };
    workload.seed = args.seed;
    if args.continuous {
        workload.pacing = Pacing::Continuous;
    }
    if !args.ladder.is_empty() {
        workload.ladder.clone_from(&args.ladder);
    }
    let positive = |name: &str, value: f64| {
        anyhow::ensure!(value > 0.0 && value.is_finite(), "{name} must be above 0");
        Ok(value)
    };
    let (small_or_full_scale, patience) = if args.full {
        (8.0, 600.0)
    } else {
        (5.0, 120.0)
    };
    Ok(Demo {
        program: std::env::current_exe().context("finding this program")?,
        pods: if args.full { 8 } else { 4 },
        profile: PROFILE.to_owned(),
        // Four pods hold a third of the groups in a third less cache each.
        kv_tokens: if args.full { 307_328 } else { 204_800 },
        time_scale: positive(
            "--time-scale",
            args.time_scale.unwrap_or(small_or_full_scale),
        )?,
        tokens_per_event: args
            .tokens_per_event
            .unwrap_or(if args.full { 100 } else { 25 }),
        workload,
        patience_seconds: positive("--patience", args.patience.unwrap_or(patience))?,
        progress: !args.json,
    })
}

#[expect(clippy::print_stdout, reason = "the output that was asked for")]
async fn demonstrate(args: &DemoArgs, directory: &Path) -> anyhow::Result<()> {
    let demo = demo(args)?;
    let mut report = Report {
        simulated: true,
        engine: Profile::named(PROFILE).map_or_else(String::new, |p| p.to_string()),
        pods: demo.pods,
        kv_tokens: demo.kv_tokens,
        time_scale: demo.time_scale,
        patience_seconds: demo.patience_seconds,
        workload: demo.workload.clone(),
        runs: Vec::new(),
    };
    if !args.json {
        println!("{}", report.head());
    }
    for (name, config) in CONFIGS {
        if name == "random" && args.skip_random {
            continue;
        }
        let own = match &args.config {
            Some(path) if name != "random" => {
                Some(std::fs::read_to_string(path).with_context(|| path.display().to_string())?)
            }
            _ => None,
        };
        let config = own.as_deref().unwrap_or(config);
        report.runs.push(demo.run(name, config, directory).await?);
    }
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
