//! The response phase: usage, timing, release. Nothing of a response is altered, except a model name
//! that was rewritten on the way in.
//!
//! Does not know ext_proc messages. Entry point: [`Accounting`], which one exchange owns from the
//! decision to its end.

pub mod accounting;
mod grpc;
pub mod model_name;
pub mod sse;
pub mod usage;

pub use accounting::Accounting;
pub use model_name::ModelNameRewriter;
