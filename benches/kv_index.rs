//! The exact block index: events in, look-ups out, and what a million entries weigh.
//!
//! `cargo bench --bench kv_index`
//!
//! 64 endpoints hold 35 of 150 conversations each: 375 blocks they share, 75 of their own. Stores
//! include hashing the tokens; removals come one block an event, as engines send them.

use pinpod::datalayer::EndpointIndex;
use pinpod::kvcache::block::{BlockHasher, BlockKey, KeySpace};
use pinpod::kvcache::events::{Batch, Event, EventSink, Removed, Stored, StreamState};
use pinpod::kvcache::index::{EndpointWriter, IndexSettings, KvIndex, Lookup};
use tokio::time::{Duration, Instant};

const ENDPOINTS: u32 = 64;
const GROUPS: u32 = 150;
const GROUPS_EACH: u32 = 35;
const SHARED: u32 = 375;
const PRIVATE: u32 = 75;
const BLOCK: u32 = 16;
const LOOKUPS: u32 = 20_000;
const LONG: u32 = 7500;
const SPACE: KeySpace<'static> = KeySpace {
    model: "m",
    lora: None,
    block_size: BLOCK,
};

fn main() {
    for same_hashes in [true, false] {
        measure(same_hashes);
    }
}

#[expect(clippy::print_stdout, reason = "a bench reports on stdout")]
fn show(text: &str) {
    println!("{text}");
}

fn measure(same_hashes: bool) {
    let before = resident_bytes();
    let index = KvIndex::new(&IndexSettings::default(), BlockHasher::default());
    let mut writers: Vec<_> = (0..ENDPOINTS)
        .map(|e| index.writer(EndpointIndex(e), "m"))
        .collect();
    let entries = ENDPOINTS * GROUPS_EACH * (SHARED + PRIVATE);
    let hashes = if same_hashes {
        "same hashes everywhere"
    } else {
        "hashes of its own each"
    };
    show(&format!(
        "{entries} entries, {ENDPOINTS} endpoints, {hashes}"
    ));

    let mut spent = Duration::ZERO;
    for g in 0..GROUPS_EACH {
        for (e, writer) in (0..).zip(&mut writers) {
            writer.set_state(StreamState::Live);
            spent += store(writer, e, group_of(e, g), SHARED + PRIVATE, same_hashes);
        }
    }
    show(&format!("store: {:.0} ns a block", ns(spent, entries)));
    let used = index.stats().used_bytes;
    let grown = resident_bytes().saturating_sub(before);
    let each = |bytes: usize| bytes as f64 / f64::from(entries);
    show(&format!(
        "memory: {:.1} bytes an entry estimated, {:.1} resident",
        each(used),
        each(grown)
    ));

    let mut keys = Vec::new();
    let (tokens, _) = prompt(0, group_of(0, 0), SHARED + PRIVATE, same_hashes);
    index
        .hasher()
        .request_keys(&SPACE, &tokens, None, &[], &mut keys);
    look(&index, &keys);

    let (mut removed, mut stored) = (Duration::ZERO, Duration::ZERO);
    for g in 0..GROUPS_EACH {
        for (e, writer) in (0..).zip(&mut writers) {
            removed += remove_tail(writer, e, group_of(e, g), same_hashes);
            stored += store(writer, e, group_of(e, g), SHARED + PRIVATE, same_hashes);
        }
    }
    let tails = ENDPOINTS * GROUPS_EACH * PRIVATE;
    show(&format!(
        "remove: {:.0} ns a block, one an event",
        ns(removed, tails)
    ));
    show(&format!(
        "store again: {:.0} ns a block",
        ns(stored, entries)
    ));

    for (e, writer) in (0..).zip(&mut writers) {
        store(writer, e, GROUPS, LONG - e * 10, same_hashes);
    }
    let (tokens, _) = prompt(0, GROUPS, LONG, same_hashes);
    let start = Instant::now();
    index
        .hasher()
        .request_keys(&SPACE, &tokens, None, &[], &mut keys);
    show(&format!(
        "hash: {:.1} ns a block",
        ns(start.elapsed(), LONG)
    ));
    look(&index, &keys);
    show("");
}

/// Conversation number `n` of an endpoint.
fn group_of(e: u32, n: u32) -> u32 {
    (e * 7 + n) % GROUPS
}

/// Tokens and engine hashes of a conversation: shared blocks, then the endpoint's own.
fn prompt(e: u32, group: u32, blocks: u32, same_hashes: bool) -> (Vec<u32>, Vec<u64>) {
    let own_from = if group == GROUPS { blocks } else { SHARED };
    let block = |i: u32| {
        let owner = if i < own_from { 0 } else { e + 1 };
        (u64::from(group) << 40 | u64::from(owner) << 20 | u64::from(i)) + 1
    };
    let tokens = (0..blocks).flat_map(|i| {
        let seed = block(i);
        (0..u64::from(BLOCK))
            .map(move |t| u32::try_from((seed * 31 + t * seed) % 150_000).unwrap_or(0))
    });
    let seed = if same_hashes { 1 } else { u64::from(e) + 2 };
    let hashes =
        (0..blocks).map(|i| (block(i) * 0x9e37_79b9_7f4a_7c15).rotate_left(29) ^ (seed << 56));
    (
        tokens.collect(),
        hashes
            .map(|h| h.wrapping_mul(0xd6e8_feb8_6659_fd93))
            .collect(),
    )
}

fn store(writer: &mut EndpointWriter, e: u32, group: u32, blocks: u32, same: bool) -> Duration {
    let (tokens, hashes) = prompt(e, group, blocks, same);
    let events = [Event::Stored(Stored {
        hashes: &hashes,
        parent: None,
        tokens: &tokens,
        block_size: BLOCK,
        lora_name: None,
        medium: "GPU",
        extra_keys: None,
        cache_salt: None,
        group: Some(0),
        kind: Some("full_attention"),
    })];
    apply(writer, &events)
}

/// Removes the endpoint's own blocks, last one first.
fn remove_tail(writer: &mut EndpointWriter, e: u32, group: u32, same: bool) -> Duration {
    let (_, hashes) = prompt(e, group, SHARED + PRIVATE, same);
    let events: Vec<_> = hashes[SHARED as usize..]
        .chunks(1)
        .rev()
        .map(|hashes| {
            Event::Removed(Removed {
                hashes,
                medium: "GPU",
                group: Some(0),
            })
        })
        .collect();
    apply(writer, &events)
}

fn apply(writer: &mut EndpointWriter, events: &[Event<'_>]) -> Duration {
    let start = Instant::now();
    writer.apply(&Batch {
        ts: 0.0,
        data_parallel_rank: None,
        events,
    });
    start.elapsed()
}

/// Looks `keys` up on all endpoints.
fn look(index: &KvIndex, keys: &[BlockKey]) {
    let candidates: Vec<_> = (0..ENDPOINTS).map(EndpointIndex).collect();
    let mut lookup = Lookup::new();
    let mut times = Vec::new();
    let mut best = 0;
    for _ in 0..LOOKUPS {
        let start = Instant::now();
        index.lookup(keys, &candidates, start, &mut lookup);
        times.push(start.elapsed());
        best = lookup
            .matches()
            .iter()
            .map(|found| found.blocks)
            .max()
            .unwrap_or(0);
    }
    times.sort_unstable();
    let us = |share: usize| times[times.len() * share / 1000].as_secs_f64() * 1e6;
    show(&format!(
        "look-up of {} blocks, best match {best}: p50 {:.2} us, p99 {:.2} us",
        keys.len(),
        us(500),
        us(990)
    ));
}

fn ns(time: Duration, n: u32) -> f64 {
    time.as_secs_f64() * 1e9 / f64::from(n)
}

/// Memory of the process; 0 where the system does not say.
fn resident_bytes() -> usize {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let pages = statm
        .split(' ')
        .nth(1)
        .and_then(|pages| pages.parse::<usize>().ok());
    pages.unwrap_or(0) * 4096
}
