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
    let name = args.file.display().to_string();
    let text = if args.file.as_os_str() == "-" {
        let mut text = String::new();
        std::io::stdin()
            .read_to_string(&mut text)
            .context("standard input")?;
        text
    } else {
        config::read_file(&args.file).context(name.clone())?
    };
    let options = LoadOptions {
        allow_experimental: args.allow_experimental_plugins,
    };
    let registry = config::builtin::registry();
    let config = config::load(Some(&text), &options, &registry).context(name.clone())?;
    for warning in &config.warnings {
        eprintln!("warning: {name}: {warning}");
    }
    print!("{}", show::resolved(&config, &registry));
    Ok(())
}
