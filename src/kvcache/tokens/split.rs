//! Where a text may be cut so that tokenizing the two sides apart gives the same ids.
//!
//! A tokenizer of the byte-level BPE family works in steps: added tokens are found in the text, the
//! rest is normalized, a regular expression splits it into words, and every word is merged by itself.
//! A cut between characters `a` and `b` is safe when
//!
//! 1. no added token can lie across it ([`Splitter::detect`] checks every added token);
//! 2. the normalizer leaves it alone (none, or NFC: `b` is a starter that composes with nothing
//!    before it, as all characters accepted below are);
//! 3. the word holding `a` ends there, whatever follows, and the words before it are the same when
//!    the text ends there. The expressions have no look-behind, so the words after it do not depend
//!    on what came before.
//!
//! For 3, with the alternatives of the expressions in mind:
//!
//! * `a` not white space, `b` a space: a word that holds a character other than white space can
//!   hold white space only as its first character or, where punctuation may end in `[\r\n]*`, as line
//!   ends at its end. A space is neither, so it fails the same way the end of the text does. Runs of
//!   white space before `a` end before `a`, which is still there for `\s+(?!\S)` to see. Holds for all.
//! * `a` an ASCII letter or digit, `b` a line feed: only words that end in punctuation take line
//!   ends. Holds for all.
//! * `a` a line feed, `b` an ASCII letter or digit: where `\s*[\r\n]+` or `[\r\n]*` took the line
//!   feed it ends there, and both take the longest run, with the text ending there too. GPT-2 has
//!   neither: `\s+(?!\S)` leaves the last of several line feeds to the next word only if a word
//!   follows, so a cut would change it.

use serde_json::Value;

/// `pre_tokenizer` expressions of Llama 3 (and other models after it) as published.
pub(super) const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// Qwen 2 to 3: digits one by one.
pub(super) const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Kimi and Moonlight: Han by itself, letters by case.
pub(super) const KIMI: &str = concat!(
    r"[\p{Han}]+",
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
);

/// The word-splitting expression of a tokenizer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Words {
    /// GPT-2: the expression built into `ByteLevel`.
    Gpt2,
    /// Llama 3, Qwen 2 and Kimi, which differ in digits and letters only.
    LineEnds,
}

/// Why a tokenizer's texts are never cut.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Unsplittable {
    /// Not BPE, or merged with dropout.
    #[error("the model is not plain BPE")]
    Model,
    /// A normalizer other than none or NFC.
    #[error("unknown normalizer")]
    Normalizer,
    /// A pre-tokenizer other than those of GPT-2, Llama 3 and Qwen 2.
    #[error("unknown pre-tokenizer")]
    PreTokenizer,
    /// An added token that looks at its surroundings or may lie across a cut.
    #[error("added token {0:?} may lie across a cut")]
    AddedToken(String),
}

/// Finds safe cuts of one tokenizer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Splitter {
    words: Words,
}

impl Splitter {
    /// Reads a `tokenizer.json`. `added` are further added tokens that it does not list.
    pub fn detect(tokenizer: &Value, added: &[Value]) -> Result<Self, Unsplittable> {
        check_model(&tokenizer["model"])?;
        let nfc = check_normalizer(&tokenizer["normalizer"])?;
        let splitter = Self {
            words: words_of(&tokenizer["pre_tokenizer"]).ok_or(Unsplittable::PreTokenizer)?,
        };
        let listed = tokenizer["added_tokens"].as_array();
        for token in listed.into_iter().flatten().chain(added) {
            splitter.check_added(token, nfc)?;
        }
        Ok(splitter)
    }

    /// For words of the expression `words`, with control tokens of these names.
    pub(super) fn for_words<'a>(
        words: &str,
        control: impl IntoIterator<Item = &'a str>,
    ) -> Result<Self, Unsplittable> {
        if ![LLAMA3, QWEN2, KIMI].contains(&words) {
            return Err(Unsplittable::PreTokenizer);
        }
        let splitter = Self {
            words: Words::LineEnds,
        };
        for name in control {
            splitter.check_added(&serde_json::json!({"content": name}), false)?;
        }
        Ok(splitter)
    }

    /// True when the text may be cut between neighbours `before` and `after`.
    pub fn may_cut(self, before: char, after: char) -> bool {
        match after {
            ' ' => !is_space(before),
            '\n' => before.is_ascii_alphanumeric(),
            _ => self.words == Words::LineEnds && before == '\n' && after.is_ascii_alphanumeric(),
        }
    }

    /// The first safe cut of `text` at or after byte `from`, if any lies before its end.
    pub fn next_cut(self, text: &str, from: usize) -> Option<usize> {
        let bytes = text.as_bytes();
        (from.max(1)..bytes.len()).find(|&at| {
            let (Some(&before), Some(&after)) = (bytes.get(at - 1), bytes.get(at)) else {
                return false;
            };
            // Every cut has an ASCII character behind it, so the rest is skipped without decoding.
            if !after.is_ascii() {
                return false;
            }
            let before = if before.is_ascii() {
                Some(char::from(before))
            } else {
                text.get(..at).and_then(|left| left.chars().next_back())
            };
            before.is_some_and(|before| self.may_cut(before, char::from(after)))
        })
    }

    fn check_added(self, token: &Value, nfc: bool) -> Result<(), Unsplittable> {
        let content = token["content"].as_str().unwrap_or_default();
        let flag = |name: &str| token[name].as_bool().unwrap_or(false);
        let looks_around = flag("lstrip") || flag("rstrip") || flag("single_word");
        // Normalizing could give the token another shape than the one checked here.
        let reshaped = nfc && flag("normalized") && !content.is_ascii();
        let mut pairs = content.chars().zip(content.chars().skip(1));
        if looks_around || reshaped || pairs.any(|(a, b)| self.may_cut(a, b)) {
            return Err(Unsplittable::AddedToken(content.to_owned()));
        }
        Ok(())
    }
}

/// White space as the expressions' `\s` may see it. Wider than Unicode's property where versions of
/// it differ, which only costs a cut.
fn is_space(c: char) -> bool {
    c.is_whitespace() || c.is_control() || matches!(c, '\u{180e}' | '\u{200b}' | '\u{feff}')
}

fn check_model(model: &Value) -> Result<(), Unsplittable> {
    // Old files name no type; `merges` tells them from others.
    let bpe = match model["type"].as_str() {
        Some(name) => name == "BPE",
        None => model["merges"].is_array(),
    };
    let dropout = model["dropout"].as_f64().unwrap_or(0.0) > 0.0;
    let affixes = ["continuing_subword_prefix", "end_of_word_suffix"]
        .iter()
        .any(|name| model[*name].as_str().is_some_and(|affix| !affix.is_empty()));
    if bpe && !dropout && !affixes {
        Ok(())
    } else {
        Err(Unsplittable::Model)
    }
}

/// True for NFC, false for none.
fn check_normalizer(normalizer: &Value) -> Result<bool, Unsplittable> {
    if normalizer.is_null() {
        return Ok(false);
    }
    match normalizer["type"].as_str() {
        Some("NFC") => Ok(true),
        Some("Sequence") => normalizer["normalizers"]
            .as_array()
            .ok_or(Unsplittable::Normalizer)?
            .iter()
            .try_fold(false, |nfc, one| Ok(check_normalizer(one)? || nfc)),
        _ => Err(Unsplittable::Normalizer),
    }
}

fn words_of(pre_tokenizer: &Value) -> Option<Words> {
    match pre_tokenizer["type"].as_str()? {
        "ByteLevel" => byte_level(pre_tokenizer)?.then_some(Words::Gpt2),
        "Sequence" => {
            let [split, bytes] = pre_tokenizer["pretokenizers"].as_array()?.as_slice() else {
                return None;
            };
            let known = split["type"] == "Split"
                && split["behavior"] == "Isolated"
                && split["invert"] == false
                && bytes["type"] == "ByteLevel"
                && !byte_level(bytes)?;
            let expression = split["pattern"]["Regex"].as_str()?;
            (known && [LLAMA3, QWEN2].contains(&expression)).then_some(Words::LineEnds)
        }
        _ => None,
    }
}

/// Whether a `ByteLevel` splits by its own expression; `None` when it adds a space, which it would do
/// once more behind every cut.
fn byte_level(step: &Value) -> Option<bool> {
    let prefix = step["add_prefix_space"].as_bool().unwrap_or(true);
    (!prefix).then(|| step["use_regex"].as_bool().unwrap_or(true))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn gpt2() -> Value {
        json!({
            "model": {"type": "BPE", "dropout": null},
            "normalizer": null,
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "use_regex": true},
            "added_tokens": [{"content": "<|im_end|>", "lstrip": false, "rstrip": false,
                              "single_word": false, "normalized": false}],
        })
    }

    fn refused(change: impl FnOnce(&mut Value)) -> Unsplittable {
        let mut tokenizer = gpt2();
        change(&mut tokenizer);
        Splitter::detect(&tokenizer, &[]).unwrap_err()
    }

    #[test]
    fn cuts_lie_before_a_space_that_follows_a_word() {
        let splitter = Splitter::detect(&gpt2(), &[]).unwrap();
        // 0123456789
        // ab  cd\n\ne f: before the first of two spaces, before a line feed behind a letter, and
        // before the space behind e; never inside a run of white space.
        let text = "ab  cd\n\ne f";
        let cuts: Vec<usize> = (1..text.len())
            .filter(|&at| splitter.next_cut(text, at) == Some(at))
            .collect();
        assert_eq!(cuts, [2, 6, 9]);
        assert_eq!(splitter.next_cut(text, 10), None);
    }

    #[test]
    fn line_end_before_a_word_is_a_cut_only_where_line_ends_are_words() {
        assert!(!Splitter { words: Words::Gpt2 }.may_cut('\n', 'e'));
        assert!(
            Splitter {
                words: Words::LineEnds
            }
            .may_cut('\n', 'e')
        );
        // Punctuation takes the line feed with it.
        assert!(
            !Splitter {
                words: Words::LineEnds
            }
            .may_cut('.', '\n')
        );
    }

    #[test]
    fn multibyte_text_is_cut_between_characters_only() {
        let splitter = Splitter { words: Words::Gpt2 };
        assert_eq!(splitter.next_cut("é é", 1), Some(2));
        // U+3000 is white space of three bytes.
        assert_eq!(splitter.next_cut("\u{3000} a b", 1), Some(5));
    }

    #[test]
    fn what_is_not_proven_is_not_cut() {
        assert_eq!(
            refused(|t| t["model"]["type"] = "Unigram".into()),
            Unsplittable::Model
        );
        assert_eq!(
            refused(|t| t["model"]["dropout"] = 0.1.into()),
            Unsplittable::Model
        );
        assert_eq!(
            refused(|t| t["normalizer"] = json!({"type": "NFKC"})),
            Unsplittable::Normalizer
        );
        assert_eq!(
            refused(|t| t["pre_tokenizer"]["add_prefix_space"] = true.into()),
            Unsplittable::PreTokenizer
        );
        for flag in ["lstrip", "rstrip", "single_word"] {
            let error = refused(|t| t["added_tokens"][0][flag] = true.into());
            assert_eq!(error, Unsplittable::AddedToken("<|im_end|>".into()));
        }
        let error = refused(|t| t["added_tokens"][0]["content"] = "end of".into());
        assert_eq!(error, Unsplittable::AddedToken("end of".into()));
    }

    #[test]
    fn nfc_is_known() {
        let mut tokenizer = gpt2();
        tokenizer["normalizer"] = json!({"type": "Sequence", "normalizers": [{"type": "NFC"}]});
        assert!(Splitter::detect(&tokenizer, &[]).is_ok());
    }
}
