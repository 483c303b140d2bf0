//! Scorers: one number per candidate, in `[0, 1]`, higher is better.

mod active_request;
mod endpoint_attribute;
mod header_label_affinity;
mod kv_cache_utilization;
mod load_aware;
mod lora_affinity;
mod mm_embeddings_cache;
mod multicluster;
mod no_hit_lru;
mod prefix_cache;
mod queue;
mod running_requests_size;
mod token_load;
mod topology_affinity;

pub use active_request::ActiveRequestScorer;
pub use endpoint_attribute::EndpointAttributeScorer;
pub use header_label_affinity::HeaderLabelAffinityScorer;
pub use kv_cache_utilization::KvCacheUtilizationScorer;
pub use load_aware::LoadAwareScorer;
pub use lora_affinity::LoraAffinityScorer;
pub use mm_embeddings_cache::MmEmbeddingsCacheScorer;
pub use multicluster::{MulticlusterKvCacheUtilizationScorer, MulticlusterQueueScorer};
pub use no_hit_lru::NoHitLruScorer;
pub use prefix_cache::PrefixCacheScorer;
pub use queue::QueueScorer;
pub use running_requests_size::RunningRequestsSizeScorer;
pub use token_load::TokenLoadScorer;
pub use topology_affinity::TopologyAffinityScorer;

use super::{Candidate, Candidates};

/// Min-max rating where less is better: `(max - x) / (max - min)`, 1 for all when equal.
///
/// An endpoint that was never scraped is unknown, not idle: beside scraped ones it gets 0. (The
/// reference reads its absent gauges as 0 and so prefers it.)
fn less_is_better(
    candidates: Candidates<'_>,
    scores: &mut [f64],
    value: impl Fn(&Candidate) -> u32,
) {
    let known = || {
        candidates
            .iter()
            .filter(|(_, c)| c.metrics.updated_at.is_some())
            .map(|(_, c)| value(c))
    };
    let (Some(min), Some(max)) = (known().min(), known().max()) else {
        scores.fill(1.0);
        return;
    };
    let range = f64::from(max - min);
    for (score, (_, candidate)) in scores.iter_mut().zip(candidates.iter()) {
        *score = match candidate.metrics.updated_at {
            None => 0.0,
            Some(_) if max == min => 1.0,
            Some(_) => f64::from(max - value(candidate)) / range,
        };
    }
}

/// Linear rating of `value` within `range`, or within what the candidates have when `None`. A missing
/// value gives 0; an empty range, that is all known values equal, gives 1.
fn linear(
    candidates: Candidates<'_>,
    scores: &mut [f64],
    range: Option<(f64, f64)>,
    lower_is_better: bool,
    value: impl Fn(&Candidate) -> Option<f64>,
) {
    let known = || candidates.iter().filter_map(|(_, c)| value(c));
    let (min, max) = range.unwrap_or_else(|| {
        (
            known().fold(f64::INFINITY, f64::min),
            known().fold(f64::NEG_INFINITY, f64::max),
        )
    });
    for (score, (_, candidate)) in scores.iter_mut().zip(candidates.iter()) {
        let Some(value) = value(candidate) else {
            continue;
        };
        if min >= max {
            *score = 1.0;
            continue;
        }
        let share = ((value - min) / (max - min)).clamp(0.0, 1.0);
        *score = if lower_is_better { 1.0 - share } else { share };
    }
}

/// Declares that a scorer reads what the core metrics extractor publishes as `data_type`.
fn require_core_metric(build: &mut crate::plugin::Build<'_>, data_type: &'static str) {
    build
        .keys
        .require::<()>(data_type, super::attributes::CORE_METRICS_PRODUCER);
}
