//! `topology-affinity-scorer`

use serde::Deserialize;

use crate::plugin::{Build, Maturity, ParamDoc, Plugin, PluginError};
use crate::scheduling::topology::{Level, Places};
use crate::scheduling::{Candidates, Cycle, Scorer};

/// Prefers endpoints near the one an earlier profile of the request picked.
///
/// Score by what they share: host 1, rack 0.20, zone 0.05, region 0.02, nothing or unknown 0; 0 for all
/// without an earlier pick.
#[derive(Debug)]
pub struct TopologyAffinityScorer {
    places: Places,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
struct Settings {
    topology_producer_name: String,
}

impl Plugin for TopologyAffinityScorer {
    const TYPE: &'static str = "topology-affinity-scorer";
    const MATURITY: Maturity = Maturity::Alpha;
    const PARAMETERS: &'static [ParamDoc] = &[ParamDoc {
        name: "topologyProducerName",
        kind: "string",
        default: "topology-extractor",
        help: "Instance that knows where endpoints are.",
    }];
    const ABOUT: &'static str = "Prefers endpoints near the one an earlier profile picked.";

    fn build(build: &mut Build<'_>) -> Result<Self, PluginError> {
        let settings: Settings = build.read::<Self, _>()?;
        Ok(Self {
            places: Places::optional(build, &settings.topology_producer_name)?,
        })
    }
}

impl Scorer for TopologyAffinityScorer {
    fn score(&self, _: &Cycle<'_>, candidates: Candidates<'_>, scores: &mut [f64]) {
        let Some(peer) = self.places.peer(candidates) else {
            return;
        };
        for (score, (_, candidate)) in scores.iter_mut().zip(candidates.iter()) {
            *score = match self.places.shared(&peer, candidate) {
                Some(Level::Host) => 1.0,
                Some(Level::Rack) => 0.2,
                Some(Level::Zone) => 0.05,
                Some(Level::Region) => 0.02,
                None => 0.0,
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scheduling::topology::tests::pool;

    fn scores(peer: Option<u32>) -> [f64; 6] {
        let mut pool = pool(&[
            "h1/r1/z1/g1",
            "h2/r1/z1/g1",
            "h3/r2/z1/g1",
            "h4/r3/z2/g1",
            "h5/r4/z3/g2",
            "",
        ]);
        let scorer: TopologyAffinityScorer = pool.plugin("{}");
        let all: Vec<u32> = (0..6).collect();
        let mut scores = [0.0; 6];
        pool.with_cycle(|cycle, candidates| {
            let candidates = Candidates::new(candidates, &all).with_peer(peer);
            scorer.score(cycle, candidates, &mut scores);
        });
        scores
    }

    #[test]
    fn nearer_endpoints_score_higher() {
        assert_eq!(scores(Some(0)), [1.0, 0.2, 0.05, 0.02, 0.0, 0.0]);
        assert_eq!(scores(Some(5)), [0.0; 6], "the peer's place is unknown");
        assert_eq!(scores(None), [0.0; 6]);
    }
}
