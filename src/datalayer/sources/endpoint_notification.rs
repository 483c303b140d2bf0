//! `endpoint-notification-source`

use super::{DataSource, Payload};
use crate::plugin::{Build, Maturity, ParamDoc, Plugin, PluginError};

/// Names the plugins that follow endpoints. They do so by themselves, listed here or not.
#[derive(Debug)]
pub struct EndpointNotificationSource;

impl Plugin for EndpointNotificationSource {
    const TYPE: &'static str = "endpoint-notification-source";
    const MATURITY: Maturity = Maturity::Beta;
    const PARAMETERS: &'static [ParamDoc] = &[];
    const LENIENT: bool = true;
    const ABOUT: &'static str = "Accepted: every plugin learns of endpoints by itself.";

    fn build(_: &mut Build<'_>) -> Result<Self, PluginError> {
        Ok(Self)
    }
}

impl DataSource for EndpointNotificationSource {
    fn payload(&self) -> Payload {
        Payload::Endpoints
    }
}
