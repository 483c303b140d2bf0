//! Profile handlers: which profiles run, and what their picks mean.

mod data_parallel;
mod disagg;
mod disagg_headers;
mod header_profile;
mod pairing;
mod pd;
mod single;
mod staged;

pub use data_parallel::DataParallelProfileHandler;
pub use disagg::DisaggProfileHandler;
pub use disagg_headers::DisaggHeadersHandler;
pub use header_profile::HeaderProfileHandler;
pub use pd::PdProfileHandler;
pub use single::SingleProfileHandler;
