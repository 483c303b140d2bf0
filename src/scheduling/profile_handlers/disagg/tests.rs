//! Stages, their order and the headers, worked out by hand.

use std::sync::Arc;

use super::*;
use crate::plugin::{DataKeys, Parameters};
use crate::scheduling::pickers::MaxScorePicker;
use crate::scheduling::scheduler::{Profile, Scheduler, Scratch};
use crate::scheduling::test_support::{Pool, endpoint};
use crate::scheduling::{Candidates, Decider, Filter, Scorer};

/// Says yes to the decode endpoints in the list; without a decode pick only if it names none.
#[derive(Debug)]
struct Only(Option<&'static [u32]>);

impl Decider for Only {
    fn wants_stage(&self, _: &Round<'_>, decode: Option<u32>) -> bool {
        self.0
            .is_none_or(|list| decode.is_some_and(|d| list.contains(&d)))
    }
}

const YES: Only = Only(None);
const NO: Only = Only(Some(&[]));

/// Keeps endpoints whose name begins with the letter.
#[derive(Debug)]
struct Named(char);

impl Filter for Named {
    fn filter(&self, _: &Cycle<'_>, candidates: Candidates<'_>, keep: &mut Vec<u32>) {
        for (position, candidate) in candidates.iter() {
            if candidate.endpoint.spec.name.starts_with(self.0) {
                keep.push(u32::try_from(position).unwrap());
            }
        }
    }
}

/// Prefers endpoints near the front, and tells which peer it saw by preferring the same name's digit.
#[derive(Debug)]
struct FrontOrPeer;

impl Scorer for FrontOrPeer {
    fn score(&self, _: &Cycle<'_>, candidates: Candidates<'_>, scores: &mut [f64]) {
        let digit = |name: &str| name.chars().last();
        let peer = candidates.peer().map(|c| digit(&c.endpoint.spec.name));
        for (score, (position, candidate)) in scores.iter_mut().zip(candidates.iter()) {
            let near = peer == Some(digit(&candidate.endpoint.spec.name));
            *score = if near {
                1.0
            } else {
                0.5 / (position + 1) as f64
            };
        }
    }
}

fn handler(parameters: &str, deciders: [(&str, Only); 2]) -> Result<DisaggProfileHandler, String> {
    let parameters = Parameters(Some(serde_json::from_str(parameters).unwrap()));
    let mut keys = DataKeys::default();
    for (name, decider) in deciders {
        keys.offer(name, Arc::new(decider) as Arc<dyn Decider>);
    }
    keys.offer("queue-scorer", 7_u8);
    keys.enter("disagg");
    DisaggProfileHandler::build(&mut Build {
        name: "disagg",
        parameters: &parameters,
        keys: &mut keys,
    })
    .map_err(|e| e.to_string())
}

/// A scheduler over profiles named `d`, `p` and `e`, each with the endpoints of that letter.
fn scheduler(handler: Arc<DisaggProfileHandler>, profiles: &str, picks: i64) -> Scheduler {
    let name = || crate::plugin::TypedName {
        type_name: "t",
        name: "n".to_owned(),
    };
    let picker: MaxScorePicker =
        Pool::new([]).plugin(&format!(r#"{{"maxNumOfEndpoints": {picks}}}"#));
    let picker = Arc::new(picker);
    let profile = |letter: char| Profile {
        name: letter.to_string().into(),
        filters: vec![crate::plugin::Hook::new(
            "Filter",
            name(),
            Arc::new(Named(letter)) as Arc<dyn Filter>,
        )],
        scorers: vec![(
            crate::plugin::Hook::new("Scorer", name(), Arc::new(FrontOrPeer) as Arc<dyn Scorer>),
            1.0,
        )],
        picker: crate::plugin::Hook::new("Picker", name(), Arc::clone(&picker) as _),
    };
    Scheduler::new(handler, profiles.chars().map(profile).collect())
}

/// What became of a request: the destination's name and the headers, or the error.
fn outcome(
    handler: DisaggProfileHandler,
    profiles: &str,
    endpoints: &[&str],
    picks: i64,
) -> Result<String, String> {
    let pool = Pool::new(endpoints.iter().map(|name| endpoint(name)));
    run(handler, profiles, &pool, picks)
}

fn run(
    handler: DisaggProfileHandler,
    profiles: &str,
    pool: &Pool,
    picks: i64,
) -> Result<String, String> {
    let handler = Arc::new(handler);
    let scheduler = scheduler(Arc::clone(&handler), profiles, picks);
    pool.with_cycle(|cycle, candidates| {
        let result = scheduler.schedule(cycle, candidates, &mut Scratch::default());
        let result = result.map_err(|e| e.to_string())?;
        let mut outcome = Outcome::default();
        handler.on_pick(cycle, candidates, &result, &mut outcome);
        let name = |address: &str| {
            let mut all = candidates.iter();
            let found = all.find(|c| c.endpoint.host_port_str() == address);
            found.unwrap().endpoint.spec.name.clone()
        };
        let first = candidates[result.primary.picks[0] as usize]
            .endpoint
            .host_port_str();
        let mut text = name(first);
        for (header, value) in &outcome.set_headers {
            let stage = if *header == PREFILL_HEADER {
                "prefill"
            } else {
                "encode"
            };
            let value = std::str::from_utf8(value).unwrap();
            let names: Vec<String> = value.split(',').map(name).collect();
            text += &[" ", stage, "=", &names.join("+")].concat();
        }
        Ok(text)
    })
}

const POOL: [&str; 6] = ["d1", "d2", "p1", "p2", "e1", "e2"];
const ALL: &str = r#""profiles": {"decode": "d", "prefill": "p", "encode": "e"}"#;

#[test]
fn deciders_say_which_stages_run_elsewhere() {
    let nested = format!(r#"{{{ALL}, "deciders": {{"prefill": "pd", "encode": "mm"}}}}"#);
    for (pd, mm, wanted) in [
        (YES, YES, "d1 prefill=p1 encode=e1"),
        (YES, NO, "d1 prefill=p1"),
        (NO, YES, "d1 encode=e1"),
        (NO, NO, "d1"),
        // Both are told the decode pick.
        (Only(Some(&[0])), Only(Some(&[1])), "d1 prefill=p1"),
    ] {
        let handler = handler(&nested, [("pd", pd), ("mm", mm)]).unwrap();
        assert_eq!(outcome(handler, "dpe", &POOL, 1), Ok(wanted.to_owned()));
    }
}

#[test]
fn a_stage_without_profile_or_decider_stays_with_decode() {
    let with = |deciders: &str, profiles: &str| {
        let parameters = format!(r#"{{{ALL}, "deciders": {deciders}}}"#);
        let handler = handler(&parameters, [("pd", YES), ("mm", YES)]).unwrap();
        outcome(handler, profiles, &POOL, 1).unwrap()
    };
    let both = r#"{"prefill": "pd", "encode": "mm"}"#;
    assert_eq!(with("{}", "dpe"), "d1");
    assert_eq!(with(r#"{"encode": "mm"}"#, "dpe"), "d1 encode=e1");
    assert_eq!(with(both, "de"), "d1 encode=e1");
    assert_eq!(with(both, "d"), "d1");
}

#[test]
fn a_stage_without_endpoints_stays_with_decode_and_decode_needs_one() {
    let ask = |order: &str, endpoints: &[&str]| {
        let deciders = match order {
            "decode-first" => r#"{"prefill": "pd", "encode": "mm"}"#,
            _ => r#"{"encode": "mm"}"#,
        };
        let parameters = format!(r#"{{"stageOrder": "{order}", {ALL}, "deciders": {deciders}}}"#);
        let handler = handler(&parameters, [("pd", YES), ("mm", YES)]).unwrap();
        outcome(handler, "dpe", endpoints, 1)
    };
    let refused =
        Err("failed to find target endpoint: failed to find available decode workers".to_owned());
    for order in ["decode-first", "prefill-first"] {
        let ok = |text: &str| Ok(text.to_owned());
        assert_eq!(ask(order, &["d1", "e1"]), ok("d1 encode=e1"));
        assert_eq!(ask(order, &["d1", "p1"]), ok("d1 prefill=p1"));
        assert_eq!(ask(order, &["d1"]), ok("d1"));
        assert_eq!(ask(order, &["p1", "e1"]), refused);
        assert_eq!(ask(order, &[]), refused);
    }
}

#[test]
fn the_first_stage_is_the_peer_of_the_others() {
    // Without a peer the first in the list wins; with one the endpoint with its digit does.
    let endpoints = ["d2", "d1", "p1", "p2", "e1", "e2"];
    let ask = |parameters: &str| {
        let handler = handler(parameters, [("pd", YES), ("mm", YES)]).unwrap();
        outcome(handler, "dpe", &endpoints, 1).unwrap()
    };
    let first = format!(r#"{{{ALL}, "deciders": {{"prefill": "pd", "encode": "mm"}}}}"#);
    assert_eq!(ask(&first), "d2 prefill=p2 encode=e2");
    for order in ["prefill-first", "Prefill_First", "prefill"] {
        let second = format!(r#"{{"stageOrder": "{order}", {ALL}}}"#);
        assert_eq!(ask(&second), "d1 prefill=p1", "always, without a decider");
    }
}

#[test]
fn flat_parameters_mean_the_same() {
    for (parameters, wanted) in [
        (
            r#"{"decodeProfile": "d", "prefillProfile": "p", "encodeProfile": "e", "deciderPluginName": "pd", "encodeDeciderPluginName": "mm"}"#,
            "d1 prefill=p1 encode=e1",
        ),
        (
            r#"{"decodeProfile": "d", "prefillProfile": "p", "prefillDeciderPluginName": "pd", "deciderPluginName": "no such"}"#,
            "d1 prefill=p1",
        ),
        (
            r#"{"stageOrder": "PREFILL", "decodeProfile": "d", "prefillProfile": "p"}"#,
            "d1 prefill=p1",
        ),
        (r#"{"decodeProfile": "d", "prefillProfile": "p"}"#, "d1"),
    ] {
        let handler = handler(parameters, [("pd", YES), ("mm", YES)]).unwrap();
        let got = outcome(handler, "dpe", &POOL, 1);
        assert_eq!(got, Ok(wanted.to_owned()), "{parameters}");
    }
}

#[test]
fn refusals_name_the_field() {
    for (parameters, wanted) in [
        (
            r#"{"stageOrder": "encode"}"#,
            "stageOrder: 'encode' is neither",
        ),
        (
            r#"{"profiles": {}, "decodeProfile": "d"}"#,
            "decodeProfile: cannot stand beside profiles or deciders",
        ),
        (
            r#"{"deciders": {"prefill": "pd"}, "encodeDeciderPluginName": "mm"}"#,
            "encodeDeciderPluginName: cannot stand beside",
        ),
        (
            r#"{"stageOrder": "prefill-first", "deciders": {"prefill": "pd"}}"#,
            "deciders.prefill: must be absent with stageOrder prefill-first",
        ),
        (
            r#"{"stageOrder": "prefill-first", "deciderPluginName": "pd"}"#,
            "deciderPluginName: must be absent",
        ),
        (
            r#"{"deciders": {"prefill": "queue-scorer"}}"#,
            "deciders.prefill: 'queue-scorer' is not a decider",
        ),
        (
            r#"{"encodeDeciderPluginName": "queue-scorer"}"#,
            "encodeDeciderPluginName: 'queue-scorer' is not a decider",
        ),
        (
            r#"{"deciders": {"decode": "pd"}}"#,
            "deciders.decode: unknown field",
        ),
        (
            r#"{"profiles": {"decode": 3}}"#,
            "profiles.decode: invalid type",
        ),
        (
            r#"{"maxPrefillEndpoints": 0}"#,
            "maxPrefillEndpoints: 0 is not 1 to 8",
        ),
        (
            r#"{"maxPrefillEndpoints": 9}"#,
            "maxPrefillEndpoints: 9 is not 1 to 8",
        ),
        (
            r#"{"pairing": {}}"#,
            "pairing: needs stageOrder decode-first and a prefill decider",
        ),
        (
            r#"{"deciders": {"prefill": "pd"}, "pairing": {"prefillTokensPerSecond": 0}}"#,
            "pairing.prefillTokensPerSecond: 0 is not above 0",
        ),
        (
            r#"{"deciders": {"prefill": "pd"}, "pairing": {"transferMsPer1kTokens": {"host": -1}}}"#,
            "pairing.transferMsPer1kTokens.host: -1 is below 0",
        ),
        (r#"{"threshold": 1}"#, "threshold: unknown field"),
    ] {
        let error = handler(parameters, [("pd", YES), ("mm", YES)]).unwrap_err();
        assert!(error.starts_with(wanted), "{parameters}: {error}");
    }
}

#[test]
fn fallbacks_are_named_only_when_asked_for() {
    let endpoints = ["d1", "p1", "p2", "p3", "p4"];
    let ask = |more: &str, picks: i64| {
        let parameters = format!(r#"{{{ALL}, "deciders": {{"prefill": "pd"}}{more}}}"#);
        let handler = handler(&parameters, [("pd", YES), ("mm", NO)]).unwrap();
        outcome(handler, "dp", &endpoints, picks).unwrap()
    };
    // By score: p1 shares the peer's digit, then 0.5/3, 0.5/4 and 0.5/5.
    assert_eq!(ask("", 1), "d1 prefill=p1");
    assert_eq!(ask("", 3), "d1 prefill=p1", "however many the picker picks");
    let three = r#", "maxPrefillEndpoints": 3"#;
    assert_eq!(ask(three, 1), "d1 prefill=p1+p2+p3");
    assert_eq!(ask(three, 2), "d1 prefill=p1+p2+p3");
    let eight = r#", "maxPrefillEndpoints": 8"#;
    assert_eq!(
        ask(eight, 1),
        "d1 prefill=p1+p2+p3+p4",
        "no more than there are"
    );
}

#[test]
fn all_encode_picks_are_named() {
    let parameters = format!(r#"{{{ALL}, "deciders": {{"encode": "mm"}}}}"#);
    let handler = handler(&parameters, [("pd", YES), ("mm", YES)]).unwrap();
    assert_eq!(
        outcome(handler, "dpe", &POOL, 3).unwrap(),
        "d1 encode=e1+e2"
    );
}

#[test]
fn an_endpoint_never_prefills_for_itself() {
    // Both profiles pick among the same endpoints.
    let parameters =
        r#"{"profiles": {"decode": "d", "prefill": "d2"}, "deciders": {"prefill": "pd"}}"#;
    let handler = handler(parameters, [("pd", YES), ("mm", NO)]).unwrap();
    let picks = |picks: &[u32]| {
        let picked = |name: &str, picks: &[u32]| {
            crate::scheduling::ProfileRun::Picked(crate::scheduling::ProfilePicks {
                profile: name.into(),
                picks: picks.iter().copied().collect(),
            })
        };
        let names: [Arc<str>; 2] = ["d".into(), "d2".into()];
        let mut runs = [picked("d", &[0]), picked("d2", picks)];
        let pool = Pool::new(["d1", "d2", "d3"].map(endpoint));
        pool.with_round(&names, |round| {
            let result = handler
                .combine(round, Survivors::new(&[]), &mut runs)
                .unwrap();
            let others = result.others.iter();
            others.map(|p| p.picks.to_vec()).collect::<Vec<_>>()
        })
    };
    assert_eq!(picks(&[0, 1]), Vec::<Vec<u32>>::new());
    assert_eq!(picks(&[1, 0, 2]), [[1, 2]], "nor is it a fallback");
}

#[test]
fn decode_needs_a_profile() {
    let handler = handler("{}", [("pd", YES), ("mm", YES)]).unwrap();
    assert!(handler.check_profiles(&["prefill", "decode"]).is_ok());
    let error = handler.check_profiles(&["prefill"]).unwrap_err();
    assert!(
        error.contains("no scheduling profile called 'decode'"),
        "{error}"
    );
}

/// The joint choice through the whole cycle: filters still count, scores do not.
#[test]
fn with_pairing_the_pair_is_chosen_by_cost() {
    let parameters = format!(
        r#"{{{ALL}, "deciders": {{"prefill": "pd"}}, "maxPrefillEndpoints": 2,
            "pairing": {{"prefillTokensPerSecond": 10000}}}}"#
    );
    let mut pool = Pool::new([
        endpoint("d1").in_flight(5, 0),
        endpoint("d2").in_flight(2, 0),
        endpoint("p1").in_flight(1, 4000),
        endpoint("p2").in_flight(1, 1000),
        endpoint("p3").in_flight(1, 2000),
        endpoint("x9"),
    ]);
    pool.prompt_tokens = Some(640);
    let handler: DisaggProfileHandler = {
        let yes = Arc::new(YES) as Arc<dyn Decider>;
        pool.keys.offer("pd", yes);
        pool.plugin(&parameters)
    };
    // Decode: 5 * 10 = 50 ms and 2 * 10 = 20 ms. Prefill: (4000 + 640) / 10 = 464 ms, 164 ms, 264 ms.
    // Transfer is the same for all. Alone, the front ones would win.
    assert_eq!(run(handler, "dpe", &pool, 1).unwrap(), "d2 prefill=p2+p3");
}
