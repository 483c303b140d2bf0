//! Logs, metrics and traces. Every other room may use this one; it knows none of them.

pub mod log;
pub mod metrics;
pub mod server;
pub mod trace;
