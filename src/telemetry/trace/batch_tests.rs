use std::net::{Ipv4Addr, SocketAddr};

use super::super::otlp::{Otlp, endpoint};
use super::super::settings::{OtlpSettings, TlsFiles};
use super::super::{RequestTrace, Site, Tracer, Tracing, sampler::Sampler, span::Span};
use super::*;
use crate::telemetry::metrics::{Exposition, counted};

const SITE: Site = Site::internal("tests", "s");

fn limits() -> BatchLimits {
    BatchLimits {
        max_queue: 3,
        max_batch: 2,
        delay: Duration::from_millis(1),
        timeout: Duration::from_millis(300),
    }
}

/// A tracer that records everything into a queue.
fn tracer(limits: &BatchLimits) -> (Tracer, mpsc::Receiver<Finished>) {
    Tracer::into_queue(limits.max_queue)
}

fn start(tracer: &Tracer) -> Span {
    let RequestTrace { span, .. } = tracer.start(|| None, || SITE);
    assert!(span.is_recording());
    span
}

fn total(exposition: &Exposition, result: &str) -> u64 {
    let text = exposition.render();
    let name = format!("pinpod_trace_spans_total{{result=\"{result}\"}} ");
    let line = text.lines().find_map(|line| line.strip_prefix(&name));
    line.map_or(0, |number| number.parse().unwrap())
}

#[test]
fn a_full_queue_drops_and_counts() {
    let exposition = counted(|| {
        let (tracer, mut spans) = tracer(&limits());
        let root = start(&tracer);
        for _ in 0..4 {
            drop(root.child(SITE));
        }
        drop(root);
        let queued: Vec<_> = std::iter::from_fn(|| spans.try_recv().ok()).collect();
        // Three fit; the fourth child and the root do not.
        assert_eq!(queued.len(), 3);
        assert!(queued.iter().all(|span| span.parent.is_some()));
    });
    assert_eq!(total(&exposition, "dropped"), 2);
}

#[test]
fn spans_know_their_place_and_time() {
    let (tracer, mut spans) = tracer(&limits());
    let mut root = start(&tracer);
    root.record(|| [("a", 1u32.into()), ("b", "x".into())]);
    root.record(|| [("a", "y".repeat(2000).into())]);
    let mut child = root.child(SITE);
    child.fail("first");
    child.fail("second");
    let twin = child.child_from_start(SITE);
    drop(twin);
    drop(child);
    drop(root);
    let [twin, child, root] = std::array::from_fn(|_| spans.try_recv().unwrap());
    assert_eq!(
        (root.parent, child.parent, twin.parent),
        (None, Some(root.id), Some(child.id))
    );
    assert!(root.trace == child.trace && root.trace == twin.trace);
    assert_eq!(twin.start_unix_nanos, child.start_unix_nanos);
    assert!(root.start_unix_nanos <= child.start_unix_nanos);
    assert!(child.end_unix_nanos <= root.end_unix_nanos);
    let now = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap();
    assert!(now.as_nanos() - u128::from(root.end_unix_nanos) < 60_000_000_000);
    assert_eq!(child.error.as_deref(), Some("first"));
    // Replaced, and cut to its bound.
    let names: Vec<_> = root.attributes.iter().map(|(name, _)| *name).collect();
    assert_eq!(names, ["a", "b"]);
    assert_eq!(root.attributes[0].1, "y".repeat(1024).into());
}

#[test]
fn nothing_is_evaluated_for_a_request_that_is_not_recorded() {
    let off = Tracer::default().start(|| panic!("read"), || panic!("made"));
    assert!(off.context.is_none());
    let (sink, mut spans) = queue(&limits());
    let tracing = Tracing {
        sampler: Sampler::new(0.0),
        sink,
    };
    let tracer = Tracer(Some(Arc::new(tracing)));
    let mut trace = tracer.start(|| None, || panic!("made"));
    assert!(!trace.context.unwrap().sampled && trace.is_root);
    trace.span.record(|| -> [_; 1] { panic!("evaluated") });
    trace.span.fail("x");
    drop(trace.span.child(SITE).child_from_start(SITE));
    drop(trace);
    assert!(spans.try_recv().is_err());
}

fn otlp(address: SocketAddr) -> Exporter {
    let settings = OtlpSettings {
        endpoint: endpoint(&address.to_string(), "http").unwrap(),
        tls: TlsFiles::default(),
        headers: Vec::new(),
        timeout: Duration::from_millis(100),
    };
    Exporter::Otlp(Box::new(Otlp::new(settings, None, &[])))
}

/// Exports five spans to a collector that does not take them; returns the counters.
fn export_to(address: SocketAddr) -> Exposition {
    counted(|| {
        let limits = BatchLimits {
            max_queue: 5,
            ..limits()
        };
        let (tracer, spans) = tracer(&limits);
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async {
            let export = Export::start(spans, otlp(address), limits);
            (0..5).for_each(|_| drop(start(&tracer)));
            let began = Instant::now();
            export.finish().await;
            assert!(
                began.elapsed() < FLUSH_TIMEOUT,
                "the limits of three batches are 0.9 s"
            );
            // Nobody exports any more.
            drop(start(&tracer));
        });
    })
}

#[test]
fn a_collector_that_is_not_there_costs_its_spans() {
    // Bound and given up, so that nobody listens.
    let nobody = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let address = nobody.local_addr().unwrap();
    drop(nobody);
    let exposition = export_to(address);
    assert_eq!(
        (total(&exposition, "failed"), total(&exposition, "dropped")),
        (5, 1)
    );
    assert_eq!(total(&exposition, "exported"), 0);
}

#[test]
fn a_collector_that_is_silent_costs_its_spans() {
    // The system accepts, nobody answers.
    let silent = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let exposition = export_to(silent.local_addr().unwrap());
    assert_eq!(
        (total(&exposition, "failed"), total(&exposition, "dropped")),
        (5, 1)
    );
}
