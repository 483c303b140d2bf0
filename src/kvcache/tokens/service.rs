//! [`TokenService`]: the ids of a request's prompts, at once where they are known, else from a worker.

use std::path::PathBuf;
use std::pin::Pin;
use std::sync::{Arc, Weak};
use std::time::Duration;

use hashbrown::HashMap;
use parking_lot::RwLock;

use super::body::Source;
use super::hub::{Hub, HubSettings, Repo};
use super::keeper::Keeper;
use super::memo::{DEFAULT_MEMO_BYTES, MemoStats};
use super::messages::MessageError;
use super::pool::{DEFAULT_QUEUE, Pool, PoolError, PoolStats};
use super::slot::Slot;
use super::stats::{FallbackReason, TokenStats};
use super::template::RenderError;
use super::tokenizer::{EncodeError, LoadError};
use crate::request::{ApiKind, Extent, InferenceRequest, MediaItem, Prompt};

/// How often the files of a model's directory are looked at unless configured.
pub const DEFAULT_POLL: Duration = Duration::from_secs(5);
/// Bytes of a body that the caller's thread decodes and parses, in about 0.1 ms.
pub const INLINE_UNREAD_BYTES: usize = 16 << 10;
/// Bodies up to this size, decoded already but for [`INLINE_UNREAD_BYTES`], are rendered on the caller's thread
/// and looked up in the memo, which takes about 0.2 ms; handing them to another costs more than that.
pub const INLINE_BODY_BYTES: usize = 512 << 10;
/// Text the caller's thread may tokenize: at 3 MB/s about 0.3 ms.
pub const INLINE_TOKENIZE_BYTES: usize = 1 << 10;
/// Largest body read here; larger ones go on without tokens.
pub const MAX_BODY_BYTES: usize = 32 << 20;
/// Prompts of one completion request.
pub const MAX_PROMPTS: usize = 4096;

/// APIs whose prompts are made here.
pub(super) const KNOWN_APIS: [ApiKind; 4] = [
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
    /// How often files are looked at for changes; `None`, never.
    pub poll: Option<Duration>,
    /// The hub that models with a `repo` come from; `None`, as the environment says.
    pub hub: Option<HubSettings>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            models: Vec::new(),
            memo_bytes: DEFAULT_MEMO_BYTES,
            workers: Pool::default_workers(),
            queue: DEFAULT_QUEUE,
            poll: Some(DEFAULT_POLL),
            hub: None,
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
    /// Instead of a directory: where on the hub the files are. They are fetched in the background; until
    /// then the model has no tokenizer.
    pub repo: Option<Repo>,
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
    /// The model's files are not here yet.
    #[error("tokenizer of model {0:?} is not loaded yet")]
    NotLoaded(String),
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
    pub ids: Arc<Vec<u32>>,
    /// Media placed among them; `token_offset` and `tokens` are set.
    pub media: Vec<MediaItem>,
}

impl PromptTokens {
    /// The ids whose block keys can be the engine's: up to the first media item of which nobody said
    /// how the engine calls it.
    pub fn keyed_ids(&self) -> &[u32] {
        let unnamed = self.media.iter().filter(|item| item.identifier.is_none());
        let end = unnamed.map(|item| item.token_offset.unwrap_or(0)).min();
        let end = end.map_or(self.ids.len(), |end| end as usize);
        self.ids.get(..end).unwrap_or(&self.ids)
    }

    /// The media among [`Self::keyed_ids`], by offset, with the engine's name for each.
    pub fn named_media(&self) -> Vec<(&MediaItem, &str)> {
        let end = self.keyed_ids().len();
        let named = self.media.iter().filter_map(|item| {
            let at = item.token_offset.unwrap_or(0) as usize;
            let name = item.identifier.as_deref()?;
            (at < end).then_some((item, name))
        });
        let mut named: Vec<_> = named.collect();
        named.sort_by_key(|(item, _)| item.token_offset);
        named
    }

    /// False when some of the prompt has no keys, because only the engine knows its media.
    pub fn is_whole(&self) -> bool {
        self.keyed_ids().len() == self.ids.len()
    }

    /// A prompt of which the engine's ids are known up to `exact`, where the first medium begins.
    pub(super) fn until(ids: Arc<Vec<u32>>, exact: usize) -> Self {
        let first = MediaItem {
            modality: "image",
            hash: 0,
            identifier: None,
            token_offset: Some(u32::try_from(exact).unwrap_or(u32::MAX)),
            tokens: None,
            extent: Extent::Unknown,
        };
        Self {
            ids,
            media: vec![first],
        }
    }

    pub(super) fn text(ids: Arc<Vec<u32>>) -> Self {
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

/// What is known of one configured model, for admin pages and logs.
#[derive(Debug, Clone)]
pub struct ModelState {
    /// Its name.
    pub name: String,
    /// A tokenizer is in use.
    pub loaded: bool,
    /// Where on the hub its files are, if there: `owner/name` and revision.
    pub repo: Option<Repo>,
    /// The commit of the hub's files that are in use or were tried last.
    pub commit: Option<String>,
    /// Why the newest files are not in use, if they are not.
    pub error: Option<String>,
    /// Why its texts are tokenized whole, which is slow; `None` when they are cut and remembered.
    pub unsplittable: Option<String>,
    /// Counters of its memory.
    pub memo: MemoStats,
}

/// In-process tokenizers of all configured models. Shared by all requests; a model whose files change
/// is replaced whole, and forgets what it remembered.
#[derive(Debug)]
pub struct TokenService {
    /// Model and adapter names to their slot.
    names: HashMap<String, Arc<Slot>>,
    slots: Arc<[Arc<Slot>]>,
    pool: Pool,
    stats: Arc<TokenStats>,
    /// Watches files until it is dropped.
    _keeper: Option<Keeper>,
}

/// Services that run, by the name of their plugin, so that metrics find them.
static PUBLISHED: RwLock<Vec<(String, Weak<TokenService>)>> = RwLock::new(Vec::new());

/// Every running service that was published, with its name.
pub fn published() -> Vec<(String, Arc<TokenService>)> {
    let list = PUBLISHED.read();
    let running = list.iter();
    running
        .filter_map(|(name, service)| Some((name.clone(), service.upgrade()?)))
        .collect()
}

impl TokenService {
    /// Loads every model that is on disk, starts to watch the files and to fetch those of the hub. Blocks
    /// for up to seconds, but for no network: start-up only.
    pub fn load(settings: Settings) -> Result<Self, LoadError> {
        let hub = if settings.models.iter().any(|model| model.repo.is_some()) {
            let hub = Hub::new(settings.hub.unwrap_or_else(HubSettings::from_env));
            Some(Arc::new(hub.map_err(|e| LoadError::invalid("hub", e))?))
        } else {
            None
        };
        let stats = Arc::<TokenStats>::default();
        let mut names = HashMap::new();
        let mut slots = Vec::new();
        for one in settings.models {
            let own = one.adapters.iter().chain([&one.name]);
            let own: Vec<String> = own.cloned().collect();
            let slot = Arc::new(Slot::load(one, settings.memo_bytes, Arc::clone(&stats))?);
            for name in own {
                if let Some(known) = names.insert(name, Arc::clone(&slot)) {
                    return Err(LoadError::invalid(known.name(), "model is named twice"));
                }
            }
            slots.push(slot);
        }
        let slots: Arc<[Arc<Slot>]> = slots.into();
        let started = |error| LoadError::invalid("tokenizer workers", error);
        let pool =
            Pool::new(settings.workers, settings.queue, Arc::clone(&stats)).map_err(started)?;
        let keeper = (settings.poll.is_some() || hub.is_some())
            .then(|| Keeper::start(Arc::clone(&slots), settings.poll, hub));
        Ok(Self {
            names,
            slots,
            pool,
            stats,
            _keeper: keeper.transpose().map_err(started)?,
        })
    }

    /// Lets [`published`] find this service while it lives.
    pub fn publish(self: &Arc<Self>, name: &str) {
        let mut list = PUBLISHED.write();
        list.retain(|(_, service)| service.strong_count() > 0);
        list.push((name.to_owned(), Arc::downgrade(self)));
    }

    /// Reads all directories again, whether they changed or not. On an error the old model stays.
    /// Blocks as [`Self::load`] does.
    pub fn reload(&self) -> Result<(), LoadError> {
        self.slots.iter().try_for_each(|slot| slot.reload())
    }

    /// Everything that is counted, for export.
    pub fn stats(&self) -> &Arc<TokenStats> {
        &self.stats
    }

    /// Counters of the workers.
    pub fn pool_stats(&self) -> PoolStats {
        self.pool.stats()
    }

    /// What is known of every model.
    pub fn models(&self) -> Vec<ModelState> {
        let state = |slot: &Arc<Slot>| {
            let model = slot.model();
            let tokenizer = model.as_ref().map(|model| model.memo.tokenizer());
            let unsplittable = tokenizer.and_then(|t| t.splitter().as_ref().err());
            ModelState {
                name: slot.name().to_owned(),
                loaded: model.is_some(),
                repo: slot.repo().cloned(),
                commit: slot.commit(),
                error: slot.error(),
                unsplittable: unsplittable.map(ToString::to_string),
                memo: model.as_ref().map(|m| m.memo.stats()).unwrap_or_default(),
            }
        };
        self.slots.iter().map(state).collect()
    }

    /// Counters of a model's memory; adapters share those of their base.
    pub fn memo_stats(&self, model: &str) -> Option<MemoStats> {
        let model = self.names.get(model)?.model()?;
        Some(model.memo.stats())
    }

    /// The tokens of `request` for its target model. Bodies up to [`INLINE_BODY_BYTES`] of which little
    /// is still to be read, and at most [`INLINE_TOKENIZE_BYTES`] to be tokenized, are done before this
    /// returns, others by a worker.
    pub fn tokenize(&self, request: &InferenceRequest) -> Answer {
        match self.start(request) {
            Ok(answer) => answer,
            Err(error) => {
                self.stats.fell_back(FallbackReason::of(&error));
                Answer::Ready(Err(error))
            }
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
        let name = &request.target_model;
        let slot = self.names.get(name);
        let slot = slot.ok_or_else(|| TokenizeError::UnknownModel(name.clone()))?;
        let model = slot.model();
        let model = model.ok_or_else(|| TokenizeError::NotLoaded(name.clone()))?;
        let body = Source::of(request);
        if body.len() <= INLINE_BODY_BYTES && body.unread_bytes() <= INLINE_UNREAD_BYTES {
            let inline = model.tokenize(api, &body, INLINE_TOKENIZE_BYTES);
            if let Some(result) = inline.transpose() {
                return result.map(|tokens| Answer::Ready(Ok(tokens)));
            }
        }
        let stats = Arc::clone(&self.stats);
        let work = self.pool.run(move || {
            let tokens = model.tokenize(api, &body, usize::MAX);
            let tokens = tokens.and_then(|t| t.ok_or(TokenizeError::Unsupported("this prompt")));
            if let Err(error) = &tokens {
                stats.fell_back(FallbackReason::of(error));
            }
            tokens
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
            ids: Arc::new(ids.clone()),
            media: media.clone(),
        }),
        Prompt::Text(_) => None,
    });
    let prompts = prompts.collect::<Option<_>>()?;
    Some(Tokenized { prompts })
}

#[cfg(test)]
mod tests;
