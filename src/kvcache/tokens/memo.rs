//! Tokenization that remembers: a prefix seen before is not tokenized again.
//!
//! A text is cut into segments at the first safe cut ([`super::split`]) behind every
//! [`SEGMENT_BYTES`]. Where a segment ends depends on the bytes up to there only, so two texts with a
//! common prefix have the same segments in it, save the last. Ids of a segment are kept under the hash
//! of its bytes in a map bounded by bytes.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;
use xxhash_rust::xxh3::xxh3_128_with_seed;

use super::lru::ByteLru;
use super::tokenizer::{EncodeError, ModelTokenizer};

/// A segment ends at the first safe cut at or behind this many bytes. Less costs more look-ups (about
/// 100 ns each); more makes the last segment, which a growing prompt tokenizes anew, longer.
pub const SEGMENT_BYTES: usize = 2 << 10;
/// Bytes of a token in usual text, rather too few: room for ids is made by it.
const TOKEN_BYTES: usize = 3;
/// Bytes of remembered ids per model unless configured: about 60 MB of English text.
pub const DEFAULT_MEMO_BYTES: usize = 64 << 20;
/// What an entry costs beside its ids: key, slot and index.
const ENTRY_BYTES: usize = 96;
/// Parts of the map with a lock each, a power of two.
const SHARDS: usize = 16;

/// What a [`Memo`] has done so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct MemoStats {
    /// Segments found.
    pub hits: u64,
    /// Segments tokenized.
    pub misses: u64,
    /// Bytes of text that were tokenized.
    pub tokenized_bytes: u64,
    /// Segments that left to make room.
    pub evictions: u64,
    /// Bytes held.
    pub held_bytes: usize,
}

type Shard = Mutex<ByteLru<u128, Arc<[u32]>>>;

/// A tokenizer with a memory. Locks are per shard and held for one look-up.
#[derive(Debug)]
pub struct Memo {
    tokenizer: ModelTokenizer,
    shards: Vec<Shard>,
    /// Secret of this process, so that clients cannot make two segments collide.
    seed: u64,
    segment_bytes: usize,
    hits: AtomicU64,
    misses: AtomicU64,
    tokenized_bytes: AtomicU64,
    evictions: AtomicU64,
}

impl Memo {
    /// Remembers up to `memo_bytes` of ids.
    pub fn new(tokenizer: ModelTokenizer, memo_bytes: usize) -> Self {
        Self::with_segments(tokenizer, memo_bytes, SEGMENT_BYTES)
    }

    fn with_segments(tokenizer: ModelTokenizer, memo_bytes: usize, segment_bytes: usize) -> Self {
        let shard = || Mutex::new(ByteLru::new(memo_bytes / SHARDS));
        Self {
            tokenizer,
            shards: std::iter::repeat_with(shard).take(SHARDS).collect(),
            seed: fastrand::u64(..),
            segment_bytes,
            hits: AtomicU64::new(0),
            misses: AtomicU64::new(0),
            tokenized_bytes: AtomicU64::new(0),
            evictions: AtomicU64::new(0),
        }
    }

    /// The tokenizer behind it.
    pub fn tokenizer(&self) -> &ModelTokenizer {
        &self.tokenizer
    }

    /// Counters.
    pub fn stats(&self) -> MemoStats {
        MemoStats {
            hits: self.hits.load(Ordering::Relaxed),
            misses: self.misses.load(Ordering::Relaxed),
            tokenized_bytes: self.tokenized_bytes.load(Ordering::Relaxed),
            evictions: self.evictions.load(Ordering::Relaxed),
            held_bytes: self.shards.iter().map(|shard| shard.lock().bytes()).sum(),
        }
    }

    /// The ids of `text`, the same as [`ModelTokenizer::encode`] gives.
    pub fn encode(&self, text: &str, special: bool) -> Result<Arc<Vec<u32>>, EncodeError> {
        self.encode_within(text, special, usize::MAX)
            .unwrap_or_else(|| Ok(Arc::default()))
    }

    /// As [`Self::encode`], or `None` when more than `budget_bytes` of `text` would have to be
    /// tokenized. Then at most `budget_bytes` have been.
    pub fn encode_within(
        &self,
        text: &str,
        special: bool,
        budget_bytes: usize,
    ) -> Option<Result<Arc<Vec<u32>>, EncodeError>> {
        let affixes = match self.tokenizer.affixes() {
            _ if !special => (&[][..], &[][..]),
            Some(affixes) => affixes,
            // Special tokens depend on the text: nothing is remembered.
            None if text.len() > budget_bytes => return None,
            None => return Some(self.tokenizer.encode(text, true).map(Arc::new)),
        };
        if let Err(error) = self.tokenizer.check(text) {
            return Some(Err(error));
        }
        let mut budget = budget_bytes;
        let room = text.len() / TOKEN_BYTES + affixes.0.len() + affixes.1.len();
        let mut ids = Vec::with_capacity(room);
        ids.extend_from_slice(affixes.0);
        for segment in self.segments(text) {
            let key = xxh3_128_with_seed(segment.as_bytes(), self.seed);
            if self.append_known(key, &mut ids) {
                continue;
            }
            budget = budget.checked_sub(segment.len())?;
            match self.tokenize(key, segment) {
                Ok(new) => ids.extend_from_slice(&new),
                Err(error) => return Some(Err(error)),
            }
        }
        ids.extend_from_slice(affixes.1);
        Some(Ok(ids.into()))
    }

    /// Pieces of `text` that are tokenized apart; all of it in one when it must not be cut.
    fn segments<'a>(&self, text: &'a str) -> impl Iterator<Item = &'a str> {
        let splitter = self.tokenizer.splitter().as_ref().ok().copied();
        let segment_bytes = self.segment_bytes;
        let mut rest = text;
        std::iter::from_fn(move || {
            if rest.is_empty() {
                return None;
            }
            let cut = splitter.and_then(|splitter| splitter.next_cut(rest, segment_bytes));
            let (segment, behind) = rest.split_at(cut.unwrap_or(rest.len()));
            rest = behind;
            Some(segment)
        })
    }

    fn shard(&self, key: u128) -> Option<&Shard> {
        // The map hashes the key again, so its low bits are free to choose the shard.
        self.shards.get(key as usize % SHARDS)
    }

    fn append_known(&self, key: u128, ids: &mut Vec<u32>) -> bool {
        let known = self.shard(key).and_then(|s| s.lock().get(&key).cloned());
        let Some(known) = known else {
            return false;
        };
        ids.extend_from_slice(&known);
        self.hits.fetch_add(1, Ordering::Relaxed);
        true
    }

    fn tokenize(&self, key: u128, segment: &str) -> Result<Arc<[u32]>, EncodeError> {
        let ids: Arc<[u32]> = self.tokenizer.encode(segment, false)?.into();
        let bytes = ids.len() * size_of::<u32>() + ENTRY_BYTES;
        self.misses.fetch_add(1, Ordering::Relaxed);
        self.tokenized_bytes
            .fetch_add(segment.len() as u64, Ordering::Relaxed);
        if let Some(shard) = self.shard(key) {
            let evicted = shard.lock().insert(key, Arc::clone(&ids), bytes);
            self.evictions.fetch_add(evicted as u64, Ordering::Relaxed);
        }
        Ok(ids)
    }
}

#[cfg(test)]
mod tests {
    use super::super::tokenizer::tests::{tiny, with};
    use super::*;
    use proptest::prelude::*;
    use serde_json::{Value, json};
    use std::sync::LazyLock;

    /// Segments so short that almost every safe cut is used.
    fn short(tokenizer: ModelTokenizer) -> Memo {
        assert!(tokenizer.splitter().is_ok());
        Memo::with_segments(tokenizer, 1 << 20, 1)
    }

    fn split_by(expression: &str) -> Value {
        json!({"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": false},
            {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false},
        ]})
    }

    fn llama3() -> ModelTokenizer {
        let expression = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
        with(split_by(expression), Value::Null)
    }

    fn qwen2() -> ModelTokenizer {
        let expression = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
        with(split_by(expression), json!({"type": "NFC"}))
    }

    static MEMOS: LazyLock<[(&str, Memo); 3]> = LazyLock::new(|| {
        [
            ("gpt2", short(tiny())),
            ("llama3", short(llama3())),
            ("qwen2", short(qwen2())),
        ]
    });

    fn agree(text: &str) -> Result<(), TestCaseError> {
        for (name, memo) in MEMOS.iter() {
            let plain = memo.tokenizer().encode(text, false).unwrap();
            let first = memo.encode(text, false).unwrap();
            prop_assert_eq!(&*first, &plain[..], "{} on {:?}", name, text);
            let again = memo.encode(text, false).unwrap();
            prop_assert_eq!(&*again, &plain[..], "{} again on {:?}", name, text);
        }
        Ok(())
    }

    /// Text made of what the expressions treat differently.
    fn hard_text() -> impl Strategy<Value = String> {
        let piece = prop::sample::select(vec![
            " ",
            "  ",
            "\n",
            "\n\n",
            "\r\n",
            "\t",
            "\u{a0}",
            "\u{3000}",
            "\u{85}",
            "\u{200b}",
            "a",
            "word",
            "B",
            "é",
            "e\u{301}",
            "\u{301}",
            "水",
            "한",
            "\u{1112}\u{1161}",
            "ß",
            "7",
            "2026",
            "٣",
            "'s",
            "'S",
            "'re",
            "'",
            ".",
            "...",
            "!?",
            "{\"",
            "</",
            "_",
            "😀",
            "\u{1f3fd}",
            "<|im_start|>",
            "<|im_end|>",
            "<|im_",
            "|>",
            "<|endoftext|>",
            "\u{0}",
            "\u{fffd}",
        ]);
        prop::collection::vec(piece, 0..40).prop_map(|pieces| pieces.concat())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(1500))]

        #[test]
        fn segments_give_the_ids_of_the_whole_on_hard_text(text in hard_text()) {
            agree(&text)?;
        }

        #[test]
        fn segments_give_the_ids_of_the_whole_on_any_unicode(text in "\\PC{0,60}") {
            agree(&text)?;
        }

        #[test]
        fn segments_give_the_ids_of_the_whole_on_any_chars(chars in prop::collection::vec(any::<char>(), 0..40)) {
            agree(&chars.into_iter().collect::<String>())?;
        }
    }

    #[test]
    fn every_safe_cut_of_a_text_is_equal_by_itself() {
        let text = "It's  a test.\n\nOur ship\r\n is 300 m long;\tcan't we'LL  \n  turn? {\"a\": [1, 2]}\n";
        let mut cuts = 0;
        for (name, memo) in MEMOS.iter() {
            let tokenizer = memo.tokenizer();
            let splitter = tokenizer.splitter().as_ref().unwrap();
            let whole = tokenizer.encode(text, false).unwrap();
            for at in (1..text.len()).filter(|&at| splitter.next_cut(text, at) == Some(at)) {
                let (left, right) = text.split_at(at);
                let mut ids = tokenizer.encode(left, false).unwrap();
                ids.extend(tokenizer.encode(right, false).unwrap());
                assert_eq!(ids, whole, "{name} at {at}");
                cuts += 1;
            }
        }
        assert!(cuts > 30, "{cuts}");
    }

    #[test]
    fn a_longer_prompt_tokenizes_its_tail_only() {
        let memo = Memo::new(tiny(), 1 << 20);
        // No two segments alike, all new.
        let lines = (1000..2000).map(|ship| format!("Our ship {ship} is very long.\n"));
        let mut prompt: String = lines.collect();
        memo.encode(&prompt, false).unwrap();
        let first = memo.stats().tokenized_bytes;
        assert_eq!(first, prompt.len() as u64);
        prompt.push_str("Which side is starboard?");
        memo.encode(&prompt, false).unwrap();
        let tail = memo.stats().tokenized_bytes - first;
        // At most one segment up to its first cut (words are shorter than 20 bytes) and the new text.
        assert!(tail <= (SEGMENT_BYTES + 20 + 24) as u64, "{tail}");
        let before = memo.stats();
        memo.encode(&prompt, false).unwrap();
        assert_eq!(memo.stats().tokenized_bytes, before.tokenized_bytes);
        assert_eq!(memo.stats().misses, before.misses);
    }

    #[test]
    fn what_would_cost_more_than_the_budget_is_left() {
        let memo = Memo::new(tiny(), 1 << 20);
        let text = "The port keeps a ledger of every ship. ".repeat(10);
        assert!(memo.encode_within(&text, false, text.len() - 1).is_none());
        assert_eq!(memo.stats().misses, 0);
        let ids = memo
            .encode_within(&text, false, text.len())
            .unwrap()
            .unwrap();
        // Now it is known and costs nothing.
        assert_eq!(memo.encode_within(&text, false, 0).unwrap().unwrap(), ids);
    }

    #[test]
    fn the_memory_is_bounded() {
        let bound = SHARDS * 4096;
        let memo = Memo::new(tiny(), bound);
        for number in 0..2000 {
            memo.encode(&format!("ship number {number}"), false)
                .unwrap();
        }
        let stats = memo.stats();
        assert!(stats.held_bytes <= bound, "{stats:?}");
        assert!(stats.held_bytes > bound / 2, "{stats:?}");
        assert!(stats.evictions > 0, "{stats:?}");
    }

    #[test]
    fn an_unknown_pre_tokenizer_is_remembered_whole() {
        let tokenizer = with(split_by(r"\w+|\W+"), Value::Null);
        assert!(tokenizer.splitter().is_err());
        let memo = Memo::with_segments(tokenizer, 1 << 20, 1);
        let text = "Our ship is long";
        let plain = memo.tokenizer().encode(text, false).unwrap();
        assert_eq!(*memo.encode(text, false).unwrap(), plain[..]);
        assert_eq!(memo.stats().misses, 1);
        memo.encode(text, false).unwrap();
        assert_eq!(memo.stats().hits, 1);
    }
}
