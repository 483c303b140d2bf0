//! Fields that most APIs share, and small readings of scanned values.

use std::ops::Range;

use xxhash_rust::xxh64::Xxh64;

use super::keys::Key;
use super::media;
use super::scan::{Event, Step};
use super::text::decode_json_string;
use super::{ApiKind, Body, Extent, MediaItem, ModelField, Payload, Prompt, Segment, TextEncoding};

/// Longest model name or salt that is read, in bytes; a longer one counts as absent.
const MAX_NAME_BYTES: usize = 4096;

/// Position of a JSON string.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Text {
    pub(crate) range: Range<usize>,
    pub(crate) escaped: bool,
}

impl Text {
    /// As a piece of a prompt.
    pub(super) fn segment(&self) -> Segment {
        let encoding = if self.escaped {
            TextEncoding::JsonEscaped
        } else {
            TextEncoding::Verbatim
        };
        Segment::Body {
            range: self.range.clone(),
            encoding,
        }
    }

    /// The decoded string, unless it is absurdly long.
    pub(super) fn read(&self, body: &Body) -> Option<String> {
        if self.range.len() > MAX_NAME_BYTES {
            return None;
        }
        Some(decode_json_string(
            &body.copy_range(self.range.clone()),
            self.escaped,
        ))
    }

    /// xxHash64 of the decoded bytes.
    pub(super) fn hash(&self, body: &Body) -> u64 {
        let mut hasher = Xxh64::new(0);
        super::text::for_each_decoded(body, self.range.clone(), self.escaped, &mut |bytes| {
            hasher.update(bytes);
        });
        hasher.digest()
    }

    /// As a media item of `modality`.
    pub(super) fn media(&self, modality: &'static str, extent: Extent, body: &Body) -> MediaItem {
        MediaItem {
            modality,
            hash: self.hash(body),
            identifier: None,
            token_offset: None,
            tokens: None,
            extent,
        }
    }
}

/// An `input_audio` object while it is read.
#[derive(Debug, Default)]
pub(super) struct Audio {
    data: Option<Text>,
    format_bytes: u64,
}

impl Audio {
    /// Reads an event of the object, `path` being below it. At its end: where the data lie, and the
    /// clip.
    pub(super) fn visit(
        &mut self,
        path: &[Step],
        event: &Event<'_>,
        body: &Body,
    ) -> Option<(Range<usize>, MediaItem)> {
        match (path, event) {
            ([Step::Key(Key::Data)], _) => self.data = text_of(event),
            ([Step::Key(Key::Format)], _) => {
                self.format_bytes =
                    text_of(event).map_or(0, |text| media::decoded_len(&text, body));
            }
            ([], Event::End(_)) => {
                let Self { data, format_bytes } = std::mem::take(self);
                let data = data?;
                return Some((data.range.clone(), media::audio(&data, format_bytes, body)));
            }
            _ => {}
        }
        None
    }
}

/// A range of raw JSON as a piece of a prompt.
pub(super) fn raw_segment(range: Range<usize>) -> Segment {
    Segment::Body {
        range,
        encoding: TextEncoding::Verbatim,
    }
}

/// Top-level fields that the payload reports. Of duplicate keys the last wins, as in every engine.
#[expect(
    clippy::struct_excessive_bools,
    reason = "each is a field of the body by itself"
)]
#[derive(Debug, Default)]
pub(super) struct Common {
    model: Option<Text>,
    stream: bool,
    salt: Option<Text>,
    max_tokens: Option<u64>,
    max_completion_tokens: Option<u64>,
    max_output_tokens: Option<u64>,
    echo: bool,
    logprobs: bool,
    top_logprobs: bool,
    prompt_logprobs: bool,
}

impl Common {
    /// Takes note of a top-level value; true when it was one of the fields.
    pub(super) fn visit(&mut self, path: &[Step], event: &Event<'_>) -> bool {
        let [Step::Key(key)] = path else { return false };
        let given = *event != Event::Scalar(b"null");
        match key {
            Key::Model => self.model = text_of(event),
            Key::CacheSalt => self.salt = text_of(event),
            Key::Stream => self.stream = *event == Event::Scalar(b"true"),
            Key::MaxTokens => self.max_tokens = whole_number(event),
            Key::MaxCompletionTokens => self.max_completion_tokens = whole_number(event),
            Key::MaxOutputTokens => self.max_output_tokens = whole_number(event),
            Key::Echo => self.echo = *event == Event::Scalar(b"true"),
            Key::Logprobs => self.logprobs = given,
            Key::TopLogprobs => self.top_logprobs = given,
            Key::PromptLogprobs => self.prompt_logprobs = given,
            _ => return false,
        }
        true
    }

    /// The payload of `api` with these fields.
    pub(super) fn payload(self, api: ApiKind, body: &Body, prompts: Vec<Prompt>) -> Payload {
        let model = self.model.and_then(|text| {
            // The rewrite replaces the string with its quotes.
            let range = text.range.start - 1..text.range.end + 1;
            Some(ModelField {
                name: text.read(body)?,
                range,
            })
        });
        let max_output_tokens = match api {
            ApiKind::ChatCompletions => self.max_completion_tokens.or(self.max_tokens),
            ApiKind::Completions | ApiKind::Messages => self.max_tokens,
            ApiKind::Responses => self.max_output_tokens,
            _ => None,
        };
        // vLLM: `echo` turns what is asked of the output's tokens to the prompt's as well.
        let echoed = match api {
            ApiKind::ChatCompletions => self.echo && self.top_logprobs,
            ApiKind::Completions => self.echo && self.logprobs,
            _ => false,
        };
        Payload {
            scores_prompt: self.prompt_logprobs || echoed,
            api,
            model,
            rewritable: true,
            object_end: object_end(body),
            stream: self.stream,
            max_output_tokens,
            cache_salt: if api == ApiKind::Images {
                None
            } else {
                self.salt.and_then(|text| text.read(body))
            },
            prompts,
            skip_response: false,
        }
    }
}

/// Offset of the last `}`.
fn object_end(body: &Body) -> Option<usize> {
    let mut end = body.len();
    for piece in body.pieces().iter().rev() {
        end -= piece.len();
        if let Some(at) = memchr::memrchr(b'}', piece) {
            return Some(end + at);
        }
    }
    None
}

/// The string an event carries.
pub(super) fn text_of(event: &Event<'_>) -> Option<Text> {
    match event {
        Event::String { range, escaped } => Some(Text {
            range: range.clone(),
            escaped: *escaped,
        }),
        _ => None,
    }
}

/// A scalar that is a non-negative whole number, also when written `16.0` or `1e3`.
pub(super) fn whole_number(event: &Event<'_>) -> Option<u64> {
    let Event::Scalar(text) = event else {
        return None;
    };
    let text = std::str::from_utf8(text).ok()?;
    if let Ok(number) = text.parse() {
        return Some(number);
    }
    let number: f64 = text.parse().ok()?;
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "checked to be whole and in range"
    )]
    let whole = (number >= 0.0 && number.fract() == 0.0 && number < 9e15).then_some(number as u64);
    whole
}

/// A scalar that is a token id.
pub(super) fn token_id(event: &Event<'_>) -> Option<u32> {
    let Event::Scalar(text) = event else {
        return None;
    };
    let mut id: u32 = 0;
    if text.is_empty() {
        return None;
    }
    for digit in *text {
        if !digit.is_ascii_digit() {
            return None;
        }
        id = id.checked_mul(10)?.checked_add(u32::from(digit - b'0'))?;
    }
    Some(id)
}
