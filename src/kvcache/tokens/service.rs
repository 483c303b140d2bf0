//! [`TokenService`]: the ids of a request's prompts, at once where they are known, else from a worker.

use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;

use arc_swap::ArcSwap;
use hashbrown::HashMap;
use minijinja::Value;

use super::anthropic::{self, Rules};
use super::memo::{DEFAULT_MEMO_BYTES, Memo, MemoStats};
use super::messages::{self, MessageError, field, keys};
use super::pool::{DEFAULT_QUEUE, Pool, PoolError, PoolStats};
use super::responses;
use super::stats::TokenStats;
use super::template::{Chat, RenderError, Templates};
use super::tokenizer::{EncodeError, LoadError, MAX_CONFIG_BYTES, ModelTokenizer, read};
use crate::request::{ApiKind, Body, InferenceRequest, MediaItem, Prompt};

/// Bodies up to this size are parsed and rendered on the caller's thread, which takes about 0.1 ms.
pub const INLINE_BODY_BYTES: usize = 16 << 10;
/// Text the caller's thread may tokenize: at 3 MB/s about 0.3 ms.
pub const INLINE_TOKENIZE_BYTES: usize = 1 << 10;
/// Largest body read here; larger ones go on without tokens.
pub const MAX_BODY_BYTES: usize = 32 << 20;
/// Prompts of one completion request.
pub const MAX_PROMPTS: usize = 4096;

/// APIs whose prompts are made here.
const KNOWN_APIS: [ApiKind; 4] = [
    ApiKind::Completions,
    ApiKind::ChatCompletions,
    ApiKind::Messages,
    ApiKind::Responses,
];

/// What a [`TokenService`] is made of.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The models, each in a directory of its own.
    pub models: Vec<ModelSettings>,
    /// Bytes of ids remembered per model.
    pub memo_bytes: usize,
    /// Worker threads.
    pub workers: usize,
    /// Jobs that may wait for them.
    pub queue: usize,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            models: Vec::new(),
            memo_bytes: DEFAULT_MEMO_BYTES,
            workers: Pool::default_workers(),
            queue: DEFAULT_QUEUE,
        }
    }
}

/// One model.
#[derive(Debug, Clone, Default)]
pub struct ModelSettings {
    /// Name requests use.
    pub name: String,
    /// Holds `tokenizer.json` and, for chats, `tokenizer_config.json` and the chat template.
    pub directory: PathBuf,
    /// LoRA adapters: other names for the same tokenizer.
    pub adapters: Vec<String>,
    /// Engine flag `--chat-template`: a file that replaces the model's template.
    pub chat_template: Option<PathBuf>,
}

/// Why a request has no tokens. The request goes on without them.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum TokenizeError {
    /// No directory is configured for this model.
    #[error("no tokenizer for model {0:?}")]
    UnknownModel(String),
    /// The API, or something the request asks for, is not tokenized here.
    #[error("{0} is not tokenized here")]
    Unsupported(&'static str),
    /// The body has not the form its API asks for; the engine will refuse it.
    #[error("malformed request: {0}")]
    Malformed(String),
    /// The prompt holds media, whose tokens only the engine knows.
    #[error("media in the prompt")]
    Media,
    /// The body is larger than [`MAX_BODY_BYTES`].
    #[error("body is larger than {MAX_BODY_BYTES} bytes")]
    TooLarge,
    /// The chat template failed.
    #[error(transparent)]
    Render(#[from] RenderError),
    /// The tokenizer failed.
    #[error(transparent)]
    Encode(#[from] EncodeError),
    /// The workers are busy.
    #[error(transparent)]
    Pool(#[from] PoolError),
    /// It took too long, in seconds.
    #[error("no tokens within {0} s")]
    Late(f64),
    /// An engine that was asked did not answer as hoped.
    #[error("remote tokenizer: {0}")]
    Remote(String),
}

impl From<MessageError> for TokenizeError {
    fn from(error: MessageError) -> Self {
        match error {
            MessageError::Media => Self::Media,
            MessageError::Unsupported(what) => Self::Unsupported(what),
            MessageError::Invalid(what) => Self::Malformed(what.to_owned()),
        }
    }
}

/// The prompts of one request, in order.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Tokenized {
    /// One for each prompt.
    pub prompts: Vec<PromptTokens>,
}

/// One prompt as the engine will compute it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PromptTokens {
    /// Token ids.
    pub ids: Arc<[u32]>,
    /// Media placed among them; `token_offset` and `tokens` are set.
    pub media: Vec<MediaItem>,
}

impl PromptTokens {
    fn text(ids: Arc<[u32]>) -> Self {
        Self {
            ids,
            media: Vec::new(),
        }
    }
}

/// Tokens that are not there yet. Dropping it gives the work up if no worker has begun.
pub type Pending = Pin<Box<dyn Future<Output = Result<Tokenized, TokenizeError>> + Send>>;

/// Answer of [`TokenService::tokenize`].
pub enum Answer {
    /// Everything was known or cheap.
    Ready(Result<Tokenized, TokenizeError>),
    /// A worker is on it.
    Pending(Pending),
}

impl std::fmt::Debug for Answer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Ready(result) => f.debug_tuple("Ready").field(result).finish(),
            Self::Pending(_) => f.write_str("Pending"),
        }
    }
}

impl Answer {
    /// The result, waiting for the worker if need be.
    pub async fn wait(self) -> Result<Tokenized, TokenizeError> {
        match self {
            Self::Ready(result) => result,
            Self::Pending(work) => work.await,
        }
    }
}

/// One loaded model.
#[derive(Debug)]
struct Model {
    memo: Memo,
    templates: Option<Templates>,
    /// How Anthropic bodies become chats.
    rules: Rules,
}

/// In-process tokenizers of all configured models. Shared by all requests; models are replaced whole.
#[derive(Debug)]
pub struct TokenService {
    settings: Settings,
    models: ArcSwap<HashMap<String, Arc<Model>>>,
    pool: Pool,
    stats: Arc<TokenStats>,
}

impl TokenService {
    /// Loads every model. Blocks for up to seconds: start-up only.
    pub fn load(settings: Settings) -> Result<Self, LoadError> {
        let models = load_models(&settings)?;
        let stats = Arc::<TokenStats>::default();
        let pool = Pool::new(settings.workers, settings.queue, Arc::clone(&stats))
            .map_err(|e| LoadError::invalid("tokenizer workers", e))?;
        Ok(Self {
            settings,
            models: ArcSwap::from_pointee(models),
            pool,
            stats,
        })
    }

    /// Reads all directories again. What was remembered is forgotten; on an error the old models
    /// stay. Blocks as [`Self::load`] does.
    pub fn reload(&self) -> Result<(), LoadError> {
        self.models.store(Arc::new(load_models(&self.settings)?));
        Ok(())
    }

    /// Everything that is counted, for export.
    pub fn stats(&self) -> &Arc<TokenStats> {
        &self.stats
    }

    /// Counters of the workers.
    pub fn pool_stats(&self) -> PoolStats {
        self.pool.stats()
    }

    /// Counters of a model's memory; adapters share those of their base.
    pub fn memo_stats(&self, model: &str) -> Option<MemoStats> {
        self.models
            .load()
            .get(model)
            .map(|model| model.memo.stats())
    }

    /// Why texts of `model` are tokenized whole, for readiness and logs; `None` when they are cut.
    pub fn unsplittable(&self, model: &str) -> Option<String> {
        let models = self.models.load();
        let splitter = models.get(model)?.memo.tokenizer().splitter().as_ref();
        splitter.err().map(ToString::to_string)
    }

    /// The tokens of `request` for its target model. Bodies up to [`INLINE_BODY_BYTES`] of which at
    /// most [`INLINE_TOKENIZE_BYTES`] are new are done before this returns, others by a worker.
    pub fn tokenize(&self, request: &InferenceRequest) -> Answer {
        match self.start(request) {
            Ok(answer) => answer,
            Err(error) => Answer::Ready(Err(error)),
        }
    }

    fn start(&self, request: &InferenceRequest) -> Result<Answer, TokenizeError> {
        if let Some(tokens) = supplied(request) {
            return Ok(Answer::Ready(Ok(tokens)));
        }
        let api = request.payload.api;
        if !KNOWN_APIS.contains(&api) {
            return Err(TokenizeError::Unsupported("this API"));
        }
        if request.body.len() > MAX_BODY_BYTES {
            return Err(TokenizeError::TooLarge);
        }
        let models = self.models.load();
        let model = models
            .get(&request.target_model)
            .ok_or_else(|| TokenizeError::UnknownModel(request.target_model.clone()))?;
        if request.body.len() <= INLINE_BODY_BYTES {
            let inline = model.tokenize(api, &request.body, INLINE_TOKENIZE_BYTES);
            if let Some(result) = inline.transpose() {
                return result.map(|tokens| Answer::Ready(Ok(tokens)));
            }
        }
        let (model, body) = (Arc::clone(model), request.body.clone());
        let work = self.pool.run(move || {
            let tokens = model.tokenize(api, &body, usize::MAX)?;
            tokens.ok_or(TokenizeError::Unsupported("this prompt"))
        })?;
        Ok(Answer::Pending(Box::pin(async move { work.await? })))
    }
}

/// Ids the client sent, when every prompt has them.
pub fn supplied(request: &InferenceRequest) -> Option<Tokenized> {
    if request.payload.prompts.is_empty() {
        return None;
    }
    let prompts = request.payload.prompts.iter().map(|prompt| match prompt {
        Prompt::Tokens { ids, media } => Some(PromptTokens {
            ids: Arc::from(ids.as_slice()),
            media: media.clone(),
        }),
        Prompt::Text(_) => None,
    });
    let prompts = prompts.collect::<Option<_>>()?;
    Some(Tokenized { prompts })
}

fn load_models(settings: &Settings) -> Result<HashMap<String, Arc<Model>>, LoadError> {
    let mut models = HashMap::new();
    for one in &settings.models {
        let model = Arc::new(Model::load(one, settings.memo_bytes)?);
        for name in one.adapters.iter().chain([&one.name]) {
            if models.insert(name.clone(), Arc::clone(&model)).is_some() {
                return Err(LoadError::invalid(name, "model is named twice"));
            }
        }
    }
    Ok(models)
}

impl Model {
    fn load(settings: &ModelSettings, memo_bytes: usize) -> Result<Self, LoadError> {
        const CONFIG: &str = "tokenizer_config.json";
        let directory = settings.directory.as_path();
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
        let templates = templates.filter(|_| !speaks_harmony(directory));
        let tokenizer = ModelTokenizer::load(directory, &config)?;
        let mut model = Self {
            memo: Memo::new(tokenizer, memo_bytes),
            rules: Rules {
                system_first: templates.as_ref().is_none_or(Templates::system_first),
                disabled_effort: "none",
            },
            templates,
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
            self.render(&body).ok()
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
    fn tokenize(
        &self,
        api: ApiKind,
        body: &Body,
        budget_bytes: usize,
    ) -> Result<Option<Tokenized>, TokenizeError> {
        let body = parse(body)?;
        let body = match api {
            ApiKind::Completions => return self.completions(&body, budget_bytes),
            ApiKind::Messages => anthropic::to_chat(&body, self.rules)?,
            ApiKind::Responses => responses::to_chat(&body)?,
            _ => body,
        };
        let special = flag(&body, "add_special_tokens", false)?;
        let text = self.render(&body)?;
        let ids = self.memo.encode_within(&text, special, budget_bytes);
        Ok(ids.transpose()?.map(|ids| Tokenized {
            prompts: vec![PromptTokens::text(ids)],
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
    fn render(&self, body: &Value) -> Result<String, TokenizeError> {
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
            messages: messages::conversation(&given, template.wants())?,
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

/// gpt-oss does not use its template: engines build its prompt in code.
fn speaks_harmony(directory: &std::path::Path) -> bool {
    let config = read(directory, "config.json", MAX_CONFIG_BYTES).ok();
    let config = config.and_then(|bytes| serde_json::from_slice::<serde_json::Value>(&bytes).ok());
    config.is_some_and(|config| config["model_type"] == "gpt_oss")
}

/// The body as a value whose objects keep their order, as Python's do.
pub(super) fn parse(body: &Body) -> Result<Value, TokenizeError> {
    let parsed = match body.pieces() {
        [piece] => serde_json::from_slice(piece),
        _ => serde_json::from_slice(&body.copy_range(0..body.len())),
    };
    parsed.map_err(|e| TokenizeError::Malformed(e.to_string()))
}

pub(super) fn flag(body: &Value, name: &str, default: bool) -> Result<bool, TokenizeError> {
    match field(body, name) {
        None => Ok(default),
        Some(value) => bool::try_from(value)
            .map_err(|_| TokenizeError::Malformed(format!("{name} is not a boolean"))),
    }
}

/// Variables of a template: special tokens, `chat_template_kwargs`, then fields of the request.
fn variables(
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

#[cfg(test)]
mod tests;
