//! The pods of a pool, all of them, page by page.

use std::collections::BTreeMap;

use serde_json::Value;

use super::{Cluster, MAX_NAMES, encoded, is_ready, name_of};
use crate::datalayer::EndpointSpec;
use crate::doctor::finding::Report;
use crate::kubernetes::endpoints_of;

/// Pods asked for at once.
const PAGE_PODS: usize = 500;
/// Pods that are looked at; that there are more is said.
const MAX_PODS: usize = 10_000;

/// What is kept of the pods.
#[derive(Debug, Default)]
struct Seen {
    pods: usize,
    ready: usize,
    endpoints: Vec<EndpointSpec>,
    /// Names of pods that are not ready.
    waiting: Names,
    /// Names of pods that are ready and yet have no endpoint.
    closed: Names,
    /// Pods by target ports that they do not declare, and those that they do.
    strange: BTreeMap<(Vec<u16>, Vec<u64>), Names>,
}

/// The first of many names, and how many there are.
#[derive(Debug, Default)]
struct Names {
    first: Vec<String>,
    count: usize,
}

impl Names {
    fn note(&mut self, name: &str) {
        self.count += 1;
        if self.first.len() < MAX_NAMES {
            self.first.push(name.to_owned());
        }
    }
}

impl std::fmt::Display for Names {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?}", self.first)?;
        match self.count - self.first.len() {
            0 => Ok(()),
            more => write!(f, " and {more} more"),
        }
    }
}

impl Cluster<'_> {
    /// The endpoints of all pods that `selector` finds.
    pub(super) async fn pods(
        &self,
        selector: &str,
        ports: &[u16],
        report: &mut Report,
    ) -> Vec<EndpointSpec> {
        let subject = format!("pods {selector}");
        let first = format!("pods?labelSelector={}&limit={PAGE_PODS}", encoded(selector));
        let mut seen = Seen::default();
        let mut next = String::new();
        loop {
            let path = self.path("api/v1", &format!("{first}{next}"));
            let list = match self.get(&path).await {
                Ok(list) => list,
                Err(refusal) => {
                    self.unreadable("pods", refusal, report);
                    return Vec::new();
                }
            };
            for pod in list["items"].as_array().into_iter().flatten() {
                seen.take(pod, ports);
            }
            match list["metadata"]["continue"].as_str() {
                None | Some("") => break,
                Some(_) if seen.pods >= MAX_PODS => {
                    report.warning(
                        "pods",
                        &subject,
                        format!("there are more than the {} that were looked at", seen.pods),
                        "look at a part: --endpoint-selector with further labels",
                    );
                    break;
                }
                Some(token) => next = format!("&continue={}", encoded(token)),
            }
        }
        if seen.pods == 0 {
            report.error(
                "pods",
                subject,
                "the selector matches no pod",
                format!(
                    "compare it with `kubectl -n {} get pods --show-labels`; pool and pods must be in one namespace",
                    self.0.namespace
                ),
            );
        } else {
            seen.tell(&subject, report);
        }
        seen.endpoints
    }
}

impl Seen {
    fn take(&mut self, pod: &Value, ports: &[u16]) {
        self.pods += 1;
        let name = name_of(pod);
        if !is_ready(pod) {
            return self.waiting.note(name);
        }
        self.ready += 1;
        // As the picker sees it; what it cannot read is no endpoint for it either.
        let read = serde_json::from_value(pod.clone());
        let endpoints = read
            .map(|pod| endpoints_of(&pod, ports))
            .unwrap_or_default();
        if endpoints.is_empty() {
            self.closed.note(name);
        }
        self.endpoints.extend(endpoints);
        let declared = declared_ports(pod);
        let strange = ports.iter().copied();
        let strange: Vec<u16> = strange
            .filter(|port| !declared.is_empty() && !declared.contains(&u64::from(*port)))
            .collect();
        if !strange.is_empty() {
            self.strange
                .entry((strange, declared))
                .or_default()
                .note(name);
        }
    }

    fn tell(&self, subject: &str, report: &mut Report) {
        let Self { ready, waiting, .. } = self;
        if *ready == 0 {
            report.error(
                "pods",
                subject,
                format!("none is ready: {waiting}"),
                "kubectl describe pod says why; models take minutes to load",
            );
        } else if waiting.count == 0 {
            report.ok("pods", subject, format!("{ready} ready"));
        } else {
            report.warning(
                "pods",
                subject,
                format!("{ready} ready, not ready: {waiting}"),
                "kubectl describe pod says why",
            );
        }
        if self.closed.count > 0 {
            report.warning(
                "ports",
                subject,
                format!("ready, but without an endpoint: {}", self.closed),
                "their annotation llm-d.ai/active-ports names none of the pool's targetPorts, or they have no address",
            );
        }
        for ((strange, declared), names) in &self.strange {
            report.warning(
                "ports",
                subject,
                format!("target ports {strange:?} are not among the declared {declared:?} of {names}"),
                "set the pool's targetPorts to the ports of the server (vLLM: 8000, behind a routing sidecar the sidecar's; one for each data-parallel rank)",
            );
        }
    }
}

/// What the containers of a pod say they listen on; they need not say it.
fn declared_ports(pod: &Value) -> Vec<u64> {
    let containers = ["containers", "initContainers"]
        .into_iter()
        .flat_map(|kind| pod["spec"][kind].as_array().into_iter().flatten());
    containers
        .flat_map(|c| c["ports"].as_array().into_iter().flatten())
        .filter_map(|port| port["containerPort"].as_u64())
        .collect()
}
