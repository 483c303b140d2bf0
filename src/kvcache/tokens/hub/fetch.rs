//! [`Hub`]: brings a model's files into the cache.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use http::{HeaderMap, Response, Uri, header};
use hyper::body::Incoming;
use ring::digest::{Context, SHA256};
use serde::Deserialize;
use tokio_rustls::rustls::ClientConfig;

use super::cache::{Cache, TOKENIZER, blob_name};
use super::http::{Client, exchange, host, location, protocol, same_origin};
use super::proxy::Proxy;
use super::settings::HubSettings;
use super::{HubError, Repo, is_commit};
use crate::kvcache::tokens::tiktoken;
use crate::kvcache::tokens::tokenizer::{MAX_CONFIG_BYTES, MAX_TOKENIZER_BYTES};

/// Redirects followed for one file; the hub's own take two.
const MAX_REDIRECTS: usize = 5;
/// Largest list of a repository's files that is read.
const MAX_LISTING_BYTES: u64 = 16 << 20;
/// Longest pause a server may ask for.
const MAX_RETRY_AFTER: Duration = Duration::from_mins(5);
/// Longest time one file may take.
const FILE_LIMIT: Duration = Duration::from_mins(15);

/// Files beside the vocabulary that decide ids, fetched before it.
const CONFIGS: [&str; 5] = [
    "config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
];
/// Vocabularies of tiktoken to try where a server does not list its files.
const KNOWN_RANKS: [&str; 3] = ["tiktoken.model", "qwen.tiktoken", "hy.tiktoken"];

/// A model's files at one commit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    /// Where they are.
    pub directory: PathBuf,
    /// Of the repository.
    pub commit: String,
}

/// A client of one hub with one cache.
#[derive(Debug)]
pub struct Hub {
    settings: HubSettings,
    endpoint: Uri,
    client: Client,
    downloads: AtomicU64,
}

/// What a hub says of a file, on the way to it.
#[derive(Debug, Default)]
struct Marks {
    commit: Option<String>,
    etag: Option<String>,
    linked_etag: Option<String>,
    /// Size of a file that is kept elsewhere.
    linked_bytes: Option<u64>,
}

/// An answer that is no redirect.
struct Arrived {
    url: Uri,
    response: Response<Incoming>,
    marks: Marks,
    /// The hub itself answered, no host it sent us to.
    own: bool,
    /// Of the hub: why a status is no 200.
    code: String,
}

#[derive(Deserialize)]
struct Listing {
    sha: String,
    #[serde(default)]
    siblings: Vec<Sibling>,
}

#[derive(Deserialize)]
struct Sibling {
    rfilename: String,
}

impl Hub {
    /// Checks the endpoint; connects to nothing.
    pub fn new(settings: HubSettings) -> Result<Self, HubError> {
        Self::with_tls(settings, None)
    }

    /// As [`Self::new`], with other certificates than those the system trusts.
    pub fn with_tls(
        settings: HubSettings,
        tls: Option<Arc<ClientConfig>>,
    ) -> Result<Self, HubError> {
        let wrong = || HubError::Name(format!("HF_ENDPOINT: {:?} is no URL", settings.endpoint));
        let endpoint: Uri = settings.endpoint.parse().map_err(|_| wrong())?;
        let known = matches!(endpoint.scheme_str(), Some("http" | "https"));
        if !known || endpoint.host().is_none_or(str::is_empty) || endpoint.query().is_some() {
            return Err(wrong());
        }
        let proxy = settings.proxy.as_ref();
        let proxy = proxy.map(|(url, except)| Proxy::new(url, except));
        Ok(Self {
            client: Client {
                timeout: settings.timeout,
                proxy: proxy.transpose()?,
                tls,
            },
            settings,
            endpoint,
            downloads: AtomicU64::new(0),
        })
    }

    /// Files downloaded so far.
    pub fn downloads(&self) -> u64 {
        self.downloads.load(Ordering::Relaxed)
    }

    /// What the cache has, without asking anyone.
    pub fn cached(&self, repo: &Repo) -> Option<Snapshot> {
        let cache = self.cache(repo);
        let commit = cache.commit(repo)?;
        Some(Snapshot {
            directory: cache.snapshot(&commit),
            commit,
        })
    }

    /// True when the cached files cannot be other than the hub's, or the hub must not be asked.
    pub(super) fn is_settled(&self, repo: &Repo) -> bool {
        self.settings.offline || repo.is_pinned()
    }

    fn cache(&self, repo: &Repo) -> Cache {
        Cache::new(&self.settings.cache, repo)
    }

    /// Resolves the revision and downloads what the cache lacks; offline, what the cache has.
    pub async fn fetch(&self, repo: &Repo) -> Result<Snapshot, HubError> {
        if self.is_settled(repo)
            && let Some(cached) = self.cached(repo)
        {
            return Ok(cached);
        }
        if self.settings.offline {
            return Err(HubError::Offline(repo.id.clone()));
        }
        let cache = self.cache(repo);
        let listing = self.list(repo).await?;
        let mut commit = listing.as_ref().map(|listing| listing.sha.clone());
        let listed = |name: &str| {
            let files = listing.as_ref().map(|listing| &listing.siblings);
            files.is_none_or(|files| files.iter().any(|file| file.rfilename == name))
        };
        for name in CONFIGS.into_iter().filter(|name| listed(name)) {
            self.file(repo, &cache, &mut commit, name).await?;
        }
        let mut found = false;
        for name in vocabularies(listing.as_ref()) {
            found = self.file(repo, &cache, &mut commit, &name).await?;
            if found {
                break;
            }
        }
        let (true, Some(commit)) = (found, commit) else {
            return Err(HubError::NoTokenizer(repo.id.clone()));
        };
        cache.refer(repo, &commit)?;
        Ok(Snapshot {
            directory: cache.snapshot(&commit),
            commit,
        })
    }

    /// The files at a revision and its commit; `None` from a mirror that has files only.
    async fn list(&self, repo: &Repo) -> Result<Option<Listing>, HubError> {
        let revision = escape(&repo.revision);
        let url = self.url(&format!("/api/models/{}/revision/{revision}", repo.id))?;
        let mut arrived = self.get(repo, &url).await?;
        if arrived.response.status() == 404 {
            return match arrived.code.as_str() {
                "" => Ok(None),
                _ => Err(not_found(repo)),
            };
        }
        arrived.accept(repo)?;
        let mut bytes = Vec::new();
        while let Some(piece) = self
            .client
            .piece(&arrived.url, &mut arrived.response)
            .await?
        {
            if (bytes.len() + piece.len()) as u64 > MAX_LISTING_BYTES {
                return Err(HubError::TooLarge {
                    file: "the list of files".to_owned(),
                    limit: MAX_LISTING_BYTES,
                });
            }
            bytes.extend_from_slice(&piece);
        }
        let listing: Listing = serde_json::from_slice(&bytes)
            .map_err(|error| protocol(&arrived.url, format!("list of files: {error}")))?;
        if !is_commit(&listing.sha) {
            return Err(protocol(&arrived.url, "a list of files without a commit"));
        }
        Ok(Some(listing))
    }

    /// Brings one file into the snapshot of `commit`, which the first file settles where no list did.
    /// False when there is no such file.
    async fn file(
        &self,
        repo: &Repo,
        cache: &Cache,
        commit: &mut Option<String>,
        name: &str,
    ) -> Result<bool, HubError> {
        if let Some(commit) = commit.as_deref()
            && cache.has(commit, name)
        {
            return Ok(true);
        }
        let at = commit.as_deref().unwrap_or(&repo.revision);
        let url = self.url(&format!("/{}/resolve/{}/{name}", repo.id, escape(at)))?;
        let arrived = self.get(repo, &url).await?;
        if arrived.response.status() == 404 {
            return match arrived.code.as_str() {
                "" | "EntryNotFound" => Ok(false),
                _ => Err(not_found(repo)),
            };
        }
        arrived.accept(repo)?;
        let own = arrived.marks.commit.clone().filter(|own| is_commit(own));
        let own = own.or_else(|| commit.clone());
        let own = own.ok_or_else(|| protocol(&url, "a file without its commit"))?;
        if commit.get_or_insert_with(|| own.clone()) != &own {
            return Err(protocol(&url, "the revision moved meanwhile"));
        }
        let etag = arrived.marks.linked_etag.as_deref();
        let etag = etag.or(arrived.marks.etag.as_deref()).and_then(blob_name);
        let etag = etag.ok_or_else(|| protocol(&url, "a file without an etag"))?;
        let etag = etag.to_owned();
        if !cache.has_blob(&etag, arrived.announced_bytes()) {
            let download = self.download(cache, &etag, name, arrived);
            match tokio::time::timeout(FILE_LIMIT, download).await {
                Ok(downloaded) => downloaded?,
                Err(_) => return Err(exchange(&url, format!("{name} took over {FILE_LIMIT:?}"))),
            }
            self.downloads.fetch_add(1, Ordering::Relaxed);
        }
        cache.link(&own, name, &etag)?;
        Ok(true)
    }

    async fn download(
        &self,
        cache: &Cache,
        etag: &str,
        name: &str,
        mut arrived: Arrived,
    ) -> Result<(), HubError> {
        let limit = if CONFIGS.contains(&name) {
            MAX_CONFIG_BYTES
        } else {
            MAX_TOKENIZER_BYTES
        };
        let too_large = || HubError::TooLarge {
            file: name.to_owned(),
            limit,
        };
        let announced = arrived.announced_bytes();
        if announced.is_some_and(|bytes| bytes > limit) {
            return Err(too_large());
        }
        let mut blob = cache.write(etag)?;
        let mut digest = Context::new(&SHA256);
        let mut bytes = 0;
        while let Some(piece) = self
            .client
            .piece(&arrived.url, &mut arrived.response)
            .await?
        {
            bytes += piece.len() as u64;
            if bytes > limit {
                return Err(too_large());
            }
            digest.update(&piece);
            blob.append(&piece)?;
        }
        if announced.is_some_and(|announced| announced != bytes) {
            return Err(exchange(&arrived.url, format!("{name} was cut short")));
        }
        // Files that are kept elsewhere have their SHA-256 for an etag, others have a git hash.
        if arrived.marks.linked_etag.is_some() && is_sha256(etag) && hex(digest) != etag {
            return Err(protocol(
                &arrived.url,
                format!("{name} is not what its etag says"),
            ));
        }
        blob.finish()
    }

    /// Follows redirects. The token goes to the endpoint only, and only there marks are read.
    async fn get(&self, repo: &Repo, url: &Uri) -> Result<Arrived, HubError> {
        let mut url = url.clone();
        let mut marks = Marks::default();
        for _ in 0..=MAX_REDIRECTS {
            let own = same_origin(&url, &self.endpoint);
            let token = self.settings.token.read().filter(|_| own);
            let response = self.client.get(&url, token.as_deref()).await?;
            if own {
                marks.read(response.headers());
            }
            let Some(next) = location(&url, &response)? else {
                let code = text(response.headers(), "x-error-code").filter(|_| own);
                return Ok(Arrived {
                    own,
                    code: code.unwrap_or_default(),
                    url,
                    response,
                    marks,
                });
            };
            url = next;
        }
        Err(protocol(&url, format!("{}: too many redirects", repo.id)))
    }

    fn url(&self, path: &str) -> Result<Uri, HubError> {
        let url = format!("{}{path}", self.settings.endpoint);
        url.parse()
            .map_err(|_| HubError::Name(format!("{url:?} is no URL")))
    }
}

/// In order of preference. Where a tokenizer is listed no other is asked for.
fn vocabularies(listing: Option<&Listing>) -> Vec<String> {
    let Some(listing) = listing else {
        let known = std::iter::once(TOKENIZER).chain(KNOWN_RANKS);
        return known.map(ToOwned::to_owned).collect();
    };
    let names = listing.siblings.iter().map(|file| file.rfilename.as_str());
    let mut ranks: Vec<&str> = names
        .clone()
        .filter(|name| tiktoken::is_name(name))
        .collect();
    ranks.sort_unstable_by_key(|name| (*name != KNOWN_RANKS[0], *name));
    let tokenizer = names.filter(|name| *name == TOKENIZER);
    let preferred = tokenizer.chain(ranks).take(1);
    preferred.map(ToOwned::to_owned).collect()
}

/// A revision as one segment of a path.
fn escape(revision: &str) -> String {
    revision.replace('/', "%2F")
}

fn not_found(repo: &Repo) -> HubError {
    HubError::NotFound {
        id: repo.id.clone(),
        revision: repo.revision.clone(),
    }
}

fn is_sha256(etag: &str) -> bool {
    etag.len() == 64 && etag.bytes().all(|b| b.is_ascii_hexdigit())
}

fn hex(digest: Context) -> String {
    use std::fmt::Write;
    digest
        .finish()
        .as_ref()
        .iter()
        .fold(String::new(), |mut text, byte| {
            let _ = write!(text, "{byte:02x}");
            text
        })
}

fn text(headers: &HeaderMap, name: &str) -> Option<String> {
    let value = headers.get(name)?.to_str().ok()?;
    Some(value.to_owned())
}

impl Marks {
    /// The first answer that says something is right: later ones may speak of a copy.
    fn read(&mut self, headers: &HeaderMap) {
        let fill = |slot: &mut Option<String>, name: &str| {
            if slot.is_none() {
                *slot = text(headers, name);
            }
        };
        fill(&mut self.commit, "x-repo-commit");
        fill(&mut self.linked_etag, "x-linked-etag");
        fill(&mut self.etag, "etag");
        let linked = text(headers, "x-linked-size").and_then(|size| size.parse().ok());
        self.linked_bytes = self.linked_bytes.or(linked);
    }
}

impl Arrived {
    /// An error for any status but 200.
    fn accept(&self, repo: &Repo) -> Result<(), HubError> {
        let status = self.response.status();
        match (status.as_u16(), self.code.as_str()) {
            (200, _) => Ok(()),
            (_, "RevisionNotFound") => Err(not_found(repo)),
            (401 | 403, _) if self.own => Err(HubError::Denied {
                id: repo.id.clone(),
                status: status.as_u16(),
            }),
            (status, _) => {
                let headers = self.response.headers();
                let pause = text(headers, header::RETRY_AFTER.as_str());
                let pause = pause.and_then(|seconds| seconds.trim().parse().ok());
                Err(HubError::Status {
                    host: host(&self.url),
                    status,
                    retry_after: pause.map(|s| Duration::from_secs(s).min(MAX_RETRY_AFTER)),
                })
            }
        }
    }

    /// How long the file is, by the hub or by the answer's head.
    fn announced_bytes(&self) -> Option<u64> {
        let length = text(self.response.headers(), header::CONTENT_LENGTH.as_str());
        let length = length.and_then(|length| length.parse().ok());
        self.marks.linked_bytes.or(length)
    }
}
