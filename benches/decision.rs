//! The decision alone, from the complete request to the pick: parse, hash, match, score, book.
//!
//! `cargo bench --bench decision`

use std::sync::Arc;

use bytes::Bytes;
use pinpod::config::{LoadOptions, builtin, load};
use pinpod::control::director::DirectorOptions;
use pinpod::control::{BodyKnowledge, Director, Intake, Step, Subset};
use pinpod::datalayer::EndpointStore;
use pinpod::datalayer::discovery::list;
use pinpod::demo::report::percentile;
use pinpod::request::{Body, Headers};
use pinpod::telemetry::metrics::{self, Metrics};
use tokio::time::Instant;

const ROUNDS: usize = 3000;
/// Distinct prompts, in groups that share three quarters, as in `extproc_stream`.
const PROMPTS: usize = 64;
const GROUPS: usize = 16;

fn main() -> anyhow::Result<()> {
    metrics::install()?;
    show("| endpoints | prompt | p50 us | p99 us |");
    show("|---|---|---|---|");
    for endpoints in [8, 64, 512] {
        for bytes in [2_000, 32_000, 400_000] {
            let (p50, p99) = measure(endpoints, bytes)?;
            show(&format!(
                "| {endpoints} | {} KB | {p50:.1} | {p99:.1} |",
                bytes / 1000
            ));
        }
    }
    Ok(())
}

#[expect(clippy::print_stdout, reason = "a bench reports on stdout")]
fn show(text: &str) {
    println!("{text}");
}

fn measure(endpoints: usize, prompt_bytes: usize) -> anyhow::Result<(f64, f64)> {
    let text = include_str!("../deploy/config/recommended.yaml");
    let config = load(Some(text), &LoadOptions::default(), &builtin::registry())?;
    let store = Arc::new(EndpointStore::default());
    let addresses: Vec<String> = (0..endpoints)
        .map(|n| format!("10.0.{}.{}:8000", n / 250, n % 250 + 1))
        .collect();
    store.replace(list::parse(&addresses.join(",")).map_err(anyhow::Error::msg)?);
    let options = DirectorOptions {
        ignore_subset: false,
        emit_scores: false,
        strip_control_headers: true,
        seed: None,
    };
    let director = Director::new(store, config.activate(), options, Metrics::new());
    let bodies: Vec<Vec<Bytes>> = (0..PROMPTS)
        .map(|number| body(number, prompt_bytes))
        .collect();
    let mut times = Vec::with_capacity(ROUNDS);
    for round in 0..ROUNDS + PROMPTS {
        let Some(pieces) = bodies.get(round % PROMPTS) else {
            continue;
        };
        let intake = Intake {
            headers: headers(),
            body: pieces.iter().cloned().collect::<Body>(),
            early: None,
            subset: Subset::Any,
            received_at: Instant::now(),
            trace: pinpod::telemetry::trace::Span::default(),
        };
        let started = Instant::now();
        let Step::Done(decision) = director.decide(intake, BodyKnowledge::Complete) else {
            anyhow::bail!("the recommended configuration never waits");
        };
        let decision = decision?;
        let took = started.elapsed().as_secs_f64() * 1e6;
        drop(decision);
        // The first time round prompts are new.
        if round >= PROMPTS {
            times.push(took);
        }
    }
    Ok((percentile(&mut times, 0.5), percentile(&mut times, 0.99)))
}

fn body(number: usize, prompt_bytes: usize) -> Vec<Bytes> {
    let text = |seed: usize, bytes: usize| -> String {
        let mut rng = fastrand::Rng::with_seed(seed as u64);
        (0..bytes)
            .map(|at| if at % 6 == 5 { ' ' } else { rng.lowercase() })
            .collect()
    };
    let shared = prompt_bytes / 4 * 3;
    let prompt = text(number % GROUPS, shared) + &text(1000 + number, prompt_bytes - shared);
    let body = serde_json::json!({
        "model": "sim-model", "stream": true, "max_tokens": 100,
        "messages": [{"role": "system", "content": "You are helpful."}, {"role": "user", "content": prompt}],
    });
    let body = Bytes::from(body.to_string());
    (0..body.len())
        .step_by(65_536)
        .map(|at| body.slice(at..(at + 65_536).min(body.len())))
        .collect()
}

fn headers() -> Headers {
    let lines = [
        (":authority", "gateway.test"),
        (":path", "/v1/chat/completions"),
        (":method", "POST"),
        ("content-type", "application/json"),
        ("user-agent", "bench/1.0"),
        ("x-forwarded-for", "192.0.2.1"),
        ("x-request-id", "5c9d1e7a-6d0b-4a0e-8f0b-1f2e3d4c5b6a"),
        ("accept-encoding", "gzip"),
    ];
    lines
        .into_iter()
        .map(|(name, value)| (name.to_owned(), Bytes::from_static(value.as_bytes())))
        .collect()
}
