//! What lies where: one hash for each block of a prompt, its fields the copies that endpoints hold, and
//! one sorted set for each name that engines give a block.

use serde::{Deserialize, Serialize};

/// One copy of a block, or the expectation of one. Spelled and ordered as the other programs that share
/// the index do, for a field is removed by its text.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Entry {
    /// `address:port` of the endpoint.
    pub pod_identifier: String,
    /// Lower-case name of the tier; empty for an expectation.
    #[serde(default)]
    pub device_tier: String,
    /// Expected because a request was sent there.
    #[serde(default)]
    pub speculative: bool,
    /// Whether the event named a cache group.
    #[serde(default)]
    pub has_group: bool,
    /// The group; 0 without one.
    #[serde(default)]
    pub group_idx: u32,
}

impl Entry {
    /// A copy in a tier.
    pub fn copy(endpoint: &str, medium: &str, group: Option<u32>) -> Self {
        let tier = if medium.is_empty() { "gpu" } else { medium };
        Self {
            pod_identifier: endpoint.to_owned(),
            device_tier: tier.to_ascii_lowercase(),
            speculative: false,
            has_group: group.is_some(),
            group_idx: group.unwrap_or(0),
        }
    }

    /// A copy that is expected.
    pub fn expected(endpoint: &str) -> Self {
        Self {
            pod_identifier: endpoint.to_owned(),
            device_tier: String::new(),
            speculative: true,
            has_group: false,
            group_idx: 0,
        }
    }

    /// Name of the field.
    pub fn field(&self) -> String {
        // Strings, numbers and flags always have a JSON form.
        serde_json::to_string(self).unwrap_or_default()
    }

    /// Reads a field; `None` for one that somebody else put there.
    pub fn read(field: &[u8]) -> Option<Self> {
        serde_json::from_slice(field).ok()
    }
}

/// Name of the sorted set of an engine's hash.
pub(super) fn engine_key(hash: u64) -> String {
    format!("engine:{hash}")
}

/// Which block keys each of an event's hashes stands for: pairs of hash position and key position, with
/// as many of each as there are of the more numerous.
pub(super) fn pair_up(hashes: usize, keys: usize) -> impl Iterator<Item = (usize, usize)> {
    let n = if hashes == 0 || keys == 0 {
        0
    } else {
        hashes.max(keys)
    };
    (0..n).map(move |i| (i * hashes / n.max(1), i * keys / n.max(1)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_field_is_the_text_the_reference_writes() {
        assert_eq!(
            Entry::copy("10.0.0.1:8000", "GPU", Some(3)).field(),
            r#"{"PodIdentifier":"10.0.0.1:8000","DeviceTier":"gpu","Speculative":false,"HasGroup":true,"GroupIdx":3}"#
        );
        assert_eq!(
            Entry::copy("a", "", None).field(),
            r#"{"PodIdentifier":"a","DeviceTier":"gpu","Speculative":false,"HasGroup":false,"GroupIdx":0}"#
        );
        let expected = Entry::expected("a");
        assert_eq!(
            expected.field(),
            r#"{"PodIdentifier":"a","DeviceTier":"","Speculative":true,"HasGroup":false,"GroupIdx":0}"#
        );
        assert_eq!(Entry::read(expected.field().as_bytes()), Some(expected));
        assert_eq!(Entry::read(b"something else"), None);
    }

    #[test]
    fn hashes_and_keys_are_paired_by_their_ratio() {
        let pairs = |hashes, keys| pair_up(hashes, keys).collect::<Vec<_>>();
        assert_eq!(pairs(2, 2), [(0, 0), (1, 1)]);
        // Blocks of the engine are half as long as a key's: i*4/4 and i*2/4.
        assert_eq!(pairs(4, 2), [(0, 0), (1, 0), (2, 1), (3, 1)]);
        // And twice as long: i*2/4 and i*4/4.
        assert_eq!(pairs(2, 4), [(0, 0), (0, 1), (1, 2), (1, 3)]);
        assert_eq!(pairs(3, 0), []);
    }
}
