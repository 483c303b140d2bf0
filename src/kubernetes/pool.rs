//! What an InferencePool says, whichever group it is of.

use super::objects::{InferencePool, LEGACY_GROUP, POOL_GROUP};
use super::watch::Collection;

/// Ports of a pool or of a selector at most.
pub const MAX_TARGET_PORTS: usize = 8;

/// Which pods, and which of their ports.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PoolSpec {
    /// Label selector in its text form.
    pub selector: String,
    /// Ports in the order that gives ranks.
    pub ports: Vec<u16>,
    /// What the ports speak, as the pool says it.
    pub app_protocol: Option<String>,
}

impl PoolSpec {
    /// Reads a pool; an error says why it cannot be used.
    pub fn read(pool: &InferencePool) -> Result<Self, String> {
        let labels = pool.spec.selector.labels();
        if labels.is_empty() {
            // Would select every pod of the namespace.
            return Err("spec.selector selects nothing".to_owned());
        }
        let pairs: Vec<String> = labels.iter().map(|(k, v)| format!("{k}={v}")).collect();
        let listed = pool.spec.target_ports.iter().map(|port| port.number);
        let mut ports = Vec::new();
        for number in listed.chain(pool.spec.target_port_number) {
            let port = u16::try_from(number).ok().filter(|port| *port > 0);
            let port = port.ok_or_else(|| format!("target port {number} is no port"))?;
            if !ports.contains(&port) {
                ports.push(port);
            }
        }
        if ports.is_empty() || ports.len() > MAX_TARGET_PORTS {
            return Err(format!(
                "{} target ports are not 1 to {MAX_TARGET_PORTS}",
                ports.len()
            ));
        }
        Ok(Self {
            selector: pairs.join(","),
            ports,
            app_protocol: pool.spec.app_protocol.clone(),
        })
    }
}

/// The one pool called `name`, in the group of v1 or the one before. The older one may be absent.
pub(super) fn collection(group: &str, namespace: &str, name: &str) -> Collection {
    let legacy = group == LEGACY_GROUP;
    Collection {
        resource: "inferencepools",
        group: if legacy { LEGACY_GROUP } else { POOL_GROUP },
        version: if legacy { "v1alpha2" } else { "v1" },
        namespace: namespace.to_owned(),
        labels: None,
        fields: Some(format!("metadata.name={name}")),
        optional: false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    #[expect(clippy::needless_pass_by_value, reason = "calls read better")]
    fn read(spec: Value) -> Result<PoolSpec, String> {
        let pool = json!({"metadata": {"name": "p"}, "spec": spec});
        PoolSpec::read(&serde_json::from_value(pool).unwrap())
    }

    #[test]
    fn labels_become_a_selector_and_ports_keep_their_order() {
        let pool = read(json!({
            "selector": {"matchLabels": {"b": "2", "a": "1"}},
            "targetPorts": [{"number": 8001}, {"number": 8000}, {"number": 8001}],
        }))
        .unwrap();
        assert_eq!(
            (pool.selector.as_str(), pool.ports),
            ("a=1,b=2", vec![8001, 8000])
        );
        let legacy = read(json!({"selector": {"a": "1"}, "targetPortNumber": 8000})).unwrap();
        assert_eq!(
            (legacy.selector.as_str(), legacy.ports),
            ("a=1", vec![8000])
        );
    }

    #[test]
    fn what_selects_everything_or_no_port_is_refused() {
        let nine: Vec<_> = (1..=9).map(|number| json!({"number": number})).collect();
        for (spec, problem) in [
            (
                json!({"targetPorts": [{"number": 1}]}),
                "spec.selector selects nothing",
            ),
            (
                json!({"selector": {"matchLabels": {}}, "targetPorts": [{"number": 1}]}),
                "spec.selector selects nothing",
            ),
            (
                json!({"selector": {"a": "b"}}),
                "0 target ports are not 1 to 8",
            ),
            (
                json!({"selector": {"a": "b"}, "targetPorts": nine}),
                "9 target ports are not 1 to 8",
            ),
            (
                json!({"selector": {"a": "b"}, "targetPorts": [{"number": 65536}]}),
                "target port 65536 is no port",
            ),
            (
                json!({"selector": {"a": "b"}, "targetPortNumber": 0}),
                "target port 0 is no port",
            ),
        ] {
            assert_eq!(read(spec).unwrap_err(), problem);
        }
    }
}
