//! Answers to inference requests, key by key as vLLM writes them.

use std::fmt::Write;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::stream;
use http::header::CONTENT_TYPE;
use http::{HeaderValue, Response, StatusCode};
use http_body_util::{BodyExt, StreamBody};
use hyper::body::Frame;

use super::answers::{Body, json_reply, refuse};
use super::ask::{Refusal, StreamOptions};
use super::text::output;
use super::transfer::Transfer;
use super::work::Progress;

/// Stands for the release that the answers imitate.
const FINGERPRINT: &str = "\"vllm-0.32.0-sim\"";

const EVENT_STREAM: &str = "text/event-stream; charset=utf-8";

/// An accepted request.
#[derive(Debug)]
pub(super) struct Job {
    pub(super) chat: bool,
    /// A string that is JSON: quoted and escaped.
    pub(super) id: String,
    /// The same.
    pub(super) model: String,
    /// Unix time.
    pub(super) created: u64,
    /// Of the output.
    pub(super) seed: u64,
    pub(super) prompt_tokens: usize,
    /// Those in full blocks.
    pub(super) block_tokens: usize,
    pub(super) max_tokens: usize,
    pub(super) options: StreamOptions,
    /// Tell how many prompt tokens were cached.
    pub(super) details: bool,
    pub(super) progress: Arc<Progress>,
    pub(super) tokens_per_event: usize,
    pub(super) reset_mid_stream: bool,
    /// Cached tokens of the pod that computed the prompt, told instead of the own.
    pub(super) told_cached: Option<usize>,
    /// Says where the blocks of this request are.
    pub(super) keeper: Option<Keeper>,
}

/// What tells other pods of kept blocks.
#[derive(Debug)]
pub(super) struct Keeper {
    pub(super) transfer: Arc<Transfer>,
    /// Name of the request for them.
    pub(super) request: Arc<str>,
}

impl Job {
    /// `"id":..,"object":..,"created":..,"model":..`
    fn head(&self, object: &str) -> String {
        let Self {
            id, created, model, ..
        } = self;
        format!(r#""id":{id},"object":"{object}","created":{created},"model":{model}"#)
    }

    /// The three counts.
    fn counts(&self, generated: usize) -> String {
        format!(
            r#""prompt_tokens":{},"total_tokens":{},"completion_tokens":{generated}"#,
            self.prompt_tokens,
            self.prompt_tokens + generated
        )
    }

    /// Prompt tokens that were cached, as usage tells it.
    fn cached(&self) -> usize {
        self.told_cached.unwrap_or_else(|| self.progress.cached())
    }

    /// Prompt tokens that this request put into the cache; told for chats only. Those that were
    /// pulled are not.
    fn created_cache_tokens(&self) -> Option<usize> {
        self.chat.then(|| match self.told_cached {
            Some(_) => 0,
            None => self.block_tokens.saturating_sub(self.progress.cached()),
        })
    }

    /// `kv_transfer_params` of the answer.
    fn transfer_params(&self) -> String {
        let Some(Keeper { transfer, request }) = &self.keeper else {
            return "null".to_owned();
        };
        let (kept, cached) = (self.progress.kept(), self.progress.cached());
        transfer.params(request, &kept, self.prompt_tokens, cached)
    }

    /// `,"usage":{..}` of an event with output up to `generated`.
    fn event_usage(&self, generated: usize, details: bool) -> String {
        let counts = self.counts(generated);
        if !details {
            return format!(r#","usage":{{{counts}}}"#);
        }
        let cached = self.cached();
        let created = self
            .created_cache_tokens()
            .map_or_else(String::new, |tokens| {
                format!(r#","created_cache_tokens":{tokens}"#)
            });
        let details = format!(r#""prompt_tokens_details":{{"cached_tokens":{cached}{created}}}"#);
        format!(r#","usage":{{{counts},{details}}}"#)
    }

    /// The whole answer.
    fn whole(&self) -> String {
        let text = output(self.seed, 0, self.max_tokens);
        let details = if self.details {
            let created = self
                .created_cache_tokens()
                .map_or_else(|| "null".to_owned(), |tokens| tokens.to_string());
            format!(
                r#"{{"cached_tokens":{},"created_cache_tokens":{created},"multimodal_tokens":null}}"#,
                self.cached()
            )
        } else {
            "null".to_owned()
        };
        let usage = format!(
            r#"{{{},"prompt_tokens_details":{details},"completion_tokens_details":null}}"#,
            self.counts(self.max_tokens)
        );
        let service = format!(r#""service_tier":null,"system_fingerprint":{FINGERPRINT}"#);
        let tail = format!(
            r#""kv_transfer_params":{},"ec_transfer_params":null,"metrics":null"#,
            self.transfer_params()
        );
        // The output holds letters and spaces only, so it is JSON as it is.
        if self.chat {
            let head = self.head("chat.completion");
            let message = format!(
                r#"{{"role":"assistant","content":"{text}","refusal":null,"annotations":null,"audio":null,"function_call":null,"reasoning":null}}"#
            );
            format!(
                r#"{{{head},"choices":[{{"index":0,"message":{message},"logprobs":null,"finish_reason":"length","stop_reason":null,"token_ids":null,"routed_experts":null}}],{service},"usage":{usage},"prompt_logprobs":null,"prompt_token_ids":null,"prompt_text":null,{tail}}}"#
            )
        } else {
            let head = self.head("text_completion");
            format!(
                r#"{{{head},"choices":[{{"index":0,"text":"{text}","logprobs":null,"finish_reason":"length","stop_reason":null,"token_ids":null,"prompt_logprobs":null,"prompt_token_ids":null,"routed_experts":null}}],{service},"usage":{usage},{tail}}}"#
            )
        }
    }

    /// One event with `choices` and what follows them.
    fn event(&self, choices: &str, rest: &str) -> String {
        let object = if self.chat {
            "chat.completion.chunk"
        } else {
            "text_completion"
        };
        format!(
            "data: {{{},\"choices\":[{choices}]{rest}}}\n\n",
            self.head(object)
        )
    }

    /// The event that opens a chat.
    fn opening(&self) -> String {
        let usage = self.running_usage(0);
        self.event(
            r#"{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}"#,
            &format!(r#"{usage},"prompt_token_ids":null,"prompt_text":null"#),
        )
    }

    /// The event with output tokens `from..to`.
    fn piece(&self, from: usize, to: usize) -> String {
        let last = to >= self.max_tokens;
        let text = output(self.seed, from, to - from);
        let choice = match (self.chat, last) {
            (true, false) => format!(
                r#"{{"index":0,"delta":{{"content":"{text}"}},"logprobs":null,"finish_reason":null,"token_ids":null}}"#
            ),
            (true, true) => format!(
                r#"{{"index":0,"delta":{{"content":"{text}"}},"logprobs":null,"finish_reason":"length","stop_reason":null,"token_ids":null}}"#
            ),
            (false, _) => {
                let finish = if last { r#""length""# } else { "null" };
                format!(
                    r#"{{"index":0,"text":"{text}","logprobs":null,"finish_reason":{finish},"stop_reason":null,"prompt_token_ids":null,"token_ids":null}}"#
                )
            }
        };
        let mut rest = self.running_usage(to);
        if last && !self.options.include_usage {
            let _ = write!(rest, r#","system_fingerprint":{FINGERPRINT}"#);
        }
        self.event(&choice, &rest)
    }

    /// Usage in every event, when asked for.
    fn running_usage(&self, generated: usize) -> String {
        if self.options.include_usage && self.options.continuous_usage_stats {
            self.event_usage(generated, false)
        } else {
            String::new()
        }
    }

    /// The event with the usage of the whole request.
    fn closing(&self) -> String {
        let usage = self.event_usage(self.max_tokens, self.details);
        self.event(
            "",
            &format!(r#"{usage},"system_fingerprint":{FINGERPRINT}"#),
        )
    }
}

/// Waits for the end and answers at once.
pub(super) async fn whole_reply(job: Job) -> Response<Body> {
    job.progress.ended().await;
    if job.progress.is_failed() {
        return refuse(&Refusal::new(
            StatusCode::INTERNAL_SERVER_ERROR,
            "InternalServerError",
            "engine restarted",
            None,
        ));
    }
    json_reply(StatusCode::OK, job.whole())
}

/// Where a stream is.
enum Stage {
    Role,
    Tokens(usize),
    Usage,
    Done,
    End,
}

/// Answers with an event for each piece of output.
pub(super) fn stream_reply(job: Job) -> Response<Body> {
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
    let content_type = HeaderValue::from_static(EVENT_STREAM);
    response.headers_mut().insert(CONTENT_TYPE, content_type);
    response
}

/// A stream that has nothing but the refusal.
pub(super) fn late_refusal(refusal: &Refusal) -> Response<Body> {
    let text = format!("data: {}\n\ndata: [DONE]\n\n", refusal.body());
    let mut response = json_reply(StatusCode::OK, text);
    let content_type = HeaderValue::from_static(EVENT_STREAM);
    response.headers_mut().insert(CONTENT_TYPE, content_type);
    response
}

async fn next_event(job: &Job, stage: Stage) -> io::Result<Option<(String, Stage)>> {
    Ok(match stage {
        Stage::Role => {
            // vLLM sends the role with the first token.
            job.progress.beyond(0).await;
            Some((job.opening(), Stage::Tokens(0)))
        }
        Stage::Tokens(sent) => {
            if job.reset_mid_stream && sent > 0 {
                // What came before goes out only if the error comes later.
                tokio::time::sleep(Duration::from_millis(20)).await;
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
            let next = match (wanted >= job.max_tokens, job.options.include_usage) {
                (false, _) => Stage::Tokens(wanted),
                (true, true) => Stage::Usage,
                (true, false) => Stage::Done,
            };
            Some((job.piece(sent, wanted), next))
        }
        Stage::Usage => Some((job.closing(), Stage::Done)),
        Stage::Done => Some(("data: [DONE]\n\n".to_owned(), Stage::End)),
        Stage::End => None,
    })
}
