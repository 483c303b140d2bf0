//! What a parser found in a body: fields by value where they are short, the prompt by position.

use std::ops::Range;
use std::sync::Arc;

/// The API a body belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ApiKind {
    /// `chat/completions` and its render variant.
    ChatCompletions,
    /// `completions` and its render variant.
    Completions,
    /// `embeddings`.
    Embeddings,
    /// `responses`.
    Responses,
    /// `conversations`.
    Conversations,
    /// `images/generations`.
    Images,
    /// Anthropic `messages`.
    Messages,
    /// vLLM `inference/v1/generate`.
    VllmGenerate,
    /// SGLang `/generate`.
    SglangGenerate,
    /// vLLM gRPC `VllmEngine/Generate`.
    GrpcGenerate,
    /// vLLM gRPC `VllmEngine/Embed`.
    GrpcEmbed,
    /// Vertex AI gRPC: an OpenAI body inside a message.
    VertexAi,
    /// Bytes that are forwarded without being read.
    Raw,
}

/// Result of parsing one body.
#[expect(clippy::struct_excessive_bools, reason = "independent facts")]
#[derive(Debug, Clone)]
pub struct Payload {
    /// The API.
    pub api: ApiKind,
    /// The `model` field, if the API has one and the body names it.
    pub model: Option<ModelField>,
    /// True when the API lets the model name be rewritten in the body.
    pub rewritable: bool,
    /// Offset of the `}` of the top-level object, where a missing `model` can be spliced in.
    pub object_end: Option<usize>,
    /// `stream` is literally `true`.
    pub stream: bool,
    /// The client's limit on output tokens.
    pub max_output_tokens: Option<u64>,
    /// The answer is to hold log probabilities of the prompt, which engines compute without reading their
    /// cache.
    pub scores_prompt: bool,
    /// Isolates the prefix cache (`cache_salt`, for SGLang `extra_key`).
    pub cache_salt: Option<String>,
    /// Prompts in order; several for a batch. Empty when the API has none that is understood.
    pub prompts: Vec<Prompt>,
    /// The response phase is not interpreted for this request.
    pub skip_response: bool,
}

impl Payload {
    /// A payload whose body is forwarded without having been read.
    pub fn raw(skip_response: bool) -> Self {
        Self {
            api: ApiKind::Raw,
            model: None,
            rewritable: false,
            object_end: None,
            stream: false,
            max_output_tokens: None,
            scores_prompt: false,
            cache_salt: None,
            prompts: Vec::new(),
            skip_response,
        }
    }
}

/// A top-level `model` string.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelField {
    /// The decoded name.
    pub name: String,
    /// Where the JSON string lies, quotes included; a rewrite replaces exactly these bytes.
    pub range: Range<usize>,
}

/// One prompt of a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Prompt {
    /// Text, in the order it counts towards the prefix (tools, then system, then messages).
    Text(Vec<Segment>),
    /// Token ids the client supplied.
    Tokens {
        /// The ids in order.
        ids: Vec<u32>,
        /// Media placed inside the ids; `token_offset` is set.
        media: Vec<MediaItem>,
    },
}

/// A piece of a text prompt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Segment {
    /// Bytes of the body.
    Body {
        /// Position; for a JSON string the bytes between its quotes.
        range: Range<usize>,
        /// How to read them.
        encoding: TextEncoding,
    },
    /// An image, video or audio clip.
    Media(MediaItem),
}

/// How the bytes of a [`Segment::Body`] become text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TextEncoding {
    /// As they are: raw JSON, or a JSON string without escapes.
    Verbatim,
    /// Inside of a JSON string with at least one backslash escape.
    JsonEscaped,
}

/// A media item of a prompt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MediaItem {
    /// `image`, `video` or `audio`.
    pub modality: &'static str,
    /// xxHash64 (seed 0) of the URL or data, or of the engine's own hash string.
    pub hash: u64,
    /// What the engine calls the item in the keys of its blocks, where the request or the engine says
    /// so. For an item given by URL or data only the engine knows: it hashes what it fetched.
    pub identifier: Option<Arc<str>>,
    /// Placeholder position in token ids, when the client gave one.
    pub token_offset: Option<u32>,
    /// Placeholder length in tokens, when the client gave one.
    pub tokens: Option<u32>,
    /// What the body tells of the item's size.
    pub extent: Extent,
}

/// How large a media item is, as far as its own bytes in the body tell.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Extent {
    /// Nothing: it lies behind a URL, or nothing of its kind is read.
    #[default]
    Unknown,
    /// Size of an image sent inline; both are above 0.
    Pixels {
        /// Columns.
        width: u32,
        /// Rows.
        height: u32,
    },
    /// Bytes of audio as sent: data in base64 and the name of its format.
    Bytes(u64),
}

/// Why a body was refused. The text reaches the client behind `inference error: BadRequest - `.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct ParseError(pub String);

impl ParseError {
    /// An error with this client-facing text.
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }
}
