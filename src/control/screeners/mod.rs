//! Screeners: which candidates a request may see at all.

mod disaggregatedset_rollout;

pub use disaggregatedset_rollout::DisaggregatedSetRolloutScreener;
