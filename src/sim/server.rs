//! The HTTP face of a simulated pod: OpenAI endpoints, `/metrics`, and switches for faults.

use std::io;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use http::header::CONTENT_TYPE;
use http::{HeaderValue, Method, Request, Response, StatusCode};
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full, Limited};
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

use super::adapters::Adapters;
use super::ask::{Ask, Refusal};
use super::engine::{Engine, EngineConfig};
use super::kv::block_hashes;
use super::metrics;
use super::reply::{Job, stream_reply, whole_reply};
use super::text::{self, TOKEN_BYTES, append, output};
use super::work::Work;

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
}

pub(super) type Body = BoxBody<Bytes, io::Error>;

struct Pod {
    config: SimConfig,
    engine: Arc<Engine>,
    adapters: Adapters,
    fault: Mutex<Fault>,
    started: SystemTime,
}

/// Serves `config` on `listener` until `shutdown`.
pub async fn serve(config: SimConfig, listener: TcpListener, shutdown: CancellationToken) {
    let engine = Engine::new(config.engine.clone());
    tokio::spawn(Arc::clone(&engine).run(shutdown.clone()));
    let pod = Arc::new(Pod {
        adapters: Adapters::new(&config.loras),
        fault: Mutex::new(config.fault),
        config,
        engine,
        started: SystemTime::now(),
    });
    loop {
        let accepted = tokio::select! {
            () = shutdown.cancelled() => return,
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
            "/reset_prefix_cache" => {
                self.engine.reset_cache();
                plain(StatusCode::OK, String::new())
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
        });
        json_reply(StatusCode::OK, stats.to_string())
    }

    fn tokenize(&self, body: &[u8]) -> Result<Response<Body>, Refusal> {
        let ask = Ask::parse(body)?;
        let tokens = text::ids(&if ask.is_chat() {
            ask.chat_tokens()?
        } else {
            ask.prompt_tokens()?
        });
        let answer = json!({
            "count": tokens.len(), "max_model_len": self.config.engine.max_model_len, "tokens": tokens,
            "token_strs": null,
        });
        Ok(json_reply(StatusCode::OK, answer.to_string()))
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
            Fault::None | Fault::ResetMidStream => {}
        }
        let ask = match Ask::parse(&body) {
            Ok(ask) => ask,
            Err(refusal) => return Ok(refuse(&refusal)),
        };
        match self.accept(chat, &ask, id.as_ref()) {
            Err(refusal) => Ok(refuse(&refusal)),
            Ok(mut job) if ask.stream == Some(true) => {
                job.reset_mid_stream = fault == Fault::ResetMidStream;
                Ok(stream_reply(job))
            }
            Ok(job) => Ok(whole_reply(job).await),
        }
    }

    /// Queues the request, or says why not.
    fn accept(&self, chat: bool, ask: &Ask, id: Option<&HeaderValue>) -> Result<Job, Refusal> {
        let options = ask.stream_options()?;
        let base = &self.config.model;
        let model = ask.model.as_ref().unwrap_or(base);
        let lora = self.adapters.contains(model).then(|| model.clone());
        if lora.is_none() && model != base {
            return Err(Refusal::unknown_model(model, base));
        }
        let mut tokens = if chat {
            ask.chat_tokens()?
        } else {
            ask.prompt_tokens()?
        };
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
        let salt = ask.cache_salt.as_deref().unwrap_or_default();
        let work = Work {
            prompt_tokens,
            hashes: block_hashes(model, salt, &tokens, engine.block_tokens * TOKEN_BYTES),
            max_tokens,
            lora,
        };
        let Some(progress) = self.engine.submit(work) else {
            return Err(Refusal::too_long(prompt_tokens, max_tokens, limit));
        };
        let prefix = if chat { "chatcmpl" } else { "cmpl" };
        let id = id.and_then(|id| id.to_str().ok()).map_or_else(
            || format!("{prefix}-{:016x}", fastrand::u64(..)),
            |id| format!("{prefix}-{id}"),
        );
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
        })
    }
}

/// The method of a path; `None` when there is nothing.
fn method(path: &str) -> Option<Method> {
    match path {
        "/metrics" | "/health" | "/version" | "/load" | "/v1/models" | "/sim/stats" => {
            Some(Method::GET)
        }
        "/v1/chat/completions"
        | "/v1/completions"
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

fn simulated_failure(status: StatusCode, kind: &'static str) -> Response<Body> {
    refuse(&Refusal::new(status, kind, "simulated fault", None))
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

fn reply(status: StatusCode, content_type: Option<&'static str>, text: String) -> Response<Body> {
    let body = Full::new(Bytes::from(text))
        .map_err(|never| match never {})
        .boxed();
    let mut response = Response::new(body);
    *response.status_mut() = status;
    if let Some(content_type) = content_type {
        let value = HeaderValue::from_static(content_type);
        response.headers_mut().insert(CONTENT_TYPE, value);
    }
    response
}

fn plain(status: StatusCode, text: String) -> Response<Body> {
    reply(status, None, text)
}

/// An answer whose text is JSON.
pub(super) fn json_reply(status: StatusCode, text: String) -> Response<Body> {
    reply(status, Some("application/json"), text)
}

/// An answer about a route, as vLLM's web framework words it.
fn detail(status: StatusCode, text: &str) -> Response<Body> {
    json_reply(status, json!({ "detail": text }).to_string())
}

/// The answer that tells a refusal.
pub(super) fn refuse(refusal: &Refusal) -> Response<Body> {
    json_reply(refusal.status, refusal.body().to_string())
}
