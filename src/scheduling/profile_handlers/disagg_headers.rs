//! `disagg-headers-handler` and `prefill-header-handler`

use serde::Deserialize;

use super::staged::{encode_header, prefill_header, record_stages};
use crate::plugin::{Build, Maturity, ParamDoc, Plugin, PluginError};
use crate::scheduling::stages::{ENCODE_HEADER, ENCODE_STAGE, PREFILL_HEADER, PREFILL_STAGE};
use crate::scheduling::{Candidate, Cycle, Outcome, PreRequest, ProfilePicks, SchedulingResult};

/// Writes the headers of disaggregated serving for handlers that do not: `pd-profile-handler`.
///
/// A stage is recognized by the name of its profile or by its own; see
/// [`crate::scheduling::ProfileHandler::combine`]. What another plugin set stays, so that it is harmless
/// beside `disagg-profile-handler`.
#[derive(Debug)]
pub struct DisaggHeadersHandler {
    prefill: String,
    encode: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
struct Settings {
    prefill_profile: String,
    encode_profile: String,
}

impl Plugin for DisaggHeadersHandler {
    const TYPE: &'static str = "disagg-headers-handler";
    const MATURITY: Maturity = Maturity::Beta;
    const PARAMETERS: &'static [ParamDoc] = &[
        ParamDoc {
            name: "prefillProfile",
            kind: "string",
            default: "prefill",
            help: "Profile whose pick prefills.",
        },
        ParamDoc {
            name: "encodeProfile",
            kind: "string",
            default: "encode",
            help: "Profile whose picks encode.",
        },
    ];
    const ABOUT: &'static str = "Tells sidecars where prefill and encode run.";

    fn build(build: &mut Build<'_>) -> Result<Self, PluginError> {
        let settings: Settings = build.read::<Self, _>()?;
        let or = |name: String, default: &str| match name.as_str() {
            "" => default.to_owned(),
            _ => name,
        };
        Ok(Self {
            prefill: or(settings.prefill_profile, PREFILL_STAGE),
            encode: or(settings.encode_profile, ENCODE_STAGE),
        })
    }
}

impl PreRequest for DisaggHeadersHandler {
    fn on_pick(
        &self,
        cycle: &Cycle<'_>,
        candidates: &[Candidate],
        result: &SchedulingResult,
        outcome: &mut Outcome,
    ) {
        let find = |profile: &str, stage: &str| -> Option<&ProfilePicks> {
            let mut others = result.others.iter();
            others.find(|p| *p.profile == *profile || &*p.profile == stage)
        };
        let prefill = find(&self.prefill, PREFILL_STAGE);
        let encode = find(&self.encode, ENCODE_STAGE);
        record_stages(cycle, candidates, (prefill, encode));
        if let Some(picks) = prefill
            && let Some(value) = prefill_header(candidates, picks, 1)
        {
            outcome.set_header_if_absent(PREFILL_HEADER, value);
        }
        if let Some(picks) = encode
            && let Some(value) = encode_header(candidates, picks)
        {
            outcome.set_header_if_absent(ENCODE_HEADER, value);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scheduling::test_support::{Pool, endpoint};

    /// Headers for a decode pick 0 and these picks, beside what is set already.
    fn headers(
        parameters: &str,
        others: &[(&str, &[u32])],
        mut outcome: Outcome,
    ) -> Vec<(&'static str, String)> {
        let mut pool = Pool::new(["d", "p", "e", "f"].map(endpoint));
        let handler: DisaggHeadersHandler = pool.plugin(parameters);
        let picks = |(name, picks): (&str, &[u32])| ProfilePicks {
            profile: name.into(),
            picks: picks.iter().copied().collect(),
        };
        let result = SchedulingResult {
            primary: picks(("decode", &[0])),
            others: others.iter().map(|(n, p)| picks((n, p))).collect(),
        };
        pool.with_cycle(|cycle, all| handler.on_pick(cycle, all, &result, &mut outcome));
        let text = |value: &bytes::Bytes| String::from_utf8(value.to_vec()).unwrap();
        let set = outcome.set_headers.iter();
        set.map(|(name, value)| (*name, text(value))).collect()
    }

    #[test]
    fn the_first_prefill_pick_and_all_encode_picks_are_named() {
        let all: &[(&str, &[u32])] = &[("encode", &[2, 3]), ("prefill", &[1, 2])];
        assert_eq!(
            headers("{}", all, Outcome::default()),
            [
                (PREFILL_HEADER, "10.0.0.1:8001".to_owned()),
                (ENCODE_HEADER, "10.0.0.1:8002,10.0.0.1:8003".to_owned()),
            ]
        );
        let own = r#"{"prefillProfile": "p"}"#;
        let named: &[(&str, &[u32])] = &[("p", &[1])];
        let wanted = [(PREFILL_HEADER, "10.0.0.1:8001".to_owned())];
        assert_eq!(headers(own, named, Outcome::default()), wanted);
        assert!(headers("{}", named, Outcome::default()).is_empty());
    }

    #[test]
    fn what_is_set_stays() {
        let mut outcome = Outcome::default();
        outcome.set_header(PREFILL_HEADER, "10.9.9.9:1,10.9.9.9:2".into());
        assert_eq!(
            headers("{}", &[("prefill", &[1])], outcome),
            [(PREFILL_HEADER, "10.9.9.9:1,10.9.9.9:2".to_owned())]
        );
    }
}
