//! `pinpod check-config`

use std::io::Read;
use std::path::PathBuf;

use anyhow::Context;

use crate::config::{self, LoadOptions, show};

/// Flags of `check-config`.
#[derive(Debug, clap::Args)]
pub(super) struct CheckConfigArgs {
    /// The document, or - for standard input
    file: PathBuf,
    /// Permit plugins marked alpha
    #[arg(long)]
    allow_experimental_plugins: bool,
}

/// Loads the document as `serve` would; prints what it resolves to, and warnings on stderr.
#[expect(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "the output that was asked for"
)]
pub(super) fn run(args: &CheckConfigArgs) -> anyhow::Result<()> {
    let mut text = String::new();
    if args.file.as_os_str() == "-" {
        std::io::stdin()
            .read_to_string(&mut text)
            .context("standard input")?;
    } else {
        text =
            std::fs::read_to_string(&args.file).with_context(|| args.file.display().to_string())?;
    }
    let options = LoadOptions {
        allow_experimental: args.allow_experimental_plugins,
    };
    let config = config::load(Some(&text), &options, &config::builtin::registry())?;
    for warning in &config.warnings {
        eprintln!("warning: {warning}");
    }
    print!("{}", show::resolved(&config));
    Ok(())
}
