//! Tokenizers from the Hugging Face hub, for models that are in no local directory.
//!
//! Only the files that decide ids are fetched, into the hub's usual cache (`cache`), so that a cache
//! filled by an engine or a download job serves as well, and the other way round. What the cache has is
//! used at once; the hub is asked in the background whether its revision is still that commit, and a
//! model that is missing is asked for until it is there (`follow`). Once a revision was resolved it is
//! not asked for again: engines do not change their files while they run either.
//!
//! Does not know tokenizers: `slot` loads what is found.

mod cache;
mod fetch;
pub(super) mod follow;
mod http;
mod proxy;
mod settings;

pub use self::fetch::{Hub, Snapshot};
pub use self::proxy::Proxy;
pub use self::settings::{HubSettings, Token};

use std::time::Duration;

/// Longest segment of a repository's name.
const MAX_SEGMENT_CHARS: usize = 96;
/// Longest name of a revision.
const MAX_REVISION_CHARS: usize = 255;
/// Branch that is meant when no revision is given.
pub const DEFAULT_REVISION: &str = "main";

/// A model on the hub at a revision.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Repo {
    id: String,
    revision: String,
}

impl Repo {
    /// `id` is `name` or `owner/name`; `revision` a branch, tag or commit, empty for
    /// [`DEFAULT_REVISION`]. Both become parts of paths and URLs, so nothing else is accepted.
    pub fn new(id: &str, revision: &str) -> Result<Self, HubError> {
        let allowed = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
        let segment = |text: &str| {
            (1..=MAX_SEGMENT_CHARS).contains(&text.len())
                && text.chars().all(allowed)
                && !text.starts_with(['.', '-'])
                && !text.ends_with(['.', '-'])
                && !["..", "--"].iter().any(|pair| text.contains(pair))
        };
        if id.split('/').count() > 2 || !id.split('/').all(segment) {
            return Err(HubError::Name(format!("{id:?} is not owner/name")));
        }
        let revision = if revision.is_empty() {
            DEFAULT_REVISION
        } else {
            revision
        };
        let part = |text: &str| {
            !text.is_empty()
                && text.chars().all(allowed)
                && !text.starts_with('.')
                && !text.contains("..")
        };
        if revision.len() > MAX_REVISION_CHARS || !revision.split('/').all(part) {
            return Err(HubError::Name(format!(
                "{revision:?} is not a branch, tag or commit"
            )));
        }
        Ok(Self {
            id: id.to_owned(),
            revision: revision.to_owned(),
        })
    }

    /// `owner/name`.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Branch, tag or commit.
    pub fn revision(&self) -> &str {
        &self.revision
    }

    /// True when the revision can never mean other files.
    fn is_pinned(&self) -> bool {
        is_commit(&self.revision)
    }
}

/// A whole commit hash.
fn is_commit(text: &str) -> bool {
    text.len() == 40 && text.bytes().all(|b| b.is_ascii_hexdigit())
}

/// Why a model's files could not be had.
#[derive(Debug, thiserror::Error)]
pub enum HubError {
    /// The repository or revision is not one.
    #[error("{0}")]
    Name(String),
    /// Connecting, TLS or the exchange failed, or took too long.
    #[error("{host}: {reason}")]
    Exchange {
        /// Who was asked.
        host: String,
        /// What happened.
        reason: String,
    },
    /// 401 or 403.
    #[error(
        "{id}: status {status}: gated, private or unknown; give HF_TOKEN a token that may read it"
    )]
    Denied {
        /// The repository.
        id: String,
        /// Of the answer.
        status: u16,
    },
    /// 404 of the repository or the revision.
    #[error("{id} has no revision {revision:?}, or there is no such model")]
    NotFound {
        /// The repository.
        id: String,
        /// Branch, tag or commit.
        revision: String,
    },
    /// Any other status than 200.
    #[error("{host}: status {status}")]
    Status {
        /// Who answered.
        host: String,
        /// Of the answer.
        status: u16,
        /// How long the server asks to be left alone.
        retry_after: Option<Duration>,
    },
    /// The answer is not what a hub sends.
    #[error("{host}: {reason}")]
    Protocol {
        /// Who answered.
        host: String,
        /// What is wrong.
        reason: String,
    },
    /// A file is larger than its limit.
    #[error("{file} is larger than {limit} bytes")]
    TooLarge {
        /// Its name.
        file: String,
        /// In bytes.
        limit: u64,
    },
    /// The repository has no file that a tokenizer can be made of here.
    #[error("{0} has neither tokenizer.json nor a tiktoken vocabulary")]
    NoTokenizer(String),
    /// Offline, and not in the cache.
    #[error("{0} is not in the cache, and HF_HUB_OFFLINE forbids to ask for it")]
    Offline(String),
    /// The cache cannot be written.
    #[error("cache: {path}: {error}")]
    Cache {
        /// Where.
        path: String,
        /// What the system said.
        error: std::io::Error,
    },
}

impl HubError {
    /// True when asking again soon cannot help.
    fn is_lasting(&self) -> bool {
        match self {
            Self::Name(_)
            | Self::Denied { .. }
            | Self::NotFound { .. }
            | Self::TooLarge { .. }
            | Self::NoTokenizer(_)
            | Self::Offline(_) => true,
            Self::Exchange { .. }
            | Self::Status { .. }
            | Self::Protocol { .. }
            | Self::Cache { .. } => false,
        }
    }

    /// How long the server asked to be left alone.
    fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Status { retry_after, .. } => *retry_after,
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests;
