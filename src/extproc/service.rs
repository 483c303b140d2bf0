//! The gRPC face: one [`Exchange`] per stream, polled in place.
//!
//! A reply stream is a plain `Stream` around the inbound messages, without a task or channel of its
//! own: a spawned task per stream cost 24 % more CPU on small requests.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use futures_core::Stream;
use tokio::time::Sleep;
use tonic::{Request, Response, Status, Streaming};

use super::proto::external_processor_server::ExternalProcessor;
use super::proto::{ProcessingRequest, ProcessingResponse};
use super::stream::{Exchange, StreamSettings};
use crate::control::Director;
use crate::telemetry::metrics::ExtProcStreams;

/// Serves ext_proc with the decisions of one director.
#[derive(Debug, Clone)]
pub struct Processor {
    director: Arc<Director>,
    settings: Arc<StreamSettings>,
    streams: Option<Arc<ExtProcStreams>>,
}

impl Processor {
    /// `streams` is given with `--enable-grpc-stream-metrics`.
    pub fn new(
        director: Arc<Director>,
        settings: StreamSettings,
        streams: Option<Arc<ExtProcStreams>>,
    ) -> Self {
        Self {
            director,
            settings: Arc::new(settings),
            streams,
        }
    }
}

#[tonic::async_trait]
impl ExternalProcessor for Processor {
    type ProcessStream = ReplyStream<Streaming<ProcessingRequest>>;

    async fn process(
        &self,
        request: Request<Streaming<ProcessingRequest>>,
    ) -> Result<Response<Self::ProcessStream>, Status> {
        let exchange = Exchange::new(Arc::clone(&self.director), Arc::clone(&self.settings));
        let guard = self.streams.as_ref().map(ExtProcStreams::open);
        Ok(Response::new(ReplyStream::new(
            request.into_inner(),
            exchange,
            guard,
        )))
    }
}

/// Replies of one exchange.
#[derive(Debug)]
pub struct ReplyStream<S> {
    inbound: Option<S>,
    exchange: Exchange,
    /// Armed only while a decision is outstanding and the peer is silent.
    timer: Option<Pin<Box<Sleep>>>,
    guard: Option<crate::telemetry::metrics::StreamGuard>,
}

impl<S> ReplyStream<S> {
    /// Replies of `exchange` to what `inbound` brings.
    pub fn new(
        inbound: S,
        exchange: Exchange,
        guard: Option<crate::telemetry::metrics::StreamGuard>,
    ) -> Self {
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
}

impl<S> Stream for ReplyStream<S>
where
    S: Stream<Item = Result<ProcessingRequest, Status>> + Unpin,
{
    type Item = Result<ProcessingResponse, Status>;

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
            match Pin::new(inbound).poll_next(cx) {
                Poll::Ready(Some(Ok(message))) => {
                    if let Err(status) = this.exchange.on_message(message) {
                        this.finish("InvalidArgument");
                        return Poll::Ready(Some(Err(status)));
                    }
                }
                // End of input and reset mean the same: Envoy sends either after success and abort.
                Poll::Ready(None | Some(Err(_))) => {
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
                }
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
