//! The parts of a run, by the layout of its pods.

use std::net::SocketAddr;
use std::path::Path;

use super::envoy::ORIGINAL_DST;
use super::processes::{Envoy, Picker, Process, Sidecar, Sims};

/// Bytes of a token's KV: those of the 32B model that `latency.rs` describes.
pub const KV_TOKEN_BYTES: u32 = 262_144;
/// Simulated bytes a second that a pod can pull: a network interface of 200 Gbit/s.
pub const KV_BYTES_PER_SECOND: f64 = 2.5e10;
/// Label by which the picker knows what an endpoint is for.
const ROLE: &str = "llm-d.ai/role";

/// Which pods there are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// So many, each of which computes prompts and output.
    Aggregated(u16),
    /// Some compute prompts, the others, each behind a sidecar of its own, the output.
    Disaggregated {
        /// Pods of prompts.
        prefill: u16,
        /// Pods of output.
        decode: u16,
    },
}

/// Everything that runs. Dropped, it is gone.
#[derive(Debug)]
pub struct Parts {
    /// Pods that answer.
    answering: Sims,
    /// Pods that only compute prompts.
    prefill: Option<Sims>,
    sidecars: Vec<Sidecar>,
    picker: Picker,
    envoy: Envoy,
}

/// Where the parts listen.
#[derive(Debug, Clone)]
pub struct Addresses {
    /// Engines that answer.
    pub answering: Vec<SocketAddr>,
    /// Engines that only compute prompts.
    pub prefill: Vec<SocketAddr>,
    /// Metrics of the picker.
    pub picker_metrics: SocketAddr,
    /// Where clients connect.
    pub gateway: SocketAddr,
}

impl Addresses {
    /// All engines, those that answer first.
    pub fn engines(&self) -> Vec<SocketAddr> {
        [&self.answering[..], &self.prefill[..]].concat()
    }
}

impl Parts {
    /// Starts pods with `sim_flags` in this layout, a picker with the configuration at `document`, and
    /// Envoy.
    pub async fn start(
        program: &Path,
        layout: Layout,
        sim_flags: &[String],
        document: &Path,
        directory: &Path,
    ) -> anyhow::Result<Self> {
        let (answering, prefill) = pods(program, layout, sim_flags, directory).await?;
        let mut sidecars = Vec::new();
        if let Some(prefill) = &prefill {
            for engine in &answering.addresses {
                let targets = [format!("--allowed-targets={}", prefill.list())];
                sidecars.push(Sidecar::start(program, *engine, &targets, directory).await?);
            }
        }
        let endpoints = match &prefill {
            None => answering.endpoints_flag(),
            Some(prefill) => endpoints_of_roles(&prefill.addresses, &sidecars),
        };
        let arguments = [endpoints, format!("--config-file={}", document.display())];
        let picker = Picker::start(program, &arguments, directory).await?;
        let envoy = Envoy::start(ORIGINAL_DST, picker.grpc, true, Vec::new(), directory).await?;
        Ok(Self {
            answering,
            prefill,
            sidecars,
            picker,
            envoy,
        })
    }

    /// Where they listen.
    pub fn addresses(&self) -> Addresses {
        let prefill = self.prefill.as_ref();
        Addresses {
            answering: self.answering.addresses.clone(),
            prefill: prefill.map_or_else(Vec::new, |pods| pods.addresses.clone()),
            picker_metrics: ([127, 0, 0, 1], self.picker.metrics).into(),
            gateway: ([127, 0, 0, 1], self.envoy.port).into(),
        }
    }

    /// All processes.
    pub fn processes(&mut self) -> Vec<&mut Process> {
        let pods = self.prefill.iter_mut().chain([&mut self.answering]);
        let sidecars = self.sidecars.iter_mut().map(|sidecar| &mut sidecar.process);
        pods.map(|pods| &mut pods.process)
            .chain(sidecars)
            .chain([&mut self.picker.process, &mut self.envoy.process])
            .collect()
    }
}

/// The pods that answer, and those that only compute prompts.
async fn pods(
    program: &Path,
    layout: Layout,
    flags: &[String],
    directory: &Path,
) -> anyhow::Result<(Sims, Option<Sims>)> {
    let (prefill, decode) = match layout {
        Layout::Aggregated(pods) => {
            return Ok((Sims::start(program, pods, flags, directory).await?, None));
        }
        Layout::Disaggregated { prefill, decode } => (prefill, decode),
    };
    let with_role = |role: &str| {
        let own = [
            format!("--kv-role={role}"),
            "--kv-side-channel-port=0".to_owned(),
            format!("--kv-token-bytes={KV_TOKEN_BYTES}"),
            format!("--kv-bytes-per-second={KV_BYTES_PER_SECOND}"),
        ];
        [flags, &own].concat()
    };
    let prefill = Sims::start(program, prefill, &with_role("prefill"), directory).await?;
    let decode = Sims::start(program, decode, &with_role("decode"), directory).await?;
    Ok((decode, Some(prefill)))
}

/// `--endpoints` with roles: a decode endpoint is the sidecar before its engine.
fn endpoints_of_roles(prefill: &[SocketAddr], sidecars: &[Sidecar]) -> String {
    let prefill = prefill.iter().map(|address| (address, "prefill"));
    let decode = sidecars.iter().map(|sidecar| (&sidecar.address, "decode"));
    let entries: Vec<String> = prefill
        .chain(decode)
        .map(|(address, role)| format!("{address};{ROLE}={role}"))
        .collect();
    format!("--endpoints={}", entries.join(","))
}
