//! `topology-extractor`

use std::sync::Arc;

use serde::Deserialize;

use crate::datalayer::{Endpoint, EndpointListener};
use crate::plugin::{Build, EndpointColumn, Maturity, ParamDoc, Plugin, PluginError};

/// Attribute that is published under the instance's name: [`Topology`].
pub const TOPOLOGY: &str = "Topology";

/// Where an endpoint runs, from near to far; what is unknown matches nothing.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Topology {
    /// Host.
    pub host: Option<String>,
    /// Rack.
    pub rack: Option<String>,
    /// Zone.
    pub zone: Option<String>,
    /// Region.
    pub region: Option<String>,
}

/// Reads where an endpoint runs from its labels, before requests see it.
///
/// Without a host label the host name that discovery knows counts. An endpoint of which nothing is
/// known has no attribute.
#[derive(Debug)]
pub struct TopologyExtractor {
    labels: Settings,
    column: EndpointColumn<Topology>,
}

/// Label names.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
struct Settings {
    hostname: String,
    rack: String,
    zone: String,
    region: String,
}

const HOST_LABEL: &str = "kubernetes.io/hostname";
const RACK_LABEL: &str = "topology.kubernetes.io/rack";
const ZONE_LABEL: &str = "topology.kubernetes.io/zone";
const REGION_LABEL: &str = "topology.kubernetes.io/region";

impl Plugin for TopologyExtractor {
    const TYPE: &'static str = "topology-extractor";
    const MATURITY: Maturity = Maturity::Alpha;
    const PARAMETERS: &'static [ParamDoc] = &[
        ParamDoc {
            name: "hostname",
            kind: "string",
            default: HOST_LABEL,
            help: "Label that names the host.",
        },
        ParamDoc {
            name: "rack",
            kind: "string",
            default: RACK_LABEL,
            help: "Label that names the rack.",
        },
        ParamDoc {
            name: "zone",
            kind: "string",
            default: ZONE_LABEL,
            help: "Label that names the zone.",
        },
        ParamDoc {
            name: "region",
            kind: "string",
            default: REGION_LABEL,
            help: "Label that names the region.",
        },
    ];
    const ABOUT: &'static str = "Reads host, rack, zone and region from an endpoint's labels.";

    fn build(build: &mut Build<'_>) -> Result<Self, PluginError> {
        let mut labels: Settings = build.read::<Self, _>()?;
        for (label, default) in [
            (&mut labels.hostname, HOST_LABEL),
            (&mut labels.rack, RACK_LABEL),
            (&mut labels.zone, ZONE_LABEL),
            (&mut labels.region, REGION_LABEL),
        ] {
            if label.is_empty() {
                default.clone_into(label);
            }
        }
        Ok(Self {
            labels,
            column: build.keys.endpoint_produce(TOPOLOGY)?,
        })
    }
}

impl EndpointListener for TopologyExtractor {
    fn joining(&self, endpoint: &Arc<Endpoint>) {
        let label = |name: &String| {
            let value = endpoint.spec.labels.get(name);
            value.filter(|v| !v.is_empty()).cloned()
        };
        let topology = Topology {
            host: label(&self.labels.hostname).or_else(|| endpoint.spec.details.hostname.clone()),
            rack: label(&self.labels.rack),
            zone: label(&self.labels.zone),
            region: label(&self.labels.region),
        };
        // One that lost its labels still has what they said.
        if topology != Topology::default() || endpoint.attribute(self.column).is_some() {
            endpoint.set_attribute(self.column, Arc::new(topology));
        }
    }

    fn added(&self, _: &Arc<Endpoint>) {}

    fn removed(&self, _: &Arc<Endpoint>) {}
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::datalayer::EndpointStore;
    use crate::datalayer::extractors::test_support::{build, endpoint};
    use crate::plugin::DataKeys;

    #[test]
    fn labels_say_where_an_endpoint_runs() {
        let mut keys = DataKeys::default();
        let extractor: TopologyExtractor =
            build(&mut keys, "where", r#"{"rack": "own/rack"}"#).unwrap();
        let column = keys
            .endpoint_require::<Topology>(TOPOLOGY, "where")
            .unwrap();
        let store = EndpointStore::default();
        store.subscribe(Arc::new(extractor));
        let labelled = endpoint(
            "a",
            &[
                (HOST_LABEL, "n1"),
                ("own/rack", "r1"),
                (RACK_LABEL, "no"),
                (ZONE_LABEL, ""),
            ],
        );
        let mut named = endpoint("b", &[(REGION_LABEL, "eu")]).spec;
        named.details.hostname = Some("h2".to_owned());
        let unknown = endpoint("c", &[("other", "x")]).spec;
        store.replace(vec![labelled.spec, named, unknown]);
        let own = |text: &str| Some(text.to_owned());
        let topologies: Vec<_> = store
            .snapshot()
            .iter()
            .map(|e| e.attribute(column).as_deref().cloned())
            .collect();
        let expected = [
            Some(Topology {
                host: own("n1"),
                rack: own("r1"),
                ..Topology::default()
            }),
            Some(Topology {
                host: own("h2"),
                region: own("eu"),
                ..Topology::default()
            }),
            None,
        ];
        assert_eq!(topologies, expected);
    }
}
