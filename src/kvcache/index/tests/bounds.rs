//! Memory bounds and parking.

use std::time::Duration;

use tokio::time::Instant;

use super::super::table::MAX_EXPECTED;
use super::super::{IndexSettings, KvIndex, Lookup, MAX_ADAPTERS, parked};
use super::stored;
use crate::datalayer::EndpointIndex;
use crate::kvcache::block::{BlockHasher, BlockKey, KeySpace};
use crate::kvcache::events::{Batch, Event, EventSink, Removed, StreamState};

const ENDPOINT: EndpointIndex = EndpointIndex(0);

fn keys(index: &KvIndex, tokens: &[u32]) -> Vec<BlockKey> {
    let space = KeySpace {
        model: "m",
        lora: None,
        block_size: 1,
    };
    let mut keys = Vec::new();
    index
        .hasher()
        .request_keys(&space, tokens, None, &[], &mut keys);
    keys
}

fn blocks(index: &KvIndex, tokens: &[u32]) -> u32 {
    let mut lookup = Lookup::new();
    index.lookup(
        &keys(index, tokens),
        &[ENDPOINT],
        Instant::now(),
        &mut lookup,
    );
    lookup.matches()[0].blocks
}

fn one(event: Event<'_>) -> [Event<'_>; 1] {
    [event]
}

fn batch<'a>(events: &'a [Event<'a>]) -> Batch<'a> {
    Batch {
        ts: 0.0,
        data_parallel_rank: None,
        events,
    }
}

#[test]
fn at_the_bound_prompts_not_stored_for_longest_go() {
    let settings = IndexSettings {
        max_bytes: 100_000,
        ..IndexSettings::default()
    };
    let index = KvIndex::new(&settings, BlockHasher::with_seed(1));
    let mut writer = index.writer(ENDPOINT, "m");
    writer.set_state(StreamState::Live);
    for n in 0..500_u32 {
        let tokens: Vec<u32> = (0..20).map(|i| n * 100 + i).collect();
        let hashes: Vec<u64> = tokens.iter().map(|token| u64::from(*token) + 1).collect();
        writer.apply(&batch(&one(Event::Stored(stored(
            &hashes, None, &tokens, 1,
        )))));
        assert!(index.stats().used_bytes <= settings.max_bytes);
        assert_eq!(blocks(&index, &tokens), 20, "the newest is always in");
    }
    let stats = index.stats();
    // A prompt takes 20 * 71 + 574 + 85 = 2079 bytes, so 48 fit.
    assert_eq!(stats.runs, 48, "{stats:?}");
    assert_eq!(stats.evicted_runs, 500 - 48);
    assert_eq!((blocks(&index, &[0, 1]), stats.refused_blocks), (0, 0));
    let gone = one(Event::Removed(Removed {
        hashes: &[1],
        medium: "GPU",
        group: Some(0),
    }));
    writer.apply(&batch(&gone));
    assert_eq!(
        writer.stats().unknown_hashes,
        1,
        "a late removal of an evicted block is harmless"
    );
}

#[test]
fn names_that_only_one_endpoint_uses_count() {
    let settings = IndexSettings {
        max_bytes: 100_000,
        ..IndexSettings::default()
    };
    let index = KvIndex::new(&settings, BlockHasher::with_seed(1));
    let mut writers: Vec<_> = (0..20)
        .map(|e| index.writer(EndpointIndex(e), "m"))
        .collect();
    // A prompt takes 2079 bytes for the first endpoint, and 20 * 39 + 85 = 865 for each that calls its blocks
    // something else: not even six prompts fit with all names.
    for n in 0..10_u32 {
        let tokens: Vec<u32> = (0..20).map(|i| n * 100 + i).collect();
        for (e, writer) in (0..).zip(&mut writers) {
            let name = |token: &u32| u64::from(*token) + 1 + e * 10_000;
            let hashes: Vec<u64> = tokens.iter().map(name).collect();
            writer.apply(&batch(&one(Event::Stored(stored(
                &hashes, None, &tokens, 1,
            )))));
            let stats = index.stats();
            assert!(stats.used_bytes <= settings.max_bytes, "{stats:?}");
        }
        assert_eq!(blocks(&index, &tokens), 20, "the newest is in");
    }
    let stats = index.stats();
    assert_eq!((stats.runs, stats.refused_blocks), (5, 0), "{stats:?}");
}

#[test]
fn a_prompt_larger_than_the_bound_keeps_its_head() {
    let settings = IndexSettings {
        max_bytes: 10_000,
        ..IndexSettings::default()
    };
    let index = KvIndex::new(&settings, BlockHasher::with_seed(1));
    let mut writer = index.writer(ENDPOINT, "m");
    let tokens: Vec<u32> = (0..1000).collect();
    let hashes: Vec<u64> = (1..=1000).collect();
    writer.apply(&batch(&one(Event::Stored(stored(
        &hashes, None, &tokens, 1,
    )))));
    let held = blocks(&index, &tokens);
    // (10000 - 574 - 85) / 71
    assert_eq!(held, 131);
    assert_eq!(index.stats().refused_blocks, 1000 - u64::from(held));
    assert!(index.stats().used_bytes <= settings.max_bytes);
    // Other names for the same blocks do not fit beside them.
    let mut other = index.writer(EndpointIndex(1), "m");
    let hashes: Vec<u64> = (2001..=3000).collect();
    other.apply(&batch(&one(Event::Stored(stored(
        &hashes, None, &tokens, 1,
    )))));
    assert!(index.stats().used_bytes <= settings.max_bytes);
}

#[test]
fn predictions_are_bounded() {
    let index = KvIndex::new(&IndexSettings::default(), BlockHasher::with_seed(1));
    let _writer = index.writer(ENDPOINT, "m");
    let now = Instant::now();
    for n in 0..MAX_EXPECTED + 5 {
        let key = BlockKey(n as u64);
        index.expect(ENDPOINT, &[key], now, Duration::from_mins(1));
    }
    assert_eq!(index.stats().refused_predictions, 5);
    assert_eq!(index.stats().blocks, MAX_EXPECTED);
    index.expire(now + Duration::from_secs(61));
    assert_eq!(index.stats().blocks, 0);
}

#[test]
fn orphans_wait_for_their_parent_in_bounded_number() {
    let index = KvIndex::new(&IndexSettings::default(), BlockHasher::with_seed(1));
    let mut writer = index.writer(ENDPOINT, "m");
    let extra = 3;
    for n in 0..parked::MAX_EVENTS as u64 + extra {
        let hashes = [1000 + n];
        writer.apply(&batch(&one(Event::Stored(stored(
            &hashes,
            Some(n),
            &[0],
            1,
        )))));
    }
    assert_eq!(writer.stats().parked_dropped, extra);
    writer.reset();
    // Grandchild, child, then the parent; the grandchild's last block is removed before it counts.
    writer.apply(&batch(&[
        Event::Stored(stored(&[13, 14], Some(12), &[3, 4], 1)),
        Event::Stored(stored(&[12], Some(11), &[2], 1)),
        Event::Removed(Removed {
            hashes: &[14],
            medium: "GPU",
            group: Some(0),
        }),
    ]));
    assert_eq!(blocks(&index, &[1, 2, 3, 4]), 0);
    writer.apply(&batch(&one(Event::Stored(stored(&[11], None, &[1], 1)))));
    assert_eq!(blocks(&index, &[1, 2, 3, 4]), 3);
}

#[test]
fn adapter_names_are_bounded() {
    let index = KvIndex::new(&IndexSettings::default(), BlockHasher::with_seed(1));
    for number in 0..=MAX_ADAPTERS {
        index.note_adapter(&format!("adapter-{number}"));
    }
    assert!(index.is_adapter("adapter-4095"));
    assert!(!index.is_adapter("adapter-4096"));
    assert!(!index.is_adapter("base"));
}
