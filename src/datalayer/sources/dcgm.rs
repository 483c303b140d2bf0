//! `dcgm-data-source`

use super::http::{Defaults, INTERVAL, PATH, SCHEME, SKIP_VERIFY};
use super::{DataSource, HttpSource, Payload};
use crate::plugin::{Build, Maturity, ParamDoc, Plugin, PluginError};

/// Scrapes a DCGM exporter beside each endpoint, or the one of its node.
#[derive(Debug)]
pub struct DcgmDataSource(HttpSource);

impl Plugin for DcgmDataSource {
    const TYPE: &'static str = "dcgm-data-source";
    const MATURITY: Maturity = Maturity::Alpha;
    const PARAMETERS: &'static [ParamDoc] = &[
        SCHEME,
        PATH,
        ParamDoc {
            name: "port",
            kind: "int",
            default: "9400",
            help: "Port of the exposition, 1 to 65535.",
        },
        SKIP_VERIFY,
        ParamDoc {
            name: "useNodeAddress",
            kind: "bool",
            default: "false",
            help: "Fetch from the endpoint's node, where the exporter serves all its pods.",
        },
        INTERVAL,
    ];
    const ABOUT: &'static str = "Scrapes a DCGM exporter beside each endpoint or on its node.";

    fn build(build: &mut Build<'_>) -> Result<Self, PluginError> {
        let defaults = Defaults {
            scheme: "http",
            path: "/metrics",
            port: Some(9400),
            insecure_skip_verify: true,
        };
        HttpSource::read::<Self>(build, defaults).map(Self)
    }
}

impl DataSource for DcgmDataSource {
    fn payload(&self) -> Payload {
        Payload::Exposition
    }

    fn http(&self) -> Option<&HttpSource> {
        Some(&self.0)
    }
}
