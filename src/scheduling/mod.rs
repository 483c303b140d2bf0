//! Filter, score, pick: from a request and its candidates to the endpoints that should serve it.
//!
//! Scheduling does no I/O, never awaits and takes no lock that another request can hold for long.
//! It does not know Envoy or the response. Entry point: [`scheduler::Scheduler::schedule`].

use std::cell::RefCell;
use std::fmt::Debug;
use std::sync::Arc;

use smallvec::SmallVec;

use crate::datalayer::{Endpoint, EngineMetrics};
use crate::plugin::{Attributes, Column};
use crate::request::InferenceRequest;

pub mod attributes;
pub mod deciders;
pub mod filters;
mod hooks;
pub mod pickers;
pub mod profile_handlers;
pub mod scheduler;
pub mod scorers;
mod spans;
pub mod stages;
#[cfg(test)]
pub(crate) mod test_support;
mod topology;

use attributes::PrefixMatch;
pub use hooks::{
    Admitter, DataProducer, Denial, Outcome, PreRequest, Preparation, ProducerError,
    RequestHeaderProcessor, SaturationDetector, Screener,
};

/// One endpoint still in the running, with its metrics frozen for this request. In-flight load is
/// read live from the endpoint.
#[derive(Debug, Clone)]
pub struct Candidate {
    /// The endpoint.
    pub endpoint: Arc<Endpoint>,
    /// Metrics as of the start of scheduling.
    pub metrics: Arc<EngineMetrics>,
}

impl Candidate {
    /// `endpoint` with its metrics as they are now.
    pub fn new(endpoint: Arc<Endpoint>) -> Self {
        Self {
            metrics: endpoint.metrics(),
            endpoint,
        }
    }

    /// Brings the metrics up to date.
    pub fn refresh(&mut self) {
        self.endpoint.refresh_metrics(&mut self.metrics);
    }
}

/// The candidates a hook may look at: a selection of the request's candidate list.
#[derive(Debug, Clone, Copy)]
pub struct Candidates<'a> {
    all: &'a [Candidate],
    selected: &'a [u32],
    peer: Option<u32>,
}

impl<'a> Candidates<'a> {
    /// `selected` are positions in `all`; one out of range is never yielded.
    pub fn new(all: &'a [Candidate], selected: &'a [u32]) -> Self {
        Self {
            all,
            selected,
            peer: None,
        }
    }

    /// The same candidates, for a profile that runs after one that picked `peer`.
    #[must_use]
    pub fn with_peer(self, peer: Option<u32>) -> Self {
        Self { peer, ..self }
    }

    /// First pick of the first profile that chose for this request, in a round before this one. It need
    /// not be selected here: prefill and decode endpoints may be disjoint.
    pub fn peer(&self) -> Option<&'a Candidate> {
        self.all.get(self.peer? as usize)
    }

    /// Number of selected candidates.
    pub fn len(&self) -> usize {
        self.selected.len()
    }

    /// True when none is left.
    pub fn is_empty(&self) -> bool {
        self.selected.is_empty()
    }

    /// `(position, candidate)` in selection order. The position addresses attribute columns.
    pub fn iter(&self) -> impl Iterator<Item = (usize, &'a Candidate)> + Clone + use<'a> {
        let all = self.all;
        self.selected
            .iter()
            .filter_map(move |&i| Some((i as usize, all.get(i as usize)?)))
    }
}

/// What hooks may read of the request being scheduled.
#[derive(Debug, Clone, Copy)]
pub struct Cycle<'a> {
    /// The request.
    pub request: &'a InferenceRequest,
    /// Columns written by data producers, addressed by candidate position.
    pub attributes: &'a Attributes,
    /// Clock reading of this decision.
    pub now: tokio::time::Instant,
    /// Random numbers of this decision; seeded when picks must be reproducible.
    pub rng: &'a RefCell<fastrand::Rng>,
}

/// Narrows the selection. Runs in the order the profile lists it.
pub trait Filter: Send + Sync + Debug {
    /// Writes the positions to keep into `keep` (given empty), in the order they should go on.
    fn filter(&self, cycle: &Cycle<'_>, candidates: Candidates<'_>, keep: &mut Vec<u32>);
}

/// Rates candidates. The framework clamps to `[0, 1]`, treats NaN as 0, and applies weights.
pub trait Scorer: Send + Sync + Debug {
    /// Writes one value per selected candidate, in selection order; `scores` is given zeroed.
    fn score(&self, cycle: &Cycle<'_>, candidates: Candidates<'_>, scores: &mut [f64]);
}

/// Chooses from weighted totals.
pub trait Picker: Send + Sync + Debug {
    /// Reorders `scored` so that the best come first and truncates it to at most the configured number.
    fn pick(&self, cycle: &Cycle<'_>, scored: &mut Vec<Scored>);
}

/// A candidate with its weighted total.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Scored {
    /// Position in the request's candidate list.
    pub position: u32,
    /// Weighted sum of clamped scores.
    pub total: f64,
}

/// What one profile chose.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProfilePicks {
    /// Profile name.
    pub profile: Arc<str>,
    /// Positions in the candidate list, best first; never empty in a result.
    pub picks: SmallVec<[u32; 4]>,
}

/// What scheduling decided.
#[derive(Debug, Clone)]
pub struct SchedulingResult {
    /// The profile whose picks become the destination.
    pub primary: ProfilePicks,
    /// Picks of further profiles (for example `prefill`).
    pub others: SmallVec<[ProfilePicks; 2]>,
}

impl SchedulingResult {
    /// All profiles, primary first.
    pub fn profiles(&self) -> impl Iterator<Item = &ProfilePicks> {
        std::iter::once(&self.primary).chain(&self.others)
    }
}

/// How far a profile is while the handler decides.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum ProfileRun {
    /// Not asked for.
    #[default]
    NotRun,
    /// Its filters left nothing.
    Failed,
    /// It chose.
    Picked(ProfilePicks),
}

/// What a profile handler and its deciders may look at.
#[derive(Debug, Clone, Copy)]
pub struct Round<'a> {
    /// The request.
    pub cycle: &'a Cycle<'a>,
    /// All candidates.
    pub candidates: &'a [Candidate],
    /// Names of the profiles, in configuration order.
    pub names: &'a [Arc<str>],
    /// Prefix matches that the configuration has, the most exact first.
    pub prefix_matches: &'a [Column<PrefixMatch>],
}

impl Round<'_> {
    /// How much of the prompt the candidate at `position` holds, by the most exact producer that has
    /// written anything for this request.
    pub fn prefix_match(&self, position: u32) -> Option<PrefixMatch> {
        let mut columns = self.prefix_matches.iter();
        let found = columns.find_map(|column| self.cycle.attributes.get(*column))?;
        found.get(position as usize).copied()
    }
}

/// What was left of the candidates after each profile's filters, with weighted totals.
#[derive(Debug, Clone, Copy)]
pub struct Survivors<'a>(&'a [Vec<Scored>]);

impl<'a> Survivors<'a> {
    /// One list for each profile.
    pub fn new(of_profiles: &'a [Vec<Scored>]) -> Self {
        Self(of_profiles)
    }

    /// Those of the profile at `position`, in the order the last filter left them; empty when it did
    /// not run or nothing was left.
    pub fn of(&self, position: usize) -> &'a [Scored] {
        self.0.get(position).map(Vec::as_slice).unwrap_or_default()
    }
}

/// Decides which profiles run and how their picks become the result.
pub trait ProfileHandler: Send + Sync + Debug {
    /// Writes the positions of the profiles to run next into `run` (given empty), given what ran so
    /// far; leaving it empty ends the loop. `runs` is in configuration order.
    fn next_profiles(&self, round: &Round<'_>, runs: &[ProfileRun], run: &mut Vec<usize>);

    /// Combines the runs once the loop ended; takes what it needs out of `runs`. Producers record
    /// placements by the names of [`SchedulingResult::others`]: the stages of disaggregated serving are
    /// called `prefill` and `encode` there, whatever their profiles are called.
    fn combine(
        &self,
        round: &Round<'_>,
        survivors: Survivors<'_>,
        runs: &mut [ProfileRun],
    ) -> Result<SchedulingResult, ScheduleError>;

    /// Says why it cannot work with profiles of these names; asked once, at load.
    fn check_profiles(&self, _names: &[&str]) -> Result<(), String> {
        Ok(())
    }
}

/// Says whether a stage of a request runs on an endpoint of its own.
pub trait Decider: Send + Sync + Debug {
    /// `decode` is the position of the decode pick; `None` when the stage is decided on before there
    /// is one.
    fn wants_stage(&self, round: &Round<'_>, decode: Option<u32>) -> bool;
}

/// Why no endpoint was chosen.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ScheduleError {
    /// The filters of a needed profile left nothing: 429, dropped reason `rejected-saturated`.
    #[error("no endpoints available for the given request")]
    FiltersLeftNothing,
    /// No endpoint is left to decode on: 429, dropped reason `rejected-saturated`.
    #[error("failed to find target endpoint: failed to find available decode workers")]
    NoDecodeEndpoint,
    /// The request names a profile that does not exist: 400.
    #[error("no scheduling profile is configured for the request")]
    UnknownProfile,
    /// The profile handler could not use the results: 429.
    #[error("failed to find target endpoint: {0}")]
    Handler(String),
}
