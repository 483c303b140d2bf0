//! The process: options, wiring, readiness, TLS, shutdown.
//!
//! Entry point: [`run::run`]. The only room besides `cli` that sees `config`.

mod control_plane;
pub mod health;
pub mod options;
mod reload;
pub mod run;
pub mod tls;
pub(crate) mod tracing;
