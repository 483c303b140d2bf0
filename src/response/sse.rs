//! Lines of an event stream, whatever the pieces it arrives in.

use memchr::{memchr, memmem, memrchr};

/// Longest line that is put together over pieces; the rest of a longer one is skipped.
pub const MAX_LINE_BYTES: usize = 64 * 1024;

/// Puts lines together. Only lines that contain a marker, or began in an earlier piece, are handed on.
#[derive(Debug, Default)]
pub struct Lines {
    carry: Vec<u8>,
    /// The current line outgrew the bound.
    skipping: bool,
}

impl Lines {
    /// Reads a piece; calls `on_line` for each complete line that may contain `marker`, without its
    /// line ending.
    pub fn push(&mut self, piece: &[u8], marker: &[u8], on_line: &mut impl FnMut(&[u8])) {
        let mut rest = piece;
        if !self.carry.is_empty() || self.skipping {
            let end = memchr(b'\n', rest);
            self.carry_on(rest.get(..end.unwrap_or(rest.len())).unwrap_or_default());
            let Some(end) = end else { return };
            self.finish(on_line);
            rest = rest.get(end + 1..).unwrap_or_default();
        }
        let Some(last) = memrchr(b'\n', rest) else {
            self.carry_on(rest);
            return;
        };
        let (whole, open) = rest.split_at(last);
        if memmem::find(whole, marker).is_some() {
            whole
                .split(|byte| *byte == b'\n')
                .for_each(|line| on_line(trim(line)));
        }
        self.carry_on(open.get(1..).unwrap_or_default());
    }

    /// Hands on the line that no line ending closed yet.
    pub fn finish(&mut self, on_line: &mut impl FnMut(&[u8])) {
        if !self.skipping && !self.carry.is_empty() {
            on_line(trim(&self.carry));
        }
        self.carry.clear();
        self.skipping = false;
    }

    fn carry_on(&mut self, bytes: &[u8]) {
        if self.skipping || self.carry.len() + bytes.len() > MAX_LINE_BYTES {
            self.carry.clear();
            self.skipping = true;
            return;
        }
        self.carry.extend_from_slice(bytes);
    }
}

fn trim(line: &[u8]) -> &[u8] {
    line.strip_suffix(b"\r").unwrap_or(line)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(pieces: &[&[u8]]) -> Vec<String> {
        let mut out = Vec::new();
        let mut reader = Lines::default();
        let mut on_line = |line: &[u8]| out.push(String::from_utf8_lossy(line).into_owned());
        for piece in pieces {
            reader.push(piece, b"u", &mut on_line);
        }
        reader.finish(&mut on_line);
        out
    }

    #[test]
    fn a_line_split_over_pieces_is_whole_again() {
        assert_eq!(
            lines(&[b"a u", b"", b" b\r\nc u\r", b"\n"]),
            ["a u b", "c u"]
        );
        assert_eq!(lines(&[b"x\nno\n"]), Vec::<String>::new());
        assert_eq!(lines(&[b"last u"]), ["last u"]);
    }

    #[test]
    fn a_line_over_the_bound_is_skipped_and_the_next_is_read() {
        let long = vec![b'u'; MAX_LINE_BYTES];
        assert_eq!(lines(&[&long, b"\nu\n"]).len(), 2);
        assert_eq!(lines(&[&long, b"u", b"uu\nu\n"]), ["u"]);
    }
}
