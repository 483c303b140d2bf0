//! `pinpod plugins`

use crate::config::{builtin, show};

/// Flags of `plugins`.
#[derive(Debug, clap::Args)]
pub(super) struct PluginsArgs {
    /// Print JSON instead of Markdown
    #[arg(long)]
    json: bool,
}

/// Prints every plugin type with its parameters.
#[expect(
    clippy::print_stdout,
    clippy::unnecessary_wraps,
    reason = "the output that was asked for; the shape all commands have"
)]
pub(super) fn run(args: &PluginsArgs) -> anyhow::Result<()> {
    let registry = builtin::registry();
    if args.json {
        print!("{}", show::plugins_json(&registry));
    } else {
        print!("{}", show::plugins(&registry));
    }
    Ok(())
}
