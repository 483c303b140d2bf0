//! What every plugin shares: identity, maturity, strict parameters, the data keys that wire
//! producers to consumers, and the per-request columns those keys address.
//!
//! Does not know any hook: each room owns its hook traits, `config` owns the list of plugin types.

pub mod data;
pub mod duration;
pub mod go_value;
mod hook;
mod lease;
pub mod params;

pub use data::{
    Attributes, Column, DataKeys, EndpointColumn, InFlightSlot, MAX_COLUMNS, MAX_ENDPOINT_COLUMNS,
    MAX_IN_FLIGHT_PRODUCERS,
};
pub use hook::{Hook, Lap};
pub use lease::{Lease, Leases, PromptUsage};
pub use params::{ParamError, Parameters};

/// How settled a plugin is. Alpha needs `--allow-experimental-plugins`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Maturity {
    /// May change or vanish.
    Alpha,
    /// Kept compatible.
    Beta,
}

/// Type and instance name, as configuration and metrics spell them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TypedName {
    /// Registered type, for example `queue-scorer`.
    pub type_name: &'static str,
    /// Instance name; the type when the document gives none.
    pub name: String,
}

/// Why a plugin could not be built.
#[derive(Debug, thiserror::Error)]
pub enum PluginError {
    /// A parameter is unknown, of the wrong type or out of range.
    #[error(transparent)]
    Parameter(#[from] ParamError),
    /// Anything else that makes the instance unusable.
    #[error("{0}")]
    Invalid(String),
}

/// One parameter as `pinpod plugins` and the reference page show it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ParamDoc {
    /// Key in the document.
    pub name: &'static str,
    /// `int`, `float`, `bool`, `string`, `duration`, `list` or `object`.
    pub kind: &'static str,
    /// The default as a value of that kind, or in words when there is none: `none`, `required`, or where
    /// it comes from. Empty means that absence is the default.
    pub default: &'static str,
    /// What it does, with unit and range.
    pub help: &'static str,
}

impl ParamDoc {
    /// The default, when it is a value: writing it down changes nothing. Empty lists and objects are
    /// left out, as absent says the same.
    pub fn default_value(&self) -> Option<serde_json::Value> {
        let text = self.default;
        match self.kind {
            _ if ["", "none", "required"].contains(&text) => None,
            "int" => text.parse::<i64>().ok().map(Into::into),
            "float" => text.parse::<f64>().ok().map(Into::into),
            "bool" => text.parse::<bool>().ok().map(Into::into),
            // Several words describe a value.
            "string" => (!text.contains(' ')).then(|| text.into()),
            "duration" => text
                .parse::<duration::GoDuration>()
                .ok()
                .map(|_| text.into()),
            "list" | "object" => serde_json::from_str(text)
                .ok()
                .filter(|value| ![serde_json::json!([]), serde_json::json!({})].contains(value)),
            _ => None,
        }
    }
}

/// What a plugin gets to build one instance from.
#[derive(Debug)]
pub struct Build<'a> {
    /// Instance name.
    pub name: &'a str,
    /// The `parameters` block.
    pub parameters: &'a Parameters,
    /// Declares what the instance produces and consumes.
    pub keys: &'a mut DataKeys,
}

/// A plugin type: what the registry and the reference page need to know, and how to build it.
pub trait Plugin: Sized {
    /// Registered type name.
    const TYPE: &'static str;
    /// How settled it is.
    const MATURITY: Maturity;
    /// Accepted parameters. Unknown ones are errors, unless [`Self::LENIENT`].
    const PARAMETERS: &'static [ParamDoc];
    /// True for the types whose reference ignores any `parameters` (configuration contract, section 3).
    const LENIENT: bool = false;
    /// One sentence for the reference page.
    const ABOUT: &'static str;

    /// Builds one instance.
    fn build(build: &mut Build<'_>) -> Result<Self, PluginError>;
}

impl Build<'_> {
    /// Reads the parameters of `P` into `T`; see [`Parameters::read`].
    pub fn read<P: Plugin, T: serde::de::DeserializeOwned>(&self) -> Result<T, PluginError> {
        let fields: Vec<&str> = P::PARAMETERS.iter().map(|p| p.name).collect();
        Ok(self.parameters.read(&fields)?)
    }
}
