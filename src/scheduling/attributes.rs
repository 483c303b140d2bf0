//! Data keys that scheduling plugins read, and the values behind them.

/// Prefix match per candidate: [`PrefixMatch`].
pub const PREFIX_MATCH: &str = "PrefixCacheMatchInfoDataKey";
/// Uncached prompt tokens per candidate: `u64`.
pub const UNCACHED_TOKENS: &str = "UncachedRequestTokensDataKey";
/// Live in-flight counters; addressed by slot, so the column holds nothing.
pub const IN_FLIGHT: &str = "InFlightLoadDataKey";
/// Prompt tokens of the request, one value for each prompt: `u64`.
pub const TOKENIZED_PROMPT: &str = "TokenizedPrompt";
/// Token ids of the request's prompts, published beside [`TOKENIZED_PROMPT`] by a token producer with a
/// tokenizer behind it, and left unwritten when it gave no answer.
pub const TOKEN_IDS: &str = "TokenizedPrompt.ids";
/// Media of the request's prompts in order: [`MediaFeature`]. Published beside [`TOKENIZED_PROMPT`],
/// and only when there are any: a request without media leaves the column unwritten.
pub const MEDIA_FEATURES: &str = "TokenizedPrompt.features";
/// How much of the request's media an endpoint has encoded: [`EncoderCacheMatch`].
pub const ENCODER_CACHE_MATCH: &str = "MultiModalEncoderCacheMatchInfoKey";

/// Who the calling agent is, one value: `String`. Used as fairness id.
pub const AGENT_IDENTITY: &str = "agent-identity";
/// Session of the request, one value: `String`.
pub const SESSION_ID: &str = "SessionIDDataKey";

/// Default producers of the keys above.
pub const APPROX_PREFIX_PRODUCER: &str = "approx-prefix-cache-producer";
/// See [`APPROX_PREFIX_PRODUCER`].
pub const IN_FLIGHT_PRODUCER: &str = "inflight-load-producer";
/// See [`APPROX_PREFIX_PRODUCER`].
pub const TOKEN_PRODUCER: &str = "token-producer";
/// See [`APPROX_PREFIX_PRODUCER`].
pub const MM_EMBEDDINGS_PRODUCER: &str = "mm-embeddings-cache-producer";
/// Publishes the scraped core metrics under its type name, whatever the instance is called.
pub use crate::datalayer::attributes::CORE_METRICS_PRODUCER;

/// How much of the request's prefix an endpoint holds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PrefixMatch {
    /// Consecutive blocks from the start.
    pub matched_blocks: u32,
    /// Blocks of the request, a partial last one included.
    pub total_blocks: u32,
    /// Tokens of a block.
    pub block_size_tokens: u32,
    /// Consecutive blocks from the start in any memory of the endpoint; `matched_blocks` may count
    /// blocks in slower memory for less.
    pub cached_blocks: u32,
    /// Those of them that lie in host memory without a gap; `None` when that is not known.
    pub host_blocks: Option<u32>,
}

impl PrefixMatch {
    /// Share of the request's blocks that is held, `0..=1`; 0 for a request without blocks.
    pub fn ratio(&self) -> f64 {
        if self.total_blocks == 0 {
            0.0
        } else {
            f64::from(self.matched_blocks) / f64::from(self.total_blocks)
        }
    }

    /// Tokens of the prefix that need not be computed there.
    pub fn cached_tokens(&self) -> u64 {
        u64::from(self.cached_blocks) * u64::from(self.block_size_tokens)
    }
}

/// An image, video or audio clip of a prompt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MediaFeature {
    /// Position of its prompt in the request.
    pub prompt: u32,
    /// `image`, `video` or `audio`.
    pub modality: &'static str,
    /// Equal for equal content; see [`crate::request::MediaItem::hash`].
    pub hash: u64,
    /// Token of the prompt at which its placeholders begin.
    pub offset: u32,
    /// Placeholder tokens, at least 1.
    pub tokens: u32,
}

/// How much of the request's distinct media items an endpoint has encoded before. Sizes are in
/// placeholder tokens.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct EncoderCacheMatch {
    /// Items the endpoint was sent before.
    pub matched_items: u32,
    /// Items of the request.
    pub request_items: u32,
    /// Size of the matched items.
    pub matched_size: u64,
    /// Size of all items.
    pub request_size: u64,
}

impl EncoderCacheMatch {
    /// Share of the request's media, by size, that is held, `0..=1`; 0 without any.
    pub fn ratio(&self) -> f64 {
        if self.request_size == 0 {
            0.0
        } else {
            self.matched_size as f64 / self.request_size as f64
        }
    }
}

/// `name`, or `default` when it is empty: the rule of all `*ProducerName` parameters.
pub fn producer_or<'a>(name: &'a str, default: &'a str) -> &'a str {
    if name.is_empty() { default } else { name }
}
