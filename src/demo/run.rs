//! One demonstration: for each configuration fresh pods, pinpod and Envoy, the same traffic, a result.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use bytes::Bytes;
use http::{Request, header};
use http_body_util::{BodyExt, Empty};
use hyper_util::rt::TokioIo;
use indicatif::{ProgressBar, ProgressStyle};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::client::{Connections, Outcome, drive};
use super::envoy::ORIGINAL_DST;
use super::processes::{Envoy, Picker, Sims};
use super::report::{Measured, Rung, percentile};
use super::workload::Workload;

/// What to demonstrate.
#[derive(Debug, Clone)]
pub struct Demo {
    /// This program.
    pub program: PathBuf,
    /// Simulated pods.
    pub pods: u16,
    /// Engine profile.
    pub profile: String,
    /// KV cache of a pod, tokens.
    pub kv_tokens: usize,
    /// Times faster than real time.
    pub time_scale: f64,
    /// Output tokens in one SSE event.
    pub tokens_per_event: usize,
    /// The traffic.
    pub workload: Workload,
    /// Wall time to wait for answers after the last request.
    pub patience: Duration,
    /// Show a progress bar.
    pub progress: bool,
}

/// Model the pods serve.
const MODEL: &str = "sim-model";

impl Demo {
    /// Runs the traffic against `config` (a document); temporary files live in `directory`.
    pub async fn run(
        &self,
        name: &str,
        config: &str,
        directory: &Path,
    ) -> anyhow::Result<Measured> {
        let flags = [
            format!("--profile={}", self.profile),
            format!("--kv-tokens={}", self.kv_tokens),
            format!("--time-scale={}", self.time_scale),
            format!("--tokens-per-event={}", self.tokens_per_event),
            format!("--model={MODEL}"),
        ];
        let sims = Sims::start(&self.program, self.pods, &flags, directory).await?;
        let document = directory.join(format!("{name}.yaml"));
        std::fs::write(&document, config)?;
        let arguments = [
            sims.endpoints_flag(),
            format!("--config-file={}", document.display()),
        ];
        let picker = Picker::start(&self.program, &arguments, directory).await?;
        let envoy = Envoy::start(
            ORIGINAL_DST,
            picker.grpc,
            true,
            sims.addresses.clone(),
            directory,
        )
        .await?;
        self.measure(name, &sims, &picker, &envoy).await
    }

    async fn measure(
        &self,
        name: &str,
        sims: &Sims,
        picker: &Picker,
        envoy: &Envoy,
    ) -> anyhow::Result<Measured> {
        let arrivals = self.workload.arrivals();
        let bodies = Arc::new(self.workload.bodies(MODEL));
        let gateway: SocketAddr = ([127, 0, 0, 1], envoy.port).into();
        let connections = Arc::new(Connections::new(gateway));
        let (ended, ends) = mpsc::channel(1024);
        let bar = tokio::spawn(show_progress(
            name.to_owned(),
            arrivals.len() as u64,
            ends,
            self.progress,
        ));
        let started = Instant::now();
        let throughput = tokio::spawn(sample_throughput(
            sims.addresses.clone(),
            self.workload.ladder.clone(),
            self.time_scale,
            started,
        ));
        let outcomes = drive(
            connections,
            bodies,
            &arrivals,
            self.time_scale,
            self.patience,
            ended,
        )
        .await;
        let elapsed = started.elapsed().as_secs_f64() * self.time_scale;
        bar.await?;
        let rates = throughput.await??;
        let pods = pod_totals(&sims.addresses).await?;
        let decisions = metrics(([127, 0, 0, 1], picker.metrics).into()).await?;
        Ok(self.summarise(name, &outcomes, elapsed, &rates, &pods, &decisions))
    }

    fn summarise(
        &self,
        name: &str,
        outcomes: &[Outcome],
        elapsed: f64,
        rates: &[f64],
        pods: &[HashMap<String, f64>],
        decisions: &HashMap<String, f64>,
    ) -> Measured {
        let ttfts = |rung: Option<usize>| -> Vec<f64> {
            let of = outcomes.iter().filter(|o| rung.is_none_or(|r| o.rung == r));
            of.filter_map(|o| o.ttft).collect()
        };
        let mut all = ttfts(None);
        let mean = all.iter().sum::<f64>() / (all.len() as f64).max(1.0);
        let mut lags: Vec<f64> = outcomes.iter().map(|o| o.lag).collect();
        let sum = |key: &str| pods.iter().filter_map(|p| p.get(key)).sum::<f64>();
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "counters"
        )]
        let finished: Vec<u64> = pods
            .iter()
            .map(|p| p.get("finished").copied().unwrap_or(0.0) as u64)
            .collect();
        let average = finished.iter().sum::<u64>() as f64 / (finished.len() as f64).max(1.0);
        let variance = finished
            .iter()
            .map(|&n| (n as f64 - average).powi(2))
            .sum::<f64>();
        let rungs = self.workload.ladder.iter().zip(rates).enumerate().map(
            |(rung, ((rate, _), tokens))| Rung {
                rate: *rate,
                output_tokens_per_second: *tokens,
                ttft_p90: percentile(&mut ttfts(Some(rung)), 0.9),
            },
        );
        let answered = outcomes.iter().filter(|o| o.total.is_some()).count();
        Measured {
            name: name.to_owned(),
            requests: outcomes.len(),
            failed: outcomes.len() - answered,
            ttft_mean: mean,
            ttft_p50: percentile(&mut all, 0.5),
            ttft_p90: percentile(&mut all, 0.9),
            ttft_p99: percentile(&mut all, 0.99),
            output_tokens_per_second: (answered * self.workload.output_tokens) as f64 / elapsed,
            rungs: rungs.collect(),
            hit_rate: sum("vllm:prefix_cache_hits_total")
                / sum("vllm:prefix_cache_queries_total").max(1.0),
            spread: (
                finished.iter().copied().min().unwrap_or(0),
                finished.iter().copied().max().unwrap_or(0),
                (variance / (finished.len() as f64).max(1.0)).sqrt(),
            ),
            decision_mean_us: 1e6
                * decisions
                    .get("pinpod_decision_duration_seconds_sum")
                    .unwrap_or(&0.0)
                / decisions
                    .get("pinpod_decision_duration_seconds_count")
                    .unwrap_or(&1.0)
                    .max(1.0),
            decision_p99_us: 1e6
                * bucket_percentile(decisions, "pinpod_decision_duration_seconds", 0.99),
            client_lag_p99: percentile(&mut lags, 0.99),
            engine_lag: sum("lag_seconds"),
        }
    }
}

async fn show_progress(name: String, total: u64, mut ends: mpsc::Receiver<()>, visible: bool) {
    let bar = if visible {
        ProgressBar::new(total)
    } else {
        ProgressBar::hidden()
    };
    if let Ok(style) =
        ProgressStyle::with_template("{msg:>12} [{bar:40}] {pos}/{len} requests, {elapsed}")
    {
        bar.set_style(style);
    }
    bar.set_message(name);
    while ends.recv().await.is_some() {
        bar.inc(1);
    }
    bar.finish();
}

/// Output tokens per virtual second over all pods, for each rung while it lasts.
async fn sample_throughput(
    pods: Vec<SocketAddr>,
    ladder: Vec<(f64, f64)>,
    time_scale: f64,
    started: Instant,
) -> anyhow::Result<Vec<f64>> {
    let mut rates = Vec::new();
    let (mut before, mut at) = (0.0, started);
    let mut end = 0.0;
    for (_, seconds) in ladder {
        end += seconds;
        tokio::time::sleep_until(started + Duration::from_secs_f64(end / time_scale)).await;
        let totals = pod_totals(&pods).await?;
        let tokens: f64 = totals
            .iter()
            .filter_map(|p| p.get("vllm:generation_tokens_total"))
            .sum();
        let now = Instant::now();
        rates.push((tokens - before) / ((now - at).as_secs_f64() * time_scale).max(1e-9));
        (before, at) = (tokens, now);
    }
    Ok(rates)
}

/// Metrics and counters of each pod by name.
async fn pod_totals(pods: &[SocketAddr]) -> anyhow::Result<Vec<HashMap<String, f64>>> {
    let mut all = Vec::new();
    for pod in pods {
        let mut values = metrics(*pod).await?;
        let stats: HashMap<String, f64> = serde_json::from_slice(&get(*pod, "/sim/stats").await?)?;
        values.extend(stats);
        all.push(values);
    }
    Ok(all)
}

/// An exposition as values by series name, labels dropped but `le`; equal names are summed.
async fn metrics(address: SocketAddr) -> anyhow::Result<HashMap<String, f64>> {
    let text = String::from_utf8(get(address, "/metrics").await?)?;
    let mut values = HashMap::new();
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        let Some((series, value)) = line.rsplit_once(' ') else {
            continue;
        };
        let name = series.split('{').next().unwrap_or_default();
        let bound = series
            .split_once("le=\"")
            .and_then(|(_, rest)| rest.split('"').next());
        let key = bound.map_or_else(|| name.to_owned(), |bound| format!("{name}:{bound}"));
        *values.entry(key).or_insert(0.0) += value.parse().unwrap_or(0.0);
    }
    Ok(values)
}

/// Upper bound of the bucket in which `share` of the observations are reached.
fn bucket_percentile(values: &HashMap<String, f64>, name: &str, share: f64) -> f64 {
    let prefix = format!("{name}_bucket:");
    let mut buckets: Vec<(f64, f64)> = values
        .iter()
        .filter_map(|(key, count)| Some((key.strip_prefix(&prefix)?.parse().ok()?, *count)))
        .collect();
    buckets.sort_by(|a, b| a.0.total_cmp(&b.0));
    let total = values.get(&format!("{name}_count")).copied().unwrap_or(0.0);
    buckets
        .iter()
        .find(|(_, count)| *count >= share * total)
        .map_or(f64::INFINITY, |(bound, _)| *bound)
}

async fn get(address: SocketAddr, path: &str) -> anyhow::Result<Vec<u8>> {
    let stream = TcpStream::connect(address)
        .await
        .with_context(|| address.to_string())?;
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    tokio::spawn(connection);
    let request = Request::get(path)
        .header(header::HOST, "localhost")
        .body(Empty::<Bytes>::new())?;
    let response = sender.send_request(request).await?;
    Ok(response.into_body().collect().await?.to_bytes().to_vec())
}
