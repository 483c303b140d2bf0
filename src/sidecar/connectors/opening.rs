//! The beginning of a decode engine's stream, read before anything is sent on: an engine that cannot go
//! through with it says so in its first events, behind a status of 200.

use bytes::{Bytes, BytesMut};
use http::{HeaderMap, header};
use serde::Deserialize;
use serde::de::IgnoredAny;

use super::super::engines::{CallError, LegBody};

/// How an engine says that too little was cached.
const GAVE_UP: &str = "cache_threshold";
/// Longest beginning that is looked at.
const MAX_BYTES: usize = 64 << 10;

/// What a stream begins with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Opening {
    /// An answer, or anything else.
    Answers,
    /// Too little was cached.
    GaveUp,
    /// An error, and nothing before it.
    Failed,
}

/// Whether these are the headers of an event stream.
pub(super) fn is_stream(headers: &HeaderMap) -> bool {
    headers
        .get(header::CONTENT_TYPE)
        .is_some_and(|value| value.as_bytes().starts_with(b"text/event-stream"))
}

/// Whether a whole answer says that too little was cached.
pub(super) fn gave_up(body: &[u8]) -> bool {
    serde_json::from_slice::<Chunk>(body).is_ok_and(|chunk| chunk.gave_up())
}

/// Reads a stream until it shows what it is; returns that and what was read. An error when it breaks off
/// before: the client can still be told.
pub(super) async fn read(leg: &mut LegBody) -> Result<(Opening, Bytes), CallError> {
    let mut read = BytesMut::new();
    let opening = loop {
        if let Some(opening) = judge(&read) {
            break opening;
        }
        match leg.next_piece().await {
            Some(piece) => read.extend_from_slice(&piece?),
            None => break Opening::Answers,
        }
    };
    Ok((opening, read.freeze()))
}

/// What complete events say; `None` while that is nothing, as in one that only names the role.
fn judge(text: &[u8]) -> Option<Opening> {
    let mut from = 0;
    while let Some(end) = memchr::memmem::find(text.get(from..).unwrap_or_default(), b"\n\n") {
        let event = text.get(from..from + end).unwrap_or_default();
        from += end + 2;
        let data = event.strip_prefix(b"data:").unwrap_or(event);
        match serde_json::from_slice::<Chunk>(data) {
            Ok(chunk) if chunk.error.is_some() => return Some(Opening::Failed),
            Ok(chunk) if chunk.gave_up() => return Some(Opening::GaveUp),
            Ok(chunk) if chunk.says_nothing() => {}
            _ => return Some(Opening::Answers),
        }
    }
    (text.len() >= MAX_BYTES).then_some(Opening::Answers)
}

#[derive(Deserialize)]
struct Chunk {
    #[serde(default)]
    choices: Vec<Choice>,
    error: Option<IgnoredAny>,
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

#[cfg(test)]
mod tests {
    use super::*;

    const ROLE: &str = "data: {\"choices\":[{\"delta\":{\"role\":\"assistant\",\"content\":\"\"},\"finish_reason\":null}]}\n\n";

    #[test]
    fn the_first_event_that_says_something_counts() {
        let error = "data: {\"error\": {\"message\": \"Internal server error\", \"type\": \"InternalServerError\", \"param\": null, \"code\": 500}}\n\n";
        let word =
            "data: {\"choices\":[{\"text\":\"x\",\"finish_reason\":null}],\"error\":null}\n\n";
        let gave_up =
            "data: {\"choices\":[{\"text\":\"\",\"finish_reason\":\"cache_threshold\"}]}\n\n";
        let of = |events: &[&str]| judge(events.concat().as_bytes());
        assert_eq!(of(&[]), None);
        assert_eq!(of(&[ROLE]), None);
        assert_eq!(of(&[&error[..20]]), None, "the rest is on its way");
        assert_eq!(of(&[error]), Some(Opening::Failed));
        assert_eq!(of(&[ROLE, error]), Some(Opening::Failed));
        assert_eq!(of(&[ROLE, gave_up]), Some(Opening::GaveUp));
        assert_eq!(of(&[word, error]), Some(Opening::Answers));
        assert_eq!(of(&["data: [DONE]\n\n"]), Some(Opening::Answers));
        assert_eq!(of(&[&"x".repeat(MAX_BYTES)]), Some(Opening::Answers));
    }
}
