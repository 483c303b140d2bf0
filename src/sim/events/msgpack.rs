//! msgpack as vLLM's encoder writes it: the shortest form of everything, floats always in 64 bits.

/// Type, and the length or value behind it, big-endian.
fn head(out: &mut Vec<u8>, mark: u8, number: u64, width: usize) {
    out.push(mark);
    out.extend(number.to_be_bytes().iter().skip(8 - width.min(8)));
}

pub(super) fn nil(out: &mut Vec<u8>) {
    out.push(0xC0);
}

pub(super) fn float(out: &mut Vec<u8>, number: f64) {
    head(out, 0xCB, number.to_bits(), 8);
}

pub(super) fn integer(out: &mut Vec<u8>, number: u64) {
    match number {
        0..0x80 => head(out, (number & 0x7F) as u8, 0, 0),
        0x80..0x100 => head(out, 0xCC, number, 1),
        0x100..0x1_0000 => head(out, 0xCD, number, 2),
        0x1_0000..0x1_0000_0000 => head(out, 0xCE, number, 4),
        _ => head(out, 0xCF, number, 8),
    }
}

pub(super) fn signed(out: &mut Vec<u8>, number: i64) {
    let bits = number.cast_unsigned();
    match number {
        0.. => integer(out, bits),
        -0x20..0 => head(out, (bits & 0xFF) as u8, 0, 0),
        -0x80..-0x20 => head(out, 0xD0, bits, 1),
        -0x8000..-0x80 => head(out, 0xD1, bits, 2),
        -0x8000_0000..-0x8000 => head(out, 0xD2, bits, 4),
        _ => head(out, 0xD3, bits, 8),
    }
}

pub(super) fn text(out: &mut Vec<u8>, text: &str) {
    let length = text.len() as u64;
    match length {
        0..0x20 => head(out, 0xA0 | (length & 0x1F) as u8, 0, 0),
        0x20..0x100 => head(out, 0xD9, length, 1),
        0x100..0x1_0000 => head(out, 0xDA, length, 2),
        _ => head(out, 0xDB, length, 4),
    }
    out.extend_from_slice(text.as_bytes());
}

pub(super) fn bytes(out: &mut Vec<u8>, bytes: &[u8]) {
    let length = bytes.len() as u64;
    match length {
        0..0x100 => head(out, 0xC4, length, 1),
        0x100..0x1_0000 => head(out, 0xC5, length, 2),
        _ => head(out, 0xC6, length, 4),
    }
    out.extend_from_slice(bytes);
}

pub(super) fn array(out: &mut Vec<u8>, items: usize) {
    let items = items as u64;
    match items {
        0..0x10 => head(out, 0x90 | (items & 0xF) as u8, 0, 0),
        0x10..0x1_0000 => head(out, 0xDC, items, 2),
        _ => head(out, 0xDD, items, 4),
    }
}

/// A map of up to 15 fields, which is what an event has.
pub(super) fn map(out: &mut Vec<u8>, fields: u8) {
    debug_assert!(fields < 0x10, "an event has few fields");
    head(out, 0x80 | (fields & 0xF), 0, 0);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The forms of the msgpack specification at the edges of each.
    #[test]
    fn numbers_take_their_shortest_form() {
        let written = |number: i64| {
            let mut out = Vec::new();
            signed(&mut out, number);
            out
        };
        for (number, bytes) in [
            (0, vec![0x00]),
            (0x7F, vec![0x7F]),
            (0x80, vec![0xCC, 0x80]),
            (0xFF, vec![0xCC, 0xFF]),
            (0x100, vec![0xCD, 1, 0]),
            (0x1_0000, vec![0xCE, 0, 1, 0, 0]),
            (0x1_0000_0000, vec![0xCF, 0, 0, 0, 1, 0, 0, 0, 0]),
            (-1, vec![0xFF]),
            (-0x20, vec![0xE0]),
            (-0x21, vec![0xD0, 0xDF]),
            (-0x80, vec![0xD0, 0x80]),
            (-0x81, vec![0xD1, 0xFF, 0x7F]),
            (-0x8001, vec![0xD2, 0xFF, 0xFF, 0x7F, 0xFF]),
            (
                -0x8000_0001,
                vec![0xD3, 0xFF, 0xFF, 0xFF, 0xFF, 0x7F, 0xFF, 0xFF, 0xFF],
            ),
        ] {
            assert_eq!(written(number), bytes, "{number}");
        }
    }

    #[test]
    fn lengths_take_their_shortest_form() {
        let head = |write: &dyn Fn(&mut Vec<u8>), count: usize| {
            let mut out = Vec::new();
            write(&mut out);
            out.truncate(count);
            out
        };
        let long = "a".repeat(0x1_0000);
        let of = |length: usize| long.get(..length).unwrap();
        for (length, bytes) in [
            (0x1F, vec![0xBF]),
            (0x20, vec![0xD9, 0x20]),
            (0x100, vec![0xDA, 1, 0]),
            (0x1_0000, vec![0xDB, 0, 1, 0, 0]),
        ] {
            assert_eq!(head(&|out| text(out, of(length)), bytes.len()), bytes);
        }
        for (length, bytes) in [
            (0x20, vec![0xC4, 0x20]),
            (0x100, vec![0xC5, 1, 0]),
            (0x1_0000, vec![0xC6, 0, 1, 0, 0]),
        ] {
            let write = |out: &mut Vec<u8>| super::bytes(out, of(length).as_bytes());
            assert_eq!(head(&write, bytes.len()), bytes);
        }
        for (items, bytes) in [
            (15, vec![0x9F]),
            (16, vec![0xDC, 0, 16]),
            (0x1_0000, vec![0xDD, 0, 1, 0, 0]),
        ] {
            assert_eq!(head(&|out| array(out, items), bytes.len()), bytes);
        }
    }
}
