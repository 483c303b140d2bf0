//! The `pinpod` binary: parse the command line, run one subcommand, turn its error into an exit code.

use std::process::ExitCode;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    pinpod::cli::main()
}
