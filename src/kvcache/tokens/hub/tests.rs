use std::collections::HashMap;
use std::fmt::Write;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::{ClientConfig, RootCertStore, ServerConfig, crypto};

use super::*;
use crate::kvcache::tokens::service::{
    ModelSettings, Settings, TokenService, TokenizeError, Tokenized,
};
use crate::kvcache::tokens::tokenizer::MAX_CONFIG_BYTES;
use crate::kvcache::tokens::tokenizer::tests::directory;
use crate::request::{ApiKind, Body, InferenceRequest, Payload};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
const NEXT: &str = "fedcba9876543210fedcba9876543210fedcba98";
/// `sha256sum tests/data/tokenizer/tokenizer.json`.
const TOKENIZER_SHA256: &str = "ff13967110d7159a6e4bbd6202604186040d79d746420f04c3bbd7fba5e671c8";

/// One request as a server saw it.
#[derive(Debug, Clone)]
struct Seen {
    path: String,
    authorization: Option<String>,
}

/// Raw answers of a server by path; each is given once, the last of a path for ever.
#[derive(Default)]
struct Script(HashMap<String, Vec<Vec<u8>>>);

struct Server {
    url: String,
    seen: Arc<Mutex<Vec<Seen>>>,
}

fn answer(status: u16, headers: &[(&str, &str)], body: &[u8]) -> Vec<u8> {
    let mut head = format!("HTTP/1.1 {status} X\r\n");
    if !headers.iter().any(|(name, _)| *name == "content-length") {
        write!(head, "content-length: {}\r\n", body.len()).unwrap();
    }
    for (name, value) in headers {
        write!(head, "{name}: {value}\r\n").unwrap();
    }
    [head.as_bytes(), b"connection: close\r\n\r\n", body].concat()
}

fn file(commit: &str, etag: &str, body: &[u8]) -> Vec<u8> {
    let etag = format!("\"{etag}\"");
    answer(200, &[("x-repo-commit", commit), ("etag", &etag)], body)
}

fn listing(commit: &str, names: &[&str]) -> Vec<u8> {
    let siblings: Vec<_> = names
        .iter()
        .map(|name| serde_json::json!({"rfilename": name}))
        .collect();
    let body = serde_json::json!({"sha": commit, "siblings": siblings}).to_string();
    answer(200, &[], body.as_bytes())
}

impl Script {
    fn on(mut self, path: impl Into<String>, answer: Vec<u8>) -> Self {
        self.0.entry(path.into()).or_default().push(answer);
        self
    }

    /// `owner/tiny` at a commit with the files of the recorded engine's model.
    fn tiny(self, commit: &str) -> Self {
        let names = [
            "model.safetensors",
            "tokenizer.json",
            "tokenizer_config.json",
        ];
        let mut script = self.on(api(), listing(commit, &names));
        for (name, etag) in [("tokenizer_config.json", "c1"), ("tokenizer.json", "t1")] {
            let bytes = tiny_file(name);
            script = script.on(resolve(commit, name), file(commit, etag, &bytes));
        }
        script
    }

    async fn serve(self) -> Server {
        self.serve_with(None).await
    }

    async fn serve_with(self, tls: Option<TlsAcceptor>) -> Server {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let url = match tls {
            None => format!("http://127.0.0.1:{port}"),
            Some(_) => format!("https://localhost:{port}"),
        };
        let seen = Arc::<Mutex<Vec<Seen>>>::default();
        let server = Server {
            url: url.clone(),
            seen: Arc::clone(&seen),
        };
        let script = Arc::new(Mutex::new(self));
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (script, seen, tls) = (Arc::clone(&script), Arc::clone(&seen), tls.clone());
                tokio::spawn(async move {
                    match tls {
                        None => serve_one(stream, &script, &seen).await,
                        Some(tls) => {
                            if let Ok(stream) = tls.accept(stream).await {
                                serve_one(stream, &script, &seen).await;
                            }
                        }
                    }
                });
            }
        });
        server
    }

    fn next(&mut self, path: &str) -> Vec<u8> {
        match self.0.get_mut(path) {
            Some(answers) if answers.len() > 1 => answers.remove(0),
            Some(answers) => answers[0].clone(),
            None => answer(404, &[("x-error-code", "EntryNotFound")], b""),
        }
    }
}

async fn serve_one(
    mut stream: impl AsyncReadExt + AsyncWriteExt + Unpin,
    script: &Mutex<Script>,
    seen: &Mutex<Vec<Seen>>,
) {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        match stream.read_u8().await {
            Ok(byte) => head.push(byte),
            Err(_) => return,
        }
    }
    let head = String::from_utf8(head).unwrap();
    let path = head.split(' ').nth(1).unwrap().to_owned();
    let authorization = head.lines().find_map(|line| {
        let (name, value) = line.split_once(": ")?;
        name.eq_ignore_ascii_case("authorization")
            .then(|| value.to_owned())
    });
    seen.lock().push(Seen {
        path: path.clone(),
        authorization,
    });
    let bytes = script.lock().next(&path);
    if bytes.is_empty() {
        // Never answers.
        std::future::pending::<()>().await;
    }
    let _ = stream.write_all(&bytes).await;
    let _ = stream.shutdown().await;
}

impl Server {
    fn paths(&self) -> Vec<String> {
        self.seen.lock().iter().map(|s| s.path.clone()).collect()
    }
}

fn api() -> String {
    "/api/models/owner/tiny/revision/main".to_owned()
}

fn resolve(at: &str, name: &str) -> String {
    format!("/owner/tiny/resolve/{at}/{name}")
}

fn tiny_file(name: &str) -> Vec<u8> {
    std::fs::read(directory().join(name)).unwrap()
}

fn repo() -> Repo {
    Repo::new("owner/tiny", "").unwrap()
}

fn settings(endpoint: &str, cache: &Path) -> HubSettings {
    HubSettings {
        endpoint: endpoint.to_owned(),
        cache: cache.to_owned(),
        token: Token {
            value: Some("hf_secret".to_owned()),
            file: None,
        },
        offline: false,
        timeout: Duration::from_secs(20),
        proxy: None,
    }
}

fn hub(server: &Server, cache: &Path) -> Hub {
    Hub::new(settings(&server.url, cache)).unwrap()
}

/// Names below a directory with what links point to, sorted.
fn tree(root: &Path) -> Vec<String> {
    let mut found = Vec::new();
    let mut left = vec![root.to_owned()];
    while let Some(directory) = left.pop() {
        for entry in std::fs::read_dir(directory).unwrap().flatten() {
            let path = entry.path();
            let name = path.strip_prefix(root).unwrap().display().to_string();
            if let Ok(target) = std::fs::read_link(&path) {
                found.push(format!("{name} -> {}", target.display()));
            } else if path.is_dir() {
                left.push(path);
            } else {
                found.push(name);
            }
        }
    }
    found.sort();
    found
}

#[tokio::test]
async fn files_come_by_redirects_into_the_usual_layout_and_the_token_stays_here() {
    let etag = TOKENIZER_SHA256;
    let tokenizer = tiny_file("tokenizer.json");
    let size = tokenizer.len().to_string();
    let cdn = Script::default()
        .on("/blob?sig=1", answer(200, &[], &tokenizer))
        .serve()
        .await;
    let elsewhere = format!("{}/blob?sig=1", cdn.url);
    let linked = format!("\"{etag}\"");
    let large = [
        ("x-repo-commit", COMMIT),
        ("x-linked-etag", &linked),
        ("x-linked-size", &size),
        ("location", &elsewhere),
    ];
    let small = [
        ("x-repo-commit", COMMIT),
        ("etag", "\"c1\""),
        ("location", "/api/resolve-cache/c"),
    ];
    let names = [
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ];
    let config = tiny_file("tokenizer_config.json");
    let origin = Script::default()
        .on(api(), listing(COMMIT, &names))
        .on(resolve(COMMIT, "tokenizer.json"), answer(302, &large, b""))
        .on(
            resolve(COMMIT, "tokenizer_config.json"),
            answer(307, &small, b"moved"),
        )
        .on(
            "/api/resolve-cache/c",
            answer(200, &[("etag", "other")], &config),
        )
        .serve()
        .await;
    let cache = tempfile::tempdir().unwrap();
    let hub = hub(&origin, cache.path());
    assert_eq!(hub.cached(&repo()), None);
    let snapshot = hub.fetch(&repo()).await.unwrap();
    assert_eq!(snapshot.commit, COMMIT);
    let folder = cache.path().join("models--owner--tiny");
    assert_eq!(snapshot.directory, folder.join("snapshots").join(COMMIT));
    assert_eq!(
        tree(&folder),
        [
            "blobs/c1".to_owned(),
            format!("blobs/{etag}"),
            "refs/main".to_owned(),
            format!("snapshots/{COMMIT}/tokenizer.json -> ../../blobs/{etag}"),
            format!("snapshots/{COMMIT}/tokenizer_config.json -> ../../blobs/c1"),
        ]
    );
    let reference = std::fs::read_to_string(folder.join("refs/main")).unwrap();
    assert_eq!(reference, COMMIT);
    let got = std::fs::read(snapshot.directory.join("tokenizer.json")).unwrap();
    assert_eq!(got, tokenizer);
    assert_eq!(hub.downloads(), 2);
    assert_eq!(hub.cached(&repo()), Some(snapshot));

    let bearer = Some("Bearer hf_secret".to_owned());
    assert!(origin.seen.lock().iter().all(|s| s.authorization == bearer));
    // The vocabulary comes last, and nothing is asked for that decides no ids.
    assert_eq!(
        origin.paths(),
        [
            api(),
            resolve(COMMIT, "tokenizer_config.json"),
            "/api/resolve-cache/c".to_owned(),
            resolve(COMMIT, "tokenizer.json"),
        ]
    );
    let cdn_seen = cdn.seen.lock().clone();
    assert_eq!(cdn_seen.len(), 1);
    assert_eq!(cdn_seen[0].authorization, None);
}

#[tokio::test]
async fn a_mirror_without_lists_is_asked_for_each_file() {
    let origin = Script::default()
        .on(api(), answer(404, &[], b"no such page"))
        .on(
            resolve("main", "tokenizer_config.json"),
            file(COMMIT, "c1", &tiny_file("tokenizer_config.json")),
        )
        .on(
            resolve(COMMIT, "tokenizer.json"),
            file(COMMIT, "t1", &tiny_file("tokenizer.json")),
        )
        .serve()
        .await;
    let cache = tempfile::tempdir().unwrap();
    let snapshot = hub(&origin, cache.path()).fetch(&repo()).await.unwrap();
    assert_eq!(snapshot.commit, COMMIT);
    let mut names: Vec<_> = tree(&snapshot.directory);
    names.retain(|name| name.starts_with("tokenizer"));
    assert_eq!(names.len(), 2);
    // Absent ones were asked for and are no error; the first file settled the commit.
    let paths = origin.paths();
    assert!(paths.contains(&resolve("main", "config.json")), "{paths:?}");
    assert!(
        paths.contains(&resolve(COMMIT, "chat_template.jinja")),
        "{paths:?}"
    );
}

#[tokio::test]
async fn gated_and_unknown_models_are_told_apart() {
    let error = async |script: Script| {
        let server = script.serve().await;
        let cache = tempfile::tempdir().unwrap();
        hub(&server, cache.path()).fetch(&repo()).await.unwrap_err()
    };
    let status = |status, code| answer(status, &[("x-error-code", code)], b"");
    let private = error(Script::default().on(api(), status(401, "RepoNotFound"))).await;
    assert!(
        matches!(private, HubError::Denied { status: 401, .. }),
        "{private}"
    );
    assert!(private.to_string().contains("HF_TOKEN"), "{private}");
    assert!(private.is_lasting());
    // Gated: everyone may list the files.
    let gated = Script::default()
        .on(api(), listing(COMMIT, &["tokenizer.json"]))
        .on(resolve(COMMIT, "tokenizer.json"), status(403, "GatedRepo"));
    let gated = error(gated).await;
    assert!(
        matches!(gated, HubError::Denied { status: 403, .. }),
        "{gated}"
    );
    let unknown = error(Script::default().on(api(), status(404, "RevisionNotFound"))).await;
    assert!(matches!(unknown, HubError::NotFound { .. }), "{unknown}");
    let none = error(Script::default().on(api(), listing(COMMIT, &["model.safetensors"]))).await;
    assert!(matches!(none, HubError::NoTokenizer(_)), "{none}");
    let busy = error(Script::default().on(api(), answer(429, &[("retry-after", "7")], b""))).await;
    assert_eq!(busy.retry_after(), Some(Duration::from_secs(7)));
    assert!(!busy.is_lasting());
}

#[tokio::test]
async fn a_body_that_is_cut_short_leaves_nothing_and_comes_whole_later() {
    let bytes = tiny_file("tokenizer.json");
    let length = bytes.len().to_string();
    let cut = |etag: &str| {
        let headers = [
            ("x-repo-commit", COMMIT),
            ("etag", etag),
            ("content-length", &length),
        ];
        answer(200, &headers, &bytes[..bytes.len() / 2])
    };
    let origin = Script::default()
        .on(api(), listing(COMMIT, &["tokenizer.json"]))
        .on(resolve(COMMIT, "tokenizer.json"), cut("\"t1\""))
        .on(
            resolve(COMMIT, "tokenizer.json"),
            file(COMMIT, "t1", &bytes),
        )
        .serve()
        .await;
    let cache = tempfile::tempdir().unwrap();
    let hub = hub(&origin, cache.path());
    let error = hub.fetch(&repo()).await.unwrap_err();
    assert!(error.to_string().contains("cut short"), "{error}");
    assert!(!error.is_lasting());
    assert_eq!(tree(cache.path()), [""; 0]);
    assert_eq!(hub.cached(&repo()), None);
    let snapshot = hub.fetch(&repo()).await.unwrap();
    let got = std::fs::read(snapshot.directory.join("tokenizer.json")).unwrap();
    assert_eq!(got, bytes);
}

#[tokio::test]
async fn a_file_that_is_not_what_its_etag_says_is_refused() {
    let etag = format!("\"{}\"", "0".repeat(64));
    let headers = [("x-repo-commit", COMMIT), ("x-linked-etag", etag.as_str())];
    let origin = Script::default()
        .on(api(), listing(COMMIT, &["tokenizer.json"]))
        .on(
            resolve(COMMIT, "tokenizer.json"),
            answer(200, &headers, b"{}"),
        )
        .serve()
        .await;
    let cache = tempfile::tempdir().unwrap();
    let error = hub(&origin, cache.path()).fetch(&repo()).await.unwrap_err();
    assert!(
        error.to_string().contains("not what its etag says"),
        "{error}"
    );
    assert_eq!(tree(cache.path()), [""; 0]);
}

#[tokio::test]
async fn files_over_their_limit_are_not_downloaded() {
    let over = (MAX_CONFIG_BYTES + 1).to_string();
    let headers = [
        ("x-repo-commit", COMMIT),
        ("etag", "\"c1\""),
        ("content-length", over.as_str()),
    ];
    let said = answer(200, &headers, b"");
    // Nothing said: what comes is counted.
    let mut unsaid = b"HTTP/1.1 200 X\r\nx-repo-commit: ".to_vec();
    unsaid.extend(COMMIT.as_bytes());
    unsaid.extend(b"\r\netag: \"c1\"\r\nconnection: close\r\n\r\n");
    unsaid.resize(
        unsaid.len() + usize::try_from(MAX_CONFIG_BYTES).unwrap() + 1,
        b' ',
    );
    for config in [said, unsaid] {
        let origin = Script::default()
            .on(api(), listing(COMMIT, &["config.json", "tokenizer.json"]))
            .on(resolve(COMMIT, "config.json"), config)
            .serve()
            .await;
        let cache = tempfile::tempdir().unwrap();
        let error = hub(&origin, cache.path()).fetch(&repo()).await.unwrap_err();
        assert!(matches!(error, HubError::TooLarge { .. }), "{error}");
        assert!(error.is_lasting());
        assert_eq!(tree(cache.path()), [""; 0]);
    }
}

#[tokio::test]
async fn a_new_commit_with_the_same_etags_downloads_nothing() {
    let cache = tempfile::tempdir().unwrap();
    let origin = Script::default().tiny(COMMIT).serve().await;
    hub(&origin, cache.path()).fetch(&repo()).await.unwrap();
    let moved = Script::default().tiny(NEXT).serve().await;
    let hub = hub(&moved, cache.path());
    let snapshot = hub.fetch(&repo()).await.unwrap();
    assert_eq!((snapshot.commit.as_str(), hub.downloads()), (NEXT, 0));
    assert!(snapshot.directory.join("tokenizer.json").is_file());
    // Neither is a file of a known commit asked for.
    let before = moved.paths().len();
    assert_eq!(hub.fetch(&repo()).await.unwrap(), snapshot);
    assert_eq!(moved.paths()[before..], [api()]);
}

#[tokio::test]
async fn redirects_are_bounded_and_never_leave_https() {
    let round = answer(302, &[("location", "/round")], b"");
    let origin = Script::default()
        .on(api(), round.clone())
        .on("/round", round)
        .serve()
        .await;
    let cache = tempfile::tempdir().unwrap();
    let error = hub(&origin, cache.path()).fetch(&repo()).await.unwrap_err();
    assert!(error.to_string().contains("too many redirects"), "{error}");
    assert_eq!(origin.paths().len(), 6);

    let (url, answered) = ("https://hub/a".parse().unwrap(), |to: &str| {
        let answer = ::http::Response::builder()
            .status(302)
            .header("location", to);
        answer.body(()).unwrap()
    });
    let next = |to: &str| super::http::location(&url, &answered(to));
    assert_eq!(next("/b?c").unwrap().unwrap(), "https://hub/b?c");
    assert_eq!(next("//cdn/b").unwrap().unwrap(), "https://cdn/b");
    assert!(next("http://hub/b").is_err());
}

/// `owner/tiny` over TLS, and a client's configuration that believes its certificate.
async fn secure() -> (Server, Arc<ClientConfig>) {
    let issued = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let key = issued.signing_key.serialize_der().try_into().unwrap();
    let config = ServerConfig::builder_with_provider(Arc::new(crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![issued.cert.der().clone()], key)
        .unwrap();
    let tls = TlsAcceptor::from(Arc::new(config));
    let origin = Script::default().tiny(COMMIT).serve_with(Some(tls)).await;
    let mut roots = RootCertStore::empty();
    roots.add(issued.cert.der().clone()).unwrap();
    (origin, trusting(roots))
}

fn trusting(roots: RootCertStore) -> Arc<ClientConfig> {
    let provider = Arc::new(crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider);
    let builder = builder.with_safe_default_protocol_versions().unwrap();
    Arc::new(builder.with_root_certificates(roots).with_no_client_auth())
}

#[tokio::test]
async fn https_is_spoken_and_foreign_certificates_are_refused() {
    let (origin, trust) = secure().await;
    let cache = tempfile::tempdir().unwrap();
    let with = |tls| Hub::with_tls(settings(&origin.url, cache.path()), Some(tls)).unwrap();
    let error = with(trusting(RootCertStore::empty())).fetch(&repo()).await;
    let error = error.unwrap_err().to_string();
    assert!(error.contains("no TLS"), "{error}");
    assert!(origin.seen.lock().is_empty());
    assert!(with(trust).fetch(&repo()).await.is_ok());
}

/// A proxy that notes the heads of its requests and opens tunnels, or refuses to.
async fn proxy(opens: bool) -> (String, Arc<Mutex<Vec<String>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let heads = Arc::<Mutex<Vec<String>>>::default();
    let seen = Arc::clone(&heads);
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let seen = Arc::clone(&seen);
            tokio::spawn(async move {
                let mut head = Vec::new();
                while !head.ends_with(b"\r\n\r\n") {
                    head.push(stream.read_u8().await?);
                }
                let head = String::from_utf8(head).unwrap();
                let target = head.split(' ').nth(1).unwrap().to_owned();
                seen.lock().push(head);
                if !opens {
                    let refused = answer(403, &[], b"");
                    return stream.write_all(&refused).await;
                }
                let mut target = TcpStream::connect(target).await?;
                stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await?;
                tokio::io::copy_bidirectional(&mut stream, &mut target).await?;
                Ok::<_, std::io::Error>(())
            });
        }
    });
    (format!("http://user:pw@{address}"), heads)
}

#[tokio::test]
async fn https_goes_through_the_proxy_unless_the_host_is_excepted() {
    let (origin, trust) = secure().await;
    let (url, heads) = proxy(true).await;
    let fetched = async |url: &str, except: &str| {
        let cache = tempfile::tempdir().unwrap();
        let settings = HubSettings {
            proxy: Some((url.to_owned(), except.to_owned())),
            ..settings(&origin.url, cache.path())
        };
        let hub = Hub::with_tls(settings, Some(Arc::clone(&trust))).unwrap();
        hub.fetch(&repo()).await
    };
    fetched(&url, "").await.unwrap();
    let target = origin.url.strip_prefix("https://").unwrap();
    let first = heads.lock()[0].to_ascii_lowercase();
    assert!(
        first.starts_with(&format!("connect {target} http/1.1")),
        "{first}"
    );
    // base64 of "user:pw"; what is for the hub stays inside the tunnel.
    assert!(
        first.contains("proxy-authorization: basic dxnlcjpwdw=="),
        "{first}"
    );
    assert!(!first.contains("hf_secret"), "{first}");
    assert_eq!(heads.lock().len(), origin.paths().len());

    let before = heads.lock().len();
    fetched(&url, "example.org,localhost").await.unwrap();
    assert_eq!(heads.lock().len(), before);

    let (closed, _) = proxy(false).await;
    let error = fetched(&closed, "").await.unwrap_err().to_string();
    assert!(error.contains("proxy: localhost"), "{error}");
    assert!(error.contains("status 403"), "{error}");
}

#[test]
fn names_that_could_leave_the_cache_are_refused() {
    for id in [
        "", "a/b/c", "../x", "a/..", "a//b", "a b", "a/b?c", ".a/b", "a--b/c", "a/b#",
    ] {
        assert!(Repo::new(id, "").is_err(), "{id:?}");
    }
    for revision in ["../../x", "/a", "a/", "a//b", ".git", "a b", "a%2e"] {
        assert!(Repo::new("gpt2", revision).is_err(), "{revision:?}");
    }
    let repo = Repo::new("meta-llama/Llama-3.1-8B-Instruct", "refs/pr/3").unwrap();
    assert_eq!(repo.revision(), "refs/pr/3");
    assert_eq!(Repo::new("gpt2", "").unwrap().revision(), "main");
}

/// What `service` makes of a completion, once its model is there.
async fn tokens(service: &TokenService) -> Result<Tokenized, TokenizeError> {
    let mut payload = Payload::raw(false);
    payload.api = ApiKind::Completions;
    let body = Body::from(r#"{"prompt": "The port"}"#);
    let mut request = InferenceRequest::new("1", payload, body);
    "tiny".clone_into(&mut request.target_model);
    service.tokenize(&request).wait().await
}

fn service(hub: HubSettings) -> TokenService {
    let settings = Settings {
        models: vec![ModelSettings {
            name: "tiny".to_owned(),
            repo: Some(repo()),
            ..ModelSettings::default()
        }],
        workers: 1,
        hub: Some(hub),
        ..Settings::default()
    };
    TokenService::load(settings).unwrap()
}

/// Waits for what happens in the background.
async fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
    for _ in 0..3000 {
        if done() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("{what} did not happen");
}

#[tokio::test]
async fn start_waits_for_no_hub_and_requests_go_on_without_ids_until_it_answers() {
    // A busy hub and one that fails, then one that works.
    let origin = Script::default()
        .on(api(), answer(429, &[("retry-after", "0")], b""))
        .on(api(), answer(503, &[], b""))
        .tiny(COMMIT)
        .serve()
        .await;
    let cache = tempfile::tempdir().unwrap();
    let service = service(settings(&origin.url, cache.path()));
    let state = || service.models()[0].clone();
    let missing = || service.stats().missing_models.load(Ordering::Relaxed);
    wait_for("the first failure", || state().error.is_some()).await;
    assert_eq!(missing(), 1);
    let without = tokens(&service).await;
    assert_eq!(without, Err(TokenizeError::NotLoaded("tiny".to_owned())));
    let fallbacks: u64 = service.stats().fallbacks().map(|(_, n)| n).sum();
    assert_eq!(fallbacks, 1);
    let error = state().error.unwrap();
    assert!(error.starts_with("hub: 127.0.0.1: status"), "{error}");
    wait_for("the model", || state().loaded).await;
    assert_eq!(state().error, None);
    assert_eq!(state().commit.as_deref(), Some(COMMIT));
    assert_eq!(missing(), 0);
    // `tokenize-prompt` of the recording begins "The port".
    assert_eq!(*tokens(&service).await.unwrap().prompts[0].ids, [591, 3105]);
    let stats = service.stats();
    let count = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed);
    assert_eq!(count(&stats.hub_failures), 2);
    assert_eq!(count(&stats.hub_resolved), 1);
    assert_eq!(count(&stats.hub_downloads), 2);
}

#[tokio::test]
async fn a_silent_hub_holds_nothing_up() {
    let origin = Script::default().on(api(), Vec::new()).serve().await;
    let cache = tempfile::tempdir().unwrap();
    let service = service(settings(&origin.url, cache.path()));
    wait_for("the question", || !origin.paths().is_empty()).await;
    let without = tokens(&service).await;
    assert_eq!(without, Err(TokenizeError::NotLoaded("tiny".to_owned())));
    // Ends the thread that waits for the hub.
    drop(service);
}

/// A cache as another program fills it: files where this one puts links.
fn prefill(cache: &Path, reference: Option<&str>) {
    let folder = cache.join("models--owner--tiny");
    let snapshot = folder.join("snapshots").join(COMMIT);
    std::fs::create_dir_all(&snapshot).unwrap();
    for name in ["tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(directory().join(name), snapshot.join(name)).unwrap();
    }
    if let Some(reference) = reference {
        std::fs::create_dir_all(folder.join("refs")).unwrap();
        std::fs::write(folder.join("refs/main"), reference).unwrap();
    }
}

#[tokio::test]
async fn offline_the_cache_has_to_do() {
    let origin = Script::default().tiny(NEXT).serve().await;
    let offline = |cache: &Path| HubSettings {
        offline: true,
        ..settings(&origin.url, cache)
    };
    let cache = tempfile::tempdir().unwrap();
    let empty = Hub::new(offline(cache.path())).unwrap();
    let error = empty.fetch(&repo()).await.unwrap_err();
    assert!(matches!(error, HubError::Offline(_)), "{error}");
    prefill(cache.path(), Some(&format!("{COMMIT}\n")));
    let service = service(offline(cache.path()));
    wait_for("the model", || service.models()[0].loaded).await;
    assert_eq!(*tokens(&service).await.unwrap().prompts[0].ids, [591, 3105]);
    assert_eq!(service.models()[0].error, None);
    assert!(origin.paths().is_empty());
}

#[tokio::test]
async fn a_pinned_commit_in_the_cache_needs_no_hub() {
    let cache = tempfile::tempdir().unwrap();
    prefill(cache.path(), None);
    let origin = Script::default().serve().await;
    let pinned = Repo::new("owner/tiny", COMMIT).unwrap();
    let hub = hub(&origin, cache.path());
    assert_eq!(hub.fetch(&pinned).await.unwrap().commit, COMMIT);
    assert!(origin.paths().is_empty());
    // No reference says what the branch is.
    assert_eq!(hub.cached(&repo()), None);
}

#[tokio::test]
async fn the_cache_serves_while_the_hub_is_away_and_that_is_shown() {
    let cache = tempfile::tempdir().unwrap();
    prefill(cache.path(), Some(COMMIT));
    let origin = Script::default()
        .on(api(), answer(500, &[], b""))
        .tiny(NEXT)
        .serve()
        .await;
    let service = service(settings(&origin.url, cache.path()));
    let state = || service.models()[0].clone();
    let stale = || service.stats().stale_models.load(Ordering::Relaxed);
    wait_for("the failure", || state().error.is_some()).await;
    assert!(state().loaded);
    assert_eq!(state().commit.as_deref(), Some(COMMIT));
    assert_eq!(stale(), 1);
    assert!(tokens(&service).await.is_ok());
    wait_for("the new commit", || state().commit.as_deref() == Some(NEXT)).await;
    wait_for("the end of the error", || state().error.is_none()).await;
    assert_eq!(stale(), 0);
}

#[tokio::test]
async fn a_vocabulary_of_tiktoken_is_taken_where_there_is_no_other() {
    let ranks = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/tiktoken/small.tiktoken");
    let ranks = std::fs::read(ranks).unwrap();
    let origin = Script::default()
        .on(
            api(),
            listing(
                COMMIT,
                &["other.tiktoken", "sub/x.tiktoken", "tiktoken.model"],
            ),
        )
        .on(
            resolve(COMMIT, "tiktoken.model"),
            file(COMMIT, "r1", &ranks),
        )
        .serve()
        .await;
    let cache = tempfile::tempdir().unwrap();
    let snapshot = hub(&origin, cache.path()).fetch(&repo()).await.unwrap();
    assert!(snapshot.directory.join("tiktoken.model").is_file());
    assert_eq!(origin.paths().len(), 2);
}

#[test]
fn endpoints_that_are_no_urls_are_refused() {
    for endpoint in ["", "huggingface.co", "ftp://h", "http://", "https://h?x"] {
        let refused = Hub::new(settings(endpoint, Path::new("/nowhere")));
        assert!(refused.is_err(), "{endpoint:?}");
    }
}

#[tokio::test]
async fn nobody_at_the_endpoint_is_an_error_with_its_host() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    drop(listener);
    assert!(TcpStream::connect(address).await.is_err());
    let cache = tempfile::tempdir().unwrap();
    let hub = Hub::new(settings(&format!("http://{address}"), cache.path())).unwrap();
    let error = hub.fetch(&repo()).await.unwrap_err().to_string();
    assert!(error.starts_with("127.0.0.1: cannot connect"), "{error}");
}
