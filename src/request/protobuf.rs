//! A resumable protobuf scanner: one forward pass over the pieces of one message, reporting the
//! fields a visitor asks for.
//!
//! It keeps no bytes: a field that is not asked for is skipped by its length, whatever piece it ends
//! in, so neither a prompt nor an embedding is copied or buffered. Unknown fields and groups pass.
//! UTF-8 in strings is left to the engine, which reads the same bytes after us.

use std::ops::Range;

use smallvec::SmallVec;

/// Groups that may be open at once. Only unknown fields are groups (proto3 has none), and protobuf
/// libraries refuse deeper nesting as well.
pub const MAX_GROUPS: usize = 100;
/// Bytes of the longest varint.
const MAX_VARINT_BYTES: u8 = 10;
/// First number that no field can have.
const FIELD_NUMBERS_END: u32 = 1 << 29;

/// How to read a length-delimited field.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content {
    /// A message: its fields are reported below it.
    Message,
    /// A packed list: its elements are reported as varints of the field.
    Varints,
    /// Its bytes are handed on as they pass.
    Bytes,
    /// Not looked at.
    Skip,
}

/// Receives fields with their path: field numbers from the root, the field's own last. Field numbers
/// of another wire type than expected arrive in the other method, so matching on both is enough to
/// ignore them.
pub trait Visitor {
    /// A length-delimited field begins; `range` is where its bytes lie.
    fn begin(&mut self, path: &[u32], range: Range<usize>) -> Content;

    /// A varint, alone or as an element of a packed list.
    fn varint(&mut self, path: &[u32], value: u64);

    /// A part of a field that is read as [`Content::Bytes`], in order.
    fn bytes(&mut self, path: &[u32], part: &[u8]) {
        let _ = (path, part);
    }
}

/// Why bytes are not a protobuf message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// The message ends inside a field, or a field reaches past its message.
    #[error("a field reaches past the end of its message at offset {at}")]
    Truncated {
        /// Absolute offset.
        at: usize,
    },
    /// A varint of more than 64 bits.
    #[error("a varint is longer than 64 bits at offset {at}")]
    Varint {
        /// Absolute offset behind it.
        at: usize,
    },
    /// A field number or wire type that does not exist.
    #[error("invalid field tag before offset {at}")]
    Tag {
        /// Absolute offset behind it.
        at: usize,
    },
    /// A group ends that did not begin, or does not end, or nests too deeply.
    #[error("unbalanced group at offset {at}")]
    Group {
        /// Absolute offset.
        at: usize,
    },
}

/// What a varint is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    Tag,
    /// The value of the field.
    Value(u32),
    /// The length of the field.
    Length(u32),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Varint(Role),
    /// A packed list.
    Elements,
    /// Bytes that are skipped, or handed on.
    Run {
        left: usize,
        report: bool,
    },
}

/// An open message or packed list.
#[derive(Debug)]
struct Frame {
    end: usize,
    packed: bool,
}

/// A varint that is not complete yet.
#[derive(Debug, Default)]
struct Partial {
    value: u64,
    bytes: u8,
}

/// The scanner of one message; feed it the bytes of its range in pieces, then [`Scanner::finish`].
#[derive(Debug)]
pub struct Scanner {
    state: State,
    /// Absolute offset of the next byte.
    at: usize,
    frames: SmallVec<[Frame; 4]>,
    path: SmallVec<[u32; 4]>,
    partial: Partial,
    /// Numbers of the open groups, all inside the last frame: nothing in them is reported.
    groups: SmallVec<[u32; 4]>,
}

impl Scanner {
    /// A scanner of the message at `range`.
    pub fn new(range: Range<usize>) -> Self {
        let root = Frame {
            end: range.end,
            packed: false,
        };
        Self {
            state: State::Varint(Role::Tag),
            at: range.start,
            frames: SmallVec::from_iter([root]),
            path: SmallVec::new(),
            partial: Partial::default(),
            groups: SmallVec::new(),
        }
    }

    /// Reads one piece. The first error is final.
    pub fn feed(&mut self, piece: &[u8], visitor: &mut impl Visitor) -> Result<(), WireError> {
        let mut rest = piece;
        while !rest.is_empty() {
            match self.state {
                State::Varint(role) => {
                    if let Some(value) = self.take_varint(&mut rest)? {
                        self.on_varint(role, value, visitor)?;
                    }
                }
                State::Elements => self.elements(&mut rest, visitor)?,
                State::Run { left, report } => self.run(&mut rest, left, report, visitor)?,
            }
        }
        Ok(())
    }

    /// Checks that the message is complete.
    pub fn finish(&self) -> Result<(), WireError> {
        let at = self.at;
        if !self.groups.is_empty() {
            return Err(WireError::Group { at });
        }
        let between_fields = self.state == State::Varint(Role::Tag) && self.partial.bytes == 0;
        let at_end = matches!(self.frames.as_slice(), [root] if root.end == at);
        if between_fields && at_end {
            Ok(())
        } else {
            Err(WireError::Truncated { at })
        }
    }

    /// The end of the innermost message.
    fn end(&self) -> usize {
        self.frames.last().map_or(self.at, |frame| frame.end)
    }

    /// Reads on in a varint; `None` when the piece ends first.
    fn take_varint(&mut self, rest: &mut &[u8]) -> Result<Option<u64>, WireError> {
        while let Some((&byte, tail)) = rest.split_first() {
            *rest = tail;
            self.at += 1;
            let Partial { value, bytes } = &mut self.partial;
            let bits = u64::from(byte & 0x7f);
            // The tenth byte has room for the last of 64 bits.
            if *bytes + 1 >= MAX_VARINT_BYTES && byte > 1 {
                return Err(WireError::Varint { at: self.at });
            }
            *value |= bits << (7 * u32::from(*bytes));
            *bytes += 1;
            if byte < 0x80 {
                let value = *value;
                self.partial = Partial::default();
                return Ok(Some(value));
            }
        }
        Ok(None)
    }

    fn on_varint(
        &mut self,
        role: Role,
        value: u64,
        visitor: &mut impl Visitor,
    ) -> Result<(), WireError> {
        match role {
            Role::Tag => self.on_tag(value),
            Role::Value(number) => {
                if self.groups.is_empty() {
                    self.path.push(number);
                    visitor.varint(&self.path, value);
                    self.path.pop();
                }
                self.field_done()
            }
            Role::Length(number) => self.on_length(number, value, visitor),
        }
    }

    fn on_tag(&mut self, tag: u64) -> Result<(), WireError> {
        let at = self.at;
        let number = u32::try_from(tag >> 3)
            .ok()
            .filter(|number| (1..FIELD_NUMBERS_END).contains(number))
            .ok_or(WireError::Tag { at })?;
        match tag & 7 {
            0 => self.state = State::Varint(Role::Value(number)),
            1 => return self.begin_run(8, false),
            2 => self.state = State::Varint(Role::Length(number)),
            3 if self.groups.len() < MAX_GROUPS => {
                self.groups.push(number);
                return self.field_done();
            }
            4 if self.groups.last() == Some(&number) => {
                self.groups.pop();
                return self.field_done();
            }
            3 | 4 => return Err(WireError::Group { at }),
            5 => return self.begin_run(4, false),
            _ => return Err(WireError::Tag { at }),
        }
        // The value needs at least one byte of the same message.
        self.check_room(1)
    }

    fn on_length(
        &mut self,
        number: u32,
        length: u64,
        visitor: &mut impl Visitor,
    ) -> Result<(), WireError> {
        let length = usize::try_from(length).map_err(|_| WireError::Truncated { at: self.at })?;
        self.check_room(length)?;
        if !self.groups.is_empty() {
            return self.begin_run(length, false);
        }
        let end = self.at + length;
        self.path.push(number);
        match visitor.begin(&self.path, self.at..end) {
            content @ (Content::Message | Content::Varints) => {
                let packed = content == Content::Varints;
                self.frames.push(Frame { end, packed });
                self.field_done()
            }
            Content::Bytes if length > 0 => self.begin_run(length, true),
            Content::Bytes | Content::Skip => {
                self.path.pop();
                self.begin_run(length, false)
            }
        }
    }

    fn begin_run(&mut self, length: usize, report: bool) -> Result<(), WireError> {
        self.check_room(length)?;
        if length == 0 {
            return self.field_done();
        }
        self.state = State::Run {
            left: length,
            report,
        };
        Ok(())
    }

    fn check_room(&self, bytes: usize) -> Result<(), WireError> {
        let room = self.end().checked_sub(self.at);
        if room.is_none_or(|room| room < bytes) {
            return Err(WireError::Truncated { at: self.at });
        }
        Ok(())
    }

    fn run(
        &mut self,
        rest: &mut &[u8],
        left: usize,
        report: bool,
        visitor: &mut impl Visitor,
    ) -> Result<(), WireError> {
        let (part, tail) = rest.split_at(left.min(rest.len()));
        *rest = tail;
        self.at += part.len();
        if report {
            visitor.bytes(&self.path, part);
        }
        if part.len() < left {
            let left = left - part.len();
            self.state = State::Run { left, report };
            return Ok(());
        }
        if report {
            self.path.pop();
        }
        self.field_done()
    }

    /// Reads elements of a packed list up to its end or the end of the piece.
    fn elements(&mut self, rest: &mut &[u8], visitor: &mut impl Visitor) -> Result<(), WireError> {
        let room = self.end().saturating_sub(self.at);
        let (mut list, tail) = rest.split_at(room.min(rest.len()));
        while let Some(value) = self.take_varint(&mut list)? {
            visitor.varint(&self.path, value);
        }
        *rest = tail;
        if self.at == self.end() {
            if self.partial.bytes != 0 {
                return Err(WireError::Truncated { at: self.at });
            }
            return self.field_done();
        }
        Ok(())
    }

    /// A field is complete, and with it every message and list that ends here.
    fn field_done(&mut self) -> Result<(), WireError> {
        let at = self.at;
        while let Some(frame) = self.frames.last()
            && frame.end <= at
        {
            if frame.end < at {
                return Err(WireError::Truncated { at });
            }
            if !self.groups.is_empty() {
                return Err(WireError::Group { at });
            }
            if self.frames.len() == 1 {
                break;
            }
            self.frames.pop();
            self.path.pop();
        }
        let packed = self.frames.last().is_some_and(|frame| frame.packed);
        self.state = if packed {
            State::Elements
        } else {
            State::Varint(Role::Tag)
        };
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Descends into 1 and 1.1, reads 2 as a packed list and 3 as bytes, at any depth.
    #[derive(Debug, Default, PartialEq)]
    struct Log(Vec<String>);

    impl Visitor for Log {
        fn begin(&mut self, path: &[u32], range: Range<usize>) -> Content {
            self.0.push(format!("{path:?} begin {range:?}"));
            match path {
                [1] | [1, 1] => Content::Message,
                [.., 2] => Content::Varints,
                [.., 3] => Content::Bytes,
                _ => Content::Skip,
            }
        }

        fn varint(&mut self, path: &[u32], value: u64) {
            self.0.push(format!("{path:?} {value}"));
        }

        fn bytes(&mut self, path: &[u32], part: &[u8]) {
            // One line a byte, so that the log is the same for every split.
            self.0
                .extend(part.iter().map(|b| format!("{path:?} byte {b}")));
        }
    }

    fn scan(pieces: &[&[u8]]) -> Result<Vec<String>, WireError> {
        let mut scanner = Scanner::new(0..pieces.iter().map(|p| p.len()).sum());
        let mut log = Log::default();
        for piece in pieces {
            scanner.feed(piece, &mut log)?;
        }
        scanner.finish().map(|()| log.0)
    }

    /// A tag is `number << 3 | wire type`.
    const MESSAGE: &[u8] = &[
        0x0a, 0x08, // 1: a message of 8 bytes
        0x08, 0x96, 0x01, // 1.1: 0x16 + (1 << 7) = 150
        0x12, 0x03, 0x05, 0xac, 0x02, // 1.2: a packed list of 5 and 0x2c + (2 << 7) = 300
        0x10, 0x07, // 2: an element of a list that is not packed
        0x1a, 0x02, 0xaa, 0xbb, // 3: two bytes
        0x22, 0x01, 0x00, // 4: one byte
        0x29, 0, 0, 0, 0, 0, 0, 0, 0, // 5: fixed64
        0x35, 0, 0, 0, 0, // 6: fixed32
        0x3b, 0x10, 0x01, 0x12, 0x01, 0x09, // 7: a group with 2: 1, 2: one byte,
        0x43, 0x44, 0x3c, // and 8: an empty group
        0x12, 0x00, // 2: an empty packed list
    ];

    #[test]
    fn fields_are_reported_with_path_and_place() {
        assert_eq!(
            scan(&[MESSAGE]).unwrap(),
            [
                "[1] begin 2..10",
                "[1, 1] 150",
                "[1, 2] begin 7..10",
                "[1, 2] 5",
                "[1, 2] 300",
                "[2] 7",
                "[3] begin 14..16",
                "[3] byte 170",
                "[3] byte 187",
                "[4] begin 18..19",
                "[2] begin 44..44",
            ]
        );
    }

    #[test]
    fn an_empty_message_is_complete() {
        assert_eq!(scan(&[]).unwrap(), Vec::<String>::new());
        // 1: an empty message, and in it nothing.
        assert_eq!(scan(&[&[0x0a, 0x00]]).unwrap(), ["[1] begin 2..2"]);
    }

    #[test]
    fn what_is_not_protobuf_is_refused() {
        let truncated = |at| WireError::Truncated { at };
        for (bytes, error) in [
            (&[0x08][..], truncated(1)),               // a tag without its value
            (&[0x08, 0x80], truncated(2)),             // a varint that goes on
            (&[0x1a, 0x02, 0xaa], truncated(2)),       // two bytes, one there
            (&[0x0a, 0x01, 0x08, 0x01], truncated(3)), // 1 ends between tag and value
            (&[0x0a, 0x02, 0x12, 0x01, 0x05], truncated(4)), // 1.2 reaches past 1
            (&[0x12, 0x01, 0x80], truncated(3)),       // an element reaches past its list
            (&[0x29, 0, 0, 0], truncated(1)),          // a fixed64 of 3 bytes
            (&[0x00], WireError::Tag { at: 1 }),       // number 0
            (&[0x0f], WireError::Tag { at: 1 }),       // wire type 7
            (&[0x0e], WireError::Tag { at: 1 }),       // wire type 6
            (&[0x80, 0x80, 0x80, 0x80, 0x10], WireError::Tag { at: 5 }), // number 2^29
            (&[0x3b], WireError::Group { at: 1 }),     // a group that does not end
            (&[0x3c], WireError::Group { at: 1 }),     // one that did not begin
            (&[0x3b, 0x44], WireError::Group { at: 2 }), // one that ends as another
            (&[0x0a, 0x01, 0x3b, 0x3c], WireError::Group { at: 3 }), // its end is not in 1
        ] {
            assert_eq!(scan(&[bytes]), Err(error), "{bytes:02x?}");
        }
        // Ten bytes carry 70 bits; the last of them may only be 1.
        let mut longest = vec![0x08];
        longest.extend([0xff; 9]);
        longest.push(0x01);
        assert_eq!(scan(&[&longest]).unwrap(), [format!("[1] {}", u64::MAX)]);
        longest[10] = 0x02;
        assert_eq!(scan(&[&longest]), Err(WireError::Varint { at: 11 }));
    }

    #[test]
    fn groups_nest_up_to_the_bound() {
        let nested = |n: usize| [vec![0x3b; n], vec![0x3c; n]].concat();
        assert!(scan(&[&nested(MAX_GROUPS)]).is_ok());
        let at = MAX_GROUPS + 1;
        assert_eq!(
            scan(&[&nested(MAX_GROUPS + 1)]),
            Err(WireError::Group { at })
        );
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]

        #[test]
        fn any_split_reports_the_same(
            edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..3),
            cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..10),
        ) {
            let mut bytes = MESSAGE.to_vec();
            for (index, byte) in edits {
                let at = index.index(bytes.len());
                bytes[at] = byte;
            }
            let mut at: Vec<usize> = cuts.iter().map(|c| c.index(bytes.len())).collect();
            at.extend([0, bytes.len()]);
            at.sort_unstable();
            let pieces: Vec<&[u8]> = at.windows(2).map(|w| &bytes[w[0]..w[1]]).collect();
            prop_assert_eq!(scan(&pieces), scan(&[&bytes]));
        }

        #[test]
        fn garbage_never_panics(pieces in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..40), 0..5)) {
            let pieces: Vec<&[u8]> = pieces.iter().map(Vec::as_slice).collect();
            let _ = scan(&pieces);
        }
    }
}
