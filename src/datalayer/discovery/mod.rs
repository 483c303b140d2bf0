//! Where endpoints come from: a list on the command line or a watched file. Kubernetes will be
//! another [`Discovery`]. Each writes whole sets into the [`EndpointStore`].

use std::fmt::Debug;

use futures_util::future::BoxFuture;
use tokio_util::sync::CancellationToken;

use super::EndpointStore;

pub mod file;
pub mod list;
pub mod multicluster_file;

pub use file::FileDiscovery;
pub use multicluster_file::MulticlusterFileDiscovery;

/// Keeps an [`EndpointStore`] equal to what some authority says.
pub trait Discovery: Send + Sync + Debug {
    /// Delivers what is known at the start; an error fails it. One that can only deliver later
    /// returns at once, and [`EndpointStore::is_synced`] stays false until it does.
    fn load<'a>(&'a self, store: &'a EndpointStore) -> BoxFuture<'a, Result<(), String>>;

    /// Follows changes until `shutdown`; returns early when nothing can change.
    fn watch<'a>(
        &'a self,
        store: &'a EndpointStore,
        shutdown: CancellationToken,
    ) -> BoxFuture<'a, ()>;
}
