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
use tokio::task::{JoinError, JoinSet};
use tokio::time::Instant;

use super::workload::Arrival;

/// What became of one request. Times are virtual seconds.
#[derive(Debug, Clone)]
pub struct Outcome {
    /// Rung of the ladder.
    pub rung: usize,
    /// From its due time to the first byte of a whole answer; `None` when it failed.
    pub ttft: Option<f64>,
    /// From the start of the stage to the end of the answer or to its failure; `None` when it was
    /// given up.
    pub end: Option<f64>,
    /// Between one event of the answer and the next; empty when it failed.
    pub gaps: Vec<f64>,
    /// How late it was sent.
    pub lag: f64,
}

/// When the parts of an answer came.
#[derive(Debug)]
pub struct Answered {
    first: Instant,
    last: Instant,
    /// Between one event and the next, as far as it is a stream; nothing between those that came in
    /// one piece.
    gaps: Vec<Duration>,
}

/// What the events of a stream begin with, but for the last, which says that it ended.
const EVENT: &[u8] = b"data: {";

/// Finds the events of a stream, in whatever pieces it comes.
#[derive(Debug)]
struct Events {
    /// Bytes of [`EVENT`] since the line began; `None` behind anything else.
    matched: Option<usize>,
}

impl Events {
    fn new() -> Self {
        Self { matched: Some(0) }
    }

    /// How many begin in `piece`.
    fn begin_in(&mut self, piece: &[u8]) -> usize {
        let mut events = 0;
        for &byte in piece {
            self.matched = match self.matched {
                _ if byte == b'\n' => Some(0),
                Some(matched) if EVENT.get(matched) == Some(&byte) => Some(matched + 1),
                _ => None,
            };
            events += usize::from(self.matched == Some(EVENT.len()));
        }
        events
    }
}

impl Outcome {
    fn unanswered(arrival: &Arrival) -> Self {
        Self {
            rung: arrival.rung,
            ttft: None,
            end: None,
            gaps: Vec::new(),
            lag: 0.0,
        }
    }
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

    /// Posts `body`; returns the times of a 200 answer.
    pub async fn post(&self, path: &str, body: Bytes) -> anyhow::Result<Answered> {
        let mut sender = self.take().await?;
        let request = Request::post(path)
            .header(header::HOST, self.address.to_string())
            .header(header::CONTENT_TYPE, "application/json")
            .body(Full::new(body))?;
        let response = sender.send_request(request).await?;
        anyhow::ensure!(response.status() == 200, "status {}", response.status());
        let mut incoming = response.into_body();
        let mut first = None;
        let (mut events, mut before, mut gaps) = (Events::new(), None, Vec::new());
        while let Some(frame) = incoming.frame().await {
            let frame = frame?;
            let Some(piece) = frame.data_ref().filter(|data| !data.is_empty()) else {
                continue;
            };
            let now = Instant::now();
            first.get_or_insert(now);
            for _ in 0..events.begin_in(piece) {
                gaps.extend(before.map(|before| now - before));
                before = Some(now);
            }
        }
        let last = Instant::now();
        self.idle.lock().push(sender);
        Ok(Answered {
            first: first.unwrap_or(last),
            last,
            gaps,
        })
    }
}

/// What became of a stage.
#[derive(Debug)]
pub struct Driven {
    /// One for each arrival, in their order.
    pub outcomes: Vec<Outcome>,
    /// Virtual seconds from the start until the last request ended or was given up.
    pub seconds: f64,
}

/// Sends `arrivals`, `time_scale` times faster than they say, and waits until all ended or `patience`
/// virtual seconds passed after the last one was sent; what is unanswered then is given up and counts
/// as failed. Reports each end on `progress`.
pub async fn drive(
    connections: &Arc<Connections>,
    bodies: &[Bytes],
    arrivals: &[Arrival],
    time_scale: f64,
    patience: f64,
    progress: &mpsc::Sender<()>,
) -> Driven {
    let start = Instant::now();
    let mut tasks = JoinSet::new();
    let mut outcomes: Vec<Outcome> = arrivals.iter().map(Outcome::unanswered).collect();
    for (number, arrival) in arrivals.iter().enumerate() {
        let due = start + Duration::from_secs_f64(arrival.at / time_scale);
        tokio::time::sleep_until(due).await;
        let Some(body) = bodies.get(arrival.prompt).cloned() else {
            continue;
        };
        let (connections, progress) = (Arc::clone(connections), progress.clone());
        let arrival = *arrival;
        tasks.spawn(async move {
            let outcome = send(&connections, body, &arrival, due, time_scale).await;
            // A full or closed progress channel costs a tick of the bar.
            let _ = progress.try_send(());
            (number, outcome)
        });
        while let Some(ended) = tasks.try_join_next() {
            note(&mut outcomes, ended);
        }
    }
    let rest = async {
        while let Some(ended) = tasks.join_next().await {
            note(&mut outcomes, ended);
        }
    };
    let given_up = tokio::time::timeout(Duration::from_secs_f64(patience / time_scale), rest)
        .await
        .is_err();
    tasks.shutdown().await;
    let last_end = outcomes.iter().filter_map(|outcome| outcome.end);
    let seconds = if given_up {
        start.elapsed().as_secs_f64() * time_scale
    } else {
        last_end.fold(0.0, f64::max)
    };
    Driven { outcomes, seconds }
}

async fn send(
    connections: &Connections,
    body: Bytes,
    arrival: &Arrival,
    due: Instant,
    time_scale: f64,
) -> Outcome {
    let since_due = |at: Instant| at.saturating_duration_since(due).as_secs_f64() * time_scale;
    let lag = since_due(Instant::now());
    let answer = connections.post("/v1/completions", body).await;
    if let Err(error) = &answer {
        tracing::debug!(%error, "request failed");
    }
    let answer = answer.ok();
    let last = answer
        .as_ref()
        .map_or_else(Instant::now, |answered| answered.last);
    let virtual_seconds = |gap: &Duration| gap.as_secs_f64() * time_scale;
    let gaps = answer.iter().flat_map(|answered| &answered.gaps);
    Outcome {
        rung: arrival.rung,
        gaps: gaps.map(virtual_seconds).collect(),
        ttft: answer.map(|answered| since_due(answered.first)),
        end: Some(arrival.at + since_due(last)),
        lag,
    }
}

/// A task that was given up or panicked leaves its request unanswered.
fn note(outcomes: &mut [Outcome], ended: Result<(usize, Outcome), JoinError>) {
    if let Ok((number, outcome)) = ended
        && let Some(cell) = outcomes.get_mut(number)
    {
        *cell = outcome;
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    use super::*;

    /// Answers `ok` at once, `stream` with three events 300 ms apart, `fail` with 500, and `hang` never.
    async fn server() -> SocketAddr {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                tokio::spawn(async move {
                    let mut buffer = [0; 4096];
                    while let Ok(read @ 1..) = stream.read(&mut buffer).await {
                        let text = String::from_utf8_lossy(&buffer[..read]).into_owned();
                        if text.ends_with("\r\nstream") {
                            stream_three_events(&mut stream).await;
                            continue;
                        }
                        let status = match text.rsplit("\r\n").next() {
                            Some("ok") => "200 OK",
                            Some("fail") => "500 Internal Server Error",
                            _ => std::future::pending().await,
                        };
                        let answer = format!("HTTP/1.1 {status}\r\ncontent-length: 2\r\n\r\nhi");
                        stream.write_all(answer.as_bytes()).await.unwrap();
                    }
                });
            }
        });
        address
    }

    async fn stream_three_events(stream: &mut TcpStream) {
        let head = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n";
        stream.write_all(head.as_bytes()).await.unwrap();
        for event in [
            "data: {\"a\":1}\n\n",
            "data: {}\n\n",
            "data: {}\n\ndata: [DONE]\n\n",
        ] {
            let chunk = format!("{:x}\r\n{event}\r\n", event.len());
            stream.write_all(chunk.as_bytes()).await.unwrap();
            tokio::time::sleep(Duration::from_millis(300)).await;
        }
        stream.write_all(b"0\r\n\r\n").await.unwrap();
    }

    async fn run(prompts: &[usize], patience: f64) -> Driven {
        let connections = Arc::new(Connections::new(server().await));
        let bodies =
            ["ok", "fail", "hang", "stream"].map(|body| Bytes::from_static(body.as_bytes()));
        let arrivals: Vec<Arrival> = (1_u32..)
            .zip(prompts)
            .map(|(number, &prompt)| Arrival {
                at: f64::from(number),
                prompt,
                rung: 0,
            })
            .collect();
        let (progress, _ends) = mpsc::channel(16);
        // 20 times faster: a virtual second is 50 ms.
        drive(&connections, &bodies, &arrivals, 20.0, patience, &progress).await
    }

    #[test]
    fn events_are_found_in_whatever_pieces_they_come() {
        let stream =
            b"data: {\"text\":\"data: {\"}\n\ndata: {}\n\n: ping\n\ndata: {}\n\ndata: [DONE]\n\n";
        for size in 1..=stream.len() {
            let mut events = Events::new();
            let found: usize = stream
                .chunks(size)
                .map(|piece| events.begin_in(piece))
                .sum();
            assert_eq!(found, 3, "pieces of {size}");
        }
        assert_eq!(Events::new().begin_in(b"{\"id\":\"data: {\"}"), 0);
    }

    #[tokio::test]
    async fn gaps_are_those_between_the_events_of_a_stream() {
        let driven = run(&[3, 0, 1], 1000.0).await;
        let gaps: Vec<&Vec<f64>> = driven
            .outcomes
            .iter()
            .map(|outcome| &outcome.gaps)
            .collect();
        assert!(gaps[1].is_empty() && gaps[2].is_empty(), "{gaps:?}");
        // Three events, 300 ms and so six virtual seconds apart; on a busy machine two may come as one.
        assert_eq!(gaps[0].len(), 2);
        let span = gaps[0].iter().sum::<f64>();
        let outcome = &driven.outcomes[0];
        assert!(span > 1.0 && span <= outcome.end.unwrap(), "{outcome:?}");
    }

    #[tokio::test]
    async fn a_stage_ends_with_its_last_answer() {
        let driven = run(&[0, 1, 0], 1000.0).await;
        let answered: Vec<bool> = driven.outcomes.iter().map(|o| o.ttft.is_some()).collect();
        assert_eq!(answered, [true, false, true]);
        assert!(
            driven.outcomes.iter().all(|o| o.end.is_some()),
            "a refusal is an end"
        );
        // The last is due at 3 s; its answer takes far less than the 1000 s of patience.
        assert!((3.0..100.0).contains(&driven.seconds), "{}", driven.seconds);
    }

    #[tokio::test]
    async fn what_is_unanswered_when_patience_ends_is_given_up() {
        let driven = run(&[2, 0], 4.0).await;
        assert!(driven.outcomes[0].ttft.is_none() && driven.outcomes[0].end.is_none());
        assert!(driven.outcomes[1].ttft.is_some());
        // The last is due at 2 s, and 4 s later the other is given up.
        assert!(driven.seconds >= 6.0, "{}", driven.seconds);
    }
}
