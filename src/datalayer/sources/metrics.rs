//! `metrics-data-source`

use super::http::{CA, CLIENT_CERT, CLIENT_KEY, Defaults, INTERVAL, PATH, SCHEME, SKIP_VERIFY};
use super::{DataSource, HttpSource, Payload};
use crate::plugin::{Build, Maturity, ParamDoc, Plugin, PluginError};

/// Scrapes each endpoint's Prometheus metrics, from its own port unless told otherwise.
#[derive(Debug)]
pub struct MetricsDataSource(HttpSource);

impl Plugin for MetricsDataSource {
    const TYPE: &'static str = "metrics-data-source";
    const MATURITY: Maturity = Maturity::Beta;
    const PARAMETERS: &'static [ParamDoc] = &[
        SCHEME,
        PATH,
        ParamDoc {
            name: "port",
            kind: "int",
            default: "the endpoint's",
            help: "Port of the exposition, 1 to 65535.",
        },
        SKIP_VERIFY,
        CA,
        CLIENT_CERT,
        CLIENT_KEY,
        INTERVAL,
    ];
    const ABOUT: &'static str = "Scrapes each endpoint's Prometheus metrics.";

    fn build(build: &mut Build<'_>) -> Result<Self, PluginError> {
        let defaults = Defaults {
            scheme: "http",
            path: "/metrics",
            port: None,
            insecure_skip_verify: true,
        };
        HttpSource::read::<Self>(build, defaults).map(Self)
    }
}

impl DataSource for MetricsDataSource {
    fn payload(&self) -> Payload {
        Payload::Exposition
    }

    fn http(&self) -> Option<&HttpSource> {
        Some(&self.0)
    }
}
