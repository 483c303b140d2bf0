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
    use super::super::openai::OpenAiParser;
    use super::super::passthrough::PassthroughParser;
    use super::super::sglang_http::SglangHttpParser;
    use super::super::vertexai::VertexAiParser;
    use super::super::vllm_grpc::VllmGrpcParser;
    use super::super::vllm_http::VllmHttpParser;
    use super::*;
    use bytes::Bytes;

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
}
