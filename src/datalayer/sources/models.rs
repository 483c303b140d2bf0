//! `models-data-source`

use super::http::{CA, CLIENT_CERT, CLIENT_KEY, Defaults, INTERVAL, PATH, SCHEME, SKIP_VERIFY};
use super::{DataSource, HttpSource, Payload};
use crate::plugin::{Build, Maturity, ParamDoc, Plugin, PluginError};

/// Fetches each endpoint's OpenAI model list.
#[derive(Debug)]
pub struct ModelsDataSource(HttpSource);

impl Plugin for ModelsDataSource {
    const TYPE: &'static str = "models-data-source";
    const MATURITY: Maturity = Maturity::Beta;
    const PARAMETERS: &'static [ParamDoc] = &[
        SCHEME,
        ParamDoc {
            default: "/v1/models",
            help: "Path of the model list.",
            ..PATH
        },
        SKIP_VERIFY,
        CA,
        CLIENT_CERT,
        CLIENT_KEY,
        INTERVAL,
    ];
    const ABOUT: &'static str = "Fetches each endpoint's model list.";

    fn build(build: &mut Build<'_>) -> Result<Self, PluginError> {
        let defaults = Defaults {
            scheme: "http",
            path: "/v1/models",
            port: None,
            insecure_skip_verify: true,
        };
        HttpSource::read::<Self>(build, defaults).map(Self)
    }
}

impl DataSource for ModelsDataSource {
    fn payload(&self) -> Payload {
        Payload::Models
    }

    fn http(&self) -> Option<&HttpSource> {
        Some(&self.0)
    }
}
