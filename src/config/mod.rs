//! `EndpointPickerConfig`: from the document to running plugins.
//!
//! [`raw`] mirrors the file, [`builtin`] lists every plugin type, [`resolve`] fills defaults, builds
//! instances and checks references. The rest of the program sees only [`ResolvedConfig`]. This room
//! knows every plugin type and is seen only by `epp` and `cli`.

pub mod builtin;
pub mod raw;
pub mod resolve;
pub mod show;

pub use builtin::{Instance, PluginType, Registry};
pub use resolve::{LoadOptions, ResolvedConfig, ResolvedProfile, ResolvedSource};

/// Why a configuration cannot be used. Texts name the field, the value and what was expected.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// The document is not what its format says.
    #[error("failed to decode configuration: {0}")]
    Decode(String),
    /// A rule of the contract is broken.
    #[error("{0}")]
    Invalid(String),
    /// A plugin could not be built.
    #[error("failed to create plugin '{name}' (type: {type_name}): {reason}")]
    Plugin {
        /// Instance name.
        name: String,
        /// Type.
        type_name: String,
        /// What its factory said.
        reason: String,
    },
}

/// Loads a document, or the built-in one when `text` is `None`.
pub fn load(
    text: Option<&str>,
    options: &LoadOptions,
    registry: &Registry,
) -> Result<ResolvedConfig, ConfigError> {
    let document = raw::read(text.unwrap_or(raw::BUILT_IN))?;
    resolve::resolve(document, options, registry)
}
