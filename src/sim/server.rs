//! The HTTP face of a simulated pod: OpenAI endpoints, `/metrics`, and switches for faults.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use http::{HeaderValue, Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Limited};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use parking_lot::Mutex;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use xxhash_rust::xxh3::xxh3_64;

use super::adapters::{Adapter, Adapters};
use super::answers::{
    Body, cut, detail, json_reply, plain, refuse, rendered, reply, simulated_failure,
};
use super::ask::{Ask, Refusal};
use super::engine::{Engine, EngineConfig};
use super::events::publisher::Encoding;
use super::events::{EventsConfig, HashForm, Publisher};
use super::hash::{BlockHasher, Extras, HashAlgorithm};
use super::kv::block_hashes;
use super::metrics;
use super::reply::{Job, Keeper, late_refusal, stream_reply, whole_reply};
use super::text::{self, TOKEN_BYTES, append, output};
use super::transfer::{Transfer, TransferSetup};
use super::work::{Content, Handover, Work};

/// Between the end of an engine and that of its process.
const DEATH_TIME: Duration = Duration::from_millis(200);
/// What a pod answers that is not itself.
const GARBAGE: &str = "\u{1}{]not what was asked for";
/// Longest request body.
const MAX_BODY_BYTES: usize = 64 << 20;

/// One simulated pod.
#[derive(Debug, Clone)]
pub struct SimConfig {
    /// Sent back as `x-sim-name`.
    pub name: String,
    /// Served model.
    pub model: String,
    /// Adapters served from the start.
    pub loras: Vec<String>,
    /// The engine.
    pub engine: EngineConfig,
    /// Output tokens in one SSE event.
    pub tokens_per_event: usize,
    /// Usage tells how many prompt tokens were cached.
    pub prompt_tokens_details: bool,
    /// Fault at start.
    pub fault: Fault,
    /// KV events.
    pub events: EventsSetup,
    /// Answer at `/render`, which vLLM refuses without its flag of that name.
    pub enable_scale_out: bool,
    /// Hands KV from pod to pod.
    pub transfer: Option<TransferSetup>,
}

/// What a pod publishes of its prefix cache, and how it hashes blocks for that.
#[derive(Debug, Clone, Default)]
pub struct EventsSetup {
    /// Checked, and with the ports of this rank; nothing is published unless it says so.
    pub config: EventsConfig,
    /// Data-parallel rank told in every batch.
    pub rank: u16,
    /// Of block hashes.
    pub algorithm: HashAlgorithm,
    /// `PYTHONHASHSEED`, if set.
    pub seed: Option<String>,
    /// Events carry whole digests instead of 64-bit integers.
    pub whole_hashes: bool,
}

impl EventsSetup {
    /// The sockets and the hash function, when something is to be published.
    async fn start(
        &self,
        host: &str,
        shutdown: &CancellationToken,
    ) -> io::Result<Option<(Publisher, BlockHasher)>> {
        if !self.config.publishes() {
            return Ok(None);
        }
        let hasher = BlockHasher::new(self.algorithm, self.seed.as_deref());
        let encoding = Encoding {
            hashes: if self.whole_hashes {
                HashForm::Bytes(hasher.digest_bytes())
            } else {
                HashForm::Integer
            },
            rank: u32::from(self.rank),
        };
        let publisher =
            Publisher::start(self.config.clone(), encoding, host, shutdown.clone()).await?;
        Ok(Some((publisher, hasher)))
    }
}

/// How a pod misbehaves towards inference requests.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Fault {
    /// It does not.
    #[default]
    None,
    /// Accepts and never answers.
    Hang,
    /// Answers 500.
    Error500,
    /// Answers 503.
    Error503,
    /// Closes the connection without an answer.
    Drop,
    /// Closes the connection after the first event of a stream.
    ResetMidStream,
    /// Waits a second before it begins.
    Slow,
    /// Answers 200 with a body that is no JSON.
    Garbage,
    /// Closes the connection in the middle of an answer, stream or not.
    DropMidResponse,
}

struct Pod {
    config: SimConfig,
    engine: Arc<Engine>,
    adapters: Adapters,
    fault: Mutex<Fault>,
    started: SystemTime,
    /// With events only.
    hasher: Option<BlockHasher>,
    transfer: Option<Arc<Transfer>>,
    /// Inference requests that arrived whole.
    received: AtomicU64,
    /// One handle for each that has no answer yet, and this one.
    unanswered: Arc<()>,
    /// The engine ended, and the process with it.
    dead: CancellationToken,
}

/// Serves `config` on `listener` until `shutdown`. Fails when a socket for events or KV cannot be
/// had, and when a request ends the engine.
pub async fn serve(
    mut config: SimConfig,
    listener: TcpListener,
    shutdown: CancellationToken,
) -> io::Result<()> {
    let host = listener.local_addr()?.ip().to_string();
    // Ends with this function, so that nothing of a dead pod is left.
    let shutdown = shutdown.child_token();
    let _ends = shutdown.clone().drop_guard();
    let (publisher, hasher) = config.events.start(&host, &shutdown).await?.unzip();
    config.engine.kv_role = config.transfer.as_ref().map(|setup| setup.role);
    let time_scale = config.engine.time_scale;
    let engine = Engine::new(config.engine.clone(), publisher);
    let transfer = match config.transfer.clone() {
        None => None,
        Some(setup) => {
            let engine = Arc::clone(&engine);
            let transfer = Transfer::start(setup, time_scale, engine, shutdown.clone()).await?;
            Some(Arc::new(transfer))
        }
    };
    let dead = CancellationToken::new();
    tokio::spawn(Arc::clone(&engine).run(shutdown.clone()));
    let pod = Arc::new(Pod {
        adapters: Adapters::new(&config.loras),
        fault: Mutex::new(config.fault),
        config,
        engine,
        started: SystemTime::now(),
        hasher,
        transfer,
        received: AtomicU64::new(0),
        unanswered: Arc::default(),
        dead: dead.clone(),
    });
    loop {
        let accepted = tokio::select! {
            () = shutdown.cancelled() => return Ok(()),
            () = dead.cancelled() => {
                // Time for the answer that tells it.
                tokio::time::sleep(DEATH_TIME).await;
                return Err(io::Error::other("the engine died"));
            }
            accepted = listener.accept() => accepted,
        };
        let Ok((stream, _)) = accepted else {
            tokio::time::sleep(Duration::from_millis(20)).await;
            continue;
        };
        let _ = stream.set_nodelay(true);
        let (pod, shutdown) = (Arc::clone(&pod), shutdown.clone());
        tokio::spawn(async move {
            let service = service_fn(move |request| {
                let pod = Arc::clone(&pod);
                async move { pod.answer(request).await }
            });
            let connection = hyper::server::conn::http1::Builder::new()
                .timer(TokioTimer::new())
                .serve_connection(TokioIo::new(stream), service);
            tokio::select! {
                // A client that hangs up is part of the game.
                _ = connection => {}
                () = shutdown.cancelled() => {}
            }
        });
    }
}

impl Pod {
    async fn answer(self: Arc<Self>, request: Request<Incoming>) -> io::Result<Response<Body>> {
        let mut response = self.route(request).await?;
        if let Ok(name) = HeaderValue::from_str(&self.config.name) {
            response.headers_mut().insert("x-sim-name", name);
        }
        Ok(response)
    }

    async fn route(&self, request: Request<Incoming>) -> io::Result<Response<Body>> {
        let path = request.uri().path().to_owned();
        let Some(method) = method(&path) else {
            return Ok(detail(StatusCode::NOT_FOUND, "Not Found"));
        };
        if method != request.method() {
            return Ok(detail(StatusCode::METHOD_NOT_ALLOWED, "Method Not Allowed"));
        }
        match path.as_str() {
            "/v1/chat/completions" => return self.infer(true, request).await,
            "/v1/completions" => return self.infer(false, request).await,
            _ => {}
        }
        let body = collect(request).await?;
        let answer = match path.as_str() {
            "/tokenize" => self.tokenize(&body),
            "/v1/chat/completions/render" => self.render(true, &body),
            "/v1/completions/render" => self.render(false, &body),
            "/detokenize" => detokenize(&body),
            "/v1/load_lora_adapter" => parse(&body)
                .and_then(|request| self.adapters.load(request))
                .map(|text| plain(StatusCode::OK, text)),
            "/v1/unload_lora_adapter" => parse(&body)
                .and_then(|request| self.adapters.unload(&request))
                .map(|text| plain(StatusCode::OK, text)),
            "/sim/fault" => self.set_fault(&body),
            _ => Ok(self.state(&path)),
        };
        Ok(answer.unwrap_or_else(|refusal| refuse(&refusal)))
    }

    /// What takes no parameters.
    fn state(&self, path: &str) -> Response<Body> {
        let engine = &self.config.engine;
        match path {
            "/metrics" => {
                let stats = self.engine.stats();
                let loras = !self.adapters.is_empty();
                let text = metrics::render(&stats, engine, &self.config.model, loras, self.started);
                reply(StatusCode::OK, Some(metrics::CONTENT_TYPE), text)
            }
            "/sim/stats" => self.stats(),
            "/version" => json_reply(StatusCode::OK, json!({"version": "0.32.0-sim"}).to_string()),
            "/v1/models" => {
                let models = self
                    .adapters
                    .models(&self.config.model, engine.max_model_len, now());
                json_reply(StatusCode::OK, models.to_string())
            }
            "/load" => {
                let stats = self.engine.stats();
                let load = json!({"server_load": stats.running + stats.waiting});
                json_reply(StatusCode::OK, load.to_string())
            }
            "/kv_event_sources" => self.event_sources(),
            "/reset_prefix_cache" => {
                let success = self.engine.reset_cache();
                json_reply(StatusCode::OK, json!({ "success": success }).to_string())
            }
            "/sim/restart" => {
                self.engine.restart();
                plain(StatusCode::OK, String::new())
            }
            // Of the known paths only /health is left.
            _ => plain(StatusCode::OK, String::new()),
        }
    }

    fn stats(&self) -> Response<Body> {
        let stats = self.engine.stats();
        let totals = &stats.totals;
        let stats = json!({
            "running": stats.running, "waiting": stats.waiting, "finished": totals.finished,
            "aborted": totals.aborted, "lag_seconds": totals.lag_seconds, "preemptions": totals.preemptions,
            "generation_tokens": totals.generation_tokens,
            // What tests of several pods look at: who was asked, who computed, and what is left.
            "received": self.received.load(Ordering::Relaxed),
            "unanswered": Arc::strong_count(&self.unanswered) - 1,
            "prompt_tokens": totals.prompt_tokens, "cached_prompt_tokens": totals.cached_prompt_tokens,
            "pulled_prompt_tokens": totals.pulled_prompt_tokens, "failed_pulls": totals.failed_pulls,
            "kept": stats.kept, "expired": totals.expired, "held_blocks": stats.held_blocks,
        });
        json_reply(StatusCode::OK, stats.to_string())
    }

    /// By data-parallel rank, where events are published.
    fn event_sources(&self) -> Response<Body> {
        let sources = self.engine.publisher().map(Publisher::sources);
        let text = sources.and_then(|sources| serde_json::to_string(sources).ok());
        let rank = self.config.events.rank;
        let text = text.map_or_else(|| "{}".to_owned(), |text| format!(r#"{{"{rank}":{text}}}"#));
        json_reply(StatusCode::OK, text)
    }

    fn tokenize(&self, body: &[u8]) -> Result<Response<Body>, Refusal> {
        let ask = Ask::parse(body)?;
        self.model(&ask)?;
        let tokens = ask.tokens(ask.is_chat())?;
        let strings = ask.return_token_strs.then(|| text::strings(&tokens));
        let ids = text::ids(&tokens);
        let answer = format!(
            r#"{{"count":{},"max_model_len":{},"tokens":{},"token_strs":{}}}"#,
            ids.len(),
            self.config.engine.max_model_len,
            json!(ids),
            json!(strings),
        );
        Ok(json_reply(StatusCode::OK, answer))
    }

    /// What the engine would compute, without computing it.
    fn render(&self, chat: bool, body: &[u8]) -> Result<Response<Body>, Refusal> {
        if !self.config.enable_scale_out {
            return Err(Refusal::closed());
        }
        let ask = Ask::parse(body)?;
        let (model, _) = self.model(&ask)?;
        let ids = text::ids(&ask.tokens(chat)?);
        let max_tokens = ask.max_tokens()?;
        let limit = self.config.engine.max_model_len;
        if ids.len().saturating_add(max_tokens) > limit {
            return Err(Refusal::too_long(ids.len(), max_tokens, limit));
        }
        let rendered = rendered(chat, &model, &ids, max_tokens, ask.cache_salt.as_deref());
        let text = if chat {
            rendered
        } else {
            format!("[{rendered}]")
        };
        Ok(json_reply(StatusCode::OK, text))
    }

    /// The model asked for, and the adapter when it is one.
    fn model(&self, ask: &Ask) -> Result<(String, Option<Adapter>), Refusal> {
        let base = &self.config.model;
        let model = ask.model.as_ref().unwrap_or(base);
        let lora = self.adapters.find(model);
        if lora.is_none() && model != base {
            return Err(Refusal::unknown_model(model, base));
        }
        Ok((model.clone(), lora))
    }

    /// The request for the engine: `tokens` are those of the prompt and the output, as bytes.
    fn work(
        &self,
        ask: &Ask,
        model: &str,
        lora: Option<&Adapter>,
        tokens: &[u8],
        max_tokens: usize,
    ) -> Work {
        let block_tokens = self.config.engine.block_tokens;
        let salt = ask.cache_salt.as_deref().unwrap_or_default();
        let (hashes, content) = if let Some(hasher) = &self.hasher {
            let name = lora.map(|lora| Arc::<str>::from(lora.name.as_str()));
            let extras = Extras {
                lora: name.clone().zip(lora.map(|lora| lora.path.as_str().into())),
                media: Vec::new(),
                salt: (!salt.is_empty()).then(|| salt.into()),
            };
            let ids = text::ids(tokens);
            let (hashes, extra_keys) = hasher.chain(&ids, block_tokens, &extras);
            let content = Content {
                tokens: ids,
                extra_keys,
                lora: lora.map(|lora| lora.number).zip(name),
                session_id: ask.session_id.as_deref().map(Arc::from),
                report_hits: ask.reports_hits(),
            };
            (hashes, Some(content))
        } else {
            let bytes = block_tokens * TOKEN_BYTES;
            (block_hashes(model, salt, tokens, bytes), None)
        };
        Work {
            prompt_tokens: tokens.len() / TOKEN_BYTES - max_tokens,
            hashes,
            max_tokens,
            lora: lora.map(|lora| lora.name.clone()),
            content,
            handover: Handover::None,
        }
    }

    fn set_fault(&self, body: &[u8]) -> Result<Response<Body>, Refusal> {
        #[derive(Deserialize)]
        struct Switch {
            mode: Fault,
        }
        let switch: Switch = parse(body)?;
        *self.fault.lock() = switch.mode;
        Ok(plain(StatusCode::OK, String::new()))
    }

    async fn infer(&self, chat: bool, request: Request<Incoming>) -> io::Result<Response<Body>> {
        let id = request.headers().get("x-request-id").cloned();
        let body = collect(request).await?;
        self.received.fetch_add(1, Ordering::Relaxed);
        // Dropped with the answer's head, or when the client leaves before.
        let _unanswered = Arc::clone(&self.unanswered);
        let fault = *self.fault.lock();
        match fault {
            Fault::Hang => std::future::pending().await,
            Fault::Error500 => {
                return Ok(simulated_failure(
                    StatusCode::INTERNAL_SERVER_ERROR,
                    "InternalServerError",
                ));
            }
            Fault::Error503 => {
                return Ok(simulated_failure(
                    StatusCode::SERVICE_UNAVAILABLE,
                    "Service Unavailable",
                ));
            }
            Fault::Drop => return Err(io::Error::other("simulated fault")),
            Fault::Slow => tokio::time::sleep(Duration::from_secs(1)).await,
            Fault::Garbage => return Ok(reply(StatusCode::OK, None, GARBAGE.to_owned())),
            Fault::None | Fault::ResetMidStream | Fault::DropMidResponse => {}
        }
        let ask = match Ask::parse(&body) {
            Ok(ask) => ask,
            Err(refusal) => return Ok(refuse(&refusal)),
        };
        match self.accept(chat, &ask, id.as_ref()).await {
            Err(refusal) if refusal.comes_late() && ask.stream == Some(true) => {
                Ok(late_refusal(&refusal))
            }
            Err(refusal) => Ok(refuse(&refusal)),
            Ok(mut job) if ask.stream == Some(true) => {
                job.reset_mid_stream =
                    matches!(fault, Fault::ResetMidStream | Fault::DropMidResponse);
                Ok(stream_reply(job))
            }
            Ok(job) if fault == Fault::DropMidResponse => Ok(cut(&whole_reply(job)
                .await
                .into_body()
                .collect()
                .await?
                .to_bytes())),
            Ok(job) => Ok(whole_reply(job).await),
        }
    }

    /// Does what the request says about KV on other pods: pulls it, or arranges that it is kept. The
    /// name for other pods begins with `id`. Returns what usage tells of cached tokens.
    async fn hand_over(
        &self,
        ask: &Ask,
        id: &str,
        work: &mut Work,
    ) -> Result<Option<usize>, Refusal> {
        let Some((transfer, params)) = self.transfer.as_ref().zip(ask.transfer_params()) else {
            return Ok(None);
        };
        if params.do_remote_decode == Some(true) {
            work.handover = Handover::Keep {
                request: format!("{id}-{:08x}", fastrand::u32(..)).into(),
                lease: transfer.lease(),
            };
            return Ok(None);
        }
        if params.do_remote_prefill != Some(true) {
            return Ok(None);
        }
        if params.remote_block_ids.as_ref().is_none_or(Value::is_null) {
            // vLLM 0.32 does not survive this.
            self.dead.cancel();
            return Err(Refusal::engine_died());
        }
        let told = params.remote_prefill_cached_tokens;
        let Some(remote) = params.remote() else {
            return Ok(None);
        };
        let cached = self.engine.cached_tokens(&work.hashes, work.prompt_tokens);
        let missing = work.prompt_tokens - cached;
        let block_tokens = self.config.engine.block_tokens;
        let pulling = self.engine.begin_pull();
        let pulled = transfer.pull(&remote, missing, block_tokens).await;
        drop(pulling);
        let Ok(pull) = pulled else {
            self.engine.count_failed_pull();
            return Err(Refusal::pull_failed());
        };
        self.engine.observe_pull(&pull);
        work.handover = Handover::Pulled;
        Ok(told)
    }

    /// Queues the request, or says why not.
    async fn accept(
        &self,
        chat: bool,
        ask: &Ask,
        id: Option<&HeaderValue>,
    ) -> Result<Job, Refusal> {
        let options = ask.stream_options()?;
        let (model, lora) = self.model(ask)?;
        let mut tokens = ask.tokens(chat)?;
        let max_tokens = ask.max_tokens()?;
        let engine = &self.config.engine;
        let prompt_tokens = tokens.len() / TOKEN_BYTES;
        let limit = engine.longest_request();
        // Also what bounds the output that is hashed below.
        if prompt_tokens.saturating_add(max_tokens) > limit {
            return Err(Refusal::too_long(prompt_tokens, max_tokens, limit));
        }
        let seed = xxh3_64(&tokens);
        append(&mut tokens, output(seed, 0, max_tokens).as_bytes());
        let prefix = if chat { "chatcmpl" } else { "cmpl" };
        let id = id.and_then(|id| id.to_str().ok()).map_or_else(
            || format!("{prefix}-{:016x}", fastrand::u64(..)),
            |id| format!("{prefix}-{id}"),
        );
        let mut work = self.work(ask, &model, lora.as_ref(), &tokens, max_tokens);
        // A completion may have several prompts, so its name has the number of the prompt.
        let name = if chat { id.clone() } else { format!("{id}-0") };
        let told_cached = self.hand_over(ask, &name, &mut work).await?;
        let keeper = match (&work.handover, &self.transfer) {
            (Handover::Keep { request, .. }, Some(transfer)) => Some(Keeper {
                transfer: Arc::clone(transfer),
                request: Arc::clone(request),
            }),
            _ => None,
        };
        let Some(progress) = self.engine.submit(work) else {
            return Err(Refusal::too_long(prompt_tokens, max_tokens, limit));
        };
        Ok(Job {
            chat,
            id: Value::from(id).to_string(),
            model: Value::from(model.as_str()).to_string(),
            created: now(),
            seed,
            prompt_tokens,
            block_tokens: prompt_tokens / engine.block_tokens * engine.block_tokens,
            max_tokens,
            options,
            details: self.config.prompt_tokens_details,
            progress,
            tokens_per_event: self.config.tokens_per_event.max(1),
            reset_mid_stream: false,
            told_cached,
            keeper,
        })
    }
}

/// The method of a path; `None` when there is nothing.
fn method(path: &str) -> Option<Method> {
    match path {
        "/metrics" | "/health" | "/version" | "/load" | "/v1/models" | "/sim/stats"
        | "/kv_event_sources" => Some(Method::GET),
        "/v1/chat/completions"
        | "/v1/completions"
        | "/v1/chat/completions/render"
        | "/v1/completions/render"
        | "/tokenize"
        | "/detokenize"
        | "/v1/load_lora_adapter"
        | "/v1/unload_lora_adapter"
        | "/reset_prefix_cache"
        | "/sim/restart"
        | "/sim/fault" => Some(Method::POST),
        _ => None,
    }
}

fn detokenize(body: &[u8]) -> Result<Response<Body>, Refusal> {
    #[derive(Deserialize)]
    struct Tokens {
        tokens: Vec<u32>,
    }
    let Tokens { tokens } = parse(body)?;
    let answer = json!({"prompt": text::text(&text::from_ids(&tokens))});
    Ok(json_reply(StatusCode::OK, answer.to_string()))
}

fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, Refusal> {
    serde_json::from_slice(body).map_err(|error| Refusal::invalid(&error.to_string(), None))
}

async fn collect(request: Request<Incoming>) -> io::Result<Bytes> {
    let limited = Limited::new(request.into_body(), MAX_BODY_BYTES);
    limited
        .collect()
        .await
        .map(http_body_util::Collected::to_bytes)
        .map_err(io::Error::other)
}

fn now() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
        .as_secs()
}
