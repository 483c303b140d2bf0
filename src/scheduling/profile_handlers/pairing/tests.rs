//! Costs worked out by hand, in milliseconds.

use super::*;
use crate::plugin::{DataKeys, Parameters};
use crate::scheduling::test_support::{Pool, TestEndpoint, endpoint};

/// Disaggregates for every decode endpoint but those in the list.
#[derive(Debug)]
struct AllBut(&'static [u32]);

impl Decider for AllBut {
    fn wants_stage(&self, _: &Round<'_>, decode: Option<u32>) -> bool {
        decode.is_some_and(|d| !self.0.contains(&d))
    }
}

/// Round numbers: 0.1 ms a token, 10 ms a request; 1, 4, 16, 64, 256 ms for 1,000 tokens by distance.
const SETTINGS: &str = r#"{"prefillTokensPerSecond": 10000, "decodeMsPerRequest": 10,
    "transferMsPer1kTokens": {"host": 1, "rack": 4, "zone": 16, "region": 64, "other": 256, "unknown": 32}
    MORE}"#;

fn pairing(pool: &mut Pool, more: &str, fallbacks: usize) -> Pairing {
    let settings = serde_json::from_str(&SETTINGS.replace("MORE", more)).unwrap();
    let mut keys: DataKeys = pool.keys.clone();
    keys.enter("handler");
    let pairing = Pairing::new(
        &settings,
        fallbacks,
        &mut Build {
            name: "handler",
            parameters: &Parameters::default(),
            keys: &mut keys,
        },
    );
    // The prefix matches are read through the round.
    keys.optional::<crate::scheduling::attributes::PrefixMatch>(
        crate::scheduling::attributes::PREFIX_MATCH,
        crate::scheduling::attributes::APPROX_PREFIX_PRODUCER,
    );
    pool.keys = keys;
    pairing.unwrap()
}

fn scored(positions: &[u32]) -> Vec<Scored> {
    let score = |position| Scored {
        position,
        total: 0.0,
    };
    positions.iter().copied().map(score).collect()
}

/// Decode and prefill positions for a prompt of 1,000 tokens.
fn choose(
    pool: &mut Pool,
    more: &str,
    fallbacks: usize,
    decider: &AllBut,
    (prefill, decode): (&[u32], &[u32]),
) -> Option<(u32, Vec<u32>)> {
    pool.prompt_tokens = Some(1000);
    let pairing = pairing(pool, more, fallbacks);
    let (prefill, decode) = (scored(prefill), scored(decode));
    let choice = pool.with_round(&[], |round| {
        pairing.choose(round, decider, (&prefill, &decode))
    })?;
    Some((choice.decode, choice.prefill.to_vec()))
}

fn endpoints(pool: impl IntoIterator<Item = TestEndpoint>) -> Pool {
    Pool::new(pool)
}

#[test]
fn queue_cache_and_load_add_up() {
    // Prefill 2: 0.1 * (3000 + 1000) = 400. Prefill 3: 0.1 * (2000 + 1000 - 2 * 64) = 287.2.
    // Decode 0: 10 * 3 = 30, all 1000 tokens come over: 32. Decode 1: 10 * 5 = 50, 1000 - 10 * 64 = 360
    // tokens: 11.52. Pairs with 3: 349.2 and 348.72.
    let mut pool = endpoints([
        endpoint("d0").in_flight(3, 0),
        endpoint("d1").in_flight(5, 0).matched_blocks(10),
        endpoint("p2").in_flight(9, 3000),
        endpoint("p3").in_flight(9, 2000).matched_blocks(2),
    ]);
    let sets = (&[2, 3][..], &[0, 1][..]);
    assert_eq!(
        choose(&mut pool, "", 1, &AllBut(&[]), sets),
        Some((1, vec![3]))
    );
    assert_eq!(
        choose(&mut pool, "", 8, &AllBut(&[]), sets),
        Some((1, vec![3, 2])),
        "the others to fall back on, cheapest first"
    );
}

#[test]
fn a_decode_endpoint_that_stays_whole_competes_with_the_pairs() {
    // Decode 0 computes it itself: 10 * 1 + 0.1 * (200 + 1000) = 130.
    // Decode 1 with prefill 2: 0.1 * 1000 + 10 * n + 32 = 132 + 10 * n.
    let mut pool = endpoints([
        endpoint("d0").in_flight(1, 200),
        endpoint("d1"),
        endpoint("p2"),
    ]);
    let sets = (&[2][..], &[0, 1][..]);
    assert_eq!(
        choose(&mut pool, "", 1, &AllBut(&[0]), sets),
        Some((0, vec![]))
    );
    // With 50 tokens more in flight: 135.
    let mut pool = endpoints([
        endpoint("d0").in_flight(1, 250),
        endpoint("d1"),
        endpoint("p2"),
    ]);
    assert_eq!(
        choose(&mut pool, "", 1, &AllBut(&[0]), sets),
        Some((1, vec![2]))
    );
    // Without prefill endpoints nobody is left but decode: 135 against 0.1 * 1000 = 100.
    assert_eq!(
        choose(&mut pool, "", 1, &AllBut(&[]), (&[], &[0, 1])),
        Some((1, vec![]))
    );
    assert_eq!(choose(&mut pool, "", 1, &AllBut(&[]), (&[2], &[])), None);
}

#[test]
fn distance_counts_by_what_is_shared() {
    let pool = || {
        crate::scheduling::topology::tests::pool(&[
            "h1/r1/z1/g1", // decode
            "h1/r1/z1/g1", // 1 ms
            "h2/r1/z1/g1", // 4 ms
            "h3/r2/z1/g1", // 16 ms
            "h4/r3/z2/g1", // 64 ms
            "h5/r4/z3/g2", // 256 ms
            "",            // 32 ms
        ])
    };
    let named = r#", "topologyProducerName": "topology-extractor""#;
    let order = |more: &str, prefill: &[u32]| {
        choose(&mut pool(), more, 8, &AllBut(&[]), (prefill, &[0]))
            .unwrap()
            .1
    };
    assert_eq!(order(named, &[5, 6, 4, 3, 2, 1]), [1, 2, 3, 6, 4, 5]);
    // Nobody is asked where endpoints are: all are equally far.
    let mut all = order("", &[5, 6, 4, 3, 2, 1]);
    all.sort_unstable();
    assert_eq!(all, [1, 2, 3, 4, 5, 6]);
}

#[test]
fn an_endpoint_of_both_kinds_transfers_nothing_to_itself() {
    // Together: 0.1 * 1000 = 100. With the other one: 100 + 32.
    let mut pool = endpoints([endpoint("both"), endpoint("p")]);
    let choice = choose(&mut pool, "", 8, &AllBut(&[]), (&[0, 1], &[0]));
    assert_eq!(choice, Some((0, vec![])), "so it is not disaggregated");
}

#[test]
fn equal_pairs_are_drawn_by_lot() {
    let mut pool = endpoints(["d0", "d1", "p2", "p3"].map(endpoint));
    let mut seen = std::collections::BTreeSet::new();
    for seed in 0..64 {
        pool.rng = std::cell::RefCell::new(fastrand::Rng::with_seed(seed));
        let sets = (&[2, 3][..], &[0, 1][..]);
        let (decode, prefill) = choose(&mut pool, "", 1, &AllBut(&[]), sets).unwrap();
        seen.insert((decode, prefill[0]));
    }
    assert_eq!(seen.len(), 4, "{seen:?}");
}

#[test]
fn past_the_bound_only_the_cheapest_are_compared() {
    // 100 of each kind; the cheapest of either stands at the end of its list.
    let load = |i: i64| endpoint(&format!("e{i}")).in_flight(200 - i % 100, 10 * (200 - i % 100));
    let mut pool = endpoints((0..200).map(load));
    let (prefill, decode): (Vec<u32>, Vec<u32>) = ((0..100).collect(), (100..200).collect());
    let choice = choose(&mut pool, "", 8, &AllBut(&[]), (&prefill, &decode));
    assert_eq!(choice, Some((199, (92..=99).rev().collect())));
    pool.prompt_tokens = Some(1000);
    let pairing = pairing(&mut pool, "", 1);
    let kept = pool.with_round(&[], |round| {
        pairing
            .sides(round, &scored(&prefill), |_, p| f64::from(p))
            .len()
    });
    assert_eq!(kept, MAX_SIDE);
}
