//! Just enough msgpack to walk a payload: heads of values, and skipping a value whole.
//!
//! Never allocates and never recurses: what a header claims is compared with what is there.

/// The payload is not well-formed msgpack: cut short, or a byte no value starts with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Broken;

/// One value; of arrays and maps only the size, their elements follow.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Head<'a> {
    Nil,
    Bool,
    Uint(u64),
    /// Negative integers only.
    Negative(i64),
    Float(f64),
    Str(&'a [u8]),
    Bin(&'a [u8]),
    Array(u32),
    Map(u32),
    Ext,
}

/// An integer of at most 32 bits, within the eight bytes that begin with it.
#[derive(Debug, Clone, Copy)]
struct Small {
    /// 0: something else.
    bytes: usize,
    shift: u32,
    mask: u64,
}

impl Small {
    const fn new(bytes: usize, shift: u32, mask: u64) -> Self {
        Self { bytes, shift, mask }
    }
}

/// By first byte, which of a small number is the number itself.
static SMALL: [Small; 256] = {
    let mut table = [Small::new(0, 0, 0); 256];
    let (numbers, _) = table.split_at_mut(0x80);
    let mut tag = 0;
    while tag < numbers.len() {
        numbers[tag] = Small::new(1, 56, 0x7f);
        tag += 1;
    }
    table[0xcc] = Small::new(2, 48, 0xff);
    table[0xcd] = Small::new(3, 40, 0xffff);
    table[0xce] = Small::new(5, 24, 0xffff_ffff);
    table
};

/// A position in a payload.
#[derive(Debug, Clone, Copy)]
pub(super) struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    pub(super) fn new(payload: &'a [u8]) -> Self {
        Self { rest: payload }
    }

    /// What was not read yet.
    pub(super) fn rest(&self) -> &'a [u8] {
        self.rest
    }

    fn take(&mut self, n: usize) -> Result<&'a [u8], Broken> {
        let (taken, rest) = self.rest.split_at_checked(n).ok_or(Broken)?;
        self.rest = rest;
        Ok(taken)
    }

    fn uint<const N: usize>(&mut self) -> Result<u64, Broken> {
        let bytes = self.take(N)?;
        Ok(bytes.iter().fold(0, |n, b| n << 8 | u64::from(*b)))
    }

    fn len<const N: usize>(&mut self) -> Result<usize, Broken> {
        usize::try_from(self.uint::<N>()?).map_err(|_| Broken)
    }

    fn count<const N: usize>(&mut self) -> Result<u32, Broken> {
        u32::try_from(self.uint::<N>()?).map_err(|_| Broken)
    }

    /// Reads a two's complement integer of `N` bytes.
    fn int<const N: usize>(&mut self) -> Result<Head<'a>, Broken> {
        let unused = 64 - 8 * N;
        let n = (self.uint::<N>()? << unused).cast_signed() >> unused;
        Ok(u64::try_from(n).map_or(Head::Negative(n), Head::Uint))
    }

    fn ext(&mut self, len: usize) -> Result<Head<'a>, Broken> {
        // One byte of type before the data.
        self.take(len.checked_add(1).ok_or(Broken)?)?;
        Ok(Head::Ext)
    }

    /// A string of less than 32 bytes, if that is what comes next.
    #[inline]
    pub(super) fn short_str(&mut self) -> Option<&'a [u8]> {
        let (first, rest) = self.rest.split_first()?;
        let len = usize::from(first ^ 0xa0);
        let (text, rest) = rest.split_at_checked(len).filter(|_| len < 32)?;
        self.rest = rest;
        Some(text)
    }

    /// Reads the next value, of a container its size only.
    #[inline]
    pub(super) fn head(&mut self) -> Result<Head<'a>, Broken> {
        // Keys and most values that are text are short, and a reader of keys meets nothing else; most
        // other values are one byte. A branch of its own at each place is guessed right, one jump for all
        // kinds is not.
        if let Some(text) = self.short_str() {
            return Ok(Head::Str(text));
        }
        if let Some((first @ (0..=0x7f | 0xc0), rest)) = self.rest.split_first() {
            self.rest = rest;
            return Ok(match first {
                0xc0 => Head::Nil,
                n => Head::Uint(u64::from(*n)),
            });
        }
        self.any_head()
    }

    fn any_head(&mut self) -> Result<Head<'a>, Broken> {
        let (&first, rest) = self.rest.split_first().ok_or(Broken)?;
        self.rest = rest;
        let head = match first {
            0x00..=0x7f => Head::Uint(u64::from(first)),
            0x80..=0x8f => Head::Map(u32::from(first & 0x0f)),
            0x90..=0x9f => Head::Array(u32::from(first & 0x0f)),
            0xa0..=0xbf => Head::Str(self.take(usize::from(first & 0x1f))?),
            0xc0 => Head::Nil,
            0xc1 => return Err(Broken),
            0xc2 | 0xc3 => Head::Bool,
            0xc4 => {
                let len = self.len::<1>()?;
                Head::Bin(self.take(len)?)
            }
            0xc5 => {
                let len = self.len::<2>()?;
                Head::Bin(self.take(len)?)
            }
            0xc6 => {
                let len = self.len::<4>()?;
                Head::Bin(self.take(len)?)
            }
            0xc7 => {
                let len = self.len::<1>()?;
                self.ext(len)?
            }
            0xc8 => {
                let len = self.len::<2>()?;
                self.ext(len)?
            }
            0xc9 => {
                let len = self.len::<4>()?;
                self.ext(len)?
            }
            0xca => {
                let bits = self.count::<4>()?;
                Head::Float(f64::from(f32::from_bits(bits)))
            }
            0xcb => Head::Float(f64::from_bits(self.uint::<8>()?)),
            0xcc => Head::Uint(self.uint::<1>()?),
            0xcd => Head::Uint(self.uint::<2>()?),
            0xce => Head::Uint(self.uint::<4>()?),
            0xcf => Head::Uint(self.uint::<8>()?),
            0xd0 => self.int::<1>()?,
            0xd1 => self.int::<2>()?,
            0xd2 => self.int::<4>()?,
            0xd3 => self.int::<8>()?,
            0xd4..=0xd8 => self.ext(1 << (first - 0xd4))?,
            0xd9 => {
                let len = self.len::<1>()?;
                Head::Str(self.take(len)?)
            }
            0xda => {
                let len = self.len::<2>()?;
                Head::Str(self.take(len)?)
            }
            0xdb => {
                let len = self.len::<4>()?;
                Head::Str(self.take(len)?)
            }
            0xdc => Head::Array(self.count::<2>()?),
            0xdd => Head::Array(self.count::<4>()?),
            0xde => Head::Map(self.count::<2>()?),
            0xdf => Head::Map(self.count::<4>()?),
            0xe0..=0xff => Head::Negative(i64::from(first.cast_signed())),
        };
        Ok(head)
    }

    /// Steps over one value with all it holds. O(bytes skipped); depth costs nothing.
    pub(super) fn skip(&mut self) -> Result<(), Broken> {
        self.skip_values(1)
    }

    fn skip_values(&mut self, mut values: u64) -> Result<(), Broken> {
        while values > 0 {
            values -= 1;
            values = values.saturating_add(children(self.head()?));
        }
        Ok(())
    }

    /// One value: its head, and what is inside it is stepped over.
    #[inline]
    pub(super) fn whole(&mut self) -> Result<Head<'a>, Broken> {
        let head = self.head()?;
        if let Head::Array(_) | Head::Map(_) = head {
            self.skip_values(children(head))?;
        }
        Ok(head)
    }

    /// One value, if it is a string; else `None`, and it is stepped over.
    #[inline]
    pub(super) fn string(&mut self) -> Result<Option<&'a [u8]>, Broken> {
        if let Some(text) = self.short_str() {
            return Ok(Some(text));
        }
        Ok(match self.whole()? {
            Head::Str(text) => Some(text),
            _ => None,
        })
    }

    /// One value as raw bytes.
    pub(super) fn raw(&mut self) -> Result<&'a [u8], Broken> {
        Ok(self.value()?.1)
    }

    /// One value: its head, and all of it as raw bytes.
    pub(super) fn value(&mut self) -> Result<(Head<'a>, &'a [u8]), Broken> {
        let before = self.rest;
        let head = self.whole()?;
        let n = before.len() - self.rest.len();
        Ok((head, before.get(..n).unwrap_or_default()))
    }

    /// Appends `n` integers below 2^32 to `out`. `Ok(false)`: one of them is something else, and the
    /// position is undefined.
    pub(super) fn u32s(&mut self, n: u32, out: &mut Vec<u32>) -> Result<bool, Broken> {
        // An element takes at least one byte: a header cannot make us reserve more than was sent.
        out.reserve((n as usize).min(self.rest.len()));
        for _ in 0..n {
            // Ids come in widths no processor can guess, so nothing branches on them.
            if let Some(word) = self.rest.first_chunk::<8>()
                && let [tag, ..] = *word
                && let Some(small) = SMALL.get(usize::from(tag))
                && small.bytes > 0
            {
                let value = u64::from_be_bytes(*word) >> small.shift & small.mask;
                out.push(u32::try_from(value).unwrap_or(u32::MAX));
                self.rest = self.rest.get(small.bytes..).unwrap_or_default();
                continue;
            }
            match self.head()? {
                Head::Uint(value) => match u32::try_from(value) {
                    Ok(value) => out.push(value),
                    Err(_) => return Ok(false),
                },
                _ => return Ok(false),
            }
        }
        Ok(true)
    }
}

/// Values directly inside one.
fn children(head: Head<'_>) -> u64 {
    match head {
        Head::Array(n) => u64::from(n),
        Head::Map(n) => u64::from(n) * 2,
        _ => 0,
    }
}

/// Text of a string; `None` when it is not UTF-8 or not a string.
pub(super) fn text(head: Head<'_>) -> Option<&str> {
    match head {
        Head::Str(bytes) => std::str::from_utf8(bytes).ok(),
        _ => None,
    }
}
