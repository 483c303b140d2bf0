//! An open-loop client: requests go out when they are due, whether earlier ones were answered or not.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{Request, header};
use http_body_util::{BodyExt, Full};
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::workload::Arrival;

/// What became of one request. Times are virtual seconds from its due time.
#[derive(Debug, Clone, Copy)]
pub struct Outcome {
    /// Rung of the ladder.
    pub rung: usize,
    /// First byte of the answer; `None` when there was none.
    pub ttft: Option<f64>,
    /// End of the answer.
    pub total: Option<f64>,
    /// How late it was sent.
    pub lag: f64,
}

/// Idle keep-alive connections to one address.
#[derive(Debug)]
pub struct Connections {
    address: SocketAddr,
    idle: Mutex<Vec<SendRequest<Full<Bytes>>>>,
}

impl Connections {
    /// No connection yet.
    pub fn new(address: SocketAddr) -> Self {
        Self {
            address,
            idle: Mutex::default(),
        }
    }

    async fn take(&self) -> anyhow::Result<SendRequest<Full<Bytes>>> {
        loop {
            let Some(mut sender) = self.idle.lock().pop() else {
                break;
            };
            if !sender.is_closed()
                && tokio::time::timeout(Duration::ZERO, sender.ready())
                    .await
                    .is_ok_and(|r| r.is_ok())
            {
                return Ok(sender);
            }
        }
        let stream = TcpStream::connect(self.address).await?;
        stream.set_nodelay(true)?;
        let (sender, connection) = handshake(TokioIo::new(stream)).await?;
        tokio::spawn(async move {
            // Errors show up at the request.
            let _ = connection.await;
        });
        Ok(sender)
    }

    /// Posts `body`; returns the times of the first and last byte of a 200 answer.
    pub async fn post(&self, path: &str, body: Bytes) -> anyhow::Result<(Instant, Instant)> {
        let mut sender = self.take().await?;
        let request = Request::post(path)
            .header(header::HOST, self.address.to_string())
            .header(header::CONTENT_TYPE, "application/json")
            .body(Full::new(body))?;
        let response = sender.send_request(request).await?;
        anyhow::ensure!(response.status() == 200, "status {}", response.status());
        let mut incoming = response.into_body();
        let mut first = None;
        while let Some(frame) = incoming.frame().await {
            if frame?.data_ref().is_some_and(|data| !data.is_empty()) {
                first.get_or_insert_with(Instant::now);
            }
        }
        let last = Instant::now();
        self.idle.lock().push(sender);
        Ok((first.unwrap_or(last), last))
    }
}

/// Sends `arrivals`, `time_scale` times faster than they say, and waits until all ended or `patience`
/// (wall time) passed after the last one was sent. Reports each end on `progress`.
pub async fn drive(
    connections: Arc<Connections>,
    bodies: Arc<Vec<Bytes>>,
    arrivals: &[Arrival],
    time_scale: f64,
    patience: Duration,
    progress: mpsc::Sender<()>,
) -> Vec<Outcome> {
    let start = Instant::now();
    let due = |arrival: &Arrival| start + Duration::from_secs_f64(arrival.at / time_scale);
    let mut tasks = JoinSet::new();
    let sent = Arc::new(Mutex::new(vec![None; arrivals.len()]));
    for (number, arrival) in arrivals.iter().enumerate() {
        let due = due(arrival);
        tokio::time::sleep_until(due).await;
        let Some(body) = bodies.get(arrival.prompt).cloned() else {
            continue;
        };
        let (connections, sent, progress) = (
            Arc::clone(&connections),
            Arc::clone(&sent),
            progress.clone(),
        );
        let rung = arrival.rung;
        tasks.spawn(async move {
            let virtual_since =
                |at: Instant| at.saturating_duration_since(due).as_secs_f64() * time_scale;
            let lag = virtual_since(Instant::now());
            let answer = connections.post("/v1/completions", body).await;
            if let Err(error) = &answer {
                tracing::debug!(%error, "request failed");
            }
            let times = answer
                .ok()
                .map(|(first, last)| (virtual_since(first), virtual_since(last)));
            let outcome = Outcome {
                rung,
                ttft: times.map(|t| t.0),
                total: times.map(|t| t.1),
                lag,
            };
            if let Some(cell) = sent.lock().get_mut(number) {
                *cell = Some(outcome);
            }
            // A full or closed progress channel costs a tick of the bar.
            let _ = progress.try_send(());
        });
    }
    let all = async { while tasks.join_next().await.is_some() {} };
    // What is not answered by then counts as failed.
    let _ = tokio::time::timeout(patience, all).await;
    tasks.abort_all();
    let sent = sent.lock();
    let unanswered = |arrival: &Arrival| Outcome {
        rung: arrival.rung,
        ttft: None,
        total: None,
        lag: 0.0,
    };
    arrivals
        .iter()
        .zip(sent.iter())
        .map(|(arrival, outcome)| outcome.unwrap_or_else(|| unanswered(arrival)))
        .collect()
}
