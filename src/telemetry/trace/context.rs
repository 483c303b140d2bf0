//! W3C trace context: what a request brings, and what goes on with it.

use std::fmt;

/// Of a whole trace; never 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TraceId(u128);

/// Of one span; never 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SpanId(u64);

/// Where in which trace a request is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SpanContext {
    /// The trace.
    pub trace: TraceId,
    /// The span that comes next is a child of this one.
    pub span: SpanId,
    /// Whether the trace is recorded.
    pub sampled: bool,
}

/// Length of a `traceparent` of version 00, the only one there is.
const LENGTH: usize = 55;

impl TraceId {
    /// A new one.
    pub fn random() -> Self {
        Self(fastrand::u128(1..))
    }

    /// As on the wire.
    pub fn bytes(self) -> [u8; 16] {
        self.0.to_be_bytes()
    }

    /// The part that samplers decide by, as all OpenTelemetry samplers do: the last eight bytes.
    pub(super) fn low(self) -> u64 {
        #[expect(clippy::cast_possible_truncation, reason = "the low half is wanted")]
        let low = self.0 as u64;
        low
    }
}

impl SpanId {
    /// A new one.
    pub fn random() -> Self {
        Self(fastrand::u64(1..))
    }

    /// As on the wire.
    pub fn bytes(self) -> [u8; 8] {
        self.0.to_be_bytes()
    }
}

impl fmt::Display for TraceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

impl fmt::Display for SpanId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

impl SpanContext {
    /// Reads a `traceparent`; `None` when it is none. Of a version after 00 only the parts that 00
    /// has are read, as the standard asks.
    pub fn parse(text: &str) -> Option<Self> {
        let head = text.get(..LENGTH)?;
        let mut parts = head.split('-');
        let mut next = |digits: usize| hex(parts.next()?, digits);
        let version = next(2)?;
        let (trace, span, flags) = (next(32)?, next(16)?, next(2)?);
        let more = text.get(LENGTH..).unwrap_or_default();
        let whole = match version {
            0 => more.is_empty(),
            0xff => false,
            _ => more.is_empty() || more.starts_with('-'),
        };
        let span = u64::try_from(span).ok()?;
        (whole && trace != 0 && span != 0).then_some(Self {
            trace: TraceId(trace),
            span: SpanId(span),
            sampled: flags & 1 == 1,
        })
    }

    /// As a `traceparent`.
    pub fn traceparent(&self) -> String {
        // On the way of every request while tracing is on: one allocation, no formatting.
        let mut text = String::with_capacity(LENGTH);
        text.push_str("00-");
        push_hex(&self.trace.bytes(), &mut text);
        text.push('-');
        push_hex(&self.span.bytes(), &mut text);
        text.push_str(if self.sampled { "-01" } else { "-00" });
        text
    }
}

fn push_hex(bytes: &[u8], text: &mut String) {
    for byte in bytes {
        for digit in [byte >> 4, byte & 15] {
            text.extend(char::from_digit(digit.into(), 16));
        }
    }
}

/// A number of exactly so many lower-case digits.
fn hex(text: &str, digits: usize) -> Option<u128> {
    let lower = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
    let well_formed = text.len() == digits && text.bytes().all(lower);
    u128::from_str_radix(text, 16).ok().filter(|_| well_formed)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The example of the W3C recommendation, section 3.2.2.5.
    const EXAMPLE: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

    #[test]
    fn a_context_is_read_and_written() {
        let context = SpanContext::parse(EXAMPLE).unwrap();
        assert_eq!(
            context.trace.to_string(),
            "4bf92f3577b34da6a3ce929d0e0e4736"
        );
        assert_eq!(context.span.to_string(), "00f067aa0ba902b7");
        assert!(context.sampled);
        assert_eq!(context.traceparent(), EXAMPLE);
        let unsampled = EXAMPLE.replace("-01", "-00");
        assert_eq!(
            SpanContext::parse(&unsampled).unwrap().traceparent(),
            unsampled
        );
    }

    #[test]
    fn later_versions_may_be_longer() {
        for (text, good) in [
            (
                "01-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
                true,
            ),
            (
                "cc-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-what",
                true,
            ),
            (
                "cc-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01.what",
                false,
            ),
            (
                "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-what",
                false,
            ),
            (
                "ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
                false,
            ),
        ] {
            assert_eq!(SpanContext::parse(text).is_some(), good, "{text}");
        }
    }

    #[test]
    fn what_is_no_context_is_none() {
        for text in [
            "",
            "00",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7",
            "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01",
            "00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e473-600f067aa0ba902b7-01",
            "00-+bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            "00_4bf92f3577b34da6a3ce929d0e0e4736_00f067aa0ba902b7_01",
            "00-4bf92f3577b34da6a3ce929d0e0e473\u{e9}-0f067aa0ba902b7-01",
        ] {
            assert_eq!(SpanContext::parse(text), None, "{text}");
        }
    }
}
