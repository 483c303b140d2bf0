//! How near two endpoints are; shared by the topology filter and scorer.

use std::sync::Arc;

use serde::Deserialize;

use super::Candidates;
use crate::datalayer::extractors::{TOPOLOGY, Topology};
use crate::plugin::{Build, EndpointColumn, PluginError};
use crate::scheduling::attributes::producer_or;

/// What two endpoints share, nearest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Level {
    Host,
    Rack,
    Zone,
    Region,
}

impl Level {
    /// The nearest level at which both are known to be at the same place.
    pub(super) fn shared(a: &Topology, b: &Topology) -> Option<Self> {
        let same = |a: &Option<String>, b: &Option<String>| a.is_some() && a == b;
        [
            (Self::Host, &a.host, &b.host),
            (Self::Rack, &a.rack, &b.rack),
            (Self::Zone, &a.zone, &b.zone),
            (Self::Region, &a.region, &b.region),
        ]
        .into_iter()
        .find(|(_, a, b)| same(a, b))
        .map(|(level, ..)| level)
    }
}

/// Where endpoints are, and where the one is that an earlier profile picked.
#[derive(Debug)]
pub(super) struct Places(EndpointColumn<Topology>);

impl Places {
    /// Reads what the instance called `producer` publishes, if there is one.
    pub(super) fn optional(build: &mut Build<'_>, producer: &str) -> Result<Self, PluginError> {
        let producer = producer_or(producer, "topology-extractor");
        build.keys.endpoint_optional(TOPOLOGY, producer).map(Self)
    }

    /// Where the peer is; `None` without a peer or when its place is unknown.
    pub(super) fn peer(&self, candidates: Candidates<'_>) -> Option<Arc<Topology>> {
        candidates.peer()?.endpoint.attribute(self.0)
    }

    /// Where `candidate` is; `None` when that is not known.
    pub(super) fn of(&self, candidate: &super::Candidate) -> Option<Arc<Topology>> {
        candidate.endpoint.attribute(self.0)
    }

    /// What `candidate` shares with `peer`.
    pub(super) fn shared(&self, peer: &Topology, candidate: &super::Candidate) -> Option<Level> {
        Level::shared(peer, candidate.endpoint.attribute(self.0)?.as_ref())
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::scheduling::test_support::{Pool, endpoint};

    pub(in crate::scheduling) fn place(text: &str) -> Topology {
        let mut parts = text.split('/').map(|p| (p != "-").then(|| p.to_owned()));
        let mut next = || parts.next().flatten();
        Topology {
            host: next(),
            rack: next(),
            zone: next(),
            region: next(),
        }
    }

    /// Endpoints named after their places (`host/rack/zone/region`, `-` unknown, empty none at all), as
    /// `topology-extractor` would have left them.
    pub(in crate::scheduling) fn pool(places: &[&str]) -> Pool {
        let mut pool = Pool::new(places.iter().map(|name| endpoint(name)));
        pool.keys.enter("topology-extractor");
        let column = pool.keys.endpoint_produce::<Topology>(TOPOLOGY).unwrap();
        for (candidate, text) in pool.candidates.iter().zip(places) {
            if !text.is_empty() {
                candidate
                    .endpoint
                    .set_attribute(column, Arc::new(place(text)));
            }
        }
        pool
    }

    #[test]
    fn the_nearest_shared_level_counts() {
        for (a, b, wanted) in [
            ("h/r/z/g", "h/r/z/g", Some(Level::Host)),
            ("h/r/z/g", "i/r/z/g", Some(Level::Rack)),
            ("h/r/z/g", "i/s/z/g", Some(Level::Zone)),
            ("h/r/z/g", "i/s/y/g", Some(Level::Region)),
            ("h/r/z/g", "i/s/y/f", None),
            ("-/-/z/g", "-/-/z/g", Some(Level::Zone)),
            ("h/-/z/-", "h/r/y/g", Some(Level::Host)),
            ("-/-/-/-", "-/-/-/-", None),
        ] {
            assert_eq!(Level::shared(&place(a), &place(b)), wanted, "{a} {b}");
        }
        assert!(Level::Host < Level::Rack && Level::Zone < Level::Region);
    }
}
