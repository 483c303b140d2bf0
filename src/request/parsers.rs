//! Which parser reads which path.

use std::sync::Arc;

use super::{AppProtocol, Headers, ParseError, Parser};

/// Path when the request carries none.
const DEFAULT_PATH: &str = "/v1/completions";

/// Parsers in configuration order, as the paths see them.
#[derive(Debug, Default)]
pub struct ParserSet {
    by_suffix: Vec<(&'static str, Arc<dyn Parser>)>,
    fallback: Option<Arc<dyn Parser>>,
}

impl ParserSet {
    /// Registers parsers in order. A type that is registered already is skipped; the first parser
    /// without paths becomes the fallback and ends the registration.
    pub fn new(parsers: impl IntoIterator<Item = Arc<dyn Parser>>) -> Self {
        let mut set = Self::default();
        let mut seen: Vec<&'static str> = Vec::new();
        for parser in parsers {
            if seen.contains(&parser.type_name()) {
                continue;
            }
            seen.push(parser.type_name());
            if parser.path_suffixes().is_empty() {
                set.fallback = Some(parser);
                break;
            }
            set.by_suffix.extend(
                parser
                    .path_suffixes()
                    .iter()
                    .map(|suffix| (*suffix, Arc::clone(&parser))),
            );
        }
        set
    }

    /// True when every parser that says what protocols it is for says `protocol`.
    pub fn accept(&self, protocol: AppProtocol) -> bool {
        let parsers = self.by_suffix.iter().map(|(_, parser)| parser);
        parsers.chain(&self.fallback).all(|parser| {
            let protocols = parser.app_protocols();
            protocols.is_empty() || protocols.contains(&protocol)
        })
    }

    /// The parser with the longest suffix of `path` (whole segments; for gRPC also a service without
    /// its package), else the fallback.
    pub fn resolve(&self, path: &str) -> Result<&dyn Parser, ParseError> {
        let matching = self.by_suffix.iter().filter(|(suffix, parser)| {
            path.strip_suffix(suffix)
                .is_some_and(|head| is_border(head, parser.as_ref()))
        });
        let longest = matching
            .max_by_key(|(suffix, _)| suffix.len())
            .map(|(_, parser)| parser);
        longest
            .or(self.fallback.as_ref())
            .map(AsRef::as_ref)
            .ok_or_else(|| {
                ParseError::new(format!(
                    "no parser registered matching path suffix for: {path}"
                ))
            })
    }
}

/// A suffix of `parser` may begin behind `head`. A gRPC path is `/package.Service/Method`, and parsers
/// may leave the package out.
fn is_border(head: &str, parser: &dyn Parser) -> bool {
    let grpc = parser.app_protocols() == [AppProtocol::H2c];
    head.is_empty() || head.ends_with('/') || (grpc && head.ends_with('.'))
}

/// The path that selects the parser: the first non-empty of `:path`, `x-original-path` and
/// `x-forwarded-path`, without query string and trailing slash.
pub fn request_path(headers: &Headers) -> &str {
    let named = [":path", "x-original-path", "x-forwarded-path"].into_iter();
    let path = named
        .filter_map(|name| headers.get_str(name))
        .find(|path| !path.is_empty())
        .unwrap_or(DEFAULT_PATH);
    let path = path.split('?').next().unwrap_or_default().trim();
    path.strip_suffix('/').unwrap_or(path)
}

#[cfg(test)]
mod tests {
    use super::super::anthropic::AnthropicParser;
    use super::super::grpc::proto::{frame, vertex_ai, vllm};
    use super::super::openai::OpenAiParser;
    use super::super::passthrough::PassthroughParser;
    use super::super::rewrite::rewrite_model;
    use super::super::sglang_http::SglangHttpParser;
    use super::super::text::{for_each_piece, token_count};
    use super::super::vertexai::VertexAiParser;
    use super::super::vllm_grpc::VllmGrpcParser;
    use super::super::vllm_http::VllmHttpParser;
    use super::super::{Body, Prompt};
    use super::*;
    use crate::config::builtin::registry;
    use crate::plugin::{Build, DataKeys, Parameters};
    use bytes::Bytes;
    use proptest::prelude::*;

    #[test]
    fn the_longest_suffix_wins_and_whole_segments_count() {
        let set = ParserSet::new([
            Arc::new(SglangHttpParser) as Arc<dyn Parser>,
            Arc::new(OpenAiParser),
            Arc::new(AnthropicParser),
            Arc::new(VllmHttpParser),
            Arc::new(PassthroughParser),
        ]);
        let name = |path| set.resolve(path).unwrap().type_name();
        assert_eq!(name("/v1/chat/completions"), "openai-parser");
        assert_eq!(name("/ns/model/v1/completions"), "openai-parser");
        assert_eq!(name("/v1/messages/count_tokens"), "anthropic-parser");
        assert_eq!(name("/inference/v1/generate"), "vllmhttp-parser");
        assert_eq!(name("/generate"), "sglanghttp-parser");
        assert_eq!(name("/v1/xcompletions"), "passthrough-parser");
        assert_eq!(name("/v1/models"), "passthrough-parser");
    }

    #[test]
    fn grpc_methods_are_found_with_and_without_their_package() {
        let set = ParserSet::new([
            Arc::new(OpenAiParser) as Arc<dyn Parser>,
            Arc::new(VertexAiParser),
            Arc::new(VllmGrpcParser),
            Arc::new(PassthroughParser),
        ]);
        let name = |path: &str| set.resolve(path).unwrap().type_name();
        assert_eq!(
            name("/vllm.grpc.engine.VllmEngine/Generate"),
            "vllmgrpc-parser"
        );
        assert_eq!(
            name("/vllm.grpc.engine.VllmEngine/Embed"),
            "vllmgrpc-parser"
        );
        assert_eq!(
            name("/vllm.grpc.engine.VllmEngine/Abort"),
            "passthrough-parser"
        );
        assert_eq!(
            name("/xvllm.grpc.engine.VllmEngine/Generate"),
            "passthrough-parser"
        );
        let vertex = "/google.cloud.aiplatform.v1beta1.PredictionService/";
        for method in ["ChatCompletions", "StreamRawPredict", "RawPredict"] {
            assert_eq!(name(&format!("{vertex}{method}")), "vertexai-parser");
        }
        assert_eq!(name(&format!("{vertex}Predict")), "passthrough-parser");
        assert_eq!(
            name("/a.XPredictionService/RawPredict"),
            "passthrough-parser"
        );
        // A dot is no border of an HTTP path.
        assert_eq!(name("/v1/x.completions"), "passthrough-parser");
    }

    #[test]
    fn without_a_fallback_an_unknown_path_is_refused() {
        let set = ParserSet::new([Arc::new(OpenAiParser) as Arc<dyn Parser>]);
        let error = set.resolve("/v1/rerank").unwrap_err();
        assert_eq!(
            error.to_string(),
            "no parser registered matching path suffix for: /v1/rerank"
        );
    }

    #[test]
    fn the_fallback_ends_the_registration() {
        let set = ParserSet::new([
            Arc::new(PassthroughParser) as Arc<dyn Parser>,
            Arc::new(OpenAiParser),
        ]);
        assert_eq!(
            set.resolve("/v1/completions").unwrap().type_name(),
            "passthrough-parser"
        );
    }

    #[test]
    fn the_path_is_cut_at_query_and_slash() {
        let path = |lines: &[(&str, &'static str)]| {
            let headers: Headers = lines
                .iter()
                .map(|(n, v)| ((*n).to_owned(), Bytes::from_static(v.as_bytes())))
                .collect();
            request_path(&headers).to_owned()
        };
        assert_eq!(
            path(&[(":path", "/v1/chat/completions/?a=b")]),
            "/v1/chat/completions"
        );
        assert_eq!(
            path(&[
                (":path", ""),
                ("x-forwarded-path", "/b"),
                ("x-original-path", "/a")
            ]),
            "/a"
        );
        assert_eq!(path(&[]), "/v1/completions");
    }

    /// Every parser of this build.
    fn all_parsers() -> Vec<Arc<dyn Parser>> {
        let registry = registry();
        let parsers = registry.types().iter().filter_map(|plugin_type| {
            let mut keys = DataKeys::default();
            keys.enter(plugin_type.type_name);
            let built = plugin_type.build(&mut Build {
                name: plugin_type.type_name,
                parameters: &Parameters::default(),
                keys: &mut keys,
            });
            built?.ok()?.parser
        });
        parsers.collect()
    }

    /// A body that has what each JSON parser looks for.
    const JSON: &str = r#"{"model":"m\u00e9","stream":true,"max_tokens":3,"cache_salt":"s","tools":[{"a":1}],
        "messages":[{"role":"user","content":[{"type":"text","text":"a\"\ud83d\ude00"},{"type":"image_url","image_url":{"url":"x"}}]}],
        "system":[{"type":"text","text":"y"}],"prompt":["a","b"],"input":[[1],[2,3]],"items":[{"type":"message"}],"instructions":"i",
        "token_ids":[1,2],"input_ids":[[1],[2]],"extra_key":"k","sampling_params":{"max_tokens":4,"max_new_tokens":5},
        "features":{"mm_hashes":{"image":["h"]},"mm_placeholders":{"image":[{"offset":0,"length":1}]}}}"#;

    fn samples() -> Vec<Vec<u8>> {
        let tokenized = || vllm::TokenizedInput {
            original_text: "t".to_owned(),
            input_ids: vec![1, 300, u32::MAX],
        };
        let generate = vllm::GenerateRequest {
            request_id: "r".to_owned(),
            input: Some(vllm::generate_request::Input::Tokenized(tokenized())),
            sampling_params: Some(vllm::SamplingParams {
                max_tokens: Some(7),
            }),
            stream: true,
            mm_inputs: Some(vllm::MultimodalInputs {
                mm_placeholders: vec![vllm::PlaceholderRange {
                    offset: 1,
                    length: 2,
                }],
                mm_hashes: vec!["h".to_owned()],
            }),
        };
        let text = vllm::GenerateRequest {
            input: Some(vllm::generate_request::Input::Text("abc".to_owned())),
            ..vllm::GenerateRequest::default()
        };
        let embed = vllm::EmbedRequest {
            request_id: String::new(),
            tokenized: Some(tokenized()),
        };
        let vertex = vertex_ai::ChatCompletionsRequest {
            endpoint: "e".to_owned(),
            http_body: Some(vertex_ai::HttpBody {
                content_type: "application/json".to_owned(),
                data: Bytes::from_static(JSON.as_bytes()),
            }),
        };
        vec![
            JSON.as_bytes().to_vec(),
            frame(&generate),
            frame(&text),
            frame(&embed),
            frame(&vertex),
        ]
    }

    /// Uses what a parser found as the rooms behind it do.
    fn read_all(parser: &dyn Parser, path: &str, body: &Body) -> bool {
        let Ok(payload) = parser.parse(path, body) else {
            return false;
        };
        for prompt in &payload.prompts {
            token_count(prompt, body, None, &mut |_, _| 1);
            if let Prompt::Text(segments) = prompt {
                for_each_piece(segments, body, &mut |_| {});
            }
        }
        if payload.rewritable {
            rewrite_model(body, &payload, "other");
        }
        let places = payload.model.map(|model| model.range.end);
        assert!(
            places
                .into_iter()
                .chain(payload.object_end)
                .all(|at| at <= body.len())
        );
        true
    }

    fn paths(parser: &dyn Parser) -> Vec<String> {
        let suffixes = parser.path_suffixes().iter();
        let mut paths: Vec<_> = suffixes.map(|suffix| format!("/{suffix}")).collect();
        paths.push("/other".to_owned());
        paths
    }

    #[test]
    fn the_samples_are_readable() {
        let parsers = all_parsers();
        assert_eq!(parsers.len(), 7);
        let samples: Vec<Body> = samples()
            .into_iter()
            .map(|s| Bytes::from(s).into())
            .collect();
        for parser in &parsers {
            for path in paths(parser.as_ref()) {
                let readable = samples.iter().any(|s| read_all(parser.as_ref(), &path, s));
                // Parsers of one path refuse others.
                assert!(
                    readable || path == "/other",
                    "{} {path}",
                    parser.type_name()
                );
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(300))]

        #[test]
        fn no_bytes_make_a_parser_panic(
            noise in prop::collection::vec(any::<u8>(), 0..200),
            sample in prop::option::of(any::<prop::sample::Index>()),
            edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6),
            length in any::<prop::sample::Index>(),
            cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..6),
        ) {
            let mut bytes = noise;
            if let Some(sample) = sample {
                bytes = sample.get(&samples()).clone();
                for (index, byte) in edits {
                    let at = index.index(bytes.len());
                    bytes[at] = byte;
                }
                // Every other one whole, the others cut anywhere.
                bytes.truncate(length.index(2 * bytes.len()) + 1);
            }
            let mut at: Vec<usize> = cuts.iter().map(|c| c.index(bytes.len() + 1)).collect();
            at.extend([0, bytes.len()]);
            at.sort_unstable();
            let body: Body = at.windows(2).map(|w| Bytes::copy_from_slice(&bytes[w[0]..w[1]])).collect();
            for parser in all_parsers() {
                for path in paths(parser.as_ref()) {
                    read_all(parser.as_ref(), &path, &body);
                }
            }
        }
    }
}
