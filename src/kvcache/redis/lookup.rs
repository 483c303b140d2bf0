//! Matches of a request's prompts.

use std::collections::HashMap;
use std::sync::atomic::Ordering::Relaxed;

use redis::aio::MultiplexedConnection;
use redis::{Pipeline, RedisError};
use tokio::time::timeout;

use super::layout::Entry;
use super::{LOOKUP_LIMIT, SharedError, SharedIndex};

/// Keys asked for in one round trip. Reading stops at the first block nobody holds, so a long prompt that
/// is not there costs one.
const KEYS_AT_ONCE: usize = 256;

/// Tiers told apart in [`Found::by_tier`]; the last stands for all others.
pub const TIERS: [&str; 5] = ["gpu", "cpu", "storage", "speculative", "other"];
const SPECULATIVE: usize = 3;

/// What one candidate holds of one prompt.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Found {
    /// Leading blocks in any tier, expected ones included.
    pub blocks: u32,
    /// Those of them that lie in some tier.
    pub stored: u32,
    /// Sum over the leading blocks of the best weight among the tiers that have it.
    pub score: f64,
    /// Leading blocks in each of [`TIERS`].
    pub by_tier: [u32; TIERS.len()],
}

impl SharedIndex {
    /// What each of the endpoints `names` holds of each prompt, given its keys: one list for each prompt,
    /// in the order of the names. Ends after [`LOOKUP_LIMIT`] at the latest, on any runtime.
    pub async fn lookup(
        &self,
        prompts: Vec<Vec<u64>>,
        names: Vec<String>,
    ) -> Result<Vec<Vec<Found>>, SharedError> {
        let Some(connection) = self.connection.load_full() else {
            self.stats.down.fetch_add(1, Relaxed);
            return Err(SharedError::Down);
        };
        let work = self.match_all(&prompts, &names, (*connection).clone());
        match timeout(LOOKUP_LIMIT, work).await {
            Ok(Ok(found)) => {
                self.stats.found.fetch_add(1, Relaxed);
                Ok(found)
            }
            Ok(Err(error)) => {
                self.stats.failed.fetch_add(1, Relaxed);
                self.give_up();
                Err(SharedError::Failed(error.to_string()))
            }
            Err(_) => {
                self.stats.late.fetch_add(1, Relaxed);
                self.give_up();
                Err(SharedError::Late)
            }
        }
    }

    /// Others need not find out for themselves; the task that writes connects again.
    fn give_up(&self) {
        self.hang_up();
        self.broken.notify_one();
    }

    async fn match_all(
        &self,
        prompts: &[Vec<u64>],
        names: &[String],
        mut connection: MultiplexedConnection,
    ) -> Result<Vec<Vec<Found>>, RedisError> {
        let mut fields = Fields::new(self, names);
        let mut all = Vec::with_capacity(prompts.len());
        for keys in prompts {
            let mut walk = Walk::new(names.len());
            for keys in keys.chunks(KEYS_AT_ONCE) {
                let mut pipe = Pipeline::with_capacity(keys.len());
                for key in keys {
                    pipe.cmd("HKEYS").arg(*key);
                }
                let holders: Vec<Vec<Vec<u8>>> = pipe.query_async(&mut connection).await?;
                if !holders.iter().all(|block| walk.block(block, &mut fields)) {
                    break;
                }
            }
            all.push(walk.found);
        }
        Ok(all)
    }
}

/// Fields that were read before: the same few lie in every block.
struct Fields<'a> {
    index: &'a SharedIndex,
    names: HashMap<&'a str, usize>,
    known: HashMap<Vec<u8>, Option<Copy>>,
}

/// A copy of some block on a candidate.
#[derive(Debug, Clone, std::marker::Copy)]
struct Copy {
    candidate: usize,
    weight: f64,
    stored: bool,
    /// Place in [`TIERS`].
    tier: usize,
}

impl<'a> Fields<'a> {
    fn new(index: &'a SharedIndex, names: &'a [String]) -> Self {
        Self {
            index,
            names: names.iter().map(String::as_str).zip(0..).collect(),
            known: HashMap::new(),
        }
    }

    fn read(&mut self, field: &[u8]) -> Option<Copy> {
        if let Some(known) = self.known.get(field) {
            return *known;
        }
        let copy = Entry::read(field).and_then(|entry| {
            Some(Copy {
                candidate: *self.names.get(entry.pod_identifier.as_str())?,
                weight: self.weight(&entry.device_tier),
                stored: !entry.speculative,
                tier: tier_number(&entry),
            })
        });
        self.known.insert(field.to_vec(), copy);
        copy
    }

    fn weight(&self, tier: &str) -> f64 {
        self.index.weights.get(tier).copied().unwrap_or(1.0)
    }
}

fn tier_number(entry: &Entry) -> usize {
    if entry.speculative {
        return SPECULATIVE;
    }
    let tier = entry.device_tier.to_ascii_lowercase();
    let known = TIERS.iter().position(|known| *known == tier);
    known.unwrap_or(TIERS.len() - 1)
}

/// A candidate's copies of one block.
#[derive(Debug, Clone, std::marker::Copy)]
struct Here {
    /// Best weight.
    weight: f64,
    stored: bool,
    /// A bit for each of [`TIERS`].
    tiers: u8,
}

/// The candidates' way along one prompt.
struct Walk {
    found: Vec<Found>,
    /// Blocks passed.
    done: u32,
    /// Of the block at hand.
    here: Vec<Option<Here>>,
}

impl Walk {
    fn new(candidates: usize) -> Self {
        Self {
            found: vec![Found::default(); candidates],
            done: 0,
            here: vec![None; candidates],
        }
    }

    /// Takes everybody who has all blocks so far one further; false when nobody gets there.
    fn block(&mut self, holders: &[Vec<u8>], fields: &mut Fields<'_>) -> bool {
        self.here.fill(None);
        for copy in holders.iter().filter_map(|field| fields.read(field)) {
            if let Some(here) = self.here.get_mut(copy.candidate) {
                let known = here.get_or_insert(Here {
                    weight: f64::NEG_INFINITY,
                    stored: false,
                    tiers: 0,
                });
                known.weight = known.weight.max(copy.weight);
                known.stored |= copy.stored;
                known.tiers |= 1 << copy.tier;
            }
        }
        let mut any = false;
        for (found, here) in self.found.iter_mut().zip(&self.here) {
            let Some(here) = here.filter(|_| found.blocks == self.done) else {
                continue;
            };
            any = true;
            found.stored += u32::from(here.stored && found.stored == found.blocks);
            for (tier, blocks) in found.by_tier.iter_mut().enumerate() {
                let holds = here.tiers & 1 << tier != 0;
                *blocks += u32::from(holds && *blocks == found.blocks);
            }
            found.blocks += 1;
            found.score += here.weight;
        }
        self.done += 1;
        any
    }
}
