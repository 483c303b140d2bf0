//! Tokens of the stand-in: four bytes of text are one token, in both directions. Its id is these
//! bytes as a little-endian number.
//!
//! A text ends at a token boundary, as those of a chat do behind a real template; its last token is
//! filled up with zero bytes. So what was generated after a prompt is found again when it comes back
//! as a message of a chat, or behind a prompt whose length is a multiple of four.

/// Bytes of a token.
pub const TOKEN_BYTES: usize = 4;

/// Appends the tokens of `text` to `tokens`, given as their bytes.
pub fn append(tokens: &mut Vec<u8>, text: &[u8]) {
    tokens.extend_from_slice(text);
    tokens.resize(tokens.len().next_multiple_of(TOKEN_BYTES), 0);
}

/// Token ids as bytes.
pub fn from_ids(ids: &[u32]) -> Vec<u8> {
    ids.iter().flat_map(|id| id.to_le_bytes()).collect()
}

/// The ids of tokens given as bytes.
pub fn ids(tokens: &[u8]) -> Vec<u32> {
    let (whole, _) = tokens.as_chunks::<TOKEN_BYTES>();
    whole.iter().copied().map(u32::from_le_bytes).collect()
}

/// The text of each token given as bytes.
pub fn strings(tokens: &[u8]) -> Vec<String> {
    tokens.chunks(TOKEN_BYTES).map(text).collect()
}

/// The text of tokens given as bytes; what is no UTF-8 is replaced.
pub fn text(tokens: &[u8]) -> String {
    String::from_utf8_lossy(tokens).replace('\0', "")
}

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

    #[test]
    fn ids_stand_for_the_same_tokens_as_text() {
        let mut tokens = Vec::new();
        append(&mut tokens, b"hello");
        append(&mut tokens, b" sea");
        // "hell", "o" and three zeros, " sea".
        assert_eq!(tokens, b"hello\0\0\0 sea");
        let numbers = ids(&tokens);
        assert_eq!(numbers[1], u32::from(b'o'));
        assert_eq!(from_ids(&numbers), tokens);
        assert_eq!(text(&tokens), "hello sea");
    }
}
