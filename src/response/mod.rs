//! The response phase: usage, timing, release. Nothing of a response is altered, except a model name
//! that was rewritten on the way in and headers that response plugins add.
//!
//! Does not know ext_proc messages. Entry point: [`Accounting`], which one exchange owns from the
//! decision to its end.

pub mod accounting;
mod grpc;
pub mod hooks;
pub mod model_name;
mod report;
pub mod request_attribute_reporter;
pub mod served_verifier;
pub mod sse;
pub mod usage;

pub use accounting::Accounting;
pub use hooks::{
    MetadataNumber, ResponseCompleteHook, ResponseHeaderHook, ResponseHooks, ResponseView, Served,
};
pub use model_name::ModelNameRewriter;
