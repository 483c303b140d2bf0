//! Deciders: whether a stage of a request is worth an endpoint of its own.

mod always;
mod always_multimodal;
mod prefix_based;

pub use always::AlwaysDecider;
pub use always_multimodal::AlwaysMultimodalDecider;
pub use prefix_based::PrefixBasedDecider;
