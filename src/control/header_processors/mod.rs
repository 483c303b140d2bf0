//! Header processors: what a request's headers say about it before anything is decided.

mod agent_identity;

pub use agent_identity::AgentIdentity;
