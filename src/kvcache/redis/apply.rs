//! Changes as commands: what they need to know is asked for in one round trip, then all is written in
//! another, and names that stand for nothing any more are removed in a third.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use redis::aio::MultiplexedConnection;
use redis::{Pipeline, RedisError};
use smallvec::SmallVec;
use tokio::time::{Instant, sleep_until};

use super::keys::KeyScheme;
use super::layout::{Entry, engine_key, pair_up};
use super::{Op, SharedStats, StoredBlocks};

/// Commands sent together.
const MAX_COMMANDS: usize = 4096;
/// Names of blocks remembered, in each of two generations; others are asked for.
const MAX_NAMES: usize = 1 << 19;
/// Copies counted for one endpoint; a removal of further ones counts as the last.
const MAX_COPIES: usize = 1 << 20;
/// Requests whose expectations wait to be taken back.
const MAX_EXPECTED: usize = 1 << 16;
/// Keys looked at with one round trip while an endpoint is cleared.
const SCAN: usize = 1000;

type Keys = SmallVec<[u64; 1]>;

/// Knows which keys the engines' hashes stand for, and how many copies of each there are.
#[derive(Debug)]
pub(super) struct Applier {
    scheme: KeyScheme,
    /// Newer and older names.
    names: [HashMap<u64, Keys>; 2],
    copies: HashMap<Arc<str>, HashMap<Copy, u8>>,
    /// Deadline, field and keys.
    expected: VecDeque<(Instant, String, Vec<u64>)>,
}

/// A block in a tier and group of one endpoint.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Copy {
    hash: u64,
    tier: Arc<str>,
    group: Option<u32>,
}

impl Applier {
    pub(super) fn new(scheme: KeyScheme) -> Self {
        Self {
            scheme,
            names: [HashMap::new(), HashMap::new()],
            copies: HashMap::new(),
            expected: VecDeque::new(),
        }
    }

    /// Nothing that was written counts any more.
    pub(super) fn forget(&mut self) {
        self.names = [HashMap::new(), HashMap::new()];
        self.copies.clear();
        self.expected.clear();
    }

    /// Ends when the next expectation is to be taken back.
    pub(super) async fn next_expiry(&self) {
        match self.expected.front() {
            Some((deadline, ..)) => sleep_until(*deadline).await,
            None => std::future::pending().await,
        }
    }

    /// Writes changes, in order.
    pub(super) async fn apply(
        &mut self,
        ops: &mut Vec<Op>,
        connection: &mut MultiplexedConnection,
        now: Instant,
        stats: &SharedStats,
    ) -> Result<(), RedisError> {
        self.learn(ops, connection).await?;
        let mut commands = Commands::default();
        self.expire(now, &mut commands);
        for op in ops.drain(..) {
            match op {
                Op::Stored(stored) if stored.tokens.is_empty() => {
                    self.located(&stored, &mut commands);
                }
                Op::Stored(stored) => {
                    if !self.stored(&stored, &mut commands) {
                        stats.without_parent.fetch_add(1, Relaxed);
                    }
                }
                Op::Removed {
                    endpoint,
                    hashes,
                    medium,
                    group,
                } => {
                    let entry = Entry::copy(&endpoint, &medium, group);
                    for hash in hashes {
                        self.removed(&endpoint, hash, &entry, group, &mut commands);
                    }
                }
                Op::Cleared(endpoints) => {
                    commands.flush(connection).await?;
                    for endpoint in &endpoints {
                        self.copies.remove(endpoint);
                    }
                    clear(&endpoints, connection).await?;
                }
                Op::Expected {
                    endpoint,
                    keys,
                    ttl,
                } => self.expect(&endpoint, keys, now + ttl, &mut commands),
            }
            if commands.pipe.len() >= MAX_COMMANDS {
                commands.flush(connection).await?;
            }
        }
        commands.flush(connection).await?;
        self.drop_names(&commands.emptied, connection).await
    }

    /// Asks for the names that these changes need and nobody here knows.
    async fn learn(
        &mut self,
        ops: &[Op],
        connection: &mut MultiplexedConnection,
    ) -> Result<(), RedisError> {
        let mut coming: HashSet<u64> = HashSet::new();
        let mut unknown: Vec<u64> = Vec::new();
        for op in ops {
            let (needed, brought): (&[u64], &[u64]) = match op {
                Op::Stored(s) if s.tokens.is_empty() => (&s.hashes, &[]),
                Op::Stored(s) => (s.parent.as_slice(), &s.hashes),
                Op::Removed { hashes, .. } => (hashes, &[]),
                Op::Cleared(_) | Op::Expected { .. } => (&[], &[]),
            };
            let missing = needed
                .iter()
                .filter(|hash| !coming.contains(hash) && self.keys_of(**hash).is_none());
            unknown.extend(missing);
            coming.extend(brought);
        }
        for hashes in unknown.chunks(MAX_COMMANDS) {
            let mut pipe = Pipeline::with_capacity(hashes.len());
            for hash in hashes {
                pipe.cmd("ZRANGE").arg(engine_key(*hash)).arg(0).arg(-1);
            }
            let found: Vec<Vec<u64>> = pipe.query_async(connection).await?;
            for (hash, keys) in hashes.iter().zip(found) {
                if !keys.is_empty() {
                    self.remember(*hash, keys.into());
                }
            }
        }
        Ok(())
    }

    fn keys_of(&self, hash: u64) -> Option<&Keys> {
        self.names.iter().find_map(|names| names.get(&hash))
    }

    fn remember(&mut self, hash: u64, keys: Keys) {
        let [newer, older] = &mut self.names;
        if newer.len() >= MAX_NAMES {
            *older = std::mem::take(newer);
        }
        older.remove(&hash);
        newer.insert(hash, keys);
    }

    /// False when the parent is unknown.
    fn stored(&mut self, stored: &StoredBlocks, commands: &mut Commands) -> bool {
        let parent = match stored.parent {
            None => Some(self.scheme.start(&stored.model)),
            // The last of several: the block goes on where that one ends.
            Some(hash) => self.keys_of(hash).and_then(|keys| keys.last().copied()),
        };
        let Some(parent) = parent else {
            return false;
        };
        let blocks = stored.tokens.len() / self.scheme.block_tokens();
        let extras = realigned(&stored.extras, stored.hashes.len(), blocks);
        let of = |block: usize| extras.get(block).map_or(&[][..], Vec::as_slice);
        let keys = self.scheme.keys(parent, &stored.tokens, of);
        let field = Entry::copy(&stored.endpoint, &stored.medium, stored.group).field();
        for key in &keys {
            commands.add(*key, &field);
        }
        let mut names: Vec<Keys> = vec![Keys::new(); stored.hashes.len()];
        for (hash, key) in pair_up(stored.hashes.len(), keys.len()) {
            if let (Some(own), Some(key)) = (names.get_mut(hash), keys.get(key)) {
                own.push(*key);
            }
        }
        for (hash, keys) in stored.hashes.iter().zip(names) {
            if keys.is_empty() {
                continue;
            }
            let zadd = commands.pipe.cmd("ZADD").arg(engine_key(*hash));
            for (position, key) in keys.iter().enumerate() {
                zadd.arg(position).arg(*key);
            }
            zadd.ignore();
            self.remember(*hash, keys);
            self.count(stored, *hash);
        }
        true
    }

    /// Known blocks have a copy in another place now.
    fn located(&mut self, stored: &StoredBlocks, commands: &mut Commands) {
        let field = Entry::copy(&stored.endpoint, &stored.medium, stored.group).field();
        for hash in &stored.hashes {
            let Some(keys) = self.keys_of(*hash) else {
                continue;
            };
            for key in keys {
                commands.add(*key, &field);
            }
            self.count(stored, *hash);
        }
    }

    fn count(&mut self, stored: &StoredBlocks, hash: u64) {
        let copies = self.copies.entry(Arc::clone(&stored.endpoint)).or_default();
        let copy = Copy {
            hash,
            tier: Entry::copy("", &stored.medium, None).device_tier.into(),
            group: stored.group,
        };
        if let Some(n) = copies.get_mut(&copy) {
            *n = n.saturating_add(1);
        } else if copies.len() < MAX_COPIES {
            copies.insert(copy, 1);
        }
    }

    /// One copy less; the entry goes with the last.
    fn removed(
        &mut self,
        endpoint: &Arc<str>,
        hash: u64,
        entry: &Entry,
        group: Option<u32>,
        commands: &mut Commands,
    ) {
        if let Some(copies) = self.copies.get_mut(endpoint) {
            let copy = Copy {
                hash,
                tier: entry.device_tier.as_str().into(),
                group,
            };
            if let Some(n) = copies.get_mut(&copy) {
                *n -= 1;
                if *n > 0 {
                    return;
                }
                copies.remove(&copy);
            }
        }
        let Some(keys) = self.keys_of(hash) else {
            return;
        };
        let field = entry.field();
        for key in keys {
            commands.pipe.cmd("HDEL").arg(*key).arg(&field).ignore();
        }
        commands.emptied.insert(hash);
    }

    /// Removes the names of blocks nobody holds any more.
    async fn drop_names(
        &mut self,
        hashes: &HashSet<u64>,
        connection: &mut MultiplexedConnection,
    ) -> Result<(), RedisError> {
        let mut pipe = Pipeline::new();
        let mut asked = Vec::new();
        for hash in hashes {
            if let Some(keys) = self.keys_of(*hash) {
                let exists = pipe.cmd("EXISTS");
                for key in keys {
                    exists.arg(*key);
                }
                asked.push(*hash);
            }
        }
        if asked.is_empty() {
            return Ok(());
        }
        let held: Vec<u64> = pipe.query_async(connection).await?;
        let mut pipe = Pipeline::new();
        for (hash, _) in asked.iter().zip(held).filter(|(_, held)| *held == 0) {
            pipe.cmd("DEL").arg(engine_key(*hash)).ignore();
            for names in &mut self.names {
                names.remove(hash);
            }
        }
        if pipe.is_empty() {
            return Ok(());
        }
        pipe.query_async(connection).await
    }

    fn expect(
        &mut self,
        endpoint: &str,
        keys: Vec<u64>,
        deadline: Instant,
        commands: &mut Commands,
    ) {
        if self.expected.len() >= MAX_EXPECTED {
            return;
        }
        let field = Entry::expected(endpoint).field();
        for key in &keys {
            commands.add(*key, &field);
        }
        self.expected.push_back((deadline, field, keys));
    }

    /// Takes back what a later request did not renew: an entry stays until the last deadline that keeps
    /// it.
    fn expire(&mut self, now: Instant, commands: &mut Commands) {
        let mut due = Vec::new();
        while let Some((deadline, ..)) = self.expected.front()
            && *deadline <= now
        {
            due.extend(self.expected.pop_front());
        }
        if due.is_empty() {
            return;
        }
        let renewed: HashSet<(&str, u64)> = self
            .expected
            .iter()
            .flat_map(|(_, field, keys)| keys.iter().map(|key| (field.as_str(), *key)))
            .collect();
        for (_, field, keys) in &due {
            for key in keys
                .iter()
                .filter(|key| !renewed.contains(&(field.as_str(), **key)))
            {
                commands.pipe.cmd("HDEL").arg(*key).arg(field).ignore();
            }
        }
    }
}

/// Commands that wait for their round trip.
#[derive(Default)]
struct Commands {
    pipe: Pipeline,
    /// Hashes that may have lost their last holder.
    emptied: HashSet<u64>,
}

impl Commands {
    fn add(&mut self, key: u64, field: &str) {
        self.pipe.cmd("HSET").arg(key).arg(field).arg("").ignore();
    }

    async fn flush(&mut self, connection: &mut MultiplexedConnection) -> Result<(), RedisError> {
        if self.pipe.is_empty() {
            return Ok(());
        }
        let pipe = std::mem::take(&mut self.pipe);
        pipe.query_async(connection).await
    }
}

/// What keys depend on, for blocks of another size: shared by the parts of a larger block, put together
/// from smaller ones.
fn realigned(extras: &[Vec<String>], hashes: usize, keys: usize) -> Vec<Vec<String>> {
    if extras.is_empty() {
        return Vec::new();
    }
    let mut aligned = vec![Vec::new(); keys];
    for (hash, key) in pair_up(hashes, keys) {
        if let (Some(own), Some(block)) = (aligned.get_mut(key), extras.get(hash)) {
            own.extend_from_slice(block);
        }
    }
    aligned
}

/// Removes every entry of these endpoints. Cost: the whole key space.
async fn clear(
    endpoints: &[Arc<str>],
    connection: &mut MultiplexedConnection,
) -> Result<(), RedisError> {
    let mut cursor = 0_u64;
    loop {
        // Keys of blocks are numbers; names of engines are left to be overwritten.
        let (next, keys): (u64, Vec<String>) = redis::cmd("SCAN")
            .arg(cursor)
            .arg("MATCH")
            .arg("[0-9]*")
            .arg("COUNT")
            .arg(SCAN)
            .query_async(connection)
            .await?;
        if !keys.is_empty() {
            let mut pipe = Pipeline::with_capacity(keys.len());
            for key in &keys {
                pipe.cmd("HKEYS").arg(key);
            }
            let fields: Vec<Vec<Vec<u8>>> = pipe.query_async(connection).await?;
            let mut pipe = Pipeline::new();
            for (key, fields) in keys.iter().zip(fields) {
                let own = fields.into_iter().filter(|field| {
                    Entry::read(field)
                        .is_some_and(|entry| endpoints.iter().any(|e| **e == entry.pod_identifier))
                });
                for field in own {
                    pipe.cmd("HDEL").arg(key).arg(field).ignore();
                }
            }
            if !pipe.is_empty() {
                let () = pipe.query_async(connection).await?;
            }
        }
        cursor = next;
        if cursor == 0 {
            return Ok(());
        }
    }
}
