//! The exact block index alone: keys, wire bytes to index, and look-ups while writers work. `make
//! bench-index` compares it with published ones.
//!
//! `cargo bench --profile release --bench kv_index`, so that it is built as the binary is

#[path = "kv_index/messages.rs"]
mod messages;
#[allow(dead_code, reason = "the peers' bench uses all of it")]
#[path = "kv_index/workload.rs"]
mod workload;

use std::fs::File;
use std::hint::black_box;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use pinpod::datalayer::EndpointIndex;
use pinpod::kvcache::block::{BlockHasher, BlockKey, KeySpace};
use pinpod::kvcache::events::wire::Scratch;
use pinpod::kvcache::events::{EventSink, StreamState};
use pinpod::kvcache::index::{EndpointWriter, IndexSettings, KvIndex, Lookup};
use tokio::time::{Duration, Instant};

use messages::{removals, store};
use workload::{BLOCK, ENDPOINTS, GROUPS_EACH, Hashes, PRIVATE, SHARED, conversation, group_of};

const SPACE: KeySpace<'static> = KeySpace {
    model: "m",
    lora: None,
    block_size: BLOCK,
};
const LOOKUPS: usize = 50_000;
const WRITERS: usize = 8;
const ROUNDS: usize = 7;
/// Prompts that measurements go through in turn.
const ASKED: u32 = 128;

/// That of the binary.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() {
    keys();
    wire();
    beside_writers();
}

#[expect(clippy::print_stdout, reason = "a bench reports on stdout")]
fn show(text: &str) {
    println!("{text}");
}

/// Hashing prompts of 7,200 tokens.
fn keys() {
    let hasher = BlockHasher::default();
    let prompts: Vec<_> = asked().map(|prompt| prompt.tokens).collect();
    let mut keys = Vec::new();
    let mut times = Vec::new();
    for tokens in prompts.iter().cycle().take(LOOKUPS) {
        let start = Instant::now();
        hasher.request_keys(&SPACE, black_box(tokens), None, &[], &mut keys);
        times.push(start.elapsed());
        black_box(&keys);
    }
    let [p50, p99, _] = percentiles(times);
    show(&format!(
        "7,200 tokens to keys: p50 {p50:.2} us, p99 {p99:.2} us"
    ));
}

/// Conversations of all endpoints, in no order.
fn asked() -> impl Iterator<Item = workload::Prompt> {
    (0..ASKED).map(|n| {
        let e = n * 29 % ENDPOINTS;
        conversation(e, group_of(e, n % GROUPS_EACH), Hashes::Shared)
    })
}

fn writers(index: &KvIndex) -> Vec<EndpointWriter> {
    let writers = (0..ENDPOINTS).map(|e| {
        let mut writer = index.writer(EndpointIndex(e), "m");
        writer.set_state(StreamState::Live);
        writer
    });
    writers.collect()
}

/// Message bytes to index: whole prompts, the blocks that 64 running requests fill in a step, single ones.
fn wire() {
    for hashes in [Hashes::Shared, Hashes::Own] {
        let index = KvIndex::new(&IndexSettings::default(), BlockHasher::default());
        let mut writers = writers(&index);
        let mut scratch = Scratch::default();
        let prompts: Vec<_> = (0..GROUPS_EACH)
            .flat_map(|n| (0..ENDPOINTS).map(move |e| (e, group_of(e, n))))
            .map(|(e, group)| (e, conversation(e, group, hashes)))
            .collect();
        let mut apply = |messages: &[(u32, Vec<u8>)]| {
            let start = Instant::now();
            for (e, message) in messages {
                let Some(writer) = writers.get_mut(*e as usize) else {
                    continue;
                };
                let decoded = scratch.decode(message, |batch| writer.apply(batch));
                assert!(decoded.is_ok_and(|decoded| decoded.malformed + decoded.unknown == 0));
            }
            start.elapsed()
        };
        let whole: Vec<_> = prompts
            .iter()
            .map(|(e, prompt)| (*e, store([prompt.tail(0)])))
            .collect();
        let bytes: usize = whole.iter().map(|(_, message)| message.len()).sum();
        let blocks = prompts.len() * (SHARED + PRIVATE) as usize;
        show(&format!(
            "wire, {hashes:?} hashes: {:.0} ns a block in messages of 450 ({} bytes a block)",
            ns(apply(&whole), blocks),
            bytes / blocks
        ));
        // The tails again, a block at a time: one event a message, then 64. Messages are made just before
        // they are applied, so that they are where a socket leaves them: in the cache.
        for events in [1, 64] {
            let (mut removed, mut stored) = (Duration::ZERO, Duration::ZERO);
            for (e, prompt) in &prompts {
                removed += apply(&[(*e, removals(prompt.tail(SHARED).1))]);
                let from: Vec<u32> = (SHARED..SHARED + PRIVATE).collect();
                let one = |from: &u32| {
                    let (tokens, hashes, parent) = prompt.tail(*from);
                    (&tokens[..BLOCK as usize], &hashes[..1], parent)
                };
                let steps = from.chunks(events);
                let again: Vec<_> = steps
                    .map(|from| (*e, store(from.iter().map(one))))
                    .collect();
                stored += apply(&again);
            }
            let tails = prompts.len() * PRIVATE as usize;
            show(&format!(
                "wire, {hashes:?} hashes: {:.0} ns a one-block store, {events} a message; {:.0} ns \
                 a removal, {PRIVATE} a message",
                ns(stored, tails),
                ns(removed, tails)
            ));
        }
    }
}

/// An index with all conversations of all endpoints.
fn filled() -> (KvIndex, Vec<EndpointWriter>) {
    let index = KvIndex::new(&IndexSettings::default(), BlockHasher::default());
    let mut writers = writers(&index);
    let mut scratch = Scratch::default();
    for (e, writer) in (0..).zip(&mut writers) {
        for n in 0..GROUPS_EACH {
            let prompt = conversation(e, group_of(e, n), Hashes::Shared);
            let message = store([prompt.tail(0)]);
            let decoded = scratch.decode(&message, |batch| writer.apply(batch));
            assert!(decoded.is_ok());
        }
    }
    (index, writers)
}

/// Look-ups of 450 blocks on all endpoints: alone, while eight threads apply removals and stores to
/// another index as fast as they can, and while they do to this one. The second tells what it costs to
/// share processors and their caches with busy threads, whatever these do. Medians of rounds, since a
/// machine that is shared has bad moments.
///
/// A look-up during which the kernel took the processor away says nothing about the index, so those are
/// told by the thread's count of time slices and left out. Waiting for a lock would count: a thread that
/// waits is not left out by it until it sleeps, and look-ups never sleep.
fn beside_writers() {
    let (index, mut own) = filled();
    let (_other_index, mut others) = filled();
    let mut churn: Vec<Vec<(Vec<u8>, Vec<u8>)>> = Vec::new();
    for e in 0..ENDPOINTS {
        let tails = (0..GROUPS_EACH).map(|n| {
            let prompt = conversation(e, group_of(e, n), Hashes::Shared);
            let (tail, names, parent) = prompt.tail(SHARED);
            (removals(names), store([(tail, names, parent)]))
        });
        churn.push(tails.collect());
    }
    let prompts: Vec<_> = asked()
        .map(|prompt| {
            let mut keys = Vec::new();
            let hasher = index.hasher();
            hasher.request_keys(&SPACE, &prompt.tokens, None, &[], &mut keys);
            keys
        })
        .collect();
    let (mut alone, mut beside_others, mut beside_own) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        alone.push((look(&index, &prompts), 0.0));
        beside_others.push(beside(&mut others, &churn, &index, &prompts));
        beside_own.push(beside(&mut own, &churn, &index, &prompts));
    }
    let report = |what: &str, rounds: &[([f64; 3], f64)]| {
        let [p50, p99, p999] = [0, 1, 2].map(|at| median(rounds.iter().map(|round| round.0[at])));
        show(&format!(
            "look-ups of 450 blocks, {what}: p50 {p50:.2} us, p99 {p99:.2} us, p99.9 {p999:.2} us"
        ));
    };
    let rate = median(beside_own.iter().map(|round| round.1));
    report("alone", &alone);
    report("beside 8 writers of another index", &beside_others);
    report("beside 8 writers", &beside_own);
    show(&format!("  which apply {rate:.1} million blocks a second"));
}

/// Look-ups while the writers are at work: percentiles, and millions of blocks applied a second.
fn beside(
    writers: &mut [EndpointWriter],
    churn: &[Vec<(Vec<u8>, Vec<u8>)>],
    index: &KvIndex,
    prompts: &[Vec<BlockKey>],
) -> ([f64; 3], f64) {
    let stop = AtomicBool::new(false);
    let applied = AtomicU64::new(0);
    let (each, start) = (ENDPOINTS as usize / WRITERS, Instant::now());
    let times = std::thread::scope(|scope| {
        for (writers, churn) in writers.chunks_mut(each).zip(churn.chunks(each)) {
            let (stop, applied) = (&stop, &applied);
            scope.spawn(move || work(writers, churn, stop, applied));
        }
        let times = look(index, prompts);
        stop.store(true, Ordering::Relaxed);
        times
    });
    let rate = applied.load(Ordering::Relaxed) as f64 / start.elapsed().as_secs_f64() / 1e6;
    (times, rate)
}

fn median(numbers: impl Iterator<Item = f64>) -> f64 {
    let mut numbers: Vec<f64> = numbers.collect();
    numbers.sort_by(f64::total_cmp);
    numbers.get(numbers.len() / 2).copied().unwrap_or(0.0)
}

/// Removes and stores tails in turn until told to stop.
fn work(
    writers: &mut [EndpointWriter],
    churn: &[Vec<(Vec<u8>, Vec<u8>)>],
    stop: &AtomicBool,
    applied: &AtomicU64,
) {
    let mut scratch = Scratch::default();
    let longest = churn.iter().map(Vec::len).max().unwrap_or(0);
    for n in (0..longest).cycle() {
        for (writer, messages) in writers.iter_mut().zip(churn) {
            if stop.load(Ordering::Relaxed) {
                return;
            }
            let Some((gone, again)) = messages.get(n) else {
                continue;
            };
            for message in [gone, again] {
                let decoded = scratch.decode(message, |batch| writer.apply(batch));
                assert!(decoded.is_ok());
            }
            applied.fetch_add(2 * u64::from(PRIVATE), Ordering::Relaxed);
        }
    }
}

/// Percentiles of the look-ups that ran in one piece.
fn look(index: &KvIndex, prompts: &[Vec<BlockKey>]) -> [f64; 3] {
    let candidates: Vec<_> = (0..ENDPOINTS).map(EndpointIndex).collect();
    let mut lookup = Lookup::new();
    let slices = Slices::new();
    let mut whole = Vec::new();
    for keys in prompts.iter().cycle().take(LOOKUPS) {
        let before = slices.count();
        let start = Instant::now();
        index.lookup(black_box(keys), &candidates, start, &mut lookup);
        let took = start.elapsed();
        let best = lookup.matches().iter().map(|found| found.blocks).max();
        assert!(best >= Some(SHARED));
        if slices.count() == before {
            whole.push(took);
        }
    }
    percentiles(whole)
}

/// How often this thread was given a processor; always the same where the system does not say.
struct Slices(Option<File>);

impl Slices {
    fn new() -> Self {
        Self(File::open("/proc/thread-self/schedstat").ok())
    }

    fn count(&self) -> u64 {
        let mut text = [0; 80];
        let read = self.0.as_ref().map(|file| file.read_at(&mut text, 0));
        let Some(Ok(read)) = read else {
            return 0;
        };
        let text = std::str::from_utf8(&text[..read]).unwrap_or_default();
        let last = text.split_ascii_whitespace().nth(2);
        last.and_then(|n| n.parse().ok()).unwrap_or(0)
    }
}

/// Median, 99th and 99.9th in microseconds.
fn percentiles(mut times: Vec<Duration>) -> [f64; 3] {
    times.sort_unstable();
    [500, 990, 999].map(|share| {
        let at = times.get(times.len().saturating_sub(1) * share / 1000);
        at.map_or(0.0, |time| time.as_secs_f64() * 1e6)
    })
}

fn ns(time: Duration, n: usize) -> f64 {
    time.as_secs_f64() * 1e9 / n as f64
}
