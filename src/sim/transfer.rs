//! Hands the KV of a prompt from one pod to another, as vLLM's NixlConnector does (pull mode,
//! `vllm/distributed/kv_transfer/kv_connector/v1/nixl/`).
//!
//! A request with `do_remote_decode` keeps its blocks when it ends, and its answer says where they
//! are. A request that brings these parameters back with `do_remote_prefill` pulls what its own cache
//! lacks over the side channel: a line of JSON each way, the time the bytes would take, and a line
//! that frees the blocks. The role of the configuration changes only what is exposed, as in vLLM.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Mutex, Semaphore};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::engine::Engine;

/// Time to reach the other pod; a pull that is not answered by then fails, as recorded.
const REACH_TIME: Duration = Duration::from_secs(5);
/// Longest line on the side channel.
const MAX_LINE_BYTES: u64 = 4096;
/// Pods that pull at a time; further ones are turned away.
const MAX_PEERS: usize = 256;

/// `--kv-transfer-config`; what the stand-in has no use for is ignored.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct TransferConfig {
    /// `NixlConnector`, or nothing.
    pub kv_connector: Option<String>,
    /// `kv_producer`, `kv_consumer` or `kv_both`.
    pub kv_role: Option<Role>,
    /// Random unless given.
    pub engine_id: Option<String>,
}

/// What a pod is for. vLLM's connector serves both sides whatever it says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, clap::ValueEnum)]
pub enum Role {
    /// Computes prompts for others.
    #[serde(rename = "kv_producer")]
    Prefill,
    /// Takes prompts from others.
    #[serde(rename = "kv_consumer")]
    Decode,
    /// Either.
    #[serde(rename = "kv_both")]
    Both,
}

/// A pod that hands over KV.
#[derive(Debug, Clone)]
pub struct TransferSetup {
    /// What the pod says it is for.
    pub role: Role,
    /// Tells lives of engines apart.
    pub engine_id: String,
    /// Host of the side channel, told to others.
    pub host: String,
    /// Its port; 0 lets the system choose.
    pub port: u16,
    /// How long blocks wait to be pulled.
    pub lease: Duration,
    /// KV of a token.
    pub token_bytes: f64,
    /// Of the network, in simulated seconds.
    pub bytes_per_second: f64,
}

/// `kv_transfer_params` of a request, read as loosely as vLLM does.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct TransferParams {
    pub(super) do_remote_decode: Option<bool>,
    pub(super) do_remote_prefill: Option<bool>,
    pub(super) remote_block_ids: Option<Value>,
    remote_engine_id: Option<String>,
    remote_request_id: Option<String>,
    remote_host: Option<String>,
    remote_port: Option<u16>,
    pub(super) remote_prefill_cached_tokens: Option<usize>,
}

/// Where the KV of a prompt is.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Remote {
    engine_id: String,
    request_id: String,
    host: String,
    port: u16,
    /// Numbers of its blocks, of all groups in a row.
    blocks: Vec<u64>,
}

/// A pull that came to its end.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Pull {
    /// From its beginning to the last byte, in simulated seconds.
    pub(super) seconds: f64,
    /// Of whole blocks.
    pub(super) bytes: f64,
    /// Runs of neighbouring blocks: NIXL moves such a run at once. The stand-in has one region of
    /// memory, an engine one for each layer.
    pub(super) descriptors: usize,
}

impl TransferParams {
    /// Where to pull from; `None` when something is missing, which vLLM only warns of.
    pub(super) fn remote(self) -> Option<Remote> {
        let groups = self.remote_block_ids.as_ref().and_then(Value::as_array);
        let numbers = groups.into_iter().flatten().filter_map(Value::as_array);
        Some(Remote {
            blocks: numbers.flatten().filter_map(Value::as_u64).collect(),
            engine_id: self.remote_engine_id?,
            request_id: self.remote_request_id?,
            host: self.remote_host?,
            port: self.remote_port?,
        })
    }
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Message {
    /// Wants the blocks of a request of an engine.
    Read { request: String, engine: String },
    /// They are there: so many tokens.
    Tokens(usize),
    /// Has them.
    Done,
}

/// The side channel of a pod.
#[derive(Debug)]
pub(super) struct Transfer {
    setup: TransferSetup,
    port: u16,
    time_scale: f64,
    /// Of one pod, whose pulls share it: one after the other.
    link: Mutex<()>,
}

impl Transfer {
    /// Binds the side channel and serves it until `shutdown`.
    pub(super) async fn start(
        setup: TransferSetup,
        time_scale: f64,
        engine: Arc<Engine>,
        shutdown: CancellationToken,
    ) -> io::Result<Self> {
        let listener = TcpListener::bind((setup.host.as_str(), setup.port)).await?;
        let port = listener.local_addr()?.port();
        tokio::spawn(serve(listener, setup.engine_id.clone(), engine, shutdown));
        Ok(Self {
            setup,
            port,
            time_scale,
            link: Mutex::default(),
        })
    }

    pub(super) fn lease(&self) -> Duration {
        self.setup.lease
    }

    /// The `kv_transfer_params`, as JSON, of an answer whose `blocks` are kept for `request`.
    pub(super) fn params(
        &self,
        request: &str,
        blocks: &[u32],
        prompt: usize,
        cached: usize,
    ) -> String {
        let (engine, host, port) = (
            json!(self.setup.engine_id),
            json!(self.setup.host),
            self.port,
        );
        let (blocks, request) = (json!([blocks]), json!(request));
        format!(
            r#"{{"do_remote_prefill":true,"do_remote_decode":false,"remote_block_ids":{blocks},"remote_engine_id":{engine},"remote_request_id":{request},"remote_host":{host},"remote_port":{port},"tp_size":1,"dcp_size":1,"pp_size":1,"remote_num_tokens":{prompt},"remote_blocks_expiry_time":null,"transfer_mode":"pull","remote_prefill_cached_tokens":{cached}}}"#
        )
    }

    /// Pulls the blocks that hold the last `tokens` tokens of a prompt, and frees all of them there.
    pub(super) async fn pull(
        &self,
        remote: &Remote,
        tokens: usize,
        block_tokens: usize,
    ) -> io::Result<Pull> {
        let reach = async {
            let address = (remote.host.as_str(), remote.port);
            let mut stream = BufReader::new(TcpStream::connect(address).await?);
            let read = Message::Read {
                request: remote.request_id.clone(),
                engine: remote.engine_id.clone(),
            };
            send(&mut stream, &read).await?;
            match receive(&mut stream).await? {
                Some(Message::Tokens(_)) => Ok(stream),
                _ => Err(io::Error::from(io::ErrorKind::NotFound)),
            }
        };
        let reached = tokio::time::timeout(REACH_TIME, reach).await;
        let mut stream = reached.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
        let begun = Instant::now();
        let blocks = tokens.div_ceil(block_tokens);
        let bytes = (blocks * block_tokens) as f64 * self.setup.token_bytes;
        let seconds = bytes / self.setup.bytes_per_second;
        let time = Duration::try_from_secs_f64(seconds / self.time_scale).unwrap_or(REACH_TIME);
        let moved = async {
            let _link = self.link.lock().await;
            tokio::time::sleep(time).await;
        };
        tokio::select! {
            () = moved => {}
            // The other side has nothing to say: it died.
            _ = stream.fill_buf() => return Err(io::ErrorKind::UnexpectedEof.into()),
        }
        let seconds = begun.elapsed().as_secs_f64() * self.time_scale;
        send(&mut stream, &Message::Done).await?;
        Ok(Pull {
            seconds,
            bytes,
            descriptors: runs(remote.blocks.iter().rev().take(blocks)),
        })
    }
}

/// How many runs of neighbours `blocks`, last first, are.
fn runs<'a>(blocks: impl Iterator<Item = &'a u64>) -> usize {
    let mut behind: Option<u64> = None;
    let begins = blocks.filter(|&&block| {
        let neighbour = behind.is_some_and(|behind| behind.checked_sub(1) == Some(block));
        behind = Some(block);
        !neighbour
    });
    begins.count()
}

async fn send(stream: &mut BufReader<TcpStream>, message: &Message) -> io::Result<()> {
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    stream.write_all(&line).await
}

/// The next message; `None` at the end.
async fn receive(stream: &mut BufReader<TcpStream>) -> io::Result<Option<Message>> {
    let mut line = String::new();
    let read = stream.take(MAX_LINE_BYTES).read_line(&mut line).await?;
    if read == 0 {
        return Ok(None);
    }
    Ok(Some(serde_json::from_str(&line)?))
}

async fn serve(
    listener: TcpListener,
    engine_id: String,
    engine: Arc<Engine>,
    shutdown: CancellationToken,
) {
    let peers = Arc::new(Semaphore::new(MAX_PEERS));
    loop {
        let accepted = tokio::select! {
            () = shutdown.cancelled() => return,
            accepted = listener.accept() => accepted,
        };
        let Ok((stream, _)) = accepted else {
            tokio::time::sleep(Duration::from_millis(20)).await;
            continue;
        };
        let Ok(place) = Arc::clone(&peers).try_acquire_owned() else {
            continue;
        };
        let (engine, engine_id, shutdown) =
            (Arc::clone(&engine), engine_id.clone(), shutdown.clone());
        tokio::spawn(async move {
            tokio::select! {
                () = shutdown.cancelled() => {}
                // A peer that breaks off leaves the blocks to their lease.
                _ = hand_over(stream, &engine_id, &engine) => {}
            }
            drop(place);
        });
    }
}

async fn hand_over(stream: TcpStream, engine_id: &str, engine: &Engine) -> io::Result<()> {
    let mut stream = BufReader::new(stream);
    let first = tokio::time::timeout(REACH_TIME, receive(&mut stream)).await;
    let Ok(Ok(Some(Message::Read {
        request,
        engine: wanted,
    }))) = first
    else {
        return Ok(());
    };
    let tokens = engine.kept_tokens(&request).filter(|_| wanted == engine_id);
    let Some(tokens) = tokens else {
        // Closing says that they are not here.
        return Ok(());
    };
    send(&mut stream, &Message::Tokens(tokens)).await?;
    if let Some(Message::Done) = receive(&mut stream).await? {
        engine.free_kept(&request);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_are_moved_at_once() {
        let runs_of = |blocks: &[u64]| runs(blocks.iter().rev());
        assert_eq!(runs_of(&[38, 39, 40, 41]), 1);
        assert_eq!(runs_of(&[38, 39, 50, 51, 7]), 3);
        assert_eq!(runs_of(&[3, 2, 1]), 3, "downwards is no run");
        assert_eq!((runs_of(&[u64::MAX]), runs_of(&[])), (1, 0));
    }

    #[test]
    fn block_numbers_are_read_over_groups_and_nothing_else() {
        let params: TransferParams = serde_json::from_value(json!({
            "remote_block_ids": [[1, 2, "x"], 7, [9]], "remote_engine_id": "e",
            "remote_request_id": "r", "remote_host": "h", "remote_port": 1,
        }))
        .unwrap();
        assert_eq!(params.remote().unwrap().blocks, [1, 2, 9]);
    }
}
