//! Token usage out of response bodies, at a cost per piece that is a byte search.

use memchr::memmem;

use super::grpc::{Method, VllmUsage, WrappedUsage};
use super::report::{Object, Report};
use super::sse::Lines;

/// Bytes kept of the end of a non-streaming body: engines write `usage` behind the choices. What leaves
/// is searched once, so a report that kilobytes of other fields follow is found unless it is longer.
const TAIL_BYTES: usize = 16 * 1024;
/// Places that are tried at a time.
const MAX_GUESSES: usize = 8;

/// How an API writes usage.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UsageFormat {
    /// `usage` at the top level, or in the `response` of a `response.completed` event.
    OpenAi,
    /// `usage`, `message_start.message.usage`, `message_delta.usage`.
    Anthropic,
    /// `meta_info`, in a stream only once `finish_reason` is set.
    Sglang,
    /// Counts in the gRPC messages of vLLM's `Generate`.
    VllmGenerate,
    /// Counts in the gRPC message of vLLM's `Embed`.
    VllmEmbed,
    /// An OpenAI body, JSON or event stream, in gRPC messages.
    VertexAi,
}

/// Token counts of one response.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// Prompt tokens.
    pub prompt_tokens: u64,
    /// Generated tokens.
    pub completion_tokens: u64,
    /// As reported with both others, else their sum.
    pub total_tokens: u64,
    /// Prompt tokens found in the cache; `None` when the engine did not say.
    pub cached_tokens: Option<u64>,
    /// There was an object of prompt token details, whatever was in it.
    pub has_details: bool,
}

impl Usage {
    /// As the reference counts: details without a number are 0.
    pub fn cached_or_zero(&self) -> Option<u64> {
        self.cached_tokens.or(self.has_details.then_some(0))
    }
}

/// Reads the usage of one response while it passes.
#[derive(Debug)]
pub struct ResponseReader {
    source: Source,
    usage: Option<Usage>,
}

#[derive(Debug)]
enum Source {
    Text(TextUsage),
    Vllm(VllmUsage),
    Wrapped(WrappedUsage),
}

impl ResponseReader {
    /// A reader for `format`; `streaming` when the body is an event stream.
    pub fn new(format: UsageFormat, streaming: bool) -> Self {
        let text = |dialect| Source::Text(TextUsage::new(dialect, streaming));
        let source = match format {
            UsageFormat::OpenAi => text(Dialect::OpenAi),
            UsageFormat::Anthropic => text(Dialect::Anthropic),
            UsageFormat::Sglang => text(Dialect::Sglang),
            UsageFormat::VllmGenerate => Source::Vllm(VllmUsage::new(Method::Generate)),
            UsageFormat::VllmEmbed => Source::Vllm(VllmUsage::new(Method::Embed)),
            UsageFormat::VertexAi => Source::Wrapped(WrappedUsage::default()),
        };
        Self {
            source,
            usage: None,
        }
    }

    /// Looks at one piece of the body.
    pub fn on_chunk(&mut self, piece: &[u8]) {
        let Self { source, usage } = self;
        match source {
            Source::Text(text) => text.push(piece, usage),
            Source::Vllm(messages) => messages.push(piece, usage),
            Source::Wrapped(messages) => messages.push(piece, usage),
        }
    }

    /// The usage, once the body ended.
    pub fn finish(&mut self) -> Option<Usage> {
        let Self { source, usage } = self;
        match source {
            Source::Text(text) => text.finish(usage),
            Source::Vllm(_) => {}
            Source::Wrapped(messages) => messages.finish(usage),
        }
        *usage
    }
}

/// How a text body writes usage.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Dialect {
    /// As [`UsageFormat::OpenAi`].
    OpenAi,
    /// As [`UsageFormat::Anthropic`].
    Anthropic,
    /// As [`UsageFormat::Sglang`].
    Sglang,
}

/// Reads usage out of JSON or an event stream.
#[derive(Debug)]
pub(super) struct TextUsage {
    dialect: Dialect,
    text: Text,
}

#[derive(Debug)]
enum Text {
    Stream(Lines),
    Tail(Tail),
}

/// The end of a body, and the last report before it.
#[derive(Debug, Default)]
struct Tail {
    bytes: Vec<u8>,
    earlier: Option<Report>,
}

impl TextUsage {
    /// `streaming` when the text is an event stream.
    pub(super) fn new(dialect: Dialect, streaming: bool) -> Self {
        let text = if streaming {
            Text::Stream(Lines::default())
        } else {
            Text::Tail(Tail::default())
        };
        Self { dialect, text }
    }

    /// Looks at one piece of the text.
    pub(super) fn push(&mut self, piece: &[u8], usage: &mut Option<Usage>) {
        let Self { dialect, text } = self;
        match text {
            Text::Stream(lines) => lines.push(piece, dialect.marker(), &mut |line| {
                dialect.read_line(line, usage);
            }),
            Text::Tail(tail) => tail.push(piece, dialect.marker()),
        }
    }

    /// The text ended.
    pub(super) fn finish(&mut self, usage: &mut Option<Usage>) {
        let Self { dialect, text } = self;
        match text {
            Text::Stream(lines) => lines.finish(&mut |line| dialect.read_line(line, usage)),
            Text::Tail(tail) => {
                if let Some(report) = tail.finish(dialect.marker()) {
                    report.merge_into(usage);
                }
            }
        }
    }
}

impl Tail {
    fn push(&mut self, piece: &[u8], marker: &[u8]) {
        for part in piece.chunks(TAIL_BYTES) {
            self.bytes.extend_from_slice(part);
            // Shift only when the buffer is twice the bound, so that small pieces cost what they copy.
            if self.bytes.len() > 2 * TAIL_BYTES {
                let excess = self.bytes.len() - TAIL_BYTES;
                self.earlier = last_report(&self.bytes, excess, marker).or(self.earlier.take());
                self.bytes.drain(..excess);
            }
        }
    }

    fn finish(&mut self, marker: &[u8]) -> Option<Report> {
        last_report(&self.bytes, self.bytes.len(), marker).or(self.earlier.take())
    }
}

/// The last report in `text` whose key begins before `end`. A quoted `"usage"` inside text has a
/// backslash before its closing quote and does not match; a text or key of that name may.
fn last_report(text: &[u8], end: usize, marker: &[u8]) -> Option<Report> {
    let mut end = text.len().min(end + marker.len() - 1);
    // Searching forward is several times faster, and most often there is nothing.
    memmem::find(text.get(..end)?, marker)?;
    for _ in 0..MAX_GUESSES {
        let at = memmem::rfind(text.get(..end)?, marker)?;
        let report = report_behind(text.get(at + marker.len()..)?);
        if report.is_some() {
            return report;
        }
        end = at;
    }
    None
}

impl Dialect {
    /// What a line or body with usage contains.
    fn marker(self) -> &'static [u8] {
        match self {
            Self::OpenAi | Self::Anthropic => b"\"usage\"",
            Self::Sglang => b"\"meta_info\"",
        }
    }

    /// One line of an event stream. What cannot be read is skipped: the response is not ours.
    fn read_line(self, line: &[u8], usage: &mut Option<Usage>) {
        let Some(data) = line.strip_prefix(b"data:") else {
            return;
        };
        if memmem::find(data, self.marker()).is_none() {
            return;
        }
        let Ok(event) = serde_json::from_slice::<Report>(data) else {
            return;
        };
        let report = match self {
            Self::OpenAi => event.usage.or_else(|| event.response?.usage),
            Self::Anthropic => event.usage.or_else(|| event.message?.usage),
            Self::Sglang => event.meta_info.filter(|info| info.finished),
        };
        if let Some(report) = report {
            report.merge_into(usage);
        }
    }
}

/// The report that is the value of the key before `rest`.
fn report_behind(rest: &[u8]) -> Option<Report> {
    let value = rest.trim_ascii_start().strip_prefix(b":")?;
    let mut values = serde_json::Deserializer::from_slice(value).into_iter();
    values.next()?.ok().and_then(|Object(report)| report)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const STREAM: &[u8] = include_bytes!("../../tests/data/vllm-0.32/http/chat-stream-usage.body");
    const JSON: &[u8] = include_bytes!("../../tests/data/vllm-0.32/http/chat-cached.body");

    fn read(format: UsageFormat, streaming: bool, pieces: &[&[u8]]) -> Option<Usage> {
        let mut reader = ResponseReader::new(format, streaming);
        for piece in pieces {
            reader.on_chunk(piece);
        }
        reader.finish()
    }

    /// The recording's own usage, by a DOM reader.
    fn recorded(json: &[u8]) -> Usage {
        let value: serde_json::Value = serde_json::from_slice(json).unwrap();
        let usage = &value["usage"];
        Usage {
            prompt_tokens: usage["prompt_tokens"].as_u64().unwrap(),
            completion_tokens: usage["completion_tokens"].as_u64().unwrap(),
            total_tokens: usage["total_tokens"].as_u64().unwrap(),
            cached_tokens: usage["prompt_tokens_details"]["cached_tokens"].as_u64(),
            has_details: usage["prompt_tokens_details"].is_object(),
        }
    }

    fn last_usage_line(stream: &[u8]) -> &[u8] {
        let mut lines = stream
            .split(|b| *b == b'\n')
            .filter(|l| memmem::find(l, b"\"usage\":{").is_some());
        lines
            .next_back()
            .and_then(|l| l.strip_prefix(b"data: "))
            .unwrap()
    }

    #[test]
    fn recorded_bodies_are_read() {
        assert_eq!(
            read(UsageFormat::OpenAi, false, &[JSON]),
            Some(recorded(JSON))
        );
        assert!(
            recorded(JSON).cached_tokens.unwrap() > 0,
            "the recording is a cache hit"
        );
        assert_eq!(
            read(UsageFormat::OpenAi, true, &[STREAM]),
            Some(recorded(last_usage_line(STREAM)))
        );
    }

    #[test]
    fn anthropic_usage_comes_in_two_events() {
        let stream = b"event: message_start\r\ndata: {\"type\":\"message_start\",\"message\":{\"usage\":{\"input_tokens\":11,\"cache_read_input_tokens\":4,\"output_tokens\":1}}}\r\n\r\ndata:{\"type\":\"message_delta\",\"usage\":{\"output_tokens\":\"9\"}}\r\n\r\n";
        let usage = read(UsageFormat::Anthropic, true, &[stream]).unwrap();
        // 11 + 9: the total is a sum, because no block reported all three.
        assert_eq!(
            usage,
            Usage {
                prompt_tokens: 11,
                completion_tokens: 9,
                total_tokens: 20,
                cached_tokens: Some(4),
                has_details: false,
            }
        );
    }

    #[test]
    fn responses_events_carry_usage_inside_response() {
        let line = b"data: {\"type\":\"response.completed\",\"response\":{\"usage\":{\"input_tokens\":3,\"output_tokens\":2,\"total_tokens\":5,\"input_tokens_details\":{\"cached_tokens\":1}}}}\n\n";
        let usage = read(UsageFormat::OpenAi, true, &[line]).unwrap();
        assert_eq!(
            usage,
            Usage {
                prompt_tokens: 3,
                completion_tokens: 2,
                total_tokens: 5,
                cached_tokens: Some(1),
                has_details: true,
            }
        );
    }

    #[test]
    fn no_number_of_cached_tokens_is_not_zero() {
        let cached = |format, usage: &str| {
            let body = format!(r#"{{"usage":{usage}}}"#);
            let usage = read(format, false, &[body.as_bytes()]).unwrap();
            (usage.cached_tokens, usage.cached_or_zero())
        };
        let openai = |details: &str| {
            let usage = format!(r#"{{"prompt_tokens":9,"completion_tokens":1{details}}}"#);
            cached(UsageFormat::OpenAi, &usage)
        };
        for (details, expected) in [
            ("", (None, None)),
            (r#","prompt_tokens_details":null"#, (None, None)),
            (r#","prompt_tokens_details":{}"#, (None, Some(0))),
            // vLLM: a prompt with media whose cached tokens nobody counted.
            (
                r#","prompt_tokens_details":{"cached_tokens":null,"multimodal_tokens":{"image":4}}"#,
                (None, Some(0)),
            ),
            (
                r#","prompt_tokens_details":{"cached_tokens":0}"#,
                (Some(0), Some(0)),
            ),
            (
                r#","input_tokens_details":{"cached_tokens":"3"}"#,
                (Some(3), Some(3)),
            ),
        ] {
            assert_eq!(openai(details), expected, "{details}");
        }
        let anthropic = |more: &str| {
            let usage = format!(r#"{{"input_tokens":9,"output_tokens":1{more}}}"#);
            cached(UsageFormat::Anthropic, &usage).0
        };
        assert_eq!(anthropic(""), None);
        assert_eq!(anthropic(r#","cache_read_input_tokens":null"#), None);
        assert_eq!(anthropic(r#","cache_read_input_tokens":0"#), Some(0));
    }

    /// All APIs of the recorded engine tell, a zero as well.
    #[test]
    fn the_recorded_engine_tells_what_it_found_in_every_api() {
        let http =
            std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/vllm-0.32/http");
        for (name, format, cached) in [
            ("chat-cold", UsageFormat::OpenAi, Some(0)),
            ("chat-cached", UsageFormat::OpenAi, Some(176)),
            ("chat-stream-usage", UsageFormat::OpenAi, Some(176)),
            ("chat-stream", UsageFormat::OpenAi, None),
            ("completion-cold", UsageFormat::OpenAi, Some(0)),
            ("completion-cached", UsageFormat::OpenAi, Some(128)),
            ("completion-stream-usage", UsageFormat::OpenAi, Some(128)),
            (
                "generate-token-in-token-out",
                UsageFormat::OpenAi,
                Some(112),
            ),
            ("messages", UsageFormat::Anthropic, Some(48)),
            ("messages-stream", UsageFormat::Anthropic, Some(48)),
            ("responses", UsageFormat::OpenAi, Some(48)),
            ("responses-stream", UsageFormat::OpenAi, Some(48)),
        ] {
            let body = std::fs::read(http.join(format!("{name}.body"))).unwrap();
            let usage = read(format, name.contains("stream"), &[&body]);
            assert_eq!(usage.and_then(|u| u.cached_tokens), cached, "{name}");
        }
    }

    #[test]
    fn sglang_usage_counts_once_finished() {
        let event = |reason: &str| {
            format!(
                "data: {{\"text\":\"x\",\"meta_info\":{{\"finish_reason\":{reason},\"prompt_tokens\":5,\"completion_tokens\":2,\"cached_tokens\":3}}}}\n\n"
            )
        };
        assert_eq!(
            read(UsageFormat::Sglang, true, &[event("null").as_bytes()]),
            None
        );
        let usage = read(
            UsageFormat::Sglang,
            true,
            &[event("{\"type\":\"stop\"}").as_bytes()],
        )
        .unwrap();
        assert_eq!(
            (
                usage.prompt_tokens,
                usage.completion_tokens,
                usage.cached_tokens
            ),
            (5, 2, Some(3))
        );
    }

    #[test]
    fn usage_is_read_as_loosely_as_engines_write_it() {
        for usage in [
            r#"{"prompt_tokens":11,"input_tokens":11,"completion_tokens":7,"output_tokens":7,"prompt_tokens_details":{"cached_tokens":3},"input_tokens_details":{"cached_tokens":3}}"#,
            r#"{"prompt_tokens":11.0,"completion_tokens":7.0,"prompt_tokens_details":{"cached_tokens":3.0}}"#,
            r#"{"prompt_tokens":"11","completion_tokens":" 7 ","prompt_tokens_details":{"cached_tokens":"3"}}"#,
            r#"{"prompt_tokens":1,"prompt_tokens":11,"completion_tokens":7,"cached_tokens":3,"prompt_tokens_details":"none","cost":[{"usage":1}]}"#,
        ] {
            let wanted = Some(Usage {
                prompt_tokens: 11,
                completion_tokens: 7,
                total_tokens: 18,
                cached_tokens: Some(3),
                has_details: usage.contains(r#"details":{"#),
            });
            // What stands around it has the same names, and other types.
            for body in [
                format!(r#"{{"usage":{usage}}}"#),
                format!(r#"{{"usage":{usage},"tokens":["usage","usage"],"x":{{"usage":null}}}}"#),
                format!(r#"{{"message":"m","response":["r"],"meta_info":5,"usage": {usage}}}"#),
            ] {
                let json = read(UsageFormat::OpenAi, false, &[body.as_bytes()]);
                assert_eq!(json, wanted, "{body}");
                let line = format!("data: {body}\n\n");
                let event = read(UsageFormat::OpenAi, true, &[line.as_bytes()]);
                assert_eq!(event, wanted, "{line}");
            }
        }
    }

    #[test]
    fn usage_quoted_in_text_is_not_usage() {
        let body = br#"{"choices":[{"text":"say \"usage\":{\"prompt_tokens\":9}"}]}"#;
        assert_eq!(read(UsageFormat::OpenAi, false, &[body]), None);
    }

    #[test]
    fn the_tail_of_a_long_body_is_enough_and_bounded() {
        let mut body = format!("{{\"text\":\"{}\",", "x".repeat(1 << 20)).into_bytes();
        body.extend_from_slice(
            br#""usage":{"prompt_tokens":1,"completion_tokens":2,"total_tokens":3}}"#,
        );
        let mut reader = ResponseReader::new(UsageFormat::OpenAi, false);
        for piece in body.chunks(1000) {
            reader.on_chunk(piece);
            let Source::Text(TextUsage {
                text: Text::Tail(tail),
                ..
            }) = &reader.source
            else {
                panic!("streaming")
            };
            assert!(tail.bytes.len() <= 2 * TAIL_BYTES);
        }
        assert_eq!(reader.finish().unwrap().total_tokens, 3);
    }

    #[test]
    fn usage_is_found_wherever_it_stands() {
        let usage = br#""usage":{"prompt_tokens":1,"completion_tokens":2,"total_tokens":3}"#;
        let text = |bytes: usize| format!(r#""x":"{}""#, "y".repeat(bytes)).into_bytes();
        for (before, behind) in [
            (0, 100_000),
            (50_000, 50_000),
            (20_000, 15_000),
            // The key straddles the end of what leaves first.
            (2 * TAIL_BYTES - 10, 3 * TAIL_BYTES),
        ] {
            let body = [
                b"{",
                &text(before)[..],
                b",",
                usage,
                b",",
                &text(behind),
                b"}",
            ]
            .concat();
            for size in [1, 777, TAIL_BYTES, 64 * 1024, body.len()] {
                let pieces: Vec<&[u8]> = body.chunks(size).collect();
                let found = read(UsageFormat::OpenAi, false, &pieces);
                assert_eq!(
                    found.map(|u| u.total_tokens),
                    Some(3),
                    "{before} {behind} {size}"
                );
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(100))]

        #[test]
        fn any_split_reads_the_same(cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..12), crlf in any::<bool>()) {
            let stream = if crlf { String::from_utf8(STREAM.to_vec()).unwrap().replace('\n', "\r\n").into_bytes() } else { STREAM.to_vec() };
            for (format, streaming, body) in [(UsageFormat::OpenAi, true, &stream[..]), (UsageFormat::OpenAi, false, JSON)] {
                let mut at: Vec<usize> = cuts.iter().map(|c| c.index(body.len())).collect();
                at.extend([0, body.len()]);
                at.sort_unstable();
                let pieces: Vec<&[u8]> = at.windows(2).map(|w| &body[w[0]..w[1]]).collect();
                prop_assert_eq!(read(format, streaming, &pieces), read(format, streaming, &[body]));
            }
        }

        #[test]
        fn garbage_never_panics(pieces in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..64), 0..6)) {
            let pieces: Vec<&[u8]> = pieces.iter().map(Vec::as_slice).collect();
            for format in [UsageFormat::OpenAi, UsageFormat::Anthropic, UsageFormat::Sglang, UsageFormat::VllmGenerate, UsageFormat::VllmEmbed, UsageFormat::VertexAi] {
                read(format, true, &pieces);
                read(format, false, &pieces);
            }
        }
    }
}
