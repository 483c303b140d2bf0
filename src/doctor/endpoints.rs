//! The model servers: do they answer, do they expose what scorers read, do they agree with each other.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;

use futures_util::StreamExt;

use super::finding::Report;
use super::http;
use super::picker::samples;
use crate::datalayer::EndpointSpec;
use crate::datalayer::extractors::core_metrics::{EngineSeries, engine_series};

/// Endpoints that are asked at once.
const CONCURRENT: usize = 16;

/// How the picker scrapes.
#[derive(Debug, Clone)]
pub struct Scrape {
    /// https instead of http.
    pub tls: bool,
    /// Path of the metrics.
    pub path: String,
}

/// What one endpoint told about itself.
#[derive(Debug, Default)]
struct Seen {
    findings: Report,
    models: BTreeSet<String>,
    block_size: Option<String>,
}

/// Asks every endpoint.
pub async fn check(endpoints: &[EndpointSpec], scrape: &Scrape, report: &mut Report) {
    let engines = engine_series();
    let asked = endpoints.iter().map(|endpoint| {
        let (address, engines) = (endpoint.address, &engines);
        async move { (address, one(address, scrape, engines).await) }
    });
    let mut seen: BTreeMap<SocketAddr, Seen> = futures_util::stream::iter(asked)
        .buffer_unordered(CONCURRENT)
        .collect()
        .await;
    for endpoint in seen.values_mut() {
        report.append(std::mem::take(&mut endpoint.findings));
    }
    agreement(&seen, report);
}

async fn one(address: SocketAddr, scrape: &Scrape, engines: &[EngineSeries]) -> Seen {
    let mut seen = Seen::default();
    let subject = format!("endpoint {address}");
    match http::get(address, scrape.tls, &scrape.path).await {
        Err(error) => {
            seen.findings.error(
                "endpoint",
                &subject,
                error,
                "is the model server up, is this its port (targetPorts), does it speak https (metrics-data-source scheme)?",
            );
            return seen;
        }
        Ok((200, body)) => {
            let text = String::from_utf8_lossy(&body);
            families(&subject, &text, engines, &mut seen.findings);
            cache(&subject, &text, &mut seen);
        }
        Ok((status, _)) => seen.findings.error(
            "endpoint-metrics",
            &subject,
            format!("{} answers {status}", scrape.path),
            "set `path` of metrics-data-source; vLLM has /metrics unless --disable-log-stats is given, SGLang needs --enable-metrics",
        ),
    }
    if let Ok((200, body)) = http::get(address, scrape.tls, "/v1/models").await {
        let document: serde_json::Value = serde_json::from_slice(&body).unwrap_or_default();
        let models = document["data"].as_array().into_iter().flatten();
        seen.models = models
            .filter_map(|model| model["id"].as_str().map(str::to_owned))
            .collect();
    }
    seen
}

/// The engine is the one most of whose load series are there.
fn families(subject: &str, text: &str, engines: &[EngineSeries], report: &mut Report) {
    let present = |name: &String| has_family(text, name);
    let known = |engine: &&EngineSeries| engine.load.iter().filter(|n| present(n)).count();
    let Some(engine) = engines.iter().max_by_key(known).filter(|e| known(e) > 0) else {
        report.error(
            "endpoint-metrics",
            subject,
            "exposes the load of no engine that is known",
            "describe its series in core-metrics-extractor's engineConfigs",
        );
        return;
    };
    let missing = |names: &[String]| -> Vec<String> {
        names.iter().filter(|n| !present(n)).cloned().collect()
    };
    let load = missing(&engine.load);
    if !load.is_empty() {
        report.error(
            "endpoint-metrics",
            subject,
            format!("looks like {} but lacks {}", engine.engine, load.join(", ")),
            "scorers that read them see nothing: name the engine's own series in core-metrics-extractor's engineConfigs",
        );
        return;
    }
    let optional = missing(&engine.optional);
    // Adapters are only announced by engines that serve some.
    let geometry: Vec<_> = optional.iter().filter(|n| !n.contains("lora")).collect();
    if geometry.is_empty() {
        report.ok(
            "endpoint-metrics",
            subject,
            format!("{} answers", engine.engine),
        );
    } else {
        report.warning(
            "endpoint-metrics",
            subject,
            format!("{} without {geometry:?}", engine.engine),
            "block size and cache size are assumed: give them to the prefix producer (blockSizeTokens, lruCapacityPerServer)",
        );
    }
}

/// A `# TYPE` line or a sample of it.
fn has_family(text: &str, name: &str) -> bool {
    text.lines().any(|line| {
        let line = line.strip_prefix("# TYPE ").unwrap_or(line);
        line.strip_prefix(name)
            .is_some_and(|rest| rest.starts_with(['{', ' ']))
    })
}

/// What vLLM says of its prefix cache.
fn cache(subject: &str, text: &str, seen: &mut Seen) {
    for (labels, _) in samples(text, "vllm:cache_config_info") {
        let label = |name: &str| {
            let (_, rest) = labels.split_once(&format!("{name}=\""))?;
            rest.split('"').next()
        };
        seen.block_size = label("block_size").map(str::to_owned);
        if label("enable_prefix_caching") == Some("False") {
            seen.findings.warning(
                "prefix-cache",
                subject,
                "prefix caching is off",
                "start vLLM with --enable-prefix-caching, or leave the prefix scorers out: they follow a cache that is not there",
            );
        }
    }
}

/// Endpoints of a pool should serve the same.
fn agreement(seen: &BTreeMap<SocketAddr, Seen>, report: &mut Report) {
    let mut by_models: BTreeMap<&BTreeSet<String>, Vec<SocketAddr>> = BTreeMap::new();
    let mut by_block: BTreeMap<&String, Vec<SocketAddr>> = BTreeMap::new();
    for (address, endpoint) in seen {
        if !endpoint.models.is_empty() {
            by_models
                .entry(&endpoint.models)
                .or_default()
                .push(*address);
        }
        if let Some(size) = &endpoint.block_size {
            by_block.entry(size).or_default().push(*address);
        }
    }
    if by_models.len() > 1 {
        report.warning(
            "pool-models",
            "pool",
            format!("endpoints serve different models: {by_models:?}"),
            "a request for a model may go to an endpoint without it: make a pool for each set, or add lora-affinity-scorer where adapters differ",
        );
    }
    if by_block.len() > 1 {
        report.warning(
            "pool-blocks",
            "pool",
            format!("endpoints have different block sizes: {by_block:?}"),
            "prefix matches are computed with one of them: start all engines with the same --block-size",
        );
    }
    if let Some((models, _)) = by_models.first_key_value().filter(|_| by_models.len() == 1) {
        report.ok("pool-models", "pool", format!("all serve {models:?}"));
    }
}
