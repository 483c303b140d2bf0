//! From body bytes to the text they stand for: JSON escapes, piece borders, token estimates.

use std::ops::Range;

use super::{Body, MediaItem, Prompt, PromptBlocks, Segment, TextEncoding};

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
    decoder.push(inside, &mut |bytes| out.extend_from_slice(bytes));
    decoder.finish(&mut |bytes| out.extend_from_slice(bytes));
    String::from_utf8_lossy(&out).into_owned()
}

/// Hands the decoded bytes of one string to `f`, in slices of any length. Runs without escapes are
/// slices of the body.
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
    for slice in body.slices(range) {
        decoder.push(slice, f);
    }
    decoder.finish(f);
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
    early: Option<&PromptBlocks>,
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
}

#[derive(Debug, Default, Clone, Copy)]
enum Pending {
    #[default]
    None,
    Backslash,
    Hex {
        digits: u8,
        value: u16,
    },
}

impl Unescape {
    pub(super) fn push(&mut self, mut bytes: &[u8], f: &mut impl FnMut(&[u8])) {
        while let Some((&first, rest)) = bytes.split_first() {
            match self.pending {
                Pending::None => {
                    let run = memchr::memchr(b'\\', bytes).unwrap_or(bytes.len());
                    let (plain, tail) = bytes.split_at(run);
                    if !plain.is_empty() {
                        self.drop_lone_surrogate(f);
                        f(plain);
                    }
                    if tail.is_empty() {
                        return;
                    }
                    self.pending = Pending::Backslash;
                    bytes = tail.get(1..).unwrap_or_default();
                }
                Pending::Backslash => {
                    self.simple(first, f);
                    bytes = rest;
                }
                Pending::Hex { digits, value } => {
                    let digit = char::from(first)
                        .to_digit(16)
                        .and_then(|d| u16::try_from(d).ok())
                        .unwrap_or(0);
                    let value = value << 4 | digit;
                    if digits == 3 {
                        self.pending = Pending::None;
                        self.unit(value, f);
                    } else {
                        self.pending = Pending::Hex {
                            digits: digits + 1,
                            value,
                        };
                    }
                    bytes = rest;
                }
            }
        }
    }

    /// The string ended.
    pub(super) fn finish(&mut self, f: &mut impl FnMut(&[u8])) {
        self.drop_lone_surrogate(f);
    }

    fn simple(&mut self, byte: u8, f: &mut impl FnMut(&[u8])) {
        if byte == b'u' {
            self.pending = Pending::Hex {
                digits: 0,
                value: 0,
            };
            return;
        }
        self.pending = Pending::None;
        self.drop_lone_surrogate(f);
        f(match byte {
            b'n' => b"\n",
            b't' => b"\t",
            b'r' => b"\r",
            b'b' => b"\x08",
            b'f' => b"\x0c",
            b'/' => b"/",
            b'"' => b"\"",
            _ => b"\\",
        });
    }

    fn unit(&mut self, unit: u16, f: &mut impl FnMut(&[u8])) {
        if let Some(high) = self.high.take() {
            if let Some(Ok(character)) = char::decode_utf16([high, unit]).next()
                && (0xDC00..0xE000).contains(&unit)
            {
                f(character.encode_utf8(&mut [0; 4]).as_bytes());
                return;
            }
            f("\u{FFFD}".as_bytes());
        }
        if (0xD800..0xDC00).contains(&unit) {
            self.high = Some(unit);
            return;
        }
        let character = char::from_u32(u32::from(unit)).unwrap_or('\u{FFFD}');
        f(character.encode_utf8(&mut [0; 4]).as_bytes());
    }

    fn drop_lone_surrogate(&mut self, f: &mut impl FnMut(&[u8])) {
        if self.high.take().is_some() {
            f("\u{FFFD}".as_bytes());
        }
    }
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
