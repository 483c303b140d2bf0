//! Store, churn, look-up and weight of the exact block index beside smg's chain index, Dynamo's compressed
//! radix tree and a plain map: one workload, one process, one allocator.
//!
//! Every index is used through its fastest public interface by one thread. Numbers are medians of
//! `ROUNDS` rounds, each on a fresh index. "tokens" is from token ids to the index, what a router has to
//! do; "hashed" leaves out hashing the tokens of the peers, whose interfaces take hashes.

mod alloc;
mod dynamo;
mod ours;
mod plain;
mod smg;
#[path = "../../kv_index/workload.rs"]
mod workload;

use std::hint::black_box;
use std::time::{Duration, Instant};

use workload::{
    ENDPOINTS, ENTRIES, GROUPS_EACH, Hashes, LONG_PROMPTS, PRIVATE, Prompt, SHARED, conversation,
    group_of, long,
};

#[global_allocator]
static ALLOCATOR: alloc::Counting = alloc::Counting;

const ROUNDS: usize = 3;
/// Times every conversation loses and regains its tail.
const CHURNS: u32 = 2;
/// Prompts that look-ups go through in turn, so that not every one finds its answer in the first cache.
const ASKED: u32 = 128;

/// An index under test.
trait Peer {
    const NAME: &'static str;
    const LOOKUPS: usize = 20_000;
    /// What an event is before it is applied.
    type Event;
    /// Keys of a prompt.
    type Keys;

    fn new() -> Self;
    /// Blocks from number `from` on were stored. Timed as "tokens" together with applying.
    fn stored(&mut self, endpoint: u32, prompt: &Prompt, from: u32) -> Self::Event;
    /// Each hash in an event of its own, as engines evict; one message.
    fn removed(&mut self, endpoint: u32, hashes: &[u64]) -> Self::Event;
    fn apply(&mut self, event: Self::Event);
    fn keys(&self, tokens: &[u32]) -> Self::Keys;
    /// Scores all endpoints and returns the best score.
    fn look_up(&mut self, keys: &Self::Keys) -> u32;
}

#[derive(Debug, Default, Clone)]
struct Round {
    /// Nanoseconds a block.
    store_tokens: f64,
    store_hashed: f64,
    churn_tokens: f64,
    churn_hashed: f64,
    /// Microseconds.
    short: (f64, f64),
    long: (f64, f64),
    keys: f64,
    bytes: f64,
}

fn main() {
    // Names of indexes to leave the others out.
    let only: Vec<String> = std::env::args().skip(1).collect();
    let asked = |name: &str| only.is_empty() || only.iter().any(|other| other == name);
    for hashes in [Hashes::Shared, Hashes::Own] {
        println!("{ENTRIES} entries, {ENDPOINTS} endpoints, hashes: {hashes:?}");
        println!(
            "{:<12} {:>14} {:>14} {:>16} {:>16} {:>9} {:>8}",
            "", "store ns/block", "churn ns/op", "450 p50/p99 us", "7500 p50/p99 us", "keys us", "B/entry"
        );
        compare::<ours::Pinpod>(hashes, &asked);
        compare::<smg::Smg>(hashes, &asked);
        compare::<dynamo::Radix>(hashes, &asked);
        compare::<plain::Plain>(hashes, &asked);
    }
}

fn compare<P: Peer>(hashes: Hashes, asked: impl Fn(&str) -> bool) {
    if !asked(P::NAME) {
        return;
    }
    let rounds: Vec<_> = (0..ROUNDS).map(|_| round::<P>(hashes)).collect();
    let median = |of: &dyn Fn(&Round) -> f64| {
        let mut all: Vec<_> = rounds.iter().map(of).collect();
        all.sort_by(f64::total_cmp);
        all[all.len() / 2]
    };
    println!(
        "{:<12} {:>6.0} ({:>5.0}) {:>6.0} ({:>5.0}) {:>8.2}/{:<7.2} {:>8.2}/{:<7.2} {:>9.2} {:>8.1}",
        P::NAME,
        median(&|r| r.store_tokens),
        median(&|r| r.store_hashed),
        median(&|r| r.churn_tokens),
        median(&|r| r.churn_hashed),
        median(&|r| r.short.0),
        median(&|r| r.short.1),
        median(&|r| r.long.0),
        median(&|r| r.long.1),
        median(&|r| r.keys),
        median(&|r| r.bytes),
    );
}

/// Time to make an event and time to apply it.
#[derive(Default)]
struct Spent {
    making: Duration,
    applying: Duration,
}

impl Spent {
    fn apply<P: Peer>(&mut self, peer: &mut P, make: impl FnOnce(&mut P) -> P::Event) {
        let start = Instant::now();
        let event = make(peer);
        let made = Instant::now();
        peer.apply(event);
        self.applying += made.elapsed();
        self.making += made - start;
    }

    /// Nanoseconds an operation, with making the events and without.
    fn each(&self, operations: u32) -> (f64, f64) {
        let ns = |time: Duration| time.as_secs_f64() * 1e9 / f64::from(operations);
        (ns(self.making + self.applying), ns(self.applying))
    }
}

fn round<P: Peer>(hashes: Hashes) -> Round {
    let mut round = Round::default();
    let before = alloc::live();
    let mut peer = P::new();
    let mut spent = Spent::default();
    for n in 0..GROUPS_EACH {
        for e in 0..ENDPOINTS {
            let prompt = conversation(e, group_of(e, n), hashes);
            spent.apply(&mut peer, |peer| peer.stored(e, &prompt, 0));
        }
    }
    (round.store_tokens, round.store_hashed) = spent.each(ENTRIES);
    round.bytes = (alloc::live() - before) as f64 / f64::from(ENTRIES);

    let asked: Vec<_> = (0..ASKED)
        .map(|n| {
            let e = n * 29 % ENDPOINTS;
            conversation(e, group_of(e, n % GROUPS_EACH), hashes).tokens
        })
        .collect();
    let start = Instant::now();
    let keys: Vec<_> = asked.iter().map(|tokens| peer.keys(tokens)).collect();
    round.keys = start.elapsed().as_secs_f64() * 1e6 / f64::from(ASKED);
    round.short = look(&mut peer, &keys, SHARED + PRIVATE);

    let mut spent = Spent::default();
    for _ in 0..CHURNS {
        for n in 0..GROUPS_EACH {
            for e in 0..ENDPOINTS {
                let prompt = conversation(e, group_of(e, n), hashes);
                let (_, tail, _) = prompt.tail(SHARED);
                let gone: Vec<_> = tail.iter().rev().copied().collect();
                spent.apply(&mut peer, |peer| peer.removed(e, &gone));
                spent.apply(&mut peer, |peer| peer.stored(e, &prompt, SHARED));
            }
        }
    }
    let operations = CHURNS * GROUPS_EACH * ENDPOINTS * PRIVATE * 2;
    (round.churn_tokens, round.churn_hashed) = spent.each(operations);

    for number in 0..LONG_PROMPTS {
        for e in 0..ENDPOINTS {
            let prompt = long(e, number, hashes);
            let event = peer.stored(e, &prompt, 0);
            peer.apply(event);
        }
    }
    let keys: Vec<_> = (0..LONG_PROMPTS)
        .map(|number| peer.keys(&long(0, number, hashes).tokens))
        .collect();
    round.long = look(&mut peer, &keys, workload::LONG);
    round
}

/// Median and 99th percentile in microseconds.
fn look<P: Peer>(peer: &mut P, prompts: &[P::Keys], expected: u32) -> (f64, f64) {
    let mut times = Vec::with_capacity(P::LOOKUPS);
    for keys in prompts.iter().cycle().take(P::LOOKUPS) {
        let start = Instant::now();
        let best = peer.look_up(black_box(keys));
        times.push(start.elapsed());
        assert_eq!(best, expected, "{}", P::NAME);
    }
    times.sort_unstable();
    let at = |share: usize| times[times.len() * share / 100].as_secs_f64() * 1e6;
    (at(50), at(99))
}
