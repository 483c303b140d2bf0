//! `openai-parser`: chat, completions, embeddings, responses, conversations, images.

use std::ops::Range;

use super::fields::{Audio, Common, raw_segment, text_of, token_id};
use super::keys::Key;
use super::media::{image_url, video_url};
use super::scan::{Event, OpenString, ScanError, Scanner, Step, Visitor, scan_range};
use super::{
    ApiKind, AppProtocol, Body, MediaItem, ParseError, Parser, Payload, Prompt, Reading, Segment,
    Settled,
};
use crate::plugin::{Build, Maturity, ParamDoc, Plugin, PluginError};

/// Reads OpenAI bodies and their vLLM extensions. No parameters.
#[derive(Debug, Default)]
pub struct OpenAiParser;

impl Plugin for OpenAiParser {
    const TYPE: &'static str = "openai-parser";
    const MATURITY: Maturity = Maturity::Beta;
    const PARAMETERS: &'static [ParamDoc] = &[];
    const LENIENT: bool = true;
    const ABOUT: &'static str = "Reads OpenAI request bodies.";

    fn build(_: &mut Build<'_>) -> Result<Self, PluginError> {
        Ok(Self)
    }
}

impl Parser for OpenAiParser {
    fn type_name(&self) -> &'static str {
        Self::TYPE
    }

    fn path_suffixes(&self) -> &'static [&'static str] {
        &[
            "chat/completions",
            "completions",
            "embeddings",
            "responses",
            "conversations",
            "chat/completions/render",
            "completions/render",
            "images/generations",
        ]
    }

    fn app_protocols(&self) -> &'static [AppProtocol] {
        &[AppProtocol::Http, AppProtocol::H2c]
    }

    fn parse(&self, path: &str, body: &Body) -> Result<Payload, ParseError> {
        parse_range(api_of(path), body, 0..body.len())
    }

    fn begin(&self, path: &str) -> Option<Box<dyn Reading>> {
        Some(Box::new(ReadAhead {
            scanner: Scanner::default(),
            reader: Reader::new(api_of(path)),
            read: 0,
            failed: None,
        }))
    }
}

/// A body that is read while it arrives.
#[derive(Debug)]
struct ReadAhead {
    scanner: Scanner,
    reader: Reader,
    /// Bytes of the body that were read.
    read: usize,
    failed: Option<ScanError>,
}

impl Reading for ReadAhead {
    fn advance(&mut self, body: &Body) {
        let reader = &mut self.reader;
        for slice in body.slices(self.read..body.len()) {
            if self.failed.is_none() {
                let mut over = Over { reader, body };
                self.failed = self.scanner.feed(slice, &mut over).err();
            }
        }
        self.read = body.len();
    }

    fn settled(&self) -> Settled<'_> {
        let open = self.scanner.open_string();
        self.reader.settled(open.filter(|_| self.failed.is_none()))
    }

    fn finish(mut self: Box<Self>, body: &Body) -> Result<Payload, ParseError> {
        self.advance(body);
        let scanned = self.failed.map_or_else(|| self.scanner.finish(), Err);
        scanned.map_err(malformed)?;
        self.reader.finish(body)
    }
}

fn malformed(error: ScanError) -> ParseError {
    ParseError::new(format!("error unmarshaling request bodyMap: {error}"))
}

/// Reads the part of `body` at `range` as a request of `api`. Positions in the payload address the
/// whole body.
pub(super) fn parse_range(
    api: ApiKind,
    body: &Body,
    range: Range<usize>,
) -> Result<Payload, ParseError> {
    let mut reader = Reader::new(api);
    let mut over = Over {
        reader: &mut reader,
        body,
    };
    scan_range(body, range, &mut over).map_err(malformed)?;
    reader.finish(body)
}

/// The API by path, in the reference's order; anything else is read as completions.
fn api_of(path: &str) -> ApiKind {
    let path = path.strip_suffix("/render").unwrap_or(path);
    let ends = |suffix: &str| path.ends_with(suffix);
    match () {
        () if ends("conversations") => ApiKind::Conversations,
        () if ends("responses") => ApiKind::Responses,
        () if ends("chat/completions") => ApiKind::ChatCompletions,
        () if ends("completions") => ApiKind::Completions,
        () if ends("embeddings") => ApiKind::Embeddings,
        () if ends("images/generations") => ApiKind::Images,
        () => ApiKind::Completions,
    }
}

/// Collects what one API needs while the body is scanned.
#[derive(Debug)]
struct Reader {
    api: ApiKind,
    common: Common,
    tools: Option<Segment>,
    instructions: Option<Segment>,
    raw_input: Option<Range<usize>>,
    inline: Inline,
    messages: Messages,
    texts: Texts,
    items: u32,
}

/// Prompts in the three forms of `prompt` and `input`.
#[derive(Debug, Default)]
struct Texts {
    strings: Vec<Segment>,
    /// Token arrays; a flat array is one.
    ids: Vec<Vec<u32>>,
    /// The ids stand in the array itself, not in arrays of it.
    flat: bool,
    invalid: bool,
}

/// Chat messages.
#[derive(Debug, Default)]
struct Messages {
    count: u32,
    segments: Vec<Segment>,
    role: Option<Segment>,
    content: Vec<Segment>,
    audio: Audio,
}

/// Media inside a value that is otherwise taken as raw JSON: where each string lies, in order.
#[derive(Debug, Default)]
struct Inline {
    items: Vec<(Range<usize>, MediaItem)>,
    audio: Audio,
}

impl Reader {
    fn new(api: ApiKind) -> Self {
        Self {
            api,
            common: Common::default(),
            tools: None,
            instructions: None,
            raw_input: None,
            inline: Inline::default(),
            messages: Messages::default(),
            texts: Texts::default(),
            items: 0,
        }
    }

    /// What of the first prompt cannot change any more, if the rest of the body is as usual: chat
    /// messages with their role first, tools before them or not at all, one `prompt`.
    fn settled(&self, open: Option<OpenString<'_>>) -> Settled<'_> {
        let text = |at: &dyn Fn(&[Step]) -> bool| {
            let open = open.filter(|open| at(open.path));
            open.map(|open| (open.start, open.escaped))
        };
        match self.api {
            ApiKind::ChatCompletions => {
                let Messages {
                    segments,
                    role,
                    content,
                    ..
                } = &self.messages;
                let content = role.as_ref().map_or(&[][..], |_| content);
                Settled {
                    closed: [self.tools.as_slice(), segments, role.as_slice(), content],
                    open: text(&|path| self.messages.is_text(path)),
                }
            }
            ApiKind::Completions => {
                let first = self.texts.strings.first();
                let is_text = |path: &[Step]| {
                    first.is_none()
                        && matches!(
                            path,
                            [Step::Key(Key::Prompt)] | [Step::Key(Key::Prompt), Step::Index(0)]
                        )
                };
                let whole = first.map_or(&[][..], std::slice::from_ref);
                Settled {
                    closed: [whole, &[], &[], &[]],
                    open: text(&is_text),
                }
            }
            _ => Settled::default(),
        }
    }

    fn finish(self, body: &Body) -> Result<Payload, ParseError> {
        let missing = |api: &str, field: &str| {
            Err(ParseError::new(format!(
                "invalid {api} request: must have {field} field"
            )))
        };
        let tools = self.tools;
        let prompts = match self.api {
            ApiKind::ChatCompletions if self.messages.count == 0 => {
                return missing("chat completions", "valid messages");
            }
            ApiKind::ChatCompletions => {
                vec![Prompt::Text(
                    tools.into_iter().chain(self.messages.segments).collect(),
                )]
            }
            ApiKind::Responses => {
                let Some(input) = self.raw_input else {
                    return missing("responses", "input");
                };
                let parts = self
                    .instructions
                    .into_iter()
                    .chain(tools)
                    .chain(self.inline.cut(input));
                vec![Prompt::Text(parts.collect())]
            }
            ApiKind::Conversations => match self.raw_input {
                Some(items) if self.items > 0 => {
                    vec![Prompt::Text(self.inline.cut(items).collect())]
                }
                _ => return missing("conversations", "items"),
            },
            api => match self.texts.prompts() {
                Some(prompts) => prompts,
                None => {
                    return match api {
                        ApiKind::Embeddings => missing("embeddings", "input"),
                        ApiKind::Images => missing("images generations", "prompt"),
                        _ => missing("completions", "prompt"),
                    };
                }
            },
        };
        Ok(self.common.payload(self.api, body, prompts))
    }

    fn chat(&mut self, path: &[Step], event: &Event<'_>, body: &Body) {
        let [Step::Key(Key::Messages), rest @ ..] = path else {
            return self.tools(path, event);
        };
        self.messages.visit(rest, event, body);
    }

    fn tools(&mut self, path: &[Step], event: &Event<'_>) {
        if let ([Step::Key(Key::Tools)], Event::End(range)) = (path, event) {
            self.tools = Some(raw_segment(range.clone()));
        }
    }

    fn responses(&mut self, path: &[Step], event: &Event<'_>, body: &Body) {
        match path {
            [Step::Key(Key::Input)] => self.raw(event),
            [Step::Key(Key::Input), part @ ..] => self.inline.visit(part, event, body),
            [Step::Key(Key::Instructions)] => {
                if let Some(text) = text_of(event) {
                    self.instructions = Some(text.segment());
                }
            }
            _ => self.tools(path, event),
        }
    }

    fn conversations(&mut self, path: &[Step], event: &Event<'_>, body: &Body) {
        match (path, event) {
            ([Step::Key(Key::Items)], Event::ArrayStart) => {
                self.items = 0;
                self.raw(event);
            }
            ([Step::Key(Key::Items)], _) => self.raw(event),
            ([Step::Key(Key::Items), Step::Index(_)], Event::ObjectStart) => self.items += 1,
            ([Step::Key(Key::Items), part @ ..], _) => self.inline.visit(part, event, body),
            _ => {}
        }
    }

    /// The value whose raw JSON is the prompt begins or ends; of duplicate keys the last counts.
    fn raw(&mut self, event: &Event<'_>) {
        if !matches!(event, Event::End(_)) {
            self.inline = Inline::default();
        }
        self.raw_input = value_range(event, self.raw_input.take());
    }
}

/// A reader with the body it reads.
struct Over<'a> {
    reader: &'a mut Reader,
    body: &'a Body,
}

impl Visitor for Over<'_> {
    fn visit(&mut self, path: &[Step], event: Event<'_>) {
        let Self { reader, body } = self;
        if reader.common.visit(path, &event) {
            return;
        }
        match reader.api {
            ApiKind::ChatCompletions => reader.chat(path, &event, body),
            ApiKind::Responses => reader.responses(path, &event, body),
            ApiKind::Conversations => reader.conversations(path, &event, body),
            ApiKind::Embeddings => reader.texts.visit(path, &event, Key::Input),
            _ => reader.texts.visit(path, &event, Key::Prompt),
        }
    }
}

impl Inline {
    /// `input_image` and `input_audio` parts, wherever an item carries them.
    fn visit(&mut self, path: &[Step], event: &Event<'_>, body: &Body) {
        let found = match path {
            [.., Step::Key(Key::ImageUrl)] => text_of(event).map(|url| {
                let item = image_url(&url, body);
                (url.range, item)
            }),
            [.., Step::Key(Key::InputAudio)] => self.audio.visit(&[], event, body),
            [.., Step::Key(Key::InputAudio), field] => {
                self.audio.visit(std::slice::from_ref(field), event, body)
            }
            _ => None,
        };
        self.items.extend(found);
    }

    /// The raw JSON of `value` with the media in place of their strings.
    fn cut(self, value: Range<usize>) -> impl Iterator<Item = Segment> {
        let mut from = value.start;
        let rest = self.items.last().map_or(from, |(range, _)| range.end);
        let parts = self.items.into_iter().flat_map(move |(range, item)| {
            let before = raw_segment(from..range.start);
            from = range.end;
            [before, Segment::Media(item)]
        });
        parts.chain([raw_segment(rest..value.end)])
    }
}

/// Where a string, object or array lies, quotes and brackets included. `null` clears it.
fn value_range(event: &Event<'_>, before: Option<Range<usize>>) -> Option<Range<usize>> {
    match event {
        Event::String { range, .. } => Some(range.start - 1..range.end + 1),
        Event::End(range) => Some(range.clone()),
        Event::Scalar(_) => None,
        Event::ObjectStart | Event::ArrayStart => before,
    }
}

impl Texts {
    fn visit(&mut self, path: &[Step], event: &Event<'_>, field: Key) {
        match path {
            [Step::Key(key)]
                if *key == field
                // The field begins again: the last one counts.
                && !matches!(event, Event::End(_)) =>
            {
                *self = Self::default();
                match text_of(event) {
                    Some(text) => self.strings.push(text.segment()),
                    None => self.invalid = *event != Event::ArrayStart,
                }
            }
            [Step::Key(key), Step::Index(_)] if *key == field => match event {
                Event::String { .. } => {
                    self.strings
                        .extend(text_of(event).map(|text| text.segment()));
                }
                Event::Scalar(_) => match (token_id(event), self.ids.last_mut()) {
                    (Some(id), None) => {
                        self.flat = true;
                        self.ids.push(vec![id]);
                    }
                    (Some(id), Some(ids)) if self.flat => ids.push(id),
                    _ => self.invalid = true,
                },
                Event::ArrayStart if self.flat => self.invalid = true,
                Event::ArrayStart => self.ids.push(Vec::new()),
                Event::ObjectStart => self.invalid = true,
                Event::End(_) => {}
            },
            [Step::Key(key), Step::Index(_), Step::Index(_)] if *key == field => {
                match (token_id(event), self.ids.last_mut()) {
                    (Some(id), Some(ids)) => ids.push(id),
                    _ => self.invalid = true,
                }
            }
            _ => {}
        }
    }

    /// The prompts, unless the field is missing, empty or of mixed kind.
    fn prompts(self) -> Option<Vec<Prompt>> {
        let empty_ids = self.ids.iter().any(Vec::is_empty);
        if self.invalid || empty_ids || self.strings.is_empty() == self.ids.is_empty() {
            return None;
        }
        if let [Segment::Body { range, .. }] = self.strings.as_slice()
            && range.is_empty()
        {
            return None;
        }
        let texts = self
            .strings
            .into_iter()
            .map(|text| Prompt::Text(vec![text]));
        let tokens = self.ids.into_iter().map(|ids| Prompt::Tokens {
            ids,
            media: Vec::new(),
        });
        Some(texts.chain(tokens).collect())
    }
}

impl Messages {
    /// The string that is being read at `path` is the next text of the prompt: the role is known, and
    /// the content is a string or a text part.
    fn is_text(&self, path: &[Step]) -> bool {
        let [
            Step::Key(Key::Messages),
            Step::Index(_),
            Step::Key(Key::Content),
            part @ ..,
        ] = path
        else {
            return false;
        };
        let place = match part {
            [] => self.content.is_empty(),
            [Step::Index(_), Step::Key(Key::Text)] => true,
            _ => false,
        };
        place && self.role.is_some()
    }

    fn visit(&mut self, path: &[Step], event: &Event<'_>, body: &Body) {
        match path {
            [] if *event == Event::ArrayStart => *self = Self::default(),
            [Step::Index(_)] => match event {
                Event::ObjectStart => self.count += 1,
                Event::End(_) => {
                    // Role first, whatever the order of the keys.
                    self.segments.extend(self.role.take());
                    self.segments.append(&mut self.content);
                }
                _ => {}
            },
            [Step::Index(_), Step::Key(Key::Role)] => {
                self.role = text_of(event).map(|t| t.segment());
            }
            [Step::Index(_), Step::Key(Key::Content)] => match text_of(event) {
                Some(text) => self.content = vec![text.segment()],
                None if *event == Event::ArrayStart => self.content.clear(),
                None => {}
            },
            [
                Step::Index(_),
                Step::Key(Key::Content),
                Step::Index(_),
                block @ ..,
            ] => {
                if let [Step::Key(Key::InputAudio), rest @ ..] = block {
                    let clip = self.audio.visit(rest, event, body);
                    self.content
                        .extend(clip.map(|(_, item)| Segment::Media(item)));
                    return;
                }
                let Some(text) = text_of(event) else { return };
                self.content.push(match block {
                    [Step::Key(Key::Text)] => text.segment(),
                    [Step::Key(Key::ImageUrl)]
                    | [Step::Key(Key::ImageUrl), Step::Key(Key::Url)] => {
                        Segment::Media(image_url(&text, body))
                    }
                    [Step::Key(Key::VideoUrl), Step::Key(Key::Url)] => {
                        Segment::Media(video_url(&text, body))
                    }
                    _ => return,
                });
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::Extent;
    use super::super::text::Piece;
    use super::super::text::for_each_piece;
    use super::*;

    fn parse(path: &str, body: &str) -> Result<Payload, String> {
        OpenAiParser
            .parse(path, &Body::from(body))
            .map_err(|e| e.to_string())
    }

    fn text(payload: &Payload, body: &str) -> String {
        let mut out = Vec::new();
        for prompt in &payload.prompts {
            let Prompt::Text(segments) = prompt else {
                panic!("token prompt")
            };
            for_each_piece(segments, &Body::from(body), &mut |piece| match piece {
                Piece::Text(bytes) => out.extend_from_slice(bytes),
                Piece::Media(item) => {
                    out.extend_from_slice(format!("<{}>", item.modality).as_bytes());
                }
            });
            out.push(b'|');
        }
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn log_probabilities_of_the_prompt_are_noticed() {
        // vLLM: `to_sampling_params` of both requests.
        for (path, fields, expected) in [
            ("/v1/completions", r#""prompt_logprobs":0"#, true),
            ("/v1/completions", r#""prompt_logprobs":null"#, false),
            ("/v1/completions", r#""echo":true,"logprobs":1"#, true),
            ("/v1/completions", r#""echo":true"#, false),
            ("/v1/completions", r#""logprobs":1"#, false),
            ("/v1/chat/completions", r#""prompt_logprobs":1"#, true),
            (
                "/v1/chat/completions",
                r#""echo":true,"logprobs":true"#,
                false,
            ),
            (
                "/v1/chat/completions",
                r#""echo":true,"top_logprobs":2"#,
                true,
            ),
        ] {
            let body = format!(r#"{{"prompt":"p","messages":[{{"role":"user"}}],{fields}}}"#);
            let payload = parse(path, &body).unwrap();
            assert_eq!(payload.scores_prompt, expected, "{path} {fields}");
        }
    }

    #[test]
    fn chat_counts_tools_then_role_and_text_of_each_message() {
        let body = r#"{"model":"m","messages":[{"content":"a\n","role":"system"},{"role":"user","content":[{"type":"text","text":"b"},{"type":"image_url","image_url":{"url":"http://x"}},{"type":"input_audio","input_audio":{"data":"zz","format":"wav"}}]}, {"role":"assistant","content":null}],"tools":[{"type":"function"}],"stream":true,"max_tokens":5,"max_completion_tokens":7,"cache_salt":"s"}"#;
        let payload = parse("/v1/chat/completions", body).unwrap();
        assert_eq!(
            text(&payload, body),
            "[{\"type\":\"function\"}]systema\nuserb<image><audio>assistant|"
        );
        assert_eq!(payload.model.as_ref().unwrap().name, "m");
        assert!(payload.stream && payload.rewritable);
        assert_eq!(payload.max_output_tokens, Some(7));
        assert_eq!(payload.cache_salt.as_deref(), Some("s"));
    }

    /// The media of the only prompt, with their extents.
    fn media(payload: &Payload) -> Vec<(&'static str, Extent)> {
        let Prompt::Text(segments) = &payload.prompts[0] else {
            panic!("token prompt")
        };
        let items = segments.iter().filter_map(|segment| match segment {
            Segment::Media(item) => Some((item.modality, item.extent)),
            Segment::Body { .. } => None,
        });
        items.collect()
    }

    /// The header of a 64 x 64 PNG.
    const PNG: &str = "iVBORw0KGgoAAAANSUhEUgAAAEAAAABACAIAAAAlC+aJ";

    #[test]
    fn chat_media_tell_what_they_can() {
        let body = format!(
            r#"{{"messages":[{{"role":"user","content":[
                {{"type":"image_url","image_url":{{"url":"data:image/png;base64,{PNG}","detail":"low"}}}},
                {{"type":"image_url","image_url":"http://x/i.png"}},
                {{"type":"video_url","video_url":{{"url":"http://x/v.mp4"}}}},
                {{"type":"input_audio","input_audio":{{"format":"mp3","data":"abcd"}}}},
                {{"type":"input_audio","input_audio":{{"format":"mp3"}}}},
                {{"type":"input_audio","input_audio":{{"data":"abcd"}}}}]}}]}}"#
        );
        let payload = parse("/v1/chat/completions", &body).unwrap();
        let pixels = Extent::Pixels {
            width: 64,
            height: 64,
        };
        assert_eq!(
            media(&payload),
            [
                ("image", pixels),
                ("image", Extent::Unknown),
                ("video", Extent::Unknown),
                ("audio", Extent::Bytes(7)),
                ("audio", Extent::Bytes(4)),
            ]
        );
    }

    #[test]
    fn media_of_responses_stand_in_the_raw_input() {
        let body = format!(
            r#"{{"input":[{{"role":"user","content":[{{"type":"input_text","text":"a"}},{{"type":"input_image","image_url":"data:image/png;base64,{PNG}"}},{{"type":"input_audio","input_audio":{{"data":"AA","format":"wav"}}}}]}}]}}"#
        );
        let payload = parse("/v1/responses", &body).unwrap();
        assert_eq!(
            text(&payload, &body),
            r#"[{"role":"user","content":[{"type":"input_text","text":"a"},{"type":"input_image","image_url":"<image>"},{"type":"input_audio","input_audio":{"data":"<audio>","format":"wav"}}]}]|"#
        );
        let pixels = Extent::Pixels {
            width: 64,
            height: 64,
        };
        assert_eq!(
            media(&payload),
            [("image", pixels), ("audio", Extent::Bytes(5))]
        );
        let body =
            r#"{"items":[{"type":"message","content":[{"type":"input_image","image_url":"u"}]}]}"#;
        let payload = parse("/v1/conversations", body).unwrap();
        assert_eq!(media(&payload), [("image", Extent::Unknown)]);
    }

    #[test]
    fn media_of_an_input_that_was_replaced_do_not_count() {
        let body = r#"{"input":[{"image_url":"u"}],"input":"x"}"#;
        let payload = parse("/v1/responses", body).unwrap();
        assert_eq!(text(&payload, body), "\"x\"|");
    }

    #[test]
    fn a_limit_counts_only_as_a_non_negative_whole_number() {
        let limit = |fields: &str| {
            parse(
                "/v1/chat/completions",
                &format!(r#"{{"messages":[{{}}],{fields}}}"#),
            )
            .unwrap()
            .max_output_tokens
        };
        assert_eq!(
            limit(r#""max_completion_tokens":-1,"max_tokens":5"#),
            Some(5)
        );
        assert_eq!(
            limit(r#""max_completion_tokens":1.5,"max_tokens":6.0"#),
            Some(6)
        );
        assert_eq!(limit(r#""max_completion_tokens":"7""#), None);
    }

    #[test]
    fn completions_take_text_lists_and_token_ids() {
        let prompts = |prompt: &str| {
            parse("/v1/completions", &format!(r#"{{"prompt":{prompt}}}"#))
                .unwrap()
                .prompts
        };
        let ids = |list: &[u32]| Prompt::Tokens {
            ids: list.to_vec(),
            media: Vec::new(),
        };
        assert_eq!(prompts(r#""abc""#).len(), 1);
        assert_eq!(prompts(r#"["a","b"]"#).len(), 2);
        assert_eq!(prompts("[1,2,4294967295]"), [ids(&[1, 2, u32::MAX])]);
        assert_eq!(prompts("[[1],[2,3]]"), [ids(&[1]), ids(&[2, 3])]);
    }

    #[test]
    fn missing_or_mixed_prompts_are_refused_with_the_contracts_text() {
        for (path, bodies, text) in [
            (
                "/v1/chat/completions",
                &[
                    r"{}",
                    r#"{"messages":[]}"#,
                    r#"{"messages":"x"}"#,
                    r#"{"messages":[1]}"#,
                ][..],
                "invalid chat completions request: must have valid messages field",
            ),
            (
                "/v1/completions",
                &[
                    r"{}",
                    r#"{"prompt":""}"#,
                    r#"{"prompt":[]}"#,
                    r#"{"prompt":["a",1]}"#,
                    r#"{"prompt":[1,[2]]}"#,
                    r#"{"prompt":[-1]}"#,
                    r#"{"prompt":[4294967296]}"#,
                    r#"{"prompt":{}}"#,
                    r#"{"prompt":null}"#,
                    r#"{"prompt":[[]]}"#,
                ],
                "invalid completions request: must have prompt field",
            ),
            (
                "/v1/embeddings",
                &[r#"{"input":null}"#],
                "invalid embeddings request: must have input field",
            ),
            (
                "/v1/responses",
                &[r#"{"input":null}"#, "{}"],
                "invalid responses request: must have input field",
            ),
            (
                "/v1/conversations",
                &[r#"{"items":[]}"#],
                "invalid conversations request: must have items field",
            ),
            (
                "/v1/images/generations",
                &["{}"],
                "invalid images generations request: must have prompt field",
            ),
        ] {
            for body in bodies {
                assert_eq!(parse(path, body).unwrap_err(), text, "{path} {body}");
            }
        }
    }

    #[test]
    fn malformed_json_names_the_place() {
        let error = parse("/v1/completions", r#"{"prompt":tru}"#).unwrap_err();
        assert_eq!(
            error,
            "error unmarshaling request bodyMap: invalid literal before offset 13"
        );
        assert!(
            parse("/v1/completions", "")
                .unwrap_err()
                .starts_with("error unmarshaling request bodyMap: ")
        );
        assert!(parse("/v1/completions", "[1]").is_err());
    }

    #[test]
    fn the_last_of_duplicate_keys_counts() {
        let body = r#"{"prompt":[1,2],"prompt":"ab","model":"x","model":"y"}"#;
        let payload = parse("/v1/completions", body).unwrap();
        assert_eq!(text(&payload, body), "ab|");
        assert_eq!(payload.model.unwrap().name, "y");
    }

    #[test]
    fn responses_count_instructions_tools_and_input() {
        let body = r#"{"input":[{"a":1}],"tools":[2],"instructions":"do","max_output_tokens":9}"#;
        let payload = parse("/v1/responses", body).unwrap();
        assert_eq!(text(&payload, body), r#"do[2][{"a":1}]|"#);
        assert_eq!(payload.max_output_tokens, Some(9));
        let body = r#"{"input":"hi"}"#;
        assert_eq!(
            text(&parse("/v1/responses", body).unwrap(), body),
            "\"hi\"|"
        );
    }

    #[test]
    fn render_and_unknown_paths_follow_their_family() {
        assert_eq!(
            api_of("/v1/chat/completions/render"),
            ApiKind::ChatCompletions
        );
        assert_eq!(api_of("/v1/completions/render"), ApiKind::Completions);
        assert_eq!(api_of("/x"), ApiKind::Completions);
    }
}
