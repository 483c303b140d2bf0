//! A model's own tokenizer, read from its directory.

use std::path::Path;

use serde_json::Value;
use tokenizers::Tokenizer;

use super::special::SpecialTokens;
use super::split::{Splitter, Unsplittable};
use super::tiktoken::{self, TikToken};

/// Largest `tokenizer.json` read; the largest published ones are about 35 MB.
pub const MAX_TOKENIZER_BYTES: u64 = 128 << 20;
/// Largest `tokenizer_config.json`, `special_tokens_map.json` or template file read.
pub const MAX_CONFIG_BYTES: u64 = 8 << 20;

/// Why a model's files cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// A file is missing or unreadable.
    #[error("cannot read {file}: {source}")]
    Read {
        /// File name inside the model's directory.
        file: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file is larger than its limit.
    #[error("{file} has {bytes} bytes, at most {limit} are read")]
    TooLarge {
        /// File name inside the model's directory.
        file: String,
        /// Its size.
        bytes: u64,
        /// The limit.
        limit: u64,
    },
    /// A file has not the expected form.
    #[error("{file}: {reason}")]
    Invalid {
        /// File name inside the model's directory.
        file: String,
        /// What is wrong.
        reason: String,
    },
}

impl LoadError {
    pub(super) fn invalid(file: &str, reason: impl std::fmt::Display) -> Self {
        Self::Invalid {
            file: file.to_owned(),
            reason: reason.to_string(),
        }
    }
}

/// Ids before and after a text.
type Affixes = (Vec<u32>, Vec<u32>);

/// What turns text into ids.
enum Vocabulary {
    /// A `tokenizer.json`.
    File(Box<Tokenizer>),
    /// Ranks of tiktoken.
    Ranks(TikToken),
}

/// The tokenizer of one model, as its engine loads it.
pub struct ModelTokenizer {
    vocabulary: Vocabulary,
    splitter: Result<Splitter, Unsplittable>,
    /// Ids around every text that asks for special tokens; `None` when they are not the same for all.
    affixes: Option<Affixes>,
}

impl std::fmt::Debug for ModelTokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ModelTokenizer")
            .field("splitter", &self.splitter)
            .field("affixes", &self.affixes)
            .finish_non_exhaustive()
    }
}

/// A text could not be tokenized.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("tokenizer: {0}")]
pub struct EncodeError(pub String);

impl ModelTokenizer {
    /// Reads `tokenizer.json` in `directory`, with the tokens that `config` (its
    /// `tokenizer_config.json`) adds, or without it a vocabulary of tiktoken (`tiktoken.model` or
    /// `*.tiktoken`). Blocks; takes tens to hundreds of milliseconds.
    pub fn load(directory: &Path, config: &Value) -> Result<Self, LoadError> {
        const FILE: &str = "tokenizer.json";
        if !directory.join(FILE).exists()
            && let Some(path) = tiktoken::find(directory)
        {
            let (ranks, splitter) = TikToken::load(&path, config)?;
            return Ok(Self {
                vocabulary: Vocabulary::Ranks(ranks),
                splitter,
                affixes: Some((Vec::new(), Vec::new())),
            });
        }
        let bytes = read(directory, FILE, MAX_TOKENIZER_BYTES)?;
        let special = SpecialTokens::read(directory, config)?;
        Self::with_special(&bytes, config, &special)
            .map_err(|reason| LoadError::invalid(FILE, reason))
    }

    /// As [`Self::load`], from the bytes of a `tokenizer.json`.
    pub fn parse(bytes: &[u8], config: &Value) -> Result<Self, String> {
        Self::with_special(bytes, config, &SpecialTokens::of(config))
    }

    fn with_special(bytes: &[u8], config: &Value, special: &SpecialTokens) -> Result<Self, String> {
        let json: Value = serde_json::from_slice(bytes).map_err(|e| e.to_string())?;
        let mut tokenizer = Tokenizer::from_bytes(bytes).map_err(|e| e.to_string())?;
        // Both belong to training; engines reset them for every call.
        tokenizer.with_truncation(None).map_err(|e| e.to_string())?;
        tokenizer.with_padding(None);
        let added = special.add_to(&mut tokenizer, config)?;
        if config["split_special_tokens"] == true {
            tokenizer.set_encode_special_tokens(true);
        }
        let class = config["tokenizer_class"].as_str().unwrap_or_default();
        if class.starts_with("LlamaTokenizer") && !json["normalizer"].is_null() {
            tracing::warn!(
                class,
                "engines with transformers 5 build this tokenizer anew, with other ids for spaces behind \
                 special tokens; these are those of its file"
            );
        }
        let splitter = Splitter::detect(&json, &added);
        let affixes = affixes(&tokenizer)?;
        Ok(Self {
            vocabulary: Vocabulary::File(Box::new(tokenizer)),
            splitter,
            affixes,
        })
    }

    /// Where texts may be cut, or why nowhere.
    pub fn splitter(&self) -> &Result<Splitter, Unsplittable> {
        &self.splitter
    }

    /// Ids before and after a text with special tokens, when they do not depend on it.
    pub fn affixes(&self) -> Option<(&[u32], &[u32])> {
        let (before, after) = self.affixes.as_ref()?;
        Some((before, after))
    }

    /// The ids of `text`. `special` puts the model's begin and end tokens around it, as completions
    /// have them; a rendered chat has its own. About 3 MB/s.
    pub fn encode(&self, text: &str, special: bool) -> Result<Vec<u32>, EncodeError> {
        match &self.vocabulary {
            Vocabulary::File(tokenizer) => encode(tokenizer, text, special),
            Vocabulary::Ranks(ranks) => ranks.encode(text),
        }
        .map_err(EncodeError)
    }

    /// An error for a text whose ids are not those of its segments, because the model's own code cuts
    /// it elsewhere.
    pub(super) fn check(&self, text: &str) -> Result<(), EncodeError> {
        match &self.vocabulary {
            Vocabulary::File(_) => Ok(()),
            Vocabulary::Ranks(ranks) => ranks.check(text).map_err(EncodeError),
        }
    }

    /// True for a token that is found in a text before it is split into words.
    pub(super) fn is_added(&self, id: u32) -> bool {
        match &self.vocabulary {
            Vocabulary::File(tokenizer) => tokenizer
                .get_added_vocabulary()
                .get_added_tokens_decoder()
                .contains_key(&id),
            Vocabulary::Ranks(ranks) => ranks.is_control(id),
        }
    }

    /// The id of a token, added ones included.
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        match &self.vocabulary {
            Vocabulary::File(tokenizer) => tokenizer.token_to_id(token),
            Vocabulary::Ranks(ranks) => ranks.token_to_id(token),
        }
    }
}

/// Reads a file of a model's directory up to `limit` bytes.
pub(super) fn read(directory: &Path, file: &str, limit: u64) -> Result<Vec<u8>, LoadError> {
    let failed = |source| LoadError::Read {
        file: file.to_owned(),
        source,
    };
    let path = directory.join(file);
    let bytes = std::fs::metadata(&path).map_err(failed)?.len();
    if bytes > limit {
        return Err(LoadError::TooLarge {
            file: file.to_owned(),
            bytes,
            limit,
        });
    }
    std::fs::read(&path).map_err(failed)
}

fn encode(tokenizer: &Tokenizer, text: &str, special: bool) -> Result<Vec<u32>, String> {
    let encoding = tokenizer
        .encode_fast(text, special)
        .map_err(|e| e.to_string())?;
    Ok(encoding.get_ids().to_vec())
}

/// What the post-processor puts around a text. Two texts must agree, and the text's own ids must lie
/// at one place only.
fn affixes(tokenizer: &Tokenizer) -> Result<Option<Affixes>, String> {
    let around = |text: &str| -> Result<Option<Affixes>, String> {
        let plain = encode(tokenizer, text, false)?;
        let full = encode(tokenizer, text, true)?;
        if plain.is_empty() {
            return Ok(None);
        }
        let mut places = (0..full.len()).filter(|&at| {
            full.get(at..at + plain.len())
                .is_some_and(|window| window == plain)
        });
        let (Some(at), None) = (places.next(), places.next()) else {
            return Ok(None);
        };
        let (before, rest) = full.split_at(at);
        Ok(Some((before.to_vec(), rest[plain.len()..].to_vec())))
    };
    let (first, second) = (around("the quay")?, around("7 tugs")?);
    Ok(if first == second { first } else { None })
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use serde_json::json;

    /// The recorded engine's model.
    pub(in crate::kvcache::tokens) fn directory() -> std::path::PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/tokenizer")
    }

    pub(in crate::kvcache::tokens) fn tiny() -> ModelTokenizer {
        ModelTokenizer::load(&directory(), &Value::Null).unwrap()
    }

    /// `tokenizer.json` of the tiny model with another pre-tokenizer and normalizer.
    pub(in crate::kvcache::tokens) fn with(
        pre_tokenizer: Value,
        normalizer: Value,
    ) -> ModelTokenizer {
        let mut json: Value =
            serde_json::from_slice(&std::fs::read(directory().join("tokenizer.json")).unwrap())
                .unwrap();
        json["pre_tokenizer"] = pre_tokenizer;
        json["normalizer"] = normalizer;
        ModelTokenizer::parse(json.to_string().as_bytes(), &Value::Null).unwrap()
    }

    #[test]
    fn ids_are_those_of_the_file() {
        let tokenizer = tiny();
        // `make_model.py`: special tokens in order; <|im_start|> is 1, <|im_end|> 2.
        assert_eq!(
            tokenizer.encode("<|im_start|><|im_end|>", false).unwrap(),
            [1, 2]
        );
        assert_eq!(tokenizer.token_to_id("<|pad|>"), Some(3));
    }

    #[test]
    fn a_model_without_begin_and_end_tokens_has_empty_affixes() {
        assert_eq!(tiny().affixes(), Some((&[][..], &[][..])));
    }

    #[test]
    fn begin_token_of_a_template_processor_is_an_affix() {
        let mut json: Value =
            serde_json::from_slice(&std::fs::read(directory().join("tokenizer.json")).unwrap())
                .unwrap();
        json["post_processor"] = json!({
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}},
                       {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0],
                                                 "tokens": ["<|endoftext|>"]}},
        });
        let tokenizer = ModelTokenizer::parse(json.to_string().as_bytes(), &Value::Null).unwrap();
        assert_eq!(tokenizer.affixes(), Some((&[0][..], &[][..])));
    }

    #[test]
    fn truncation_of_the_file_is_not_applied() {
        let mut json: Value =
            serde_json::from_slice(&std::fs::read(directory().join("tokenizer.json")).unwrap())
                .unwrap();
        json["truncation"] = json!({"direction": "Right", "max_length": 2,
                                    "strategy": "LongestFirst", "stride": 0});
        let tokenizer = ModelTokenizer::parse(json.to_string().as_bytes(), &Value::Null).unwrap();
        let text = "The port keeps a ledger";
        let ids = tokenizer.encode(text, false).unwrap();
        assert_eq!(ids, tiny().encode(text, false).unwrap());
    }

    #[test]
    fn tokens_of_the_config_are_added_at_their_ids() {
        let token = |id: &str| json!({"added_tokens_decoder": {id: {"content": "<tool>", "special": true}}});
        let bytes = std::fs::read(directory().join("tokenizer.json")).unwrap();
        // 4096 entries, so the next id is 4096.
        let tokenizer = ModelTokenizer::parse(&bytes, &token("4096")).unwrap();
        assert_eq!(tokenizer.encode("<tool>", false).unwrap(), [4096]);
        let error = ModelTokenizer::parse(&bytes, &token("5000")).unwrap_err();
        assert!(error.contains("cannot have id 5000"), "{error}");
    }

    #[test]
    fn a_missing_file_is_named() {
        let error = ModelTokenizer::load(Path::new("tests"), &Value::Null).unwrap_err();
        assert!(error.to_string().starts_with("cannot read tokenizer.json"));
    }
}
