//! What the admin endpoint shows beside matches: since when, and how much.

use tokio::time::Instant;

use super::lookup::columns;
use super::table::{PREDICTED, Table};
use super::tier::MAX_TIERS;
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
    endpoint: EndpointIndex,
    keys: &[BlockKey],
) -> Vec<(u32, Option<u32>)> {
    let mut found = Vec::new();
    let mut done = 0;
    while let Some(&id) = keys.get(done).and_then(|key| table.heads.get(key)) {
        let Some(run) = table.runs.get(id as usize) else {
            break;
        };
        let n = run.common(0, keys.get(done..).unwrap_or_default());
        let ranks = columns(table, endpoint).iter();
        let first = ranks
            .filter_map(|rank| {
                let column = table.columns.get(*rank as usize)?.as_ref()?;
                column.runs.get(&id).copied()
            })
            .min();
        let Some(seconds) = first.filter(|_| n > 0) else {
            break;
        };
        found.push((
            super::table::short(n),
            Some(seconds).filter(|s| *s != PREDICTED),
        ));
        done += n;
    }
    found
}

/// Counts what the endpoint's ranks hold.
pub(super) fn holding(table: &Table, endpoint: EndpointIndex) -> Holding {
    let mut total = Holding::default();
    for id in columns(table, endpoint) {
        let Some(column) = table.columns.get(*id as usize).and_then(Option::as_ref) else {
            continue;
        };
        total.runs += column.runs.len();
        total.block_size = total.block_size.max(column.block_size);
        let runs = column.runs.keys();
        for run in runs.filter_map(|run| table.runs.get(*run as usize)) {
            for span in run.of_column(*id) {
                if let Some(blocks) = total.blocks.get_mut(usize::from(span.tier)) {
                    *blocks += u64::from(span.end - span.start);
                }
            }
        }
    }
    total
}
