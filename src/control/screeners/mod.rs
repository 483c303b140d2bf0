//! Screeners: which candidates a request may see at all.

mod disaggregatedset_rollout;
mod selector;

pub use disaggregatedset_rollout::DisaggregatedSetRolloutScreener;
