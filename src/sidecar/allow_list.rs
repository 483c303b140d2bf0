//! Which hosts and ports an engine call may go to, whatever a request's headers say.

use std::net::IpAddr;
use std::ops::RangeInclusive;

use arc_swap::ArcSwap;
use hashbrown::HashMap;

use super::host_port::{HostPort, usual_spelling};

/// Targets of one moment.
#[derive(Debug, Clone, Default)]
pub struct Targets {
    anything: bool,
    hosts: HashMap<String, Vec<RangeInclusive<u16>>>,
    networks: Vec<(IpAddr, u8, RangeInclusive<u16>)>,
}

/// An entry of a static list cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("{0:?} is not host[:port[-port]] or network/bits[:port[-port]]")]
pub struct TargetError(String);

impl Targets {
    /// Everything is allowed: protection is off.
    pub fn anything() -> Self {
        Self {
            anything: true,
            ..Self::default()
        }
    }

    /// A list of `host`, `host:port`, `host:first-last`, with a network (`10.0.0.0/8`) in place of the
    /// host if wanted. Without a port, or with `*`, any port.
    pub fn listed<'a>(entries: impl IntoIterator<Item = &'a str>) -> Result<Self, TargetError> {
        let mut targets = Self::default();
        for entry in entries {
            let refuse = || TargetError(entry.to_owned());
            let (host, ports) = split(entry).ok_or_else(refuse)?;
            let ports = port_range(ports).ok_or_else(refuse)?;
            if let Some((network, bits)) = host.split_once('/') {
                let network: IpAddr = network.parse().map_err(|_| refuse())?;
                let longest = if network.is_ipv4() { 32 } else { 128 };
                let bits = bits.parse().ok().filter(|b| *b <= longest);
                targets
                    .networks
                    .push((network, bits.ok_or_else(refuse)?, ports));
            } else {
                targets.allow(usual_spelling(host).ok_or_else(refuse)?, ports);
            }
        }
        Ok(targets)
    }

    /// Adds a host, an address or a name in lower case, with some of its ports.
    pub fn allow(&mut self, host: String, ports: RangeInclusive<u16>) {
        self.hosts.entry(host).or_default().push(ports);
    }

    fn allows(&self, target: &HostPort) -> bool {
        let port = target.port();
        if self.anything {
            return true;
        }
        if let Some(ranges) = self.hosts.get(target.host())
            && ranges.iter().any(|ports| ports.contains(&port))
        {
            return true;
        }
        let Ok(address) = target.host().parse::<IpAddr>() else {
            return false;
        };
        self.networks
            .iter()
            .any(|(network, bits, ports)| ports.contains(&port) && within(address, *network, *bits))
    }
}

/// Host and ports of an entry.
fn split(entry: &str) -> Option<(&str, &str)> {
    if let Some(rest) = entry.strip_prefix('[') {
        let (host, rest) = rest.split_once(']')?;
        return Some((host, rest.strip_prefix(':').unwrap_or(rest)));
    }
    match entry.split_once(':') {
        // An address of version 6 without brackets has no port.
        Some((_, rest)) if rest.contains(':') => Some((entry, "*")),
        Some(parts) => Some(parts),
        None => Some((entry, "*")),
    }
}

fn port_range(text: &str) -> Option<RangeInclusive<u16>> {
    if matches!(text, "" | "*") {
        return Some(1..=u16::MAX);
    }
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    let range = first.parse().ok()?..=last.parse().ok()?;
    (!range.is_empty() && *range.start() > 0).then_some(range)
}

fn within(address: IpAddr, network: IpAddr, bits: u8) -> bool {
    match (address, network) {
        (IpAddr::V4(address), IpAddr::V4(network)) => {
            let differing = address.to_bits() ^ network.to_bits();
            differing.leading_zeros() >= u32::from(bits)
        }
        (IpAddr::V6(address), IpAddr::V6(network)) => {
            let differing = address.to_bits() ^ network.to_bits();
            differing.leading_zeros() >= u32::from(bits)
        }
        _ => false,
    }
}

/// The list that requests ask. Whoever follows the pool replaces it whole, so no request meets one
/// that is still being filled.
#[derive(Debug)]
pub struct AllowList {
    current: ArcSwap<Targets>,
}

impl AllowList {
    /// A list that starts with `targets`.
    pub fn new(targets: Targets) -> Self {
        Self {
            current: ArcSwap::from_pointee(targets),
        }
    }

    /// Replaces the list.
    pub fn replace(&self, targets: Targets) {
        self.current.store(targets.into());
    }

    /// Whether a call may go to `target`.
    pub fn allows(&self, target: &HostPort) -> bool {
        self.current.load().allows(target)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn host_and_port_both_count() {
        let list = AllowList::new(
            Targets::listed([
                "10.0.0.1:8000",
                "10.0.0.2:8000-8003",
                "Pod-a.ns",
                "10.1.0.0/16:9000",
                "[fd00::/64]:80",
                "fd01::1",
            ])
            .unwrap(),
        );
        let allows = |text: &str| list.allows(&text.parse().unwrap());
        for good in [
            "10.0.0.1:8000",
            "[::ffff:10.0.0.1]:8000",
            "10.0.0.2:8003",
            "pod-A.ns:1",
            "10.1.255.1:9000",
            "[fd00::5]:80",
            "[fd01:0::1]:443",
        ] {
            assert!(allows(good), "{good}");
        }
        for bad in [
            "10.0.0.1:22",
            "10.0.0.2:8004",
            "10.0.0.3:8000",
            "pod-a.ns.evil:1",
            "10.2.0.1:9000",
            "10.1.0.1:9001",
            "[fd00:0:0:1::5]:80",
            "127.0.0.1:8000",
        ] {
            assert!(!allows(bad), "{bad}");
        }
        list.replace(Targets::default());
        assert!(!allows("10.0.0.1:8000"), "an empty list allows nothing");
        list.replace(Targets::anything());
        assert!(allows("192.0.2.1:1"));
    }

    #[test]
    fn broken_entries_are_refused() {
        for bad in [
            "",
            "a:b",
            "a:9-8",
            "a:0",
            "10.0.0.0/33",
            "x/8",
            "[fd00::1",
            "a b",
        ] {
            assert!(Targets::listed([bad]).is_err(), "{bad}");
        }
    }
}
