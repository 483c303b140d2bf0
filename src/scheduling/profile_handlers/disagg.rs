//! `disagg-profile-handler`

use serde::Deserialize;

use super::pairing::{self, Pairing};
use super::staged::{Order, Staged, decider, encode_header, prefill_header, record_stages};
use crate::plugin::{Build, Maturity, ParamDoc, ParamError, Plugin, PluginError};
use crate::scheduling::attributes::{
    APPROX_PREFIX_PRODUCER, PREFIX_MATCH, PrefixMatch, TOKEN_PRODUCER, TOKENIZED_PROMPT,
    producer_or,
};
use crate::scheduling::stages::{
    Decision, ENCODE_HEADER, ENCODE_STAGE, PREFILL_HEADER, PREFILL_STAGE,
};
use crate::scheduling::{
    Candidate, Cycle, Outcome, PreRequest, ProfileHandler, ProfileRun, Round, ScheduleError,
    SchedulingResult, Survivors,
};
use crate::telemetry::metrics::DecisionSeries;
use crate::telemetry::trace::names;

/// Prefill endpoints that a request may name.
const MAX_PREFILL_ENDPOINTS: i64 = 8;

/// Picks an endpoint for each stage of a request and tells the sidecar of the decode endpoint.
///
/// - `decode-first`: the decode profile, then the encode and the prefill profile where their deciders
///   want the stage elsewhere. The decode pick is the peer of the later profiles.
/// - `prefill-first`: the prefill profile whenever it exists, then the encode profile if its decider says
///   so, and the decode profile. The prefill pick is the peer.
///
/// The destination is the decode pick; without one the request is refused. A prefill or encode profile
/// that finds no endpoint leaves its stage to the decode endpoint. Headers: `x-prefiller-host-port` with
/// the first `maxPrefillEndpoints` prefill endpoints, the one to fall back on behind the one before it,
/// and `x-encoder-hosts-ports` with every encode pick. With `pairing` the prefill and the decode endpoint
/// are chosen together.
#[derive(Debug)]
pub struct DisaggProfileHandler {
    staged: Staged,
    decisions: DecisionSeries<4>,
}

#[derive(Debug, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
struct Settings {
    stage_order: String,
    profiles: Option<Profiles>,
    deciders: Option<Deciders>,
    max_prefill_endpoints: i64,
    pairing: Option<pairing::Settings>,
    decode_profile: String,
    prefill_profile: String,
    encode_profile: String,
    prefill_decider_plugin_name: String,
    decider_plugin_name: String,
    encode_decider_plugin_name: String,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            stage_order: String::new(),
            profiles: None,
            deciders: None,
            max_prefill_endpoints: 1,
            pairing: None,
            decode_profile: String::new(),
            prefill_profile: String::new(),
            encode_profile: String::new(),
            prefill_decider_plugin_name: String::new(),
            decider_plugin_name: String::new(),
            encode_decider_plugin_name: String::new(),
        }
    }
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
struct Profiles {
    decode: String,
    prefill: String,
    encode: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
struct Deciders {
    prefill: String,
    encode: String,
}

/// A decider's name and the parameter that gives it; an empty name is none.
struct Named<'a> {
    field: &'static str,
    name: &'a str,
}

const PARAMETERS: &[ParamDoc] = &[
    ParamDoc {
        name: "stageOrder",
        kind: "string",
        default: "decode-first",
        help: "decode-first or prefill-first; case, `-` and `_` do not matter, `decode` and `prefill` will do.",
    },
    ParamDoc {
        name: "profiles",
        kind: "object",
        default: "",
        help: "Scheduling profiles of the stages: {decode: decode, prefill: prefill, encode: encode}.",
    },
    ParamDoc {
        name: "deciders",
        kind: "object",
        default: "",
        help: "Instances that decide whether a stage runs on an endpoint of its own: {prefill, encode}. Without one the stage stays on the decode endpoint; with prefill-first prefill has none.",
    },
    ParamDoc {
        name: "maxPrefillEndpoints",
        kind: "int",
        default: "1",
        help: "Prefill endpoints named to the sidecar, the best first, the others to fall back on; 1 to 8.",
    },
    ParamDoc {
        name: "pairing",
        kind: "object",
        default: "",
        help: "Chooses the prefill and the decode endpoint together, for the least milliseconds: (tokens in flight + uncached tokens on the prefill endpoint) / `prefillTokensPerSecond` (15928) + tokens missing on the decode endpoint x `transferMsPer1kTokens` ({host: 2, rack: 7, zone: 25, region: 110, other: 110, unknown: 10}, by what both share) + requests in flight on the decode endpoint x `decodeMsPerRequest` (10). Pickers and scorers of the two profiles have no say then, filters have. `topologyProducerName` names who knows where endpoints are; without it every distance is unknown. Needs decode-first and a prefill decider, which is asked for every decode endpoint. At most 64 endpoints of each kind are compared.",
    },
    ParamDoc {
        name: "decodeProfile",
        kind: "string",
        default: "",
        help: "Older form of profiles.decode; the forms cannot be mixed.",
    },
    ParamDoc {
        name: "prefillProfile",
        kind: "string",
        default: "",
        help: "Older form of profiles.prefill.",
    },
    ParamDoc {
        name: "encodeProfile",
        kind: "string",
        default: "",
        help: "Older form of profiles.encode.",
    },
    ParamDoc {
        name: "prefillDeciderPluginName",
        kind: "string",
        default: "",
        help: "Older form of deciders.prefill; wins over deciderPluginName.",
    },
    ParamDoc {
        name: "deciderPluginName",
        kind: "string",
        default: "",
        help: "Older form of deciders.prefill.",
    },
    ParamDoc {
        name: "encodeDeciderPluginName",
        kind: "string",
        default: "",
        help: "Older form of deciders.encode.",
    },
];

impl Plugin for DisaggProfileHandler {
    const TYPE: &'static str = "disagg-profile-handler";
    const MATURITY: Maturity = Maturity::Beta;
    const PARAMETERS: &'static [ParamDoc] = PARAMETERS;
    const ABOUT: &'static str =
        "Picks a decode endpoint, and endpoints for prefill and encode where deciders want them.";

    fn build(build: &mut Build<'_>) -> Result<Self, PluginError> {
        let settings: Settings = build.read::<Self, _>()?;
        // As published: whoever runs this handler has the default prefix matches.
        build.keys.require::<u64>(TOKENIZED_PROMPT, TOKEN_PRODUCER);
        build
            .keys
            .require::<PrefixMatch>(PREFIX_MATCH, APPROX_PREFIX_PRODUCER);
        Ok(Self {
            staged: settings.staged(build)?,
            decisions: DecisionSeries::new(
                "llm_d_epp_disagg_decision_total",
                Self::TYPE,
                build.name,
                Decision::ALL.map(Decision::name),
            ),
        })
    }
}

impl Settings {
    fn staged(&self, build: &mut Build<'_>) -> Result<Staged, PluginError> {
        self.check_forms()?;
        let order = self.order()?;
        let prefill_endpoints = match self.max_prefill_endpoints {
            n @ 1..=MAX_PREFILL_ENDPOINTS => usize::try_from(n).unwrap_or(1),
            n => {
                let text = format!("maxPrefillEndpoints: {n} is not 1 to {MAX_PREFILL_ENDPOINTS}");
                return Err(ParamError(text).into());
            }
        };
        let prefill = self.prefill_decider();
        if order == Order::PrefillFirst && !prefill.name.is_empty() {
            let text = format!(
                "{}: must be absent with stageOrder prefill-first, which always runs prefill",
                prefill.field
            );
            return Err(ParamError(text).into());
        }
        let joint = order == Order::DecodeFirst && !prefill.name.is_empty();
        let pairing = match &self.pairing {
            Some(_) if !joint => {
                let text = "pairing: needs stageOrder decode-first and a prefill decider";
                return Err(ParamError(text.to_owned()).into());
            }
            Some(settings) => Some(Pairing::new(settings, prefill_endpoints, build)?),
            None => None,
        };
        let get = |named: &Named<'_>| match named.name {
            "" => Ok(None),
            name => decider(build, named.field, name).map(Some),
        };
        let profiles = self.profiles.as_ref();
        let profile = |nested: Option<&String>, flat: &str, default: &str| {
            let name = nested.map_or(flat, String::as_str);
            producer_or(name, default).to_owned()
        };
        Ok(Staged {
            order,
            decode: profile(profiles.map(|p| &p.decode), &self.decode_profile, "decode"),
            prefill: profile(
                profiles.map(|p| &p.prefill),
                &self.prefill_profile,
                "prefill",
            ),
            encode: Some(profile(
                profiles.map(|p| &p.encode),
                &self.encode_profile,
                "encode",
            )),
            prefill_decider: get(&prefill)?,
            encode_decider: get(&self.encode_decider())?,
            prefill_endpoints,
            pairing,
            span: names::PICK_DISAGG_PROFILE,
        })
    }

    /// The nested and the older flat form exclude each other.
    fn check_forms(&self) -> Result<(), ParamError> {
        if self.profiles.is_none() && self.deciders.is_none() {
            return Ok(());
        }
        let flat = [
            ("decodeProfile", &self.decode_profile),
            ("prefillProfile", &self.prefill_profile),
            ("encodeProfile", &self.encode_profile),
            (
                "prefillDeciderPluginName",
                &self.prefill_decider_plugin_name,
            ),
            ("deciderPluginName", &self.decider_plugin_name),
            ("encodeDeciderPluginName", &self.encode_decider_plugin_name),
        ];
        match flat.iter().find(|(_, value)| !value.is_empty()) {
            Some((field, _)) => Err(ParamError(format!(
                "{field}: cannot stand beside profiles or deciders, which replace it"
            ))),
            None => Ok(()),
        }
    }

    fn order(&self) -> Result<Order, ParamError> {
        let mut word = self.stage_order.to_ascii_lowercase();
        word.retain(|c| c != '-' && c != '_');
        match word.as_str() {
            "" | "decode" | "decodefirst" => Ok(Order::DecodeFirst),
            "prefill" | "prefillfirst" => Ok(Order::PrefillFirst),
            _ => Err(ParamError(format!(
                "stageOrder: '{}' is neither decode-first nor prefill-first",
                self.stage_order
            ))),
        }
    }

    fn prefill_decider(&self) -> Named<'_> {
        let named = |field, name| Named { field, name };
        match &self.deciders {
            Some(deciders) => named("deciders.prefill", deciders.prefill.as_str()),
            None if self.prefill_decider_plugin_name.is_empty() => {
                named("deciderPluginName", self.decider_plugin_name.as_str())
            }
            None => named(
                "prefillDeciderPluginName",
                self.prefill_decider_plugin_name.as_str(),
            ),
        }
    }

    fn encode_decider(&self) -> Named<'_> {
        match &self.deciders {
            Some(deciders) => Named {
                field: "deciders.encode",
                name: &deciders.encode,
            },
            None => Named {
                field: "encodeDeciderPluginName",
                name: &self.encode_decider_plugin_name,
            },
        }
    }
}

impl ProfileHandler for DisaggProfileHandler {
    fn next_profiles(&self, round: &Round<'_>, runs: &[ProfileRun], run: &mut Vec<usize>) {
        self.staged.next_profiles(round, runs, run);
    }

    fn combine(
        &self,
        round: &Round<'_>,
        survivors: Survivors<'_>,
        runs: &mut [ProfileRun],
    ) -> Result<SchedulingResult, ScheduleError> {
        let (result, decision) = self.staged.combine(round, survivors, runs)?;
        self.decisions
            .count(&round.cycle.request.target_model, decision as usize);
        Ok(result)
    }

    fn check_profiles(&self, names: &[&str]) -> Result<(), String> {
        self.staged.check_profiles(Self::TYPE, names)
    }
}

impl PreRequest for DisaggProfileHandler {
    fn on_pick(
        &self,
        cycle: &Cycle<'_>,
        candidates: &[Candidate],
        result: &SchedulingResult,
        outcome: &mut Outcome,
    ) {
        let find = |stage: &str| result.others.iter().find(|p| &*p.profile == stage);
        let limit = self.staged.prefill_endpoints;
        let stages = (find(PREFILL_STAGE), find(ENCODE_STAGE));
        record_stages(cycle, candidates, stages);
        let prefill = stages
            .0
            .and_then(|picks| prefill_header(candidates, picks, limit));
        let encode = stages.1.and_then(|picks| encode_header(candidates, picks));
        tracing::debug!(
            request_id = cycle.request.id,
            llm_d.epp.pd.disaggregation_used = prefill.is_some(),
            llm_d.epp.pd.prefill_pods = %String::from_utf8_lossy(prefill.as_deref().unwrap_or_default()),
            llm_d.epp.encode.disaggregation_used = encode.is_some(),
            llm_d.epp.encode.endpoints = %String::from_utf8_lossy(encode.as_deref().unwrap_or_default()),
            "prepare_disaggregation"
        );
        if let Some(value) = prefill {
            outcome.set_header(PREFILL_HEADER, value);
        }
        if let Some(value) = encode {
            outcome.set_header(ENCODE_HEADER, value);
        }
    }
}

#[cfg(test)]
#[path = "disagg/tests.rs"]
mod tests;
