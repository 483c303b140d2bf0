//! How many prompt tokens were cached, told as the prefill engine saw it.
//!
//! The decode engine finds the blocks that were handed to it and reports them as it likes; the client
//! should learn what the prefill engine had cached. The object `prompt_tokens_details` is looked for
//! in the bytes as they pass: its quoted name cannot occur inside a JSON string, where quotes are
//! escaped. Nothing is held back but a name or an object that a piece cut in two.

use std::io;
use std::ops::Range;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::{Bytes, BytesMut};
use http_body::{Body, Frame};
use memchr::memmem;

use super::engines::LegBody;

const DETAILS: &[u8] = b"\"prompt_tokens_details\"";
const CACHED: &[u8] = b"\"cached_tokens\"";
/// Longest details object that is waited for.
const MAX_HELD_BYTES: usize = 4096;

/// An answer whose `usage.prompt_tokens_details.cached_tokens` is replaced as it passes.
#[derive(Debug)]
pub(super) struct UsageRewrite {
    /// The beginning, if it was read before.
    read: Bytes,
    leg: LegBody,
    filter: CachedTokens,
    trailing: Option<Frame<Bytes>>,
}

impl UsageRewrite {
    /// For `read` and then the rest of `leg`.
    pub(super) fn new(read: Bytes, leg: LegBody, cached_tokens: u64) -> Self {
        Self {
            read,
            leg,
            filter: CachedTokens::new(cached_tokens),
            trailing: None,
        }
    }
}

impl Body for UsageRewrite {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, io::Error>>> {
        let this = self.get_mut();
        if let Some(frame) = this.trailing.take() {
            return Poll::Ready(Some(Ok(frame)));
        }
        if !this.read.is_empty() {
            let out = this.filter.feed(std::mem::take(&mut this.read));
            if !out.is_empty() {
                return Poll::Ready(Some(Ok(Frame::data(out))));
            }
        }
        loop {
            let frame = match std::task::ready!(Pin::new(&mut this.leg).poll_frame(cx)) {
                Some(Ok(frame)) => frame,
                Some(Err(error)) => return Poll::Ready(Some(Err(error))),
                None => {
                    let rest = this.filter.finish();
                    return Poll::Ready(rest.map(|rest| Ok(Frame::data(rest))));
                }
            };
            match frame.into_data() {
                Ok(piece) => {
                    let out = this.filter.feed(piece);
                    if !out.is_empty() {
                        return Poll::Ready(Some(Ok(Frame::data(out))));
                    }
                }
                // Trailers end a body: what was held goes before them.
                Err(trailers) => {
                    let Some(rest) = this.filter.finish() else {
                        return Poll::Ready(Some(Ok(trailers)));
                    };
                    this.trailing = Some(trailers);
                    return Poll::Ready(Some(Ok(Frame::data(rest))));
                }
            }
        }
    }
}

/// The replacement over pieces.
#[derive(Debug)]
struct CachedTokens {
    value: String,
    held: BytesMut,
}

/// What a search found.
enum Found {
    /// Nothing up to the end.
    Nothing,
    /// A number to replace.
    Number(Range<usize>),
    /// Something at the offset that needs more bytes.
    Open(usize),
}

impl CachedTokens {
    fn new(value: u64) -> Self {
        Self {
            value: value.to_string(),
            held: BytesMut::new(),
        }
    }

    fn feed(&mut self, piece: Bytes) -> Bytes {
        // The usual piece: whole events, none of which has usage.
        if self.held.is_empty() && memmem::find(&piece, DETAILS).is_none() {
            let tail = open_tail(&piece, DETAILS);
            if tail == 0 {
                return piece;
            }
            let at = piece.len() - tail;
            self.held
                .extend_from_slice(piece.get(at..).unwrap_or_default());
            return piece.slice(..at);
        }
        self.held.extend_from_slice(&piece);
        let mut out = BytesMut::new();
        loop {
            match search(&self.held) {
                Found::Nothing => {
                    out.unsplit(self.held.split());
                    return out.freeze();
                }
                Found::Number(range) => {
                    let number = self.held.split_to(range.end);
                    out.extend_from_slice(number.get(..range.start).unwrap_or_default());
                    out.extend_from_slice(self.value.as_bytes());
                    // The rest of the object needs no look: it is flat, and has one such member.
                }
                Found::Open(at) if self.held.len() - at > MAX_HELD_BYTES => {
                    out.unsplit(self.held.split());
                    return out.freeze();
                }
                Found::Open(at) => {
                    let rest = self.held.split_off(at);
                    out.unsplit(std::mem::replace(&mut self.held, rest));
                    return out.freeze();
                }
            }
        }
    }

    fn finish(&mut self) -> Option<Bytes> {
        let rest = self.held.split().freeze();
        (!rest.is_empty()).then_some(rest)
    }
}

/// The first details object of `text` that has something to replace.
fn search(text: &[u8]) -> Found {
    let mut from = 0;
    while let Some(offset) = memmem::find(text.get(from..).unwrap_or_default(), DETAILS) {
        let name = from + offset;
        from = name + DETAILS.len();
        if name > 0 && text.get(name - 1) == Some(&b'\\') {
            continue;
        }
        let value = skip(text, from, |b| is_space(b) || b == b':');
        match text.get(value) {
            None => return Found::Open(name),
            Some(b'{') => {}
            Some(_) => continue,
        }
        let rest = text.get(value..).unwrap_or_default();
        let Some(length) = memchr::memchr(b'}', rest) else {
            return Found::Open(name);
        };
        let object = rest.get(..length).unwrap_or_default();
        if let Some(member) = memmem::find(object, CACHED) {
            let start = skip(text, value + member + CACHED.len(), |b| {
                is_space(b) || b == b':'
            });
            let end = skip(text, start, |b| b.is_ascii_digit());
            if end > start {
                return Found::Number(start..end);
            }
        }
        from = value + length;
    }
    match open_tail(text, DETAILS) {
        0 => Found::Nothing,
        tail => Found::Open(text.len() - tail),
    }
}

fn is_space(byte: u8) -> bool {
    matches!(byte, b' ' | b'\n' | b'\r' | b'\t')
}

fn skip(text: &[u8], mut at: usize, matches: impl Fn(u8) -> bool) -> usize {
    while text.get(at).is_some_and(|b| matches(*b)) {
        at += 1;
    }
    at
}

/// Length of the longest end of `text` with which `pattern` begins.
fn open_tail(text: &[u8], pattern: &[u8]) -> usize {
    let longest = text.len().min(pattern.len() - 1);
    let tail = text.get(text.len() - longest..).unwrap_or_default();
    // The pattern's first byte is a quote; most ends have none in their last few bytes.
    memchr::memchr_iter(b'"', tail)
        .map(|at| tail.get(at..).unwrap_or_default())
        .find(|end| pattern.starts_with(end))
        .map_or(0, <[u8]>::len)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn through(pieces: &[&[u8]], cached: u64) -> String {
        let mut filter = CachedTokens::new(cached);
        let mut out = Vec::new();
        for piece in pieces {
            out.extend_from_slice(&filter.feed(Bytes::copy_from_slice(piece)));
        }
        out.extend_from_slice(&filter.finish().unwrap_or_default());
        String::from_utf8(out).unwrap()
    }

    const STREAM: &str = concat!(
        "data: {\"choices\":[{\"delta\":{\"content\":\"say \\\"prompt_tokens_details\\\":{\\\"cached_tokens\\\":1}\"}}]}\n\n",
        "data: {\"choices\":[],\"usage\":{\"prompt_tokens\":180,\"prompt_tokens_details\":{\"cached_tokens\":176,\"created_cache_tokens\":0}}}\n\n",
        "data: {\"usage\":{\"prompt_tokens_details\" : { \"x\":1, \"cached_tokens\" : 3 }, \"completion_tokens_details\":{\"cached_tokens\":9}}}\n\n",
        "data: {\"usage\":{\"prompt_tokens_details\":null}}\n\ndata: [DONE]\n\n"
    );

    fn expected() -> String {
        STREAM
            .replace("\"cached_tokens\":176", "\"cached_tokens\":64")
            .replace("\"cached_tokens\" : 3", "\"cached_tokens\" : 64")
    }

    #[test]
    fn every_usage_object_and_nothing_else_is_changed() {
        assert_eq!(through(&[STREAM.as_bytes()], 64), expected());
    }

    #[test]
    fn what_is_no_usage_passes_at_once_in_the_same_memory() {
        let mut filter = CachedTokens::new(1);
        let piece = Bytes::from_static(b"data: {\"choices\":[]}\n\n");
        let out = filter.feed(piece.clone());
        assert_eq!(out.as_ptr(), piece.as_ptr());
        assert_eq!(out.len(), piece.len());
    }

    #[test]
    fn an_object_without_end_is_given_up() {
        let long = format!("\"prompt_tokens_details\":{{{}", " ".repeat(MAX_HELD_BYTES));
        let mut filter = CachedTokens::new(1);
        assert_eq!(filter.feed(long.clone().into()), long.as_bytes());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(300))]

        #[test]
        fn cuts_do_not_matter(cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..10)) {
            let text = STREAM.as_bytes();
            let mut at: Vec<usize> = cuts.iter().map(|c| c.index(text.len())).collect();
            at.extend([0, text.len()]);
            at.sort_unstable();
            let pieces: Vec<&[u8]> = at.windows(2).map(|w| &text[w[0]..w[1]]).collect();
            prop_assert_eq!(through(&pieces, 64), expected());
        }
    }
}
