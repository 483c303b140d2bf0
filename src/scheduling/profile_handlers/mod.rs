//! Profile handlers: which profiles run, and what their picks mean.

mod single;

pub use single::SingleProfileHandler;
