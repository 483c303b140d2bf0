//! Pickers: from weighted totals to an ordered choice.

mod max_score;
mod random;
mod weighted_random;

pub use max_score::MaxScorePicker;
pub use random::RandomPicker;
pub use weighted_random::WeightedRandomPicker;

use crate::plugin::{Build, ParamDoc, Plugin, PluginError};

/// The one parameter all pickers have.
const PARAMETERS: &[ParamDoc] = &[ParamDoc {
    name: "maxNumOfEndpoints",
    kind: "int",
    default: "1",
    help: "How many endpoints to name, best first; 0 and less mean 1. Envoy's ORIGINAL_DST cluster understands only one.",
}];

#[derive(Debug, Default, serde::Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
struct Settings {
    max_num_of_endpoints: i64,
}

/// `maxNumOfEndpoints`, at least 1.
fn max_endpoints<P: Plugin>(build: &Build<'_>) -> Result<usize, PluginError> {
    let settings: Settings = build.read::<P, _>()?;
    Ok(usize::try_from(settings.max_num_of_endpoints)
        .unwrap_or(1)
        .max(1))
}
