//! The parts of Kubernetes objects that are read here. Everything else of an object is skipped while
//! it is decoded: of a pod of 20 KB some 500 bytes stay.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde::de::DeserializeOwned;

/// Group of InferencePool v1.
pub const POOL_GROUP: &str = "inference.networking.k8s.io";
/// Group of InferencePool, objectives and rewrites before they moved; version `v1alpha2`.
pub const LEGACY_GROUP: &str = "inference.networking.x-k8s.io";
/// Group of objectives and rewrites; version `v1alpha2`.
pub const LLM_D_GROUP: &str = "llm-d.ai";

/// What a watch needs to know of any object.
pub trait Object: DeserializeOwned + Send + 'static {
    /// Its metadata.
    fn meta(&self) -> &Meta;
}

/// `metadata` of an object.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Meta {
    /// Name, unique in the namespace.
    pub name: String,
    /// Its namespace.
    pub namespace: String,
    /// Unique for all time.
    pub uid: String,
    /// Where the object is in the history of its collection.
    pub resource_version: String,
    /// RFC 3339, always in UTC and whole seconds, so that texts compare as times.
    pub creation_timestamp: Option<String>,
    /// Set once deletion was asked for.
    pub deletion_timestamp: Option<String>,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// The annotations we read.
    pub annotations: Annotations,
}

impl Meta {
    /// True once deletion was asked for.
    pub fn is_leaving(&self) -> bool {
        self.deletion_timestamp.is_some()
    }
}

/// Annotations that mean something here.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct Annotations {
    /// Ports of a pod that serve, comma-separated.
    #[serde(rename = "llm-d.ai/active-ports")]
    pub active_ports: Option<String>,
    /// Its former spelling.
    #[serde(rename = "inference.networking.k8s.io/active-ports")]
    pub legacy_active_ports: Option<String>,
}

/// A pod.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct Pod {
    /// Metadata.
    pub metadata: Meta,
    /// What was asked for.
    pub spec: PodSpec,
    /// What is.
    pub status: PodStatus,
}

/// `spec` of a pod.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct PodSpec {
    /// Host name it was given.
    pub hostname: Option<String>,
}

/// `status` of a pod.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct PodStatus {
    /// Its first address.
    #[serde(rename = "podIP")]
    pub pod_ip: Option<String>,
    /// Its addresses, one per IP family.
    #[serde(rename = "podIPs")]
    pub pod_ips: Vec<PodIp>,
    /// Address of its node.
    #[serde(rename = "hostIP")]
    pub host_ip: Option<String>,
    /// Conditions.
    pub conditions: Vec<Condition>,
    /// Containers, those of sidecars and init containers apart.
    pub container_statuses: Vec<ContainerStatus>,
}

/// One address of a pod.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct PodIp {
    /// The address.
    pub ip: String,
}

/// One condition of an object.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct Condition {
    /// What it is about.
    #[serde(rename = "type")]
    pub kind: String,
    /// `True`, `False` or `Unknown`.
    pub status: String,
}

/// One container of a pod.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct ContainerStatus {
    /// How often it was started again.
    pub restart_count: u32,
}

/// An InferencePool of either group.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct InferencePool {
    /// Metadata.
    pub metadata: Meta,
    /// What was asked for.
    pub spec: InferencePoolSpec,
}

/// `spec` of an InferencePool of either group.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct InferencePoolSpec {
    /// Which pods belong to it.
    pub selector: PoolSelector,
    /// v1: the ports of each pod.
    pub target_ports: Vec<TargetPort>,
    /// v1alpha2: its only port.
    pub target_port_number: Option<i64>,
    /// What the ports speak.
    pub app_protocol: Option<String>,
}

/// Which pods belong to a pool.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(untagged)]
pub enum PoolSelector {
    /// v1.
    Labels {
        /// Labels that a pod must have.
        #[serde(rename = "matchLabels")]
        match_labels: BTreeMap<String, String>,
    },
    /// v1alpha2: the labels themselves.
    Flat(BTreeMap<String, String>),
}

impl Default for PoolSelector {
    fn default() -> Self {
        Self::Flat(BTreeMap::new())
    }
}

impl PoolSelector {
    /// The labels that a pod must have.
    pub fn labels(&self) -> &BTreeMap<String, String> {
        match self {
            Self::Labels { match_labels } => match_labels,
            Self::Flat(labels) => labels,
        }
    }
}

/// A port of every pod of a pool.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct TargetPort {
    /// The number.
    pub number: i64,
}

impl Object for Pod {
    fn meta(&self) -> &Meta {
        &self.metadata
    }
}

impl Object for InferencePool {
    fn meta(&self) -> &Meta {
        &self.metadata
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn both_pool_groups_are_read() {
        let v1: InferencePool = serde_json::from_value(json!({
            "metadata": {"name": "p", "managedFields": [{}]},
            "spec": {"selector": {"matchLabels": {"app": "x"}}, "targetPorts": [{"number": 8000}],
                     "appProtocol": "http", "endpointPickerRef": {"name": "epp"}},
            "status": {"parents": []},
        }))
        .unwrap();
        let legacy: InferencePool = serde_json::from_value(json!({
            "metadata": {"name": "p"},
            "spec": {"selector": {"app": "x"}, "targetPortNumber": 8000, "extensionRef": {"name": "epp"}},
        }))
        .unwrap();
        assert_eq!(v1.spec.selector.labels(), legacy.spec.selector.labels());
        assert_eq!(v1.spec.target_ports, [TargetPort { number: 8000 }]);
        assert_eq!(legacy.spec.target_port_number, Some(8000));
    }

    #[test]
    fn of_a_pod_only_what_counts_is_kept() {
        let pod: Pod = serde_json::from_value(json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": "a", "uid": "u", "resourceVersion": "7",
                         "annotations": {"llm-d.ai/active-ports": "8000", "other": "x"}},
            "spec": {"hostname": "h", "containers": [{"name": "vllm", "image": "i"}]},
            "status": {"podIP": "10.0.0.1", "podIPs": [{"ip": "10.0.0.1"}, {"ip": "fd00::1"}],
                       "conditions": [{"type": "Ready", "status": "True", "lastProbeTime": null}],
                       "containerStatuses": [{"restartCount": 2}]},
        }))
        .unwrap();
        assert_eq!(
            pod.metadata.annotations.active_ports.as_deref(),
            Some("8000")
        );
        assert_eq!(pod.status.container_statuses[0].restart_count, 2);
        assert!(!pod.metadata.is_leaving());
    }
}
