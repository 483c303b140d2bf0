//! `vllmhttp-parser`: vLLM's token-in endpoint `inference/v1/generate`.

use xxhash_rust::xxh64::xxh64;

use super::fields::{Common, text_of, token_id, whole_number};
use super::keys::Key;
use super::scan::{Event, Step, Visitor, scan};
use super::{ApiKind, AppProtocol, Body, Extent, MediaItem, ParseError, Parser, Payload, Prompt};
use crate::plugin::{Build, Maturity, ParamDoc, Plugin, PluginError};

/// Media items that are read of one request; further ones are ignored.
pub(super) const MAX_MEDIA: usize = 4096;

/// Reads pre-tokenized vLLM bodies. No parameters.
#[derive(Debug, Default)]
pub struct VllmHttpParser;

impl Plugin for VllmHttpParser {
    const TYPE: &'static str = "vllmhttp-parser";
    const MATURITY: Maturity = Maturity::Beta;
    const PARAMETERS: &'static [ParamDoc] = &[];
    const LENIENT: bool = true;
    const ABOUT: &'static str = "Reads pre-tokenized vLLM generate bodies.";

    fn build(_: &mut Build<'_>) -> Result<Self, PluginError> {
        Ok(Self)
    }
}

impl Parser for VllmHttpParser {
    fn type_name(&self) -> &'static str {
        Self::TYPE
    }

    fn path_suffixes(&self) -> &'static [&'static str] {
        &["inference/v1/generate"]
    }

    fn app_protocols(&self) -> &'static [AppProtocol] {
        &[AppProtocol::Http, AppProtocol::H2c]
    }

    fn parse(&self, path: &str, body: &Body) -> Result<Payload, ParseError> {
        if !path.ends_with("inference/v1/generate") {
            return Err(ParseError::new(format!("unsupported path: {path}")));
        }
        let mut reader = Reader::default();
        scan(body, &mut reader)
            .map_err(|e| ParseError::new(format!("error unmarshaling request bodyMap: {e}")))?;
        if let Some((index, value)) = reader.invalid {
            let text =
                format!("invalid generate request: token_ids[{index}]: invalid value {value}");
            return Err(ParseError::new(text));
        }
        if reader.ids.is_empty() {
            return Err(ParseError::new(
                "invalid generate request: must have non-empty token_ids field",
            ));
        }
        let media = reader.features.media(body);
        let prompts = vec![Prompt::Tokens {
            ids: reader.ids,
            media,
        }];
        let mut payload = reader.common.payload(ApiKind::VllmGenerate, body, prompts);
        payload.max_output_tokens = reader.max_tokens;
        payload.scores_prompt = reader.scores_prompt;
        Ok(payload)
    }
}

#[derive(Default)]
struct Reader {
    common: Common,
    ids: Vec<u32>,
    invalid: Option<(u32, String)>,
    max_tokens: Option<u64>,
    scores_prompt: bool,
    features: Features,
}

/// Hashes and placeholders arrive as two maps from modality to lists of equal length.
#[derive(Default)]
struct Features {
    hashes: Vec<(&'static str, super::fields::Text)>,
    places: Vec<(&'static str, Option<u32>, Option<u32>)>,
}

impl Features {
    fn visit(&mut self, path: &[Step], event: &Event<'_>) {
        if self.hashes.len() >= MAX_MEDIA || self.places.len() >= MAX_MEDIA {
            return;
        }
        match path {
            [
                Step::Key(Key::MmHashes),
                Step::Key(modality),
                Step::Index(_),
            ] => {
                if let (Some(modality), Some(text)) = (modality_of(*modality), text_of(event)) {
                    self.hashes.push((modality, text));
                }
            }
            [
                Step::Key(Key::MmPlaceholders),
                Step::Key(modality),
                Step::Index(_),
            ] if *event == Event::ObjectStart => {
                if let Some(modality) = modality_of(*modality) {
                    self.places.push((modality, None, None));
                }
            }
            [
                Step::Key(Key::MmPlaceholders),
                Step::Key(_),
                Step::Index(_),
                Step::Key(field),
            ] => {
                if let Some(place) = self.places.last_mut() {
                    match field {
                        Key::Offset => place.1 = token_id(event),
                        Key::Length => place.2 = token_id(event),
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }

    fn media(self, body: &Body) -> Vec<MediaItem> {
        let mut items = Vec::with_capacity(self.hashes.len());
        for modality in ["image", "video", "audio"] {
            let hashes = self.hashes.iter().filter(|(m, _)| *m == modality);
            let mut places = self.places.iter().filter(|(m, ..)| *m == modality);
            for (_, text) in hashes {
                let place = places.next();
                let identifier = text.read(body);
                let bytes = identifier.as_ref().map(String::as_bytes);
                items.push(MediaItem {
                    modality,
                    hash: bytes.map_or(0, |bytes| xxh64(bytes, 0)),
                    identifier: identifier.map(Into::into),
                    token_offset: place.and_then(|p| p.1),
                    tokens: place.and_then(|p| p.2),
                    extent: Extent::Unknown,
                });
            }
        }
        items
    }
}

fn modality_of(key: Key) -> Option<&'static str> {
    match key {
        Key::Image => Some("image"),
        Key::Video => Some("video"),
        Key::Audio => Some("audio"),
        _ => None,
    }
}

impl Visitor for Reader {
    fn visit(&mut self, path: &[Step], event: Event<'_>) {
        if self.common.visit(path, &event) {
            return;
        }
        match path {
            [Step::Key(Key::TokenIds)] if event == Event::ArrayStart => {
                self.ids.clear();
                self.invalid = None;
            }
            [Step::Key(Key::TokenIds), Step::Index(index)] => match (token_id(&event), &event) {
                (Some(id), _) => self.ids.push(id),
                (None, Event::End(_)) => {}
                (None, _) if self.invalid.is_some() => {}
                (None, Event::Scalar(text)) => {
                    self.invalid = Some((*index, String::from_utf8_lossy(text).into_owned()));
                }
                (None, _) => self.invalid = Some((*index, "of another type".to_owned())),
            },
            [Step::Key(Key::SamplingParams), Step::Key(Key::MaxTokens)] => {
                self.max_tokens = whole_number(&event);
            }
            [
                Step::Key(Key::SamplingParams),
                Step::Key(Key::PromptLogprobs),
            ] => {
                self.scores_prompt = event != Event::Scalar(b"null");
            }
            [Step::Key(Key::Features), rest @ ..] => self.features.visit(rest, &event),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(body: &str) -> Result<Payload, String> {
        VllmHttpParser
            .parse("/inference/v1/generate", &Body::from(body))
            .map_err(|e| e.to_string())
    }

    #[test]
    fn ids_limit_and_media_are_read() {
        let payload = parse(
            r#"{"model":"m","token_ids":[1,2],"stream":true,"sampling_params":{"max_tokens":3,"prompt_logprobs":1},"cache_salt":"s",
               "features":{"mm_hashes":{"image":["h1","h2"]},"mm_placeholders":{"image":[{"offset":0,"length":5},{"offset":9,"length":6}]}}}"#,
        )
        .unwrap();
        let Prompt::Tokens { ids, media } = &payload.prompts[0] else {
            panic!("text")
        };
        assert_eq!(ids, &[1, 2]);
        assert_eq!(
            media
                .iter()
                .map(|m| (m.token_offset, m.tokens))
                .collect::<Vec<_>>(),
            [(Some(0), Some(5)), (Some(9), Some(6))]
        );
        assert_eq!(media[0].hash, xxh64(b"h1", 0));
        assert_eq!(media[0].identifier.as_deref(), Some("h1"));
        assert_eq!((payload.max_output_tokens, payload.stream), (Some(3), true));
        assert!(payload.scores_prompt);
        assert_eq!(payload.cache_salt.as_deref(), Some("s"));
    }

    #[test]
    fn bad_ids_are_named() {
        assert_eq!(
            parse(r#"{"token_ids":[]}"#).unwrap_err(),
            "invalid generate request: must have non-empty token_ids field"
        );
        assert_eq!(
            parse(r#"{"token_ids":[1,-2]}"#).unwrap_err(),
            "invalid generate request: token_ids[1]: invalid value -2"
        );
    }
}
