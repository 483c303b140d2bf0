//! The gRPC face: one [`Exchange`] per call, polled in place as the body of its HTTP/2 response.
//!
//! [`Messages`] turns received frames into messages, [`ReplyStream`] drives the exchange,
//! [`ReplyBody`] turns replies into frames. None of them has a task or channel of its own: a spawned
//! task per stream cost 24 % more CPU on small requests. tonic serves only the health checks: its
//! codec copies every body into and out of buffers of its own, which was a quarter of the CPU of a
//! 400 KB request, and keeps them until the stream ends.

use std::convert::Infallible;
use std::future::Ready;
use std::io::Read;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use flate2::read::GzDecoder;
use futures_core::Stream;
use http::{HeaderMap, HeaderName, HeaderValue, Request, Response, header};
use http_body::{Body, Frame};
use hyper::body::Incoming as Received;
use tokio::time::Sleep;
use tonic::Status;
use tower_service::Service;

use super::reply::{Reply, encode};
use super::stream::{Exchange, StreamSettings};
use super::wire::{Inbox, Incoming, Segments, Slices, decode};
use crate::control::Director;
use crate::telemetry::metrics::{ExtProcStreams, StreamGuard};

/// The method.
pub const PATH: &str = "/envoy.service.ext_proc.v3.ExternalProcessor/Process";
/// Replies that are ready together leave together, up to this many bytes.
const BATCH_BYTES: usize = 256 * 1024;
const GRPC: HeaderValue = HeaderValue::from_static("application/grpc");
const ENCODING: HeaderName = HeaderName::from_static("grpc-encoding");
const ACCEPT_ENCODING: HeaderName = HeaderName::from_static("grpc-accept-encoding");

/// Serves ext_proc with the decisions of one director.
#[derive(Debug, Clone)]
pub struct Processor {
    director: Arc<Director>,
    settings: Arc<StreamSettings>,
    streams: Option<Arc<ExtProcStreams>>,
    limits: MessageLimits,
}

/// Longest gRPC messages, in bytes.
#[derive(Debug, Clone, Copy)]
pub struct MessageLimits {
    /// Received.
    pub receive: usize,
    /// Sent.
    pub send: usize,
}

impl Processor {
    /// `streams` is given with `--enable-grpc-stream-metrics`.
    pub fn new(
        director: Arc<Director>,
        settings: StreamSettings,
        limits: MessageLimits,
        streams: Option<Arc<ExtProcStreams>>,
    ) -> Self {
        Self {
            director,
            settings: Arc::new(settings),
            streams,
            limits,
        }
    }
}

impl Service<Request<Received>> for Processor {
    type Response = Response<ReplyBody<Received>>;
    type Error = Infallible;
    type Future = Ready<Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Received>) -> Self::Future {
        let gzip = request
            .headers()
            .get(ENCODING)
            .is_some_and(|encoding| encoding == "gzip");
        let messages = Messages::new(request.into_body(), self.limits.receive, gzip);
        let exchange = Box::new(Exchange::new(
            Arc::clone(&self.director),
            Arc::clone(&self.settings),
        ));
        let guard = self.streams.as_ref().map(ExtProcStreams::open);
        let mut response = Response::new(ReplyBody {
            replies: Some(ReplyStream::new(messages, exchange, guard)),
            max_message_bytes: self.limits.send,
            trailers: None,
        });
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, GRPC);
        headers.insert(ACCEPT_ENCODING, HeaderValue::from_static("identity,gzip"));
        std::future::ready(Ok(response))
    }
}

/// Messages of a request body.
#[derive(Debug)]
pub struct Messages<B> {
    body: Option<B>,
    inbox: Inbox,
    max_message_bytes: usize,
    gzip: bool,
}

impl<B> Messages<B> {
    /// Messages of `body`, none longer than `max_message_bytes`; those flagged as compressed are
    /// unpacked with `gzip` and refused without.
    pub fn new(body: B, max_message_bytes: usize, gzip: bool) -> Self {
        Self {
            body: Some(body),
            inbox: Inbox::default(),
            max_message_bytes,
            gzip,
        }
    }

    fn next_message(&mut self) -> Result<Option<Incoming>, Status> {
        let Some(framed) = self.inbox.next(self.max_message_bytes)? else {
            return Ok(None);
        };
        let slices = match (framed.compressed, self.gzip) {
            (false, _) => framed.slices,
            (true, true) => unpack(framed.slices, self.max_message_bytes)?,
            (true, false) => {
                return Err(Status::unimplemented(
                    "a compressed message without grpc-encoding: gzip",
                ));
            }
        };
        decode(slices).map(Some)
    }
}

fn unpack(slices: Slices, limit: usize) -> Result<Slices, Status> {
    let packed = Segments::from(slices);
    let mut whole = Vec::new();
    let room = u64::try_from(limit).unwrap_or(u64::MAX).saturating_add(1);
    GzDecoder::new(bytes::Buf::reader(packed))
        .take(room)
        .read_to_end(&mut whole)
        .map_err(|error| Status::internal(format!("gzip: {error}")))?;
    if whole.len() > limit {
        return Err(Status::resource_exhausted(format!(
            "grpc: received message after decompression larger than max {limit}"
        )));
    }
    Ok(Slices::from_iter([Bytes::from(whole)]))
}

impl<B> Stream for Messages<B>
where
    B: Body<Data = Bytes> + Unpin,
    B::Error: std::fmt::Display,
{
    type Item = Result<Incoming, Status>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = self.get_mut();
        loop {
            match this.next_message() {
                Ok(None) => {}
                Ok(Some(incoming)) => return Poll::Ready(Some(Ok(incoming))),
                Err(status) => {
                    this.body = None;
                    return Poll::Ready(Some(Err(status)));
                }
            }
            let Some(body) = &mut this.body else {
                return Poll::Ready(None);
            };
            match std::task::ready!(Pin::new(body).poll_frame(cx)) {
                Some(Ok(frame)) => {
                    // Trailers of a request mean nothing in gRPC.
                    if let Ok(data) = frame.into_data() {
                        this.inbox.push(data);
                    }
                }
                // End of input and reset mean the same: Envoy sends either after success and abort.
                Some(Err(_)) | None => this.body = None,
            }
        }
    }
}

/// Replies of one exchange.
#[derive(Debug)]
pub struct ReplyStream<S> {
    inbound: Option<S>,
    /// Boxed: hyper moves this stream several times before it polls it.
    exchange: Box<Exchange>,
    /// Armed only while a decision is outstanding and the peer is silent.
    timer: Option<Pin<Box<Sleep>>>,
    guard: Option<StreamGuard>,
}

impl<S> ReplyStream<S> {
    /// Replies of `exchange` to what `inbound` brings.
    pub fn new(inbound: S, exchange: Box<Exchange>, guard: Option<StreamGuard>) -> Self {
        Self {
            inbound: Some(inbound),
            exchange,
            timer: None,
            guard,
        }
    }

    /// True when the decision is overdue; otherwise arms the timer for this task.
    fn is_overdue(&mut self, cx: &mut Context<'_>) -> bool {
        let Some(deadline) = self.exchange.deadline() else {
            self.timer = None;
            return false;
        };
        let timer = self
            .timer
            .get_or_insert_with(|| Box::pin(tokio::time::sleep_until(deadline)));
        timer.as_mut().poll(cx).is_ready()
    }

    /// `code` is spelled as Go spells gRPC codes, which dashboards know.
    fn finish(&mut self, code: &'static str) {
        self.inbound = None;
        if let Some(guard) = self.guard.take() {
            guard.close(code);
        }
    }

    /// The peer ended or reset the stream.
    fn end(&mut self) {
        let normal = self.exchange.on_end();
        self.finish(if normal { "OK" } else { "Canceled" });
    }

    /// The stream ends with an error of ours.
    fn fail(&mut self, status: &Status) {
        let code = match status.code() {
            tonic::Code::InvalidArgument => "InvalidArgument",
            tonic::Code::ResourceExhausted => "ResourceExhausted",
            tonic::Code::Unimplemented => "Unimplemented",
            _ => "Internal",
        };
        self.exchange.note_failure(code);
        self.exchange.on_end();
        self.finish(code);
    }
}

impl<S> Stream for ReplyStream<S>
where
    S: Stream<Item = Result<Incoming, Status>> + Unpin,
{
    type Item = Result<Reply, Status>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = &mut *self;
        loop {
            if let Some(reply) = this.exchange.pop() {
                return Poll::Ready(Some(Ok(reply)));
            }
            let Some(inbound) = this.inbound.as_mut().filter(|_| !this.exchange.is_closed()) else {
                this.end();
                return Poll::Ready(None);
            };
            let handled = match Pin::new(inbound).poll_next(cx) {
                Poll::Ready(Some(received)) => {
                    received.and_then(|incoming| this.exchange.on_message(incoming))
                }
                Poll::Ready(None) => {
                    this.end();
                    return Poll::Ready(None);
                }
                Poll::Pending => {
                    if this.exchange.poll_decision(cx) {
                        continue;
                    }
                    if !this.is_overdue(cx) {
                        return Poll::Pending;
                    }
                    this.exchange.on_deadline();
                    Ok(())
                }
            };
            if let Err(status) = handled {
                this.fail(&status);
                return Poll::Ready(Some(Err(status)));
            }
        }
    }
}

impl<S> Drop for ReplyStream<S> {
    /// hyper drops the reply stream when the peer resets it, without a last poll.
    fn drop(&mut self) {
        if self.inbound.is_some() {
            self.end();
        }
    }
}

/// Replies as an HTTP/2 response body that ends with a gRPC status.
#[derive(Debug)]
pub struct ReplyBody<B> {
    /// `None` once the exchange ended.
    replies: Option<ReplyStream<Messages<B>>>,
    max_message_bytes: usize,
    /// Still to be sent.
    trailers: Option<HeaderMap>,
}

impl<B> ReplyBody<B> {
    fn end(&mut self, status: &Status) {
        self.replies = None;
        let mut trailers = HeaderMap::with_capacity(2);
        if status.add_header(&mut trailers).is_err() {
            trailers.insert("grpc-status", HeaderValue::from_static("13"));
        }
        self.trailers = Some(trailers);
    }
}

impl<B> Body for ReplyBody<B>
where
    B: Body<Data = Bytes> + Unpin,
    B::Error: std::fmt::Display,
{
    type Data = Segments;
    type Error = Infallible;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Segments>, Infallible>>> {
        let this = self.get_mut();
        let mut batch = Segments::default();
        while let Some(replies) = &mut this.replies
            && batch.len() < BATCH_BYTES
        {
            match Pin::new(replies).poll_next(cx) {
                Poll::Ready(Some(Ok(reply))) => {
                    if let Err(status) = encode(reply, this.max_message_bytes, &mut batch) {
                        this.end(&status);
                    }
                }
                Poll::Ready(Some(Err(status))) => this.end(&status),
                Poll::Ready(None) => this.end(&Status::ok("")),
                Poll::Pending if batch.is_empty() => return Poll::Pending,
                Poll::Pending => break,
            }
        }
        if !batch.is_empty() {
            return Poll::Ready(Some(Ok(Frame::data(batch))));
        }
        Poll::Ready(
            this.trailers
                .take()
                .map(|trailers| Ok(Frame::trailers(trailers))),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use flate2::Compression;
    use flate2::write::GzEncoder;
    use std::io::Write;

    fn packed(bytes: &[u8]) -> Slices {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
        encoder.write_all(bytes).unwrap();
        let packed = encoder.finish().unwrap();
        let (head, tail) = packed.split_at(packed.len() / 2);
        Slices::from_iter([Bytes::copy_from_slice(head), Bytes::copy_from_slice(tail)])
    }

    #[test]
    fn a_compressed_message_is_unpacked_up_to_the_limit() {
        let bytes = vec![7; 1000];
        assert_eq!(unpack(packed(&bytes), 1000).unwrap()[0], bytes);
        let status = unpack(packed(&bytes), 999).unwrap_err();
        assert_eq!(status.code(), tonic::Code::ResourceExhausted);
        let garbage = Slices::from_iter([Bytes::from_static(b"no gzip")]);
        assert_eq!(
            unpack(garbage, 999).unwrap_err().code(),
            tonic::Code::Internal
        );
    }
}
