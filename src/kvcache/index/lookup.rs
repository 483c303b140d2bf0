//! How much of a prompt each candidate holds: one walk over the prompt's runs for all of them.

use super::run::{Expected, Run, Span};
use super::table::short;
use super::tier::{MAX_TIERS, SPECULATIVE};
use super::view::View;
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
///
/// Requests mostly ask for the same candidates as the one before: then who they are is not worked out
/// again, and only the matches the last look-up changed are reset.
#[derive(Debug, Default)]
pub struct Lookup {
    /// One for each candidate, then one for each further rank of a candidate.
    matches: Vec<Match>,
    /// Beside `matches`: tiers without a hole so far.
    tiers: Vec<u8>,
    /// Places of `matches` that are not as they were at first.
    changed: Vec<u32>,
    /// By column.
    marks: Vec<Mark>,
    epoch: u32,
    /// What `marks` are for: these candidates in a view with this stamp.
    candidates: Vec<EndpointIndex>,
    stamp: u64,
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
        self.matches
            .get(..self.candidates.len())
            .unwrap_or_default()
    }

    pub(super) fn run(
        &mut self,
        view: &View,
        keys: &[BlockKey],
        candidates: &[EndpointIndex],
        now_ms: u64,
    ) {
        if self.stamp == view.stamp && self.candidates == candidates {
            self.reset();
        } else {
            self.enter(view, candidates);
        }
        let mut done = 0;
        while let Some(run) = keys.get(done).and_then(|key| view.heads.get(key)) {
            let Some(run) = view.run(*run) else {
                break;
            };
            let n = run.common(0, keys.get(done..).unwrap_or_default());
            if n == 0 || !self.walk(view, run, done, n, now_ms) {
                break;
            }
            done += n;
        }
        if self.matches.len() > self.candidates.len() {
            self.leave(view);
        }
    }

    /// Makes the matches what they were before the last look-up.
    fn reset(&mut self) {
        for slot in self.changed.drain(..) {
            let slot = slot as usize;
            if let (Some(found), Some(tiers)) =
                (self.matches.get_mut(slot), self.tiers.get_mut(slot))
            {
                *found = Match::with(found.trust);
                *tiers = u8::MAX;
            }
        }
    }

    fn enter(&mut self, view: &View, candidates: &[EndpointIndex]) {
        self.epoch = self.epoch.wrapping_add(1);
        if self.epoch == 0 {
            self.marks.clear();
            self.epoch = 1;
        }
        if self.marks.len() < view.columns.len() {
            self.marks.resize(view.columns.len(), Mark::default());
        }
        self.candidates.clear();
        self.candidates.extend_from_slice(candidates);
        self.stamp = view.stamp;
        self.changed.clear();
        self.matches.clear();
        for candidate in candidates {
            let first = view.ranks(candidate.0).first();
            let trust = first.map_or(Trust::Unknown, |id| self.mark(view, *id));
            self.matches.push(Match::with(trust));
        }
        for id in candidates
            .iter()
            .flat_map(|c| view.ranks(c.0).iter().skip(1))
        {
            let trust = self.mark(view, *id);
            self.matches.push(Match::with(trust));
        }
        self.tiers.clear();
        self.tiers.resize(self.matches.len(), u8::MAX);
    }

    /// Gives the column the next match.
    fn mark(&mut self, view: &View, id: u32) -> Trust {
        if let Some(mark) = self.marks.get_mut(id as usize) {
            *mark = Mark {
                epoch: self.epoch,
                slot: short(self.matches.len()),
            };
        }
        let column = view.column(id);
        column.map_or(Trust::Unknown, |column| column.state.into())
    }

    /// Takes all columns along the first `n` blocks of a run, which is entered after `done` blocks.
    /// False when none of them gets to the end.
    fn walk(&mut self, view: &View, run: &Run, done: usize, n: usize, now_ms: u64) -> bool {
        let (done, n) = (short(done), short(n));
        let weights = &view.tiers.by_number;
        let mut through = false;
        let mut step = |id: u32, spans: &[Span], expected: &[Expected]| {
            let mark = self.marks.get(id as usize).copied().unwrap_or_default();
            let slot = mark.slot as usize;
            let walk = self.matches.get_mut(slot).zip(self.tiers.get_mut(slot));
            let Some((found, tiers)) = walk.filter(|_| mark.epoch == self.epoch) else {
                return;
            };
            if found.blocks != done {
                return;
            }
            if done == 0 {
                self.changed.push(mark.slot);
            }
            let Some(column) = view.column(id) else {
                return;
            };
            let mut walk = Walk { found, tiers };
            match (spans, expected) {
                ([span], []) if !column.many_groups => walk.along_one(span, weights, n),
                _ => walk.along(&column.groups, spans, expected, weights, n, now_ms),
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
    fn leave(&mut self, view: &View) {
        let (own, ranks) = self.matches.split_at_mut(self.candidates.len());
        let mut ranks = ranks.iter();
        for (found, candidate) in own.iter_mut().zip(&self.candidates) {
            let more = view.ranks(candidate.0).len().saturating_sub(1);
            for rank in ranks.by_ref().take(more) {
                if (rank.blocks, rank.trust) > (found.blocks, found.trust) {
                    *found = *rank;
                }
            }
        }
        // A candidate's match may be that of another rank now.
        self.stamp = 0;
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
    fn along(
        &mut self,
        groups: &[u32; MAX_TIERS],
        spans: &[Span],
        expected: &[Expected],
        weights: &[f64; MAX_TIERS],
        n: u32,
        now_ms: u64,
    ) {
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
                if *present != 0 && present & needed == *needed {
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

impl View {
    /// Leading blocks of `keys` that a column holds, in any tier and group.
    pub(super) fn depth(&self, id: u32, keys: &[BlockKey]) -> usize {
        let mut done = 0;
        while let Some(run) = keys.get(done).and_then(|key| self.heads.get(key))
            && let Some(run) = self.run(*run)
        {
            let n = run.common(0, keys.get(done..).unwrap_or_default());
            let mut held = 0;
            while let Some(span) = run
                .of_column(id)
                .iter()
                .find(|span| span.start <= held && held < span.end)
            {
                held = span.end;
            }
            done += n.min(held as usize);
            if n == 0 || (held as usize) < n {
                break;
            }
        }
        done
    }
}
