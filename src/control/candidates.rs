//! Which endpoints a request may go to, before any plugin looks at it.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use crate::datalayer::{Endpoint, EndpointStore};
use crate::scheduling::Candidate;

/// The proxy's subset hint (`x-gateway-destination-endpoint-subset`).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Subset {
    /// No hint: the whole pool.
    #[default]
    Any,
    /// Only these; an entry without a port stands for every port of the address. An empty list selects
    /// nothing.
    Only(Vec<(IpAddr, Option<u16>)>),
}

impl Subset {
    /// Only these `ip:port` or addresses, however written. What is neither selects nothing.
    pub fn only<'a>(entries: impl IntoIterator<Item = &'a str>) -> Self {
        let read = |entry: &str| {
            if let Ok(address) = entry.parse::<SocketAddr>() {
                return Some((address.ip(), Some(address.port())));
            }
            let bare = entry.trim_start_matches('[').trim_end_matches(']');
            Some((bare.parse().ok()?, None))
        };
        Self::Only(entries.into_iter().filter_map(read).collect())
    }

    /// True when `endpoint` is in the subset. The reference compares addresses only; the protocol
    /// says `ip:port`, which is what counts here.
    pub fn admits(&self, endpoint: &Endpoint) -> bool {
        match self {
            Self::Any => true,
            Self::Only(entries) => {
                let own = endpoint.spec.address;
                let same = |port: &Option<u16>| port.is_none_or(|port| port == own.port());
                entries
                    .iter()
                    .any(|(ip, port)| *ip == own.ip() && same(port))
            }
        }
    }
}

/// The candidates of a worker thread, kept from request to request: as long as the pool is the same
/// list, a request costs one comparison for each endpoint whose metrics have not changed, instead of
/// four reference counts. An endpoint that left the pool is held until the thread's next request.
#[derive(Debug, Default)]
pub struct CandidatePool {
    pool: Arc<Vec<Arc<Endpoint>>>,
    candidates: Vec<Candidate>,
    /// `candidates` are all of `pool`, in order.
    whole: bool,
}

impl CandidatePool {
    /// The endpoints of `store` that `subset` admits, metrics frozen.
    pub fn collect(&mut self, store: &EndpointStore, subset: &Subset) -> &mut Vec<Candidate> {
        let same = store.refresh(&mut self.pool);
        let whole = *subset == Subset::Any;
        if same && whole && self.whole {
            for candidate in &mut self.candidates {
                candidate.refresh();
            }
        } else if whole && self.whole {
            // Of a large pool little changes at once: what stayed in its place costs no more than ever.
            self.candidates.truncate(self.pool.len());
            for (candidate, endpoint) in self.candidates.iter_mut().zip(self.pool.iter()) {
                if Arc::ptr_eq(&candidate.endpoint, endpoint) {
                    candidate.refresh();
                } else {
                    *candidate = Candidate::new(Arc::clone(endpoint));
                }
            }
            let further = self.pool.iter().skip(self.candidates.len());
            self.candidates
                .extend(further.map(|endpoint| Candidate::new(Arc::clone(endpoint))));
        } else {
            self.candidates.clear();
            let admitted = self.pool.iter().filter(|endpoint| subset.admits(endpoint));
            self.candidates
                .extend(admitted.map(|endpoint| Candidate::new(Arc::clone(endpoint))));
            self.whole = whole;
        }
        &mut self.candidates
    }

    /// Lends the list to a request.
    pub fn take(&mut self) -> Lent {
        Lent {
            list: std::mem::take(&mut self.candidates),
            whole_of: std::mem::take(&mut self.whole).then(|| Arc::clone(&self.pool)),
        }
    }

    /// Takes a lent list back. Kept for the next request when it is still the whole pool, which
    /// screeners and requests that overlapped on this thread may have changed.
    pub fn put_back(&mut self, lent: Lent) {
        let current = lent
            .whole_of
            .is_some_and(|pool| Arc::ptr_eq(&pool, &self.pool) && pool.len() == lent.list.len());
        if current && !self.whole {
            self.candidates = lent.list;
            self.whole = true;
        }
    }
}

/// The candidates of one request.
#[derive(Debug, Default)]
pub struct Lent {
    /// The candidates.
    pub list: Vec<Candidate>,
    /// The pool that they were all of.
    whole_of: Option<Arc<Vec<Arc<Endpoint>>>>,
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

    fn store(addresses: &[&str]) -> EndpointStore {
        let store = EndpointStore::default();
        replace(&store, addresses);
        store
    }

    fn replace(store: &EndpointStore, addresses: &[&str]) {
        store.replace(addresses.iter().map(|a| endpoint(a).spec).collect());
    }

    fn names(candidates: &[Candidate]) -> Vec<&str> {
        candidates
            .iter()
            .map(|c| c.endpoint.host_port_str())
            .collect()
    }

    #[test]
    fn a_kept_list_follows_pool_metrics_and_subset() {
        let store = store(&["10.0.0.1:1", "10.0.0.2:1"]);
        let mut kept = CandidatePool::default();
        assert_eq!(kept.collect(&store, &Subset::Any).len(), 2);
        let lent = kept.take();
        kept.put_back(lent);
        let metrics = crate::datalayer::EngineMetrics {
            waiting_requests: 7,
            ..Default::default()
        };
        store.snapshot()[1].set_metrics(metrics);
        let waiting = |candidates: &[Candidate]| -> Vec<u32> {
            candidates
                .iter()
                .map(|c| c.metrics.waiting_requests)
                .collect()
        };
        assert_eq!(waiting(kept.collect(&store, &Subset::Any)), [0, 7]);
        assert_eq!(
            names(kept.collect(&store, &only(&["10.0.0.2:1"]))),
            ["10.0.0.2:1"]
        );
        assert_eq!(
            kept.collect(&store, &Subset::Any).len(),
            2,
            "a part is not kept"
        );
        replace(&store, &["10.0.0.2:1", "10.0.0.3:1"]);
        assert_eq!(
            names(kept.collect(&store, &Subset::Any)),
            ["10.0.0.2:1", "10.0.0.3:1"]
        );
        // A list kept from one pool to the next follows it in order and length.
        for pool in [
            &["10.0.0.3:1", "10.0.0.2:1"][..],
            &["10.0.0.3:1"],
            &["10.0.0.3:1", "10.0.0.4:1", "10.0.0.2:1"],
            &[],
            &["10.0.0.2:1", "10.0.0.3:1"],
        ] {
            let lent = kept.take();
            kept.put_back(lent);
            replace(&store, pool);
            assert_eq!(names(kept.collect(&store, &Subset::Any)), pool);
        }
        // What a screener cut, or an overlapping request took, is collected anew.
        let mut lent = kept.take();
        lent.list.pop();
        kept.put_back(lent);
        assert_eq!(kept.collect(&store, &Subset::Any).len(), 2);
        let late = kept.take();
        replace(&store, &["10.0.0.4:1", "10.0.0.5:1"]);
        assert_eq!(kept.collect(&store, &Subset::Any).len(), 2);
        let lent = kept.take();
        kept.put_back(late);
        assert_eq!(
            names(kept.collect(&store, &Subset::Any)),
            ["10.0.0.4:1", "10.0.0.5:1"]
        );
        kept.put_back(lent);
        assert_eq!(
            names(kept.collect(&store, &Subset::Any)),
            ["10.0.0.4:1", "10.0.0.5:1"]
        );
    }

    fn only(entries: &[&str]) -> Subset {
        Subset::only(entries.iter().copied())
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
        assert!(only(&["[FD00:0::07]:8000"]).admits(&endpoint("[fd00::7]:8000")));
        assert!(!only(&["[fd00::7]:8001", "host:8000"]).admits(&endpoint("[fd00::7]:8000")));
        assert!(!only(&["10.0.0.70"]).admits(&endpoint("10.0.0.7:8000")));
    }
}
