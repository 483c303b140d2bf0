//! The hash chain of the approximate prefix index: one xxHash64 per block of tokens, chained.
//!
//! `h[-1] = H(model ‖ salt)`, `b[i] = H(tokens as little-endian u32)`, `h[i] = H(le64(b[i]) ‖
//! le64(h[i-1]))`, seed 0. Text without a tokenizer counts four UTF-8 bytes as one token, the last
//! one zero-padded, so a block of tokens is a run of the text's own bytes. The last block may be
//! partial.

use smallvec::SmallVec;
use xxhash_rust::xxh64::xxh64;

use crate::request::text::{DEFAULT_IMAGE_TOKENS, Piece, for_each_piece};
use crate::request::{Body, InferenceRequest, Prompt};
use crate::scheduling::attributes::MediaFeature;

/// Bytes of a token in the chain.
const TOKEN_BYTES: usize = 4;
/// A block of up to 256 tokens that straddles slices is put together without an allocation.
const INLINE_BLOCK_BYTES: usize = 1024;

/// Appends the hashes of `prompt` to `hashes`, at most `max_blocks` of them. `media` gives the tokens
/// of each media item of a text, in order; an item past its end counts [`DEFAULT_IMAGE_TOKENS`].
///
/// A media item begins at a token border and is that many copies of the low half of its hash; the
/// media of a token prompt are part of its ids.
pub fn hash_prompt(
    prompt: &Prompt,
    body: &Body,
    seed: u64,
    block_tokens: usize,
    max_blocks: usize,
    mut media: impl Iterator<Item = u32>,
    hashes: &mut Vec<u64>,
) {
    let mut hasher = BlockHasher::new(seed, block_tokens, max_blocks, hashes);
    match prompt {
        Prompt::Tokens { ids, .. } => {
            let mut buffer = [0; 1024];
            for ids in ids.chunks(buffer.len() / TOKEN_BYTES) {
                for (bytes, id) in buffer.chunks_exact_mut(TOKEN_BYTES).zip(ids) {
                    bytes.copy_from_slice(&id.to_le_bytes());
                }
                hasher.push(buffer.get(..ids.len() * TOKEN_BYTES).unwrap_or_default());
            }
        }
        Prompt::Text(segments) => for_each_piece(segments, body, &mut |piece| match piece {
            Piece::Text(bytes) => hasher.push(bytes),
            Piece::Media(item) => {
                hasher.align();
                #[expect(
                    clippy::cast_possible_truncation,
                    reason = "the low half stands for the item"
                )]
                let token = (item.hash as u32).to_le_bytes();
                hasher.repeat(token, media.next().unwrap_or(DEFAULT_IMAGE_TOKENS));
            }
        }),
    }
    hasher.finish();
}

/// Appends the hashes of every prompt of `request` to `hashes`, at most `max_blocks` of each, and the
/// end of each to `ends`. `media` are the request's items with their sizes, as the token producer
/// publishes them.
pub fn hash_request(
    request: &InferenceRequest,
    media: &[MediaFeature],
    block_tokens: usize,
    max_blocks: usize,
    hashes: &mut Vec<u64>,
    ends: &mut Vec<usize>,
) {
    let seed = chain_seed(&request.target_model, request.payload.cache_salt.as_deref());
    for (prompt, index) in request.payload.prompts.iter().zip(0..) {
        let own = media.iter().filter(|feature| feature.prompt == index);
        let sizes = own.map(|feature| feature.tokens);
        hash_prompt(
            prompt,
            &request.body,
            seed,
            block_tokens,
            max_blocks,
            sizes,
            hashes,
        );
        ends.push(hashes.len());
    }
}

/// Start of the chain: what separates models and tenants.
pub fn chain_seed(model: &str, salt: Option<&str>) -> u64 {
    let salt = salt.unwrap_or_default();
    if salt.is_empty() {
        return xxh64(model.as_bytes(), 0);
    }
    xxh64([model, salt].concat().as_bytes(), 0)
}

/// Cuts a byte stream into blocks and chains their hashes. Whole blocks inside one slice are hashed
/// in place; only blocks that straddle slices are copied.
#[derive(Debug)]
struct BlockHasher<'a> {
    parent: u64,
    block_bytes: usize,
    room: usize,
    partial: SmallVec<[u8; INLINE_BLOCK_BYTES]>,
    hashes: &'a mut Vec<u64>,
}

impl<'a> BlockHasher<'a> {
    fn new(seed: u64, block_tokens: usize, max_blocks: usize, hashes: &'a mut Vec<u64>) -> Self {
        Self {
            parent: seed,
            block_bytes: block_tokens.max(1) * TOKEN_BYTES,
            room: max_blocks,
            partial: SmallVec::new(),
            hashes,
        }
    }

    fn push(&mut self, mut bytes: &[u8]) {
        if !self.partial.is_empty() {
            let missing = self.block_bytes - self.partial.len();
            let (head, tail) = bytes.split_at(missing.min(bytes.len()));
            self.partial.extend_from_slice(head);
            bytes = tail;
            if self.partial.len() < self.block_bytes {
                return;
            }
            let block = std::mem::take(&mut self.partial);
            self.block(&block);
            self.partial = block;
            self.partial.clear();
        }
        let mut blocks = bytes.chunks_exact(self.block_bytes);
        for block in &mut blocks {
            self.block(block);
        }
        self.partial.extend_from_slice(blocks.remainder());
    }

    /// Pushes `count` copies of one token.
    fn repeat(&mut self, token: [u8; TOKEN_BYTES], count: u32) {
        const RUN: usize = 64;
        let mut run = [0; RUN * TOKEN_BYTES];
        for bytes in run.chunks_exact_mut(TOKEN_BYTES) {
            bytes.copy_from_slice(&token);
        }
        let mut left = count as usize;
        while left > 0 && self.room > 0 {
            let now = left.min(RUN);
            self.push(run.get(..now * TOKEN_BYTES).unwrap_or_default());
            left -= now;
        }
    }

    /// Fills the current token up with zeros.
    fn align(&mut self) {
        let rest = self.partial.len() % TOKEN_BYTES;
        if rest > 0 {
            self.push(&[0; TOKEN_BYTES][rest..]);
        }
    }

    fn finish(mut self) {
        self.align();
        if !self.partial.is_empty() {
            let block = std::mem::take(&mut self.partial);
            self.block(&block);
        }
    }

    fn block(&mut self, bytes: &[u8]) {
        if self.room == 0 {
            return;
        }
        self.room -= 1;
        let mut link = [0; 16];
        link[..8].copy_from_slice(&xxh64(bytes, 0).to_le_bytes());
        link[8..].copy_from_slice(&self.parent.to_le_bytes());
        self.parent = xxh64(&link, 0);
        self.hashes.push(self.parent);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::request::openai::OpenAiParser;
    use crate::request::{Parser, Segment, TextEncoding};
    use bytes::Bytes;

    /// Computed from the reference's source and checked with the Go xxHash library.
    const VECTORS: &str = include_str!("../../../tests/data/approx_prefix_hashes.json");

    #[test]
    fn the_chain_equals_the_recorded_vectors() {
        let vectors: serde_json::Value = serde_json::from_str(VECTORS).unwrap();
        let cases = vectors["cases"].as_array().unwrap();
        assert!(cases.len() > 3);
        for case in cases {
            let name = case["name"].as_str().unwrap();
            let number = |v: &serde_json::Value| v.as_str().unwrap().parse::<u64>().unwrap();
            let salt = case["cache_salt"].as_str();
            let seed = chain_seed(case["model"].as_str().unwrap(), salt);
            assert_eq!(seed, number(&case["seed_hash"]), "{name}: seed");
            let body = match (case["text"].as_str(), case["messages"].as_array()) {
                (Some(text), _) => serde_json::json!({ "prompt": text }).to_string(),
                (None, Some(messages)) => serde_json::json!({ "messages": messages }).to_string(),
                (None, None) => serde_json::json!({ "prompt": case["tokens"] }).to_string(),
            };
            let path = if case["messages"].is_array() {
                "/v1/chat/completions"
            } else {
                "/v1/completions"
            };
            let body = Body::from(body.as_str());
            let payload = OpenAiParser.parse(path, &body).unwrap();
            let mut hashes = Vec::new();
            let block = usize::try_from(case["block_size_tokens"].as_u64().unwrap()).unwrap();
            let max = usize::try_from(case["max_blocks"].as_u64().unwrap()).unwrap();
            let media = std::iter::empty();
            hash_prompt(
                &payload.prompts[0],
                &body,
                seed,
                block,
                max,
                media,
                &mut hashes,
            );
            let wanted: Vec<u64> = case["blocks"]
                .as_array()
                .unwrap()
                .iter()
                .map(number)
                .collect();
            assert_eq!(hashes, wanted, "{name}");
        }
    }

    #[test]
    fn pieces_of_any_size_hash_alike() {
        let text = "0123456789".repeat(100);
        let segments = vec![Segment::Body {
            range: 0..text.len(),
            encoding: TextEncoding::Verbatim,
        }];
        let prompt = Prompt::Text(segments);
        let hash = |body: &Body| {
            let mut hashes = Vec::new();
            let media = std::iter::empty();
            hash_prompt(&prompt, body, 1, 16, usize::MAX, media, &mut hashes);
            hashes
        };
        let whole = hash(&Body::from(text.as_str()));
        // 1000 bytes are 250 tokens: 15 blocks of 16 and a partial one of 10.
        assert_eq!(whole.len(), 16);
        for size in [1, 3, 64, 65, 999] {
            let body: Body = text
                .as_bytes()
                .chunks(size)
                .map(Bytes::copy_from_slice)
                .collect();
            assert_eq!(hash(&body), whole, "pieces of {size}");
        }
    }
}
