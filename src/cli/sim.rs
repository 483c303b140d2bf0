//! `pinpod sim`

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::Context;
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::sim::events::EventsConfig;
use crate::sim::hash::HashAlgorithm;
use crate::sim::server::{EventsSetup, Fault};
use crate::sim::transfer::{Role, TransferConfig, TransferSetup};
use crate::sim::{EngineConfig, Profile, SimConfig, serve};

/// Flags of `sim`.
#[derive(Debug, clap::Args)]
pub(super) struct SimArgs {
    /// First port; further pods take the ports behind it
    #[arg(long, default_value_t = 8000)]
    port: u16,
    /// Address to listen on
    #[arg(long, default_value = "127.0.0.1")]
    host: IpAddr,
    /// Pods to run
    #[arg(long, default_value_t = 1)]
    count: u16,
    /// Name in the x-sim-name response header; pods are numbered
    #[arg(long, default_value = "sim")]
    name: String,
    /// Served model
    #[arg(long, default_value = "sim-model")]
    model: String,
    /// Served LoRA adapters, comma-separated
    #[arg(long, value_delimiter = ',')]
    lora: Vec<String>,
    /// Adapters that fit at once
    #[arg(long, default_value_t = 4)]
    max_loras: usize,
    /// Speed: h100-8b (one H100) or h100-32b (two)
    #[arg(long, default_value = "h100-8b")]
    profile: String,
    /// Times faster than real time
    #[arg(long, default_value_t = 1.0)]
    time_scale: f64,
    /// KV cache in tokens [default: the profile's]
    #[arg(long)]
    kv_tokens: Option<usize>,
    /// Tokens of a KV block
    #[arg(long, default_value_t = 16)]
    block_size: usize,
    /// Tokens of a request, prompt and output together [default: the KV cache]
    #[arg(long)]
    max_model_len: Option<usize>,
    /// Do not tell in usage how many prompt tokens were cached
    #[arg(long)]
    no_enable_prompt_tokens_details: bool,
    /// Requests in a step
    #[arg(long, default_value_t = 1024)]
    max_num_seqs: usize,
    /// Tokens in a step
    #[arg(long, default_value_t = 8192)]
    max_num_batched_tokens: usize,
    /// Output tokens in one SSE event
    #[arg(long, default_value_t = 1)]
    tokens_per_event: usize,
    /// Decode steps computed and slept as one, when nothing else is to do
    #[arg(long, default_value_t = 1)]
    steps_per_tick: usize,
    /// Misbehave from the start
    #[arg(long, value_enum, default_value_t = Fault::None)]
    fault: Fault,
    /// Publishes KV events: JSON as of vLLM's flag; further pods take the ports behind those given
    #[arg(long, value_parser = events_config, default_value = "{}")]
    kv_events_config: EventsConfig,
    /// The pods are the data-parallel ranks of one engine, and say so in events
    #[arg(long)]
    data_parallel: bool,
    /// How blocks are hashed for events
    #[arg(long, value_enum, default_value_t)]
    prefix_caching_hash_algo: HashAlgorithm,
    /// Seed of block hashes
    #[arg(long, env = "PYTHONHASHSEED")]
    hash_seed: Option<String>,
    /// 1: events carry hashes as 64-bit integers; 0: as bytes
    #[arg(long, env = "VLLM_KV_EVENTS_USE_INT_BLOCK_HASHES", default_value_t = 1)]
    int_block_hashes: u8,
    /// Answer at /v1/completions/render and /v1/chat/completions/render
    #[arg(long)]
    enable_scale_out: bool,
    /// Hands KV from pod to pod: JSON as of vLLM's flag, with the connector NixlConnector
    #[arg(long, value_parser = transfer_config, default_value = "{}")]
    kv_transfer_config: TransferConfig,
    /// Short for --kv-transfer-config with NixlConnector and this role
    #[arg(long, value_enum)]
    kv_role: Option<Role>,
    /// Host that other pods pull KV from
    #[arg(long, env = "VLLM_NIXL_SIDE_CHANNEL_HOST", default_value = "127.0.0.1")]
    kv_side_channel_host: String,
    /// Its port; further pods take the ports behind it, and 0 lets the system choose
    #[arg(long, env = "VLLM_NIXL_SIDE_CHANNEL_PORT", default_value_t = 5600)]
    kv_side_channel_port: u16,
    /// Seconds, of the host, that blocks wait to be pulled
    #[arg(long, default_value_t = 30.0)]
    kv_lease_seconds: f64,
    /// Bytes of a token's KV
    #[arg(long, default_value_t = 131_072.0)]
    kv_token_bytes: f64,
    /// Simulated bytes a second between pods
    #[arg(long, default_value_t = 5e10)]
    kv_bytes_per_second: f64,
}

fn transfer_config(json: &str) -> Result<TransferConfig, serde_json::Error> {
    serde_json::from_str(json)
}

fn events_config(json: &str) -> Result<EventsConfig, serde_json::Error> {
    serde_json::from_str(json)
}

impl SimArgs {
    /// What pod `number` publishes.
    fn events(&self, number: u16) -> anyhow::Result<EventsSetup> {
        let config = self.kv_events_config.of_rank(number);
        Ok(EventsSetup {
            config: config.context("--kv-events-config")?,
            rank: if self.data_parallel { number } else { 0 },
            algorithm: self.prefix_caching_hash_algo,
            seed: self.hash_seed.clone(),
            whole_hashes: self.int_block_hashes == 0,
        })
    }
}

impl SimArgs {
    /// How pod `number` hands over KV, if it does.
    fn transfer(&self, number: u16) -> anyhow::Result<Option<TransferSetup>> {
        let config = &self.kv_transfer_config;
        let (connector, role) = match (&config.kv_connector, self.kv_role) {
            (None, None) => return Ok(None),
            (None, Some(role)) => ("NixlConnector", role),
            (Some(connector), role) => {
                let role = config.kv_role.or(role);
                let role = role.context("--kv-transfer-config: kv_role is missing")?;
                (connector.as_str(), role)
            }
        };
        anyhow::ensure!(
            connector == "NixlConnector",
            "--kv-transfer-config: {connector:?} is not NixlConnector"
        );
        anyhow::ensure!(
            self.kv_bytes_per_second > 0.0 && self.kv_token_bytes >= 0.0,
            "--kv-bytes-per-second must be above 0, --kv-token-bytes at least 0"
        );
        let port = match self.kv_side_channel_port {
            0 => 0,
            first => first
                .checked_add(number)
                .context("--kv-side-channel-port and --count run past 65535")?,
        };
        let engine_id = || uuid::Uuid::new_v4().to_string();
        Ok(Some(TransferSetup {
            role,
            engine_id: config.engine_id.clone().unwrap_or_else(engine_id),
            host: self.kv_side_channel_host.clone(),
            port,
            lease: Duration::try_from_secs_f64(self.kv_lease_seconds)
                .context("--kv-lease-seconds")?,
            token_bytes: self.kv_token_bytes,
            bytes_per_second: self.kv_bytes_per_second,
        }))
    }
}

/// Runs the pods until SIGTERM or Ctrl-C.
pub(super) fn run(args: &SimArgs) -> anyhow::Result<()> {
    let profile = Profile::named(&args.profile).with_context(|| {
        format!(
            "--profile: {:?} is not one of h100-8b, h100-32b",
            args.profile
        )
    })?;
    anyhow::ensure!(
        args.time_scale > 0.0 && args.time_scale.is_finite(),
        "--time-scale must be above 0"
    );
    anyhow::ensure!(
        args.block_size > 0 && args.max_num_seqs > 0 && args.max_loras > 0,
        "--block-size, --max-num-seqs and --max-loras must be above 0"
    );
    anyhow::ensure!(
        args.max_num_batched_tokens > 0,
        "--max-num-batched-tokens must be above 0"
    );
    let kv_tokens = args.kv_tokens.unwrap_or(profile.kv_tokens);
    let engine = EngineConfig {
        profile,
        time_scale: args.time_scale,
        blocks: kv_tokens / args.block_size,
        block_tokens: args.block_size,
        max_num_seqs: args.max_num_seqs,
        max_num_batched_tokens: args.max_num_batched_tokens,
        steps_per_tick: args.steps_per_tick.max(1),
        max_loras: args.max_loras,
        max_model_len: args.max_model_len.unwrap_or(kv_tokens),
        kv_role: None,
    };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let shutdown = CancellationToken::new();
        let mut pods = JoinSet::new();
        for number in 0..args.count {
            let port = args
                .port
                .checked_add(number)
                .context("--port and --count run past 65535")?;
            let address = SocketAddr::new(args.host, port);
            let listener = TcpListener::bind(address)
                .await
                .with_context(|| address.to_string())?;
            let config = SimConfig {
                name: format!("{}-{number}", args.name),
                model: args.model.clone(),
                loras: args.lora.clone(),
                engine: engine.clone(),
                tokens_per_event: args.tokens_per_event,
                prompt_tokens_details: !args.no_enable_prompt_tokens_details,
                fault: args.fault,
                events: args.events(number)?,
                enable_scale_out: args.enable_scale_out,
                transfer: args.transfer(number)?,
            };
            pods.spawn(serve(config, listener, shutdown.clone()));
        }
        let ended = tokio::select! {
            signal = crate::epp::run::wait_for_signal() => signal,
            Some(ended) = pods.join_next() => ended.context("a pod panicked")?.context("a pod"),
        };
        shutdown.cancel();
        while pods.join_next().await.is_some() {}
        ended
    })
}
