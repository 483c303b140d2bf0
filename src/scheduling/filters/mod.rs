//! Filters: which candidates stay.

mod by_label;
mod concurrency_detector;
mod context_length_aware;
mod endpoint_attribute;
mod header_based_testing;
mod label_selector;
mod prefix_cache_affinity;
mod role;
mod topology_affinity;
mod utilization;
mod utilization_detector;

pub use by_label::ByLabelFilter;
pub use concurrency_detector::ConcurrencyDetector;
pub use context_length_aware::ContextLengthAware;
pub use endpoint_attribute::EndpointAttributeFilter;
pub use header_based_testing::HeaderBasedTestingFilter;
pub use label_selector::LabelSelectorFilter;
pub use prefix_cache_affinity::PrefixCacheAffinityFilter;
pub use role::{DecodeFilter, EncodeFilter, PrefillFilter};
pub use topology_affinity::TopologyAffinityFilter;
pub use utilization::UtilizationFilter;
pub use utilization_detector::UtilizationDetector;

use super::Candidates;

/// Keeps every candidate.
fn keep_all(candidates: Candidates<'_>, keep: &mut Vec<u32>) {
    keep_where(candidates, keep, |_, _| true);
}

/// Keeps the candidates `wanted` accepts, by position and value.
fn keep_where(
    candidates: Candidates<'_>,
    keep: &mut Vec<u32>,
    wanted: impl Fn(usize, &super::Candidate) -> bool,
) {
    let kept = candidates
        .iter()
        .filter(|(position, candidate)| wanted(*position, candidate));
    keep.extend(kept.filter_map(|(position, _)| u32::try_from(position).ok()));
}
