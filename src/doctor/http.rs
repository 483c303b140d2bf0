//! One HTTP/1.1 request with limits.

use std::net::SocketAddr;
use std::sync::Arc;

use bytes::Bytes;
use http::{HeaderValue, Request, header};
use http_body_util::{BodyExt, Full, Limited};
use hyper::client::conn::http1::handshake;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::pki_types::ServerName;

use super::grpc::TIMEOUT;
use crate::datalayer::scrape::tls::accept_any;

/// Longest body that is read: a proxy's whole configuration fits.
pub const MAX_BODY_BYTES: usize = 32 << 20;

/// Status and body of a GET; any certificate is accepted when `tls`. The error is a sentence.
pub async fn get(address: SocketAddr, tls: bool, path: &str) -> Result<(u16, Bytes), String> {
    let request = Request::get(path)
        .body(Full::default())
        .map_err(|error| error.to_string())?;
    tokio::time::timeout(TIMEOUT, send(&address.to_string(), tls, request))
        .await
        .unwrap_or_else(|_| Err(format!("no answer within {} s", TIMEOUT.as_secs())))
}

/// Status and body of the answer to `request` at `server`, `host:port`; any certificate is accepted when
/// `tls`. How long it may take is the caller's to say. The error is a sentence.
pub async fn send(
    server: &str,
    tls: bool,
    request: Request<Full<Bytes>>,
) -> Result<(u16, Bytes), String> {
    let stream = TcpStream::connect(server)
        .await
        .map_err(|error| format!("cannot connect: {error}"))?;
    if !tls {
        return ask(stream, server, request).await;
    }
    let host = server.rsplit_once(':').map_or(server, |(host, _)| host);
    let name = ServerName::try_from(host.trim_matches(['[', ']']).to_owned())
        .map_err(|error| format!("{host}: {error}"))?;
    let stream = TlsConnector::from(Arc::new(accept_any()))
        .connect(name, stream)
        .await
        .map_err(|error| format!("no TLS: {error}"))?;
    ask(stream, server, request).await
}

async fn ask<S>(
    stream: S,
    server: &str,
    mut request: Request<Full<Bytes>>,
) -> Result<(u16, Bytes), String>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let sentence = |error: hyper::Error| format!("no HTTP: {error}");
    let host = HeaderValue::from_str(server).map_err(|error| error.to_string())?;
    request.headers_mut().insert(header::HOST, host);
    let (mut sender, connection) = handshake(TokioIo::new(stream)).await.map_err(sentence)?;
    tokio::spawn(async move {
        // Errors show up at the request.
        let _ = connection.await;
    });
    let response = sender.send_request(request).await.map_err(sentence)?;
    let status = response.status().as_u16();
    let body = Limited::new(response.into_body(), MAX_BODY_BYTES)
        .collect()
        .await
        .map_err(|error| format!("reading the answer: {error}"))?;
    Ok((status, body.to_bytes()))
}
