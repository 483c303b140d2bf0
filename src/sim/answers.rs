//! Answers of a simulated pod that are not generated text.

use std::io;
use std::time::Duration;

use bytes::Bytes;
use futures_util::{StreamExt, stream};
use http::header::CONTENT_TYPE;
use http::{HeaderValue, Response, StatusCode};
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::Frame;
use serde_json::json;

use super::ask::Refusal;

/// Body of any answer.
pub(super) type Body = BoxBody<Bytes, io::Error>;

/// What vLLM renders of a request, key by key.
pub(super) fn rendered(
    chat: bool,
    model: &str,
    ids: &[u32],
    max_tokens: usize,
    salt: Option<&str>,
) -> String {
    let prefix = if chat { "chatcmpl" } else { "cmpl" };
    let top = if chat {
        r#","top_p":1.0,"min_p":0.0"#
    } else {
        ""
    };
    let sampling = format!(
        r#"{{"presence_penalty":0.0,"frequency_penalty":0.0,"repetition_penalty":1.0,"temperature":1.0{top},"stop":[],"stop_token_ids":[],"max_tokens":{max_tokens},"output_kind":2,"skip_clone":true,"bad_words":[],"skip_reading_prefix_cache":false}}"#
    );
    format!(
        r#"{{"request_id":"{prefix}-{:016x}","token_ids":{},"token_offsets":null,"features":null,"content_parts":null,"sampling_params":{sampling},"model":{},"reasoning_ended":null,"reasoning_parser_kwargs":null,"return_token_ids":null,"output_mode":"tokens","stream":false,"stream_options":null,"cache_salt":{},"priority":0,"kv_transfer_params":null,"ec_transfer_params":null}}"#,
        fastrand::u64(..),
        json!(ids),
        json!(model),
        json!(salt),
    )
}

/// The first half of an answer, and then the end of the connection.
pub(super) fn cut(whole: &Bytes) -> Response<Body> {
    let half = Frame::data(whole.slice(..whole.len() / 2));
    let end = async {
        // What came before an error goes out only if the error comes later.
        tokio::time::sleep(Duration::from_millis(20)).await;
        Err(io::Error::other("simulated fault"))
    };
    let body = StreamBody::new(stream::once(std::future::ready(Ok(half))).chain(stream::once(end)));
    let mut response = Response::new(BodyExt::boxed(body));
    let content_type = HeaderValue::from_static("application/json");
    response.headers_mut().insert(CONTENT_TYPE, content_type);
    response
}

pub(super) fn simulated_failure(status: StatusCode, kind: &'static str) -> Response<Body> {
    refuse(&Refusal::new(status, kind, "simulated fault", None))
}

pub(super) fn reply(
    status: StatusCode,
    content_type: Option<&'static str>,
    text: String,
) -> Response<Body> {
    let body = Full::new(Bytes::from(text))
        .map_err(|never| match never {})
        .boxed();
    let mut response = Response::new(body);
    *response.status_mut() = status;
    if let Some(content_type) = content_type {
        let value = HeaderValue::from_static(content_type);
        response.headers_mut().insert(CONTENT_TYPE, value);
    }
    response
}

pub(super) fn plain(status: StatusCode, text: String) -> Response<Body> {
    reply(status, None, text)
}

/// An answer whose text is JSON.
pub(super) fn json_reply(status: StatusCode, text: String) -> Response<Body> {
    reply(status, Some("application/json"), text)
}

/// An answer about a route, as vLLM's web framework words it.
pub(super) fn detail(status: StatusCode, text: &str) -> Response<Body> {
    json_reply(status, json!({ "detail": text }).to_string())
}

/// The answer that tells a refusal.
pub(super) fn refuse(refusal: &Refusal) -> Response<Body> {
    json_reply(refusal.status, refusal.body().to_string())
}
