//! `pinpod sidecar`

use std::process::ExitCode;

use crate::epp::options::OptionsError;
use crate::sidecar::{options, run};

/// Parses the flags of the sidecar and runs it.
#[expect(clippy::print_stderr, reason = "stderr is where bad usage is reported")]
pub(super) fn main(arguments: impl IntoIterator<Item = String>) -> ExitCode {
    match options::parse(arguments) {
        Ok(options) => super::report(run::run(options)),
        // Prints help to stdout and errors to stderr, and exits with 0 or 2.
        Err(OptionsError::Clap(error)) => error.exit(),
        Err(OptionsError::Invalid(text)) => {
            eprintln!("error: {text}");
            ExitCode::from(2)
        }
    }
}
