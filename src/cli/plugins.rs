//! `pinpod plugins`

use crate::config::{builtin, show};

/// Prints every plugin type with its parameters.
#[expect(
    clippy::print_stdout,
    clippy::unnecessary_wraps,
    reason = "the output that was asked for; the shape all commands have"
)]
pub(super) fn run() -> anyhow::Result<()> {
    print!("{}", show::plugins(&builtin::registry()));
    Ok(())
}
