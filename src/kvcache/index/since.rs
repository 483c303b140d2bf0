//! What the admin endpoint shows beside matches: since when, and how much.

use tokio::time::Instant;

use super::table::{PREDICTED, Table, short};
use super::tier::MAX_TIERS;
use super::view::View;
use crate::datalayer::EndpointIndex;
use crate::kvcache::block::BlockKey;

/// Part of a prompt on one endpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Held {
    /// Blocks of it, those behind the parts before it.
    pub blocks: u32,
    /// When the endpoint first stored a block of the run they lie in; `None` when it only is expected to.
    pub since: Option<Instant>,
}

/// How much an endpoint holds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Holding {
    /// Block copies by tier number, physical copies of one block counted once.
    pub blocks: [u64; MAX_TIERS],
    /// Runs they lie in.
    pub runs: usize,
    /// Tokens per block; 0 before the first store.
    pub block_size: u32,
}

/// Blocks of each run along the prompt, and the second its first holder among the endpoint's ranks
/// began.
pub(super) fn held_since(
    table: &Table,
    view: &View,
    endpoint: EndpointIndex,
    keys: &[BlockKey],
) -> Vec<(u32, Option<u32>)> {
    let mut found = Vec::new();
    let mut done = 0;
    while let Some(&id) = keys.get(done).and_then(|key| view.heads.get(key)) {
        let Some(run) = view.run(id) else {
            break;
        };
        let n = run.common(0, keys.get(done..).unwrap_or_default());
        let ranks = view.ranks(endpoint.0).iter();
        let first = ranks.filter_map(|rank| table.since(*rank, id)).min();
        let Some(seconds) = first.filter(|_| n > 0) else {
            break;
        };
        found.push((short(n), Some(seconds).filter(|s| *s != PREDICTED)));
        done += n;
    }
    found
}

/// Counts what the endpoint's ranks hold.
pub(super) fn holding(table: &Table, view: &View, endpoint: EndpointIndex) -> Holding {
    let mut total = Holding {
        block_size: view.block_size(endpoint.0).unwrap_or(0),
        ..Holding::default()
    };
    for id in view.ranks(endpoint.0) {
        for run in table.runs_of(*id).filter_map(|run| view.run(run)) {
            total.runs += 1;
            for span in run.of_column(*id) {
                if let Some(blocks) = total.blocks.get_mut(usize::from(span.tier)) {
                    *blocks += u64::from(span.end - span.start);
                }
            }
        }
    }
    total
}
