//! Names that engines do not share, ranks, and tiers that never say what they drop.

use std::time::Duration;

use tokio::time::{Instant, advance};

use super::super::{CPU, EndpointWriter, IndexSettings, KvIndex, Lookup, MAX_WAITING_KEYS, Trust};
use super::stored;
use crate::datalayer::EndpointIndex;
use crate::kvcache::block::{BlockHasher, BlockKey, KeySpace};
use crate::kvcache::events::{Batch, Event, EventSink, Removed, Stored, StreamState};

const SPACE: KeySpace<'static> = KeySpace {
    model: "m",
    lora: None,
    block_size: 1,
};

struct Pool {
    index: KvIndex,
    writers: Vec<EndpointWriter>,
}

impl Pool {
    /// One writer for each of `endpoints`.
    fn new(endpoints: &[u32]) -> Self {
        let index = KvIndex::new(&IndexSettings::default(), BlockHasher::with_seed(1));
        let writers = endpoints
            .iter()
            .map(|e| index.writer(EndpointIndex(*e), "m"));
        Self {
            writers: writers.collect(),
            index,
        }
    }

    fn apply(&mut self, writer: usize, event: Event<'_>) {
        self.writers[writer].apply(&Batch {
            ts: 0.0,
            data_parallel_rank: None,
            events: &[event],
        });
    }

    fn store(&mut self, writer: usize, hashes: &[u64], tokens: &[u32]) {
        self.apply(writer, Event::Stored(stored(hashes, None, tokens, 1)));
    }

    fn remove(&mut self, writer: usize, hashes: &[u64], medium: &str) {
        self.apply(
            writer,
            Event::Removed(Removed {
                hashes,
                medium,
                group: Some(0),
            }),
        );
    }

    fn keys(&self, tokens: &[u32]) -> Vec<BlockKey> {
        let mut keys = Vec::new();
        let hasher = self.index.hasher();
        hasher.request_keys(&SPACE, tokens, None, &[], &mut keys);
        keys
    }

    fn look_up(&self, endpoint: u32, tokens: &[u32]) -> super::super::Match {
        let mut lookup = Lookup::new();
        let candidates = [EndpointIndex(endpoint)];
        self.index
            .lookup(&self.keys(tokens), &candidates, Instant::now(), &mut lookup);
        lookup.matches()[0]
    }

    fn blocks(&self, endpoint: u32, tokens: &[u32]) -> u32 {
        self.look_up(endpoint, tokens).blocks
    }
}

#[test]
fn one_name_may_mean_different_blocks_to_different_engines() {
    let mut pool = Pool::new(&[0, 1]);
    let tokens = [1, 2, 3, 4];
    pool.store(0, &[11, 12, 13, 14], &tokens);
    // The second engine calls the blocks by the first one's names, in another order.
    pool.store(1, &[14, 13, 12, 11], &tokens);
    assert_eq!((pool.blocks(0, &tokens), pool.blocks(1, &tokens)), (4, 4));
    pool.remove(1, &[14], "GPU");
    assert_eq!((pool.blocks(0, &tokens), pool.blocks(1, &tokens)), (4, 0));
    pool.remove(0, &[14], "GPU");
    assert_eq!((pool.blocks(0, &tokens), pool.blocks(1, &tokens)), (3, 0));
    pool.store(1, &[14], &tokens[..1]);
    assert_eq!(pool.blocks(1, &tokens), 4);
    // It calls the block as everybody does from now on, and no block else.
    pool.store(1, &[11], &tokens[..1]);
    assert_eq!(pool.blocks(1, &tokens), 3);
    pool.remove(1, &[11], "GPU");
    assert_eq!(pool.blocks(1, &tokens), 3, "one of two copies");
    pool.remove(1, &[11], "GPU");
    assert_eq!(pool.blocks(1, &tokens), 0);
}

#[test]
fn a_name_that_moves_leaves_its_old_block() {
    let mut pool = Pool::new(&[0, 1]);
    for writer in [0, 1] {
        // 0 is a name like any other.
        for name in [0, 5] {
            pool.store(writer, &[name], &[1]);
            pool.store(writer, &[name], &[2]);
            let endpoint = u32::try_from(writer).unwrap();
            assert_eq!(
                (pool.blocks(endpoint, &[1]), pool.blocks(endpoint, &[2])),
                (0, 1)
            );
            pool.remove(writer, &[name], "GPU");
            assert_eq!(pool.blocks(endpoint, &[2]), 0);
        }
    }
    // Two blocks of one event alike: the first cannot be named and is given up.
    pool.store(0, &[7, 7], &[1, 2]);
    assert_eq!(pool.blocks(0, &[1, 2]), 0);
    drop(pool.writers);
    let stats = pool.index.stats();
    assert_eq!((stats.blocks, stats.used_bytes), (0, 0), "nothing leaks");
}

#[test]
fn a_prediction_goes_to_the_rank_that_holds_most_among_those_known() {
    let mut pool = Pool::new(&[0, 0, 0]);
    let tokens = [1, 2, 3, 4];
    for (writer, state) in [StreamState::Down, StreamState::Live, StreamState::Live]
        .into_iter()
        .enumerate()
    {
        pool.writers[writer].set_state(state);
    }
    pool.store(0, &[11, 12, 13], &tokens[..3]);
    pool.store(2, &[11, 12], &tokens[..2]);
    let (keys, now) = (pool.keys(&tokens), Instant::now());
    pool.index
        .expect(EndpointIndex(0), &keys, now, Duration::from_secs(2));
    let found = pool.look_up(0, &tokens);
    assert_eq!((found.blocks, found.trust), (4, Trust::Exact));
    // Only the rank it was made for takes it along.
    pool.writers.pop();
    let found = pool.look_up(0, &tokens);
    assert_eq!((found.blocks, found.trust), (3, Trust::Unknown));
}

#[test]
fn predictions_that_wait_are_bounded() {
    let pool = Pool::new(&[0]);
    let keys = vec![BlockKey(1); MAX_WAITING_KEYS + 1];
    pool.index.expect(
        EndpointIndex(0),
        &keys,
        Instant::now(),
        Duration::from_secs(2),
    );
    assert_eq!(pool.index.stats().refused_predictions, 1);
}

#[tokio::test(start_paused = true)]
async fn a_tier_that_never_reports_removals_ages_out() {
    let mut pool = Pool::new(&[0, 1, 2]);
    let tokens = [1, 2];
    let cpu = |hashes| Stored {
        medium: "CPU",
        ..stored(hashes, None, &[1, 2], 1)
    };
    for writer in 0..3 {
        pool.apply(writer, Event::Stored(cpu(&[11, 12])));
    }
    pool.store(1, &[11], &tokens[..1]);
    // The third engine does report what leaves the tier.
    pool.store(2, &[11], &tokens[..1]);
    pool.apply(2, Event::Stored(cpu(&[11, 12])));
    pool.remove(2, &[12], "CPU");
    advance(Duration::from_mins(59)).await;
    for writer in 0..3 {
        pool.remove(writer, &[99], "GPU");
    }
    let blocks = |pool: &Pool| [0, 1, 2].map(|endpoint| pool.blocks(endpoint, &tokens));
    assert_eq!(blocks(&pool), [2, 2, 2]);
    advance(Duration::from_mins(2)).await;
    for writer in 0..3 {
        pool.remove(writer, &[99], "GPU");
    }
    assert_eq!(blocks(&pool), [0, 1, 2], "what the GPU holds stays");
    assert_eq!(pool.look_up(1, &tokens).by_tier[usize::from(CPU)], 0);
    assert_eq!(pool.index.stats().aged_out, 2);
}
