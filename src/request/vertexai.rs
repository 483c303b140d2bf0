//! `vertexai-parser`: Vertex AI's prediction service over gRPC, whose messages carry an OpenAI body.

use std::ops::Range;

use super::grpc::{first_message, scan_message};
use super::protobuf::{Content, Visitor};
use super::{ApiKind, AppProtocol, Body, ParseError, Parser, Payload, openai};
use crate::plugin::{Build, Maturity, ParamDoc, Plugin, PluginError};

/// Methods, without the package of the service: path suffix, request message, API of the inner body.
const METHODS: [(&str, &str, ApiKind); 3] = [
    (CHAT, "ChatCompletionsRequest", ApiKind::ChatCompletions),
    (STREAM, "StreamRawPredictRequest", ApiKind::Responses),
    (RAW, "RawPredictRequest", ApiKind::Responses),
];
const CHAT: &str = "PredictionService/ChatCompletions";
const STREAM: &str = "PredictionService/StreamRawPredict";
const RAW: &str = "PredictionService/RawPredict";

/// Reads Vertex AI gRPC requests. No parameters. A model name is read but not rewritten: the lengths
/// of the messages around it would change.
#[derive(Debug, Default)]
pub struct VertexAiParser;

impl Plugin for VertexAiParser {
    const TYPE: &'static str = "vertexai-parser";
    const MATURITY: Maturity = Maturity::Beta;
    const PARAMETERS: &'static [ParamDoc] = &[];
    const LENIENT: bool = true;
    const ABOUT: &'static str = "Reads OpenAI bodies inside Vertex AI gRPC requests.";

    fn build(_: &mut Build<'_>) -> Result<Self, PluginError> {
        Ok(Self)
    }
}

impl Parser for VertexAiParser {
    fn type_name(&self) -> &'static str {
        Self::TYPE
    }

    fn path_suffixes(&self) -> &'static [&'static str] {
        &[CHAT, STREAM, RAW]
    }

    fn app_protocols(&self) -> &'static [AppProtocol] {
        &[AppProtocol::H2c]
    }

    fn parse(&self, path: &str, body: &Body) -> Result<Payload, ParseError> {
        let method = METHODS.iter().find(|(suffix, ..)| path.ends_with(suffix));
        let Some((_, message, api)) = method else {
            return Ok(Payload::raw(true));
        };
        let range = first_message(body).map_err(|error| {
            ParseError::new(format!("invalid or unsupported gRPC payload: {error}"))
        })?;
        let mut request = Request::default();
        scan_message(body, range, &mut request)
            .map_err(|error| ParseError::new(format!("unmarshaling {message}: {error}")))?;
        let data = request
            .data
            .ok_or_else(|| ParseError::new(format!("{message} has no HttpBody")))?;
        let payload = openai::parse_range(*api, body, data)
            .map_err(|error| ParseError::new(format!("parsing {message}: {error}")))?;
        Ok(Payload {
            api: ApiKind::VertexAi,
            rewritable: false,
            object_end: None,
            ..payload
        })
    }
}

/// The three requests: `http_body` = 2 {`data` = 2}.
#[derive(Default)]
struct Request {
    /// Where `data` lies; empty when `http_body` came without it.
    data: Option<Range<usize>>,
}

impl Visitor for Request {
    fn begin(&mut self, path: &[u32], range: Range<usize>) -> Content {
        match path {
            [2] => {
                self.data.get_or_insert(0..0);
                return Content::Message;
            }
            [2, 2] => self.data = Some(range),
            _ => {}
        }
        Content::Skip
    }

    fn varint(&mut self, _: &[u32], _: u64) {}
}

#[cfg(test)]
mod tests {
    use super::super::grpc::proto::{frame, vertex_ai};
    use super::super::openai::OpenAiParser;
    use super::super::text::{Piece, for_each_piece};
    use super::super::{MediaItem, Prompt};
    use super::*;
    use bytes::Bytes;
    use proptest::prelude::*;

    const SERVICE: &str = "/google.cloud.aiplatform.v1beta1.PredictionService/";
    const CHAT_BODY: &str = r#"{"model":"m","messages":[{"role":"user","content":"Hi\n"},{"role":"user","content":[{"type":"image_url","image_url":{"url":"http://x"}}]}],"stream":true,"max_tokens":5,"cache_salt":"s"}"#;

    fn parse(method: &str, pieces: &[&[u8]]) -> Result<(Payload, Body), String> {
        let body: Body = pieces.iter().map(|p| Bytes::copy_from_slice(p)).collect();
        let payload = VertexAiParser.parse(&format!("{SERVICE}{method}"), &body);
        payload.map(|p| (p, body)).map_err(|e| e.to_string())
    }

    /// The prompt's decoded text, and its media.
    fn content(payload: &Payload, body: &Body) -> (String, Vec<MediaItem>) {
        let [Prompt::Text(segments)] = payload.prompts.as_slice() else {
            panic!("{:?}", payload.prompts)
        };
        let (mut text, mut media) = (Vec::new(), Vec::new());
        for_each_piece(segments, body, &mut |piece| match piece {
            Piece::Text(bytes) => text.extend_from_slice(bytes),
            Piece::Media(item) => media.push(item.clone()),
        });
        (String::from_utf8(text).unwrap(), media)
    }

    #[test]
    fn the_inner_body_is_read_where_it_lies() {
        let json = br#"{"model":"m","input":"ab","max_output_tokens":3}"#;
        let mut bytes = vec![
            0, 0, 0, 0, 57, // frame: flag 0, 57 bytes
            0x0a, 0x01, b'{', // endpoint = 1: "{"
            0x12, 52, // http_body = 2, 52 bytes
            0x12, 48, // data = 2, 48 bytes
        ];
        assert_eq!(json.len(), 48);
        bytes.extend(json);
        bytes.extend([0x1a, 0x00]); // extensions = 3: an empty Any
        for method in ["RawPredict", "StreamRawPredict"] {
            let (payload, body) = parse(method, &[&bytes]).unwrap();
            assert_eq!(payload.api, ApiKind::VertexAi);
            // The input counts as it is written, quotes included.
            assert_eq!(content(&payload, &body).0, "\"ab\"");
            assert_eq!(payload.max_output_tokens, Some(3));
            let model = payload.model.unwrap();
            // 12 bytes in front of the JSON, 9 of `{"model":`.
            assert_eq!((model.name.as_str(), model.range), ("m", 21..24));
            assert!(!payload.rewritable && payload.object_end.is_none());
        }
    }

    #[test]
    fn errors_have_the_contracts_texts() {
        for (method, bytes, text) in [
            (
                "ChatCompletions",
                &[0, 0, 0, 0][..],
                "invalid or unsupported gRPC payload: a frame header has 5 bytes, the body 4",
            ),
            (
                "RawPredict",
                &[1, 0, 0, 0, 0],
                "invalid or unsupported gRPC payload: compressed messages are not read (flag 1)",
            ),
            (
                "StreamRawPredict",
                &[0, 0, 0, 0, 1, 0xff],
                "unmarshaling StreamRawPredictRequest: a field reaches past the end of its message at offset 6",
            ),
            (
                "ChatCompletions",
                &[0, 0, 0, 0, 3, 0x0a, 0x01, b'e'], // endpoint only
                "ChatCompletionsRequest has no HttpBody",
            ),
            (
                "RawPredict",
                &[0, 0, 0, 0, 2, 0x12, 0x00], // http_body without data
                "parsing RawPredictRequest: error unmarshaling request bodyMap: unexpected end of JSON input",
            ),
            (
                "ChatCompletions",
                &[0, 0, 0, 0, 6, 0x12, 0x04, 0x12, 0x02, b'{', b'}'],
                "parsing ChatCompletionsRequest: invalid chat completions request: must have valid messages field",
            ),
        ] {
            assert_eq!(parse(method, &[bytes]).unwrap_err(), text);
        }
    }

    #[test]
    fn other_methods_pass_unread() {
        let (payload, _) = parse("Predict", &[&[1]]).unwrap();
        assert_eq!(payload.api, ApiKind::Raw);
        assert!(payload.skip_response);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(100))]

        #[test]
        fn any_split_reads_what_the_openai_parser_reads(
            endpoint in "[a-z{\"]{0,20}",
            cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..8),
        ) {
            let plain = Body::from(CHAT_BODY);
            let wanted = OpenAiParser.parse("/v1/chat/completions", &plain).unwrap();
            let bytes = frame(&vertex_ai::ChatCompletionsRequest {
                endpoint,
                http_body: Some(vertex_ai::HttpBody {
                    content_type: "application/json".to_owned(),
                    data: Bytes::from_static(CHAT_BODY.as_bytes()),
                }),
            });
            let mut at: Vec<usize> = cuts.iter().map(|c| c.index(bytes.len())).collect();
            at.extend([0, bytes.len()]);
            at.sort_unstable();
            let pieces: Vec<&[u8]> = at.windows(2).map(|w| &bytes[w[0]..w[1]]).collect();
            let (payload, body) = parse("ChatCompletions", &pieces).unwrap();
            prop_assert_eq!(content(&payload, &body), content(&wanted, &plain));
            prop_assert_eq!(payload.model.unwrap().name, "m");
            prop_assert_eq!(payload.max_output_tokens, Some(5));
            prop_assert_eq!(payload.cache_salt.as_deref(), Some("s"));
            prop_assert!(payload.stream);
        }
    }
}
