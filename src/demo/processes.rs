//! Child processes that die with us.

use std::fs::File;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Context, bail};
use tokio::time::Instant;

use super::envoy::{Addresses, configure};

/// Longest a part may take to come up.
const START_TIMEOUT: Duration = Duration::from_secs(30);

/// Lines of a log that an error shows.
const LOG_LINES: usize = 20;

/// A child did not come up, or ended before it was told to.
#[derive(Debug, thiserror::Error)]
#[error("{name} {how}; its log is {}, the end of it:\n{last_lines}", .log.display())]
pub struct PartFailed {
    name: String,
    how: String,
    log: PathBuf,
    last_lines: String,
}

/// A running child; killed when dropped.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Starts `program`; its output goes to `<directory>/<name>.log`.
    pub fn start(
        name: &str,
        program: &Path,
        arguments: &[String],
        directory: &Path,
    ) -> anyhow::Result<Self> {
        let log = directory.join(format!("{name}.log"));
        let file = File::create(&log).with_context(|| log.display().to_string())?;
        let child = Command::new(program)
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file)
            .spawn()
            .with_context(|| format!("starting {}", program.display()))?;
        Ok(Self {
            name: name.to_owned(),
            child,
            log,
        })
    }

    /// Process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Waits until something listens on `port`; fails with the log when the child ends before.
    pub async fn wait_for_port(&mut self, port: u16) -> anyhow::Result<()> {
        let address = SocketAddr::from(([127, 0, 0, 1], port));
        let deadline = Instant::now() + START_TIMEOUT;
        while TcpStream::connect_timeout(&address, Duration::from_millis(200)).is_err() {
            self.check()?;
            if Instant::now() > deadline {
                return Err(self.failed(format!("does not listen on {port}")).into());
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(())
    }

    /// Fails, naming its log, when the child ended.
    pub fn check(&mut self) -> anyhow::Result<()> {
        match self.child.try_wait()? {
            Some(status) => Err(self.failed(format!("ended early with {status}")).into()),
            None => Ok(()),
        }
    }

    /// Kills the child at once.
    pub fn kill(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    fn failed(&self, how: String) -> PartFailed {
        let text = std::fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        let last = lines
            .get(lines.len().saturating_sub(LOG_LINES)..)
            .unwrap_or_default();
        PartFailed {
            name: self.name.clone(),
            how,
            log: self.log.clone(),
            last_lines: last.join("\n"),
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Ports below those that the system hands out to outgoing connections, which would take them away
/// before a child binds them.
const LISTEN_PORTS: std::ops::Range<u16> = 18_000..32_000;

/// Ports that were free a moment ago, all different.
pub fn free_ports<const N: usize>() -> anyhow::Result<[u16; N]> {
    let mut ports = [0; N];
    for port in &mut ports {
        *port = free_port_range(1)?;
    }
    Ok(ports)
}

/// The first of `count` consecutive ports that were free a moment ago. None is given out twice by one
/// process before all others were.
pub fn free_port_range(count: u16) -> anyhow::Result<u16> {
    /// How far this process got; begins somewhere, so that several seldom meet.
    static NEXT: OnceLock<AtomicUsize> = OnceLock::new();
    let next = NEXT.get_or_init(|| AtomicUsize::new(fastrand::usize(..LISTEN_PORTS.len())));
    for _ in 0..LISTEN_PORTS.len() {
        let offset = next.fetch_add(usize::from(count.max(1)), Ordering::Relaxed);
        let offset = u16::try_from(offset % LISTEN_PORTS.len()).unwrap_or_default();
        let first = LISTEN_PORTS.start + offset;
        let end = first.saturating_add(count);
        if end <= LISTEN_PORTS.end
            && (first..end).all(|port| TcpListener::bind(("127.0.0.1", port)).is_ok())
        {
            return Ok(first);
        }
    }
    bail!("no {count} free ports in a row")
}

/// Where the Envoy binary is: `PINPOD_ENVOY`, `.tools/envoy` here or above, or the search path.
pub fn find_envoy() -> anyhow::Result<PathBuf> {
    if let Some(path) = std::env::var_os("PINPOD_ENVOY") {
        return Ok(path.into());
    }
    let here = std::env::current_dir()?;
    let tools = here
        .ancestors()
        .map(|directory| directory.join(".tools/envoy"));
    let search = std::env::var_os("PATH").unwrap_or_default();
    let path = std::env::split_paths(&search)
        .map(|directory| directory.join("envoy"))
        .collect::<Vec<_>>();
    tools
        .chain(path)
        .find(|candidate| candidate.is_file())
        .context("no Envoy found: run `make .tools/envoy`, or set PINPOD_ENVOY to the binary")
}

/// A running Envoy.
#[derive(Debug)]
pub struct Envoy {
    /// The process.
    pub process: Process,
    /// Where clients connect.
    pub port: u16,
    /// Admin interface.
    pub admin: u16,
}

impl Envoy {
    /// Starts Envoy with a shipped template in front of a picker.
    pub async fn start(
        template: &str,
        picker: u16,
        plaintext_picker: bool,
        endpoints: Vec<SocketAddr>,
        directory: &Path,
    ) -> anyhow::Result<Self> {
        let [listener, admin, ready] = free_ports()?;
        let addresses = Addresses {
            listener,
            admin,
            ready,
            picker,
            endpoints,
            plaintext_picker,
        };
        let file = directory.join(format!("envoy-{listener}.json"));
        std::fs::write(&file, configure(template, &addresses)?)?;
        let arguments = [
            "-c",
            &file.display().to_string(),
            "--use-dynamic-base-id",
            "--concurrency",
            "1",
            "--log-level",
            "warn",
            "--drain-time-s",
            "1",
        ]
        .map(str::to_owned);
        let mut process = Process::start(
            &format!("envoy-{listener}"),
            &find_envoy()?,
            &arguments,
            directory,
        )?;
        process.wait_for_port(listener).await?;
        Ok(Self {
            process,
            port: listener,
            admin,
        })
    }
}

/// A running endpoint picker.
#[derive(Debug)]
pub struct Picker {
    /// The process.
    pub process: Process,
    /// ext_proc port.
    pub grpc: u16,
    /// Metrics port.
    pub metrics: u16,
}

impl Picker {
    /// Starts `program serve` with `arguments` and ports of its own, plaintext unless told otherwise.
    pub async fn start(
        program: &Path,
        arguments: &[String],
        directory: &Path,
    ) -> anyhow::Result<Self> {
        let [grpc, health, metrics] = free_ports()?;
        Self::start_on(program, [grpc, health, metrics], arguments, directory).await
    }

    /// The same on given ports: ext_proc, health, metrics.
    pub async fn start_on(
        program: &Path,
        [grpc, health, metrics]: [u16; 3],
        arguments: &[String],
        directory: &Path,
    ) -> anyhow::Result<Self> {
        let mut all = vec![
            "serve".to_owned(),
            format!("--grpc-port={grpc}"),
            format!("--grpc-health-port={health}"),
            format!("--metrics-port={metrics}"),
            "--drain-timeout=0s".to_owned(),
        ];
        if !arguments.iter().any(|a| a.starts_with("--secure-serving")) {
            all.push("--secure-serving=false".to_owned());
        }
        all.extend_from_slice(arguments);
        let mut process = Process::start(&format!("pinpod-{grpc}"), program, &all, directory)?;
        process.wait_for_port(metrics).await?;
        process.wait_for_port(grpc).await?;
        Ok(Self {
            process,
            grpc,
            metrics,
        })
    }
}

/// Simulated pods on consecutive ports, in one process.
#[derive(Debug)]
pub struct Sims {
    /// The process.
    pub process: Process,
    /// Their addresses.
    pub addresses: Vec<SocketAddr>,
}

impl Sims {
    /// Starts `count` pods with further `sim` flags.
    pub async fn start(
        program: &Path,
        count: u16,
        flags: &[String],
        directory: &Path,
    ) -> anyhow::Result<Self> {
        let first = free_port_range(count)?;
        let mut arguments = vec![
            "sim".to_owned(),
            format!("--port={first}"),
            format!("--count={count}"),
        ];
        arguments.extend_from_slice(flags);
        let mut process = Process::start(&format!("sim-{first}"), program, &arguments, directory)?;
        process.wait_for_port(first + count - 1).await?;
        let addresses = (first..first + count)
            .map(|port| ([127, 0, 0, 1], port).into())
            .collect();
        Ok(Self { process, addresses })
    }

    /// The pods as `--endpoints` takes them.
    pub fn endpoints_flag(&self) -> String {
        format!("--endpoints={}", self.list())
    }

    /// Their addresses with commas between.
    pub fn list(&self) -> String {
        let list: Vec<String> = self.addresses.iter().map(ToString::to_string).collect();
        list.join(",")
    }
}

/// A routing sidecar before one engine.
#[derive(Debug)]
pub struct Sidecar {
    /// The process.
    pub process: Process,
    /// Where it listens.
    pub address: SocketAddr,
}

impl Sidecar {
    /// Starts `program sidecar` before the engine at `engine`, plaintext, with further flags.
    pub async fn start(
        program: &Path,
        engine: SocketAddr,
        flags: &[String],
        directory: &Path,
    ) -> anyhow::Result<Self> {
        let port = free_port_range(1)?;
        let mut arguments = vec![
            "sidecar".to_owned(),
            format!("--port={port}"),
            format!("--model-server-port={}", engine.port()),
            "--secure-proxy=false".to_owned(),
            "--workers=1".to_owned(),
        ];
        arguments.extend_from_slice(flags);
        let name = format!("sidecar-{port}");
        let mut process = Process::start(&name, program, &arguments, directory)?;
        process.wait_for_port(port).await?;
        let address = ([127, 0, 0, 1], port).into();
        Ok(Self { process, address })
    }
}
