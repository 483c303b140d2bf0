//! A stand-in for a vLLM pod: same API, same metrics, a modelled engine instead of a GPU.
//!
//! [`kv`] is the block pool with vLLM's prefix caching and eviction order, [`latency`] what a step
//! costs, [`engine`] the scheduler that batches requests into steps, [`server`] the HTTP face,
//! [`metrics`] the exposition. Shares no code with the picker: a shared mistake would hide itself.

pub mod engine;
pub mod kv;
pub mod latency;
pub mod metrics;
pub mod server;
pub mod text;

pub use engine::{Engine, EngineConfig};
pub use latency::Profile;
pub use server::{SimConfig, serve};
