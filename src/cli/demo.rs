//! `pinpod demo`

use std::time::Duration;

use anyhow::Context;

use crate::demo::report;
use crate::demo::run::Demo;
use crate::demo::workload::Workload;

/// The baseline and the configuration we recommend, as shipped.
const CONFIGS: [(&str, &str); 2] = [
    ("random", include_str!("../../deploy/config/random.yaml")),
    (
        "recommended",
        include_str!("../../deploy/config/recommended.yaml"),
    ),
];

/// Flags of `demo`.
#[derive(Debug, clap::Args)]
pub(super) struct DemoArgs {
    /// The published workload on 8 pods (some minutes) instead of a small one on 4
    #[arg(long)]
    full: bool,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
    /// Times faster than real time
    #[arg(long)]
    time_scale: Option<f64>,
    /// Output tokens in one SSE event
    #[arg(long)]
    tokens_per_event: Option<usize>,
    /// Another EndpointPickerConfig in place of the recommended one
    #[arg(long, value_name = "FILE")]
    config: Option<std::path::PathBuf>,
    /// Only the second run, without the random baseline
    #[arg(long)]
    skip_random: bool,
    /// Of arrivals
    #[arg(long, default_value_t = 42)]
    seed: u64,
}

/// Runs both configurations and prints the comparison. Ctrl-C ends the parts and exits with 130.
pub(super) fn run(args: &DemoArgs) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()?;
    runtime.block_on(async {
        tokio::select! {
            result = demonstrate(args) => result,
            interrupted = tokio::signal::ctrl_c() => {
                interrupted?;
                // Leaving the select dropped, and so killed, every part.
                Err(super::Interrupted.into())
            }
        }
    })
}

fn demo(args: &DemoArgs) -> anyhow::Result<Demo> {
    let mut workload = if args.full {
        Workload::published()
    } else {
        Workload::small()
    };
    workload.seed = args.seed;
    Ok(Demo {
        program: std::env::current_exe().context("finding this program")?,
        pods: if args.full { 8 } else { 4 },
        profile: "h100-32b".to_owned(),
        // Four pods hold a third of the groups in a third less cache each.
        kv_tokens: if args.full { 307_328 } else { 204_800 },
        time_scale: args.time_scale.unwrap_or(if args.full { 8.0 } else { 5.0 }),
        tokens_per_event: args
            .tokens_per_event
            .unwrap_or(if args.full { 100 } else { 25 }),
        workload,
        patience: Duration::from_secs(if args.full { 600 } else { 40 }),
        progress: !args.json,
    })
}

#[expect(clippy::print_stdout, reason = "the output that was asked for")]
async fn demonstrate(args: &DemoArgs) -> anyhow::Result<()> {
    let demo = demo(args)?;
    let directory = Scratch::new()?;
    if !args.json {
        println!(
            "{} simulated pods ({}), real Envoy, pinpod: {} groups of {} prompts, {} + {} tokens in, {} out.\n\
             The pods are simulated; times are those of the simulated engines, {} times faster than real ones.\n",
            demo.pods,
            demo.profile,
            demo.workload.groups,
            demo.workload.prompts_per_group,
            demo.workload.prefix_tokens,
            demo.workload.question_tokens,
            demo.workload.output_tokens,
            demo.time_scale,
        );
    }
    let mut runs = Vec::new();
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
        runs.push(
            demo.run(name, own.as_deref().unwrap_or(config), &directory.0)
                .await?,
        );
    }
    if args.json {
        println!("{}", serde_json::to_string_pretty(&runs)?);
    } else {
        println!("\n{}", report::table(&runs));
    }
    Ok(())
}

/// A directory that is removed with everything in it.
struct Scratch(std::path::PathBuf);

impl Scratch {
    fn new() -> anyhow::Result<Self> {
        let path = std::env::temp_dir().join(format!("pinpod-demo-{}", std::process::id()));
        std::fs::create_dir_all(&path).with_context(|| path.display().to_string())?;
        Ok(Self(path))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // What cannot be removed is left to the system's own cleaning.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
