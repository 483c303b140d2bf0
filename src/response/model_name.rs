//! Puts the client's model name back where the engine wrote the forwarded one.

use bytes::{Bytes, BytesMut};
use memchr::memmem::Finder;
use smallvec::SmallVec;

/// Replaces `"model":"<target>"` (or with one space behind the colon) by the client's name in every
/// place, also where pieces cut it. Holds back at most one pattern's length of bytes.
#[derive(Debug)]
pub struct ModelNameRewriter {
    patterns: [(Finder<'static>, Bytes); 2],
    held: Bytes,
}

impl ModelNameRewriter {
    /// Replaces `target` by `incoming`.
    pub fn new(target: &str, incoming: &str) -> Self {
        let quote = |name: &str| serde_json::Value::from(name).to_string();
        let pattern = |colon: &str| {
            let from = format!("\"model\"{colon}{}", quote(target));
            let to = format!("\"model\"{colon}{}", quote(incoming));
            (Finder::new(from.as_bytes()).into_owned(), Bytes::from(to))
        };
        Self {
            patterns: [pattern(":"), pattern(": ")],
            held: Bytes::new(),
        }
    }

    /// Pieces to forward in place of `piece`. Without a match they are slices of it.
    pub fn push(&mut self, piece: Bytes, last: bool) -> SmallVec<[Bytes; 4]> {
        let mut rest = self.take_held(piece);
        let mut out = SmallVec::new();
        while let Some((at, length, replacement)) = self.find(&rest) {
            push_part(&mut out, rest.split_to(at));
            push_part(&mut out, replacement);
            let _pattern = rest.split_to(length);
        }
        if !last {
            self.held = rest.split_off(rest.len() - self.open_tail(&rest));
        }
        push_part(&mut out, rest);
        out
    }

    fn take_held(&mut self, piece: Bytes) -> Bytes {
        if self.held.is_empty() {
            return piece;
        }
        let mut joined = BytesMut::with_capacity(self.held.len() + piece.len());
        joined.extend_from_slice(&self.held);
        joined.extend_from_slice(&piece);
        self.held = Bytes::new();
        joined.freeze()
    }

    fn find(&self, text: &[u8]) -> Option<(usize, usize, Bytes)> {
        let places = self.patterns.iter().filter_map(|(finder, to)| {
            finder
                .find(text)
                .map(|at| (at, finder.needle().len(), to.clone()))
        });
        places.min_by_key(|(at, ..)| *at)
    }

    /// Bytes at the end of `text` that may be the beginning of a pattern.
    fn open_tail(&self, text: &[u8]) -> usize {
        let open = |needle: &[u8]| {
            let longest = (needle.len() - 1).min(text.len());
            (1..=longest)
                .rev()
                .find(|&n| text.ends_with(needle.get(..n).unwrap_or_default()))
                .unwrap_or(0)
        };
        self.patterns
            .iter()
            .map(|(finder, _)| open(finder.needle()))
            .max()
            .unwrap_or(0)
    }
}

fn push_part(out: &mut SmallVec<[Bytes; 4]>, part: Bytes) {
    if !part.is_empty() {
        out.push(part);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn rewrite(pieces: &[&[u8]]) -> Vec<u8> {
        let mut rewriter = ModelNameRewriter::new("base-v2", "chat\"x");
        let mut out = Vec::new();
        for (i, piece) in pieces.iter().enumerate() {
            let last = i + 1 == pieces.len();
            rewriter
                .push(Bytes::copy_from_slice(piece), last)
                .iter()
                .for_each(|p| out.extend_from_slice(p));
        }
        out
    }

    const TEXT: &[u8] =
        br#"{"model":"base-v2","x":"base-v2","y":{"model": "base-v2"},"model":"base-v"}"#;
    const WANTED: &[u8] =
        br#"{"model":"chat\"x","x":"base-v2","y":{"model": "chat\"x"},"model":"base-v"}"#;

    #[test]
    fn every_place_is_replaced_and_nothing_else() {
        assert_eq!(rewrite(&[TEXT]), WANTED);
    }

    #[test]
    fn a_piece_without_a_match_is_not_copied() {
        let piece = Bytes::from_static(b"data: {\"delta\":\"hi\"}\n\n");
        let out = ModelNameRewriter::new("a", "b").push(piece.clone(), false);
        assert_eq!(out[0].as_ptr(), piece.as_ptr());
    }

    proptest! {
        #[test]
        fn any_split_gives_the_same(cuts in prop::collection::vec(0..TEXT.len(), 0..8)) {
            let mut at = cuts;
            at.extend([0, TEXT.len()]);
            at.sort_unstable();
            let pieces: Vec<&[u8]> = at.windows(2).map(|w| &TEXT[w[0]..w[1]]).collect();
            prop_assert_eq!(rewrite(&pieces), WANTED);
        }
    }
}
