use super::*;
use crate::scheduling::{Candidates, Cycle, Scorer};
use std::net::SocketAddr;

use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;

use crate::control::producers::token::TokenProducer;
use crate::kvcache::events::testing::{message, read_short_frame, shake, until};
use crate::kvcache::events::{Batch, Event, EventSink, Stored, StreamState};
use crate::request::openai::OpenAiParser;
use crate::request::{Body, Parser};
use crate::scheduling::attributes::PREFIX_MATCH;
use crate::scheduling::test_support::{Pool, endpoint};

/// An engine that stored `tokens` in blocks of four.
fn engine(
    producer: &PrecisePrefixProducer,
    number: u32,
    tokens: &[u32],
    lora_name: Option<&str>,
) -> Box<dyn EventSink> {
    let mut writer = producer.index.writer(EndpointIndex(number), BASE_MODEL);
    let hashes: Vec<u64> = (1..).take(tokens.len() / 4).collect();
    let stored = Stored {
        hashes: &hashes,
        parent: None,
        tokens,
        block_size: 4,
        lora_name,
        medium: "GPU",
        extra_keys: None,
        cache_salt: None,
        group: Some(0),
        kind: Some("full_attention"),
    };
    writer.apply(&Batch {
        ts: 1.0,
        data_parallel_rank: Some(0),
        events: &[Event::Stored(stored)],
    });
    writer.set_state(StreamState::Live);
    Box::new(writer)
}

/// (matched, total, block size) of each endpoint for a request of `ids`.
fn ask(
    pool: &mut Pool,
    tokens: &TokenProducer,
    producer: &PrecisePrefixProducer,
    ids: &[u32],
    model: &str,
) -> Vec<(u32, u32, u32)> {
    let attributes = work(pool, tokens, producer, ids, model);
    let found = attributes.get(producer.matches).unwrap().iter();
    found
        .map(|m| (m.matched_blocks, m.total_blocks, m.block_size_tokens))
        .collect()
}

/// What both producers make of a request of `ids`, beside guesses of 1, 1 and 2 of 2 blocks.
fn work(
    pool: &mut Pool,
    tokens: &TokenProducer,
    producer: &PrecisePrefixProducer,
    ids: &[u32],
    model: &str,
) -> Attributes {
    let body = serde_json::json!({"model": model, "prompt": ids}).to_string();
    let body = Body::from(body.as_str());
    let payload = OpenAiParser.parse("/v1/completions", &body).unwrap();
    pool.request = InferenceRequest::new("r", payload, body);
    let mut attributes = pool.keys.new_attributes();
    let guess = pool
        .keys
        .optional::<PrefixMatch>(PREFIX_MATCH, APPROX_PREFIX_PRODUCER);
    attributes.write(guess).extend([
        PrefixMatch {
            matched_blocks: 1,
            total_blocks: 2,
            block_size_tokens: 64,
            ..PrefixMatch::default()
        },
        PrefixMatch {
            matched_blocks: 1,
            total_blocks: 2,
            block_size_tokens: 64,
            ..PrefixMatch::default()
        },
        PrefixMatch {
            matched_blocks: 2,
            total_blocks: 2,
            block_size_tokens: 64,
            ..PrefixMatch::default()
        },
    ]);
    for step in [tokens as &dyn DataProducer, producer] {
        step.produce(&pool.request, &pool.candidates, &mut attributes)
            .unwrap();
    }
    attributes
}

fn setting(parameters: &str) -> (Pool, TokenProducer, PrecisePrefixProducer) {
    let mut pool = Pool::new(["a", "b", "c"].map(endpoint));
    let tokens = pool.plugin("{}");
    let producer = pool.plugin(parameters);
    (pool, tokens, producer)
}

const PROMPT: [u32; 14] = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14];

#[test]
fn events_decide_and_silent_endpoints_are_guessed() {
    let (mut pool, tokens, producer) = setting("{}");
    let _a = engine(&producer, 0, &PROMPT[..12], None);
    // The first block is another one.
    let _b = engine(&producer, 1, &[9, 2, 3, 4, 5, 6, 7, 8], None);
    // 14 ids are three full blocks; c publishes nothing, so its guess stays.
    assert_eq!(
        ask(&mut pool, &tokens, &producer, &PROMPT, "m"),
        [(3, 3, 4), (0, 3, 4), (2, 2, 64)]
    );
    // Two blocks are the same, then the prompts part.
    let other = [1, 2, 3, 4, 5, 6, 7, 8, 0, 10, 11, 12];
    let found = ask(&mut pool, &tokens, &producer, &other, "m");
    assert_eq!(found[..2], [(2, 3, 4), (0, 3, 4)]);
}

#[test]
fn an_engine_that_started_anew_holds_nothing_whatever_it_was_sent() {
    let (mut pool, tokens, producer) = setting("{}");
    let _a = engine(&producer, 0, &PROMPT[..8], None);
    let mut b = engine(&producer, 1, &PROMPT[..12], None);
    let mut c = engine(&producer, 2, &PROMPT[..12], None);
    b.reset();
    c.reset();
    // Of c events may be missing: it could hold what it was sent.
    c.set_state(StreamState::Gap);
    assert_eq!(
        ask(&mut pool, &tokens, &producer, &PROMPT, "m"),
        [(2, 3, 4), (0, 3, 4), (2, 2, 64)]
    );
}

#[test]
fn a_request_without_ids_is_guessed() {
    let (mut pool, tokens, producer) = setting("{}");
    let _a = engine(&producer, 0, &PROMPT[..12], None);
    let body = Body::from(r#"{"prompt": "text"}"#);
    let payload = OpenAiParser.parse("/v1/completions", &body).unwrap();
    pool.request = InferenceRequest::new("r", payload, body);
    let mut attributes = pool.keys.new_attributes();
    tokens
        .produce(&pool.request, &pool.candidates, &mut attributes)
        .unwrap();
    producer
        .produce(&pool.request, &pool.candidates, &mut attributes)
        .unwrap();
    let found = attributes.get(producer.matches).unwrap();
    assert_eq!(found, [PrefixMatch::default(); 3]);
}

#[test]
fn adapters_share_nothing_with_their_base() {
    let (mut pool, tokens, producer) = setting("{}");
    let _a = engine(&producer, 0, &PROMPT[..12], Some("poet"));
    let _b = engine(&producer, 1, &PROMPT[..8], None);
    let mut matched = |model| {
        let found = ask(&mut pool, &tokens, &producer, &PROMPT, model);
        [found[0].0, found[1].0]
    };
    assert_eq!(matched("poet"), [3, 0]);
    assert_eq!(matched("base"), [0, 2]);
}

#[test]
fn host_memory_counts_by_its_weight() {
    let (mut pool, tokens, producer) = setting(
        r#"{"indexerConfig": {"kvCacheBackendConfigs": [{"name": "gpu", "weight": 0.5}]}}"#,
    );
    let _a = engine(&producer, 0, &PROMPT[..12], None);
    // Three blocks at 0.5 are 1.5, cut to whole blocks.
    assert_eq!(
        ask(&mut pool, &tokens, &producer, &PROMPT, "m")[0],
        (1, 3, 4)
    );
}

/// An engine that connects to the picker and stores blocks of four tokens.
struct Dialled {
    stream: TcpStream,
    topic: &'static str,
    seq: u64,
}

impl Dialled {
    async fn new(address: SocketAddr, topic: &'static str) -> Self {
        let mut stream = loop {
            match TcpStream::connect(address).await {
                Ok(stream) => break stream,
                Err(_) => tokio::time::sleep(Duration::from_millis(5)).await,
            }
        };
        shake(&mut stream, b"PUB").await.unwrap();
        assert_eq!(read_short_frame(&mut stream).await.unwrap(), (0, vec![1]));
        Self {
            stream,
            topic,
            seq: 0,
        }
    }

    /// `[ts, [["BlockStored", hashes, nil, tokens, 4]], rank]`
    async fn store(&mut self, tokens: &[u32], rank: u8) {
        let number = |bytes: &mut Vec<u8>, n: u64| {
            bytes.push(0xcf);
            bytes.extend(n.to_be_bytes());
        };
        let mut bytes = vec![0x93, 0xcb];
        bytes.extend((1e6 + self.seq as f64).to_be_bytes());
        bytes.extend([0x91, 0x95, 0xab]);
        bytes.extend(b"BlockStored");
        let blocks = u8::try_from(tokens.len() / 4).unwrap();
        bytes.push(0x90 | blocks);
        (1..=u64::from(blocks)).for_each(|hash| number(&mut bytes, hash));
        bytes.push(0xc0);
        bytes.push(0x90 | u8::try_from(tokens.len()).unwrap());
        for token in tokens {
            number(&mut bytes, u64::from(*token));
        }
        bytes.extend([4, rank]);
        let seq = self.seq.to_be_bytes();
        let frames = message(&[self.topic.as_bytes(), &seq, &bytes]);
        self.stream.write_all(&frames).await.unwrap();
        self.seq += 1;
    }
}

/// An address that was free a moment ago.
fn free_address() -> SocketAddr {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap()
}

#[tokio::test]
async fn engines_that_connect_to_us_are_told_apart_by_topic() {
    let address = free_address();
    let parameters = format!(r#"{{"kvEventsConfig": {{"zmqEndpoint": "tcp://{address}"}}}}"#);
    let (mut pool, tokens, producer) = setting(&parameters);
    let endpoints: Vec<_> = pool
        .candidates
        .iter()
        .map(|c| Arc::clone(&c.endpoint))
        .collect();
    for endpoint in &endpoints {
        producer.added(endpoint);
    }
    // The test pool is 10.0.0.1:8000 and the two ports after it.
    let mut a = Dialled::new(address, "kv@10.0.0.1:8000@m").await;
    let mut b = Dialled::new(address, "kv@10.0.0.1:8001@m").await;
    let mut stranger = Dialled::new(address, "kv@10.0.0.9:8000@m").await;
    a.store(&PROMPT[..12], 0).await;
    b.store(&PROMPT[..8], 0).await;
    stranger.store(&PROMPT[..12], 0).await;
    let size = |n| producer.index.block_size(EndpointIndex(n));
    let listener = producer.publishers.listener().unwrap().1;
    until("both known", || size(0) == Some(4) && size(1) == Some(4)).await;
    until("stranger", || listener.snapshot().unattributed == 1).await;
    assert_eq!(
        ask(&mut pool, &tokens, &producer, &PROMPT, "m"),
        [(3, 3, 4), (2, 3, 4), (2, 2, 64)]
    );

    // It leaves: its part is gone at once, and what its engine still sends goes nowhere.
    producer.removed(&endpoints[0]);
    assert_eq!(size(0), None);
    a.store(&PROMPT[..12], 0).await;
    until("unattributed", || listener.snapshot().unattributed == 2).await;
    assert_eq!(size(0), None);
    // It comes back under the same number, and its engine on the same connection.
    producer.added(&endpoints[0]);
    a.store(&PROMPT[..12], 0).await;
    until("known again", || size(0) == Some(4)).await;
    let names: Vec<_> = producer.publishers.all();
    let mut names: Vec<_> = names.iter().map(|p| p.name.to_string()).collect();
    names.sort_unstable();
    assert_eq!(names, ["10.0.0.1:8000", "10.0.0.1:8001"]);
}

#[test]
fn what_publishers_and_the_index_do_is_counted() {
    let text = crate::telemetry::metrics::recorded(|| {
        let (mut pool, tokens, producer) =
            setting(r#"{"indexerConfig": {"kvBlockIndexConfig": {"enableMetrics": true}}}"#);
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let _entered = runtime.enter();
        let endpoint = Arc::clone(&pool.candidates[0].endpoint);
        producer.added(&endpoint);
        let mut sink = sink::Tap::new(
            producer.index.writer(EndpointIndex(1), BASE_MODEL),
            producer.publishers.totals_for_test(),
        );
        let stored = |kind: &'static str, tokens: &'static [u32], hashes: &'static [u64]| {
            Event::Stored(Stored {
                hashes,
                parent: None,
                tokens,
                block_size: 4,
                lora_name: None,
                medium: "GPU",
                extra_keys: None,
                cache_salt: None,
                group: Some(u32::from(kind == "mamba")),
                kind: Some(kind),
            })
        };
        let removed = |group| {
            Event::Removed(crate::kvcache::events::Removed {
                hashes: &[3],
                medium: "GPU",
                group,
            })
        };
        let prompt: &'static [u32] = &[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12];
        sink.apply(&Batch {
            ts: 1.0,
            data_parallel_rank: None,
            events: &[
                stored("full_attention", prompt, &[1, 2, 3]),
                // A second copy of the third block; then both go, one after the other.
                stored("full_attention", prompt, &[1, 2, 3]),
                removed(Some(0)),
                removed(Some(0)),
                stored("mamba", &prompt[..4], &[9]),
                removed(Some(1)),
                removed(Some(7)),
                stored("full_attention", prompt, &[1, 2]),
            ],
        });
        sink.set_state(StreamState::Live);
        let found = ask(&mut pool, &tokens, &producer, &PROMPT, "m");
        assert_eq!(found[1], (2, 3, 4));
        crate::telemetry::metrics::Collect::collect(&*producer.observer);
    });
    for line in [
        // Three blocks twice; one look-up that found two of them.
        "llm_d_epp_kv_cache_index_admissions_total 6",
        "kvcache_index_evictions_total 1",
        "llm_d_epp_kv_cache_index_lookup_requests_total 1",
        "llm_d_epp_kv_cache_index_lookup_hits_total 2",
        "llm_d_epp_kv_cache_index_max_pod_hit_count_total 2",
        "llm_d_epp_kv_cache_index_lookup_latency_seconds_count 1",
        "llm_d_epp_kv_cache_events_dedup_removed_hashes_suppressed_total 1",
        "kvcache_kvevents_dedup_removed_hashes_forwarded_total 1",
        r#"llm_d_epp_kv_cache_events_stores_skipped_total{cache_kind="mamba",reason="unsupported_cache_kind"} 1"#,
        r#"llm_d_epp_kv_cache_events_stores_skipped_total{cache_kind="full_attention",reason="non_dense_block_span"} 1"#,
        r#"llm_d_epp_kv_cache_events_removals_skipped_total{cache_kind="mamba",reason="unsupported_cache_kind"} 1"#,
        r#"llm_d_epp_kv_cache_events_removals_skipped_total{cache_kind="unknown",reason="unknown_group"} 1"#,
        "llm_d_epp_kv_cache_events_active_subscribers 1",
        "llm_d_epp_kv_cache_events_pool_queue_depth 0",
        "llm_d_epp_kv_cache_events_pool_capacity 4096",
        r#"llm_d_epp_kv_cache_events_messages_received_total{pod_identifier="10.0.0.1:8000"} 0"#,
        r#"llm_d_epp_kv_cache_events_zmq_errors_total{pod_identifier="10.0.0.1:8000",operation="recv"} 0"#,
        r#"pinpod_kv_subscribers{state="down"} 1"#,
        "pinpod_kv_index_blocks 2",
        "pinpod_kv_index_endpoints 2",
        "pinpod_kv_index_max_bytes 1073741824",
    ] {
        assert!(
            text.contains(&format!("{line}\n")),
            "missing {line}\nin\n{text}"
        );
    }
}

#[tokio::test]
async fn an_address_in_use_is_tried_again() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap();
    let parameters = format!(r#"{{"kvEventsConfig": {{"zmqEndpoint": "tcp://{address}"}}}}"#);
    let (pool, _, producer) = setting(&parameters);
    producer.added(&pool.candidates[0].endpoint);
    let listener = producer.publishers.listener().unwrap().1;
    until("a failure", || listener.snapshot().bind_errors > 0).await;
    drop(taken);
    until("listening", || listener.state() == StreamState::Live).await;
}

#[test]
fn a_mixed_pool_is_scored_by_what_is_known_of_each_endpoint() {
    use crate::scheduling::scorers::PrefixCacheScorer;
    let (mut pool, tokens, producer) = setting("{}");
    let scorer: PrefixCacheScorer =
        pool.plugin(r#"{"prefixMatchInfoProducerName": "precise-prefix-cache-producer"}"#);
    let _a = engine(&producer, 0, &PROMPT[..8], None);
    let _b = engine(&producer, 1, &[9, 2, 3, 4], None);
    let attributes = work(&mut pool, &tokens, &producer, &PROMPT, "m");
    let cycle = Cycle {
        request: &pool.request,
        attributes: &attributes,
        now: Instant::now(),
        rng: &pool.rng,
    };
    let mut scores = [0.0; 3];
    scorer.score(
        &cycle,
        Candidates::new(&pool.candidates, &[0, 1, 2]),
        &mut scores,
    );
    // a: 2 of 3 blocks by its events; b: none, whatever its guess of 1/2 says; c publishes nothing, so
    // its guess of 2/2 counts.
    assert_eq!(scores, [2.0 / 3.0, 0.0, 1.0]);
}

/// Matches of each endpoint for one prompt as a tokenizer gave it, beside these guesses.
fn ask_for(
    pool: &mut Pool,
    producer: &PrecisePrefixProducer,
    prompt: PromptTokens,
    guesses: [(u32, u32); 3],
    model: &str,
) -> Vec<(u32, u32, u32)> {
    let body = Body::from(r#"{"prompt": "text"}"#);
    let payload = OpenAiParser.parse("/v1/completions", &body).unwrap();
    pool.request = InferenceRequest::new("r", payload, body);
    model.clone_into(&mut pool.request.target_model);
    let mut attributes = pool.keys.new_attributes();
    let guess = pool
        .keys
        .optional::<PrefixMatch>(PREFIX_MATCH, APPROX_PREFIX_PRODUCER);
    let guesses = guesses.map(|(matched_blocks, total_blocks)| PrefixMatch {
        matched_blocks,
        total_blocks,
        block_size_tokens: 64,
        ..PrefixMatch::default()
    });
    attributes.write(guess).extend(guesses);
    attributes.write(producer.ids).push(prompt);
    producer
        .produce(&pool.request, &pool.candidates, &mut attributes)
        .unwrap();
    let found = attributes.get(producer.matches).unwrap().iter();
    found
        .map(|m| (m.matched_blocks, m.total_blocks, m.block_size_tokens))
        .collect()
}

fn image(offset: u32, identifier: Option<&str>) -> crate::request::MediaItem {
    crate::request::MediaItem {
        modality: "image",
        hash: 1,
        identifier: identifier.map(Into::into),
        token_offset: Some(offset),
        tokens: identifier.map(|_| 20),
        extent: crate::request::Extent::Unknown,
    }
}

#[test]
fn before_an_unknown_medium_events_decide_and_behind_it_guesses() {
    let (mut pool, _, producer) = setting("{}");
    let _a = engine(&producer, 0, &PROMPT[..8], None);
    let _b = engine(&producer, 1, &PROMPT[..4], None);
    // Ten ids are before the medium, two blocks of the three.
    let prompt = PromptTokens {
        ids: Arc::new(PROMPT.to_vec()),
        media: vec![image(10, None)],
    };
    let all = [(2, 2); 3];
    // a holds both, so the guess may be right about the third; b lacks the second, which ends it.
    assert_eq!(
        ask_for(&mut pool, &producer, prompt.clone(), all, "m"),
        [(3, 3, 4), (1, 3, 4), (2, 2, 64)]
    );
    // A guess takes nothing from what is known.
    let found = ask_for(&mut pool, &producer, prompt.clone(), [(0, 2); 3], "m");
    assert_eq!(found[..2], [(2, 3, 4), (1, 3, 4)]);
    // Without media a guess adds nothing.
    let whole = PromptTokens {
        media: Vec::new(),
        ..prompt
    };
    let found = ask_for(&mut pool, &producer, whole, all, "m");
    assert_eq!(found[..2], [(2, 3, 4), (1, 3, 4)]);
}

/// `multimodal` of the published scenarios, made by vLLM 0.32: four blocks of 16, an image of 20 tokens at
/// the twentieth.
#[test]
fn text_before_an_image_matches_what_the_recorded_engine_stored() {
    use crate::kvcache::events::wire::Scratch;
    let (mut pool, _, producer) = setting("{}");
    let path = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/tests/data/vectors/index_scenarios.json"
    );
    let file: serde_json::Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let mut cases = file["cases"].as_array().unwrap().iter();
    let case = cases.find(|case| case["name"] == "multimodal").unwrap();
    let mut writer = producer.index.writer(EndpointIndex(0), BASE_MODEL);
    let steps = case["steps"].as_array().unwrap();
    for step in steps.iter().filter(|step| step["op"] == "batch") {
        let hex = step["hex"].as_str().unwrap();
        let bytes: Vec<u8> = (0..hex.len() / 2)
            .map(|at| u8::from_str_radix(&hex[2 * at..2 * at + 2], 16).unwrap())
            .collect();
        let mut scratch = Scratch::default();
        scratch.decode(&bytes, |batch| writer.apply(batch)).unwrap();
    }
    writer.set_state(StreamState::Live);
    let lookup = steps.iter().find(|step| step["op"] == "lookup").unwrap();
    let ids = lookup["tokens"].as_array().unwrap().iter();
    let ids: Vec<u32> = ids
        .map(|id| u32::try_from(id.as_u64().unwrap()).unwrap())
        .collect();
    let mut blocks = |identifier| {
        let prompt = PromptTokens {
            ids: ids.clone().into(),
            media: vec![image(20, identifier)],
        };
        ask_for(&mut pool, &producer, prompt, [(0, 1); 3], "Qwen/Qwen3-8B")[0].0
    };
    // Named as the engine names it, everything is there; not named, the block before it; wrongly named,
    // the same.
    assert_eq!(blocks(lookup["mm"][0]["identifier"].as_str()), 4);
    assert_eq!(blocks(None), 1);
    assert_eq!(blocks(Some("another image")), 1);
}
