//! Events of an engine, written by hand: no byte of them comes from the code under test.

#![allow(
    unreachable_pub,
    dead_code,
    reason = "shared by test binaries as a module"
)]

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// Tokens of a block.
pub const BLOCK: usize = 16;

/// Greeting and READY of both sides.
pub async fn shake(stream: &mut TcpStream, socket_type: &str) -> std::io::Result<()> {
    let mut hello = [0_u8; 64];
    hello[..10].copy_from_slice(&[0xff, 0, 0, 0, 0, 0, 0, 0, 0, 0x7f]);
    hello[10] = 3;
    hello[12..16].copy_from_slice(b"NULL");
    stream.write_all(&hello).await?;
    let mut ready = b"\x05READY\x0bSocket-Type".to_vec();
    ready.extend(u32::try_from(socket_type.len()).unwrap().to_be_bytes());
    ready.extend(socket_type.as_bytes());
    let length = u8::try_from(ready.len()).unwrap();
    stream.write_all(&[4, length]).await?;
    stream.write_all(&ready).await?;
    stream.read_exact(&mut hello).await?;
    let (flags, body) = frame(stream).await?;
    assert_eq!((flags, &body[..6]), (4, &b"\x05READY"[..]));
    Ok(())
}

/// Flags and body of a short frame.
pub async fn frame(stream: &mut TcpStream) -> std::io::Result<(u8, Vec<u8>)> {
    let mut head = [0_u8; 2];
    stream.read_exact(&mut head).await?;
    let mut body = vec![0; usize::from(head[1])];
    stream.read_exact(&mut body).await?;
    Ok((head[0], body))
}

/// Frames of one message, all but the last marked to be followed.
pub fn message(frames: &[&[u8]]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (number, frame) in frames.iter().enumerate() {
        let more = u8::from(number + 1 < frames.len());
        bytes.push(more | 2);
        bytes.extend((frame.len() as u64).to_be_bytes());
        bytes.extend(*frame);
    }
    bytes
}

/// [`stored_in`] GPU memory.
pub fn stored(
    seq: u64,
    hashes: &[u64],
    ids: &[u32],
    adapter: Option<&str>,
    salt: Option<&str>,
) -> Vec<u8> {
    stored_in("GPU", seq, hashes, ids, adapter, salt)
}

/// `[ts, [["BlockStored", hashes, nil, ids, 16, nil, medium, adapter, extra keys]], 0]`
pub fn stored_in(
    medium: &str,
    seq: u64,
    hashes: &[u64],
    ids: &[u32],
    adapter: Option<&str>,
    salt: Option<&str>,
) -> Vec<u8> {
    let mut bytes = vec![0x93, 0xcb];
    bytes.extend((1e9 + seq as f64).to_be_bytes());
    bytes.extend([0x91, 0x99]);
    string(&mut bytes, "BlockStored");
    numbers(&mut bytes, hashes.iter().copied());
    bytes.push(0xc0);
    numbers(&mut bytes, ids.iter().copied().map(u64::from));
    bytes.extend([u8::try_from(BLOCK).unwrap(), 0xc0]);
    string(&mut bytes, medium);
    match adapter {
        Some(adapter) => string(&mut bytes, adapter),
        None => bytes.push(0xc0),
    }
    list_of(&mut bytes, hashes.len());
    for block in 0..hashes.len() {
        let salt = salt.filter(|_| block == 0);
        let keys: Vec<_> = adapter.into_iter().chain(salt).collect();
        if keys.is_empty() {
            bytes.push(0xc0);
        } else {
            list_of(&mut bytes, keys.len());
            for key in &keys {
                string(&mut bytes, key);
            }
        }
    }
    bytes.push(0);
    bytes
}

fn numbers(bytes: &mut Vec<u8>, all: impl ExactSizeIterator<Item = u64>) {
    list_of(bytes, all.len());
    for n in all {
        bytes.push(0xcf);
        bytes.extend(n.to_be_bytes());
    }
}

fn string(bytes: &mut Vec<u8>, text: &str) {
    bytes.push(0xa0 | u8::try_from(text.len()).unwrap());
    bytes.extend(text.as_bytes());
}

fn list_of(bytes: &mut Vec<u8>, n: usize) {
    bytes.push(0xdc);
    bytes.extend(u16::try_from(n).unwrap().to_be_bytes());
}
