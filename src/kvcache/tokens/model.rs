//! [`Model`]: one model's tokenizer and templates, and the ids of a body by them.

use std::path::Path;
use std::sync::Arc;

use minijinja::Value;

use super::anthropic::{self, Rules};
use super::body::Source;
use super::content_format::ContentFormat;
use super::media;
use super::memo::Memo;
use super::messages::{self, MARK, Media, field, keys};
use super::responses;
use super::service::{MAX_PROMPTS, ModelSettings, PromptTokens, TokenizeError, Tokenized};
use super::template::{Chat, Templates};
use super::tokenizer::{LoadError, MAX_CONFIG_BYTES, ModelTokenizer, read};
use crate::request::ApiKind;

/// One loaded model.
#[derive(Debug)]
pub(super) struct Model {
    pub(super) memo: Memo,
    templates: Option<Templates>,
    /// How Anthropic bodies become chats.
    rules: Rules,
    /// Ids that stand for media or lie beside them.
    media_ids: Vec<u32>,
}

impl Model {
    /// Reads the files in `directory`. Blocks for tens to hundreds of milliseconds.
    pub(super) fn load(
        settings: &ModelSettings,
        directory: &Path,
        memo_bytes: usize,
    ) -> Result<Self, LoadError> {
        const CONFIG: &str = "tokenizer_config.json";
        let config: serde_json::Value = if directory.join(CONFIG).exists() {
            let bytes = read(directory, CONFIG, MAX_CONFIG_BYTES)?;
            serde_json::from_slice(&bytes).map_err(|e| LoadError::invalid(CONFIG, e))?
        } else {
            serde_json::Value::Null
        };
        let templates = match &settings.chat_template {
            Some(file) => {
                let name = file.to_string_lossy();
                let bytes = read(directory, &name, MAX_CONFIG_BYTES)?;
                let source = String::from_utf8(bytes).map_err(|e| LoadError::invalid(&name, e))?;
                let special = super::template::special_tokens(directory, &config)?;
                Some(Templates::new(&source, None, special)?)
            }
            None => Templates::load(directory, &config)?,
        };
        let model_config = model_config(directory);
        // gpt-oss does not use its template: engines build its prompt in code.
        let templates = templates.filter(|_| model_config["model_type"] != "gpt_oss");
        let tokenizer = ModelTokenizer::load(directory, &config)?;
        let mut model = Self {
            memo: Memo::new(tokenizer, memo_bytes),
            rules: Rules {
                system_first: templates.as_ref().is_none_or(Templates::system_first),
                disabled_effort: "none",
            },
            templates,
            media_ids: media::ids_of(&model_config),
        };
        model.rules.disabled_effort = model.disabled_effort();
        Ok(model)
    }

    /// The effort that switches thinking off: `none`, unless the template refuses it or takes it for
    /// one of the others.
    fn disabled_effort(&self) -> &'static str {
        let prompt = |effort: &str| {
            let body = serde_json::json!({
                "messages": [{"role": "user", "content": "Hi"}],
                "reasoning_effort": effort,
            });
            let body: Value = serde_json::from_value(body).ok()?;
            self.render(&body, Media::Refuse).ok()
        };
        let none = prompt("none");
        let mut others = ["low", "medium", "high", "xhigh", "max"].into_iter();
        if none.is_none() || others.any(|effort| prompt(effort) == none) {
            "low"
        } else {
            "none"
        }
    }

    /// The tokens of a body, or `None` when more than `budget_bytes` would have to be tokenized.
    pub(super) fn tokenize(
        &self,
        api: ApiKind,
        body: &Source,
        budget_bytes: usize,
    ) -> Result<Option<Tokenized>, TokenizeError> {
        let body = body.parse()?;
        let body = match api {
            ApiKind::Completions => return self.completions(&body, budget_bytes),
            ApiKind::Messages => anthropic::to_chat(&body, self.rules)?,
            ApiKind::Responses => responses::to_chat(&body)?,
            _ => body,
        };
        let special = flag(&body, "add_special_tokens", false)?;
        let text = match self.render(&body, Media::Refuse) {
            Err(TokenizeError::Media) => return self.before_media(&body, special, budget_bytes),
            text => text?,
        };
        let ids = self.memo.encode_within(&text, special, budget_bytes);
        Ok(ids.transpose()?.map(|ids| Tokenized {
            prompts: vec![PromptTokens::text(ids)],
        }))
    }

    /// The tokens of a chat with media, of which those before the first medium are the engine's. How many
    /// tokens a medium becomes, and what it is called, only the engine knows; the ids from there on are
    /// good for counting.
    fn before_media(
        &self,
        body: &Value,
        special: bool,
        budget_bytes: usize,
    ) -> Result<Option<Tokenized>, TokenizeError> {
        let marked = self.render(body, Media::Mark)?;
        let template = self.templates.as_ref().map(|t| t.choose(has_tools(body)));
        let parts = template.is_some_and(|t| t.wants().format == ContentFormat::Parts);
        let (whole, end) = if parts {
            let whole = self.render(body, Media::AsParts)?;
            let end = media::common_bytes(&whole, &marked);
            (whole, end)
        } else {
            let end = marked.find(MARK).ok_or(TokenizeError::Media)?;
            (marked, end)
        };
        let before = whole.get(..end).unwrap_or_default();
        let encode = |text: &str| self.memo.encode_within(text, special, budget_bytes);
        let (Some(ids), Some(known)) = (encode(&whole), encode(before)) else {
            return Ok(None);
        };
        let (ids, known): (Arc<Vec<u32>>, _) = (ids?, known?);
        let is_added = |id: u32| self.memo.tokenizer().is_added(id);
        let exact = media::exact_ids(&ids, &known, parts, is_added, &self.media_ids);
        Ok(Some(Tokenized {
            prompts: vec![PromptTokens::until(ids, exact)],
        }))
    }

    fn completions(
        &self,
        body: &Value,
        budget_bytes: usize,
    ) -> Result<Option<Tokenized>, TokenizeError> {
        for name in ["truncate_prompt_tokens", "prompt_embeds"] {
            if field(body, name).is_some() {
                return Err(TokenizeError::Unsupported(
                    "a prompt that is cut or embedded",
                ));
            }
        }
        let special = flag(body, "add_special_tokens", true)?;
        let mut prompts = Vec::new();
        for prompt in prompts_of(body)? {
            let ids = match prompt.as_str() {
                Some(text) => match self.memo.encode_within(text, special, budget_bytes) {
                    Some(ids) => ids?,
                    None => return Ok(None),
                },
                None => ids_of(&prompt)?.into(),
            };
            prompts.push(PromptTokens::text(ids));
        }
        Ok(Some(Tokenized { prompts }))
    }

    /// The text of a chat.
    fn render(&self, body: &Value, media: Media) -> Result<String, TokenizeError> {
        let templates = self
            .templates
            .as_ref()
            .ok_or(TokenizeError::Unsupported("a chat with this model"))?;
        // Engines refuse both unless told to trust requests, which is not known here.
        if field(body, "chat_template").is_some() || field(body, "truncate_prompt_tokens").is_some()
        {
            return Err(TokenizeError::Unsupported(
                "a chat with its own template or limit",
            ));
        }
        let tools = field(body, "tools")
            .map(|tools| messages::tools(&tools))
            .transpose()?;
        let template = templates.choose(tools.is_some());
        let given = field(body, "messages")
            .ok_or_else(|| TokenizeError::Malformed("no messages".to_owned()))?;
        let chat = Chat {
            messages: messages::conversation(&given, template.wants(), media)?,
            tools,
            documents: field(body, "documents"),
            variables: variables(templates.special(), body)?,
            add_generation_prompt: flag(body, "add_generation_prompt", true)?,
            continue_final_message: flag(body, "continue_final_message", false)?,
        };
        if chat.add_generation_prompt && chat.continue_final_message {
            let both = "continue_final_message with add_generation_prompt";
            return Err(TokenizeError::Malformed(both.to_owned()));
        }
        Ok(template.render(&chat)?)
    }
}

/// What `config.json` says of the model; null without a readable one.
fn model_config(directory: &Path) -> serde_json::Value {
    let config = read(directory, "config.json", MAX_CONFIG_BYTES).ok();
    let config = config.and_then(|bytes| serde_json::from_slice(&bytes).ok());
    config.unwrap_or_default()
}

fn has_tools(body: &Value) -> bool {
    field(body, "tools").is_some()
}

pub(super) fn flag(body: &Value, name: &str, default: bool) -> Result<bool, TokenizeError> {
    match field(body, name) {
        None => Ok(default),
        Some(value) => bool::try_from(value)
            .map_err(|_| TokenizeError::Malformed(format!("{name} is not a boolean"))),
    }
}

/// Variables of a template: special tokens, `chat_template_kwargs`, then fields of the request.
pub(super) fn variables(
    special: &[(String, Value)],
    body: &Value,
) -> Result<Vec<(String, Value)>, TokenizeError> {
    let mut variables = special.to_vec();
    if let Some(options) = field(body, "chat_template_kwargs") {
        for key in keys(&options)? {
            let name = key.as_str().unwrap_or_default();
            if ["chat_template", "tokenize"].contains(&name) {
                return Err(TokenizeError::Malformed(format!(
                    "{name} in chat_template_kwargs"
                )));
            }
            let value = options.get_item(&key).unwrap_or_default();
            variables.push((name.to_owned(), value));
        }
    }
    if let Some(effort) = field(body, "reasoning_effort").filter(|e| e.as_str() != Some("auto")) {
        // Any effort switches thinking on for templates that ask, unless the request says otherwise.
        if !variables.iter().any(|(name, _)| name == "enable_thinking") {
            let thinking = effort.as_str() != Some("none");
            variables.push(("enable_thinking".to_owned(), Value::from(thinking)));
        }
        variables.push(("reasoning_effort".to_owned(), effort));
    }
    Ok(variables)
}

/// The prompts of a completion: a string, a list of strings, of ids, or of lists of ids.
pub(super) fn prompts_of(body: &Value) -> Result<Vec<Value>, TokenizeError> {
    let malformed = |text: &str| TokenizeError::Malformed(text.to_owned());
    let prompt = field(body, "prompt").ok_or_else(|| malformed("no prompt"))?;
    if prompt.as_str().is_some() {
        return Ok(vec![prompt]);
    }
    let list = prompt
        .try_iter()
        .map_err(|_| malformed("prompt is neither text nor a list"))?;
    let list: Vec<Value> = list.collect();
    match list.first() {
        None => Err(malformed("empty prompt")),
        Some(first) if first.is_integer() => Ok(vec![prompt]),
        Some(_) if list.len() > MAX_PROMPTS => Err(malformed("too many prompts")),
        Some(_) => Ok(list),
    }
}

fn ids_of(prompt: &Value) -> Result<Vec<u32>, TokenizeError> {
    let malformed = || TokenizeError::Malformed("prompt is not a list of token ids".to_owned());
    let ids = prompt.try_iter().map_err(|_| malformed())?;
    ids.map(|id| u32::try_from(id).map_err(|_| malformed()))
        .collect()
}
