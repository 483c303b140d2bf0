//! Tokens of the stand-in: four bytes of text are one token, in both directions.

/// Bytes of a token.
pub const TOKEN_BYTES: usize = 4;

/// Words of one token each, leading space included.
const WORDS: [&str; 16] = [
    " sea", " map", " oak", " ink", " fog", " bay", " elm", " ray", " hut", " owl", " gem", " ivy",
    " arc", " dew", " fir", " jet",
];

/// `count` output tokens of request `seed`, from output position `from`; equal for equal arguments.
pub fn output(seed: u64, from: usize, count: usize) -> String {
    let word = |position: usize| {
        let mixed = (seed ^ position as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        WORDS.get((mixed >> 60) as usize).copied().unwrap_or(" sea")
    };
    (from..from + count).map(word).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn output_is_four_bytes_a_token_and_independent_of_the_cut() {
        let whole = output(7, 0, 10);
        assert_eq!(whole.len(), 10 * TOKEN_BYTES);
        assert_eq!(format!("{}{}", output(7, 0, 3), output(7, 3, 7)), whole);
        assert_ne!(output(8, 0, 10), whole);
    }
}
