//! The command line: one file per subcommand, each holding that command's flags and nothing else.
//!
//! Entry point: [`main`]. Knows which subcommand to run; the work happens in `epp`, `sim`, `demo`.

use std::process::ExitCode;

/// Runs the command line of this process and returns its exit code: 0 done, 1 failed, 2 bad usage.
pub fn main() -> ExitCode {
    ExitCode::SUCCESS
}
