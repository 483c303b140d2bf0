//! `pinpod noop`: what an ext_proc picker costs that decides nothing. It shares our HTTP/2 server and
//! messages and uses tonic's generated service, as anyone would write one.

use std::net::Ipv4Addr;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use futures_core::Stream;
use tonic::{Request, Response, Status, Streaming};

use crate::epp::health::{HealthService, HealthState};
use crate::extproc::mutation::{self, Direction};
use crate::extproc::proto::external_processor_server::{
    ExternalProcessor, ExternalProcessorServer,
};
use crate::extproc::proto::health::health_server::HealthServer;
use crate::extproc::proto::processing_request::Request as Message;
use crate::extproc::proto::{CommonResponse, ProcessingRequest, ProcessingResponse};
use crate::extproc::reply::Reply;
use crate::extproc::server::{Routes, Server, ServerConfigs};
use crate::extproc::stream::DESTINATION;

/// Flags of `noop`.
#[derive(Debug, clap::Args)]
pub(super) struct NoopArgs {
    /// ext_proc port, plaintext
    #[arg(long, default_value_t = 9002)]
    port: u16,
    /// Endpoint that every request is sent to
    #[arg(long, default_value = "127.0.0.1:8000")]
    endpoint: String,
    /// Threads [default: one per core]
    #[arg(long, default_value_t = 0, hide_default_value = true)]
    workers: usize,
}

/// Serves until the process is killed.
pub(super) fn run(args: &NoopArgs) -> anyhow::Result<()> {
    let store = std::sync::Arc::new(crate::datalayer::EndpointStore::default());
    store.replace(Vec::new());
    let health = HealthServer::new(HealthService(std::sync::Arc::new(HealthState::new(store))));
    let noop = Noop {
        endpoint: Bytes::from(args.endpoint.clone()),
    };
    let processor = ExternalProcessorServer::new(noop).max_decoding_message_size(usize::MAX);
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let workers = if args.workers == 0 {
        cores
    } else {
        args.workers
    };
    let configs = ServerConfigs {
        address: (Ipv4Addr::LOCALHOST, args.port).into(),
        workers,
        tls: None,
    };
    let server = Server::start(&configs, &Routes { processor, health })?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(tokio::signal::ctrl_c())?;
    server.stop(Duration::ZERO);
    Ok(())
}

#[derive(Debug, Clone)]
struct Noop {
    endpoint: Bytes,
}

#[tonic::async_trait]
impl ExternalProcessor for Noop {
    type ProcessStream = Echo;

    async fn process(
        &self,
        request: Request<Streaming<ProcessingRequest>>,
    ) -> Result<Response<Echo>, Status> {
        Ok(Response::new(Echo {
            inbound: request.into_inner(),
            endpoint: self.endpoint.clone(),
            held: Vec::new(),
            out: std::collections::VecDeque::new(),
        }))
    }
}

/// Holds the request until its end, as a picker must, then sends everything back.
#[derive(Debug)]
struct Echo {
    inbound: Streaming<ProcessingRequest>,
    endpoint: Bytes,
    held: Vec<Bytes>,
    out: std::collections::VecDeque<ProcessingResponse>,
}

impl Echo {
    fn answer(&mut self, message: ProcessingRequest) {
        let out = &mut self.out;
        let mut emit = |reply: Reply| out.push_back(reply.into());
        match message.request {
            Some(Message::RequestHeaders(headers)) if headers.end_of_stream => {
                emit(routed(&self.endpoint).into());
            }
            Some(Message::RequestBody(body)) => {
                self.held.push(body.body);
                if body.end_of_stream {
                    emit(routed(&self.endpoint).into());
                    mutation::stream_pieces(
                        Direction::Request,
                        self.held.drain(..),
                        62_000,
                        true,
                        &mut emit,
                    );
                }
            }
            Some(Message::ResponseHeaders(_)) => {
                let unchanged =
                    mutation::headers(Direction::Response, CommonResponse::default(), None);
                emit(unchanged.into());
            }
            Some(Message::ResponseBody(body)) => {
                let end = body.end_of_stream;
                mutation::stream_pieces(Direction::Response, [body.body], 62_000, end, &mut emit);
            }
            Some(Message::ResponseTrailers(_)) => {
                emit(mutation::trailers(Direction::Response).into());
            }
            _ => {}
        }
    }
}

fn routed(endpoint: &Bytes) -> ProcessingResponse {
    let set = vec![mutation::set_header(DESTINATION, endpoint.clone())];
    mutation::headers(
        Direction::Request,
        mutation::with_headers(set, Vec::new(), true),
        None,
    )
}

impl Stream for Echo {
    type Item = Result<ProcessingResponse, Status>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        loop {
            if let Some(reply) = self.out.pop_front() {
                return Poll::Ready(Some(Ok(reply)));
            }
            match Pin::new(&mut self.inbound).poll_next(cx) {
                Poll::Ready(Some(Ok(message))) => self.answer(message),
                Poll::Ready(_) => return Poll::Ready(None),
                Poll::Pending => return Poll::Pending,
            }
        }
    }
}
