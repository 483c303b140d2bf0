use std::path::PathBuf;

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;

fn data(variable: &str, default: &str) -> PathBuf {
    std::env::var_os(variable).map_or_else(
        || PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(default),
        PathBuf::from,
    )
}

fn vectors() -> PathBuf {
    data("PINPOD_VECTORS", "tests/data/vectors")
}

fn fixtures() -> PathBuf {
    data("PINPOD_FIXTURES", "tests/data/vllm-0.32")
}

fn bytes(hex: &str) -> Vec<u8> {
    (0..hex.len() / 2)
        .map(|i| u8::from_str_radix(&hex[2 * i..2 * i + 2], 16).unwrap())
        .collect()
}

fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::new(), |mut text, b| {
        write!(text, "{b:02x}").unwrap();
        text
    })
}

/// The extra keys of an event with this many hashes in the form of the vectors; `None` as JSON null.
fn keys(raw: Option<&[u8]>, hashes: usize) -> Value {
    let Some(raw) = raw else { return Value::Null };
    let Some(mut blocks) = extra_keys(raw, hashes, None).unwrap() else {
        return json!(vec![Value::Null; hashes]);
    };
    let block = |_| {
        let mut keys = Vec::new();
        let read = blocks.next_block(|key| {
            keys.push(match key {
                ExtraKey::Str(text) => json!(text),
                ExtraKey::Mm { identifier, offset } => json!([identifier, offset]),
                ExtraKey::Bytes(bytes) => json!({ "bin": hex(bytes) }),
                ExtraKey::Unknown(raw) => json!({ "unknown": hex(raw) }),
            });
        });
        read.unwrap();
        if keys.is_empty() {
            Value::Null
        } else {
            json!(keys)
        }
    };
    (0..hashes).map(block).collect()
}

fn strings(hashes: &[u64]) -> Value {
    hashes.iter().map(ToString::to_string).collect()
}

fn or_null(text: &str) -> Value {
    if text.is_empty() {
        Value::Null
    } else {
        json!(text)
    }
}

/// An event as the vectors write it, with the fields we read.
fn as_json(event: &Event<'_>) -> Value {
    match event {
        Event::Stored(s) => json!({
            "type": "BlockStored",
            "block_hashes": strings(s.hashes),
            "parent_block_hash": s.parent.map(|p| p.to_string()),
            "token_ids": s.tokens,
            "block_size": s.block_size,
            "medium": or_null(s.medium),
            "lora_name": s.lora_name,
            "extra_keys": keys(s.extra_keys, s.hashes.len()),
            "group_idx": s.group,
            "kv_cache_spec_kind": s.kind,
            "cache_salt": s.cache_salt,
        }),
        Event::Removed(r) => json!({
            "type": "BlockRemoved",
            "block_hashes": strings(r.hashes),
            "medium": or_null(r.medium),
            "group_idx": r.group,
        }),
        Event::Cleared(Cleared) => json!({ "type": "AllBlocksCleared" }),
    }
}

/// `expected` without the fields we do not read.
fn reduced(expected: &Value) -> Value {
    const UNREAD: [&str; 6] = [
        "hash_wire",
        "lora_id",
        "kv_cache_spec_sliding_window",
        "locality",
        "ownership",
        "session_id",
    ];
    let mut event = expected.as_object().unwrap().clone();
    event.retain(|key, _| !UNREAD.contains(&key.as_str()));
    Value::Object(event)
}

/// Decodes with every left-out event in its place.
fn decode(scratch: &mut Scratch, payload: &[u8]) -> Result<Value, WireError> {
    let mut out = Value::Null;
    let decoded = scratch.decode(payload, |batch| {
        let events: Vec<Value> = batch.events.iter().map(as_json).collect();
        out = json!({ "ok": true, "ts": batch.ts, "data_parallel_rank": batch.data_parallel_rank, "events": events });
    })?;
    assert_eq!(decoded.unknown + decoded.malformed, scratch.skipped().len());
    let events = out["events"].as_array_mut().unwrap();
    for skipped in scratch.skipped() {
        let kind = match skipped.reason {
            SkipReason::UnknownTag => "Unknown",
            SkipReason::Malformed => "Malformed",
        };
        events.insert(skipped.index as usize, json!({ "type": kind }));
    }
    Ok(out)
}

/// serde_json reads a decimal of 17 digits one bit off at times; at these dates that is 0.24 us.
fn assert_same(mut got: Value, mut want: Value, name: &str) {
    let (got_ts, want_ts) = (got["ts"].take(), want["ts"].take());
    let error = got_ts.as_f64().unwrap() - want_ts.as_f64().unwrap();
    assert!(error.abs() < 1e-6, "{name}: {got_ts} {want_ts}");
    assert_eq!(got, want, "{name}");
}

fn read_json(path: &std::path::Path) -> Value {
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

#[test]
fn every_published_vector_decodes_as_expected() {
    let vectors = read_json(&vectors().join("kv_events.json"));
    let mut scratch = Scratch::default();
    let cases = vectors["cases"].as_array().unwrap();
    assert!(!cases.is_empty());
    for case in cases {
        let name = case["name"].as_str().unwrap();
        let got = decode(&mut scratch, &bytes(case["hex"].as_str().unwrap()));
        let expect = &case["expect"];
        if expect["ok"] == json!(false) {
            assert!(got.is_err(), "{name}: {got:?}");
            continue;
        }
        let mut want = expect.clone();
        for event in want["events"].as_array_mut().unwrap() {
            *event = reduced(event);
            if matches!(event["type"].as_str(), Some("Unknown" | "Malformed")) {
                event.as_object_mut().unwrap().remove("tag");
            }
        }
        assert_same(got.unwrap(), want, name);
    }
}

/// What the capture's own decoder read, in the form of the vectors.
fn captured_hash(value: &Value) -> Value {
    match value {
        // Byte hashes are written as hex.
        Value::String(_) | Value::Object(_) => {
            let text = value
                .as_str()
                .unwrap_or_else(|| value["hex"].as_str().unwrap());
            let tail = &bytes(text)[text.len() / 2 - 8..];
            json!(u64::from_be_bytes(tail.try_into().unwrap()).to_string())
        }
        Value::Null => Value::Null,
        other => json!(other.to_string()),
    }
}

fn captured(event: &Value) -> Value {
    let mut event = reduced(event);
    let kind = event["type"].as_str().unwrap().to_owned();
    if kind == "AllBlocksCleared" {
        return event;
    }
    let hashes: Vec<Value> = event["block_hashes"]
        .as_array()
        .unwrap()
        .iter()
        .map(captured_hash)
        .collect();
    event["block_hashes"] = json!(hashes);
    let optional: &[&str] = if kind == "BlockStored" {
        event["parent_block_hash"] = captured_hash(&event["parent_block_hash"]);
        &[
            "medium",
            "lora_name",
            "extra_keys",
            "group_idx",
            "kv_cache_spec_kind",
            "cache_salt",
        ]
    } else {
        &["medium", "group_idx"]
    };
    for field in optional {
        event
            .as_object_mut()
            .unwrap()
            .entry(*field)
            .or_insert(Value::Null);
    }
    event
}

#[test]
fn recorded_streams_of_a_running_engine_decode_as_recorded() {
    let mut scratch = Scratch::default();
    let mut batches = 0;
    for file in std::fs::read_dir(fixtures().join("kv-events")).unwrap() {
        let path = file.unwrap().path();
        if path.extension().is_none_or(|e| e != "jsonl") {
            continue;
        }
        for line in std::fs::read_to_string(&path).unwrap().lines() {
            let line: Value = serde_json::from_str(line).unwrap();
            let got = decode(&mut scratch, &bytes(line["payload_hex"].as_str().unwrap())).unwrap();
            let batch = &line["batch"];
            let events: Vec<Value> = batch[1].as_array().unwrap().iter().map(captured).collect();
            let want = json!({ "ok": true, "ts": batch[0], "data_parallel_rank": batch[2], "events": events });
            assert_same(
                got,
                want,
                &format!("{} seq {}", path.display(), line["seq"]),
            );
            batches += 1;
        }
    }
    assert!(batches > 0);
}

fn payloads() -> Vec<Vec<u8>> {
    let vectors = read_json(&vectors().join("kv_events.json"));
    let cases = vectors["cases"].as_array().unwrap();
    cases
        .iter()
        .map(|c| bytes(c["hex"].as_str().unwrap()))
        .collect()
}

/// Decodes and holds the memory the scratch took against the payload.
fn survives(payload: &[u8]) {
    let mut scratch = Scratch::default();
    let _ = scratch.decode(payload, |batch| {
        for event in batch.events {
            if let Event::Stored(stored) = event
                && let Some(raw) = stored.extra_keys
                && let Ok(Some(mut keys)) = extra_keys(raw, stored.hashes.len(), None)
            {
                for _ in stored.hashes {
                    let _ = keys.next_block(|_| {});
                }
            }
        }
    });
    let _ = timestamp(payload);
    // A vector grows by doubling (from at least four elements), so twice what it holds.
    let most = 2 * payload.len() + 8;
    assert!(scratch.hashes.capacity() <= most);
    assert!(scratch.tokens.capacity() <= most);
    assert!(scratch.events.capacity() <= most);
}

proptest! {
    #[test]
    fn arbitrary_bytes_never_panic(payload in proptest::collection::vec(any::<u8>(), 0..512)) {
        survives(&payload);
    }

    #[test]
    fn mutated_batches_never_panic(
        which in any::<proptest::sample::Index>(),
        edits in proptest::collection::vec((any::<proptest::sample::Index>(), any::<u8>()), 1..8),
        cut in proptest::option::of(any::<proptest::sample::Index>()),
    ) {
        let mut payload = which.get(&payloads()).clone();
        if !payload.is_empty() {
            for (at, byte) in edits {
                let at = at.index(payload.len());
                payload[at] = byte;
            }
            if let Some(cut) = cut {
                payload.truncate(cut.index(payload.len()));
            }
        }
        survives(&payload);
    }
}

#[test]
fn claimed_sizes_reserve_nothing_beyond_the_payload() {
    // [1.0, [["BlockStored", array of 2^32 - 1 ...
    let mut payload = vec![0x92, 0xcb, 0x3f, 0xf0, 0, 0, 0, 0, 0, 0, 0x91, 0x92, 0xab];
    payload.extend_from_slice(b"BlockStored");
    payload.extend_from_slice(&[0xdd, 0xff, 0xff, 0xff, 0xff, 1, 2, 3]);
    survives(&payload);
    assert_eq!(
        Scratch::default().decode(&payload, |_| {}),
        Err(WireError::Malformed)
    );
}

#[test]
fn every_cut_of_a_batch_is_refused() {
    let mut scratch = Scratch::default();
    for payload in payloads() {
        if scratch.decode(&payload, |_| {}).is_err() {
            continue;
        }
        for n in 0..payload.len() {
            assert!(scratch.decode(&payload[..n], |_| {}).is_err());
        }
        let longer = [payload.as_slice(), &[0xc0]].concat();
        assert_eq!(scratch.decode(&longer, |_| {}), Err(WireError::Malformed));
    }
}

fn cleared_batch(events: usize) -> Vec<u8> {
    let n = u32::try_from(events).unwrap();
    let mut payload = vec![0x92, 0xcb, 0x3f, 0xf0, 0, 0, 0, 0, 0, 0, 0xdd];
    payload.extend_from_slice(&n.to_be_bytes());
    for _ in 0..events {
        payload.extend_from_slice(&[0x91, 0xb0]);
        payload.extend_from_slice(b"AllBlocksCleared");
    }
    payload
}

#[test]
fn a_batch_with_more_events_than_the_limit_is_refused() {
    let mut scratch = Scratch::default();
    let decoded = scratch.decode(&cleared_batch(MAX_EVENTS), |_| {}).unwrap();
    assert_eq!(decoded.events, MAX_EVENTS);
    assert_eq!(
        scratch.decode(&cleared_batch(MAX_EVENTS + 1), |_| {}),
        Err(WireError::TooManyEvents)
    );
}

#[test]
fn skipped_places_are_bounded_and_all_counted() {
    // [1.0, [nil * 100]]
    let mut payload = vec![0x92, 0xcb, 0x3f, 0xf0, 0, 0, 0, 0, 0, 0, 0xdc, 0, 100];
    payload.extend([0xc0; 100]);
    let mut scratch = Scratch::default();
    let decoded = scratch.decode(&payload, |_| {}).unwrap();
    assert_eq!(decoded.malformed, 100);
    assert_eq!(scratch.skipped().len(), MAX_SKIPPED_PLACES);
}

#[test]
fn string_tokens_leave_an_event_that_only_names_a_place() {
    // [1.0, [["BlockStored", [7], nil, [1, "a"], 2]]]
    let mut payload = vec![0x92, 0xcb, 0x3f, 0xf0, 0, 0, 0, 0, 0, 0, 0x91, 0x95, 0xab];
    payload.extend_from_slice(b"BlockStored");
    payload.extend_from_slice(&[0x91, 7, 0xc0, 0x92, 1, 0xa1, b'a', 2]);
    let mut seen = 0;
    Scratch::default()
        .decode(&payload, |batch| {
            let Event::Stored(stored) = batch.events[0] else {
                panic!("{:?}", batch.events)
            };
            assert_eq!((stored.hashes, stored.tokens), (&[7][..], &[][..]));
            seen += 1;
        })
        .unwrap();
    assert_eq!(seen, 1);
}

#[test]
fn the_event_vector_is_reused() {
    let payload = cleared_batch(100);
    let mut scratch = Scratch::default();
    scratch.decode(&payload, |_| {}).unwrap();
    let (capacity, at) = (scratch.events.capacity(), scratch.events.as_ptr());
    assert!(capacity >= 100);
    scratch.decode(&payload, |_| {}).unwrap();
    assert_eq!(
        (scratch.events.capacity(), scratch.events.as_ptr()),
        (capacity, at)
    );
}

#[test]
fn timestamps_are_read_from_both_batch_forms() {
    assert_eq!(
        timestamp(&[0x92, 0xcb, 0x3f, 0xf8, 0, 0, 0, 0, 0, 0, 0x90]),
        Some(1.5)
    );
    // {"events": [], "ts": 2}
    let map = [
        0x82, 0xa6, b'e', b'v', b'e', b'n', b't', b's', 0x90, 0xa2, b't', b's', 2,
    ];
    assert_eq!(timestamp(&map), Some(2.0));
    assert_eq!(timestamp(&[0x90]), None);
}
