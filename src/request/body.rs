//! A request body as the slices it arrived in.

use std::ops::Range;

use bytes::Bytes;

/// Body pieces in arrival order, addressed by absolute byte offsets. Cloning is O(pieces).
#[derive(Debug, Clone, Default)]
pub struct Body {
    pieces: Vec<Bytes>,
    /// Offset of the end of each piece; same length as `pieces`.
    ends: Vec<usize>,
}

impl Body {
    /// Appends one piece; an empty one is dropped.
    pub fn push(&mut self, piece: Bytes) {
        if piece.is_empty() {
            return;
        }
        self.ends.push(self.len() + piece.len());
        self.pieces.push(piece);
    }

    /// Total bytes.
    pub fn len(&self) -> usize {
        self.ends.last().copied().unwrap_or(0)
    }

    /// True when no byte was received.
    pub fn is_empty(&self) -> bool {
        self.pieces.is_empty()
    }

    /// The pieces in order.
    pub fn pieces(&self) -> &[Bytes] {
        &self.pieces
    }

    /// Gives the pieces up in order.
    pub fn into_pieces(self) -> Vec<Bytes> {
        self.pieces
    }

    /// The bytes of `range`, piece by piece; the part of the range past the end is ignored.
    pub fn slices(&self, range: Range<usize>) -> impl Iterator<Item = &[u8]> {
        let first = self.ends.partition_point(|&end| end <= range.start);
        self.pieces
            .iter()
            .zip(&self.ends)
            .skip(first)
            .map_while(move |(piece, &end)| {
                let start = end - piece.len();
                if start >= range.end {
                    return None;
                }
                let from = range.start.saturating_sub(start);
                let to = (range.end - start).min(piece.len());
                piece.get(from..to)
            })
            .filter(|slice| !slice.is_empty())
    }

    /// Copies `range` into one buffer; for short fields such as the model name.
    pub fn copy_range(&self, range: Range<usize>) -> Vec<u8> {
        let mut out = Vec::with_capacity(range.len().min(self.len()));
        for slice in self.slices(range) {
            out.extend_from_slice(slice);
        }
        out
    }
}

impl From<Bytes> for Body {
    fn from(bytes: Bytes) -> Self {
        let mut body = Self::default();
        body.push(bytes);
        body
    }
}

impl From<&str> for Body {
    fn from(text: &str) -> Self {
        Bytes::copy_from_slice(text.as_bytes()).into()
    }
}

impl FromIterator<Bytes> for Body {
    fn from_iter<I: IntoIterator<Item = Bytes>>(pieces: I) -> Self {
        let mut body = Self::default();
        for piece in pieces {
            body.push(piece);
        }
        body
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn body(pieces: &[&str]) -> Body {
        pieces
            .iter()
            .map(|p| Bytes::copy_from_slice(p.as_bytes()))
            .collect()
    }

    #[test]
    fn a_range_spans_pieces() {
        let body = body(&["abc", "", "de", "fghi"]);
        assert_eq!(body.len(), 9);
        assert_eq!(body.copy_range(2..7), b"cdefg");
        assert_eq!(body.slices(3..5).collect::<Vec<_>>(), [b"de"]);
    }

    #[test]
    fn a_range_past_the_end_is_cut() {
        let body = body(&["abc", "de"]);
        assert_eq!(body.copy_range(4..100), b"e");
        assert_eq!(body.copy_range(9..100), b"");
        assert_eq!(Body::default().copy_range(0..1), b"");
    }
}
