//! `shared-storage`: both engines use one store of blocks; nothing is said in bodies but whether an
//! engine may give up for lack of cached blocks.

use bytes::{Bytes, BytesMut};
use http::{Response, header};
use serde::Deserialize;

use super::super::answer::{Answer, decode_failed};
use super::super::body::AnswerBody;
use super::super::engines::LegBody;
use super::super::exchange::{Exchange, Refusal};
use super::super::json::Field;
use super::super::metrics::Path;
use super::super::prompt::Limits;

/// How an engine says that too little was cached.
const GAVE_UP: &str = "cache_threshold";
/// Longest head of a stream that is looked at.
const MAX_HEAD_BYTES: usize = 64 << 10;

/// Decode at once if the client set a threshold and enough is cached; else prefill, then decode.
pub(super) async fn serve(exchange: &Exchange) -> Result<Answer, Refusal> {
    if exchange.prompt.value(Field::CacheHitThreshold).is_some()
        && let Some(answer) = decode_cached(exchange).await?
    {
        exchange.sidecar.metrics().served(Path::DecodeOnly);
        return Ok(answer);
    }
    let any = (Field::CacheHitThreshold, Some(Bytes::from_static(b"0")));
    let body = exchange
        .prompt
        .single_token(Limits::Most, std::slice::from_ref(&any));
    let mut attempts = exchange.attempts();
    let mut path = Path::LocalPrefill;
    while let Some(target) = attempts.next() {
        match exchange.prefill(target, &body, &[]).await {
            Ok(_) => {
                path = Path::PrefillDecode;
                break;
            }
            Err(failure) => attempts.failed(target, failure)?,
        }
    }
    if path == Path::LocalPrefill {
        attempts.or_local()?;
    }
    let response = exchange.decode(exchange.prompt.with(&[any]), &[]).await?;
    exchange.sidecar.metrics().served(path);
    Ok(response.map(AnswerBody::leg))
}

/// The answer of an engine that had enough cached; `None` when it gave up.
async fn decode_cached(exchange: &Exchange) -> Result<Option<Answer>, Refusal> {
    let response = exchange.decode(exchange.prompt.with(&[]), &[]).await?;
    if !response.status().is_success() {
        return Ok(Some(response.map(AnswerBody::leg)));
    }
    let (head, leg) = response.into_parts();
    let streamed = head
        .headers
        .get(header::CONTENT_TYPE)
        .is_some_and(|value| value.as_bytes().starts_with(b"text/event-stream"));
    if streamed {
        return Ok(first_events(Response::from_parts(head, leg)).await);
    }
    let failed = |error| Box::new(decode_failed(&error));
    let body = leg.whole().await.map_err(failed)?;
    let gave_up = serde_json::from_slice::<Chunk>(&body).is_ok_and(|chunk| chunk.gave_up());
    Ok((!gave_up).then(|| Answer::from_parts(head, AnswerBody::whole(body))))
}

/// Reads a stream until it shows what it is; what was read is sent on before the rest.
async fn first_events(response: Response<LegBody>) -> Option<Answer> {
    let (head, mut leg) = response.into_parts();
    let mut read = BytesMut::new();
    while read.len() < MAX_HEAD_BYTES {
        match verdict(&read) {
            Verdict::GaveUp => return None,
            Verdict::Answers => break,
            Verdict::Open => {}
        }
        match leg.next_piece().await {
            Some(Ok(piece)) => read.extend_from_slice(&piece),
            // The client is told by the body, after what there was.
            Some(Err(_)) | None => break,
        }
    }
    Some(Answer::from_parts(
        head,
        AnswerBody::after(read.freeze(), leg),
    ))
}

enum Verdict {
    GaveUp,
    Answers,
    Open,
}

/// What complete events say. One that only names the role says nothing yet.
fn verdict(text: &[u8]) -> Verdict {
    let mut from = 0;
    while let Some(end) = memchr::memmem::find(text.get(from..).unwrap_or_default(), b"\n\n") {
        let event = text.get(from..from + end).unwrap_or_default();
        from += end + 2;
        let data = event.strip_prefix(b"data:").unwrap_or(event);
        match serde_json::from_slice::<Chunk>(data) {
            Ok(chunk) if chunk.gave_up() => return Verdict::GaveUp,
            Ok(chunk) if chunk.says_nothing() => {}
            _ => return Verdict::Answers,
        }
    }
    Verdict::Open
}

#[derive(Deserialize)]
struct Chunk {
    #[serde(default)]
    choices: Vec<Choice>,
}

#[derive(Deserialize)]
struct Choice {
    finish_reason: Option<String>,
    delta: Option<Delta>,
}

#[derive(Deserialize)]
struct Delta {
    role: Option<String>,
    content: Option<String>,
}

impl Chunk {
    fn gave_up(&self) -> bool {
        let first = self.choices.first();
        first.is_some_and(|choice| choice.finish_reason.as_deref() == Some(GAVE_UP))
    }

    fn says_nothing(&self) -> bool {
        let Some(choice) = self.choices.first() else {
            return false;
        };
        let only_role = choice.delta.as_ref().is_some_and(|delta| {
            delta.role.is_some() && delta.content.as_deref().unwrap_or_default().is_empty()
        });
        choice.finish_reason.is_none() && only_role
    }
}
