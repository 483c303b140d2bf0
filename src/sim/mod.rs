//! A stand-in for a vLLM pod: same API, same metrics, a modelled engine instead of a GPU.
//!
//! [`kv`] is the block pool with vLLM's prefix caching and eviction order, [`latency`] what a step
//! costs, `scheduler` batches requests into steps, [`engine`] runs these on a virtual clock and
//! [`totals`] is what it counted. [`server`] is the HTTP face, `ask` reads its requests and `reply`
//! writes its answers, [`metrics`] the exposition. [`hash`] computes vLLM's block hashes and [`events`]
//! publishes what the cache stores and loses, byte for byte as vLLM does; [`transfer`] hands the
//! KV of prompts from one pod to another. Shares no code with the picker: a shared mistake
//! would hide itself.

mod adapters;
mod answers;
mod ask;
pub mod engine;
pub mod events;
pub mod hash;
pub mod kv;
pub mod latency;
pub mod metrics;
mod reply;
mod scheduler;
pub mod server;
pub mod text;
pub mod totals;
pub mod transfer;
pub mod work;

#[cfg(test)]
mod fixtures;
#[cfg(test)]
mod tests;

pub use engine::{Engine, EngineConfig};
pub use latency::Profile;
pub use server::{SimConfig, serve};
