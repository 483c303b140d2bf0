//! What look-ups read, and the changes that lead from one state of it to the next.
//!
//! There are two copies of it (see [`super::copies`]). The table decides what happens and writes it down
//! as [`Op`]s, which do the same on either copy.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use hashbrown::HashMap;
use smallvec::SmallVec;

use super::run::{Expected, Plane, Run};
use super::tier::{MAX_TIERS, Tiers};
use crate::kvcache::block::BlockKey;
use crate::kvcache::events::StreamState;

/// Operations and keys a log keeps room for between batches.
const KEPT: usize = 1 << 16;

/// What one publisher holds: one data-parallel rank of an endpoint.
#[derive(Debug, Clone, Default)]
pub(super) struct Column {
    pub(super) endpoint: u32,
    pub(super) state: StreamState,
    /// Some tier has several dense groups, so that having one span is not having the block.
    pub(super) many_groups: bool,
    /// Dense groups seen in each tier; a block counts where all of them have it.
    pub(super) groups: [u32; MAX_TIERS],
    /// Tokens per block; 0 until the first dense store.
    pub(super) block_size: u32,
}

/// One state of what look-ups read. What every look-up needs is in front, beside the lock: one line of the
/// processors' caches, and the only one of these that writers change often.
#[derive(Debug)]
#[repr(C)]
pub(super) struct View {
    /// First key of each run. Keys are hashes already.
    pub(super) heads: HashMap<BlockKey, u32, KeyHash>,
    pub(super) runs: Vec<Run>,
    /// Of a dropped column only the number is left.
    pub(super) columns: Vec<Column>,
    /// Changes with the columns and their states, and is never that of another index.
    pub(super) stamp: u64,
    /// Columns of each endpoint; more than one when ranks share an endpoint.
    pub(super) endpoints: Vec<SmallVec<[u32; 1]>>,
    pub(super) tiers: Tiers,
    /// A block stored again is the same copy.
    idempotent: bool,
}

/// One change.
#[derive(Debug)]
pub(super) enum Op {
    /// Keys of the log at the end of a run, which is new when it was empty.
    Append {
        run: u32,
        keys: Range<usize>,
    },
    /// One more copy of each.
    Store {
        run: u32,
        plane: Plane,
        start: u32,
        end: u32,
    },
    /// One copy less.
    Remove {
        run: u32,
        plane: Plane,
        offset: u32,
    },
    /// Predictions came true.
    Confirm {
        run: u32,
        column: u32,
        start: u32,
        end: u32,
    },
    Expect {
        run: u32,
        expected: Expected,
    },
    Expire {
        run: u32,
        now_ms: u64,
    },
    /// Nothing of the column is in the run any more.
    Clear {
        run: u32,
        column: u32,
    },
    ClearTier {
        run: u32,
        column: u32,
        tier: u8,
    },
    Truncate {
        run: u32,
        len: usize,
    },
    /// The run's number is free.
    Free {
        run: u32,
    },
    AddColumn {
        id: u32,
        endpoint: u32,
        stamp: u64,
    },
    DropColumn {
        id: u32,
        stamp: u64,
    },
    /// The column's engine starts anew.
    ResetColumn {
        id: u32,
    },
    State {
        id: u32,
        state: StreamState,
        stamp: u64,
    },
    BlockSize {
        id: u32,
        block_size: u32,
    },
    /// Blocks of the plane's tier need a copy in its group from now on.
    AddGroup(Plane),
    /// The group turned out not to be dense: blocks need no copy in it.
    DropGroup {
        id: u32,
        group: u8,
    },
    Tier(Arc<str>),
}

/// A number no view of this process has had as its stamp.
pub(super) fn stamp() -> u64 {
    static LAST: AtomicU64 = AtomicU64::new(0);
    LAST.fetch_add(1, Ordering::Relaxed) + 1
}

impl View {
    pub(super) fn new(weights: &[(String, f64)], idempotent: bool) -> Self {
        Self {
            runs: Vec::new(),
            heads: HashMap::default(),
            columns: Vec::new(),
            endpoints: Vec::new(),
            tiers: Tiers::new(weights),
            stamp: 0,
            idempotent,
        }
    }

    pub(super) fn run(&self, run: u32) -> Option<&Run> {
        self.runs.get(run as usize)
    }

    pub(super) fn column(&self, id: u32) -> Option<&Column> {
        self.columns.get(id as usize)
    }

    /// Columns of an endpoint.
    pub(super) fn ranks(&self, endpoint: u32) -> &[u32] {
        self.endpoints
            .get(endpoint as usize)
            .map_or(&[], |columns| columns.as_slice())
    }

    /// Tokens per block on an endpoint; `None` before its first store.
    pub(super) fn block_size(&self, endpoint: u32) -> Option<u32> {
        let columns = self.ranks(endpoint).iter();
        let sizes = columns.filter_map(|id| Some(self.column(*id)?.block_size));
        sizes.max().filter(|size| *size > 0)
    }

    fn apply(&mut self, op: &Op, keys: &[BlockKey]) {
        match op {
            Op::Append { run, keys: range } => {
                self.append(*run, keys.get(range.clone()).unwrap_or_default());
            }
            Op::Free { run } => self.free(*run),
            Op::Store { run, .. }
            | Op::Remove { run, .. }
            | Op::Confirm { run, .. }
            | Op::Expect { run, .. }
            | Op::Expire { run, .. }
            | Op::Clear { run, .. }
            | Op::ClearTier { run, .. }
            | Op::Truncate { run, .. } => {
                let idempotent = self.idempotent;
                if let Some(run) = self.runs.get_mut(*run as usize) {
                    change_run(run, op, idempotent);
                }
            }
            Op::AddColumn {
                id,
                endpoint,
                stamp,
            } => {
                self.add_column(*id, *endpoint);
                self.stamp = *stamp;
            }
            Op::DropColumn { id, stamp } => {
                self.drop_column(*id);
                self.stamp = *stamp;
            }
            Op::State { id, state, stamp } => {
                self.change_column(*id, |column| column.state = *state);
                self.stamp = *stamp;
            }
            Op::ResetColumn { id } => self.change_column(*id, |column| {
                column.groups = [0; MAX_TIERS];
                column.block_size = 0;
            }),
            Op::BlockSize { id, block_size } => {
                self.change_column(*id, |column| column.block_size = *block_size);
            }
            Op::AddGroup(plane) => self.change_column(plane.column, |column| {
                if let Some(groups) = column.groups.get_mut(usize::from(plane.tier)) {
                    *groups |= 1 << plane.group;
                }
            }),
            Op::DropGroup { id, group } => self.change_column(*id, |column| {
                for groups in &mut column.groups {
                    *groups &= !(1 << group);
                }
            }),
            Op::Tier(name) => {
                self.tiers.number(name);
            }
        }
    }

    fn append(&mut self, id: u32, keys: &[BlockKey]) {
        if self.runs.len() <= id as usize {
            self.runs.resize_with(id as usize + 1, Run::default);
        }
        let Some(run) = self.runs.get_mut(id as usize) else {
            return;
        };
        if let Some(head) = keys.first()
            && run.keys.is_empty()
        {
            self.heads.insert(*head, id);
        }
        run.keys.extend_from_slice(keys);
    }

    fn free(&mut self, id: u32) {
        let Some(run) = self.runs.get_mut(id as usize) else {
            return;
        };
        if let Some(head) = run.keys.first() {
            self.heads.remove(head);
        }
        *run = Run::default();
    }

    fn add_column(&mut self, id: u32, endpoint: u32) {
        if self.columns.len() <= id as usize {
            self.columns.resize_with(id as usize + 1, Column::default);
        }
        self.change_column(id, |column| {
            *column = Column {
                endpoint,
                ..Column::default()
            };
        });
        let endpoint = endpoint as usize;
        if self.endpoints.len() <= endpoint {
            self.endpoints.resize_with(endpoint + 1, Default::default);
        }
        if let Some(columns) = self.endpoints.get_mut(endpoint) {
            columns.push(id);
        }
    }

    fn drop_column(&mut self, id: u32) {
        let endpoint = self.column(id).map_or(0, |column| column.endpoint);
        if let Some(columns) = self.endpoints.get_mut(endpoint as usize) {
            columns.retain(|other| *other != id);
        }
        self.change_column(id, |column| *column = Column::default());
    }

    fn change_column(&mut self, id: u32, change: impl FnOnce(&mut Column)) {
        if let Some(column) = self.columns.get_mut(id as usize) {
            change(column);
            column.many_groups = column.groups.iter().any(|groups| groups.count_ones() > 1);
        }
    }
}

fn change_run(run: &mut Run, op: &Op, idempotent: bool) {
    match op {
        Op::Store {
            plane, start, end, ..
        } => run.store(*plane, *start, *end, idempotent),
        Op::Remove { plane, offset, .. } => {
            run.remove(*plane, *offset);
        }
        Op::Confirm {
            column, start, end, ..
        } => run.confirm(*column, *start, *end),
        Op::Expect { expected, .. } => run.expect(*expected),
        Op::Expire { now_ms, .. } => run.expire(*now_ms),
        Op::Clear { column, .. } => run.clear(*column),
        Op::ClearTier { column, tier, .. } => run.clear_tier(*column, *tier),
        Op::Truncate { len, .. } => run.truncate(*len),
        _ => {}
    }
}

/// What happened to one copy and has yet to happen to the other.
#[derive(Debug, Default)]
pub(super) struct Log {
    ops: Vec<Op>,
    keys: Vec<BlockKey>,
}

impl Log {
    /// Does it all to `view` and is empty.
    pub(super) fn replay(&mut self, view: &mut View) {
        for op in &self.ops {
            view.apply(op, &self.keys);
        }
        self.ops.clear();
        self.keys.clear();
        self.ops.shrink_to(KEPT);
        self.keys.shrink_to(KEPT);
    }
}

/// The copy that is being changed, with the log for the other one.
#[derive(Debug)]
pub(super) struct Draft<'a> {
    pub(super) view: &'a mut View,
    pub(super) log: &'a mut Log,
}

impl Draft<'_> {
    pub(super) fn apply(&mut self, op: Op) {
        self.view.apply(&op, &self.log.keys);
        self.log.ops.push(op);
    }

    /// Appends keys to a run.
    pub(super) fn append(&mut self, run: u32, keys: &[BlockKey]) {
        let start = self.log.keys.len();
        self.log.keys.extend_from_slice(keys);
        let keys = start..self.log.keys.len();
        self.apply(Op::Append { run, keys });
    }

    /// Number of a medium as an event sends it.
    pub(super) fn tier(&mut self, medium: &str) -> u8 {
        let known = self.view.tiers.find(medium);
        known.unwrap_or_else(|| {
            self.apply(Op::Tier(medium.into()));
            self.view.tiers.number(medium)
        })
    }
}

/// Takes a key for its own hash.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct KeyHash;

/// See [`KeyHash`].
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct KeyHasher(u64);

impl std::hash::BuildHasher for KeyHash {
    type Hasher = KeyHasher;

    fn build_hasher(&self) -> KeyHasher {
        KeyHasher(0)
    }
}

impl std::hash::Hasher for KeyHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = self.0.rotate_left(8) ^ u64::from(*byte);
        }
    }

    fn write_u64(&mut self, n: u64) {
        self.0 = n;
    }
}
