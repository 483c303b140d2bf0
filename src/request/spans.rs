//! Spans of a request: whose they are.

use std::collections::BTreeSet;

use super::{InferenceRequest, MediaItem, Prompt, Segment};
use crate::telemetry::trace::names::{MEDIA_COUNT, MODALITY, MODEL, REQUEST_ID};
use crate::telemetry::trace::{Site, Span};

impl InferenceRequest {
    /// A span inside of the decision on this request, which names it; empty when it is not recorded.
    pub fn span(&self, site: Site) -> Span {
        let mut span = self.trace.child(site);
        self.identify(&mut span);
        span
    }

    /// Names the request and its media.
    pub fn identify(&self, span: &mut Span) {
        if !span.is_recording() {
            return;
        }
        if !self.target_model.is_empty() {
            span.record(|| [(MODEL, self.target_model.clone().into())]);
        }
        let kinds: BTreeSet<_> = self.media().map(|item| item.modality).collect();
        let kinds: Vec<_> = kinds.into_iter().collect();
        let modality = match kinds.as_slice() {
            [] => "none".to_owned(),
            kinds => kinds.join(","),
        };
        span.record(|| {
            [
                (REQUEST_ID, self.id.clone().into()),
                (MODALITY, modality.into()),
                (MEDIA_COUNT, self.media().count().into()),
            ]
        });
    }

    fn media(&self) -> impl Iterator<Item = &MediaItem> {
        self.payload.prompts.iter().flat_map(|prompt| {
            let (segments, media) = match prompt {
                Prompt::Text(segments) => (segments.as_slice(), &[][..]),
                Prompt::Tokens { media, .. } => (&[][..], media.as_slice()),
            };
            let in_text = segments.iter().filter_map(|segment| match segment {
                Segment::Media(item) => Some(item),
                Segment::Body { .. } => None,
            });
            in_text.chain(media)
        })
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::super::openai::OpenAiParser;
    use super::super::{Body, Parser};
    use super::*;
    use crate::telemetry::trace::span::Finished;
    use crate::telemetry::trace::{Tracer, Value, names};

    /// The span of a chat with this content.
    fn span(model: &str, content: &serde_json::Value) -> Finished {
        let messages = serde_json::json!([{"role": "user", "content": content}]);
        let text = serde_json::json!({"model": model, "messages": messages}).to_string();
        let body = Body::from(Bytes::from(text));
        let payload = OpenAiParser.parse("/v1/chat/completions", &body).unwrap();
        let mut request = InferenceRequest::new("id", payload, body);
        let (tracer, mut spans) = Tracer::into_queue(1);
        request.trace = tracer.start(|| None, || names::ORCHESTRATION).span;
        drop(request.span(names::PROFILE));
        spans.try_recv().unwrap()
    }

    fn text(value: &str) -> Value {
        value.to_owned().into()
    }

    #[test]
    fn a_span_names_its_request_and_the_kinds_of_media() {
        let image = |n: u32| {
            let url = format!("https://example.com/{n}.png");
            serde_json::json!({"type": "image_url", "image_url": {"url": url}})
        };
        let audio = serde_json::json!({"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}});
        let content =
            serde_json::json!([image(1), audio, image(2), {"type": "text", "text": "secret"}]);
        let found = span("m", &content);
        assert_eq!(
            found.attributes,
            [
                (MODEL, text("m")),
                (REQUEST_ID, text("id")),
                (MODALITY, text("audio,image")),
                (MEDIA_COUNT, 3usize.into()),
            ]
        );
        // Without a model or media there is nothing to name.
        let plain = span("", &"secret".into());
        assert_eq!(
            plain.attributes,
            [
                (REQUEST_ID, text("id")),
                (MODALITY, text("none")),
                (MEDIA_COUNT, 0usize.into()),
            ]
        );
        assert!(!format!("{found:?}{plain:?}").contains("secret"));
    }
}
