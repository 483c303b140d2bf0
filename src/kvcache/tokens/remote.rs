//! Asks an engine, or a render side-car, for the tokens of a request.
//!
//! `/v1/completions/render` and `/v1/chat/completions/render` give ids and where media lie. vLLM
//! answers 403 there unless started with `--enable-scale-out`; then `/tokenize`, which always exists
//! and knows no media, takes their place. HTTP/1 over plain TCP.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;

use bytes::Bytes;
use http::uri::{Authority, PathAndQuery};
use http::{Method, Request, StatusCode, Uri, header};
use http_body_util::{BodyExt, Full, Limited};
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper_util::rt::TokioIo;
use minijinja::Value;
use serde::Deserialize;
use tokio::net::TcpStream;
use tokio::sync::{Semaphore, SemaphorePermit};
use xxhash_rust::xxh64::xxh64;

use super::body::Source;
use super::messages::{Map, field, replace};
use super::model::{flag, prompts_of};
use super::service::{KNOWN_APIS, PromptTokens, TokenizeError, Tokenized};
use crate::request::{ApiKind, Body, Extent, MediaItem};

/// `timeout` unless configured.
pub const DEFAULT_TIMEOUT: Duration = Duration::from_secs(5);
/// `mmTimeout` unless configured: the engine fetches media before it answers.
pub const DEFAULT_MEDIA_TIMEOUT: Duration = Duration::from_secs(30);
/// Largest answer read: a million ids are about 7 MB.
pub const MAX_RESPONSE_BYTES: usize = 32 << 20;
/// Calls at a time; more are refused, so that a slow tokenizer holds no queue of requests.
pub const MAX_CALLS: usize = 64;
/// Prompts of one request asked for one by one at `/tokenize`.
pub const MAX_TOKENIZE_CALLS: usize = 16;

/// Which routes the engine answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Route {
    /// Not asked yet.
    Unknown,
    /// `/render`.
    Render,
    /// `/tokenize` only.
    Tokenize,
}

/// Where to ask.
#[derive(Debug, Clone)]
pub struct RemoteSettings {
    /// For example `http://localhost:8000`.
    pub url: String,
    /// Model name the engine knows.
    pub model: String,
    /// For a request without media.
    pub timeout: Duration,
    /// For a request whose content is a list, which may hold media.
    pub media_timeout: Duration,
}

impl RemoteSettings {
    /// Default timeouts.
    pub fn new(url: impl Into<String>, model: impl Into<String>) -> Self {
        Self {
            url: url.into(),
            model: model.into(),
            timeout: DEFAULT_TIMEOUT,
            media_timeout: DEFAULT_MEDIA_TIMEOUT,
        }
    }
}

/// A tokenizer behind HTTP.
#[derive(Debug)]
pub struct RemoteTokenizer {
    settings: RemoteSettings,
    authority: Authority,
    /// A [`Route`].
    route: AtomicU8,
    calls: Semaphore,
}

/// Part of an answer of `/render`.
#[derive(Deserialize)]
struct Rendered {
    token_ids: Vec<u32>,
    features: Option<Features>,
}

#[derive(Deserialize)]
struct Features {
    #[serde(default)]
    mm_hashes: ByModality<Option<String>>,
    #[serde(default)]
    mm_placeholders: ByModality<Placeholder>,
}

type ByModality<T> = BTreeMap<String, Vec<T>>;

#[derive(Deserialize)]
struct Placeholder {
    offset: u32,
    length: u32,
}

/// Part of an answer of `/tokenize`.
#[derive(Deserialize)]
struct TokenizeAnswer {
    tokens: Vec<u32>,
}

#[expect(clippy::needless_pass_by_value, reason = "for map_err")]
fn remote(text: impl ToString) -> TokenizeError {
    TokenizeError::Remote(text.to_string())
}

impl RemoteTokenizer {
    /// Checks the URL; connects to nothing.
    pub fn new(settings: RemoteSettings) -> Result<Arc<Self>, TokenizeError> {
        let uri: Uri = settings.url.parse().map_err(remote)?;
        if uri.scheme_str() != Some("http") || uri.path().len() > 1 {
            return Err(remote("the URL must be http://host:port"));
        }
        let authority = uri
            .authority()
            .ok_or_else(|| remote("the URL has no host"))?
            .clone();
        Ok(Arc::new(Self {
            settings,
            authority,
            route: AtomicU8::new(Route::Unknown as u8),
            calls: Semaphore::new(MAX_CALLS),
        }))
    }

    /// What is known of the engine, for readiness and logs.
    pub fn route(&self) -> Route {
        match self.route.load(Ordering::Relaxed) {
            1 => Route::Render,
            2 => Route::Tokenize,
            _ => Route::Unknown,
        }
    }

    /// Finds out which routes there are, once. Call it at start-up until it succeeds; a request that
    /// comes before asks by itself.
    pub async fn probe(&self) -> Result<Route, TokenizeError> {
        if self.route() != Route::Unknown {
            return Ok(self.route());
        }
        let mut body = Map::default();
        body.push("model", Value::from(self.settings.model.as_str()));
        body.push("prompt", Value::from("a"));
        body.push("max_tokens", Value::from(1));
        let path = "/v1/completions/render";
        let (status, _) = self
            .post(path, &body.build(), self.settings.timeout)
            .await?;
        let route = match status {
            status if status.is_success() => Route::Render,
            StatusCode::FORBIDDEN => Route::Tokenize,
            status => return Err(remote(format!("{path} answered {status}"))),
        };
        self.route.store(route as u8, Ordering::Relaxed);
        Ok(route)
    }

    /// The tokens of a request. `body` is what the client sent.
    pub async fn tokenize(&self, api: ApiKind, body: &Body) -> Result<Tokenized, TokenizeError> {
        if !KNOWN_APIS.contains(&api) {
            return Err(TokenizeError::Unsupported("this API"));
        }
        let body = Source::from(body).parse()?;
        let media = has_lists(&body);
        let timeout = if media {
            self.settings.media_timeout
        } else {
            self.settings.timeout
        };
        if self.probe().await? == Route::Render {
            match self.render(api, &body, timeout).await? {
                Some(tokens) => return Ok(tokens),
                // Restarted without the flag.
                None => self.route.store(Route::Tokenize as u8, Ordering::Relaxed),
            }
        }
        if matches!(api, ApiKind::Messages | ApiKind::Responses) {
            return Err(TokenizeError::Unsupported("this API without render routes"));
        }
        if api == ApiKind::ChatCompletions {
            let ids = self
                .tokenize_one(&self.tokenize_chat(&body)?, timeout)
                .await?;
            return Ok(Tokenized { prompts: vec![ids] });
        }
        let prompts = prompts_of(&body)?;
        if prompts.len() > MAX_TOKENIZE_CALLS {
            return Err(TokenizeError::Unsupported("a batch of this size"));
        }
        let special = flag(&body, "add_special_tokens", true)?;
        let mut tokenized = Tokenized::default();
        for prompt in prompts {
            let call = self.tokenize_text(prompt, special)?;
            tokenized
                .prompts
                .push(self.tokenize_one(&call, timeout).await?);
        }
        Ok(tokenized)
    }

    /// `None` when the route is closed.
    async fn render(
        &self,
        api: ApiKind,
        body: &Value,
        timeout: Duration,
    ) -> Result<Option<Tokenized>, TokenizeError> {
        let model = Value::from(self.settings.model.as_str());
        let (path, call) = match api {
            ApiKind::ChatCompletions => {
                let mut call = Map::default();
                call.push("model", model);
                copy_fields(body, &mut call, CHAT_FIELDS);
                ("/v1/chat/completions/render", call.build())
            }
            ApiKind::Messages => ("/v1/messages/render", replace(body, "model", model)?),
            ApiKind::Responses => ("/v1/responses/render", replace(body, "model", model)?),
            _ => ("/v1/completions/render", replace(body, "model", model)?),
        };
        let (status, answer) = self.post(path, &call, timeout).await?;
        if status == StatusCode::FORBIDDEN {
            return Ok(None);
        }
        accept(path, status)?;
        // Only completions may have several prompts.
        let rendered: Vec<Rendered> = if api == ApiKind::Completions {
            serde_json::from_slice(&answer).map_err(remote)?
        } else {
            vec![serde_json::from_slice(&answer).map_err(remote)?]
        };
        let prompts = rendered.into_iter().map(Rendered::into_tokens).collect();
        Ok(Some(Tokenized { prompts }))
    }

    fn tokenize_chat(&self, body: &Value) -> Result<Value, TokenizeError> {
        let mut call = Map::default();
        call.push("model", Value::from(self.settings.model.as_str()));
        call.push(
            "add_generation_prompt",
            Value::from(flag(body, "add_generation_prompt", true)?),
        );
        copy_fields(body, &mut call, TOKENIZE_FIELDS);
        Ok(call.build())
    }

    fn tokenize_text(&self, prompt: Value, special: bool) -> Result<Value, TokenizeError> {
        if prompt.as_str().is_none() {
            return Err(TokenizeError::Unsupported("a batch of ids"));
        }
        let mut call = Map::default();
        call.push("model", Value::from(self.settings.model.as_str()));
        call.push("prompt", prompt);
        call.push("add_special_tokens", Value::from(special));
        Ok(call.build())
    }

    async fn tokenize_one(
        &self,
        call: &Value,
        timeout: Duration,
    ) -> Result<PromptTokens, TokenizeError> {
        if has_media(call) {
            return Err(TokenizeError::Media);
        }
        let (status, answer) = self.post("/tokenize", call, timeout).await?;
        accept("/tokenize", status)?;
        let answer: TokenizeAnswer = serde_json::from_slice(&answer).map_err(remote)?;
        Ok(PromptTokens {
            ids: answer.tokens.into(),
            media: Vec::new(),
        })
    }

    async fn post(
        &self,
        path: &'static str,
        body: &Value,
        timeout: Duration,
    ) -> Result<(StatusCode, Bytes), TokenizeError> {
        let _call: SemaphorePermit<'_> = self
            .calls
            .try_acquire()
            .map_err(|_| remote("too many calls at a time"))?;
        let json = serde_json::to_vec(body).map_err(remote)?;
        let exchange = self.exchange(path, json);
        match tokio::time::timeout(timeout, exchange).await {
            Ok(result) => result,
            Err(_) => Err(remote(format!("no answer within {timeout:?}"))),
        }
    }

    async fn exchange(
        &self,
        path: &'static str,
        json: Vec<u8>,
    ) -> Result<(StatusCode, Bytes), TokenizeError> {
        let mut sender = self.connect().await?;
        let request = Request::builder()
            .method(Method::POST)
            .uri(Uri::from(PathAndQuery::from_static(path)))
            .header(header::HOST, self.authority.as_str())
            .header(header::CONTENT_TYPE, "application/json")
            .body(Full::new(Bytes::from(json)))
            .map_err(remote)?;
        let response = sender.send_request(request).await.map_err(remote)?;
        let status = response.status();
        let body = Limited::new(response.into_body(), MAX_RESPONSE_BYTES);
        let bytes = body.collect().await.map_err(remote)?.to_bytes();
        Ok((status, bytes))
    }

    /// A connection for one call: the tokenizer is near, and calls are long against a handshake.
    async fn connect(&self) -> Result<SendRequest<Full<Bytes>>, TokenizeError> {
        let host = self.authority.host().trim_matches(['[', ']']);
        let port = self.authority.port_u16().unwrap_or(80);
        let stream = TcpStream::connect((host, port)).await.map_err(remote)?;
        let (sender, connection) = handshake(TokioIo::new(stream)).await.map_err(remote)?;
        // Ends with the sender, which the caller drops with its answer.
        tokio::spawn(async move {
            let _ = connection.await;
        });
        Ok(sender)
    }
}

/// What of a chat decides its prompt.
const CHAT_FIELDS: &[&str] = &[
    "messages",
    "tools",
    "tool_choice",
    "documents",
    "chat_template",
    "add_generation_prompt",
    "continue_final_message",
    "chat_template_kwargs",
    "reasoning_effort",
    "add_special_tokens",
];
/// What of it `/tokenize` takes.
const TOKENIZE_FIELDS: &[&str] = &[
    "messages",
    "tools",
    "continue_final_message",
    "chat_template",
    "chat_template_kwargs",
];

fn copy_fields(from: &Value, to: &mut Map, names: &[&str]) {
    for name in names {
        if let Some(value) = field(from, name) {
            to.push(name, value);
        }
    }
}

fn accept(path: &str, status: StatusCode) -> Result<(), TokenizeError> {
    if status.is_success() {
        return Ok(());
    }
    Err(remote(format!("{path} answered {status}")))
}

fn contents(body: &Value) -> Vec<Value> {
    let messages = field(body, "messages").and_then(|list| list.try_iter().ok());
    messages
        .into_iter()
        .flatten()
        .filter_map(|message| field(&message, "content"))
        .filter(|content| content.as_str().is_none())
        .collect()
}

/// True when some content is a list, which may hold media.
fn has_lists(body: &Value) -> bool {
    !contents(body).is_empty()
}

fn has_media(body: &Value) -> bool {
    let text = |part: &Value| {
        part.as_str().is_some()
            || field(part, "type").is_some_and(|kind| {
                matches!(
                    kind.as_str(),
                    Some("text" | "input_text" | "output_text" | "refusal" | "thinking")
                )
            })
    };
    contents(body)
        .iter()
        .filter_map(|content| content.try_iter().ok())
        .flatten()
        .any(|part| !text(&part))
}

impl Rendered {
    fn into_tokens(mut self) -> PromptTokens {
        let features = self.features.as_mut();
        let hashes = features.map(|f| std::mem::take(&mut f.mm_hashes));
        let hashes = hashes.unwrap_or_default();
        let mut media: Vec<MediaItem> = Vec::new();
        for (modality, places) in self
            .features
            .map(|f| f.mm_placeholders)
            .into_iter()
            .flatten()
        {
            let hashes = hashes.get(&modality).map_or(&[][..], Vec::as_slice);
            let modality = match modality.as_str() {
                "video" => "video",
                "audio" => "audio",
                // Whatever it is, its tokens are none of a text.
                _ => "image",
            };
            // A medium without a name ends what has keys.
            media.extend(places.iter().enumerate().map(|(at, place)| {
                let hash = hashes.get(at).and_then(Option::as_deref);
                MediaItem {
                    modality,
                    hash: hash.map_or(0, |hash| xxh64(hash.as_bytes(), 0)),
                    identifier: hash.map(Into::into),
                    token_offset: Some(place.offset),
                    tokens: Some(place.length),
                    extent: Extent::Unknown,
                }
            }));
        }
        media.sort_by_key(|item| item.token_offset);
        PromptTokens {
            ids: self.token_ids.into(),
            media,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::Response;
    use hyper::body::Incoming;
    use hyper::service::service_fn;
    use parking_lot::Mutex;
    use serde_json::json;
    use std::convert::Infallible;

    type Calls = Arc<Mutex<Vec<(String, String)>>>;

    /// Serves `answer(path)`; a status of 0 never answers.
    async fn engine(answer: fn(&str) -> (u16, String)) -> (Arc<RemoteTokenizer>, Calls) {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let calls = Calls::default();
        let seen = Arc::clone(&calls);
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let seen = Arc::clone(&seen);
                let service = service_fn(move |request: Request<Incoming>| {
                    let seen = Arc::clone(&seen);
                    async move {
                        let path = request.uri().path().to_owned();
                        let body = request.into_body().collect().await.unwrap().to_bytes();
                        seen.lock()
                            .push((path.clone(), String::from_utf8(body.to_vec()).unwrap()));
                        let (status, text) = answer(&path);
                        if status == 0 {
                            std::future::pending::<()>().await;
                        }
                        let response = Response::builder().status(status);
                        Ok::<_, Infallible>(response.body(Full::new(Bytes::from(text))).unwrap())
                    }
                });
                let http = hyper::server::conn::http1::Builder::new();
                tokio::spawn(http.serve_connection(TokioIo::new(stream), service));
            }
        });
        let remote = RemoteTokenizer::new(RemoteSettings::new(url, "tiny")).unwrap();
        (remote, calls)
    }

    fn body(json: &str) -> Body {
        Body::from(Bytes::from(json.to_owned()))
    }

    fn rendered(path: &str) -> (u16, String) {
        match path {
            "/v1/completions/render" => (
                200,
                json!([{"token_ids": [591, 3105], "features": null}]).to_string(),
            ),
            "/v1/chat/completions/render" => {
                let features = json!({
                    "mm_hashes": {"image": ["abc"]},
                    "mm_placeholders": {"image": [{"offset": 1, "length": 2}]},
                });
                (
                    200,
                    json!({"token_ids": [1, 9, 9, 2], "features": features}).to_string(),
                )
            }
            "/v1/messages/render" | "/v1/responses/render" => (
                200,
                json!({"token_ids": [4, 2], "features": null}).to_string(),
            ),
            _ => (404, String::new()),
        }
    }

    #[tokio::test]
    async fn other_apis_are_rendered_by_their_own_routes() {
        let (remote, calls) = engine(rendered).await;
        for (api, path) in [
            (ApiKind::Messages, "/v1/messages/render"),
            (ApiKind::Responses, "/v1/responses/render"),
        ] {
            let asked = r#"{"model":"lora","max_tokens":7}"#;
            let tokens = remote.tokenize(api, &body(asked)).await.unwrap();
            assert_eq!(*tokens.prompts[0].ids, [4, 2]);
            let sent = calls.lock().last().cloned().unwrap();
            let expected = r#"{"model":"tiny","max_tokens":7}"#;
            assert_eq!(sent, (path.to_owned(), expected.to_owned()));
        }
        let closed = |path: &str| match path {
            "/tokenize" => (200, json!({"tokens": [1]}).to_string()),
            _ => (403, String::new()),
        };
        let (remote, _) = engine(closed).await;
        let refused = remote.tokenize(ApiKind::Messages, &body("{}")).await;
        assert!(matches!(refused, Err(TokenizeError::Unsupported(_))));
    }

    #[tokio::test]
    async fn render_gives_ids_and_media() {
        let (remote, calls) = engine(rendered).await;
        let chat = r#"{"model":"lora","stream":true,"messages":[{"role":"user","content":[{"type":"image_url"}]}]}"#;
        let tokens = remote
            .tokenize(ApiKind::ChatCompletions, &body(chat))
            .await
            .unwrap();
        assert_eq!(*tokens.prompts[0].ids, [1, 9, 9, 2]);
        let item = &tokens.prompts[0].media[0];
        assert_eq!(
            (item.modality, item.token_offset, item.tokens),
            ("image", Some(1), Some(2))
        );
        assert_eq!(item.hash, xxh64(b"abc", 0));
        assert_eq!(item.identifier.as_deref(), Some("abc"));
        assert_eq!(remote.route(), Route::Render);
        let sent = calls.lock()[1].1.clone();
        // Only what decides the prompt, for the model the engine knows.
        assert_eq!(
            sent,
            r#"{"model":"tiny","messages":[{"role":"user","content":[{"type":"image_url"}]}]}"#
        );
    }

    #[test]
    fn media_that_the_engine_does_not_name_end_what_has_keys() {
        let rendered = |features: serde_json::Value| {
            let answer = json!({"token_ids": [1, 9, 9, 2, 8, 8, 3], "features": features});
            let rendered: Rendered = serde_json::from_value(answer).unwrap();
            rendered.into_tokens()
        };
        let places = |modality: &str| json!({modality: [{"offset": 1, "length": 2}, {"offset": 4, "length": 2}]});
        let named = rendered(
            json!({"mm_hashes": {"image": ["a", "b"]}, "mm_placeholders": places("image")}),
        );
        assert!(named.is_whole());
        assert_eq!(named.named_media().len(), 2);
        for hashes in [json!({"image": ["a"]}), json!({"image": ["a", null]})] {
            let some = rendered(json!({"mm_hashes": hashes, "mm_placeholders": places("image")}));
            assert_eq!(some.keyed_ids(), [1, 9, 9, 2]);
        }
        // A modality of tomorrow is still no text.
        let odd = rendered(json!({"mm_hashes": {}, "mm_placeholders": places("smell")}));
        assert_eq!(odd.keyed_ids(), [1]);
    }

    #[tokio::test]
    async fn a_completion_is_sent_whole_with_the_model_replaced() {
        let (remote, calls) = engine(rendered).await;
        let tokens = remote
            .tokenize(
                ApiKind::Completions,
                &body(r#"{"model":"lora","prompt":"The port","n":2}"#),
            )
            .await
            .unwrap();
        assert_eq!(*tokens.prompts[0].ids, [591, 3105]);
        assert_eq!(
            calls.lock()[1].1,
            r#"{"model":"tiny","prompt":"The port","n":2}"#
        );
    }

    fn tokenize_only(path: &str) -> (u16, String) {
        match path {
            "/tokenize" => (200, json!({"count": 2, "tokens": [591, 3105]}).to_string()),
            _ => (403, String::new()),
        }
    }

    #[tokio::test]
    async fn closed_render_routes_are_asked_once() {
        let (remote, calls) = engine(tokenize_only).await;
        for _ in 0..2 {
            let prompt = body(r#"{"prompt":"The port"}"#);
            let tokens = remote
                .tokenize(ApiKind::Completions, &prompt)
                .await
                .unwrap();
            assert_eq!(*tokens.prompts[0].ids, [591, 3105]);
        }
        assert_eq!(remote.route(), Route::Tokenize);
        let paths: Vec<String> = calls.lock().iter().map(|(path, _)| path.clone()).collect();
        assert_eq!(paths, ["/v1/completions/render", "/tokenize", "/tokenize"]);
        let sent = calls.lock()[1].1.clone();
        assert_eq!(
            sent,
            r#"{"model":"tiny","prompt":"The port","add_special_tokens":true}"#
        );
    }

    #[tokio::test]
    async fn tokenize_knows_no_media() {
        let (remote, _) = engine(tokenize_only).await;
        let chat = r#"{"messages":[{"role":"user","content":[{"type":"image_url"}]}]}"#;
        let result = remote.tokenize(ApiKind::ChatCompletions, &body(chat)).await;
        assert_eq!(result, Err(TokenizeError::Media));
        let chat = r#"{"messages":[{"role":"user","content":[{"type":"text","text":"a"}]}]}"#;
        assert!(
            remote
                .tokenize(ApiKind::ChatCompletions, &body(chat))
                .await
                .is_ok()
        );
    }

    #[tokio::test]
    async fn an_error_of_the_engine_is_an_error() {
        let (remote, _) = engine(|_| (500, String::new())).await;
        let result = remote
            .tokenize(ApiKind::Completions, &body(r#"{"prompt":"a"}"#))
            .await;
        let error = result.unwrap_err().to_string();
        assert!(error.contains("500"), "{error}");
        // Not settled: the next request asks again.
        assert_eq!(remote.route(), Route::Unknown);
    }

    #[tokio::test]
    async fn an_answer_that_is_too_large_is_refused() {
        let (remote, _) = engine(|_| (200, " ".repeat(MAX_RESPONSE_BYTES + 1))).await;
        assert!(matches!(
            remote.probe().await,
            Err(TokenizeError::Remote(_))
        ));
    }

    #[tokio::test]
    async fn silence_ends_with_the_timeout() {
        let (remote, _) = engine(|_| (0, String::new())).await;
        let mut settings = remote.settings.clone();
        settings.timeout = Duration::from_millis(50);
        let remote = RemoteTokenizer::new(settings).unwrap();
        let error = remote.probe().await.unwrap_err().to_string();
        assert!(error.contains("no answer within 50ms"), "{error}");
    }

    #[tokio::test]
    async fn calls_at_a_time_are_bounded() {
        let (remote, _) = engine(rendered).await;
        let _all = remote
            .calls
            .try_acquire_many(u32::try_from(MAX_CALLS).unwrap())
            .unwrap();
        let error = remote.probe().await.unwrap_err().to_string();
        assert!(error.contains("too many calls"), "{error}");
    }

    #[test]
    fn only_plain_http_is_spoken() {
        for url in ["https://a:1", "a:1", "http://a/b"] {
            assert!(
                RemoteTokenizer::new(RemoteSettings::new(url, "m")).is_err(),
                "{url}"
            );
        }
        assert_eq!(DEFAULT_TIMEOUT.as_secs(), 5);
        assert_eq!(DEFAULT_MEDIA_TIMEOUT.as_secs(), 30);
    }
}
