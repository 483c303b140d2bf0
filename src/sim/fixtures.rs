//! Where tests find recordings and vectors: the directories that `PINPOD_FIXTURES` and
//! `PINPOD_VECTORS` name, else those of the repository.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

const DATA: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data");

/// A file of vectors.
pub(super) fn vector(name: &str) -> String {
    let own = || PathBuf::from(DATA).join("vectors");
    let directory = std::env::var_os("PINPOD_VECTORS").map_or_else(own, PathBuf::from);
    read(&directory, name)
}

/// A file that was recorded from vLLM 0.32; the variable names its directory or the one above.
pub(super) fn recording(name: &str) -> String {
    let own = || PathBuf::from(DATA);
    let given = std::env::var_os("PINPOD_FIXTURES").map_or_else(own, PathBuf::from);
    let release = given.join("vllm-0.32");
    let directory = if release.is_dir() { release } else { given };
    read(&directory, name)
}

fn read(directory: &Path, name: &str) -> String {
    let path = directory.join(name);
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

pub(super) fn unhex(text: &str) -> Vec<u8> {
    let digits = text.as_bytes().chunks(2);
    digits
        .map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap())
        .collect()
}
