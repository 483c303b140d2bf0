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

    /// Like [`Hook::timed`], for plugins that run one after another: the end of one is the start of
    /// the next, so the clock is read once.
    pub fn timed_after<R>(&self, lap: &mut Lap, f: impl FnOnce(&T) -> R) -> R {
        let result = f(&self.plugin);
        let now = Instant::now();
        let took = now.saturating_duration_since(lap.0);
        self.duration.record(took.as_secs_f64());
        lap.0 = now;
        result
    }
}

/// The end of the last plugin of a row.
#[derive(Debug)]
pub struct Lap(Instant);

impl Lap {
    /// The row starts now.
    pub fn start() -> Self {
        Self(Instant::now())
    }
}
