//! Durations in Go's spelling: `250ms`, `1m30s`, `1.5h`.

use std::time::Duration;

use serde::{Deserialize, Deserializer, de};

/// The longest that Go has, 2^63 nanoseconds: some 292 years, which can be added to any time.
const MAX_SECONDS: f64 = 9_223_372_036.0;

/// A non-negative duration read from Go's spelling.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct GoDuration(pub Duration);

impl std::str::FromStr for GoDuration {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let refuse = || format!("{text:?} is not a duration such as 250ms, 1m30s or 2h");
        let body = text.strip_prefix('+').unwrap_or(text);
        if body == "0" {
            return Ok(Self(Duration::ZERO));
        }
        let mut rest = body;
        let mut seconds = 0.0;
        while !rest.is_empty() {
            let end = rest
                .find(|c: char| !c.is_ascii_digit() && c != '.')
                .ok_or_else(refuse)?;
            let (number, tail) = rest.split_at(end);
            let unit_end = tail
                .find(|c: char| c.is_ascii_digit() || c == '.')
                .unwrap_or(tail.len());
            let (unit, next) = tail.split_at(unit_end);
            let scale = match unit {
                "ns" => 1e-9,
                "us" | "µs" => 1e-6,
                "ms" => 1e-3,
                "s" => 1.0,
                "m" => 60.0,
                "h" => 3600.0,
                _ => return Err(refuse()),
            };
            seconds += number.parse::<f64>().map_err(|_| refuse())? * scale;
            rest = next;
        }
        if body.is_empty() || seconds > MAX_SECONDS {
            return Err(refuse());
        }
        Duration::try_from_secs_f64(seconds)
            .map(Self)
            .map_err(|_| refuse())
    }
}

impl std::fmt::Display for GoDuration {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?}", self.0)
    }
}

impl<'de> Deserialize<'de> for GoDuration {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?
            .parse()
            .map_err(de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn go_spellings_are_read() {
        let ms = |text: &str| text.parse::<GoDuration>().map(|d| d.0.as_millis());
        assert_eq!(ms("250ms"), Ok(250));
        assert_eq!(ms("1m30s"), Ok(90_000));
        assert_eq!(ms("1.5h"), Ok(5_400_000));
        assert_eq!(ms("0"), Ok(0));
        assert_eq!(ms("0s"), Ok(0));
        // 2^63 ns are 2562047 h and 47 min.
        assert_eq!(ms("2562047h"), Ok(9_223_369_200_000));
        for bad in [
            "", "5", "-1s", "1x", "s", "1..2s", "1 s", "1e400s", "2562048h",
        ] {
            assert!(ms(bad).is_err(), "{bad}");
        }
    }
}
