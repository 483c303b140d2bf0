//! Amounts in Kubernetes' spelling: `500`, `10Gi`, `1k`, `1.5M`, `2e3`.

use serde::{Deserialize, Deserializer, de};

/// A whole amount; fractions are rounded away from zero, as Kubernetes does when it needs an integer.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Quantity(pub i64);

/// Factors of the suffixes: decimal, then binary.
const SUFFIXES: [(&str, f64); 15] = [
    ("", 1.0),
    ("n", 1e-9),
    ("u", 1e-6),
    ("m", 1e-3),
    ("k", 1e3),
    ("M", 1e6),
    ("G", 1e9),
    ("T", 1e12),
    ("P", 1e15),
    ("E", 1e18),
    ("Ki", 1024.0),
    ("Mi", 1_048_576.0),
    ("Gi", 1_073_741_824.0),
    ("Ti", 1_099_511_627_776.0),
    ("Pi", 1_125_899_906_842_624.0),
];
/// `Ei` stands apart: its multiples do not fit otherwise.
const EXBI: (&str, f64) = ("Ei", 1_152_921_504_606_846_976.0);

impl std::str::FromStr for Quantity {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let refuse = || format!("{text:?} is not a quantity such as 500, 1k or 10Gi");
        let signed = text.strip_prefix(['+', '-']).unwrap_or(text);
        let digits = signed
            .find(|c: char| !c.is_ascii_digit() && c != '.')
            .unwrap_or(signed.len());
        let (number, suffix) = signed.split_at(digits);
        let number: f64 = number.parse().map_err(|_| refuse())?;
        let factor = match suffix.strip_prefix(['e', 'E']) {
            // "E" alone is exa, "Ei" exbi; with digits it is an exponent.
            Some(exponent) if !exponent.is_empty() && exponent != "i" => {
                10f64.powi(exponent.parse().map_err(|_| refuse())?)
            }
            _ => SUFFIXES
                .iter()
                .chain([&EXBI])
                .find(|(name, _)| *name == suffix)
                .map(|(_, factor)| *factor)
                .ok_or_else(refuse)?,
        };
        let amount = (number * factor).ceil();
        #[expect(clippy::cast_possible_truncation, reason = "a float cast saturates")]
        let amount = amount as i64;
        Ok(Self(if text.starts_with('-') {
            -amount
        } else {
            amount
        }))
    }
}

impl<'de> Deserialize<'de> for Quantity {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(QuantityVisitor)
    }
}

struct QuantityVisitor;

impl de::Visitor<'_> for QuantityVisitor {
    type Value = Quantity;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a quantity such as 500, 1k or 10Gi")
    }

    fn visit_i64<E>(self, value: i64) -> Result<Quantity, E> {
        Ok(Quantity(value))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Quantity, E> {
        Ok(Quantity(i64::try_from(value).unwrap_or(i64::MAX)))
    }

    fn visit_f64<E: de::Error>(self, value: f64) -> Result<Quantity, E> {
        value.to_string().parse().map_err(E::custom)
    }

    fn visit_str<E: de::Error>(self, value: &str) -> Result<Quantity, E> {
        value.parse().map_err(E::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kubernetes_spellings_are_read() {
        let read = |text: &str| text.parse::<Quantity>().map(|q| q.0);
        for (text, amount) in [
            ("500", 500),
            ("1k", 1000),
            ("10Gi", 10_737_418_240),
            ("64Mi", 67_108_864),
            ("1.5Ki", 1536),
            ("2e3", 2000),
            ("2E3", 2000),
            ("1E", 1_000_000_000_000_000_000),
            ("1Ei", 1_152_921_504_606_846_976),
            ("1500m", 2),
            ("-5", -5),
            ("+7", 7),
            ("0", 0),
            ("9999999999E", i64::MAX),
        ] {
            assert_eq!(read(text), Ok(amount), "{text}");
        }
        for bad in [
            "", "k", "1K", "1ki", "1 k", "--1", "1.2.3", "0x10", "1e", "∞",
        ] {
            assert!(read(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn numbers_and_strings_are_quantities() {
        let read = |json: &str| serde_json::from_str::<Quantity>(json).map(|q| q.0).ok();
        assert_eq!(read("1000"), Some(1000));
        assert_eq!(read("-1"), Some(-1));
        assert_eq!(read("1.5"), Some(2));
        assert_eq!(read("\"20k\""), Some(20_000));
        assert_eq!(read("true"), None);
    }
}
