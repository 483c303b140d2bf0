//! Every case of `index_scenarios.json`, and the rules it does not cover.

use std::collections::HashMap;
use std::path::PathBuf;
use std::time::Duration;

use rmpv::Value;
use serde_json::Value as Json;
use tokio::time::Instant;

use super::super::{CPU, EndpointWriter, GPU, IndexSettings, KvIndex, Lookup, SPECULATIVE, Trust};
use super::stored;
use crate::datalayer::EndpointIndex;
use crate::kvcache::block::{BlockHasher, BlockKey, KeySpace, MediaSpan};
use crate::kvcache::events::{Batch, Cleared, Event, EventSink, Removed, Stored, StreamState};

/// Vectors of the environment's choice, else those of the repository.
fn vectors(name: &str) -> Json {
    let directory = std::env::var_os("PINPOD_VECTORS").map_or_else(
        || PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/data/vectors"),
        PathBuf::from,
    );
    let text = std::fs::read_to_string(directory.join(name)).unwrap();
    serde_json::from_str(&text).unwrap()
}

#[test]
fn published_scenarios() {
    let file = vectors("index_scenarios.json");
    let cases = file["cases"].as_array().unwrap();
    assert!(!cases.is_empty());
    for case in cases {
        Scenario::new(case).run(case);
    }
}

struct Scenario {
    name: String,
    index: KvIndex,
    block_size: u32,
    writers: HashMap<String, (EndpointIndex, EndpointWriter)>,
    used: u32,
}

impl Scenario {
    fn new(case: &Json) -> Self {
        let weights = case["tier_weights"].as_object().unwrap();
        let settings = IndexSettings {
            tier_weights: weights
                .iter()
                .map(|(k, v)| (k.clone(), v.as_f64().unwrap()))
                .collect(),
            ..IndexSettings::default()
        };
        Self {
            name: case["name"].as_str().unwrap().into(),
            index: KvIndex::new(&settings, BlockHasher::default()),
            block_size: u32::try_from(case["block_size"].as_u64().unwrap()).unwrap(),
            writers: HashMap::new(),
            used: 0,
        }
    }

    fn run(mut self, case: &Json) {
        for step in case["steps"].as_array().unwrap() {
            let endpoint = step["endpoint"].as_str().unwrap_or_default();
            match step["op"].as_str().unwrap() {
                "batch" => self.batch(endpoint, step),
                "endpoint_removed" => assert!(self.writers.remove(endpoint).is_some()),
                "lookup" => self.lookup(step),
                other => panic!("{}: unknown step {other}", self.name),
            }
        }
    }

    fn batch(&mut self, endpoint: &str, step: &Json) {
        let model = step["topic"]
            .as_str()
            .unwrap()
            .splitn(3, '@')
            .nth(2)
            .unwrap();
        let (_, writer) = self.writers.entry(endpoint.into()).or_insert_with(|| {
            self.used += 1;
            let index = EndpointIndex(self.used);
            let mut writer = self.index.writer(index, model);
            writer.set_state(StreamState::Live);
            (index, writer)
        });
        let hex = step["hex"].as_str().unwrap();
        let bytes: Vec<u8> = (0..hex.len())
            .step_by(2)
            .map(|i| u8::from_str_radix(&hex[i..i + 2], 16).unwrap())
            .collect();
        let value = rmpv::decode::read_value(&mut bytes.as_slice()).unwrap();
        let decoded: Vec<_> = value[1]
            .as_array()
            .unwrap()
            .iter()
            .filter_map(Decoded::new)
            .collect();
        let events: Vec<_> = decoded.iter().map(Decoded::event).collect();
        writer.apply(&Batch {
            ts: value[0].as_f64().unwrap(),
            data_parallel_rank: None,
            events: &events,
        });
    }

    fn lookup(&self, step: &Json) {
        let tokens: Vec<u32> = step["tokens"]
            .as_array()
            .unwrap()
            .iter()
            .map(|token| u32::try_from(token.as_u64().unwrap()).unwrap())
            .collect();
        let number =
            |item: &Json, field: &str| u32::try_from(item[field].as_u64().unwrap()).unwrap();
        let media: Vec<_> = step["mm"]
            .as_array()
            .unwrap()
            .iter()
            .map(|item| MediaSpan {
                identifier: item["identifier"].as_str().unwrap(),
                offset: number(item, "offset"),
                length: number(item, "length"),
            })
            .collect();
        let space = KeySpace {
            model: step["model"].as_str().unwrap(),
            lora: step["lora_name"].as_str(),
            block_size: self.block_size,
        };
        let mut keys = Vec::new();
        let salt = step["cache_salt"].as_str();
        self.index
            .hasher()
            .request_keys(&space, &tokens, salt, &media, &mut keys);
        let answer = self.answer(&keys);
        let right = [&step["expect"], &step["alt_expect"]].contains(&&answer);
        assert!(right, "{}: {answer} is not {}", self.name, step["expect"]);
    }

    /// The look-up's result in the form of `expect`.
    fn answer(&self, keys: &[BlockKey]) -> Json {
        let names: Vec<_> = self.writers.iter().collect();
        let candidates: Vec<_> = names.iter().map(|(_, (index, _))| *index).collect();
        let mut lookup = Lookup::new();
        self.index
            .lookup(keys, &candidates, Instant::now(), &mut lookup);
        let tier_names = self.index.tiers();
        let mut answer = serde_json::Map::new();
        for ((name, _), found) in names.iter().zip(lookup.matches()) {
            assert_eq!(found.trust, Trust::Exact);
            if found.blocks == 0 {
                continue;
            }
            let tiers: serde_json::Map<_, _> = tier_names
                .iter()
                .zip(found.by_tier)
                .filter(|(_, blocks)| *blocks > 0)
                .map(|(tier, blocks)| (tier.to_string(), blocks.into()))
                .collect();
            // Sums of 0.8 differ from the vector's in the last bits.
            let score = (found.score * 1e6).round() / 1e6;
            let found = serde_json::json!({"blocks": found.blocks, "tiers": tiers, "score": score});
            answer.insert((*name).clone(), found);
        }
        answer.into()
    }
}

/// An event of the map form with owned parts.
struct Decoded {
    tag: String,
    hashes: Vec<u64>,
    parent: Option<u64>,
    tokens: Vec<u32>,
    block_size: u32,
    lora_name: Option<String>,
    medium: String,
    extra_keys: Option<Vec<u8>>,
    group: Option<u32>,
    kind: Option<String>,
}

impl Decoded {
    /// `None` for unknown tags and events without a required field.
    fn new(value: &Value) -> Option<Self> {
        let field = |name: &str| {
            let fields = value.as_map()?.iter();
            let found = fields
                .filter(|(key, _)| key.as_str() == Some(name))
                .map(|(_, v)| v)
                .next();
            found.filter(|value| !value.is_nil())
        };
        let text = |name| Some(field(name)?.as_str()?.to_owned());
        let number = |name| u32::try_from(field(name)?.as_u64()?).ok();
        let tag = text("type")?;
        let numbers = |name| -> Option<Vec<u64>> {
            field(name)?.as_array()?.iter().map(Value::as_u64).collect()
        };
        let hashes = match tag.as_str() {
            "AllBlocksCleared" => Vec::new(),
            "BlockStored" | "BlockRemoved" => numbers("block_hashes")?,
            _ => return None,
        };
        let stored = tag == "BlockStored";
        let tokens = if stored {
            numbers("token_ids")?
        } else {
            Vec::new()
        };
        let extra_keys = field("extra_keys").map(|value| {
            let mut raw = Vec::new();
            rmpv::encode::write_value(&mut raw, value).unwrap();
            raw
        });
        Some(Self {
            hashes,
            parent: field("parent_block_hash").and_then(Value::as_u64),
            tokens: tokens
                .into_iter()
                .map(|token| u32::try_from(token).unwrap())
                .collect(),
            block_size: if stored { number("block_size")? } else { 0 },
            lora_name: text("lora_name"),
            medium: text("medium").unwrap_or_default(),
            extra_keys,
            group: number("group_idx"),
            kind: text("kv_cache_spec_kind"),
            tag,
        })
    }

    fn event(&self) -> Event<'_> {
        match self.tag.as_str() {
            "BlockStored" => Event::Stored(Stored {
                hashes: &self.hashes,
                parent: self.parent,
                tokens: &self.tokens,
                block_size: self.block_size,
                lora_name: self.lora_name.as_deref(),
                medium: &self.medium,
                extra_keys: self.extra_keys.as_deref(),
                cache_salt: None,
                group: self.group,
                kind: self.kind.as_deref(),
            }),
            "BlockRemoved" => Event::Removed(Removed {
                hashes: &self.hashes,
                medium: &self.medium,
                group: self.group,
            }),
            _ => Event::Cleared(Cleared),
        }
    }
}

/// One endpoint, block size 1, tokens that name their block.
struct One {
    index: KvIndex,
    writer: EndpointWriter,
    lookup: Lookup,
    start: Instant,
}

const ENDPOINT: EndpointIndex = EndpointIndex(4);

impl One {
    fn new() -> Self {
        let index = KvIndex::new(&IndexSettings::default(), BlockHasher::with_seed(1));
        let mut writer = index.writer(ENDPOINT, "m");
        writer.set_state(StreamState::Live);
        Self {
            index,
            writer,
            lookup: Lookup::new(),
            start: Instant::now(),
        }
    }

    fn apply(&mut self, event: Event<'_>) {
        self.writer.apply(&Batch {
            ts: 0.0,
            data_parallel_rank: None,
            events: &[event],
        });
    }

    fn store(&mut self, group: Option<u32>, kind: Option<&str>, hashes: &[u64], tokens: &[u32]) {
        self.apply(Event::Stored(Stored {
            group,
            kind,
            ..stored(hashes, None, tokens, 1)
        }));
    }

    fn remove(&mut self, group: Option<u32>, medium: &str, hashes: &[u64]) {
        self.apply(Event::Removed(Removed {
            hashes,
            medium,
            group,
        }));
    }

    fn keys(&self, tokens: &[u32]) -> Vec<BlockKey> {
        let space = KeySpace {
            model: "m",
            lora: None,
            block_size: 1,
        };
        let mut keys = Vec::new();
        self.index
            .hasher()
            .request_keys(&space, tokens, None, &[], &mut keys);
        keys
    }

    fn found(&mut self, tokens: &[u32], after_ms: u64) -> super::super::Match {
        let keys = self.keys(tokens);
        let now = self.start + Duration::from_millis(after_ms);
        self.index.lookup(&keys, &[ENDPOINT], now, &mut self.lookup);
        self.lookup.matches()[0]
    }
}

#[test]
fn predictions_end_at_their_own_deadline() {
    let mut one = One::new();
    let (long, short) = (one.keys(&[1, 2, 3]), one.keys(&[1, 2]));
    let ttl = Duration::from_secs(2);
    one.index.expect(ENDPOINT, &long, one.start, ttl);
    one.index
        .expect(ENDPOINT, &short, one.start + Duration::from_secs(1), ttl);
    assert_eq!(one.found(&[1, 2, 3, 4], 1990).blocks, 3);
    let renewed = one.found(&[1, 2, 3, 4], 2010);
    assert_eq!(
        (renewed.blocks, renewed.by_tier[usize::from(SPECULATIVE)]),
        (2, 2)
    );
    assert_eq!(one.found(&[1, 2, 3, 4], 3010).blocks, 0);
    assert_eq!(one.index.stats().blocks, 3);
    one.index.expire(one.start + Duration::from_secs(4));
    assert_eq!(one.index.stats().blocks, 0);
}

#[test]
fn events_take_the_place_of_predictions() {
    let mut one = One::new();
    let keys = one.keys(&[1, 2, 3]);
    one.index
        .expect(ENDPOINT, &keys, one.start, Duration::from_secs(2));
    one.store(Some(0), None, &[11, 12], &[1, 2]);
    let found = one.found(&[1, 2, 3], 0);
    // Blocks 0 and 1 are real, block 2 is still expected: no tier but the GPU leads.
    assert_eq!(
        (found.blocks, found.by_tier[0], found.by_tier[2]),
        (3, 2, 0)
    );
    one.remove(Some(0), "GPU", &[12]);
    assert_eq!(
        one.found(&[1, 2, 3], 0).blocks,
        1,
        "the event won over the prediction"
    );
    one.apply(Event::Cleared(Cleared));
    assert_eq!(
        one.found(&[1, 2, 3], 0).blocks,
        0,
        "clearing drops predictions too"
    );
    assert_eq!(one.index.stats().blocks, 0);
}

#[test]
fn two_dense_groups_must_both_have_a_block() {
    let mut one = One::new();
    let full = Some("full_attention");
    one.store(Some(0), full, &[11, 12, 13], &[1, 2, 3]);
    assert_eq!(one.found(&[1, 2, 3], 0).blocks, 3, "one group seen");
    one.store(Some(1), full, &[11, 12], &[1, 2]);
    assert_eq!(one.found(&[1, 2, 3], 0).blocks, 2);
    one.remove(Some(0), "GPU", &[12]);
    assert_eq!(one.found(&[1, 2, 3], 0).blocks, 1);
}

#[test]
fn sparse_and_window_groups_are_left_out() {
    let mut one = One::new();
    one.store(Some(1), Some("sliding_window"), &[11, 12], &[1, 2]);
    one.store(Some(0), Some("full_attention"), &[12], &[1, 2]);
    one.store(Some(2), None, &[12], &[1, 2]);
    one.store(Some(99), None, &[11, 12], &[1, 2]);
    assert_eq!(one.found(&[1, 2], 0).blocks, 0);
    let stats = one.writer.stats();
    assert_eq!((stats.unsupported_group, stats.not_dense), (2, 2));
    one.store(Some(3), None, &[11, 12], &[1, 2]);
    assert_eq!(
        one.found(&[1, 2], 0).blocks,
        2,
        "an unknown kind counts where it is dense"
    );
}

#[test]
fn location_only_stores_need_a_known_block() {
    let mut one = One::new();
    one.store(None, None, &[11, 12], &[1, 2]);
    let place = Stored {
        medium: "cpu",
        block_size: 0,
        group: None,
        kind: None,
        ..stored(&[12, 77], None, &[], 0)
    };
    one.apply(Event::Stored(place));
    one.remove(None, "GPU", &[12, 11, 99]);
    let stats = one.writer.stats();
    assert_eq!((stats.located_blocks, stats.unknown_hashes), (1, 2));
    assert_eq!(one.found(&[1, 2], 0).blocks, 0, "block 0 is gone");
    one.store(None, None, &[11], &[1]);
    let found = one.found(&[1, 2], 0);
    assert_eq!(
        (
            found.blocks,
            found.by_tier[usize::from(GPU)],
            found.by_tier[usize::from(CPU)]
        ),
        (2, 1, 0)
    );
    assert!(
        (found.score - 1.8).abs() < 1e-9,
        "1.0 on the GPU and 0.8 on the CPU"
    );
}

#[test]
fn trust_follows_the_stream() {
    let mut one = One::new();
    one.store(None, None, &[11], &[1]);
    for (state, trust) in [
        (StreamState::Joining, Trust::LowerBound),
        (StreamState::Gap, Trust::LowerBound),
        (StreamState::Down, Trust::Unknown),
        (StreamState::Live, Trust::Exact),
    ] {
        one.writer.set_state(state);
        assert_eq!(one.found(&[1], 0).trust, trust);
    }
    let mut lookup = Lookup::new();
    one.index.lookup(
        &one.keys(&[1]),
        &[EndpointIndex(900)],
        one.start,
        &mut lookup,
    );
    assert_eq!(
        (lookup.matches()[0].blocks, lookup.matches()[0].trust),
        (0, Trust::Unknown)
    );
}

#[test]
fn ranks_of_one_endpoint_answer_with_the_longer_match() {
    let mut one = One::new();
    one.store(None, None, &[11], &[1]);
    let mut rank = one.index.writer(ENDPOINT, "m");
    rank.set_state(StreamState::Live);
    let events = [Event::Stored(stored(&[21, 22], None, &[1, 2], 1))];
    rank.apply(&Batch {
        ts: 0.0,
        data_parallel_rank: Some(1),
        events: &events,
    });
    assert_eq!(one.found(&[1, 2], 0).blocks, 2);
    drop(rank);
    assert_eq!(one.found(&[1, 2], 0).blocks, 1);
}

#[test]
fn block_size_is_learned_and_kept_until_a_restart() {
    let mut one = One::new();
    assert_eq!(one.index.block_size(ENDPOINT), None);
    one.store(None, None, &[11], &[1]);
    assert_eq!(one.index.block_size(ENDPOINT), Some(1));
    one.apply(Event::Stored(stored(&[12], None, &[1, 2], 2)));
    assert_eq!(one.writer.stats().block_size, 1);
    one.writer.reset();
    one.apply(Event::Stored(stored(&[12], None, &[1, 2], 2)));
    assert_eq!(one.index.block_size(ENDPOINT), Some(2));
}

#[test]
fn a_hash_that_moves_to_another_block_leaves_the_first() {
    let mut one = One::new();
    one.store(None, None, &[11, 12], &[1, 2]);
    one.store(None, None, &[12], &[5]);
    assert_eq!(one.found(&[1, 2], 0).blocks, 1);
    assert_eq!(one.found(&[5], 0).blocks, 1);
    one.remove(None, "GPU", &[12, 11]);
    assert_eq!(
        one.index.stats().blocks,
        0,
        "nothing is left that no hash names"
    );
}

#[test]
fn idempotent_stores_are_one_copy() {
    let settings = IndexSettings {
        idempotent_stores: true,
        ..IndexSettings::default()
    };
    let index = KvIndex::new(&settings, BlockHasher::with_seed(1));
    let mut one = One {
        writer: index.writer(ENDPOINT, "m"),
        index,
        lookup: Lookup::new(),
        start: Instant::now(),
    };
    one.store(None, None, &[11], &[1]);
    one.store(None, None, &[11], &[1]);
    one.remove(None, "GPU", &[11]);
    assert_eq!(one.found(&[1], 0).blocks, 0);
}
