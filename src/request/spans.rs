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
