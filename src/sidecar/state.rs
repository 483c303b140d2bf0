//! What a sidecar holds at the moment, for `/debug/plugins/state`. When nobody asks for anything, `legs`
//! are 0 and `tasks` are those of an idle process and one for each connection.

use std::sync::Arc;

use serde_json::json;
use tokio::runtime::Handle;
use tokio_util::task::TaskTracker;

use super::metrics::Stage;
use super::proxy::Sidecar;
use crate::telemetry::server::PluginState;

/// Reads `sidecar` and the connections of its clients; to be called in its runtime.
pub(super) fn reader(sidecar: Arc<Sidecar>, connections: TaskTracker) -> PluginState {
    let runtime = Handle::current().metrics();
    Arc::new(move || {
        let legs =
            Stage::ALL.map(|stage| (stage.name().to_owned(), sidecar.metrics().active(stage)));
        let legs: serde_json::Map<_, _> = legs.into_iter().map(|(n, v)| (n, v.into())).collect();
        json!({
            "legs": legs,
            "connections": connections.len(),
            "kept_engine_connections": sidecar.engines.kept(),
            "tasks": runtime.num_alive_tasks(),
        })
    })
}
