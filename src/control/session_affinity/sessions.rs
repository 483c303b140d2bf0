//! Which endpoint each session is bound to.

use std::sync::Arc;
use std::time::Duration;

use hashbrown::HashMap;
use parking_lot::Mutex;
use tokio::time::Instant;
use xxhash_rust::xxh3::xxh3_128;

use crate::datalayer::EndpointSpec;

/// Parts of the map, so that requests of different sessions seldom meet on a lock.
const SHARDS: usize = 64;
/// Sessions that are remembered at once; past it the one not seen for longest is forgotten.
pub(super) const MAX_SESSIONS: usize = 131_072;
const MAX_SESSIONS_PER_SHARD: usize = MAX_SESSIONS / SHARDS;

/// A session's id, hashed: ids are as long as clients make them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct SessionKey(u128);

impl SessionKey {
    pub(super) fn of(id: &str) -> Self {
        Self(xxh3_128(id.as_bytes()))
    }

    fn shard(self) -> usize {
        // The map inside a shard uses other bits.
        usize::from((self.0 >> 120) as u8) % SHARDS
    }
}

/// Bindings of sessions to endpoints, at most [`MAX_SESSIONS`].
///
/// A binding that was not seen for the time to live does not count. Each part is swept when a request
/// binds in it and the sweep interval has passed; a part no request comes to keeps its share of the
/// bound at most. Cost of a bind: one short lock; O(part) while sweeping or at the bound.
#[derive(Debug)]
pub(super) struct Sessions {
    shards: Vec<Mutex<Shard>>,
    ttl: Duration,
    sweep_interval: Duration,
}

#[derive(Debug, Default)]
struct Shard {
    bindings: HashMap<SessionKey, Binding>,
    swept_at: Option<Instant>,
}

#[derive(Debug)]
struct Binding {
    /// `namespace/name`.
    endpoint: Arc<str>,
    last_seen: Instant,
}

impl Binding {
    fn is_expired(&self, now: Instant, ttl: Duration) -> bool {
        now.saturating_duration_since(self.last_seen) > ttl
    }
}

impl Sessions {
    pub(super) fn new(ttl: Duration, sweep_interval: Duration) -> Self {
        Self {
            shards: (0..SHARDS).map(|_| Mutex::default()).collect(),
            ttl,
            sweep_interval,
        }
    }

    /// `namespace/name` of the endpoint that `session` is bound to.
    pub(super) fn bound(&self, session: SessionKey, now: Instant) -> Option<Arc<str>> {
        let shard = self.shards.get(session.shard())?.lock();
        let binding = shard.bindings.get(&session)?;
        (!binding.is_expired(now, self.ttl)).then(|| Arc::clone(&binding.endpoint))
    }

    /// `session` was sent to `pick`: binds it, or keeps its binding alive. One bound elsewhere moves
    /// only when `may_move`.
    pub(super) fn bind(
        &self,
        session: SessionKey,
        pick: &EndpointSpec,
        may_move: bool,
        now: Instant,
    ) {
        let Some(shard) = self.shards.get(session.shard()) else {
            return;
        };
        let mut shard = shard.lock();
        shard.sweep(self.ttl, self.sweep_interval, now);
        match shard.bindings.get_mut(&session) {
            Some(binding) if is_named(pick, &binding.endpoint) => binding.last_seen = now,
            Some(binding) if !may_move && !binding.is_expired(now, self.ttl) => {}
            known => {
                if known.is_none() {
                    shard.make_room();
                }
                let binding = Binding {
                    endpoint: full_name(pick).into(),
                    last_seen: now,
                };
                shard.bindings.insert(session, binding);
            }
        }
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.shards.iter().map(|s| s.lock().bindings.len()).sum()
    }
}

impl Shard {
    fn sweep(&mut self, ttl: Duration, interval: Duration, now: Instant) {
        let swept_at = *self.swept_at.get_or_insert(now);
        if now.saturating_duration_since(swept_at) < interval {
            return;
        }
        self.swept_at = Some(now);
        self.bindings
            .retain(|_, binding| !binding.is_expired(now, ttl));
    }

    fn make_room(&mut self) {
        if self.bindings.len() < MAX_SESSIONS_PER_SHARD {
            return;
        }
        let oldest = self.bindings.iter().min_by_key(|(_, b)| b.last_seen);
        if let Some(oldest) = oldest.map(|(session, _)| *session) {
            self.bindings.remove(&oldest);
        }
    }
}

/// How an endpoint is named in bindings and tokens.
pub(super) fn full_name(endpoint: &EndpointSpec) -> String {
    format!("{}/{}", endpoint.namespace, endpoint.name)
}

/// True when `full_name` is that of `endpoint`.
pub(super) fn is_named(endpoint: &EndpointSpec, full_name: &str) -> bool {
    let name = full_name
        .strip_prefix(endpoint.namespace.as_str())
        .and_then(|rest| rest.strip_prefix('/'));
    name == Some(endpoint.name.as_str())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scheduling::test_support::{Pool, endpoint};

    fn specs() -> [EndpointSpec; 2] {
        let pool = Pool::new(["a", "b"].map(endpoint));
        [0, 1].map(|i: usize| pool.candidates[i].endpoint.spec.clone())
    }

    fn sessions() -> Sessions {
        Sessions::new(Duration::from_mins(5), Duration::from_secs(10))
    }

    #[test]
    fn a_binding_lives_for_its_time_since_it_was_last_used() {
        let (sessions, [a, b], key) = (sessions(), specs(), SessionKey::of("s"));
        let start = Instant::now();
        let after = |seconds| start + Duration::from_secs(seconds);
        assert_eq!(sessions.bound(key, start), None);
        sessions.bind(key, &a, false, start);
        let bound = |at| sessions.bound(key, at);
        assert_eq!(bound(after(300)).as_deref(), Some("default/a"));
        assert_eq!(bound(after(301)), None, "expired though not swept");
        // Used at 200 s, so good until 500 s; a pick elsewhere neither moves nor refreshes it.
        sessions.bind(key, &a, false, after(200));
        sessions.bind(key, &b, false, after(400));
        assert_eq!(bound(after(500)).as_deref(), Some("default/a"));
        assert_eq!(bound(after(501)), None);
        sessions.bind(key, &b, false, after(501));
        assert_eq!(bound(after(501)).as_deref(), Some("default/b"), "expired");
        sessions.bind(key, &a, true, after(502));
        assert_eq!(bound(after(502)).as_deref(), Some("default/a"), "moved");
    }

    #[test]
    fn expired_bindings_are_swept() {
        let (sessions, [a, _]) = (sessions(), specs());
        let start = Instant::now();
        // Keys of one shard, so that the last bind sweeps the others.
        let keys: Vec<SessionKey> = (0..10_000)
            .map(|n| SessionKey::of(&n.to_string()))
            .filter(|key| key.shard() == 0)
            .take(10)
            .collect();
        for key in &keys {
            sessions.bind(*key, &a, false, start);
        }
        sessions.bind(keys[0], &a, false, start + Duration::from_secs(299));
        assert_eq!(sessions.len(), 10);
        sessions.bind(keys[0], &a, false, start + Duration::from_secs(310));
        assert_eq!(sessions.len(), 1);
    }

    #[test]
    fn the_number_of_sessions_is_bounded() {
        let (sessions, [a, _]) = (sessions(), specs());
        let start = Instant::now();
        let keys: Vec<SessionKey> = (0..1_000_000)
            .map(|n| SessionKey::of(&n.to_string()))
            .filter(|key| key.shard() == 5)
            .take(MAX_SESSIONS_PER_SHARD + 1)
            .collect();
        assert_eq!(keys.len(), MAX_SESSIONS_PER_SHARD + 1);
        let mut now = start;
        for key in &keys {
            sessions.bind(*key, &a, false, now);
            now += Duration::from_millis(1);
        }
        assert_eq!(sessions.len(), MAX_SESSIONS_PER_SHARD);
        assert_eq!(sessions.bound(keys[0], now), None, "the oldest made room");
        assert!(sessions.bound(keys[1], now).is_some());
    }

    #[test]
    fn names_are_told_apart_at_the_slash() {
        let [a, _] = specs();
        assert!(is_named(&a, "default/a"));
        for other in ["default/b", "default/aa", "defaulta", "a", "", "other/a"] {
            assert!(!is_named(&a, other), "{other}");
        }
    }
}
