//! Choosing the prefill and the decode endpoint of a request together, by one cost.
//!
//! In milliseconds, for prefill on `p` and decode on `d`:
//!
//! ```text
//! cost(p, d) = 1000 * (in_flight_tokens(p) + prompt - cached(p)) / prefillTokensPerSecond
//!            + transferMsPer1kTokens[shared(p, d)] * (prompt - cached(d)) / 1000
//!            + decodeMsPerRequest * in_flight_requests(d)
//! ```
//!
//! Tokens in flight are the uncached prompt tokens that were sent to `p` and are not computed yet, so the
//! first term is the wait for the prompts before this one and its own computation. The second is the time
//! to bring over what `d` does not hold. A decode endpoint that the decider would not disaggregate
//! computes the prompt itself: the first term with `d` for `p`, and nothing to transfer.

use std::sync::Arc;

use serde::Deserialize;
use smallvec::SmallVec;
use xxhash_rust::xxh3::xxh3_64;

use crate::datalayer::extractors::Topology;
use crate::plugin::{Build, Column, InFlightSlot, ParamError, PluginError};
use crate::scheduling::attributes::{
    IN_FLIGHT, IN_FLIGHT_PRODUCER, TOKEN_PRODUCER, TOKENIZED_PROMPT,
};
use crate::scheduling::topology::Places;
use crate::scheduling::{Candidate, Decider, Round, Scored};

/// Endpoints of a kind that are compared with those of the other: the pairs are its square.
const MAX_SIDE: usize = 64;

/// The parameter `pairing`; there is none without it.
#[derive(Debug, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub(super) struct Settings {
    prefill_tokens_per_second: f64,
    decode_ms_per_request: f64,
    #[serde(rename = "transferMsPer1kTokens")]
    transfer_ms_per_1k_tokens: Transfer,
    topology_producer_name: String,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            // The throughput that the cache affinity filter assumes, too: two H100 with a 32B model.
            prefill_tokens_per_second: 15_928.0,
            decode_ms_per_request: 10.0,
            transfer_ms_per_1k_tokens: Transfer::default(),
            topology_producer_name: String::new(),
        }
    }
}

/// Milliseconds for a thousand tokens of KV cache, by what both endpoints share. The defaults are 330 MB,
/// as a 70B model has it, over NVLink, 400 Gb/s, 100 Gb/s and 25 Gb/s.
#[derive(Debug, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
struct Transfer {
    host: f64,
    rack: f64,
    zone: f64,
    region: f64,
    other: f64,
    unknown: f64,
}

impl Default for Transfer {
    fn default() -> Self {
        Self {
            host: 2.0,
            rack: 7.0,
            zone: 25.0,
            region: 110.0,
            other: 110.0,
            unknown: 10.0,
        }
    }
}

/// Weighs every prefill endpoint with every decode endpoint.
#[derive(Debug)]
pub(super) struct Pairing {
    tokens: Column<u64>,
    slot: InFlightSlot,
    places: Option<Places>,
    prefill_ms_per_token: f64,
    decode_ms_per_request: f64,
    /// By shared level, then nothing shared.
    transfer_ms_per_token: [f64; 5],
    unknown_ms_per_token: f64,
    prefill_endpoints: usize,
}

/// What was chosen: positions of candidates.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Choice {
    pub(super) decode: u32,
    /// The cheapest for that decode endpoint first; empty when it computes the prompt itself.
    pub(super) prefill: SmallVec<[u32; 4]>,
}

/// Host, rack, zone and region as numbers; 0 is unknown.
type Place = [u64; 4];

/// An endpoint of either kind, with the part of the cost that is its own.
#[derive(Debug)]
struct Side {
    position: u32,
    own_ms: f64,
    place: Option<Place>,
}

fn not_negative(field: &str, value: f64) -> Result<f64, ParamError> {
    if value >= 0.0 && value.is_finite() {
        Ok(value)
    } else {
        Err(ParamError(format!("pairing.{field}: {value} is below 0")))
    }
}

impl Pairing {
    pub(super) fn new(
        settings: &Settings,
        prefill_endpoints: usize,
        build: &mut Build<'_>,
    ) -> Result<Self, PluginError> {
        let rate = settings.prefill_tokens_per_second;
        if not_negative("prefillTokensPerSecond", rate)? == 0.0 {
            let text = "pairing.prefillTokensPerSecond: 0 is not above 0";
            return Err(ParamError(text.to_owned()).into());
        }
        let transfer = &settings.transfer_ms_per_1k_tokens;
        let per_token = |name: &str, ms: f64| {
            not_negative(&format!("transferMsPer1kTokens.{name}"), ms).map(|ms| ms / 1000.0)
        };
        build.keys.require::<()>(IN_FLIGHT, IN_FLIGHT_PRODUCER);
        let places = match settings.topology_producer_name.as_str() {
            "" => None,
            name => Some(Places::optional(build, name)?),
        };
        Ok(Self {
            tokens: build.keys.require(TOKENIZED_PROMPT, TOKEN_PRODUCER),
            slot: build.keys.in_flight(IN_FLIGHT_PRODUCER)?,
            places,
            prefill_ms_per_token: 1000.0 / rate,
            decode_ms_per_request: not_negative(
                "decodeMsPerRequest",
                settings.decode_ms_per_request,
            )?,
            transfer_ms_per_token: [
                per_token("host", transfer.host)?,
                per_token("rack", transfer.rack)?,
                per_token("zone", transfer.zone)?,
                per_token("region", transfer.region)?,
                per_token("other", transfer.other)?,
            ],
            unknown_ms_per_token: per_token("unknown", transfer.unknown)?,
            prefill_endpoints,
        })
    }

    /// The cheapest choice among what the filters of the prefill and the decode profile left; equal ones
    /// by lot. `None` when there is no decode endpoint. O(prefill * decode), at most [`MAX_SIDE`] each.
    pub(super) fn choose(
        &self,
        round: &Round<'_>,
        decider: &dyn Decider,
        (prefill, decode): (&[Scored], &[Scored]),
    ) -> Option<Choice> {
        let prompts = round.cycle.attributes.get(self.tokens).unwrap_or_default();
        let tokens: u64 = prompts.iter().sum();
        let missing = |position: u32| {
            let found = round.prefix_match(position).unwrap_or_default();
            tokens.saturating_sub(found.cached_tokens()) as f64
        };
        let prefills = self.sides(round, prefill, |candidate, position| {
            self.prefill_ms(candidate, missing(position))
        });
        let decodes = self.sides(round, decode, |candidate, _| {
            let requests = candidate.endpoint.in_flight(self.slot).requests();
            self.decode_ms_per_request * requests as f64
        });
        let mut best = Best::default();
        for d in &decodes {
            let missing = missing(d.position);
            if prefills.is_empty() || !decider.wants_stage(round, Some(d.position)) {
                let candidate = round.candidates.get(d.position as usize)?;
                let cost = d.own_ms + self.prefill_ms(candidate, missing);
                best.offer(round, cost, (d.position, None));
                continue;
            }
            for p in &prefills {
                let cost = p.own_ms + d.own_ms + self.transfer_ms(p, d) * missing;
                best.offer(round, cost, (d.position, Some(p.position)));
            }
        }
        let (decode, first) = best.choice?;
        let mut choice = Choice {
            decode,
            prefill: SmallVec::new(),
        };
        if let Some(first) = first.filter(|first| *first != decode) {
            choice.prefill.push(first);
            let decode = decodes.iter().find(|d| d.position == decode)?;
            self.add_fallbacks(&prefills, decode, missing(decode.position), &mut choice);
        }
        Some(choice)
    }

    /// The endpoints with their own costs; past the bound only those with the least.
    fn sides(
        &self,
        round: &Round<'_>,
        scored: &[Scored],
        own_ms: impl Fn(&Candidate, u32) -> f64,
    ) -> SmallVec<[Side; MAX_SIDE]> {
        let mut sides: SmallVec<[Side; MAX_SIDE]> = scored
            .iter()
            .filter_map(|scored| {
                let candidate = round.candidates.get(scored.position as usize)?;
                Some(Side {
                    position: scored.position,
                    own_ms: own_ms(candidate, scored.position),
                    place: None,
                })
            })
            .collect();
        if sides.len() > MAX_SIDE {
            sides.select_nth_unstable_by(MAX_SIDE - 1, |a, b| a.own_ms.total_cmp(&b.own_ms));
            sides.truncate(MAX_SIDE);
        }
        if let Some(places) = &self.places {
            for side in &mut sides {
                let candidate = round.candidates.get(side.position as usize);
                side.place = candidate
                    .and_then(|candidate| places.of(candidate))
                    .map(|topology| place(&topology));
            }
        }
        sides
    }

    fn prefill_ms(&self, candidate: &Candidate, missing_tokens: f64) -> f64 {
        let waiting = candidate.endpoint.in_flight(self.slot).tokens() as f64;
        self.prefill_ms_per_token * (waiting + missing_tokens)
    }

    /// For each token that has to be brought over; nothing to itself.
    fn transfer_ms(&self, prefill: &Side, decode: &Side) -> f64 {
        if prefill.position == decode.position {
            return 0.0;
        }
        let (Some(a), Some(b)) = (prefill.place, decode.place) else {
            return self.unknown_ms_per_token;
        };
        let shared = a.iter().zip(&b).position(|(a, b)| *a != 0 && a == b);
        let level = shared.unwrap_or(self.transfer_ms_per_token.len() - 1);
        let ms = self.transfer_ms_per_token.get(level);
        ms.copied().unwrap_or(self.unknown_ms_per_token)
    }

    /// The next cheapest for the decode endpoint.
    fn add_fallbacks(&self, prefills: &[Side], decode: &Side, missing: f64, choice: &mut Choice) {
        if self.prefill_endpoints <= choice.prefill.len() {
            return;
        }
        let mut rest: SmallVec<[(f64, u32); MAX_SIDE]> = prefills
            .iter()
            .filter(|p| p.position != decode.position && !choice.prefill.contains(&p.position))
            .map(|p| (p.own_ms + self.transfer_ms(p, decode) * missing, p.position))
            .collect();
        rest.sort_by(|a, b| a.0.total_cmp(&b.0));
        let wanted = self.prefill_endpoints - choice.prefill.len();
        choice.prefill.extend(rest.iter().take(wanted).map(|r| r.1));
    }
}

/// The cheapest so far.
#[derive(Debug, Default)]
struct Best {
    choice: Option<(u32, Option<u32>)>,
    cost: f64,
    equals: u32,
}

impl Best {
    /// Keeps the cheaper one; each of several equal ones with the same probability.
    fn offer(&mut self, round: &Round<'_>, cost: f64, choice: (u32, Option<u32>)) {
        if self.choice.is_none() || cost < self.cost {
            *self = Self {
                choice: Some(choice),
                cost,
                equals: 1,
            };
        } else if cost == self.cost {
            self.equals += 1;
            if round.cycle.rng.borrow_mut().u32(..self.equals) == 0 {
                self.choice = Some(choice);
            }
        }
    }
}

fn place(topology: &Arc<Topology>) -> Place {
    let number = |name: &Option<String>| name.as_ref().map_or(0, |n| xxh3_64(n.as_bytes()).max(1));
    [
        number(&topology.host),
        number(&topology.rack),
        number(&topology.zone),
        number(&topology.region),
    ]
}

#[cfg(test)]
#[path = "pairing/tests.rs"]
mod tests;
