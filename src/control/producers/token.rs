//! `token-producer`: tokens of the prompt; this version estimates them from bytes.

use serde::Deserialize;

use crate::plugin::{Attributes, Build, Column, Maturity, ParamDoc, Plugin, PluginError};
use crate::request::InferenceRequest;
use crate::request::text::token_count;
use crate::scheduling::attributes::{TOKEN_PRODUCER, TOKENIZED_PROMPT};
use crate::scheduling::{Candidate, DataProducer, ProducerError};

/// Counts the tokens of each prompt: ids the client sent as they are, text at four bytes a token.
/// Publishes nothing for a request without a prompt.
#[derive(Debug)]
pub struct TokenProducer {
    tokens: Column<u64>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
struct Settings {
    estimate: Option<serde_json::Value>,
    vllm: Option<serde_json::Value>,
    model_name: String,
    uds_tokenizer_config: Option<serde_json::Value>,
}

impl Plugin for TokenProducer {
    const TYPE: &'static str = TOKEN_PRODUCER;
    const MATURITY: Maturity = Maturity::Beta;
    const PARAMETERS: &'static [ParamDoc] = &[
        ParamDoc {
            name: "estimate",
            kind: "object",
            default: "{}",
            help: "Count four bytes as one token; media options are not available yet.",
        },
        ParamDoc {
            name: "vllm",
            kind: "object",
            default: "",
            help: "Ask a vLLM render endpoint; not yet available.",
        },
        ParamDoc {
            name: "modelName",
            kind: "string",
            default: "",
            help: "Model for a remote backend; not yet available.",
        },
        ParamDoc {
            name: "udsTokenizerConfig",
            kind: "object",
            default: "",
            help: "Deprecated; not yet available.",
        },
    ];
    const ABOUT: &'static str = "Counts prompt tokens.";

    fn build(build: &mut Build<'_>) -> Result<Self, PluginError> {
        let settings: Settings = build.read::<Self, _>()?;
        let later = |what: &str| {
            Err(PluginError::Invalid(format!(
                "{what} is known but not yet available in this version"
            )))
        };
        if settings.vllm.is_some() || !settings.model_name.is_empty() {
            return later("the vllm backend");
        }
        if settings.uds_tokenizer_config.is_some() {
            return later("udsTokenizerConfig");
        }
        match &settings.estimate {
            None | Some(serde_json::Value::Null) => {}
            Some(serde_json::Value::Object(options)) if options.is_empty() => {}
            Some(_) => return later("estimate: image and video options"),
        }
        Ok(Self {
            tokens: build.keys.produce::<u64>(TOKENIZED_PROMPT),
        })
    }
}

impl DataProducer for TokenProducer {
    fn produce(
        &self,
        request: &InferenceRequest,
        _: &[Candidate],
        attributes: &mut Attributes,
    ) -> Result<(), ProducerError> {
        if !request.payload.prompts.is_empty() {
            let counts = request
                .payload
                .prompts
                .iter()
                .map(|prompt| token_count(prompt, &request.body));
            attributes.write(self.tokens).extend(counts);
        }
        Ok(())
    }
}
