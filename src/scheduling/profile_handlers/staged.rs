//! Stages of a request on endpoints of their own: what `disagg-profile-handler` and the deprecated
//! `pd-profile-handler` share.

use std::sync::Arc;

use bytes::Bytes;
use smallvec::SmallVec;

use super::pairing::{Choice, Pairing};
use crate::plugin::{Build, ParamError, PluginError};
use crate::scheduling::stages::{Decision, ENCODE_STAGE, PREFILL_STAGE};
use crate::scheduling::{
    Candidate, Cycle, Decider, ProfilePicks, ProfileRun, Round, ScheduleError, SchedulingResult,
    Scored, Survivors,
};
use crate::telemetry::trace::{Site, names};

/// The step that ends a request without a decode endpoint.
const MISSING_DECODE: &str = "error_missing_decode_profile";

/// Which stage is picked first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Order {
    /// Decode, then what the deciders want beside it.
    DecodeFirst,
    /// Prefill whenever it has a profile, then the others.
    PrefillFirst,
}

/// Runs the profiles of the stages in order and combines their picks.
#[derive(Debug)]
pub(super) struct Staged {
    pub(super) order: Order,
    /// Profile names.
    pub(super) decode: String,
    pub(super) prefill: String,
    /// `None` for handlers without such a stage.
    pub(super) encode: Option<String>,
    /// Without one the stage stays on the decode endpoint.
    pub(super) prefill_decider: Option<Arc<dyn Decider>>,
    pub(super) encode_decider: Option<Arc<dyn Decider>>,
    /// Prefill endpoints to name, at least 1.
    pub(super) prefill_endpoints: usize,
    /// Chooses the prefill and the decode endpoint together.
    pub(super) pairing: Option<Pairing>,
    /// Span of a step.
    pub(super) span: Site,
}

/// The decider that the parameter `field` names.
pub(super) fn decider(
    build: &Build<'_>,
    field: &str,
    name: &str,
) -> Result<Arc<dyn Decider>, PluginError> {
    let offered = build.keys.offered::<Arc<dyn Decider>>(name);
    offered.ok_or_else(|| ParamError(format!("{field}: '{name}' is not a decider")).into())
}

/// As a header value: the first `limit` picks.
pub(super) fn prefill_header(
    candidates: &[Candidate],
    picks: &ProfilePicks,
    limit: usize,
) -> Option<Bytes> {
    addresses(candidates, picks.picks.iter().take(limit))
}

/// As a header value: all picks.
pub(super) fn encode_header(candidates: &[Candidate], picks: &ProfilePicks) -> Option<Bytes> {
    addresses(candidates, picks.picks.iter())
}

fn addresses<'a>(candidates: &[Candidate], picks: impl Iterator<Item = &'a u32>) -> Option<Bytes> {
    let mut found = picks.filter_map(|&p| Some(&candidates.get(p as usize)?.endpoint.host_port));
    let first = found.next()?;
    let mut list = Vec::new();
    for more in found {
        if list.is_empty() {
            list.extend_from_slice(first);
        }
        list.push(b',');
        list.extend_from_slice(more);
    }
    // One address, the usual case, is shared and not copied.
    Some(if list.is_empty() {
        first.clone()
    } else {
        list.into()
    })
}

/// Records where the stages of a request run, as their headers say it. `picked` are endpoints of
/// prefill and encode.
pub(super) fn record_stages(
    cycle: &Cycle<'_>,
    candidates: &[Candidate],
    (prefill, encode): (Option<&ProfilePicks>, Option<&ProfilePicks>),
) {
    if !cycle.request.trace.is_recording() {
        return;
    }
    let mut span = cycle.request.span(names::PREPARE_DISAGGREGATION);
    let first = prefill.map(|p| p.picks.first().and_then(|&p| candidates.get(p as usize)));
    match first {
        Some(Some(candidate)) => {
            let address = candidate.endpoint.spec.address;
            span.record(|| {
                [
                    ("llm_d.epp.pd.disaggregation_used", true.into()),
                    (
                        "llm_d.epp.pd.prefill_pod_address",
                        address.ip().to_string().into(),
                    ),
                    (
                        "llm_d.epp.pd.prefill_pod_port",
                        address.port().to_string().into(),
                    ),
                ]
            });
        }
        unused => {
            let reason = if unused.is_some() {
                "no_prefill_profile_target_endpoints"
            } else {
                "no_prefill_profile_result"
            };
            span.record(|| {
                [
                    ("llm_d.epp.pd.disaggregation_used", false.into()),
                    ("llm_d.epp.pd.reason", reason.into()),
                ]
            });
        }
    }
    match encode.map(|picks| encode_header(candidates, picks)) {
        Some(Some(endpoints)) => span.record(|| {
            let endpoints = String::from_utf8_lossy(&endpoints).into_owned();
            [
                ("llm_d.epp.encode.disaggregation_used", true.into()),
                ("llm_d.epp.encode.endpoints", endpoints.into()),
            ]
        }),
        unused => {
            let reason = if unused.is_some() {
                "no_encode_profile_target_endpoints"
            } else {
                "no_encode_profile_result"
            };
            span.record(|| {
                [
                    ("llm_d.epp.encode.disaggregation_used", false.into()),
                    ("llm_d.epp.encode.reason", reason.into()),
                ]
            });
        }
    }
}

fn first_pick(run: &ProfileRun) -> Option<u32> {
    match run {
        ProfileRun::Picked(picked) => picked.picks.first().copied(),
        _ => None,
    }
}

impl Staged {
    /// See [`crate::scheduling::ProfileHandler::next_profiles`].
    pub(super) fn next_profiles(
        &self,
        round: &Round<'_>,
        runs: &[ProfileRun],
        run: &mut Vec<usize>,
    ) {
        let at = |name: &str| round.names.iter().position(|n| **n == *name);
        let open = |position: &usize| runs.get(*position) == Some(&ProfileRun::NotRun);
        let (decode, prefill) = (at(&self.decode), at(&self.prefill));
        let encode = self.encode.as_deref().and_then(at);
        match (self.order, decode) {
            (_, None) => {}
            (Order::DecodeFirst, Some(decode)) if open(&decode) => {
                self.note(round, runs, "run_decode", Some(&self.decode));
                run.push(decode);
                // To be chosen together, neither may know of the other.
                let paired = prefill.filter(|_| self.pairing.is_some());
                run.extend(paired.filter(|_| self.prefill_decider.is_some()));
            }
            (Order::DecodeFirst, Some(decode)) => {
                let pick = runs.get(decode).and_then(first_pick);
                let untouched = |p: Option<usize>| p.is_none_or(|p| open(&p));
                let begun = !untouched(encode) || (self.pairing.is_none() && !untouched(prefill));
                if pick.is_none() || begun {
                    return;
                }
                self.ask_encode(round, runs, encode.filter(open), (pick, &mut *run));
                let prefill = prefill.filter(open);
                if let (Some(prefill), Some(decider)) = (prefill, &self.prefill_decider) {
                    let wanted = decider.wants_stage(round, pick);
                    let step = if wanted {
                        "run_prefill"
                    } else {
                        "skip_prefill"
                    };
                    self.note(round, runs, step, wanted.then_some(&*self.prefill));
                    run.extend(wanted.then_some(prefill));
                }
            }
            (Order::PrefillFirst, Some(decode)) => {
                if let Some(prefill) = prefill.filter(open) {
                    self.note(round, runs, "run_prefill", Some(&self.prefill));
                    run.push(prefill);
                } else if open(&decode) {
                    self.ask_encode(round, runs, encode.filter(open), (None, &mut *run));
                    self.note(round, runs, "run_decode", Some(&self.decode));
                    run.push(decode);
                }
            }
        }
    }

    fn ask_encode(
        &self,
        round: &Round<'_>,
        runs: &[ProfileRun],
        encode: Option<usize>,
        (decode, run): (Option<u32>, &mut Vec<usize>),
    ) {
        if let (Some(encode), Some(decider)) = (encode, &self.encode_decider) {
            let wanted = decider.wants_stage(round, decode);
            let step = if wanted { "run_encode" } else { "skip_encode" };
            let selected = self.encode.as_deref().filter(|_| wanted);
            self.note(round, runs, step, selected);
            run.extend(wanted.then_some(encode));
        }
    }

    /// Logs and records a step of the decision, and the profile it selects.
    fn note(
        &self,
        round: &Round<'_>,
        runs: &[ProfileRun],
        step: &'static str,
        selected: Option<&str>,
    ) {
        let request = round.cycle.request;
        tracing::debug!(
            request_id = request.id,
            gen_ai.request.model = request.target_model,
            llm_d.epp.profile_handler.decision = step,
            "{}",
            self.span.name
        );
        if !request.trace.is_recording() {
            return;
        }
        let mut span = request.span(self.span.clone());
        let executed = runs.iter().filter(|run| **run != ProfileRun::NotRun);
        span.record(|| {
            [
                ("llm_d.epp.profile_handler.decision", step.into()),
                (
                    "llm_d.epp.profile_handler.total_profiles",
                    round.names.len().into(),
                ),
                (
                    "llm_d.epp.profile_handler.executed_profiles",
                    executed.count().into(),
                ),
            ]
        });
        if let Some(selected) = selected {
            let name = "llm_d.epp.profile_handler.selected_profile";
            span.record(|| [(name, selected.to_owned().into())]);
        }
        if step == MISSING_DECODE {
            span.record(|| [("llm_d.epp.profile_handler.decode_failed", true.into())]);
            span.fail("no endpoint to decode on");
        }
    }

    /// See [`crate::scheduling::ProfileHandler::combine`]; also says what was decided.
    pub(super) fn combine(
        &self,
        round: &Round<'_>,
        survivors: Survivors<'_>,
        runs: &mut [ProfileRun],
    ) -> Result<(SchedulingResult, Decision), ScheduleError> {
        let at = |name: &str| round.names.iter().position(|n| **n == *name);
        let executed = round
            .cycle
            .request
            .trace
            .is_recording()
            .then(|| runs.to_vec());
        let executed = executed.unwrap_or_default();
        let mut take = |position: Option<usize>| match runs.get_mut(position?).map(std::mem::take) {
            Some(ProfileRun::Picked(picks)) => Some(picks),
            _ => None,
        };
        let (decode_at, prefill_at) = (at(&self.decode), at(&self.prefill));
        let Some(mut primary) = take(decode_at) else {
            self.note(round, &executed, MISSING_DECODE, None);
            return Err(ScheduleError::NoDecodeEndpoint);
        };
        let encode = take(self.encode.as_deref().and_then(at));
        let mut prefill = take(prefill_at);
        let of = |position: Option<usize>| position.map_or(&[][..], |p| survivors.of(p));
        if let (Some(pairing), Some(decider)) = (&self.pairing, &self.prefill_decider) {
            let sets = (of(prefill_at), of(decode_at));
            let choice = pairing.choose(round, decider.as_ref(), sets);
            apply(choice, &mut primary, &mut prefill);
        } else if let Some(picks) = &mut prefill {
            self.add_fallbacks(of(prefill_at), picks);
        }
        let mut others = SmallVec::new();
        let decode = primary.picks.first().copied();
        let mut add = |picks: Option<ProfilePicks>, stage: &str| {
            others.extend(picks.map(|picks| ProfilePicks {
                profile: stage.into(),
                ..picks
            }));
        };
        let encodes = encode.is_some();
        add(encode, ENCODE_STAGE);
        let prefill = prefill.and_then(|picks| elsewhere(picks, decode));
        let decision = Decision::of(encodes, prefill.is_some());
        add(prefill, PREFILL_STAGE);
        self.note(round, &executed, complete(decision), None);
        Ok((SchedulingResult { primary, others }, decision))
    }

    /// Adds the best of the endpoints that were not picked, until there are enough to fall back on.
    fn add_fallbacks(&self, survivors: &[Scored], picks: &mut ProfilePicks) {
        if picks.picks.len() >= self.prefill_endpoints {
            return;
        }
        let mut rest: Vec<Scored> = survivors
            .iter()
            .filter(|s| !picks.picks.contains(&s.position))
            .copied()
            .collect();
        rest.sort_by(|a, b| b.total.total_cmp(&a.total));
        let missing = self.prefill_endpoints - picks.picks.len();
        picks
            .picks
            .extend(rest.iter().take(missing).map(|s| s.position));
    }

    /// The decode profile must exist; without it no request could be served.
    pub(super) fn check_profiles(&self, type_name: &str, names: &[&str]) -> Result<(), String> {
        if names.contains(&self.decode.as_str()) {
            Ok(())
        } else {
            Err(format!(
                "{type_name}: there is no scheduling profile called '{}' to decode with",
                self.decode
            ))
        }
    }
}

/// Picks other than the decode pick. When it comes first there is nothing to hand over: an endpoint that
/// is both computes its own prefill.
fn elsewhere(mut picks: ProfilePicks, decode: Option<u32>) -> Option<ProfilePicks> {
    if picks.picks.first().copied() == decode {
        return None;
    }
    picks.picks.retain(|p| Some(*p) != decode);
    Some(picks)
}

/// Puts the choice in place of the picks that the profiles made one by one.
fn apply(choice: Option<Choice>, decode: &mut ProfilePicks, prefill: &mut Option<ProfilePicks>) {
    let Some(choice) = choice else { return };
    let wanted = decode.picks.len();
    decode.picks.retain(|p| *p != choice.decode);
    decode.picks.insert(0, choice.decode);
    decode.picks.truncate(wanted);
    match prefill {
        Some(picks) if !choice.prefill.is_empty() => picks.picks = choice.prefill,
        _ => *prefill = None,
    }
}

fn complete(decision: Decision) -> &'static str {
    match decision {
        Decision::DecodeOnly => "complete_decode-only",
        Decision::PrefillDecode => "complete_prefill-decode",
        Decision::EncodeDecode => "complete_encode-decode",
        Decision::EncodePrefillDecode => "complete_encode-prefill-decode",
    }
}
