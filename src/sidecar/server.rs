//! Listeners, one for each rank: HTTP/1.1 and HTTP/2, plain or over TLS.

use std::convert::Infallible;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use http::Request;
use hyper::body::Incoming;
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::proxy::Sidecar;
use super::upgrade::TunnelSlot;

/// Connections of one listener; further ones wait in the accept queue.
const MAX_CONNECTIONS: usize = 16_384;
/// Time for a TLS handshake, and for the first bytes of a connection.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(30);
/// Time to the next request's head, which for a kept connection is its idle time.
const HEAD_TIMEOUT: Duration = Duration::from_mins(5);
/// Longest request head.
const MAX_HEAD_BYTES: u32 = 1 << 20;
/// Streams of one HTTP/2 connection.
const MAX_STREAMS: u32 = 1024;
/// What an HTTP/2 connection without TLS begins with; no HTTP/1 method begins so.
const HTTP2_PREFACE: &[u8] = b"PRI";

/// The certificate in use, if the listener has TLS.
pub type ListenerTls = Option<Arc<ArcSwap<ServerConfig>>>;

/// One rank's listener.
#[derive(Debug)]
pub struct RankServer {
    /// Whose requests these are.
    pub rank: u16,
    /// What answers.
    pub sidecar: Arc<Sidecar>,
    /// TLS, if any.
    pub tls: ListenerTls,
    /// Connections, so that shutdown can wait for them.
    pub connections: TaskTracker,
}

impl RankServer {
    /// Accepts until `stop`; connections then finish the requests they have, until `cancel`.
    pub async fn serve(
        self: Arc<Self>,
        listener: TcpListener,
        stop: CancellationToken,
        cancel: CancellationToken,
    ) {
        let permits = Arc::new(tokio::sync::Semaphore::new(MAX_CONNECTIONS));
        loop {
            let Ok(permit) = Arc::clone(&permits).acquire_owned().await else {
                return;
            };
            let accepted = tokio::select! {
                () = stop.cancelled() => return,
                accepted = listener.accept() => accepted,
            };
            let stream = match accepted {
                Ok((stream, _)) => stream,
                Err(error) => {
                    tracing::warn!(%error, "accept failed");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    continue;
                }
            };
            let (server, stop, cancel) = (Arc::clone(&self), stop.clone(), cancel.clone());
            self.connections.spawn(async move {
                tokio::select! {
                    () = server.connection(stream, stop) => {}
                    () = cancel.cancelled() => {}
                }
                drop(permit);
            });
        }
    }

    async fn connection(self: Arc<Self>, stream: TcpStream, stop: CancellationToken) {
        if stream.set_nodelay(true).is_err() {
            return;
        }
        let Some(tls) = &self.tls else {
            let begins = tokio::time::timeout(HANDSHAKE_TIMEOUT, begins_http2(&stream));
            if let Ok(Ok(http2)) = begins.await {
                self.http(stream, http2, stop).await;
            }
            return;
        };
        let accepting = TlsAcceptor::from(tls.load_full()).accept(stream);
        match tokio::time::timeout(HANDSHAKE_TIMEOUT, accepting).await {
            Ok(Ok(stream)) => {
                let http2 = stream.get_ref().1.alpn_protocol() == Some(b"h2");
                self.http(stream, http2, stop).await;
            }
            Ok(Err(error)) => tracing::debug!(%error, "TLS handshake failed"),
            Err(_) => tracing::debug!("TLS handshake took too long"),
        }
    }

    async fn http<S>(self: Arc<Self>, stream: S, http2: bool, stop: CancellationToken)
    where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let tunnel = TunnelSlot::default();
        let offered = (!http2).then(|| tunnel.clone());
        let service = service_fn(move |mut request: Request<Incoming>| {
            let server = Arc::clone(&self);
            if let Some(tunnel) = offered.clone() {
                request.extensions_mut().insert(tunnel);
            }
            async move { Ok::<_, Infallible>(server.sidecar.answer(server.rank, request).await) }
        });
        // A connection that breaks drops its requests and with them every call made for them.
        macro_rules! until_stopped {
            ($connection:expr) => {{
                let mut connection = pin!($connection);
                tokio::select! {
                    _ = connection.as_mut() => {}
                    () = stop.cancelled() => {
                        connection.as_mut().graceful_shutdown();
                        let _ = connection.await;
                    }
                }
            }};
        }
        if http2 {
            let mut builder = http2::Builder::new(TokioExecutor::new());
            builder
                .timer(TokioTimer::new())
                .max_concurrent_streams(MAX_STREAMS)
                .max_header_list_size(MAX_HEAD_BYTES);
            until_stopped!(builder.serve_connection(TokioIo::new(stream), service));
        } else {
            let mut builder = http1::Builder::new();
            builder
                .timer(TokioTimer::new())
                .header_read_timeout(HEAD_TIMEOUT)
                .max_buf_size(MAX_HEAD_BYTES as usize)
                .max_header_size(MAX_HEAD_BYTES as usize);
            let connection = builder.serve_connection(TokioIo::new(stream), service);
            until_stopped!(connection.with_upgrades());
            tunnel.pass().await;
        }
    }
}

/// Looks at the first bytes without taking them.
async fn begins_http2(stream: &TcpStream) -> std::io::Result<bool> {
    let mut first = [0; HTTP2_PREFACE.len()];
    loop {
        let read = stream.peek(&mut first).await?;
        let seen = first.get(..read).unwrap_or_default();
        if read == 0 || read == first.len() || !HTTP2_PREFACE.starts_with(seen) {
            return Ok(seen == HTTP2_PREFACE);
        }
        // One or two bytes of what may be either; the rest is on its way.
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}
