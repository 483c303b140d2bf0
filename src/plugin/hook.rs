//! A plugin in one of its roles, with its name and timing.

use std::sync::Arc;

use metrics::Histogram;
use tokio::time::Instant;

use super::TypedName;
use crate::telemetry::metrics::{Pair, labels};

/// A hook with its name and timing series.
#[derive(Debug)]
pub struct Hook<T: ?Sized> {
    /// Identity.
    pub name: TypedName,
    /// The plugin.
    pub plugin: Arc<T>,
    duration: Pair<Histogram>,
}

impl<T: ?Sized> Clone for Hook<T> {
    fn clone(&self) -> Self {
        Self {
            name: self.name.clone(),
            plugin: Arc::clone(&self.plugin),
            duration: self.duration.clone(),
        }
    }
}

impl<T: ?Sized> Hook<T> {
    /// A hook timed as `extension_point`, spelled as the metric's label has it.
    pub fn new(extension_point: &'static str, name: TypedName, plugin: Arc<T>) -> Self {
        let list = labels(&[
            ("extension_point", extension_point),
            ("plugin_type", name.type_name),
            ("plugin_name", &name.name),
        ]);
        Self {
            duration: Pair::histogram("llm_d_epp_plugin_duration_seconds", list.clone(), list),
            name,
            plugin,
        }
    }

    /// Runs `f` on the plugin and records how long it took.
    pub fn timed<R>(&self, f: impl FnOnce(&T) -> R) -> R {
        let started = Instant::now();
        let result = f(&self.plugin);
        self.duration.record(started.elapsed().as_secs_f64());
        result
    }
}
