//! Profile handlers: which profiles run, and what their picks mean.

mod header_profile;
mod single;

pub use header_profile::HeaderProfileHandler;
pub use single::SingleProfileHandler;
