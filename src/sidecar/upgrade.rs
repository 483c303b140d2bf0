//! Connections that change their protocol, WebSockets above all: once the engine agrees, bytes pass both
//! ways until one side breaks or both have ended.
//!
//! Only routes that pass through can be upgraded, and only over HTTP/1.1, as the reference's proxy does it.

use std::pin::Pin;
use std::sync::Arc;

use http::{HeaderMap, HeaderValue, Request, Response, Version, header};
use hyper::body::Incoming;
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use tokio::io::copy_bidirectional;

use super::answer::{self, Answer, strip_hop_by_hop};
use super::body::AnswerBody;
use super::engines::LegBody;
use super::exchange::Refusal;
use super::host_port::HostPort;
use super::metrics::Path;
use super::proxy::Sidecar;

/// What follows the last answer of a connection. The listener's task waits for it, so that a tunnel counts
/// as its connection did, towards limits and at shutdown.
#[derive(Clone, Default)]
pub(super) struct TunnelSlot(Arc<Mutex<Option<Tunnel>>>);

type Tunnel = Pin<Box<dyn Future<Output = ()> + Send>>;

impl TunnelSlot {
    /// Passes bytes until the tunnel ends; nothing to do without one.
    pub(super) async fn pass(&self) {
        let tunnel = self.0.lock().take();
        if let Some(tunnel) = tunnel {
            tunnel.await;
        }
    }
}

/// A client that wants another protocol.
pub(super) struct Wanted {
    protocol: HeaderValue,
    client: OnUpgrade,
    slot: TunnelSlot,
}

impl Wanted {
    /// Takes the wish out of `request`.
    pub(super) fn take(request: &mut Request<Incoming>) -> Option<Self> {
        if request.version() != Version::HTTP_11 {
            return None;
        }
        let slot = request.extensions_mut().remove::<TunnelSlot>()?;
        let protocol = protocol(request.headers())?.clone();
        let client = hyper::upgrade::on(request);
        Some(Self {
            protocol,
            client,
            slot,
        })
    }

    /// Asks the engine for the same.
    pub(super) fn ask(&self, headers: &mut HeaderMap) {
        set(headers, &self.protocol);
    }

    /// The engine switched: to that protocol, or the answer is refused.
    pub(super) fn switch(
        self,
        sidecar: &Sidecar,
        local: &HostPort,
        mut response: Response<LegBody>,
    ) -> Result<Answer, Refusal> {
        let agreed = protocol(response.headers()).cloned();
        strip_hop_by_hop(response.headers_mut());
        let same = |agreed: &HeaderValue| {
            agreed
                .as_bytes()
                .eq_ignore_ascii_case(self.protocol.as_bytes())
        };
        if !agreed.as_ref().is_some_and(same) {
            tracing::warn!(decode_target = %local, ?agreed, "the decode engine switched to another protocol");
            return Err(Box::new(answer::bad_gateway("The decode node failed.")));
        }
        let engine = hyper::upgrade::on(&mut response);
        let (head, leg) = response.into_parts();
        let client = self.client;
        *self.slot.0.lock() = Some(Box::pin(async move {
            if let Ok((client, engine)) = tokio::try_join!(client, engine) {
                let (mut client, mut engine) = (TokioIo::new(client), TokioIo::new(engine));
                // Whoever breaks off, both are closed.
                let _ = copy_bidirectional(&mut client, &mut engine).await;
            }
            leg.end();
        }));
        sidecar.metrics().served(Path::Plain);
        let mut answer = Answer::from_parts(head, AnswerBody::whole(""));
        set(answer.headers_mut(), &self.protocol);
        Ok(answer)
    }
}

/// The protocol that `headers` ask for or agree to.
fn protocol(headers: &HeaderMap) -> Option<&HeaderValue> {
    let connection = headers.get_all(header::CONNECTION).iter();
    let mut tokens = connection
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','));
    tokens
        .any(|token| token.trim().eq_ignore_ascii_case("upgrade"))
        .then(|| headers.get(header::UPGRADE))?
}

fn set(headers: &mut HeaderMap, protocol: &HeaderValue) {
    headers.insert(header::CONNECTION, HeaderValue::from_static("Upgrade"));
    headers.insert(header::UPGRADE, protocol.clone());
}
