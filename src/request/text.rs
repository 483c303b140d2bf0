//! From body bytes to the text they stand for: JSON escapes, piece borders, token estimates.

use std::ops::Range;

use super::{Body, EarlyPrompt, MediaItem, Prompt, Segment, TextEncoding};

/// UTF-8 bytes that count as one token where no tokenizer is asked.
pub const BYTES_PER_TOKEN: u64 = 4;
/// Tokens of a media item that nobody estimated: an image of 640 x 360 pixels, 1024 pixels a token.
pub const DEFAULT_IMAGE_TOKENS: u32 = 640 * 360 / 1024;

/// Decodes the inside of a JSON string. Bytes that are not UTF-8 become U+FFFD.
pub fn decode_json_string(inside: &[u8], escaped: bool) -> String {
    if !escaped {
        return String::from_utf8_lossy(inside).into_owned();
    }
    let mut out = Vec::with_capacity(inside.len());
    let mut decoder = Unescape::default();
    decoder.push(inside, &mut out);
    decoder.finish(&mut out);
    String::from_utf8_lossy(&out).into_owned()
}

/// Decodes one string, or `None` when it is none: JSON allows no control characters in it and no lone
/// surrogates, and it must be UTF-8.
pub fn decode_strict(body: &Body, range: Range<usize>, escaped: bool) -> Option<String> {
    let mut out = Vec::with_capacity(range.len().min(body.len()));
    let mut decoder = Unescape::default();
    for slice in body.slices(range) {
        if has_control(slice) {
            return None;
        }
        if escaped {
            decoder.push(slice, &mut out);
        } else {
            out.extend_from_slice(slice);
        }
    }
    decoder.finish(&mut out);
    (!decoder.lossy)
        .then(|| String::from_utf8(out).ok())
        .flatten()
}

/// True when `range` is the inside of a JSON string rather than raw JSON.
pub fn is_quoted(body: &Body, range: &Range<usize>) -> bool {
    let is_quote = |at: usize| body.slices(at..at + 1).next() == Some(b"\"");
    range.start.checked_sub(1).is_some_and(is_quote) && is_quote(range.end)
}

/// True with a character that JSON strings hold only as an escape.
pub(super) fn has_control(bytes: &[u8]) -> bool {
    // Without a branch for each byte.
    bytes
        .iter()
        .fold(0, |any, byte| any | u8::from(*byte < b' '))
        != 0
}

/// Hands the decoded bytes of one string to `f`, in slices of any length.
pub fn for_each_decoded(
    body: &Body,
    range: Range<usize>,
    escaped: bool,
    f: &mut impl FnMut(&[u8]),
) {
    if !escaped {
        body.slices(range).for_each(f);
        return;
    }
    let mut decoder = Unescape::default();
    let mut out = Vec::new();
    for slice in body.slices(range) {
        out.clear();
        decoder.push(slice, &mut out);
        f(&out);
    }
    out.clear();
    decoder.finish(&mut out);
    f(&out);
}

/// What a prompt is made of, in order.
#[derive(Debug)]
pub enum Piece<'a> {
    /// Decoded text.
    Text(&'a [u8]),
    /// A media item.
    Media(&'a MediaItem),
}

/// Hands the decoded content of a text prompt to `f`.
pub fn for_each_piece(segments: &[Segment], body: &Body, f: &mut impl FnMut(Piece<'_>)) {
    for segment in segments {
        match segment {
            Segment::Media(item) => f(Piece::Media(item)),
            Segment::Body { range, encoding } => {
                let escaped = *encoding == TextEncoding::JsonEscaped;
                for_each_decoded(body, range.clone(), escaped, &mut |bytes| {
                    f(Piece::Text(bytes));
                });
            }
        }
    }
}

/// Tokens of a prompt: its ids, or one per four decoded bytes (rounded up) and its media. `media` is
/// asked for the tokens of each item of a text, and told at which token the item begins; the media of
/// a token prompt are part of its ids. `early` is what was read of this prompt while it arrived.
pub fn token_count(
    prompt: &Prompt,
    body: &Body,
    early: Option<&EarlyPrompt>,
    media: &mut impl FnMut(&MediaItem, u64) -> u64,
) -> u64 {
    let segments = match prompt {
        Prompt::Tokens { ids, .. } => return ids.len() as u64,
        Prompt::Text(segments) => segments,
    };
    let mut tokens = 0;
    let (read, mut bytes) = early.map_or((0, 0), |early| (early.segments(), early.bytes()));
    for segment in segments.get(read..).unwrap_or_default() {
        match segment {
            Segment::Body {
                range,
                encoding: TextEncoding::Verbatim,
            } => bytes += range.len() as u64,
            Segment::Body { range, .. } => {
                for_each_decoded(body, range.clone(), true, &mut |b| {
                    bytes += b.len() as u64;
                });
            }
            Segment::Media(item) => {
                // Media begin at a token border.
                tokens += bytes.div_ceil(BYTES_PER_TOKEN);
                bytes = 0;
                tokens += media(item, tokens);
            }
        }
    }
    tokens + bytes.div_ceil(BYTES_PER_TOKEN)
}

/// JSON string unescaping over pieces. The scanner has checked the syntax; what still cannot be
/// decoded (a lone surrogate) becomes U+FFFD.
#[derive(Debug, Clone, Default)]
pub(super) struct Unescape {
    pending: Pending,
    /// A high surrogate that waits for its low half.
    high: Option<u16>,
    /// Something became U+FFFD.
    pub(super) lossy: bool,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum Pending {
    #[default]
    None,
    Backslash,
    Hex {
        digits: u8,
        value: u16,
    },
}

/// Bytes that are looked at and copied together.
const WORD: usize = size_of::<u64>();

impl Unescape {
    /// Appends what `bytes` stand for to `out`.
    pub(super) fn push(&mut self, bytes: &[u8], out: &mut Vec<u8>) {
        let mut rest = bytes;
        while let Some((&first, behind)) = rest.split_first() {
            rest = match self.pending {
                Pending::None if first == b'\\' => {
                    self.pending = Pending::Backslash;
                    behind
                }
                Pending::None => {
                    self.drop_lone_surrogate(out);
                    copy_simple(rest, out)
                }
                Pending::Backslash => {
                    self.simple(first, out);
                    behind
                }
                Pending::Hex { digits, value } => {
                    self.digit(first, digits, value, out);
                    behind
                }
            };
        }
    }

    /// The string ended.
    pub(super) fn finish(&mut self, out: &mut Vec<u8>) {
        self.drop_lone_surrogate(out);
    }

    fn simple(&mut self, byte: u8, out: &mut Vec<u8>) {
        if byte == b'u' {
            self.pending = Pending::Hex {
                digits: 0,
                value: 0,
            };
            return;
        }
        self.pending = Pending::None;
        self.drop_lone_surrogate(out);
        out.push(meaning(byte));
    }

    fn digit(&mut self, digit: u8, digits: u8, value: u16, out: &mut Vec<u8>) {
        let digit = char::from(digit)
            .to_digit(16)
            .and_then(|d| u16::try_from(d).ok())
            .unwrap_or(0);
        let value = value << 4 | digit;
        if digits == 3 {
            self.pending = Pending::None;
            self.unit(value, out);
        } else {
            self.pending = Pending::Hex {
                digits: digits + 1,
                value,
            };
        }
    }

    fn unit(&mut self, unit: u16, out: &mut Vec<u8>) {
        if let Some(high) = self.high.take() {
            if let Some(Ok(character)) = char::decode_utf16([high, unit]).next()
                && (0xDC00..0xE000).contains(&unit)
            {
                append(out, character);
                return;
            }
            self.replace(out);
        }
        if (0xD800..0xDC00).contains(&unit) {
            self.high = Some(unit);
            return;
        }
        match char::from_u32(u32::from(unit)) {
            Some(character) => append(out, character),
            None => self.replace(out),
        }
    }

    fn drop_lone_surrogate(&mut self, out: &mut Vec<u8>) {
        if self.high.take().is_some() {
            self.replace(out);
        }
    }

    fn replace(&mut self, out: &mut Vec<u8>) {
        self.lossy = true;
        append(out, char::REPLACEMENT_CHARACTER);
    }
}

/// Decodes up to the end, an escape that is not whole, or one of the form `\uXXXX`; returns what is left, which
/// begins with a backslash. Words are copied before it is known whether they end in an escape, which costs
/// less than finding the runs between escapes first.
fn copy_simple<'a>(bytes: &'a [u8], out: &mut Vec<u8>) -> &'a [u8] {
    let start = out.len();
    out.resize(start + bytes.len(), 0);
    let (mut at, mut end) = (0, start);
    while let Some(word) = bytes.get(at..).and_then(<[u8]>::first_chunk::<WORD>) {
        let Some(to) = out.get_mut(end..).and_then(<[u8]>::first_chunk_mut) else {
            break;
        };
        *to = *word;
        let plain = plain_bytes(*word);
        let Some(to) = to.get_mut(plain) else {
            (at, end) = (at + WORD, end + WORD);
            continue;
        };
        match bytes.get(at + plain + 1) {
            None | Some(b'u') => break,
            Some(&escape) => *to = meaning(escape),
        }
        (at, end) = (at + plain + 2, end + plain + 1);
    }
    // Less than a word, or up to an escape that is not simple.
    while let (Some(&byte), Some(to)) = (bytes.get(at), out.get_mut(end)) {
        *to = match (byte, bytes.get(at + 1)) {
            (b'\\', None | Some(b'u')) => break,
            (b'\\', Some(&escape)) => {
                at += 1;
                meaning(escape)
            }
            _ => byte,
        };
        (at, end) = (at + 1, end + 1);
    }
    out.truncate(end);
    bytes.get(at..).unwrap_or_default()
}

/// Bytes before the first backslash.
fn plain_bytes(word: [u8; WORD]) -> usize {
    const ONES: u64 = u64::from_le_bytes([1; WORD]);
    const TOPS: u64 = u64::from_le_bytes([0x80; WORD]);
    const BACKSLASHES: u64 = u64::from_le_bytes([b'\\'; WORD]);
    // A zero byte borrows from its top bit; those before the first one are exact.
    let zeros = u64::from_le_bytes(word) ^ BACKSLASHES;
    let found = zeros.wrapping_sub(ONES) & !zeros & TOPS;
    (found.trailing_zeros() / 8) as usize
}

/// The byte that a backslash with `escape` stands for.
fn meaning(escape: u8) -> u8 {
    match escape {
        b'n' => b'\n',
        b't' => b'\t',
        b'r' => b'\r',
        b'b' => 8,
        b'f' => 12,
        b'/' | b'"' => escape,
        _ => b'\\',
    }
}

fn append(out: &mut Vec<u8>, character: char) {
    out.extend_from_slice(character.encode_utf8(&mut [0; 4]).as_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;
    use proptest::prelude::*;

    fn decode(inside: &str) -> String {
        decode_json_string(inside.as_bytes(), true)
    }

    #[test]
    fn escapes_decode_as_json_says() {
        assert_eq!(decode(r#"a\n\t\r\b\f\/\\\"z"#), "a\n\t\r\u{8}\u{c}/\\\"z");
        assert_eq!(decode(r"\u00e9\uD83D\uDE00x"), "é\u{1F600}x");
    }

    #[test]
    fn lone_surrogates_become_replacement_characters() {
        assert_eq!(decode(r"\uD83Dx"), "\u{FFFD}x");
        assert_eq!(decode(r"\uDE00"), "\u{FFFD}");
        assert_eq!(decode(r"\uD83D\uD83D\uDE00"), "\u{FFFD}\u{1F600}");
        assert_eq!(decode(r"\uD83D\n"), "\u{FFFD}\n");
        assert_eq!(decode(r"\uD83D\u0041"), "\u{FFFD}A");
    }

    #[test]
    fn tokens_are_four_decoded_bytes_each() {
        // `a\nb` decodes to 3 bytes, `cde` is 3 more: 6 bytes are 2 tokens; an image of 7 tokens
        // begins behind 1 token and leaves 3 bytes, which are another.
        let body = Body::from(r"a\nbcde");
        let text = |range, encoding| Segment::Body { range, encoding };
        let escaped = text(0..4, TextEncoding::JsonEscaped);
        let plain = text(4..7, TextEncoding::Verbatim);
        let image = MediaItem {
            modality: "image",
            hash: 1,
            identifier: None,
            token_offset: None,
            tokens: None,
            extent: crate::request::Extent::Unknown,
        };
        let count = |segments| {
            let mut offsets = Vec::new();
            let tokens = token_count(&Prompt::Text(segments), &body, None, &mut |_, at| {
                offsets.push(at);
                7
            });
            (tokens, offsets)
        };
        assert_eq!(count(vec![escaped.clone(), plain.clone()]), (2, vec![]));
        assert_eq!(
            count(vec![escaped, Segment::Media(image), plain]),
            (1 + 7 + 1, vec![1])
        );
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]

        #[test]
        fn any_split_decodes_like_serde(text in "[\\PC\n\t\"\\\\\u{1F600}é]{0,40}", ascii in any::<bool>(), cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..5)) {
            let quoted = serde_json::to_string(&text).unwrap();
            let mut inside = quoted[1..quoted.len() - 1].to_owned();
            if ascii {
                inside = inside.chars().flat_map(|c| {
                    let mut units = [0; 2];
                    if c.is_ascii() { vec![c] } else {
                        c.encode_utf16(&mut units).iter().flat_map(|u| format!("\\u{u:04x}").chars().collect::<Vec<_>>()).collect()
                    }
                }).collect();
            }
            let mut at: Vec<usize> = cuts.iter().map(|c| c.index(inside.len() + 1)).collect();
            at.extend([0, inside.len()]);
            at.sort_unstable();
            let body: Body = at.windows(2).map(|w| Bytes::copy_from_slice(&inside.as_bytes()[w[0]..w[1]])).collect();
            let mut out = Vec::new();
            for_each_decoded(&body, 0..inside.len(), true, &mut |bytes| out.extend_from_slice(bytes));
            prop_assert_eq!(String::from_utf8(out).unwrap(), text);
        }
    }
}
