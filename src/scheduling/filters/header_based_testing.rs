//! `header-based-testing-filter`, for conformance tests.

use std::net::{IpAddr, SocketAddr};

use crate::plugin::{Build, Maturity, ParamDoc, Plugin, PluginError};
use crate::scheduling::{Candidates, Cycle, Filter};

/// Names the endpoints a test wants.
const HEADER: &str = "test-epp-endpoint-selection";

/// Keeps the endpoints that a request header lists, in the order of the header.
///
/// Entries are `ip` or `ip:port`; one without port stands for the first candidate with that address.
/// A header that is absent, empty or names nobody leaves nothing. Ignores parameters.
#[derive(Debug, Default)]
pub struct HeaderBasedTestingFilter;

impl Plugin for HeaderBasedTestingFilter {
    const TYPE: &'static str = "header-based-testing-filter";
    const MATURITY: Maturity = Maturity::Beta;
    const PARAMETERS: &'static [ParamDoc] = &[];
    const LENIENT: bool = true;
    const ABOUT: &'static str =
        "Keeps the endpoints that the header test-epp-endpoint-selection lists.";

    fn build(_: &mut Build<'_>) -> Result<Self, PluginError> {
        Ok(Self)
    }
}

/// One entry of the header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Wanted {
    ip: IpAddr,
    port: Option<u16>,
}

impl Wanted {
    fn parse(entry: &str) -> Option<Self> {
        let entry = entry.trim();
        if let Ok(address) = entry.parse::<SocketAddr>() {
            return Some(Self {
                ip: address.ip(),
                port: Some(address.port()),
            });
        }
        let bare = entry
            .strip_prefix('[')
            .and_then(|rest| rest.strip_suffix(']'))
            .unwrap_or(entry);
        let ip = bare.parse().ok()?;
        Some(Self { ip, port: None })
    }

    fn matches(self, address: SocketAddr) -> bool {
        address.ip() == self.ip && self.port.is_none_or(|port| port == address.port())
    }
}

impl Filter for HeaderBasedTestingFilter {
    fn filter(&self, cycle: &Cycle<'_>, candidates: Candidates<'_>, keep: &mut Vec<u32>) {
        let list = cycle.request.headers.get_str(HEADER).unwrap_or_default();
        for wanted in list.split(',').filter_map(Wanted::parse) {
            let found = candidates
                .iter()
                .find(|(_, c)| wanted.matches(c.endpoint.spec.address));
            let position = found.and_then(|(position, _)| u32::try_from(position).ok());
            if let Some(position) = position.filter(|p| !keep.contains(p)) {
                keep.push(position);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scheduling::test_support::{Pool, endpoint};

    #[test]
    fn the_header_names_who_stays_and_in_which_order() {
        // The pool's endpoints are 10.0.0.1:8000, :8001 and :8002.
        for (header, kept) in [
            (Some("10.0.0.1:8002, 10.0.0.1:8000"), &["c", "a"][..]),
            (Some("10.0.0.1"), &["a"]),
            (Some("[10.0.0.1],10.0.0.1:8000"), &["a"]),
            (Some("10.0.0.2:8000,nonsense,,10.0.0.1:8001"), &["b"]),
            (Some("  "), &[]),
            (None, &[]),
        ] {
            let mut pool = Pool::new(["a", "b", "c"].map(endpoint));
            if let Some(value) = header {
                pool.header(HEADER, value);
            }
            assert_eq!(pool.kept(&HeaderBasedTestingFilter), kept, "{header:?}");
        }
    }

    #[test]
    fn ipv6_may_be_bracketed() {
        let v6 = "::1".parse().unwrap();
        let wanted = |port| Some(Wanted { ip: v6, port });
        assert_eq!(Wanted::parse("::1"), wanted(None));
        assert_eq!(Wanted::parse(" [::1] "), wanted(None));
        assert_eq!(Wanted::parse("[::1]:80"), wanted(Some(80)));
        assert_eq!(Wanted::parse("host:80"), None);
    }
}
