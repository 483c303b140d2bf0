//! `token-producer`: tokens of the prompt; this version estimates them from bytes.

use serde::Deserialize;
use smallvec::SmallVec;

use super::media_tokens::{EstimateSettings, MediaEstimate, VideoHints};
use crate::plugin::{Attributes, Build, Column, Maturity, ParamDoc, Plugin, PluginError};
use crate::request::text::token_count;
use crate::request::{Headers, InferenceRequest, MediaItem, Prompt};
use crate::scheduling::attributes::{
    MEDIA_FEATURES, MediaFeature, TOKEN_PRODUCER, TOKENIZED_PROMPT,
};
use crate::scheduling::{Candidate, DataProducer, ProducerError};

/// Tokens that the media of one request count together, about the largest context a model has; past
/// it every further item counts one. Sizes come from clients (headers, image headers), and the prefix
/// hash is as long as they say.
const MAX_MEDIA_TOKENS: u32 = 1 << 20;

/// Counts the tokens of each prompt: ids the client sent as they are, text at four bytes a token,
/// media as `media_tokens.rs` estimates them. Publishes nothing for a request without a
/// prompt, and no media features for one without media, which costs it nothing.
#[derive(Debug)]
pub struct TokenProducer {
    tokens: Column<u64>,
    features: Column<MediaFeature>,
    estimate: MediaEstimate,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
struct Settings {
    estimate: Option<EstimateSettings>,
    vllm: Option<serde_json::Value>,
    model_name: String,
    uds_tokenizer_config: Option<serde_json::Value>,
}

impl Plugin for TokenProducer {
    const TYPE: &'static str = TOKEN_PRODUCER;
    const MATURITY: Maturity = Maturity::Beta;
    const PARAMETERS: &'static [ParamDoc] = &[
        ParamDoc {
            name: "estimate",
            kind: "object",
            default: "{}",
            help: "Count four bytes as one token, and media by `image` (`mode` dynamic|static, `defaultResolution`, `dynamic.factor`, `static.staticToken`) and `video` (`defaultResolution`, `defaultDuration` in seconds, `tokensPerFrame`, `frames`, `maxVideoTokens`).",
        },
        ParamDoc {
            name: "vllm",
            kind: "object",
            default: "",
            help: "Ask a vLLM render endpoint; not yet available.",
        },
        ParamDoc {
            name: "modelName",
            kind: "string",
            default: "",
            help: "Model for a remote backend; not yet available.",
        },
        ParamDoc {
            name: "udsTokenizerConfig",
            kind: "object",
            default: "",
            help: "Deprecated; not yet available.",
        },
    ];
    const ABOUT: &'static str = "Counts prompt tokens.";

    fn build(build: &mut Build<'_>) -> Result<Self, PluginError> {
        let settings: Settings = build.read::<Self, _>()?;
        let later = |what: &str| {
            Err(PluginError::Invalid(format!(
                "{what} is known but not yet available in this version"
            )))
        };
        if settings.vllm.is_some() || !settings.model_name.is_empty() {
            return later("the vllm backend");
        }
        if settings.uds_tokenizer_config.is_some() {
            return later("udsTokenizerConfig");
        }
        Ok(Self {
            estimate: settings.estimate.unwrap_or_default().resolve()?,
            tokens: build.keys.produce(TOKENIZED_PROMPT),
            features: build.keys.produce(MEDIA_FEATURES),
        })
    }
}

impl DataProducer for TokenProducer {
    fn produce(
        &self,
        request: &InferenceRequest,
        _: &[Candidate],
        attributes: &mut Attributes,
    ) -> Result<(), ProducerError> {
        if request.payload.prompts.is_empty() {
            return Ok(());
        }
        let mut media = MediaReader::new(&self.estimate, &request.headers);
        let prompts = request.payload.prompts.iter().zip(0..);
        let counts = prompts.map(|(prompt, index)| {
            if let Prompt::Tokens { media: items, .. } = prompt {
                for item in items {
                    media.read(index, item, item.token_offset.unwrap_or(0).into());
                }
            }
            let early = request.first_blocks.as_deref().filter(|_| index == 0);
            token_count(prompt, &request.body, early, &mut |item, offset| {
                media.read(index, item, offset).into()
            })
        });
        attributes.write(self.tokens).extend(counts);
        if !media.features.is_empty() {
            attributes.write(self.features).extend(media.features);
        }
        Ok(())
    }
}

/// Collects the media of one request as its prompts are counted.
struct MediaReader<'a> {
    estimate: &'a MediaEstimate,
    headers: &'a Headers,
    /// Read with the first video.
    hints: Option<VideoHints>,
    /// What is left of [`MAX_MEDIA_TOKENS`].
    left: u32,
    features: SmallVec<[MediaFeature; 4]>,
}

impl<'a> MediaReader<'a> {
    fn new(estimate: &'a MediaEstimate, headers: &'a Headers) -> Self {
        Self {
            estimate,
            headers,
            hints: None,
            left: MAX_MEDIA_TOKENS,
            features: SmallVec::new(),
        }
    }

    /// Takes note of an item and returns its tokens.
    fn read(&mut self, prompt: u32, item: &MediaItem, offset: u64) -> u32 {
        let hints = || {
            *self
                .hints
                .get_or_insert_with(|| VideoHints::of(self.headers))
        };
        let tokens = u32::try_from(self.estimate.tokens(item, hints)).unwrap_or(u32::MAX);
        let tokens = tokens.min(self.left).max(1);
        self.left = self.left.saturating_sub(tokens);
        self.features.push(MediaFeature {
            prompt,
            modality: item.modality,
            hash: item.hash,
            offset: u32::try_from(offset).unwrap_or(u32::MAX),
            tokens,
        });
        tokens
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::producers::block_hash::{Cut, chain_seed, hash_prompt};
    use crate::request::openai::OpenAiParser;
    use crate::request::{Body, Parser};
    use crate::scheduling::test_support::Pool;

    fn chat(content: &serde_json::Value) -> InferenceRequest {
        let body = serde_json::json!({"messages": [{"role": "user", "content": content}]});
        let body = Body::from(body.to_string().as_str());
        let payload = OpenAiParser.parse("/v1/chat/completions", &body).unwrap();
        InferenceRequest::new("r", payload, body)
    }

    /// Tokens of the only prompt, and the media: modality, offset, tokens.
    type Counted = (Vec<u64>, Vec<(&'static str, u32, u32)>);

    fn count(parameters: &str, request: &InferenceRequest) -> Counted {
        let mut pool = Pool::new([]);
        let producer: TokenProducer = pool.plugin(parameters);
        let mut attributes = pool.keys.new_attributes();
        producer.produce(request, &[], &mut attributes).unwrap();
        let features = attributes.get(producer.features).unwrap_or_default();
        (
            attributes.get(producer.tokens).unwrap_or_default().to_vec(),
            features
                .iter()
                .map(|f| (f.modality, f.offset, f.tokens))
                .collect(),
        )
    }

    #[test]
    fn media_count_by_the_settings_at_their_places() {
        let content = serde_json::json!([
            {"type": "text", "text": "a"},
            {"type": "image_url", "image_url": {"url": "http://x/i"}},
            {"type": "text", "text": "b"},
            {"type": "video_url", "video_url": {"url": "http://x/v"}},
            {"type": "input_audio", "input_audio": {"format": "wav", "data": "abcdef"}},
        ]);
        let mut request = chat(&content);
        let header = |name: &str, value: &'static str| {
            (name.to_owned(), bytes::Bytes::from_static(value.as_bytes()))
        };
        request.headers = [header("x-llm-d-video-duration-seconds", "3")]
            .into_iter()
            .collect();
        let parameters = r#"{"estimate": {"image": {"mode": "static", "static": {"staticToken": 7}},
            "video": {"tokensPerFrame": {"mode": "static", "static": {"numTokensPerFrame": 10}}}}}"#;
        // "usera" is 2 tokens, the image 7, "b" 1, the video 3 s * 2 fps * 10 = 60, and "abcdefwav"
        // is 9 bytes, 3 tokens.
        assert_eq!(
            count(parameters, &request),
            (
                vec![2 + 7 + 1 + 60 + 3],
                vec![("image", 2, 7), ("video", 10, 60), ("audio", 70, 3)]
            )
        );
    }

    #[test]
    fn a_request_without_media_publishes_no_features() {
        let request = chat(&"abcd".into());
        let mut pool = Pool::new([]);
        let producer: TokenProducer = pool.plugin("{}");
        let mut attributes = pool.keys.new_attributes();
        producer.produce(&request, &[], &mut attributes).unwrap();
        assert_eq!(attributes.get(producer.tokens), Some(&[2][..]));
        assert_eq!(attributes.get(producer.features), None);
    }

    #[test]
    fn the_count_and_the_hash_chain_agree() {
        let url = "http://x/i";
        let content = serde_json::json!([
            {"type": "image_url", "image_url": {"url": url}},
            {"type": "text", "text": "tail"},
        ]);
        let request = chat(&content);
        let (tokens, features) = count(
            r#"{"estimate": {"image": {"defaultResolution": {"width": 320, "height": 32}}}}"#,
            &request,
        );
        // 320 * 32 / 1024 = 10: one token of role, ten of image, one of text.
        assert_eq!(tokens, [12]);
        let mut hashes = Vec::new();
        let seed = chain_seed("", None);
        let media = features.iter().map(|(.., tokens)| *tokens);
        let prompt = &request.payload.prompts[0];
        let cut = Cut {
            block_tokens: 4,
            max_blocks: usize::MAX,
        };
        hash_prompt(prompt, &request.body, None, seed, cut, media, &mut hashes);
        // The same bytes as text: the low half of the URL's hash, ten times.
        let hash = xxhash_rust::xxh64::xxh64(url.as_bytes(), 0);
        let mut bytes = b"user".to_vec();
        for _ in 0..10 {
            bytes.extend(&hash.to_le_bytes()[..4]);
        }
        bytes.extend(b"tail");
        let mut parent = seed;
        let expected: Vec<u64> = bytes
            .chunks(16)
            .map(|block| {
                let own = xxhash_rust::xxh64::xxh64(block, 0).to_le_bytes();
                parent = xxhash_rust::xxh64::xxh64(&[own, parent.to_le_bytes()].concat(), 0);
                parent
            })
            .collect();
        assert_eq!(expected.len(), 3);
        assert_eq!(hashes, expected);
    }

    #[test]
    fn the_media_of_a_request_are_bounded() {
        // A PNG header that claims 2^31 - 1 by 2^31 - 1 pixels.
        let huge = "data:image/png;base64,iVBORw0KGgoAAAANSUhEUn////9/////";
        let part = serde_json::json!({"type": "image_url", "image_url": {"url": huge}});
        let (tokens, features) = count("{}", &chat(&serde_json::json!([part, part])));
        // One token of role, the whole bound, then one token for the second image.
        assert_eq!(tokens, [1 + (1 << 20) + 1]);
        assert_eq!(
            features,
            [("image", 1, 1 << 20), ("image", 1 + (1 << 20), 1)]
        );
    }

    #[test]
    fn media_of_token_prompts_keep_the_clients_places() {
        let body = r#"{"token_ids":[1,2,3,4],"features":{"mm_hashes":{"image":["h"]},"mm_placeholders":{"image":[{"offset":1,"length":2}]}}}"#;
        let body = Body::from(body);
        let parser = crate::request::vllm_http::VllmHttpParser;
        let payload = parser.parse("/inference/v1/generate", &body).unwrap();
        let request = InferenceRequest::new("r", payload, body);
        assert_eq!(count("{}", &request), (vec![4], vec![("image", 1, 2)]));
    }
}
