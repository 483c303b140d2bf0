//! Replies and their bytes.
//!
//! The two that every request has, header changes and body pieces, are written without building
//! protobuf messages first; the rest goes through prost. Body bytes are not copied.

use std::borrow::Cow;

use bytes::{BufMut, Bytes, BytesMut};
use prost::Message;
use prost::encoding::{encode_varint, encoded_len_varint};
use tonic::Status;

use super::mutation::{self, Direction};
use super::proto::body_mutation::Mutation;
use super::proto::{CommonResponse, ProcessingResponse, Struct};
use super::wire::{PREFIX_BYTES, Segments, Slices, join};

/// A reply.
#[derive(Debug, Clone, PartialEq)]
pub enum Reply {
    /// Answer to a headers message.
    Headers(HeaderChanges),
    /// A piece of a body in full duplex mode.
    Piece(Piece),
    /// Anything else.
    Message(Box<ProcessingResponse>),
}

/// What becomes of headers.
#[derive(Debug, Clone, PartialEq)]
pub struct HeaderChanges {
    /// Whose headers.
    pub direction: Direction,
    /// Each replaces every value of its name.
    pub set: Vec<(Cow<'static, str>, Bytes)>,
    /// Names to remove.
    pub remove: Vec<String>,
    /// The route depends on what changed.
    pub clear_route_cache: bool,
    /// Dynamic metadata that travels with it.
    pub metadata: Option<EncodedMetadata>,
}

/// A piece of a body that goes back in full duplex mode.
#[derive(Debug, Clone, PartialEq)]
pub struct Piece {
    /// Which body.
    pub direction: Direction,
    /// Its bytes.
    pub slices: Slices,
    /// Nothing follows.
    pub end_of_stream: bool,
    /// Dynamic metadata that travels with it.
    pub metadata: Option<EncodedMetadata>,
}

/// Dynamic metadata as it is sent: the bytes of a `google.protobuf.Struct`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EncodedMetadata(Bytes);

impl From<&Struct> for EncodedMetadata {
    fn from(metadata: &Struct) -> Self {
        Self(metadata.encode_to_vec().into())
    }
}

impl EncodedMetadata {
    /// One text: `{namespace: {key: text}}`.
    pub fn of_text(namespace: &str, key: &str, text: &[u8]) -> Self {
        // Struct.fields is a map, each entry a message with key 1 and value 2; Value.string_value is
        // field 3 and Value.struct_value field 5.
        let string_value = field_length(text.len());
        let inner_entry = field_length(key.len()) + field_length(string_value);
        let inner_struct = field_length(inner_entry);
        let struct_value = field_length(inner_struct);
        let entry = field_length(namespace.len()) + field_length(struct_value);
        let mut out = BytesMut::with_capacity(field_length(entry));
        put_key(0x0a, entry, &mut out);
        put_field(0x0a, namespace.as_bytes(), &mut out);
        put_key(0x12, struct_value, &mut out);
        put_key(0x2a, inner_struct, &mut out);
        put_key(0x0a, inner_entry, &mut out);
        put_field(0x0a, key.as_bytes(), &mut out);
        put_key(0x12, string_value, &mut out);
        put_field(0x1a, text, &mut out);
        Self(out.freeze())
    }

    /// The message.
    fn decoded(&self) -> Option<Struct> {
        Struct::decode(self.0.clone()).ok()
    }
}

impl From<ProcessingResponse> for Reply {
    fn from(message: ProcessingResponse) -> Self {
        Self::Message(Box::new(message))
    }
}

impl HeaderChanges {
    fn into_parts(self) -> (CommonResponse, Option<Struct>) {
        let set = self.set.into_iter();
        let set = set.map(|(name, value)| mutation::set_header(&name, value));
        let common = mutation::with_headers(set.collect(), self.remove, self.clear_route_cache);
        (common, self.metadata.and_then(|m| m.decoded()))
    }

    /// What of these changes can still be said in the answer to trailers: the metadata.
    pub fn with_trailers(self) -> ProcessingResponse {
        ProcessingResponse {
            dynamic_metadata: self.metadata.and_then(|m| m.decoded()),
            ..mutation::trailers(self.direction)
        }
    }

    /// These changes as the answer to a whole body, which `body` replaces if it is there.
    pub fn with_whole_body(self, body: Option<Bytes>) -> ProcessingResponse {
        let direction = self.direction;
        let (mut common, metadata) = self.into_parts();
        common.body_mutation =
            body.and_then(|body| mutation::with_body(Mutation::Body(body)).body_mutation);
        mutation::body(direction, common, metadata)
    }
}

impl From<HeaderChanges> for Reply {
    fn from(changes: HeaderChanges) -> Self {
        Self::Headers(changes)
    }
}

impl Reply {
    /// Attaches dynamic metadata.
    pub fn set_metadata(&mut self, metadata: &Struct) {
        match self {
            Self::Message(message) => message.dynamic_metadata = Some(metadata.clone()),
            Self::Piece(piece) => piece.metadata = Some(metadata.into()),
            Self::Headers(changes) => changes.metadata = Some(metadata.into()),
        }
    }
}

/// The whole message, for those who want it in one place.
impl From<Reply> for ProcessingResponse {
    fn from(reply: Reply) -> Self {
        match reply {
            Reply::Message(message) => *message,
            Reply::Headers(changes) => {
                let direction = changes.direction;
                let (common, metadata) = changes.into_parts();
                mutation::headers(direction, common, metadata)
            }
            Reply::Piece(piece) => {
                let mut whole = mutation::streamed_body(
                    piece.direction,
                    join(&piece.slices),
                    piece.end_of_stream,
                );
                whole.dynamic_metadata = piece.metadata.and_then(|m| m.decoded());
                whole
            }
        }
    }
}

/// Appends `reply` as a gRPC message; an error, and nothing appended, when it is longer than `limit`.
pub fn encode(reply: Reply, limit: usize, out: &mut Segments) -> Result<(), Status> {
    match reply {
        Reply::Message(message) => {
            let length = admit(message.encoded_len(), limit)?;
            let mut buffer = framed(length);
            message.encode_raw(&mut buffer);
            out.push(buffer.freeze());
        }
        Reply::Headers(changes) => encode_headers(&changes, limit, out)?,
        Reply::Piece(piece) => encode_piece(piece, limit, out)?,
    }
    Ok(())
}

fn admit(length: usize, limit: usize) -> Result<usize, Status> {
    if length > limit {
        return Err(Status::resource_exhausted(format!(
            "grpc: trying to send message larger than max ({length} vs. {limit})"
        )));
    }
    Ok(length)
}

/// A buffer with the prefix of a message, and room for it.
fn framed(length: usize) -> BytesMut {
    let mut buffer = BytesMut::with_capacity(PREFIX_BYTES + length);
    put_prefix(length, &mut buffer);
    buffer
}

fn put_prefix(length: usize, out: &mut BytesMut) {
    out.put_u8(0);
    out.put_u32(u32::try_from(length).unwrap_or(u32::MAX));
}

/// Length of a length-delimited field with a key of one byte.
fn field_length(length: usize) -> usize {
    1 + encoded_len_varint(length as u64) + length
}

fn put_key(key: u8, length: usize, out: &mut BytesMut) {
    out.put_u8(key);
    encode_varint(length as u64, out);
}

fn put_field(key: u8, value: &[u8], out: &mut BytesMut) {
    put_key(key, value.len(), out);
    out.put_slice(value);
}

/// Fields of text and bytes are left out when they are empty.
fn text_length(value: &[u8]) -> usize {
    if value.is_empty() {
        0
    } else {
        field_length(value.len())
    }
}

fn put_text(key: u8, value: &[u8], out: &mut BytesMut) {
    if !value.is_empty() {
        put_field(key, value, out);
    }
}

/// Key of `ProcessingResponse.dynamic_metadata`.
const DYNAMIC_METADATA: u8 = 0x42;
/// `CommonResponse.clear_route_cache: true`.
const CLEAR_ROUTE_CACHE: [u8; 2] = [0x28, 0x01];

fn encode_headers(changes: &HeaderChanges, limit: usize, out: &mut Segments) -> Result<(), Status> {
    let HeaderChanges {
        direction,
        set,
        remove,
        clear_route_cache,
        metadata,
    } = changes;
    // HeaderValue, with `key` and `raw_value`, in HeaderValueOption, in HeaderMutation.
    let line =
        |(name, value): &(Cow<'_, str>, Bytes)| text_length(name.as_bytes()) + text_length(value);
    let mutation: usize = set
        .iter()
        .map(|header| field_length(field_length(line(header))))
        .chain(remove.iter().map(|name| field_length(name.len())))
        .sum();
    let changed = !set.is_empty() || !remove.is_empty();
    let common = if changed { field_length(mutation) } else { 0 }
        + if *clear_route_cache {
            CLEAR_ROUTE_CACHE.len()
        } else {
            0
        };
    let response = field_length(common);
    let metadata_length = metadata.as_ref().map_or(0, |m| field_length(m.0.len()));
    let length = admit(field_length(response) + metadata_length, limit)?;
    let mut buffer = framed(length);
    let whose = match direction {
        Direction::Request => 0x0a,
        Direction::Response => 0x12,
    };
    put_key(whose, response, &mut buffer);
    put_key(0x0a, common, &mut buffer);
    if changed {
        put_key(0x12, mutation, &mut buffer);
    }
    for header in set {
        let value = line(header);
        put_key(0x0a, field_length(value), &mut buffer);
        put_key(0x0a, value, &mut buffer);
        put_text(0x0a, header.0.as_bytes(), &mut buffer);
        put_text(0x1a, &header.1, &mut buffer);
    }
    for name in remove {
        put_field(0x12, name.as_bytes(), &mut buffer);
    }
    if *clear_route_cache {
        buffer.put_slice(&CLEAR_ROUTE_CACHE);
    }
    if let Some(EncodedMetadata(bytes)) = metadata {
        put_field(DYNAMIC_METADATA, bytes, &mut buffer);
    }
    out.push(buffer.freeze());
    Ok(())
}

/// Keys of the messages around the bytes of a piece, from the inside out, each with its wire type
/// "length-delimited": `StreamedBodyResponse.body`, `BodyMutation.streamed_response`,
/// `CommonResponse.body_mutation`, `BodyResponse.response`.
const NESTING: [u8; 4] = [0x0a, 0x1a, 0x1a, 0x0a];
/// `StreamedBodyResponse.end_of_stream: true`.
const END_OF_STREAM: [u8; 2] = [0x10, 0x01];

fn encode_piece(piece: Piece, limit: usize, out: &mut Segments) -> Result<(), Status> {
    let Piece {
        direction,
        slices,
        end_of_stream,
        metadata,
    } = piece;
    let body: usize = slices.iter().map(Bytes::len).sum();
    let tail = if end_of_stream {
        END_OF_STREAM.len()
    } else {
        0
    };
    // Lengths of StreamedBodyResponse, BodyMutation, CommonResponse and BodyResponse.
    let streamed = if body == 0 { 0 } else { field_length(body) } + tail;
    let mutation = field_length(streamed);
    let common = field_length(mutation);
    let response = field_length(common);
    let metadata_length = metadata.as_ref().map_or(0, |m| field_length(m.0.len()));
    let whole = admit(field_length(response) + metadata_length, limit)?;
    // A prefix, five keys with lengths of at most five bytes each, and the end.
    let mut head = BytesMut::with_capacity(64);
    put_prefix(whole, &mut head);
    let [in_streamed, in_mutation, in_common, in_response] = NESTING;
    let which = match direction {
        Direction::Request => 0x1a,
        Direction::Response => 0x22,
    };
    put_key(which, response, &mut head);
    put_key(in_response, common, &mut head);
    put_key(in_common, mutation, &mut head);
    put_key(in_mutation, streamed, &mut head);
    if body > 0 {
        put_key(in_streamed, body, &mut head);
        out.push(head.split().freeze());
        slices.into_iter().for_each(|slice| out.push(slice));
    }
    if end_of_stream {
        head.put_slice(&END_OF_STREAM);
    }
    if let Some(EncodedMetadata(bytes)) = metadata {
        put_field(DYNAMIC_METADATA, &bytes, &mut head);
    }
    out.push(head.freeze());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Buf;
    use proptest::prelude::*;

    fn direction(request: bool) -> Direction {
        if request {
            Direction::Request
        } else {
            Direction::Response
        }
    }

    /// `reply` is refused under its length, and otherwise written as prost writes the same message.
    fn assert_encoded_as_prost(reply: &Reply) -> Result<(), TestCaseError> {
        let wanted = ProcessingResponse::from(reply.clone());
        let mut out = Segments::default();
        let limit = wanted.encoded_len();
        prop_assert!(encode(reply.clone(), limit.saturating_sub(1), &mut out).is_err());
        prop_assert!(out.is_empty());
        encode(reply.clone(), limit, &mut out).unwrap();
        let length = out.len();
        let mut framed = vec![0];
        framed.extend(u32::try_from(limit).unwrap().to_be_bytes());
        framed.extend(wanted.encode_to_vec());
        prop_assert_eq!(&out.copy_to_bytes(length)[..], &framed[..]);
        Ok(())
    }

    proptest! {
        #[test]
        fn a_piece_is_encoded_as_prost_encodes_it(
            request in any::<bool>(),
            slices in prop::collection::vec(prop::collection::vec(any::<u8>(), 1..100), 0..4),
            end_of_stream in any::<bool>(),
            with_metadata in any::<bool>(),
        ) {
            assert_encoded_as_prost(&Reply::Piece(Piece {
                direction: direction(request),
                slices: slices.into_iter().map(Bytes::from).collect(),
                end_of_stream,
                metadata: with_metadata.then(|| {
                    (&mutation::structure([("n".to_owned(), mutation::number_value(7.0))])).into()
                }),
            }))?;
        }

        #[test]
        fn header_changes_are_encoded_as_prost_encodes_them(
            request in any::<bool>(),
            set in prop::collection::vec(("[a-z:-]{0,140}", prop::collection::vec(any::<u8>(), 0..200)), 0..4),
            remove in prop::collection::vec("[a-z-]{0,140}", 0..3),
            clear_route_cache in any::<bool>(),
            text in prop::option::of(("[a-z.]{1,140}", "[a-z-]{1,20}", "\\PC{0,150}")),
        ) {
            let metadata = text.map(|(namespace, key, text)| {
                let encoded = EncodedMetadata::of_text(&namespace, &key, text.as_bytes());
                let inner = mutation::structure([(key, mutation::string_value(&text))]);
                (encoded, mutation::structure([(namespace, mutation::struct_value(inner))]))
            });
            if let Some((encoded, wanted)) = &metadata {
                prop_assert_eq!(encoded, &EncodedMetadata::from(wanted));
            }
            assert_encoded_as_prost(&Reply::Headers(HeaderChanges {
                direction: direction(request),
                set: set.into_iter().map(|(n, v)| (n.into(), Bytes::from(v))).collect(),
                remove,
                clear_route_cache,
                metadata: metadata.map(|(encoded, _)| encoded),
            }))?;
        }
    }
}
