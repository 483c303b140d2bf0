//! The body of a watch as lines.

use bytes::{Bytes, BytesMut};
use http_body_util::BodyExt;
use kube::client::Body;

use super::{Failure, causes};

/// Longest line: an object of etcd's limit of 1.5 MiB, twice that as JSON, and room.
const MAX_LINE_BYTES: usize = 8 << 20;

/// Cuts a body into lines. An unfinished last line is dropped: its event comes again on the next
/// watch, which starts after the last finished one.
#[derive(Debug)]
pub(super) struct Lines {
    body: Body,
    buffer: BytesMut,
    /// Bytes of `buffer` without a newline.
    searched: usize,
}

impl Lines {
    pub(super) fn new(body: Body) -> Self {
        Self {
            body,
            buffer: BytesMut::new(),
            searched: 0,
        }
    }

    /// The next line without its end; `None` at the end of the body. Cancel-safe.
    pub(super) async fn next(&mut self) -> Result<Option<Bytes>, Failure> {
        loop {
            let rest = self.buffer.get(self.searched..).unwrap_or_default();
            if let Some(at) = memchr::memchr(b'\n', rest) {
                let line = self.buffer.split_to(self.searched + at + 1).freeze();
                self.searched = 0;
                let line = line.slice(..line.len() - 1);
                if !line.is_empty() {
                    return Ok(Some(line));
                }
                continue;
            }
            self.searched = self.buffer.len();
            if self.searched > MAX_LINE_BYTES {
                return Err(Failure::TooLong(MAX_LINE_BYTES));
            }
            match self.body.frame().await {
                None => return Ok(None),
                Some(Ok(frame)) => {
                    if let Ok(data) = frame.into_data() {
                        self.buffer.extend_from_slice(&data);
                    }
                }
                Some(Err(error)) => return Err(Failure::Connection(causes(&error))),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn lines_are_cut_and_an_unfinished_one_is_dropped() {
        let mut lines = Lines::new(Body::from(b"one\n\ntwo\nthr".to_vec()));
        assert_eq!(lines.next().await.unwrap().unwrap(), "one");
        assert_eq!(lines.next().await.unwrap().unwrap(), "two");
        assert!(lines.next().await.unwrap().is_none());
    }

    #[tokio::test]
    async fn a_line_without_end_is_refused() {
        let fits = vec![b'x'; MAX_LINE_BYTES];
        assert!(Lines::new(Body::from(fits)).next().await.unwrap().is_none());
        let long = vec![b'x'; MAX_LINE_BYTES + 1];
        let error = Lines::new(Body::from(long)).next().await.unwrap_err();
        assert_eq!(error.reason(), "too_long");
    }
}
