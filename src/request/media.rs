//! Media items out of the strings that carry them, and the pixel size of an image sent inline.
//!
//! Only the header of an inline image is read: the reference decodes the sizes of PNG, GIF and JPEG
//! files in base64 and asks no server for an image behind a URL.

use std::borrow::Cow;

use super::fields::Text;
use super::text::for_each_decoded;
use super::{Body, Extent, MediaItem};

/// Base64 characters of an image that are looked at first: enough unless a JPEG begins with metadata.
const FIRST_CHARS: usize = 4 << 10;
/// Base64 characters of an image that are looked at at most. The size of a JPEG with more metadata
/// in front of it stays unknown.
const MAX_CHARS: usize = 256 << 10;
/// Scheme and type of an inline image.
const DATA_URL: &[u8] = b"data:image/";
/// What separates an inline image's type from its bytes.
const BASE64: &[u8] = b"base64,";

/// The image a URL names or, as a data URL, carries.
pub(super) fn image_url(url: &Text, body: &Body) -> MediaItem {
    let pixels = read_size(url, body, |text| {
        let start = text
            .starts_with(DATA_URL)
            .then(|| memchr::memmem::find(text, BASE64))??;
        text.get(start + BASE64.len()..)
    });
    url.media("image", pixels, body)
}

/// The image whose file is `data` in base64.
pub(super) fn image_base64(data: &Text, body: &Body) -> MediaItem {
    data.media("image", read_size(data, body, |text| Some(text)), body)
}

/// The video a URL names or carries; nothing of it is read.
pub(super) fn video_url(url: &Text, body: &Body) -> MediaItem {
    url.media("video", Extent::Unknown, body)
}

/// An audio clip in base64; its extent is the length of both strings as sent.
pub(super) fn audio(data: &Text, format_bytes: u64, body: &Body) -> MediaItem {
    let bytes = decoded_len(data, body) + format_bytes;
    data.media("audio", Extent::Bytes(bytes), body)
}

/// Bytes of the decoded string.
pub(super) fn decoded_len(text: &Text, body: &Body) -> u64 {
    if !text.escaped {
        return text.range.len() as u64;
    }
    let mut bytes = 0;
    for_each_decoded(body, text.range.clone(), true, &mut |piece| {
        bytes += piece.len() as u64;
    });
    bytes
}

/// The size of the image that `base64_of` finds in the beginning of `text`.
fn read_size(text: &Text, body: &Body, base64_of: impl Fn(&[u8]) -> Option<&[u8]>) -> Extent {
    let mut seen = 0;
    for limit in [FIRST_CHARS, MAX_CHARS] {
        let length = text.range.len().min(limit);
        if length == seen {
            break;
        }
        seen = length;
        let beginning = beginning(text, length, body);
        let Some(chars) = base64_of(&beginning) else {
            break;
        };
        if let Some((width, height)) = dimensions(&Base64(chars)) {
            return Extent::Pixels { width, height };
        }
    }
    Extent::Unknown
}

/// The first `length` bytes of a JSON string, decoded and without line breaks; borrowed where the
/// body has them in one piece.
fn beginning<'a>(text: &Text, length: usize, body: &'a Body) -> Cow<'a, [u8]> {
    let range = text.range.start..text.range.start + length;
    if text.escaped {
        let mut out = Vec::with_capacity(length);
        for_each_decoded(body, range, true, &mut |bytes| out.extend_from_slice(bytes));
        out.retain(|byte| !matches!(byte, b'\n' | b'\r'));
        return Cow::Owned(out);
    }
    match body.slices(range.clone()).next() {
        Some(slice) if slice.len() == length => Cow::Borrowed(slice),
        _ => Cow::Owned(body.copy_range(range)),
    }
}

/// A file in base64, read byte by byte where it is needed.
struct Base64<'a>(&'a [u8]);

impl Base64<'_> {
    /// The byte at `position` of the file.
    fn byte(&self, position: usize) -> Option<u8> {
        // Three bytes are four characters of six bits.
        let at = position / 3 * 4 + position % 3;
        let (left, right) = (sextet(*self.0.get(at)?)?, sextet(*self.0.get(at + 1)?)?);
        Some(match position % 3 {
            0 => left << 2 | right >> 4,
            1 => left << 4 | right >> 2,
            _ => left << 6 | right,
        })
    }

    fn bytes<const N: usize>(&self, position: usize) -> Option<[u8; N]> {
        let mut out = [0; N];
        for (byte, at) in out.iter_mut().zip(position..) {
            *byte = self.byte(at)?;
        }
        Some(out)
    }
}

/// Value of a character of the standard alphabet.
fn sextet(character: u8) -> Option<u8> {
    match character {
        b'A'..=b'Z' => Some(character - b'A'),
        b'a'..=b'z' => Some(character - b'a' + 26),
        b'0'..=b'9' => Some(character - b'0' + 52),
        b'+' => Some(62),
        b'/' => Some(63),
        _ => None,
    }
}

/// Width and height of a PNG, GIF or JPEG file, both above 0.
fn dimensions(file: &Base64<'_>) -> Option<(u32, u32)> {
    let (width, height) = match file.bytes::<4>(0)? {
        [0x89, b'P', b'N', b'G'] => png(file)?,
        [b'G', b'I', b'F', b'8'] => gif(file)?,
        [0xFF, 0xD8, ..] => jpeg(file)?,
        _ => return None,
    };
    (width > 0 && height > 0).then_some((width, height))
}

/// The header chunk comes first, behind eight bytes of signature.
fn png(file: &Base64<'_>) -> Option<(u32, u32)> {
    if file.bytes(12)? != *b"IHDR" {
        return None;
    }
    let (width, height) = (file.bytes(16)?, file.bytes(20)?);
    Some((u32::from_be_bytes(width), u32::from_be_bytes(height)))
}

/// The size of the logical screen.
fn gif(file: &Base64<'_>) -> Option<(u32, u32)> {
    let (width, height) = (file.bytes(6)?, file.bytes(8)?);
    Some((
        u16::from_le_bytes(width).into(),
        u16::from_le_bytes(height).into(),
    ))
}

/// Walks the segments to the frame header. Ends with the characters: every step moves on.
fn jpeg(file: &Base64<'_>) -> Option<(u32, u32)> {
    let mut at = 2;
    loop {
        let [0xFF, marker] = file.bytes(at)? else {
            return None;
        };
        match marker {
            // Padding before a marker.
            0xFF => at += 1,
            // Markers that stand alone.
            0x01 | 0xD0..=0xD7 => at += 2,
            // Frame headers; the three left out of the range are tables.
            0xC0..=0xC3 | 0xC5..=0xC7 | 0xC9..=0xCB | 0xCD..=0xCF => {
                let (height, width) = (file.bytes(at + 5)?, file.bytes(at + 7)?);
                return Some((
                    u16::from_be_bytes(width).into(),
                    u16::from_be_bytes(height).into(),
                ));
            }
            // Image data, or the end: no frame header came.
            0x00 | 0xD8..=0xDA => return None,
            _ => {
                let length = u16::from_be_bytes(file.bytes(at + 2)?);
                if length < 2 {
                    return None;
                }
                at += 2 + usize::from(length);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;
    use proptest::prelude::*;

    fn base64(file: &[u8]) -> String {
        const ALPHABET: &[u8; 64] =
            b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
        let digit = |bits: u32| char::from(ALPHABET[bits as usize & 63]);
        let mut out = String::new();
        for group in file.chunks(3) {
            let at = |i: usize| u32::from(group.get(i).copied().unwrap_or(0));
            let bits = at(0) << 16 | at(1) << 8 | at(2);
            let digits = [18, 12, 6, 0].map(|shift| digit(bits >> shift));
            out.extend(&digits[..=group.len()]);
            out.extend(std::iter::repeat_n('=', 3 - group.len()));
        }
        out
    }

    fn text(body: &str, escaped: bool) -> (Text, Body) {
        let text = Text {
            range: 0..body.len(),
            escaped,
        };
        (text, Body::from(body))
    }

    fn of_url(url: &str) -> Extent {
        let (text, body) = text(url, false);
        image_url(&text, &body).extent
    }

    fn of_file(file: &[u8]) -> Extent {
        let (text, body) = text(&base64(file), false);
        image_base64(&text, &body).extent
    }

    fn pixels(width: u32, height: u32) -> Extent {
        Extent::Pixels { width, height }
    }

    /// JPEG beginning with `metadata` bytes of application segments.
    fn jpeg_file(metadata: usize) -> Vec<u8> {
        let mut file = vec![0xFF, 0xD8];
        let mut left = metadata;
        while left > 0 {
            let part = left.min(60_000);
            file.extend([0xFF, 0xE1]);
            file.extend(u16::try_from(part + 2).unwrap().to_be_bytes());
            file.extend(std::iter::repeat_n(0xC0, part));
            left -= part;
        }
        // Fill byte, a Huffman table segment, then a progressive frame header of 600 x 450.
        file.extend([0xFF, 0xFF, 0xC4, 0, 3, 9]);
        file.extend([0xFF, 0xC2, 0, 17, 8, 0x01, 0xC2, 0x02, 0x58, 3]);
        file
    }

    #[test]
    fn inline_images_tell_their_size() {
        // A published 64 x 64 PNG (llm-d: guides/multimodal-serving/README.md), cut behind its header.
        assert_eq!(
            of_url("data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAEAAAABACAIAAAAlC+aJ"),
            pixels(64, 64)
        );
        // 0x0140 = 320, 0x00C8 = 200, little-endian.
        assert_eq!(of_file(b"GIF89a\x40\x01\xC8\x00"), pixels(320, 200));
        assert_eq!(of_file(&jpeg_file(0)), pixels(600, 450));
        assert_eq!(of_file(&jpeg_file(100_000)), pixels(600, 450));
    }

    #[test]
    fn what_is_no_inline_image_has_no_size() {
        assert_eq!(of_url("https://example.com/a.png"), Extent::Unknown);
        assert_eq!(of_url("data:image/png,iVBORw0KGgo"), Extent::Unknown);
        assert_eq!(
            of_url("data:text/plain;base64,R0lGODlhQAHIAA"),
            Extent::Unknown
        );
        assert_eq!(of_url("data:image/png;base64,"), Extent::Unknown);
        // No width, no frame header, a segment length of 1.
        assert_eq!(of_file(b"GIF89a\x00\x00\xC8\x00"), Extent::Unknown);
        assert_eq!(of_file(&[0xFF, 0xD8, 0xFF, 0xDA, 0, 9]), Extent::Unknown);
        assert_eq!(of_file(&[0xFF, 0xD8, 0xFF, 0xE0, 0, 1]), Extent::Unknown);
    }

    #[test]
    fn metadata_past_the_limit_hides_the_size() {
        // 256 KiB of characters are 192 KiB of file.
        assert_eq!(of_file(&jpeg_file(190 << 10)), pixels(600, 450));
        assert_eq!(of_file(&jpeg_file(193 << 10)), Extent::Unknown);
    }

    #[test]
    fn escapes_and_piece_borders_do_not_matter() {
        let plain = base64(&jpeg_file(5000));
        let escaped = plain.replace('/', r"\/").replace("AA", r"A\nA");
        let (whole, body) = text(&escaped, true);
        assert_eq!(image_base64(&whole, &body).extent, pixels(600, 450));
        let pieces: Body = plain
            .as_bytes()
            .chunks(100)
            .map(Bytes::copy_from_slice)
            .collect();
        let (whole, _) = text(&plain, false);
        assert_eq!(image_base64(&whole, &pieces).extent, pixels(600, 450));
    }

    #[test]
    fn audio_is_as_long_as_its_strings() {
        // `a/b` is three bytes once decoded; `wav` adds three.
        let (data, body) = text(r"a\/b", true);
        assert_eq!(audio(&data, 3, &body).extent, Extent::Bytes(6));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(300))]

        #[test]
        fn any_header_is_survived(mut file in prop::collection::vec(any::<u8>(), 0..200), kind in 0..4usize) {
            let start: &[u8] = [&b"\x89PNG"[..], b"GIF8", b"\xFF\xD8\xFF\xE0", b""][kind];
            file.splice(0..0, start.iter().copied());
            let extent = of_file(&file);
            let usable = match extent {
                Extent::Unknown => true,
                Extent::Pixels { width, height } => width > 0 && height > 0,
                Extent::Bytes(_) => false,
            };
            prop_assert!(usable);
        }
    }
}
