//! Headers by which the picker says where a request should go. They speak to the sidecar alone:
//! whatever is read here is gone from what is passed on.

use http::{HeaderMap, HeaderName};

use super::allow_list::AllowList;
use super::host_port::HostPort;
use super::metrics::SidecarMetrics;

/// Prefill endpoints, best first.
pub(super) const PREFILL: &str = "x-prefiller-host-port";
/// Encode endpoints.
pub(super) const ENCODE: &str = "x-encoder-hosts-ports";
/// An endpoint whose cached prefix may be fetched.
pub(super) const KV_SOURCE: &str = "x-kv-cache-source-host-port";
/// The local rank that was chosen.
pub(super) const DATA_PARALLEL: &str = "x-data-parallel-host-port";
/// The rank inside an engine; for engines, not for us.
pub(super) const DATA_PARALLEL_RANK: HeaderName = HeaderName::from_static("x-data-parallel-rank");

/// Endpoints that one header may name; further ones are not looked at.
pub(super) const MAX_TARGETS: usize = 16;

/// What the headers of a request said.
#[derive(Debug, Default)]
pub(super) struct Routing {
    /// In order of preference; only allowed ones.
    pub(super) prefill: Vec<HostPort>,
    /// Prefill endpoints were named, and none of them is allowed.
    pub(super) prefill_denied: bool,
    /// Only allowed ones.
    pub(super) encode: Vec<HostPort>,
    /// Absent unless it is well-formed and allowed.
    pub(super) kv_source: Option<HostPort>,
    /// As written.
    pub(super) data_parallel: Option<String>,
}

impl Routing {
    /// Takes the routing headers out of `headers`.
    pub(super) fn take(
        headers: &mut HeaderMap,
        allowed: &AllowList,
        metrics: &SidecarMetrics,
    ) -> Self {
        let (prefill, named) = targets(headers, PREFILL, allowed, metrics);
        let prefill_denied = named && prefill.is_empty();
        let (encode, _) = targets(headers, ENCODE, allowed, metrics);
        let (kv_source, _) = targets(headers, KV_SOURCE, allowed, metrics);
        let data_parallel = headers
            .remove(DATA_PARALLEL)
            .and_then(|value| value.to_str().ok().map(|v| v.trim().to_owned()))
            .filter(|value| !value.is_empty());
        Self {
            prefill,
            prefill_denied,
            encode,
            kv_source: kv_source.into_iter().next(),
            data_parallel,
        }
    }
}

/// Allowed targets of a header, which may be repeated and hold a list, and whether it named any.
fn targets(
    headers: &mut HeaderMap,
    name: &'static str,
    allowed: &AllowList,
    metrics: &SidecarMetrics,
) -> (Vec<HostPort>, bool) {
    let http::header::Entry::Occupied(entry) = headers.entry(name) else {
        return (Vec::new(), false);
    };
    let (_, values) = entry.remove_entry_mult();
    let mut named = false;
    let mut out = Vec::new();
    let values: Vec<_> = values.collect();
    let texts = values.iter().filter_map(|value| value.to_str().ok());
    let entries = texts.flat_map(|text| text.split(',')).map(str::trim);
    for entry in entries.filter(|e| !e.is_empty()).take(MAX_TARGETS) {
        named = true;
        match entry.parse::<HostPort>() {
            Ok(target) if allowed.allows(&target) => out.push(target),
            _ => {
                metrics.denied();
                tracing::warn!(header = name, denied_target = entry, "target not allowed");
            }
        }
    }
    (out, named)
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::super::allow_list::Targets;
    use super::*;

    #[test]
    fn headers_are_read_once_and_taken_out() {
        let mut headers = HeaderMap::new();
        for (name, value) in [
            (PREFILL, "http://10.0.0.1:80, 10.0.0.9:80"),
            (PREFILL, "10.0.0.2:80"),
            (ENCODE, "10.0.0.2:80,10.0.0.9:80,x"),
            (KV_SOURCE, "10.0.0.9:80"),
            (DATA_PARALLEL, "10.0.0.1:8001"),
            ("x-other", "kept"),
        ] {
            headers.append(name, HeaderValue::from_static(value));
        }
        let allowed = AllowList::new(Targets::listed(["10.0.0.1", "10.0.0.2:80"]).unwrap());
        let routing = Routing::take(&mut headers, &allowed, &SidecarMetrics::new());
        let texts =
            |targets: &[HostPort]| targets.iter().map(ToString::to_string).collect::<Vec<_>>();
        assert_eq!(texts(&routing.prefill), ["10.0.0.1:80", "10.0.0.2:80"]);
        assert_eq!(texts(&routing.encode), ["10.0.0.2:80"]);
        assert_eq!(routing.kv_source, None);
        assert_eq!(routing.data_parallel.as_deref(), Some("10.0.0.1:8001"));
        assert!(!routing.prefill_denied);
        assert_eq!(headers.len(), 1);
    }

    #[test]
    fn only_denied_prefill_endpoints_are_a_refusal() {
        let allowed = AllowList::new(Targets::default());
        let denied = |value: &'static str| {
            let mut headers = HeaderMap::new();
            headers.insert(PREFILL, HeaderValue::from_static(value));
            Routing::take(&mut headers, &allowed, &SidecarMetrics::new()).prefill_denied
        };
        assert!(denied("10.0.0.1:80"));
        assert!(denied("nonsense"));
        assert!(!denied(""));
    }

    #[test]
    fn a_header_names_a_bounded_number_of_targets() {
        let mut headers = HeaderMap::new();
        let many = "10.0.0.1:80,".repeat(MAX_TARGETS + 1);
        headers.insert(PREFILL, HeaderValue::from_str(&many).unwrap());
        let allowed = AllowList::new(Targets::anything());
        let routing = Routing::take(&mut headers, &allowed, &SidecarMetrics::new());
        assert_eq!(routing.prefill.len(), MAX_TARGETS);
    }
}
