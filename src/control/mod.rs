//! The use case, top to bottom: rewrite, objective, admission, candidates, producers, schedule,
//! book. Entry point: the director. Does not know ext_proc messages.

pub mod admitters;
pub mod candidates;
pub mod director;
mod error;
pub mod header_processors;
mod intake;
pub mod producers;
pub mod rules;
pub mod screeners;
pub mod session_affinity;

pub use candidates::Subset;
pub use director::{Decision, Director, Step, Waiting};
pub use error::RequestError;
pub use intake::{BodyKnowledge, Intake, received_id};
