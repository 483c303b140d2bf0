//! Feature gates.

use super::{ConfigError, Problem};

/// What `featureGates` turns on and off.
pub(super) struct Gates {
    pub(super) flow_control: bool,
    pub(super) populate_standbys: bool,
}

/// Reads the gates; an unknown one is an error.
pub(super) fn read(gates: &[String]) -> Result<Gates, ConfigError> {
    let mut read = Gates {
        flow_control: false,
        populate_standbys: true,
    };
    for (position, gate) in gates.iter().enumerate() {
        let fail =
            |text: String| Err(Problem::Invalid(text).at(format!("featureGates[{position}]")));
        let (name, value) = gate.split_once('=').unwrap_or((gate, "true"));
        let value = value.trim().to_ascii_lowercase();
        let enabled = match value.as_str() {
            "1" | "t" | "true" => true,
            "0" | "f" | "false" => false,
            _ => {
                return fail(format!(
                    "{value} is not a valid value for the feature gate {name} (error: expected a \
                     boolean)"
                ));
            }
        };
        match name.trim() {
            "flowControl" => read.flow_control = enabled,
            "haPopulateNonLeaderDatastore" => read.populate_standbys = enabled,
            other => return fail(format!("feature gate '{other}' is unknown or unregistered")),
        }
    }
    Ok(read)
}
