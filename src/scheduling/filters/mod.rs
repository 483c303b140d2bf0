//! Filters: which candidates stay.

mod context_length_aware;
mod label_selector;
mod prefix_cache_affinity;
mod role;
mod utilization_detector;

pub use context_length_aware::ContextLengthAware;
pub use label_selector::LabelSelectorFilter;
pub use prefix_cache_affinity::PrefixCacheAffinityFilter;
pub use role::{DecodeFilter, EncodeFilter, PrefillFilter};
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
