//! Decode in several calls of bounded length, so that a long answer does not hold its place in the
//! engine's batch.
//!
//! Each further call continues the assistant's message of the last. Only plain chat can be continued
//! so: requests with tools, log probabilities, several choices, or a message to be continued of the
//! client's own are decoded in one call.

use std::io;

use bytes::Bytes;
use http::{HeaderValue, Response, header};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio_util::task::AbortOnDropHandle;

use super::super::answer::{self, Answer, decode_failed};
use super::super::api::Api;
use super::super::body::AnswerBody;
use super::super::exchange::{Exchange, Refusal};
use super::super::json::{Change, Field, Splice, quoted};
use super::super::metrics::Path;
use super::super::spans::CHUNKED_DECODE;

/// Events that wait for the client; a slow client holds up the next call.
const MAX_WAITING: usize = 2;

/// How a decode is cut.
#[derive(Debug, Clone, Copy)]
pub(super) struct Plan {
    chunk: u64,
    /// Tokens wanted in all; `None` for no limit.
    budget: Option<u64>,
}

/// The plan for a request; `None` when one call does.
pub(super) fn plan(exchange: &Exchange) -> Option<Plan> {
    let chunk = exchange.sidecar.settings.decode_chunk_size;
    let prompt = &exchange.prompt;
    if chunk == 0 || prompt.api() != Api::Chat {
        return None;
    }
    let number = |field| {
        let text = std::str::from_utf8(prompt.value(field)?).ok()?;
        text.parse::<u64>().ok().filter(|n| *n > 0)
    };
    let set = |field| {
        let value = prompt.value(field);
        value.is_some_and(|value| !matches!(value, b"null" | b"false" | b"[]"))
    };
    let plain = !set(Field::Tools)
        && !set(Field::Logprobs)
        && !set(Field::ContinueFinalMessage)
        && number(Field::N).is_none_or(|n| n == 1);
    let budget = number(Field::MaxCompletionTokens).or_else(|| number(Field::MaxTokens));
    (plain && budget.is_none_or(|budget| budget > chunk)).then_some(Plan { chunk, budget })
}

/// Decodes by `plan`; `first` changes the body of the first call only.
pub(super) async fn serve(
    mut exchange: Exchange,
    plan: Plan,
    path: Path,
    first: Vec<Change>,
) -> Result<Answer, Refusal> {
    let streamed = exchange.prompt.is_true(Field::Stream);
    exchange.decoding = exchange.span.child(CHUNKED_DECODE);
    let mut decode = Decode {
        exchange,
        left: plan.budget,
        chunk: plan.chunk,
        first,
        text: String::new(),
        usage: None,
        completion_tokens: 0,
    };
    // The first call decides the status.
    let mut chunk = match decode.next().await? {
        Step::Chunk(chunk) => chunk,
        Step::Refused(answer) => return Ok(*answer),
    };
    decode.exchange.sidecar.metrics().served(path);
    if streamed {
        return Ok(stream(decode, chunk));
    }
    while decode.goes_on(&chunk) {
        chunk = match decode.next().await? {
            Step::Chunk(chunk) => chunk,
            Step::Refused(answer) => return Ok(*answer),
        };
    }
    Ok(whole(&decode, *chunk))
}

/// A decode in progress.
struct Decode {
    exchange: Exchange,
    left: Option<u64>,
    chunk: u64,
    first: Vec<Change>,
    text: String,
    /// Of the first call, whose prompt is the client's.
    usage: Option<Value>,
    completion_tokens: u64,
}

enum Step {
    Chunk(Box<Chunk>),
    /// The engine's own refusal.
    Refused(Box<Answer>),
}

/// One call's answer.
struct Chunk {
    head: http::response::Parts,
    body: Value,
    text: String,
    finish: String,
}

#[derive(Deserialize)]
struct ChatAnswer {
    choices: Vec<ChatChoice>,
}

#[derive(Deserialize)]
struct ChatChoice {
    message: ChatMessage,
    finish_reason: Option<String>,
}

#[derive(Deserialize)]
struct ChatMessage {
    content: Option<String>,
}

impl Decode {
    async fn next(&mut self) -> Result<Step, Refusal> {
        let tokens = self.left.map_or(self.chunk, |left| left.min(self.chunk));
        let body = self.body(tokens);
        let response = self.exchange.decode(body, &[]).await?;
        self.exchange.sidecar.metrics().decoded_chunk();
        if !response.status().is_success() {
            return Ok(Step::Refused(Box::new(response.map(AnswerBody::leg))));
        }
        let (head, leg) = response.into_parts();
        let text = leg.whole().await.map_err(|e| Box::new(decode_failed(&e)))?;
        let garbage = || Box::new(answer::bad_gateway("The decode node failed."));
        let answer: ChatAnswer = serde_json::from_slice(&text).map_err(|_| garbage())?;
        let body: Value = serde_json::from_slice(&text).map_err(|_| garbage())?;
        let choice = answer.choices.into_iter().next().ok_or_else(garbage)?;
        let made = body
            .pointer("/usage/completion_tokens")
            .and_then(Value::as_u64);
        let made = made.unwrap_or(tokens);
        self.completion_tokens += made;
        self.left = self.left.map(|left| left.saturating_sub(made.max(1)));
        if self.usage.is_none() {
            self.usage = body.get("usage").cloned();
        }
        let text = choice.message.content.unwrap_or_default();
        self.text.push_str(&text);
        Ok(Step::Chunk(Box::new(Chunk {
            head,
            body,
            text,
            finish: choice.finish_reason.unwrap_or_default(),
        })))
    }

    fn body(&mut self, tokens: u64) -> Vec<Bytes> {
        let prompt = &self.exchange.prompt;
        let limit = || Some(Bytes::from(tokens.to_string()));
        let mut changes = vec![
            (Field::MaxTokens, limit()),
            (Field::MaxCompletionTokens, limit()),
            (Field::Stream, Some(Bytes::from_static(b"false"))),
            (Field::StreamOptions, None),
        ];
        if self.text.is_empty() {
            changes.append(&mut self.first);
            return prompt.with(&changes);
        }
        changes.push((
            Field::ContinueFinalMessage,
            Some(Bytes::from_static(b"true")),
        ));
        changes.push((
            Field::AddGenerationPrompt,
            Some(Bytes::from_static(b"false")),
        ));
        prompt.with_splices(&changes, self.said())
    }

    /// The text so far as the last message.
    fn said(&self) -> Vec<Splice> {
        let Some(messages) = self.exchange.prompt.place(Field::Messages) else {
            return Vec::new();
        };
        let mut message = Vec::from(&b",{\"role\":\"assistant\",\"content\":"[..]);
        message.extend_from_slice(&quoted(&self.text));
        message.push(b'}');
        let end = messages.end - 1;
        vec![(end..end, message.into())]
    }

    fn goes_on(&self, chunk: &Chunk) -> bool {
        chunk.finish == "length" && !chunk.text.is_empty() && self.left != Some(0)
    }

    /// Tokens of the client's prompt, and of all that was made.
    fn usage(&self) -> Value {
        let mut usage = self.usage.clone().unwrap_or_else(|| json!({}));
        let prompt = usage
            .get("prompt_tokens")
            .and_then(Value::as_u64)
            .unwrap_or(0);
        usage["completion_tokens"] = json!(self.completion_tokens);
        usage["total_tokens"] = json!(prompt + self.completion_tokens);
        usage
    }
}

/// The last answer with all of the text.
fn whole(decode: &Decode, mut chunk: Chunk) -> Answer {
    if let Some(content) = chunk.body.pointer_mut("/choices/0/message/content") {
        *content = decode.text.as_str().into();
    }
    chunk.body["usage"] = decode.usage();
    chunk.head.headers.remove(header::CONTENT_LENGTH);
    Answer::from_parts(chunk.head, AnswerBody::whole(chunk.body.to_string()))
}

/// One event for each call, the usage, and the end. A failure after the first cuts the stream off.
fn stream(mut decode: Decode, mut chunk: Box<Chunk>) -> Answer {
    let mut response = Response::new(());
    response.headers_mut().insert(
        header::CONTENT_TYPE,
        HeaderValue::from_static("text/event-stream; charset=utf-8"),
    );
    let (events, waiting) = mpsc::channel(MAX_WAITING);
    let task = tokio::spawn(async move {
        loop {
            let goes_on = decode.goes_on(&chunk);
            if events.send(Ok(event(&chunk, goes_on))).await.is_err() {
                return;
            }
            if !goes_on {
                break;
            }
            chunk = match decode.next().await {
                Ok(Step::Chunk(chunk)) => chunk,
                Ok(Step::Refused(_)) | Err(_) => {
                    let _ = events.send(Err(io::Error::other("decode failed"))).await;
                    return;
                }
            };
        }
        let mut last = envelope(&chunk.body);
        last["choices"] = json!([]);
        last["usage"] = decode.usage();
        let end = format!("data: {last}\n\ndata: [DONE]\n\n");
        let _ = events.send(Ok(end.into())).await;
    });
    response.map(|()| AnswerBody::made(waiting, AbortOnDropHandle::new(task)))
}

fn envelope(body: &Value) -> Value {
    let of = |name: &str| body.get(name).cloned().unwrap_or(Value::Null);
    json!({
        "id": of("id"),
        "object": "chat.completion.chunk",
        "created": of("created"),
        "model": of("model"),
    })
}

fn event(chunk: &Chunk, goes_on: bool) -> Bytes {
    let mut event = envelope(&chunk.body);
    let finish = if goes_on {
        Value::Null
    } else {
        chunk.finish.as_str().into()
    };
    event["choices"] = json!([{
        "index": 0,
        "delta": {"role": "assistant", "content": chunk.text},
        "finish_reason": finish,
    }]);
    format!("data: {event}\n\n").into()
}
