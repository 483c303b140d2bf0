//! `topology-affinity-filter`

use serde::Deserialize;

use crate::plugin::{Build, Maturity, ParamDoc, Plugin, PluginError};
use crate::scheduling::topology::{Level, Places};
use crate::scheduling::{Candidates, Cycle, Filter};

/// Keeps endpoints at the same place as the one an earlier profile of the request picked.
///
/// The same place is `minAffinity` or nearer; a place that is unknown matches nothing. Without an
/// earlier pick, when its place is unknown, or when nothing is near enough, all stay.
#[derive(Debug)]
pub struct TopologyAffinityFilter {
    places: Places,
    farthest: Level,
}

#[derive(Debug, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
struct Settings {
    min_affinity: Level,
    topology_producer_name: String,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            min_affinity: Level::Host,
            topology_producer_name: String::new(),
        }
    }
}

impl Plugin for TopologyAffinityFilter {
    const TYPE: &'static str = "topology-affinity-filter";
    const MATURITY: Maturity = Maturity::Alpha;
    const PARAMETERS: &'static [ParamDoc] = &[
        ParamDoc {
            name: "minAffinity",
            kind: "string",
            default: "host",
            help: "What an endpoint must share with the earlier pick: host, rack, zone or region, or something nearer.",
        },
        ParamDoc {
            name: "topologyProducerName",
            kind: "string",
            default: "topology-extractor",
            help: "Instance that knows where endpoints are.",
        },
    ];
    const ABOUT: &'static str = "Keeps endpoints near the one an earlier profile picked.";

    fn build(build: &mut Build<'_>) -> Result<Self, PluginError> {
        let settings: Settings = build.read::<Self, _>()?;
        Ok(Self {
            places: Places::optional(build, &settings.topology_producer_name)?,
            farthest: settings.min_affinity,
        })
    }
}

impl Filter for TopologyAffinityFilter {
    fn filter(&self, _: &Cycle<'_>, candidates: Candidates<'_>, keep: &mut Vec<u32>) {
        if let Some(peer) = self.places.peer(candidates) {
            super::keep_where(candidates, keep, |_, candidate| {
                let shared = self.places.shared(&peer, candidate);
                shared.is_some_and(|level| level <= self.farthest)
            });
        }
        if keep.is_empty() {
            super::keep_all(candidates, keep);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scheduling::test_support::refusal;
    use crate::scheduling::topology::tests::pool;

    const PLACES: [&str; 6] = [
        "h1/r1/z1/g1",
        "h2/r1/z1/g1",
        "h3/r2/z1/g1",
        "h4/r3/z2/g1",
        "h5/r4/z3/g2",
        "",
    ];

    /// Positions that stay of [`PLACES`] when `peer` was picked before.
    fn kept(parameters: &str, peer: Option<u32>) -> Vec<u32> {
        let mut pool = pool(&PLACES);
        let filter: TopologyAffinityFilter = pool.plugin(parameters);
        let all: Vec<u32> = (0..6).collect();
        let mut keep = Vec::new();
        pool.with_cycle(|cycle, candidates| {
            let candidates = Candidates::new(candidates, &all).with_peer(peer);
            filter.filter(cycle, candidates, &mut keep);
        });
        keep
    }

    #[test]
    fn endpoints_near_the_peer_stay() {
        let all = [0, 1, 2, 3, 4, 5];
        for (level, peer, wanted) in [
            ("host", Some(0), &[0][..]),
            ("rack", Some(0), &[0, 1]),
            ("zone", Some(0), &[0, 1, 2]),
            ("region", Some(0), &[0, 1, 2, 3]),
            ("region", Some(4), &[4]),
            // The peer's place is unknown.
            ("region", Some(5), &all),
            ("host", None, &all),
        ] {
            let parameters = format!(r#"{{"minAffinity": "{level}"}}"#);
            assert_eq!(kept(&parameters, peer), wanted, "{level} {peer:?}");
        }
        assert_eq!(kept("{}", Some(1)), [1], "host is the default");
    }

    #[test]
    fn all_stay_when_nothing_is_near() {
        let mut pool = pool(&PLACES);
        let filter: TopologyAffinityFilter = pool.plugin("{}");
        let mut keep = Vec::new();
        pool.with_cycle(|cycle, candidates| {
            // The peer itself is not among those this profile may choose.
            let candidates = Candidates::new(candidates, &[1, 4, 5]).with_peer(Some(0));
            filter.filter(cycle, candidates, &mut keep);
        });
        assert_eq!(keep, [1, 4, 5]);
    }

    #[test]
    fn levels_are_checked() {
        let text = refusal::<TopologyAffinityFilter>(r#"{"minAffinity": "city"}"#);
        assert!(text.contains("unknown variant `city`"), "{text}");
    }
}
