//! `anthropic-parser`: `messages`; `messages/count_tokens` passes unread.

use std::ops::Range;

use super::fields::{Common, Text, raw_segment, text_of};
use super::keys::Key;
use super::media::{image_base64, image_url};
use super::scan::{Event, Step, Visitor, scan};
use super::{ApiKind, AppProtocol, Body, ParseError, Parser, Payload, Prompt, Segment};
use crate::plugin::{Build, Maturity, ParamDoc, Plugin, PluginError};

/// Reads Anthropic Messages bodies. No parameters.
#[derive(Debug, Default)]
pub struct AnthropicParser;

impl Plugin for AnthropicParser {
    const TYPE: &'static str = "anthropic-parser";
    const MATURITY: Maturity = Maturity::Beta;
    const PARAMETERS: &'static [ParamDoc] = &[];
    const LENIENT: bool = true;
    const ABOUT: &'static str = "Reads Anthropic Messages request bodies.";

    fn build(_: &mut Build<'_>) -> Result<Self, PluginError> {
        Ok(Self)
    }
}

impl Parser for AnthropicParser {
    fn type_name(&self) -> &'static str {
        Self::TYPE
    }

    fn path_suffixes(&self) -> &'static [&'static str] {
        &["messages", "messages/count_tokens"]
    }

    fn app_protocols(&self) -> &'static [AppProtocol] {
        &[AppProtocol::Http, AppProtocol::H2c]
    }

    fn parse(&self, path: &str, body: &Body) -> Result<Payload, ParseError> {
        if path.ends_with("/messages/count_tokens") {
            return Ok(Payload::raw(true));
        }
        if !path.ends_with("/messages") {
            return Err(ParseError::new(format!("unsupported API endpoint: {path}")));
        }
        let mut reader = Reader::new(body);
        scan(body, &mut reader).map_err(|error| {
            ParseError::new(format!("error unmarshaling request body: {error}"))
        })?;
        if reader.count == 0 {
            return Err(ParseError::new(
                "invalid messages request: must have at least one message",
            ));
        }
        let parts = reader
            .tools
            .map(raw_segment)
            .into_iter()
            .chain(reader.system)
            .chain(reader.messages);
        let prompts = vec![Prompt::Text(parts.collect())];
        Ok(reader.common.payload(ApiKind::Messages, body, prompts))
    }
}

struct Reader<'a> {
    body: &'a Body,
    common: Common,
    tools: Option<Range<usize>>,
    system: Vec<Segment>,
    messages: Vec<Segment>,
    role: Option<Segment>,
    content: Vec<Segment>,
    source: Source,
    count: u32,
}

/// The `source` object of an image while it is read.
#[derive(Default)]
struct Source {
    url: Option<Text>,
    data: Option<Text>,
}

impl<'a> Reader<'a> {
    fn new(body: &'a Body) -> Self {
        Self {
            body,
            common: Common::default(),
            tools: None,
            system: Vec::new(),
            messages: Vec::new(),
            role: None,
            content: Vec::new(),
            source: Source::default(),
            count: 0,
        }
    }

    fn system(&mut self, path: &[Step], event: &Event<'_>) {
        match (path, text_of(event)) {
            ([], Some(text)) => self.system = vec![text.segment()],
            ([], None) if *event == Event::ArrayStart => self.system.clear(),
            ([Step::Index(_), Step::Key(Key::Text)], Some(text)) => {
                self.system.push(text.segment());
            }
            _ => {}
        }
    }

    fn message(&mut self, path: &[Step], event: &Event<'_>) {
        match path {
            [] if *event == Event::ArrayStart => {
                self.messages.clear();
                self.count = 0;
            }
            [Step::Index(_)] => match event {
                Event::ObjectStart => self.count += 1,
                Event::End(_) => {
                    self.messages.extend(self.role.take());
                    self.messages.append(&mut self.content);
                }
                _ => {}
            },
            [Step::Index(_), Step::Key(Key::Role)] => {
                self.role = text_of(event).map(|t| t.segment());
            }
            [Step::Index(_), Step::Key(Key::Content)] => {
                if let Some(text) = text_of(event) {
                    self.content = vec![text.segment()];
                }
            }
            [
                Step::Index(_),
                Step::Key(Key::Content),
                Step::Index(_),
                block @ ..,
            ] => self.block(block, event),
            _ => {}
        }
    }

    /// Text, thinking, tool use and tool results in the order of the body; images by hash.
    fn block(&mut self, path: &[Step], event: &Event<'_>) {
        match (path, event) {
            ([Step::Key(Key::Input)], Event::End(range)) => {
                self.content.push(raw_segment(range.clone()));
            }
            (
                [Step::Key(Key::Source)]
                | [
                    Step::Key(Key::Content),
                    Step::Index(_),
                    Step::Key(Key::Source),
                ],
                Event::End(_),
            ) => {
                let image = std::mem::take(&mut self.source).image(self.body);
                self.content.extend(image);
            }
            _ => {}
        }
        let Some(text) = text_of(event) else { return };
        match path {
            [
                Step::Key(
                    Key::Text | Key::Thinking | Key::Id | Key::Name | Key::ToolUseId | Key::Content,
                ),
            ]
            | [
                Step::Key(Key::Content),
                Step::Index(_),
                Step::Key(Key::Text),
            ] => self.content.push(text.segment()),
            [Step::Key(Key::Source), Step::Key(field)]
            | [
                Step::Key(Key::Content),
                Step::Index(_),
                Step::Key(Key::Source),
                Step::Key(field),
            ] => match field {
                Key::Url => self.source.url = Some(text),
                Key::Data => self.source.data = Some(text),
                _ => {}
            },
            _ => {}
        }
    }
}

impl Source {
    /// The image by URL or, without one, by its data; an empty string is none.
    fn image(self, body: &Body) -> Option<Segment> {
        let given = |text: &Text| !text.range.is_empty();
        let item = match (self.url.filter(given), self.data.filter(given)) {
            (Some(url), _) => image_url(&url, body),
            (None, Some(data)) => image_base64(&data, body),
            (None, None) => return None,
        };
        Some(Segment::Media(item))
    }
}

impl Visitor for Reader<'_> {
    fn visit(&mut self, path: &[Step], event: Event<'_>) {
        if self.common.visit(path, &event) {
            return;
        }
        match path {
            [Step::Key(Key::Tools)] => {
                if let Event::End(range) = event {
                    self.tools = Some(range);
                }
            }
            [Step::Key(Key::System), rest @ ..] => self.system(rest, &event),
            [Step::Key(Key::Messages), rest @ ..] => self.message(rest, &event),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::Extent;
    use super::super::text::{Piece, for_each_piece};
    use super::*;

    fn parse(path: &str, body: &str) -> Result<Payload, String> {
        AnthropicParser
            .parse(path, &Body::from(body))
            .map_err(|e| e.to_string())
    }

    #[test]
    fn tools_system_and_messages_count_in_that_order() {
        let body = r#"{"model":"c","max_tokens":9,"messages":[{"role":"user","content":"q"},{"role":"assistant","content":[{"type":"thinking","thinking":"t"},{"type":"tool_use","id":"i","name":"n","input":{"a":1}}]},{"role":"user","content":[{"type":"tool_result","tool_use_id":"i","content":[{"type":"text","text":"r"}]},{"type":"image","source":{"type":"base64","data":"AA"}}]}],"system":[{"type":"text","text":"s"}],"tools":[0]}"#;
        let payload = parse("/v1/messages", body).unwrap();
        let Prompt::Text(segments) = &payload.prompts[0] else {
            panic!("tokens")
        };
        let mut out = String::new();
        for_each_piece(segments, &Body::from(body), &mut |piece| match piece {
            Piece::Text(bytes) => out.push_str(std::str::from_utf8(bytes).unwrap()),
            Piece::Media(item) => out.push_str(item.modality),
        });
        assert_eq!(out, "[0]suserqassistanttin{\"a\":1}useririmage");
        assert_eq!(payload.max_output_tokens, Some(9));
        assert!(payload.rewritable);
    }

    #[test]
    fn an_image_is_its_url_or_its_data() {
        let body = r#"{"messages":[{"role":"user","content":[
            {"type":"image","source":{"type":"base64","media_type":"image/png","data":"iVBORw0KGgoAAAANSUhEUgAAAEAAAABACAIAAAAlC+aJ"}},
            {"type":"image","source":{"type":"url","url":"http://x/i.png","data":""}},
            {"type":"image","source":{"type":"file","file_id":"f"}},
            {"type":"tool_use","id":"i","name":"n","input":{"source":{"data":"no image"}}},
            {"type":"tool_result","tool_use_id":"i","content":[{"type":"image","source":{"type":"url","url":"http://x/j.png"}}]}]}]}"#;
        let payload = parse("/v1/messages", body).unwrap();
        let Prompt::Text(segments) = &payload.prompts[0] else {
            panic!("tokens")
        };
        let found: Vec<_> = segments
            .iter()
            .filter_map(|segment| match segment {
                Segment::Media(item) => Some((item.hash, item.extent)),
                Segment::Body { .. } => None,
            })
            .collect();
        let hash = |text: &str| xxhash_rust::xxh64::xxh64(text.as_bytes(), 0);
        let pixels = Extent::Pixels {
            width: 64,
            height: 64,
        };
        assert_eq!(
            found,
            [
                (hash("iVBORw0KGgoAAAANSUhEUgAAAEAAAABACAIAAAAlC+aJ"), pixels),
                (hash("http://x/i.png"), Extent::Unknown),
                (hash("http://x/j.png"), Extent::Unknown),
            ]
        );
    }

    #[test]
    fn count_tokens_is_raw_and_leaves_the_response_alone() {
        let payload = parse("/v1/messages/count_tokens", "not json").unwrap();
        assert!(payload.skip_response && payload.api == ApiKind::Raw && !payload.rewritable);
    }

    #[test]
    fn errors_have_the_contracts_texts() {
        assert_eq!(
            parse("/v1/messages", r#"{"messages":[]}"#).unwrap_err(),
            "invalid messages request: must have at least one message"
        );
        assert!(
            parse("/v1/messages", "{")
                .unwrap_err()
                .starts_with("error unmarshaling request body: ")
        );
        assert_eq!(
            parse("/v1/xmessages", "{}").unwrap_err(),
            "unsupported API endpoint: /v1/xmessages"
        );
    }
}
