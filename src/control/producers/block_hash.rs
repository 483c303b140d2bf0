//! The hash chain of the approximate prefix index: one xxHash64 per block of tokens, chained.
//!
//! `h[-1] = H(model ‖ salt)`, `b[i] = H(tokens as little-endian u32)`, `h[i] = H(le64(b[i]) ‖
//! le64(h[i-1]))`, seed 0. Text without a tokenizer counts four UTF-8 bytes as one token, the last
//! one zero-padded, so a block of tokens is a run of the text's own bytes. The last block may be
//! partial.

use xxhash_rust::xxh64::xxh64;

use crate::request::early::{BlockHasher, TOKEN_BYTES};
use crate::request::text::{DEFAULT_IMAGE_TOKENS, Piece, for_each_piece};
use crate::request::{Body, EarlyPrompt, InferenceRequest, Prompt};
use crate::scheduling::attributes::MediaFeature;

/// How a prompt is cut.
#[derive(Debug, Clone, Copy)]
pub struct Cut {
    /// Tokens of a block.
    pub block_tokens: usize,
    /// Blocks of a prompt that are hashed at most.
    pub max_blocks: usize,
}

/// Appends the hashes of `prompt` to `hashes`. `media` gives the tokens of each media item of a text,
/// in order; an item past its end counts [`DEFAULT_IMAGE_TOKENS`]. `early` is what was hashed of this
/// prompt while it arrived.
///
/// A media item begins at a token border and is that many copies of the low half of its hash; the
/// media of a token prompt are part of its ids.
pub fn hash_prompt(
    prompt: &Prompt,
    body: &Body,
    early: Option<&EarlyPrompt>,
    seed: u64,
    cut: Cut,
    mut media: impl Iterator<Item = u32>,
    hashes: &mut Vec<u64>,
) {
    let Cut {
        block_tokens,
        max_blocks,
    } = cut;
    let first = hashes.len();
    let resumed = early.and_then(|early| {
        let hasher = early.resume(block_tokens, max_blocks, hashes)?;
        Some((hasher, early.segments()))
    });
    let (mut hasher, read) =
        resumed.unwrap_or_else(|| (BlockHasher::new(block_tokens, max_blocks), 0));
    match prompt {
        Prompt::Tokens { ids, .. } => {
            let mut buffer = [0; 1024];
            for ids in ids.chunks(buffer.len() / TOKEN_BYTES) {
                for (bytes, id) in buffer.chunks_exact_mut(TOKEN_BYTES).zip(ids) {
                    bytes.copy_from_slice(&id.to_le_bytes());
                }
                let bytes = buffer.get(..ids.len() * TOKEN_BYTES);
                hasher.push(bytes.unwrap_or_default(), hashes);
            }
        }
        Prompt::Text(segments) => {
            let rest = segments.get(read..).unwrap_or_default();
            for_each_piece(rest, body, &mut |piece| match piece {
                Piece::Text(bytes) => hasher.push(bytes, hashes),
                Piece::Media(item) => {
                    hasher.align(hashes);
                    #[expect(
                        clippy::cast_possible_truncation,
                        reason = "the low half stands for the item"
                    )]
                    let token = (item.hash as u32).to_le_bytes();
                    hasher.repeat(token, media.next().unwrap_or(DEFAULT_IMAGE_TOKENS), hashes);
                }
            });
        }
    }
    hasher.finish(hashes);
    chain(hashes.get_mut(first..).unwrap_or_default(), seed);
}

/// Appends the hashes of every prompt of `request` to `hashes`, and the end of each to `ends`. `media` are the request's items with their sizes, as the token producer
/// publishes them.
pub fn hash_request(
    request: &InferenceRequest,
    media: &[MediaFeature],
    cut: Cut,
    hashes: &mut Vec<u64>,
    ends: &mut Vec<usize>,
) {
    let seed = chain_seed(&request.target_model, request.payload.cache_salt.as_deref());
    for (prompt, index) in request.payload.prompts.iter().zip(0..) {
        let own = media.iter().filter(|feature| feature.prompt == index);
        let sizes = own.map(|feature| feature.tokens);
        let early = request.early.as_deref().filter(|_| index == 0);
        hash_prompt(prompt, &request.body, early, seed, cut, sizes, hashes);
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

/// Replaces the hash of each block by its link of the chain that begins at `seed`.
fn chain(hashes: &mut [u64], seed: u64) {
    let mut parent = seed;
    for hash in hashes {
        let mut link = [0; 16];
        link[..8].copy_from_slice(&hash.to_le_bytes());
        link[8..].copy_from_slice(&parent.to_le_bytes());
        parent = xxh64(&link, 0);
        *hash = parent;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::request::openai::OpenAiParser;
    use crate::request::text::token_count;
    use crate::request::{Early, EarlyBlocks, EarlyWork, Parser, Segment, TextEncoding};
    use bytes::Bytes;
    use proptest::prelude::*;

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
            let size = |name: &str| usize::try_from(case[name].as_u64().unwrap()).unwrap();
            let cut = Cut {
                block_tokens: size("block_size_tokens"),
                max_blocks: size("max_blocks"),
            };
            let media = std::iter::empty();
            hash_prompt(
                &payload.prompts[0],
                &body,
                None,
                seed,
                cut,
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
            let cut = Cut {
                block_tokens: 16,
                max_blocks: usize::MAX,
            };
            hash_prompt(&prompt, body, None, 1, cut, media, &mut hashes);
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

    /// Reads `body` piece by piece, as it arrives, and checks that nothing comes out otherwise than from
    /// the whole body. Returns how many segments were read early.
    fn early_equals_late(path: &str, pieces: &[&[u8]], early: (u32, usize)) -> Option<usize> {
        let mut body = Body::default();
        let blocks = EarlyBlocks {
            tokens: early.0,
            max: early.1,
        };
        let work = EarlyWork {
            blocks: Some(blocks),
            texts: early.1 == usize::MAX,
        };
        let mut early = Early::new(OpenAiParser.begin(path).unwrap(), work);
        for piece in pieces {
            body.push(Bytes::copy_from_slice(piece));
            early.advance(&body);
        }
        let late = OpenAiParser.parse(path, &body);
        let (payload, blocks) = match (early.finish(&body), late) {
            (Ok(read), Ok(late)) => {
                assert_eq!(format!("{:?}", read.0), format!("{late:?}"));
                read
            }
            (early, late) => {
                assert_eq!(
                    early.unwrap_err().to_string(),
                    late.unwrap_err().to_string()
                );
                return None;
            }
        };
        let prompt = payload.prompts.first()?;
        for cut in [(16, usize::MAX), (16, 3), (64, usize::MAX)] {
            let (block_tokens, max_blocks) = cut;
            let hash = |early| {
                let mut hashes = vec![7];
                let cut = Cut {
                    block_tokens,
                    max_blocks,
                };
                let media = std::iter::repeat(5);
                hash_prompt(prompt, &body, early, 1, cut, media, &mut hashes);
                hashes
            };
            assert_eq!(hash(blocks.as_deref()), hash(None), "{cut:?}");
        }
        let count = |early| token_count(prompt, &body, early, &mut |_, at| at + 3);
        assert_eq!(count(blocks.as_deref()), count(None));
        blocks.map(|blocks| blocks.segments()).filter(|n| *n > 0)
    }

    #[test]
    fn the_usual_orders_are_hashed_while_they_arrive() {
        let segments = |path: &str, body: &str| {
            let pieces: Vec<&[u8]> = body.as_bytes().chunks(7).collect();
            early_equals_late(path, &pieces, (16, usize::MAX))
        };
        let chat = "/v1/chat/completions";
        let long = "x\\n\\u00e9 ".repeat(60);
        let messages = format!(
            r#""messages":[{{"role":"system","content":"{long}"}},{{"role":"user","content":[{{"type":"text","text":"{long}"}},{{"type":"image_url","image_url":{{"url":"u"}}}},{{"type":"text","text":"b"}}]}}]"#
        );
        // Both roles, the system text and the text before the image.
        assert_eq!(segments(chat, &format!("{{{messages}}}")), Some(4));
        let tools = r#""tools":[{"a":"\\n"}]"#;
        assert_eq!(segments(chat, &format!("{{{tools},{messages}}}")), Some(5));
        // Tools come first in the prompt: what was hashed before they were seen is of no use.
        assert_eq!(segments(chat, &format!("{{{messages},{tools}}}")), None);
        // The role comes first too, so the content has to wait for it.
        let turned = format!(r#"{{"messages":[{{"content":"{long}","role":"user"}}]}}"#);
        assert_eq!(segments(chat, &turned), Some(2));
        let completions = "/v1/completions";
        let prompt = format!(r#"{{"model":"m","prompt":"{long}"}}"#);
        assert_eq!(segments(completions, &prompt), Some(1));
        let prompts = format!(r#"{{"prompt":["{long}","{long}"]}}"#);
        assert_eq!(segments(completions, &prompts), Some(1));
        // Of duplicate keys the last counts.
        let twice = format!(r#"{{"prompt":"{long}","prompt":"b"}}"#);
        assert_eq!(segments(completions, &twice), None);
        let twice = r#"{"messages":[{"role":"user","content":"aaaaaaaaaa","content":"b"}]}"#;
        assert_eq!(segments(chat, twice), None);
        assert_eq!(segments(completions, r#"{"prompt":"aaaaaaaaaaaaa"#), None);
    }

    /// Members of a chat body in any order, some of them twice.
    fn chat_body() -> impl Strategy<Value = String> {
        let text =
            || "[a-c\n\"\\\\é\u{1F600}]{0,40}".prop_map(|t| serde_json::to_string(&t).unwrap());
        let part = prop_oneof![
            4 => text().prop_map(|t| format!(r#"{{"type":"text","text":{t}}}"#)),
            1 => Just(r#"{"type":"image_url","image_url":{"url":"u"}}"#.to_owned()),
        ];
        let content = prop_oneof![
            text(),
            prop::collection::vec(part, 0..4).prop_map(|parts| format!("[{}]", parts.join(","))),
        ];
        let member = prop_oneof![
            content.prop_map(|c| format!(r#""content":{c}"#)),
            Just(r#""role":"user""#.to_owned()),
            Just(r#""name":"n""#.to_owned()),
        ];
        let message =
            prop::collection::vec(member, 0..4).prop_map(|m| format!("{{{}}}", m.join(",")));
        let top = prop_oneof![
            6 => prop::collection::vec(message, 0..4).prop_map(|m| format!(r#""messages":[{}]"#, m.join(","))),
            1 => text().prop_map(|t| format!(r#""tools":[{t}]"#)),
            1 => text().prop_map(|t| format!(r#""prompt":{t}"#)),
            1 => prop::collection::vec(text(), 0..3).prop_map(|t| format!(r#""prompt":[{}]"#, t.join(","))),
            1 => Just(r#""model":"m""#.to_owned()),
            1 => Just("broken".to_owned()),
        ];
        prop::collection::vec(top, 1..4).prop_map(|members| format!("{{{}}}", members.join(",")))
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(400))]

        #[test]
        fn reading_early_changes_nothing(body in chat_body(), chat in any::<bool>(), early in (prop_oneof![Just(16u32), Just(64)], prop_oneof![Just(usize::MAX), Just(3), 0..20usize]), cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..12)) {
            let text = body.as_bytes();
            let mut at: Vec<usize> = cuts.iter().map(|c| c.index(text.len())).collect();
            at.extend([0, text.len()]);
            at.sort_unstable();
            let pieces: Vec<&[u8]> = at.windows(2).map(|w| &text[w[0]..w[1]]).collect();
            let path = if chat { "/v1/chat/completions" } else { "/v1/completions" };
            early_equals_late(path, &pieces, early);
        }
    }
}
