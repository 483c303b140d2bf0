//! ZMTP 3.1 with the NULL mechanism, as a listening or dialling socket speaks it.

use std::io;
use std::time::Duration;

use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// Longest frame that a peer may send: subscriptions and replay requests are short.
pub(super) const MAX_FRAME_BYTES: u64 = 1 << 16;
/// Time for a peer to finish its greeting.
const HANDSHAKE_TIME: Duration = Duration::from_secs(10);

const MORE: u8 = 1;
const LONG: u8 = 2;
const COMMAND: u8 = 4;

/// A frame as it came.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Frame {
    /// Part of a message; the flag tells whether more parts follow.
    Part(Vec<u8>, bool),
    /// A command by name, with what follows it.
    Command(Vec<u8>, Vec<u8>),
}

fn malformed(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

fn head(out: &mut Vec<u8>, flags: u8, length: usize) {
    if let Ok(length) = u8::try_from(length) {
        out.extend_from_slice(&[flags, length]);
    } else {
        out.push(flags | LONG);
        out.extend_from_slice(&(length as u64).to_be_bytes());
    }
}

/// The bytes of a message of `parts`.
pub(super) fn message(parts: &[&[u8]]) -> Bytes {
    let mut out = Vec::with_capacity(parts.iter().map(|part| part.len() + 9).sum());
    for (index, part) in parts.iter().enumerate() {
        let more = if index + 1 < parts.len() { MORE } else { 0 };
        head(&mut out, more, part.len());
        out.extend_from_slice(part);
    }
    out.into()
}

fn command(name: &str, rest: &[u8]) -> Vec<u8> {
    let mut body = vec![u8::try_from(name.len()).unwrap_or(u8::MAX)];
    body.extend_from_slice(name.as_bytes());
    body.extend_from_slice(rest);
    let mut out = Vec::new();
    head(&mut out, COMMAND, body.len());
    out.append(&mut body);
    out
}

/// The answer to a ping with `context`.
pub(super) fn pong(context: &[u8]) -> Bytes {
    command("PONG", context).into()
}

fn greeting() -> [u8; 64] {
    let mut bytes = [0; 64];
    let start = [
        0xFF, 0, 0, 0, 0, 0, 0, 0, 0, 0x7F, 3, 1, b'N', b'U', b'L', b'L',
    ];
    for (to, from) in bytes.iter_mut().zip(start) {
        *to = from;
    }
    bytes
}

fn check_greeting(bytes: &[u8; 64]) -> io::Result<()> {
    let [0xFF, ..] = bytes else {
        return Err(malformed("no ZMTP greeting"));
    };
    let ends_signature = bytes.get(9).is_some_and(|byte| byte & 1 == 1);
    let version = bytes.get(10).copied().unwrap_or_default();
    let mechanism = bytes.get(12..32).unwrap_or_default();
    if !ends_signature || version < 3 {
        return Err(malformed("an older protocol than ZMTP 3"));
    }
    if mechanism
        .strip_prefix(b"NULL")
        .is_none_or(|rest| rest.iter().any(|byte| *byte != 0))
    {
        return Err(malformed("another mechanism than NULL"));
    }
    Ok(())
}

fn property(out: &mut Vec<u8>, name: &str, value: &[u8]) {
    out.push(u8::try_from(name.len()).unwrap_or(u8::MAX));
    out.extend_from_slice(name.as_bytes());
    out.extend_from_slice(&u32::try_from(value.len()).unwrap_or(u32::MAX).to_be_bytes());
    out.extend_from_slice(value);
}

/// The value of a property of a READY command.
fn find_property<'a>(mut rest: &'a [u8], wanted: &str) -> Option<&'a [u8]> {
    loop {
        let (length, tail) = rest.split_first()?;
        let (name, tail) = tail.split_at_checked(usize::from(*length))?;
        let (length, tail) = tail.split_first_chunk()?;
        let length = usize::try_from(u32::from_be_bytes(*length)).ok()?;
        let (value, tail) = tail.split_at_checked(length)?;
        if name.eq_ignore_ascii_case(wanted.as_bytes()) {
            return Some(value);
        }
        rest = tail;
    }
}

/// Greets a peer as a socket of type `own` and checks that the peer is of one of `peers`.
pub(super) async fn handshake(stream: &mut TcpStream, own: &str, peers: &[&str]) -> io::Result<()> {
    let greet = async {
        stream.write_all(&greeting()).await?;
        let mut theirs = [0; 64];
        stream.read_exact(&mut theirs).await?;
        check_greeting(&theirs)?;
        let mut properties = Vec::new();
        property(&mut properties, "Socket-Type", own.as_bytes());
        if own == "ROUTER" {
            property(&mut properties, "Identity", b"");
        }
        stream.write_all(&command("READY", &properties)).await?;
        let Frame::Command(name, rest) = read_frame(stream).await? else {
            return Err(malformed("a message before READY"));
        };
        let kind = find_property(&rest, "Socket-Type");
        let fits = peers.iter().any(|peer| kind == Some(peer.as_bytes()));
        if name != b"READY" || !fits {
            return Err(malformed("no peer of a fitting type"));
        }
        Ok(())
    };
    match tokio::time::timeout(HANDSHAKE_TIME, greet).await {
        Ok(result) => result,
        Err(_) => Err(io::ErrorKind::TimedOut.into()),
    }
}

/// Reads a frame. Not safe to cancel and go on.
pub(super) async fn read_frame(reader: &mut (impl AsyncRead + Unpin)) -> io::Result<Frame> {
    let flags = reader.read_u8().await?;
    let length = if flags & LONG == 0 {
        u64::from(reader.read_u8().await?)
    } else {
        reader.read_u64().await?
    };
    if length > MAX_FRAME_BYTES {
        return Err(malformed("a frame that is too long"));
    }
    let mut body = Vec::new();
    let read = reader.take(length).read_to_end(&mut body).await?;
    if read as u64 != length {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    if flags & COMMAND == 0 {
        return Ok(Frame::Part(body, flags & MORE != 0));
    }
    let named = body
        .split_first()
        .and_then(|(length, rest)| rest.split_at_checked(usize::from(*length)));
    let (name, rest) = named.ok_or_else(|| malformed("a command without a name"))?;
    Ok(Frame::Command(name.to_vec(), rest.to_vec()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn frames_are_short_up_to_255_bytes() {
        let bytes = message(&[b"", &[7; 255], &[8; 256]]);
        // The forms of the ZMTP specification: flags, then one or eight bytes of length.
        assert_eq!(bytes[..4], [1, 0, 1, 255]);
        assert_eq!(bytes[2 + 2 + 255..][..9], [2, 0, 0, 0, 0, 0, 0, 1, 0]);
        let mut reader = &bytes[..];
        for (part, more) in [(vec![], true), (vec![7; 255], true), (vec![8; 256], false)] {
            assert_eq!(
                read_frame(&mut reader).await.unwrap(),
                Frame::Part(part, more)
            );
        }
    }

    #[tokio::test]
    async fn a_frame_longer_than_the_bound_is_refused_before_it_is_read() {
        let mut longest = vec![LONG];
        longest.extend_from_slice(&MAX_FRAME_BYTES.to_be_bytes());
        longest.resize(9 + usize::try_from(MAX_FRAME_BYTES).unwrap(), 0);
        assert!(read_frame(&mut &longest[..]).await.is_ok());
        let mut longer = vec![LONG];
        longer.extend_from_slice(&(MAX_FRAME_BYTES + 1).to_be_bytes());
        let error = read_frame(&mut &longer[..]).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    }

    #[tokio::test]
    async fn commands_have_names_and_ready_has_properties() {
        let mut properties = Vec::new();
        property(&mut properties, "Identity", b"");
        property(&mut properties, "Socket-Type", b"SUB");
        let bytes = command("READY", &properties);
        let Frame::Command(name, rest) = read_frame(&mut &bytes[..]).await.unwrap() else {
            panic!("READY is a command");
        };
        assert_eq!(
            (&name[..], find_property(&rest, "socket-type")),
            (&b"READY"[..], Some(&b"SUB"[..]))
        );
        assert_eq!(find_property(&rest[..12], "Socket-Type"), None, "cut off");
    }

    #[test]
    fn only_the_null_mechanism_of_version_3_is_spoken() {
        let with = |index: usize, byte: u8| {
            let mut bytes = greeting();
            bytes[index] = byte;
            check_greeting(&bytes)
        };
        assert!(with(11, 0).is_ok(), "3.0");
        assert!(with(10, 2).is_err() && with(12, b'P').is_err() && with(16, b'X').is_err());
        assert!(with(0, 0).is_err());
    }
}
