//! The window in which requests wait to be placed together.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Instant;

use super::assign::{Replica, Rules, assign};
use crate::scheduling::Candidate;

/// Requests that wait in one window at most, whatever `maxBatchSize` says. Each holds its block hashes,
/// 16 KiB for the longest prompt that is matched.
pub(super) const MAX_WAITING: usize = 65_536;

/// Opens windows one after the other.
#[derive(Debug)]
pub(super) struct Windows {
    length: Duration,
    max_requests: usize,
    rules: Rules,
    open: Mutex<Option<Arc<Window>>>,
}

/// The requests that arrived within one window.
#[derive(Debug)]
struct Window {
    ends_at: Instant,
    state: Mutex<State>,
}

#[derive(Debug)]
enum State {
    Open {
        /// By ticket; `None` for a request that gave up.
        chains: Vec<Option<Vec<u64>>>,
        waiting: usize,
        replicas: Vec<Replica>,
    },
    /// Name of the replica by ticket.
    Sealed(Vec<Option<Arc<str>>>),
}

/// What became of a request that wanted to wait.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Placing {
    /// The window was full.
    Full,
    /// The window closed; `namespace/name` of the replica, if the request shares its prefix.
    Placed(Option<Arc<str>>),
}

/// A request's place in a window. Dropping it before the end takes the request out.
#[derive(Debug)]
struct Ticket {
    window: Arc<Window>,
    number: usize,
}

impl Windows {
    pub(super) fn new(length: Duration, max_requests: Option<usize>, rules: Rules) -> Self {
        Self {
            length,
            max_requests: max_requests.map_or(MAX_WAITING, |n| n.min(MAX_WAITING)),
            rules,
            open: Mutex::default(),
        }
    }

    /// Joins the open window, or opens one. The future ends when it closes.
    pub(super) fn wait(
        &self,
        chain: Vec<u64>,
        candidates: &[Candidate],
    ) -> impl Future<Output = Placing> + Send + use<> {
        let ticket = self.join(chain, candidates);
        let rules = self.rules;
        async move {
            let Some(ticket) = ticket else {
                return Placing::Full;
            };
            tokio::time::sleep_until(ticket.window.ends_at).await;
            Placing::Placed(ticket.window.result(ticket.number, rules))
        }
    }

    /// `None` when the window is full.
    fn join(&self, chain: Vec<u64>, candidates: &[Candidate]) -> Option<Ticket> {
        let now = Instant::now();
        let mut open = self.open.lock();
        let window = open.take().filter(|window| now < window.ends_at);
        let window = open.insert(window.unwrap_or_else(|| {
            Arc::new(Window {
                ends_at: now + self.length,
                state: Mutex::new(State::Open {
                    chains: Vec::new(),
                    waiting: 0,
                    replicas: candidates.iter().map(replica).collect(),
                }),
            })
        }));
        let number = window.add(chain, self.max_requests)?;
        Some(Ticket {
            window: Arc::clone(window),
            number,
        })
    }

    #[cfg(test)]
    pub(super) fn waiting(&self) -> usize {
        let open = self.open.lock();
        open.as_ref()
            .map_or(0, |window| match &*window.state.lock() {
                State::Open { waiting, .. } => *waiting,
                State::Sealed(_) => 0,
            })
    }
}

fn replica(candidate: &Candidate) -> Replica {
    let spec = &candidate.endpoint.spec;
    Replica {
        name: format!("{}/{}", spec.namespace, spec.name),
        running_requests: candidate.metrics.running_requests,
    }
}

impl Window {
    /// The new request's number; `None` when `max_requests` wait already.
    fn add(&self, chain: Vec<u64>, max_requests: usize) -> Option<usize> {
        match &mut *self.state.lock() {
            State::Open {
                chains, waiting, ..
            } if *waiting < max_requests => {
                *waiting += 1;
                chains.push(Some(chain));
                Some(chains.len() - 1)
            }
            State::Open { .. } | State::Sealed(_) => None,
        }
    }

    fn leave(&self, number: usize) {
        if let State::Open {
            chains, waiting, ..
        } = &mut *self.state.lock()
            && chains.get_mut(number).is_some_and(|c| c.take().is_some())
        {
            *waiting -= 1;
        }
    }

    /// Where the request goes. The first to ask after the end places them all.
    fn result(&self, number: usize, rules: Rules) -> Option<Arc<str>> {
        let mut state = self.state.lock();
        if let State::Open {
            chains, replicas, ..
        } = &*state
        {
            let chains: Vec<&[u64]> = chains
                .iter()
                .map(|chain| chain.as_deref().unwrap_or_default())
                .collect();
            let names: Vec<Arc<str>> = replicas.iter().map(|r| Arc::from(&*r.name)).collect();
            let placed = assign(&chains, replicas, rules).into_iter();
            let placed = placed.map(|replica| names.get(replica?).cloned());
            *state = State::Sealed(placed.collect());
        }
        match &*state {
            State::Sealed(placed) => placed.get(number).cloned().flatten(),
            State::Open { .. } => None,
        }
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.window.leave(self.number);
    }
}
