//! ZeroMQ's wire protocol (ZMTP 3.0, NULL mechanism) as far as a subscriber needs it: SUB towards a PUB,
//! DEALER towards a ROUTER, dialled or accepted.
//!
//! One connection is one TCP stream without a queue of its own: what is not read stays in the
//! publisher. A message is bounded by [`MAX_MESSAGE_BYTES`] and [`MAX_FRAMES`], and memory grows with the
//! bytes that arrived, not with what a header claims.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// Bytes of all frames of one message. A step that reports a context of 1 Mi tokens takes 5 MiB and
/// byte hashes for it 2 MiB.
pub const MAX_MESSAGE_BYTES: usize = 16 << 20;

/// Frames of one message; the longest known form has 5.
pub const MAX_FRAMES: usize = 8;

/// Bytes of a command frame: READY carries two properties, PING a context of 16 bytes.
const MAX_COMMAND_BYTES: usize = 4096;

/// Commands answered before one message; a peer that only sends commands is cut off.
const MAX_COMMANDS_IN_A_ROW: usize = 1024;

/// Least room made for a read.
const READ_CHUNK: usize = 16 << 10;

/// Silence after which the kernel asks whether the peer is still there; publishers send nothing while
/// idle, so that a dead host would look like an idle one.
const KEEPALIVE: Duration = Duration::from_secs(15);

const MORE: u8 = 1;
const LONG: u8 = 2;
const COMMAND: u8 = 4;

/// Why a connection ended.
#[derive(Debug, thiserror::Error)]
pub enum ZmtpError {
    /// The socket failed.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// The peer closed.
    #[error("closed by the peer")]
    Closed,
    /// The peer speaks something else, or asks for authentication.
    #[error("not a ZMTP 3 peer without authentication: {0}")]
    Protocol(&'static str),
    /// The message is larger than [`MAX_MESSAGE_BYTES`] or [`MAX_FRAMES`].
    #[error("message beyond {MAX_MESSAGE_BYTES} bytes or {MAX_FRAMES} frames")]
    Oversize,
}

/// Which socket we are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Live events.
    Sub,
    /// Replay requests.
    Dealer,
}

impl Role {
    fn name(self) -> &'static [u8] {
        match self {
            Self::Sub => b"SUB",
            Self::Dealer => b"DEALER",
        }
    }

    fn accepts(self, peer: &[u8]) -> bool {
        match self {
            Self::Sub => matches!(peer, b"PUB" | b"XPUB"),
            Self::Dealer => matches!(peer, b"ROUTER" | b"DEALER" | b"REP"),
        }
    }
}

/// An open connection. Dropping it closes the socket.
#[derive(Debug)]
pub struct Connection {
    stream: TcpStream,
    input: BytesMut,
    /// Bytes we owe the peer: PONGs, subscriptions, requests.
    output: BytesMut,
    frames: Vec<Bytes>,
    message_bytes: usize,
    commands: usize,
}

/// One frame off the wire.
struct Frame {
    flags: u8,
    body: Bytes,
}

impl Connection {
    /// Dials a publisher. The caller sets the time limit.
    pub async fn connect(address: SocketAddr, role: Role) -> Result<Self, ZmtpError> {
        Self::open(TcpStream::connect(address).await?, role).await
    }

    /// Shakes hands on a stream, dialled or accepted: both sides do the same.
    pub async fn open(stream: TcpStream, role: Role) -> Result<Self, ZmtpError> {
        stream.set_nodelay(true)?;
        let keepalive = socket2::TcpKeepalive::new()
            .with_time(KEEPALIVE)
            .with_interval(KEEPALIVE);
        socket2::SockRef::from(&stream).set_tcp_keepalive(&keepalive)?;
        let mut connection = Self {
            stream,
            input: BytesMut::new(),
            output: BytesMut::new(),
            frames: Vec::new(),
            message_bytes: 0,
            commands: 0,
        };
        connection.output.put_slice(&greeting());
        connection.output.put_slice(&ready(role));
        connection.flush().await?;
        connection.expect_greeting().await?;
        connection.expect_ready(role).await?;
        Ok(connection)
    }

    /// Asks a publisher for every topic. An engine without a configured topic sends an empty one, so
    /// any longer prefix would miss it silently.
    pub async fn subscribe_to_all(&mut self) -> Result<(), ZmtpError> {
        self.output.put_slice(&[0, 1, 1]);
        self.flush().await
    }

    /// Asks a replay socket for every batch from `start` on.
    pub async fn request_replay(&mut self, start: u64) -> Result<(), ZmtpError> {
        self.output.put_slice(&[MORE, 0, 0, 8]);
        self.output.put_u64(start);
        self.flush().await
    }

    /// The next message. Cancel-safe: what was read is kept for the next call.
    pub async fn recv(&mut self) -> Result<Vec<Bytes>, ZmtpError> {
        loop {
            while let Some(frame) = self.next_frame()? {
                if frame.flags & COMMAND != 0 {
                    self.on_command(&frame.body)?;
                    continue;
                }
                self.commands = 0;
                self.message_bytes += frame.body.len();
                self.frames.push(frame.body);
                if frame.flags & MORE == 0 {
                    self.message_bytes = 0;
                    return Ok(std::mem::take(&mut self.frames));
                }
                if self.frames.len() >= MAX_FRAMES {
                    return Err(ZmtpError::Oversize);
                }
            }
            self.flush().await?;
            self.fill().await?;
        }
    }

    /// Writes what is owed. Cancel-safe: only written bytes leave the buffer.
    async fn flush(&mut self) -> Result<(), ZmtpError> {
        while self.output.has_remaining() {
            if self.stream.write_buf(&mut self.output).await? == 0 {
                return Err(ZmtpError::Closed);
            }
        }
        Ok(())
    }

    /// Reads what is there. Cancel-safe.
    async fn fill(&mut self) -> Result<(), ZmtpError> {
        if self.input.capacity() - self.input.len() < READ_CHUNK / 4 {
            // At most doubles: room follows the bytes that came, not the size a header claims.
            self.input.reserve(self.input.len().max(READ_CHUNK));
        }
        if self.stream.read_buf(&mut self.input).await? == 0 {
            return Err(ZmtpError::Closed);
        }
        Ok(())
    }

    fn next_frame(&mut self) -> Result<Option<Frame>, ZmtpError> {
        let mut head = self.input.as_ref();
        let Ok(flags) = head.try_get_u8() else {
            return Ok(None);
        };
        let len = if flags & LONG == 0 {
            head.try_get_u8().map(u64::from)
        } else {
            head.try_get_u64()
        };
        let Ok(len) = len else {
            return Ok(None);
        };
        let limit = if flags & COMMAND == 0 {
            MAX_MESSAGE_BYTES - self.message_bytes.min(MAX_MESSAGE_BYTES)
        } else {
            MAX_COMMAND_BYTES
        };
        let len = usize::try_from(len).map_err(|_| ZmtpError::Oversize)?;
        if len > limit {
            return Err(ZmtpError::Oversize);
        }
        if head.len() < len {
            return Ok(None);
        }
        let header = self.input.len() - head.len();
        self.input.advance(header);
        Ok(Some(Frame {
            flags,
            body: self.input.split_to(len).freeze(),
        }))
    }

    fn on_command(&mut self, body: &[u8]) -> Result<(), ZmtpError> {
        self.commands += 1;
        if self.commands > MAX_COMMANDS_IN_A_ROW {
            return Err(ZmtpError::Protocol("only commands"));
        }
        // PING: name, time to live (2 bytes), context; PONG gives the context back.
        if let Some(ping) = body.strip_prefix(b"\x04PING") {
            let context = ping.get(2..).unwrap_or_default();
            if let Ok(len) = u8::try_from(5 + context.len()) {
                self.output.put_slice(&[COMMAND, len]);
                self.output.put_slice(b"\x04PONG");
                self.output.put_slice(context);
            }
        }
        Ok(())
    }

    async fn expect_greeting(&mut self) -> Result<(), ZmtpError> {
        while self.input.len() < GREETING_BYTES {
            if self.input.first().is_some_and(|b| *b != 0xff) {
                return Err(ZmtpError::Protocol("signature"));
            }
            self.fill().await?;
        }
        let greeting = self.input.split_to(GREETING_BYTES);
        match greeting.as_ref() {
            [0xff, .., 0] if greeting.get(9) != Some(&0x7f) => {
                Err(ZmtpError::Protocol("signature"))
            }
            _ if greeting.get(10).is_none_or(|major| *major < 3) => {
                Err(ZmtpError::Protocol("version"))
            }
            _ if greeting.get(12..32) != Some(&MECHANISM[..]) => {
                Err(ZmtpError::Protocol("mechanism"))
            }
            _ => Ok(()),
        }
    }

    async fn expect_ready(&mut self, role: Role) -> Result<(), ZmtpError> {
        let frame = loop {
            match self.next_frame()? {
                Some(frame) => break frame,
                None => self.fill().await?,
            }
        };
        let properties = frame
            .body
            .strip_prefix(b"\x05READY")
            .filter(|_| frame.flags & COMMAND != 0)
            .ok_or(ZmtpError::Protocol("handshake"))?;
        match socket_type(properties) {
            Some(peer) if role.accepts(peer) => Ok(()),
            _ => Err(ZmtpError::Protocol("socket type")),
        }
    }
}

const GREETING_BYTES: usize = 64;

/// `NULL`, padded with zeros.
const MECHANISM: [u8; 20] = *b"NULL\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0";

fn greeting() -> [u8; GREETING_BYTES] {
    let mut bytes = [0; GREETING_BYTES];
    bytes[0] = 0xff;
    bytes[9] = 0x7f;
    bytes[10] = 3;
    bytes[12..32].copy_from_slice(&MECHANISM);
    bytes
}

/// The READY command of a role, a whole frame.
fn ready(role: Role) -> Vec<u8> {
    let mut body = b"\x05READY".to_vec();
    property(&mut body, b"Socket-Type", role.name());
    if role == Role::Dealer {
        property(&mut body, b"Identity", b"");
    }
    // Under 64 bytes for both roles, so that the short form of a frame does.
    let mut frame = vec![COMMAND, body.len().to_be_bytes()[7]];
    frame.append(&mut body);
    frame
}

fn property(body: &mut Vec<u8>, name: &[u8], value: &[u8]) {
    body.push(name.len().to_be_bytes()[7]);
    body.put_slice(name);
    body.put_slice(&value.len().to_be_bytes()[4..]);
    body.put_slice(value);
}

/// `Socket-Type` among the properties of a READY; names compare without case.
fn socket_type(mut properties: &[u8]) -> Option<&[u8]> {
    while let Ok(len) = properties.try_get_u8() {
        let (name, rest) = properties.split_at_checked(usize::from(len))?;
        properties = rest;
        let len = usize::try_from(properties.try_get_u32().ok()?).ok()?;
        let (value, rest) = properties.split_at_checked(len)?;
        properties = rest;
        if name.eq_ignore_ascii_case(b"Socket-Type") {
            return Some(value);
        }
    }
    None
}

#[cfg(test)]
mod tests;
