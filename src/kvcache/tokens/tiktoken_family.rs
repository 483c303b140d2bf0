//! Which family of models a vocabulary of tiktoken belongs to.
//!
//! Told by `tokenizer_class` of `tokenizer_config.json`, else by the vocabulary's name. Known are Qwen 1
//! (`QWenTokenizer`), HunYuan (`HYTokenizer`), Kimi and Moonlight (`TikTokenTokenizer`), and what Hugging
//! Face's `TikTokenConverter` reads: a `tiktoken.model` without a class of its own, with the word
//! expression of Llama 3 unless the configuration has a `pattern`. Anything else is refused: ids made by
//! the wrong rules would match nothing, or the wrong prompts, and nobody would notice.

use hashbrown::HashMap;
use serde_json::Value;

use super::split::{KIMI, LLAMA3, QWEN2};
use super::tiktoken::FILE;

/// Control tokens that Kimi's tokenizer has above its ranks, named or not.
const KIMI_RESERVED: u32 = 256;
/// Control tokens `<|extra_0|>` and so on of Qwen 1 and HunYuan behind the named ones.
const EXTRA: u32 = 205;
/// Classes of `transformers` that read a vocabulary without code of the model's own.
const CONVERTED: [&str; 4] = [
    "PreTrainedTokenizer",
    "PreTrainedTokenizerFast",
    "TokenizersBackend",
    "TikTokenConverter",
];

/// How one family of models uses its vocabulary.
#[derive(Debug)]
pub(super) struct Family {
    /// Expression that finds words.
    pub(super) words: String,
    /// Texts are normalized first.
    pub(super) nfc: bool,
    /// Long texts are cut at places of the tokenizer's own.
    pub(super) cuts: bool,
    /// Control tokens with their ids.
    pub(super) control: Vec<(String, u32)>,
}

impl Family {
    /// Of the vocabulary `file` with `ranks` ranks. `config` is `tokenizer_config.json`, `model`
    /// `config.json`; null where there is none. The error says why it cannot be known.
    pub(super) fn of(
        file: &str,
        config: &Value,
        model: &Value,
        ranks: u32,
    ) -> Result<Self, String> {
        let class = config["tokenizer_class"].as_str().unwrap_or_default();
        match class {
            "QWenTokenizer" => Self::qwen(model, ranks),
            "HYTokenizer" => Ok(Self::hunyuan(ranks)),
            "TikTokenTokenizer" => Self::kimi(config, model, ranks),
            "" => match file {
                "qwen.tiktoken" => Self::qwen(model, ranks),
                "hy.tiktoken" => Ok(Self::hunyuan(ranks)),
                _ if file == FILE || config["pattern"].is_string() => Ok(Self::converted(config)),
                _ => Err(
                    "no tokenizer_class and no pattern in tokenizer_config.json: whose \
                          vocabulary it is cannot be known"
                        .to_owned(),
                ),
            },
            class if CONVERTED.contains(&class) => {
                if file == FILE || config["pattern"].is_string() {
                    return Ok(Self::converted(config));
                }
                Err(format!(
                    "{class} reads {FILE} only, and tokenizer_config.json has no pattern"
                ))
            }
            class => Err(format!(
                "tokenizer_class {class} is not known: its words and control tokens are in code"
            )),
        }
    }

    /// Of the text models. Those with pictures or sound have control tokens more, and put what they
    /// stand for among them.
    fn qwen(model: &Value, ranks: u32) -> Result<Self, String> {
        if let Some(sense) = ["visual", "audio"]
            .iter()
            .find(|key| !model[**key].is_null())
        {
            return Err(format!(
                "Qwen with {sense}: its control tokens are in code and not known"
            ));
        }
        let named = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"];
        Ok(Self::with_extra(&named, ranks))
    }

    fn hunyuan(ranks: u32) -> Self {
        let named = [
            "<|endoftext|>",
            "<|startoftext|>",
            "<|bos|>",
            "<|eos|>",
            "<|pad|>",
        ];
        Self::with_extra(&named, ranks)
    }

    fn with_extra(named: &[&str], ranks: u32) -> Self {
        let named = named.iter().map(|name| (*name).to_owned());
        let extra = (0..EXTRA).map(|number| format!("<|extra_{number}|>"));
        Self {
            words: QWEN2.to_owned(),
            nfc: true,
            cuts: false,
            control: named.chain(extra).zip(ranks..).collect(),
        }
    }

    fn kimi(config: &Value, model: &Value, ranks: u32) -> Result<Self, String> {
        let named: HashMap<u32, String> = added_tokens(config).map(|(t, id)| (id, t)).collect();
        let kind = model["model_type"].as_str().unwrap_or_default();
        if kind == "kimi_audio" || named.values().any(|name| name.contains("kimia")) {
            return Err("Kimi-Audio: its prompts are made in code and not known".to_owned());
        }
        let control = (ranks..ranks.saturating_add(KIMI_RESERVED)).map(|id| {
            let name = named.get(&id).cloned();
            (
                name.unwrap_or_else(|| format!("<|reserved_token_{id}|>")),
                id,
            )
        });
        Ok(Self {
            words: KIMI.to_owned(),
            nfc: false,
            cuts: true,
            control: control.collect(),
        })
    }

    fn converted(config: &Value) -> Self {
        Self {
            words: config["pattern"].as_str().unwrap_or(LLAMA3).to_owned(),
            nfc: false,
            cuts: false,
            control: added_tokens(config).collect(),
        }
    }
}

/// Content and id of each entry of `added_tokens_decoder`.
fn added_tokens(config: &Value) -> impl Iterator<Item = (String, u32)> {
    let decoder = config["added_tokens_decoder"].as_object();
    decoder.into_iter().flatten().filter_map(|(id, token)| {
        let content = token["content"].as_str().filter(|c| !c.is_empty())?;
        Some((content.to_owned(), id.parse().ok()?))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn family(file: &str, class: Option<&str>, model: &Value) -> Result<Family, String> {
        let config = json!({"tokenizer_class": class});
        Family::of(file, &config, model, 1000)
    }

    fn id(family: &Family, name: &str) -> Option<u32> {
        let mut named = family.control.iter();
        named.find(|(known, _)| known == name).map(|(_, id)| *id)
    }

    #[test]
    fn hunyuan_and_qwen_are_told_apart_by_class_and_by_file() {
        for hunyuan in [
            family("hy.tiktoken", Some("HYTokenizer"), &Value::Null),
            family("hy.tiktoken", None, &Value::Null),
        ] {
            // As `tokenization_hy.py` numbers them.
            let hunyuan = hunyuan.unwrap();
            assert_eq!(id(&hunyuan, "<|startoftext|>"), Some(1001));
            assert_eq!(id(&hunyuan, "<|pad|>"), Some(1004));
            assert_eq!(id(&hunyuan, "<|extra_0|>"), Some(1005));
            assert_eq!(id(&hunyuan, "<|im_start|>"), None);
        }
        for qwen in [
            family("qwen.tiktoken", Some("QWenTokenizer"), &Value::Null),
            family("qwen.tiktoken", None, &json!({"model_type": "qwen"})),
        ] {
            let qwen = qwen.unwrap();
            assert_eq!(id(&qwen, "<|im_start|>"), Some(1001));
            assert_eq!(id(&qwen, "<|extra_0|>"), Some(1003));
        }
    }

    #[test]
    fn what_cannot_be_known_is_refused_with_its_reason() {
        let refused = |file: &str, class: Option<&str>, model: &Value| {
            family(file, class, model).unwrap_err()
        };
        let none = Value::Null;
        for (file, class, model, reason) in [
            (
                "cl100k_base.tiktoken",
                Some("Phi3SmallTokenizer"),
                &none,
                "Phi3SmallTokenizer",
            ),
            (
                "arcade100k.tiktoken",
                Some("Arcade100kTokenizer"),
                &none,
                "Arcade100kTokenizer",
            ),
            ("o200k_base.tiktoken", None, &none, "whose vocabulary"),
            (
                "o200k_base.tiktoken",
                Some("PreTrainedTokenizerFast"),
                &none,
                "no pattern",
            ),
            (
                "qwen.tiktoken",
                Some("QWenTokenizer"),
                &json!({"visual": {}}),
                "visual",
            ),
            ("qwen.tiktoken", None, &json!({"audio": {}}), "audio"),
            (
                FILE,
                Some("TikTokenTokenizer"),
                &json!({"model_type": "kimi_audio"}),
                "Kimi-Audio",
            ),
        ] {
            let error = refused(file, class, model);
            assert!(error.contains(reason), "{file} {class:?}: {error}");
        }
        let config = json!({"tokenizer_class": "TikTokenTokenizer",
            "added_tokens_decoder": {"1010": {"content": "<|im_kimia_text_blank|>"}}});
        assert!(Family::of(FILE, &config, &none, 1000).is_err());
    }

    #[test]
    fn a_pattern_of_the_configuration_is_taken_for_any_file() {
        let config = json!({"pattern": r"\w+|\W+", "tokenizer_class": "PreTrainedTokenizerFast"});
        let family = Family::of("o200k_base.tiktoken", &config, &Value::Null, 1000).unwrap();
        assert_eq!(family.words, r"\w+|\W+");
        let plain = Family::of(FILE, &Value::Null, &Value::Null, 1000).unwrap();
        assert_eq!(plain.words, LLAMA3);
    }
}
