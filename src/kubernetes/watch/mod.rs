//! One collection of objects, listed and then followed for as long as the process lives.
//!
//! Built on the client's plain requests rather than on a watcher library: a list arrives whole, so
//! that the pool is never seen half filled; what is not read of an object is never decoded; lines and
//! pages have a limit; and every failure is counted by its cause.
//!
//! The rules of the protocol that matter here:
//! - A list is read in pages at one version; the watch goes on from that version.
//! - A watch that ends, for whatever reason, is taken up at the version of its last event or
//!   bookmark: nothing is missed and nothing is listed again. Servers end watches after some minutes.
//! - 410 says that the version is forgotten: list again.
//! - Versions of one collection only grow. An event that is not newer than what is known is a
//!   repetition and dropped.

use std::marker::PhantomData;
use std::time::Duration;

use bytes::Bytes;
use http::{Request, StatusCode, header};
use http_body_util::{BodyExt, Limited};
use kube::Client;
use kube::client::Body;
use kube::core::Request as Resource;
use kube::core::params::{ListParams, WatchParams};
use serde::Deserialize;
use serde_json::value::RawValue;
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout};

use super::objects::Object;

mod backoff;
mod lines;
mod standing;

pub use backoff::Backoff;
use lines::Lines;
pub use standing::ApiContact;
use standing::Standing;

/// Objects asked for in one page of a list.
const PAGE_OBJECTS: u32 = 500;
/// Longest page of a list; etcd limits an object to 1.5 MiB, pods take some 20 KB.
const MAX_PAGE_BYTES: usize = 256 << 20;
/// Longest answer that says what is wrong.
const MAX_STATUS_BYTES: usize = 64 << 10;
/// How long one page of a list may take.
const LIST_TIMEOUT: Duration = Duration::from_mins(1);
/// How long a watch lasts before the server ends it, at random between these seconds so that replicas
/// do not come back together.
const WATCH_SECONDS: std::ops::RangeInclusive<u32> = 240..=330;
/// A watch without a word for this long is taken up again on a new request: the connection may be
/// dead without anybody having said so. Servers send a bookmark every minute.
const SILENCE: Duration = Duration::from_secs(90);
/// A watch that lasted this long was one: what comes after it starts without delay.
const STABLE: Duration = Duration::from_secs(10);
/// How long a server must say of a collection it has shown that there is none.
const ABSENT_AFTER: Duration = Duration::from_mins(2);
/// How often a collection is asked for that is not there or not ours to see.
const ABSENT_INTERVAL: Duration = Duration::from_mins(1);
/// Longest wait that a server's `Retry-After` is followed for.
const LONGEST_RETRY_AFTER: Duration = Duration::from_mins(1);
/// Updates on their way to the reader. When it is full the watch waits, and with it the server.
pub const UPDATE_QUEUE: usize = 1024;

/// Which objects.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Collection {
    /// Plural name of the resource, for logs and metrics.
    pub resource: &'static str,
    /// API group; empty for the core.
    pub group: &'static str,
    /// Version of the group.
    pub version: &'static str,
    /// Namespace.
    pub namespace: String,
    /// Label selector in its text form; the server selects.
    pub labels: Option<String>,
    /// Field selector in its text form.
    pub fields: Option<String>,
    /// True when a cluster may lack the resource, or we the right to read it. Both are then said once
    /// and asked again from time to time, instead of counting as a lost connection.
    pub optional: bool,
}

impl Collection {
    /// Path of the collection.
    pub fn path(&self) -> String {
        let Self {
            resource,
            group,
            version,
            namespace,
            ..
        } = self;
        if group.is_empty() {
            format!("/api/{version}/namespaces/{namespace}/{resource}")
        } else {
            format!("/apis/{group}/{version}/namespaces/{namespace}/{resource}")
        }
    }
}

/// What happened to a collection.
#[derive(Debug)]
pub enum Update<K> {
    /// These are all objects there are.
    Listed(Vec<K>),
    /// An object is new or different.
    Applied(K),
    /// An object is gone, or is not selected any more.
    Deleted(K),
    /// The server does not know the resource or does not let us read it. Says nothing about objects
    /// that were listed before: a server that is starting says the same.
    Absent,
}

/// Why a request did not do its work.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error("the version is no longer known")]
    Gone,
    #[error("{0} {1}")]
    Status(StatusCode, String, Option<Duration>),
    #[error("{0}")]
    Connection(String),
    #[error("no answer in time")]
    Timeout,
    #[error("cannot be decoded: {0}")]
    Decode(String),
    #[error("longer than {0} bytes")]
    TooLong(usize),
}

impl Failure {
    /// Label of the error counter.
    fn reason(&self) -> &'static str {
        match self {
            Self::Gone => "gone",
            Self::Status(status, ..) => match status.as_u16() {
                401 => "unauthorized",
                403 => "forbidden",
                404 => "not_found",
                429 => "throttled",
                500..=599 => "server_error",
                _ => "refused",
            },
            Self::Connection(_) => "connection",
            Self::Timeout => "timeout",
            Self::Decode(_) => "decode",
            Self::TooLong(_) => "too_long",
        }
    }

    fn is_absence(&self) -> bool {
        matches!(self, Self::Status(status, ..) if *status == 403 || *status == 404)
    }

    fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Status(_, _, after) => *after,
            _ => None,
        }
    }
}

/// Follows one collection.
pub struct Watcher<K> {
    client: Client,
    collection: Collection,
    standing: Standing,
    backoff: Backoff,
    /// The version that everything up to was delivered of.
    version: String,
    /// When that was listed, if it was.
    listed_at: Option<Instant>,
    /// Absence was reported since the last list.
    absent: bool,
    /// Nobody answered the last request.
    unreachable: bool,
    /// Since when the server says that it is not there, or not ours to see.
    absent_since: Option<Instant>,
    /// That was believed, and it was not seen since.
    given_up: bool,
    objects: PhantomData<fn() -> K>,
}

impl<K> std::fmt::Debug for Watcher<K> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Watcher")
            .field("collection", &self.collection)
            .field("version", &self.version)
            .finish_non_exhaustive()
    }
}

/// The receiver is gone: nobody wants to know any more.
struct Unwanted;

impl<K: Object> Watcher<K> {
    /// A watcher that has not begun; `contact` learns how it fares.
    pub fn new(client: Client, collection: Collection, contact: &ApiContact) -> Self {
        Self {
            standing: Standing::new(collection.resource, collection.group, contact),
            client,
            collection,
            backoff: Backoff::default(),
            version: String::new(),
            listed_at: None,
            absent: false,
            unreachable: false,
            absent_since: None,
            given_up: false,
            objects: PhantomData,
        }
    }

    /// Delivers updates until nobody receives them. Failures are counted, logged and waited out here.
    pub async fn run(mut self, updates: mpsc::Sender<Update<K>>) {
        let gone = updates.clone();
        tokio::select! {
            // Dropped wherever it waits: nothing here outlives the request it is in.
            () = gone.closed() => {}
            Unwanted = self.follow(&updates) => {}
        }
    }

    async fn follow(&mut self, updates: &mpsc::Sender<Update<K>>) -> Unwanted {
        loop {
            match self.list().await {
                Ok(objects) => {
                    self.absent = false;
                    self.backoff.reset();
                    if updates.send(Update::Listed(objects)).await.is_err() {
                        return Unwanted;
                    }
                    if let Err(unwanted) = self.watch_on(updates).await {
                        return unwanted;
                    }
                }
                Err(failure) => {
                    let is_absent = failure.is_absence();
                    let was_absent = std::mem::replace(&mut self.absent, is_absent);
                    if is_absent && !was_absent && updates.send(Update::Absent).await.is_err() {
                        return Unwanted;
                    }
                    self.wait_out("list", &failure).await;
                }
            }
        }
    }

    /// Watches on and on from the version that is known, until it is forgotten.
    async fn watch_on(&mut self, updates: &mpsc::Sender<Update<K>>) -> Result<(), Unwanted> {
        loop {
            let begun = Instant::now();
            let before = self.version.clone();
            let ended = self.watch(updates).await;
            if begun.elapsed() >= STABLE || self.version != before {
                self.backoff.reset();
            }
            match ended {
                Ok(Ok(())) if begun.elapsed() >= STABLE => {}
                // A server that hangs up at once is not asked again at once.
                Ok(Ok(())) => {
                    self.standing.lost();
                    tokio::time::sleep(self.backoff.pause()).await;
                }
                Ok(Err(Failure::Gone)) => {
                    self.standing.failed("gone");
                    // After an outage that is to be expected. But a server that forgets what it has
                    // just listed is not listed in a loop.
                    if self.listed_at.is_some_and(|at| at.elapsed() < STABLE) {
                        self.standing.lost();
                        tokio::time::sleep(self.backoff.pause()).await;
                    }
                    return Ok(());
                }
                Ok(Err(failure)) => self.wait_out("watch", &failure).await,
                Err(unwanted) => return Err(unwanted),
            }
        }
    }

    async fn wait_out(&mut self, doing: &str, failure: &Failure) {
        let Collection {
            resource, group, ..
        } = self.collection;
        self.standing.failed(failure.reason());
        let unreachable = matches!(failure, Failure::Connection(_) | Failure::Timeout);
        if std::mem::replace(&mut self.unreachable, unreachable) && !unreachable {
            // Somebody answers again, if not yet what is wanted: it will not be long.
            self.backoff.reset();
        }
        if self.collection.optional && failure.is_absence() && self.is_given_up() {
            if !self.standing.is_absent() {
                tracing::info!(resource, group, %failure, "not followed, asked again every minute");
            }
            self.standing.absent();
            // At first more often: the cluster may just be set up.
            let pause = if self.backoff.is_longest() {
                jittered(ABSENT_INTERVAL)
            } else {
                self.backoff.pause()
            };
            tokio::time::sleep(pause).await;
            return;
        }
        if !failure.is_absence() {
            self.absent_since = None;
        }
        if self.standing.is_unsettled() || self.standing.is_connected() {
            tracing::warn!(resource, group, doing, %failure, "Kubernetes API: the last known state stays");
        } else {
            tracing::debug!(resource, group, doing, %failure, "Kubernetes API");
        }
        self.standing.lost();
        let pause = match failure.retry_after() {
            // The server knows best, and says so to everybody at once.
            Some(after) => after
                .min(LONGEST_RETRY_AFTER)
                .mul_f64(1.0 + fastrand::f64() / 2.0),
            None => self.backoff.pause(),
        };
        tokio::time::sleep(pause).await;
    }

    /// Whether a collection that cannot be seen is taken for absent. One that was never seen is, at once;
    /// of one that was, a server says so too while it starts, before it has read its rules and resources.
    fn is_given_up(&mut self) -> bool {
        let since = *self.absent_since.get_or_insert_with(Instant::now);
        self.given_up |= self.version.is_empty() || since.elapsed() >= ABSENT_AFTER;
        self.given_up
    }

    /// The server showed the collection.
    fn seen(&mut self) {
        self.absent_since = None;
        self.given_up = false;
    }

    /// All objects at one version.
    async fn list(&mut self) -> Result<Vec<K>, Failure> {
        let resource = Resource::new(self.collection.path());
        let mut params = ListParams {
            label_selector: self.collection.labels.clone(),
            field_selector: self.collection.fields.clone(),
            limit: Some(PAGE_OBJECTS),
            ..ListParams::default()
        };
        let mut objects = Vec::new();
        loop {
            let request = resource.list(&params).map_err(decode)?;
            let page = async {
                let response = self.send(request).await?;
                whole(response.into_body(), MAX_PAGE_BYTES).await
            };
            let page = timeout(LIST_TIMEOUT, page)
                .await
                .map_err(|_| Failure::Timeout)??;
            let page: Page<'_> = serde_json::from_slice(&page).map_err(decode)?;
            for item in page.items.unwrap_or_default() {
                objects.extend(self.object(item));
            }
            params.continue_token = page.metadata.next.filter(|next| !next.is_empty());
            if params.continue_token.is_none() {
                self.version = page.metadata.resource_version;
                self.standing.listed();
                self.listed_at = Some(Instant::now());
                self.seen();
                return Ok(objects);
            }
        }
    }

    /// One watch, to its end.
    async fn watch(
        &mut self,
        updates: &mpsc::Sender<Update<K>>,
    ) -> Result<Result<(), Failure>, Unwanted> {
        let params = WatchParams {
            label_selector: self.collection.labels.clone(),
            field_selector: self.collection.fields.clone(),
            timeout: Some(fastrand::u32(WATCH_SECONDS)),
            ..WatchParams::default()
        };
        let begin = async {
            let request = Resource::new(self.collection.path())
                .watch(&params, &self.version)
                .map_err(decode)?;
            timeout(SILENCE, self.send(request))
                .await
                .map_err(|_| Failure::Timeout)?
        };
        let mut lines = match begin.await {
            Ok(response) => Lines::new(response.into_body()),
            Err(failure) => return Ok(Err(failure)),
        };
        self.standing.connected();
        self.seen();
        loop {
            let line = match timeout(SILENCE, lines.next()).await {
                Ok(Ok(Some(line))) => line,
                Ok(Ok(None)) => return Ok(Ok(())),
                Ok(Err(failure)) => return Ok(Err(failure)),
                Err(_) => return Ok(Err(Failure::Timeout)),
            };
            match self.event(&line) {
                Ok(Some(update)) => {
                    if updates.send(update).await.is_err() {
                        return Err(Unwanted);
                    }
                }
                Ok(None) => {}
                Err(failure) => return Ok(Err(failure)),
            }
        }
    }

    /// What one line of a watch says; `None` when that is nothing new.
    fn event(&mut self, line: &[u8]) -> Result<Option<Update<K>>, Failure> {
        self.standing.heard();
        let event: Event<'_> = serde_json::from_slice(line).map_err(decode)?;
        if event.kind == "ERROR" {
            let status: Status = serde_json::from_str(event.object.get()).map_err(decode)?;
            return Err(status.failure(None));
        }
        let Versioned { metadata } = serde_json::from_str(event.object.get()).map_err(decode)?;
        let version = metadata.resource_version;
        if event.kind == "BOOKMARK" {
            self.version = version;
            return Ok(None);
        }
        if !is_newer(&version, &self.version) {
            self.standing.event("stale");
            return Ok(None);
        }
        self.version = version;
        let kind = event.kind;
        let update: fn(K) -> Update<K> = match kind {
            "ADDED" | "MODIFIED" => Update::Applied,
            "DELETED" => Update::Deleted,
            // A later protocol may have more to say; the version counts all the same.
            _ => return Ok(None),
        };
        self.standing.event(if kind == "DELETED" {
            "deleted"
        } else {
            "applied"
        });
        Ok(self.object(event.object).map(update))
    }

    /// An object; one that cannot be decoded is counted and left out, the others go on.
    fn object(&self, raw: &RawValue) -> Option<K> {
        serde_json::from_str(raw.get())
            .inspect_err(|error| {
                self.standing.failed("decode");
                tracing::warn!(
                    resource = self.collection.resource,
                    %error,
                    "an object cannot be read and is left out"
                );
            })
            .ok()
    }

    /// Sends a request; anything but success is a failure.
    async fn send(&self, request: Request<Vec<u8>>) -> Result<http::Response<Body>, Failure> {
        let response = self
            .client
            .send(request.map(Body::from))
            .await
            .map_err(|error| Failure::Connection(causes(&error)))?;
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        let after = response.headers().get(header::RETRY_AFTER);
        let after = after
            .and_then(|value| value.to_str().ok()?.parse().ok())
            .map(Duration::from_secs);
        let body = timeout(LIST_TIMEOUT, whole(response.into_body(), MAX_STATUS_BYTES));
        let body = body.await.ok().and_then(Result::ok).unwrap_or_default();
        // Not every 404 is JSON: unknown groups get a line of text.
        let mut said: Status = serde_json::from_slice(&body).unwrap_or_default();
        said.code = status.as_u16();
        Err(said.failure(after))
    }
}

/// One page of a list.
#[derive(Deserialize)]
struct Page<'a> {
    metadata: PageMeta,
    #[serde(borrow)]
    items: Option<Vec<&'a RawValue>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct PageMeta {
    resource_version: String,
    #[serde(rename = "continue")]
    next: Option<String>,
}

/// One line of a watch.
#[derive(Deserialize)]
struct Event<'a> {
    #[serde(rename = "type")]
    kind: &'a str,
    #[serde(borrow)]
    object: &'a RawValue,
}

#[derive(Deserialize)]
struct Versioned {
    metadata: Version,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Version {
    resource_version: String,
}

/// The server's word for what is wrong.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Status {
    code: u16,
    reason: String,
    message: String,
}

impl Status {
    fn failure(self, after: Option<Duration>) -> Failure {
        if self.code == 410 || self.reason == "Expired" || self.reason == "Gone" {
            return Failure::Gone;
        }
        let status = StatusCode::from_u16(self.code).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        Failure::Status(status, self.message, after)
    }
}

#[expect(clippy::needless_pass_by_value, reason = "for map_err")]
fn decode(error: impl ToString) -> Failure {
    Failure::Decode(error.to_string())
}

/// An error with what caused it: connecting says only that it failed.
fn causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        text = format!("{text}: {cause}");
        next = cause.source();
    }
    text
}

async fn whole(body: Body, limit: usize) -> Result<Bytes, Failure> {
    let collected = Limited::new(body, limit).collect().await;
    collected
        .map(http_body_util::Collected::to_bytes)
        .map_err(|error| {
            if error.is::<http_body_util::LengthLimitError>() {
                Failure::TooLong(limit)
            } else {
                Failure::Connection(causes(error.as_ref()))
            }
        })
}

/// True unless both are numbers and `version` is not the higher one. Other texts cannot be compared.
fn is_newer(version: &str, known: &str) -> bool {
    match (version.parse::<u64>(), known.parse::<u64>()) {
        (Ok(version), Ok(known)) => version > known,
        _ => true,
    }
}

/// Up to a tenth longer.
fn jittered(time: Duration) -> Duration {
    time.mul_f64(1.0 + fastrand::f64() / 10.0)
}

#[cfg(test)]
mod tests;
