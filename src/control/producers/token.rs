//! `token-producer`: tokens of the prompt, counted by an estimate or made by a tokenizer.

use std::any::Any;
use std::cell::Cell;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use metrics::Counter;
use serde::Deserialize;
use smallvec::SmallVec;

use super::media_tokens::{EstimateSettings, MediaEstimate, VideoHints};
use super::token_metrics::TokenObserver;
use crate::datalayer::Endpoint;
use crate::kvcache::tokens::hub::Repo;
use crate::kvcache::tokens::remote::{RemoteSettings, RemoteTokenizer};
use crate::kvcache::tokens::service::{
    Answer, ModelSettings, Pending, PromptTokens, Settings as TokenSettings, TokenService,
    TokenizeError, Tokenized, supplied,
};
use crate::plugin::duration::GoDuration;
use crate::plugin::{
    Attributes, Build, Column, Maturity, ParamDoc, ParamError, Plugin, PluginError,
};
use crate::request::text::token_count;
use crate::request::{EarlyWork, Headers, InferenceRequest, MediaItem, Prompt};
use crate::scheduling::attributes::{
    MEDIA_FEATURES, MediaFeature, TOKEN_IDS, TOKEN_PRODUCER, TOKENIZED_PROMPT,
};
use crate::scheduling::{Candidate, DataProducer, Preparation, ProducerError};
use crate::telemetry::metrics::register;

/// Engine that the vllm backend asks unless configured.
const DEFAULT_ENGINE: &str = "http://localhost:8000";
/// How long a prompt may wait for this process's tokenizer: a megabyte takes a third of a second.
const LOCAL_TIMEOUT: Duration = Duration::from_secs(5);
/// What the preparation may take beyond its own limit before it counts as failed.
const TIMEOUT_MARGIN: Duration = Duration::from_secs(1);

/// Tokens that the media of one request count together, about the largest context a model has; past
/// it every further item counts one. Sizes come from clients (headers, image headers), and the prefix
/// hash is as long as they say.
const MAX_MEDIA_TOKENS: u32 = 1 << 20;

/// Counts the tokens of each prompt: ids the client sent as they are, text at four bytes a token,
/// media as `media_tokens.rs` estimates them. Publishes nothing for a request without a
/// prompt, and no media features for one without media, which costs it nothing.
#[derive(Debug)]
pub struct TokenProducer {
    tokenizer: Tokenizer,
    /// Kept, since metrics ask it only as long as it lives.
    _observer: Option<Arc<TokenObserver>>,
    ready: Counter,
    waited: Counter,
    failed: Counter,
    tokens: Column<u64>,
    ids: Column<PromptTokens>,
    features: Column<MediaFeature>,
    estimate: MediaEstimate,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
struct Settings {
    estimate: Option<EstimateSettings>,
    vllm: Option<Vllm>,
    local: Option<Local>,
    model_name: String,
    uds_tokenizer_config: Option<serde_json::Value>,
}

/// The `vllm` backend.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
struct Vllm {
    url: String,
    timeout: String,
    mm_timeout: String,
}

/// The `local` backend.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
struct Local {
    models: Vec<LocalModel>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
struct LocalModel {
    name: String,
    directory: PathBuf,
    repo: String,
    revision: String,
    adapters: Vec<String>,
    chat_template: Option<PathBuf>,
}

/// Who turns prompts into ids.
#[derive(Debug)]
enum Tokenizer {
    /// Nobody: tokens are counted only.
    None,
    /// An engine, over HTTP.
    Remote {
        remote: Arc<RemoteTokenizer>,
        timeout: Duration,
    },
    /// This process.
    Local(Arc<TokenService>),
}

impl Plugin for TokenProducer {
    const TYPE: &'static str = TOKEN_PRODUCER;
    const MATURITY: Maturity = Maturity::Beta;
    const PARAMETERS: &'static [ParamDoc] = &[
        ParamDoc {
            name: "estimate",
            kind: "object",
            default: "{}",
            help: "Count four bytes as one token, and media by `image` (`mode` dynamic|static, `defaultResolution`, `dynamic.factor`, `static.staticToken`) and `video` (`defaultResolution`, `defaultDuration` in seconds, `tokensPerFrame`, `frames`, `maxVideoTokens`).",
        },
        ParamDoc {
            name: "vllm",
            kind: "object",
            default: "",
            help: "Ask a vLLM: `url` (http://localhost:8000), `timeout` (5s), `mmTimeout` (30s, for content that is a list). Uses the render routes, or /tokenize where they are closed.",
        },
        ParamDoc {
            name: "local",
            kind: "object",
            default: "",
            help: "Tokenize in this process: `models`, each with `name`, `directory` (tokenizer.json, tokenizer_config.json, chat template), `adapters` and `chatTemplate` (a file). Instead of a directory, `repo` (owner/name on the Hugging Face hub, which `name` defaults to) and `revision` (main) are fetched in the background into the hub's cache; `HF_ENDPOINT`, `HF_TOKEN`, `HF_HOME`, `HF_HUB_CACHE`, `HF_HUB_OFFLINE` and `HTTPS_PROXY` mean what they mean to engines.",
        },
        ParamDoc {
            name: "modelName",
            kind: "string",
            default: "",
            help: "Model the vllm backend asks for; required with it, and selects it when given alone.",
        },
        ParamDoc {
            name: "udsTokenizerConfig",
            kind: "object",
            default: "",
            help: "Deprecated; not available: use `local`.",
        },
    ];
    const ABOUT: &'static str =
        "Counts prompt tokens, and makes their ids where a tokenizer is configured.";

    fn build(build: &mut Build<'_>) -> Result<Self, PluginError> {
        let settings: Settings = build.read::<Self, _>()?;
        let tokenizer = settings.tokenizer(build.name)?;
        let name = build.name.to_owned();
        let observer = match &tokenizer {
            Tokenizer::Local(service) => {
                let stats = Arc::clone(service.stats());
                Some(Arc::new(TokenObserver::new(&name, stats)))
            }
            _ => None,
        };
        if let Some(observer) = &observer {
            register(observer);
        }
        let requests = |result: &'static str| {
            metrics::counter!("pinpod_token_producer_requests_total",
                "plugin_name" => name.clone(), "result" => result)
        };
        Ok(Self {
            _observer: observer,
            tokenizer,
            ready: requests("ready"),
            waited: requests("waited"),
            failed: requests("failed"),
            estimate: settings.estimate.unwrap_or_default().resolve()?,
            tokens: build.keys.produce(TOKENIZED_PROMPT),
            ids: build.keys.produce(TOKEN_IDS),
            features: build.keys.produce(MEDIA_FEATURES),
        })
    }
}

impl Settings {
    fn tokenizer(&self, name: &str) -> Result<Tokenizer, PluginError> {
        if self.uds_tokenizer_config.is_some() {
            return Err(PluginError::Invalid(
                "udsTokenizerConfig is known but not available: use the local backend".to_owned(),
            ));
        }
        let remote = self.vllm.is_some() || !self.model_name.is_empty();
        let chosen = [self.estimate.is_some(), remote, self.local.is_some()];
        if chosen.into_iter().filter(|chosen| *chosen).count() > 1 {
            return Err(ParamError(
                "exactly one backend: estimate, vllm (also chosen by modelName) or local"
                    .to_owned(),
            )
            .into());
        }
        match &self.local {
            Some(local) => local.load(name),
            None if remote => self
                .vllm
                .as_ref()
                .unwrap_or(&Vllm::default())
                .connect(&self.model_name),
            None => Ok(Tokenizer::None),
        }
    }
}

impl Vllm {
    fn connect(&self, model: &str) -> Result<Tokenizer, PluginError> {
        if model.is_empty() {
            return Err(ParamError("modelName: required with the vllm backend".to_owned()).into());
        }
        let url = if self.url.is_empty() {
            DEFAULT_ENGINE
        } else {
            &self.url
        };
        let mut settings = RemoteSettings::new(url, model);
        let limits = [
            ("vllm.timeout", &self.timeout, &mut settings.timeout),
            (
                "vllm.mmTimeout",
                &self.mm_timeout,
                &mut settings.media_timeout,
            ),
        ];
        for (field, text, limit) in limits {
            if !text.is_empty() {
                let parsed = text.parse::<GoDuration>();
                *limit = parsed
                    .map_err(|error| ParamError(format!("{field}: {error}")))?
                    .0;
            }
        }
        let timeout = settings.timeout.max(settings.media_timeout);
        let remote = RemoteTokenizer::new(settings)
            .map_err(|error| ParamError(format!("vllm.url: {error}")))?;
        Ok(Tokenizer::Remote { remote, timeout })
    }
}

impl Local {
    fn load(&self, name: &str) -> Result<Tokenizer, PluginError> {
        let models = self.models.iter().map(LocalModel::resolve);
        let settings = TokenSettings {
            models: models.collect::<Result<_, _>>()?,
            ..TokenSettings::default()
        };
        if settings.models.is_empty() {
            return Err(ParamError("local.models: at least one model".to_owned()).into());
        }
        let service = TokenService::load(settings)
            .map_err(|error| ParamError(format!("local.models: {error}")))?;
        let service = Arc::new(service);
        service.publish(name);
        Ok(Tokenizer::Local(service))
    }
}

impl LocalModel {
    fn resolve(&self) -> Result<ModelSettings, ParamError> {
        let refuse = |what: &str| Err(ParamError(format!("local.models: {what}")));
        let no_directory = self.directory.as_os_str().is_empty();
        let repo = match (self.repo.is_empty(), no_directory) {
            (true, true) => return refuse("directory or repo is required"),
            (false, false) => return refuse("directory and repo exclude each other"),
            (true, false) if !self.revision.is_empty() => return refuse("revision without repo"),
            (true, false) => None,
            (false, true) => match Repo::new(&self.repo, &self.revision) {
                Ok(repo) => Some(repo),
                Err(error) => return refuse(&error.to_string()),
            },
        };
        let template = self.chat_template.as_ref();
        if repo.is_some() && template.is_some_and(|path| path.is_relative()) {
            return refuse("chatTemplate has to be an absolute path beside repo");
        }
        let name = if self.name.is_empty() {
            &self.repo
        } else {
            &self.name
        };
        Ok(ModelSettings {
            name: name.clone(),
            directory: self.directory.clone(),
            repo,
            adapters: self.adapters.clone(),
            chat_template: self.chat_template.clone(),
        })
    }
}

type Answered = Result<Tokenized, TokenizeError>;

/// An answer found while asking whether there is something to wait for, kept for the call that
/// publishes it. The director makes both calls for one request before it turns to another.
struct Ready {
    producer: *const TokenProducer,
    request: *const InferenceRequest,
    answered: Answered,
}

thread_local! {
    static READY: Cell<Option<Ready>> = const { Cell::new(None) };
}

impl TokenProducer {
    /// The answer of [`DataProducer::prepare`] to this very request, or a new one.
    fn ready(&self, service: &TokenService, request: &InferenceRequest) -> Option<Answered> {
        let known = READY.take().filter(|ready| {
            std::ptr::eq(ready.producer, self) && std::ptr::eq(ready.request, request)
        });
        match known {
            Some(ready) => Some(ready.answered),
            None => match service.tokenize(request) {
                Answer::Ready(answered) => Some(answered),
                Answer::Pending(_) => None,
            },
        }
    }

    /// What the prompts are made of without asking anyone.
    fn count(&self, request: &InferenceRequest, attributes: &mut Attributes) {
        if request.payload.prompts.is_empty() {
            return;
        }
        let mut media = MediaReader::new(&self.estimate, &request.headers);
        let prompts = request.payload.prompts.iter().zip(0..);
        let counts = prompts.map(|(prompt, index)| {
            if let Prompt::Tokens { media: items, .. } = prompt {
                for item in items {
                    media.read(index, item, item.token_offset.unwrap_or(0).into());
                }
            }
            let early = request.early.as_deref().filter(|_| index == 0);
            token_count(prompt, &request.body, early, &mut |item, offset| {
                media.read(index, item, offset).into()
            })
        });
        attributes.write(self.tokens).extend(counts);
        if !media.features.is_empty() {
            attributes.write(self.features).extend(media.features);
        }
    }

    /// Publishes ids and their number, and counts them in `how`; without an answer the estimate stays.
    fn answer(&self, answered: Answered, how: &Counter, attributes: &mut Attributes) {
        match answered {
            Ok(tokenized) => {
                how.increment(1);
                let features = attributes.get(self.features).unwrap_or_default();
                let prompts = tokenized.prompts.iter().zip(0..);
                let counts = prompts.map(|(prompt, index)| {
                    // Media of which nobody said how many tokens they are stay estimated.
                    let own = features.iter().filter(|f| f.prompt == index);
                    let unknown = prompt.media.iter().any(|item| item.tokens.is_none());
                    let media = own.map(|f| u64::from(f.tokens)).sum::<u64>();
                    prompt.ids.len() as u64 + if unknown { media } else { 0 }
                });
                let counts: SmallVec<[u64; 4]> = counts.collect();
                let tokens = attributes.write(self.tokens);
                tokens.clear();
                tokens.extend(counts);
                attributes.write(self.ids).extend(tokenized.prompts);
            }
            Err(error) => {
                self.failed.increment(1);
                tracing::debug!(%error, "no token ids, the count is estimated");
            }
        }
    }
}

impl DataProducer for TokenProducer {
    /// Counts, and makes ids where that needs no waiting.
    fn produce(
        &self,
        request: &InferenceRequest,
        _: &[Candidate],
        attributes: &mut Attributes,
    ) -> Result<(), ProducerError> {
        self.count(request, attributes);
        if let Tokenizer::Local(service) = &self.tokenizer {
            if let Some(answered) = self.ready(service, request) {
                self.answer(answered, &self.ready, attributes);
            }
        } else if let Some(supplied) = supplied(request) {
            self.answer(Ok(supplied), &self.ready, attributes);
        }
        Ok(())
    }

    fn prepare(
        &self,
        request: &InferenceRequest,
        _: &[Candidate],
        _: &Attributes,
    ) -> Option<Preparation> {
        let (work, timeout): (Pending, _) = match &self.tokenizer {
            Tokenizer::None => return None,
            Tokenizer::Remote { remote, timeout } => {
                if request.payload.prompts.is_empty() || supplied(request).is_some() {
                    return None;
                }
                let (remote, api) = (Arc::clone(remote), request.payload.api);
                let body = request.body.clone();
                let work = async move { remote.tokenize(api, &body).await };
                (Box::pin(work), *timeout)
            }
            Tokenizer::Local(service) => match service.tokenize(request) {
                Answer::Ready(answered) => {
                    READY.set(Some(Ready {
                        producer: self,
                        request,
                        answered,
                    }));
                    return None;
                }
                Answer::Pending(work) => (work, LOCAL_TIMEOUT),
            },
        };
        // A late answer is an answer without ids. Were the preparation itself to run out of time, the
        // producers behind this one would be skipped as well.
        let work = async move {
            let in_time = tokio::time::timeout(timeout, work).await;
            let answered: Answered =
                in_time.unwrap_or(Err(TokenizeError::Late(timeout.as_secs_f64())));
            Box::new(answered) as Box<dyn Any + Send>
        };
        Some(Preparation {
            work: Box::pin(work),
            timeout: timeout + TIMEOUT_MARGIN,
        })
    }

    fn early_work(&self) -> EarlyWork {
        EarlyWork {
            blocks: None,
            texts: matches!(self.tokenizer, Tokenizer::Local(_)),
        }
    }

    /// The models whose prompts are tokenized here, and what became of their files.
    fn overview(&self, _: &[Arc<Endpoint>]) -> Option<serde_json::Value> {
        let Tokenizer::Local(service) = &self.tokenizer else {
            return None;
        };
        let models = service.models().into_iter().map(|model| {
            serde_json::json!({
                "model": model.name,
                "loaded": model.loaded,
                "repo": model.repo.as_ref().map(Repo::id),
                "revision": model.repo.as_ref().map(Repo::revision),
                "commit": model.commit,
                "error": model.error,
                "unsplittable": model.unsplittable,
            })
        });
        Some(serde_json::json!({"models": models.collect::<Vec<_>>()}))
    }

    fn produce_prepared(
        &self,
        prepared: Box<dyn Any + Send>,
        request: &InferenceRequest,
        _: &[Candidate],
        attributes: &mut Attributes,
    ) -> Result<(), ProducerError> {
        let answered = prepared
            .downcast::<Answered>()
            .map_err(|_| ProducerError("not prepared by this producer".to_owned()))?;
        self.count(request, attributes);
        self.answer(*answered, &self.waited, attributes);
        Ok(())
    }
}

/// Collects the media of one request as its prompts are counted.
struct MediaReader<'a> {
    estimate: &'a MediaEstimate,
    headers: &'a Headers,
    /// Read with the first video.
    hints: Option<VideoHints>,
    /// What is left of [`MAX_MEDIA_TOKENS`].
    left: u32,
    features: SmallVec<[MediaFeature; 4]>,
}

impl<'a> MediaReader<'a> {
    fn new(estimate: &'a MediaEstimate, headers: &'a Headers) -> Self {
        Self {
            estimate,
            headers,
            hints: None,
            left: MAX_MEDIA_TOKENS,
            features: SmallVec::new(),
        }
    }

    /// Takes note of an item and returns its tokens.
    fn read(&mut self, prompt: u32, item: &MediaItem, offset: u64) -> u32 {
        let hints = || {
            *self
                .hints
                .get_or_insert_with(|| VideoHints::of(self.headers))
        };
        let tokens = u32::try_from(self.estimate.tokens(item, hints)).unwrap_or(u32::MAX);
        let tokens = tokens.min(self.left).max(1);
        self.left = self.left.saturating_sub(tokens);
        self.features.push(MediaFeature {
            prompt,
            modality: item.modality,
            hash: item.hash,
            offset: u32::try_from(offset).unwrap_or(u32::MAX),
            tokens,
        });
        tokens
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::producers::block_hash::{Cut, chain_seed, hash_prompt};
    use crate::request::openai::OpenAiParser;
    use crate::request::{Body, Parser};
    use crate::scheduling::test_support::Pool;

    fn chat(content: &serde_json::Value) -> InferenceRequest {
        let body = serde_json::json!({"messages": [{"role": "user", "content": content}]});
        let body = Body::from(body.to_string().as_str());
        let payload = OpenAiParser.parse("/v1/chat/completions", &body).unwrap();
        InferenceRequest::new("r", payload, body)
    }

    /// Tokens of the only prompt, and the media: modality, offset, tokens.
    type Counted = (Vec<u64>, Vec<(&'static str, u32, u32)>);

    fn count(parameters: &str, request: &InferenceRequest) -> Counted {
        let mut pool = Pool::new([]);
        let producer: TokenProducer = pool.plugin(parameters);
        let mut attributes = pool.keys.new_attributes();
        producer.produce(request, &[], &mut attributes).unwrap();
        let features = attributes.get(producer.features).unwrap_or_default();
        (
            attributes.get(producer.tokens).unwrap_or_default().to_vec(),
            features
                .iter()
                .map(|f| (f.modality, f.offset, f.tokens))
                .collect(),
        )
    }

    #[test]
    fn media_count_by_the_settings_at_their_places() {
        let content = serde_json::json!([
            {"type": "text", "text": "a"},
            {"type": "image_url", "image_url": {"url": "http://x/i"}},
            {"type": "text", "text": "b"},
            {"type": "video_url", "video_url": {"url": "http://x/v"}},
            {"type": "input_audio", "input_audio": {"format": "wav", "data": "abcdef"}},
        ]);
        let mut request = chat(&content);
        let header = |name: &str, value: &'static str| {
            (name.to_owned(), bytes::Bytes::from_static(value.as_bytes()))
        };
        request.headers = [header("x-llm-d-video-duration-seconds", "3")]
            .into_iter()
            .collect();
        let parameters = r#"{"estimate": {"image": {"mode": "static", "static": {"staticToken": 7}},
            "video": {"tokensPerFrame": {"mode": "static", "static": {"numTokensPerFrame": 10}}}}}"#;
        // "usera" is 2 tokens, the image 7, "b" 1, the video 3 s * 2 fps * 10 = 60, and "abcdefwav"
        // is 9 bytes, 3 tokens.
        assert_eq!(
            count(parameters, &request),
            (
                vec![2 + 7 + 1 + 60 + 3],
                vec![("image", 2, 7), ("video", 10, 60), ("audio", 70, 3)]
            )
        );
    }

    #[test]
    fn a_request_without_media_publishes_no_features() {
        let request = chat(&"abcd".into());
        let mut pool = Pool::new([]);
        let producer: TokenProducer = pool.plugin("{}");
        let mut attributes = pool.keys.new_attributes();
        producer.produce(&request, &[], &mut attributes).unwrap();
        assert_eq!(attributes.get(producer.tokens), Some(&[2][..]));
        assert_eq!(attributes.get(producer.features), None);
    }

    #[test]
    fn the_count_and_the_hash_chain_agree() {
        let url = "http://x/i";
        let content = serde_json::json!([
            {"type": "image_url", "image_url": {"url": url}},
            {"type": "text", "text": "tail"},
        ]);
        let request = chat(&content);
        let (tokens, features) = count(
            r#"{"estimate": {"image": {"defaultResolution": {"width": 320, "height": 32}}}}"#,
            &request,
        );
        // 320 * 32 / 1024 = 10: one token of role, ten of image, one of text.
        assert_eq!(tokens, [12]);
        let mut hashes = Vec::new();
        let seed = chain_seed("", None);
        let media = features.iter().map(|(.., tokens)| *tokens);
        let prompt = &request.payload.prompts[0];
        let cut = Cut {
            block_tokens: 4,
            max_blocks: usize::MAX,
        };
        hash_prompt(prompt, &request.body, None, seed, cut, media, &mut hashes);
        // The same bytes as text: the low half of the URL's hash, ten times.
        let hash = xxhash_rust::xxh64::xxh64(url.as_bytes(), 0);
        let mut bytes = b"user".to_vec();
        for _ in 0..10 {
            bytes.extend(&hash.to_le_bytes()[..4]);
        }
        bytes.extend(b"tail");
        let mut parent = seed;
        let expected: Vec<u64> = bytes
            .chunks(16)
            .map(|block| {
                let own = xxhash_rust::xxh64::xxh64(block, 0).to_le_bytes();
                parent = xxhash_rust::xxh64::xxh64(&[own, parent.to_le_bytes()].concat(), 0);
                parent
            })
            .collect();
        assert_eq!(expected.len(), 3);
        assert_eq!(hashes, expected);
    }

    #[test]
    fn the_media_of_a_request_are_bounded() {
        // A PNG header that claims 2^31 - 1 by 2^31 - 1 pixels.
        let huge = "data:image/png;base64,iVBORw0KGgoAAAANSUhEUn////9/////";
        let part = serde_json::json!({"type": "image_url", "image_url": {"url": huge}});
        let (tokens, features) = count("{}", &chat(&serde_json::json!([part, part])));
        // One token of role, the whole bound, then one token for the second image.
        assert_eq!(tokens, [1 + (1 << 20) + 1]);
        assert_eq!(
            features,
            [("image", 1, 1 << 20), ("image", 1 + (1 << 20), 1)]
        );
    }

    #[test]
    fn media_of_token_prompts_keep_the_clients_places() {
        let body = r#"{"token_ids":[1,2,3,4],"features":{"mm_hashes":{"image":["h"]},"mm_placeholders":{"image":[{"offset":1,"length":2}]}}}"#;
        let body = Body::from(body);
        let parser = crate::request::vllm_http::VllmHttpParser;
        let payload = parser.parse("/inference/v1/generate", &body).unwrap();
        let request = InferenceRequest::new("r", payload, body);
        assert_eq!(count("{}", &request), (vec![4], vec![("image", 1, 2)]));
    }

    #[test]
    fn a_ready_prompt_is_tokenized_once() {
        let directory = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/tokenizer");
        let parameters =
            serde_json::json!({"local": {"models": [{"name": "m", "directory": directory}]}});
        let mut pool = Pool::new([]);
        let producer: TokenProducer = pool.plugin(&parameters.to_string());
        let request = |prompt: &str| {
            let body = serde_json::json!({"model": "m", "prompt": prompt}).to_string();
            let body = Body::from(body.as_str());
            let payload = OpenAiParser.parse("/v1/completions", &body).unwrap();
            let mut request = InferenceRequest::new("r", payload, body);
            "m".clone_into(&mut request.target_model);
            request
        };
        let (first, second) = (request("The port"), request("The quay"));
        let Tokenizer::Local(service) = &producer.tokenizer else {
            panic!("not local");
        };
        let looked_up = || {
            let stats = service.memo_stats("m").unwrap();
            stats.hits + stats.misses
        };
        let mut attributes = pool.keys.new_attributes();
        assert!(producer.prepare(&first, &[], &attributes).is_none());
        assert_eq!(looked_up(), 1);
        producer.produce(&first, &[], &mut attributes).unwrap();
        assert_eq!(looked_up(), 1);
        // `tokenize-prompt` of the recording begins "The port".
        assert_eq!(*attributes.get(producer.ids).unwrap()[0].ids, [591, 3105]);
        // What was found for one request is never another's.
        assert!(producer.prepare(&first, &[], &attributes).is_none());
        let mut others = pool.keys.new_attributes();
        producer.produce(&second, &[], &mut others).unwrap();
        assert_ne!(*others.get(producer.ids).unwrap()[0].ids, [591, 3105]);
    }

    #[test]
    fn a_model_has_a_directory_or_a_repo() {
        let resolve = |json: &str| {
            let model: LocalModel = serde_json::from_str(json).unwrap();
            model.resolve()
        };
        let hub = resolve(r#"{"repo": "meta-llama/Llama-3.1-8B-Instruct", "revision": "v1"}"#);
        let hub = hub.unwrap();
        assert_eq!(hub.name, "meta-llama/Llama-3.1-8B-Instruct");
        let repo = hub.repo.unwrap();
        assert_eq!((repo.id(), repo.revision()), (hub.name.as_str(), "v1"));
        let named = resolve(r#"{"name": "llama", "repo": "a/b", "chatTemplate": "/t.jinja"}"#);
        assert_eq!(named.unwrap().name, "llama");
        for (json, reason) in [
            (r#"{"name": "m"}"#, "directory or repo is required"),
            (
                r#"{"directory": "/m", "repo": "a/b"}"#,
                "exclude each other",
            ),
            (
                r#"{"directory": "/m", "revision": "v1"}"#,
                "revision without repo",
            ),
            (r#"{"repo": "../b"}"#, "is not owner/name"),
            (
                r#"{"repo": "a/b", "revision": "../x"}"#,
                "is not a branch, tag or commit",
            ),
            (
                r#"{"repo": "a/b", "chatTemplate": "t.jinja"}"#,
                "absolute path",
            ),
        ] {
            let error = resolve(json).unwrap_err().to_string();
            assert!(error.contains(reason), "{json}: {error}");
        }
    }

    #[test]
    fn models_are_shown_with_what_became_of_their_files() {
        let directory = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/tokenizer");
        let parameters =
            serde_json::json!({"local": {"models": [{"name": "m", "directory": directory}]}});
        let producer: TokenProducer = Pool::new([]).plugin(&parameters.to_string());
        let shown = producer.overview(&[]).unwrap();
        let model = &shown["models"][0];
        assert_eq!(model["model"], "m");
        assert_eq!(model["loaded"], true);
        assert!(model["error"].is_null() && model["repo"].is_null());
        let estimate: TokenProducer = Pool::new([]).plugin("{}");
        assert!(estimate.overview(&[]).is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn an_engine_that_is_silent_leaves_the_estimate() {
        // Accepts connections and never answers.
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let parameters = format!(
            r#"{{"modelName": "m", "vllm": {{"url": "http://{address}", "timeout": "2s", "mmTimeout": "2s"}}}}"#
        );
        let mut pool = Pool::new([]);
        let producer: TokenProducer = pool.plugin(&parameters);
        let mut attributes = pool.keys.new_attributes();
        let request = chat(&"abcd".into());
        let preparation = producer.prepare(&request, &[], &attributes).unwrap();
        let prepared = tokio::time::timeout(preparation.timeout, preparation.work).await;
        producer
            .produce_prepared(prepared.unwrap(), &request, &[], &mut attributes)
            .unwrap();
        // "userabcd" is two tokens at four bytes each.
        assert_eq!(attributes.get(producer.tokens), Some(&[2][..]));
        assert!(attributes.get(producer.ids).is_none());
    }
}
