//! Where the members of a JSON object lie, and how to change some without touching the rest.
//!
//! One forward scan over contiguous text, which builds no value. It differs from `request/scan.rs` in
//! what it reports: the extent of whole members, keys decoded, so that a key spelled with escapes is
//! found too. What it accepts is laxer than JSON inside strings only; an engine that reads the text
//! finds the members where we did, or refuses it.

use std::ops::Range;

use bytes::Bytes;
use smallvec::SmallVec;

use crate::request::scan::{find_string_end, is_number};

/// Containers that may be open at once.
const MAX_DEPTH: usize = 512;
/// Known members of one object, duplicates included.
const MAX_KNOWN: usize = 64;

/// Why a text is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum JsonError {
    /// Not JSON.
    #[error("invalid JSON at offset {0}")]
    Invalid(usize),
    /// The root is something else.
    #[error("the body is not a JSON object")]
    NotAnObject,
    /// More than [`MAX_DEPTH`] open containers.
    #[error("nested deeper than {MAX_DEPTH}")]
    TooDeep,
    /// More than [`MAX_KNOWN`].
    #[error("too many duplicate fields")]
    TooManyDuplicates,
}

macro_rules! fields {
    ($($name:ident = $text:literal),* $(,)?) => {
        /// A field that somebody here reads or changes.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub(super) enum Field {
            $($name,)*
        }

        impl Field {
            fn of(key: &[u8]) -> Option<Self> {
                $(if key == $text.as_bytes() {
                    return Some(Self::$name);
                })*
                None
            }

            fn quoted(self) -> &'static str {
                match self {
                    $(Self::$name => concat!("\"", $text, "\":"),)*
                }
            }
        }
    };
}

fields! {
    AddGenerationPrompt = "add_generation_prompt",
    AudioUrl = "audio_url",
    BootstrapHost = "bootstrap_host",
    BootstrapPort = "bootstrap_port",
    BootstrapRoom = "bootstrap_room",
    CacheHitThreshold = "cache_hit_threshold",
    Content = "content",
    ContinueFinalMessage = "continue_final_message",
    EcTransferParams = "ec_transfer_params",
    ExtraArgs = "extra_args",
    ImageUrl = "image_url",
    KvTransferParams = "kv_transfer_params",
    Logprobs = "logprobs",
    MaxCompletionTokens = "max_completion_tokens",
    MaxOutputTokens = "max_output_tokens",
    MaxTokens = "max_tokens",
    Messages = "messages",
    MinTokens = "min_tokens",
    N = "n",
    RemoteDpRank = "remote_dp_rank",
    RemoteDpRankOverride = "remote_dp_rank_override",
    RemoteDpSize = "remote_dp_size",
    RemoteDpSizeLocal = "remote_dp_size_local",
    RemoteHandshakePort = "remote_handshake_port",
    RemoteHosts = "remote_hosts",
    RemoteNotifyPort = "remote_notify_port",
    SamplingParams = "sampling_params",
    Stream = "stream",
    StreamOptions = "stream_options",
    Tools = "tools",
    TransferId = "transfer_id",
    Type = "type",
    Url = "url",
    VideoUrl = "video_url",
    VllmXargs = "vllm_xargs",
}

/// One known member.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Member {
    field: Field,
    /// Position among all members.
    index: usize,
    /// Where the key's quote is.
    start: usize,
    value: Range<usize>,
    comma_before: Option<usize>,
    comma_after: Option<usize>,
}

/// An object in a text; all offsets address the text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Object {
    close: usize,
    members: usize,
    known: SmallVec<[Member; 12]>,
}

/// What becomes of a field: a new value, or nothing.
pub(super) type Change = (Field, Option<Bytes>);

/// A part of the text and what stands there instead.
pub(super) type Splice = (Range<usize>, Bytes);

impl Object {
    /// Reads a text that is one object.
    pub(super) fn parse(text: &[u8]) -> Result<Self, JsonError> {
        let mut cursor = Cursor { text, at: 0 };
        cursor.space();
        if cursor.peek() != Some(b'{') {
            return Err(match cursor.peek() {
                Some(b'[' | b'"' | b'-' | b'0'..=b'9' | b't' | b'f' | b'n') => {
                    JsonError::NotAnObject
                }
                _ => JsonError::Invalid(cursor.at),
            });
        }
        let object = cursor.object()?;
        cursor.space();
        if cursor.at != text.len() {
            return Err(JsonError::Invalid(cursor.at));
        }
        Ok(object)
    }

    /// Reads the object at `range`, a value that was found before; `None` for any other value.
    pub(super) fn at(text: &[u8], range: &Range<usize>) -> Option<Self> {
        let mut cursor = Cursor {
            text: text.get(..range.end)?,
            at: range.start,
        };
        (cursor.peek() == Some(b'{')).then_some(())?;
        cursor.object().ok()
    }

    /// The value of `field`; of duplicates the last, which is what engines read.
    pub(super) fn value(&self, field: Field) -> Option<Range<usize>> {
        let found = self.known.iter().rev().find(|m| m.field == field)?;
        Some(found.value.clone())
    }

    /// All values of `field`.
    pub(super) fn values(&self, field: Field) -> impl Iterator<Item = Range<usize>> + '_ {
        let of_field = self.known.iter().filter(move |m| m.field == field);
        of_field.map(|m| m.value.clone())
    }

    /// Adds to `splices` what makes `changes` true. A changed field is changed wherever it occurs, so
    /// that it does not matter which duplicate a reader takes; a missing one is appended.
    pub(super) fn change(&self, changes: &[Change], splices: &mut Vec<Splice>) {
        let mut left = self.members;
        // Members at the front that go are cut with the comma behind them, others with the one before.
        let mut front = 0;
        for member in &self.known {
            let Some((_, value)) = changes.iter().find(|(field, _)| *field == member.field) else {
                continue;
            };
            if let Some(value) = value {
                splices.push((member.value.clone(), value.clone()));
                continue;
            }
            left -= 1;
            let cut = if member.index == front {
                front += 1;
                member.start
                    ..member
                        .comma_after
                        .map_or(member.value.end, |comma| comma + 1)
            } else {
                member.comma_before.unwrap_or(member.start)..member.value.end
            };
            splices.push((cut, Bytes::new()));
        }
        for (field, value) in changes {
            let Some(value) = value else { continue };
            if self.known.iter().any(|m| m.field == *field) {
                continue;
            }
            let comma = if left == 0 { "" } else { "," };
            left += 1;
            let mut member = format!("{comma}{}", field.quoted()).into_bytes();
            member.extend_from_slice(value);
            splices.push((self.close..self.close, member.into()));
        }
    }
}

/// The values of the array at `range`; `None` for any other value.
pub(super) fn elements(text: &[u8], range: &Range<usize>) -> Option<Vec<Range<usize>>> {
    let mut cursor = Cursor {
        text: text.get(..range.end)?,
        at: range.start,
    };
    cursor.eat(b'[').then_some(())?;
    let mut out = Vec::new();
    cursor.space();
    if cursor.eat(b']') {
        return Some(out);
    }
    loop {
        cursor.space();
        out.push(cursor.value().ok()?);
        cursor.space();
        if !cursor.eat(b',') {
            return Some(out);
        }
    }
}

/// `text` with `splices` made, in slices of it.
pub(super) fn splice(text: &Bytes, mut splices: Vec<Splice>) -> Vec<Bytes> {
    // Stable: insertions at one place stay in order.
    splices.sort_by_key(|(range, _)| range.start);
    let mut out = Vec::with_capacity(2 * splices.len() + 1);
    let mut at = 0;
    for (range, insert) in splices {
        debug_assert!(at <= range.start && range.end <= text.len());
        out.push(text.slice(at..range.start.max(at)));
        out.push(insert);
        at = range.end.max(at);
    }
    out.push(text.slice(at..));
    out.retain(|piece| !piece.is_empty());
    out
}

/// A JSON string.
pub(super) fn quoted(text: &str) -> Bytes {
    serde_json::Value::from(text).to_string().into()
}

struct Cursor<'a> {
    text: &'a [u8],
    at: usize,
}

impl Cursor<'_> {
    fn peek(&self) -> Option<u8> {
        self.text.get(self.at).copied()
    }

    fn eat(&mut self, byte: u8) -> bool {
        let found = self.peek() == Some(byte);
        self.at += usize::from(found);
        found
    }

    fn expect(&mut self, byte: u8) -> Result<(), JsonError> {
        if self.eat(byte) {
            Ok(())
        } else {
            Err(JsonError::Invalid(self.at))
        }
    }

    fn space(&mut self) {
        while matches!(self.peek(), Some(b' ' | b'\n' | b'\r' | b'\t')) {
            self.at += 1;
        }
    }

    /// An object whose brace is next.
    fn object(&mut self) -> Result<Object, JsonError> {
        self.expect(b'{')?;
        let mut object = Object {
            close: 0,
            members: 0,
            known: SmallVec::new(),
        };
        self.space();
        if self.eat(b'}') {
            object.close = self.at - 1;
            return Ok(object);
        }
        let mut comma_before = None;
        loop {
            self.space();
            let start = self.at;
            let field = self.key()?;
            let value = self.value()?;
            self.space();
            let comma_after = (self.peek() == Some(b',')).then_some(self.at);
            if let Some(field) = field {
                if object.known.len() == MAX_KNOWN {
                    return Err(JsonError::TooManyDuplicates);
                }
                object.known.push(Member {
                    field,
                    index: object.members,
                    start,
                    value,
                    comma_before,
                    comma_after,
                });
            }
            object.members += 1;
            comma_before = comma_after;
            if comma_after.is_none() {
                self.expect(b'}')?;
                object.close = self.at - 1;
                return Ok(object);
            }
            self.at += 1;
        }
    }

    /// A key, its colon and the space behind it.
    fn key(&mut self) -> Result<Option<Field>, JsonError> {
        let start = self.at;
        let escaped = self.string()?;
        let quoted = self.text.get(start..self.at).unwrap_or_default();
        let field = if escaped {
            // Undecodable ones (lone surrogates) are no name that we know.
            let decoded = serde_json::from_slice::<String>(quoted).ok();
            decoded.and_then(|key| Field::of(key.as_bytes()))
        } else {
            Field::of(quoted.get(1..quoted.len() - 1).unwrap_or_default())
        };
        self.space();
        self.expect(b':')?;
        self.space();
        Ok(field)
    }

    /// Any value; returns where it is.
    fn value(&mut self) -> Result<Range<usize>, JsonError> {
        let start = self.at;
        let mut open: SmallVec<[u8; 32]> = SmallVec::new();
        loop {
            let kind = self.peek().ok_or(JsonError::Invalid(self.at))?;
            match kind {
                b'{' | b'[' => {
                    self.at += 1;
                    self.space();
                    if !self.eat(if kind == b'{' { b'}' } else { b']' }) {
                        if open.len() == MAX_DEPTH {
                            return Err(JsonError::TooDeep);
                        }
                        open.push(kind);
                        if kind == b'{' {
                            self.key()?;
                        }
                        continue;
                    }
                }
                b'"' => {
                    self.string()?;
                }
                _ => self.scalar()?,
            }
            if self.close(&mut open)? {
                return Ok(start..self.at);
            }
        }
    }

    /// Behind a value: closes what ends here, or goes to the next value. True once nothing is open.
    fn close(&mut self, open: &mut SmallVec<[u8; 32]>) -> Result<bool, JsonError> {
        while let Some(&kind) = open.last() {
            self.space();
            match (kind, self.peek()) {
                (b'{', Some(b'}')) | (b'[', Some(b']')) => {
                    self.at += 1;
                    open.pop();
                }
                (_, Some(b',')) => {
                    self.at += 1;
                    self.space();
                    if kind == b'{' {
                        self.key()?;
                    }
                    return Ok(false);
                }
                _ => return Err(JsonError::Invalid(self.at)),
            }
        }
        Ok(true)
    }

    /// A string; true when it has an escape.
    fn string(&mut self) -> Result<bool, JsonError> {
        self.expect(b'"')?;
        let mut escaped = false;
        loop {
            let rest = self.text.get(self.at..).unwrap_or_default();
            let found = find_string_end(rest).ok_or(JsonError::Invalid(self.text.len()))?;
            self.at += found + 1;
            if rest.get(found) == Some(&b'"') {
                return Ok(escaped);
            }
            escaped = true;
            let hex = rest.get(found + 2..found + 6);
            self.at += match rest.get(found + 1) {
                Some(b'"' | b'\\' | b'/' | b'b' | b'f' | b'n' | b'r' | b't') => 1,
                Some(b'u') if hex.is_some_and(|h| h.iter().all(u8::is_ascii_hexdigit)) => 5,
                _ => return Err(JsonError::Invalid(self.at)),
            };
        }
    }

    fn scalar(&mut self) -> Result<(), JsonError> {
        let start = self.at;
        while matches!(
            self.peek(),
            Some(b'0'..=b'9' | b'a'..=b'z' | b'A'..=b'Z' | b'+' | b'-' | b'.')
        ) {
            self.at += 1;
        }
        match self.text.get(start..self.at).unwrap_or_default() {
            b"true" | b"false" | b"null" => Ok(()),
            number if is_number(number) => Ok(()),
            _ => Err(JsonError::Invalid(start)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn changed(text: &str, changes: &[Change]) -> String {
        let text = Bytes::copy_from_slice(text.as_bytes());
        let mut splices = Vec::new();
        Object::parse(&text).unwrap().change(changes, &mut splices);
        String::from_utf8(splice(&text, splices).concat()).unwrap()
    }

    fn set(field: Field, value: &'static str) -> Change {
        (field, Some(Bytes::from_static(value.as_bytes())))
    }

    #[test]
    fn members_are_changed_removed_and_appended_in_place() {
        let text = r#"{ "stream" : true, "a":9007199254740993,"a":2 ,"max_tokens":5}"#;
        assert_eq!(
            changed(
                text,
                &[
                    set(Field::Stream, "false"),
                    (Field::MaxTokens, None),
                    set(Field::N, "1")
                ]
            ),
            r#"{ "stream" : false, "a":9007199254740993,"a":2 ,"n":1}"#
        );
    }

    #[test]
    fn removal_leaves_no_comma_behind() {
        let gone = |text| changed(text, &[(Field::Stream, None), (Field::N, None)]);
        assert_eq!(gone(r#"{"stream":1}"#), "{}");
        assert_eq!(gone(r#"{"stream":1,"n":2}"#), "{}");
        assert_eq!(gone(r#"{"stream":1,"n":2,"x":3}"#), r#"{"x":3}"#);
        assert_eq!(gone(r#"{"stream":1,"x":3,"n":2,"stream":4}"#), r#"{"x":3}"#);
        assert_eq!(gone(r#"{"x":3,"n":2,"y":1}"#), r#"{"x":3,"y":1}"#);
        let swap = |text| changed(text, &[(Field::Stream, None), set(Field::N, "7")]);
        assert_eq!(swap(r#"{"stream":1}"#), r#"{"n":7}"#);
        assert_eq!(swap("{}"), r#"{"n":7}"#);
        assert_eq!(swap(r#"{"n":1,"n":2}"#), r#"{"n":7,"n":7}"#);
    }

    #[test]
    fn keys_spelled_with_escapes_are_found() {
        assert_eq!(
            changed(
                r#"{"kv_transfer\u005fparams":{"a":1},"b":1}"#,
                &[(Field::KvTransferParams, None)]
            ),
            r#"{"b":1}"#
        );
    }

    #[test]
    fn what_is_not_an_object_is_refused() {
        for bad in [
            "",
            " ",
            "{",
            "}",
            "{]",
            r#"{"a"}"#,
            r#"{"a":}"#,
            r#"{"a":1,}"#,
            r#"{"a":1 "b":2}"#,
            r#"{"a":01}"#,
            r#"{"a":nul}"#,
            r#"{"a":NaN}"#,
            r#"{"a":"\x"}"#,
            r#"{"a":"\u12g4"}"#,
            r#"{"a":"b}"#,
            r#"{"a":[1,]}"#,
            r#"{"a":[1}"#,
            r#"{"a":1]"#,
            r#"{"a":1}x"#,
            r"{a:1}",
            r#"{,"a":1}"#,
            "\u{feff}{}",
            "{\0}",
        ] {
            assert!(
                matches!(Object::parse(bad.as_bytes()), Err(JsonError::Invalid(_))),
                "{bad}"
            );
        }
        assert_eq!(Object::parse(b"[1]"), Err(JsonError::NotAnObject));
        let deep = format!("{{\"a\":{}", "[".repeat(MAX_DEPTH + 1));
        assert_eq!(Object::parse(deep.as_bytes()), Err(JsonError::TooDeep));
        let many = format!("{{{}\"n\":1}}", "\"n\":1,".repeat(MAX_KNOWN));
        assert_eq!(
            Object::parse(many.as_bytes()),
            Err(JsonError::TooManyDuplicates)
        );
    }

    #[test]
    fn elements_of_arrays() {
        let text = br#"[ 1, {"a":[2]} ,"x"]"#;
        let found = elements(text, &(0..text.len())).unwrap();
        let texts: Vec<&[u8]> = found.into_iter().map(|r| &text[r]).collect();
        assert_eq!(texts, [&b"1"[..], br#"{"a":[2]}"#, br#""x""#]);
        assert_eq!(elements(b"[ ]", &(0..3)), Some(Vec::new()));
        assert_eq!(elements(b"{}", &(0..2)), None);
    }

    /// Members as a reader that keeps duplicates sees them, by another parser.
    fn members(text: &str) -> Vec<(String, String)> {
        struct Pairs(Vec<(String, String)>);
        impl<'de> serde::Deserialize<'de> for Pairs {
            fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
                struct V;
                impl<'de> serde::de::Visitor<'de> for V {
                    type Value = Pairs;
                    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                        f.write_str("an object")
                    }
                    fn visit_map<A: serde::de::MapAccess<'de>>(
                        self,
                        mut map: A,
                    ) -> Result<Pairs, A::Error> {
                        let mut out = Vec::new();
                        while let Some((k, v)) =
                            map.next_entry::<String, Box<serde_json::value::RawValue>>()?
                        {
                            out.push((k, v.get().to_owned()));
                        }
                        Ok(Pairs(out))
                    }
                }
                d.deserialize_map(V)
            }
        }
        serde_json::from_str::<Pairs>(text).unwrap().0
    }

    fn key() -> impl Strategy<Value = String> {
        prop_oneof![
            Just(r#""stream""#.to_owned()),
            Just(r#""max_tokens""#.to_owned()),
            Just(r#""str\u0065am""#.to_owned()),
            Just(r#""kv_transfer_params""#.to_owned()),
            "[a-z\u{e9}\"\\\\]{0,6}".prop_map(|k| serde_json::Value::from(k).to_string()),
        ]
    }

    fn value() -> impl Strategy<Value = String> {
        prop_oneof![
            Just("9007199254740993".to_owned()),
            Just("-1.50e+3".to_owned()),
            Just("null".to_owned()),
            Just(r#"[ 1,{"stream":true ,"x":[]}]"#.to_owned()),
            Just(r#"{"kv_transfer_params" : 1}"#.to_owned()),
            "[ -~\u{e9}]{0,80}".prop_map(|k| serde_json::Value::from(k).to_string()),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(400))]

        #[test]
        fn only_the_named_fields_change(
            pairs in prop::collection::vec((key(), value(), "[ \n\t]{0,2}"), 0..8),
        ) {
            let inner: Vec<String> =
                pairs.iter().map(|(k, v, s)| format!("{s}{k}{s}:{s}{v}{s}")).collect();
            let text = format!(" {{{}}} ", inner.join(","));
            let out = changed(&text, &[
                set(Field::Stream, "false"),
                (Field::KvTransferParams, None),
                set(Field::MaxTokens, "1"),
            ]);
            let mut expected: Vec<(String, String)> = members(&text)
                .into_iter()
                .filter(|(k, _)| k != "kv_transfer_params")
                .map(|(k, v)| match k.as_str() {
                    "stream" => (k, "false".to_owned()),
                    "max_tokens" => (k, "1".to_owned()),
                    _ => (k, v),
                })
                .collect();
            for (name, value) in [("stream", "false"), ("max_tokens", "1")] {
                if !expected.iter().any(|(k, _)| k == name) {
                    expected.push((name.to_owned(), value.to_owned()));
                }
            }
            prop_assert_eq!(members(&out), expected);
        }

        #[test]
        fn garbage_never_panics_and_valid_json_is_never_refused(
            pairs in prop::collection::vec((key(), value()), 0..6),
            edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
        ) {
            let inner: Vec<String> = pairs.iter().map(|(k, v)| format!("{k}:{v}")).collect();
            let mut text = format!("{{{}}}", inner.join(",")).into_bytes();
            for (index, byte) in edits {
                let at = index.index(text.len());
                text[at] = byte;
            }
            let ours = Object::parse(&text).is_ok();
            let theirs = serde_json::from_slice::<serde_json::Map<String, serde_json::Value>>(&text).is_ok();
            prop_assert!(ours || !theirs);
        }
    }
}
