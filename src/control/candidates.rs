//! Which endpoints a request may go to, before any plugin looks at it.

use std::sync::Arc;

use crate::datalayer::Endpoint;
use crate::scheduling::Candidate;

/// The proxy's subset hint (`x-gateway-destination-endpoint-subset`).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Subset {
    /// No hint: the whole pool.
    #[default]
    Any,
    /// Only these `ip:port`; an entry without a port stands for every port of the address. An empty
    /// list selects nothing.
    Only(Vec<String>),
}

impl Subset {
    /// True when `endpoint` is in the subset. The reference compares addresses only; the protocol
    /// says `ip:port`, which is what counts here.
    pub fn admits(&self, endpoint: &Endpoint) -> bool {
        match self {
            Self::Any => true,
            Self::Only(entries) => {
                let ip = endpoint.spec.address.ip().to_string();
                entries.iter().any(|entry| {
                    let bare = entry.trim_start_matches('[').trim_end_matches(']');
                    entry.as_bytes() == endpoint.host_port || bare == ip
                })
            }
        }
    }
}

/// Fills `candidates` with the endpoints of `pool` that `subset` admits, metrics frozen.
pub fn collect(pool: &[Arc<Endpoint>], subset: &Subset, candidates: &mut Vec<Candidate>) {
    candidates.clear();
    let admitted = pool.iter().filter(|endpoint| subset.admits(endpoint));
    candidates.extend(admitted.map(|endpoint| Candidate {
        endpoint: Arc::clone(endpoint),
        metrics: endpoint.metrics(),
    }));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::datalayer::{EndpointIndex, EndpointSpec};

    fn endpoint(address: &str) -> Endpoint {
        let spec = EndpointSpec {
            name: address.to_owned(),
            namespace: "default".to_owned(),
            address: address.parse().unwrap(),
            labels: std::collections::BTreeMap::new(),
            rank: 0,
            details: crate::datalayer::EndpointDetails::default(),
        };
        Endpoint::new(spec, EndpointIndex(0))
    }

    fn only(entries: &[&str]) -> Subset {
        Subset::Only(entries.iter().map(|e| (*e).to_owned()).collect())
    }

    #[test]
    fn a_subset_matches_address_and_port() {
        let endpoint = endpoint("10.0.0.7:8000");
        assert!(Subset::Any.admits(&endpoint));
        assert!(only(&["10.0.0.9:1", "10.0.0.7:8000"]).admits(&endpoint));
        assert!(!only(&["10.0.0.7:8001"]).admits(&endpoint));
        assert!(!only(&[]).admits(&endpoint));
    }

    #[test]
    fn an_entry_without_port_stands_for_the_address() {
        assert!(only(&["10.0.0.7"]).admits(&endpoint("10.0.0.7:8000")));
        assert!(only(&["fd00::7"]).admits(&endpoint("[fd00::7]:8000")));
        assert!(only(&["[fd00::7]:8000"]).admits(&endpoint("[fd00::7]:8000")));
        assert!(!only(&["10.0.0.70"]).admits(&endpoint("10.0.0.7:8000")));
    }
}
