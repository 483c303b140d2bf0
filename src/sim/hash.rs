//! vLLM's block hashes (`vllm/v1/core/kv_cache_utils.py`, `vllm/utils/hashing.py`).
//!
//! The hash of a full block covers the hash before it, the block's tokens and its extra keys, in that
//! order as a Python 3-tuple, serialised as pickle (protocol 5) or canonical CBOR. Two engines with
//! the same algorithm and seed agree on them.

use std::hash::{Hash, Hasher};
use std::sync::Arc;

use ring::digest::{SHA256, digest};
use serde::Deserialize;
use xxhash_rust::xxh3::xxh3_128;

/// Seed of the SHA-256 pair when the environment gives none.
const DEFAULT_SEED: &str = "vllm-none-hash";

/// Hash of a block: a digest, or what stands for it, at the end of 32 bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct BlockHash([u8; 32]);

impl BlockHash {
    pub(super) fn new(digest: &[u8]) -> Self {
        let mut bytes = [0; 32];
        for (to, from) in bytes.iter_mut().rev().zip(digest.iter().rev()) {
            *to = *from;
        }
        Self(bytes)
    }

    /// The low 64 bits, which is what events carry by default.
    pub fn low(&self) -> u64 {
        self.0
            .last_chunk()
            .map_or(0, |bytes| u64::from_be_bytes(*bytes))
    }

    /// The last `count` bytes, all of them when that is more.
    pub fn tail(&self, count: usize) -> &[u8] {
        let start = self.0.len().saturating_sub(count);
        self.0.get(start..).unwrap_or_default()
    }
}

impl From<u64> for BlockHash {
    fn from(number: u64) -> Self {
        Self::new(&number.to_be_bytes())
    }
}

impl Hash for BlockHash {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write_u64(self.low());
    }
}

/// `--prefix-caching-hash-algo`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
#[clap(rename_all = "snake_case")]
pub enum HashAlgorithm {
    /// SHA-256 of pickle.
    #[default]
    Sha256,
    /// SHA-256 of canonical CBOR.
    Sha256Cbor,
    /// XXH3-128 of pickle.
    Xxhash,
    /// XXH3-128 of canonical CBOR.
    XxhashCbor,
}

impl HashAlgorithm {
    /// Bytes of a digest.
    pub fn digest_bytes(self) -> usize {
        match self {
            Self::Sha256 | Self::Sha256Cbor => 32,
            Self::Xxhash | Self::XxhashCbor => 16,
        }
    }

    fn digest(self, bytes: &[u8]) -> BlockHash {
        match self {
            Self::Sha256 | Self::Sha256Cbor => BlockHash::new(digest(&SHA256, bytes).as_ref()),
            Self::Xxhash | Self::XxhashCbor => BlockHash::new(&xxh3_128(bytes).to_be_bytes()),
        }
    }

    fn is_cbor(self) -> bool {
        matches!(self, Self::Sha256Cbor | Self::XxhashCbor)
    }

    /// `PYTHONHASHSEED`, or what takes its place: a constant for SHA-256, random for the others.
    fn seed(self, given: Option<&str>) -> String {
        match (given, self) {
            (Some(seed), _) => seed.to_owned(),
            (None, Self::Sha256 | Self::Sha256Cbor) => DEFAULT_SEED.to_owned(),
            (None, Self::Xxhash | Self::XxhashCbor) => {
                // 32 random bytes.
                let part = || fastrand::u64(..);
                format!(
                    "{:016x}{:016x}{:016x}{:016x}",
                    part(),
                    part(),
                    part(),
                    part()
                )
            }
        }
    }
}

/// What beside its tokens tells a block from others.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ExtraKey {
    /// The adapter, in every block.
    Lora {
        /// Name the client asks for.
        name: Arc<str>,
        /// Where the engine loaded it from.
        path: Arc<str>,
    },
    /// A media item that overlaps the block.
    Media {
        /// Hash of its content, or the name the client gave it.
        identifier: Arc<str>,
        /// Its start, counted from the block's start.
        offset: i64,
    },
    /// `cache_salt`, in the first block.
    Salt(Arc<str>),
}

/// A media item of a prompt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Media {
    /// As in [`ExtraKey::Media`].
    pub identifier: Arc<str>,
    /// First of its tokens in the prompt.
    pub offset: usize,
    /// Its tokens.
    pub length: usize,
}

/// What the extra keys of a request's blocks are made of.
#[derive(Debug, Clone, Default)]
pub struct Extras {
    /// Name and path of the adapter.
    pub lora: Option<(Arc<str>, Arc<str>)>,
    /// By ascending offset.
    pub media: Vec<Media>,
    /// Not empty.
    pub salt: Option<Arc<str>>,
}

impl Extras {
    /// The keys of the block of tokens `start..end`.
    pub fn keys(&self, start: usize, end: usize) -> Vec<ExtraKey> {
        let lora = self.lora.iter().map(|(name, path)| ExtraKey::Lora {
            name: Arc::clone(name),
            path: Arc::clone(path),
        });
        let overlaps = |item: &&Media| item.offset < end && item.offset + item.length > start;
        let media = self.media.iter().filter(overlaps).map(|item| {
            let position = |tokens: usize| i64::try_from(tokens).unwrap_or(i64::MAX);
            ExtraKey::Media {
                identifier: Arc::clone(&item.identifier),
                offset: position(item.offset) - position(start),
            }
        });
        let salt = self.salt.iter().filter(|_| start == 0);
        lora.chain(media)
            .chain(salt.map(|salt| ExtraKey::Salt(Arc::clone(salt))))
            .collect()
    }
}

/// Algorithm and seed of an engine.
#[derive(Debug, Clone, Copy)]
pub struct BlockHasher {
    algorithm: HashAlgorithm,
    root: BlockHash,
}

impl BlockHasher {
    /// `seed` is the value of `PYTHONHASHSEED`, if set.
    pub fn new(algorithm: HashAlgorithm, seed: Option<&str>) -> Self {
        let seed = algorithm.seed(seed);
        let bytes = if algorithm.is_cbor() {
            let mut out = Vec::new();
            cbor::text(&mut out, &seed);
            out
        } else {
            Pickle::root(&seed)
        };
        Self {
            algorithm,
            root: algorithm.digest(&bytes),
        }
    }

    /// Stands before the first block.
    pub fn root(&self) -> BlockHash {
        self.root
    }

    /// Bytes of a hash in events that carry bytes.
    pub fn digest_bytes(&self) -> usize {
        self.algorithm.digest_bytes()
    }

    /// The hash of a full block behind `parent`.
    pub fn block(&self, parent: &BlockHash, tokens: &[u32], extra: &[ExtraKey]) -> BlockHash {
        self.algorithm.digest(&self.preimage(parent, tokens, extra))
    }

    fn preimage(&self, parent: &BlockHash, tokens: &[u32], extra: &[ExtraKey]) -> Vec<u8> {
        let parent = parent.tail(self.digest_bytes());
        if self.algorithm.is_cbor() {
            cbor::block(parent, tokens, extra)
        } else {
            Pickle::block(parent, tokens, extra)
        }
    }

    /// Hashes and extra keys of the full blocks of `tokens`.
    pub fn chain(
        &self,
        tokens: &[u32],
        block_tokens: usize,
        extras: &Extras,
    ) -> (Vec<BlockHash>, Vec<Vec<ExtraKey>>) {
        let size = block_tokens.max(1);
        let mut parent = self.root;
        let blocks = tokens.chunks_exact(size).enumerate();
        blocks
            .map(|(index, block)| {
                let keys = extras.keys(index * size, (index + 1) * size);
                parent = self.block(&parent, block, &keys);
                (parent, keys)
            })
            .unzip()
    }
}

/// Canonical CBOR.
mod cbor {
    use super::ExtraKey;

    /// Type and length or value, in its shortest form.
    fn head(out: &mut Vec<u8>, major: u8, number: u64) {
        let major = major << 5;
        let bytes = number.to_be_bytes();
        let (mark, width) = match number {
            0..24 => {
                out.push(major | (number & 31) as u8);
                return;
            }
            24..0x100 => (24, 1),
            0x100..0x1_0000 => (25, 2),
            0x1_0000..0x1_0000_0000 => (26, 4),
            _ => (27, 8),
        };
        out.push(major | mark);
        out.extend(bytes.iter().skip(8 - width));
    }

    pub(super) fn text(out: &mut Vec<u8>, text: &str) {
        head(out, 3, text.len() as u64);
        out.extend_from_slice(text.as_bytes());
    }

    fn integer(out: &mut Vec<u8>, number: i64) {
        if number < 0 {
            head(out, 1, number.unsigned_abs() - 1);
        } else {
            head(out, 0, number.unsigned_abs());
        }
    }

    pub(super) fn block(parent: &[u8], tokens: &[u32], extra: &[ExtraKey]) -> Vec<u8> {
        let mut out = Vec::with_capacity(64 + tokens.len() * 5);
        head(&mut out, 4, 3);
        head(&mut out, 2, parent.len() as u64);
        out.extend_from_slice(parent);
        head(&mut out, 4, tokens.len() as u64);
        for token in tokens {
            head(&mut out, 0, u64::from(*token));
        }
        if extra.is_empty() {
            out.push(0xF6);
            return out;
        }
        head(&mut out, 4, extra.len() as u64);
        for key in extra {
            match key {
                ExtraKey::Lora { name, path } => {
                    head(&mut out, 4, 3);
                    for part in ["lora", name, path] {
                        text(&mut out, part);
                    }
                }
                ExtraKey::Media { identifier, offset } => {
                    head(&mut out, 4, 3);
                    text(&mut out, "mm");
                    text(&mut out, identifier);
                    integer(&mut out, *offset);
                }
                ExtraKey::Salt(salt) => {
                    head(&mut out, 4, 2);
                    text(&mut out, "cache_salt");
                    text(&mut out, salt);
                }
            }
        }
        out
    }
}

/// Python's pickle, protocol 5, as far as the tuple of a block needs it.
///
/// Pickle writes an object that it met before as a reference to it. Of a block's parts only the tag
/// `mm` is such an object; equal names are taken for different objects, as those of different
/// requests are.
struct Pickle {
    out: Vec<u8>,
    /// Objects remembered so far.
    remembered: u8,
    media_tag: Option<u8>,
}

impl Pickle {
    const PROTOCOL: [u8; 2] = [0x80, 5];
    const FRAME: u8 = 0x95;
    const MEMOIZE: u8 = 0x94;
    const STOP: u8 = b'.';

    fn new() -> Self {
        Self {
            out: Vec::with_capacity(256),
            remembered: 0,
            media_tag: None,
        }
    }

    /// The pickle of a text.
    fn root(seed: &str) -> Vec<u8> {
        let mut pickle = Self::new();
        pickle.text(seed);
        pickle.finish()
    }

    /// The pickle of `(parent, tokens, extra or None)`.
    fn block(parent: &[u8], tokens: &[u32], extra: &[ExtraKey]) -> Vec<u8> {
        let mut pickle = Self::new();
        pickle.bytes(parent);
        pickle.tuple(tokens, |pickle, token| pickle.integer(i64::from(*token)));
        if extra.is_empty() {
            pickle.out.push(b'N');
        } else {
            pickle.tuple(extra, Self::extra);
        }
        pickle.close(3);
        pickle.finish()
    }

    fn finish(mut self) -> Vec<u8> {
        self.out.push(Self::STOP);
        let mut whole = Self::PROTOCOL.to_vec();
        whole.push(Self::FRAME);
        whole.extend_from_slice(&(self.out.len() as u64).to_le_bytes());
        whole.append(&mut self.out);
        whole
    }

    fn remember(&mut self) {
        self.out.push(Self::MEMOIZE);
        self.remembered = self.remembered.saturating_add(1);
    }

    fn bytes(&mut self, bytes: &[u8]) {
        self.out.push(b'C');
        self.out.push(u8::try_from(bytes.len()).unwrap_or(u8::MAX));
        self.out.extend_from_slice(bytes);
        self.remember();
    }

    fn text(&mut self, text: &str) {
        if let Ok(length) = u8::try_from(text.len()) {
            self.out.extend_from_slice(&[0x8C, length]);
        } else {
            self.out.push(b'X');
            let length = u32::try_from(text.len()).unwrap_or(u32::MAX);
            self.out.extend_from_slice(&length.to_le_bytes());
        }
        self.out.extend_from_slice(text.as_bytes());
        self.remember();
    }

    fn integer(&mut self, number: i64) {
        if let Ok(number) = u8::try_from(number) {
            self.out.extend_from_slice(&[b'K', number]);
        } else if let Ok(number) = u16::try_from(number) {
            self.out.push(b'M');
            self.out.extend_from_slice(&number.to_le_bytes());
        } else if let Ok(number) = i32::try_from(number) {
            self.out.push(b'J');
            self.out.extend_from_slice(&number.to_le_bytes());
        } else {
            // A token id above 2^31: five bytes, the last of them its sign.
            self.out.extend_from_slice(&[0x8A, 5]);
            self.out.extend(number.to_le_bytes().iter().take(5));
        }
    }

    fn tuple<T>(&mut self, items: &[T], write: impl Fn(&mut Self, &T)) {
        if items.len() > 3 {
            self.out.push(b'(');
        }
        for item in items {
            write(self, item);
        }
        self.close(items.len());
    }

    /// Ends a tuple of `count` items, which is not empty.
    fn close(&mut self, count: usize) {
        self.out.push(match count {
            1 => 0x85,
            2 => 0x86,
            3 => 0x87,
            _ => b't',
        });
        self.remember();
    }

    fn extra(&mut self, key: &ExtraKey) {
        match key {
            ExtraKey::Lora { name, path } => {
                for part in ["lora", name, path] {
                    self.text(part);
                }
                self.close(3);
            }
            ExtraKey::Media { identifier, offset } => {
                if let Some(tag) = self.media_tag {
                    self.out.extend_from_slice(&[b'h', tag]);
                } else {
                    self.media_tag = Some(self.remembered);
                    self.text("mm");
                }
                self.text(identifier);
                self.integer(*offset);
                self.close(3);
            }
            ExtraKey::Salt(salt) => {
                self.text("cache_salt");
                self.text(salt);
                self.close(2);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::super::fixtures;
    use super::*;

    #[derive(Deserialize)]
    struct Case {
        name: String,
        algo: HashAlgorithm,
        python_hash_seed: Option<String>,
        none_hash: String,
        block_size: usize,
        tokens: Vec<u32>,
        lora: Option<Lora>,
        mm: Vec<Item>,
        cache_salt: Option<String>,
        prompt_embeds: Option<Vec<String>>,
        blocks: Vec<Block>,
    }

    #[derive(Deserialize)]
    struct Lora {
        name: String,
        path: String,
    }

    #[derive(Deserialize)]
    struct Item {
        identifier: String,
        offset: usize,
        length: usize,
    }

    #[derive(Deserialize)]
    struct Block {
        hash: String,
        event_int: String,
        preimage: Option<String>,
    }

    impl Case {
        fn extras(&self) -> Extras {
            let lora = self.lora.as_ref();
            Extras {
                lora: lora.map(|lora| (lora.name.as_str().into(), lora.path.as_str().into())),
                media: self
                    .mm
                    .iter()
                    .map(|item| Media {
                        identifier: item.identifier.as_str().into(),
                        offset: item.offset,
                        length: item.length,
                    })
                    .collect(),
                salt: self
                    .cache_salt
                    .as_deref()
                    .filter(|salt| !salt.is_empty())
                    .map(Arc::from),
            }
        }
    }

    #[test]
    fn hashes_and_what_is_hashed_are_those_of_vllm() {
        let text = fixtures::vector("vllm_block_hashes.json");
        let mut file: Value = serde_json::from_str(&text).unwrap();
        let cases: Vec<Case> = serde_json::from_value(file["cases"].take()).unwrap();
        let mut checked = 0;
        // The stand-in takes no prompt embeddings.
        for case in cases.iter().filter(|case| case.prompt_embeds.is_none()) {
            let hasher = BlockHasher::new(case.algo, case.python_hash_seed.as_deref());
            let bytes = case.algo.digest_bytes();
            let hex = |hash: &BlockHash| fixtures::hex(hash.tail(bytes));
            assert_eq!(hex(&hasher.root()), case.none_hash, "{}", case.name);
            let (hashes, extra) = hasher.chain(&case.tokens, case.block_size, &case.extras());
            let own: Vec<_> = hashes
                .iter()
                .map(|h| (hex(h), h.low().to_string()))
                .collect();
            let given: Vec<_> = case
                .blocks
                .iter()
                .map(|b| (b.hash.clone(), b.event_int.clone()))
                .collect();
            assert_eq!(own, given, "{}", case.name);
            if let Some(preimage) = case.blocks.first().and_then(|b| b.preimage.as_deref()) {
                let block = &case.tokens[..case.block_size];
                let own = hasher.preimage(&hasher.root(), block, &extra[0]);
                assert_eq!(fixtures::hex(&own), preimage, "{}", case.name);
            }
            checked += 1;
        }
        assert!(checked > 0);
    }

    #[test]
    fn ids_above_two_to_the_31_are_pickled_as_long_integers() {
        // pickletools: LONG1 of length 5, little-endian two's complement.
        let pickle = Pickle::block(&[], &[0x8000_0001], &[]);
        let body = pickle.get(11..).unwrap();
        assert_eq!(
            fixtures::hex(body),
            "430094".to_owned() + "8a050100008000" + "8594" + "4e" + "8794" + "2e"
        );
    }

    #[test]
    fn the_tag_of_a_second_media_item_refers_to_the_first() {
        let key = |identifier: &str| ExtraKey::Media {
            identifier: identifier.into(),
            offset: 1,
        };
        let pickle = Pickle::block(b"p", &[1], &[key("a"), key("b")]);
        // Remembered before it: the parent (0) and the tokens (1).
        let first = "8c026d6d94".to_owned() + "8c016194" + "4b01" + "8794";
        let second = "6802".to_owned() + "8c016294" + "4b01" + "8794";
        assert!(fixtures::hex(&pickle).contains(&(first + &second)));
    }

    #[test]
    fn without_a_seed_only_sha256_is_the_same_in_every_process() {
        let root = |algorithm| BlockHasher::new(algorithm, None).root();
        assert_eq!(root(HashAlgorithm::Sha256), root(HashAlgorithm::Sha256));
        assert_ne!(root(HashAlgorithm::Xxhash), root(HashAlgorithm::Xxhash));
    }
}
