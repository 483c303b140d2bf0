//! `always-disagg-multimodal-decider`

use crate::plugin::{Build, Column, Maturity, ParamDoc, Plugin, PluginError};
use crate::scheduling::attributes::{MEDIA_FEATURES, MediaFeature, TOKEN_PRODUCER};
use crate::scheduling::{Decider, Round};

/// Gives the stage an endpoint of its own when a prompt has an image, a video or audio. Ignores
/// parameters.
#[derive(Debug)]
pub struct AlwaysMultimodalDecider(Column<MediaFeature>);

impl Plugin for AlwaysMultimodalDecider {
    const TYPE: &'static str = "always-disagg-multimodal-decider";
    const MATURITY: Maturity = Maturity::Beta;
    const PARAMETERS: &'static [ParamDoc] = &[];
    const LENIENT: bool = true;
    const ABOUT: &'static str =
        "Runs the stage on an endpoint of its own for requests with images, video or audio.";

    fn build(build: &mut Build<'_>) -> Result<Self, PluginError> {
        let media = build.keys.require(MEDIA_FEATURES, TOKEN_PRODUCER);
        Ok(Self(media))
    }
}

impl Decider for AlwaysMultimodalDecider {
    fn wants_stage(&self, round: &Round<'_>, _: Option<u32>) -> bool {
        let media = round.cycle.attributes.get(self.0);
        media.is_some_and(|media| !media.is_empty())
    }
}
