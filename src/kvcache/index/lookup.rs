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
    /// One for each candidate, then one for each further rank of a candidate.
    matches: Vec<Match>,
    /// Beside `matches`: tiers without a hole so far.
    tiers: Vec<u8>,
    /// By column.
    marks: Vec<Mark>,
    epoch: u32,
    candidates: usize,
}

/// Says that a column takes part in a look-up.
#[derive(Debug, Clone, Copy, Default)]
struct Mark {
    /// The look-up; the column is no candidate where it is an older one.
    epoch: u32,
    /// Where its match is kept.
    slot: u32,
}

/// A column's way along the prompt.
struct Walk<'a> {
    found: &'a mut Match,
    tiers: &'a mut u8,
}

impl Lookup {
    /// Empty room.
    pub fn new() -> Self {
        Self::default()
    }

    /// Results in the order of the candidates asked for.
    pub fn matches(&self) -> &[Match] {
        self.matches.get(..self.candidates).unwrap_or_default()
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
            self.marks.clear();
            self.epoch = 1;
        }
        if self.marks.len() < table.columns.len() {
            self.marks.resize(table.columns.len(), Mark::default());
        }
        self.candidates = candidates.len();
        self.matches.clear();
        for candidate in candidates {
            let first = columns(table, *candidate).first();
            let trust = first.map_or(Trust::Unknown, |id| self.mark(table, *id));
            self.matches.push(Match::with(trust));
        }
        for id in candidates
            .iter()
            .flat_map(|c| columns(table, *c).iter().skip(1))
        {
            let trust = self.mark(table, *id);
            self.matches.push(Match::with(trust));
        }
        self.tiers.clear();
        self.tiers.resize(self.matches.len(), u8::MAX);
    }

    /// Gives the column the next match.
    fn mark(&mut self, table: &Table, id: u32) -> Trust {
        if let Some(mark) = self.marks.get_mut(id as usize) {
            *mark = Mark {
                epoch: self.epoch,
                slot: super::table::short(self.matches.len()),
            };
        }
        let brief = table.briefs.get(id as usize);
        brief.map_or(Trust::Unknown, |brief| brief.state.into())
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
            let mark = self.marks.get(column as usize).copied().unwrap_or_default();
            let slot = mark.slot as usize;
            let walk = self.matches.get_mut(slot).zip(self.tiers.get_mut(slot));
            let Some((found, tiers)) = walk.filter(|_| mark.epoch == self.epoch) else {
                return;
            };
            if found.blocks != done {
                return;
            }
            let mut walk = Walk { found, tiers };
            let brief = table.briefs.get(column as usize);
            match (spans, expected) {
                ([span], []) if brief.is_some_and(|brief| !brief.many_groups) => {
                    walk.along_one(span, weights, n);
                }
                _ => walk.along(table, column, spans, expected, weights, n, now_ms),
            }
            through |= walk.found.blocks == done + n;
        };
        let mut rest = run.spans.as_slice();
        while let Some(first) = rest.first() {
            let own = rest.iter().take_while(|span| span.column == first.column);
            let (own, others) = rest.split_at_checked(own.count()).unwrap_or_default();
            step(first.column, own, run.expected_of(first.column));
            rest = others;
        }
        for own in run.expected.chunk_by(|a, b| a.column == b.column) {
            if let Some(first) = own.first()
                && run.of_column(first.column).is_empty()
            {
                step(first.column, &[], own);
            }
        }
        through
    }

    /// The rank that holds most answers for its endpoint.
    fn leave(&mut self, table: &Table, candidates: &[EndpointIndex]) {
        let (own, ranks) = self.matches.split_at_mut(self.candidates);
        let mut ranks = ranks.iter();
        if ranks.len() == 0 {
            return;
        }
        for (found, candidate) in own.iter_mut().zip(candidates) {
            let more = columns(table, *candidate).len().saturating_sub(1);
            for rank in ranks.by_ref().take(more) {
                if (rank.blocks, rank.trust) > (found.blocks, found.trust) {
                    *found = *rank;
                }
            }
        }
    }
}

impl Match {
    fn with(trust: Trust) -> Self {
        Self {
            trust,
            ..Self::default()
        }
    }
}

impl Walk<'_> {
    /// The usual case: a prefix in one tier and group.
    fn along_one(&mut self, span: &Span, weights: &[f64; MAX_TIERS], n: u32) {
        if span.start > 0 {
            return;
        }
        let n = span.end.min(n);
        let tier = usize::from(span.tier);
        let (Some(blocks), Some(weight)) = (self.found.by_tier.get_mut(tier), weights.get(tier))
        else {
            return;
        };
        self.found.blocks += n;
        self.found.score += weight * f64::from(n);
        *self.tiers &= 1 << span.tier;
        if *self.tiers != 0 {
            *blocks += n;
        }
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
                if expected.deadline_ms <= now_ms {
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
        self.found.blocks += n;
        *self.tiers &= tiers;
        let mut best = f64::NEG_INFINITY;
        let by_tier = self.found.by_tier.iter_mut().zip(weights);
        for (tier, (blocks, weight)) in (0..8).zip(by_tier) {
            if *self.tiers & 1 << tier != 0 {
                *blocks += n;
            }
            if tiers & 1 << tier != 0 {
                best = best.max(*weight);
            }
        }
        if n > 0 {
            self.found.score += best * f64::from(n);
        }
    }
}

pub(super) fn columns(table: &Table, endpoint: EndpointIndex) -> &[u32] {
    let columns = table.by_endpoint.get(endpoint.0 as usize);
    columns.map_or(&[], |columns| columns.as_slice())
}
