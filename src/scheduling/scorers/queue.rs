//! `queue-scorer`

use crate::plugin::{Build, Maturity, ParamDoc, Plugin, PluginError};
use crate::scheduling::{Candidates, Cycle, Scorer};

/// Prefers endpoints with fewer waiting requests.
///
/// Score: `(max - x) / (max - min)` over this request's candidates; 1 for all when equal.
/// Input: `waiting_requests`, scraped, at most one refresh interval old. Cost: O(candidates), no allocation.
#[derive(Debug, Default)]
pub struct QueueScorer;

impl Plugin for QueueScorer {
    const TYPE: &'static str = "queue-scorer";
    const MATURITY: Maturity = Maturity::Beta;
    const PARAMETERS: &'static [ParamDoc] = &[];
    const LENIENT: bool = true;
    const ABOUT: &'static str = "Prefers endpoints with fewer waiting requests.";

    fn build(build: &mut Build<'_>) -> Result<Self, PluginError> {
        super::require_core_metric(build, "WaitingQueueSize");
        Ok(Self)
    }
}

impl Scorer for QueueScorer {
    fn score(&self, _: &Cycle<'_>, candidates: Candidates<'_>, scores: &mut [f64]) {
        super::less_is_better(candidates, scores, |candidate| {
            candidate.metrics.waiting_requests
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scheduling::test_support::{Pool, endpoint};

    #[test]
    fn less_is_better_relative_to_the_candidates() {
        let with = |n| endpoint("e").waiting(n);
        // (10 - 2) / (10 - 2) = 1; (10 - 4) / 8 = 0.75; (10 - 10) / 8 = 0.
        assert_eq!(
            Pool::new([with(2), with(4), with(10)]).scores(&QueueScorer),
            [1.0, 0.75, 0.0]
        );
        assert_eq!(
            Pool::new([with(3), with(3)]).scores(&QueueScorer),
            [1.0, 1.0]
        );
    }

    #[test]
    fn an_endpoint_never_scraped_is_not_taken_for_idle() {
        let pool = Pool::new([
            endpoint("a").unscraped(),
            endpoint("b").waiting(9),
            endpoint("c").waiting(1),
        ]);
        assert_eq!(pool.scores(&QueueScorer), [0.0, 0.0, 1.0]);
        assert_eq!(
            Pool::new([endpoint("a").unscraped(), endpoint("b").unscraped()]).scores(&QueueScorer),
            [1.0, 1.0]
        );
    }
}
