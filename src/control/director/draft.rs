//! A decision on its way: producers, admitters, profiles and hooks of one request.

use std::any::Any;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use tokio::time::Instant;

use super::{ActiveConfig, Workspace};
use crate::control::RequestError;
use crate::control::candidates::Lent;
use crate::control::intake::{RequestId, wants_cached_prefix};
use crate::plugin::{Attributes, Column, Hook, Lap};
use crate::request::InferenceRequest;
use crate::scheduling::attributes::PrefixMatch;
use crate::scheduling::{
    Candidate, Cycle, Outcome, Preparation, ProducerError, SchedulingResult, Screener,
};

/// A decision that waits for a data producer. It keeps the configuration it began with.
pub struct Waiting {
    pub(super) draft: Draft,
    pub(super) work: Work,
}

/// What a producer's preparation ended with.
pub(super) type Prepared = Box<dyn Any + Send>;
/// A preparation under its timeout.
pub(super) type Work = Pin<Box<dyn Future<Output = Result<Prepared, ProducerError>> + Send>>;

impl std::fmt::Debug for Waiting {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Waiting")
            .field("draft", &self.draft)
            .finish_non_exhaustive()
    }
}

impl Waiting {
    /// Ready when the producer is done or out of time. Poll again only after `Pending`.
    pub fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<Prepared, ProducerError>> {
        self.work.as_mut().poll(cx)
    }
}

/// A decision on its way: the request and what is known so far.
#[derive(Debug)]
pub(super) struct Draft {
    pub(super) config: Arc<ActiveConfig>,
    pub(super) request: InferenceRequest,
    pub(super) id: RequestId,
    pub(super) received_at: Instant,
    pub(super) candidates: Lent,
    pub(super) attributes: Attributes,
    /// Producers that are done.
    pub(super) produced: usize,
}

impl Draft {
    /// Runs producers until all are done or one has to wait.
    pub(super) fn produce(&mut self) -> Option<Work> {
        let mut lap = Lap::start();
        while let Some(producer) = self.config.producers.get(self.produced) {
            let (request, candidates) = (&self.request, &self.candidates.list);
            let attributes = &mut self.attributes;
            if let Some(preparation) = producer.plugin.prepare(request, candidates, attributes) {
                return Some(Box::pin(in_time(preparation)));
            }
            let result = producer.timed_after(&mut lap, |plugin| {
                plugin.produce(request, candidates, attributes)
            });
            self.settle(&result);
        }
        None
    }

    /// Takes what the producer that had to wait has prepared.
    pub(super) fn take(&mut self, prepared: Result<Prepared, ProducerError>) {
        let Some(producer) = self.config.producers.get(self.produced) else {
            return;
        };
        let (request, candidates) = (&self.request, &self.candidates.list);
        let attributes = &mut self.attributes;
        let result = producer
            .timed(|plugin| plugin.produce_prepared(prepared?, request, candidates, attributes));
        self.settle(&result);
    }

    /// Goes on to the next producer; after one that failed there is none.
    fn settle(&mut self, result: &Result<(), ProducerError>) {
        let producers = &self.config.producers;
        if let (Err(error), Some(failed)) = (result, producers.get(self.produced)) {
            let producer = &*failed.name.name;
            tracing::warn!(producer, %error, "data producer failed, the rest is skipped");
            self.produced = producers.len();
        } else {
            self.produced += 1;
        }
    }

    /// Admitters, profiles, hooks.
    pub(super) fn pick(
        &self,
        workspace: &mut Workspace,
    ) -> Result<(SchedulingResult, Outcome), RequestError> {
        let Draft {
            config,
            request,
            candidates,
            attributes,
            ..
        } = self;
        let candidates = &candidates.list;
        let cycle = Cycle {
            request,
            attributes,
            now: Instant::now(),
            rng: &workspace.rng,
        };
        for hook in &config.admitters {
            hook.timed(|plugin| plugin.admit(&cycle, candidates))?;
        }
        let result = config
            .scheduler
            .schedule(&cycle, candidates, &mut workspace.scratch)?;
        if wants_cached_prefix(&request.headers)
            && !holds_prefix(&config.prefix_matches, attributes, &result)
        {
            return Err(RequestError::NoCachedPrefix);
        }
        let mut outcome = Outcome::default();
        let mut lap = Lap::start();
        for hook in &config.pre_request {
            hook.timed_after(&mut lap, |plugin| {
                plugin.on_pick(&cycle, candidates, &result, &mut outcome);
            });
        }
        Ok((result, outcome))
    }
}

pub(super) async fn in_time(preparation: Preparation) -> Result<Prepared, ProducerError> {
    let Preparation { work, timeout } = preparation;
    tokio::time::timeout(timeout, work)
        .await
        .map_err(|_| ProducerError(format!("not ready within {timeout:?}")))
}

/// Keeps the candidates that every screener keeps.
pub(super) fn screen(
    screeners: &[Hook<dyn Screener>],
    cycle: &Cycle<'_>,
    candidates: &mut Vec<Candidate>,
    keep: &mut Vec<u32>,
) {
    // Each sees the full list, so the verdicts are collected before anything is dropped.
    let mut kept_by = vec![0usize; candidates.len()];
    for hook in screeners {
        keep.clear();
        hook.timed(|plugin| plugin.screen(cycle, candidates, keep));
        keep.sort_unstable();
        keep.dedup();
        for &position in keep.iter() {
            if let Some(count) = kept_by.get_mut(position as usize) {
                *count += 1;
            }
        }
    }
    let mut counts = kept_by.into_iter();
    candidates.retain(|_| counts.next() == Some(screeners.len()));
}

/// True when the first pick holds at least one block of the prompt.
fn holds_prefix(
    columns: &[Column<PrefixMatch>],
    attributes: &Attributes,
    result: &SchedulingResult,
) -> bool {
    let Some(&pick) = result.primary.picks.first() else {
        return false;
    };
    columns
        .iter()
        .filter_map(|column| attributes.get(*column)?.get(pick as usize))
        .any(|found| found.matched_blocks > 0)
}
