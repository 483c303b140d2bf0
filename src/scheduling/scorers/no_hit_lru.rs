//! `no-hit-lru-scorer`

use std::cell::RefCell;
use std::sync::Arc;

use parking_lot::Mutex;
use serde::Deserialize;

use crate::datalayer::{Endpoint, EndpointListener};
use crate::plugin::{Build, Column, Maturity, ParamDoc, Plugin, PluginError};
use crate::scheduling::attributes::{
    APPROX_PREFIX_PRODUCER, PREFIX_MATCH, PrefixMatch, producer_or,
};
use crate::scheduling::{
    Candidate, Candidates, Cycle, Outcome, PreRequest, SchedulingResult, Scorer,
};

/// Endpoints that are remembered.
const DEFAULT_LRU_SIZE: usize = 1024;

/// Spreads requests whose prefix nobody holds: the endpoint that got a cold request longest ago is
/// best.
///
/// Score: 0.5 for all when any candidate matches a block. Otherwise candidates are ranked, those
/// never used first in list order, then by age of their last cold request: `1 - rank / (n - 1)`.
/// Ranks count this request's candidates only; the reference also counts endpoints that are gone.
/// State: when each endpoint last got a cold request, at most `lruSize` endpoints.
#[derive(Debug)]
pub struct NoHitLruScorer {
    matches: Column<PrefixMatch>,
    used: Mutex<LastUse>,
    capacity: usize,
}

/// A logical clock and its last reading by endpoint index, 0 for one that is not remembered.
#[derive(Debug, Default)]
struct LastUse {
    clock: u64,
    at: Vec<u64>,
    remembered: usize,
}

thread_local! {
    /// (last use, position in the selection) of the candidates being ranked.
    static ORDER: RefCell<Vec<(u64, u32)>> = RefCell::default();
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
struct Settings {
    lru_size: i64,
    prefix_match_info_producer_name: String,
    prefix_plugin_type: serde_json::Value,
    prefix_plugin_name: serde_json::Value,
}

impl Plugin for NoHitLruScorer {
    const TYPE: &'static str = "no-hit-lru-scorer";
    const MATURITY: Maturity = Maturity::Beta;
    const PARAMETERS: &'static [ParamDoc] = &[
        ParamDoc {
            name: "lruSize",
            kind: "int",
            default: "1024",
            help: "Endpoints remembered; 0 and less mean the default.",
        },
        ParamDoc {
            name: "prefixMatchInfoProducerName",
            kind: "string",
            default: "approx-prefix-cache-producer",
            help: "Instance that says whether a request is cold.",
        },
        ParamDoc {
            name: "prefixPluginType",
            kind: "string",
            default: "",
            help: "Accepted and ignored.",
        },
        ParamDoc {
            name: "prefixPluginName",
            kind: "string",
            default: "",
            help: "Accepted and ignored.",
        },
    ];
    const ABOUT: &'static str = "Spreads requests whose prefix no endpoint holds.";

    fn build(build: &mut Build<'_>) -> Result<Self, PluginError> {
        let settings: Settings = build.read::<Self, _>()?;
        let producer = producer_or(
            &settings.prefix_match_info_producer_name,
            APPROX_PREFIX_PRODUCER,
        );
        Ok(Self {
            matches: build.keys.require(PREFIX_MATCH, producer),
            used: Mutex::default(),
            capacity: usize::try_from(settings.lru_size)
                .ok()
                .filter(|n| *n > 0)
                .unwrap_or(DEFAULT_LRU_SIZE),
        })
    }
}

impl NoHitLruScorer {
    fn is_cold(&self, cycle: &Cycle<'_>) -> bool {
        let matches = cycle.attributes.get(self.matches).unwrap_or_default();
        matches.iter().all(|m| m.matched_blocks == 0)
    }
}

impl Scorer for NoHitLruScorer {
    fn score(&self, cycle: &Cycle<'_>, candidates: Candidates<'_>, scores: &mut [f64]) {
        if !self.is_cold(cycle) {
            scores.fill(0.5);
            return;
        }
        if scores.len() < 2 {
            scores.fill(1.0);
            return;
        }
        ORDER.with_borrow_mut(|order| {
            order.clear();
            {
                let used = self.used.lock();
                let selection = candidates.iter().zip(0..);
                order.extend(selection.map(|((_, c), at)| (used.of(&c.endpoint), at)));
            }
            // Positions break ties, so that endpoints never used stay in list order.
            order.sort_unstable();
            let steps = (scores.len() - 1) as f64;
            for (rank, (_, position)) in order.iter().enumerate() {
                if let Some(score) = scores.get_mut(*position as usize) {
                    *score = 1.0 - rank as f64 / steps;
                }
            }
        });
    }
}

impl PreRequest for NoHitLruScorer {
    /// Remembers the primary pick and the `prefill` pick of a cold request.
    fn on_pick(
        &self,
        cycle: &Cycle<'_>,
        candidates: &[Candidate],
        result: &SchedulingResult,
        _: &mut Outcome,
    ) {
        if !self.is_cold(cycle) {
            return;
        }
        let prefill = result.others.iter().filter(|p| &*p.profile == "prefill");
        let mut used = self.used.lock();
        for picks in std::iter::once(&result.primary).chain(prefill) {
            let first = picks
                .picks
                .first()
                .and_then(|&p| candidates.get(p as usize));
            if let Some(candidate) = first {
                used.touch(&candidate.endpoint, self.capacity);
            }
        }
    }
}

impl EndpointListener for NoHitLruScorer {
    fn added(&self, _: &Arc<Endpoint>) {}

    fn removed(&self, endpoint: &Arc<Endpoint>) {
        self.used.lock().forget(endpoint.index.0 as usize);
    }
}

impl LastUse {
    fn of(&self, endpoint: &Endpoint) -> u64 {
        let last = self.at.get(endpoint.index.0 as usize);
        last.copied().unwrap_or(0)
    }

    /// Grows to the pool's size at most: indexes are dense.
    fn touch(&mut self, endpoint: &Endpoint, capacity: usize) {
        if endpoint.is_removed() {
            return;
        }
        self.clock += 1;
        if self.of(endpoint) == 0 {
            if self.remembered >= capacity {
                let used = self.at.iter().enumerate().filter(|(_, at)| **at > 0);
                if let Some((oldest, _)) = used.min_by_key(|(_, at)| **at) {
                    self.forget(oldest);
                }
            }
            self.remembered += 1;
        }
        let index = endpoint.index.0 as usize;
        if self.at.len() <= index {
            self.at.resize(index + 1, 0);
        }
        if let Some(at) = self.at.get_mut(index) {
            *at = self.clock;
        }
    }

    fn forget(&mut self, index: usize) {
        if let Some(at) = self.at.get_mut(index)
            && std::mem::take(at) > 0
        {
            self.remembered -= 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scheduling::ProfilePicks;
    use crate::scheduling::test_support::{Pool, endpoint};

    fn picked(position: u32) -> SchedulingResult {
        SchedulingResult {
            primary: ProfilePicks {
                profile: "default".into(),
                picks: [position].into_iter().collect(),
            },
            others: smallvec::SmallVec::new(),
        }
    }

    #[test]
    fn cold_requests_go_round_by_age() {
        let mut pool = Pool::new(["a", "b", "c"].map(endpoint));
        let scorer: NoHitLruScorer = pool.plugin("{}");
        // Nobody used: list order, 1 - i / 2.
        assert_eq!(pool.scores(&scorer), [1.0, 0.5, 0.0]);
        let pick = |i| {
            pool.with_cycle(|cycle, all| {
                scorer.on_pick(cycle, all, &picked(i), &mut Outcome::default());
            });
        };
        pick(0);
        // b and c unused (ranks 0, 1), a used (rank 2).
        assert_eq!(pool.scores(&scorer), [0.0, 1.0, 0.5]);
        pick(2);
        // b unused, then a (older), then c.
        assert_eq!(pool.scores(&scorer), [0.5, 1.0, 0.0]);
    }

    #[test]
    fn a_warm_request_is_neutral_and_leaves_no_trace() {
        let mut pool = Pool::new([endpoint("a"), endpoint("b").matched_blocks(1)]);
        let scorer: NoHitLruScorer = pool.plugin("{}");
        pool.with_cycle(|cycle, all| {
            scorer.on_pick(cycle, all, &picked(0), &mut Outcome::default());
        });
        assert_eq!(pool.scores(&scorer), [0.5, 0.5]);
        assert_eq!(scorer.used.lock().remembered, 0);
    }

    #[test]
    fn one_candidate_scores_one_and_memory_is_bounded() {
        let mut pool = Pool::new([endpoint("a")]);
        let scorer: NoHitLruScorer = pool.plugin(r#"{"lruSize": 2}"#);
        assert_eq!(pool.scores(&scorer), [1.0]);
        let pool = Pool::new(["x", "y", "z"].map(endpoint));
        let [x, y, z] = [0, 1, 2].map(|i: usize| &pool.candidates[i].endpoint);
        let mut used = LastUse::default();
        for endpoint in [x, y, x, z] {
            used.touch(endpoint, 2);
        }
        assert_eq!([x, y, z].map(|e| used.of(e)), [3, 0, 4], "y was the oldest");
        used.forget(x.index.0 as usize);
        assert_eq!((used.of(x), used.remembered), (0, 1));
    }
}
