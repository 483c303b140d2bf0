//! One scheduling cycle of the published optimized baseline: filters, four scorers, one picker. Then one of
//! the joint choice of a prefill and a decode endpoint, which weighs every pair.
//!
//! `cargo bench --bench schedule`

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use pinpod::config::{LoadOptions, builtin, load};
use pinpod::datalayer::{EndpointDetails, EndpointSpec, EndpointStore, EngineMetrics};
use pinpod::demo::report::percentile;
use pinpod::plugin::{Attributes, InFlightSlot};
use pinpod::request::openai::OpenAiParser;
use pinpod::request::{Body, InferenceRequest, Parser};
use pinpod::scheduling::scheduler::Scratch;
use pinpod::scheduling::{Candidate, Cycle};
use pinpod::telemetry::metrics;
use tokio::time::Instant;

const ROUNDS: usize = 2000;
const CANDIDATES: [u16; 4] = [8, 64, 512, 4096];
const BASELINE: &str = "
apiVersion: llm-d.ai/v1alpha1
kind: EndpointPickerConfig
plugins: [{type: queue-scorer}, {type: kv-cache-utilization-scorer}, {type: prefix-cache-scorer}, {type: no-hit-lru-scorer}]
schedulingProfiles:
- name: default
  plugins:
  - {pluginRef: queue-scorer, weight: 2}
  - {pluginRef: kv-cache-utilization-scorer, weight: 2}
  - {pluginRef: prefix-cache-scorer, weight: 3}
  - {pluginRef: no-hit-lru-scorer, weight: 2}
";

/// Endpoints of a kind; more than 64 are cut down to the 64 cheapest before they are paired.
const SIDES: [u16; 4] = [4, 16, 64, 256];
const PAIRS: &str = "
apiVersion: llm-d.ai/v1alpha1
kind: EndpointPickerConfig
plugins:
- {type: prefill-filter}
- {type: decode-filter}
- {type: prefix-based-pd-decider, parameters: {nonCachedTokens: 16}}
- type: disagg-profile-handler
  parameters: {deciders: {prefill: prefix-based-pd-decider}, maxPrefillEndpoints: 2, pairing: {}}
schedulingProfiles:
- {name: prefill, plugins: [{pluginRef: prefill-filter}]}
- {name: decode, plugins: [{pluginRef: decode-filter}]}
";

fn main() -> anyhow::Result<()> {
    metrics::install()?;
    show("| candidates | prefix | p50 us | p99 us | ns per candidate |");
    show("|---|---|---|---|---|");
    for count in CANDIDATES {
        for (prefix, warm) in [("cold", false), ("held by one", true)] {
            let (p50, p99) = measure(BASELINE, &pool(count, false), warm)?;
            let each = p50 * 1000.0 / f64::from(count);
            show(&format!(
                "| {count} | {prefix} | {p50:.2} | {p99:.2} | {each:.0} |"
            ));
        }
    }
    show("");
    show("| prefill x decode | p50 us | p99 us | ns per pair |");
    show("|---|---|---|---|");
    for side in SIDES {
        let (p50, p99) = measure(PAIRS, &pool(2 * side, true), false)?;
        let pairs = f64::from(side.min(64)).powi(2);
        let each = p50 * 1000.0 / pairs;
        show(&format!(
            "| {side} x {side} | {p50:.2} | {p99:.2} | {each:.1} |"
        ));
    }
    Ok(())
}

/// Endpoints with different load; with roles, every other one is for prefill.
fn pool(count: u16, roles: bool) -> Vec<EndpointSpec> {
    let spec = |n: u16| {
        let mut labels = BTreeMap::new();
        if roles {
            let role = if n.is_multiple_of(2) {
                "prefill"
            } else {
                "decode"
            };
            labels.insert("llm-d.ai/role".to_owned(), role.to_owned());
        }
        EndpointSpec {
            name: format!("e{n}"),
            namespace: "default".to_owned(),
            address: ([10, 0, 0, 1], 1000 + n).into(),
            labels,
            rank: 0,
            details: EndpointDetails::default(),
        }
    };
    (0..count).map(spec).collect()
}

#[expect(clippy::print_stdout, reason = "a bench reports on stdout")]
fn show(text: &str) {
    println!("{text}");
}

fn measure(document: &str, specs: &[EndpointSpec], warm: bool) -> anyhow::Result<(f64, f64)> {
    let config = load(
        Some(document),
        &LoadOptions::default(),
        &builtin::registry(),
    )?;
    let active = config.activate();
    let store = EndpointStore::default();
    store.replace(specs.to_vec());
    let pool = store.snapshot();
    for (endpoint, n) in pool.iter().zip(0u32..) {
        endpoint.set_metrics(EngineMetrics {
            waiting_requests: n % 7,
            kv_cache_usage: f64::from(n % 10) / 10.0,
            updated_at: Some(Instant::now()),
            ..EngineMetrics::default()
        });
        let load = endpoint.in_flight(InFlightSlot::default());
        load.book(i64::from(n % 5), i64::from(n % 11) * 500);
    }
    let candidates: Vec<Candidate> = pool.iter().map(|e| Candidate::new(Arc::clone(e))).collect();
    let text = serde_json::json!({"model": "m", "prompt": "x".repeat(2000)}).to_string();
    let body = Body::from(Bytes::from(text));
    let payload = OpenAiParser
        .parse("/v1/completions", &body)
        .map_err(anyhow::Error::msg)?;
    let request = InferenceRequest::new("id", payload, body);
    let rng = RefCell::new(fastrand::Rng::with_seed(1));
    let (mut attributes, mut scratch) = (Attributes::default(), Scratch::default());
    let mut times = Vec::with_capacity(ROUNDS);
    for round in 0..ROUNDS + 10 {
        attributes.clear();
        for producer in &active.producers {
            producer
                .plugin
                .produce(&request, &candidates, &mut attributes)?;
        }
        let cycle = Cycle {
            request: &request,
            attributes: &attributes,
            now: Instant::now(),
            rng: &rng,
        };
        let started = Instant::now();
        let result = active
            .scheduler
            .schedule(&cycle, &candidates, &mut scratch)?;
        let took = started.elapsed().as_secs_f64() * 1e6;
        if round == 0 && warm {
            for hook in &active.pre_request {
                let mut outcome = pinpod::scheduling::Outcome::default();
                hook.plugin
                    .on_pick(&cycle, &candidates, &result, &mut outcome);
            }
        }
        if round >= 10 {
            times.push(took);
        }
    }
    Ok((percentile(&mut times, 0.5), percentile(&mut times, 0.99)))
}
