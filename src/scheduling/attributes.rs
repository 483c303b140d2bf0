//! Data keys that scheduling plugins read, and the values behind them.

/// Prefix match per candidate: [`PrefixMatch`].
pub const PREFIX_MATCH: &str = "PrefixCacheMatchInfoDataKey";
/// Uncached prompt tokens per candidate: `u64`.
pub const UNCACHED_TOKENS: &str = "UncachedRequestTokensDataKey";
/// Live in-flight counters; addressed by slot, so the column holds nothing.
pub const IN_FLIGHT: &str = "InFlightLoadDataKey";
/// Prompt tokens of the request, one value for each prompt: `u64`.
pub const TOKENIZED_PROMPT: &str = "TokenizedPrompt";

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
}

/// `name`, or `default` when it is empty: the rule of all `*ProducerName` parameters.
pub fn producer_or<'a>(name: &'a str, default: &'a str) -> &'a str {
    if name.is_empty() { default } else { name }
}
