//! One publisher's batches on their way into its sink: decoded, numbered, remembered.

use std::sync::Arc;

use super::stats::{SubscriberStats, count, count_n};
use super::wire::{Scratch, timestamp};
use super::{Batch, Event, EventSink, StreamState};

/// A process counts its batches from 0, or from 1.
pub(super) const FIRST_SEQ: u64 = 1;

/// What is remembered of the newest batch, to know its publisher again.
///
/// A restarted engine counts from 0 and may have passed our number while we were away. The clock in a
/// batch differs from batch to batch, so the same number with another clock is another process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Mark {
    pub(super) seq: u64,
    ts_bits: Option<u64>,
    payload_bytes: usize,
}

impl Mark {
    fn of(seq: u64, payload: &[u8]) -> Self {
        Self {
            seq,
            ts_bits: timestamp(payload).map(f64::to_bits),
            payload_bytes: payload.len(),
        }
    }

    /// Whether a batch is the remembered one.
    pub(super) fn is(&self, seq: u64, payload: &[u8]) -> bool {
        *self == Self::of(seq, payload)
    }
}

/// The sink with its place in the sequence.
pub(super) struct Stream {
    sink: Box<dyn EventSink>,
    scratch: Scratch,
    /// Newest batch applied or refused; `None` before the first one and after a reset.
    pub(super) last: Option<Mark>,
    /// Events are missing that were not forgotten: lost under [`super::subscriber::LossPolicy::Keep`], or
    /// of a payload that does not decode. Ends with a reset.
    pub(super) stale: bool,
    pub(super) stats: Arc<SubscriberStats>,
}

impl std::fmt::Debug for Stream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Stream")
            .field("last", &self.last)
            .field("stats", &self.stats)
            .finish_non_exhaustive()
    }
}

impl Stream {
    pub(super) fn new(sink: Box<dyn EventSink>, stats: Arc<SubscriberStats>) -> Self {
        Self {
            sink,
            scratch: Scratch::default(),
            last: None,
            stale: false,
            stats,
        }
    }

    /// Applies a batch and makes it the newest. A payload that does not decode is counted and still
    /// takes its number; what it would have changed is missing from then on.
    pub(super) fn apply(&mut self, seq: u64, payload: &[u8]) {
        let Self { sink, stats, .. } = self;
        if self.last.is_none() {
            stats.set_complete(seq <= FIRST_SEQ);
        }
        let apply = |batch: &Batch<'_>| {
            let is_clear = |event: &Event<'_>| matches!(event, Event::Cleared(_));
            if !stats.is_complete() && batch.events.iter().any(is_clear) {
                stats.set_complete(true);
            }
            sink.apply(batch);
        };
        match self.scratch.decode(payload, apply) {
            Ok(decoded) => {
                count(&self.stats.applied);
                count_n(&self.stats.events, decoded.events);
                count_n(&self.stats.unknown_events, decoded.unknown);
                count_n(&self.stats.malformed_events, decoded.malformed);
            }
            Err(error) => {
                count(&self.stats.bad_payloads);
                self.lose();
                tracing::debug!(seq, %error, "batch dropped");
            }
        }
        self.last = Some(Mark::of(seq, payload));
        self.stats.set_last_seq(Some(seq));
    }

    /// Events are missing from here on.
    pub(super) fn lose(&mut self) {
        self.stale = true;
        self.stats.set_complete(false);
    }

    /// As [`EventSink::on_topic`].
    pub(super) fn on_topic(&mut self, topic: &[u8]) {
        if !topic.is_empty() {
            self.sink.on_topic(topic);
        }
    }

    /// As [`EventSink::is_gone`].
    pub(super) fn is_gone(&self) -> bool {
        self.sink.is_gone()
    }

    /// Forgets everything of this publisher.
    pub(super) fn reset(&mut self) {
        self.sink.reset();
        self.last = None;
        self.stale = false;
        self.stats.set_last_seq(None);
    }

    /// The state of a stream whose batches arrive without a gap.
    pub(super) fn settled(&self) -> StreamState {
        if self.stale {
            StreamState::Gap
        } else {
            StreamState::Live
        }
    }

    pub(super) fn set_state(&mut self, state: StreamState) {
        if self.stats.state() != state {
            self.stats.set_state(state);
            self.sink.set_state(state);
        }
    }
}
