//! Hit parity: does the engine find in its cache what the index said it holds?
//!
//! The index and an engine agree only while both see the same tokens, salt and adapter name. When that
//! breaks, nothing fails: prompts match too much or nothing at all, and requests go to the wrong places.
//! So each answer's `cached_tokens` is held against what was predicted for the picked endpoint:
//!
//! - *misses*: a prefix was predicted and the engine found none, or less than half. A salt or an adapter
//!   that the picker does not see does this.
//! - *more hits*: the engine found at least two blocks where less than half was predicted, and once the
//!   answer is there (and the engine must have stored the prompt) the index still does not hold what was
//!   hit. A chat template, a tokenizer, a salt or an adapter name that differs does this.
//!
//! [`BROKEN_AFTER`] of one kind in a row, for one endpoint, model, kind of prompt and salted or not, are
//! a broken parity; [`REPAIRED_AFTER`] agreements in a row end it. Answers that tell nothing (no prefix
//! predicted and none found, a block more or less, a prompt that another request was just storing, more
//! hits of an engine whose earlier events are gone) count for neither.
//!
//! An answer without a number is not compared: engines leave it out by API, by option, and in streams
//! whose client wants no usage. vLLM 0.32 writes a 0 wherever it tells at all; up to 0.22 it left a 0 out, so
//! there *misses* are only seen of prompts that were found in part.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;

use metrics::{Counter, Gauge};
use parking_lot::Mutex;
use serde_json::json;
use tokio::time::Instant;

use super::Keys;
use super::publishers::Publishers;
use crate::datalayer::{Endpoint, EndpointIndex};
use crate::kvcache::index::{KvIndex, Lookup};
use crate::plugin::{Lease, PromptUsage};
use crate::request::{ApiKind, InferenceRequest, Prompt};
use crate::telemetry::metrics::labels;

/// Answers of one kind in a row that make parity broken.
pub(super) const BROKEN_AFTER: u32 = 5;
/// Agreements in a row that make it whole again.
pub(super) const REPAIRED_AFTER: u32 = 3;
/// Compared answers that the gauge of an endpoint is over.
const WINDOW: usize = 32;
/// Model names told apart; further ones share a series.
const MAX_MODELS: usize = 256;
/// Name of models past [`MAX_MODELS`].
const OVERFLOW: &str = "other";
/// A block, where the index has not learned of one.
const ANY_BLOCK: u64 = 16;

/// How an answer compares.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    /// About as much was found as was predicted.
    Agree,
    /// Much less.
    Misses,
    /// Much more, of what the index does not hold.
    MoreHits,
    /// It tells nothing.
    Neutral,
}

/// In the order of metrics' `reason`.
const REASONS: [(&str, Verdict); 2] = [
    ("engine_misses", Verdict::Misses),
    ("engine_hits_more", Verdict::MoreHits),
];

/// Judges an answer. `held_now` is what the index holds of the prompt once the answer is there; it is
/// asked for only where it matters. All in tokens.
pub(super) fn judge(
    predicted: u64,
    found: u64,
    block: u64,
    held_now: impl FnOnce() -> u64,
) -> Verdict {
    let two = 2 * block;
    if predicted >= two && (found < block || predicted > found + two) && found < predicted / 2 {
        return Verdict::Misses;
    }
    if found >= two && (predicted < block || found > predicted + two) && predicted < found / 2 {
        return if held_now() + block < found {
            Verdict::MoreHits
        } else {
            // It was being stored when the endpoint was picked.
            Verdict::Neutral
        };
    }
    if predicted >= block && found >= block {
        Verdict::Agree
    } else {
        Verdict::Neutral
    }
}

/// What requests must have in common to stand for each other.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Class {
    model: Arc<str>,
    /// By which API, or as tokens: each way to the ids can break on its own.
    prompt: &'static str,
    salted: bool,
}

/// Answers of one class on one endpoint.
struct ClassState {
    /// Kind and number of the last answers in a row that were no agreement.
    streak: (Verdict, u32),
    agreed: u32,
    broken: Option<Verdict>,
    gauges: [Gauge; REASONS.len()],
}

/// Answers of one endpoint.
struct EndpointState {
    /// Predicted and found tokens of the last answers.
    window: VecDeque<(u64, u64)>,
    ratio: Gauge,
    predicted: Counter,
    found: Counter,
    compared: [Counter; 5],
    classes: HashMap<Class, ClassState>,
}

/// Results in the order of `EndpointState::compared`.
const RESULTS: [&str; 5] = [
    "agree",
    "engine_misses",
    "engine_hits_more",
    "neutral",
    "unreported",
];

/// Compares for all endpoints of an instance.
#[derive(Default)]
pub(super) struct Parity(Mutex<Inner>);

#[derive(Default)]
struct Inner {
    endpoints: HashMap<EndpointIndex, EndpointState>,
    models: HashSet<Arc<str>>,
}

impl std::fmt::Debug for Parity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Parity").finish_non_exhaustive()
    }
}

/// A prediction on its way to its answer.
pub(super) struct HitCheck {
    pub(super) parity: Arc<Parity>,
    pub(super) index: KvIndex,
    pub(super) publishers: Arc<Publishers>,
    pub(super) endpoint: Arc<Endpoint>,
    pub(super) keys: Option<Arc<Keys>>,
    pub(super) predicted_tokens: u64,
    /// `None` where only the engine knows how many tokens the media are.
    pub(super) own_prompt_tokens: Option<u64>,
    pub(super) model: String,
    pub(super) prompt: &'static str,
    pub(super) salted: bool,
}

impl std::fmt::Debug for HitCheck {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HitCheck")
            .field("predicted_tokens", &self.predicted_tokens)
            .finish_non_exhaustive()
    }
}

/// How a request's prompt becomes tokens: one value of a small set.
pub(super) fn prompt_kind(request: &InferenceRequest) -> &'static str {
    let prompts = &request.payload.prompts;
    if prompts.iter().all(|p| matches!(p, Prompt::Tokens { .. })) {
        return "tokens";
    }
    match request.payload.api {
        ApiKind::ChatCompletions => "chat",
        ApiKind::Messages => "messages",
        ApiKind::Responses => "responses",
        _ => "text",
    }
}

impl Lease for HitCheck {
    fn on_usage(&mut self, usage: PromptUsage) {
        if !self.endpoint.is_removed() {
            self.parity.compare(self, usage);
        }
    }
}

impl HitCheck {
    fn block(&self) -> u64 {
        let keys = self.keys.as_ref();
        keys.map_or(ANY_BLOCK, |keys| u64::from(keys.block_size))
    }

    /// Tokens of the prompts that events say the endpoint holds by now.
    fn held_now(&self) -> u64 {
        let Some(keys) = &self.keys else {
            return 0;
        };
        stored_tokens(&self.index, self.endpoint.index, keys)
    }
}

/// Tokens of the prompts that the endpoint stored, without what is only expected of it.
pub(super) fn stored_tokens(index: &KvIndex, endpoint: EndpointIndex, keys: &Keys) -> u64 {
    // No prediction outlives a year.
    let past_all_deadlines = Instant::now() + std::time::Duration::from_hours(24 * 365);
    let mut lookup = Lookup::new();
    let mut tokens = 0;
    for prompt in keys.prompts() {
        index.lookup(prompt, &[endpoint], past_all_deadlines, &mut lookup);
        let blocks = lookup.matches().first().map_or(0, |found| found.blocks);
        tokens += u64::from(blocks) * u64::from(keys.block_size);
    }
    tokens
}

impl Parity {
    fn compare(&self, check: &HitCheck, usage: PromptUsage) {
        let mut inner = self.0.lock();
        let Some(found) = usage.cached_tokens else {
            inner.endpoint(&check.endpoint).count("unreported");
            return;
        };
        let predicted = check.predicted_tokens;
        // Of a prompt with media the prediction is a lower bound.
        let found = match check.own_prompt_tokens {
            Some(_) => found,
            None => found.min(predicted),
        };
        let verdict = match judge(predicted, found, check.block(), || check.held_now()) {
            Verdict::MoreHits if !check.publishers.is_complete(&check.endpoint) => Verdict::Neutral,
            verdict => verdict,
        };
        let class = Class {
            model: inner.model(&check.model),
            prompt: check.prompt,
            salted: check.salted,
        };
        let endpoint = inner.endpoint(&check.endpoint);
        endpoint.add(predicted, found);
        endpoint.count(match verdict {
            Verdict::Agree => "agree",
            Verdict::Misses => "engine_misses",
            Verdict::MoreHits => "engine_hits_more",
            Verdict::Neutral => "neutral",
        });
        let name = check.endpoint.spec.name.as_str();
        let state = endpoint.classes.entry(class.clone());
        let state = state.or_insert_with(|| ClassState::new(name, &class));
        match state.on(verdict) {
            None => {}
            Some(Change::Broken) => tracing::warn!(
                endpoint = name,
                model = &*class.model,
                prompt = class.prompt,
                salted = class.salted,
                reason = reason(verdict),
                predicted_tokens = predicted,
                cached_tokens = found,
                prompt_tokens = check.own_prompt_tokens,
                engine_prompt_tokens = usage.prompt_tokens,
                suspect = suspect(check, usage),
                "KV hit parity is broken: the engine's cache does not hold what its events say of \
                 these prompts"
            ),
            Some(Change::Repaired) => tracing::info!(
                endpoint = name,
                model = &*class.model,
                prompt = class.prompt,
                salted = class.salted,
                "KV hit parity is whole again"
            ),
        }
    }

    /// An endpoint left the pool.
    pub(super) fn forget(&self, endpoint: EndpointIndex) {
        if let Some(state) = self.0.lock().endpoints.remove(&endpoint) {
            state.hush();
        }
    }

    /// Parity of an endpoint, and what is broken there.
    pub(super) fn overview(&self, endpoint: EndpointIndex) -> Option<(f64, serde_json::Value)> {
        let inner = self.0.lock();
        let state = inner.endpoints.get(&endpoint)?;
        let broken = state.classes.iter().filter_map(|(class, state)| {
            Some(json!({
                "model": &*class.model,
                "prompt": class.prompt,
                "salted": class.salted,
                "reason": reason(state.broken?),
            }))
        });
        Some((state.agreement(), broken.collect()))
    }
}

impl Drop for Parity {
    fn drop(&mut self) {
        for state in self.0.get_mut().endpoints.values() {
            state.hush();
        }
    }
}

impl Inner {
    fn model(&mut self, name: &str) -> Arc<str> {
        if let Some(known) = self.models.get(name) {
            return Arc::clone(known);
        }
        if self.models.len() >= MAX_MODELS {
            return OVERFLOW.into();
        }
        let name: Arc<str> = name.into();
        self.models.insert(Arc::clone(&name));
        name
    }

    fn endpoint(&mut self, endpoint: &Endpoint) -> &mut EndpointState {
        let state = self.endpoints.entry(endpoint.index);
        state.or_insert_with(|| EndpointState::new(&endpoint.spec.name))
    }
}

impl EndpointState {
    fn new(name: &str) -> Self {
        let own = ("endpoint_name", name);
        let counter = |name: &'static str| metrics::counter!(name, labels(&[own]));
        Self {
            window: VecDeque::with_capacity(WINDOW),
            ratio: metrics::gauge!("pinpod_kv_hit_parity", labels(&[own])),
            predicted: counter("pinpod_kv_hit_predicted_tokens_total"),
            found: counter("pinpod_kv_hit_reported_tokens_total"),
            compared: RESULTS.map(|result| {
                let list = labels(&[own, ("result", result)]);
                metrics::counter!("pinpod_kv_hit_compared_total", list)
            }),
            classes: HashMap::new(),
        }
    }

    fn count(&self, result: &str) {
        let named = RESULTS.iter().zip(&self.compared);
        for (_, counter) in named.filter(|(name, _)| **name == result) {
            counter.increment(1);
        }
    }

    fn add(&mut self, predicted: u64, found: u64) {
        self.predicted.increment(predicted);
        self.found.increment(found);
        if self.window.len() >= WINDOW {
            self.window.pop_front();
        }
        self.window.push_back((predicted, found));
        self.ratio.set(self.agreement());
    }

    /// What both sides have of what either has, over the window; 1 when there was nothing to find.
    fn agreement(&self) -> f64 {
        let sum = |of: fn(u64, u64) -> u64| -> u64 {
            let pairs = self.window.iter();
            pairs.map(|(predicted, found)| of(*predicted, *found)).sum()
        };
        let (both, either) = (sum(u64::min), sum(u64::max));
        if either == 0 {
            1.0
        } else {
            both as f64 / either as f64
        }
    }

    /// Takes back what would go on to raise alarms.
    fn hush(&self) {
        for gauge in self.classes.values().flat_map(|class| &class.gauges) {
            gauge.set(0.0);
        }
        self.ratio.set(1.0);
    }
}

enum Change {
    Broken,
    Repaired,
}

impl ClassState {
    fn new(endpoint: &str, class: &Class) -> Self {
        let state = Self {
            streak: (Verdict::Neutral, 0),
            agreed: 0,
            broken: None,
            gauges: REASONS.map(|(reason, _)| {
                let list = labels(&[
                    ("endpoint_name", endpoint),
                    ("model_name", &class.model),
                    ("prompt", class.prompt),
                    ("salted", if class.salted { "true" } else { "false" }),
                    ("reason", reason),
                ]);
                metrics::gauge!("pinpod_kv_hit_parity_broken", list)
            }),
        };
        state.show();
        state
    }

    fn show(&self) {
        for (gauge, (_, verdict)) in self.gauges.iter().zip(REASONS) {
            let broken = self.broken == Some(verdict);
            gauge.set(f64::from(u8::from(broken)));
        }
    }

    fn on(&mut self, verdict: Verdict) -> Option<Change> {
        match verdict {
            Verdict::Neutral => return None,
            Verdict::Agree => {
                self.streak.1 = 0;
                self.agreed += 1;
                if self.broken.is_none() || self.agreed < REPAIRED_AFTER {
                    return None;
                }
                self.broken = None;
            }
            Verdict::Misses | Verdict::MoreHits => {
                self.agreed = 0;
                if self.streak.0 != verdict {
                    self.streak = (verdict, 0);
                }
                self.streak.1 = self.streak.1.saturating_add(1);
                if self.broken == Some(verdict) || self.streak.1 < BROKEN_AFTER {
                    return None;
                }
                self.broken = Some(verdict);
            }
        }
        self.show();
        Some(if self.broken.is_some() {
            Change::Broken
        } else {
            Change::Repaired
        })
    }
}

fn reason(verdict: Verdict) -> &'static str {
    let known = REASONS.iter().find(|(_, other)| *other == verdict);
    known.map_or("", |(reason, _)| reason)
}

/// Where to look first.
fn suspect(check: &HitCheck, usage: PromptUsage) -> &'static str {
    // Anthropic's `input_tokens` are those that were not cached.
    let own = check
        .own_prompt_tokens
        .filter(|_| check.prompt != "messages");
    if own.is_some_and(|own| own != usage.prompt_tokens) {
        return "tokenizer or chat template: the engine counts other prompt tokens";
    }
    match check.prompt {
        _ if check.salted => "cache salt",
        "chat" | "messages" | "responses" => "adapter name or chat template",
        _ => "adapter name or tokenizer",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Blocks of 16 tokens; the index holds nothing afterwards.
    fn verdict(predicted: u64, found: u64) -> Verdict {
        judge(predicted, found, 16, || 0)
    }

    #[test]
    fn a_predicted_prefix_that_is_not_found_is_a_miss() {
        assert_eq!(verdict(160, 0), Verdict::Misses);
        assert_eq!(verdict(32, 0), Verdict::Misses);
        // Engines that draft tokens drop the last block.
        assert_eq!(verdict(16, 0), Verdict::Neutral);
        assert_eq!(verdict(160, 144), Verdict::Agree);
        assert_eq!(verdict(160, 80), Verdict::Agree, "half of it");
        assert_eq!(verdict(160, 64), Verdict::Misses, "less than half");
        assert_eq!(verdict(48, 16), Verdict::Agree, "two blocks less");
    }

    #[test]
    fn a_found_prefix_that_the_index_never_learns_of_is_one_hit_too_many() {
        assert_eq!(verdict(0, 160), Verdict::MoreHits);
        assert_eq!(verdict(0, 16), Verdict::Neutral);
        assert_eq!(verdict(16, 160), Verdict::MoreHits);
        assert_eq!(verdict(144, 160), Verdict::Agree);
        // Another request stored it meanwhile: 160 tokens are there now, or all but the last block.
        assert_eq!(judge(0, 160, 16, || 160), Verdict::Neutral);
        assert_eq!(judge(0, 160, 16, || 144), Verdict::Neutral);
        assert_eq!(judge(0, 160, 16, || 128), Verdict::MoreHits);
    }

    #[test]
    fn nothing_predicted_and_nothing_found_says_nothing() {
        assert_eq!(verdict(0, 0), Verdict::Neutral);
    }

    fn class(state: &mut ClassState, verdicts: &[Verdict]) -> Option<Verdict> {
        for verdict in verdicts {
            state.on(*verdict);
        }
        state.broken
    }

    #[test]
    fn five_in_a_row_break_it_and_three_agreements_repair_it() {
        use Verdict::{Agree, Misses, MoreHits, Neutral};
        let new = || {
            ClassState::new(
                "e",
                &Class {
                    model: "m".into(),
                    prompt: "chat",
                    salted: false,
                },
            )
        };
        let mut state = new();
        assert_eq!(class(&mut state, &[Misses; 4]), None);
        assert_eq!(class(&mut state, &[Neutral, Misses]), Some(Misses));
        assert_eq!(class(&mut state, &[Agree, Agree, Misses]), Some(Misses));
        assert_eq!(class(&mut state, &[Agree, Agree]), Some(Misses));
        assert_eq!(class(&mut state, &[Agree]), None);
        // An agreement, or the other kind, begins the row anew.
        let mut state = new();
        let broken = [
            Misses, Misses, Agree, Misses, Misses, Misses, Misses, MoreHits,
        ];
        assert_eq!(class(&mut state, &broken), None);
        assert_eq!(class(&mut state, &[MoreHits; 4]), Some(MoreHits));
    }

    #[test]
    fn models_past_the_bound_share_a_name() {
        let mut inner = Inner::default();
        for number in 0..MAX_MODELS {
            let name = format!("m{number}");
            assert_eq!(&*inner.model(&name), name);
        }
        assert_eq!(&*inner.model("one more"), OVERFLOW);
        assert_eq!(&*inner.model("m7"), "m7");
        assert_eq!(inner.models.len(), MAX_MODELS);
    }
}
