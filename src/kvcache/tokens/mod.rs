//! From a request to the token ids its engine will compute.
//!
//! A completion's text or a chat rendered by the model's template ([`template`], [`messages`]) goes
//! through the model's own tokenizer ([`tokenizer`]). Prompts grow by appending, so text is cut at
//! places where cutting provably changes nothing ([`split`]) and the pieces are remembered
//! ([`memo`]); what is new is tokenized on a bounded pool ([`pool`]). [`service`] is the entry point,
//! [`remote`] asks an engine instead. Files come from a directory or from the hub ([`hub`]).
//!
//! Does not know blocks, endpoints or plugins.

pub mod anthropic;
mod body;
pub mod content_format;
mod filters;
pub mod hub;
mod keeper;
pub mod lru;
mod media;
pub mod memo;
pub mod messages;
mod methods;
mod model;
pub mod pool;
pub mod python;
pub mod remote;
mod repr;
pub mod responses;
pub mod service;
mod slot;
mod special;
pub mod split;
pub mod stats;
pub mod template;
mod tiktoken;
mod tiktoken_family;
pub mod tokenizer;
