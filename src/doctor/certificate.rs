//! The dates of a certificate: the little of DER that they need.

/// Seconds since 1970 between which a certificate is valid.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Validity {
    /// First second.
    pub not_before: i64,
    /// Last second.
    pub not_after: i64,
}

const SEQUENCE: u8 = 0x30;
const INTEGER: u8 = 0x02;
const VERSION: u8 = 0xa0;
const UTC_TIME: u8 = 0x17;
const GENERALIZED_TIME: u8 = 0x18;

/// Reads the dates; `None` for what is no certificate (RFC 5280, 4.1).
pub fn validity(der: &[u8]) -> Option<Validity> {
    let mut outer = Reader(der);
    let mut certificate = Reader(outer.expect(SEQUENCE)?);
    let mut signed = Reader(certificate.expect(SEQUENCE)?);
    if signed.peek() == Some(VERSION) {
        signed.expect(VERSION)?;
    }
    signed.expect(INTEGER)?;
    // Signature algorithm and issuer.
    signed.expect(SEQUENCE)?;
    signed.expect(SEQUENCE)?;
    let mut dates = Reader(signed.expect(SEQUENCE)?);
    Some(Validity {
        not_before: dates.time()?,
        not_after: dates.time()?,
    })
}

/// What is left of a DER value.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn peek(&self) -> Option<u8> {
        self.0.first().copied()
    }

    fn expect(&mut self, tag: u8) -> Option<&'a [u8]> {
        self.next()
            .filter(|(found, _)| *found == tag)
            .map(|(_, v)| v)
    }

    /// Tag and content of the next element.
    fn next(&mut self) -> Option<(u8, &'a [u8])> {
        let (&tag, rest) = self.0.split_first()?;
        let (&first, rest) = rest.split_first()?;
        let (length, rest) = if first < 0x80 {
            (usize::from(first), rest)
        } else {
            let count = usize::from(first & 0x7f);
            if count > 4 {
                return None;
            }
            let (bytes, rest) = rest.split_at_checked(count)?;
            let length = bytes.iter().fold(0, |n, b| n << 8 | usize::from(*b));
            (length, rest)
        };
        let (content, rest) = rest.split_at_checked(length)?;
        self.0 = rest;
        Some((tag, content))
    }

    /// `YYMMDDhhmmssZ` or `YYYYMMDDhhmmssZ`.
    fn time(&mut self) -> Option<i64> {
        let (tag, text) = self.next()?;
        let text = std::str::from_utf8(text).ok()?.strip_suffix('Z')?;
        let (year, rest) = match tag {
            UTC_TIME => {
                let short: i64 = text.get(..2)?.parse().ok()?;
                // Two digits from 50 on are of the last century.
                (short + if short < 50 { 2000 } else { 1900 }, text.get(2..)?)
            }
            GENERALIZED_TIME => (text.get(..4)?.parse().ok()?, text.get(4..)?),
            _ => return None,
        };
        let part = |at: usize| -> Option<i64> { rest.get(at..at + 2)?.parse().ok() };
        let days = days_since_1970(year, part(0)?, part(2)?);
        Some(days * 86_400 + part(4)? * 3600 + part(6)? * 60 + part(8)?)
    }
}

/// Days of the proleptic Gregorian calendar. Years are counted from March, so that a leap day is the
/// last of its year.
fn days_since_1970(year: i64, month: i64, day: i64) -> i64 {
    let year = if month <= 2 { year - 1 } else { year };
    let month_from_march = (month + 9) % 12;
    let day_of_year = (153 * month_from_march + 2) / 5 + day - 1;
    let leap_days = year.div_euclid(4) - year.div_euclid(100) + year.div_euclid(400);
    // 719468 days lie between 1 March of year 0 and 1970.
    year * 365 + leap_days + day_of_year - 719_468
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn days_are_counted_as_calendars_do() {
        // Unix time over 86400: 946684800, 951782400 (29 Feb 2000), 1709164800 (29 Feb 2024).
        assert_eq!(days_since_1970(1970, 1, 1), 0);
        assert_eq!(days_since_1970(2000, 1, 1), 10_957);
        assert_eq!(days_since_1970(2000, 2, 29), 11_016);
        assert_eq!(days_since_1970(2024, 2, 29), 19_782);
        assert_eq!(days_since_1970(2024, 3, 1), 19_783);
    }

    #[test]
    fn dates_of_a_made_certificate_are_read() {
        let mut parameters = rcgen::CertificateParams::new(vec!["a".to_owned()]).unwrap();
        // Before 2050 dates are UTCTime, from then on GeneralizedTime (RFC 5280, 4.1.2.5).
        parameters.not_before = rcgen::date_time_ymd(2024, 2, 29);
        parameters.not_after = rcgen::date_time_ymd(2051, 1, 1);
        let key = rcgen::KeyPair::generate().unwrap();
        let der = parameters.self_signed(&key).unwrap().der().to_vec();
        assert_eq!(
            validity(&der),
            Some(Validity {
                not_before: 19_782 * 86_400,
                // 81 years, 20 of them leap years from 1972 to 2048.
                not_after: (81 * 365 + 20) * 86_400,
            })
        );
        for cut in 0..der.len().min(200) {
            // Anything short of the dates is no certificate, and nothing panics.
            let _ = validity(&der[..cut]);
        }
        assert_eq!(validity(b""), None);
        assert_eq!(validity(&[0x30, 0x84, 0xff, 0xff, 0xff, 0xff]), None);
    }
}
