//! Asking a publisher for batches it still has.
//!
//! Runs on a task of its own, since a publisher drops what a slow reader leaves waiting: its ROUTER
//! queues 1000 messages and then loses the rest without a word, end marker included. A jump inside an
//! answer, or silence, is answered by asking again from where the sequence broke; only the first
//! message of an answer is known not to be a victim of that queue, so a jump there means the publisher
//! no longer has what is missing.

use std::net::SocketAddr;
use std::sync::Arc;

use bytes::Bytes;
use tokio::sync::{Semaphore, mpsc};
use tokio::time::{Instant, sleep, timeout, timeout_at};
use tokio_util::task::AbortOnDropHandle;

use super::frames::{Message, parse};
use super::subscriber::Timing;
use super::zmtp::{Connection, Role, ZmtpError};

/// Replays running at once in the process: each keeps an engine's publisher thread busy.
pub const MAX_REPLAYS: usize = 8;

/// Messages between the replay task and the subscriber; the subscriber only applies them.
const QUEUE: usize = 16;

/// Answers in a row that bring nothing new before a replay is given up.
const MAX_FRUITLESS: u32 = 3;

/// A step of a replay, in order.
#[derive(Debug)]
pub(super) enum Step {
    /// A batch. Numbers follow one another, except that an answer may start later than asked.
    Batch {
        seq: u64,
        topic: Bytes,
        payload: Bytes,
    },
    /// The end marker came: nothing older than this moment is missing.
    Complete,
    /// Given up.
    Failed(ReplayError),
}

/// Why a replay was given up.
#[derive(Debug, thiserror::Error)]
pub enum ReplayError {
    /// No connection, or no handshake in time.
    #[error("replay socket cannot be reached")]
    Unreachable,
    /// A message beyond the limits, or not of a known form.
    #[error("replay socket sends nonsense")]
    BadAnswer,
    /// Three answers in a row without a new batch.
    #[error("replay makes no progress")]
    NoProgress,
    /// Took longer than allowed.
    #[error("replay takes too long")]
    TooLong,
}

/// A replay under way; dropping it ends it.
#[derive(Debug)]
pub(super) struct Replay {
    steps: mpsc::Receiver<Step>,
    _task: AbortOnDropHandle<()>,
}

impl Replay {
    /// Asks `address` for everything from `start` on, once one of the permits is free.
    pub(super) fn start(
        address: SocketAddr,
        start: u64,
        timing: Timing,
        permits: Arc<Semaphore>,
    ) -> Self {
        // A full queue makes the task wait, and then the publisher; the loss that may follow is seen
        // as a jump.
        let (to, steps) = mpsc::channel(QUEUE);
        let task = tokio::spawn(async move {
            let Ok(_permit) = permits.acquire_owned().await else {
                return;
            };
            let mut reader = Reader {
                address,
                next: start,
                timing,
                to,
            };
            let deadline = Instant::now() + timing.replay_total;
            let last = match timeout_at(deadline, reader.run()).await {
                Ok(Ok(())) => Step::Complete,
                Ok(Err(error)) => Step::Failed(error),
                Err(_) => Step::Failed(ReplayError::TooLong),
            };
            // The subscriber may have lost interest.
            let _ = reader.to.send(last).await;
        });
        Self {
            steps,
            _task: AbortOnDropHandle::new(task),
        }
    }

    /// The next step. Cancel-safe.
    pub(super) async fn next(&mut self) -> Step {
        // The task ends after its last step; without one it was killed.
        self.steps
            .recv()
            .await
            .unwrap_or(Step::Failed(ReplayError::Unreachable))
    }
}

struct Reader {
    address: SocketAddr,
    /// The number that must come next.
    next: u64,
    timing: Timing,
    to: mpsc::Sender<Step>,
}

/// How an answer ended.
#[derive(PartialEq, Eq)]
enum Answer {
    Complete,
    /// A jump, silence or a broken connection: ask again.
    Cut,
}

impl Reader {
    async fn run(&mut self) -> Result<(), ReplayError> {
        let mut fruitless = 0;
        loop {
            let before = self.next;
            if self.ask().await? == Answer::Complete {
                return Ok(());
            }
            fruitless = if self.next == before {
                fruitless + 1
            } else {
                0
            };
            if fruitless >= MAX_FRUITLESS {
                return Err(ReplayError::NoProgress);
            }
            sleep(self.timing.replay_pause).await;
        }
    }

    /// One request on a connection of its own: the rest of a broken answer dies with the old one.
    async fn ask(&mut self) -> Result<Answer, ReplayError> {
        let open = async {
            let mut connection = Connection::connect(self.address, Role::Dealer).await?;
            connection.request_replay(self.next).await?;
            Ok::<_, ZmtpError>(connection)
        };
        let Ok(Ok(mut connection)) = timeout(self.timing.connect, open).await else {
            return Err(ReplayError::Unreachable);
        };
        let mut first = true;
        loop {
            let frames = match timeout(self.timing.replay_idle, connection.recv()).await {
                Ok(Ok(frames)) => frames,
                Ok(Err(ZmtpError::Oversize | ZmtpError::Protocol(_))) => {
                    return Err(ReplayError::BadAnswer);
                }
                Ok(Err(ZmtpError::Io(_) | ZmtpError::Closed)) | Err(_) => return Ok(Answer::Cut),
            };
            let (seq, topic, payload) = match parse(&frames) {
                Some(Message::Batch {
                    seq,
                    topic,
                    payload,
                }) => (seq, topic, payload),
                Some(Message::End) => return Ok(Answer::Complete),
                None => return Err(ReplayError::BadAnswer),
            };
            if seq < self.next {
                continue;
            }
            if seq > self.next && !first {
                return Ok(Answer::Cut);
            }
            first = false;
            // Below the end marker's number, so there is a next one.
            self.next = seq + 1;
            if self
                .to
                .send(Step::Batch {
                    seq,
                    topic,
                    payload,
                })
                .await
                .is_err()
            {
                return Ok(Answer::Complete);
            }
        }
    }
}
