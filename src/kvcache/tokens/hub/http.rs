//! GET over HTTP/1.1 with limits, one connection each.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderValue, Request, Response, StatusCode, Uri, header};
use http_body_util::{BodyExt, Empty};
use hyper::body::Incoming;
use hyper::client::conn::http1::handshake;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::ClientConfig;
use tokio_rustls::rustls::pki_types::ServerName;

use super::HubError;
use super::proxy::Proxy;
use crate::datalayer::scrape::tls::system_trust;

const USER_AGENT: &str = concat!("pinpod/", env!("CARGO_PKG_VERSION"));

/// Host of a URL, for errors.
pub(super) fn host(url: &Uri) -> String {
    url.host().unwrap_or_default().to_owned()
}

pub(super) fn exchange(url: &Uri, reason: impl std::fmt::Display) -> HubError {
    HubError::Exchange {
        host: host(url),
        reason: reason.to_string(),
    }
}

pub(super) fn protocol(url: &Uri, reason: impl Into<String>) -> HubError {
    HubError::Protocol {
        host: host(url),
        reason: reason.into(),
    }
}

/// Sends requests.
#[derive(Debug, Clone)]
pub(super) struct Client {
    pub(super) timeout: Duration,
    pub(super) proxy: Option<Proxy>,
    /// Instead of what the system trusts.
    pub(super) tls: Option<Arc<ClientConfig>>,
}

impl Client {
    /// The head of the answer; redirects are the caller's.
    pub(super) async fn get(
        &self,
        url: &Uri,
        token: Option<&str>,
    ) -> Result<Response<Incoming>, HubError> {
        match tokio::time::timeout(self.timeout, self.send(url, token)).await {
            Ok(answered) => answered,
            Err(_) => Err(exchange(
                url,
                format!("no answer within {:?}", self.timeout),
            )),
        }
    }

    /// The next piece of an answer's body; `None` at its end, which is where the head said.
    pub(super) async fn piece(
        &self,
        url: &Uri,
        response: &mut Response<Incoming>,
    ) -> Result<Option<Bytes>, HubError> {
        loop {
            let frame = tokio::time::timeout(self.timeout, response.body_mut().frame()).await;
            let frame = frame.map_err(|_| exchange(url, "the answer stopped midway"))?;
            let Some(frame) = frame else {
                return Ok(None);
            };
            let frame = frame.map_err(|error| exchange(url, format!("cut short: {error}")))?;
            if let Ok(data) = frame.into_data() {
                return Ok(Some(data));
            }
        }
    }

    async fn send(&self, url: &Uri, token: Option<&str>) -> Result<Response<Incoming>, HubError> {
        let secure = match url.scheme_str() {
            Some("https") => true,
            Some("http") => false,
            _ => return Err(protocol(url, "neither http nor https")),
        };
        let name = url.host().unwrap_or_default().trim_matches(['[', ']']);
        let port = url.port_u16().unwrap_or(if secure { 443 } else { 80 });
        if !secure {
            return ask(connect(url, name, port).await?, url, token).await;
        }
        if let Some(proxy) = self.proxy.as_ref().filter(|proxy| proxy.serves(name)) {
            let stream = proxy.tunnel(name, port).await?;
            return self.ask_securely(stream, url, name, token).await;
        }
        let stream = connect(url, name, port).await?;
        self.ask_securely(stream, url, name, token).await
    }

    async fn ask_securely<S>(
        &self,
        stream: S,
        url: &Uri,
        name: &str,
        token: Option<&str>,
    ) -> Result<Response<Incoming>, HubError>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let config = match &self.tls {
            Some(config) => Arc::clone(config),
            None => system_trust().map_err(|error| exchange(url, error))?,
        };
        let server = ServerName::try_from(name.to_owned()).map_err(|e| exchange(url, e))?;
        let stream = TlsConnector::from(config).connect(server, stream).await;
        let stream = stream.map_err(|error| exchange(url, format!("no TLS: {error}")))?;
        ask(stream, url, token).await
    }
}

async fn connect(url: &Uri, name: &str, port: u16) -> Result<TcpStream, HubError> {
    let stream = TcpStream::connect((name, port)).await;
    stream.map_err(|error| exchange(url, format!("cannot connect: {error}")))
}

async fn ask<S>(stream: S, url: &Uri, token: Option<&str>) -> Result<Response<Incoming>, HubError>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (mut sender, connection) = handshake(TokioIo::new(stream))
        .await
        .map_err(|error| exchange(url, error))?;
    // Ends with the answer. Its errors show up there.
    tokio::spawn(async move {
        let _ = connection.await;
    });
    let target = url.path_and_query().map_or("/", |target| target.as_str());
    let authority = url.authority().map_or("", |authority| authority.as_str());
    let mut request = Request::get(target)
        .header(header::HOST, authority)
        .header(header::USER_AGENT, USER_AGENT)
        // Sizes are those of the files, not of what compression makes of them.
        .header(header::ACCEPT_ENCODING, "identity")
        .body(Empty::<Bytes>::new())
        .map_err(|error| protocol(url, error.to_string()))?;
    if let Some(token) = token {
        let mut value = HeaderValue::try_from(format!("Bearer {token}"))
            .map_err(|_| exchange(url, "the token is not one line of text"))?;
        value.set_sensitive(true);
        request.headers_mut().insert(header::AUTHORIZATION, value);
    }
    let response = sender.send_request(request).await;
    response.map_err(|error| exchange(url, error))
}

/// True when two URLs lead to the same server the same way.
pub(super) fn same_origin(one: &Uri, other: &Uri) -> bool {
    let port = |url: &Uri| {
        let usual = if url.scheme_str() == Some("https") {
            443
        } else {
            80
        };
        url.port_u16().unwrap_or(usual)
    };
    let host = |url: &Uri| url.host().unwrap_or_default().to_ascii_lowercase();
    one.scheme_str() == other.scheme_str() && host(one) == host(other) && port(one) == port(other)
}

/// Where an answer sends us; `None` when it is no redirect.
pub(super) fn location<B>(url: &Uri, response: &Response<B>) -> Result<Option<Uri>, HubError> {
    let status = response.status();
    let redirects = [301, 302, 303, 307, 308].map(|code| StatusCode::from_u16(code).ok());
    if !redirects.contains(&Some(status)) {
        return Ok(None);
    }
    let target = response.headers().get(header::LOCATION);
    let target = target.and_then(|value| value.to_str().ok());
    let target = target.ok_or_else(|| protocol(url, format!("status {status} leads nowhere")))?;
    let scheme = url.scheme_str().unwrap_or("https");
    let absolute = if target.starts_with("//") {
        format!("{scheme}:{target}")
    } else if target.starts_with('/') {
        let authority = url.authority().map_or("", |authority| authority.as_str());
        format!("{scheme}://{authority}{target}")
    } else {
        target.to_owned()
    };
    let next: Uri = absolute
        .parse()
        .map_err(|_| protocol(url, "a redirect to what is no URL"))?;
    if scheme == "https" && next.scheme_str() != Some("https") {
        return Err(protocol(url, "a redirect away from https"));
    }
    Ok(Some(next))
}
