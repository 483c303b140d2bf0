//! `passthrough-parser`: the fallback that reads nothing.

use super::{AppProtocol, Body, ParseError, Parser, Payload};
use crate::plugin::{Build, Maturity, ParamDoc, Plugin, PluginError};

/// Forwards any body unread; such requests are scheduled by load alone.
#[derive(Debug, Default)]
pub struct PassthroughParser;

impl Plugin for PassthroughParser {
    const TYPE: &'static str = "passthrough-parser";
    const MATURITY: Maturity = Maturity::Beta;
    const PARAMETERS: &'static [ParamDoc] = &[];
    const LENIENT: bool = true;
    const ABOUT: &'static str = "Forwards bodies of any other path unread.";

    fn build(_: &mut Build<'_>) -> Result<Self, PluginError> {
        Ok(Self)
    }
}

impl Parser for PassthroughParser {
    fn type_name(&self) -> &'static str {
        Self::TYPE
    }

    fn path_suffixes(&self) -> &'static [&'static str] {
        &[]
    }

    fn app_protocols(&self) -> &'static [AppProtocol] {
        &[]
    }

    fn parse(&self, _: &str, _: &Body) -> Result<Payload, ParseError> {
        Ok(Payload::raw(false))
    }
}
