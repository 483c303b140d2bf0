//! One kept-alive HTTP/1.1 connection that fetches one path.

use std::net::SocketAddr;
use std::sync::Arc;

use bytes::Bytes;
use http::{Request, StatusCode, header};
use http_body_util::{BodyExt, Empty};
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::client::danger::{
    HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier,
};
use tokio_rustls::rustls::crypto::{
    CryptoProvider, ring, verify_tls12_signature, verify_tls13_signature,
};
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use tokio_rustls::rustls::{
    ClientConfig, DigitallySignedStruct, Error as TlsError, RootCertStore, SignatureScheme,
};

use super::MetricsDataSource;

/// Longest exposition that is read; the recorded ones are some 60 KB.
pub const MAX_EXPOSITION_BYTES: usize = 8 << 20;

/// Why a scrape failed.
#[derive(Debug, thiserror::Error)]
pub enum ScrapeError {
    /// Connecting, TLS or reading failed.
    #[error("{0}")]
    Io(#[from] std::io::Error),
    /// The peer does not speak HTTP/1.1.
    #[error("{0}")]
    Http(#[from] hyper::Error),
    /// Another status than 200; redirects are not followed.
    #[error("status {0}")]
    Status(StatusCode),
    /// More than [`MAX_EXPOSITION_BYTES`].
    #[error("exposition over {MAX_EXPOSITION_BYTES} bytes")]
    TooLong,
    /// Path or host cannot be put into a request.
    #[error("{0}")]
    Request(#[from] http::Error),
    /// Certificates of the source cannot be used.
    #[error("{0}")]
    Tls(String),
}

/// TLS settings of a source, made once.
pub fn tls_config(source: &MetricsDataSource) -> Result<Option<Arc<ClientConfig>>, ScrapeError> {
    if !source.tls {
        return Ok(None);
    }
    let tls = |error: &dyn std::fmt::Display| ScrapeError::Tls(error.to_string());
    let provider = Arc::new(ring::default_provider());
    let builder = ClientConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .map_err(|e| tls(&e))?;
    let builder = match (&source.ca_cert_path, source.insecure_skip_verify) {
        (Some(path), _) => {
            let mut roots = RootCertStore::empty();
            for certificate in CertificateDer::pem_file_iter(path).map_err(|e| tls(&e))? {
                roots
                    .add(certificate.map_err(|e| tls(&e))?)
                    .map_err(|e| tls(&e))?;
            }
            builder.with_root_certificates(roots)
        }
        (None, true) => builder
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(AcceptAny(provider))),
        (None, false) => {
            return Err(ScrapeError::Tls(
                "insecureSkipVerify: false needs caCertPath".to_owned(),
            ));
        }
    };
    let config = match &source.client_pair {
        None => builder.with_no_client_auth(),
        Some((certificate, key)) => {
            let chain = CertificateDer::pem_file_iter(certificate).map_err(|e| tls(&e))?;
            let chain = chain.collect::<Result<_, _>>().map_err(|e| tls(&e))?;
            let key = PrivateKeyDer::from_pem_file(key).map_err(|e| tls(&e))?;
            builder
                .with_client_auth_cert(chain, key)
                .map_err(|e| tls(&e))?
        }
    };
    Ok(Some(Arc::new(config)))
}

/// Accepts any certificate, as every published setup of engine metrics over TLS does.
#[derive(Debug)]
struct AcceptAny(Arc<CryptoProvider>);

impl ServerCertVerifier for AcceptAny {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, TlsError> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, TlsError> {
        verify_tls12_signature(
            message,
            certificate,
            signature,
            &self.0.signature_verification_algorithms,
        )
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, TlsError> {
        verify_tls13_signature(
            message,
            certificate,
            signature,
            &self.0.signature_verification_algorithms,
        )
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

/// A connection to one endpoint, opened when needed and kept.
#[derive(Debug)]
pub struct Connection {
    address: SocketAddr,
    path: String,
    tls: Option<Arc<ClientConfig>>,
    sender: Option<SendRequest<Empty<Bytes>>>,
}

impl Connection {
    /// A closed connection to fetch `path` from `address`.
    pub fn new(address: SocketAddr, path: String, tls: Option<Arc<ClientConfig>>) -> Self {
        Self {
            address,
            path,
            tls,
            sender: None,
        }
    }

    /// Fetches into `body`, whose memory is reused. After an error the connection is closed.
    pub async fn fetch(&mut self, body: &mut Vec<u8>) -> Result<(), ScrapeError> {
        // Taken out, so that an error or a cancelled call leaves no half-used connection behind.
        let mut sender = match self.sender.take() {
            Some(sender) if !sender.is_closed() => sender,
            _ => self.open().await?,
        };
        sender.ready().await?;
        let request = Request::get(&self.path)
            .header(header::HOST, self.address.to_string())
            .header(header::ACCEPT, "text/plain")
            .body(Empty::new())?;
        let response = sender.send_request(request).await?;
        if response.status() != StatusCode::OK {
            return Err(ScrapeError::Status(response.status()));
        }
        body.clear();
        let mut incoming = response.into_body();
        while let Some(frame) = incoming.frame().await {
            if let Ok(data) = frame?.into_data() {
                if body.len() + data.len() > MAX_EXPOSITION_BYTES {
                    return Err(ScrapeError::TooLong);
                }
                body.extend_from_slice(&data);
            }
        }
        self.sender = Some(sender);
        Ok(())
    }

    async fn open(&self) -> Result<SendRequest<Empty<Bytes>>, ScrapeError> {
        let stream = TcpStream::connect(self.address).await?;
        stream.set_nodelay(true)?;
        match &self.tls {
            None => start(stream).await,
            Some(config) => {
                let connector = TlsConnector::from(Arc::clone(config));
                let name = ServerName::from(self.address.ip());
                start(connector.connect(name, stream).await?).await
            }
        }
    }
}

async fn start(
    stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
) -> Result<SendRequest<Empty<Bytes>>, ScrapeError> {
    let (sender, connection) = handshake(TokioIo::new(stream)).await?;
    // Ends by itself when the sender is dropped or the peer hangs up.
    tokio::spawn(async move {
        if let Err(error) = connection.await {
            tracing::trace!(%error, "scrape connection ended");
        }
    });
    Ok(sender)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    /// Answers each request of each connection with `reply`; counts connections.
    async fn server(reply: Vec<u8>) -> (SocketAddr, Arc<std::sync::atomic::AtomicUsize>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let connections = Arc::new(std::sync::atomic::AtomicUsize::new(0));
        let count = Arc::clone(&connections);
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                count.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
                let reply = reply.clone();
                tokio::spawn(async move {
                    let mut seen = Vec::new();
                    let mut buffer = [0; 1024];
                    while let Ok(n @ 1..) = stream.read(&mut buffer).await {
                        seen.extend_from_slice(&buffer[..n]);
                        if seen.ends_with(b"\r\n\r\n") {
                            seen.clear();
                            if stream.write_all(&reply).await.is_err() {
                                return;
                            }
                        }
                    }
                });
            }
        });
        (address, connections)
    }

    async fn fetch(reply: &[u8]) -> Result<Vec<u8>, ScrapeError> {
        let (address, _) = server(reply.to_vec()).await;
        let mut body = Vec::new();
        Connection::new(address, "/metrics".to_owned(), None)
            .fetch(&mut body)
            .await
            .map(|()| body)
    }

    #[tokio::test]
    async fn one_connection_serves_many_scrapes() {
        let (address, connections) =
            server(b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\na 1".to_vec()).await;
        let mut connection = Connection::new(address, "/metrics".to_owned(), None);
        let mut body = Vec::new();
        for _ in 0..5 {
            connection.fetch(&mut body).await.unwrap();
            assert_eq!(body, b"a 1");
        }
        assert_eq!(connections.load(std::sync::atomic::Ordering::SeqCst), 1);
    }

    #[tokio::test]
    async fn chunked_bodies_are_put_together() {
        let reply =
            b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\na \r\n1\r\n1\r\n0\r\n\r\n";
        assert_eq!(fetch(reply).await.unwrap(), b"a 1");
    }

    #[tokio::test]
    async fn errors_redirects_and_floods_are_refused() {
        for status in ["500 Oops", "302 Found", "404 No"] {
            let reply = format!("HTTP/1.1 {status}\r\ncontent-length: 0\r\n\r\n");
            assert!(
                matches!(fetch(reply.as_bytes()).await, Err(ScrapeError::Status(_))),
                "{status}"
            );
        }
        assert!(matches!(
            fetch(b"hello\r\n\r\n").await,
            Err(ScrapeError::Http(_))
        ));
        let mut flood = format!(
            "HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n",
            MAX_EXPOSITION_BYTES + 1
        )
        .into_bytes();
        flood.resize(flood.len() + MAX_EXPOSITION_BYTES + 1, b'x');
        assert!(matches!(fetch(&flood).await, Err(ScrapeError::TooLong)));
    }

    #[tokio::test]
    async fn a_dead_endpoint_is_an_error() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        drop(listener);
        let mut connection = Connection::new(address, "/metrics".to_owned(), None);
        assert!(matches!(
            connection.fetch(&mut Vec::new()).await,
            Err(ScrapeError::Io(_))
        ));
    }
}
