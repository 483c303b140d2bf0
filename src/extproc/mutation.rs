//! Builders for the messages of a normal exchange.

use bytes::Bytes;

use super::proto::body_mutation::Mutation;
use super::proto::processing_response::Response;
use super::proto::value::Kind;
use super::proto::{
    BodyMutation, BodyResponse, CommonResponse, HeaderMutation, HeaderValue, HeaderValueOption,
    HeadersResponse, ProcessingResponse, StreamedBodyResponse, Struct, TrailersResponse, Value,
};
use super::reply::{Piece, Reply};
use super::wire::Slices;

/// Which half of the exchange a message belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// Client to endpoint.
    Request,
    /// Endpoint to client.
    Response,
}

/// A header that replaces every value of its name. Only `raw_value` is filled: Envoy rejects both.
pub fn set_header(name: &str, value: Bytes) -> HeaderValueOption {
    HeaderValueOption {
        header: Some(HeaderValue {
            key: name.to_owned(),
            value: Bytes::new(),
            raw_value: value,
        }),
    }
}

/// Answer to a headers message.
pub fn headers(
    direction: Direction,
    common: CommonResponse,
    metadata: Option<Struct>,
) -> ProcessingResponse {
    let response = Some(common);
    let response = match direction {
        Direction::Request => Response::RequestHeaders(HeadersResponse { response }),
        Direction::Response => Response::ResponseHeaders(HeadersResponse { response }),
    };
    ProcessingResponse {
        response: Some(response),
        dynamic_metadata: metadata,
    }
}

/// Answer to a body message.
pub fn body(
    direction: Direction,
    common: CommonResponse,
    metadata: Option<Struct>,
) -> ProcessingResponse {
    let response = Some(common);
    let response = match direction {
        Direction::Request => Response::RequestBody(BodyResponse { response }),
        Direction::Response => Response::ResponseBody(BodyResponse { response }),
    };
    ProcessingResponse {
        response: Some(response),
        dynamic_metadata: metadata,
    }
}

/// One piece of a body in full duplex mode.
pub fn streamed_body(
    direction: Direction,
    piece: Bytes,
    end_of_stream: bool,
) -> ProcessingResponse {
    let mutation = Mutation::StreamedResponse(StreamedBodyResponse {
        body: piece,
        end_of_stream,
    });
    body(direction, with_body(mutation), None)
}

/// A `CommonResponse` that only replaces the body.
pub fn with_body(mutation: Mutation) -> CommonResponse {
    CommonResponse {
        body_mutation: Some(BodyMutation {
            mutation: Some(mutation),
        }),
        ..CommonResponse::default()
    }
}

/// Answer to a trailers message; changes nothing.
pub fn trailers(direction: Direction) -> ProcessingResponse {
    let response = match direction {
        Direction::Request => Response::RequestTrailers(TrailersResponse {
            header_mutation: None,
        }),
        Direction::Response => Response::ResponseTrailers(TrailersResponse {
            header_mutation: None,
        }),
    };
    ProcessingResponse {
        response: Some(response),
        dynamic_metadata: None,
    }
}

/// A `CommonResponse` with header changes; `None` when there are none.
pub fn with_headers(
    set: Vec<HeaderValueOption>,
    remove: Vec<String>,
    clear_route_cache: bool,
) -> CommonResponse {
    let empty = set.is_empty() && remove.is_empty();
    CommonResponse {
        header_mutation: (!empty).then_some(HeaderMutation {
            set_headers: set,
            remove_headers: remove,
        }),
        clear_route_cache,
        ..CommonResponse::default()
    }
}

/// Groups `slices` into full-duplex replies of at most `limit` bytes and hands them to `emit`. The
/// last one carries `end_of_stream`; an empty body yields one empty reply if it has to end.
pub fn stream_pieces(
    direction: Direction,
    slices: impl IntoIterator<Item = Bytes>,
    limit: usize,
    end_of_stream: bool,
    emit: &mut impl FnMut(Reply),
) {
    let mut piece = |slices: Slices, end_of_stream| {
        emit(Reply::Piece(Piece {
            direction,
            slices,
            end_of_stream,
            metadata: None,
        }));
    };
    let mut group = Slices::new();
    let mut room = limit;
    for mut slice in slices {
        while !slice.is_empty() {
            if room == 0 {
                piece(std::mem::take(&mut group), false);
                room = limit;
            }
            let cut = slice.split_to(slice.len().min(room));
            room -= cut.len();
            group.push(cut);
        }
    }
    if !group.is_empty() || end_of_stream {
        piece(group, end_of_stream);
    }
}

/// A string in a metadata struct.
pub fn string_value(text: &str) -> Value {
    Value {
        kind: Some(Kind::StringValue(text.to_owned())),
    }
}

/// A struct from its fields.
pub fn structure(fields: impl IntoIterator<Item = (String, Value)>) -> Struct {
    Struct {
        fields: fields.into_iter().collect(),
    }
}

/// A struct as the value of a field.
pub fn struct_value(value: Struct) -> Value {
    Value {
        kind: Some(Kind::StructValue(value)),
    }
}

/// A number in a metadata struct.
pub fn number_value(number: f64) -> Value {
    Value {
        kind: Some(Kind::NumberValue(number)),
    }
}

#[cfg(test)]
mod tests {
    use super::super::wire::join;
    use super::*;

    fn cut(pieces: &[&'static [u8]], limit: usize, end: bool) -> Vec<(Bytes, bool)> {
        let mut out = Vec::new();
        let pieces = pieces.iter().map(|p| Bytes::from_static(p));
        stream_pieces(Direction::Request, pieces, limit, end, &mut |reply| {
            let Reply::Piece(piece) = reply else {
                panic!("not a piece: {reply:?}")
            };
            assert!(piece.slices.iter().all(|slice| !slice.is_empty()));
            out.push((join(&piece.slices), piece.end_of_stream));
        });
        out
    }

    #[test]
    fn only_the_last_piece_ends_the_stream() {
        let out = cut(&[b"abcde", b"", b"fgh"], 3, true);
        let texts: Vec<&[u8]> = out.iter().map(|(b, _)| b.as_ref()).collect();
        assert_eq!(texts, [&b"abc"[..], b"def", b"gh"]);
        assert_eq!(
            out.iter().map(|(_, end)| *end).collect::<Vec<_>>(),
            [false, false, true]
        );
    }

    #[test]
    fn an_empty_body_is_one_empty_piece_when_it_ends_and_none_otherwise() {
        assert_eq!(cut(&[], 10, true), [(Bytes::new(), true)]);
        assert_eq!(cut(&[], 10, false), []);
    }

    #[test]
    fn before_trailers_no_piece_ends_the_stream() {
        assert_eq!(
            cut(&[b"ab"], 10, false),
            [(Bytes::from_static(b"ab"), false)]
        );
    }
}
