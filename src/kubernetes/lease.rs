//! Leader election by Lease, as the reference's library does it, so that both may take part in one
//! election.
//!
//! Clocks of other machines count for nothing: a lease is free when its record has not changed for as
//! long as it says, by our own clock. A leader that cannot renew steps down before another may step
//! up: it counts from the last renewal it began, the others from the record they saw later.

use std::time::Duration;

use http::StatusCode;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use k8s_openapi::jiff::Timestamp;
use kube::Client;
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;

use crate::telemetry::metrics::LeaseSeries;

/// How long others wait for the record to change before they take the lease.
const LEASE: Duration = Duration::from_secs(15);
/// How long a leader goes on without a renewal.
const RENEW_DEADLINE: Duration = Duration::from_secs(10);
/// Time between two tries.
const RETRY: Duration = Duration::from_secs(2);
/// How long one request may take: a leader gets several tries before its deadline.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(3);
/// Random part of the pause of those who wait, as a factor: they do not come all at once.
const JITTER: f64 = 1.2;

/// Takes part in an election.
pub struct Election {
    client: Client,
    path: String,
    name: String,
    identity: String,
    seen: Option<(Value, Instant)>,
    leads: watch::Sender<bool>,
    series: LeaseSeries,
}

impl std::fmt::Debug for Election {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Election")
            .field("name", &self.name)
            .field("identity", &self.identity)
            .finish_non_exhaustive()
    }
}

/// Name of the lease of a pool.
pub fn lease_name(namespace: &str, pool: &str) -> String {
    format!("epp-{namespace}-{pool}.llm-d.ai")
}

/// A name for this process that no other has: the pod's, else the host's, and something random.
pub fn identity(pod: &str) -> String {
    let host = match pod {
        "" => std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default(),
        pod => pod.to_owned(),
    };
    format!("{}_{}", host.trim(), uuid::Uuid::new_v4())
}

/// What a try came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outcome {
    /// The lease is ours for another while.
    Held,
    /// It is another's.
    Taken,
}

impl Election {
    /// A candidate for the lease of `pool`.
    pub fn new(client: Client, namespace: &str, pool: &str, identity: String) -> Self {
        Self {
            client,
            path: format!("/apis/coordination.k8s.io/v1/namespaces/{namespace}/leases"),
            name: lease_name(namespace, pool),
            identity,
            seen: None,
            leads: watch::Sender::new(false),
            series: LeaseSeries::new(),
        }
    }

    /// Whether this process leads.
    pub fn leads(&self) -> watch::Receiver<bool> {
        self.leads.subscribe()
    }

    /// Runs until `shutdown`; a lease that is held is given back then.
    pub async fn run(mut self, shutdown: CancellationToken) {
        let stopped = shutdown.clone();
        stopped.run_until_cancelled(self.take_part()).await;
        if self.leads.send_replace(false) {
            self.series.leads(false);
            match timeout(REQUEST_TIMEOUT, self.release()).await {
                Ok(Ok(())) => tracing::info!(lease = self.name, "released"),
                Ok(Err(problem)) => tracing::warn!(lease = self.name, problem, "not released"),
                Err(_) => tracing::warn!(lease = self.name, "not released in time"),
            }
        }
    }

    async fn take_part(&mut self) {
        let mut renewed = Instant::now();
        loop {
            let began = Instant::now();
            // A try of a leader may not outlast its leadership.
            let left = if *self.leads.borrow() {
                (renewed + RENEW_DEADLINE).saturating_duration_since(began)
            } else {
                REQUEST_TIMEOUT
            };
            let tried = timeout(left.min(REQUEST_TIMEOUT), self.attempt()).await;
            let outcome = tried.unwrap_or_else(|_| Err("no answer in time".to_owned()));
            match &outcome {
                Ok(Outcome::Held) => {
                    renewed = began;
                    self.series.tried("held");
                    self.become_leader(true);
                }
                Ok(Outcome::Taken) => {
                    self.series.tried("taken");
                    self.become_leader(false);
                }
                Err(problem) => {
                    self.series.tried("error");
                    tracing::warn!(lease = self.name, problem, "leader election");
                    if renewed.elapsed() >= RENEW_DEADLINE {
                        self.become_leader(false);
                    }
                }
            }
            let leads = *self.leads.borrow();
            let pause = if leads {
                // Wakes to step down in time.
                RETRY.min((renewed + RENEW_DEADLINE).saturating_duration_since(Instant::now()))
            } else {
                RETRY.mul_f64(1.0 + fastrand::f64() * JITTER)
            };
            sleep(pause).await;
            if leads && renewed.elapsed() >= RENEW_DEADLINE {
                self.become_leader(false);
            }
        }
    }

    fn become_leader(&self, leads: bool) {
        let changed = self
            .leads
            .send_if_modified(|own| std::mem::replace(own, leads) != leads);
        if changed {
            self.series.leads(leads);
            if leads {
                tracing::info!(lease = self.name, identity = self.identity, "leading");
            } else {
                tracing::warn!(lease = self.name, "no longer leading, standing by");
            }
        }
    }

    /// One try to take or keep the lease.
    async fn attempt(&mut self) -> Result<Outcome, String> {
        let (status, mut lease) = self.ask("GET", None).await?;
        if status == StatusCode::NOT_FOUND {
            let record = json!({
                "apiVersion": "coordination.k8s.io/v1", "kind": "Lease",
                "metadata": {"name": self.name},
                "spec": self.spec(&json!({}), now()?, 0, LEASE),
            });
            let (status, answer) = self.ask("POST", Some(&record)).await?;
            return self.written(status, &answer);
        }
        if !status.is_success() {
            return Err(refusal(status, &lease));
        }
        let record = lease["spec"].clone();
        if self.seen.as_ref().is_none_or(|(seen, _)| *seen != record) {
            self.seen = Some((record.clone(), Instant::now()));
        }
        let holder = record["holderIdentity"].as_str().unwrap_or_default();
        let ours = holder == self.identity;
        if !ours && !holder.is_empty() && !self.has_run_out(&record) {
            return Ok(Outcome::Taken);
        }
        let now = now()?;
        let transitions = record["leaseTransitions"].as_i64().unwrap_or(0);
        lease["spec"] = if ours {
            let mut spec = self.spec(&record, now, transitions, LEASE);
            spec["acquireTime"] = record["acquireTime"].clone();
            spec
        } else {
            self.spec(&record, now, transitions + 1, LEASE)
        };
        // Carries the version that was read: of two that take it at once, one is refused.
        let (status, answer) = self.ask("PUT", Some(&lease)).await?;
        self.written(status, &answer)
    }

    fn written(&mut self, status: StatusCode, answer: &Value) -> Result<Outcome, String> {
        match status {
            StatusCode::CONFLICT => Ok(Outcome::Taken),
            status if status.is_success() => {
                self.seen = Some((answer["spec"].clone(), Instant::now()));
                Ok(Outcome::Held)
            }
            status => Err(refusal(status, answer)),
        }
    }

    /// True when nobody changed the record for as long as it says.
    fn has_run_out(&self, record: &Value) -> bool {
        let seconds = record["leaseDurationSeconds"].as_u64();
        let lasts = seconds.map_or(LEASE, Duration::from_secs);
        let seen = self.seen.as_ref().map(|(_, at)| *at);
        seen.is_some_and(|at| at.elapsed() >= lasts)
    }

    /// The record with us as its holder; fields of others stay.
    fn spec(&self, record: &Value, now: Value, transitions: i64, lasts: Duration) -> Value {
        let mut spec = record.clone();
        spec["holderIdentity"] = json!(self.identity);
        spec["leaseDurationSeconds"] = json!(lasts.as_secs());
        spec["acquireTime"] = now.clone();
        spec["renewTime"] = now;
        spec["leaseTransitions"] = json!(transitions);
        spec
    }

    /// Leaves the lease to whoever comes first.
    async fn release(&self) -> Result<(), String> {
        let (status, mut lease) = self.ask("GET", None).await?;
        if !status.is_success() {
            return Err(refusal(status, &lease));
        }
        let record = lease["spec"].clone();
        if record["holderIdentity"] != json!(self.identity) {
            return Ok(());
        }
        let transitions = record["leaseTransitions"].as_i64().unwrap_or(0);
        lease["spec"] = self.spec(&record, now()?, transitions, Duration::from_secs(1));
        lease["spec"]["holderIdentity"] = json!("");
        let (status, answer) = self.ask("PUT", Some(&lease)).await?;
        if status.is_success() {
            Ok(())
        } else {
            Err(refusal(status, &answer))
        }
    }

    async fn ask(&self, method: &str, body: Option<&Value>) -> Result<(StatusCode, Value), String> {
        let path = match method {
            "POST" => self.path.clone(),
            _ => format!("{}/{}", self.path, self.name),
        };
        let body = body.map(|b| b.to_string().into_bytes()).unwrap_or_default();
        super::ask(&self.client, method, &path, body).await
    }
}

fn refusal(status: StatusCode, answer: &Value) -> String {
    format!(
        "{status} {}",
        answer["message"].as_str().unwrap_or_default()
    )
}

/// Now, as a record says it.
fn now() -> Result<Value, String> {
    serde_json::to_value(MicroTime(Timestamp::now())).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kubernetes::testing::{ApiServer, eventually};

    const KEY: &str = "coordination.k8s.io/v1/leases";
    const NAME: &str = "epp-default-pool.llm-d.ai";

    fn join(server: &ApiServer, identity: &str) -> (watch::Receiver<bool>, CancellationToken) {
        let election = Election::new(server.client(), "default", "pool", identity.to_owned());
        let (leads, stop) = (election.leads(), CancellationToken::new());
        tokio::spawn(election.run(stop.clone()));
        (leads, stop)
    }

    fn holder(server: &ApiServer) -> String {
        let lease = server.get(KEY, NAME).unwrap();
        lease["spec"]["holderIdentity"].as_str().unwrap().to_owned()
    }

    #[tokio::test(start_paused = true)]
    async fn one_leads_and_the_next_takes_over_at_once_when_it_leaves() {
        let server = ApiServer::start().await;
        let (a, stop) = join(&server, "a");
        eventually("a leads", || *a.borrow()).await;
        let (b, _stop) = join(&server, "b");
        sleep(Duration::from_mins(5)).await;
        assert!(*a.borrow() && !*b.borrow());
        let lease = server.get(KEY, NAME).unwrap();
        assert_eq!(lease["spec"]["leaseDurationSeconds"], 15);
        assert_eq!(lease["spec"]["leaseTransitions"], 0);
        let time = lease["spec"]["renewTime"].as_str().unwrap();
        // Microseconds, as the API server's decoder wants them.
        assert_eq!(time.len(), "2026-01-01T00:00:00.000000Z".len(), "{time}");
        stop.cancel();
        eventually("released", || holder(&server) != "a").await;
        assert!(!*a.borrow());
        // The next try comes within 2 s * 2.2.
        sleep(Duration::from_millis(4500)).await;
        eventually("b leads", || *b.borrow()).await;
        assert_eq!(holder(&server), "b");
        assert_eq!(
            server.get(KEY, NAME).unwrap()["spec"]["leaseTransitions"],
            1
        );
    }

    #[tokio::test(start_paused = true)]
    async fn a_leader_that_dies_is_followed_after_its_lease_by_our_clock() {
        let server = ApiServer::start().await;
        // Its clock is an hour ahead, then a day behind: neither makes the lease longer or shorter.
        for time in ["2099-01-01T01:00:00.000000Z", "2001-01-01T00:00:00.000000Z"] {
            let record = json!({
                "apiVersion": "coordination.k8s.io/v1", "kind": "Lease",
                "metadata": {"name": NAME, "labels": {"x": "y"}},
                "spec": {"holderIdentity": "dead", "leaseDurationSeconds": 15, "renewTime": time,
                         "acquireTime": time, "leaseTransitions": 4, "preferredHolder": "z"},
            });
            server.apply(record);
            let (leads, stop) = join(&server, "a");
            sleep(Duration::from_secs(14)).await;
            assert!(!*leads.borrow(), "{time}");
            // 15 s after it was seen, and at most one pause of 4.4 s.
            sleep(Duration::from_secs(6)).await;
            eventually("a leads", || *leads.borrow()).await;
            let lease = server.get(KEY, NAME).unwrap();
            assert_eq!(lease["spec"]["leaseTransitions"], 5);
            assert_eq!(lease["spec"]["preferredHolder"], "z");
            assert_eq!(lease["metadata"]["labels"]["x"], "y");
            stop.cancel();
            eventually("released", || holder(&server).is_empty()).await;
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_leader_cut_off_steps_down_before_another_steps_up() {
        let server = ApiServer::start().await;
        let (a, _stop_a) = join(&server, "a");
        eventually("a leads", || *a.borrow()).await;
        server.refuse(KEY, 503);
        sleep(Duration::from_secs(7)).await;
        assert!(*a.borrow(), "within the deadline");
        sleep(Duration::from_secs(4)).await;
        assert!(!*a.borrow(), "10 s after its last renewal");
        // It comes back by itself.
        server.refuse(KEY, 0);
        sleep(Duration::from_secs(5)).await;
        eventually("a leads again", || *a.borrow()).await;
    }

    #[tokio::test(start_paused = true)]
    async fn of_two_that_come_together_one_leads() {
        let server = ApiServer::start().await;
        let (a, _stop_a) = join(&server, "a");
        let (b, _stop_b) = join(&server, "b");
        eventually("somebody leads", || *a.borrow() || *b.borrow()).await;
        for _ in 0..100 {
            sleep(Duration::from_secs(1)).await;
            assert!(*a.borrow() != *b.borrow());
        }
    }

    #[tokio::test(start_paused = true)]
    async fn metrics_say_who_leads() {
        use crate::telemetry::metrics::{recording, sample};
        recording(|shown| async move {
            let server = ApiServer::start().await;
            let leader = || sample(&shown, "pinpod_leader", &[]);
            let tries = |result: &str| {
                let label = format!("result=\"{result}\"");
                sample(&shown, "pinpod_lease_tries_total", &[&label]).unwrap_or_default()
            };
            let (leads, stop) = join(&server, "a");
            assert_eq!(leader(), Some(0.0));
            eventually("a leads", || *leads.borrow()).await;
            assert_eq!((leader(), tries("held")), (Some(1.0), 1.0));
            server.refuse(KEY, 503);
            sleep(Duration::from_secs(12)).await;
            assert_eq!(leader(), Some(0.0), "it stepped down");
            assert!(tries("error") >= 2.0);
            server.refuse(KEY, 0);
            sleep(Duration::from_secs(5)).await;
            eventually("a leads again", || leader() == Some(1.0)).await;
            stop.cancel();
            eventually("released", || leader() == Some(0.0)).await;
            assert_eq!(tries("taken"), 0.0);
        })
        .await;
    }

    #[test]
    fn the_lease_has_the_references_name() {
        assert_eq!(lease_name("default", "pool"), NAME);
        assert_ne!(identity("h"), identity("h"));
        assert!(identity("h").starts_with("h_"));
        // Without POD_NAME the host's, which in a pod is the same.
        assert!(!identity("").starts_with('_'));
    }
}
