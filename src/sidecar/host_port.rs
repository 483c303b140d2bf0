//! Who an engine call goes to, as routing headers name it.

use std::net::IpAddr;
use std::str::FromStr;
use std::sync::Arc;

/// Longest host name of DNS.
const MAX_HOST_BYTES: usize = 253;

/// An address or name, and a port. Addresses are in their usual spelling, names in lower case.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct HostPort {
    host: Arc<str>,
    port: u16,
}

/// A text is no `host:port`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not host:port")]
pub struct HostPortError(String);

impl HostPort {
    /// From parts; `host` without brackets.
    pub fn new(host: &str, port: u16) -> Option<Self> {
        Some(Self {
            host: usual_spelling(host)?.into(),
            port,
        })
    }

    /// Without brackets.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// The port.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The same host at another port.
    #[must_use]
    pub fn with_port(&self, port: u16) -> Self {
        Self {
            host: Arc::clone(&self.host),
            port,
        }
    }
}

/// The one spelling of a host: an address as the standard library prints it, a name in lower case.
/// `None` for what is neither.
pub(super) fn usual_spelling(host: &str) -> Option<String> {
    if let Ok(address) = host.parse::<IpAddr>() {
        return Some(address.to_canonical().to_string());
    }
    let name = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_');
    let usable = !host.is_empty() && host.len() <= MAX_HOST_BYTES && host.bytes().all(name);
    usable.then(|| host.to_ascii_lowercase())
}

impl FromStr for HostPort {
    type Err = HostPortError;

    /// `host:port`, an address of version 6 in brackets, with or without `http://` before it.
    fn from_str(text: &str) -> Result<Self, HostPortError> {
        let refuse = || HostPortError(text.chars().take(MAX_HOST_BYTES).collect());
        let body = text.trim();
        let body = body
            .strip_prefix("http://")
            .or_else(|| body.strip_prefix("https://"))
            .unwrap_or(body)
            .trim_end_matches('/');
        let (host, port) = body.rsplit_once(':').ok_or_else(refuse)?;
        let port = port.parse().ok().filter(|p| *p > 0).ok_or_else(refuse)?;
        let host = match host.strip_prefix('[') {
            Some(inner) => inner.strip_suffix(']').ok_or_else(refuse)?,
            // More colons: an address whose last group would be taken for a port.
            None if host.contains(':') => return Err(refuse()),
            None => host,
        };
        Self::new(host, port).ok_or_else(refuse)
    }
}

impl std::fmt::Display for HostPort {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spellings_meet_in_one() {
        let read = |text: &str| text.parse::<HostPort>().map(|h| h.to_string()).ok();
        for (text, usual) in [
            ("10.0.0.1:8000", "10.0.0.1:8000"),
            (" http://10.0.0.1:8000/", "10.0.0.1:8000"),
            ("[FD00:0::1]:80", "[fd00::1]:80"),
            ("[::ffff:10.0.0.1]:80", "10.0.0.1:80"),
            ("Pod-1.ns:80", "pod-1.ns:80"),
        ] {
            assert_eq!(read(text).as_deref(), Some(usual), "{text}");
        }
        for bad in [
            "",
            "a",
            ":80",
            "a:",
            "a:0",
            "a:65536",
            "a:80:90",
            "::1:80",
            "[::1:80",
            "a b:80",
            "a/b:80",
            "user@a:80",
            "a:80/x",
            "a?b:80",
        ] {
            assert_eq!(read(bad), None, "{bad}");
        }
    }
}
