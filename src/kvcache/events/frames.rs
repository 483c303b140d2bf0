//! The frames of a message: topic, sequence number, payload.

use bytes::Bytes;

/// Sequence number of the marker that ends a replay.
const END: u64 = u64::MAX;

/// A live message or one message of a replay.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message {
    /// One batch.
    Batch {
        /// Publisher's number of the batch.
        seq: u64,
        /// Topic; empty when the form has none.
        topic: Bytes,
        /// Msgpack, read by [`super::wire`].
        payload: Bytes,
    },
    /// The replay is over.
    End,
}

/// Reads a message, `None` when it is none of the known forms.
///
/// Live: `[topic, seq, payload]`. Replay, as a DEALER receives it: `[empty, seq, payload]` from older
/// engines, `[empty, topic, seq, payload]` from newer ones, `[identity, empty, topic, seq, payload]`
/// through a proxy. The end marker has all bits of `seq` set and, in the topic-less form, no payload
/// of its own place: `[empty, ff*8, empty]`. All are read from the back.
pub fn parse(frames: &[Bytes]) -> Option<Message> {
    if !(3..=5).contains(&frames.len()) {
        return None;
    }
    let [before @ .., seq, payload] = frames else {
        return None;
    };
    let seq = u64::from_be_bytes(seq.as_ref().try_into().ok()?);
    if seq == END {
        return Some(Message::End);
    }
    Some(Message::Batch {
        seq,
        topic: before.last().cloned().unwrap_or_default(),
        payload: payload.clone(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frames(parts: &[&[u8]]) -> Vec<Bytes> {
        parts.iter().map(|p| Bytes::copy_from_slice(p)).collect()
    }

    fn seq(n: u64) -> [u8; 8] {
        n.to_be_bytes()
    }

    #[test]
    fn three_four_and_five_frames_are_read_from_the_back() {
        let batch = |topic: &'static [u8]| {
            Some(Message::Batch {
                seq: 7,
                topic: Bytes::from_static(topic),
                payload: Bytes::from_static(b"p"),
            })
        };
        assert_eq!(parse(&frames(&[b"t", &seq(7), b"p"])), batch(b"t"));
        assert_eq!(parse(&frames(&[b"", &seq(7), b"p"])), batch(b""));
        assert_eq!(parse(&frames(&[b"", b"t", &seq(7), b"p"])), batch(b"t"));
        assert_eq!(
            parse(&frames(&[b"id", b"", b"t", &seq(7), b"p"])),
            batch(b"t")
        );
    }

    #[test]
    fn both_end_markers_end() {
        let end = seq(u64::MAX);
        assert_eq!(parse(&frames(&[b"", &end, b""])), Some(Message::End));
        assert_eq!(parse(&frames(&[b"", b"", &end, b""])), Some(Message::End));
    }

    #[test]
    fn every_published_message_parses_as_expected() {
        let dir = std::env::var_os("PINPOD_VECTORS").map_or_else(
            || std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/vectors"),
            std::path::PathBuf::from,
        );
        let text = std::fs::read_to_string(dir.join("kv_event_frames.json")).unwrap();
        let vectors: serde_json::Value = serde_json::from_str(&text).unwrap();
        for case in vectors["cases"].as_array().unwrap() {
            let (mut seqs, mut complete) = (Vec::new(), false);
            for message in case["frames"].as_array().unwrap() {
                let parts: Vec<Bytes> = message.as_array().unwrap().iter().map(unhex).collect();
                match parse(&parts).unwrap() {
                    Message::Batch {
                        seq,
                        topic,
                        payload,
                    } => {
                        assert!(crate::kvcache::events::wire::timestamp(&payload).is_some());
                        if let Some(expected) = case["topic"].as_str() {
                            assert_eq!(topic, expected);
                        }
                        seqs.push(seq);
                    }
                    Message::End => complete = true,
                }
            }
            let expect = &case["expect"];
            assert_eq!(serde_json::json!(seqs), expect["seqs"], "{}", case["name"]);
            let ends = expect["complete"].as_bool().unwrap_or(false);
            assert_eq!(complete, ends, "{}", case["name"]);
        }
    }

    fn unhex(text: &serde_json::Value) -> Bytes {
        let text = text.as_str().unwrap();
        (0..text.len() / 2)
            .map(|i| u8::from_str_radix(&text[2 * i..2 * i + 2], 16).unwrap())
            .collect()
    }

    #[test]
    fn other_shapes_are_refused() {
        assert_eq!(parse(&[]), None);
        assert_eq!(parse(&frames(&[&seq(1), b"p"])), None);
        assert_eq!(parse(&frames(&[b"t", b"1234567", b"p"])), None);
        assert_eq!(parse(&frames(&[b"", b"", b"", b"t", &seq(1), b"p"])), None);
    }
}
