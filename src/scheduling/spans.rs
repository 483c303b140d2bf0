//! What is recorded of a profile's run, under the names that are published for it. Nothing here runs for
//! a request that is not recorded.

use super::{Candidate, Cycle, Scored};
use crate::plugin::TypedName;
use crate::request::InferenceRequest;
use crate::telemetry::trace::{Span, Value, names};

/// Picks that are recorded with their scores.
const TOP: usize = 5;
/// Scorers of prefix matches, which have a span of their own inside of the one that all scorers have.
const PREFIX_SCORERS: &str = "prefix-cache-scorer";
/// The scorer whose scores say who holds media.
const MEDIA_SCORER: &str = "mm-embeddings-cache-scorer";

/// The run of a profile.
pub(super) struct ProfileSpan<'a> {
    request: &'a InferenceRequest,
    span: Span,
}

/// The scorers of a profile.
pub(super) struct ScoringSpan<'a> {
    request: &'a InferenceRequest,
    span: Span,
}

impl<'a> ProfileSpan<'a> {
    pub(super) fn begin(cycle: &Cycle<'a>, profile: &str) -> Self {
        let request = cycle.request;
        let mut span = request.span(names::PROFILE);
        span.record(|| {
            [(
                "llm_d.epp.scheduling.profile.name",
                profile.to_owned().into(),
            )]
        });
        Self { request, span }
    }

    fn child(&self, site: crate::telemetry::trace::Site) -> Span {
        let mut span = self.span.child(site);
        self.request.identify(&mut span);
        span
    }

    /// The filters run; ended by [`Self::filtered`].
    pub(super) fn filtering(&self, candidates: usize) -> Span {
        let mut span = self.child(names::FILTERS);
        span.record(|| [("llm_d.epp.filter.candidate_endpoints", candidates.into())]);
        span
    }

    /// The filters left so many.
    pub(super) fn filtered(&mut self, mut filtering: Span, left: usize) {
        filtering.record(|| [("llm_d.epp.filter.filtered_endpoints", left.into())]);
        if left == 0 {
            filtering.fail("no endpoint is left");
            self.span.fail("no endpoint is left");
        }
    }

    /// The scorers run, until it is dropped.
    pub(super) fn scoring(&self, scorers: usize, candidates: usize) -> ScoringSpan<'a> {
        let mut span = self.span.child(names::SCORING);
        span.record(|| {
            [
                ("llm_d.epp.scorer.count", scorers.into()),
                ("llm_d.epp.scoring.candidate_endpoints", candidates.into()),
            ]
        });
        ScoringSpan {
            request: self.request,
            span,
        }
    }

    /// The picker runs, until it is dropped; `scored` is what it chooses from.
    pub(super) fn picking(&self, candidates: &[Candidate], scored: &[Scored]) -> Span {
        let mut span = self.child(names::PICKER);
        span.record(|| {
            let (endpoints, scores) = top(candidates, scored);
            [
                ("llm_d.epp.picker.candidate_endpoints", scored.len().into()),
                ("llm_d.epp.picker.top_endpoints", Value::Texts(endpoints)),
                ("llm_d.epp.picker.top_scores", Value::Floats(scores)),
            ]
        });
        span
    }
}

impl ScoringSpan<'_> {
    /// A scorer runs; ended by [`Self::scored`].
    pub(super) fn scorer(&self, name: &TypedName) -> Span {
        if self.span.is_recording() {
            self.span.child(names::scorer(name.type_name))
        } else {
            Span::default()
        }
    }

    /// A scorer gave these scores, each within 0 and 1.
    pub(super) fn scored(&self, mut span: Span, name: &TypedName, weight: f64, scores: &[f64]) {
        if !span.is_recording() {
            return;
        }
        self.describe(&mut span, name, weight, scores);
        if name.type_name.ends_with(PREFIX_SCORERS) {
            let mut own = span.child_from_start(names::SCORE_PREFIX_CACHE);
            self.describe(&mut own, name, weight, scores);
        }
    }

    fn describe(&self, span: &mut Span, name: &TypedName, weight: f64, scores: &[f64]) {
        self.request.identify(span);
        let max = scores.iter().copied().fold(0.0, f64::max);
        let average = scores.iter().sum::<f64>() / scores.len().max(1) as f64;
        span.record(|| {
            [
                ("llm_d.epp.scorer.type", name.type_name.into()),
                ("llm_d.epp.scorer.name", name.name.clone().into()),
                ("llm_d.epp.scorer.weight", weight.into()),
                ("llm_d.epp.scorer.candidate_endpoints", scores.len().into()),
                ("llm_d.epp.scorer.score.max", max.into()),
                ("llm_d.epp.scorer.score.avg", average.into()),
                ("llm_d.epp.scorer.endpoints_scored", scores.len().into()),
            ]
        });
        if name.type_name == MEDIA_SCORER {
            span.record(|| [(names::MEDIA_HIT, (max > 0.0).into())]);
        }
    }
}

/// `namespace/name` of the best candidates, best first, and their totals.
fn top(candidates: &[Candidate], scored: &[Scored]) -> (Vec<String>, Vec<f64>) {
    let named = |scored: &Scored| {
        let spec = &candidates.get(scored.position as usize)?.endpoint.spec;
        Some((format!("{}/{}", spec.namespace, spec.name), scored.total))
    };
    let mut best: Vec<_> = scored.iter().filter_map(named).collect();
    best.sort_by(|a, b| b.1.total_cmp(&a.1).then_with(|| a.0.cmp(&b.0)));
    best.truncate(TOP);
    best.into_iter().unzip()
}
