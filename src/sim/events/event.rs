//! What a prefix cache tells, and its bytes (`vllm/distributed/kv_events.py`).

use std::sync::Arc;

use super::super::hash::{BlockHash, ExtraKey};
use super::msgpack as write;

/// Where the blocks lie; vLLM says `GPU` on every platform.
const MEDIUM: &str = "GPU";
/// The only cache group of a model with full attention throughout.
const GROUP: u64 = 0;
const GROUP_KIND: &str = "full_attention";

/// A change of the cache.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// Blocks were filled.
    Stored(Box<Stored>),
    /// A block was taken for other content.
    Removed(BlockHash),
    /// All content was forgotten.
    Cleared,
}

/// Consecutive blocks of a request.
#[derive(Debug, Clone, PartialEq)]
pub struct Stored {
    /// One for each block.
    pub hashes: Vec<BlockHash>,
    /// Of the block before them.
    pub parent: Option<BlockHash>,
    /// Those of all blocks.
    pub tokens: Vec<u32>,
    /// Tokens of a block.
    pub block_tokens: usize,
    /// Number and name of the adapter.
    pub lora: Option<(u64, Arc<str>)>,
    /// For each block.
    pub extra_keys: Vec<Vec<ExtraKey>>,
    /// What the request said of itself.
    pub session_id: Option<Arc<str>>,
}

/// How events carry hashes: `VLLM_KV_EVENTS_USE_INT_BLOCK_HASHES`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HashForm {
    /// The low 64 bits as an integer.
    Integer,
    /// That many bytes.
    Bytes(usize),
}

impl HashForm {
    fn write(self, out: &mut Vec<u8>, hash: &BlockHash) {
        match self {
            Self::Integer => write::integer(out, hash.low()),
            Self::Bytes(count) => write::bytes(out, hash.tail(count)),
        }
    }
}

/// The payload of a message: the changes of one engine step, at `time` in Unix seconds.
pub fn payload(time: f64, events: &[Event], rank: u32, form: HashForm) -> Vec<u8> {
    let mut out = Vec::with_capacity(256);
    write::array(&mut out, 3);
    write::float(&mut out, time);
    write::array(&mut out, events.len());
    for event in events {
        event.write(&mut out, form);
    }
    write::integer(&mut out, u64::from(rank));
    out
}

impl Event {
    fn write(&self, out: &mut Vec<u8>, form: HashForm) {
        match self {
            Self::Cleared => tag(out, 1, "AllBlocksCleared"),
            Self::Removed(hash) => {
                tag(out, 4, "BlockRemoved");
                write::text(out, "block_hashes");
                write::array(out, 1);
                form.write(out, hash);
                write::text(out, "medium");
                write::text(out, MEDIUM);
                write::text(out, "group_idx");
                write::integer(out, GROUP);
            }
            Self::Stored(stored) => stored.write(out, form),
        }
    }
}

impl Stored {
    /// Fields in vLLM's order; those that equal their default are left out.
    fn write(&self, out: &mut Vec<u8>, form: HashForm) {
        tag(out, 11 + u8::from(self.session_id.is_some()), "BlockStored");
        write::text(out, "block_hashes");
        write::array(out, self.hashes.len());
        for hash in &self.hashes {
            form.write(out, hash);
        }
        write::text(out, "parent_block_hash");
        match &self.parent {
            Some(parent) => form.write(out, parent),
            None => write::nil(out),
        }
        write::text(out, "token_ids");
        write::array(out, self.tokens.len());
        for token in &self.tokens {
            write::integer(out, u64::from(*token));
        }
        write::text(out, "block_size");
        write::integer(out, self.block_tokens as u64);
        write::text(out, "lora_id");
        match &self.lora {
            Some((number, _)) => write::integer(out, *number),
            None => write::nil(out),
        }
        write::text(out, "medium");
        write::text(out, MEDIUM);
        write::text(out, "lora_name");
        match &self.lora {
            Some((_, name)) => write::text(out, name),
            None => write::nil(out),
        }
        write::text(out, "extra_keys");
        write::array(out, self.extra_keys.len());
        for keys in &self.extra_keys {
            extra_keys(out, keys);
        }
        write::text(out, "group_idx");
        write::integer(out, GROUP);
        write::text(out, "kv_cache_spec_kind");
        write::text(out, GROUP_KIND);
        if let Some(session) = &self.session_id {
            write::text(out, "session_id");
            write::text(out, session);
        }
    }
}

/// Opens an event of `fields` fields, its tag counted.
fn tag(out: &mut Vec<u8>, fields: u8, tag: &str) {
    write::map(out, fields);
    write::text(out, "type");
    write::text(out, tag);
}

/// The keys of a block, which events carry without their kinds.
fn extra_keys(out: &mut Vec<u8>, keys: &[ExtraKey]) {
    if keys.is_empty() {
        write::nil(out);
        return;
    }
    write::array(out, keys.len());
    for key in keys {
        match key {
            ExtraKey::Lora { name, .. } => write::text(out, name),
            ExtraKey::Media { identifier, offset } => {
                write::array(out, 2);
                write::text(out, identifier);
                write::signed(out, *offset);
            }
            ExtraKey::Salt(salt) => write::text(out, salt),
        }
    }
}

#[cfg(test)]
mod tests {
    use rmpv::Value;

    use super::super::super::fixtures::{hex, recording, unhex, vector};
    use super::*;

    /// What a payload says, as far as the stand-in can say it; read by another library than it is
    /// written by. `None` for what only other engines and tiers say.
    fn read(payload: &[u8]) -> Option<(f64, Vec<Event>, u32)> {
        let Value::Array(batch) = rmpv::decode::read_value(&mut &payload[..]).ok()? else {
            return None;
        };
        let [time, events, rank] = batch.as_slice() else {
            return None;
        };
        let events: Option<Vec<Event>> = events.as_array()?.iter().map(event).collect();
        let rank = u32::try_from(rank.as_u64()?).ok()?;
        Some((time.as_f64()?, events?, rank))
    }

    /// A hash, given as a number or as bytes.
    fn hash(value: &Value) -> BlockHash {
        match value {
            Value::Binary(bytes) => BlockHash::new(bytes),
            value => value.as_u64().unwrap().into(),
        }
    }

    fn event(value: &Value) -> Option<Event> {
        let fields = value.as_map()?;
        let field = |name: &str| {
            let found = fields.iter().find(|(key, _)| key.as_str() == Some(name));
            found.map(|(_, value)| value)
        };
        let own = [
            "type",
            "block_hashes",
            "parent_block_hash",
            "token_ids",
            "block_size",
            "lora_id",
            "medium",
            "lora_name",
            "extra_keys",
            "group_idx",
            "kv_cache_spec_kind",
            "session_id",
        ];
        let foreign = fields
            .iter()
            .any(|(key, _)| !own.contains(&key.as_str().unwrap_or_default()));
        let kind = field("type")?.as_str()?;
        if foreign {
            return None;
        }
        if kind == "AllBlocksCleared" {
            return Some(Event::Cleared);
        }
        let hashes: Vec<BlockHash> = field("block_hashes")?
            .as_array()?
            .iter()
            .map(hash)
            .collect();
        if field("medium")?.as_str() != Some("GPU") || field("group_idx")?.as_u64() != Some(0) {
            return None;
        }
        if kind == "BlockRemoved" {
            return Some(Event::Removed(*hashes.first()?)).filter(|_| hashes.len() == 1);
        }
        if field("kv_cache_spec_kind")?.as_str() != Some("full_attention") {
            return None;
        }
        let name: Option<Arc<str>> = field("lora_name")?.as_str().map(Arc::from);
        let keys = field("extra_keys")?.as_array()?;
        Some(Event::Stored(Box::new(Stored {
            hashes,
            parent: field("parent_block_hash").filter(|v| !v.is_nil()).map(hash),
            tokens: field("token_ids")?
                .as_array()?
                .iter()
                .map(|id| u32::try_from(id.as_u64().unwrap()).unwrap())
                .collect(),
            block_tokens: usize::try_from(field("block_size")?.as_u64()?).ok()?,
            lora: field("lora_id")?.as_u64().zip(name.clone()),
            extra_keys: keys
                .iter()
                .map(|keys| block_keys(keys, name.as_ref()))
                .collect::<Option<_>>()?,
            session_id: field("session_id").and_then(Value::as_str).map(Arc::from),
        })))
    }

    fn block_keys(keys: &Value, lora: Option<&Arc<str>>) -> Option<Vec<ExtraKey>> {
        let Some(keys) = keys.as_array() else {
            return Some(Vec::new());
        };
        let key = |key: &Value| match key {
            Value::Array(item) => Some(ExtraKey::Media {
                identifier: item.first()?.as_str()?.into(),
                offset: item.get(1)?.as_i64()?,
            }),
            key if lora.is_some_and(|name| key.as_str() == Some(name)) => Some(ExtraKey::Lora {
                name: key.as_str()?.into(),
                path: "".into(),
            }),
            key => Some(ExtraKey::Salt(key.as_str()?.into())),
        };
        keys.iter().map(key).collect()
    }

    /// Writes anew what `payload` says; true when it was something the stand-in says.
    fn check(payload_hex: &str, what: &str, form: HashForm) -> bool {
        let bytes = unhex(payload_hex);
        let Some((time, events, rank)) = read(&bytes) else {
            return false;
        };
        assert_eq!(
            hex(&payload(time, &events, rank, form)),
            payload_hex,
            "{what}"
        );
        true
    }

    #[test]
    fn recorded_batches_are_written_byte_for_byte() {
        for (name, form) in [
            ("events", HashForm::Integer),
            ("evict", HashForm::Integer),
            ("events-bytes-sha256", HashForm::Bytes(32)),
            ("events-bytes-sha256_cbor", HashForm::Bytes(32)),
            ("events-block32-stock", HashForm::Integer),
            ("dp2-rank0", HashForm::Integer),
            ("dp2-rank1", HashForm::Integer),
        ] {
            let mut lines = 0;
            for line in recording(&format!("kv-events/{name}.jsonl")).lines() {
                let frame: serde_json::Value = serde_json::from_str(line).unwrap();
                let what = format!("{name} {}", frame["seq"]);
                assert!(
                    check(frame["payload_hex"].as_str().unwrap(), &what, form),
                    "{what} is not understood"
                );
                lines += 1;
            }
            assert!(lines > 0, "{name} is empty");
        }
    }

    #[test]
    fn vectors_of_what_the_stand_in_says_are_written_byte_for_byte() {
        let file: serde_json::Value = serde_json::from_str(&vector("kv_events.json")).unwrap();
        let mut checked = Vec::new();
        for case in file["cases"].as_array().unwrap() {
            if !case["source"].as_str().unwrap().starts_with("vllm 0.32") {
                continue;
            }
            let (name, text) = (case["name"].as_str().unwrap(), &case["hex"]);
            let form = if text.as_str().unwrap().contains("c420") {
                HashForm::Bytes(32)
            } else {
                HashForm::Integer
            };
            if check(text.as_str().unwrap(), name, form) {
                checked.push(name);
            }
        }
        for name in ["stored_int_gpu", "stored_bytes_with_parent", "lora_mm_salt"] {
            assert!(checked.contains(&name), "{checked:?}");
        }
    }
}
