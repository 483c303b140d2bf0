//! `EndpointPickerConfig`: from the document to running plugins.
//!
//! `tree.rs` reads the text and remembers lines, [`raw`] mirrors the file, [`builtin`] lists every plugin
//! type, [`resolve`] builds instances, fills defaults and checks references (with `profiles.rs`,
//! `sources.rs`, `producers.rs`, `gates.rs` and `flow.rs`, one subject each), `lint.rs` finds what has no effect,
//! [`show`] prints the outcome and the reference page. The rest of the program sees only [`ResolvedConfig`]. This room
//! knows every plugin type and is seen only by `epp` and `cli`.

use std::fs::File;
use std::io::{ErrorKind, Read};
use std::path::Path;

pub mod builtin;
mod flow;
mod gates;
mod lint;
mod producers;
mod profiles;
pub mod quantity;
pub mod raw;
pub mod resolve;
pub mod resolved;
pub mod show;
mod sources;
mod tree;

pub use builtin::{Instance, PluginType, Registry};
pub use resolve::{ConfigLoader, LoadOptions};
pub use resolved::{ResolvedConfig, ResolvedProfile, ResolvedSource};

/// Why a configuration cannot be used. Shown with line and field, as far as they are known.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigError {
    /// Line of the document, from 1.
    pub line: Option<u64>,
    /// Path of the field, for example `plugins[3].parameters.lruSize`; may be empty.
    pub field: String,
    /// What is wrong with it.
    pub problem: Problem,
}

impl std::error::Error for ConfigError {}

impl std::fmt::Display for ConfigError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write_place(f, self.line, &self.field)?;
        self.problem.fmt(f)
    }
}

/// What is wrong. Texts name the value and what was expected.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Problem {
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

impl Problem {
    /// The error about `field`.
    fn at(self, field: impl Into<String>) -> ConfigError {
        ConfigError {
            line: None,
            field: field.into(),
            problem: self,
        }
    }
}

impl ConfigError {
    /// Names the field, unless a more precise one is known.
    fn at(mut self, field: impl Into<String>) -> Self {
        if self.field.is_empty() {
            self.field = field.into();
        }
        self
    }
}

/// Something an operator should know about a configuration that can be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Warning {
    /// Line of the document, from 1.
    pub line: Option<u64>,
    /// Path of the field; may be empty.
    pub field: String,
    /// What there is to know.
    pub text: String,
}

impl std::fmt::Display for Warning {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write_place(f, self.line, &self.field)?;
        f.write_str(&self.text)
    }
}

fn write_place(
    f: &mut std::fmt::Formatter<'_>,
    line: Option<u64>,
    field: &str,
) -> std::fmt::Result {
    match (line, field.is_empty()) {
        (Some(line), true) => write!(f, "line {line}: "),
        (Some(line), false) => write!(f, "line {line}: {field}: "),
        (None, false) => write!(f, "{field}: "),
        (None, true) => Ok(()),
    }
}

/// Longest document that is read.
pub const MAX_FILE_BYTES: u64 = 1 << 20;

/// Reads a document from a file of at most [`MAX_FILE_BYTES`].
pub fn read_file(path: &Path) -> std::io::Result<String> {
    let mut text = String::new();
    // Of a file that is too long, or a device, no more is read than it takes to notice.
    File::open(path)?
        .take(MAX_FILE_BYTES + 1)
        .read_to_string(&mut text)?;
    if text.len() as u64 > MAX_FILE_BYTES {
        let problem = format!("more than {MAX_FILE_BYTES} bytes");
        return Err(std::io::Error::new(ErrorKind::FileTooLarge, problem));
    }
    Ok(text)
}

/// Loads a document, or the built-in one when `text` is `None`, as the first of a process.
pub fn load(
    text: Option<&str>,
    options: &LoadOptions,
    registry: &Registry,
) -> Result<ResolvedConfig, ConfigError> {
    ConfigLoader::new(*options, registry.clone()).load(text)
}
