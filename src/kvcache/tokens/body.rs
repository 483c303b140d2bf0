//! A request's body as a value, of which long strings are decoded only once.
//!
//! A long body is almost all text, and where that lies the parser has found out. [`Source::parse`] has a
//! deserializer read the body without its long strings, each replaced by a mark, and puts in what they
//! stand for, which was decoded while the body arrived or is decoded here.

use std::ops::Range;
use std::sync::{Arc, LazyLock};

use hashbrown::HashMap;
use minijinja::Value;
use serde::de::{DeserializeSeed, Deserializer, Error, MapAccess, SeqAccess, Visitor};

use super::service::TokenizeError;
use crate::request::early::LONG_TEXT_BYTES;
use crate::request::text::{decode_strict, is_quoted};
use crate::request::{Body, InferenceRequest, Prompt, Segment, TextEncoding};

/// Begins every mark. Only this process knows it, so no client can write one.
static SECRET: LazyLock<String> = LazyLock::new(|| format!("{:032x}", fastrand::u128(..)));

/// A body and its long strings.
#[derive(Debug, Clone)]
pub(super) struct Source {
    body: Body,
    /// In order, without overlap.
    long: Vec<Long>,
}

#[derive(Debug, Clone)]
struct Long {
    /// Without the quotes.
    range: Range<usize>,
    escaped: bool,
    known: Option<Arc<str>>,
}

impl Source {
    /// The body of `request`, with what was decoded of it early.
    pub(super) fn of(request: &InferenceRequest) -> Self {
        let early = request.early.iter().flat_map(|early| early.texts());
        let early: HashMap<&Range<usize>, &Arc<str>> =
            early.map(|text| (&text.range, &text.text)).collect();
        let body = &request.body;
        let texts = request.payload.prompts.iter().map(|prompt| match prompt {
            Prompt::Text(segments) => segments.as_slice(),
            Prompt::Tokens { .. } => &[],
        });
        let long = texts.flatten().filter_map(|segment| match segment {
            Segment::Body { range, encoding } if range.len() >= LONG_TEXT_BYTES => {
                let known = early.get(range).map(|text| Arc::clone(text));
                (known.is_some() || is_quoted(body, range)).then(|| Long {
                    range: range.clone(),
                    escaped: *encoding == TextEncoding::JsonEscaped,
                    known,
                })
            }
            _ => None,
        });
        let mut long: Vec<Long> = long.collect();
        long.sort_by_key(|long| long.range.start);
        let mut end = 0;
        long.retain(|long| {
            let apart = long.range.start >= end;
            end = end.max(long.range.end);
            apart
        });
        Self {
            body: body.clone(),
            long,
        }
    }

    /// Bytes of the body.
    pub(super) fn len(&self) -> usize {
        self.body.len()
    }

    /// Bytes that are still to be read to make the value of it.
    pub(super) fn unread_bytes(&self) -> usize {
        let known = self.long.iter().filter(|long| long.known.is_some());
        self.body.len() - known.map(|long| long.range.len()).sum::<usize>()
    }

    /// The value, whose objects keep their order, as Python's do.
    pub(super) fn parse(&self) -> Result<Value, TokenizeError> {
        let malformed = |e: serde_json::Error| TokenizeError::Malformed(e.to_string());
        if self.long.is_empty() {
            return match self.body.pieces() {
                [piece] => serde_json::from_slice(piece),
                _ => serde_json::from_slice(&self.body.copy_range(0..self.body.len())),
            }
            .map_err(malformed);
        }
        let texts: Result<Vec<Value>, TokenizeError> = self
            .long
            .iter()
            .map(|long| match &long.known {
                Some(text) => Ok(Value::from(Arc::clone(text))),
                None => decode_strict(&self.body, long.range.clone(), long.escaped)
                    .map(Value::from)
                    .ok_or_else(|| TokenizeError::Malformed("a string that is none".to_owned())),
            })
            .collect();
        let texts = texts?;
        let json = self.with_marks();
        let mut json = serde_json::Deserializer::from_slice(&json);
        let value = Marked(&texts).deserialize(&mut json).map_err(malformed)?;
        json.end().map_err(malformed)?;
        Ok(value)
    }

    /// The body with a mark for each long string.
    fn with_marks(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(self.unread_bytes().min(1 << 16));
        let mut at = 0;
        for (long, number) in self.long.iter().zip(0..) {
            for slice in self.body.slices(at..long.range.start) {
                out.extend_from_slice(slice);
            }
            out.extend_from_slice(mark(number).as_bytes());
            at = long.range.end;
        }
        for slice in self.body.slices(at..self.body.len()) {
            out.extend_from_slice(slice);
        }
        out
    }
}

impl From<&Body> for Source {
    fn from(body: &Body) -> Self {
        Self {
            body: body.clone(),
            long: Vec::new(),
        }
    }
}

fn mark(number: u32) -> String {
    format!("{}{number:08x}", *SECRET)
}

fn number_of(mark: &str) -> Option<usize> {
    let number = mark.strip_prefix(SECRET.as_str())?;
    usize::from_str_radix(number, 16).ok()
}

/// Makes a value as `Value`'s own deserializer does, with a text for each mark.
#[derive(Clone, Copy)]
struct Marked<'a>(&'a [Value]);

impl Marked<'_> {
    fn text<E: Error>(self, text: &str) -> Result<Value, E> {
        let Some(number) = number_of(text) else {
            return Ok(Value::from(text));
        };
        let known = self.0.get(number).cloned();
        known.ok_or_else(|| E::custom("an unknown mark"))
    }
}

impl<'de> DeserializeSeed<'de> for Marked<'_> {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Marked<'_> {
    type Value = Value;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("JSON")
    }

    fn visit_bool<E: Error>(self, value: bool) -> Result<Value, E> {
        Ok(Value::from(value))
    }

    fn visit_i64<E: Error>(self, value: i64) -> Result<Value, E> {
        Ok(Value::from(value))
    }

    fn visit_u64<E: Error>(self, value: u64) -> Result<Value, E> {
        Ok(Value::from(value))
    }

    fn visit_f64<E: Error>(self, value: f64) -> Result<Value, E> {
        Ok(Value::from(value))
    }

    fn visit_str<E: Error>(self, value: &str) -> Result<Value, E> {
        self.text(value)
    }

    fn visit_unit<E: Error>(self) -> Result<Value, E> {
        Ok(Value::from(()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        let mut list = Vec::new();
        while let Some(item) = items.next_element_seed(self)? {
            list.push(item);
        }
        Ok(Value::from(list))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Value, A::Error> {
        let mut pairs: Vec<(Value, Value)> = Vec::new();
        while let Some(key) = entries.next_key()? {
            pairs.push((key, entries.next_value_seed(self)?));
        }
        Ok(Value::from_pairs(pairs))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::request::openai::OpenAiParser;
    use crate::request::{Early, EarlyWork, Parser};
    use bytes::Bytes;
    use proptest::prelude::*;

    const CHATS: &str = "/v1/chat/completions";

    /// The body in pieces, as it arrives; `None` when the parser refuses it.
    fn request(body: &[u8], piece_bytes: usize, texts: bool) -> Option<InferenceRequest> {
        let work = EarlyWork {
            blocks: None,
            texts,
        };
        let mut early = Early::new(OpenAiParser.begin(CHATS).unwrap(), work);
        let mut received = Body::default();
        for piece in body.chunks(piece_bytes) {
            received.push(Bytes::copy_from_slice(piece));
            early.advance(&received);
        }
        let (payload, early) = early.finish(&received).ok()?;
        let mut request = InferenceRequest::new("r", payload, received);
        request.early = early;
        Some(request)
    }

    fn chat(content: &serde_json::Value) -> Vec<u8> {
        serde_json::json!({
            "temperature": 0.5, "seed": 18_446_744_073_709_551_615_u64, "n": -1,
            "tools": [{"type": "function", "function": {"name": "f", "description": "d".repeat(2000)}}],
            "messages": [{"role": "system", "content": "short"}, {"role": "user", "content": content}],
            "stop": null, "stream": true,
        })
        .to_string()
        .into_bytes()
    }

    fn plain(body: &[u8]) -> Result<String, String> {
        let value: Result<Value, _> = serde_json::from_slice(body);
        value
            .map(|value| format!("{value:?}"))
            .map_err(|e| e.to_string())
    }

    fn parsed(source: &Source) -> Option<String> {
        source.parse().ok().map(|value| format!("{value:?}"))
    }

    #[test]
    fn what_was_decoded_early_is_not_read_again() {
        let body = chat(&"a line\nand \"another\" é\u{1F600}".repeat(100).into());
        let request = request(&body, 16, true).unwrap();
        let source = Source::of(&request);
        // Names, tools and brackets.
        let text = r#"a line\nand \"another\" é😀"#.len() * 100;
        assert_eq!(source.unread_bytes(), body.len() - text);
        assert_eq!(parsed(&source), plain(&body).ok());
    }

    #[test]
    fn parts_and_repeated_texts_keep_their_places() {
        let text = |of: &str| serde_json::json!({"type": "text", "text": of.repeat(700)});
        let body = chat(&serde_json::json!([
            text("xy"),
            text("xy"),
            text("z\n"),
            text("s")
        ]));
        for (piece_bytes, texts) in [(1000, true), (1000, false), (usize::MAX, false)] {
            let request = request(&body, piece_bytes, texts).unwrap();
            let source = Source::of(&request);
            assert_eq!(source.long.len(), 3, "\"s\" is short, tools are no text");
            assert_eq!(parsed(&source), plain(&body).ok());
        }
    }

    #[test]
    fn a_text_that_looks_like_a_mark_is_a_text() {
        let beside_a_long_one = |text: &str| {
            let part = |text: &str| serde_json::json!({"type": "text", "text": text});
            let body = chat(&serde_json::json!([part(&"x".repeat(2000)), part(text)]));
            let request = request(&body, 100, true).unwrap();
            (parsed(&Source::of(&request)), plain(&body).ok())
        };
        for text in [
            SECRET.clone(),
            format!("{}zz", *SECRET),
            format!(" {}", mark(0)),
        ] {
            let (read, wanted) = beside_a_long_one(&text);
            assert_eq!(read, wanted, "{text}");
        }
        // Nobody outside can know the secret; a number that stands for nothing is an error even then.
        assert_eq!(beside_a_long_one(&mark(7)).0, None);
    }

    #[test]
    fn strings_that_json_forbids_are_refused() {
        let long = "x".repeat(2000);
        for wrong in [
            "\u{1}",
            "\n",
            r"\ud83d",
            r"\ude00 ",
            r"\ud83d\u0041",
            "\u{0}",
        ] {
            let content = format!("{long}{wrong}{long}");
            let body = format!(r#"{{"messages": [{{"role": "user", "content": "{content}"}}]}}"#);
            assert!(plain(body.as_bytes()).is_err());
            for texts in [true, false] {
                let request = request(body.as_bytes(), 64, texts).unwrap();
                let source = Source::of(&request);
                assert_eq!(parsed(&source), None, "{wrong:?}, early {texts}");
            }
        }
    }

    #[test]
    fn bytes_that_are_not_utf8_are_refused() {
        let mut body = chat(&"x".repeat(2000).into());
        let at = body.iter().rposition(|byte| *byte == b'x').unwrap();
        body[at] = 0xff;
        assert!(plain(&body).is_err());
        for texts in [true, false] {
            let request = request(&body, 64, texts).unwrap();
            assert_eq!(parsed(&Source::of(&request)), None);
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]

        #[test]
        fn it_reads_what_a_deserializer_reads(
            text in "[\\PC\n\t\"\\\\/\u{1F600}é]{1,40}", times in 1usize..200, ascii in any::<bool>(),
            piece_bytes in 1usize..3000, texts in any::<bool>(), edit in any::<Option<(prop::sample::Index, u8)>>(),
        ) {
            let mut body = chat(&text.repeat(times).into());
            if ascii {
                let json = String::from_utf8(body).unwrap();
                let mut units = [0; 2];
                let escape = |c: char| if c.is_ascii() { c.to_string() } else {
                    c.encode_utf16(&mut units).iter().map(|u| format!("\\u{u:04x}")).collect::<Vec<_>>().concat()
                };
                body = json.chars().map(escape).collect::<String>().into_bytes();
            }
            if let Some((at, byte)) = edit {
                let at = at.index(body.len());
                body[at] = byte;
            }
            if let Some(request) = request(&body, piece_bytes, texts) {
                prop_assert_eq!(parsed(&Source::of(&request)), plain(&body).ok());
            }
        }
    }
}
