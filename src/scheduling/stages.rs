//! Names of disaggregated serving: the stages of a request, and the headers that tell a sidecar where
//! they run.

/// What the picks of a prefill stage are called in [`super::SchedulingResult::others`].
pub const PREFILL_STAGE: &str = "prefill";
/// What the picks of an encode stage are called there.
pub const ENCODE_STAGE: &str = "encode";

/// Request header with the prefill endpoints, `ip:port,...`, the first to be tried first.
pub const PREFILL_HEADER: &str = "x-prefiller-host-port";
/// Request header with the encode endpoints, `ip:port,...`.
pub const ENCODE_HEADER: &str = "x-encoder-hosts-ports";
/// Request header with the data-parallel rank that was picked, `ip:port`.
pub const RANK_HEADER: &str = "x-data-parallel-host-port";
/// Request header with the endpoint to pull a cached prefix from, `ip:port`.
pub const SOURCE_HEADER: &str = "x-kv-cache-source-host-port";

/// Where the stages of a request run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision {
    /// All on the decode endpoint.
    DecodeOnly,
    /// Prefill elsewhere.
    PrefillDecode,
    /// Encode elsewhere.
    EncodeDecode,
    /// Both elsewhere.
    EncodePrefillDecode,
}

impl Decision {
    /// Every decision, in the order of their numbers.
    pub const ALL: [Self; 4] = [
        Self::DecodeOnly,
        Self::PrefillDecode,
        Self::EncodeDecode,
        Self::EncodePrefillDecode,
    ];

    /// The decision that runs these stages on endpoints of their own.
    pub fn of(encode: bool, prefill: bool) -> Self {
        match (encode, prefill) {
            (false, false) => Self::DecodeOnly,
            (false, true) => Self::PrefillDecode,
            (true, false) => Self::EncodeDecode,
            (true, true) => Self::EncodePrefillDecode,
        }
    }

    /// Label value.
    pub fn name(self) -> &'static str {
        match self {
            Self::DecodeOnly => "decode-only",
            Self::PrefillDecode => "prefill-decode",
            Self::EncodeDecode => "encode-decode",
            Self::EncodePrefillDecode => "encode-prefill-decode",
        }
    }
}
