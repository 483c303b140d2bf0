//! What a warm scheduling cycle may not do: allocate.

#![expect(
    unsafe_code,
    reason = "counting allocations takes an allocator, and its trait is unsafe"
)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::{Cell, RefCell};
use std::sync::Arc;

use bytes::Bytes;
use pinpod::config::{LoadOptions, builtin, load};
use pinpod::datalayer::discovery::list;
use pinpod::datalayer::{EndpointStore, EngineMetrics};
use pinpod::plugin::Attributes;
use pinpod::request::openai::OpenAiParser;
use pinpod::request::{Body, InferenceRequest, Parser};
use pinpod::scheduling::scheduler::Scratch;
use pinpod::scheduling::{Candidate, Cycle};
use pinpod::telemetry::trace::{Tracer, names, settings};

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

/// The system's allocator, counting on the calling thread.
struct Counting;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

// SAFETY: every call is passed on unchanged; the counter is a thread-local that needs no allocation.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
        // SAFETY: the caller's promises are the system allocator's.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
        // SAFETY: as above.
        unsafe { System.realloc(pointer, layout, size) }
    }
}

/// The optimized baseline of the published guides.
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

#[test]
fn the_allocator_counts() {
    let before = ALLOCATIONS.get();
    drop(std::hint::black_box(Box::new(1)));
    assert_eq!(ALLOCATIONS.get() - before, 1);
}

/// Nine requests of ten, where tracing is on.
#[test]
fn a_request_that_is_not_recorded_allocates_its_trace_context_alone() {
    let settings = settings::read("test", |name| match name {
        "OTEL_TRACES_EXPORTER" => Some("console".to_owned()),
        "OTEL_TRACES_SAMPLER_ARG" => Some("0".to_owned()),
        _ => None,
    });
    let settings = settings.unwrap().settings.unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let (tracer, export) = Tracer::install(settings, None);
        let start = || {
            let before = ALLOCATIONS.get();
            let mut trace = tracer.start(|| None, || names::GATEWAY_REQUEST);
            trace.span.record(|| [("a", "b".to_owned().into())]);
            let child = trace.span.child(names::ORCHESTRATION);
            drop((trace.span, child));
            let in_spans = ALLOCATIONS.get() - before;
            let header = Bytes::from(trace.context.unwrap().traceparent());
            (in_spans, ALLOCATIONS.get() - before, header.len())
        };
        start();
        assert_eq!(start(), (0, 1, 55));
        export.finish().await;
    });
}

#[test]
fn a_warm_cycle_of_the_baseline_allocates_nothing() {
    let config = load(
        Some(BASELINE),
        &LoadOptions::default(),
        &builtin::registry(),
    )
    .unwrap();
    let active = config.activate();
    for count in [8u16, 64, 512] {
        let store = EndpointStore::default();
        let addresses: Vec<String> = (0..count)
            .map(|n| format!("10.0.0.1:{}", 1000 + n))
            .collect();
        store.replace(list::parse(&addresses.join(",")).unwrap());
        for (endpoint, n) in store.snapshot().iter().zip(0u32..) {
            endpoint.set_metrics(EngineMetrics {
                waiting_requests: n % 7,
                kv_cache_usage: f64::from(n % 10) / 10.0,
                updated_at: Some(tokio::time::Instant::now()),
                ..EngineMetrics::default()
            });
        }
        let pool = store.snapshot();
        let candidates: Vec<Candidate> =
            pool.iter().map(|e| Candidate::new(Arc::clone(e))).collect();
        let text = serde_json::json!({"model": "m", "prompt": "x".repeat(32_000)}).to_string();
        let body = Body::from(Bytes::from(text));
        let payload = OpenAiParser.parse("/v1/completions", &body).unwrap();
        let request = InferenceRequest::new("id", payload, body);
        let rng = RefCell::new(fastrand::Rng::with_seed(1));
        let (mut attributes, mut scratch) = (Attributes::default(), Scratch::default());
        let mut cycle_once = || {
            let before = ALLOCATIONS.get();
            attributes.clear();
            for producer in &active.producers {
                producer
                    .plugin
                    .produce(&request, &candidates, &mut attributes)
                    .unwrap();
            }
            let cycle = Cycle {
                request: &request,
                attributes: &attributes,
                now: tokio::time::Instant::now(),
                rng: &rng,
            };
            let result = active.scheduler.schedule(&cycle, &candidates, &mut scratch);
            assert!(result.is_ok());
            ALLOCATIONS.get() - before
        };
        cycle_once();
        cycle_once();
        let warm: Vec<u64> = (0..3).map(|_| cycle_once()).collect();
        assert_eq!(warm, [0, 0, 0], "{count} candidates");
    }
}
