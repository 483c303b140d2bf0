//! The encode stage: every media item of the prompt goes to an encode endpoint, all at once.

use std::ops::Range;

use bytes::{Bytes, BytesMut};
use futures_util::stream::{self, StreamExt, TryStreamExt};
use http::HeaderValue;
use serde::Deserialize;
use serde_json::value::RawValue;

use super::super::answer;
use super::super::api::Api;
use super::super::exchange::{Exchange, LegFailure, Refusal};
use super::super::host_port::HostPort;
use super::super::json::{Field, Object, elements};
use super::super::prompt::{Limits, Prompt};
use super::super::settings::EcConnector;

/// Encode calls of one request at once.
const MAX_PARALLEL: usize = 16;
/// Media items of one request.
const MAX_ITEMS: usize = 256;
/// Types of content parts that are media.
const MEDIA: [&[u8]; 4] = [
    b"\"image_url\"",
    b"\"audio_url\"",
    b"\"video_url\"",
    b"\"input_audio\"",
];

/// Has every item encoded, and puts what the answers say into every later body. A prompt without
/// items needs no encoding.
pub(super) async fn serve(
    exchange: &mut Exchange,
    connector: EcConnector,
    encoders: &[HostPort],
) -> Result<(), Refusal> {
    let items = items(&exchange.prompt);
    if items.is_empty() {
        return Ok(());
    }
    if items.len() > MAX_ITEMS {
        return Err(Box::new(answer::bad_request("too many media items")));
    }
    let answers = encode(exchange, &items, encoders)
        .await
        .map_err(|failure| {
            tracing::warn!(%failure, "encode failed");
            Box::new(answer::bad_gateway("The encode node failed."))
        })?;
    if connector == EcConnector::EcNixl {
        let params = merge(&answers);
        exchange.prompt.always((Field::EcTransferParams, params));
    }
    let any = (Field::CacheHitThreshold, Some(Bytes::from_static(b"0")));
    exchange.prompt.always(any);
    exchange.kv_source = None;
    Ok(())
}

/// Dropped at the first item that nobody encodes, which ends the calls still running.
async fn encode(
    exchange: &Exchange,
    items: &[Bytes],
    encoders: &[HostPort],
) -> Result<Vec<Bytes>, LegFailure> {
    let calls = items.iter().enumerate();
    let calls = calls.map(|(index, item)| encode_item(exchange, index, item, encoders));
    let calls: Vec<_> = calls.collect();
    stream::iter(calls)
        .buffered(MAX_PARALLEL)
        .try_collect()
        .await
}

/// Items are dealt to the endpoints in turn. One that fails at its own goes to the next, each endpoint
/// once, unless the item itself is refused.
async fn encode_item(
    exchange: &Exchange,
    index: usize,
    item: &Bytes,
    encoders: &[HostPort],
) -> Result<Bytes, LegFailure> {
    let id = exchange.request_id.to_str().unwrap_or_default();
    let id = HeaderValue::from_str(&format!("{id}-enc-{index}"))
        .map_err(|_| LegFailure::Garbage("the request id is no header value"))?;
    let body = body(exchange, item)?;
    let mut failure = LegFailure::Garbage("no encode endpoint");
    let own = index % encoders.len().max(1);
    for encoder in encoders.iter().cycle().skip(own).take(encoders.len()) {
        failure = match exchange.encode(encoder, body.clone(), id.clone()).await {
            Ok(answer) => return Ok(answer),
            Err(failure) if failure.is_final() => return Err(failure),
            Err(failure) => failure,
        };
        tracing::warn!(encode_target = %encoder, index, %failure, "encode failed");
    }
    Err(failure)
}

/// The client's body with one message that has one item.
fn body(exchange: &Exchange, item: &Bytes) -> Result<Vec<Bytes>, LegFailure> {
    let mut messages = BytesMut::from(&br#"[{"role":"user","content":["#[..]);
    messages.extend_from_slice(item);
    messages.extend_from_slice(b"]}]");
    let change = (Field::Messages, Some(messages.freeze()));
    if exchange.prompt.api() == Api::Chat {
        return Ok(exchange.prompt.single_token(Limits::Present, &[change]));
    }
    // Encode endpoints speak the chat API, whatever the client does.
    Prompt::parse(Api::Chat, exchange.prompt.text().clone())
        .map(|prompt| prompt.single_token(Limits::Present, &[change]))
        .map_err(|_| LegFailure::Garbage("unusable body"))
}

/// Media parts of all messages, in order; parts with one URL count once.
fn items(prompt: &Prompt) -> Vec<Bytes> {
    let text = prompt.text();
    let mut out: Vec<Bytes> = Vec::new();
    let mut urls: Vec<&[u8]> = Vec::new();
    let messages = prompt
        .place(Field::Messages)
        .and_then(|range| elements(text, &range))
        .unwrap_or_default();
    let parts = messages.iter().filter_map(|message| {
        let content = Object::at(text, message)?.value(Field::Content)?;
        elements(text, &content)
    });
    for part in parts.flatten() {
        let Some(object) = Object::at(text, &part) else {
            continue;
        };
        let kind = object.value(Field::Type).and_then(|range| text.get(range));
        if !kind.is_some_and(|kind| MEDIA.contains(&kind)) {
            continue;
        }
        if let Some(url) = url(text, &object) {
            if urls.contains(&url) {
                continue;
            }
            urls.push(url);
        }
        out.push(text.slice(part));
        if out.len() > MAX_ITEMS {
            break;
        }
    }
    out
}

/// The URL of a part, as written: `{"image_url": {"url": "..."}}` or `{"image_url": "..."}`.
fn url<'a>(text: &'a Bytes, part: &Object) -> Option<&'a [u8]> {
    let holder: Range<usize> = [Field::ImageUrl, Field::AudioUrl, Field::VideoUrl]
        .into_iter()
        .find_map(|field| part.value(field))?;
    let value = match Object::at(text, &holder) {
        Some(object) => object.value(Field::Url)?,
        None => holder,
    };
    text.get(value)
}

#[derive(Deserialize)]
struct Encoded<'a> {
    #[serde(borrow)]
    ec_transfer_params: Option<&'a RawValue>,
}

/// All members of all answers' parameters in one object; `None` when there are none.
fn merge(answers: &[Bytes]) -> Option<Bytes> {
    let mut out = BytesMut::new();
    for answer in answers {
        let params = serde_json::from_slice::<Encoded<'_>>(answer)
            .ok()
            .and_then(|encoded| encoded.ec_transfer_params);
        let members = params.and_then(|params| {
            let text = params.get().trim();
            text.strip_prefix('{')?.strip_suffix('}').map(str::trim)
        });
        let Some(members) = members.filter(|members| !members.is_empty()) else {
            tracing::warn!("an encode answer without ec_transfer_params");
            continue;
        };
        out.extend_from_slice(if out.is_empty() { b"{" } else { b"," });
        out.extend_from_slice(members.as_bytes());
    }
    if out.is_empty() {
        return None;
    }
    out.extend_from_slice(b"}");
    Some(out.freeze())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn items_are_the_media_parts_each_url_once() {
        let body = r#"{"messages":[{"role":"system","content":"x"},{"role":"user","content":[
            {"type":"text","text":"a"},
            {"type":"image_url","image_url":{"url":"http://a/1"}},
            {"image_url":{"detail":"low","url":"http://a/1"},"type":"image_url"},
            {"type":"input_audio","input_audio":{"data":"x"}},
            {"type":"input_audio","input_audio":{"data":"x"}}]},
            {"role":"user","content":[{"type":"video_url","video_url":{"url":"http://a/2"}}]}]}"#;
        let prompt = Prompt::parse(Api::Chat, Bytes::from_static(body.as_bytes())).unwrap();
        let texts: Vec<String> = items(&prompt)
            .iter()
            .map(|item| String::from_utf8(item.to_vec()).unwrap())
            .collect();
        assert_eq!(
            texts,
            [
                r#"{"type":"image_url","image_url":{"url":"http://a/1"}}"#,
                r#"{"type":"input_audio","input_audio":{"data":"x"}}"#,
                r#"{"type":"input_audio","input_audio":{"data":"x"}}"#,
                r#"{"type":"video_url","video_url":{"url":"http://a/2"}}"#,
            ]
        );
    }

    #[test]
    fn parameters_of_answers_are_joined() {
        let answers = [
            r#"{"ec_transfer_params":{"h1":{"peer_port":1}}}"#,
            r#"{"choices":[]}"#,
            r#"{"ec_transfer_params":{}}"#,
            r#"{"ec_transfer_params":{ "h2":{"size_bytes":9007199254740993} }}"#,
        ]
        .map(|text| Bytes::from_static(text.as_bytes()));
        assert_eq!(
            merge(&answers).unwrap(),
            r#"{"h1":{"peer_port":1},"h2":{"size_bytes":9007199254740993}}"#
        );
        assert_eq!(merge(&answers[1..3]), None);
    }
}
