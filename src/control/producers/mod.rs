//! Data producers: what scheduling plugins want to know about a request and its candidates.

pub mod approx_prefix;
pub mod block_hash;
pub mod burst_prefix;
pub mod inflight_load;
mod media_tokens;
pub mod mm_embeddings_cache;
pub mod p2p_source;
pub mod precise_prefix;
pub mod prefix_index;
pub mod session_id;
pub mod token;
mod token_metrics;
