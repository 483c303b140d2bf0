//! How much of a prompt each candidate holds: one walk over the prompt's runs for all of them.

use super::run::{Expected, Run, Span};
use super::table::Table;
use super::tier::{MAX_TIERS, SPECULATIVE};
use crate::datalayer::EndpointIndex;
use crate::kvcache::block::BlockKey;
use crate::kvcache::events::StreamState;

/// How far a match can be relied on.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Trust {
    /// No publisher, or none that is connected: the endpoint may hold anything.
    #[default]
    Unknown,
    /// Older events are being replayed; the endpoint should hold this much and may hold more.
    LowerBound,
    /// Every event was applied.
    Exact,
}

impl From<StreamState> for Trust {
    fn from(state: StreamState) -> Self {
        match state {
            StreamState::Down => Self::Unknown,
            StreamState::Joining | StreamState::Gap => Self::LowerBound,
            StreamState::Live => Self::Exact,
        }
    }
}

/// What one candidate holds of a prompt.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Match {
    /// Leading blocks in any tier; ends at the first hole.
    pub blocks: u32,
    /// Leading blocks in each tier, by tier number.
    pub by_tier: [u32; MAX_TIERS],
    /// Sum over the leading blocks of the best weight among the tiers that have it.
    pub score: f64,
    /// How far to rely on it.
    pub trust: Trust,
}

/// Room for a look-up, kept from one to the next so that none allocates after the first few.
#[derive(Debug, Default)]
pub struct Lookup {
    matches: Vec<Match>,
    walks: Vec<Walk>,
    epoch: u32,
}

/// A column's way along the prompt.
#[derive(Debug, Clone, Copy, Default)]
struct Walk {
    /// Look-up it belongs to; the column is no candidate where it is an older one.
    epoch: u32,
    blocks: u32,
    by_tier: [u32; MAX_TIERS],
    /// Tiers without a hole so far.
    tiers: u8,
    /// Blocks lie in one cache group, so having one span is having the block.
    one_group: bool,
    score: f64,
}

impl Lookup {
    /// Empty room.
    pub fn new() -> Self {
        Self::default()
    }

    /// Results in the order of the candidates asked for.
    pub fn matches(&self) -> &[Match] {
        &self.matches
    }

    pub(super) fn run(
        &mut self,
        table: &Table,
        weights: &[f64; MAX_TIERS],
        keys: &[BlockKey],
        candidates: &[EndpointIndex],
        now_ms: u64,
    ) {
        self.enter(table, candidates);
        let mut done = 0;
        while let Some(run) = keys.get(done).and_then(|key| table.heads.get(key)) {
            let Some(run) = table.runs.get(*run as usize) else {
                break;
            };
            let n = run.common(0, keys.get(done..).unwrap_or_default());
            if n == 0 || !self.walk(table, weights, run, done, n, now_ms) {
                break;
            }
            done += n;
        }
        self.leave(table, candidates);
    }

    fn enter(&mut self, table: &Table, candidates: &[EndpointIndex]) {
        self.epoch = self.epoch.wrapping_add(1);
        if self.epoch == 0 {
            self.walks.clear();
            self.epoch = 1;
        }
        if self.walks.len() < table.columns.len() {
            self.walks.resize(table.columns.len(), Walk::default());
        }
        for id in candidates.iter().flat_map(|c| columns(table, *c)) {
            let column = table.columns.get(*id as usize).and_then(Option::as_ref);
            let (Some(column), Some(walk)) = (column, self.walks.get_mut(*id as usize)) else {
                continue;
            };
            *walk = Walk {
                epoch: self.epoch,
                tiers: u8::MAX,
                one_group: column.one_group(),
                ..Walk::default()
            };
        }
    }

    /// Takes all columns along the first `n` blocks of a run, which is entered after `done` blocks.
    /// False when none of them gets to the end.
    fn walk(
        &mut self,
        table: &Table,
        weights: &[f64; MAX_TIERS],
        run: &Run,
        done: usize,
        n: usize,
        now_ms: u64,
    ) -> bool {
        let (done, n) = (super::table::short(done), super::table::short(n));
        let mut through = false;
        let mut step = |column: u32, spans: &[Span], expected: &[Expected]| {
            let Some(walk) = self.walks.get_mut(column as usize) else {
                return;
            };
            if walk.epoch != self.epoch || walk.blocks != done {
                return;
            }
            match (spans, expected) {
                ([span], []) if walk.one_group => walk.along_one(span, weights, n),
                _ => walk.along(table, column, spans, expected, weights, n, now_ms),
            }
            through |= walk.blocks == done + n;
        };
        let mut rest = run.spans.as_slice();
        while let Some(first) = rest.first() {
            let own = rest.iter().take_while(|span| span.column == first.column);
            let (own, others) = rest.split_at_checked(own.count()).unwrap_or_default();
            step(first.column, own, &run.expected);
            rest = others;
        }
        for expected in &run.expected {
            if run.of_column(expected.column).is_empty() {
                step(expected.column, &[], &run.expected);
            }
        }
        through
    }

    fn leave(&mut self, table: &Table, candidates: &[EndpointIndex]) {
        self.matches.clear();
        for candidate in candidates {
            let mut best = Match::default();
            for id in columns(table, *candidate) {
                let Some(Some(column)) = table.columns.get(*id as usize) else {
                    continue;
                };
                let Some(walk) = self.walks.get(*id as usize) else {
                    continue;
                };
                let found = Match {
                    blocks: walk.blocks,
                    by_tier: walk.by_tier,
                    score: walk.score,
                    trust: column.state.into(),
                };
                let rank = |m: &Match| (m.blocks, m.trust);
                if rank(&found) >= rank(&best) {
                    best = found;
                }
            }
            self.matches.push(best);
        }
    }
}

impl Walk {
    /// The usual case: a prefix in one tier.
    fn along_one(&mut self, span: &Span, weights: &[f64; MAX_TIERS], n: u32) {
        if span.start > 0 {
            return;
        }
        self.advance(1 << span.tier, span.end.min(n), weights);
    }

    /// Any mix of tiers, groups, holes and predictions.
    #[allow(
        clippy::too_many_arguments,
        reason = "the parts of a look-up, each borrowed from a different owner"
    )]
    fn along(
        &mut self,
        table: &Table,
        id: u32,
        spans: &[Span],
        expected: &[Expected],
        weights: &[f64; MAX_TIERS],
        n: u32,
        now_ms: u64,
    ) {
        let groups = table.columns.get(id as usize).and_then(Option::as_ref);
        let groups = groups.map_or([0; MAX_TIERS], |column| column.groups);
        let mut at = 0;
        while at < n {
            let mut next = n;
            let mut present = [0_u32; MAX_TIERS];
            for span in spans {
                if span.start > at {
                    next = next.min(span.start);
                } else if span.end > at {
                    next = next.min(span.end);
                    if let Some(present) = present.get_mut(usize::from(span.tier)) {
                        *present |= 1 << span.group;
                    }
                }
            }
            let mut tiers = 0;
            for (tier, (present, needed)) in (0..8).zip(present.iter().zip(groups)) {
                if *present != 0 && present & needed == needed {
                    tiers |= 1 << tier;
                }
            }
            for expected in expected {
                if expected.column != id || expected.deadline_ms <= now_ms {
                    continue;
                }
                if expected.start > at {
                    next = next.min(expected.start);
                } else if expected.end > at {
                    next = next.min(expected.end);
                    tiers |= 1 << SPECULATIVE;
                }
            }
            if tiers == 0 {
                return;
            }
            self.advance(tiers, next - at, weights);
            at = next;
        }
    }

    /// `n` more blocks, each in all of `tiers`.
    fn advance(&mut self, tiers: u8, n: u32, weights: &[f64; MAX_TIERS]) {
        self.blocks += n;
        self.tiers &= tiers;
        let mut best = f64::NEG_INFINITY;
        let by_tier = self.by_tier.iter_mut().zip(weights);
        for (tier, (blocks, weight)) in (0..8).zip(by_tier) {
            if self.tiers & 1 << tier != 0 {
                *blocks += n;
            }
            if tiers & 1 << tier != 0 {
                best = best.max(*weight);
            }
        }
        self.score += best * f64::from(n);
    }
}

fn columns(table: &Table, endpoint: EndpointIndex) -> &[u32] {
    let columns = table.by_endpoint.get(endpoint.0 as usize);
    columns.map_or(&[], |columns| columns.as_slice())
}
