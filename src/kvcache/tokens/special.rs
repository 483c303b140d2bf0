//! Tokens that a model's configuration names or adds beside its `tokenizer.json`, as transformers reads
//! them: `from_pretrained` of `tokenization_utils_base.py`, `__init__` of `tokenization_utils_tokenizers.py`.

use std::path::Path;

use serde_json::Value as Json;
use tokenizers::{AddedToken, Tokenizer};

use super::tokenizer::{LoadError, MAX_CONFIG_BYTES, read};

/// In the order in which they are added.
const NAMES: [&str; 7] = [
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
];
/// What tells whether `special_tokens_map.json` counts.
const DECODER: &str = "added_tokens_decoder";

/// Special tokens by what configuration calls them.
#[derive(Debug, Clone, Default)]
pub(super) struct SpecialTokens {
    /// With their names, which templates know them by.
    named: Vec<(String, Json)>,
    /// Without.
    extra: Vec<Json>,
}

impl SpecialTokens {
    /// Those of `config`, a `tokenizer_config.json`, and of `special_tokens_map.json` in `directory`, which
    /// counts where the former lists no added tokens, and then first.
    pub(super) fn read(directory: &Path, config: &Json) -> Result<Self, LoadError> {
        const FILE: &str = "special_tokens_map.json";
        if config.get(DECODER).is_some() || !directory.join(FILE).exists() {
            return Ok(Self::of(config));
        }
        let bytes = read(directory, FILE, MAX_CONFIG_BYTES)?;
        let map: Json = serde_json::from_slice(&bytes).map_err(|e| LoadError::invalid(FILE, e))?;
        let mut merged = config.as_object().cloned().unwrap_or_default();
        merged.extend(map.as_object().cloned().unwrap_or_default());
        Ok(Self::of(&merged.into()))
    }

    /// Those of `config` alone.
    pub(super) fn of(config: &Json) -> Self {
        let is_token = |token: &Json| content(token).is_some_and(|text| !text.is_empty());
        let mut named: Vec<(String, Json)> = NAMES
            .iter()
            .map(|name| ((*name).to_owned(), config[*name].clone()))
            .collect();
        let own = config.as_object().into_iter().flatten();
        named.extend(
            own.filter(|(name, _)| name.ends_with("_token") && !NAMES.contains(&name.as_str()))
                .map(|(name, token)| (name.clone(), token.clone())),
        );
        let extra = ["extra_special_tokens", "additional_special_tokens"];
        let extra = extra.map(|name| &config[name]).into_iter().find(|list| {
            list.as_array().is_some_and(|list| !list.is_empty())
                || list.as_object().is_some_and(|map| !map.is_empty())
        });
        for (name, token) in extra.and_then(Json::as_object).into_iter().flatten() {
            named.push((name.clone(), token.clone()));
        }
        named.retain(|(_, token)| is_token(token));
        let list = extra.and_then(Json::as_array).into_iter().flatten();
        Self {
            named,
            extra: list.filter(|token| is_token(token)).cloned().collect(),
        }
    }

    /// Names and texts, for templates.
    pub(super) fn named(&self) -> impl Iterator<Item = (&str, &str)> {
        let named = self.named.iter();
        named.filter_map(|(name, token)| Some((name.as_str(), content(token)?)))
    }

    /// Adds to `tokenizer` what it lacks of these and of the tokens that `config` lists; returns what was
    /// added. A listed token that is there with other flags gets those of the list.
    pub(super) fn add_to(
        &self,
        tokenizer: &mut Tokenizer,
        config: &Json,
    ) -> Result<Vec<Json>, String> {
        let known = tokenizer.get_added_vocabulary().get_added_tokens_decoder();
        let same = |token: &AddedToken| known.values().any(|other| is_same(other, token));
        let listed = config[DECODER].as_object().into_iter().flatten();
        let mut listed: Vec<(u32, &Json)> = listed
            .filter_map(|(id, token)| Some((id.parse().ok()?, token)))
            .filter(|(_, token)| content(token).is_some() && !same(&added(token, false)))
            .collect();
        listed.sort_by_key(|&(id, _)| id);
        let mut texts: Vec<&str> = known.values().map(|token| token.content.as_str()).collect();
        texts.extend(listed.iter().filter_map(|(_, token)| content(token)));
        let mut missing = Vec::new();
        let special = self.named.iter().map(|(_, token)| token);
        for token in special.chain(&self.extra) {
            let text = content(token).unwrap_or_default();
            if !texts.contains(&text) {
                texts.push(text);
                missing.push(token);
            }
        }
        let all = listed.iter().map(|&(id, token)| (Some(id), token, false));
        let all: Vec<_> = all
            .chain(missing.into_iter().map(|t| (None, t, true)))
            .collect();
        let mut done = Vec::with_capacity(all.len());
        for (id, token, special) in all {
            let token = added(token, special);
            let text = token.content.clone();
            done.push(serde_json::to_value(&token).map_err(|e| e.to_string())?);
            tokenizer.add_tokens([token]).map_err(|e| e.to_string())?;
            if id.is_some() && tokenizer.token_to_id(&text) != id {
                let id = id.unwrap_or_default();
                return Err(format!(
                    "token {text:?} of tokenizer_config.json cannot have id {id}"
                ));
            }
        }
        Ok(done)
    }
}

/// The text of a token, which is a string or an object.
fn content(token: &Json) -> Option<&str> {
    token.as_str().or_else(|| token["content"].as_str())
}

/// A token with its flags; `special` if it is so whatever they say.
fn added(token: &Json, special: bool) -> AddedToken {
    let flag = |name: &str| token[name].as_bool();
    let special = special || flag("special").unwrap_or(false);
    AddedToken::from(content(token).unwrap_or_default(), special)
        .lstrip(flag("lstrip").unwrap_or(false))
        .rstrip(flag("rstrip").unwrap_or(false))
        .single_word(flag("single_word").unwrap_or(false))
        .normalized(flag("normalized").unwrap_or(!special))
}

/// Equal in all flags; `==` compares texts.
fn is_same(one: &AddedToken, other: &AddedToken) -> bool {
    let flags = |t: &AddedToken| (t.lstrip, t.rstrip, t.single_word, t.normalized, t.special);
    one.content == other.content && flags(one) == flags(other)
}

#[cfg(test)]
mod tests {
    use super::super::tokenizer::ModelTokenizer;
    use super::super::tokenizer::tests::directory;
    use super::*;

    /// `special_tokens.json` holds configurations and what transformers 5.19 makes of them beside the tiny
    /// model's `tokenizer.json`: names of tokens, and ids of texts.
    #[test]
    fn tokens_are_those_that_transformers_adds() {
        let bytes = std::fs::read(directory().join("special_tokens.json")).unwrap();
        let recorded: Json = serde_json::from_slice(&bytes).unwrap();
        let texts = recorded["texts"].as_array().unwrap();
        let cases = recorded["cases"].as_array().unwrap();
        assert!(cases.len() > 10);
        for case in cases {
            let model = tempfile::tempdir().unwrap();
            let file = |name: &str| model.path().join(name);
            std::fs::copy(directory().join("tokenizer.json"), file("tokenizer.json")).unwrap();
            if !case["map"].is_null() {
                std::fs::write(file("special_tokens_map.json"), case["map"].to_string()).unwrap();
            }
            let config = &case["config"];
            let special = SpecialTokens::read(model.path(), config).unwrap();
            let mut named: Vec<_> = special.named().collect();
            named.sort_unstable();
            let expected = case["named"].as_object().unwrap().iter();
            let mut expected: Vec<_> = expected
                .map(|(name, text)| (name.as_str(), text.as_str().unwrap()))
                .collect();
            expected.sort_unstable();
            assert_eq!(named, expected, "{config}");
            let tokenizer = ModelTokenizer::load(model.path(), config).unwrap();
            for (text, ids) in texts.iter().zip(case["ids"].as_array().unwrap()) {
                let got = tokenizer.encode(text.as_str().unwrap(), false).unwrap();
                assert_eq!(serde_json::json!(got), *ids, "{config} {text}");
            }
        }
    }
}
