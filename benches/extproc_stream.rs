//! What a request costs, as a ratio: pinpod against a no-op picker in the same binary, in one run.
//!
//! Plays Envoy's side of ext_proc over HTTP/2 in full duplex mode, message by message as Envoy 1.40
//! sends them. The servers are child processes; their CPU is read from `/proc`, so the generator's
//! own does not count.
//!
//! `make bench`, or `PINPOD_PROGRAM=... cargo bench --bench extproc_stream -- [--address HOST:PORT] [--case TEXT] [--streams N]
//! [--seconds N] [--rounds N] [--kv-blocks N] [--json] [--idle | --precise]`

#[path = "extproc_stream/precise.rs"]
mod precise;
#[path = "tokens/vocabulary.rs"]
mod vocabulary;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use bytes::{BufMut, Bytes, BytesMut};
use http::Request;
use http_body_util::{BodyExt, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::client::conn::http2::{SendRequest, handshake};
use hyper_util::rt::{TokioExecutor, TokioIo};
use pinpod::demo::processes::{Picker, Process, free_ports};
use pinpod::demo::report::percentile;
use pinpod::extproc::proto::processing_request::Request as Message;
use pinpod::extproc::proto::processing_response::Response as Reply;
use pinpod::extproc::proto::{
    BodySendMode, HeaderMap, HeaderValue, HttpBody, HttpHeaders, Metadata, ProcessingRequest,
    ProcessingResponse, ProtocolConfiguration,
};
use prost::Message as _;
use serde::Serialize;
use tokio::net::TcpStream;
use tokio::sync::{Mutex, mpsc};
use tokio::time::Instant;

/// Body pieces as Envoy cuts them with its usual buffer.
const PIECE_BYTES: usize = 65_536;
/// Longest DATA frame that Envoy 1.40 was seen to send, whatever our settings allow.
const FRAME_BYTES: usize = 16_384;
/// Endpoints behind the picker.
const ENDPOINTS: u16 = 64;
/// Blocks of 16 tokens in the cache of each: the 307,328 tokens of the published workload. The recording's
/// 1,024 are less than one prompt of 400 KB.
const KV_BLOCKS: u32 = 19_208;
/// Distinct prompts, in groups that share three quarters.
const PROMPTS: usize = 64;
const GROUPS: usize = 16;

type Outbound = mpsc::Sender<Result<Frame<Bytes>, std::io::Error>>;

struct Case {
    name: &'static str,
    prompt_bytes: usize,
    response_pieces: usize,
}

const CASES: [Case; 4] = [
    Case {
        name: "2 KB chat",
        prompt_bytes: 2_000,
        response_pieces: 1,
    },
    Case {
        name: "32 KB chat",
        prompt_bytes: 32_000,
        response_pieces: 1,
    },
    Case {
        name: "400 KB chat",
        prompt_bytes: 400_000,
        response_pieces: 1,
    },
    Case {
        name: "400 KB chat, 1000 SSE pieces",
        prompt_bytes: 400_000,
        response_pieces: 1000,
    },
];

#[derive(Debug, Clone, Serialize)]
struct Measured {
    case: String,
    server: String,
    streams: usize,
    requests: usize,
    requests_per_second: f64,
    cpu_us_per_request: f64,
    /// To the first server, measured right before.
    ratio: f64,
    decision_p50_us: f64,
    decision_p99_us: f64,
}

fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args()
        .skip(1)
        .filter(|a| a != "--bench")
        .collect();
    let value = |name: &str| {
        let at = arguments.iter().position(|a| a == name)?;
        arguments.get(at + 1).cloned()
    };
    let has = |name: &str| arguments.iter().any(|a| a == name);
    let plan = Plan {
        seconds: value("--seconds").map_or(Ok(1.0), |s| s.parse())?,
        rounds: value("--rounds").map_or(Ok(7), |s| s.parse())?,
        case: value("--case").unwrap_or_default(),
        streams: match value("--streams") {
            Some(streams) => vec![streams.parse()?],
            None => vec![1, 32, 256],
        },
    };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let loads: Vec<Load> = CASES.iter().map(Load::new).collect();
        if let Some(address) = value("--address") {
            let server = Server {
                name: "given".to_owned(),
                address: address.parse()?,
                pid: None,
            };
            let results = measure_all(&[server], &loads, &plan).await?;
            return report(&results, has("--json"));
        }
        let directory = tempfile::tempdir()?;
        let program = program()?;
        if has("--precise") {
            let pair = precise::Pair::start(&program, directory.path()).await?;
            let results = measure_all(&pair.servers(), &[pair.load()], &plan).await?;
            pair.check().await?;
            return report(&results, has("--json"));
        }
        let kv_blocks = value("--kv-blocks").map_or(Ok(KV_BLOCKS), |n| n.parse())?;
        if has("--idle") {
            return idle(&program, kv_blocks, directory.path()).await;
        }
        let [noop_port] = free_ports()?;
        let flags = ["noop".to_owned(), format!("--port={noop_port}")];
        let mut noop = Process::start("noop", &program, &flags, directory.path())?;
        noop.wait_for_port(noop_port).await?;
        let pods = exposition_servers(ENDPOINTS, kv_blocks).await?;
        let picker = recommended(&program, &pods, "1s", directory.path()).await?;
        let servers = [
            Server::local("no-op", noop_port, &noop),
            Server::local("pinpod", picker.grpc, &picker.process),
        ];
        let results = measure_all(&servers, &loads, &plan).await?;
        report(&results, has("--json"))?;
        show(&format!(
            "resident memory of pinpod after the run: {} MB",
            resident_kb(picker.process.id())? / 1024
        ));
        Ok(())
    })
}

#[expect(clippy::print_stdout, reason = "a bench reports on stdout")]
fn show(text: &str) {
    println!("{text}");
}

/// The binary to measure, which must be told: `cargo bench` puts one without link-time optimisation where the
/// release binary was.
fn program() -> anyhow::Result<PathBuf> {
    let told = std::env::var_os("PINPOD_PROGRAM").map(PathBuf::from);
    let program =
        told.context("run `make bench`, or set PINPOD_PROGRAM to a copy of the release binary")?;
    ensure!(program.is_file(), "{} is missing", program.display());
    Ok(program)
}

async fn recommended(
    program: &Path,
    pods: &[SocketAddr],
    interval: &str,
    directory: &Path,
) -> anyhow::Result<Picker> {
    let list: Vec<String> = pods.iter().map(ToString::to_string).collect();
    let document = directory.join("recommended.yaml");
    std::fs::write(&document, include_str!("../deploy/config/recommended.yaml"))?;
    let flags = [
        format!("--endpoints={}", list.join(",")),
        format!("--config-file={}", document.display()),
        format!("--refresh-metrics-interval={interval}"),
    ];
    Picker::start(program, &flags, directory).await
}

/// Servers that answer every request with a recorded exposition, but for the size of the engine's cache.
async fn exposition_servers(count: u16, kv_blocks: u32) -> anyhow::Result<Vec<SocketAddr>> {
    const RECORDED: &str = include_str!("../tests/data/vllm-0.32/metrics/3-under-load-1.txt");
    let size = "num_gpu_blocks=\"1024\"";
    ensure!(RECORDED.contains(size), "another recording");
    let exposition = RECORDED.replace(size, &format!("num_gpu_blocks=\"{kv_blocks}\""));
    let reply = format!(
        "HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{exposition}",
        exposition.len()
    );
    let reply = Arc::new(reply.into_bytes());
    let mut addresses = Vec::new();
    for _ in 0..count {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
        addresses.push(listener.local_addr()?);
        let reply = Arc::clone(&reply);
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let reply = Arc::clone(&reply);
                tokio::spawn(async move {
                    use tokio::io::{AsyncReadExt, AsyncWriteExt};
                    let mut buffer = [0; 1024];
                    while let Ok(1..) = stream.read(&mut buffer).await {
                        if stream.write_all(&reply).await.is_err() {
                            return;
                        }
                    }
                });
            }
        });
    }
    Ok(addresses)
}

/// CPU and memory of a picker that only scrapes 100 endpoints every 50 ms.
async fn idle(program: &Path, kv_blocks: u32, directory: &Path) -> anyhow::Result<()> {
    let pods = exposition_servers(100, kv_blocks).await?;
    let picker = recommended(program, &pods, "50ms", directory).await?;
    let pid = picker.process.id();
    tokio::time::sleep(Duration::from_secs(3)).await;
    let (before, started) = (cpu_seconds(pid)?, Instant::now());
    tokio::time::sleep(Duration::from_secs(20)).await;
    let cores = (cpu_seconds(pid)? - before) / started.elapsed().as_secs_f64();
    show(&format!(
        "100 endpoints every 50 ms: {cores:.3} cores, resident {} MB",
        resident_kb(pid)? / 1024
    ));
    Ok(())
}

struct Server {
    name: String,
    address: SocketAddr,
    pid: Option<u32>,
}

impl Server {
    fn local(name: &str, port: u16, process: &Process) -> Self {
        Self {
            name: name.to_owned(),
            address: ([127, 0, 0, 1], port).into(),
            pid: Some(process.id()),
        }
    }
}

/// Requests of one kind.
struct Load {
    name: String,
    response_pieces: usize,
    scripts: Arc<Vec<Script>>,
}

impl Load {
    fn new(case: &Case) -> Self {
        Self {
            name: case.name.to_owned(),
            response_pieces: case.response_pieces,
            scripts: Arc::new(Script::prompts(case)),
        }
    }
}

/// What to measure.
struct Plan {
    /// Of load, each time.
    seconds: f64,
    /// Times each measurement is made.
    rounds: usize,
    /// Part of the names of the cases wanted.
    case: String,
    /// Concurrent exchanges.
    streams: Vec<usize>,
}

/// Every case and stream count, servers in turn, round after round: the machine's speed drifts, so a
/// ratio is that of two neighbours. The round with the median CPU and the median ratio count.
async fn measure_all(
    servers: &[Server],
    loads: &[Load],
    plan: &Plan,
) -> anyhow::Result<Vec<Measured>> {
    let mut results: Vec<Measured> = Vec::new();
    for load in loads.iter().filter(|load| load.name.contains(&plan.case)) {
        for &streams in &plan.streams {
            let mut rounds: Vec<Vec<Measured>> = vec![Vec::new(); servers.len()];
            for _ in 0..plan.rounds {
                let mut first = None;
                for (server, rounds) in servers.iter().zip(&mut rounds) {
                    let mut round = measure(server, load, streams, plan.seconds).await?;
                    let base = *first.get_or_insert(round.cpu_us_per_request);
                    round.ratio = round.cpu_us_per_request / base;
                    rounds.push(round);
                }
            }
            for mut rounds in rounds {
                let mut ratios: Vec<f64> = rounds.iter().map(|r| r.ratio).collect();
                rounds.sort_by(|a, b| a.cpu_us_per_request.total_cmp(&b.cpu_us_per_request));
                let median = rounds.len() / 2;
                if let Some(mut round) = rounds.into_iter().nth(median) {
                    round.ratio = percentile(&mut ratios, 0.5);
                    results.push(round);
                }
            }
        }
    }
    Ok(results)
}

async fn measure(
    server: &Server,
    load: &Load,
    streams: usize,
    seconds: f64,
) -> anyhow::Result<Measured> {
    let scripts = &load.scripts;
    // Envoy with two workers holds two connections.
    let connections = [
        connect(server.address).await?,
        connect(server.address).await?,
    ];
    let decisions = Arc::new(Mutex::new(Vec::new()));
    let next = Arc::new(AtomicUsize::new(0));
    // Prompts become known before the clock runs, as in production.
    for script in scripts.iter().take(PROMPTS) {
        exchange(connections[0].clone(), script, load.response_pieces).await?;
    }
    let before = server.pid.map(cpu_seconds).transpose()?;
    let started = Instant::now();
    let end = started + Duration::from_secs_f64(seconds);
    let mut tasks = tokio::task::JoinSet::new();
    for stream in 0..streams {
        let connection = connections[stream % 2].clone();
        let (scripts, next, decisions) = (
            Arc::clone(scripts),
            Arc::clone(&next),
            Arc::clone(&decisions),
        );
        let pieces = load.response_pieces;
        tasks.spawn(async move {
            let mut own = Vec::new();
            while Instant::now() < end {
                let number = next.fetch_add(1, Ordering::Relaxed);
                let Some(script) = scripts.get(number % PROMPTS) else {
                    break;
                };
                own.push(
                    exchange(connection.clone(), script, pieces)
                        .await?
                        .as_secs_f64()
                        * 1e6,
                );
            }
            decisions.lock().await.extend(own);
            anyhow::Ok(())
        });
    }
    while let Some(ended) = tasks.join_next().await {
        ended??;
    }
    let elapsed = started.elapsed().as_secs_f64();
    let cpu = match (before, server.pid) {
        (Some(before), Some(pid)) => cpu_seconds(pid)? - before,
        _ => f64::NAN,
    };
    let mut decisions = decisions.lock().await;
    let requests = decisions.len();
    ensure!(requests > 0, "{}: no request finished", load.name);
    Ok(Measured {
        case: load.name.clone(),
        server: server.name.clone(),
        streams,
        requests,
        requests_per_second: requests as f64 / elapsed,
        cpu_us_per_request: cpu * 1e6 / requests as f64,
        ratio: 1.0,
        decision_p50_us: percentile(&mut decisions, 0.5),
        decision_p99_us: percentile(&mut decisions, 0.99),
    })
}

async fn connect(
    address: SocketAddr,
) -> anyhow::Result<SendRequest<http_body_util::combinators::BoxBody<Bytes, std::io::Error>>> {
    let stream = TcpStream::connect(address)
        .await
        .with_context(|| address.to_string())?;
    stream.set_nodelay(true)?;
    let (sender, connection) = handshake(TokioExecutor::new(), TokioIo::new(stream)).await?;
    tokio::spawn(connection);
    Ok(sender)
}

/// A chat.
fn body(prompt: &str) -> Bytes {
    let body = serde_json::json!({
        "model": "sim-model", "stream": true, "max_tokens": 100,
        "messages": [{"role": "system", "content": "You are helpful."}, {"role": "user", "content": prompt}],
    });
    body.to_string().into()
}

/// Encoded messages of one request, made once.
struct Script {
    headers: Bytes,
    body: Vec<Bytes>,
    end: Bytes,
    response_headers: Bytes,
    response_piece: Bytes,
    response_end: Bytes,
}

impl Script {
    fn prompts(case: &Case) -> Vec<Self> {
        (0..PROMPTS)
            .map(|number| Self::numbered(number, case.prompt_bytes))
            .collect()
    }

    fn numbered(number: usize, prompt_bytes: usize) -> Self {
        let text = |seed: usize, bytes: usize| -> String {
            let mut rng = fastrand::Rng::with_seed(seed as u64);
            (0..bytes)
                .map(|at| if at % 6 == 5 { ' ' } else { rng.lowercase() })
                .collect()
        };
        let shared = prompt_bytes / 4 * 3;
        let prompt = text(number % GROUPS, shared) + &text(1000 + number, prompt_bytes - shared);
        Self::new(&body(&prompt))
    }

    fn new(body: &Bytes) -> Self {
        let length = body.len().to_string();
        let lines = [
            (":authority", "gateway.test"),
            (":path", "/v1/chat/completions"),
            (":method", "POST"),
            (":scheme", "http"),
            ("content-length", length.as_str()),
            ("content-type", "application/json"),
            ("accept", "*/*"),
            ("user-agent", "bench/1.0"),
            ("authorization", "Bearer 0123456789abcdef"),
            ("x-forwarded-for", "192.0.2.1"),
            ("x-forwarded-proto", "http"),
            ("x-envoy-external-address", "192.0.2.1"),
            ("x-request-id", "5c9d1e7a-6d0b-4a0e-8f0b-1f2e3d4c5b6a"),
            ("accept-encoding", "gzip"),
            (
                "traceparent",
                "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            ),
        ];
        let response = [
            (":status", "200"),
            ("content-type", "text/event-stream; charset=utf-8"),
            ("date", "today"),
        ];
        let first = ProcessingRequest {
            protocol_config: Some(ProtocolConfiguration {
                request_body_mode: BodySendMode::FullDuplexStreamed.into(),
                response_body_mode: BodySendMode::FullDuplexStreamed.into(),
                send_body_without_waiting_for_header_response: false,
            }),
            ..message(Message::RequestHeaders(headers(&lines)))
        };
        let pieces = (0..body.len())
            .step_by(PIECE_BYTES)
            .map(|at| body.slice(at..(at + PIECE_BYTES).min(body.len())));
        let piece = Bytes::from_static(b"data: {\"id\":\"chatcmpl-a3ae6bfd7af0e1f4\",\"object\":\"chat.completion.chunk\",\"created\":1795346037,\"model\":\"sim-model\",\"choices\":[{\"index\":0,\"delta\":{\"content\":\" word\"},\"logprobs\":null,\"finish_reason\":null}]}\n\n");
        Self {
            headers: frame(&first),
            body: pieces
                .map(|piece| frame(&message(Message::RequestBody(body_message(piece, false)))))
                .collect(),
            end: frame(&message(Message::RequestBody(body_message(
                Bytes::new(),
                true,
            )))),
            response_headers: frame(&message(Message::ResponseHeaders(headers(&response)))),
            response_piece: frame(&message(Message::ResponseBody(body_message(piece, false)))),
            response_end: frame(&message(Message::ResponseBody(body_message(
                Bytes::new(),
                true,
            )))),
        }
    }
}

fn message(request: Message) -> ProcessingRequest {
    ProcessingRequest {
        request: Some(request),
        metadata_context: Some(Metadata::default()),
        ..ProcessingRequest::default()
    }
}

fn body_message(body: Bytes, end_of_stream: bool) -> HttpBody {
    HttpBody {
        body,
        end_of_stream,
    }
}

fn headers(lines: &[(&str, &str)]) -> HttpHeaders {
    let headers = lines.iter().map(|(key, value)| HeaderValue {
        key: (*key).to_owned(),
        value: Bytes::new(),
        raw_value: Bytes::copy_from_slice(value.as_bytes()),
    });
    HttpHeaders {
        headers: Some(HeaderMap {
            headers: headers.collect(),
        }),
        end_of_stream: false,
    }
}

/// A gRPC message frame.
fn frame(message: &ProcessingRequest) -> Bytes {
    let mut out = BytesMut::with_capacity(message.encoded_len() + 5);
    out.put_u8(0);
    out.put_u32(u32::try_from(message.encoded_len()).unwrap_or(u32::MAX));
    message.encode_raw(&mut out);
    out.freeze()
}

/// One exchange; returns the time from the end of the request to its answer.
async fn exchange(
    mut connection: SendRequest<http_body_util::combinators::BoxBody<Bytes, std::io::Error>>,
    script: &Script,
    response_pieces: usize,
) -> anyhow::Result<Duration> {
    let (out, outbound) = mpsc::channel(64);
    let stream = futures_util::stream::unfold(outbound, |mut outbound| async move {
        outbound.recv().await.map(|frame| (frame, outbound))
    });
    let request = Request::post("http://epp/envoy.service.ext_proc.v3.ExternalProcessor/Process")
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(BodyExt::boxed(StreamBody::new(Box::pin(stream))))?;
    let response = tokio::spawn(async move { connection.send_request(request).await });
    send(&out, &script.headers).await?;
    for piece in &script.body {
        send(&out, piece).await?;
    }
    send(&out, &script.end).await?;
    let asked = Instant::now();
    let mut replies = Replies {
        incoming: response.await??.into_body(),
        buffer: BytesMut::new(),
    };
    ensure!(
        matches!(replies.next().await?, Reply::RequestHeaders(_)),
        "no routing answer"
    );
    let decided = asked.elapsed();
    replies.until_end_of_body().await?;
    send(&out, &script.response_headers).await?;
    ensure!(
        matches!(replies.next().await?, Reply::ResponseHeaders(_)),
        "no answer to response headers"
    );
    for _ in 0..response_pieces {
        send(&out, &script.response_piece).await?;
        replies.next().await?;
    }
    send(&out, &script.response_end).await?;
    replies.until_end_of_body().await?;
    // Dropping both halves resets the stream, as Envoy does.
    Ok(decided)
}

/// Sends a message in DATA frames as Envoy cuts them.
async fn send(out: &Outbound, message: &Bytes) -> anyhow::Result<()> {
    let mut rest = message.clone();
    while !rest.is_empty() {
        let frame = rest.split_to(rest.len().min(FRAME_BYTES));
        out.send(Ok(Frame::data(frame)))
            .await
            .map_err(|_| anyhow::anyhow!("the server hung up"))?;
    }
    Ok(())
}

struct Replies {
    incoming: Incoming,
    buffer: BytesMut,
}

impl Replies {
    async fn next(&mut self) -> anyhow::Result<Reply> {
        loop {
            if let Some(length) = self.buffer.get(1..5) {
                let length = length.iter().fold(0usize, |n, b| n << 8 | usize::from(*b));
                if self.buffer.len() >= length + 5 {
                    let mut message = self.buffer.split_to(length + 5);
                    let _prefix = message.split_to(5);
                    let reply = ProcessingResponse::decode(message.freeze())?;
                    return reply.response.context("an empty reply");
                }
            }
            let Some(data) = self.incoming.frame().await else {
                bail!("the stream ended early")
            };
            if let Ok(data) = data?.into_data() {
                self.buffer.extend_from_slice(&data);
            }
        }
    }

    async fn until_end_of_body(&mut self) -> anyhow::Result<()> {
        use pinpod::extproc::proto::body_mutation::Mutation;
        loop {
            let (Reply::RequestBody(body) | Reply::ResponseBody(body)) = self.next().await? else {
                bail!("expected a body reply");
            };
            let mutation = body
                .response
                .and_then(|r| r.body_mutation)
                .and_then(|m| m.mutation);
            let Some(Mutation::StreamedResponse(piece)) = mutation else {
                bail!("expected a streamed body")
            };
            if piece.end_of_stream {
                return Ok(());
            }
        }
    }
}

/// User and system time of a process, all threads.
fn cpu_seconds(pid: u32) -> anyhow::Result<f64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let fields: Vec<&str> = stat
        .rsplit(')')
        .next()
        .unwrap_or_default()
        .split_whitespace()
        .collect();
    let ticks = |at: usize| {
        fields
            .get(at)
            .and_then(|f| f.parse::<f64>().ok())
            .unwrap_or(0.0)
    };
    // Fields 14 and 15 of the line, in ticks of 10 ms.
    Ok((ticks(11) + ticks(12)) / 100.0)
}

fn resident_kb(pid: u32) -> anyhow::Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status
        .lines()
        .find(|l| l.starts_with("VmRSS"))
        .context("no VmRSS")?;
    Ok(line.split_whitespace().nth(1).context("VmRSS")?.parse()?)
}

fn report(results: &[Measured], json: bool) -> anyhow::Result<()> {
    if json {
        show(&serde_json::to_string_pretty(results)?);
        return Ok(());
    }
    show(
        "| case | streams | server | requests/s | CPU us/request | ratio | answer p50 us | p99 us |",
    );
    show("|---|---|---|---|---|---|---|---|");
    for measured in results {
        show(&format!(
            "| {} | {} | {} | {:.0} | {:.0} | {:.2} | {:.0} | {:.0} |",
            measured.case,
            measured.streams,
            measured.server,
            measured.requests_per_second,
            measured.cpu_us_per_request,
            measured.ratio,
            measured.decision_p50_us,
            measured.decision_p99_us,
        ));
    }
    Ok(())
}
