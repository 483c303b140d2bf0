use tokio::time::Instant;

use super::*;
use crate::request::Headers;
use crate::response::{ResponseHeaderHook, Served};
use crate::scheduling::test_support::{Pool, endpoint, refusal};
use crate::scheduling::{Filter, PreRequest, ProfilePicks, RequestHeaderProcessor};

const SESSION_ID: &str = r#"{"strategy": "session_id"}"#;

fn pool() -> Pool {
    Pool::new(["a", "b", "c"].map(endpoint))
}

fn result(profiles: &[(&str, u32)]) -> SchedulingResult {
    let mut picks = profiles.iter().map(|(name, pick)| ProfilePicks {
        profile: (*name).into(),
        picks: [*pick].into_iter().collect(),
    });
    SchedulingResult {
        primary: picks.next().unwrap(),
        others: picks.collect(),
    }
}

/// One request: each of `offers` is what a profile offers the filter; then `picks` are booked. Returns
/// what the filter kept of each offer.
fn request(
    filter: &SessionAffinityFilter,
    pool: &Pool,
    offers: &[&[u32]],
    picks: &[(&str, u32)],
    now: Instant,
) -> Vec<Vec<u32>> {
    let mut attributes = pool.keys.new_attributes();
    filter.process(&pool.request, &mut attributes);
    let cycle = Cycle {
        request: &pool.request,
        attributes: &attributes,
        now,
        rng: &pool.rng,
    };
    let kept = offers.iter().map(|offer| {
        let mut keep = Vec::new();
        filter.filter(&cycle, Candidates::new(&pool.candidates, offer), &mut keep);
        keep
    });
    let kept = kept.collect();
    let mut outcome = Outcome::default();
    filter.on_pick(&cycle, &pool.candidates, &result(picks), &mut outcome);
    kept
}

#[test]
fn a_token_binds_to_the_endpoint_it_names() {
    // printf default/b | base64
    for (token, kept, scores) in [
        ("ZGVmYXVsdC9i", &["b"][..], [0.0, 1.0, 0.0]),
        // default/x is not in the pool.
        ("ZGVmYXVsdC94", &["a", "b", "c"], [0.0; 3]),
        ("b", &["a", "b", "c"], [0.0; 3]),
        ("", &["a", "b", "c"], [0.0; 3]),
    ] {
        let mut pool = pool();
        let filter: SessionAffinityFilter = pool.plugin("{}");
        let scorer: SessionAffinityScorer = pool.plugin("{}");
        pool.header("x-session-token", token);
        assert_eq!(pool.kept(&filter), kept, "{token}");
        assert_eq!(pool.scores(&scorer), scores, "{token}");
    }
    let mut pool = pool();
    let filter: SessionAffinityFilter =
        pool.plugin(r#"{"encodedEndpointHeaderConfig": {"header": "X-Mine"}}"#);
    pool.header("x-mine", "ZGVmYXVsdC9i");
    assert_eq!(pool.kept(&filter), ["b"]);
    let long = "A".repeat(MAX_TOKEN_BYTES + 4);
    assert_eq!(decode(long.as_bytes()), None);
    assert!(decode(&long.as_bytes()[4..]).is_some());
}

#[test]
fn a_response_names_the_endpoint_that_answers() {
    let mut pool = pool();
    let view = |pool: &Pool, headers: &Headers| {
        let view = ResponseView {
            request_id: "r",
            endpoint: &pool.candidates[1].endpoint.clone(),
            served: Served::NoNamespace,
            headers,
        };
        let mut set = Vec::new();
        let filter: SessionAffinityFilter = Pool::new([]).plugin("{}");
        filter.on_response_headers(&view, &mut set);
        set
    };
    let wanted = ("x-session-token".to_owned(), Bytes::from("ZGVmYXVsdC9i"));
    assert_eq!(view(&pool, &Headers::default()), [wanted]);

    // With a profile name it is that profile's pick, and nothing when that profile did not run.
    let filter: SessionAffinityFilter = pool.plugin(r#"{"profileName": "prefill"}"#);
    for (profiles, wanted) in [
        (&[("decode", 0), ("prefill", 2)][..], Some("ZGVmYXVsdC9j")),
        (&[("decode", 0)], None),
    ] {
        let mut outcome = Outcome::default();
        pool.with_cycle(|cycle, all| {
            filter.on_pick(cycle, all, &result(profiles), &mut outcome);
        });
        let mut set = Vec::new();
        outcome.leases.on_response_headers(&mut set);
        let tokens: Vec<_> = set.iter().map(|(_, token)| token.as_ref()).collect();
        assert_eq!(
            tokens,
            wanted.map(str::as_bytes).into_iter().collect::<Vec<_>>()
        );
    }
}

#[test]
fn a_session_stays_until_its_endpoint_is_not_on_offer() {
    let mut pool = pool();
    let filter: SessionAffinityFilter = pool.plugin(SESSION_ID);
    pool.header("x-session-id", "s");
    let now = Instant::now();
    let all: &[u32] = &[0, 1, 2];
    let ask =
        |offers: &[&[u32]], picks: &[(&str, u32)]| request(&filter, &pool, offers, picks, now);
    assert_eq!(ask(&[all], &[("default", 1)]), [all], "not bound yet");
    assert_eq!(ask(&[all], &[("default", 1)]), [[1]]);
    // Picked elsewhere although on offer: stays.
    assert_eq!(ask(&[all], &[("default", 2)]), [[1]]);
    assert_eq!(ask(&[all], &[("default", 1)]), [[1]]);
    // On offer in one of two profiles: stays.
    assert_eq!(ask(&[&[0, 1], &[2]], &[("default", 0)]), [vec![1], vec![2]]);
    assert_eq!(ask(&[all], &[("default", 1)]), [[1]]);
    // Nobody looked: stays.
    assert!(ask(&[], &[("default", 0)]).is_empty());
    // Not on offer: moves to the pick.
    assert_eq!(ask(&[&[0, 2]], &[("default", 2)]), [[0, 2]]);
    assert_eq!(ask(&[all], &[("default", 2)]), [[2]]);
}

#[test]
fn the_named_profile_is_remembered() {
    let mut pool = pool();
    let filter: SessionAffinityFilter =
        pool.plugin(r#"{"strategy": "session_id", "profileName": "prefill"}"#);
    pool.header("x-session-id", "s");
    let now = Instant::now();
    request(&filter, &pool, &[&[0, 1, 2]], &[("decode", 0)], now);
    let kept = request(
        &filter,
        &pool,
        &[&[0, 1, 2]],
        &[("decode", 0), ("prefill", 2)],
        now,
    );
    assert_eq!(kept, [[0, 1, 2]], "prefill did not run before");
    let kept = request(&filter, &pool, &[&[0, 1, 2]], &[("decode", 0)], now);
    assert_eq!(kept, [[2]]);
}

#[test]
fn the_first_source_with_a_value_is_the_session() {
    let mut pool = pool();
    let scorer: SessionAffinityScorer = pool.plugin(
        r#"{"strategy": "session_id", "sessionIdConfig": {"sources": [
            {"attribute": "SessionIDDataKey", "producer": "session-id-producer"},
            {"attribute": "agent-identity"},
            {"header": "X-Fallback"}
        ]}}"#,
    );
    pool.keys.enter("session-id-producer");
    let session_column = pool.keys.produce::<String>("SessionIDDataKey");
    let agent_column = pool.keys.produce_as::<String>("agent-identity", "");
    pool.header("x-fallback", "f");
    let Strategy::Session { sources, .. } = &scorer.0.strategy else {
        panic!("{scorer:?}")
    };
    let read = |id: Option<&str>, agent: Option<&str>| {
        let mut attributes = pool.keys.new_attributes();
        for (column, value) in [(session_column, id), (agent_column, agent)] {
            if let Some(value) = value {
                attributes.write(column).push(value.to_owned());
            }
        }
        let cycle = Cycle {
            request: &pool.request,
            attributes: &attributes,
            now: Instant::now(),
            rng: &pool.rng,
        };
        session(sources, &cycle)
    };
    for (id, agent, wanted) in [
        (Some("s"), Some("a"), "s"),
        (None, Some("a"), "a"),
        (Some(" "), Some("a"), "a"),
        (None, None, "f"),
    ] {
        assert_eq!(read(id, agent), Some(SessionKey::of(wanted)));
    }
}

#[test]
fn a_request_without_session_binds_nothing() {
    let mut pool = pool();
    let scorer: SessionAffinityScorer = pool.plugin(SESSION_ID);
    assert_eq!(pool.scores(&scorer), [0.0; 3]);
    pool.with_cycle(|cycle, all| {
        scorer.on_pick(
            cycle,
            all,
            &result(&[("default", 0)]),
            &mut Outcome::default(),
        );
    });
    let Strategy::Session { sessions, .. } = &scorer.0.strategy else {
        panic!("{scorer:?}")
    };
    assert_eq!(sessions.len(), 0);
}

#[test]
fn parameters_are_checked() {
    for (parameters, wanted) in [
        (r#"{"strategy": "cookie"}"#, "unknown variant `cookie`"),
        (
            r#"{"strategy": "session_id", "sessionIdConfig": {"sources": [{"header": "a"}, {}]}}"#,
            "sessionIdConfig.sources[1]: takes exactly one",
        ),
        (
            r#"{"strategy": "session_id", "sessionIdConfig": {"sources": [{"header": "a", "attribute": "b"}]}}"#,
            "sessionIdConfig.sources[0]: takes exactly one",
        ),
        (
            r#"{"strategy": "session_id", "sessionIdConfig": {"evictionTtlSeconds": -1}}"#,
            "sessionIdConfig.evictionTtlSeconds: -1 is not above 0",
        ),
        (
            r#"{"strategy": "session_id", "sessionIdConfig": {"evictionSweepSeconds": -0.5}}"#,
            "sessionIdConfig.evictionSweepSeconds: -0.5 is not above 0",
        ),
    ] {
        let text = refusal::<SessionAffinityFilter>(parameters);
        assert!(text.contains(wanted), "{parameters}: {text}");
        assert_eq!(refusal::<SessionAffinityScorer>(parameters), text);
    }
}
