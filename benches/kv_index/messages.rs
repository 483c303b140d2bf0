//! KV event messages as vLLM 0.32 sends them, written from its format.

/// A store of each stretch: its tokens, its hashes, the hash before it.
pub(crate) fn store<'a>(
    stretches: impl IntoIterator<Item = (&'a [u32], &'a [u64], Option<u64>)>,
) -> Vec<u8> {
    let events = stretches.into_iter().map(|(tokens, hashes, parent)| {
        let mut out = Vec::new();
        out.push(0x8b);
        text(&mut out, "type");
        text(&mut out, "BlockStored");
        text(&mut out, "block_hashes");
        array(&mut out, hashes.len());
        for hash in hashes {
            number(&mut out, *hash);
        }
        text(&mut out, "parent_block_hash");
        match parent {
            Some(hash) => number(&mut out, hash),
            None => out.push(0xc0),
        }
        text(&mut out, "token_ids");
        array(&mut out, tokens.len());
        for token in tokens {
            number(&mut out, u64::from(*token));
        }
        text(&mut out, "block_size");
        number(&mut out, (tokens.len() / hashes.len().max(1)) as u64);
        text(&mut out, "lora_id");
        out.push(0xc0);
        text(&mut out, "medium");
        text(&mut out, "GPU");
        text(&mut out, "lora_name");
        out.push(0xc0);
        text(&mut out, "extra_keys");
        array(&mut out, hashes.len());
        out.extend(hashes.iter().map(|_| 0xc0));
        text(&mut out, "group_idx");
        number(&mut out, 0);
        text(&mut out, "kv_cache_spec_kind");
        text(&mut out, "full_attention");
        out
    });
    batch(&events.collect::<Vec<_>>())
}

/// Each hash removed by an event of its own, the last one first.
pub(crate) fn removals(hashes: &[u64]) -> Vec<u8> {
    let events = hashes.iter().rev().map(|hash| {
        let mut out = Vec::new();
        out.push(0x84);
        text(&mut out, "type");
        text(&mut out, "BlockRemoved");
        text(&mut out, "block_hashes");
        array(&mut out, 1);
        number(&mut out, *hash);
        text(&mut out, "medium");
        text(&mut out, "GPU");
        text(&mut out, "group_idx");
        number(&mut out, 0);
        out
    });
    batch(&events.collect::<Vec<_>>())
}

fn batch(events: &[Vec<u8>]) -> Vec<u8> {
    let mut out = vec![0x93, 0xcb];
    out.extend(1.7e9_f64.to_be_bytes());
    array(&mut out, events.len());
    for event in events {
        out.extend(event);
    }
    out.push(0);
    out
}

fn array(out: &mut Vec<u8>, n: usize) {
    match (u8::try_from(n), u16::try_from(n), u32::try_from(n)) {
        (Ok(n @ 0..16), ..) => out.push(0x90 | n),
        (_, Ok(n), _) => {
            out.push(0xdc);
            out.extend(n.to_be_bytes());
        }
        (_, _, n) => {
            out.push(0xdd);
            out.extend(n.unwrap_or(u32::MAX).to_be_bytes());
        }
    }
}

fn text(out: &mut Vec<u8>, text: &str) {
    match u8::try_from(text.len()) {
        Ok(n @ 0..32) => out.push(0xa0 | n),
        n => out.extend([0xd9, n.unwrap_or(u8::MAX)]),
    }
    out.extend(text.as_bytes());
}

/// As short as it goes.
fn number(out: &mut Vec<u8>, n: u64) {
    match (u8::try_from(n), u16::try_from(n), u32::try_from(n)) {
        (Ok(n @ 0..128), ..) => out.push(n),
        (Ok(n), ..) => out.extend([0xcc, n]),
        (_, Ok(n), _) => {
            out.push(0xcd);
            out.extend(n.to_be_bytes());
        }
        (_, _, Ok(n)) => {
            out.push(0xce);
            out.extend(n.to_be_bytes());
        }
        _ => {
            out.push(0xcf);
            out.extend(n.to_be_bytes());
        }
    }
}
