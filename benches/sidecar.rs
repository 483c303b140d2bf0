//! What the sidecar costs, as a ratio: against a pass-through proxy on hyper of the shortest kind, in
//! one run.
//!
//! Engine, proxy and sidecar are processes of their own, with one thread each; CPU is read from
//! `/proc`. The engine sends 1,000 events at a fixed pace, each with the time at which it was sent, so
//! that a client knows how late every one is; what is added is the difference to a client that asks
//! the engine itself.
//!
//! `cargo bench --bench sidecar -- [--streams N] [--rounds N] [--pace-ms N] [--json]`

use std::convert::Infallible;
use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, ensure};
use bytes::Bytes;
use http::{Request, Response};
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::client::conn::http1::handshake;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use pinpod::demo::processes::{Process, free_ports};
use pinpod::demo::report::percentile;
use serde::Serialize;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::task::JoinSet;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Events of an answer.
const CHUNKS: usize = 1000;
/// Prompts.
const BODIES: [(&str, usize); 2] = [("2 KB", 2_000), ("400 KB", 400_000)];
const PATH: &str = "/v1/chat/completions";

#[derive(Debug, Clone, Serialize)]
struct Measured {
    body: &'static str,
    server: &'static str,
    cpu_us_per_token: f64,
    /// To the proxy of the same round.
    ratio: f64,
    delay_p50_us: f64,
    delay_p99_us: f64,
    /// From the request's first byte to the answer's head.
    head_p50_us: f64,
}

struct Server {
    name: &'static str,
    address: SocketAddr,
    pid: Option<u32>,
    prefill: bool,
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
    let number = |name: &str, default: usize| value(name).map_or(Ok(default), |v| v.parse());
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let pace = Duration::from_millis(number("--pace-ms", 2)? as u64);
    match value("--role").as_deref() {
        Some("engine") => runtime.block_on(engine(number("--port", 0)?, pace)),
        Some("proxy") => runtime.block_on(proxy(number("--port", 0)?, number("--to", 0)?)),
        _ => runtime.block_on(run(
            number("--streams", 24)?,
            number("--rounds", 3)?,
            pace,
            arguments.iter().any(|a| a == "--json"),
        )),
    }
}

async fn run(streams: usize, rounds: usize, pace: Duration, json: bool) -> anyhow::Result<()> {
    let directory = tempfile::tempdir()?;
    let [engine, proxy, sidecar] = free_ports()?;
    let this = std::env::current_exe()?;
    let flags = |line: String| line.split(' ').map(str::to_owned).collect::<Vec<_>>();
    let pace_ms = pace.as_millis();
    let start = |name: &str, program: &Path, line: String| {
        Process::start(name, program, &flags(line), directory.path())
    };
    let mut processes = [
        (
            start(
                "engine",
                &this,
                format!("--role engine --port {engine} --pace-ms {pace_ms}"),
            )?,
            engine,
        ),
        (
            start(
                "proxy",
                &this,
                format!("--role proxy --port {proxy} --to {engine}"),
            )?,
            proxy,
        ),
        (
            start(
                "sidecar",
                Path::new(env!("CARGO_BIN_EXE_pinpod")),
                format!(
                    "sidecar --port={sidecar} --model-server-port={engine} --secure-proxy=false \
                     --allowed-targets=127.0.0.1 --workers=1"
                ),
            )?,
            sidecar,
        ),
    ];
    for (process, port) in &mut processes {
        process.wait_for_port(*port).await?;
    }
    let at = |port: u16| SocketAddr::from(([127, 0, 0, 1], port));
    let pids = [processes[1].0.id(), processes[2].0.id()];
    let servers = [
        (("engine alone", engine), None, false),
        (("trivial proxy", proxy), Some(pids[0]), false),
        (("sidecar", sidecar), Some(pids[1]), false),
        (("sidecar, prefill elsewhere", sidecar), Some(pids[1]), true),
    ]
    .map(|((name, port), pid, prefill)| Server {
        name,
        address: at(port),
        pid,
        prefill,
    });
    for (name, bytes) in BODIES {
        let body = Bytes::from(format!(
            "{{\"model\":\"m\",\"stream\":true,\"max_tokens\":{CHUNKS},\"messages\":[{{\"role\":\"user\",\"content\":\"{}\"}}]}}",
            "x".repeat(bytes)
        ));
        let mut all: Vec<Vec<Measured>> = servers.iter().map(|_| Vec::new()).collect();
        for _ in 0..rounds {
            let mut base = 0.0;
            for (server, out) in servers.iter().zip(&mut all) {
                let mut measured = measure(server, name, &body, streams, engine).await?;
                if server.name == "trivial proxy" {
                    base = measured.cpu_us_per_token;
                }
                measured.ratio = measured.cpu_us_per_token / base;
                out.push(measured);
            }
        }
        for mut rounds in all {
            rounds.sort_by(|a, b| a.cpu_us_per_token.total_cmp(&b.cpu_us_per_token));
            report(&rounds[rounds.len() / 2], json)?;
        }
    }
    Ok(())
}

#[expect(clippy::print_stdout, reason = "the output of a bench")]
fn report(measured: &Measured, json: bool) -> anyhow::Result<()> {
    if json {
        println!("{}", serde_json::to_string(measured)?);
    } else {
        println!(
            "{:7} {:27} {:7.2} us CPU/token  x{:<5.2} delay p50 {:6.0} us  p99 {:6.0} us  head p50 {:6.0} us",
            measured.body,
            measured.server,
            measured.cpu_us_per_token,
            measured.ratio,
            measured.delay_p50_us,
            measured.delay_p99_us,
            measured.head_p50_us,
        );
    }
    Ok(())
}

async fn measure(
    server: &Server,
    body_name: &'static str,
    body: &Bytes,
    streams: usize,
    engine: u16,
) -> anyhow::Result<Measured> {
    let cpu = || server.pid.map_or(Ok(0.0), cpu_seconds);
    let before = cpu()?;
    let mut running = JoinSet::new();
    for _ in 0..streams {
        running.spawn(stream(
            server.address,
            body.clone(),
            server.prefill.then_some(engine),
        ));
    }
    let (mut delays, mut heads) = (Vec::new(), Vec::new());
    while let Some(ended) = running.join_next().await {
        let (head, mut late) = ended??;
        heads.push(head);
        delays.append(&mut late);
    }
    ensure!(delays.len() == streams * CHUNKS, "events are missing");
    let tokens = (streams * CHUNKS) as f64;
    Ok(Measured {
        body: body_name,
        server: server.name,
        cpu_us_per_token: (cpu()? - before) * 1e6 / tokens,
        ratio: 0.0,
        delay_p50_us: percentile(&mut delays, 0.5),
        delay_p99_us: percentile(&mut delays, 0.99),
        head_p50_us: percentile(&mut heads, 0.5),
    })
}

/// One request; how long its head took and how late each event was, in microseconds.
async fn stream(
    address: SocketAddr,
    body: Bytes,
    prefill: Option<u16>,
) -> anyhow::Result<(f64, Vec<f64>)> {
    let stream = TcpStream::connect(address).await?;
    stream.set_nodelay(true)?;
    let (mut sender, connection) = handshake(TokioIo::new(stream)).await?;
    tokio::spawn(connection);
    let mut request = Request::post(PATH)
        .header("host", "bench")
        .header("content-type", "application/json");
    if let Some(port) = prefill {
        request = request.header("x-prefiller-host-port", format!("127.0.0.1:{port}"));
    }
    let began = now_us();
    let response = sender.send_request(request.body(Full::new(body))?).await?;
    ensure!(response.status() == 200, "status {}", response.status());
    let head = now_us() - began;
    let mut body = response.into_body();
    let mut late = Vec::with_capacity(CHUNKS);
    let mut text = Vec::new();
    while let Some(frame) = body.frame().await {
        let Ok(piece) = frame?.into_data() else {
            continue;
        };
        let now = now_us();
        text.extend_from_slice(&piece);
        let mut from = 0;
        while let Some(end) = memchr::memmem::find(&text[from..], b"\n\n") {
            let event = &text[from..from + end];
            from += end + 2;
            if let Some(at) = memchr::memmem::find(event, b"\"content\":\"") {
                let sent = std::str::from_utf8(&event[at + 11..at + 27])?;
                late.push(now - sent.parse::<f64>().context("a time")?);
            }
        }
        text.drain(..from);
    }
    Ok((head, late))
}

fn now_us() -> f64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.unwrap_or_default().as_nanos() as f64 / 1e3
}

/// An engine: one token of prefill for those who ask to keep blocks, else a paced stream.
async fn engine(port: usize, pace: Duration) -> anyhow::Result<()> {
    serve(port, move |request| async move {
        let body = request.into_body().collect().await?.to_bytes();
        if memchr::memmem::find(&body, b"\"do_remote_decode\":true").is_some() {
            let answer = r#"{"choices":[],"usage":{"prompt_tokens_details":{"cached_tokens":1}},"kv_transfer_params":{"do_remote_prefill":true,"remote_block_ids":[[1]],"remote_engine_id":"e","remote_host":"127.0.0.1","remote_port":1}}"#;
            let body = Full::new(Bytes::from_static(answer.as_bytes()));
            return Ok(Response::new(body.map_err(|e| match e {}).boxed()));
        }
        let (sender, mut receiver) = mpsc::channel::<Result<Frame<Bytes>, hyper::Error>>(1);
        tokio::spawn(async move {
            let mut ticks = tokio::time::interval(pace);
            for _ in 0..CHUNKS {
                ticks.tick().await;
                let event = format!(
                    "data: {{\"id\":\"chatcmpl-0123456789abcdef\",\"object\":\"chat.completion.chunk\",\"created\":1795346764,\"model\":\"m\",\"choices\":[{{\"index\":0,\"delta\":{{\"content\":\"{:016.0}\"}},\"logprobs\":null,\"finish_reason\":null,\"token_ids\":null}}]}}\n\n",
                    now_us()
                );
                if sender.send(Ok(Frame::data(event.into()))).await.is_err() {
                    return;
                }
            }
            let end = "data: {\"choices\":[],\"usage\":{\"prompt_tokens\":1,\"prompt_tokens_details\":{\"cached_tokens\":0}}}\n\ndata: [DONE]\n\n";
            let _ = sender.send(Ok(Frame::data(end.into()))).await;
        });
        let events = futures_util::stream::poll_fn(move |cx| receiver.poll_recv(cx));
        let mut response = Response::new(StreamBody::new(events).boxed());
        response
            .headers_mut()
            .insert("content-type", http::HeaderValue::from_static("text/event-stream"));
        Ok(response)
    })
    .await
}

/// The least that passes a request on: a connection to the engine for each, bodies as they come.
async fn proxy(port: usize, to: usize) -> anyhow::Result<()> {
    serve(port, move |request| async move {
        let to = u16::try_from(to).context("--to")?;
        let stream = TcpStream::connect(("127.0.0.1", to)).await?;
        stream.set_nodelay(true)?;
        let (mut sender, connection) = handshake(TokioIo::new(stream)).await?;
        tokio::spawn(connection);
        let response = sender.send_request(request).await?;
        Ok(response.map(BodyExt::boxed))
    })
    .await
}

type Answer = Response<BoxBody<Bytes, hyper::Error>>;

async fn serve<F, A>(port: usize, answer: F) -> anyhow::Result<()>
where
    F: Fn(Request<Incoming>) -> A + Clone + Send + 'static,
    A: Future<Output = anyhow::Result<Answer>> + Send + 'static,
{
    let listener = TcpListener::bind(("127.0.0.1", u16::try_from(port)?)).await?;
    loop {
        let (stream, _) = listener.accept().await?;
        stream.set_nodelay(true)?;
        let answer = answer.clone();
        tokio::spawn(async move {
            let service = service_fn(move |request| {
                let answered = answer(request);
                async move {
                    let failed = |_| {
                        let body = Full::new(Bytes::new()).map_err(|e: Infallible| match e {});
                        let mut response = Response::new(body.boxed());
                        *response.status_mut() = http::StatusCode::BAD_GATEWAY;
                        response
                    };
                    Ok::<_, Infallible>(answered.await.unwrap_or_else(failed))
                }
            });
            let connection = hyper::server::conn::http1::Builder::new()
                .serve_connection(TokioIo::new(stream), service);
            let _ = connection.await;
        });
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
