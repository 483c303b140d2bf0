//! A resumable JSON scanner: one forward pass over body pieces, reporting where values lie.
//!
//! It checks structure (balance, commas, literals, numbers, escapes) and builds nothing. Strings are
//! skipped with SIMD search, so a long prompt costs about what reading it costs. Control characters
//! and UTF-8 inside strings are left to the engine, which reads the same bytes after us.

use std::ops::Range;

use memchr::memchr2;
use smallvec::SmallVec;

use super::Body;
use super::keys::Key;
use super::text::decode_json_string;

/// Containers that may be open at once; deeper bodies are refused.
pub const MAX_DEPTH: usize = 512;
/// Bytes of a key or scalar that are looked at. No known key and no usable number is longer.
const MAX_TOKEN_BYTES: usize = 64;

/// One step from the root to a value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Member of an object.
    Key(Key),
    /// Element of an array.
    Index(u32),
}

/// A value, at the moment it is complete (scalars, strings, containers) or begins (containers).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event<'a> {
    /// `{` was read.
    ObjectStart,
    /// `[` was read.
    ArrayStart,
    /// An object or array ended; the range includes its brackets.
    End(Range<usize>),
    /// A string; the range lies between its quotes.
    String {
        /// Absolute offsets.
        range: Range<usize>,
        /// It has at least one backslash.
        escaped: bool,
    },
    /// `true`, `false`, `null` or a number, as written (cut to 64 bytes).
    Scalar(&'a [u8]),
}

/// Receives events with the path of the value they belong to (empty for the root).
pub trait Visitor {
    /// Called in document order.
    fn visit(&mut self, path: &[Step], event: Event<'_>);
}

/// Why a body is not the JSON object it should be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ScanError {
    /// A byte that no JSON text has here.
    #[error("invalid character {found:?} at offset {at}")]
    Unexpected {
        /// The byte, as a character.
        found: char,
        /// Absolute offset.
        at: usize,
    },
    /// The text ended inside a value.
    #[error("unexpected end of JSON input")]
    Truncated,
    /// The root is not an object.
    #[error("the body is not a JSON object")]
    NotAnObject,
    /// More than [`MAX_DEPTH`] open containers.
    #[error("exceeded the depth limit of {MAX_DEPTH}")]
    TooDeep,
    /// A literal that is neither a number nor `true`, `false` or `null`.
    #[error("invalid literal before offset {at}")]
    Literal {
        /// Absolute offset behind it.
        at: usize,
    },
}

/// Scans a whole body whose root must be an object.
pub fn scan(body: &Body, visitor: &mut impl Visitor) -> Result<(), ScanError> {
    scan_range(body, 0..body.len(), visitor)
}

/// Scans the part of a body at `range`, whose root must be an object. Reported ranges address the
/// whole body.
pub fn scan_range(
    body: &Body,
    range: Range<usize>,
    visitor: &mut impl Visitor,
) -> Result<(), ScanError> {
    let mut scanner = Scanner {
        base: range.start,
        ..Scanner::default()
    };
    for slice in body.slices(range) {
        scanner.feed(slice, visitor)?;
    }
    scanner.finish()
}

/// A string value while it is read.
#[derive(Debug, Clone, Copy)]
pub struct OpenString<'a> {
    /// Path of the value.
    pub path: &'a [Step],
    /// Absolute offset behind the opening quote.
    pub start: usize,
    /// It has at least one backslash so far.
    pub escaped: bool,
}

/// Bytes that are looked at together.
const STRIDE: usize = 64;

/// Bytes that are looked at in one register, and how many times before strides are worth their while: in
/// source code an escape follows some 30 bytes after the other.
const WORD: usize = size_of::<u64>();
const WORDS: usize = 8;

/// The first quote or backslash. Long runs of plain text are passed in strides that the compiler turns
/// into vector compares; `memchr2` alone is no faster here, because under fat LTO its vector
/// operations become calls (Rust 1.95).
pub(crate) fn find_string_end(bytes: &[u8]) -> Option<usize> {
    let mut at = 0;
    for _ in 0..WORDS {
        let Some(word) = bytes.get(at..).and_then(<[u8]>::first_chunk) else {
            break;
        };
        let plain = plain_bytes(*word);
        if plain < WORD {
            return Some(at + plain);
        }
        at += WORD;
    }
    Some(at + find_in_long(bytes.get(at..)?)?)
}

/// Bytes before the first quote or backslash.
fn plain_bytes(word: [u8; WORD]) -> usize {
    const ONES: u64 = u64::from_le_bytes([1; WORD]);
    const TOPS: u64 = u64::from_le_bytes([0x80; WORD]);
    // A byte that is zero borrows from its top bit; the first one found is right.
    let zero = |bytes: u64| bytes.wrapping_sub(ONES) & !bytes;
    let word = u64::from_le_bytes(word);
    let quotes = word ^ u64::from_le_bytes([b'"'; WORD]);
    let backslashes = word ^ u64::from_le_bytes([b'\\'; WORD]);
    let found = (zero(quotes) | zero(backslashes)) & TOPS;
    (found.trailing_zeros() / 8) as usize
}

fn find_in_long(bytes: &[u8]) -> Option<usize> {
    let plain = |stride: &&[u8]| {
        let special = |byte: &u8| u8::from(*byte == b'"') | u8::from(*byte == b'\\');
        stride.iter().fold(0, |any, byte| any | special(byte)) == 0
    };
    let skipped = bytes.chunks_exact(STRIDE).take_while(plain).count() * STRIDE;
    let found = memchr2(b'"', b'\\', bytes.get(skipped..)?)?;
    Some(skipped + found)
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Root,
    Value,
    ValueOrEnd,
    KeyOrEnd,
    Key,
    Colon,
    AfterValue,
    String { key: bool },
    Escape { key: bool },
    Hex { key: bool, left: u8 },
    Scalar,
    Done,
}

#[derive(Debug)]
struct Frame {
    start: usize,
    object: bool,
}

/// The scanner; feed it pieces in order, then [`Scanner::finish`].
#[derive(Debug)]
pub struct Scanner {
    state: State,
    /// Absolute offset of the current piece's first byte.
    base: usize,
    frames: Vec<Frame>,
    path: SmallVec<[Step; 16]>,
    start: usize,
    escaped: bool,
    token: SmallVec<[u8; MAX_TOKEN_BYTES]>,
    token_cut: bool,
}

impl Default for Scanner {
    fn default() -> Self {
        Self {
            state: State::Root,
            base: 0,
            frames: Vec::new(),
            path: SmallVec::new(),
            start: 0,
            escaped: false,
            token: SmallVec::new(),
            token_cut: false,
        }
    }
}

impl Scanner {
    /// Reads one piece.
    pub fn feed(&mut self, piece: &[u8], visitor: &mut impl Visitor) -> Result<(), ScanError> {
        let mut at = 0;
        while let Some(&byte) = piece.get(at) {
            at = match self.state {
                State::String { key } => self.string(piece, at, key, visitor),
                State::Escape { key } => self.escape(byte, at, key)?,
                State::Hex { key, left } => self.hex(byte, at, key, left)?,
                State::Scalar => self.scalar(byte, at, visitor)?,
                _ if matches!(byte, b' ' | b'\n' | b'\r' | b'\t') => at + 1,
                _ => {
                    self.structure(byte, at, visitor)?;
                    at + 1
                }
            };
        }
        self.base += piece.len();
        Ok(())
    }

    /// The string value, not key, whose end was not read yet.
    pub fn open_string(&self) -> Option<OpenString<'_>> {
        let in_value = matches!(
            self.state,
            State::String { key: false }
                | State::Escape { key: false }
                | State::Hex { key: false, .. }
        );
        in_value.then_some(OpenString {
            path: &self.path,
            start: self.start,
            escaped: self.escaped,
        })
    }

    /// Checks that the root value is complete.
    pub fn finish(&self) -> Result<(), ScanError> {
        if self.state == State::Done {
            Ok(())
        } else {
            Err(ScanError::Truncated)
        }
    }

    fn structure(
        &mut self,
        byte: u8,
        at: usize,
        visitor: &mut impl Visitor,
    ) -> Result<(), ScanError> {
        let unexpected = ScanError::Unexpected {
            found: char::from(byte),
            at: self.base + at,
        };
        match (self.state, byte) {
            (State::Root, b'{') => self.open(true, at, visitor),
            (State::Root, _) => Err(ScanError::NotAnObject),
            (State::ValueOrEnd, b']') | (State::KeyOrEnd, b'}') => {
                self.close(at, visitor);
                Ok(())
            }
            (State::KeyOrEnd | State::Key, b'"') => {
                self.begin_string(at, true);
                Ok(())
            }
            (State::Colon, b':') => {
                self.state = State::Value;
                Ok(())
            }
            (State::Value | State::ValueOrEnd, _) => {
                self.begin_value(byte, at, visitor, unexpected)
            }
            (State::AfterValue, _) => self.after_value(byte, at, visitor, unexpected),
            _ => Err(unexpected),
        }
    }

    fn begin_value(
        &mut self,
        byte: u8,
        at: usize,
        visitor: &mut impl Visitor,
        unexpected: ScanError,
    ) -> Result<(), ScanError> {
        match byte {
            b'{' => return self.open(true, at, visitor),
            b'[' => return self.open(false, at, visitor),
            b'"' => self.begin_string(at, false),
            b'-' | b'0'..=b'9' | b't' | b'f' | b'n' => {
                self.token.clear();
                self.token_cut = false;
                self.token.push(byte);
                self.state = State::Scalar;
            }
            _ => return Err(unexpected),
        }
        Ok(())
    }

    fn after_value(
        &mut self,
        byte: u8,
        at: usize,
        visitor: &mut impl Visitor,
        unexpected: ScanError,
    ) -> Result<(), ScanError> {
        let in_object = self.frames.last().is_some_and(|f| f.object);
        match byte {
            b',' if in_object => {
                self.path.pop();
                self.state = State::Key;
            }
            b',' => {
                if let Some(Step::Index(index)) = self.path.last_mut() {
                    *index = index.saturating_add(1);
                }
                self.state = State::Value;
            }
            b'}' if in_object => {
                self.path.pop();
                self.close(at, visitor);
            }
            b']' if !in_object => {
                self.close(at, visitor);
            }
            _ => return Err(unexpected),
        }
        Ok(())
    }

    fn open(
        &mut self,
        object: bool,
        at: usize,
        visitor: &mut impl Visitor,
    ) -> Result<(), ScanError> {
        if self.frames.len() >= MAX_DEPTH {
            return Err(ScanError::TooDeep);
        }
        visitor.visit(
            &self.path,
            if object {
                Event::ObjectStart
            } else {
                Event::ArrayStart
            },
        );
        self.frames.push(Frame {
            start: self.base + at,
            object,
        });
        if object {
            self.state = State::KeyOrEnd;
        } else {
            self.path.push(Step::Index(0));
            self.state = State::ValueOrEnd;
        }
        Ok(())
    }

    /// An object's last key is popped by the caller; an array's index is popped here.
    fn close(&mut self, at: usize, visitor: &mut impl Visitor) {
        let Some(frame) = self.frames.pop() else {
            return;
        };
        if !frame.object {
            self.path.pop();
        }
        visitor.visit(&self.path, Event::End(frame.start..self.base + at + 1));
        self.value_done();
    }

    fn value_done(&mut self) {
        self.state = if self.frames.is_empty() {
            State::Done
        } else {
            State::AfterValue
        };
    }

    fn begin_string(&mut self, at: usize, key: bool) {
        self.start = self.base + at + 1;
        self.escaped = false;
        self.token.clear();
        self.token_cut = false;
        self.state = State::String { key };
    }

    fn string(&mut self, piece: &[u8], at: usize, key: bool, visitor: &mut impl Visitor) -> usize {
        let (at, found) = self.find_end(piece, at, key);
        let rest = piece.get(at..).unwrap_or_default();
        let run = found.unwrap_or(rest.len());
        if key {
            self.capture(rest.get(..run).unwrap_or_default());
        }
        let Some(offset) = found else {
            return piece.len();
        };
        if rest.get(offset) == Some(&b'\\') {
            self.escaped = true;
            if key {
                self.capture(b"\\");
            }
            self.state = State::Escape { key };
            return at + offset + 1;
        }
        if key {
            let known = match (self.token_cut, self.escaped) {
                (true, _) => Key::Other,
                (false, false) => Key::of(&self.token),
                (false, true) => Key::of(decode_json_string(&self.token, true).as_bytes()),
            };
            self.path.push(Step::Key(known));
            self.state = State::Colon;
        } else {
            let range = self.start..self.base + at + offset;
            visitor.visit(
                &self.path,
                Event::String {
                    range,
                    escaped: self.escaped,
                },
            );
            self.value_done();
        }
        at + offset + 1
    }

    /// Where the next run of plain text begins that does not end in an escape of one character, and its
    /// length if it ends in this piece. All of a key is read run by run.
    fn find_end(&mut self, piece: &[u8], mut at: usize, key: bool) -> (usize, Option<usize>) {
        loop {
            let rest = piece.get(at..).unwrap_or_default();
            let found = find_string_end(rest);
            let behind = found.and_then(|run| rest.get(run..));
            let Some((
                run,
                [
                    b'\\',
                    b'"' | b'\\' | b'/' | b'b' | b'f' | b'n' | b'r' | b't',
                    ..,
                ],
            )) = found.zip(behind)
            else {
                return (at, found);
            };
            if key {
                return (at, found);
            }
            self.escaped = true;
            at += run + 2;
        }
    }

    fn escape(&mut self, byte: u8, at: usize, key: bool) -> Result<usize, ScanError> {
        self.state = match byte {
            b'"' | b'\\' | b'/' | b'b' | b'f' | b'n' | b'r' | b't' => State::String { key },
            b'u' => State::Hex { key, left: 4 },
            _ => {
                return Err(ScanError::Unexpected {
                    found: char::from(byte),
                    at: self.base + at,
                });
            }
        };
        if key {
            self.capture(&[byte]);
        }
        Ok(at + 1)
    }

    fn hex(&mut self, byte: u8, at: usize, key: bool, left: u8) -> Result<usize, ScanError> {
        if !byte.is_ascii_hexdigit() {
            return Err(ScanError::Unexpected {
                found: char::from(byte),
                at: self.base + at,
            });
        }
        if key {
            self.capture(&[byte]);
        }
        self.state = if left > 1 {
            State::Hex {
                key,
                left: left - 1,
            }
        } else {
            State::String { key }
        };
        Ok(at + 1)
    }

    fn scalar(
        &mut self,
        byte: u8,
        at: usize,
        visitor: &mut impl Visitor,
    ) -> Result<usize, ScanError> {
        if matches!(byte, b'0'..=b'9' | b'a'..=b'z' | b'A'..=b'Z' | b'+' | b'-' | b'.') {
            self.capture(&[byte]);
            return Ok(at + 1);
        }
        let valid = match self.token.as_slice() {
            b"true" | b"false" | b"null" => true,
            number if !self.token_cut => is_number(number),
            // A number longer than any use: its head was a number so far, its tail is digits at most.
            number => number
                .iter()
                .all(|b| matches!(b, b'0'..=b'9' | b'-' | b'+' | b'.' | b'e' | b'E')),
        };
        if !valid {
            return Err(ScanError::Literal { at: self.base + at });
        }
        visitor.visit(&self.path, Event::Scalar(&self.token));
        self.value_done();
        // The byte behind a scalar belongs to the structure.
        Ok(at)
    }

    fn capture(&mut self, bytes: &[u8]) {
        let room = MAX_TOKEN_BYTES - self.token.len().min(MAX_TOKEN_BYTES);
        if bytes.len() > room {
            self.token_cut = true;
        }
        self.token
            .extend_from_slice(bytes.get(..bytes.len().min(room)).unwrap_or_default());
    }
}

/// RFC 8259 number grammar.
pub(crate) fn is_number(text: &[u8]) -> bool {
    let digits = |t: &[u8]| t.iter().take_while(|b| b.is_ascii_digit()).count();
    let rest = text.strip_prefix(b"-").unwrap_or(text);
    let whole = digits(rest);
    if whole == 0 || (whole > 1 && rest.first() == Some(&b'0')) {
        return false;
    }
    let mut rest = rest.get(whole..).unwrap_or_default();
    if let Some(fraction) = rest.strip_prefix(b".") {
        let count = digits(fraction);
        if count == 0 {
            return false;
        }
        rest = fraction.get(count..).unwrap_or_default();
    }
    if let Some(exponent) = rest.strip_prefix(b"e").or_else(|| rest.strip_prefix(b"E")) {
        let exponent = exponent
            .strip_prefix(b"+")
            .or_else(|| exponent.strip_prefix(b"-"))
            .unwrap_or(exponent);
        let count = digits(exponent);
        return count > 0 && count == exponent.len();
    }
    rest.is_empty()
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;
    use proptest::prelude::*;

    #[derive(Debug, Default, PartialEq)]
    struct Log(Vec<String>);

    impl Visitor for Log {
        fn visit(&mut self, path: &[Step], event: Event<'_>) {
            self.0.push(format!("{path:?} {event:?}"));
        }
    }

    fn events(pieces: &[&[u8]]) -> Result<Log, ScanError> {
        let body: Body = pieces.iter().map(|p| Bytes::copy_from_slice(p)).collect();
        let mut log = Log::default();
        scan(&body, &mut log).map(|()| log)
    }

    #[test]
    fn values_are_reported_with_path_and_place() {
        let log = events(&[br#"{"model":"a\"b","prompt":[1,{"text":null}]}"#]).unwrap();
        assert_eq!(
            log.0,
            [
                "[] ObjectStart",
                r"[Key(Model)] String { range: 10..14, escaped: true }",
                "[Key(Prompt)] ArrayStart",
                "[Key(Prompt), Index(0)] Scalar([49])",
                "[Key(Prompt), Index(1)] ObjectStart",
                "[Key(Prompt), Index(1), Key(Text)] Scalar([110, 117, 108, 108])",
                "[Key(Prompt), Index(1)] End(28..41)",
                "[Key(Prompt)] End(25..42)",
                "[] End(0..43)",
            ]
        );
    }

    #[test]
    fn an_escaped_key_is_the_key_it_stands_for() {
        // `\u0065` is `e`; the second key is `mode` and a line feed.
        let log = events(&[br#"{"mod\u00"#, br#"65l":1,"mode\n":2,"\u006Dodel":3}"#]).unwrap();
        assert_eq!(
            log.0[1..4],
            [
                "[Key(Model)] Scalar([49])",
                "[Key(Other)] Scalar([50])",
                "[Key(Model)] Scalar([51])",
            ]
        );
    }

    #[test]
    fn a_range_is_scanned_with_the_bodys_offsets() {
        // The object lies at 3..14, over three pieces.
        let body: Body = ["\u{1}{x{", r#""model":"#, "1}{"]
            .into_iter()
            .map(Bytes::from)
            .collect();
        let mut log = Log::default();
        scan_range(&body, 3..14, &mut log).unwrap();
        assert_eq!(
            log.0,
            [
                "[] ObjectStart",
                "[Key(Model)] Scalar([49])",
                "[] End(3..14)"
            ]
        );
        let error = scan_range(&body, 3..12, &mut Log::default());
        assert_eq!(error, Err(ScanError::Truncated));
        let error = scan_range(&body, 0..14, &mut Log::default());
        assert_eq!(error, Err(ScanError::NotAnObject));
    }

    #[test]
    fn what_is_not_json_is_refused() {
        for bad in [
            "",
            " ",
            "[]",
            "1",
            "{",
            "}",
            "{]",
            r#"{"a"}"#,
            r#"{"a":}"#,
            r#"{"a":1,}"#,
            r#"{"a":1 "b":2}"#,
            r#"{"a":01}"#,
            r#"{"a":1.}"#,
            r#"{"a":-}"#,
            r#"{"a":1e}"#,
            r#"{"a":nul}"#,
            r#"{"a":truee}"#,
            r#"{"a":"\x"}"#,
            r#"{"a":"\u12g4"}"#,
            r#"{"a":"b}"#,
            r#"{"a":[1,]}"#,
            r#"{"a":[1}"#,
            r#"{"a":1]"#,
            r#"{"a":1}x"#,
            r#"{"a":1}{}"#,
            r"{a:1}",
            r#"{"a":+1}"#,
        ] {
            assert!(events(&[bad.as_bytes()]).is_err(), "{bad}");
            assert!(
                serde_json::from_str::<serde_json::Map<String, serde_json::Value>>(bad).is_err(),
                "{bad}"
            );
        }
    }

    #[test]
    fn depth_is_bounded() {
        let nested = |n: usize| format!("{{\"a\":{}{}}}", "[".repeat(n), "]".repeat(n));
        assert!(events(&[nested(MAX_DEPTH - 1).as_bytes()]).is_ok());
        assert_eq!(
            events(&[nested(MAX_DEPTH).as_bytes()]),
            Err(ScanError::TooDeep)
        );
    }

    fn json() -> impl Strategy<Value = serde_json::Value> {
        let text = || "[ -~é\u{1F600}\n]{0,12}";
        let leaf = prop_oneof![
            Just(serde_json::Value::Null),
            any::<bool>().prop_map(Into::into),
            any::<i64>().prop_map(Into::into),
            any::<f32>().prop_filter_map("finite", |f| serde_json::Number::from_f64(f.into())
                .map(Into::into)),
            text().prop_map(Into::into),
        ];
        leaf.prop_recursive(4, 40, 5, move |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..5).prop_map(Into::into),
                prop::collection::vec((text(), inner), 0..5)
                    .prop_map(|m| serde_json::Value::Object(m.into_iter().collect())),
            ]
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]

        #[test]
        fn any_chunking_reports_the_same(value in json(), cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..8)) {
            let text = format!("{{\"prompt\":{value},\"model\":\"m\"}}").into_bytes();
            let whole = events(&[&text]).unwrap();
            let mut at: Vec<usize> = cuts.iter().map(|c| c.index(text.len())).collect();
            at.extend([0, text.len()]);
            at.sort_unstable();
            let pieces: Vec<&[u8]> = at.windows(2).map(|w| &text[w[0]..w[1]]).collect();
            prop_assert_eq!(events(&pieces).unwrap(), whole);
        }

        #[test]
        fn garbage_never_panics_and_agrees_with_serde(value in json(), edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4)) {
            let mut text = format!("{{\"a\":{value}}}").into_bytes();
            for (index, byte) in edits {
                let i = index.index(text.len());
                text[i] = byte;
            }
            let ours = events(&[&text]).is_ok();
            let theirs = serde_json::from_slice::<serde_json::Map<String, serde_json::Value>>(&text).is_ok();
            // We are laxer about string contents (control characters, UTF-8, surrogates), never stricter.
            prop_assert!(ours || !theirs);
        }
    }
}
