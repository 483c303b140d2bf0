//! Places the requests of one window on replicas.

use hashbrown::HashMap;
use smallvec::SmallVec;

/// A replica that requests may be placed on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Replica {
    /// `namespace/name`: the last tie-break.
    pub name: String,
    /// Requests its engine runs: the tie-break before it.
    pub running_requests: u32,
}

/// What an assignment goes by.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rules {
    /// Requests of a group that one replica gets; `None` for all of them.
    pub max_per_replica: Option<usize>,
    /// Leading blocks that different prompts must share to be placed together; 0 never does.
    pub min_colocate_blocks: usize,
    /// Load is counted in newly computed blocks instead of requests.
    pub by_tokens: bool,
}

/// Replica of each request, as a position in `replicas`; `None` for a request that shares nothing.
///
/// `chains` are the requests' block hashes in order of arrival. Requests with the same chain form a
/// group. Units to place are the groups of two and more, then single requests that share at least
/// `min_colocate_blocks` with another; the longest first in each class, else in order of arrival. A
/// unit goes to the replica that already holds the longest part of its chain, if that is at least
/// `min_colocate_blocks` and the replica is below its fair share, `ceil(total / replicas)`; otherwise to
/// the least loaded. What `max_per_replica` leaves over spills to the next least loaded.
///
/// Cost: O(requests * replicas), plus O(blocks placed) when prefixes or tokens count.
pub(super) fn assign(chains: &[&[u64]], replicas: &[Replica], rules: Rules) -> Vec<Option<usize>> {
    let mut assigned = vec![None; chains.len()];
    let units = units(chains, rules.min_colocate_blocks);
    if replicas.is_empty() || units.is_empty() {
        return assigned;
    }
    let mut placement = Placement::new(&units, replicas, rules);
    for unit in &units {
        placement.place(unit, &mut assigned);
    }
    assigned
}

/// Requests with the same chain.
#[derive(Debug)]
struct Unit<'a> {
    chain: &'a [u64],
    members: Vec<usize>,
}

impl Unit<'_> {
    fn is_group(&self) -> bool {
        self.members.len() > 1
    }
}

/// The units to place, in the order of placing.
fn units<'a>(chains: &[&'a [u64]], min_colocate_blocks: usize) -> Vec<Unit<'a>> {
    let mut by_chain: HashMap<&[u64], usize> = HashMap::new();
    let mut units: Vec<Unit<'a>> = Vec::new();
    for (member, &chain) in chains.iter().enumerate().filter(|(_, c)| !c.is_empty()) {
        let position = *by_chain.entry(chain).or_insert(units.len());
        match units.get_mut(position) {
            Some(unit) => unit.members.push(member),
            None => units.push(Unit {
                chain,
                members: vec![member],
            }),
        }
    }
    let sharing = sharing(&units, min_colocate_blocks);
    units.retain(|unit| {
        let head = unit.chain.get(..min_colocate_blocks);
        unit.is_group() || head.is_some_and(|head| sharing.get(head).is_some_and(|n| *n > 1))
    });
    // Stable, so that equal units keep their order of arrival.
    units.sort_by_key(|unit| (!unit.is_group(), std::cmp::Reverse(unit.chain.len())));
    units
}

/// Requests by their first `blocks` blocks; empty when prefixes do not count.
fn sharing<'a>(units: &[Unit<'a>], blocks: usize) -> HashMap<&'a [u64], usize> {
    let mut sharing = HashMap::new();
    if blocks > 0 {
        for unit in units {
            if let Some(head) = unit.chain.get(..blocks) {
                *sharing.entry(head).or_insert(0) += unit.members.len();
            }
        }
    }
    sharing
}

/// What was placed so far.
#[derive(Debug)]
struct Placement<'a> {
    replicas: &'a [Replica],
    rules: Rules,
    fair_share: usize,
    /// By replica: requests, or blocks to compute.
    load: Vec<usize>,
    /// Replicas that hold a block, because a chain with it was placed there.
    holders: HashMap<u64, SmallVec<[usize; 2]>>,
    /// By replica: blocks of the unit at hand that it holds. Filled per unit.
    held: Vec<usize>,
    /// By replica: requests of the unit at hand that it got. Filled per unit.
    got: Vec<usize>,
}

impl<'a> Placement<'a> {
    fn new(units: &[Unit<'_>], replicas: &'a [Replica], rules: Rules) -> Self {
        let cost = |unit: &Unit<'_>| {
            if rules.by_tokens {
                unit.chain.len()
            } else {
                unit.members.len()
            }
        };
        let total: usize = units.iter().map(cost).sum();
        Self {
            replicas,
            rules,
            fair_share: total.div_ceil(replicas.len()),
            load: vec![0; replicas.len()],
            holders: HashMap::new(),
            held: vec![0; replicas.len()],
            got: vec![0; replicas.len()],
        }
    }

    fn place(&mut self, unit: &Unit<'_>, assigned: &mut [Option<usize>]) {
        self.match_chain(unit.chain);
        self.got.fill(0);
        let mut rest = unit.members.as_slice();
        let mut target = self.holder().unwrap_or_else(|| self.least_loaded());
        while !rest.is_empty() {
            // More members than all caps together: one at a time, to the least loaded.
            let room = self.room(target).unwrap_or(rest.len()).max(1);
            let (now, later) = rest.split_at(room.min(rest.len()));
            for &member in now {
                if let Some(slot) = assigned.get_mut(member) {
                    *slot = Some(target);
                }
            }
            self.charge(target, now.len(), unit.chain.len());
            rest = later;
            if !rest.is_empty() {
                target = self.least_loaded();
            }
        }
        self.remember(unit.chain);
    }

    /// How many more of the unit's requests `replica` may get; `None` without a cap.
    fn room(&self, replica: usize) -> Option<usize> {
        let got = self.got.get(replica).copied().unwrap_or(0);
        self.rules
            .max_per_replica
            .map(|cap| cap.saturating_sub(got))
    }

    fn charge(&mut self, replica: usize, requests: usize, blocks: usize) {
        let first = self.got.get(replica) == Some(&0);
        let held = self.held.get(replica).copied().unwrap_or(0);
        // A chain is computed once on each replica, and only from where it is not held yet.
        let cost = match (self.rules.by_tokens, first) {
            (false, _) => requests,
            (true, true) => blocks.saturating_sub(held),
            (true, false) => 0,
        };
        if let Some(load) = self.load.get_mut(replica) {
            *load += cost;
        }
        if let Some(got) = self.got.get_mut(replica) {
            *got += requests;
        }
    }

    /// The replica that holds the longest part of the chain at hand and has room for it.
    fn holder(&self) -> Option<usize> {
        if self.rules.min_colocate_blocks == 0 {
            return None;
        }
        let held = |replica: usize| self.held.get(replica).copied().unwrap_or(0);
        let fits = |replica: &usize| {
            held(*replica) >= self.rules.min_colocate_blocks
                && self
                    .load
                    .get(*replica)
                    .is_some_and(|l| *l < self.fair_share)
        };
        let candidates = (0..self.replicas.len()).filter(fits);
        candidates.min_by_key(|&replica| (std::cmp::Reverse(held(replica)), self.rank(replica)))
    }

    /// The least loaded replica that may get more of the unit at hand, or of all when none may.
    fn least_loaded(&self) -> usize {
        let all = || 0..self.replicas.len();
        let with_room = all().filter(|replica| self.room(*replica) != Some(0));
        let least = with_room.min_by_key(|replica| self.rank(*replica));
        least
            .or_else(|| all().min_by_key(|replica| self.rank(*replica)))
            .unwrap_or(0)
    }

    fn rank(&self, replica: usize) -> (usize, u32, &'a str) {
        let load = self.load.get(replica).copied().unwrap_or(usize::MAX);
        let replica = self.replicas.get(replica);
        let (running, name) = replica.map_or((u32::MAX, ""), |r| (r.running_requests, &*r.name));
        (load, running, name)
    }

    /// True when it matters who holds which block.
    fn counts_blocks(&self) -> bool {
        self.rules.by_tokens || self.rules.min_colocate_blocks > 0
    }

    /// Blocks of `chain` that each replica holds from the start.
    fn match_chain(&mut self, chain: &[u64]) {
        self.held.fill(0);
        for (position, block) in chain.iter().enumerate() {
            let Some(holders) = self.holders.get(block) else {
                return;
            };
            for &replica in holders {
                if let Some(held) = self.held.get_mut(replica).filter(|h| **h == position) {
                    *held = position + 1;
                }
            }
        }
    }

    /// The replicas that got the unit at hand hold its chain from now on.
    fn remember(&mut self, chain: &[u64]) {
        if !self.counts_blocks() {
            return;
        }
        for (replica, _) in self.got.iter().enumerate().filter(|(_, got)| **got > 0) {
            for block in chain {
                let holders = self.holders.entry(*block).or_default();
                if !holders.contains(&replica) {
                    holders.push(replica);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RULES: Rules = Rules {
        max_per_replica: None,
        min_colocate_blocks: 0,
        by_tokens: false,
    };

    fn replicas(running: &[u32]) -> Vec<Replica> {
        let numbered = running.iter().enumerate();
        numbered
            .map(|(n, running)| Replica {
                name: format!("ns/r{n}"),
                running_requests: *running,
            })
            .collect()
    }

    /// One character a request: its replica, or `-`.
    fn placed(chains: &[&[u64]], running: &[u32], rules: Rules) -> String {
        let assigned = assign(chains, &replicas(running), rules);
        let text = assigned
            .iter()
            .map(|a| a.map_or("-".to_owned(), |n| n.to_string()));
        text.collect()
    }

    #[test]
    fn equal_prompts_go_to_one_replica_and_single_ones_are_left_alone() {
        let (a, b): (&[u64], &[u64]) = (&[1, 2], &[3]);
        for (chains, wanted) in [
            // The longer group is placed first, on r0; the other one on the emptier r1.
            (&[b, a, a, b][..], "1001"),
            (&[a, b, &[9], &[]], "----"),
            // Three of a on r0, two of b on r1, two of c on r1 (2 < 3).
            (&[a, a, a, b, b, &[4], &[4]], "0001111"),
            (&[], ""),
            (&[&[], &[]], "--"),
        ] {
            assert_eq!(placed(chains, &[0, 0], RULES), wanted, "{chains:?}");
        }
        assert_eq!(placed(&[a, a], &[], RULES), "--", "no replicas");
    }

    #[test]
    fn ties_go_to_fewer_running_requests_then_to_the_name() {
        let a: &[u64] = &[1];
        assert_eq!(placed(&[a, a], &[3, 1, 1], RULES), "11");
        assert_eq!(placed(&[a, a], &[1, 1, 1], RULES), "00");
    }

    #[test]
    fn a_cap_spills_to_the_least_loaded() {
        let a: &[u64] = &[1];
        let capped = |cap| Rules {
            max_per_replica: Some(cap),
            ..RULES
        };
        assert_eq!(placed(&[a; 5], &[0, 0, 0], capped(2)), "00112");
        // More than all caps together: the rest one by one to the least loaded, r2 having 1 of 2 last.
        assert_eq!(placed(&[a; 5], &[0, 0], capped(2)), "00110");
        assert_eq!(placed(&[a; 4], &[0, 0], capped(1)), "0101");
    }

    #[test]
    fn prompts_that_share_enough_go_together_within_the_fair_share() {
        let colocate = |blocks| Rules {
            min_colocate_blocks: blocks,
            ..RULES
        };
        let (long, short, other): (&[u64], &[u64], &[u64]) = (&[1, 2, 3], &[1, 2], &[7, 8]);
        // Single requests: long and short share two blocks, other shares none. Fair share is
        // ceil(2 / 2) = 1: r0 is full after long, so short goes to r1.
        let chains = [short, other, long];
        assert_eq!(placed(&chains, &[0, 0], colocate(2)), "1-0");
        assert_eq!(placed(&chains, &[0, 0], colocate(3)), "---");
        assert_eq!(placed(&chains, &[0, 0], RULES), "---");
        // Four units of 4 + 2 + 1 + 1 requests on two replicas: fair share 4. The group of long fills
        // r0, so short's group opens r1; the singles [1, 2, 9] and [1, 2, 8] join r1, whose load is 2
        // and then 3.
        let (x, y): (&[u64], &[u64]) = (&[1, 2, 9], &[1, 2, 8]);
        let chains = [long, long, long, long, short, short, x, y];
        assert_eq!(placed(&chains, &[0, 0], colocate(2)), "00001111");
        // Pairs of 4, 3 and 2 blocks, fair share ceil(6 / 2) = 3: other opens r0, long r1, and short
        // follows long, whose two blocks it shares. Without colocation the tie goes to r0 by name.
        let other: &[u64] = &[7, 8, 9, 10];
        let chains = [long, long, other, other, short, short];
        assert_eq!(placed(&chains, &[0, 0], colocate(2)), "110011");
        assert_eq!(placed(&chains, &[0, 0], RULES), "110000");
    }

    #[test]
    fn tokens_count_what_is_not_held_yet() {
        let by_tokens = Rules {
            by_tokens: true,
            ..RULES
        };
        let (long, short): (&[u64], &[u64]) = (&[1, 2, 3, 4], &[5]);
        let third: &[u64] = &[6, 7];
        // Groups of 4, 2 and 1 blocks. long: r0 (4); third: r1 (2); short: r1 (3).
        let chains = [long, long, short, short, third, third];
        assert_eq!(placed(&chains, &[0, 0], by_tokens), "001111");
        // By requests every group weighs 2: long r0, third r1, short r0.
        assert_eq!(placed(&chains, &[0, 0], RULES), "000011");
        // A prefix that is held costs nothing: [1, 2, 3] is placed with long (held 3, cost 0), so r0
        // stays at 4 and third's 2 blocks and short's 1 go to r1.
        let colocate = Rules {
            min_colocate_blocks: 2,
            ..by_tokens
        };
        let prefix: &[u64] = &[1, 2, 3];
        let chains = [long, long, prefix, prefix, third, third, short, short];
        // Total 4 + 3 + 2 + 1 = 10 blocks, fair share 5.
        assert_eq!(placed(&chains, &[0, 0], colocate), "00001111");
    }

    #[test]
    fn a_gap_in_a_chain_ends_the_match() {
        let rules = Rules {
            min_colocate_blocks: 1,
            by_tokens: true,
            ..RULES
        };
        let replicas = replicas(&[0, 0]);
        let mut placement = Placement::new(&[], &replicas, rules);
        placement.holders.insert(1, [0].into_iter().collect());
        placement.holders.insert(2, [0, 1].into_iter().collect());
        placement.holders.insert(4, [0].into_iter().collect());
        placement.match_chain(&[1, 2, 3, 4]);
        assert_eq!(placement.held, [2, 0]);
    }
}
