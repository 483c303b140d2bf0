//! Engine metrics over HTTP: one task and one kept connection per endpoint.
//!
//! [`poller`] decides when, [`client`] fetches, [`exposition`] finds the few wanted series in the raw
//! bytes, [`extractor`] turns them into [`super::EngineMetrics`]. A dead, slow or lying endpoint costs
//! its own task a failed poll and changes nothing else.

pub mod client;
pub mod exposition;
pub mod extractor;
pub mod poller;
pub mod source;

pub use extractor::CoreMetricsExtractor;
pub use poller::Scraper;
pub use source::MetricsDataSource;
