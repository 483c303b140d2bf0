//! The lease that replicas elect their leader by.

use std::time::Duration;

use k8s_openapi::jiff::Timestamp;
use serde_json::Value;

use super::{Cluster, Refusal, Target, is_ready, name_of};
use crate::doctor::finding::Report;
use crate::kubernetes::lease::lease_name;

/// A leader renews every two seconds, and those who wait look every 4.4 at most: whether anybody does
/// shows within this time, whatever the clocks say.
const LOOK_AGAIN: Duration = Duration::from_secs(6);

/// What the record says.
#[derive(Debug, PartialEq, Eq)]
struct Record {
    holder: String,
    renewed: Option<Timestamp>,
    lasts: i64,
}

impl Record {
    fn read(lease: &Value) -> Self {
        let spec = &lease["spec"];
        let text = |key: &str| spec[key].as_str().unwrap_or_default();
        Self {
            holder: text("holderIdentity").to_owned(),
            renewed: text("renewTime").parse().ok(),
            lasts: spec["leaseDurationSeconds"].as_i64().unwrap_or(15),
        }
    }

    /// Seconds since the last renewal; below zero when the holder's clock is ahead.
    fn age(&self) -> Option<i64> {
        self.renewed
            .map(|at| Timestamp::now().as_second() - at.as_second())
    }

    /// True when the clocks agree that somebody holds it now.
    fn is_fresh(&self) -> bool {
        let age = self.age();
        !self.holder.is_empty() && age.is_some_and(|age| (-self.lasts..self.lasts).contains(&age))
    }

    /// The pod that holds it: an identity is its name and something random.
    fn pod(&self) -> &str {
        self.holder
            .rsplit_once('_')
            .map_or(&self.holder, |(pod, _)| pod)
    }
}

impl Cluster<'_> {
    /// Whether the lease of the pool is kept, and by one of these pickers.
    pub(super) async fn lease(&self, pickers: &[&Value], report: &mut Report) {
        let Target::Pool(pool) = &self.0.target else {
            return;
        };
        let name = lease_name(&self.0.namespace, pool);
        let subject = format!("Lease {}/{name}", self.0.namespace);
        let path = self.path("apis/coordination.k8s.io/v1", &format!("leases/{name}"));
        let mut record = match self.get(&path).await {
            Ok(lease) => Record::read(&lease),
            Err(Refusal::Missing) => {
                return report.error(
                    "lease",
                    subject,
                    "the pickers elect a leader and there is no such lease: nobody leads",
                    "they make it: see their rights on leases, and that --pool-name and --pool-namespace are those of the pool",
                );
            }
            Err(refusal) => return self.unreadable(&format!("lease {name}"), refusal, report),
        };
        let mut kept = record.is_fresh();
        if !kept {
            tokio::time::sleep(LOOK_AGAIN).await;
            match self.get(&path).await {
                Ok(lease) => {
                    let again = Record::read(&lease);
                    kept = !again.holder.is_empty() && again != record;
                    record = again;
                }
                Err(refusal) => return self.unreadable(&format!("lease {name}"), refusal, report),
            }
        }
        let (holder, age) = (&record.holder, record.age().unwrap_or_default());
        if !kept {
            let message = match holder.as_str() {
                "" => "nobody holds it: nobody leads".to_owned(),
                _ => format!("{holder} holds it and has not renewed it for {age} s: nobody leads"),
            };
            let fix = "their logs say why (`leader election`): they need get, create and update on leases";
            return report.error("lease", subject, message, fix);
        }
        let pod = record.pod();
        match pickers.iter().find(|picker| name_of(picker) == pod) {
            None => report.warning(
                "lease",
                subject,
                format!("{holder} leads, which is none of the pickers behind the Service"),
                "another installation takes part in this election: it has the same pool name and namespace; or the pickers run with hostNetwork",
            ),
            Some(picker) if !is_ready(picker) => report.warning(
                "lease",
                subject,
                format!("{holder} leads and is not ready, so nobody gets requests"),
                "it is ready once it saw the pool and its parsers read the pool's appProtocol: its log says which",
            ),
            Some(_) if record.is_fresh() => report.ok("lease", subject, format!("{holder} leads")),
            Some(_) => report.warning(
                "lease",
                subject,
                format!("{holder} leads; its clock is {age} s behind this one"),
                "synchronise the clocks; pickers go by their own and are not disturbed",
            ),
        }
    }
}
