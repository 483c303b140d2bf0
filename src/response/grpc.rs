//! Usage out of gRPC responses. Messages are scanned as they pass, whatever the pieces they arrive in;
//! none is buffered, so their length does not matter.

use std::ops::Range;

use super::report::Report;
use super::usage::{Dialect, TextUsage, Usage};
use crate::request::grpc::{FRAME_HEADER_BYTES, read_header};
use crate::request::protobuf::{Content, Scanner, Visitor};

/// Receives the fields of each message, and its end.
trait MessageReader: Visitor {
    /// The message ended. `intact` is false when it could not be read to its end.
    fn on_end(&mut self, intact: bool);
}

/// Cuts a body into messages. A compressed or damaged message is skipped by its length.
#[derive(Debug, Default)]
struct Frames {
    header: [u8; FRAME_HEADER_BYTES],
    /// Bytes of `header` that were received.
    filled: usize,
    /// Bytes of the message still to come.
    left: usize,
    /// `None` for a message that cannot be read.
    scanner: Option<Scanner>,
}

impl Frames {
    fn push(&mut self, piece: &[u8], reader: &mut impl MessageReader) {
        let mut rest = piece;
        while !rest.is_empty() {
            if self.filled < FRAME_HEADER_BYTES {
                self.header(&mut rest);
            } else {
                let (part, tail) = rest.split_at(self.left.min(rest.len()));
                self.message(part, reader);
                rest = tail;
            }
            if self.filled == FRAME_HEADER_BYTES && self.left == 0 {
                self.filled = 0;
                let scanner = self.scanner.take();
                reader.on_end(scanner.is_some_and(|s| s.finish().is_ok()));
            }
        }
    }

    fn header(&mut self, rest: &mut &[u8]) {
        for (slot, byte) in self.header.iter_mut().skip(self.filled).zip(rest.iter()) {
            *slot = *byte;
        }
        let taken = (FRAME_HEADER_BYTES - self.filled).min(rest.len());
        *rest = rest.get(taken..).unwrap_or_default();
        self.filled += taken;
        if self.filled == FRAME_HEADER_BYTES {
            let (flag, length) = read_header(self.header);
            self.left = length;
            self.scanner = (flag == 0).then(|| Scanner::new(0..length));
        }
    }

    fn message(&mut self, part: &[u8], reader: &mut impl MessageReader) {
        self.left -= part.len();
        if let Some(scanner) = &mut self.scanner
            && scanner.feed(part, reader).is_err()
        {
            self.scanner = None;
        }
    }
}

/// A method of vLLM's engine service.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Method {
    /// `GenerateResponse`: `chunk` = 1 {`prompt_tokens` = 2, `completion_tokens` = 3, `cached_tokens`
    /// = 4} or `complete` = 2 {the same = 3, 4, 5}.
    Generate,
    /// `EmbedResponse`: `prompt_tokens` = 2.
    Embed,
}

/// Usage in the messages of vLLM's engine service.
#[derive(Debug)]
pub(super) struct VllmUsage {
    method: Method,
    frames: Frames,
    counts: Counts,
}

/// Counts of the message that is passing.
#[derive(Debug, Default)]
struct Counts {
    /// The member of `response` they belong to.
    member: u32,
    prompt: u64,
    completion: u64,
    cached: u64,
}

impl VllmUsage {
    /// For the responses of `method`.
    pub(super) fn new(method: Method) -> Self {
        Self {
            method,
            frames: Frames::default(),
            counts: Counts::default(),
        }
    }

    /// Looks at one piece of the body.
    pub(super) fn push(&mut self, piece: &[u8], usage: &mut Option<Usage>) {
        let mut reader = CountReader {
            method: self.method,
            counts: &mut self.counts,
            usage,
        };
        self.frames.push(piece, &mut reader);
    }
}

struct CountReader<'a> {
    method: Method,
    counts: &'a mut Counts,
    usage: &'a mut Option<Usage>,
}

impl Visitor for CountReader<'_> {
    fn begin(&mut self, path: &[u32], _: Range<usize>) -> Content {
        match (self.method, path) {
            (Method::Generate, [member @ (1 | 2)]) => {
                // Of two members the last counts; two of the same are one message.
                if self.counts.member != *member {
                    *self.counts = Counts::default();
                    self.counts.member = *member;
                }
                Content::Message
            }
            _ => Content::Skip,
        }
    }

    fn varint(&mut self, path: &[u32], value: u64) {
        // All are uint32 fields.
        let value = value & u64::from(u32::MAX);
        match (self.method, path) {
            (Method::Generate, [1, 2] | [2, 3]) | (Method::Embed, [2]) => {
                self.counts.prompt = value;
            }
            (Method::Generate, [1, 3] | [2, 4]) => self.counts.completion = value,
            (Method::Generate, [1, 4] | [2, 5]) => self.counts.cached = value,
            _ => {}
        }
    }
}

impl MessageReader for CountReader<'_> {
    fn on_end(&mut self, intact: bool) {
        let counts = std::mem::take(self.counts);
        if !intact || (counts.prompt == 0 && counts.completion == 0) {
            return;
        }
        let cached = match self.method {
            Method::Embed => None,
            // Zero is not written; it does not undo what an earlier message said.
            Method::Generate if counts.cached == 0 => {
                Some(self.usage.and_then(|u| u.cached_tokens).unwrap_or(0))
            }
            Method::Generate => Some(counts.cached),
        };
        let report = Report::of_counts(counts.prompt, counts.completion, cached);
        report.merge_into(self.usage);
    }
}

/// Usage in an OpenAI body that lies in the `data` = 2 of `google.api.HttpBody` messages. The messages
/// cut the body anywhere.
#[derive(Debug, Default)]
pub(super) struct WrappedUsage {
    frames: Frames,
    /// `None` before the first byte that is no white space.
    text: Option<TextUsage>,
}

impl WrappedUsage {
    /// Looks at one piece of the response.
    pub(super) fn push(&mut self, piece: &[u8], usage: &mut Option<Usage>) {
        let mut reader = DataReader {
            text: &mut self.text,
            usage,
        };
        self.frames.push(piece, &mut reader);
    }

    /// The response ended.
    pub(super) fn finish(&mut self, usage: &mut Option<Usage>) {
        if let Some(text) = &mut self.text {
            text.finish(usage);
        }
    }
}

struct DataReader<'a> {
    text: &'a mut Option<TextUsage>,
    usage: &'a mut Option<Usage>,
}

impl Visitor for DataReader<'_> {
    fn begin(&mut self, path: &[u32], _: Range<usize>) -> Content {
        if path == [2] {
            Content::Bytes
        } else {
            Content::Skip
        }
    }

    fn varint(&mut self, _: &[u32], _: u64) {}

    fn bytes(&mut self, _: &[u32], part: &[u8]) {
        if self.text.is_none() {
            // The content type may be missing; no event stream begins with a bracket.
            let first = part.trim_ascii_start().first();
            *self.text = first.map(|first| {
                let streaming = !matches!(first, b'{' | b'[');
                TextUsage::new(Dialect::OpenAi, streaming)
            });
        }
        if let Some(text) = self.text {
            text.push(part, self.usage);
        }
    }
}

impl MessageReader for DataReader<'_> {
    fn on_end(&mut self, _: bool) {}
}

#[cfg(test)]
mod tests {
    use super::super::usage::{ResponseReader, UsageFormat};
    use super::*;
    use crate::request::grpc::proto::{frame, vertex_ai, vllm};
    use bytes::Bytes;
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

    fn generate(body: &[u8]) -> Option<Usage> {
        read(UsageFormat::VllmGenerate, true, &[body])
    }

    /// `data` in `HttpBody` messages of `length` bytes each.
    fn wrapped(data: &[u8], length: usize) -> Vec<u8> {
        let messages = data.chunks(length).map(|part| {
            frame(&vertex_ai::HttpBody {
                content_type: "text/plain".to_owned(),
                data: Bytes::copy_from_slice(part),
            })
        });
        messages.collect::<Vec<_>>().concat()
    }

    #[test]
    fn the_final_message_of_a_stream_has_all_counts() {
        let body = [
            &[0, 0, 0, 0, 12][..],                 // flag 0, 12 bytes
            &[0x0a, 0x0a],                         // chunk = 1, 10 bytes
            &[0x0a, 0x02, 0x07, 0x08],             // token_ids = 1: [7, 8]
            &[0x10, 0x0b],                         // prompt_tokens = 2: 11
            &[0x18, 0x02],                         // completion_tokens = 3: 2
            &[0x20, 0x04],                         // cached_tokens = 4: 4
            &[0, 0, 0, 0, 4],                      // flag 0, 4 bytes
            &[0x0a, 0x02, 0x38, 0x01],             // chunk = 1 {index = 7: 1}: no counts
            &[0, 0, 0, 0, 0],                      // an empty message
            &[0, 0, 0, 0, 12],                     // flag 0, 12 bytes
            &[0x12, 0x0a],                         // complete = 2, 10 bytes
            &[0x12, 0x04, b's', b't', b'o', b'p'], // finish_reason = 2
            &[0x18, 0x0b],                         // prompt_tokens = 3: 11
            &[0x20, 0x09],                         // completion_tokens = 4: 9, cached_tokens absent
        ]
        .concat();
        let wanted = Usage {
            prompt_tokens: 11,
            completion_tokens: 9,
            total_tokens: 20,
            cached_tokens: Some(4),
        };
        assert_eq!(generate(&body), Some(wanted));
    }

    #[test]
    fn a_message_without_counts_is_no_usage() {
        // chunk = 1 {token_ids = 1: [4]}.
        assert_eq!(
            generate(&[0, 0, 0, 0, 5, 0x0a, 0x03, 0x0a, 0x01, 0x04]),
            None
        );
        assert_eq!(generate(&[]), None);
    }

    #[test]
    fn the_last_member_of_a_message_counts() {
        // chunk = 1 {prompt_tokens = 2: 5, cached_tokens = 4: 5}, complete = 2 {prompt_tokens = 3: 6}.
        let body = [
            0, 0, 0, 0, 10, 0x0a, 0x04, 0x10, 0x05, 0x20, 0x05, 0x12, 0x02, 0x18, 0x06,
        ];
        let usage = generate(&body).unwrap();
        assert_eq!((usage.prompt_tokens, usage.cached_tokens), (6, Some(0)));
    }

    #[test]
    fn embed_counts_the_prompt() {
        let body = [
            &[0, 0, 0, 0, 14][..],
            &[0x0a, 0x08, 0, 0, 0x80, 0x3f, 0, 0, 0, 0x40], // embedding = 1: [1.0, 2.0]
            &[0x10, 0x0a],                                  // prompt_tokens = 2: 10
            &[0x18, 0x02],                                  // embedding_dim = 3: 2
        ]
        .concat();
        let usage = read(UsageFormat::VllmEmbed, false, &[&body]).unwrap();
        assert_eq!(
            usage,
            Usage {
                prompt_tokens: 10,
                completion_tokens: 0,
                total_tokens: 10,
                cached_tokens: None
            }
        );
    }

    #[test]
    fn compressed_and_damaged_messages_are_skipped() {
        let good = frame(&vllm::EmbedResponse {
            embedding: Vec::new(),
            prompt_tokens: 3,
            embedding_dim: 0,
        });
        let compressed = [1, 0, 0, 0, 2, 0x10, 0x63];
        // prompt_tokens = 2: 99, then a tag that does not exist.
        let damaged = [0, 0, 0, 0, 4, 0x10, 0x63, 0x07, 0x00];
        // prompt_tokens = 2: 99, then a tag without a value.
        let cut = [0, 0, 0, 0, 3, 0x10, 0x63, 0x18];
        let body = [&good[..], &compressed, &damaged, &cut].concat();
        let usage = read(UsageFormat::VllmEmbed, false, &[&body]).unwrap();
        assert_eq!(usage.prompt_tokens, 3);
        let body = [&compressed[..], &damaged, &cut, &good].concat();
        let usage = read(UsageFormat::VllmEmbed, false, &[&body]).unwrap();
        assert_eq!(usage.prompt_tokens, 3);
    }

    #[test]
    fn a_long_message_passes_without_being_kept() {
        // embedding = 1 of 2^30 bytes: 0x80808004 is 4 << 28 as a varint of five bytes.
        let length: u32 = 1 << 30;
        let mut reader = VllmUsage::new(Method::Embed);
        let mut usage = None;
        let head = [0x0a, 0x80, 0x80, 0x80, 0x80, 0x04];
        reader.push(
            &[&[0][..], &(length + 8).to_be_bytes(), &head].concat(),
            &mut usage,
        );
        let zeros = vec![0; 1 << 20];
        for _ in 0..1 << 10 {
            reader.push(&zeros, &mut usage);
        }
        reader.push(&[0x10, 0x07], &mut usage);
        assert_eq!(usage.unwrap().prompt_tokens, 7);
    }

    #[test]
    fn wrapped_bodies_are_read_as_json_or_event_stream() {
        for (data, streaming) in [(JSON, false), (STREAM, true)] {
            let wanted = read(UsageFormat::OpenAi, streaming, &[data]);
            assert!(wanted.is_some());
            for length in [7, 1000, data.len()] {
                let body = wrapped(data, length);
                assert_eq!(read(UsageFormat::VertexAi, streaming, &[&body]), wanted);
            }
        }
        // White space in front, and one JSON object per message: the last usage counts.
        let first = wrapped(b" \n", 2);
        let second = wrapped(br#"{"usage":{"prompt_tokens":1}}"#, 100);
        let third = wrapped(
            br#"{"usage":{"prompt_tokens":1,"completion_tokens":2}}"#,
            100,
        );
        let body = [first, second, third].concat();
        let usage = read(UsageFormat::VertexAi, true, &[&body]).unwrap();
        assert_eq!((usage.prompt_tokens, usage.completion_tokens), (1, 2));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(100))]

        #[test]
        fn any_split_reads_the_same(
            counts in prop::collection::vec((1..u32::MAX, any::<u32>(), any::<u32>()), 1..4),
            length in 1..400_usize,
            cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..12),
        ) {
            let complete = |&(prompt_tokens, completion_tokens, cached_tokens): &(u32, u32, u32)| {
                let complete = vllm::GenerateComplete {
                    output_ids: vec![1, 2, 300],
                    finish_reason: "stop".to_owned(),
                    prompt_tokens,
                    completion_tokens,
                    cached_tokens,
                };
                let response = vllm::generate_response::Response::Complete(complete);
                frame(&vllm::GenerateResponse { response: Some(response) })
            };
            let messages: Vec<_> = counts.iter().map(complete).collect();
            for (format, body) in [
                (UsageFormat::VllmGenerate, messages.concat()),
                (UsageFormat::VertexAi, wrapped(STREAM, length)),
                (UsageFormat::VertexAi, wrapped(JSON, length)),
            ] {
                let mut at: Vec<usize> = cuts.iter().map(|c| c.index(body.len())).collect();
                at.extend([0, body.len()]);
                at.sort_unstable();
                let pieces: Vec<&[u8]> = at.windows(2).map(|w| &body[w[0]..w[1]]).collect();
                let whole = read(format, true, &[&body]);
                prop_assert!(whole.is_some());
                prop_assert_eq!(read(format, true, &pieces), whole);
                if format == UsageFormat::VllmGenerate {
                    // Non-zero counts overwrite; the prompt is never zero here.
                    let last = counts.last().unwrap().0;
                    prop_assert_eq!(whole.unwrap().prompt_tokens, u64::from(last));
                }
            }
        }
    }
}
