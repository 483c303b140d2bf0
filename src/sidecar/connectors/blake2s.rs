//! BLAKE2s-256 without a key (RFC 7693), for one number a request.

const IV: [u32; 8] = [
    0x6a09_e667,
    0xbb67_ae85,
    0x3c6e_f372,
    0xa54f_f53a,
    0x510e_527f,
    0x9b05_688c,
    0x1f83_d9ab,
    0x5be0_cd19,
];
const SIGMA: [[usize; 16]; 10] = [
    [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15],
    [14, 10, 4, 8, 9, 15, 13, 6, 1, 12, 0, 2, 11, 7, 5, 3],
    [11, 8, 12, 0, 5, 2, 15, 13, 10, 14, 3, 6, 7, 1, 9, 4],
    [7, 9, 3, 1, 13, 12, 11, 14, 2, 6, 5, 10, 4, 0, 15, 8],
    [9, 0, 5, 7, 2, 4, 10, 15, 14, 1, 11, 12, 6, 8, 3, 13],
    [2, 12, 6, 10, 0, 11, 8, 3, 4, 13, 7, 5, 15, 14, 1, 9],
    [12, 5, 1, 15, 14, 13, 4, 10, 0, 7, 6, 3, 9, 2, 8, 11],
    [13, 11, 7, 14, 12, 1, 3, 9, 5, 0, 15, 4, 8, 6, 2, 10],
    [6, 15, 14, 9, 11, 3, 0, 8, 12, 2, 13, 7, 1, 4, 10, 5],
    [10, 2, 8, 4, 7, 6, 1, 5, 15, 11, 9, 14, 3, 12, 13, 0],
];
/// Columns, then diagonals.
const MIXED: [[usize; 4]; 8] = [
    [0, 4, 8, 12],
    [1, 5, 9, 13],
    [2, 6, 10, 14],
    [3, 7, 11, 15],
    [0, 5, 10, 15],
    [1, 6, 11, 12],
    [2, 7, 8, 13],
    [3, 4, 9, 14],
];
const BLOCK: usize = 64;

/// The digest of `text`.
pub(super) fn hash(text: &[u8]) -> [u8; 32] {
    let mut state = IV;
    // 32 bytes of digest, no key, no tree.
    state[0] ^= 0x0101_0020;
    let mut rest = text;
    let mut counted = 0u64;
    loop {
        let (block, tail) = rest.split_at(rest.len().min(BLOCK));
        let last = tail.is_empty();
        counted += block.len() as u64;
        let mut padded = [0; BLOCK];
        padded[..block.len()].copy_from_slice(block);
        compress(&mut state, &padded, counted, last);
        if last {
            break;
        }
        rest = tail;
    }
    let mut out = [0; 32];
    for (bytes, word) in out.chunks_exact_mut(4).zip(state) {
        bytes.copy_from_slice(&word.to_le_bytes());
    }
    out
}

fn compress(state: &mut [u32; 8], block: &[u8; BLOCK], counted: u64, last: bool) {
    let mut words = [0u32; 16];
    for (word, bytes) in words.iter_mut().zip(block.chunks_exact(4)) {
        *word = bytes
            .iter()
            .rev()
            .fold(0, |word, byte| word << 8 | u32::from(*byte));
    }
    let mut v = [0u32; 16];
    v[..8].copy_from_slice(state);
    v[8..].copy_from_slice(&IV);
    #[expect(
        clippy::cast_possible_truncation,
        reason = "the two halves of a counter"
    )]
    let halves = [counted as u32, (counted >> 32) as u32];
    v[12] ^= halves[0];
    v[13] ^= halves[1];
    if last {
        v[14] = !v[14];
    }
    for round in SIGMA {
        for (mixed, pair) in MIXED.iter().zip(round.chunks_exact(2)) {
            mix(&mut v, *mixed, words[pair[0]], words[pair[1]]);
        }
    }
    for (index, word) in state.iter_mut().enumerate() {
        *word ^= v[index] ^ v[index + 8];
    }
}

#[expect(clippy::many_single_char_names, reason = "the names of RFC 7693")]
fn mix(v: &mut [u32; 16], [a, b, c, d]: [usize; 4], x: u32, y: u32) {
    for (word, [first, second]) in [(x, [16, 12]), (y, [8, 7])] {
        v[a] = v[a].wrapping_add(v[b]).wrapping_add(word);
        v[d] = (v[d] ^ v[a]).rotate_right(first);
        v[c] = v[c].wrapping_add(v[d]);
        v[b] = (v[b] ^ v[c]).rotate_right(second);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[expect(clippy::format_collect, reason = "a test")]
    fn hex(text: &[u8]) -> String {
        hash(text)
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect()
    }

    #[test]
    fn digests_are_the_published_ones() {
        // RFC 7693, appendix B, and the digest of the empty text.
        assert_eq!(
            hex(b"abc"),
            "508c5e8c327c14e2e1a72ba34eeb452f37458b209ed63a294d999b4c86675982"
        );
        assert_eq!(
            hex(b""),
            "69217a3079908094e11121d042354a7c1f55b6482ca1a51e1b250dfd1ed0eef9"
        );
    }
}
