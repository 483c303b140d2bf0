//! `pd-profile-handler`

use serde::Deserialize;

use super::data_parallel::{name_rank, port};
use super::staged::{Order, Staged, decider};
use crate::plugin::{Build, Column, Maturity, ParamDoc, Plugin, PluginError};
use crate::scheduling::attributes::{
    APPROX_PREFIX_PRODUCER, PREFIX_MATCH, PrefixMatch, producer_or,
};
use crate::scheduling::deciders::PrefixBasedDecider;
use crate::scheduling::stages::Decision;
use crate::scheduling::{
    Candidate, Cycle, Outcome, PreRequest, ProfileHandler, ProfileRun, Round, ScheduleError,
    SchedulingResult, Survivors,
};
use crate::telemetry::metrics::DecisionSeries;
use crate::telemetry::trace::names;

/// Decode first, then prefill on an endpoint of its own if the decider says so.
///
/// It writes no prefill header: a headers handler beside it does. With `primaryPort` the decode pick is a
/// data-parallel rank, as under `data-parallel-profile-handler`. With `prefixMatchInfoProducerName` the
/// decider reads that producer instead of the most exact one.
#[derive(Debug)]
pub struct PdProfileHandler {
    staged: Staged,
    primary_port: Option<u16>,
    matches: Option<Column<PrefixMatch>>,
    decisions: DecisionSeries<2>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
struct Settings {
    decode_profile: String,
    prefill_profile: String,
    prefix_plugin_type: String,
    prefix_plugin_name: String,
    primary_port: i64,
    decider_plugin_name: String,
    prefix_match_info_producer_name: String,
}

impl Plugin for PdProfileHandler {
    const TYPE: &'static str = "pd-profile-handler";
    const MATURITY: Maturity = Maturity::Beta;
    const PARAMETERS: &'static [ParamDoc] = &[
        ParamDoc {
            name: "decodeProfile",
            kind: "string",
            default: "decode",
            help: "Profile that picks where to decode.",
        },
        ParamDoc {
            name: "prefillProfile",
            kind: "string",
            default: "prefill",
            help: "Profile that picks where to prefill.",
        },
        ParamDoc {
            name: "deciderPluginName",
            kind: "string",
            default: "prefix-based-pd-decider",
            help: "Instance that decides whether prefill runs on an endpoint of its own.",
        },
        ParamDoc {
            name: "primaryPort",
            kind: "int",
            default: "0",
            help: "Port of the sidecar that knows the data-parallel ranks, 1 to 65535; 0 without such a sidecar.",
        },
        ParamDoc {
            name: "prefixMatchInfoProducerName",
            kind: "string",
            default: "the most exact one",
            help: "Instance that says how much of the prefix the decode endpoint holds.",
        },
        ParamDoc {
            name: "prefixPluginType",
            kind: "string",
            default: "",
            help: "Accepted, has no effect.",
        },
        ParamDoc {
            name: "prefixPluginName",
            kind: "string",
            default: "",
            help: "Must name an instance when set; has no other effect.",
        },
    ];
    const ABOUT: &'static str =
        "Picks a decode endpoint, and a prefill endpoint when the decider wants one.";

    fn build(build: &mut Build<'_>) -> Result<Self, PluginError> {
        let settings: Settings = build.read::<Self, _>()?;
        let or = |name: &String, default: &str| producer_or(name, default).to_owned();
        let name = or(&settings.decider_plugin_name, PrefixBasedDecider::TYPE);
        let prefill_decider = decider(build, "deciderPluginName", &name)?;
        let named = &settings.prefix_match_info_producer_name;
        let producer = producer_or(named, APPROX_PREFIX_PRODUCER);
        let column = build.keys.require(PREFIX_MATCH, producer);
        let staged = Staged {
            order: Order::DecodeFirst,
            decode: or(&settings.decode_profile, "decode"),
            prefill: or(&settings.prefill_profile, "prefill"),
            encode: None,
            prefill_decider: Some(prefill_decider),
            encode_decider: None,
            prefill_endpoints: 1,
            pairing: None,
            span: names::PICK_PD_PROFILE,
        };
        Ok(Self {
            staged,
            primary_port: match settings.primary_port {
                0 => None,
                value => Some(port(value)?),
            },
            matches: (!named.is_empty()).then_some(column),
            decisions: DecisionSeries::new(
                "llm_d_epp_pd_decision_total",
                Self::TYPE,
                build.name,
                [Decision::DecodeOnly, Decision::PrefillDecode].map(Decision::name),
            ),
        })
    }
}

impl PdProfileHandler {
    /// `round` as the decider should see it.
    fn seen<'a>(&'a self, round: &Round<'a>) -> Round<'a> {
        match &self.matches {
            Some(column) => Round {
                prefix_matches: std::slice::from_ref(column),
                ..*round
            },
            None => *round,
        }
    }
}

impl ProfileHandler for PdProfileHandler {
    fn next_profiles(&self, round: &Round<'_>, runs: &[ProfileRun], run: &mut Vec<usize>) {
        self.staged.next_profiles(&self.seen(round), runs, run);
    }

    fn combine(
        &self,
        round: &Round<'_>,
        survivors: Survivors<'_>,
        runs: &mut [ProfileRun],
    ) -> Result<SchedulingResult, ScheduleError> {
        let (result, decision) = self.staged.combine(&self.seen(round), survivors, runs)?;
        let kind = usize::from(decision == Decision::PrefillDecode);
        self.decisions
            .count(&round.cycle.request.target_model, kind);
        Ok(result)
    }

    fn check_profiles(&self, names: &[&str]) -> Result<(), String> {
        self.staged.check_profiles(Self::TYPE, names)
    }
}

impl PreRequest for PdProfileHandler {
    fn on_pick(
        &self,
        _: &Cycle<'_>,
        candidates: &[Candidate],
        result: &SchedulingResult,
        outcome: &mut Outcome,
    ) {
        if let Some(port) = self.primary_port {
            name_rank(candidates, result, port, outcome);
        }
    }
}
