//! Pods as endpoints.

use std::net::{IpAddr, SocketAddr};

use hashbrown::HashMap;

use super::objects::{Meta, Pod};
use crate::datalayer::{EndpointDetails, EndpointName, EndpointSpec};

/// The pods that have endpoints, by name.
#[derive(Debug)]
pub(super) struct PodTable {
    ports: Vec<u16>,
    pods: HashMap<String, Known>,
}

/// What the store has of a pod.
#[derive(Debug)]
struct Known {
    uid: String,
    endpoints: Vec<EndpointName>,
}

/// What changes in the store: the last word about each endpoint, `None` when it leaves.
#[derive(Debug, Default)]
pub(super) struct Delta(HashMap<EndpointName, Option<EndpointSpec>>);

impl Delta {
    /// Endpoints that leave, and endpoints as they are now, by name.
    pub(super) fn into_parts(self) -> (Vec<EndpointName>, Vec<EndpointSpec>) {
        let mut gone = Vec::new();
        let mut specs = Vec::new();
        for (name, spec) in self.0 {
            match spec {
                Some(spec) => specs.push(spec),
                None => gone.push(name),
            }
        }
        gone.sort_unstable();
        specs.sort_unstable_by(|a, b| a.name.cmp(&b.name));
        (gone, specs)
    }
}

impl PodTable {
    /// No pod yet; each will serve at `ports`.
    pub(super) fn new(ports: Vec<u16>) -> Self {
        Self {
            ports,
            pods: HashMap::new(),
        }
    }

    /// Exactly these pods exist: all endpoints there are.
    pub(super) fn replace(&mut self, pods: &[Pod]) -> Vec<EndpointSpec> {
        self.pods.clear();
        let mut delta = Delta::default();
        for pod in pods {
            self.apply(pod, &mut delta);
        }
        delta.into_parts().1
    }

    /// A pod is new or different.
    pub(super) fn apply(&mut self, pod: &Pod, delta: &mut Delta) {
        let specs = endpoints(pod, &self.ports);
        let name = &pod.metadata.name;
        if let Some(known) = self.pods.remove(name) {
            delta
                .0
                .extend(known.endpoints.into_iter().map(|n| (n, None)));
        }
        if specs.is_empty() {
            return;
        }
        let known = Known {
            uid: pod.metadata.uid.clone(),
            endpoints: specs.iter().map(EndpointSpec::endpoint_name).collect(),
        };
        self.pods.insert(name.clone(), known);
        let named = specs.into_iter().map(|s| (s.endpoint_name(), Some(s)));
        delta.0.extend(named);
    }

    /// A pod is gone. The end of an earlier pod of that name says nothing about this one.
    pub(super) fn delete(&mut self, pod: &Meta, delta: &mut Delta) {
        let known = self.pods.get(&pod.name);
        if known.is_none_or(|known| known.uid != pod.uid) {
            return;
        }
        if let Some(known) = self.pods.remove(&pod.name) {
            delta
                .0
                .extend(known.endpoints.into_iter().map(|n| (n, None)));
        }
    }
}

/// The endpoints of a pod: none unless it is ready and stays, else one per active port.
pub fn endpoints(pod: &Pod, ports: &[u16]) -> Vec<EndpointSpec> {
    let Some(ip) = address(pod).filter(|_| is_ready(pod)) else {
        return Vec::new();
    };
    let active = active_ports(&pod.metadata);
    let meta = &pod.metadata;
    let details = EndpointDetails {
        node_address: pod.status.host_ip.as_deref().and_then(|ip| ip.parse().ok()),
        hostname: pod.spec.hostname.clone().filter(|name| !name.is_empty()),
        incarnation: Some(incarnation(pod)),
        ..EndpointDetails::default()
    };
    (0..)
        .zip(ports)
        .filter(|(_, port)| active.as_ref().is_none_or(|active| active.contains(port)))
        .map(|(rank, &port)| EndpointSpec {
            name: format!("{}-rank-{rank}", meta.name),
            namespace: meta.namespace.clone(),
            address: SocketAddr::new(ip, port),
            labels: meta.labels.clone(),
            rank,
            details: details.clone(),
        })
        .collect()
}

/// Ready, and not on its way out. A pod that is shutting down may be ready for a while yet, but takes
/// no new work.
fn is_ready(pod: &Pod) -> bool {
    let mut conditions = pod.status.conditions.iter();
    !pod.metadata.is_leaving() && conditions.any(|c| c.kind == "Ready" && c.status == "True")
}

fn address(pod: &Pod) -> Option<IpAddr> {
    let first = pod.status.pod_ip.as_deref().filter(|ip| !ip.is_empty());
    let first = first.or_else(|| Some(pod.status.pod_ips.first()?.ip.as_str()));
    first?.parse().ok()
}

/// Ports that the pod's annotation names; `None` without one. What is no port counts for nothing.
fn active_ports(meta: &Meta) -> Option<Vec<u16>> {
    let annotations = &meta.annotations;
    let text = annotations.active_ports.as_deref();
    let text = text.or(annotations.legacy_active_ports.as_deref())?;
    let ports = text.split(',').filter_map(|port| port.trim().parse().ok());
    Some(ports.collect())
}

/// Changes with everything that empties an engine's caches: another pod of the same name, and a
/// container that was started again in it, which may happen while no watch is listening.
fn incarnation(pod: &Pod) -> String {
    let containers = pod.status.container_statuses.iter();
    let restarts: u64 = containers.map(|c| u64::from(c.restart_count)).sum();
    format!("{}/{restarts}", pod.metadata.uid)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kubernetes::testing::pod;
    use serde_json::{Value, json};

    fn read(value: Value) -> Pod {
        serde_json::from_value(value).unwrap()
    }

    fn shown(specs: &[EndpointSpec]) -> Vec<String> {
        let show = |s: &EndpointSpec| format!("{}@{}#{}", s.name, s.address, s.rank);
        specs.iter().map(show).collect()
    }

    fn at(value: Value, ports: &[u16]) -> Vec<String> {
        shown(&endpoints(&read(value), ports))
    }

    #[test]
    fn every_port_of_a_ready_pod_is_an_endpoint() {
        let mut value = pod("a", 1);
        value["status"]["hostIP"] = json!("192.0.2.1");
        value["spec"]["hostname"] = json!("h");
        value["metadata"]["labels"]["llm-d.ai/role"] = json!("decode");
        let specs = endpoints(&read(value), &[8000, 8001]);
        assert_eq!(
            shown(&specs),
            ["a-rank-0@10.0.0.1:8000#0", "a-rank-1@10.0.0.1:8001#1"]
        );
        assert_eq!(specs[1].labels["llm-d.ai/role"], "decode");
        assert_eq!(specs[1].pod_name(), "a");
        assert_eq!(specs[1].details.node_address, Some([192, 0, 2, 1].into()));
        assert_eq!(specs[1].details.hostname.as_deref(), Some("h"));
        assert_eq!(specs[1].details.incarnation.as_deref(), Some("uid-a/0"));
    }

    #[test]
    fn pods_that_do_not_serve_have_no_endpoint() {
        let change = |path: &str, value: Value| {
            let mut pod = pod("a", 1);
            *pod.pointer_mut(path).unwrap() = value;
            at(pod, &[8000])
        };
        assert!(change("/status/conditions/0/status", json!("False")).is_empty());
        assert!(change("/status/conditions/0/status", json!("Unknown")).is_empty());
        assert!(change("/status/conditions", json!([])).is_empty());
        assert!(change("/status/podIP", json!("")).is_empty());
        let mut leaving = pod("a", 1);
        leaving["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
        assert!(at(leaving, &[8000]).is_empty());
    }

    #[test]
    fn the_primary_address_counts_whatever_its_family() {
        let mut six = pod("a", 1);
        six["status"]["podIP"] = json!("fd00::7");
        six["status"]["podIPs"] = json!([{"ip": "fd00::7"}, {"ip": "10.0.0.1"}]);
        assert_eq!(at(six.clone(), &[8000]), ["a-rank-0@[fd00::7]:8000#0"]);
        six["status"].as_object_mut().unwrap().remove("podIP");
        assert_eq!(at(six, &[8000]), ["a-rank-0@[fd00::7]:8000#0"]);
    }

    #[test]
    fn an_annotation_says_which_ports_serve() {
        let with = |name: &str, ports: &str| {
            let mut pod = pod("a", 1);
            pod["metadata"]["annotations"] = json!({name: ports});
            at(pod, &[8000, 8001, 8002])
        };
        let current = "llm-d.ai/active-ports";
        // Ranks are positions among all ports of the pool.
        assert_eq!(
            with(current, " 8002, x, 9999,8001"),
            ["a-rank-1@10.0.0.1:8001#1", "a-rank-2@10.0.0.1:8002#2"]
        );
        assert!(with(current, "").is_empty());
        let legacy = with("inference.networking.k8s.io/active-ports", "8000");
        assert_eq!(legacy, ["a-rank-0@10.0.0.1:8000#0"]);
        assert_eq!(with("other", "8000").len(), 3);
    }

    #[test]
    fn a_new_life_is_a_new_incarnation() {
        let incarnation = |change: fn(&mut Value)| {
            let mut pod = pod("a", 1);
            change(&mut pod);
            endpoints(&read(pod), &[8000])[0]
                .details
                .incarnation
                .clone()
                .unwrap()
        };
        assert_eq!(incarnation(|_| {}), "uid-a/0");
        assert_eq!(incarnation(|p| p["metadata"]["uid"] = json!("b")), "b/0");
        let statuses = |p: &mut Value| {
            p["status"]["containerStatuses"] = json!([{"restartCount": 2}, {"restartCount": 1}]);
            p["status"]["initContainerStatuses"] = json!([{"restartCount": 9}]);
        };
        assert_eq!(incarnation(statuses), "uid-a/3");
    }

    #[test]
    fn a_batch_ends_with_the_last_word_about_each_pod() {
        let mut table = PodTable::new(vec![8000, 8001]);
        let listed = table.replace(&[read(pod("a", 1)), read(pod("b", 2))]);
        assert_eq!(listed.len(), 4);
        let parts = |delta: Delta| -> (Vec<String>, Vec<String>) {
            let (gone, specs) = delta.into_parts();
            (gone.into_iter().map(|n| n.name).collect(), shown(&specs))
        };
        let mut delta = Delta::default();
        let mut one_port = pod("a", 1);
        one_port["metadata"]["annotations"] = json!({"llm-d.ai/active-ports": "8001"});
        table.apply(&read(one_port.clone()), &mut delta);
        let (gone, specs) = parts(delta);
        assert_eq!(gone, ["a-rank-0"]);
        assert_eq!(specs, ["a-rank-1@10.0.0.1:8001#1"]);
        // a changes and goes; b goes and comes back as another, then the end of the first is heard of
        // again; c comes and goes.
        let mut delta = Delta::default();
        table.apply(&read(one_port.clone()), &mut delta);
        table.delete(&read(one_port).metadata, &mut delta);
        table.delete(&read(pod("b", 2)).metadata, &mut delta);
        let mut again = pod("b", 3);
        again["metadata"]["uid"] = json!("again");
        table.apply(&read(again.clone()), &mut delta);
        table.delete(&read(pod("b", 2)).metadata, &mut delta);
        table.apply(&read(pod("c", 4)), &mut delta);
        table.delete(&read(pod("c", 4)).metadata, &mut delta);
        let (gone, specs) = parts(delta);
        assert_eq!(gone, ["a-rank-1", "c-rank-0", "c-rank-1"]);
        assert_eq!(
            specs,
            ["b-rank-0@10.0.0.3:8000#0", "b-rank-1@10.0.0.3:8001#1"]
        );
        // Not ready is gone, once.
        let mut delta = Delta::default();
        again["status"]["conditions"] = json!([]);
        table.apply(&read(again.clone()), &mut delta);
        assert_eq!(parts(delta).0, ["b-rank-0", "b-rank-1"]);
        let mut delta = Delta::default();
        table.apply(&read(again), &mut delta);
        assert_eq!(parts(delta), (Vec::new(), Vec::new()));
    }
}
