//! `inflight-load-producer`: what was sent to each endpoint and is not answered yet.

use std::sync::Arc;

use serde::Deserialize;
use smallvec::SmallVec;

use crate::datalayer::Endpoint;
use crate::plugin::{
    Attributes, Build, Column, InFlightSlot, Lease, Maturity, ParamDoc, ParamError, Plugin,
    PluginError,
};
use crate::request::InferenceRequest;
use crate::scheduling::attributes::{
    APPROX_PREFIX_PRODUCER, IN_FLIGHT, IN_FLIGHT_PRODUCER, PREFIX_MATCH, PrefixMatch,
    TOKEN_PRODUCER, TOKENIZED_PROMPT, UNCACHED_TOKENS, producer_or,
};
use crate::scheduling::{
    Candidate, Cycle, DataProducer, Outcome, PreRequest, ProducerError, SchedulingResult,
};
use crate::telemetry::metrics::{InFlightGauges, InFlightSeries};

/// Books each pick on its endpoint at once and releases it exactly once, by a guard.
///
/// Tokens are the prompt's uncached ones on that endpoint, `max(0, total - matched) * block + max(0,
/// input - total * block)`, or all of them without prefix information; with
/// `addEstimatedOutputTokens` also `min(round(input * outputRatio), client limit, cap)`.
/// Released: tokens at the first response byte (output excluded), the rest when the request ends. Where the
/// proxy reports that another of the picks answers, it is booked there from then on.
#[derive(Debug)]
pub struct InFlightLoadProducer {
    slot: InFlightSlot,
    uncached: Column<u64>,
    tokens: Column<u64>,
    matches: Column<PrefixMatch>,
    output: Option<OutputEstimate>,
    name: String,
    series: Arc<InFlightSeries>,
}

#[derive(Debug)]
struct OutputEstimate {
    ratio: f64,
    cap: Option<u64>,
}

#[derive(Debug, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
struct Settings {
    add_estimated_output_tokens: bool,
    output_ratio: f64,
    max_estimated_output_tokens: Option<i64>,
    prefix_match_info_producer_name: String,
    sync_cross_replica_state: bool,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            add_estimated_output_tokens: false,
            output_ratio: 1.5,
            max_estimated_output_tokens: None,
            prefix_match_info_producer_name: String::new(),
            sync_cross_replica_state: true,
        }
    }
}

impl Plugin for InFlightLoadProducer {
    const TYPE: &'static str = IN_FLIGHT_PRODUCER;
    const MATURITY: Maturity = Maturity::Beta;
    const PARAMETERS: &'static [ParamDoc] = &[
        ParamDoc {
            name: "addEstimatedOutputTokens",
            kind: "bool",
            default: "false",
            help: "Book expected output tokens too, until the request ends.",
        },
        ParamDoc {
            name: "outputRatio",
            kind: "float",
            default: "1.5",
            help: "Expected output tokens per input token; at least 0.",
        },
        ParamDoc {
            name: "maxEstimatedOutputTokens",
            kind: "int",
            default: "none",
            help: "Upper bound of the estimate; at least 0.",
        },
        ParamDoc {
            name: "prefixMatchInfoProducerName",
            kind: "string",
            default: "approx-prefix-cache-producer",
            help: "Instance that says how much of the prefix each endpoint holds.",
        },
        ParamDoc {
            name: "syncCrossReplicaState",
            kind: "bool",
            default: "true",
            help: "Share counts with other replicas; has no effect yet.",
        },
    ];
    const ABOUT: &'static str = "Counts requests and uncached tokens in flight per endpoint.";

    fn build(build: &mut Build<'_>) -> Result<Self, PluginError> {
        let settings: Settings = build.read::<Self, _>()?;
        if settings.output_ratio < 0.0 {
            return Err(
                ParamError(format!("outputRatio: {} is below 0", settings.output_ratio)).into(),
            );
        }
        let cap =
            match settings.max_estimated_output_tokens {
                None => None,
                Some(cap) => Some(u64::try_from(cap).map_err(|_| {
                    ParamError(format!("maxEstimatedOutputTokens: {cap} is below 0"))
                })?),
            };
        let prefix = producer_or(
            &settings.prefix_match_info_producer_name,
            APPROX_PREFIX_PRODUCER,
        );
        build.keys.produce::<()>(IN_FLIGHT);
        Ok(Self {
            name: build.name.to_owned(),
            series: InFlightSeries::registered(),
            slot: build.keys.in_flight(build.name)?,
            uncached: build.keys.produce(UNCACHED_TOKENS),
            tokens: build.keys.require(TOKENIZED_PROMPT, TOKEN_PRODUCER),
            matches: build.keys.optional(PREFIX_MATCH, prefix),
            output: settings
                .add_estimated_output_tokens
                .then_some(OutputEstimate {
                    ratio: settings.output_ratio,
                    cap,
                }),
        })
    }
}

impl OutputEstimate {
    fn tokens(&self, input: u64, request: &InferenceRequest) -> u64 {
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "a float cast saturates"
        )]
        let estimate = (input as f64 * self.ratio).round() as u64;
        let limit = request.payload.max_output_tokens.unwrap_or(u64::MAX);
        estimate.min(limit).min(self.cap.unwrap_or(u64::MAX))
    }
}

fn uncached_tokens(input: u64, found: Option<&PrefixMatch>) -> u64 {
    let Some(found) = found else { return input };
    let block = u64::from(found.block_size_tokens);
    let missing = u64::from(found.total_blocks.saturating_sub(found.matched_blocks)) * block;
    missing + input.saturating_sub(u64::from(found.total_blocks) * block)
}

impl DataProducer for InFlightLoadProducer {
    fn produce(
        &self,
        _: &InferenceRequest,
        candidates: &[Candidate],
        attributes: &mut Attributes,
    ) -> Result<(), ProducerError> {
        let input: u64 = attributes.get(self.tokens).unwrap_or_default().iter().sum();
        // Taken out while the match is read, so that its memory is kept.
        let mut uncached = std::mem::take(attributes.write(self.uncached));
        let matches = attributes.get(self.matches);
        uncached.extend(
            (0..candidates.len())
                .map(|position| uncached_tokens(input, matches.and_then(|m| m.get(position)))),
        );
        *attributes.write(self.uncached) = uncached;
        Ok(())
    }
}

impl PreRequest for InFlightLoadProducer {
    /// Books one request and its tokens on the first pick of every profile.
    fn on_pick(
        &self,
        cycle: &Cycle<'_>,
        candidates: &[Candidate],
        result: &SchedulingResult,
        outcome: &mut Outcome,
    ) {
        let input: u64 = cycle
            .attributes
            .get(self.tokens)
            .unwrap_or_default()
            .iter()
            .sum();
        let output = self
            .output
            .as_ref()
            .map_or(0, |estimate| estimate.tokens(input, cycle.request));
        let uncached = cycle.attributes.get(self.uncached).unwrap_or_default();
        let mut bookings = SmallVec::new();
        for profile in result.profiles() {
            let Some(&position) = profile.picks.first() else {
                continue;
            };
            let Some(candidate) = candidates.get(position as usize) else {
                continue;
            };
            let own = uncached.get(position as usize).copied().unwrap_or(input);
            let tokens = i64::try_from(own.saturating_add(output)).unwrap_or(i64::MAX / 2);
            candidate.endpoint.in_flight(self.slot).book(1, tokens);
            let (request, spec) = (cycle.request, &candidate.endpoint.spec);
            let gauges = self.series.gauges(
                (&spec.name, &spec.namespace),
                &self.name,
                &request.fairness_id,
                request.priority,
            );
            gauges.add(1, tokens);
            bookings.push(Booking {
                endpoint: Arc::clone(&candidate.endpoint),
                gauges,
                requests: 1,
                tokens,
                prefill: &*profile.profile == "prefill",
            });
        }
        let fallbacks = result.primary.picks.iter().skip(1);
        let fallbacks = fallbacks.filter_map(|&position| candidates.get(position as usize));
        outcome.leases.push(Box::new(InFlightGuard {
            slot: self.slot,
            series: Arc::clone(&self.series),
            bookings,
            fallbacks: fallbacks.map(|c| Arc::clone(&c.endpoint)).collect(),
            output_included: self.output.is_some(),
            first_chunk_seen: false,
        }));
    }
}

/// What one request booked; releases the rest of it when dropped.
#[derive(Debug)]
struct InFlightGuard {
    slot: InFlightSlot,
    series: Arc<InFlightSeries>,
    /// The primary profile's first.
    bookings: SmallVec<[Booking; 1]>,
    /// The primary profile's picks behind the first.
    fallbacks: SmallVec<[Arc<Endpoint>; 1]>,
    output_included: bool,
    first_chunk_seen: bool,
}

#[derive(Debug)]
struct Booking {
    endpoint: Arc<Endpoint>,
    gauges: Arc<InFlightGauges>,
    requests: i64,
    tokens: i64,
    prefill: bool,
}

impl Booking {
    fn release(&self, slot: InFlightSlot, requests: i64, tokens: i64) {
        self.endpoint.in_flight(slot).release(requests, tokens);
        self.gauges.add(-requests, -tokens);
    }
}

impl Lease for InFlightGuard {
    fn on_served_by(&mut self, rank: usize) {
        let served = rank.checked_sub(1).and_then(|at| self.fallbacks.get(at));
        let (Some(served), Some(booking)) = (served, self.bookings.first_mut()) else {
            return;
        };
        booking.release(self.slot, booking.requests, booking.tokens);
        let (name, namespace) = (&served.spec.name, &served.spec.namespace);
        booking.gauges = self.series.same_flow(&booking.gauges, (name, namespace));
        booking.endpoint = Arc::clone(served);
        let (requests, tokens) = (booking.requests, booking.tokens);
        booking.endpoint.in_flight(self.slot).book(requests, tokens);
        booking.gauges.add(requests, tokens);
    }

    /// The prompt is computed: its tokens no longer wait, and a prefill endpoint is done.
    fn on_first_chunk(&mut self) {
        if std::mem::replace(&mut self.first_chunk_seen, true) {
            return;
        }
        for booking in &mut self.bookings {
            let requests = if booking.prefill {
                std::mem::take(&mut booking.requests)
            } else {
                0
            };
            let all = booking.prefill || !self.output_included;
            let tokens = if all {
                std::mem::take(&mut booking.tokens)
            } else {
                0
            };
            booking.release(self.slot, requests, tokens);
        }
    }
}

impl Drop for InFlightGuard {
    fn drop(&mut self) {
        for booking in &self.bookings {
            booking.release(self.slot, booking.requests, booking.tokens);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plugin::DataKeys;
    use crate::scheduling::ProfilePicks;
    use crate::scheduling::test_support::{Pool, endpoint};

    fn result(profiles: &[(&str, u32)]) -> SchedulingResult {
        let mut picks = profiles.iter().map(|(name, p)| ProfilePicks {
            profile: (*name).into(),
            picks: [*p].into_iter().collect(),
        });
        SchedulingResult {
            primary: picks.next().unwrap(),
            others: picks.collect(),
        }
    }

    fn load(pool: &Pool, position: usize) -> (i64, i64) {
        let slot = DataKeys::default().in_flight(IN_FLIGHT_PRODUCER).unwrap();
        let load = pool.candidates[position].endpoint.in_flight(slot);
        (load.requests(), load.tokens())
    }

    #[test]
    fn uncached_tokens_follow_the_formula() {
        let found = |matched, total| PrefixMatch {
            matched_blocks: matched,
            total_blocks: total,
            block_size_tokens: 64,
            ..PrefixMatch::default()
        };
        assert_eq!(uncached_tokens(700, None), 700);
        // (10 - 4) * 64 + max(0, 700 - 640) = 384 + 60.
        assert_eq!(uncached_tokens(700, Some(&found(4, 10))), 444);
        // A partial last block counts whole: (11 - 0) * 64 + max(0, 700 - 704).
        assert_eq!(uncached_tokens(700, Some(&found(0, 11))), 704);
        assert_eq!(uncached_tokens(700, Some(&found(11, 11))), 0);
    }

    #[test]
    fn a_pick_is_booked_at_once_and_released_once() {
        let mut pool = Pool::new([endpoint("a"), endpoint("b").uncached(500)]);
        let producer: InFlightLoadProducer = pool.plugin("{}");
        let mut outcome = Outcome::default();
        pool.with_cycle(|cycle, all| {
            producer.on_pick(cycle, all, &result(&[("default", 1)]), &mut outcome);
        });
        assert_eq!(load(&pool, 1), (1, 500));
        outcome.leases.on_first_chunk();
        outcome.leases.on_first_chunk();
        assert_eq!(load(&pool, 1), (1, 0));
        outcome.leases.release();
        drop(outcome);
        assert_eq!(load(&pool, 1), (0, 0));
    }

    #[test]
    fn a_prefill_endpoint_is_done_at_the_first_byte_and_output_stays_booked() {
        let mut pool = Pool::new([endpoint("d").uncached(10), endpoint("p").uncached(20)]);
        pool.request.payload.max_output_tokens = Some(7);
        let producer: InFlightLoadProducer =
            pool.plugin(r#"{"addEstimatedOutputTokens": true, "outputRatio": 1000}"#);
        let mut outcome = Outcome::default();
        pool.with_cycle(|cycle, all| {
            producer.on_pick(
                cycle,
                all,
                &result(&[("decode", 0), ("prefill", 1)]),
                &mut outcome,
            );
        });
        // No tokens are known, so the estimate is 0 * 1000 = 0 output tokens.
        assert_eq!((load(&pool, 0), load(&pool, 1)), ((1, 10), (1, 20)));
        outcome.leases.on_first_chunk();
        assert_eq!((load(&pool, 0), load(&pool, 1)), ((1, 10), (0, 0)));
        drop(outcome);
        assert_eq!((load(&pool, 0), load(&pool, 1)), ((0, 0), (0, 0)));
    }

    #[test]
    fn a_request_that_another_pick_answers_is_booked_there() {
        let mut pool = Pool::new([endpoint("a"), endpoint("b"), endpoint("c").uncached(30)]);
        let producer: InFlightLoadProducer = pool.plugin("{}");
        let mut outcome = Outcome::default();
        let mut result = result(&[("default", 2)]);
        result.primary.picks.extend([0, 1]);
        pool.with_cycle(|cycle, all| producer.on_pick(cycle, all, &result, &mut outcome));
        let loads = |pool: &Pool| [load(pool, 0), load(pool, 1), load(pool, 2)];
        assert_eq!(loads(&pool), [(0, 0), (0, 0), (1, 30)]);
        outcome.leases.on_served_by(0);
        outcome.leases.on_served_by(3);
        assert_eq!(loads(&pool), [(0, 0), (0, 0), (1, 30)]);
        outcome.leases.on_served_by(2);
        assert_eq!(loads(&pool), [(0, 0), (1, 30), (0, 0)]);
        outcome.leases.on_first_chunk();
        assert_eq!(loads(&pool), [(0, 0), (1, 0), (0, 0)]);
        drop(outcome);
        assert_eq!(loads(&pool), [(0, 0); 3]);
    }

    #[test]
    fn the_output_estimate_is_bounded_by_client_and_cap() {
        let mut pool = Pool::new([]);
        let estimate = |cap| OutputEstimate { ratio: 1.5, cap };
        assert_eq!(
            estimate(None).tokens(101, &pool.request),
            152,
            "151.5 rounds up"
        );
        assert_eq!(estimate(Some(100)).tokens(101, &pool.request), 100);
        pool.request.payload.max_output_tokens = Some(5);
        assert_eq!(estimate(Some(100)).tokens(101, &pool.request), 5);
    }
}
