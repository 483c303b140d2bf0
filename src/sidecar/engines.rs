//! Calls to engines: kept connections, time limits, and an end to everything a call holds when it is
//! dropped.
//!
//! A connection belongs to the call that uses it. Dropping the call, or its answer before the end,
//! closes the connection, which is how an engine learns that nobody wants the work any more.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use hashbrown::HashMap;
use http::{Request, Response, StatusCode, header};
use http_body::{Body, Frame, SizeHint};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use hyper::client::conn::http1::{self, SendRequest};
use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use tokio::net::TcpStream;
use tokio::time::Instant;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::ClientConfig;
use tokio_rustls::rustls::pki_types::ServerName;
use tokio_util::task::AbortOnDropHandle;

use super::body::EngineBody;
use super::host_port::HostPort;
use super::metrics::{ActiveLeg, SidecarMetrics, Stage};
use super::spans::LegSpan;

/// Engines whose connections are kept; beyond, those of the least recently used are closed.
const MAX_HOSTS: usize = 1024;
/// Idle time after which a connection is not used again.
const IDLE_TIMEOUT: Duration = Duration::from_secs(90);
/// Longest answer that is read whole: those of prefill and encode engines, and of chunked decode.
pub(super) const MAX_WHOLE_BYTES: usize = 64 << 20;

/// Why an engine's answer did not come.
#[derive(Debug, thiserror::Error)]
pub(super) enum CallError {
    /// Nobody listens, or nothing answers.
    #[error("connecting: {0}")]
    Connect(#[source] io::Error),
    /// The connection broke.
    #[error("{0}")]
    Broken(#[from] hyper::Error),
    /// Not within the stage's time.
    #[error("no answer within {0:?}")]
    Timeout(Duration),
    /// The engine switched to a protocol that nobody asked for.
    #[error("switched protocols unasked")]
    Switched,
    /// Longer than [`MAX_WHOLE_BYTES`].
    #[error("an answer over {MAX_WHOLE_BYTES} bytes")]
    TooLong,
}

/// How engines are reached.
#[derive(Debug, Clone)]
pub struct EngineSettings {
    /// Time to connect, TLS included.
    pub connect_timeout: Duration,
    /// Connections kept to one engine.
    pub max_idle_per_host: usize,
    /// TLS by stage: encode, prefill, decode; bootstrap servers have none.
    pub tls: [Option<Arc<ClientConfig>>; 3],
}

/// All engines.
#[derive(Debug)]
pub(super) struct Engines {
    settings: EngineSettings,
    metrics: SidecarMetrics,
    idle: Arc<Mutex<Idle>>,
}

#[derive(Debug, Default)]
struct Idle {
    hosts: HashMap<PoolKey, Host>,
    swept: Option<Instant>,
}

#[derive(Debug)]
struct Host {
    connections: Vec<Connection>,
    used: Instant,
}

/// TLS differs by stage.
type PoolKey = (Stage, HostPort);

#[derive(Debug)]
struct Connection {
    sender: SendRequest<EngineBody>,
    /// Dropped, it closes the socket.
    _driver: AbortOnDropHandle<()>,
    idle_since: Instant,
}

impl Engines {
    pub(super) fn new(settings: EngineSettings, metrics: SidecarMetrics) -> Self {
        Self {
            settings,
            metrics,
            idle: Arc::default(),
        }
    }

    pub(super) fn metrics(&self) -> &SidecarMetrics {
        &self.metrics
    }

    /// Connections that wait to be used again.
    pub(super) fn kept(&self) -> usize {
        let idle = self.idle.lock();
        let open = |host: &Host| host.connections.iter().filter(|c| c.is_usable()).count();
        idle.hosts.values().map(open).sum()
    }

    /// Sends `request` and returns the answer once its head is there. `limit` bounds the time to it.
    pub(super) async fn call(
        &self,
        stage: Stage,
        target: &HostPort,
        request: Request<EngineBody>,
        limit: Option<Duration>,
    ) -> Result<Response<LegBody>, CallError> {
        let active = self.metrics.begin(stage);
        let sending = self.send(stage, target, request, active);
        let sent = match limit {
            Some(limit) => tokio::time::timeout(limit, sending)
                .await
                .unwrap_or(Err(CallError::Timeout(limit))),
            None => sending.await,
        };
        if sent.is_err() {
            self.metrics.failed(stage);
        }
        sent
    }

    async fn send(
        &self,
        stage: Stage,
        target: &HostPort,
        mut request: Request<EngineBody>,
        active: ActiveLeg,
    ) -> Result<Response<LegBody>, CallError> {
        let key = (stage, target.clone());
        let may_switch = request.headers().contains_key(header::UPGRADE);
        loop {
            let kept = self.idle.lock().take(&key);
            let reused = kept.is_some();
            let mut connection = match kept {
                Some(kept) => kept,
                None => self.connect(stage, target).await?,
            };
            if connection.sender.ready().await.is_err() {
                // Closed by the engine between calls.
                continue;
            }
            match connection.sender.try_send_request(request).await {
                Ok(response) => {
                    let (head, body) = response.into_parts();
                    let switched = head.status == StatusCode::SWITCHING_PROTOCOLS;
                    if switched && !may_switch {
                        return Err(CallError::Switched);
                    }
                    let mut leg = LegBody {
                        body,
                        held: Some((active, connection, key)),
                        idle: Arc::clone(&self.idle),
                        max_idle: self.settings.max_idle_per_host,
                        span: None,
                    };
                    if leg.body.is_end_stream() && !switched {
                        leg.release();
                    }
                    return Ok(Response::from_parts(head, leg));
                }
                Err(mut error) => match error.take_message().filter(|_| reused) {
                    // It was closed while idle and has seen nothing of this request.
                    Some(unsent) => request = unsent,
                    None => return Err(error.into_error().into()),
                },
            }
        }
    }

    async fn connect(&self, stage: Stage, target: &HostPort) -> Result<Connection, CallError> {
        let limit = self.settings.connect_timeout;
        let opening = async {
            let stream = TcpStream::connect((target.host(), target.port())).await?;
            stream.set_nodelay(true)?;
            let Some(Some(tls)) = self.settings.tls.get(stage as usize) else {
                return handshake(stream).await;
            };
            let name = ServerName::try_from(target.host().to_owned()).map_err(io::Error::other)?;
            let stream = TlsConnector::from(Arc::clone(tls))
                .connect(name, stream)
                .await?;
            handshake(stream).await
        };
        tokio::time::timeout(limit, opening)
            .await
            .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
            .map_err(CallError::Connect)
    }
}

async fn handshake<S>(stream: S) -> io::Result<Connection>
where
    S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Send + Unpin + 'static,
{
    let (sender, connection) = http1::Builder::new()
        .handshake(TokioIo::new(stream))
        .await
        .map_err(io::Error::other)?;
    let driver = tokio::spawn(async move {
        // Its error reaches the call that waits for an answer.
        let _ = connection.with_upgrades().await;
    });
    Ok(Connection {
        sender,
        _driver: AbortOnDropHandle::new(driver),
        idle_since: Instant::now(),
    })
}

impl Connection {
    fn is_usable(&self) -> bool {
        !self.sender.is_closed() && self.idle_since.elapsed() < IDLE_TIMEOUT
    }
}

impl Idle {
    fn take(&mut self, key: &PoolKey) -> Option<Connection> {
        let host = self.hosts.get_mut(key)?;
        host.used = Instant::now();
        while let Some(kept) = host.connections.pop() {
            if kept.is_usable() {
                return Some(kept);
            }
        }
        None
    }

    /// Closes what was not used for long. An endpoint that is named no more is not asked for either, so
    /// this looks at all of them, once in [`IDLE_TIMEOUT`].
    fn sweep(&mut self) {
        let now = Instant::now();
        let last = *self.swept.get_or_insert(now);
        if now.duration_since(last) < IDLE_TIMEOUT {
            return;
        }
        self.swept = Some(now);
        self.hosts.retain(|_, host| {
            host.connections.retain(Connection::is_usable);
            !host.connections.is_empty()
        });
    }

    fn put(&mut self, key: PoolKey, connection: Connection, max: usize) {
        self.sweep();
        if self.hosts.len() >= MAX_HOSTS && !self.hosts.contains_key(&key) {
            let oldest = self.hosts.iter().min_by_key(|(_, host)| host.used);
            if let Some(oldest) = oldest.map(|(key, _)| key.clone()) {
                self.hosts.remove(&oldest);
            }
        }
        let host = self.hosts.entry(key).or_insert_with(|| Host {
            connections: Vec::new(),
            used: Instant::now(),
        });
        host.connections.retain(Connection::is_usable);
        if host.connections.len() < max {
            host.connections.push(connection);
        }
    }
}

/// An engine's answer as it arrives. Read to its end, the connection is kept for others; dropped
/// before, it is closed.
#[derive(Debug)]
pub(super) struct LegBody {
    body: Incoming,
    held: Option<(ActiveLeg, Connection, PoolKey)>,
    idle: Arc<Mutex<Idle>>,
    max_idle: usize,
    /// Of the call, while its answer is not read to the end.
    span: Option<LegSpan>,
}

impl LegBody {
    /// Its end is the end of `span`.
    pub(super) fn with_span(mut self, span: LegSpan) -> Self {
        if self.held.is_some() {
            self.span = Some(span);
        } else {
            span.end();
        }
        self
    }

    /// Nothing more is read, and that is no failure.
    pub(super) fn end(mut self) {
        if let Some(span) = self.span.take() {
            span.end();
        }
    }

    /// Reads the rest, at most [`MAX_WHOLE_BYTES`] of it.
    pub(super) async fn whole(mut self) -> Result<Bytes, CallError> {
        let mut first = Bytes::new();
        let mut rest = BytesMut::new();
        while let Some(frame) = self.next_frame().await {
            let Ok(piece) = frame?.into_data() else {
                continue;
            };
            if first.is_empty() {
                first = piece;
                continue;
            }
            if rest.is_empty() {
                rest.extend_from_slice(&first);
            }
            if rest.len() + piece.len() > MAX_WHOLE_BYTES {
                self.fail();
                return Err(CallError::TooLong);
            }
            rest.extend_from_slice(&piece);
        }
        Ok(if rest.is_empty() {
            first
        } else {
            rest.freeze()
        })
    }

    /// The next piece of data; trailers are passed over.
    pub(super) async fn next_piece(&mut self) -> Option<Result<Bytes, hyper::Error>> {
        loop {
            match self.next_frame().await? {
                Ok(frame) => {
                    if let Ok(piece) = frame.into_data() {
                        return Some(Ok(piece));
                    }
                }
                Err(error) => return Some(Err(error)),
            }
        }
    }

    async fn next_frame(&mut self) -> Option<Result<Frame<Bytes>, hyper::Error>> {
        let frame = self.body.frame().await;
        match &frame {
            None => self.release(),
            Some(Err(_)) => self.fail(),
            Some(Ok(_)) => {}
        }
        frame
    }

    /// The rest of the answer will not come, or is not wanted.
    fn fail(&mut self) {
        if let Some((active, ..)) = self.held.take() {
            active.failed();
        }
    }

    fn release(&mut self) {
        if let Some(span) = self.span.take() {
            span.end();
        }
        let Some((_active, mut connection, key)) = self.held.take() else {
            return;
        };
        if !connection.sender.is_closed() {
            connection.idle_since = Instant::now();
            self.idle.lock().put(key, connection, self.max_idle);
        }
    }
}

impl Body for LegBody {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, io::Error>>> {
        let this = self.get_mut();
        let frame = std::task::ready!(Pin::new(&mut this.body).poll_frame(cx));
        // The end is known before it is polled for when the length was announced.
        match &frame {
            Some(Err(_)) => this.fail(),
            _ if frame.is_none() || this.body.is_end_stream() => this.release(),
            _ => {}
        }
        Poll::Ready(frame.map(|frame| frame.map_err(io::Error::other)))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
