//! Whether what is known of a collection is current.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::telemetry::metrics::WatchSeries;

/// Whether the API server is heard on everything that is followed. Shared by all watchers of a
/// process; cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct ApiContact(Arc<AtomicUsize>);

impl ApiContact {
    /// False while a collection was not listed yet or its watch cannot be taken up: what is known of
    /// it may be out of date.
    pub fn is_complete(&self) -> bool {
        self.0.load(Ordering::Acquire) == 0
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Nothing was heard yet.
    Unsettled,
    Connected,
    Lost,
    /// The server does not have it, or not for us, and that is fine.
    Absent,
}

impl State {
    fn is_out_of_touch(self) -> bool {
        matches!(self, Self::Unsettled | Self::Lost)
    }
}

/// The state of one collection, told to metrics and to the process.
#[derive(Debug)]
pub(super) struct Standing {
    series: WatchSeries,
    contact: ApiContact,
    state: State,
}

impl Standing {
    pub(super) fn new(resource: &'static str, group: &'static str, contact: &ApiContact) -> Self {
        contact.0.fetch_add(1, Ordering::AcqRel);
        let series = WatchSeries::new(resource, group);
        series.set_connected(false);
        Self {
            series,
            contact: contact.clone(),
            state: State::Unsettled,
        }
    }

    fn become_state(&mut self, state: State) {
        let before = std::mem::replace(&mut self.state, state);
        match (before.is_out_of_touch(), state.is_out_of_touch()) {
            (true, false) => self.contact.0.fetch_sub(1, Ordering::AcqRel),
            (false, true) => self.contact.0.fetch_add(1, Ordering::AcqRel),
            _ => return self.series.set_connected(state == State::Connected),
        };
        self.series.set_connected(state == State::Connected);
    }

    /// A watch was accepted.
    pub(super) fn connected(&mut self) {
        self.series.heard();
        if self.state == State::Lost {
            tracing::info!(series = ?self.series, "the Kubernetes API is back");
        }
        self.become_state(State::Connected);
    }

    /// It cannot be reached; what is known stays.
    pub(super) fn lost(&mut self) {
        self.become_state(State::Lost);
    }

    /// It is not there, which is fine.
    pub(super) fn absent(&mut self) {
        self.series.heard();
        self.become_state(State::Absent);
    }

    pub(super) fn is_unsettled(&self) -> bool {
        self.state == State::Unsettled
    }

    pub(super) fn is_absent(&self) -> bool {
        self.state == State::Absent
    }

    pub(super) fn is_connected(&self) -> bool {
        self.state == State::Connected
    }

    pub(super) fn heard(&self) {
        self.series.heard();
    }

    pub(super) fn listed(&self) {
        self.series.heard();
        self.series.listed();
    }

    pub(super) fn event(&self, kind: &'static str) {
        self.series.event(kind);
    }

    pub(super) fn failed(&self, reason: &'static str) {
        self.series.failed(reason);
    }
}

impl Drop for Standing {
    fn drop(&mut self) {
        if self.state.is_out_of_touch() {
            self.contact.0.fetch_sub(1, Ordering::AcqRel);
        }
        self.series.set_connected(false);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn contact_is_complete_when_no_collection_is_out_of_touch() {
        let contact = ApiContact::default();
        assert!(contact.is_complete());
        let mut pods = Standing::new("pods", "", &contact);
        let mut optional = Standing::new("inferenceobjectives", "llm-d.ai", &contact);
        assert!(!contact.is_complete(), "not heard yet");
        pods.connected();
        optional.absent();
        assert!(contact.is_complete());
        pods.lost();
        pods.lost();
        assert!(!contact.is_complete());
        drop(pods);
        assert!(contact.is_complete(), "nobody asks any more");
        optional.lost();
        assert!(!contact.is_complete());
    }
}
