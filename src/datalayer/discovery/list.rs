//! Endpoints named on the command line: `host:port[;label=value...],...`.

use std::collections::BTreeMap;
use std::net::ToSocketAddrs;

use crate::datalayer::{EndpointDetails, EndpointSpec};

/// Most endpoints a list may name.
const MAX_ENDPOINTS: usize = 4096;

/// Reads a comma list. A host name is resolved once, now; its first address is used.
pub fn parse(text: &str) -> Result<Vec<EndpointSpec>, String> {
    let entries: Vec<&str> = text
        .split(',')
        .map(str::trim)
        .filter(|entry| !entry.is_empty())
        .collect();
    if entries.len() > MAX_ENDPOINTS {
        return Err(format!(
            "--endpoints: {} entries, at most {MAX_ENDPOINTS}",
            entries.len()
        ));
    }
    entries
        .into_iter()
        .enumerate()
        .map(|(number, entry)| endpoint(number, entry))
        .collect()
}

fn endpoint(number: usize, entry: &str) -> Result<EndpointSpec, String> {
    let refuse = |reason: &str| format!("--endpoints: {entry:?} {reason}");
    let mut parts = entry.split(';');
    let address = parts.next().unwrap_or_default();
    let resolved = address
        .to_socket_addrs()
        .map_err(|e| refuse(&format!("is not host:port ({e})")))?
        .next();
    let address = resolved
        .filter(|a| a.port() != 0)
        .ok_or_else(|| refuse("has no usable address"))?;
    let labels = parts.map(|label| {
        let (key, value) = label
            .split_once('=')
            .ok_or_else(|| refuse("has a label without '='"))?;
        Ok((key.to_owned(), value.to_owned()))
    });
    Ok(EndpointSpec {
        name: format!("endpoint-{number}"),
        namespace: "default".to_owned(),
        address,
        labels: labels.collect::<Result<BTreeMap<_, _>, String>>()?,
        rank: 0,
        details: EndpointDetails::default(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_and_labels_are_read() {
        let list = parse("10.0.0.1:8000, [fd00::1]:8000;llm-d.ai/role=decode;a=b,").unwrap();
        assert_eq!(list.len(), 2);
        assert_eq!(list[0].address, "10.0.0.1:8000".parse().unwrap());
        assert_eq!(list[1].address, "[fd00::1]:8000".parse().unwrap());
        assert_eq!(list[1].labels["llm-d.ai/role"], "decode");
    }

    #[test]
    fn what_is_no_address_is_refused_by_name() {
        for bad in ["10.0.0.1", "10.0.0.1:0", "fd00::1:x", "10.0.0.1:80;label"] {
            assert!(parse(bad).unwrap_err().contains(bad), "{bad}");
        }
    }
}
