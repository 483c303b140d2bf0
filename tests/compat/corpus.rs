//! Documents of every kind that is published, in our own words: each loads and does what it is for, or
//! says what it has to wait for.

use std::path::Path;

use pinpod::config::{builtin, show};

use super::disagg;
use super::pool::{Pool, load, node, prompt};

/// What becomes of a document.
enum Outcome {
    /// It loads, and this holds.
    Routes(fn(&Pool)),
    /// It names something of a later version; the error says what.
    Later(&'static str),
    /// It loads; its prompts become tokens at an engine, which is not here.
    Loads,
    /// The reference refuses it, too; the error says why.
    Refused(&'static str),
}
use Outcome::{Later, Loads, Refused, Routes};

/// File name without `.yaml`, whether it needs `--allow-experimental-plugins`, and the outcome.
const CORPUS: &[(&str, bool, Outcome)] = &[
    ("router-decode-prefix", false, Routes(decodes_and_sticks)),
    (
        "router-decode-prefix-sim",
        false,
        Routes(decodes_and_sticks),
    ),
    (
        "router-estimated-prefix",
        false,
        Routes(prefix_beats_a_queue),
    ),
    ("router-precise-prefix", false, Loads),
    ("router-kv-events-sim", false, Loads),
    ("router-kv-events-render", false, Loads),
    ("router-no-hit-lru", false, Routes(decodes_and_sticks)),
    (
        "router-embeddings-cache-stale",
        false,
        Refused("unknown field `cacheSizeInMB`"),
    ),
    ("router-embeddings-cache", false, Loads),
    ("router-embeddings-cache-only", false, Routes(images_stick)),
    ("router-burst-prefix", true, Routes(bursts_stay_together)),
    (
        "router-pd",
        false,
        Routes(disagg::cold_prompts_prefill_elsewhere),
    ),
    (
        "router-pd-sim",
        false,
        Routes(disagg::cold_prompts_prefill_elsewhere),
    ),
    ("router-pd-topology", true, Routes(disagg::prefill_is_near)),
    (
        "router-e-p-d",
        false,
        Routes(disagg::images_and_cold_prompts_elsewhere),
    ),
    ("router-e-pd", false, Routes(disagg::images_elsewhere)),
    (
        "router-data-parallel",
        false,
        Routes(disagg::the_rank_is_in_a_header),
    ),
    ("router-gpu", true, Routes(busy_gpus_are_left_out)),
    ("router-probabilistic-admitter", false, Routes(anywhere)),
    ("router-program-aware", false, Later("flowControl")),
    ("router-soft-ceiling", true, Later("flowControl")),
    ("chart-default", false, Routes(load_and_prefix)),
    ("chart-sglang", false, Routes(load_and_prefix)),
    ("chart-vllm-grpc", false, Routes(grpc_only)),
    ("chart-triton", false, Routes(least_loaded_without_prefix)),
    (
        "chart-latency-predictor",
        false,
        Later("predicted-latency-producer"),
    ),
    ("chart-payload-agnostic", true, Routes(sessions_return)),
    ("guide-optimized-baseline", false, Routes(baseline)),
    (
        "guide-optimized-baseline-queueing",
        false,
        Later("flowControl"),
    ),
    ("guide-precise-prefix", false, Loads),
    ("guide-tiered-prefix", false, Routes(host_memory_remembers)),
    ("guide-pd", false, Routes(disagg::prefill_always_elsewhere)),
    (
        "guide-pd-nested",
        false,
        Routes(disagg::prefill_always_elsewhere),
    ),
    (
        "guide-wide-ep",
        false,
        Routes(disagg::prefill_always_elsewhere),
    ),
    (
        "guide-wide-ep-ranks",
        false,
        Routes(disagg::nothing_is_split),
    ),
    ("guide-flow-control", false, Later("flowControl")),
    ("guide-flow-control-off", false, Routes(load_and_prefix)),
    ("guide-agentic", false, Routes(affinity_until_300k_tokens)),
    (
        "guide-multimodal",
        false,
        Routes(affinity_until_600k_tokens),
    ),
    (
        "guide-predicted-latency",
        false,
        Later("predicted-latency-producer"),
    ),
    ("guide-no-kubernetes", false, Routes(endpoints_from_a_file)),
    ("guide-leader-only", false, Routes(leaders_serve)),
    ("guide-long-context", false, Loads),
    (
        "guide-long-context-estimated",
        false,
        Routes(long_prompts_have_their_endpoint),
    ),
    ("test-default", false, Routes(adapters_count)),
    ("test-datalayer", false, Routes(adapters_count)),
    ("test-attribute-reporter", false, Routes(shortest_queue)),
    ("perf-precise", false, Routes(sticks)),
    ("perf-random", false, Routes(anywhere)),
    ("perf-random-passthrough", false, Routes(any_path_anywhere)),
    (
        "e2e-pd-deprecated",
        false,
        Routes(disagg::cold_prompts_prefill_elsewhere),
    ),
    ("e2e-decode-only", false, Routes(disagg::nothing_is_split)),
    ("e2e-generate", false, Routes(token_ids_stick)),
    ("e2e-precise-scorer", false, Routes(decodes_and_sticks)),
    (
        "coordinator-by-header",
        true,
        Routes(the_header_names_the_role),
    ),
    ("coordinator-role", false, Routes(own_role_and_live_load)),
    (
        "test-loader-types",
        false,
        Refused("plugin type 'test-one' is not registered"),
    ),
    (
        "test-loader-stale-detector",
        false,
        Refused(
            "line 8: flowControl.saturationDetector.metricsStalenessThreshold: failed to decode configuration: unknown field",
        ),
    ),
    (
        "test-multicluster",
        true,
        Routes(clusters_by_load_and_prefix),
    ),
    ("operator-precise", false, Routes(sticks)),
    (
        "operator-busyness",
        false,
        Routes(idle_first_and_busy_are_equal),
    ),
    ("operator-legacy", false, Routes(load_and_prefix)),
    ("operator-pd-flat", false, Routes(disagg::nothing_is_split)),
    ("operator-role-label", false, Routes(decodes_and_sticks)),
    ("operator-inline.json", false, Routes(queue_and_prefix)),
    ("sample-load-and-prefix", false, Routes(two_addresses)),
    ("sample-lora", false, Routes(adapters_count)),
    (
        "sample-legacy-labels",
        false,
        Routes(disagg::labels_beside_a_headers_handler),
    ),
    ("sample-by-label", false, Routes(labels_of_old)),
];

fn text(name: &str) -> String {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/configs");
    let file = if name.contains('.') {
        name.to_owned()
    } else {
        format!("{name}.yaml")
    };
    std::fs::read_to_string(directory.join(file)).unwrap()
}

#[test]
fn every_document_does_what_it_is_for() {
    for (name, alpha, outcome) in CORPUS {
        let loaded = load(&text(name), *alpha);
        match (outcome, loaded) {
            (Routes(check), Ok(config)) => {
                // Shown only when a check fails.
                println!("{name}");
                check(&Pool::new(config));
            }
            (Loads, Ok(_)) => {}
            (Routes(_) | Loads, Err(error)) => panic!("{name} does not load: {error}"),
            (Later(what), Err(error)) => {
                assert!(error.contains(what), "{name}: {error}");
                assert!(
                    error.contains("known but not yet available in this version"),
                    "{name}: {error}"
                );
                assert!(error.starts_with("line "), "{name}: {error}");
            }
            (Refused(why), Err(error)) => assert!(error.contains(why), "{name}: {error}"),
            // Give it a check of what it is for.
            (Later(_) | Refused(_), Ok(_)) => panic!("{name} loads now: move it to Routes"),
        }
    }
}

#[test]
fn every_file_is_in_the_corpus() {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/configs");
    let mut files: Vec<String> = std::fs::read_dir(directory)
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .map(|name| name.strip_suffix(".yaml").unwrap_or(&name).to_owned())
        .collect();
    let mut named: Vec<&str> = CORPUS.iter().map(|(name, ..)| *name).collect();
    files.sort_unstable();
    named.sort_unstable();
    assert_eq!(files, named);
}

#[test]
fn alpha_documents_need_the_flag() {
    for (name, alpha, outcome) in CORPUS {
        if *alpha && matches!(outcome, Routes(_)) {
            let error = load(&text(name), false).unwrap_err();
            assert!(
                error.contains("has Alpha stability level"),
                "{name}: {error}"
            );
        }
    }
}

/// Comments aside, what a resolved document resolves to is itself.
#[test]
fn resolved_documents_load_and_resolve_to_themselves() {
    let registry = builtin::registry();
    let plain = |text: &str| -> String {
        let lines = text.lines().filter(|line| !line.starts_with('#'));
        lines.collect::<Vec<_>>().join("\n")
    };
    for (name, alpha, outcome) in CORPUS {
        if !matches!(outcome, Routes(_) | Loads) {
            continue;
        }
        let config = load(&text(name), *alpha).unwrap();
        let first = show::resolved(&config, &registry);
        let again = load(&first, *alpha).unwrap_or_else(|e| panic!("{name}: {e}\n{first}"));
        assert_eq!(
            plain(&first),
            plain(&show::resolved(&again, &registry)),
            "{name}"
        );
        // What the document said in vain may be said again, but nothing is added that has no effect.
        let said = |w: &str| config.warnings.iter().any(|before| before.text == w);
        let mut in_vain = again
            .warnings
            .iter()
            .filter(|w| w.text.contains("no effect"));
        assert!(in_vain.all(|w| said(&w.text)), "{name}\n{first}");
    }
}

/// With a seed, equal requests to equal pools get equal answers; ids, or bodies without one, make the
/// difference.
#[test]
fn seeded_picks_are_reproducible() {
    let run = |pool: &Pool, headers: &[(&str, &str)]| -> String {
        let bodies = (0..32).map(|n| format!(r#"{{"model": "m", "prompt": "{n}"}}"#));
        let picks = bodies.map(|body| pool.pick_body("/v1/completions", &body, headers));
        picks.collect()
    };
    let pool = || {
        let pool = Pool::new(load(&text("perf-random"), false).unwrap());
        pool.set(&[node("a"), node("b")]);
        pool
    };
    for headers in [&[][..], &[("x-request-id", "")][..]] {
        let picks = run(&pool(), headers);
        assert_eq!(picks, run(&pool(), headers));
        assert!(picks.contains('a') && picks.contains('b'), "{picks}");
    }
    let one_id = run(&pool(), &[("x-request-id", "same")]);
    assert!(one_id.chars().all(|c| one_id.starts_with(c)), "{one_id}");
}

/// Prefill endpoints never serve, and a prompt stays where it was.
fn decodes_and_sticks(pool: &Pool) {
    pool.set(&[
        node("p").role("prefill"),
        node("d1").role("decode"),
        node("d2").role("decode"),
        node("d3").role("decode"),
    ]);
    for topic in ["rivers", "bridges", "lamps"] {
        let home = pool.answers(&prompt(topic));
        assert_eq!(home.len(), 1, "{home:?}");
        assert_ne!(home[0], "p");
    }
}

/// No engine here publishes events, so the precise producer goes by what the approximate one knows.
fn sticks(pool: &Pool) {
    pool.set(&[node("a"), node("b"), node("c")]);
    for topic in ["rivers", "bridges", "lamps"] {
        let home = pool.answers(&prompt(topic));
        assert_eq!(home.len(), 1, "{home:?}");
    }
}

/// Both weights are 1. Cold: 0.5 * (1 - 0/128) = 0.5 at b, 0.5 * (1 - 64/128) = 0.25 at a. Warm at a:
/// 1 + 0.25 against 0.5.
fn prefix_beats_a_queue(pool: &Pool) {
    pool.set(&[node("a"), node("b").waiting(64)]);
    assert_eq!(pool.pick(&prompt("cold")), "a");
    pool.set(&[node("a").waiting(64), node("b")]);
    assert_eq!(pool.pick(&prompt("colder")), "b");
    assert_eq!(pool.answers(&prompt("cold")), ["a"]);
}

/// Queue 2, KV room 2, prefix 3. Cold, a: 2 * 1 + 2 * 0.9 = 3.8, b: 0 + 2 * 0.5 = 1.
/// Warm at a, which has the queue now: 0 + 2 * 0.5 + 3 = 4 against 2 + 2 * 0.9 = 3.8.
/// With a's cache full: 0 + 2 * 0.1 + 3 = 3.2.
fn load_and_prefix(pool: &Pool) {
    pool.set(&[node("a").kv(0.1), node("b").kv(0.5).waiting(5)]);
    assert_eq!(pool.answers(&prompt("harbours")), ["a"]);
    pool.set(&[node("a").kv(0.5).waiting(5), node("b").kv(0.1)]);
    assert_eq!(pool.pick(&prompt("harbours")), "a");
    assert_eq!(pool.pick(&prompt("unheard of")), "b");
    pool.set(&[node("a").kv(0.9).waiting(5), node("b").kv(0.1)]);
    assert_eq!(pool.pick(&prompt("harbours")), "b");
}

/// The same with 2 for whoever served a cold request longest ago, 0.5 * 2 for all when it is warm.
/// Equal endpoints take turns with cold requests.
fn baseline(pool: &Pool) {
    pool.set(&[node("a"), node("b"), node("c")]);
    let mut homes = [
        pool.pick(&prompt("one")),
        pool.pick(&prompt("two")),
        pool.pick(&prompt("three")),
    ];
    homes.sort_unstable();
    assert_eq!(homes, ["a", "b", "c"]);
    // Warm: 0 + 2 * 0.5 + 3 + 1 = 5 against 2 + 2 * 0.9 + 0 + 1 = 4.8.
    let home = pool.pick(&prompt("one"));
    let names = ["a", "b", "c"].map(|name| {
        if name == home {
            node(name).kv(0.5).waiting(5)
        } else {
            node(name).kv(0.1)
        }
    });
    pool.set(&names);
    assert_eq!(pool.pick(&prompt("one")), home);
}

/// Queue 2, prefix 3 * (0.25 * min(1, matched / 8192)^2 + 0.75 * share): a whole prompt of some 700
/// tokens counts 3 * 0.75 = 2.25, and little more, against a queue's 2.
fn queue_and_prefix(pool: &Pool) {
    pool.set(&[node("a"), node("b").waiting(5)]);
    assert_eq!(pool.answers(&prompt("gates")), ["a"]);
    pool.set(&[node("a").waiting(5), node("b")]);
    assert_eq!(pool.pick(&prompt("gates")), "a");
    assert_eq!(pool.pick(&prompt("doors")), "b");
}

/// Bodies are not read, so only load counts.
fn least_loaded_without_prefix(pool: &Pool) {
    pool.set(&[node("a").waiting(5), node("b")]);
    assert_eq!(pool.answers(&prompt("any")), ["b"]);
    pool.set(&[node("a"), node("b").waiting(5)]);
    assert_eq!(pool.answers(&prompt("any")), ["a"]);
}

/// The chart names one parser; other paths have none.
fn grpc_only(pool: &Pool) {
    pool.set(&[node("a").waiting(5), node("b")]);
    let body = r#"{"model": "m", "prompt": "p"}"#;
    assert!(pool.try_decide("/v1/completions", body, &[]).is_err());
    let parsers: Vec<_> = pool.config.parsers.iter().map(|p| p.plugin_type).collect();
    assert_eq!(parsers, ["vllmgrpc-parser"]);
}

/// An image was encoded on a, which draws the next request with it against a longer queue: 4 to 1.
fn images_stick(pool: &Pool) {
    let body = |image: &str| {
        format!(
            r#"{{"model": "m", "messages": [{{"role": "user", "content": [{{"type": "image_url", "image_url": {{"url": "https://pictures.test/{image}.png"}}}}, {{"type": "text", "text": "what is it?"}}]}}]}}"#
        )
    };
    let ask = |image: &str| pool.pick_body("/v1/chat/completions", &body(image), &[]);
    pool.set(&[node("a"), node("b").waiting(3)]);
    assert_eq!(ask("boat"), "a");
    pool.set(&[node("a").waiting(3), node("b")]);
    assert_eq!(ask("boat"), "a");
    assert_eq!(ask("other"), "b");
}

/// Engines have 4 KV blocks, so the GPU index, and the third one, forget a prompt of some ten as soon as
/// others come. The other index holds it: 3 * 1 there against at most 2 * 1 for the spreading scorer.
fn host_memory_remembers(pool: &Pool) {
    let nodes = [
        node("a").blocks(4),
        node("b").blocks(4),
        node("c").blocks(4),
    ];
    pool.set(&nodes);
    let home = pool.pick(&prompt("first"));
    for topic in ["x", "y", "z", "v", "w"] {
        pool.pick(&prompt(topic));
    }
    assert_eq!(pool.answers(&prompt("first")), [home]);
    let indexes = pool.config.instances.iter();
    let indexes: Vec<&str> = indexes
        .filter(|i| i.plugin_type == "approx-prefix-cache-producer")
        .map(|i| i.name.name.as_str())
        .collect();
    // The spreading scorer is bound to neither, so a third is made for it.
    assert_eq!(
        indexes,
        ["gpu-prefix", "cpu-prefix", "approx-prefix-cache-producer"]
    );
}

/// The prompt stays at its endpoint while the tokens before it take less than 18 s there, at 16,444 a
/// second: 295,992 tokens.
fn affinity_until_300k_tokens(pool: &Pool) {
    affinity(pool, 290_000, 300_000);
}

/// The same with 36 s at 15,928 tokens a second: 573,408 tokens.
fn affinity_until_600k_tokens(pool: &Pool) {
    affinity(pool, 570_000, 580_000);
}

fn affinity(pool: &Pool, bearable: i64, too_much: i64) {
    pool.set(&[node("a"), node("b").load(3, 3000)]);
    assert_eq!(pool.pick(&prompt("agents")), "a");
    pool.set(&[node("a").load(9, bearable), node("b")]);
    assert_eq!(pool.answers(&prompt("agents")), ["a"]);
    assert_eq!(pool.pick(&prompt("something new")), "b");
    pool.set(&[node("a").load(9, too_much), node("b")]);
    assert_eq!(pool.pick(&prompt("agents")), "b");
}

fn endpoints_from_a_file(pool: &Pool) {
    assert!(pool.config.discovery.is_some());
    // The scraper's own name does not bring a second one: defaults are off.
    let sources = pool.config.sources.iter().map(|s| s.name.name.as_str());
    assert_eq!(sources.collect::<Vec<_>>(), ["scraper"]);
    baseline(pool);
}

fn leaders_serve(pool: &Pool) {
    let index = "leaderworkerset.sigs.k8s.io/worker-index";
    pool.set(&[
        node("leader").label(index, "0").waiting(9),
        node("worker").label(index, "1"),
        node("stray"),
    ]);
    assert_eq!(pool.answers(&prompt("large model")), ["leader"]);
}

/// Ranges are tokens, a token is four bytes; an endpoint whose range does not fit is left out.
fn long_prompts_have_their_endpoint(pool: &Pool) {
    let range = "llm-d.ai/context-length-range";
    pool.set(&[
        node("short").label(range, "0-100"),
        node("long").label(range, "100-100000"),
    ]);
    assert_eq!(pool.answers("hi"), ["short"]);
    assert_eq!(pool.answers(&prompt("long story")), ["long"]);
}

/// The model is an adapter that b has loaded; a has room for none.
fn adapters_count(pool: &Pool) {
    pool.set(&[node("a").adapter("other"), node("b").adapter("m")]);
    assert_eq!(pool.answers("a"), ["b"]);
    pool.set(&[node("a").adapter("m"), node("b").adapter("other")]);
    assert_eq!(pool.answers("b"), ["a"]);
}

fn anywhere(pool: &Pool) {
    pool.set(&[node("a").waiting(100).kv(1.0), node("b")]);
    assert_eq!(pool.answers(&prompt("dice")), ["a", "b"]);
}

fn any_path_anywhere(pool: &Pool) {
    anywhere(pool);
    pool.pick_body("/some/where", "no JSON", &[]);
}

/// 200 token ids are four blocks of 64.
fn token_ids_stick(pool: &Pool) {
    pool.set(&[
        node("p").role("prefill"),
        node("d1"),
        node("d2"),
        node("d3"),
    ]);
    let body = |from: usize| {
        let ids: Vec<String> = (from..from + 200).map(|id| id.to_string()).collect();
        format!(
            r#"{{"model": "m", "token_ids": [{}], "sampling_params": {{}}}}"#,
            ids.join(",")
        )
    };
    let ask = |from: usize| pool.pick_body("/inference/v1/generate", &body(from), &[]);
    for from in [0, 5000] {
        let home = ask(from);
        assert_ne!(home, "p");
        assert!((0..8).all(|_| ask(from) == home));
    }
}

/// Busy endpoints score (max - n) / max * 0 = 0, idle ones 1.
fn idle_first_and_busy_are_equal(pool: &Pool) {
    pool.set(&[node("a").load(1, 0), node("b").load(7, 0), node("c")]);
    assert_eq!(pool.answers(&prompt("idle")), ["c"]);
    pool.set(&[node("a").load(1, 0), node("b").load(7, 0)]);
    assert_eq!(pool.answers(&prompt("busy")), ["a", "b"]);
}

/// Live counts decide, without any scrape: active requests 2, tokens 1.
fn own_role_and_live_load(pool: &Pool) {
    pool.set(&[
        node("p").role("prefill"),
        node("d").role("decode").load(8, 900_000),
        node("e").role("both").load(1, 100),
    ]);
    assert_eq!(pool.answers(&prompt("roles")), ["e"]);
}

/// The best and the second best: queue 2, KV room 1.5.
fn two_addresses(pool: &Pool) {
    pool.set(&[
        node("a").waiting(9).kv(0.9),
        node("b").kv(0.2),
        node("c").kv(0.1),
    ]);
    let body = format!(r#"{{"model": "m", "prompt": "{}"}}"#, prompt("pairs"));
    let decision = pool.decide("/v1/completions", &body, &[]);
    let names = pool.names(&decision.destination);
    assert_eq!(names.len(), 2);
    assert!(!names.contains(&"a".to_owned()), "{names:?}");
}

/// Requests that wait for the same window go together when their prompts are equal: a full match, 2,
/// outweighs what any load can add, 0.5.
fn bursts_stay_together(pool: &Pool) {
    pool.set(&[
        node("p").role("prefill"),
        node("d1"),
        node("d2"),
        node("d3"),
    ]);
    let prompts = ["one", "two", "three"].map(prompt);
    let burst: Vec<&str> = (0..9).map(|i| prompts[i % 3].as_str()).collect();
    let picks = pool.together(&burst);
    assert!(!picks.contains(&"p".to_owned()), "{picks:?}");
    for (i, pick) in picks.iter().enumerate() {
        assert_eq!(*pick, picks[i % 3], "{picks:?}");
    }
    // Three groups of three on three endpoints: each has its fair share.
    let mut homes = picks[..3].to_vec();
    homes.sort_unstable();
    assert_eq!(homes, ["d1", "d2", "d3"]);
}

/// The exporter reports percent. Filter: below 0.95; score 2 * (1 - utilization) + (1 - KV use).
fn busy_gpus_are_left_out(pool: &Pool) {
    pool.set(&[node("a").kv(0.9), node("b"), node("c")]);
    let report = |name: &str, percent: u32| {
        let source = pool.config.sources.iter();
        let mut source = source.filter(|s| s.name.name == "dcgm-data-source");
        let (_, extractor) = &source.next().unwrap().extractors[0];
        let body = format!("DCGM_FI_DEV_GPU_UTIL{{gpu=\"0\"}} {percent}\n");
        extractor.extract(
            &pool.endpoint(name),
            body.as_bytes(),
            tokio::time::Instant::now(),
        );
    };
    // a: 2 * 0.9 + 0.1 = 1.9; b: 2 * 0.4 + 1 = 1.8; c is out.
    for (name, percent) in [("a", 10), ("b", 60), ("c", 97)] {
        report(name, percent);
    }
    assert_eq!(pool.answers("a"), ["a"]);
    // a: 2 * 0.5 + 0.1 = 1.1.
    report("a", 50);
    assert_eq!(pool.answers("b"), ["b"]);
}

/// The session header holds `namespace/name` of the endpoint, in base64.
fn sessions_return(pool: &Pool) {
    pool.set(&[node("a"), node("b"), node("c")]);
    let ask = |token: &str| pool.pick_body("/any/path", "no JSON", &[("x-session-token", token)]);
    assert!((0..8).all(|_| ask("ZGVmYXVsdC9i") == "b"));
    // Busy is worth as much as bound: b scores (9 - 9) / 9 + 1, the idle ones 1.
    pool.set(&[node("a"), node("b").load(9, 0), node("c").load(9, 0)]);
    assert_ne!(ask("ZGVmYXVsdC9i"), "c");
}

fn shortest_queue(pool: &Pool) {
    pool.set(&[
        node("a").waiting(3),
        node("b").waiting(1),
        node("c").waiting(2),
    ]);
    assert_eq!(pool.answers("queues"), ["b"]);
}

/// Without the header it is the decode profile.
fn the_header_names_the_role(pool: &Pool) {
    pool.set(&[
        node("p1").role("prefill").waiting(4),
        node("p2").role("prefill"),
        node("d").role("decode").waiting(9),
    ]);
    let body = r#"{"model": "m", "prompt": "p"}"#;
    let ask = |headers: &[(&str, &str)]| pool.pick_body("/v1/completions", body, headers);
    assert_eq!(ask(&[]), "d");
    assert_eq!(ask(&[("epp-profile", "decode")]), "d");
    assert_eq!(ask(&[("epp-profile", "prefill")]), "p2");
}

/// Clusters report their queue and cache use as attributes; without a report they score nothing, so
/// the prefix decides.
fn clusters_by_load_and_prefix(pool: &Pool) {
    pool.set(&[node("east"), node("west"), node("north")]);
    for topic in ["tides", "winds"] {
        assert_eq!(pool.answers(&prompt(topic)).len(), 1);
    }
    assert!(pool.config.discovery.is_some());
}

/// Gold, and in zone a or in none.
fn labels_of_old(pool: &Pool) {
    pool.set(&[
        node("silver").label("tier", "silver"),
        node("far").label("tier", "gold").label("zone", "b"),
        node("near")
            .label("tier", "gold")
            .label("zone", "a")
            .waiting(9),
    ]);
    assert_eq!(pool.answers("labels"), ["near"]);
    pool.set(&[
        node("near")
            .label("tier", "gold")
            .label("zone", "a")
            .waiting(9),
        node("any").label("tier", "gold"),
    ]);
    assert_eq!(pool.answers("labels"), ["any"]);
}
