//! Addresses of named hosts, for engines that take addresses only.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use hashbrown::HashMap;
use parking_lot::Mutex;
use tokio::time::Instant;

/// Hosts that are remembered.
const MAX_HOSTS: usize = 1024;

/// A cache of look-ups. A stale address is used while a new look-up goes on, and as long as look-ups
/// fail.
#[derive(Debug, Clone)]
pub(super) struct Resolver {
    ttl: Duration,
    timeout: Duration,
    known: Arc<Mutex<HashMap<String, Known>>>,
}

#[derive(Debug)]
struct Known {
    address: String,
    asked: Instant,
}

impl Default for Resolver {
    fn default() -> Self {
        let seconds = |name, default| {
            let given = std::env::var(name).ok().and_then(|text| text.parse().ok());
            Duration::from_secs(given.unwrap_or(default))
        };
        Self {
            ttl: seconds("MORIIO_DNS_RESOLVE_TTL_SECONDS", 30),
            timeout: seconds("MORIIO_DNS_RESOLVE_TIMEOUT_SECONDS", 5),
            known: Arc::default(),
        }
    }
}

impl Resolver {
    /// The address of `host`, of version 4 if it has one; `host` itself when it cannot be resolved.
    pub(super) async fn address(&self, host: &str) -> String {
        if host.parse::<IpAddr>().is_ok() {
            return host.to_owned();
        }
        let found = {
            let mut known = self.known.lock();
            known.get_mut(host).map(|entry| {
                let stale = entry.asked.elapsed() >= self.ttl;
                if stale {
                    // One look-up at a time.
                    entry.asked = Instant::now();
                }
                (entry.address.clone(), stale)
            })
        };
        match found {
            Some((address, false)) => address,
            Some((address, true)) => {
                metrics::counter!("moriio_dns_reresolve_total").increment(1);
                let (resolver, host) = (self.clone(), host.to_owned());
                tokio::spawn(async move { resolver.look_up(&host).await });
                address
            }
            None => self.look_up(host).await.unwrap_or_else(|| host.to_owned()),
        }
    }

    async fn look_up(&self, host: &str) -> Option<String> {
        let looking = tokio::net::lookup_host((host, 0));
        let found = match tokio::time::timeout(self.timeout, looking).await {
            Ok(Ok(addresses)) => addresses.map(|a| a.ip()).min_by_key(IpAddr::is_ipv6),
            _ => None,
        };
        let Some(address) = found.map(|address| address.to_string()) else {
            metrics::counter!("moriio_dns_lookup_failures_total").increment(1);
            return None;
        };
        let mut known = self.known.lock();
        if known.len() >= MAX_HOSTS && !known.contains_key(host) {
            let oldest = known.iter().min_by_key(|(_, entry)| entry.asked);
            if let Some(oldest) = oldest.map(|(host, _)| host.clone()) {
                known.remove(&oldest);
            }
        }
        let entry = Known {
            address: address.clone(),
            asked: Instant::now(),
        };
        let before = known.insert(host.to_owned(), entry);
        if before.is_some_and(|before| before.address != address) {
            metrics::counter!("moriio_dns_ip_changed_total").increment(1);
        }
        Some(address)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn addresses_pass_and_names_are_looked_up() {
        let resolver = Resolver::default();
        assert_eq!(resolver.address("10.0.0.1").await, "10.0.0.1");
        assert_eq!(resolver.address("fd00::1").await, "fd00::1");
        assert_eq!(resolver.address("localhost").await, "127.0.0.1");
        assert_eq!(
            resolver.address("no-such-host.invalid").await,
            "no-such-host.invalid"
        );
        assert_eq!(resolver.known.lock().len(), 1);
    }
}
