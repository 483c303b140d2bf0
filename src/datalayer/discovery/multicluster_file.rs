//! `multicluster-file-discovery`

use futures_util::future::BoxFuture;
use tokio_util::sync::CancellationToken;

use super::{Discovery, FileDiscovery};
use crate::datalayer::EndpointStore;
use crate::plugin::{Build, Maturity, ParamDoc, Plugin, PluginError};

/// Peer clusters from a file: as `file-discovery`, but hosts may be DNS names, which are resolved
/// again from time to time, and the labels `metricsAddress` and `metricsPort` say where a cluster
/// serves its metrics.
#[derive(Debug)]
pub struct MulticlusterFileDiscovery(FileDiscovery);

impl Plugin for MulticlusterFileDiscovery {
    const TYPE: &'static str = "multicluster-file-discovery";
    const MATURITY: Maturity = Maturity::Alpha;
    const PARAMETERS: &'static [ParamDoc] = FileDiscovery::PARAMETERS;
    const ABOUT: &'static str = "Reads peer clusters from a file.";

    fn build(build: &mut Build<'_>) -> Result<Self, PluginError> {
        FileDiscovery::read_settings::<Self>(build, true).map(Self)
    }
}

impl Discovery for MulticlusterFileDiscovery {
    fn load<'a>(&'a self, store: &'a EndpointStore) -> BoxFuture<'a, Result<(), String>> {
        self.0.load(store)
    }

    fn watch<'a>(
        &'a self,
        store: &'a EndpointStore,
        shutdown: CancellationToken,
    ) -> BoxFuture<'a, ()> {
        self.0.watch(store, shutdown)
    }
}
