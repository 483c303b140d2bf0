//! pinpod picks the endpoint that should serve an LLM request and tells Envoy over ext_proc.
//!
//! A request meets the rooms in this order: [`extproc`] (Envoy's dialect) → [`request`] (bytes to
//! [`request::InferenceRequest`]) → [`control`] (the use case, top to bottom) → [`scheduling`]
//! (filter, score, pick) → [`response`] (usage, timing, release).
//!
//! Beside the path: [`datalayer`] (endpoints and what is scraped from them), [`kvcache`] (what every
//! endpoint's KV cache holds), [`plugin`] (what all
//! plugins share), [`config`] (`EndpointPickerConfig` to running plugins), [`telemetry`] (logs and
//! metrics), [`kubernetes`] (the control plane), [`epp`] (the process). Separate rooms: [`sidecar`]
//! (the routing proxy of a decode pod), [`sim`] (a stand-in for a vLLM pod), [`demo`].

pub mod cli;
pub mod config;
pub mod control;
pub mod datalayer;
pub mod demo;
pub mod doctor;
pub mod epp;
pub mod extproc;
pub mod kubernetes;
pub mod kvcache;
pub mod plugin;
pub mod request;
pub mod response;
pub mod scheduling;
pub mod sidecar;
pub mod sim;
pub mod telemetry;
