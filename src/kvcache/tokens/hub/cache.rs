//! The hub's cache on disk, in the layout of its own library: `models--owner--name/` with `blobs/<etag>`,
//! `snapshots/<commit>/<file>` (links to blobs) and `refs/<revision>` (the commit it stood for).

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use super::{HubError, Repo, is_commit};
use crate::kvcache::tokens::tiktoken;

/// Longest etag that names a blob.
const MAX_ETAG_CHARS: usize = 128;
/// End of the name of a file that is being written, as the hub's library has it.
const UNFINISHED: &str = ".incomplete";
/// Unfinished files of this age are nobody's any more.
const ABANDONED_AFTER: Duration = Duration::from_hours(1);
/// Vocabulary that is preferred to those of tiktoken.
pub(super) const TOKENIZER: &str = "tokenizer.json";

/// One model's folder.
#[derive(Debug)]
pub(super) struct Cache {
    folder: PathBuf,
}

/// A blob that is being written; dropped unfinished, it is gone.
#[derive(Debug)]
pub(super) struct Unfinished {
    path: PathBuf,
    blob: PathBuf,
    file: File,
}

fn failed(path: &Path) -> impl FnOnce(std::io::Error) -> HubError {
    let path = path.display().to_string();
    move |error| HubError::Cache { path, error }
}

impl Cache {
    pub(super) fn new(root: &Path, repo: &Repo) -> Self {
        let name = repo.id.replace('/', "--");
        Self {
            folder: root.join(format!("models--{name}")),
        }
    }

    /// Directory of a commit's files.
    pub(super) fn snapshot(&self, commit: &str) -> PathBuf {
        self.folder.join("snapshots").join(commit)
    }

    /// The commit a revision stood for when it was last resolved, if its vocabulary is here.
    pub(super) fn commit(&self, repo: &Repo) -> Option<String> {
        let commit = if repo.is_pinned() {
            repo.revision.clone()
        } else {
            let text = fs::read_to_string(self.reference(repo)).ok()?;
            text.trim().to_owned()
        };
        let here = is_commit(&commit) && self.has_vocabulary(&commit);
        here.then_some(commit)
    }

    /// Vocabularies are fetched last, so with one of them everything is here.
    pub(super) fn has_vocabulary(&self, commit: &str) -> bool {
        self.has(commit, TOKENIZER) || tiktoken::find(&self.snapshot(commit)).is_some()
    }

    /// A file of a commit is here.
    pub(super) fn has(&self, commit: &str, file: &str) -> bool {
        self.snapshot(commit).join(file).is_file()
    }

    /// A blob with this etag is here; of the size that was announced, where one was.
    pub(super) fn has_blob(&self, etag: &str, bytes: Option<u64>) -> bool {
        let meta = fs::metadata(self.blob(etag));
        meta.is_ok_and(|meta| meta.is_file() && bytes.is_none_or(|bytes| meta.len() == bytes))
    }

    /// Begins a blob.
    pub(super) fn write(&self, etag: &str) -> Result<Unfinished, HubError> {
        let blob = self.blob(etag);
        let blobs = self.folder.join("blobs");
        fs::create_dir_all(&blobs).map_err(failed(&blobs))?;
        remove_abandoned(&blobs);
        // Replicas may share the cache: each writes a file of its own.
        let number = fastrand::u64(..);
        let path = blobs.join(format!("{etag}.{number:016x}{UNFINISHED}"));
        let file = File::create_new(&path).map_err(failed(&path))?;
        Ok(Unfinished { path, blob, file })
    }

    /// Makes a blob a file of a commit.
    pub(super) fn link(&self, commit: &str, file: &str, etag: &str) -> Result<(), HubError> {
        let directory = self.snapshot(commit);
        fs::create_dir_all(&directory).map_err(failed(&directory))?;
        let link = directory.join(file);
        // Made aside and moved: whoever looks sees the old link or the new one.
        let aside = directory.join(format!(".{file}.{:016x}", fastrand::u64(..)));
        let blob = Path::new("../../blobs").join(etag);
        symlink(blob, &aside).map_err(failed(&aside))?;
        fs::rename(&aside, &link).map_err(|error| {
            let _ = fs::remove_file(&aside);
            failed(&link)(error)
        })
    }

    /// Notes what a revision stands for. A commit needs no note.
    pub(super) fn refer(&self, repo: &Repo, commit: &str) -> Result<(), HubError> {
        if repo.is_pinned() {
            return Ok(());
        }
        let path = self.reference(repo);
        if fs::read_to_string(&path).is_ok_and(|known| known.trim() == commit) {
            return Ok(());
        }
        let directory = path.parent().unwrap_or(&self.folder);
        fs::create_dir_all(directory).map_err(failed(directory))?;
        let aside = directory.join(format!(".{:016x}{UNFINISHED}", fastrand::u64(..)));
        fs::write(&aside, commit).map_err(failed(&aside))?;
        fs::rename(&aside, &path).map_err(failed(&path))
    }

    fn reference(&self, repo: &Repo) -> PathBuf {
        self.folder.join("refs").join(&repo.revision)
    }

    fn blob(&self, etag: &str) -> PathBuf {
        self.folder.join("blobs").join(etag)
    }
}

impl Unfinished {
    pub(super) fn append(&mut self, bytes: &[u8]) -> Result<(), HubError> {
        self.file.write_all(bytes).map_err(failed(&self.path))
    }

    /// The blob is whole.
    pub(super) fn finish(self) -> Result<(), HubError> {
        self.file.sync_all().map_err(failed(&self.path))?;
        fs::rename(&self.path, &self.blob).map_err(failed(&self.blob))
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        // Of a finished one nothing is left under this name.
        let _ = fs::remove_file(&self.path);
    }
}

/// Removes what writers that died left behind.
fn remove_abandoned(blobs: &Path) {
    let entries = fs::read_dir(blobs).into_iter().flatten().flatten();
    for entry in entries {
        let name = entry.file_name();
        let unfinished = name.to_string_lossy().ends_with(UNFINISHED);
        let changed = entry.metadata().and_then(|meta| meta.modified());
        let age = changed.map(|at| SystemTime::now().duration_since(at));
        if unfinished && matches!(age, Ok(Ok(age)) if age > ABANDONED_AFTER) {
            let _ = fs::remove_file(entry.path());
        }
    }
}

/// An etag as the name of a blob: without quotes and weakness mark. `None` for what cannot be a name.
pub(super) fn blob_name(etag: &str) -> Option<&str> {
    let etag = etag.trim();
    let etag = etag.strip_prefix("W/").unwrap_or(etag).trim_matches('"');
    let fit = |b: u8| b.is_ascii_alphanumeric() || b"-_".contains(&b);
    let usable = (1..=MAX_ETAG_CHARS).contains(&etag.len()) && etag.bytes().all(fit);
    usable.then_some(etag)
}
