//! The place of one configured model: what is in use, and whether its files are still those.

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::SystemTime;

use arc_swap::ArcSwapOption;
use parking_lot::Mutex;

use super::model::Model;
use super::service::ModelSettings;
use super::stats::TokenStats;
use super::tokenizer::LoadError;

/// Files of a model's directory that decide ids. `*.tiktoken` files are looked for by
/// [`super::tiktoken`].
const FILES: [&str; 7] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "config.json",
    "tiktoken.model",
];

/// What tells one state of a file from another: size, time of change and identity. Links are followed,
/// so that swapping a link (as Kubernetes does with mounted maps) is a change too.
type Stamp = Option<(u64, SystemTime, u64)>;

/// One configured model.
#[derive(Debug)]
pub(super) struct Slot {
    settings: ModelSettings,
    memo_bytes: usize,
    model: ArcSwapOption<Model>,
    state: Mutex<State>,
    stats: Arc<TokenStats>,
}

#[derive(Debug, Default)]
struct State {
    /// Of the files that were tried last, in use or not.
    tried: Vec<Stamp>,
    error: Option<String>,
}

impl Slot {
    /// Loads the model from its directory; blocks.
    pub(super) fn load(
        settings: ModelSettings,
        memo_bytes: usize,
        stats: Arc<TokenStats>,
    ) -> Result<Self, LoadError> {
        let slot = Self {
            settings,
            memo_bytes,
            model: ArcSwapOption::empty(),
            state: Mutex::default(),
            stats,
        };
        slot.reload()?;
        Ok(slot)
    }

    /// The model's name.
    pub(super) fn name(&self) -> &str {
        &self.settings.name
    }

    /// The model in use.
    pub(super) fn model(&self) -> Option<Arc<Model>> {
        self.model.load_full()
    }

    /// Why the newest files are not in use.
    pub(super) fn error(&self) -> Option<String> {
        self.state.lock().error.clone()
    }

    /// Reads the files and takes them into use; on an error what is in use stays.
    pub(super) fn reload(&self) -> Result<(), LoadError> {
        // Taken first, so that a file written while it is read is read again.
        let stamps = self.stamps();
        let loaded = Model::load(&self.settings, &self.settings.directory, self.memo_bytes);
        let error = loaded.as_ref().err().map(ToString::to_string);
        let was_stale = {
            let mut state = self.state.lock();
            state.tried = stamps;
            std::mem::replace(&mut state.error, error.clone()).is_some()
        };
        match (was_stale, error.is_some()) {
            (false, true) => {
                self.stats.stale_models.fetch_add(1, Ordering::Relaxed);
            }
            (true, false) => {
                self.stats.stale_models.fetch_sub(1, Ordering::Relaxed);
            }
            _ => {}
        }
        self.model.store(Some(Arc::new(loaded?)));
        Ok(())
    }

    /// Reloads if a file is not as it was when it was last read. Blocks for a reload.
    pub(super) fn check(&self) {
        if self.stamps() == self.state.lock().tried {
            return;
        }
        match self.reload() {
            Ok(()) => {
                TokenStats::add(&self.stats.reloads);
                tracing::info!(model = self.settings.name, "tokenizer reloaded");
            }
            Err(error) => {
                TokenStats::add(&self.stats.reload_failures);
                tracing::warn!(model = self.settings.name, %error, "changed tokenizer not used");
            }
        }
    }

    fn stamps(&self) -> Vec<Stamp> {
        let directory = &self.settings.directory;
        let template = self.settings.chat_template.as_ref();
        let paths = FILES.iter().map(|name| directory.join(name));
        let named = template.map(|template| directory.join(template));
        paths.chain(named).map(|path| stamp(&path)).collect()
    }
}

fn stamp(path: &Path) -> Stamp {
    let meta = std::fs::metadata(path).ok()?;
    let changed = meta.modified().unwrap_or(SystemTime::UNIX_EPOCH);
    Some((meta.len(), changed, meta.ino()))
}
