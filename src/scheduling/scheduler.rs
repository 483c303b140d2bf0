//! The scheduling cycle: profiles, each filters then scorers then picker, until the handler is done.

use std::sync::Arc;

use metrics::Histogram;
use smallvec::SmallVec;
use tokio::time::Instant;

use super::spans::ProfileSpan;
use super::{
    Candidate, Candidates, Cycle, Filter, Picker, ProfileHandler, ProfilePicks, ProfileRun, Round,
    ScheduleError, SchedulingResult, Scored, Scorer, Survivors,
};
use crate::plugin::{Column, Hook, Lap};
use crate::scheduling::attributes::PrefixMatch;
use crate::telemetry::metrics::Pair;

/// Filters in order, weighted scorers, one picker.
#[derive(Debug)]
pub struct Profile {
    /// Name, unique in the configuration.
    pub name: Arc<str>,
    /// Applied in order.
    pub filters: Vec<Hook<dyn Filter>>,
    /// With weights; any number, also 0 and negative.
    pub scorers: Vec<(Hook<dyn Scorer>, f64)>,
    /// Chooses from the totals.
    pub picker: Hook<dyn Picker>,
}

/// All profiles and what runs them. Immutable.
#[derive(Debug)]
pub struct Scheduler {
    handler: Arc<dyn ProfileHandler>,
    names: Vec<Arc<str>>,
    profiles: Vec<Profile>,
    prefix_matches: Vec<Column<PrefixMatch>>,
    duration: Pair<Histogram>,
}

/// Buffers of one thread; a warm cycle allocates nothing.
#[derive(Debug, Default)]
pub struct Scratch {
    selected: Vec<u32>,
    keep: Vec<u32>,
    scores: Vec<f64>,
    scored: Vec<Scored>,
    runs: Vec<ProfileRun>,
    run: Vec<usize>,
    /// Totals by profile, before picking.
    totals: Vec<Vec<Scored>>,
    /// The profile whose totals may be shown; `None` when it has no scorers.
    primary: Option<usize>,
}

impl Scratch {
    /// Totals of every candidate that the primary profile of the last cycle scored.
    pub fn primary_scores(&self) -> &[Scored] {
        self.primary
            .and_then(|position| self.totals.get(position))
            .map(Vec::as_slice)
            .unwrap_or_default()
    }
}

impl Scheduler {
    /// A scheduler over `profiles` in configuration order.
    pub fn new(handler: Arc<dyn ProfileHandler>, profiles: Vec<Profile>) -> Self {
        Self {
            handler,
            names: profiles.iter().map(|p| Arc::clone(&p.name)).collect(),
            profiles,
            prefix_matches: Vec::new(),
            duration: Pair::histogram(
                "llm_d_epp_scheduler_e2e_duration_seconds",
                Vec::new(),
                Vec::new(),
            ),
        }
    }

    /// What profile handlers and deciders know of caches: prefix matches, the most exact first.
    #[must_use]
    pub fn with_prefix_matches(self, prefix_matches: Vec<Column<PrefixMatch>>) -> Self {
        Self {
            prefix_matches,
            ..self
        }
    }

    /// Runs the profiles the handler asks for. O(candidates) per plugin.
    pub fn schedule(
        &self,
        cycle: &Cycle<'_>,
        candidates: &[Candidate],
        scratch: &mut Scratch,
    ) -> Result<SchedulingResult, ScheduleError> {
        let started = Instant::now();
        let result = self.cycle(cycle, candidates, scratch);
        self.duration.record(started.elapsed().as_secs_f64());
        result
    }

    fn cycle(
        &self,
        cycle: &Cycle<'_>,
        candidates: &[Candidate],
        scratch: &mut Scratch,
    ) -> Result<SchedulingResult, ScheduleError> {
        scratch.runs.clear();
        scratch
            .runs
            .resize_with(self.profiles.len(), ProfileRun::default);
        scratch.totals.resize_with(self.profiles.len(), Vec::new);
        scratch.totals.iter_mut().for_each(Vec::clear);
        let round = Round {
            cycle,
            candidates,
            names: &self.names,
            prefix_matches: &self.prefix_matches,
        };
        let mut peer = None;
        // Each round must run a profile that has not run, so a handler cannot loop for ever.
        for _ in 0..self.profiles.len() {
            let mut run = std::mem::take(&mut scratch.run);
            run.clear();
            self.handler.next_profiles(&round, &scratch.runs, &mut run);
            for &position in &run {
                if let Some(profile) = self.profiles.get(position) {
                    let outcome = profile.run(cycle, candidates, peer, scratch, position);
                    scratch.runs[position] = outcome;
                }
            }
            peer = peer.or_else(|| first_pick(&scratch.runs, &run));
            let done = run.is_empty();
            scratch.run = run;
            if done {
                break;
            }
        }
        let survivors = Survivors::new(&scratch.totals);
        let result = self.handler.combine(&round, survivors, &mut scratch.runs)?;
        let mut profiles = self.profiles.iter();
        let primary = profiles.position(|p| p.name == result.primary.profile);
        scratch.primary =
            primary.filter(|p| self.profiles.get(*p).is_some_and(|p| !p.scorers.is_empty()));
        Ok(result)
    }
}

/// First pick of the first of the `ran` profiles that chose.
fn first_pick(runs: &[ProfileRun], ran: &[usize]) -> Option<u32> {
    ran.iter().find_map(|&position| match runs.get(position) {
        Some(ProfileRun::Picked(picked)) => picked.picks.first().copied(),
        _ => None,
    })
}

impl Profile {
    fn run(
        &self,
        cycle: &Cycle<'_>,
        candidates: &[Candidate],
        peer: Option<u32>,
        scratch: &mut Scratch,
        position: usize,
    ) -> ProfileRun {
        let Scratch {
            selected,
            keep,
            scores,
            scored,
            totals,
            ..
        } = scratch;
        let mut trace = ProfileSpan::begin(cycle, &self.name);
        let mut lap = Lap::start();
        selected.clear();
        selected.extend((0..).take(candidates.len()));
        let filtering = trace.filtering(candidates.len());
        for hook in &self.filters {
            keep.clear();
            let offered = Candidates::new(candidates, selected).with_peer(peer);
            hook.timed_after(&mut lap, |filter| filter.filter(cycle, offered, keep));
            std::mem::swap(selected, keep);
            if selected.is_empty() {
                trace.filtered(filtering, 0);
                return ProfileRun::Failed;
            }
        }
        trace.filtered(filtering, selected.len());
        scored.clear();
        scored.extend(selected.iter().map(|&position| Scored {
            position,
            total: 0.0,
        }));
        let scoring = trace.scoring(self.scorers.len(), selected.len());
        let rated = Candidates::new(candidates, selected).with_peer(peer);
        for (hook, weight) in &self.scorers {
            scores.clear();
            scores.resize(selected.len(), 0.0);
            let span = scoring.scorer(&hook.name);
            hook.timed_after(&mut lap, |scorer| scorer.score(cycle, rated, scores));
            for (scored, score) in scored.iter_mut().zip(scores.iter_mut()) {
                *score = if score.is_nan() {
                    0.0
                } else {
                    score.clamp(0.0, 1.0)
                };
                scored.total += *score * weight;
            }
            scoring.scored(span, &hook.name, *weight, scores);
        }
        drop(scoring);
        if let Some(totals) = totals.get_mut(position) {
            totals.clear();
            totals.extend_from_slice(scored);
        }
        let picking = trace.picking(candidates, scored);
        self.picker
            .timed_after(&mut lap, |picker| picker.pick(cycle, scored));
        drop(picking);
        if scored.is_empty() {
            return ProfileRun::Failed;
        }
        let picks: SmallVec<[u32; 4]> = scored.iter().map(|s| s.position).collect();
        ProfileRun::Picked(ProfilePicks {
            profile: Arc::clone(&self.name),
            picks,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::test_support::{Pool, endpoint};
    use super::*;
    use crate::plugin::TypedName;

    #[derive(Debug)]
    struct Fixed(&'static [f64]);

    impl Scorer for Fixed {
        fn score(&self, _: &Cycle<'_>, candidates: Candidates<'_>, scores: &mut [f64]) {
            for ((position, _), score) in candidates.iter().zip(scores) {
                *score = self.0[position];
            }
        }
    }

    #[derive(Debug)]
    struct Keep(&'static [u32]);

    impl Filter for Keep {
        fn filter(&self, _: &Cycle<'_>, candidates: Candidates<'_>, keep: &mut Vec<u32>) {
            let given: Vec<usize> = candidates.iter().map(|(p, _)| p).collect();
            keep.extend(self.0.iter().filter(|p| given.contains(&(**p as usize))));
        }
    }

    fn scheduler(filters: &[&'static [u32]], scorers: &[(&'static [f64], f64)]) -> Scheduler {
        let name = || TypedName {
            type_name: "t",
            name: "n".to_owned(),
        };
        let profile = Profile {
            name: "default".into(),
            filters: filters
                .iter()
                .map(|k| Hook::new("Filter", name(), Arc::new(Keep(k)) as Arc<dyn Filter>))
                .collect(),
            scorers: scorers
                .iter()
                .map(|(s, w)| {
                    (
                        Hook::new("Scorer", name(), Arc::new(Fixed(s)) as Arc<dyn Scorer>),
                        *w,
                    )
                })
                .collect(),
            picker: Hook::new(
                "Picker",
                name(),
                Arc::new(super::super::pickers::MaxScorePicker::default()),
            ),
        };
        Scheduler::new(
            Arc::new(super::super::profile_handlers::SingleProfileHandler),
            vec![profile],
        )
    }

    fn totals(scheduler: &Scheduler, n: usize) -> Result<(u32, Vec<f64>), ScheduleError> {
        let pool = Pool::new((0..n).map(|i| endpoint(&format!("e{i}"))));
        let mut scratch = Scratch::default();
        let result = pool
            .with_cycle(|cycle, candidates| scheduler.schedule(cycle, candidates, &mut scratch))?;
        Ok((
            result.primary.picks[0],
            scratch.primary_scores().iter().map(|s| s.total).collect(),
        ))
    }

    #[test]
    fn scores_are_clamped_weighted_and_summed() {
        // a: 1 (clamped from 7) * 2 + 0.5 * -1 = 1.5; b: 0 (from -3) * 2 + 0 (NaN) * -1 = 0.
        let scheduler = scheduler(&[], &[(&[7.0, -3.0], 2.0), (&[0.5, f64::NAN], -1.0)]);
        assert_eq!(totals(&scheduler, 2).unwrap(), (0, vec![1.5, 0.0]));
    }

    #[test]
    fn filters_apply_in_order_and_an_empty_set_fails() {
        let (pick, scores) = totals(
            &scheduler(&[&[2, 1], &[1, 0]], &[(&[1.0, 0.2, 1.0], 1.0)]),
            3,
        )
        .unwrap();
        assert_eq!((pick, scores), (1, vec![0.2]));
        assert_eq!(
            totals(&scheduler(&[&[0], &[1]], &[]), 2).unwrap_err(),
            ScheduleError::FiltersLeftNothing
        );
    }

    /// Keeps the candidate that an earlier round picked.
    #[derive(Debug)]
    struct PeerOnly;

    impl Filter for PeerOnly {
        fn filter(&self, _: &Cycle<'_>, candidates: Candidates<'_>, keep: &mut Vec<u32>) {
            let peer = candidates.peer().map(|c| &c.endpoint.spec.name);
            let same = candidates
                .iter()
                .filter(|(_, c)| Some(&c.endpoint.spec.name) == peer);
            keep.extend(same.map(|(position, _)| u32::try_from(position).unwrap()));
        }
    }

    /// Runs its rounds of profiles one after the other; the last one is primary.
    #[derive(Debug)]
    struct Rounds(&'static [&'static [usize]]);

    impl ProfileHandler for Rounds {
        fn next_profiles(&self, _: &Round<'_>, runs: &[ProfileRun], run: &mut Vec<usize>) {
            let open = |round: &&&[usize]| round.iter().all(|p| runs[*p] == ProfileRun::NotRun);
            run.extend(self.0.iter().find(open).copied().unwrap_or_default());
        }

        fn combine(
            &self,
            _: &Round<'_>,
            _: Survivors<'_>,
            runs: &mut [ProfileRun],
        ) -> Result<SchedulingResult, ScheduleError> {
            match runs.last_mut().map(std::mem::take) {
                Some(ProfileRun::Picked(primary)) => Ok(SchedulingResult {
                    primary,
                    others: SmallVec::new(),
                }),
                _ => Err(ScheduleError::FiltersLeftNothing),
            }
        }
    }

    #[test]
    fn later_rounds_know_the_first_pick() {
        let profiles = |rounds| {
            let mut scheduler = scheduler(&[&[1]], &[]);
            let mut second = scheduler.profiles[0].filters[0].clone();
            second.plugin = Arc::new(PeerOnly);
            let picker = scheduler.profiles[0].picker.clone();
            scheduler.profiles.push(Profile {
                name: "second".into(),
                filters: vec![second],
                scorers: Vec::new(),
                picker,
            });
            Scheduler::new(Arc::new(Rounds(rounds)), scheduler.profiles)
        };
        let picked = |rounds| totals(&profiles(rounds), 3).map(|(pick, _)| pick);
        assert_eq!(picked(&[&[0], &[1]]), Ok(1));
        // Profiles of one round do not know of each other.
        assert_eq!(picked(&[&[0, 1]]), Err(ScheduleError::FiltersLeftNothing));
    }

    #[test]
    fn without_scorers_there_are_no_scores_to_show() {
        assert_eq!(totals(&scheduler(&[&[1]], &[]), 2).unwrap(), (1, vec![]));
    }
}
