//! `pinpod sidecar`: the routing proxy of a decode pod, which splits requests over endpoints as the
//! picker's headers say.
//!
//! A request's way: [`server`] accepts it on a rank's listener; [`proxy`] goes through it top to
//! bottom: health and everything that is no inference pass through, `routing.rs` takes the routing
//! headers out and asks the [`allow_list`], `prompt.rs` reads the body; then one of `connectors/`
//! makes the calls. `exchange.rs` is what a connector has in hand: calls for this request and what
//! their failures mean. `engines.rs` keeps connections and ends a call's work when it is dropped,
//! which is all that cancellation needs: the futures of a request are one tree, and the client's
//! connection is its root.
//!
//! Bodies are never rebuilt: `json.rs` finds members in one scan and splices others in; `usage.rs`
//! does the same to an answer while it passes.
//!
//! The room knows nothing of picking: who is called was decided elsewhere and arrives in headers.

pub mod allow_list;
mod answer;
mod api;
mod body;
mod connectors;
pub mod engines;
mod exchange;
mod health;
pub mod host_port;
mod json;
pub mod metrics;
pub mod options;
mod prompt;
pub mod proxy;
mod routing;
pub mod run;
pub mod server;
pub mod settings;
mod spans;
mod state;
mod trace;
mod upgrade;
mod usage;

#[cfg(test)]
mod tests;
