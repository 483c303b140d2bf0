//! The installation in a cluster: the pool and its picker, the pods it selects, and what the picker may do.
//!
//! Objects are read as JSON: what is looked at here differs from what routing needs of them.

use kube::Client;
use serde_json::{Value, json};

use super::finding::Report;
use crate::kubernetes::objects::{LEGACY_GROUP, LLM_D_GROUP, POOL_GROUP};

/// Pods that are looked at; a larger pool is judged by its first ones.
const MAX_PODS: usize = 500;
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

/// Looks at the cluster; returns the addresses of ready pods, with every port.
pub async fn check(installation: &Installation, report: &mut Report) -> Vec<std::net::SocketAddr> {
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

    async fn pods(
        &self,
        selector: &str,
        ports: &[u16],
        report: &mut Report,
    ) -> Vec<std::net::SocketAddr> {
        let subject = format!("pods {selector}");
        let path = self.path(
            "api/v1",
            &format!("pods?labelSelector={}&limit={MAX_PODS}", encoded(selector)),
        );
        let list = match self.get(&path).await {
            Ok(list) => list,
            Err(refusal) => {
                self.unreadable("pods", refusal, report);
                return Vec::new();
            }
        };
        let pods: Vec<&Value> = list["items"].as_array().into_iter().flatten().collect();
        if pods.is_empty() {
            report.error(
                "pods",
                subject,
                "the selector matches no pod",
                format!(
                    "compare it with `kubectl -n {} get pods --show-labels`; pool and pods must be in one namespace",
                    self.0.namespace
                ),
            );
            return Vec::new();
        }
        let (ready, waiting): (Vec<&Value>, Vec<&Value>) =
            pods.into_iter().partition(|p| is_ready(p));
        let waiting: Vec<&str> = waiting
            .iter()
            .map(|pod| name_of(pod))
            .take(MAX_NAMES)
            .collect();
        if ready.is_empty() {
            report.error(
                "pods",
                &subject,
                format!("none is ready: {waiting:?}"),
                "kubectl describe pod says why; models take minutes to load",
            );
        } else if waiting.is_empty() {
            report.ok("pods", &subject, format!("{} ready", ready.len()));
        } else {
            report.warning(
                "pods",
                &subject,
                format!("{} ready, not ready: {waiting:?}", ready.len()),
                "kubectl describe pod says why",
            );
        }
        if let Some(pod) = ready.first() {
            declared_ports(pod, ports, &subject, report);
        }
        addresses(&ready, ports)
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
            "pods?labelSelector={}&limit={MAX_PODS}",
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
        self.replicas(&pods, &subject, report);
        let account = first["spec"]["serviceAccountName"].as_str();
        Some(account.unwrap_or("default").to_owned())
    }

    fn replicas(&self, pods: &[&Value], subject: &str, report: &mut Report) {
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

    /// Everything the picker needs to be allowed, asked of the API server.
    async fn rights(&self, account: &str, report: &mut Report) {
        let namespace = &self.0.namespace;
        let subject = format!("ServiceAccount {namespace}/{account}");
        let pool = matches!(self.0.target, Target::Pool(_));
        let before = report.findings.len();
        for (group, resource, verbs, without) in RIGHTS {
            if *resource == "inferencepools" && !pool {
                continue;
            }
            let mut lacking = Vec::new();
            for verb in *verbs {
                match self.may(account, group, resource, verb).await {
                    Ok(true) => {}
                    Ok(false) => lacking.push(*verb),
                    Err(refusal) => {
                        let why = match refusal {
                            Refusal::Other(error) => error,
                            _ => "you may not ask (subjectaccessreviews)".to_owned(),
                        };
                        report.warning(
                            "rbac",
                            subject,
                            why,
                            format!("kubectl auth can-i list pods -n {namespace} --as system:serviceaccount:{namespace}:{account}"),
                        );
                        return;
                    }
                }
            }
            if lacking.is_empty() {
                continue;
            }
            let verbs = lacking.join(",");
            let of = if group.is_empty() {
                String::new()
            } else {
                format!(".{group}")
            };
            let message = format!("may not {verbs} {resource}{of}: {}", without.consequence());
            let fix = without.fix(namespace, account, &verbs, &format!("{resource}{of}"));
            match without {
                Without::Routing => report.error("rbac", &subject, message, fix),
                _ => report.warning("rbac", &subject, message, fix),
            }
        }
        if report.findings.len() == before {
            report.ok("rbac", subject, "may do all it needs");
        }
    }

    async fn may(
        &self,
        account: &str,
        group: &str,
        resource: &str,
        verb: &str,
    ) -> Result<bool, Refusal> {
        let namespace = &self.0.namespace;
        let mut attributes = json!({"group": group, "resource": resource, "verb": verb});
        if !matches!(resource, "tokenreviews" | "subjectaccessreviews") {
            attributes["namespace"] = json!(namespace);
        }
        let review = json!({
            "apiVersion": "authorization.k8s.io/v1", "kind": "SubjectAccessReview",
            "spec": {
                "user": format!("system:serviceaccount:{namespace}:{account}"),
                "groups": ["system:serviceaccounts", format!("system:serviceaccounts:{namespace}"), "system:authenticated"],
                "resourceAttributes": attributes,
            },
        });
        let request = http::Request::post("/apis/authorization.k8s.io/v1/subjectaccessreviews")
            .header("content-type", "application/json")
            .body(review.to_string().into_bytes())
            .map_err(|error| Refusal::Other(error.to_string()))?;
        let answer = self.send(request).await?;
        Ok(answer["status"]["allowed"] == true)
    }
}

/// What does not work without a right.
#[derive(Debug, Clone, Copy)]
enum Without {
    Routing,
    Objectives,
    Election,
    MetricsAuth,
}

impl Without {
    fn consequence(self) -> &'static str {
        match self {
            Self::Routing => "it has no endpoints",
            Self::Objectives => "priorities and rewrites are not read",
            Self::Election => "needed with --ha-enable-leader-election",
            Self::MetricsAuth => "scrapes with a token are refused",
        }
    }

    fn fix(self, namespace: &str, account: &str, verbs: &str, resource: &str) -> String {
        let name = format!(
            "{account}-{}",
            resource.split('.').next().unwrap_or_default()
        );
        let (role, scope) = match self {
            Self::MetricsAuth => ("clusterrole", String::new()),
            _ => ("role", format!(" -n {namespace}")),
        };
        format!(
            "kubectl create {role} {name}{scope} --verb={verbs} --resource={resource}\nkubectl create {role}binding {name}{scope} --{role}={name} --serviceaccount={namespace}:{account}"
        )
    }
}

const WATCH: &[&str] = &["get", "list", "watch"];

/// Group, resource, verbs, and what they are for.
const RIGHTS: &[(&str, &str, &[&str], Without)] = &[
    ("", "pods", WATCH, Without::Routing),
    (POOL_GROUP, "inferencepools", WATCH, Without::Routing),
    (
        LLM_D_GROUP,
        "inferenceobjectives",
        WATCH,
        Without::Objectives,
    ),
    (
        LLM_D_GROUP,
        "inferencemodelrewrites",
        WATCH,
        Without::Objectives,
    ),
    (
        "coordination.k8s.io",
        "leases",
        &["get", "create", "update"],
        Without::Election,
    ),
    (
        "authentication.k8s.io",
        "tokenreviews",
        &["create"],
        Without::MetricsAuth,
    ),
    (
        "authorization.k8s.io",
        "subjectaccessreviews",
        &["create"],
        Without::MetricsAuth,
    ),
];

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

/// A container that declares ports should declare the pool's.
fn declared_ports(pod: &Value, ports: &[u16], subject: &str, report: &mut Report) {
    let containers = ["containers", "initContainers"]
        .into_iter()
        .flat_map(|kind| pod["spec"][kind].as_array().into_iter().flatten());
    let declared: Vec<u64> = containers
        .flat_map(|c| c["ports"].as_array().into_iter().flatten())
        .filter_map(|port| port["containerPort"].as_u64())
        .collect();
    let strange: Vec<_> = ports
        .iter()
        .filter(|port| !declared.is_empty() && !declared.contains(&u64::from(**port)))
        .collect();
    if !strange.is_empty() {
        report.warning(
            "ports",
            subject,
            format!("target ports {strange:?} are not among the declared {declared:?}"),
            "set the pool's targetPorts to the port of the server (vLLM: 8000, behind a routing sidecar the sidecar's)",
        );
    }
}

fn addresses(pods: &[&Value], ports: &[u16]) -> Vec<std::net::SocketAddr> {
    let ips = pods.iter().filter_map(|pod| {
        let ip: std::net::IpAddr = pod["status"]["podIP"].as_str()?.parse().ok()?;
        Some(ip)
    });
    ips.flat_map(|ip| ports.iter().map(move |port| (ip, *port).into()))
        .collect()
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
