//! A vLLM gRPC engine behind the real Envoy: calls pass with their trailers and are counted.

use std::net::SocketAddr;
use std::pin::Pin;
use std::task::{Context, Poll};

use futures_util::stream;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::service::TowerToHyperService;
use pinpod::demo::envoy::ORIGINAL_DST;
use tokio::net::{TcpListener, TcpStream};
use tonic::{Code, Request, Response, Status};

use super::support::{Gateway, Setup};
use proto::generate_request::Input;
use proto::generate_response::Response as Answer;
use proto::vllm_engine_client::VllmEngineClient;
use proto::vllm_engine_server::{VllmEngine, VllmEngineServer};
use proto::{
    EmbedRequest, EmbedResponse, GenerateComplete, GenerateRequest, GenerateResponse,
    GenerateStreamChunk, TokenizedInput,
};

#[allow(
    clippy::pedantic,
    clippy::allow_attributes_without_reason,
    unreachable_pub,
    rust_2018_idioms,
    reason = "generated code"
)]
mod proto {
    tonic::include_proto!("vllm.grpc.engine");
}

const CONFIG: &str = "apiVersion: llm-d.ai/v1alpha1
kind: EndpointPickerConfig
plugins:
- {type: vllmgrpc-parser}
requestHandler: {parsers: [{pluginRef: vllmgrpc-parser}]}
";

/// Answers with the ids it got, one message each.
struct Engine;

fn count(tokens: usize) -> u32 {
    u32::try_from(tokens).unwrap()
}

#[tonic::async_trait]
impl VllmEngine for Engine {
    type GenerateStream = stream::Iter<std::vec::IntoIter<Result<GenerateResponse, Status>>>;

    async fn generate(
        &self,
        request: Request<GenerateRequest>,
    ) -> Result<Response<Self::GenerateStream>, Status> {
        let Some(Input::Tokenized(input)) = request.into_inner().input else {
            return Err(Status::resource_exhausted("only ids today"));
        };
        let mut answers: Vec<_> = input.input_ids.iter().map(|id| chunk(*id)).collect();
        answers.push(Answer::Complete(GenerateComplete {
            finish_reason: "stop".to_owned(),
            prompt_tokens: count(input.input_ids.len()),
            completion_tokens: count(input.input_ids.len()),
            cached_tokens: 1,
            ..GenerateComplete::default()
        }));
        let answers: Vec<_> = answers.into_iter().map(|a| Ok(response(a))).collect();
        Ok(Response::new(stream::iter(answers)))
    }

    async fn embed(
        &self,
        request: Request<EmbedRequest>,
    ) -> Result<Response<EmbedResponse>, Status> {
        let ids = request.into_inner().tokenized.unwrap_or_default().input_ids;
        Ok(Response::new(EmbedResponse {
            embedding: vec![0.5; 1024],
            prompt_tokens: count(ids.len()),
            embedding_dim: 1024,
        }))
    }
}

fn chunk(id: u32) -> Answer {
    Answer::Chunk(GenerateStreamChunk {
        token_ids: vec![id],
        ..GenerateStreamChunk::default()
    })
}

fn response(answer: Answer) -> GenerateResponse {
    GenerateResponse {
        response: Some(answer),
    }
}

/// Serves the engine over HTTP/2 without TLS until the test ends.
async fn start_engine() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let service = TowerToHyperService::new(VllmEngineServer::new(Engine));
            let connection = hyper::server::conn::http2::Builder::new(TokioExecutor::new())
                .serve_connection(TokioIo::new(stream), service);
            tokio::spawn(connection);
        }
    });
    address
}

/// One HTTP/2 connection as a tonic client wants it.
#[derive(Clone)]
struct Connection(hyper::client::conn::http2::SendRequest<tonic::body::Body>);

impl tower_service::Service<http::Request<tonic::body::Body>> for Connection {
    type Response = http::Response<hyper::body::Incoming>;
    type Error = hyper::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.0.poll_ready(context)
    }

    fn call(&mut self, request: http::Request<tonic::body::Body>) -> Self::Future {
        Box::pin(self.0.send_request(request))
    }
}

async fn client(gateway: &Gateway) -> VllmEngineClient<Connection> {
    let address = gateway.address();
    let io = TokioIo::new(TcpStream::connect(address).await.unwrap());
    let (sender, connection) = hyper::client::conn::http2::handshake(TokioExecutor::new(), io)
        .await
        .unwrap();
    tokio::spawn(connection);
    let origin = format!("http://{address}").parse().unwrap();
    VllmEngineClient::with_origin(Connection(sender), origin)
}

fn tokenized(ids: impl IntoIterator<Item = u32>) -> TokenizedInput {
    TokenizedInput {
        original_text: "not looked at".to_owned(),
        input_ids: ids.into_iter().collect(),
    }
}

fn generate(input: Input) -> GenerateRequest {
    GenerateRequest {
        input: Some(input),
        stream: true,
        ..GenerateRequest::default()
    }
}

fn embed(ids: impl IntoIterator<Item = u32>) -> EmbedRequest {
    EmbedRequest {
        request_id: "e".to_owned(),
        tokenized: Some(tokenized(ids)),
    }
}

#[tokio::test]
async fn grpc_calls_pass_with_their_trailers() {
    let engine = start_engine().await;
    // The shipped file says where: HTTP/2 to the model servers.
    let shipped = "            http_protocol_options: {}";
    assert_eq!(ORIGINAL_DST.matches(shipped).count(), 1);
    let template = ORIGINAL_DST.replace(shipped, "            http2_protocol_options: {}");
    let endpoints = format!("--endpoints={engine}");
    let gateway = Setup {
        template: &template,
        pods: 1,
        serve_flags: &[&endpoints],
        config: Some(CONFIG),
        ..Setup::default()
    }
    .start()
    .await;
    let mut client = client(&gateway).await;

    // Unary.
    let answer = client.embed(embed([1, 2, 3])).await.unwrap();
    let through_picker = answer.metadata().get("x-went-into-resp-headers");
    assert_eq!(through_picker.unwrap(), "true");
    let answer = answer.into_inner();
    assert_eq!((answer.prompt_tokens, answer.embedding.len()), (3, 1024));

    // 1.6 MB of ids, in many pieces both in the proxy and in the picker.
    let many = || (0..600_000).map(|n| n % 150_000);
    let answer = client.embed(embed(many())).await.unwrap().into_inner();
    assert_eq!(answer.prompt_tokens, 600_000);

    // Server streaming.
    let request = generate(Input::Tokenized(tokenized(7..12)));
    let mut stream = client.generate(request).await.unwrap().into_inner();
    let mut answers = Vec::new();
    while let Some(answer) = stream.message().await.unwrap() {
        answers.push(answer.response.unwrap());
    }
    let (last, chunks) = answers.split_last().unwrap();
    assert_eq!(chunks, (7..12).map(chunk).collect::<Vec<_>>());
    assert!(
        matches!(last, Answer::Complete(c) if c.prompt_tokens == 5),
        "{last:?}"
    );

    // The engine's own refusal comes as headers only.
    let request = generate(Input::Text("hello".to_owned()));
    let refused = client.generate(request).await.unwrap_err();
    assert_eq!(refused.code(), Code::ResourceExhausted);
    assert_eq!(refused.message(), "only ids today");

    // The picker's: Envoy turns status 400 into a gRPC status and the body into its message.
    let refused = client
        .generate(GenerateRequest::default())
        .await
        .unwrap_err();
    assert_eq!(refused.code(), Code::Internal);
    assert_eq!(
        refused.message(),
        "inference error: BadRequest - not supported request inputType"
    );

    gateway.wait_until_idle().await;
    assert_eq!(gateway.metric("llm_d_epp_request_total").await, 4.0);
    assert_eq!(
        gateway.metric("llm_d_epp_request_input_tokens_sum").await,
        // Two embeddings and one stream.
        f64::from(3 + 600_000 + 5)
    );
    assert_eq!(
        gateway.metric("llm_d_epp_request_output_tokens_sum").await,
        5.0
    );
}
