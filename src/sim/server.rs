//! The HTTP face of a simulated pod: OpenAI endpoints, `/metrics`, and switches for faults.

use std::io;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use futures_util::stream;
use http::header::CONTENT_TYPE;
use http::{HeaderValue, Method, Request, Response, StatusCode};
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full, Limited, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use parking_lot::Mutex;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use xxhash_rust::xxh3::xxh3_64;

use super::engine::{Engine, EngineConfig, Progress, Work};
use super::kv::block_hashes;
use super::metrics;
use super::text::{TOKEN_BYTES, output};

/// Longest request body.
const MAX_BODY_BYTES: usize = 64 << 20;
/// Output tokens of a request that names no limit, as vLLM's completions default.
const DEFAULT_MAX_TOKENS: usize = 16;

/// One simulated pod.
#[derive(Debug, Clone)]
pub struct SimConfig {
    /// Sent back as `x-sim-name`.
    pub name: String,
    /// Served model.
    pub model: String,
    /// Served adapters.
    pub loras: Vec<String>,
    /// The engine.
    pub engine: EngineConfig,
    /// Output tokens in one SSE event.
    pub tokens_per_event: usize,
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

type Body = BoxBody<Bytes, io::Error>;

struct Pod {
    config: SimConfig,
    engine: Arc<Engine>,
    fault: Mutex<Fault>,
    started: SystemTime,
}

/// Serves `config` on `listener` until `shutdown`.
pub async fn serve(config: SimConfig, listener: TcpListener, shutdown: CancellationToken) {
    let engine = Engine::new(config.engine.clone());
    tokio::spawn(Arc::clone(&engine).run(shutdown.clone()));
    let pod = Arc::new(Pod {
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

/// What the simulator reads of a request.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Ask {
    model: Option<String>,
    messages: Option<Vec<Message>>,
    prompt: Option<Prompt>,
    stream: Option<bool>,
    stream_options: Option<StreamOptions>,
    max_tokens: Option<i64>,
    max_completion_tokens: Option<i64>,
    cache_salt: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct StreamOptions {
    include_usage: bool,
}

#[derive(Debug, Deserialize)]
struct Message {
    #[serde(default)]
    role: String,
    #[serde(default)]
    content: Value,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Prompt {
    Text(String),
    Ids(Vec<u32>),
}

/// An accepted request.
struct Job {
    chat: bool,
    id: String,
    model: String,
    seed: u64,
    prompt_tokens: usize,
    max_tokens: usize,
    include_usage: bool,
    progress: Arc<Progress>,
    tokens_per_event: usize,
    reset_mid_stream: bool,
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
        let inference = matches!(path.as_str(), "/v1/chat/completions" | "/v1/completions");
        match (request.method(), path.as_str()) {
            (&Method::POST, _) if inference => {
                self.infer(path.ends_with("chat/completions"), request)
                    .await
            }
            (&Method::GET, "/metrics") => {
                let text = metrics::render(
                    &self.engine.stats(),
                    &self.config.engine,
                    &self.config.model,
                    self.started,
                );
                Ok(reply(StatusCode::OK, metrics::CONTENT_TYPE, text))
            }
            (&Method::GET, "/sim/stats") => {
                let stats = self.engine.stats();
                let totals = &stats.totals;
                Ok(json_reply(
                    StatusCode::OK,
                    &json!({
                        "running": stats.running, "waiting": stats.waiting, "finished": totals.finished,
                        "aborted": totals.aborted, "lag_seconds": totals.lag_seconds, "preemptions": totals.preemptions,
                        "generation_tokens": totals.generation_tokens,
                    }),
                ))
            }
            (&Method::GET, "/health") => Ok(reply(StatusCode::OK, "text/plain", String::new())),
            (&Method::GET, "/version") => Ok(json_reply(
                StatusCode::OK,
                &json!({"version": "0.32.0-sim"}),
            )),
            (&Method::GET, "/v1/models") => Ok(json_reply(StatusCode::OK, &self.models())),
            (&Method::POST, "/reset_prefix_cache") => {
                self.engine.reset_cache();
                Ok(reply(StatusCode::OK, "text/plain", String::new()))
            }
            (&Method::POST, "/sim/restart") => {
                self.engine.restart();
                Ok(reply(StatusCode::OK, "text/plain", String::new()))
            }
            (&Method::POST, "/sim/fault") => self.set_fault(request).await,
            (_, "/metrics" | "/health" | "/version" | "/v1/models") => Ok(json_reply(
                StatusCode::METHOD_NOT_ALLOWED,
                &json!({"detail": "Method Not Allowed"}),
            )),
            _ if inference => Ok(json_reply(
                StatusCode::METHOD_NOT_ALLOWED,
                &json!({"detail": "Method Not Allowed"}),
            )),
            _ => Ok(json_reply(
                StatusCode::NOT_FOUND,
                &json!({"detail": "Not Found"}),
            )),
        }
    }

    fn models(&self) -> Value {
        let entry = |id: &str, parent: Option<&str>| json!({"id": id, "object": "model", "created": now(), "owned_by": "vllm", "root": id, "parent": parent});
        let base = entry(&self.config.model, None);
        let loras = self
            .config
            .loras
            .iter()
            .map(|name| entry(name, Some(&self.config.model)));
        json!({"object": "list", "data": std::iter::once(base).chain(loras).collect::<Vec<_>>()})
    }

    async fn set_fault(&self, request: Request<Incoming>) -> io::Result<Response<Body>> {
        #[derive(Deserialize)]
        struct Switch {
            mode: Fault,
        }
        let body = collect(request).await?;
        match serde_json::from_slice::<Switch>(&body) {
            Ok(switch) => {
                *self.fault.lock() = switch.mode;
                Ok(reply(StatusCode::OK, "text/plain", String::new()))
            }
            Err(error) => Ok(failure(
                StatusCode::BAD_REQUEST,
                "Bad Request",
                &error.to_string(),
                None,
            )),
        }
    }

    async fn infer(&self, chat: bool, request: Request<Incoming>) -> io::Result<Response<Body>> {
        let body = collect(request).await?;
        let fault = *self.fault.lock();
        match fault {
            Fault::Hang => std::future::pending().await,
            Fault::Error500 => {
                return Ok(failure(
                    StatusCode::INTERNAL_SERVER_ERROR,
                    "InternalServerError",
                    "simulated fault",
                    None,
                ));
            }
            Fault::Error503 => {
                return Ok(failure(
                    StatusCode::SERVICE_UNAVAILABLE,
                    "Service Unavailable",
                    "simulated fault",
                    None,
                ));
            }
            Fault::Drop => return Err(io::Error::other("simulated fault")),
            Fault::Slow => tokio::time::sleep(Duration::from_secs(1)).await,
            Fault::None | Fault::ResetMidStream => {}
        }
        let ask: Ask = match serde_json::from_slice(&body) {
            Ok(ask) => ask,
            Err(error) => {
                return Ok(failure(
                    StatusCode::BAD_REQUEST,
                    "Bad Request",
                    &error.to_string(),
                    None,
                ));
            }
        };
        let stream = ask.stream == Some(true);
        match self.accept(chat, ask) {
            Err(refusal) => Ok(refusal),
            Ok(mut job) if stream => {
                job.reset_mid_stream = fault == Fault::ResetMidStream;
                Ok(stream_reply(job))
            }
            Ok(job) => Ok(whole_reply(job).await),
        }
    }

    /// Queues the request, or says why not in vLLM's words.
    #[expect(
        clippy::result_large_err,
        reason = "the refusal is the response itself"
    )]
    fn accept(&self, chat: bool, ask: Ask) -> Result<Job, Response<Body>> {
        let bad = |text: &str| failure(StatusCode::BAD_REQUEST, "BadRequestError", text, None);
        let model = ask.model.unwrap_or_else(|| self.config.model.clone());
        let lora = self
            .config
            .loras
            .iter()
            .find(|name| **name == model)
            .cloned();
        if lora.is_none() && model != self.config.model {
            let text = format!(
                "The model `{model}` does not exist. Valid aliases: {}.",
                self.config.model
            );
            return Err(failure(
                StatusCode::NOT_FOUND,
                "NotFoundError",
                &text,
                Some("model"),
            ));
        }
        let prompt = match (chat, ask.messages, ask.prompt) {
            (true, Some(messages), _) if !messages.is_empty() => chat_bytes(&messages),
            (true, ..) => return Err(bad("messages must not be empty")),
            (false, _, Some(Prompt::Text(text))) => text.into_bytes(),
            (false, _, Some(Prompt::Ids(ids))) => {
                ids.into_iter().flat_map(u32::to_le_bytes).collect()
            }
            (false, _, None) => return Err(bad("prompt is required")),
        };
        let limit = ask.max_completion_tokens.or(ask.max_tokens);
        let max_tokens = match limit {
            None => DEFAULT_MAX_TOKENS,
            Some(limit) => match usize::try_from(limit) {
                Ok(limit) if limit > 0 => limit,
                _ => return Err(bad(&format!("max_tokens must be at least 1, got {limit}."))),
            },
        };
        let prompt_tokens = prompt.len().div_ceil(TOKEN_BYTES).max(1);
        let salt = ask.cache_salt.unwrap_or_default();
        let block_bytes = self.config.engine.block_tokens * TOKEN_BYTES;
        let hashes = block_hashes(&model, &salt, &prompt, block_bytes);
        let seed = xxh3_64(&prompt);
        let work = Work {
            prompt_tokens,
            hashes,
            max_tokens,
            lora,
        };
        let Some(progress) = self.engine.submit(work) else {
            let text = format!(
                "This model's maximum context length is exceeded by {prompt_tokens} + {max_tokens} tokens."
            );
            return Err(bad(&text));
        };
        let prefix = if chat { "chatcmpl" } else { "cmpl" };
        Ok(Job {
            chat,
            id: format!("{prefix}-{:016x}", fastrand::u64(..)),
            model,
            seed,
            prompt_tokens,
            max_tokens,
            include_usage: ask.stream_options.is_some_and(|o| o.include_usage),
            progress,
            tokens_per_event: self.config.tokens_per_event.max(1),
            reset_mid_stream: false,
        })
    }
}

/// Role and text of each message, one after the other.
fn chat_bytes(messages: &[Message]) -> Vec<u8> {
    let mut out = Vec::new();
    for message in messages {
        out.extend_from_slice(message.role.as_bytes());
        match &message.content {
            Value::String(text) => out.extend_from_slice(text.as_bytes()),
            Value::Array(blocks) => {
                let texts = blocks
                    .iter()
                    .filter_map(|block| block.get("text")?.as_str());
                texts.for_each(|text| out.extend_from_slice(text.as_bytes()));
            }
            _ => {}
        }
    }
    out
}

impl Job {
    fn usage(&self, generated: usize) -> Value {
        json!({
            "prompt_tokens": self.prompt_tokens, "total_tokens": self.prompt_tokens + generated,
            "completion_tokens": generated, "prompt_tokens_details": {"cached_tokens": self.progress.cached()},
        })
    }

    /// One SSE event with output tokens `from..to`.
    fn event(&self, from: usize, to: usize, last: bool) -> String {
        let text = output(self.seed, from, to - from);
        let finish = if last { json!("length") } else { Value::Null };
        let choice = if self.chat {
            json!({"index": 0, "delta": {"content": text}, "logprobs": null, "finish_reason": finish})
        } else {
            json!({"index": 0, "text": text, "logprobs": null, "finish_reason": finish})
        };
        self.chunk(&json!([choice]), None)
    }

    fn chunk(&self, choices: &Value, usage: Option<Value>) -> String {
        let object = if self.chat {
            "chat.completion.chunk"
        } else {
            "text_completion"
        };
        let mut chunk = json!({"id": self.id, "object": object, "created": now(), "model": self.model, "choices": choices});
        if let (Some(usage), Some(fields)) = (usage, chunk.as_object_mut()) {
            fields.insert("usage".to_owned(), usage);
        }
        format!("data: {chunk}\n\n")
    }
}

/// Waits for the end and answers at once.
async fn whole_reply(job: Job) -> Response<Body> {
    let mut seen = 0;
    while !job.progress.is_ended() {
        job.progress.beyond(seen).await;
        seen = job.progress.generated();
    }
    if job.progress.is_failed() {
        return failure(
            StatusCode::INTERNAL_SERVER_ERROR,
            "InternalServerError",
            "engine restarted",
            None,
        );
    }
    let text = output(job.seed, 0, job.max_tokens);
    let (object, choice) = if job.chat {
        let message = json!({"role": "assistant", "content": text});
        (
            "chat.completion",
            json!({"index": 0, "message": message, "logprobs": null, "finish_reason": "length"}),
        )
    } else {
        (
            "text_completion",
            json!({"index": 0, "text": text, "logprobs": null, "finish_reason": "length"}),
        )
    };
    json_reply(
        StatusCode::OK,
        &json!({
            "id": job.id, "object": object, "created": now(), "model": job.model, "choices": [choice],
            "usage": job.usage(job.max_tokens),
        }),
    )
}

/// Where a stream is.
enum Stage {
    Role,
    Tokens(usize),
    Usage,
    Done,
    End,
}

fn stream_reply(job: Job) -> Response<Body> {
    let start = if job.chat {
        Stage::Role
    } else {
        Stage::Tokens(0)
    };
    let events = stream::unfold((job, start), |(job, stage)| async move {
        let (text, next) = match next_event(&job, stage).await {
            Ok(Some(event)) => event,
            Ok(None) => return None,
            Err(error) => return Some((Err(error), (job, Stage::End))),
        };
        Some((Ok(Frame::data(Bytes::from(text))), (job, next)))
    });
    let mut response = Response::new(BodyExt::boxed(StreamBody::new(Box::pin(events))));
    let content_type = HeaderValue::from_static("text/event-stream; charset=utf-8");
    response.headers_mut().insert(CONTENT_TYPE, content_type);
    response
}

async fn next_event(job: &Job, stage: Stage) -> io::Result<Option<(String, Stage)>> {
    Ok(match stage {
        Stage::Role => {
            // vLLM sends the role with the first token.
            job.progress.beyond(0).await;
            let choice = json!([{"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": null, "finish_reason": null}]);
            Some((job.chunk(&choice, None), Stage::Tokens(0)))
        }
        Stage::Tokens(sent) => {
            if job.reset_mid_stream && sent > 0 {
                return Err(io::Error::other("simulated fault"));
            }
            // The first token goes out alone, so that its time can be seen.
            let wanted = if sent == 0 {
                1
            } else {
                (sent + job.tokens_per_event).min(job.max_tokens)
            };
            job.progress.beyond(wanted - 1).await;
            if job.progress.is_failed() {
                return Err(io::Error::other("engine restarted"));
            }
            let to = wanted.max(sent + 1).min(job.max_tokens);
            let last = to >= job.max_tokens;
            let next = match (last, job.include_usage) {
                (false, _) => Stage::Tokens(to),
                (true, true) => Stage::Usage,
                (true, false) => Stage::Done,
            };
            Some((job.event(sent, to, last), next))
        }
        Stage::Usage => Some((
            job.chunk(&json!([]), Some(job.usage(job.max_tokens))),
            Stage::Done,
        )),
        Stage::Done => Some(("data: [DONE]\n\n".to_owned(), Stage::End)),
        Stage::End => None,
    })
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

fn reply(status: StatusCode, content_type: &'static str, text: String) -> Response<Body> {
    let body = Full::new(Bytes::from(text))
        .map_err(|never| match never {})
        .boxed();
    let mut response = Response::new(body);
    *response.status_mut() = status;
    response
        .headers_mut()
        .insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    response
}

fn json_reply(status: StatusCode, value: &Value) -> Response<Body> {
    reply(status, "application/json", value.to_string())
}

/// An error as vLLM writes it.
fn failure(status: StatusCode, kind: &str, text: &str, param: Option<&str>) -> Response<Body> {
    let error = json!({"message": text, "type": kind, "param": param, "code": status.as_u16()});
    json_reply(status, &json!({ "error": error }))
}
