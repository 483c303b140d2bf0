//! The memory bound: what things take, and what goes when there is no room.

use super::{Meta, Table, View, short};
use crate::kvcache::index::run::Run;
use crate::kvcache::index::view::Draft;

// Memory at the worst fill: vectors half empty, hash tables just grown (7 in 16 slots used, of tables of
// names 3 in 8), and what look-ups read there twice.
/// One block: its key (8, twice, in either copy), its shared name (8, twice), its entry in `by_name` (8 a
/// slot) and its part of a sheet of numbers (12 for 16, twice).
pub(super) const BLOCK_BYTES: usize = 71;
/// One span (16, twice, in either copy) and the run's entry in its column (9 a slot).
pub(super) const SPAN_BYTES: usize = 85;
/// A run beside its blocks: itself (64, twice, in either copy), its entry in `heads` (17 a slot, in
/// either copy), what writers keep of it ([`META_BYTES`], twice) and a sheet that it begins (8, twice).
pub(super) const RUN_BYTES: usize = 350 + 2 * META_BYTES;
const META_BYTES: usize = 112;
/// One name an endpoint does not share with the others: itself (8, twice), its entry in the column's table
/// (8 a slot) and its part of a list.
const OWN_BYTES: usize = 39;

const _: () = assert!(size_of::<Meta>() == META_BYTES && size_of::<Run>() == 64);

impl Table {
    pub(super) fn used_bytes(&self, view: &View) -> usize {
        self.blocks * BLOCK_BYTES
            + self.spans * SPAN_BYTES
            + view.heads.len() * RUN_BYTES
            + self.own_names * OWN_BYTES
    }

    /// What the column's name of a block takes beside the block.
    pub(super) fn name_bytes(&self, id: u32) -> usize {
        let column = self.columns.get(id as usize).and_then(Option::as_ref);
        column.map_or(0, |column| if column.apart { OWN_BYTES } else { 0 })
    }

    /// Evicts until `n` things of `each` bytes fit with `once` bytes, or as many of them as can; `None` when
    /// not even one does. `pinned` stays.
    pub(super) fn make_room(
        &mut self,
        draft: &mut Draft<'_>,
        n: usize,
        each: usize,
        once: usize,
        pinned: Option<u32>,
    ) -> Option<usize> {
        let max = self.max_bytes.saturating_sub(once);
        while self.used_bytes(draft.view) + n * each > max {
            if !self.evict(draft, pinned) {
                break;
            }
        }
        let left = max.checked_sub(self.used_bytes(draft.view))?;
        let fits = left.checked_div(each).map_or(n, |fits| fits.min(n));
        (fits > 0 || n == 0).then_some(fits)
    }

    /// Drops the next run the clock hand finds that was not stored to since it came by last, ends of
    /// prompts first.
    fn evict(&mut self, draft: &mut Draft<'_>, pinned: Option<u32>) -> bool {
        let n = self.metas.len();
        for step in 0..3 * n {
            let id = short(self.hand);
            self.hand = (self.hand + 1) % n.max(1);
            let empty = draft.view.run(id).is_none_or(|run| run.keys.is_empty());
            let Some(meta) = self.meta_mut(id) else {
                continue;
            };
            if empty || pinned == Some(id) {
                continue;
            }
            let spared = std::mem::take(&mut meta.referenced) || meta.children > 0;
            if spared && step < 2 * n {
                continue;
            }
            let blocks = draft.view.run(id).map_or(0, |run| run.keys.len());
            self.stats.evicted_blocks += blocks as u64;
            self.free(draft, id);
            self.stats.evicted_runs += 1;
            return true;
        }
        false
    }
}
