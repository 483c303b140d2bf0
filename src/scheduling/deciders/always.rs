//! `always-disagg-pd-decider`

use crate::plugin::{Build, Maturity, ParamDoc, Plugin, PluginError};
use crate::scheduling::{Decider, Round};

/// Gives every request's stage an endpoint of its own. Ignores parameters.
#[derive(Debug, Default)]
pub struct AlwaysDecider;

impl Plugin for AlwaysDecider {
    const TYPE: &'static str = "always-disagg-pd-decider";
    const MATURITY: Maturity = Maturity::Beta;
    const PARAMETERS: &'static [ParamDoc] = &[];
    const LENIENT: bool = true;
    const ABOUT: &'static str = "Runs the stage on an endpoint of its own, always.";

    fn build(_: &mut Build<'_>) -> Result<Self, PluginError> {
        Ok(Self)
    }
}

impl Decider for AlwaysDecider {
    fn wants_stage(&self, _: &Round<'_>, _: Option<u32>) -> bool {
        true
    }
}
