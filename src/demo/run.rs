//! One demonstration: for each configuration fresh pods, pinpod and Envoy, the same traffic, a result.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use indicatif::{ProgressBar, ProgressStyle};
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::client::{Connections, Outcome, drive};
use super::parts::{Addresses, Layout, Parts};
use super::processes::Process;
use super::report::{Decision, Flow, Handover, Measured, RungMeasured, Spread, Times, percentile};
use super::scrape::{Samples, metrics, pod_stats};
use super::workload::{Arrival, Pacing, Rung, Workload};

/// What to demonstrate.
#[derive(Debug, Clone)]
pub struct Demo {
    /// This program.
    pub program: PathBuf,
    /// Engine profile.
    pub profile: String,
    /// KV cache of a pod, tokens.
    pub kv_tokens: usize,
    /// Most tokens of an engine step.
    pub max_num_batched_tokens: usize,
    /// Times faster than real time.
    pub time_scale: f64,
    /// Output tokens in one SSE event.
    pub tokens_per_event: usize,
    /// The traffic.
    pub workload: Workload,
    /// Virtual seconds to wait for answers after the last request of a stage; what is unanswered
    /// then is given up and counts as failed.
    pub patience_seconds: f64,
    /// Show a progress bar.
    pub progress: bool,
}

/// Model the pods serve.
const MODEL: &str = "sim-model";
/// Output tokens an engine made.
const TOKENS: &str = "vllm:generation_tokens_total";
/// Time of pinpod's decisions: of its histograms the one with bounds from 5 us on.
const DECISION: &str = "pinpod_decision_duration_seconds";
/// How often the parts are checked for having ended.
const WATCH_INTERVAL: Duration = Duration::from_millis(100);

/// What engines made in a stretch of time, virtual seconds.
#[derive(Debug, Clone, Copy, Default)]
struct Made {
    tokens: f64,
    seconds: f64,
}

impl Made {
    fn rate(self) -> f64 {
        self.tokens / self.seconds.max(1e-9)
    }
}

/// All stages of a run.
#[derive(Debug, Default)]
struct Driving {
    outcomes: Vec<Outcome>,
    /// By rung.
    rungs: Vec<Made>,
    /// All stages together.
    total: Made,
}

impl Demo {
    /// Runs the traffic against pods of this layout and `config` (a document); temporary files live in
    /// `directory`. Fails when a part ends before the run does.
    pub async fn run(
        &self,
        name: &str,
        layout: Layout,
        config: &str,
        directory: &Path,
    ) -> anyhow::Result<Measured> {
        let mut parts = self.start(name, layout, config, directory).await?;
        let addresses = parts.addresses();
        let mut processes = parts.processes();
        let failure = tokio::select! {
            ended = first_end(&mut processes) => return Err(ended),
            measured = self.measure(name, &addresses) => match measured {
                Ok(measured) => return Ok(measured),
                Err(failure) => failure,
            },
        };
        // A part that ends is the reason of whatever fails with it.
        let ended = tokio::time::timeout(2 * WATCH_INTERVAL, first_end(&mut processes)).await;
        Err(ended.unwrap_or(failure))
    }

    async fn start(
        &self,
        name: &str,
        layout: Layout,
        config: &str,
        directory: &Path,
    ) -> anyhow::Result<Parts> {
        let flags = [
            format!("--profile={}", self.profile),
            format!("--kv-tokens={}", self.kv_tokens),
            format!("--max-num-batched-tokens={}", self.max_num_batched_tokens),
            format!("--time-scale={}", self.time_scale),
            format!("--tokens-per-event={}", self.tokens_per_event),
            format!("--model={MODEL}"),
        ];
        let document = directory.join(format!("{name}.yaml"));
        std::fs::write(&document, config)?;
        Parts::start(&self.program, layout, &flags, &document, directory).await
    }

    async fn measure(&self, name: &str, addresses: &Addresses) -> anyhow::Result<Measured> {
        let driving = self.drive(name, addresses).await?;
        let engines = addresses.engines();
        let pods = metrics(&engines).await?;
        let stats = pod_stats(&engines).await?;
        let picker = metrics(&[addresses.picker_metrics]).await?;
        let picker = picker.into_iter().next().unwrap_or_default();
        let sum = |series: &str| pods.iter().map(|pod| pod.get(series)).sum::<f64>();
        let finished: Vec<u64> = stats.iter().map(|pod| pod.finished).collect();
        let (answered, prefilled) = finished.split_at(addresses.answering.len());
        let outcomes = &driving.outcomes;
        let mut lags: Vec<f64> = outcomes.iter().map(|outcome| outcome.lag).collect();
        Ok(Measured {
            name: name.to_owned(),
            requests: outcomes.len(),
            failed: outcomes.iter().filter(|o| o.ttft.is_none()).count(),
            ttft: Times::of(&mut outcomes.iter().filter_map(|o| o.ttft).collect::<Vec<_>>()),
            flow: self.flow(outcomes.iter()),
            handover: handover(answered.iter().sum(), &sum),
            output_tokens_per_second: driving.total.rate(),
            rungs: self.rungs(&driving),
            hit_rate: sum("vllm:prefix_cache_hits_total")
                / sum("vllm:prefix_cache_queries_total").max(1.0),
            spread: Spread::of(answered),
            prefill_spread: (!prefilled.is_empty()).then(|| Spread::of(prefilled)),
            decision: decision(&picker),
            client_lag_p99: percentile(&mut lags, 0.99),
            engine_lag: stats.iter().map(|pod| pod.lag_seconds).sum(),
        })
    }

    /// Sends every stage.
    async fn drive(&self, name: &str, addresses: &Addresses) -> anyhow::Result<Driving> {
        let stages = self.workload.stages();
        // Progress is shown, never waited for: a tick that finds the channel full is lost.
        let (progress, mut ends) = mpsc::channel(1024);
        let bar = self.bar(stages.iter().map(Vec::len).sum());
        let ticks = bar.clone();
        let show = async move {
            while ends.recv().await.is_some() {
                ticks.inc(1);
            }
        };
        let session = Session {
            demo: self,
            pods: &addresses.answering,
            bodies: self.workload.bodies(MODEL),
            connections: Arc::new(Connections::new(addresses.gateway)),
            progress,
        };
        let marks = bar.clone();
        // The session, and with it the sender, ends with its block: then the other one ends.
        let send = async move {
            let mut driving = Driving::default();
            for stage in &stages {
                marks.set_message(self.label(name, stage));
                session.stage(stage, &mut driving).await?;
                marks.set_position(driving.outcomes.len() as u64);
            }
            anyhow::Ok(driving)
        };
        let (driving, ()) = tokio::join!(send, show);
        bar.finish();
        driving
    }

    fn bar(&self, requests: usize) -> ProgressBar {
        if !self.progress {
            return ProgressBar::hidden();
        }
        let bar = ProgressBar::new(requests as u64);
        let template = "{msg:>24} [{bar:40}] {pos}/{len} requests, {elapsed}";
        // The template is a constant; if it were wrong, the built-in style would do.
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        bar
    }

    fn label(&self, name: &str, stage: &[Arrival]) -> String {
        let rung = stage
            .first()
            .and_then(|arrival| self.workload.ladder.get(arrival.rung));
        match (self.workload.pacing, rung) {
            (Pacing::Draining, Some(rung)) => format!("{name}, {}/s", rung.rate),
            _ => name.to_owned(),
        }
    }

    fn rungs(&self, driving: &Driving) -> Vec<RungMeasured> {
        let rungs = self.workload.ladder.iter().zip(&driving.rungs).enumerate();
        rungs
            .map(|(index, (rung, made))| self.rung(rung, *made, index, &driving.outcomes))
            .collect()
    }

    fn rung(&self, rung: &Rung, made: Made, index: usize, outcomes: &[Outcome]) -> RungMeasured {
        let own = || outcomes.iter().filter(|outcome| outcome.rung == index);
        let requests = own().count();
        let failed = own().filter(|outcome| outcome.ttft.is_none()).count();
        RungMeasured {
            rate: rung.rate,
            warm_up: rung.warm_up,
            requests,
            failed,
            seconds: made.seconds,
            requests_per_second: (requests - failed) as f64 / made.seconds.max(1e-9),
            output_tokens_per_second: made.rate(),
            ttft: Times::of(&mut own().filter_map(|outcome| outcome.ttft).collect::<Vec<_>>()),
            flow: self.flow(own()),
        }
    }

    fn flow<'a>(&self, outcomes: impl Iterator<Item = &'a Outcome> + Clone) -> Option<Flow> {
        let one_by_one = self.tokens_per_event == 1;
        one_by_one.then(|| Flow::of(outcomes.map(|outcome| &outcome.gaps[..])))
    }
}

/// What pods that `answered` so many requests had from others, by the sums of their series.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a count; the cast saturates"
)]
fn handover(answered: u64, sum: &impl Fn(&str) -> f64) -> Handover {
    let apart = sum("vllm:nixl_xfer_time_seconds_count");
    Handover {
        apart: apart as u64,
        local: answered.saturating_sub(apart as u64),
        bytes: sum("vllm:nixl_bytes_transferred_sum"),
        seconds: sum("vllm:nixl_xfer_time_seconds_sum") / apart.max(1.0),
    }
}

/// A run in progress.
struct Session<'a> {
    demo: &'a Demo,
    pods: &'a [SocketAddr],
    bodies: Vec<Bytes>,
    connections: Arc<Connections>,
    progress: mpsc::Sender<()>,
}

impl Session<'_> {
    /// Sends one stage and adds what came of it to `driving`.
    async fn stage(&self, arrivals: &[Arrival], driving: &mut Driving) -> anyhow::Result<()> {
        let before = self.tokens().await?;
        let sent = drive(
            &self.connections,
            &self.bodies,
            arrivals,
            self.demo.time_scale,
            self.demo.patience_seconds,
            &self.progress,
        );
        let driven = match self.demo.workload.pacing {
            Pacing::Draining => sent.await,
            Pacing::Continuous => {
                let (driven, windows) = tokio::join!(sent, self.windows());
                driving.rungs = windows?;
                driven
            }
        };
        let made = Made {
            tokens: self.tokens().await? - before,
            seconds: driven.seconds,
        };
        if self.demo.workload.pacing == Pacing::Draining {
            driving.rungs.push(made);
        }
        driving.total.tokens += made.tokens;
        driving.total.seconds += made.seconds;
        driving.outcomes.extend(driven.outcomes);
        Ok(())
    }

    /// What the engines make while the requests of each rung arrive.
    async fn windows(&self) -> anyhow::Result<Vec<Made>> {
        let Demo {
            workload,
            time_scale,
            ..
        } = self.demo;
        let started = Instant::now();
        let (mut before, mut at, mut end) = (0.0, started, 0.0);
        let mut windows = Vec::new();
        for rung in &workload.ladder {
            end += rung.seconds;
            tokio::time::sleep_until(started + Duration::from_secs_f64(end / time_scale)).await;
            let (tokens, now) = (self.tokens().await?, Instant::now());
            windows.push(Made {
                tokens: tokens - before,
                seconds: (now - at).as_secs_f64() * time_scale,
            });
            (before, at) = (tokens, now);
        }
        Ok(windows)
    }

    /// Output tokens of all pods since their start.
    async fn tokens(&self) -> anyhow::Result<f64> {
        let pods = metrics(self.pods).await?;
        Ok(pods.iter().map(|pod| pod.get(TOKENS)).sum())
    }
}

fn decision(picker: &Samples) -> Decision {
    let bound = |share| {
        let seconds = picker.bucket_percentile(DECISION, share);
        seconds.is_finite().then_some(1e6 * seconds)
    };
    Decision {
        mean_us: 1e6 * picker.mean(DECISION),
        p50_us: bound(0.5),
        p99_us: bound(0.99),
    }
}

/// Never ready while all of `processes` run; the first that ended, as an error that names its log.
async fn first_end(processes: &mut [&mut Process]) -> anyhow::Error {
    loop {
        for process in &mut *processes {
            if let Err(ended) = process.check() {
                return ended;
            }
        }
        tokio::time::sleep(WATCH_INTERVAL).await;
    }
}
