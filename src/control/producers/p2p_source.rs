//! `p2p-source-producer`: which endpoint a cached prefix can be pulled from.

use serde::Deserialize;

use crate::plugin::{
    Attributes, Build, Column, Maturity, ParamDoc, ParamError, Plugin, PluginError,
};
use crate::request::InferenceRequest;
use crate::scheduling::attributes::{
    APPROX_PREFIX_PRODUCER, PREFIX_MATCH, PrefixMatch, producer_or,
};
use crate::scheduling::stages::{PREFILL_STAGE, SOURCE_HEADER};
use crate::scheduling::{
    Candidate, Cycle, DataProducer, Outcome, PreRequest, ProducerError, SchedulingResult,
};

/// Internal column with the chosen source: one position, or none.
const SOURCE: &str = "p2p-source";

/// Names an endpoint that holds more of the prompt than the one that computes it.
///
/// Sources are the endpoints within one block of the longest cached prefix: in host memory where that is
/// known, from where it can be sent, else in any. One of them is drawn with weight `1 / (1 + waiting
/// requests)`; the request id decides, so that a repeated request has the same source. The header is set
/// when the source is another endpoint than the one that computes the prompt (the prefill pick, else the
/// primary one) and holds at least `minCachedTokenDelta` tokens more than that one does in any memory.
#[derive(Debug)]
pub struct P2pSourceProducer {
    matches: Column<PrefixMatch>,
    source: Column<u32>,
    min_delta: u64,
    prefill_profile: String,
}

#[derive(Debug, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
struct Settings {
    prefix_match_info_producer_name: String,
    min_cached_token_delta: i64,
    prefill_profile_name: String,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            prefix_match_info_producer_name: String::new(),
            min_cached_token_delta: 1,
            prefill_profile_name: String::new(),
        }
    }
}

impl Plugin for P2pSourceProducer {
    const TYPE: &'static str = "p2p-source-producer";
    const MATURITY: Maturity = Maturity::Alpha;
    const PARAMETERS: &'static [ParamDoc] = &[
        ParamDoc {
            name: "prefixMatchInfoProducerName",
            kind: "string",
            default: "approx-prefix-cache-producer",
            help: "Instance that says how much of the prefix each endpoint holds.",
        },
        ParamDoc {
            name: "minCachedTokenDelta",
            kind: "int",
            default: "1",
            help: "Tokens that a source must hold beyond what the computing endpoint does; at least 1.",
        },
        ParamDoc {
            name: "prefillProfileName",
            kind: "string",
            default: "prefill",
            help: "Profile whose pick computes the prompt, when it ran.",
        },
    ];
    const ABOUT: &'static str = "Names an endpoint to pull a cached prefix from.";

    fn build(build: &mut Build<'_>) -> Result<Self, PluginError> {
        let settings: Settings = build.read::<Self, _>()?;
        let min_delta = match u64::try_from(settings.min_cached_token_delta) {
            Ok(delta) if delta > 0 => delta,
            _ => {
                let text = format!(
                    "minCachedTokenDelta: {} is not above 0",
                    settings.min_cached_token_delta
                );
                return Err(ParamError(text).into());
            }
        };
        let prefix = producer_or(
            &settings.prefix_match_info_producer_name,
            APPROX_PREFIX_PRODUCER,
        );
        Ok(Self {
            matches: build.keys.require(PREFIX_MATCH, prefix),
            source: build.keys.produce(SOURCE),
            min_delta,
            prefill_profile: producer_or(&settings.prefill_profile_name, PREFILL_STAGE).to_owned(),
        })
    }
}

/// Tokens that can be sent to another endpoint.
fn sendable_tokens(found: &PrefixMatch) -> u64 {
    let blocks = found.host_blocks.unwrap_or(found.cached_blocks);
    u64::from(blocks) * u64::from(found.block_size_tokens)
}

/// 32-bit FNV-1a.
fn fnv1a(text: &str) -> u32 {
    text.bytes().fold(0x811c_9dc5, |hash, byte| {
        (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193)
    })
}

/// Draws one of the endpoints within a block of the most tokens; `None` when nobody holds any.
fn draw(id: &str, candidates: &[Candidate], matches: &[PrefixMatch]) -> Option<u32> {
    let most = matches.iter().map(sendable_tokens).max()?;
    let eligible = || {
        let all = (0..).zip(candidates.iter().zip(matches));
        all.filter(|(_, (_, found))| {
            let own = sendable_tokens(found);
            own > 0 && own + u64::from(found.block_size_tokens) >= most
        })
        .map(|(position, (candidate, _))| {
            let weight = 1.0 / (1.0 + f64::from(candidate.metrics.waiting_requests));
            (position, weight)
        })
    };
    let total: f64 = eligible().map(|(_, weight)| weight).sum();
    let mut left = f64::from(fnv1a(id)) / 4_294_967_296.0 * total;
    let mut last = None;
    for (position, weight) in eligible() {
        if left < weight {
            return Some(position);
        }
        left -= weight;
        last = Some(position);
    }
    // Rounding may leave a little over.
    last
}

impl DataProducer for P2pSourceProducer {
    fn produce(
        &self,
        request: &InferenceRequest,
        candidates: &[Candidate],
        attributes: &mut Attributes,
    ) -> Result<(), ProducerError> {
        let matches = attributes.get(self.matches).unwrap_or_default();
        let source = draw(&request.id, candidates, matches);
        attributes.write(self.source).extend(source);
        Ok(())
    }
}

impl PreRequest for P2pSourceProducer {
    fn on_pick(
        &self,
        cycle: &Cycle<'_>,
        candidates: &[Candidate],
        result: &SchedulingResult,
        outcome: &mut Outcome,
    ) {
        let mut others = result.others.iter();
        let prefill =
            others.find(|p| *p.profile == *self.prefill_profile || &*p.profile == PREFILL_STAGE);
        let picks = &prefill.unwrap_or(&result.primary).picks;
        let source = cycle.attributes.get(self.source).and_then(|s| s.first());
        let (Some(&source), Some(&computing)) = (source, picks.first()) else {
            return;
        };
        let matches = cycle.attributes.get(self.matches).unwrap_or_default();
        let at = |position: u32| matches.get(position as usize);
        let theirs = at(source).map_or(0, sendable_tokens);
        let own = at(computing).map_or(0, PrefixMatch::cached_tokens);
        let Some(candidate) = candidates.get(source as usize) else {
            return;
        };
        if source != computing && theirs >= own.saturating_add(self.min_delta) {
            outcome.set_header(SOURCE_HEADER, candidate.endpoint.host_port.clone());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scheduling::ProfilePicks;
    use crate::scheduling::test_support::{Pool, TestEndpoint, endpoint, refusal};

    /// The source for a request with this id that is decoded at 0 and, if given, prefilled elsewhere.
    fn source(
        parameters: &str,
        endpoints: &[TestEndpoint],
        id: &str,
        prefill: Option<(&str, u32)>,
    ) -> Option<String> {
        let mut pool = Pool::new(endpoints.iter().cloned());
        pool.request.id = id.to_owned();
        let producer: P2pSourceProducer = pool.plugin(parameters);
        let picks = |profile: &str, position| ProfilePicks {
            profile: profile.into(),
            picks: [position].into_iter().collect(),
        };
        let result = SchedulingResult {
            primary: picks("decode", 0),
            others: prefill.iter().map(|(name, p)| picks(name, *p)).collect(),
        };
        let mut outcome = Outcome::default();
        pool.with_cycle(|cycle, all| {
            let mut attributes = pool.keys.new_attributes();
            let found = cycle.attributes.get(producer.matches).unwrap().to_vec();
            attributes.write(producer.matches).extend(found);
            producer
                .produce(cycle.request, all, &mut attributes)
                .unwrap();
            let cycle = Cycle {
                attributes: &attributes,
                ..*cycle
            };
            producer.on_pick(&cycle, all, &result, &mut outcome);
        });
        let set = outcome.set_headers.first();
        set.map(|(name, value)| {
            assert_eq!(*name, SOURCE_HEADER);
            String::from_utf8(value.to_vec()).unwrap()
        })
    }

    #[test]
    fn the_hash_is_fnv_1a() {
        // Published test vectors.
        assert_eq!(fnv1a(""), 0x811c_9dc5);
        assert_eq!(fnv1a("a"), 0xe40c_292c);
        assert_eq!(fnv1a("foobar"), 0xbf9c_f968);
    }

    #[test]
    fn a_peer_with_more_is_the_source() {
        let held = |blocks: [u32; 3]| {
            ["a", "b", "c"]
                .iter()
                .zip(blocks)
                .map(|(name, blocks)| endpoint(name).matched_blocks(blocks))
                .collect::<Vec<_>>()
        };
        let c = Some("10.0.0.1:8002".to_owned());
        // Decode at a computes; only c is within 64 tokens of 9 * 64.
        assert_eq!(source("{}", &held([2, 7, 9]), "r", None), c);
        // c computes it itself, whatever its profile is called.
        assert_eq!(
            source("{}", &held([2, 7, 9]), "r", Some(("prefill", 2))),
            None
        );
        let named = r#"{"prefillProfileName": "p"}"#;
        assert_eq!(source(named, &held([2, 7, 9]), "r", Some(("p", 2))), None);
        // 9 * 64 - 7 * 64 = 128 tokens more.
        let delta = |n| format!(r#"{{"minCachedTokenDelta": {n}}}"#);
        let at_b = Some(("prefill", 1));
        assert_eq!(source(&delta(128), &held([2, 7, 9]), "r", at_b), c);
        assert_eq!(source(&delta(129), &held([2, 7, 9]), "r", at_b), None);
        assert_eq!(
            source("{}", &held([0, 0, 0]), "r", None),
            None,
            "nothing anywhere"
        );
    }

    #[test]
    fn host_memory_is_what_can_be_sent() {
        // a has all ten blocks, but in GPU memory only; b has six of them in host memory.
        let pool = [
            endpoint("d").matched_blocks(0),
            endpoint("a").matched_blocks(10).host_blocks(0),
            endpoint("b").matched_blocks(6).host_blocks(6),
        ];
        let b = Some("10.0.0.1:8002".to_owned());
        assert_eq!(source("{}", &pool, "r", None), b);
        // An endpoint that holds more in GPU memory needs nothing from there.
        assert_eq!(source("{}", &pool, "r", Some(("prefill", 1))), None);
    }

    #[test]
    fn the_request_id_and_the_queues_draw() {
        // Weights 1/(1+0) = 1 and 1/(1+3) = 0.25: b up to the coordinate 1/1.25 = 0.8, then c.
        // fnv1a("a") / 2^32 = 0.8908 and fnv1a("foobar") / 2^32 = 0.7485.
        let pool = [
            endpoint("d"),
            endpoint("b").matched_blocks(9),
            endpoint("c").matched_blocks(8).waiting(3),
        ];
        let at = |port: u16| Some(format!("10.0.0.1:{port}"));
        assert_eq!(source("{}", &pool, "a", None), at(8002));
        assert_eq!(source("{}", &pool, "foobar", None), at(8001));
    }

    #[test]
    fn the_delta_is_at_least_one() {
        let text = refusal::<P2pSourceProducer>(r#"{"minCachedTokenDelta": 0}"#);
        assert_eq!(text, "minCachedTokenDelta: 0 is not above 0");
    }
}
