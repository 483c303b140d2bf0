use tokio::time::{Instant, advance};

use super::*;
use crate::request::openai::OpenAiParser;
use crate::request::{Body, Parser};
use crate::scheduling::test_support::{Pool, endpoint, refusal};

fn request(prompt: &str) -> InferenceRequest {
    let body = serde_json::json!({"model": "m", "prompt": prompt}).to_string();
    let body = Body::from(body.as_str());
    let payload = OpenAiParser.parse("/v1/completions", &body).unwrap();
    InferenceRequest::new("r", payload, body)
}

fn pool() -> Pool {
    Pool::new(["a", "b"].map(endpoint))
}

/// Matched blocks by endpoint, and all blocks.
fn matches(
    producer: &BurstPrefixProducer,
    pool: &Pool,
    request: &InferenceRequest,
    waited: Box<dyn Any + Send>,
) -> Result<(Vec<u32>, u32), String> {
    let mut attributes = pool.keys.new_attributes();
    producer
        .produce_prepared(waited, request, &pool.candidates, &mut attributes)
        .map_err(|e| e.to_string())?;
    let column = attributes.get(producer.matches).unwrap();
    assert!(column.iter().all(|m| m.block_size_tokens == 64));
    Ok((
        column.iter().map(|m| m.matched_blocks).collect(),
        column[0].total_blocks,
    ))
}

fn start(producer: &BurstPrefixProducer, pool: &Pool, prompt: &str) -> Preparation {
    let attributes = pool.keys.new_attributes();
    producer
        .prepare(&request(prompt), &pool.candidates, &attributes)
        .unwrap()
}

#[tokio::test(start_paused = true)]
async fn equal_prompts_of_a_window_match_on_one_endpoint() {
    let mut pool = pool();
    let producer: BurstPrefixProducer = pool.plugin("{}");
    // 600 bytes are 150 tokens: two blocks of 64 and a partial one.
    let [one, two, lone] = ["x", "y", "z"].map(|text| text.repeat(600));
    let began = Instant::now();
    let prompts = [&one, &two, &one, &two, &lone];
    let started: Vec<_> = prompts.iter().map(|p| start(&producer, &pool, p)).collect();
    assert_eq!(producer.windows.waiting(), 5);
    assert!(
        started
            .iter()
            .all(|p| p.timeout == Duration::from_millis(400))
    );
    let mut got = Vec::new();
    for (prompt, preparation) in prompts.iter().zip(started) {
        let waited = preparation.work.await;
        got.push(matches(&producer, &pool, &request(prompt), waited).unwrap());
    }
    assert_eq!(began.elapsed(), Duration::from_millis(100));
    let wanted = [[3, 0], [0, 3], [3, 0], [0, 3], [0, 0]];
    assert_eq!(got, wanted.map(|matched| (matched.to_vec(), 3)));
    assert_eq!(producer.windows.waiting(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_window_ends_by_its_first_request() {
    let mut pool = pool();
    let producer: BurstPrefixProducer = pool.plugin(r#"{"windowDurationMs": 100}"#);
    let prompt = "x".repeat(600);
    let first = start(&producer, &pool, &prompt);
    advance(Duration::from_millis(99)).await;
    let second = start(&producer, &pool, &prompt);
    advance(Duration::from_millis(1)).await;
    // Nobody asked for the first window's result yet; a new request does not join it all the same.
    let late = start(&producer, &pool, &prompt);
    let began = Instant::now();
    for preparation in [first, second] {
        let waited = preparation.work.await;
        let got = matches(&producer, &pool, &request(&prompt), waited);
        assert_eq!(got, Ok((vec![3, 0], 3)));
    }
    assert_eq!(began.elapsed(), Duration::ZERO);
    let waited = late.work.await;
    assert_eq!(began.elapsed(), Duration::from_millis(100));
    let got = matches(&producer, &pool, &request(&prompt), waited);
    assert_eq!(got, Ok((vec![0, 0], 3)), "alone in its window");
}

#[tokio::test(start_paused = true)]
async fn a_full_window_fails_the_producer_and_an_abort_makes_room() {
    let mut pool = pool();
    let producer: BurstPrefixProducer = pool.plugin(r#"{"maxBatchSize": 2}"#);
    let prompt = "x".repeat(600);
    let first = start(&producer, &pool, &prompt);
    let second = start(&producer, &pool, &prompt);
    let third = start(&producer, &pool, &prompt).work.await;
    let error = matches(&producer, &pool, &request(&prompt), third).unwrap_err();
    assert_eq!(error, "burst window full: maxBatchSize 2 reached");
    drop(second);
    assert_eq!(producer.windows.waiting(), 1);
    let fourth = start(&producer, &pool, &prompt);
    assert_eq!(producer.windows.waiting(), 2);
    drop(fourth);
    // The others left, so there is no group any more.
    let waited = first.work.await;
    let got = matches(&producer, &pool, &request(&prompt), waited);
    assert_eq!(got, Ok((vec![0, 0], 3)));
}

#[tokio::test(start_paused = true)]
async fn an_unlimited_window_ends_at_the_fixed_bound() {
    let mut pool = pool();
    let producer: BurstPrefixProducer = pool.plugin(r#"{"maxBatchSize": -1}"#);
    let waiting: Vec<_> = (0..window::MAX_WAITING)
        .map(|_| producer.windows.wait(vec![1], &pool.candidates))
        .collect();
    assert_eq!(producer.windows.waiting(), window::MAX_WAITING);
    let more = producer.windows.wait(vec![1], &pool.candidates);
    assert_eq!(more.await, Placing::Full);
    drop(waiting);
    assert_eq!(producer.windows.waiting(), 0);
}

#[tokio::test(start_paused = true)]
async fn an_endpoint_that_is_no_candidate_matches_nowhere() {
    let mut pool = pool();
    let producer: BurstPrefixProducer = pool.plugin("{}");
    let prompt = "x".repeat(600);
    let all = pool.keys.new_attributes();
    let first = start(&producer, &pool, &prompt);
    let only_b = &pool.candidates[1..];
    let second = producer.prepare(&request(&prompt), only_b, &all).unwrap();
    first.work.await;
    let waited = second.work.await;
    let mut attributes = pool.keys.new_attributes();
    producer
        .produce_prepared(waited, &request(&prompt), only_b, &mut attributes)
        .unwrap();
    let column = attributes.get(producer.matches).unwrap();
    assert_eq!(column[0].matched_blocks, 0, "the group went to a");
}

#[test]
fn a_request_without_prompt_does_not_wait() {
    let mut pool = pool();
    let producer: BurstPrefixProducer = pool.plugin("{}");
    let mut attributes = pool.keys.new_attributes();
    let none = producer.prepare(&pool.request, &pool.candidates, &attributes);
    assert!(none.is_none());
    producer
        .produce(&pool.request, &pool.candidates, &mut attributes)
        .unwrap();
    let column = attributes.get(producer.matches).unwrap();
    assert_eq!((column.len(), column[0].total_blocks), (2, 0));
}

#[test]
fn prompts_are_compared_up_to_the_cap() {
    let blocks = |parameters: &str, bytes: usize| {
        let mut pool = pool();
        let producer: BurstPrefixProducer = pool.plugin(parameters);
        let attributes = pool.keys.new_attributes();
        producer
            .chain(&request(&"x".repeat(bytes)), &attributes)
            .len()
    };
    // 2048 blocks of 64 tokens of 4 bytes are 524,288 bytes.
    assert_eq!(blocks("{}", 524_288), 2048);
    assert_eq!(blocks("{}", 600_000), 2048);
    assert_eq!(blocks(r#"{"maxPrefixTokensToMatch": 200}"#, 10_000), 3);
    // 1000 bytes are 250 tokens.
    assert_eq!(blocks(r#"{"blockSizeTokens": 100}"#, 1000), 3);
}

#[test]
fn parameters_are_checked() {
    for (parameters, wanted) in [
        (
            r#"{"windowDurationMs": 0}"#,
            "windowDurationMs: 0 is not within 1 and 10000",
        ),
        (
            r#"{"windowDurationMs": 10001}"#,
            "windowDurationMs: 10001 is not within 1 and 10000",
        ),
        (
            r#"{"maxPerReplica": 0}"#,
            "maxPerReplica: 0 is neither -1 nor at least 1",
        ),
        (
            r#"{"maxBatchSize": -2}"#,
            "maxBatchSize: -2 is neither -1 nor at least 1",
        ),
        (
            r#"{"blockSizeTokens": 0}"#,
            "blockSizeTokens: 0 is not above 0",
        ),
        (
            r#"{"maxPrefixTokensToMatch": -1}"#,
            "maxPrefixTokensToMatch: -1 is below 0",
        ),
        (
            r#"{"maxPrefixTokensToMatch": 63}"#,
            "maxPrefixTokensToMatch: 63 is less than a block of 64",
        ),
        (
            r#"{"minColocateBlocks": -1}"#,
            "minColocateBlocks: -1 is below 0",
        ),
        (r#"{"balanceBy": "bytes"}"#, "unknown variant `bytes`"),
    ] {
        let text = refusal::<BurstPrefixProducer>(parameters);
        assert!(text.contains(wanted), "{parameters}: {text}");
    }
}
