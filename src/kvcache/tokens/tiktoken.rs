//! Vocabularies of tiktoken: byte strings with a rank, one a line in base64. A rank is the id and the
//! priority of a merge.
//!
//! Words, normalization and control tokens are in each model's Python code, so its family has to be
//! known by the configuration beside the vocabulary ([`super::tiktoken_family`]). Words are found by the
//! same engine as those of `tokenizer.json` files.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::path::{Path, PathBuf};

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use hashbrown::HashMap;
use serde_json::Value;
use tokenizers::utils::SysRegex;
use tokenizers::{NormalizedString, Normalizer, normalizers::NFC};

use super::split::{Splitter, Unsplittable};
use super::tiktoken_family::Family;
use super::tokenizer::{LoadError, MAX_CONFIG_BYTES, MAX_TOKENIZER_BYTES, read};

/// Names a vocabulary has, beside `*.tiktoken`.
pub(super) const FILE: &str = "tiktoken.model";
/// Tells what the model is.
const MODEL_CONFIG: &str = "config.json";
/// Suffix of the others.
const EXTENSION: &str = "tiktoken";
/// Kimi's tokenizer cuts longer texts (in characters), whatever stands there.
const KIMI_MAX_CHARS: usize = 400_000;
/// And longer runs of white space, or of anything else.
const KIMI_MAX_RUN: usize = 25_000;

/// A vocabulary with its words and control tokens.
pub(super) struct TikToken {
    ranks: HashMap<Box<[u8]>, u32>,
    words: SysRegex,
    /// Finds control tokens; `None` without any.
    marks: Option<SysRegex>,
    control: HashMap<String, u32>,
    nfc: bool,
    cuts: bool,
}

impl std::fmt::Debug for TikToken {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TikToken")
            .field("ranks", &self.ranks.len())
            .field("control", &self.control.len())
            .finish_non_exhaustive()
    }
}

/// True for the name of a vocabulary.
pub(super) fn is_name(name: &str) -> bool {
    let extension = Path::new(name).extension();
    !name.contains('/') && (name == FILE || extension.is_some_and(|e| e == EXTENSION))
}

/// The vocabulary in `directory`; the first by name if there are several.
pub(super) fn find(directory: &Path) -> Option<PathBuf> {
    let usual = directory.join(FILE);
    if usual.exists() {
        return Some(usual);
    }
    let entries = std::fs::read_dir(directory).ok()?;
    let paths = entries.flatten().map(|entry| entry.path());
    paths
        .filter(|path| path.extension().is_some_and(|e| e == EXTENSION))
        .min()
}

impl TikToken {
    /// Reads the vocabulary at `path` for the model that `config` describes, and tells where its texts
    /// may be cut.
    pub(super) fn load(
        path: &Path,
        config: &Value,
    ) -> Result<(Self, Result<Splitter, Unsplittable>), LoadError> {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let directory = path.parent().unwrap_or(path);
        let bytes = read(directory, &name, MAX_TOKENIZER_BYTES)?;
        let model = if directory.join(MODEL_CONFIG).exists() {
            let bytes = read(directory, MODEL_CONFIG, MAX_CONFIG_BYTES)?;
            serde_json::from_slice(&bytes).map_err(|e| LoadError::invalid(MODEL_CONFIG, e))?
        } else {
            Value::Null
        };
        let invalid = |reason: String| LoadError::invalid(&name, reason);
        let ranks = read_ranks(&bytes).map_err(invalid)?;
        let above = u32::try_from(ranks.len()).unwrap_or(u32::MAX);
        let family = Family::of(&name, config, &model, above).map_err(invalid)?;
        Self::new(ranks, family).map_err(invalid)
    }

    fn new(
        ranks: HashMap<Box<[u8]>, u32>,
        family: Family,
    ) -> Result<(Self, Result<Splitter, Unsplittable>), String> {
        let splitter = Splitter::for_words(
            &family.words,
            family.control.iter().map(|(name, _)| name.as_str()),
        );
        let mut names: Vec<&str> = family
            .control
            .iter()
            .map(|(name, _)| name.as_str())
            .collect();
        // The longest wins where one begins another.
        names.sort_by_key(|name| Reverse(name.len()));
        let marks: Vec<String> = names.into_iter().map(quote).collect();
        let compile = |text: &str| SysRegex::new(text).map_err(|error| error.to_string());
        let tokenizer = Self {
            ranks,
            words: compile(&family.words)?,
            marks: Some(marks)
                .filter(|marks| !marks.is_empty())
                .map(|marks| compile(&marks.join("|")))
                .transpose()?,
            control: family.control.into_iter().collect(),
            nfc: family.nfc,
            cuts: family.cuts,
        };
        Ok((tokenizer, splitter))
    }

    /// The id of a token.
    pub(super) fn token_to_id(&self, token: &str) -> Option<u32> {
        let control = self.control.get(token);
        control
            .or_else(|| self.ranks.get(token.as_bytes()))
            .copied()
    }

    /// True for a control token.
    pub(super) fn is_control(&self, id: u32) -> bool {
        self.control.values().any(|known| *known == id)
    }

    /// An error for a text that its tokenizer would cut at a place of its own.
    pub(super) fn check(&self, text: &str) -> Result<(), String> {
        if !self.cuts || text.len() <= KIMI_MAX_RUN {
            return Ok(());
        }
        let (mut chars, mut run, mut white) = (0, 0, false);
        for c in text.chars() {
            chars += 1;
            let is_white = c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c);
            run = if is_white == white { run + 1 } else { 1 };
            white = is_white;
            if run > KIMI_MAX_RUN || chars > KIMI_MAX_CHARS {
                return Err("the model's tokenizer cuts a text of this length".to_owned());
            }
        }
        Ok(())
    }

    /// The ids of `text`, control tokens in it included.
    pub(super) fn encode(&self, text: &str) -> Result<Vec<u32>, String> {
        let normalized;
        let text = if self.nfc && !text.is_ascii() {
            let mut string = NormalizedString::from(text);
            NFC.normalize(&mut string).map_err(|e| e.to_string())?;
            normalized = string.get().to_owned();
            &normalized
        } else {
            text
        };
        let mut ids = Vec::with_capacity(text.len() / 3);
        let mut merger = Merger::default();
        let mut behind = 0;
        let found = self.marks.as_ref().map(|marks| marks.find_iter(text));
        for (start, end) in found.into_iter().flatten() {
            self.encode_plain(text.get(behind..start), &mut merger, &mut ids)?;
            let mark = text.get(start..end).unwrap_or_default();
            ids.extend(self.control.get(mark));
            behind = end;
        }
        self.encode_plain(text.get(behind..), &mut merger, &mut ids)?;
        Ok(ids)
    }

    fn encode_plain(
        &self,
        text: Option<&str>,
        merger: &mut Merger,
        ids: &mut Vec<u32>,
    ) -> Result<(), String> {
        let text = text.unwrap_or_default();
        for (start, end) in self.words.find_iter(text) {
            let word = text.as_bytes().get(start..end).unwrap_or_default();
            match self.ranks.get(word) {
                Some(&id) => ids.push(id),
                None => merger.merge(&self.ranks, word, ids)?,
            }
        }
        Ok(())
    }
}

/// Lines of base64 and rank.
fn read_ranks(bytes: &[u8]) -> Result<HashMap<Box<[u8]>, u32>, String> {
    let text = std::str::from_utf8(bytes).map_err(|e| e.to_string())?;
    let mut ranks = HashMap::new();
    for (number, line) in (1..).zip(text.lines()) {
        let line = line.trim();
        if line.is_empty() {
            continue;
        }
        let wrong = || format!("line {number} is not base64 and a rank");
        let (token, rank) = line.split_once(' ').ok_or_else(wrong)?;
        let token = BASE64_STANDARD.decode(token).map_err(|_| wrong())?;
        let rank = rank.trim().parse().map_err(|_| wrong())?;
        if token.is_empty() || ranks.insert(token.into_boxed_slice(), rank).is_some() {
            return Err(format!("line {number} repeats a token or has none"));
        }
    }
    // Then every text has ids.
    if (0..=u8::MAX).any(|byte| !ranks.contains_key([byte].as_slice())) {
        return Err("a byte has no rank".to_owned());
    }
    Ok(ranks)
}

/// `text` as an expression that matches nothing else.
fn quote(text: &str) -> String {
    let mut out = String::with_capacity(text.len() * 2);
    for c in text.chars() {
        if c.is_ascii_punctuation() {
            out.push('\\');
        }
        out.push(c);
    }
    out
}

/// Two neighbours: rank of what they make, where it begins and ends. The lowest rank is merged first,
/// the leftmost of equal ones.
type Pair = Reverse<(u32, usize, usize)>;

/// Room for merging one word, used again for the next.
#[derive(Debug, Default)]
struct Merger {
    /// For each byte that begins a part, where the part ends; 0 for the others.
    ends: Vec<usize>,
    /// For each byte that begins a part, where the part before it begins.
    before: Vec<usize>,
    pairs: BinaryHeap<Pair>,
}

impl Merger {
    /// Merges the bytes of `word` until nothing is left to merge. O(n log n).
    fn merge(
        &mut self,
        ranks: &HashMap<Box<[u8]>, u32>,
        word: &[u8],
        ids: &mut Vec<u32>,
    ) -> Result<(), String> {
        self.ends.clear();
        self.ends.extend(1..=word.len());
        self.before.clear();
        self.before
            .extend((0..word.len()).map(|at| at.saturating_sub(1)));
        self.pairs.clear();
        for start in 0..word.len().saturating_sub(1) {
            self.propose(ranks, word, start);
        }
        while let Some(Reverse((_, start, end))) = self.pairs.pop() {
            let middle = self.end(start);
            // Parts may have been merged meanwhile; then the two no longer make this pair.
            if middle == 0 || middle >= end || self.end(middle) != end {
                continue;
            }
            self.set_end(start, end);
            self.set_end(middle, 0);
            if let Some(before) = self.before.get_mut(end) {
                *before = start;
            }
            self.propose(ranks, word, start);
            if start > 0 {
                let before = self.before.get(start).copied().unwrap_or_default();
                self.propose(ranks, word, before);
            }
        }
        let mut start = 0;
        while start < word.len() {
            let end = self.end(start).max(start + 1);
            let part = word.get(start..end).unwrap_or_default();
            let id = ranks.get(part).ok_or("a part of a word has no rank")?;
            ids.push(*id);
            start = end;
        }
        Ok(())
    }

    fn end(&self, start: usize) -> usize {
        self.ends.get(start).copied().unwrap_or_default()
    }

    fn set_end(&mut self, start: usize, end: usize) {
        if let Some(slot) = self.ends.get_mut(start) {
            *slot = end;
        }
    }

    /// Queues the part at `start` with the one behind it, if they make a token.
    fn propose(&mut self, ranks: &HashMap<Box<[u8]>, u32>, word: &[u8], start: usize) {
        let end = self.end(self.end(start));
        let rank = word.get(start..end).and_then(|made| ranks.get(made));
        if let (Some(&rank), true) = (rank, end > 0) {
            self.pairs.push(Reverse((rank, start, end)));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::memo::Memo;
    use super::super::split::LLAMA3;
    use super::super::tokenizer::ModelTokenizer;
    use super::*;
    use serde_json::json;
    use std::collections::BTreeMap;

    fn directory() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/tiktoken")
    }

    /// Ranks trained on this repository's documents and some scripts: 900, and 4000 in `large`, which has
    /// random texts of what the expressions treat differently. Ids of tiktoken 0.14.0 for the expressions
    /// and control tokens of each family.
    #[derive(serde::Deserialize)]
    struct Vectors {
        ranks: usize,
        named: BTreeMap<String, String>,
        texts: Vec<String>,
        families: BTreeMap<String, Vec<Vec<u32>>>,
    }

    fn vectors_in(directory: &Path) -> Vectors {
        let bytes = std::fs::read(directory.join("vectors.json")).unwrap();
        serde_json::from_slice(&bytes).unwrap()
    }

    fn vectors() -> Vectors {
        vectors_in(&directory())
    }

    fn config(family: &str, vectors: &Vectors) -> Value {
        let added = |named: &[(String, String)]| {
            let entry = |(id, name): &(String, String)| (id.clone(), json!({"content": name}));
            Value::from_iter(named.iter().map(entry).collect::<serde_json::Map<_, _>>())
        };
        let ranks = vectors.ranks;
        match family {
            "qwen" => json!({"tokenizer_class": "QWenTokenizer"}),
            "hunyuan" => json!({"tokenizer_class": "HYTokenizer"}),
            "kimi" => {
                let named: Vec<_> = vectors.named.clone().into_iter().collect();
                json!({"tokenizer_class": "TikTokenTokenizer", "added_tokens_decoder": added(&named)})
            }
            _ => {
                let named = [
                    (ranks.to_string(), "<|begin_of_text|>".to_owned()),
                    ((ranks + 9).to_string(), "<|eot_id|>".to_owned()),
                ];
                json!({"pattern": LLAMA3, "added_tokens_decoder": added(&named)})
            }
        }
    }

    #[test]
    fn ids_are_those_of_tiktoken_in_every_family() {
        for (directory, families) in [(directory(), 3), (directory().join("large"), 4)] {
            let vectors = vectors_in(&directory);
            assert_eq!(vectors.families.len(), families);
            for (family, expected) in &vectors.families {
                let tokenizer =
                    ModelTokenizer::load(&directory, &config(family, &vectors)).unwrap();
                agree(family, tokenizer, &vectors, expected);
            }
        }
    }

    fn agree(family: &str, tokenizer: ModelTokenizer, vectors: &Vectors, expected: &[Vec<u32>]) {
        assert!(tokenizer.splitter().is_ok(), "{family}");
        assert_eq!(tokenizer.affixes(), Some((&[][..], &[][..])));
        assert_eq!(expected.len(), vectors.texts.len());
        for (text, expected) in vectors.texts.iter().zip(expected) {
            let ids = tokenizer.encode(text, true).unwrap();
            assert_eq!(&ids, expected, "{family}: {text:?}");
        }
        // Every text as one, by segments, against the whole.
        let whole = vectors.texts.concat().repeat(20);
        let plain = tokenizer.encode(&whole, false).unwrap();
        let memo = Memo::new(tokenizer, 1 << 20);
        assert_eq!(*memo.encode(&whole, false).unwrap(), plain[..], "{family}");
        assert!(memo.stats().misses > 4, "{family}: {:?}", memo.stats());
    }

    #[test]
    fn texts_that_the_models_own_code_would_cut_are_refused() {
        let vectors = vectors();
        let kimi = ModelTokenizer::load(&directory(), &config("kimi", &vectors)).unwrap();
        let memo = Memo::new(kimi, 1 << 20);
        assert!(memo.encode(&"a".repeat(KIMI_MAX_RUN), false).is_ok());
        assert!(memo.encode(&"a".repeat(KIMI_MAX_RUN + 1), false).is_err());
        assert!(memo.encode(&" ".repeat(KIMI_MAX_RUN + 1), false).is_err());
        let long = "ab ".repeat(KIMI_MAX_CHARS / 3 + 1);
        assert!(memo.encode(&long, false).is_err());
        let qwen = ModelTokenizer::load(&directory(), &config("qwen", &vectors)).unwrap();
        assert!(qwen.encode(&long, false).is_ok());
    }

    #[test]
    #[expect(clippy::format_collect, reason = "a test")]
    fn broken_vocabularies_are_refused() {
        let all: String = (0..=255_u8)
            .map(|byte| format!("{} {byte}\n", BASE64_STANDARD.encode([byte])))
            .collect();
        assert!(read_ranks(all.as_bytes()).is_ok());
        for (text, error) in [
            ("YQ== 0\n", "a byte has no rank"),
            ("YQ==\n", "line 1 is not base64 and a rank"),
            ("\n*** 1\n", "line 2 is not base64 and a rank"),
            ("YQ== x\n", "line 1 is not base64 and a rank"),
            ("YQ== 0\nYQ== 1\n", "line 2 repeats a token or has none"),
        ] {
            assert_eq!(read_ranks(text.as_bytes()).unwrap_err(), error, "{text:?}");
        }
    }

    #[test]
    fn equal_ranks_are_merged_from_the_left() {
        let mut ranks: HashMap<Box<[u8]>, u32> = HashMap::new();
        for (token, rank) in [("a", 0), ("aa", 1), ("aaa", 2)] {
            ranks.insert(token.as_bytes().into(), rank);
        }
        let ids = |word: &str| {
            let mut ids = Vec::new();
            let mut merger = Merger::default();
            merger.merge(&ranks, word.as_bytes(), &mut ids).unwrap();
            ids
        };
        // aa|aa|a: the pair at 0, then at 2; nothing makes "aaaa", "aa" and "a" make "aaa".
        assert_eq!(ids("aaaaa"), [1, 2]);
        assert_eq!(ids("aaaa"), [1, 1]);
    }
}
