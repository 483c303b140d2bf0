//! Keys of the shared index: the same in every process, so no process can keep its seed secret.

use xxhash_rust::xxh3::xxh3_64_with_seed;
use xxhash_rust::xxh64::xxh64;

/// First state and factor of 64-bit FNV-1a.
const FNV_START: u64 = 0xcbf2_9ce4_8422_2325;
const FNV_PRIME: u64 = 0x100_0000_01b3;
/// Seed of the standard proposal for block hashes on the wire.
const STANDARD_SEED: u64 = 1337;

/// How keys are made.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Algorithm {
    /// FNV-1a over canonical CBOR.
    #[default]
    CborFnv,
    /// XXH64 over plain bytes.
    Xxh64,
}

/// Makes keys: one a block of a prompt, each from the one before it.
#[derive(Debug, Clone)]
pub struct KeyScheme {
    algorithm: Algorithm,
    init: u64,
    block_tokens: usize,
}

impl KeyScheme {
    /// Keys of blocks of `block_tokens` tokens, at least one, in chains that depend on `seed`.
    pub fn new(algorithm: Algorithm, seed: &str, block_tokens: usize) -> Self {
        let init = match algorithm {
            Algorithm::CborFnv => fnv(seed.as_bytes()),
            Algorithm::Xxh64 => xxh64(seed.as_bytes(), 0),
        };
        Self {
            algorithm,
            init,
            block_tokens: block_tokens.max(1),
        }
    }

    /// Tokens of a block.
    pub fn block_tokens(&self) -> usize {
        self.block_tokens
    }

    /// What every chain starts from, whatever its model.
    pub fn init(&self) -> u64 {
        self.init
    }

    /// What stands before the first block of a prompt for `model`, which is the adapter's name where
    /// there is one.
    pub fn start(&self, model: &str) -> u64 {
        let mut bytes = Vec::with_capacity(model.len() + 24);
        match self.algorithm {
            Algorithm::CborFnv => {
                bytes.push(0x83);
                head(&mut bytes, UNSIGNED, self.init);
                bytes.push(NULL);
                text(&mut bytes, model);
                fnv(&bytes)
            }
            Algorithm::Xxh64 => {
                bytes.extend(self.init.to_le_bytes());
                bytes.extend((model.len() as u64).to_le_bytes());
                bytes.extend(model.as_bytes());
                xxh64(&bytes, 0)
            }
        }
    }

    /// Keys of the full blocks of `tokens`, which follow the block named `parent`. `extras_of` gives what
    /// else a block's key depends on, by its number in `tokens`.
    pub fn keys<'a>(
        &self,
        parent: u64,
        tokens: &[u32],
        extras_of: impl Fn(usize) -> &'a [String],
    ) -> Vec<u64> {
        let mut bytes = Vec::with_capacity(16 + 5 * self.block_tokens);
        let mut key = parent;
        let blocks = tokens.chunks_exact(self.block_tokens).enumerate();
        blocks
            .map(|(number, block)| {
                bytes.clear();
                key = self.key(key, block, extras_of(number), &mut bytes);
                key
            })
            .collect()
    }

    fn key(&self, parent: u64, block: &[u32], extras: &[String], bytes: &mut Vec<u8>) -> u64 {
        match self.algorithm {
            Algorithm::CborFnv => {
                preimage(parent, block, extras, bytes);
                fnv(bytes)
            }
            Algorithm::Xxh64 => {
                bytes.extend(parent.to_le_bytes());
                for token in block {
                    bytes.extend(token.to_le_bytes());
                }
                for extra in extras {
                    bytes.extend((extra.len() as u64).to_le_bytes());
                    bytes.extend(extra.as_bytes());
                }
                xxh64(bytes, 0)
            }
        }
    }
}

/// `[parent, [tokens], null or [{"Hash": extra}, ..]]` in canonical CBOR.
fn preimage(parent: u64, block: &[u32], extras: &[String], bytes: &mut Vec<u8>) {
    bytes.push(0x83);
    head(bytes, UNSIGNED, parent);
    head(bytes, ARRAY, block.len() as u64);
    for token in block {
        head(bytes, UNSIGNED, u64::from(*token));
    }
    if extras.is_empty() {
        bytes.push(NULL);
        return;
    }
    head(bytes, ARRAY, extras.len() as u64);
    for extra in extras {
        head(bytes, MAP, 1);
        text(bytes, "Hash");
        text(bytes, extra);
    }
}

const UNSIGNED: u8 = 0;
const TEXT: u8 = 3;
const ARRAY: u8 = 4;
const MAP: u8 = 5;
const NULL: u8 = 0xf6;

/// Type and argument of a CBOR item, as short as it gets.
fn head(bytes: &mut Vec<u8>, major: u8, n: u64) {
    let major = major << 5;
    if let Ok(n) = u8::try_from(n) {
        if n < 24 {
            bytes.push(major | n);
        } else {
            bytes.extend([major | 0x18, n]);
        }
    } else if let Ok(n) = u16::try_from(n) {
        bytes.push(major | 0x19);
        bytes.extend(n.to_be_bytes());
    } else if let Ok(n) = u32::try_from(n) {
        bytes.push(major | 0x1a);
        bytes.extend(n.to_be_bytes());
    } else {
        bytes.push(major | 0x1b);
        bytes.extend(n.to_be_bytes());
    }
}

fn text(bytes: &mut Vec<u8>, text: &str) {
    head(bytes, TEXT, text.len() as u64);
    bytes.extend(text.as_bytes());
}

fn fnv(bytes: &[u8]) -> u64 {
    let step = |hash: u64, byte: &u8| (hash ^ u64::from(*byte)).wrapping_mul(FNV_PRIME);
    bytes.iter().fold(FNV_START, step)
}

/// Hashes of the standard proposal that several routers and stores share: of each full block alone, and
/// of each with those before it.
pub fn standard_hashes(tokens: &[u32], block_tokens: usize) -> (Vec<u64>, Vec<u64>) {
    let hash = |bytes: &[u8]| xxh3_64_with_seed(bytes, STANDARD_SEED);
    let blocks = tokens.chunks_exact(block_tokens.max(1));
    let local: Vec<u64> = blocks
        .map(|block| {
            let bytes: Vec<u8> = block.iter().flat_map(|t| t.to_le_bytes()).collect();
            hash(&bytes)
        })
        .collect();
    let mut before = None;
    let sequence = local.iter().map(|local| {
        let own = before.map_or(*local, |before: u64| {
            let bytes = [before.to_le_bytes(), local.to_le_bytes()].concat();
            hash(&bytes)
        });
        before = Some(own);
        own
    });
    let sequence = sequence.collect();
    (local, sequence)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;

    fn vectors(file: &str) -> Vec<Value> {
        let directory = std::env::var_os("PINPOD_VECTORS").map_or_else(
            || std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/vectors"),
            std::path::PathBuf::from,
        );
        let text = std::fs::read_to_string(directory.join(file)).unwrap();
        let mut document: Value = serde_json::from_str(&text).unwrap();
        let cases = document["cases"].take().as_array().cloned().unwrap();
        assert!(!cases.is_empty());
        cases
    }

    fn number(value: &Value) -> u64 {
        value.as_str().unwrap().parse().unwrap()
    }

    fn numbers(value: &Value) -> Vec<u64> {
        value.as_array().unwrap().iter().map(number).collect()
    }

    fn tokens(case: &Value) -> Vec<u32> {
        let ids = case["tokens"].as_array().unwrap().iter();
        ids.map(|id| u32::try_from(id.as_u64().unwrap()).unwrap())
            .collect()
    }

    fn size(case: &Value, field: &str) -> usize {
        usize::try_from(case[field].as_u64().unwrap()).unwrap()
    }

    #[test]
    fn keys_are_those_of_the_reference() {
        for case in vectors("llmd_block_keys.json") {
            let algorithm = match case["hash_algorithm"].as_str().unwrap() {
                "cbor-fnv" => Algorithm::CborFnv,
                "xxh64" => Algorithm::Xxh64,
                other => panic!("{other}"),
            };
            let seed = case["hash_seed"].as_str().unwrap();
            let scheme = KeyScheme::new(algorithm, seed, size(&case, "block_size_tokens"));
            let name = &case["name"];
            assert_eq!(scheme.init(), number(&case["init_hash"]), "{name}");
            // A chain that goes on from a block starts there: the model is in it already.
            let parent = match number(&case["parent_key"]) {
                0 => scheme.start(case["model"].as_str().unwrap()),
                parent => parent,
            };
            assert_eq!(parent, number(&case["start_hash"]), "{name}");
            let extras: Vec<Vec<String>> =
                serde_json::from_value::<Option<Vec<Option<Vec<String>>>>>(
                    case["extra_features"].clone(),
                )
                .unwrap()
                .unwrap_or_default()
                .into_iter()
                .map(Option::unwrap_or_default)
                .collect();
            let tokens = tokens(&case);
            let of = |block: usize| extras.get(block).map_or(&[][..], Vec::as_slice);
            let keys = scheme.keys(parent, &tokens, of);
            assert_eq!(keys, numbers(&case["keys"]), "{name}");
            if let Some(expected) = case["first_preimage_cbor"].as_str() {
                let mut bytes = Vec::new();
                preimage(parent, &tokens[..scheme.block_tokens], of(0), &mut bytes);
                let expected: Vec<u8> = (0..expected.len())
                    .step_by(2)
                    .map(|at| u8::from_str_radix(&expected[at..at + 2], 16).unwrap())
                    .collect();
                assert_eq!(bytes, expected, "{name}");
            }
        }
    }

    #[test]
    fn standard_hashes_are_those_of_the_proposal() {
        for case in vectors("standard_seq_hashes.json") {
            let found = standard_hashes(&tokens(&case), size(&case, "block_size"));
            let expected = (numbers(&case["local_hashes"]), numbers(&case["seq_hashes"]));
            assert_eq!(found, expected, "{}", case["name"]);
        }
    }
}
