//! How the Kubernetes API is followed.

use std::time::SystemTime;

use metrics::{Counter, Gauge};

use super::labels;

/// Leadership of this process.
pub struct LeaseSeries {
    leader: Gauge,
}

impl std::fmt::Debug for LeaseSeries {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("LeaseSeries")
    }
}

impl Default for LeaseSeries {
    fn default() -> Self {
        Self::new()
    }
}

impl LeaseSeries {
    /// Not leading.
    pub fn new() -> Self {
        let leader = metrics::gauge!("pinpod_leader");
        leader.set(0.0);
        Self { leader }
    }

    /// Whether this process leads.
    pub fn leads(&self, leads: bool) {
        self.leader.set(if leads { 1.0 } else { 0.0 });
    }

    /// A try for the lease came to `result`, one of a closed set.
    pub fn tried(&self, result: &'static str) {
        metrics::counter!("pinpod_lease_tries_total", "result" => result).increment(1);
    }
}

/// Series of one collection. All label values come from closed sets.
pub struct WatchSeries {
    resource: &'static str,
    group: &'static str,
    connected: Gauge,
    last_contact: Gauge,
    lists: Counter,
}

impl std::fmt::Debug for WatchSeries {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "WatchSeries({})", self.resource)
    }
}

impl WatchSeries {
    /// The series of `resource` in `group`.
    pub fn new(resource: &'static str, group: &'static str) -> Self {
        let own = || labels(&[("resource", resource), ("group", group)]);
        Self {
            resource,
            group,
            connected: metrics::gauge!("pinpod_kubernetes_watch_connected", own()),
            last_contact: metrics::gauge!(
                "pinpod_kubernetes_last_contact_timestamp_seconds",
                own()
            ),
            lists: metrics::counter!("pinpod_kubernetes_lists_total", own()),
        }
    }

    /// Whether the collection is followed.
    pub fn set_connected(&self, connected: bool) {
        self.connected.set(if connected { 1.0 } else { 0.0 });
    }

    /// The server said something.
    pub fn heard(&self) {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        self.last_contact.set(now.unwrap_or_default().as_secs_f64());
    }

    /// A whole list was read.
    pub fn listed(&self) {
        self.lists.increment(1);
    }

    /// An event of `kind`, one of a closed set.
    pub fn event(&self, kind: &'static str) {
        let list = [
            ("resource", self.resource),
            ("group", self.group),
            ("type", kind),
        ];
        metrics::counter!("pinpod_kubernetes_events_total", labels(&list)).increment(1);
    }

    /// Something failed for `reason`, one of a closed set.
    pub fn failed(&self, reason: &'static str) {
        let list = [
            ("resource", self.resource),
            ("group", self.group),
            ("reason", reason),
        ];
        metrics::counter!("pinpod_kubernetes_failures_total", labels(&list)).increment(1);
    }
}
