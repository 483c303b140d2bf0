//! What is known about endpoints: which exist ([`store`], fed by [`discovery`]) and what they last
//! reported ([`sources`] are fetched by [`scrape`] and read by [`extractors`] into metrics and
//! [`attributes`]).
//!
//! Readers take immutable snapshots and never wait for a writer. Does not know requests.

pub mod attributes;
pub mod discovery;
pub mod endpoint;
pub mod extractors;
pub mod pool_gauges;
pub mod scrape;
pub mod selector;
pub mod sources;
pub mod store;

pub use attributes::ScalarRef;
pub use endpoint::{
    Endpoint, EndpointDetails, EndpointIndex, EndpointSpec, EngineMetrics, LoraState,
};
pub use store::{EndpointListener, EndpointName, EndpointStore};
