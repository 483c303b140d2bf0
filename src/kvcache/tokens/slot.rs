//! The place of one configured model: what is in use, and whether its files are still those.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::SystemTime;

use arc_swap::ArcSwapOption;
use parking_lot::Mutex;

use super::hub::{Repo, Snapshot};
use super::model::Model;
use super::service::ModelSettings;
use super::stats::TokenStats;
use super::tiktoken;
use super::tokenizer::LoadError;

/// Files of a model's directory that decide ids. `*.tiktoken` files are looked for by
/// [`super::tiktoken`].
const FILES: [&str; 6] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "config.json",
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
    /// Where the files are; `None` until the hub's are here.
    directory: Option<PathBuf>,
    /// Commit of the hub's files.
    commit: Option<String>,
    /// Of the files that were tried last, in use or not.
    tried: Vec<Stamp>,
    /// Why they are not in use.
    load_error: Option<String>,
    /// Why the hub's newest files are not here.
    fetch_error: Option<String>,
    /// Counted among the stale models.
    stale: bool,
}

impl Slot {
    /// Loads the model from its directory, and blocks for that. A model of the hub is missing until its
    /// files are here.
    pub(super) fn load(
        settings: ModelSettings,
        memo_bytes: usize,
        stats: Arc<TokenStats>,
    ) -> Result<Self, LoadError> {
        let directory = Some(settings.directory.clone()).filter(|_| settings.repo.is_none());
        let state = State {
            directory,
            ..State::default()
        };
        let slot = Self {
            settings,
            memo_bytes,
            model: ArcSwapOption::empty(),
            state: Mutex::new(state),
            stats,
        };
        slot.stats.missing_models.fetch_add(1, Ordering::Relaxed);
        slot.reload()?;
        Ok(slot)
    }

    /// The model's name.
    pub(super) fn name(&self) -> &str {
        &self.settings.name
    }

    /// Where its files come from, unless from a directory.
    pub(super) fn repo(&self) -> Option<&Repo> {
        self.settings.repo.as_ref()
    }

    /// The model in use.
    pub(super) fn model(&self) -> Option<Arc<Model>> {
        self.model.load_full()
    }

    /// Why the newest files are not in use.
    pub(super) fn error(&self) -> Option<String> {
        let state = self.state.lock();
        state.load_error.clone().or(state.fetch_error.clone())
    }

    /// Commit of the hub's files.
    pub(super) fn commit(&self) -> Option<String> {
        self.state.lock().commit.clone()
    }

    /// Where what happens is counted.
    pub(super) fn stats(&self) -> &TokenStats {
        &self.stats
    }

    /// Takes files of the hub into use, unless they are. Blocks for loading them.
    pub(super) fn take(&self, snapshot: &Snapshot) {
        {
            let mut state = self.state.lock();
            let known = state.commit.as_ref() == Some(&snapshot.commit);
            if known && state.directory.as_ref() == Some(&snapshot.directory) {
                // Tried before; files that came since are another matter.
                drop(state);
                self.note(|state| &mut state.fetch_error, None);
                self.check();
                return;
            }
            state.directory = Some(snapshot.directory.clone());
            state.commit = Some(snapshot.commit.clone());
        }
        self.note(|state| &mut state.fetch_error, None);
        let (model, commit) = (&self.settings.name, &snapshot.commit);
        match self.reload() {
            Ok(()) => tracing::info!(model, commit, "tokenizer of the hub loaded"),
            Err(error) => tracing::warn!(model, commit, %error, "tokenizer of the hub not used"),
        }
    }

    /// The hub's files could not be had; what is in use stays.
    pub(super) fn not_fetched(&self, error: &str) {
        let error = format!("hub: {error}");
        if self.note(|state| &mut state.fetch_error, Some(error.clone())) {
            tracing::warn!(model = self.settings.name, error, "tokenizer not fetched");
        } else {
            tracing::debug!(model = self.settings.name, error, "tokenizer not fetched");
        }
    }

    /// Remembers that something went wrong, or right; true if that is news.
    fn note(&self, which: fn(&mut State) -> &mut Option<String>, error: Option<String>) -> bool {
        let mut state = self.state.lock();
        let slot = which(&mut state);
        let news = *slot != error;
        *slot = error;
        let wrong = state.load_error.is_some() || state.fetch_error.is_some();
        let stale = wrong && self.model.load().is_some();
        match (std::mem::replace(&mut state.stale, stale), stale) {
            (false, true) => {
                self.stats.stale_models.fetch_add(1, Ordering::Relaxed);
            }
            (true, false) => {
                self.stats.stale_models.fetch_sub(1, Ordering::Relaxed);
            }
            _ => {}
        }
        news
    }

    /// Reads the files and takes them into use; on an error what is in use stays. Does nothing while
    /// there are none.
    pub(super) fn reload(&self) -> Result<(), LoadError> {
        let Some(directory) = self.directory() else {
            return Ok(());
        };
        // Taken first, so that a file written while it is read is read again.
        let stamps = self.stamps(&directory);
        let loaded = Model::load(&self.settings, &directory, self.memo_bytes);
        self.state.lock().tried = stamps;
        match loaded {
            Ok(model) => {
                if self.model.swap(Some(Arc::new(model))).is_none() {
                    self.stats.missing_models.fetch_sub(1, Ordering::Relaxed);
                }
                self.note(|state| &mut state.load_error, None);
                Ok(())
            }
            Err(error) => {
                self.note(|state| &mut state.load_error, Some(error.to_string()));
                Err(error)
            }
        }
    }

    fn directory(&self) -> Option<PathBuf> {
        self.state.lock().directory.clone()
    }

    /// Reloads if a file is not as it was when it was last read. Blocks for a reload.
    pub(super) fn check(&self) {
        let Some(directory) = self.directory() else {
            return;
        };
        if self.stamps(&directory) == self.state.lock().tried {
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

    fn stamps(&self, directory: &Path) -> Vec<Stamp> {
        let template = self.settings.chat_template.as_ref();
        let paths = FILES.iter().map(|name| directory.join(name));
        let named = template.map(|template| directory.join(template));
        let ranks = tiktoken::find(directory);
        paths
            .chain(named)
            .chain(ranks)
            .map(|path| stamp(&path))
            .collect()
    }
}

fn stamp(path: &Path) -> Stamp {
    let meta = std::fs::metadata(path).ok()?;
    let changed = meta.modified().unwrap_or(SystemTime::UNIX_EPOCH);
    Some((meta.len(), changed, meta.ino()))
}
