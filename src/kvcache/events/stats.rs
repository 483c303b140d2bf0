//! What a subscriber has seen, for metrics and the admin endpoint: written by its task, read by anyone
//! without a lock.

use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU8, AtomicU64, Ordering::Relaxed};
use std::time::{SystemTime, UNIX_EPOCH};

use super::StreamState;

/// `last_seq` before the first batch.
const NO_SEQ: u64 = u64::MAX;

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// Counters of one subscriber. Each is exact; together they are not of one moment.
        #[derive(Debug)]
        pub struct SubscriberStats {
            $(pub(super) $name: AtomicU64,)*
            last_seq: AtomicU64,
            lag_ms: AtomicI64,
            waiting: AtomicU64,
            complete: AtomicBool,
            state: AtomicU8,
        }

        /// The counters at a moment.
        #[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
        #[serde(rename_all = "camelCase")]
        pub struct StatsSnapshot {
            $($(#[$doc])* pub $name: u64,)*
            /// Number of the newest batch applied.
            pub last_seq: Option<u64>,
            /// Arrival of the newest live batch minus its `ts`, on two clocks; negative when the
            /// engine's is ahead.
            pub lag_ms: i64,
            /// Live batches that wait for a replay to end, now.
            pub waiting: u64,
            /// As [`SubscriberStats::is_complete`].
            pub complete: bool,
            /// As told to the sink.
            #[serde(serialize_with = "state_name")]
            pub state: StreamState,
        }

        impl Default for SubscriberStats {
            fn default() -> Self {
                Self {
                    $($name: AtomicU64::new(0),)*
                    last_seq: AtomicU64::new(NO_SEQ),
                    lag_ms: AtomicI64::new(0),
                    waiting: AtomicU64::new(0),
                    complete: AtomicBool::new(false),
                    state: AtomicU8::new(StreamState::Down as u8),
                }
            }
        }

        impl SubscriberStats {
            /// Reads every counter.
            pub fn snapshot(&self) -> StatsSnapshot {
                StatsSnapshot {
                    $($name: self.$name.load(Relaxed),)*
                    last_seq: Some(self.last_seq.load(Relaxed)).filter(|seq| *seq != NO_SEQ),
                    lag_ms: self.lag_ms.load(Relaxed),
                    waiting: self.waiting.load(Relaxed),
                    complete: self.is_complete(),
                    state: self.state(),
                }
            }
        }
    };
}

counters! {
    /// Live messages received.
    received,
    /// Batches applied, live and replayed.
    applied,
    /// Events handed to the sink.
    events,
    /// Events left out: unknown tag.
    unknown_events,
    /// Events left out: malformed.
    malformed_events,
    /// Batches dropped: the payload is not a batch.
    bad_payloads,
    /// Messages dropped: not of a known form.
    bad_frames,
    /// Batches dropped: no sink for their topic (centralised mode).
    unattributed,
    /// Batches dropped: already applied.
    duplicates,
    /// Live batches dropped while a replay ran, oldest first; the replay brings most of them again.
    buffer_dropped,
    /// Times a sequence number was skipped.
    gaps,
    /// Gaps no replay could fill.
    losses,
    /// Engine restarts noticed.
    restarts,
    /// Replays asked for.
    replays,
    /// Batches that came by replay.
    replayed,
    /// Replays that ended before the end marker.
    replay_failures,
    /// Live connections made, after the first one.
    reconnects,
    /// Live connections that could not be made, or never got to their handshake.
    connect_errors,
    /// Live connections that broke after it.
    receive_errors,
    /// Failed attempts to listen (centralised mode).
    bind_errors,
    /// Messages beyond the size limit; each costs its connection.
    oversize,
}

impl SubscriberStats {
    /// The state as last told to the sink.
    pub fn state(&self) -> StreamState {
        match self.state.load(Relaxed) {
            1 => StreamState::Joining,
            2 => StreamState::Live,
            3 => StreamState::Gap,
            _ => StreamState::Down,
        }
    }

    /// Whether any event was applied.
    pub fn has_events(&self) -> bool {
        self.events.load(Relaxed) > 0
    }

    /// Whether every batch was applied since the engine began or cleared its cache. If not, it may hold
    /// what no event will tell of any more.
    pub fn is_complete(&self) -> bool {
        self.complete.load(Relaxed)
    }

    pub(super) fn set_complete(&self, complete: bool) {
        self.complete.store(complete, Relaxed);
    }

    pub(super) fn set_state(&self, state: StreamState) {
        self.state.store(state as u8, Relaxed);
    }

    pub(super) fn set_last_seq(&self, seq: Option<u64>) {
        self.last_seq.store(seq.unwrap_or(NO_SEQ), Relaxed);
    }

    pub(super) fn set_waiting(&self, batches: usize) {
        self.waiting.store(batches as u64, Relaxed);
    }

    pub(super) fn arrived(&self, ts: f64) {
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        #[expect(clippy::cast_possible_truncation, reason = "saturates on a wild clock")]
        self.lag_ms
            .store(((now.as_secs_f64() - ts) * 1000.0) as i64, Relaxed);
    }
}

impl StreamState {
    /// As metrics and the admin endpoint spell it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Down => "down",
            Self::Joining => "joining",
            Self::Live => "live",
            Self::Gap => "gap",
        }
    }
}

/// One more.
pub(super) fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Relaxed);
}

/// `n` more.
pub(super) fn count_n(counter: &AtomicU64, n: usize) {
    counter.fetch_add(n as u64, Relaxed);
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde asks for it")]
fn state_name<S: serde::Serializer>(state: &StreamState, to: S) -> Result<S::Ok, S::Error> {
    to.serialize_str(state.name())
}
