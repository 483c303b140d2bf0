//! `vllmgrpc-parser`: vLLM's gRPC engine service, `Generate` and `Embed`.

use std::ops::Range;

use super::fields::Text;
use super::grpc::{first_message, scan_message};
use super::protobuf::{Content, Visitor};
use super::vllm_http::MAX_MEDIA;
use super::{
    ApiKind, AppProtocol, Body, Extent, MediaItem, ParseError, Parser, Payload, Prompt, Segment,
    TextEncoding,
};
use crate::plugin::{Build, Maturity, ParamDoc, Plugin, PluginError};

/// Path of the `Generate` method.
const GENERATE: &str = "vllm.grpc.engine.VllmEngine/Generate";
/// Path of the `Embed` method.
const EMBED: &str = "vllm.grpc.engine.VllmEngine/Embed";

/// Token ids of this vocabulary take two or three bytes each; what a list reserves up front.
const ID_BYTES: usize = 3;

/// Reads vLLM gRPC requests. No parameters. These requests name no model.
#[derive(Debug, Default)]
pub struct VllmGrpcParser;

impl Plugin for VllmGrpcParser {
    const TYPE: &'static str = "vllmgrpc-parser";
    const MATURITY: Maturity = Maturity::Beta;
    const PARAMETERS: &'static [ParamDoc] = &[];
    const LENIENT: bool = true;
    const ABOUT: &'static str = "Reads vLLM gRPC generate and embed requests.";

    fn build(_: &mut Build<'_>) -> Result<Self, PluginError> {
        Ok(Self)
    }
}

impl Parser for VllmGrpcParser {
    fn type_name(&self) -> &'static str {
        Self::TYPE
    }

    fn path_suffixes(&self) -> &'static [&'static str] {
        &[GENERATE, EMBED]
    }

    fn app_protocols(&self) -> &'static [AppProtocol] {
        &[AppProtocol::H2c]
    }

    fn parse(&self, path: &str, body: &Body) -> Result<Payload, ParseError> {
        if path.ends_with(GENERATE) {
            generate(body)
        } else if path.ends_with(EMBED) {
            embed(body)
        } else {
            Ok(Payload::raw(true))
        }
    }
}

fn generate(body: &Body) -> Result<Payload, ParseError> {
    let mut request = GenerateRequest::default();
    read(body, "GenerateRequest", &mut request)?;
    let prompt = match request.input {
        Input::Tokenized => Prompt::Tokens {
            ids: request.ids,
            media: request.images.media(body),
        },
        Input::Text(range) => Prompt::Text(vec![Segment::Body {
            range,
            encoding: TextEncoding::Verbatim,
        }]),
        Input::None => return Err(ParseError::new("not supported request inputType")),
    };
    Ok(Payload {
        api: ApiKind::GrpcGenerate,
        stream: request.stream,
        max_output_tokens: request.max_tokens,
        prompts: vec![prompt],
        ..Payload::raw(false)
    })
}

fn embed(body: &Body) -> Result<Payload, ParseError> {
    let mut request = EmbedRequest::default();
    read(body, "EmbedRequest", &mut request)?;
    if !request.tokenized {
        return Err(ParseError::new("missing tokenized input in EmbedRequest"));
    }
    Ok(Payload {
        api: ApiKind::GrpcEmbed,
        prompts: vec![Prompt::Tokens {
            ids: request.ids,
            media: Vec::new(),
        }],
        ..Payload::raw(false)
    })
}

fn read(body: &Body, message: &str, visitor: &mut impl Visitor) -> Result<(), ParseError> {
    let range =
        first_message(body).map_err(|_| ParseError::new("invalid or unsupported gRPC payload"))?;
    scan_message(body, range, visitor)
        .map_err(|error| ParseError::new(format!("unmarshaling {message}: {error}")))
}

/// The `input` of a generate request; the last one on the wire counts.
#[derive(Default)]
enum Input {
    #[default]
    None,
    Tokenized,
    Text(Range<usize>),
}

/// `GenerateRequest`: `tokenized` = 2 {`input_ids` = 2}, `text` = 3, `sampling_params` = 4
/// {`max_tokens` = 8}, `stream` = 5, `mm_inputs` = 7.
#[derive(Default)]
struct GenerateRequest {
    input: Input,
    ids: Vec<u32>,
    max_tokens: Option<u64>,
    stream: bool,
    images: Images,
}

impl Visitor for GenerateRequest {
    fn begin(&mut self, path: &[u32], range: Range<usize>) -> Content {
        match path {
            [2] => {
                // A second `tokenized` goes on where the first ended, as protobuf merges messages.
                if !matches!(self.input, Input::Tokenized) {
                    self.ids.clear();
                }
                self.input = Input::Tokenized;
                Content::Message
            }
            [2, 2] => {
                self.ids.reserve(range.len() / ID_BYTES);
                Content::Varints
            }
            [3] => {
                self.input = Input::Text(range);
                Content::Skip
            }
            [4 | 7] => Content::Message,
            [7, field @ ..] => self.images.begin(field, range),
            _ => Content::Skip,
        }
    }

    fn varint(&mut self, path: &[u32], value: u64) {
        match path {
            [2, 2] => self.ids.push(uint32(value)),
            [4, 8] => self.max_tokens = Some(u64::from(uint32(value))),
            [5] => self.stream = value != 0,
            [7, field @ ..] => self.images.varint(field, value),
            _ => {}
        }
    }
}

/// `EmbedRequest`: `tokenized` = 2 {`input_ids` = 2}.
#[derive(Default)]
struct EmbedRequest {
    tokenized: bool,
    ids: Vec<u32>,
}

impl Visitor for EmbedRequest {
    fn begin(&mut self, path: &[u32], range: Range<usize>) -> Content {
        match path {
            [2] => {
                self.tokenized = true;
                Content::Message
            }
            [2, 2] => {
                self.ids.reserve(range.len() / ID_BYTES);
                Content::Varints
            }
            _ => Content::Skip,
        }
    }

    fn varint(&mut self, path: &[u32], value: u64) {
        if path == [2, 2] {
            self.ids.push(uint32(value));
        }
    }
}

/// `MultimodalInputs`: `mm_placeholders` = 5 {`offset` = 1, `length` = 2}, `mm_hashes` = 6. Pixels lie
/// in other fields and are skipped.
#[derive(Default)]
struct Images {
    /// Offset and length in tokens; an absent field is 0, as in proto3.
    places: Vec<(u32, u32)>,
    hashes: Vec<Range<usize>>,
}

impl Images {
    fn begin(&mut self, field: &[u32], range: Range<usize>) -> Content {
        match field {
            [5] if self.places.len() < MAX_MEDIA => {
                self.places.push((0, 0));
                return Content::Message;
            }
            [6] if self.hashes.len() < MAX_MEDIA => self.hashes.push(range),
            _ => {}
        }
        Content::Skip
    }

    fn varint(&mut self, field: &[u32], value: u64) {
        let Some(place) = self.places.last_mut() else {
            return;
        };
        match field {
            [5, 1] => place.0 = uint32(value),
            [5, 2] => place.1 = uint32(value),
            _ => {}
        }
    }

    /// One item per placeholder; one without a hash gets 0.
    fn media(self, body: &Body) -> Vec<MediaItem> {
        let hash = |range: Range<usize>| {
            let escaped = false;
            let text = Text { range, escaped };
            (text.hash(body), text.read(body).map(Into::into))
        };
        let hashes = self.hashes.into_iter().map(hash);
        self.places
            .into_iter()
            .zip(hashes.chain(std::iter::repeat((0, None))))
            .map(|((offset, tokens), (hash, identifier))| MediaItem {
                extent: Extent::Unknown,
                modality: "image",
                hash,
                identifier,
                token_offset: Some(offset),
                tokens: Some(tokens),
            })
            .collect()
    }
}

/// A `uint32` field keeps the low half of a longer varint, in every protobuf implementation.
#[expect(clippy::cast_possible_truncation, reason = "as protobuf says")]
fn uint32(value: u64) -> u32 {
    value as u32
}

#[cfg(test)]
mod tests {
    use super::super::grpc::proto::{frame, vllm};
    use super::*;
    use bytes::Bytes;
    use proptest::prelude::*;
    use xxhash_rust::xxh64::xxh64;

    const GENERATE_PATH: &str = "/vllm.grpc.engine.VllmEngine/Generate";
    const EMBED_PATH: &str = "/vllm.grpc.engine.VllmEngine/Embed";

    fn parse_pieces(path: &str, pieces: &[&[u8]]) -> Result<Payload, String> {
        let body: Body = pieces.iter().map(|p| Bytes::copy_from_slice(p)).collect();
        VllmGrpcParser.parse(path, &body).map_err(|e| e.to_string())
    }

    /// Parses `message` as the only one of a body.
    fn parse(path: &str, message: &[u8]) -> Result<Payload, String> {
        let length = u32::try_from(message.len()).unwrap();
        parse_pieces(path, &[&[0], &length.to_be_bytes(), message])
    }

    fn tokens(payload: &Payload) -> (&[u32], &[MediaItem]) {
        match payload.prompts.as_slice() {
            [Prompt::Tokens { ids, media }] => (ids, media),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn ids_limit_and_stream_are_read() {
        let payload = parse(
            GENERATE_PATH,
            &[
                0x0a, 0x01, b'r', // request_id = 1: "r"
                0x12, 0x0b, // tokenized = 2, 11 bytes
                0x0a, 0x02, b'h', b'i', // original_text = 1: "hi"
                0x12, 0x03, 0x07, 0x80, 0x01, // input_ids = 2, packed: 7, 128
                0x10, 0x09, // input_ids = 2, not packed: 9
                0x22, 0x05, // sampling_params = 4, 5 bytes
                0x0d, 0, 0, 0x80, 0x3f, // temperature = 1: fixed32
                0x22, 0x02, // sampling_params again, 2 bytes: the messages merge
                0x40, 0x10, // max_tokens = 8: 16
                0x28, 0x01, // stream = 5: true
                0x48, 0x05, // a field 9 of a later version
            ],
        )
        .unwrap();
        assert_eq!(tokens(&payload).0, [7, 128, 9]);
        assert_eq!(payload.api, ApiKind::GrpcGenerate);
        assert_eq!(
            (payload.max_output_tokens, payload.stream),
            (Some(16), true)
        );
        assert!(payload.model.is_none() && payload.cache_salt.is_none());
        assert!(!payload.rewritable && payload.object_end.is_none() && !payload.skip_response);
    }

    #[test]
    fn an_explicit_limit_of_zero_is_a_limit() {
        // tokenized = 2: empty; sampling_params = 4 {max_tokens = 8: 0}.
        let payload = parse(GENERATE_PATH, &[0x12, 0x00, 0x22, 0x02, 0x40, 0x00]).unwrap();
        assert_eq!(payload.max_output_tokens, Some(0));
        assert_eq!(tokens(&payload).0, [0; 0]);
        let payload = parse(GENERATE_PATH, &[0x12, 0x00, 0x22, 0x00]).unwrap();
        assert_eq!(payload.max_output_tokens, None);
    }

    #[test]
    fn an_id_of_more_than_32_bits_keeps_its_low_half() {
        // 0x1_0000_0007 as a varint: 7, then bit 32 is bit 4 of the fifth byte.
        let ids = [0x12, 0x07, 0x12, 0x05, 0x87, 0x80, 0x80, 0x80, 0x10];
        assert_eq!(tokens(&parse(GENERATE_PATH, &ids).unwrap()).0, [7]);
    }

    #[test]
    fn the_last_input_counts() {
        let tokenized = [0x12, 0x03, 0x12, 0x01, 0x07]; // tokenized = 2 {input_ids = 2: [7]}
        let text = [0x1a, 0x02, b'h', b'i']; // text = 3: "hi"
        let payload = parse(GENERATE_PATH, &[&tokenized[..], &text].concat()).unwrap();
        // 5 bytes of frame header, 5 of `tokenized`, 2 of tag and length.
        let range = 12..14;
        let encoding = TextEncoding::Verbatim;
        let segment = Segment::Body { range, encoding };
        assert_eq!(payload.prompts, [Prompt::Text(vec![segment])]);
        let twice = [&tokenized[..], &text, &tokenized, &tokenized].concat();
        // The text drops the first list; the other two are one message.
        assert_eq!(tokens(&parse(GENERATE_PATH, &twice).unwrap()).0, [7, 7]);
    }

    #[test]
    fn images_have_hashes_and_places() {
        let payload = parse(
            GENERATE_PATH,
            &[
                0x12, 0x04, 0x12, 0x02, 0x01, 0x02, // tokenized = 2 {input_ids = 2: [1, 2]}
                0x3a, 0x12, // mm_inputs = 7, 18 bytes
                0x12, 0x02, 0xff, 0xff, // pixel_values = 2, skipped
                0x2a, 0x04, 0x08, 0x03, 0x10,
                0x05, // mm_placeholders = 5 {offset 3, length 5}
                0x32, 0x02, b'h', b'1', // mm_hashes = 6: "h1"
                0x2a, 0x02, 0x10, 0x04, // mm_placeholders = 5 {length 4}
            ],
        )
        .unwrap();
        let item = |hash, name: Option<&str>, offset, tokens| MediaItem {
            extent: Extent::Unknown,
            modality: "image",
            hash,
            identifier: name.map(Into::into),
            token_offset: Some(offset),
            tokens: Some(tokens),
        };
        assert_eq!(
            tokens(&payload).1,
            [item(xxh64(b"h1", 0), Some("h1"), 3, 5), item(0, None, 0, 4)]
        );
    }

    #[test]
    fn images_past_the_bound_are_ignored() {
        let mut message = vec![0x12, 0x00];
        for _ in 0..=MAX_MEDIA {
            // mm_inputs = 7 {mm_placeholders = 5 {}, mm_hashes = 6: ""}
            message.extend([0x3a, 0x04, 0x2a, 0x00, 0x32, 0x00]);
        }
        let payload = parse(GENERATE_PATH, &message).unwrap();
        assert_eq!(tokens(&payload).1.len(), MAX_MEDIA);
    }

    #[test]
    fn embed_reads_its_ids() {
        // request_id = 1: "r"; tokenized = 2 {input_ids = 2: [4, 5]}
        let message = [0x0a, 0x01, b'r', 0x12, 0x04, 0x12, 0x02, 0x04, 0x05];
        let payload = parse(EMBED_PATH, &message).unwrap();
        assert_eq!(payload.api, ApiKind::GrpcEmbed);
        assert_eq!(tokens(&payload).0, [4, 5]);
        assert!(!payload.stream && !payload.skip_response);
    }

    #[test]
    fn errors_have_the_contracts_texts() {
        let frame_error = "invalid or unsupported gRPC payload";
        for (path, bytes, text) in [
            (GENERATE_PATH, &[][..], frame_error),
            (GENERATE_PATH, &[0, 0, 0, 0], frame_error),
            (GENERATE_PATH, &[1, 0, 0, 0, 0], frame_error),
            (EMBED_PATH, &[0, 0, 0, 0, 1], frame_error),
            (
                GENERATE_PATH,
                &[0, 0, 0, 0, 0],
                "not supported request inputType",
            ),
            (
                EMBED_PATH,
                &[0, 0, 0, 0, 0],
                "missing tokenized input in EmbedRequest",
            ),
            (
                GENERATE_PATH,
                &[0, 0, 0, 0, 1, 0xff],
                "unmarshaling GenerateRequest: a field reaches past the end of its message at offset 6",
            ),
            (
                EMBED_PATH,
                &[0, 0, 0, 0, 1, 0x07],
                "unmarshaling EmbedRequest: invalid field tag before offset 6",
            ),
        ] {
            assert_eq!(parse_pieces(path, &[bytes]).unwrap_err(), text, "{bytes:?}");
        }
    }

    #[test]
    fn other_methods_pass_unread() {
        let payload = parse_pieces("/vllm.grpc.engine.VllmEngine/Abort", &[&[1, 2]]).unwrap();
        assert_eq!(payload.api, ApiKind::Raw);
        assert!(payload.skip_response);
    }

    #[test]
    fn only_the_first_frame_is_read() {
        let first = frame(&vllm::EmbedRequest {
            request_id: String::new(),
            tokenized: Some(tokenized(vec![1], "")),
        });
        let both = [&first[..], &[1, 0xff]].concat();
        assert_eq!(tokens(&parse_pieces(EMBED_PATH, &[&both]).unwrap()).0, [1]);
    }

    fn tokenized(input_ids: Vec<u32>, text: &str) -> vllm::TokenizedInput {
        vllm::TokenizedInput {
            original_text: text.to_owned(),
            input_ids,
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]

        #[test]
        fn any_split_of_what_prost_encodes_is_read(
            ids in prop::collection::vec(any::<u32>(), 0..50),
            text in "[a-z\u{e9}]{0,20}",
            max_tokens in any::<Option<u32>>(),
            stream in any::<bool>(),
            places in prop::collection::vec((any::<u32>(), any::<u32>()), 0..4),
            cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..8),
        ) {
            let hashes: Vec<String> = (0..places.len()).map(|n| format!("{text}{n}")).collect();
            let placeholder = |&(offset, length): &(u32, u32)| vllm::PlaceholderRange { offset, length };
            let request = vllm::GenerateRequest {
                request_id: text.clone(),
                input: Some(vllm::generate_request::Input::Tokenized(tokenized(ids.clone(), &text))),
                sampling_params: Some(vllm::SamplingParams { max_tokens }),
                stream,
                mm_inputs: Some(vllm::MultimodalInputs {
                    mm_placeholders: places.iter().map(placeholder).collect(),
                    mm_hashes: hashes.clone(),
                }),
            };
            let bytes = frame(&request);
            let mut at: Vec<usize> = cuts.iter().map(|c| c.index(bytes.len())).collect();
            at.extend([0, bytes.len()]);
            at.sort_unstable();
            let pieces: Vec<&[u8]> = at.windows(2).map(|w| &bytes[w[0]..w[1]]).collect();
            let payload = parse_pieces(GENERATE_PATH, &pieces).unwrap();
            let (read_ids, media) = tokens(&payload);
            prop_assert_eq!(read_ids, &ids);
            prop_assert_eq!(payload.max_output_tokens, max_tokens.map(u64::from));
            prop_assert_eq!(payload.stream, stream);
            let wanted: Vec<_> = places.iter().zip(&hashes).map(|((offset, tokens), hash)| {
                (xxh64(hash.as_bytes(), 0), Some(*offset), Some(*tokens))
            }).collect();
            let read: Vec<_> = media.iter().map(|m| (m.hash, m.token_offset, m.tokens)).collect();
            prop_assert_eq!(read, wanted);
        }
    }
}
