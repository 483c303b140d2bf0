//! Received messages: gRPC framing and the parts of protobuf that carry bodies.
//!
//! Body bytes are never copied: a received piece stays the slices of the HTTP/2 frames it came in
//! (Envoy 1.40 sends frames of at most 16 KiB whatever we allow, so a piece of 64 KiB is five of
//! them), and a reply ([`super::reply`]) is a list of slices that HTTP/2 writes out with one vectored
//! call. Everything else is small and goes through prost.

use std::collections::VecDeque;
use std::io::IoSlice;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use prost::Message;
use prost::encoding::{WireType, decode_key, decode_varint, encode_varint};
use smallvec::SmallVec;
use tonic::Status;

use super::proto::ProcessingRequest;
use super::proto::processing_request::Request;

/// Flag and length in front of a gRPC message.
pub(super) const PREFIX_BYTES: usize = 5;
/// Slices of one body piece.
pub type Slices = SmallVec<[Bytes; 4]>;

/// A received message. The bytes of a body message are in `body`; its `HttpBody.body` is empty.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Incoming {
    /// The message.
    pub message: ProcessingRequest,
    /// Bytes of a body piece, none of them empty.
    pub body: Slices,
}

impl From<ProcessingRequest> for Incoming {
    fn from(mut message: ProcessingRequest) -> Self {
        let mut body = Slices::new();
        if let Some(Request::RequestBody(piece) | Request::ResponseBody(piece)) =
            &mut message.request
        {
            let bytes = std::mem::take(&mut piece.body);
            if !bytes.is_empty() {
                body.push(bytes);
            }
        }
        Self { message, body }
    }
}

/// Puts slices together; free for a single one.
pub fn join(slices: &[Bytes]) -> Bytes {
    match slices {
        [] => Bytes::new(),
        [only] => only.clone(),
        many => {
            let mut whole = BytesMut::with_capacity(many.iter().map(Bytes::len).sum());
            for slice in many {
                whole.extend_from_slice(slice);
            }
            whole.freeze()
        }
    }
}

/// Received bytes that are not consumed yet.
#[derive(Debug, Default)]
pub struct Inbox(Segments);

/// A gRPC message as it came.
#[derive(Debug)]
pub struct Framed {
    /// The flag says that it is compressed.
    pub compressed: bool,
    /// Its bytes.
    pub slices: Slices,
}

impl Inbox {
    /// Appends what one HTTP/2 frame brought.
    pub fn push(&mut self, frame: Bytes) {
        self.0.push(frame);
    }

    /// True when no byte waits.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The next complete message, if it is there; an error when it is longer than `limit`.
    pub fn next(&mut self, limit: usize) -> Result<Option<Framed>, Status> {
        if self.0.len() < PREFIX_BYTES {
            return Ok(None);
        }
        let mut prefix = [0; PREFIX_BYTES];
        let bytes = self.0.parts.iter().flat_map(|part| part.iter());
        prefix
            .iter_mut()
            .zip(bytes)
            .for_each(|(to, from)| *to = *from);
        let [flag, length @ ..] = prefix;
        let length = u32::from_be_bytes(length) as usize;
        if length > limit {
            return Err(Status::resource_exhausted(format!(
                "grpc: received message larger than max ({length} vs. {limit})"
            )));
        }
        if self.0.len() < PREFIX_BYTES + length {
            return Ok(None);
        }
        self.0.advance(PREFIX_BYTES);
        let compressed = match flag {
            0 => false,
            1 => true,
            _ => return Err(Status::internal("invalid gRPC message flag")),
        };
        Ok(Some(Framed {
            compressed,
            slices: self.0.split_front(length),
        }))
    }
}

/// Reads one message. Unknown fields are skipped; of repeated oneof members the last wins.
pub fn decode(slices: Slices) -> Result<Incoming, Status> {
    if let [_] | [] = slices.as_slice() {
        // One slice: prost takes body and header values out of it without copying.
        let whole = slices.into_iter().next().unwrap_or_default();
        return Ok(ProcessingRequest::decode(whole).map_err(refuse)?.into());
    }
    decode_scattered(Segments::from(slices))
}

/// Field numbers of the body members.
const REQUEST_BODY: u32 = 4;
const RESPONSE_BODY: u32 = 5;

/// Splits off the body, whose bytes stay where they are; the other fields are put together.
fn decode_scattered(mut buffer: Segments) -> Result<Incoming, Status> {
    let mut rest = BytesMut::new();
    let mut body = None;
    while buffer.has_remaining() {
        let (field, wire_type) = decode_key(&mut buffer).map_err(refuse)?;
        if wire_type != WireType::LengthDelimited {
            // The only scalar is `observability_mode`; what else may come is skipped by prost.
            prost::encoding::encode_key(field, wire_type, &mut rest);
            copy_scalar(wire_type, &mut buffer, &mut rest)?;
            continue;
        }
        let value = buffer.take_value()?;
        if field == REQUEST_BODY || field == RESPONSE_BODY {
            body = Some((field, value));
        } else {
            prost::encoding::encode_key(field, wire_type, &mut rest);
            encode_varint(
                value.iter().map(Bytes::len).sum::<usize>() as u64,
                &mut rest,
            );
            for slice in &value {
                rest.extend_from_slice(slice);
            }
        }
    }
    let mut incoming = Incoming::from(ProcessingRequest::decode(rest.freeze()).map_err(refuse)?);
    if let Some((field, value)) = body {
        let (piece, slices) = decode_body(Segments::from(value))?;
        incoming.body = slices;
        incoming.message.request = Some(if field == REQUEST_BODY {
            Request::RequestBody(piece)
        } else {
            Request::ResponseBody(piece)
        });
    }
    Ok(incoming)
}

fn decode_body(mut buffer: Segments) -> Result<(super::proto::HttpBody, Slices), Status> {
    let mut piece = super::proto::HttpBody::default();
    let mut slices = Slices::new();
    while buffer.has_remaining() {
        match decode_key(&mut buffer).map_err(refuse)? {
            (1, WireType::LengthDelimited) => slices = buffer.take_value()?,
            (2, WireType::Varint) => {
                piece.end_of_stream = decode_varint(&mut buffer).map_err(refuse)? != 0;
            }
            (_, WireType::LengthDelimited) => drop(buffer.take_value()?),
            (_, wire_type) => copy_scalar(wire_type, &mut buffer, &mut BytesMut::new())?,
        }
    }
    Ok((piece, slices))
}

fn copy_scalar(wire_type: WireType, from: &mut Segments, to: &mut BytesMut) -> Result<(), Status> {
    let fixed = match wire_type {
        WireType::Varint => {
            encode_varint(decode_varint(from).map_err(refuse)?, to);
            return Ok(());
        }
        WireType::SixtyFourBit => 8,
        WireType::ThirtyTwoBit => 4,
        // Groups: no field of ours, and no proto3 message has any.
        _ => return Err(malformed()),
    };
    if from.remaining() < fixed {
        return Err(malformed());
    }
    to.put(from.copy_to_bytes(fixed));
    Ok(())
}

#[expect(
    clippy::needless_pass_by_value,
    reason = "map_err hands the error over"
)]
fn refuse(error: prost::DecodeError) -> Status {
    Status::internal(format!("malformed message: {error}"))
}

fn malformed() -> Status {
    Status::internal("malformed message")
}

/// Bytes in several slices, to be read or written in order.
#[derive(Debug, Default)]
pub struct Segments {
    parts: VecDeque<Bytes>,
    remaining: usize,
}

impl From<Slices> for Segments {
    fn from(slices: Slices) -> Self {
        let mut segments = Self::default();
        slices.into_iter().for_each(|slice| segments.push(slice));
        segments
    }
}

impl From<Bytes> for Segments {
    fn from(bytes: Bytes) -> Self {
        let mut segments = Self::default();
        segments.push(bytes);
        segments
    }
}

impl Segments {
    /// Appends a slice.
    pub fn push(&mut self, slice: Bytes) {
        if !slice.is_empty() {
            self.remaining += slice.len();
            self.parts.push_back(slice);
        }
    }

    /// Bytes still to be read.
    pub fn len(&self) -> usize {
        self.remaining
    }

    /// True when all was read.
    pub fn is_empty(&self) -> bool {
        self.remaining == 0
    }

    /// Takes a length and that many bytes.
    fn take_value(&mut self) -> Result<Slices, Status> {
        let length = usize::try_from(decode_varint(self).map_err(refuse)?).unwrap_or(usize::MAX);
        if length > self.remaining {
            return Err(malformed());
        }
        Ok(self.split_front(length))
    }

    /// Removes `count` bytes, at most those that are there.
    fn split_front(&mut self, mut count: usize) -> Slices {
        let mut taken = Slices::new();
        while count > 0
            && let Some(front) = self.parts.front_mut()
        {
            let now = count.min(front.len());
            if now == front.len() {
                taken.extend(self.parts.pop_front());
            } else {
                taken.push(front.split_to(now));
            }
            count -= now;
            self.remaining -= now;
        }
        taken
    }
}

impl Buf for Segments {
    fn remaining(&self) -> usize {
        self.remaining
    }

    fn chunk(&self) -> &[u8] {
        self.parts.front().map(Bytes::as_ref).unwrap_or_default()
    }

    fn advance(&mut self, mut count: usize) {
        debug_assert!(count <= self.remaining);
        self.remaining -= count.min(self.remaining);
        while count > 0
            && let Some(front) = self.parts.front_mut()
        {
            let now = count.min(front.len());
            front.advance(now);
            count -= now;
            if front.is_empty() {
                self.parts.pop_front();
            }
        }
    }

    fn chunks_vectored<'a>(&'a self, out: &mut [IoSlice<'a>]) -> usize {
        let parts = self.parts.iter().zip(out);
        parts.map(|(part, slot)| *slot = IoSlice::new(part)).count()
    }
}

#[cfg(test)]
mod tests {
    use super::super::mutation;
    use super::super::proto::{HttpBody, Metadata, ProtocolConfiguration};
    use super::*;
    use proptest::prelude::*;

    fn sliced(whole: &[u8], cuts: &[prop::sample::Index]) -> Vec<Bytes> {
        let mut at: Vec<usize> = cuts.iter().map(|c| c.index(whole.len() + 1)).collect();
        at.extend([0, whole.len()]);
        at.sort_unstable();
        let pairs = at.windows(2);
        pairs
            .map(|w| Bytes::copy_from_slice(&whole[w[0]..w[1]]))
            .collect()
    }

    fn framed(message: &[u8]) -> Vec<u8> {
        let mut out = vec![0];
        out.extend(u32::try_from(message.len()).unwrap().to_be_bytes());
        out.extend_from_slice(message);
        out
    }

    fn body_message(request: bool, body: &[u8], end_of_stream: bool) -> ProcessingRequest {
        let piece = HttpBody {
            body: Bytes::copy_from_slice(body),
            end_of_stream,
        };
        let hint = (
            "envoy.lb".to_owned(),
            mutation::structure([("k".to_owned(), mutation::string_value("v"))]),
        );
        ProcessingRequest {
            request: Some(if request {
                Request::RequestBody(piece)
            } else {
                Request::ResponseBody(piece)
            }),
            metadata_context: Some(Metadata {
                filter_metadata: [hint].into(),
            }),
            protocol_config: Some(ProtocolConfiguration {
                request_body_mode: 4,
                ..ProtocolConfiguration::default()
            }),
            observability_mode: true,
            ..ProcessingRequest::default()
        }
    }

    proptest! {
        #[test]
        fn any_frames_give_the_messages_back(
            bodies in prop::collection::vec((any::<bool>(), prop::collection::vec(any::<u8>(), 0..40), any::<bool>()), 1..4),
            cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..12),
        ) {
            let messages: Vec<_> = bodies.iter().map(|(r, b, e)| body_message(*r, b, *e)).collect();
            let wire: Vec<u8> = messages.iter().flat_map(|m| framed(&m.encode_to_vec())).collect();
            let mut inbox = Inbox::default();
            let mut seen = Vec::new();
            for frame in sliced(&wire, &cuts) {
                inbox.push(frame);
                while let Some(framed) = inbox.next(1000).unwrap() {
                    prop_assert!(!framed.compressed);
                    let mut incoming = decode(framed.slices).unwrap();
                    let whole = join(&incoming.body);
                    prop_assert!(incoming.body.iter().all(|slice| !slice.is_empty()));
                    match incoming.message.request.as_mut() {
                        Some(Request::RequestBody(b) | Request::ResponseBody(b)) => b.body = whole,
                        other => prop_assert!(false, "{other:?}"),
                    }
                    seen.push(incoming.message);
                }
            }
            prop_assert!(inbox.is_empty());
            prop_assert_eq!(seen, messages);
        }

        #[test]
        fn garbage_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..60), cuts in prop::collection::vec(any::<prop::sample::Index>(), 1..4)) {
            let slices: Slices = sliced(&bytes, &cuts).into_iter().filter(|s| !s.is_empty()).collect();
            let scattered = decode(slices);
            let whole = ProcessingRequest::decode(&bytes[..]);
            // Groups are refused in scattered messages; everything else is judged as prost judges it.
            prop_assert!(scattered.is_err() || whole.is_ok());
        }
    }

    #[test]
    fn a_message_over_the_limit_is_refused_before_it_arrives() {
        let mut inbox = Inbox::default();
        inbox.push(Bytes::from_static(&[0, 0, 0, 0, 11]));
        let status = inbox.next(10).unwrap_err();
        assert_eq!(status.code(), tonic::Code::ResourceExhausted);
        let mut inbox = Inbox::default();
        inbox.push(Bytes::from_static(&[0, 0, 0, 0, 10, 1, 2]));
        assert!(inbox.next(10).unwrap().is_none());
    }

    #[test]
    fn segments_hand_out_all_slices_at_once() {
        let mut segments = Segments::default();
        for part in [&b"ab"[..], b"", b"cde"] {
            segments.push(Bytes::copy_from_slice(part));
        }
        let mut slots = [IoSlice::new(&[]); 4];
        assert_eq!(segments.chunks_vectored(&mut slots), 2);
        segments.advance(3);
        assert_eq!((segments.chunk(), segments.remaining()), (&b"de"[..], 2));
    }
}
