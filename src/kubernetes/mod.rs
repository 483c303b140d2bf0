//! The Kubernetes control plane: which endpoints a pool has ([`discovery`]), from the API server's
//! watches ([`watch`]).
//!
//! Everything here writes into snapshots that requests read; no request ever waits for the API server.
//! While it is away, what was known last stands.

pub mod allow_list;
pub mod client;
pub mod discovery;
pub mod objects;
mod pods;
pub mod pool;
#[cfg(test)]
pub(crate) mod testing;
pub mod watch;

pub use allow_list::AllowList;
pub use client::{ClientError, ClientOptions, client};
pub use discovery::{KubernetesDiscovery, PoolSource};
