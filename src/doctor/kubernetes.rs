//! The installation in a cluster: the pool and its picker, the pods it selects, and what the picker may do.
//!
//! Objects are read as JSON: what is looked at here differs from what routing needs of them.

use kube::Client;
use serde_json::Value;

use super::finding::Report;
use crate::datalayer::EndpointSpec;
use crate::kubernetes::objects::{LEGACY_GROUP, LLM_D_GROUP, POOL_GROUP};

mod lease;
mod pods;
mod rights;

/// Replicas of a picker that are looked at.
const MAX_PICKERS: usize = 500;
/// Names listed in a message.
const MAX_NAMES: usize = 5;

/// What to look at.
#[derive(Clone)]
pub struct Installation {
    /// The cluster.
    pub client: Client,
    /// Namespace of pool, pods and picker.
    pub namespace: String,
    /// Which pods are endpoints.
    pub target: Target,
    /// The picker's account, when no Service leads to it.
    pub service_account: Option<String>,
}

impl std::fmt::Debug for Installation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Installation")
            .field("namespace", &self.namespace)
            .field("target", &self.target)
            .finish_non_exhaustive()
    }
}

/// Which pods are endpoints.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// Those of an InferencePool.
    Pool(String),
    /// Those of a selector, at these ports.
    Selector(String, Vec<u16>),
}

/// Why the API server did not give an object.
#[derive(Debug)]
enum Refusal {
    Missing,
    Forbidden,
    Other(String),
}

/// Looks at the cluster; returns the endpoints that the picker has.
pub async fn check(installation: &Installation, report: &mut Report) -> Vec<EndpointSpec> {
    let cluster = Cluster(installation);
    let (selector, ports, picker) = match &installation.target {
        Target::Selector(selector, ports) => (selector.clone(), ports.clone(), None),
        Target::Pool(name) => match cluster.pool(name, report).await {
            Some(pool) => pool,
            None => return Vec::new(),
        },
    };
    let endpoints = cluster.pods(&selector, &ports, report).await;
    let account = match picker {
        Some(service) => cluster.picker(&service, report).await,
        None => None,
    };
    let account = installation.service_account.clone().or(account);
    cluster.objectives(report).await;
    match account {
        Some(account) => cluster.rights(&account, report).await,
        None => report.warning(
            "rbac",
            format!("namespace {}", installation.namespace),
            "the picker's service account is not known",
            "give --service-account",
        ),
    }
    endpoints
}

/// The picker's Service as a pool names it.
struct PickerRef {
    service: String,
    port: Option<u64>,
}

struct Cluster<'a>(&'a Installation);

impl Cluster<'_> {
    async fn get(&self, path: &str) -> Result<Value, Refusal> {
        let request = http::Request::get(path).body(Vec::new());
        self.send(request.map_err(|e| Refusal::Other(e.to_string()))?)
            .await
    }

    async fn send(&self, request: http::Request<Vec<u8>>) -> Result<Value, Refusal> {
        match self.0.client.request::<Value>(request).await {
            Ok(value) => Ok(value),
            Err(kube::Error::Api(status)) if status.code == 404 => Err(Refusal::Missing),
            Err(kube::Error::Api(status)) if status.code == 403 => Err(Refusal::Forbidden),
            Err(error) => Err(Refusal::Other(error.to_string())),
        }
    }

    /// `api/v1` or `apis/group/version`, then the namespace and `rest`.
    fn path(&self, group: &str, rest: &str) -> String {
        format!("/{group}/namespaces/{}/{rest}", self.0.namespace)
    }

    /// Notes that something could not be read.
    fn unreadable(&self, what: &str, refusal: Refusal, report: &mut Report) {
        let namespace = &self.0.namespace;
        let (message, fix) = match refusal {
            Refusal::Missing => (
                "is not there".to_owned(),
                "check the name and the namespace",
            ),
            Refusal::Forbidden => (
                "you may not read it".to_owned(),
                "look with an account that may: doctor needs get and list",
            ),
            Refusal::Other(error) => (
                error,
                "check kubeconfig, context and the way to the API server",
            ),
        };
        report.error("kubernetes", format!("{what} in {namespace}"), message, fix);
    }

    /// Selector, ports and picker of the pool.
    async fn pool(
        &self,
        name: &str,
        report: &mut Report,
    ) -> Option<(String, Vec<u16>, Option<PickerRef>)> {
        let subject = format!("InferencePool {}/{name}", self.0.namespace);
        let groups = [
            format!("apis/{POOL_GROUP}/v1"),
            format!("apis/{LEGACY_GROUP}/v1alpha2"),
        ];
        for group in &groups {
            match self
                .get(&self.path(group, &format!("inferencepools/{name}")))
                .await
            {
                Ok(pool) => {
                    let version = group.trim_start_matches("apis/");
                    report.ok("pool", &subject, version);
                    conditions(&pool, &subject, report);
                    return shape(&pool, &subject, report);
                }
                Err(Refusal::Missing) => {}
                Err(refusal) => {
                    self.unreadable(&format!("InferencePool {name}"), refusal, report);
                    return None;
                }
            }
        }
        let others = self.get(&self.path(&groups[0], "inferencepools")).await;
        match others {
            Err(_) => report.error(
                "pool",
                subject,
                "there is no such pool, and no InferencePool v1 in this cluster",
                "kubectl apply -f deploy/kubernetes/crds, then make the pool; or run the picker with --endpoint-selector, which needs no CRD",
            ),
            Ok(list) => report.error(
                "pool",
                subject,
                format!("there is no such pool; here are {:?}", names(&list)),
                "correct --pool-name and --pool-namespace: both must be those of the pool",
            ),
        }
        None
    }

    /// The picker behind its Service; returns its account.
    async fn picker(&self, picker: &PickerRef, report: &mut Report) -> Option<String> {
        let subject = format!("Service {}/{}", self.0.namespace, picker.service);
        let path = self.path("api/v1", &format!("services/{}", picker.service));
        let service = match self.get(&path).await {
            Ok(service) => service,
            Err(Refusal::Missing) => {
                report.error(
                    "picker-service",
                    subject,
                    "the pool names it as its picker and it is not there",
                    "make the Service, or correct spec.endpointPickerRef.name of the pool",
                );
                return None;
            }
            Err(refusal) => {
                self.unreadable("services", refusal, report);
                return None;
            }
        };
        let offered: Vec<u64> = service["spec"]["ports"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(|port| port["port"].as_u64())
            .collect();
        if let Some(port) = picker.port.filter(|port| !offered.contains(port)) {
            report.error(
                "picker-service",
                &subject,
                format!("the pool calls port {port}, the Service has {offered:?}"),
                "spec.endpointPickerRef.port.number is a port of the Service, usually 9002",
            );
        }
        let selector = service["spec"]["selector"].as_object()?;
        let pairs: Vec<String> = selector
            .iter()
            .map(|(key, value)| format!("{key}={}", value.as_str().unwrap_or_default()))
            .collect();
        let query = format!(
            "pods?labelSelector={}&limit={MAX_PICKERS}",
            encoded(&pairs.join(","))
        );
        let list = self.get(&self.path("api/v1", &query)).await.ok()?;
        let pods: Vec<&Value> = list["items"].as_array().into_iter().flatten().collect();
        let Some(first) = pods.first() else {
            report.error(
                "picker-pods",
                subject,
                "selects no pod",
                "compare spec.selector of the Service with the labels of the picker's Deployment",
            );
            return None;
        };
        if self.replicas(&pods, &subject, report) {
            self.lease(&pods, report).await;
        }
        let account = first["spec"]["serviceAccountName"].as_str();
        Some(account.unwrap_or("default").to_owned())
    }

    /// Looks at the replicas together; true when they elect a leader.
    fn replicas(&self, pods: &[&Value], subject: &str, report: &mut Report) -> bool {
        let ready = pods.iter().filter(|pod| is_ready(pod)).count();
        let elects = pods.iter().all(|pod| {
            let containers = pod["spec"]["containers"].as_array().into_iter().flatten();
            containers
                .flat_map(|c| c["args"].as_array().into_iter().flatten())
                .filter_map(Value::as_str)
                .any(|a| {
                    matches!(
                        a,
                        "--ha-enable-leader-election" | "--ha-enable-leader-election=true"
                    )
                })
        });
        if ready == 0 {
            report.error(
                "picker-pods",
                subject,
                "no picker is ready",
                format!("kubectl -n {} logs of its pod says why", self.0.namespace),
            );
        } else if pods.len() > 1 && !elects {
            report.warning(
                "picker-replicas",
                subject,
                format!("{} replicas answer without electing a leader", pods.len()),
                "each knows only the load and the prefixes it sent itself: add --ha-enable-leader-election, or use scorers without local state",
            );
        } else if elects && ready > 1 {
            report.error(
                "picker-replicas",
                subject,
                format!("{ready} replicas believe they lead"),
                "readiness must ask gRPC service `readiness` on port 9003, which only the leader confirms",
            );
        } else {
            let message = format!("{ready} of {} pickers ready", pods.len());
            report.ok("picker-pods", subject, message);
        }
        elects
    }

    /// Objects of the group that is passed over.
    async fn objectives(&self, report: &mut Report) {
        for resource in ["inferenceobjectives", "inferencemodelrewrites"] {
            let current = self.path(&format!("apis/{LLM_D_GROUP}/v1alpha2"), resource);
            let legacy = self.path(&format!("apis/{LEGACY_GROUP}/v1alpha2"), resource);
            let (Ok(_), Ok(old)) = (self.get(&current).await, self.get(&legacy).await) else {
                continue;
            };
            let ignored = names(&old);
            if !ignored.is_empty() {
                report.warning(
                    "objectives",
                    format!("{resource}.{LEGACY_GROUP}"),
                    format!(
                        "{ignored:?} are passed over: {resource}.{LLM_D_GROUP} is installed too"
                    ),
                    format!("make them again with apiVersion {LLM_D_GROUP}/v1alpha2"),
                );
            }
        }
    }
}

/// Selector, ports and picker of either version of a pool.
fn shape(
    pool: &Value,
    subject: &str,
    report: &mut Report,
) -> Option<(String, Vec<u16>, Option<PickerRef>)> {
    let spec = &pool["spec"];
    let labels = spec["selector"]["matchLabels"]
        .as_object()
        .or_else(|| spec["selector"].as_object())
        .filter(|labels| !labels.is_empty());
    let Some(labels) = labels else {
        report.error(
            "pool",
            subject,
            "spec.selector is empty",
            "name the labels of the model servers in spec.selector.matchLabels",
        );
        return None;
    };
    let pairs: Vec<String> = labels
        .iter()
        .map(|(key, value)| format!("{key}={}", value.as_str().unwrap_or_default()))
        .collect();
    let listed = spec["targetPorts"].as_array().into_iter().flatten();
    let numbers = listed.filter_map(|port| port["number"].as_u64());
    let ports = numbers
        .chain(spec["targetPortNumber"].as_u64())
        .filter_map(|number| u16::try_from(number).ok())
        .collect();
    let reference = [&spec["endpointPickerRef"], &spec["extensionRef"]]
        .into_iter()
        .find(|reference| reference["name"].is_string());
    let Some(reference) = reference else {
        report.error(
            "picker-service",
            subject,
            "names no picker: most gateways refuse such a pool",
            "set spec.endpointPickerRef: {name: <service>, port: {number: 9002}}",
        );
        return Some((pairs.join(","), ports, None));
    };
    let picker = PickerRef {
        service: reference["name"].as_str().unwrap_or_default().to_owned(),
        port: reference["port"]["number"]
            .as_u64()
            .or(reference["portNumber"].as_u64()),
    };
    Some((pairs.join(","), ports, Some(picker)))
}

/// What gateways say of the pool.
fn conditions(pool: &Value, subject: &str, report: &mut Report) {
    let status = &pool["status"];
    let parents: Vec<&Value> = [&status["parents"], &status["parent"]]
        .into_iter()
        .flat_map(|list| list.as_array().into_iter().flatten())
        .filter(|parent| parent["parentRef"]["kind"] != "Status")
        .collect();
    if parents.is_empty() {
        report.warning(
            "gateway",
            subject,
            "no gateway has taken it up",
            "route to it: an HTTPRoute with backendRefs [{group: inference.networking.k8s.io, kind: InferencePool, name: ...}]; see that the gateway's support for InferencePools is switched on",
        );
    }
    for parent in parents {
        let gateway = parent["parentRef"]["name"].as_str().unwrap_or("?");
        for condition in parent["conditions"].as_array().into_iter().flatten() {
            let text = |key: &str| condition[key].as_str().unwrap_or_default();
            let of = format!("{subject} at gateway {gateway}");
            if text("status") == "False" && text("type") != "Exported" {
                let message = format!(
                    "not {}: {} {}",
                    text("type"),
                    text("reason"),
                    text("message")
                );
                let fix = "the gateway gives the reason; ResolvedRefs speaks of the picker's Service, Accepted of the route";
                report.error("gateway", of, message.trim_end(), fix);
            } else if text("status") == "True" {
                report.ok("gateway", of, text("type"));
            }
        }
    }
}

fn is_ready(pod: &Value) -> bool {
    let conditions = pod["status"]["conditions"].as_array().into_iter().flatten();
    pod["metadata"]["deletionTimestamp"].is_null()
        && conditions
            .into_iter()
            .any(|c| c["type"] == "Ready" && c["status"] == "True")
}

fn name_of(object: &Value) -> &str {
    object["metadata"]["name"].as_str().unwrap_or_default()
}

fn names(list: &Value) -> Vec<&str> {
    let items = list["items"].as_array().into_iter().flatten();
    items.map(name_of).take(MAX_NAMES).collect()
}

/// A selector as a query value.
fn encoded(text: &str) -> String {
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_' | b'~');
    text.bytes().fold(String::new(), |mut out, byte| {
        if plain(byte) {
            out.push(char::from(byte));
        } else {
            use std::fmt::Write;
            // Writing to a string cannot fail.
            let _ = write!(out, "%{byte:02X}");
        }
        out
    })
}

#[cfg(test)]
mod tests;
