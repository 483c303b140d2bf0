//! Polling over HTTP: one task and one kept connection per endpoint and source.
//!
//! [`poller`] decides when, [`client`] fetches, the source's extractors read the bytes as they came;
//! [`exposition`] finds the few wanted series in them. A dead, slow or lying endpoint costs its own
//! task a failed poll and changes nothing else.

pub mod client;
pub mod exposition;
pub mod poller;
pub mod tls;

pub use poller::{Poll, Scraper, base_tick};
