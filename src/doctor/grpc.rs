//! A gRPC connection for probing: plaintext or TLS that accepts any certificate and keeps it.

use std::future::Future;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use http::{Request, Response, Uri};
use hyper::body::Incoming;
use hyper::client::conn::http2::{SendRequest, handshake};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::pki_types::ServerName;
use tonic::body::Body;

use crate::datalayer::scrape::tls::accept_any;
use crate::extproc::proto::health::HealthCheckRequest;
use crate::extproc::proto::health::health_check_response::ServingStatus;
use crate::extproc::proto::health::health_client::HealthClient;

/// Longest wait for a connection, its handshake, or an answer.
pub const TIMEOUT: Duration = Duration::from_secs(3);

/// Why a probe failed.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// Nobody accepts connections there.
    #[error("cannot connect: {0}")]
    Connect(std::io::Error),
    /// The peer does not speak TLS, or no version of it that we do.
    #[error("no TLS: {0}")]
    Tls(std::io::Error),
    /// The peer does not speak HTTP/2 this way.
    #[error("no HTTP/2: {0}")]
    Http2(hyper::Error),
    /// The call was answered with an error.
    #[error("gRPC status {:?}: {}", .0.code(), .0.message())]
    Status(Box<tonic::Status>),
    /// Nothing came in [`TIMEOUT`].
    #[error("no answer within {} s", TIMEOUT.as_secs())]
    Timeout,
}

/// One HTTP/2 connection to a gRPC server.
#[derive(Debug, Clone)]
pub struct Channel {
    sender: SendRequest<Body>,
    /// What the peer showed, leaf first; empty on plaintext.
    certificates: Vec<Vec<u8>>,
}

impl Channel {
    /// Connects; with `tls`, any certificate is accepted, as gateways do with a picker.
    pub async fn connect(address: SocketAddr, tls: bool) -> Result<Self, ProbeError> {
        let connected = async {
            let stream = TcpStream::connect(address)
                .await
                .map_err(ProbeError::Connect)?;
            if !tls {
                return Self::over(stream, Vec::new()).await;
            }
            let mut config = accept_any();
            config.alpn_protocols = vec![b"h2".to_vec()];
            let name = ServerName::IpAddress(address.ip().into());
            let stream = TlsConnector::from(Arc::new(config))
                .connect(name, stream)
                .await
                .map_err(ProbeError::Tls)?;
            let shown = stream.get_ref().1.peer_certificates().unwrap_or_default();
            let certificates = shown.iter().map(|c| c.to_vec()).collect();
            Self::over(stream, certificates).await
        };
        tokio::time::timeout(TIMEOUT, connected)
            .await
            .unwrap_or(Err(ProbeError::Timeout))
    }

    async fn over<S>(stream: S, certificates: Vec<Vec<u8>>) -> Result<Self, ProbeError>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let (sender, connection) = handshake(TokioExecutor::new(), TokioIo::new(stream))
            .await
            .map_err(ProbeError::Http2)?;
        tokio::spawn(async move {
            // Errors show up at the call.
            let _ = connection.await;
        });
        Ok(Self {
            sender,
            certificates,
        })
    }

    /// Certificates of the peer in DER, leaf first; none on plaintext.
    pub fn certificates(&self) -> &[Vec<u8>] {
        &self.certificates
    }

    /// Asks `grpc.health.v1.Health/Check` about `service`.
    pub async fn health(&self, service: &str) -> Result<ServingStatus, ProbeError> {
        let mut client = HealthClient::with_origin(self.clone(), origin());
        let request = HealthCheckRequest {
            service: service.to_owned(),
        };
        let answer = tokio::time::timeout(TIMEOUT, client.check(request))
            .await
            .map_err(|_| ProbeError::Timeout)?
            .map_err(|status| ProbeError::Status(Box::new(status)))?;
        Ok(answer.get_ref().status())
    }
}

/// What stands in `:scheme` and `:authority`; no server we know looks at them.
pub fn origin() -> Uri {
    Uri::from_static("http://picker")
}

impl tower_service::Service<Request<Body>> for Channel {
    type Response = Response<Incoming>;
    type Error = hyper::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.sender.poll_ready(context)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        Box::pin(self.sender.send_request(request))
    }
}
