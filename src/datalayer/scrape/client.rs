//! One kept-alive HTTP/1.1 connection that fetches one path.
//!
//! Scraping is most of what an idle picker does, so an answer is read straight into the buffer in
//! which it is searched: no task per connection, no copy of the body.

use std::ops::Range;
use std::sync::Arc;

use httparse::Status;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_rustls::rustls::ClientConfig;
use tokio_rustls::rustls::pki_types::ServerName;

/// Longest body that is read; recorded expositions are some 60 KB.
pub const MAX_BODY_BYTES: usize = 8 << 20;
/// Longest head, and longest trailer section.
const MAX_HEAD_BYTES: usize = 16 << 10;
/// Most header lines.
const MAX_HEADERS: usize = 64;
/// Longest line with a chunk's size.
const MAX_CHUNK_LINE_BYTES: usize = 256;
/// Room offered to the first read, so that a usual exposition takes few of them.
const FIRST_READ_BYTES: usize = 64 << 10;
/// Least room offered to each later read.
const READ_BYTES: usize = 16 << 10;

/// Why a fetch failed.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    /// Resolving, connecting, TLS or reading failed.
    #[error("{0}")]
    Io(#[from] std::io::Error),
    /// The peer hung up before the answer was complete.
    #[error("connection closed early")]
    Closed,
    /// The answer is not HTTP/1.1 as we asked for it.
    #[error("not a usable HTTP/1.1 answer: {0}")]
    Protocol(&'static str),
    /// Another status than 200; redirects are not followed.
    #[error("status {0}")]
    Status(u16),
    /// More than [`MAX_BODY_BYTES`].
    #[error("answer over {MAX_BODY_BYTES} bytes")]
    TooLong,
    /// The host is no name that a certificate could be for.
    #[error("{0:?} is not a host name")]
    Host(String),
}

/// A connection to one endpoint, opened when needed and kept.
#[derive(Debug)]
pub struct Connection {
    host: String,
    port: u16,
    /// The whole request, the same each time.
    request: Vec<u8>,
    tls: Option<Arc<ClientConfig>>,
    stream: Option<Stream>,
}

#[derive(Debug)]
enum Stream {
    Plain(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
}

/// An answer that was read.
struct Answer {
    /// Where in the buffer the body is.
    body: Range<usize>,
    /// Another request may follow on the connection.
    reusable: bool,
}

/// What the head says.
struct Head {
    bytes: usize,
    framing: Framing,
    keep_alive: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Framing {
    Length(usize),
    Chunked,
    UntilClose,
}

impl Connection {
    /// A closed connection to fetch `path` from `host`, an address or a name that is resolved whenever
    /// the connection is opened. `path` must be fit for a request line.
    pub fn new(
        host: String,
        port: u16,
        path: &str,
        accept: &str,
        tls: Option<Arc<ClientConfig>>,
    ) -> Self {
        let bracketed = if host.contains(':') {
            format!("[{host}]")
        } else {
            host.clone()
        };
        let request = format!(
            "GET {path} HTTP/1.1\r\nhost: {bracketed}:{port}\r\naccept: {accept}\r\nuser-agent: pinpod\r\n\r\n"
        );
        Self {
            host,
            port,
            request: request.into_bytes(),
            tls,
            stream: None,
        }
    }

    /// Fetches into `buffer`, whose memory is reused, and returns the body in it. After an error, or
    /// when the call is dropped midway, the connection is closed.
    pub async fn fetch<'b>(&mut self, buffer: &'b mut Vec<u8>) -> Result<&'b [u8], FetchError> {
        // Taken out, so that an error or a dropped call leaves no half-used connection behind.
        let body = match self.stream.take() {
            None => self.fetch_anew(buffer).await?,
            Some(kept) => match self.exchange(kept, buffer).await {
                // The peer closed the idle connection; it has not seen this request.
                Err(FetchError::Io(_) | FetchError::Closed) if buffer.is_empty() => {
                    self.fetch_anew(buffer).await?
                }
                answered => answered?,
            },
        };
        buffer.get(body).ok_or(FetchError::Closed)
    }

    async fn fetch_anew(&mut self, buffer: &mut Vec<u8>) -> Result<Range<usize>, FetchError> {
        let stream = self.open().await?;
        self.exchange(stream, buffer).await
    }

    async fn exchange(
        &mut self,
        mut stream: Stream,
        buffer: &mut Vec<u8>,
    ) -> Result<Range<usize>, FetchError> {
        buffer.clear();
        let answer = match &mut stream {
            Stream::Plain(stream) => exchange(stream, &self.request, buffer).await?,
            Stream::Tls(stream) => exchange(stream, &self.request, buffer).await?,
        };
        if answer.reusable {
            self.stream = Some(stream);
        }
        Ok(answer.body)
    }

    async fn open(&self) -> Result<Stream, FetchError> {
        let stream = TcpStream::connect((self.host.as_str(), self.port)).await?;
        stream.set_nodelay(true)?;
        let Some(config) = &self.tls else {
            return Ok(Stream::Plain(stream));
        };
        let name = ServerName::try_from(self.host.clone())
            .map_err(|_| FetchError::Host(self.host.clone()))?;
        let connector = TlsConnector::from(Arc::clone(config));
        let stream = connector.connect(name, stream).await?;
        Ok(Stream::Tls(Box::new(stream)))
    }
}

/// One request and its answer.
async fn exchange(
    stream: &mut (impl AsyncRead + AsyncWrite + Unpin),
    request: &[u8],
    buffer: &mut Vec<u8>,
) -> Result<Answer, FetchError> {
    stream.write_all(request).await?;
    stream.flush().await?;
    buffer.reserve(FIRST_READ_BYTES);
    let head = loop {
        read_more(stream, buffer).await?;
        if let Some(head) = parse_head(buffer)? {
            break head;
        }
        if buffer.len() > MAX_HEAD_BYTES {
            return Err(FetchError::Protocol("head too long"));
        }
    };
    match head.framing {
        Framing::Length(bytes) => {
            let end = head.bytes + bytes;
            buffer.reserve(end.saturating_sub(buffer.len()));
            while buffer.len() < end {
                read_more(stream, buffer).await?;
            }
            Ok(Answer {
                body: head.bytes..end,
                // Bytes behind the answer belong to nothing we asked for.
                reusable: head.keep_alive && buffer.len() == end,
            })
        }
        Framing::Chunked => {
            let mut answer = read_chunks(stream, buffer, head.bytes).await?;
            answer.reusable &= head.keep_alive;
            Ok(answer)
        }
        Framing::UntilClose => loop {
            match read_more(stream, buffer).await {
                Ok(()) if buffer.len() - head.bytes > MAX_BODY_BYTES => {
                    return Err(FetchError::TooLong);
                }
                Ok(()) => {}
                Err(FetchError::Closed) => {
                    return Ok(Answer {
                        body: head.bytes..buffer.len(),
                        reusable: false,
                    });
                }
                Err(error) => return Err(error),
            }
        },
    }
}

/// Appends what is there. The end of the stream is an error: nobody asks without expecting more.
async fn read_more(
    stream: &mut (impl AsyncRead + Unpin),
    buffer: &mut Vec<u8>,
) -> Result<(), FetchError> {
    // Chunk sizes come on top of the body; beyond twice its limit they are no answer either.
    if buffer.len() > 2 * MAX_BODY_BYTES {
        return Err(FetchError::TooLong);
    }
    if buffer.len() == buffer.capacity() {
        // `reserve` at least doubles.
        buffer.reserve(READ_BYTES);
    }
    match stream.read_buf(buffer).await? {
        0 => Err(FetchError::Closed),
        _ => Ok(()),
    }
}

/// Reads the head; `None` while it is incomplete.
fn parse_head(bytes: &[u8]) -> Result<Option<Head>, FetchError> {
    let mut lines = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut response = httparse::Response::new(&mut lines);
    let head_bytes = match response.parse(bytes) {
        Ok(Status::Complete(head_bytes)) => head_bytes,
        Ok(Status::Partial) => return Ok(None),
        Err(_) => return Err(FetchError::Protocol("malformed head")),
    };
    match response.code {
        Some(200) => {}
        code => return Err(FetchError::Status(code.unwrap_or_default())),
    }
    let mut length = None;
    let mut chunked = false;
    let mut keep_alive = response.version == Some(1);
    for line in response.headers.iter() {
        let name = |wanted: &str| line.name.eq_ignore_ascii_case(wanted);
        let value = line.value.trim_ascii();
        if name("content-length") {
            let own = std::str::from_utf8(value).ok().and_then(|v| v.parse().ok());
            let own: usize = own.ok_or(FetchError::Protocol("bad content-length"))?;
            if length.is_some_and(|before| before != own) {
                return Err(FetchError::Protocol("two content-lengths"));
            }
            length = Some(own);
        } else if name("transfer-encoding") {
            if chunked || !value.eq_ignore_ascii_case(b"chunked") {
                return Err(FetchError::Protocol("unknown transfer-encoding"));
            }
            chunked = true;
        } else if name("content-encoding") && !value.eq_ignore_ascii_case(b"identity") {
            return Err(FetchError::Protocol("compressed, which was not asked for"));
        } else if name("connection") {
            let mut options = value.split(|b| *b == b',');
            keep_alive &= !options.any(|o| o.trim_ascii().eq_ignore_ascii_case(b"close"));
        }
    }
    let framing = match (chunked, length) {
        (true, Some(_)) => return Err(FetchError::Protocol("chunked with a content-length")),
        (true, None) => Framing::Chunked,
        (false, Some(length)) if length > MAX_BODY_BYTES => return Err(FetchError::TooLong),
        (false, Some(length)) => Framing::Length(length),
        (false, None) => Framing::UntilClose,
    };
    Ok(Some(Head {
        bytes: head_bytes,
        framing,
        keep_alive,
    }))
}

/// Reads chunks from `start` on and moves their data together there.
async fn read_chunks(
    stream: &mut (impl AsyncRead + Unpin),
    buffer: &mut Vec<u8>,
    start: usize,
) -> Result<Answer, FetchError> {
    let mut next = start;
    let mut end = start;
    loop {
        let (line_bytes, size) = read_chunk_size(stream, buffer, next).await?;
        next += line_bytes;
        if size == 0 {
            break;
        }
        if size > MAX_BODY_BYTES - (end - start) {
            return Err(FetchError::TooLong);
        }
        let behind = next + size;
        while buffer.len() < behind + 2 {
            read_more(stream, buffer).await?;
        }
        if buffer.get(behind..behind + 2) != Some(b"\r\n") {
            return Err(FetchError::Protocol("chunk without end"));
        }
        buffer.copy_within(next..behind, end);
        end += size;
        next = behind + 2;
    }
    next = skip_trailers(stream, buffer, next).await?;
    Ok(Answer {
        body: start..end,
        reusable: buffer.len() == next,
    })
}

/// Length of the line at `from`, and the size it states.
async fn read_chunk_size(
    stream: &mut (impl AsyncRead + Unpin),
    buffer: &mut Vec<u8>,
    from: usize,
) -> Result<(usize, usize), FetchError> {
    loop {
        let line = buffer.get(from..).unwrap_or_default();
        match httparse::parse_chunk_size(line) {
            Ok(Status::Complete((line_bytes, size))) => {
                let size = usize::try_from(size).map_err(|_| FetchError::TooLong)?;
                return Ok((line_bytes, size));
            }
            Ok(Status::Partial) if line.len() <= MAX_CHUNK_LINE_BYTES => {
                read_more(stream, buffer).await?;
            }
            _ => return Err(FetchError::Protocol("bad chunk size")),
        }
    }
}

/// Where the answer ends: behind the empty line that follows the trailers.
async fn skip_trailers(
    stream: &mut (impl AsyncRead + Unpin),
    buffer: &mut Vec<u8>,
    from: usize,
) -> Result<usize, FetchError> {
    let mut line_start = from;
    loop {
        let rest = buffer.get(line_start..).unwrap_or_default();
        match memchr::memchr(b'\n', rest) {
            Some(at) => {
                line_start += at + 1;
                if rest
                    .get(..at)
                    .is_some_and(|line| line == b"\r" || line.is_empty())
                {
                    return Ok(line_start);
                }
            }
            None if buffer.len() - from > MAX_HEAD_BYTES => {
                return Err(FetchError::Protocol("trailers too long"));
            }
            None => read_more(stream, buffer).await?,
        }
    }
}

#[cfg(test)]
mod tests;
