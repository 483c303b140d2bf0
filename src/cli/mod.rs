//! The command line: one file per subcommand, each holding that command's flags and nothing else.
//!
//! Entry point: [`main`]. Knows which subcommand to run; the work happens in `epp`, `sim`, `demo`.

mod check_config;
mod demo;
mod doctor;
mod index;
mod noop;
mod plugins;
mod serve;
mod sidecar;
mod sim;
mod tokenize;

use std::ffi::OsString;
use std::path::Path;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use tokio::signal::unix::SignalKind;

/// Picks the endpoint that should serve each LLM request and tells Envoy over ext_proc.
#[derive(Debug, Parser)]
#[command(
    name = "pinpod",
    version,
    after_help = "Started with flags only, or under the name epp, it acts as `pinpod serve`."
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// The endpoint picker (see `pinpod serve --help`)
    #[command(disable_help_flag = true)]
    Serve {
        /// Flags of the endpoint picker
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
    /// The routing proxy of a decode pod (see `pinpod sidecar --help`)
    #[command(disable_help_flag = true)]
    Sidecar {
        /// Flags of the sidecar
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
    /// Real Envoy, pinpod and simulated pods: random picks against the recommended configuration, or
    /// pods that do everything against prefill and decode apart
    Demo(demo::DemoArgs),
    /// Simulated vLLM pods: same API and metrics, a modelled engine
    Sim(sim::SimArgs),
    /// Check an EndpointPickerConfig and show what it resolves to
    CheckConfig(check_config::CheckConfigArgs),
    /// Ask a running picker which endpoints hold a prompt, in which tier and since when
    Index(index::IndexArgs),
    /// List every plugin with its parameters
    Plugins(plugins::PluginsArgs),
    /// Look at an installation and say what is wrong with it
    Doctor(doctor::DoctorArgs),
    /// Token ids of request bodies, as `serve` computes them for exact prefix routing
    Tokenize(tokenize::TokenizeArgs),
    /// A picker that always answers the same: the floor to measure against
    #[command(hide = true)]
    Noop(noop::NoopArgs),
}

/// Names that are subcommands; anything else in first place makes the line one of `serve`.
const SUBCOMMANDS: [&str; 9] = [
    "serve",
    "check-config",
    "plugins",
    "noop",
    "help",
    "--version",
    "-V",
    "--help",
    "-h",
];

/// Runs the command line of this process and returns its exit code: 0 done, 1 failed, 2 bad usage.
pub fn main() -> ExitCode {
    let arguments: Vec<OsString> = std::env::args_os().collect();
    if acts_as_serve(&arguments) {
        let flags = arguments
            .into_iter()
            .skip(1)
            .map(|a| a.to_string_lossy().into_owned());
        return serve::main(flags);
    }
    match Cli::parse_from(arguments).command {
        Command::Serve { arguments } => serve::main(arguments),
        Command::Sidecar { arguments } => sidecar::main(arguments),
        Command::Demo(args) => report(demo::run(&args)),
        Command::Sim(args) => report(sim::run(&args)),
        Command::CheckConfig(args) => report(check_config::run(&args)),
        Command::Index(args) => report(index::run(&args)),
        Command::Plugins(args) => report(plugins::run(&args)),
        Command::Doctor(args) => doctor::run(&args).unwrap_or_else(|error| report(Err(error))),
        Command::Tokenize(args) => report(tokenize::run(&args)),
        Command::Noop(args) => report(noop::run(&args)),
    }
}

fn acts_as_serve(arguments: &[OsString]) -> bool {
    let text = |position: usize| {
        arguments
            .get(position)
            .map(|a| a.to_string_lossy().into_owned())
    };
    let program = text(0).unwrap_or_default();
    let is_epp = Path::new(&program)
        .file_name()
        .is_some_and(|name| name == "epp");
    match text(1) {
        _ if is_epp => true,
        None => false,
        Some(first) => {
            !SUBCOMMANDS.contains(&first.as_str()) && (first.is_empty() || first.starts_with('-'))
        }
    }
}

/// A signal ended the command.
#[derive(Debug, thiserror::Error)]
#[error("ended by signal {}", .0.as_raw_value())]
struct Interrupted(SignalKind);

impl Interrupted {
    /// 128 and the signal's number, as shells report it.
    fn exit_code(&self) -> u8 {
        u8::try_from(128 + self.0.as_raw_value()).unwrap_or(u8::MAX)
    }
}

/// Prints a failure and its causes.
#[expect(
    clippy::print_stderr,
    reason = "stderr is where a command reports its failure"
)]
fn report(result: anyhow::Result<()>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            if let Some(interrupted) = error.downcast_ref::<Interrupted>() {
                eprintln!("{interrupted}");
                return ExitCode::from(interrupted.exit_code());
            }
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_only_and_the_name_epp_mean_serve() {
        let acts =
            |line: &[&str]| acts_as_serve(&line.iter().map(OsString::from).collect::<Vec<_>>());
        assert!(acts(&["/app/epp"]));
        assert!(acts(&["/app/epp", "--pool-name", "p"]));
        assert!(acts(&["pinpod", "--pool-name", "p"]));
        assert!(acts(&["pinpod", "", "-poolName", "p"]));
        assert!(!acts(&["pinpod"]));
        assert!(!acts(&["pinpod", "plugins"]));
        assert!(!acts(&["pinpod", "--help"]));
        assert!(!acts(&["pinpod", "-h"]));
        assert!(acts(&["/app/epp", "-h"]));
    }
}
