//! An API server for tests: real HTTP, a history of versions, lists in pages, chunked watches with
//! bookmarks, 410, conflicts, and every way to misbehave. Speaks for one namespace.

use std::collections::{BTreeMap, HashMap};
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use kube::Client;
use parking_lot::Mutex;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::datalayer::selector::Selector;

type Reply = Response<UnsyncBoxBody<Bytes, std::io::Error>>;
/// What a watch is sent: a line, a broken line and the end of the connection, or the plain end.
type Line = Result<Bytes, std::io::Error>;
/// Answers to a `create` of a review, by resource.
type Review = Box<dyn Fn(&Value) -> Value + Send>;

/// The server; stops when dropped.
pub(crate) struct ApiServer {
    shared: Arc<Shared>,
    address: SocketAddr,
    up: Mutex<CancellationToken>,
}

struct Shared {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    version: u64,
    /// Watches from before this version get 410.
    forgotten: u64,
    objects: BTreeMap<(String, String), Value>,
    history: Vec<(u64, String, &'static str, Value)>,
    watches: Vec<Watch>,
    requests: Vec<String>,
    /// Status by resource, instead of an answer.
    refused: HashMap<String, u16>,
    /// `Retry-After` of refusals, in seconds.
    retry_after: Option<u32>,
    reviews: HashMap<String, Review>,
}

struct Watch {
    resource: String,
    query: HashMap<String, String>,
    lines: mpsc::UnboundedSender<Line>,
}

/// A ready pod that the pool of [`pool`] selects.
pub(crate) fn pod(name: &str, last: u8) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": name, "namespace": "default", "uid": format!("uid-{name}"),
                     "labels": {"app": "llm"}, "creationTimestamp": "2026-01-01T00:00:00Z"},
        "spec": {"containers": []},
        "status": {"podIP": format!("10.0.0.{last}"), "conditions": [{"type": "Ready", "status": "True"}]},
    })
}

/// The InferencePool `pool` over pods with `app=llm`.
pub(crate) fn pool(ports: &[u16]) -> Value {
    let ports: Vec<Value> = ports
        .iter()
        .map(|number| json!({"number": number}))
        .collect();
    json!({
        "apiVersion": "inference.networking.k8s.io/v1", "kind": "InferencePool",
        "metadata": {"name": "pool", "namespace": "default", "uid": "uid-pool"},
        "spec": {"selector": {"matchLabels": {"app": "llm"}}, "targetPorts": ports},
    })
}

/// Waits until `condition` holds.
pub(crate) async fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    for _ in 0..2000 {
        if condition() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    panic!("not within ten seconds: {what}");
}

impl ApiServer {
    pub(crate) async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let server = Self {
            shared: Arc::new(Shared {
                state: Mutex::new(State {
                    version: 100,
                    ..State::default()
                }),
            }),
            address: listener.local_addr().unwrap(),
            up: Mutex::new(CancellationToken::new()),
        };
        server.serve(listener);
        server
    }

    fn serve(&self, listener: TcpListener) {
        let up = CancellationToken::new();
        *self.up.lock() = up.clone();
        let shared = Arc::clone(&self.shared);
        tokio::spawn(async move {
            loop {
                let accepted = tokio::select! {
                    () = up.cancelled() => return,
                    accepted = listener.accept() => accepted,
                };
                let Ok((stream, _)) = accepted else { return };
                let (shared, up) = (Arc::clone(&shared), up.clone());
                tokio::spawn(async move {
                    let service = service_fn(move |request| {
                        let shared = Arc::clone(&shared);
                        async move { Ok::<_, Infallible>(shared.answer(request).await) }
                    });
                    let connection = hyper::server::conn::http1::Builder::new()
                        .serve_connection(TokioIo::new(stream), service);
                    tokio::select! { _ = connection => {}, () = up.cancelled() => {} }
                });
            }
        });
    }

    /// A client of this server.
    pub(crate) fn client(&self) -> Client {
        client_of(self.address())
    }

    /// Where it listens.
    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Nobody is there any more: connections break, new ones are refused.
    pub(crate) fn go_down(&self) {
        self.up.lock().cancel();
        self.shared.state.lock().watches.clear();
    }

    /// Back at the same address.
    pub(crate) async fn come_back(&self) {
        for _ in 0..500 {
            let socket = tokio::net::TcpSocket::new_v4().unwrap();
            socket.set_reuseaddr(true).unwrap();
            if socket.bind(self.address).is_ok() {
                return self.serve(socket.listen(64).unwrap());
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("the address is taken");
    }

    /// Creates or changes an object; its kind says where.
    pub(crate) fn apply(&self, mut object: Value) {
        let resource = plural(object["kind"].as_str().unwrap());
        let group = object["apiVersion"].as_str().unwrap();
        let key = keyed(group, &resource);
        let name = object["metadata"]["name"].as_str().unwrap().to_owned();
        let state = &mut *self.shared.state.lock();
        state.put(&key, &name, &mut object);
    }

    /// Deletes an object of a core resource, or of `group/version/resource`.
    pub(crate) fn delete(&self, resource: &str, name: &str) {
        let state = &mut *self.shared.state.lock();
        let key = (resource.to_owned(), name.to_owned());
        let mut object = state.objects.remove(&key).expect("an object to delete");
        state.version += 1;
        object["metadata"]["resourceVersion"] = json!(state.version.to_string());
        state.record(resource, "DELETED", object);
    }

    /// The object as the server has it.
    pub(crate) fn get(&self, resource: &str, name: &str) -> Option<Value> {
        let state = self.shared.state.lock();
        state
            .objects
            .get(&(resource.to_owned(), name.to_owned()))
            .cloned()
    }

    /// Forgets the history: watches from before now are gone.
    pub(crate) fn compact(&self) {
        let state = &mut *self.shared.state.lock();
        state.version += 1;
        state.forgotten = state.version;
        state.history.clear();
    }

    /// A bookmark to every watch of the resource.
    pub(crate) fn bookmark(&self, resource: &str) {
        let version = {
            let state = &mut *self.shared.state.lock();
            state.version += 1;
            state.version.to_string()
        };
        let object =
            json!({"kind": "Pod", "apiVersion": "v1", "metadata": {"resourceVersion": version}});
        self.send(
            resource,
            &json!({"type": "BOOKMARK", "object": object}).to_string(),
        );
    }

    /// A line to every watch of the resource, as it is.
    pub(crate) fn send(&self, resource: &str, line: &str) {
        let state = self.shared.state.lock();
        for watch in state.watches.iter().filter(|w| w.resource == resource) {
            let _ = watch.lines.send(Ok(format!("{line}\n").into()));
        }
    }

    /// Ends every watch in the middle of an event, with the connection.
    pub(crate) fn cut(&self) {
        for watch in self.shared.state.lock().watches.drain(..) {
            let half = r#"{"type":"MODIFIED","object":{"metadata":{"name":"#;
            let _ = watch.lines.send(Ok(Bytes::from_static(half.as_bytes())));
            let _ = watch.lines.send(Err(std::io::Error::other("cut")));
        }
    }

    /// Ends every watch in good order.
    pub(crate) fn end_watches(&self) {
        self.shared.state.lock().watches.clear();
    }

    /// How many watches of the resource are open.
    pub(crate) fn watches(&self, resource: &str) -> usize {
        let state = &mut *self.shared.state.lock();
        state.watches.retain(|watch| !watch.lines.is_closed());
        state
            .watches
            .iter()
            .filter(|w| w.resource == resource)
            .count()
    }

    /// Answers requests for the resource with this status; 0 ends that.
    pub(crate) fn refuse(&self, resource: &str, status: u16) {
        self.shared
            .state
            .lock()
            .refused
            .insert(resource.to_owned(), status);
    }

    /// Refusals come with this `Retry-After`, in seconds.
    pub(crate) fn retry_after(&self, seconds: u32) {
        self.shared.state.lock().retry_after = Some(seconds);
    }

    /// Answers reviews posted to the resource.
    pub(crate) fn review(&self, resource: &str, answer: impl Fn(&Value) -> Value + Send + 'static) {
        let mut state = self.shared.state.lock();
        state.reviews.insert(resource.to_owned(), Box::new(answer));
    }

    /// `METHOD path?query` of every request so far, decoded.
    pub(crate) fn requests(&self) -> Vec<String> {
        self.shared.state.lock().requests.clone()
    }

    /// How many lists of the resource were begun.
    pub(crate) fn lists(&self, resource: &str) -> usize {
        let requests = self.requests();
        let path = format!("/{resource}?");
        let lists = requests.iter().filter(|r| {
            r.starts_with("GET")
                && r.contains(&path)
                && !r.contains("watch=")
                && !r.contains("continue=")
        });
        lists.count()
    }
}

/// A client of the server at `address`, for another runtime.
pub(crate) fn client_of(address: SocketAddr) -> Client {
    let uri = format!("http://{address}").parse().unwrap();
    crate::kubernetes::client::connect(kube::Config::new(uri)).unwrap()
}

impl Drop for ApiServer {
    fn drop(&mut self) {
        self.up.lock().cancel();
    }
}

fn plural(kind: &str) -> String {
    format!("{}s", kind.to_lowercase())
}

/// Core resources go by their name, others by group, version and name.
fn keyed(group: &str, resource: &str) -> String {
    if group == "v1" {
        resource.to_owned()
    } else {
        format!("{group}/{resource}")
    }
}

fn matches(query: &HashMap<String, String>, object: &Value) -> bool {
    let labels: BTreeMap<String, String> =
        serde_json::from_value(object["metadata"]["labels"].clone()).unwrap_or_default();
    let selected = query
        .get("labelSelector")
        .is_none_or(|s| Selector::parse(s).unwrap().matches(&labels));
    let named = query.get("fieldSelector").is_none_or(|field| {
        let name = field.strip_prefix("metadata.name=").expect("a known field");
        object["metadata"]["name"] == name
    });
    selected && named
}

impl State {
    fn put(&mut self, resource: &str, name: &str, object: &mut Value) {
        self.version += 1;
        object["metadata"]["resourceVersion"] = json!(self.version.to_string());
        let key = (resource.to_owned(), name.to_owned());
        let before = self.objects.insert(key, object.clone());
        let kind = if before.is_some() {
            "MODIFIED"
        } else {
            "ADDED"
        };
        self.record_change(resource, kind, before.as_ref(), object.clone());
    }

    fn record(&mut self, resource: &str, kind: &'static str, object: Value) {
        self.record_change(resource, kind, Some(&object.clone()), object);
    }

    /// Tells watches; one that selects only the former object hears of its end.
    fn record_change(
        &mut self,
        resource: &str,
        kind: &'static str,
        before: Option<&Value>,
        object: Value,
    ) {
        for watch in self.watches.iter().filter(|w| w.resource == resource) {
            let was = before.is_some_and(|object| matches(&watch.query, object));
            let kind = match (was, matches(&watch.query, &object)) {
                (true, false) => "DELETED",
                (false, true) => "ADDED",
                (true, true) => kind,
                (false, false) => continue,
            };
            let line = json!({"type": kind, "object": object});
            let _ = watch.lines.send(Ok(format!("{line}\n").into()));
        }
        self.history
            .push((self.version, resource.to_owned(), kind, object));
    }
}

fn reply(status: u16, body: &Value) -> Reply {
    let body = Full::new(Bytes::from(body.to_string())).map_err(|never| match never {});
    let mut response = Response::new(body.boxed_unsync());
    *response.status_mut() = StatusCode::from_u16(status).unwrap();
    response
}

fn failure(status: u16, reason: &str) -> Value {
    json!({"kind": "Status", "status": "Failure", "code": status, "reason": reason, "message": reason})
}

/// Decodes a query; spaces come as `+`.
fn decoded(query: &str) -> HashMap<String, String> {
    let decode = |text: &str| {
        let mut out = Vec::new();
        let mut bytes = text.bytes();
        while let Some(byte) = bytes.next() {
            out.push(match byte {
                b'+' => b' ',
                b'%' => {
                    let hex = [bytes.next().unwrap(), bytes.next().unwrap()];
                    u8::from_str_radix(std::str::from_utf8(&hex).unwrap(), 16).unwrap()
                }
                byte => byte,
            });
        }
        String::from_utf8(out).unwrap()
    };
    let pairs = query.split('&').filter_map(|pair| pair.split_once('='));
    pairs.map(|(k, v)| (decode(k), decode(v))).collect()
}

impl Shared {
    async fn answer(&self, request: Request<Incoming>) -> Reply {
        let (head, body) = request.into_parts();
        let body = body
            .collect()
            .await
            .map(http_body_util::Collected::to_bytes)
            .unwrap_or_default();
        let query = decoded(head.uri.query().unwrap_or_default());
        // /api/v1/namespaces/default/pods[/name], /apis/group/version[/namespaces/default]/resource[/name]
        let parts: Vec<&str> = head.uri.path().split('/').skip(1).collect();
        let (group, rest) = match parts.as_slice() {
            ["api", version, rest @ ..] => ((*version).to_owned(), rest),
            ["apis", group, version, rest @ ..] => (format!("{group}/{version}"), rest),
            _ => return reply(404, &failure(404, "NotFound")),
        };
        let rest = rest
            .strip_prefix(&["namespaces", "default"])
            .unwrap_or(rest);
        let (Some(resource), name) = (rest.first(), rest.get(1)) else {
            return reply(404, &failure(404, "NotFound"));
        };
        let resource = keyed(&group, resource);
        let state = &mut *self.state.lock();
        let mut shown: Vec<_> = query.iter().map(|(k, v)| format!("{k}={v}")).collect();
        shown.sort();
        state.requests.push(format!(
            "{} {}?{}",
            head.method,
            head.uri.path(),
            shown.join("&")
        ));
        match state.refused.get(&resource) {
            None | Some(0) => {}
            Some(status) => {
                let mut refusal = reply(*status, &failure(*status, "Refused"));
                if let Some(seconds) = state.retry_after {
                    let headers = refusal.headers_mut();
                    headers.insert(http::header::RETRY_AFTER, seconds.into());
                }
                return refusal;
            }
        }
        if head.method == Method::GET && query.contains_key("watch") {
            return state.watch(resource, query);
        }
        match (&head.method, name) {
            (&Method::GET, None) => state.list(&resource, &query),
            (&Method::GET, Some(name)) => {
                match state.objects.get(&(resource, (*name).to_owned())) {
                    Some(object) => reply(200, object),
                    None => reply(404, &failure(404, "NotFound")),
                }
            }
            (method, name) => {
                let object: Value = serde_json::from_slice(&body).unwrap();
                state.write(method, &resource, name.copied(), object)
            }
        }
    }
}

impl State {
    fn list(&self, resource: &str, query: &HashMap<String, String>) -> Reply {
        let objects = self
            .objects
            .iter()
            .filter(|((r, _), o)| r == resource && matches(query, o));
        let all: Vec<&Value> = objects.map(|(_, object)| object).collect();
        // A continuation says at which version the list began and how far it came.
        let (version, from) = match query.get("continue") {
            Some(token) => {
                let (version, from) = token.split_once('-').unwrap();
                (version.parse().unwrap(), from.parse().unwrap())
            }
            None => (self.version, 0),
        };
        if version < self.forgotten {
            return reply(410, &failure(410, "Expired"));
        }
        let limit = query
            .get("limit")
            .map_or(usize::MAX, |l| l.parse().unwrap());
        let items: Vec<&&Value> = all.iter().skip(from).take(limit).collect();
        let mut meta = json!({"resourceVersion": version.to_string()});
        let end = from + items.len();
        if end < all.len() {
            meta["continue"] = json!(format!("{version}-{end}"));
        }
        reply(
            200,
            &json!({"kind": "List", "apiVersion": "v1", "metadata": meta, "items": items}),
        )
    }

    #[expect(clippy::disallowed_methods, reason = "a test's server")]
    fn watch(&mut self, resource: String, query: HashMap<String, String>) -> Reply {
        let (lines, receiver) = mpsc::unbounded_channel::<Line>();
        let from: u64 = query["resourceVersion"].parse().unwrap();
        if from < self.forgotten {
            let line = json!({"type": "ERROR", "object": failure(410, "Expired")});
            let _ = lines.send(Ok(format!("{line}\n").into()));
        } else {
            let missed = self
                .history
                .iter()
                .filter(|(v, r, ..)| *v > from && *r == resource);
            for (_, _, kind, object) in missed.filter(|(.., object)| matches(&query, object)) {
                let line = json!({"type": kind, "object": object});
                let _ = lines.send(Ok(format!("{line}\n").into()));
            }
            self.watches.push(Watch {
                resource,
                query,
                lines,
            });
        }
        let stream = futures_util::stream::unfold(receiver, |mut receiver| async {
            let line = receiver.recv().await?;
            Some((line.map(Frame::data), receiver))
        });
        Response::new(StreamBody::new(stream).boxed_unsync())
    }

    fn write(
        &mut self,
        method: &Method,
        resource: &str,
        name: Option<&str>,
        mut object: Value,
    ) -> Reply {
        if let Some(review) = self.reviews.get(resource) {
            return reply(201, &review(&object));
        }
        let own = object["metadata"]["name"]
            .as_str()
            .unwrap_or_default()
            .to_owned();
        let name = name.unwrap_or(&own);
        let before = self.objects.get(&(resource.to_owned(), name.to_owned()));
        match (method, before) {
            (&Method::POST, Some(_)) => return reply(409, &failure(409, "AlreadyExists")),
            (&Method::PUT, None) => return reply(404, &failure(404, "NotFound")),
            (&Method::PUT, Some(before)) => {
                let known = &object["metadata"]["resourceVersion"];
                if *known != before["metadata"]["resourceVersion"] {
                    return reply(409, &failure(409, "Conflict"));
                }
            }
            (&Method::POST, None) => {}
            _ => return reply(405, &failure(405, "MethodNotAllowed")),
        }
        self.put(resource, name, &mut object);
        reply(if method == Method::POST { 201 } else { 200 }, &object)
    }
}
