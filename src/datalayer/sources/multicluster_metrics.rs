//! `multicluster-metrics-data-source`

use super::http::{CA, CLIENT_CERT, CLIENT_KEY, Defaults, INTERVAL, PATH, SCHEME, SKIP_VERIFY};
use super::{DataSource, HttpSource, Payload};
use crate::plugin::{Build, Maturity, ParamDoc, Plugin, PluginError};

/// Scrapes the picker of each peer cluster. The way there crosses a trust boundary, so it is encrypted
/// and certificates are checked unless told otherwise.
#[derive(Debug)]
pub struct MulticlusterMetricsDataSource(HttpSource);

impl Plugin for MulticlusterMetricsDataSource {
    const TYPE: &'static str = "multicluster-metrics-data-source";
    const MATURITY: Maturity = Maturity::Alpha;
    const PARAMETERS: &'static [ParamDoc] = &[
        ParamDoc {
            default: "https",
            ..SCHEME
        },
        PATH,
        ParamDoc {
            default: "false",
            ..SKIP_VERIFY
        },
        CA,
        CLIENT_CERT,
        CLIENT_KEY,
        INTERVAL,
    ];
    const ABOUT: &'static str = "Scrapes the picker of each peer cluster.";

    fn build(build: &mut Build<'_>) -> Result<Self, PluginError> {
        let defaults = Defaults {
            scheme: "https",
            path: "/metrics",
            port: None,
            insecure_skip_verify: false,
        };
        HttpSource::read::<Self>(build, defaults).map(Self)
    }
}

impl DataSource for MulticlusterMetricsDataSource {
    fn payload(&self) -> Payload {
        Payload::Exposition
    }

    fn http(&self) -> Option<&HttpSource> {
        Some(&self.0)
    }
}
