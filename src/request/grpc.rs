//! gRPC framing of request bodies: one flag byte, four bytes of length (big-endian), the message.

use std::ops::Range;

use super::Body;
use super::protobuf::{Scanner, Visitor, WireError};

/// Bytes in front of each message.
pub const FRAME_HEADER_BYTES: usize = 5;

/// Why a body has no readable first message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// Not even a frame header.
    #[error("a frame header has {FRAME_HEADER_BYTES} bytes, the body {0}")]
    NoHeader(usize),
    /// The flag byte is not zero. A compressed message would have to be inflated to be read.
    #[error("compressed messages are not read (flag {0})")]
    Compressed(u8),
    /// The message is longer than the body.
    #[error("the first message has {announced} bytes, {received} were received")]
    Incomplete {
        /// Length in the frame header.
        announced: usize,
        /// Bytes behind the frame header.
        received: usize,
    },
}

/// Flag and length of a message.
pub fn read_header(header: [u8; FRAME_HEADER_BYTES]) -> (u8, usize) {
    let [flag, length @ ..] = header;
    // A length of 32 bits fits wherever a body of that length would.
    let length = usize::try_from(u32::from_be_bytes(length)).unwrap_or(usize::MAX);
    (flag, length)
}

/// Where the first message of `body` lies. Later ones are not looked at: the calls that are read have
/// one request message.
pub fn first_message(body: &Body) -> Result<Range<usize>, FrameError> {
    let header = body.copy_range(0..FRAME_HEADER_BYTES);
    let header = <[u8; FRAME_HEADER_BYTES]>::try_from(header)
        .map_err(|_| FrameError::NoHeader(body.len()))?;
    let (flag, announced) = read_header(header);
    if flag != 0 {
        return Err(FrameError::Compressed(flag));
    }
    let received = body.len() - FRAME_HEADER_BYTES;
    if announced > received {
        return Err(FrameError::Incomplete {
            announced,
            received,
        });
    }
    Ok(FRAME_HEADER_BYTES..FRAME_HEADER_BYTES + announced)
}

/// Scans the message at `message`. Paths and ranges are those of [`Visitor`]; ranges address `body`.
pub fn scan_message(
    body: &Body,
    message: Range<usize>,
    visitor: &mut impl Visitor,
) -> Result<(), WireError> {
    let mut scanner = Scanner::new(message.clone());
    for slice in body.slices(message) {
        scanner.feed(slice, visitor)?;
    }
    scanner.finish()
}

/// The messages as generated from `proto/`: what this room scans, encoded by another implementation.
#[cfg(test)]
#[allow(
    missing_docs,
    unreachable_pub,
    rust_2018_idioms,
    dead_code,
    clippy::pedantic,
    clippy::allow_attributes_without_reason,
    reason = "generated code"
)]
pub(crate) mod proto {
    pub mod vllm {
        tonic::include_proto!("vllm.grpc.engine");
    }
    pub mod vertex_ai {
        tonic::include_proto!("google.cloud.aiplatform.v1beta1");
    }

    /// `message` as the only one of a body.
    pub fn frame(message: &impl prost::Message) -> Vec<u8> {
        let message = message.encode_to_vec();
        let length = u32::try_from(message.len()).unwrap();
        [&[0][..], &length.to_be_bytes(), &message].concat()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;

    fn body(pieces: &[&[u8]]) -> Body {
        pieces.iter().map(|p| Bytes::copy_from_slice(p)).collect()
    }

    #[test]
    fn the_first_message_is_found_across_pieces() {
        // Flag 0, length 2, two bytes; then a second frame that is not looked at.
        let pieces: &[&[u8]] = &[&[0, 0, 0], &[0, 2, 7], &[8, 1, 9]];
        assert_eq!(first_message(&body(pieces)), Ok(5..7));
        assert_eq!(first_message(&body(&[&[0, 0, 0, 0, 0]])), Ok(5..5));
    }

    #[test]
    fn unreadable_frames_say_why() {
        let error = |bytes: &[u8]| first_message(&body(&[bytes])).unwrap_err().to_string();
        assert_eq!(error(&[]), "a frame header has 5 bytes, the body 0");
        assert_eq!(
            error(&[1, 0, 0, 0, 0]),
            "compressed messages are not read (flag 1)"
        );
        assert_eq!(
            error(&[2, 0, 0, 0, 0]),
            "compressed messages are not read (flag 2)"
        );
        // 0x0100 = 256.
        assert_eq!(
            error(&[0, 0, 0, 1, 0, 9]),
            "the first message has 256 bytes, 1 were received"
        );
        assert_eq!(
            error(&[0, 0xff, 0xff, 0xff, 0xff]),
            "the first message has 4294967295 bytes, 0 were received"
        );
    }
}
