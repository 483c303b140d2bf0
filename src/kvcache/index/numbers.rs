//! Numbers of blocks: 32 bits that stand for a run and an offset in tables of names.
//!
//! A run has numbers by the sheet, so that each leads to the other in one step, however runs grow.

use smallvec::SmallVec;

use super::table::{Place, short};

/// Numbers of a sheet.
const SHEET: u32 = 16;

/// Whose the sheets are.
#[derive(Debug, Default)]
pub(super) struct Numbers {
    /// The first block of each sheet; of a free one, what it was.
    sheets: Vec<Place>,
    free: Vec<u32>,
}

/// Sheets of one run, in order.
#[derive(Debug, Default)]
pub(super) struct Sheets(SmallVec<[u32; 4]>);

impl Sheets {
    /// The number of a block.
    pub(super) fn number(&self, offset: u32) -> Option<u32> {
        let sheet = self.0.get((offset / SHEET) as usize)?;
        Some(sheet * SHEET + offset % SHEET)
    }

    /// Numbers of the blocks from `offset` on.
    pub(super) fn numbers(&self, offset: u32) -> impl Iterator<Item = u32> {
        (offset..).map_while(|offset| self.number(offset))
    }
}

impl Numbers {
    /// The run has `len` blocks now.
    pub(super) fn resize(&mut self, run: u32, sheets: &mut Sheets, len: usize) {
        let Sheets(sheets) = sheets;
        let n = len.div_ceil(SHEET as usize);
        while sheets.len() < n {
            let offset = short(sheets.len()) * SHEET;
            let first = Place { run, offset };
            let sheet = self.free.pop().unwrap_or_else(|| {
                self.sheets.push(first);
                short(self.sheets.len() - 1)
            });
            if let Some(slot) = self.sheets.get_mut(sheet as usize) {
                *slot = first;
            }
            sheets.push(sheet);
        }
        self.free.extend(sheets.drain(n..));
    }

    /// The block with the number.
    pub(super) fn place(&self, number: u32) -> Option<Place> {
        let first = self.sheets.get((number / SHEET) as usize)?;
        Some(Place {
            run: first.run,
            offset: first.offset + number % SHEET,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_leads_back_to_its_block_while_runs_grow_and_shrink() {
        let mut numbers = Numbers::default();
        let mut runs: Vec<Sheets> = (0..3).map(|_| Sheets::default()).collect();
        let lens = [
            (0, 1),
            (1, 100),
            (0, 16),
            (2, 17),
            (1, 33),
            (0, 40),
            (1, 0),
            (2, 90),
        ];
        let mut now = [0_u32; 3];
        for (run, len) in lens {
            numbers.resize(run, &mut runs[run as usize], len as usize);
            now[run as usize] = len;
            let mut seen = std::collections::HashSet::new();
            for (run, (sheets, len)) in (0..).zip(runs.iter().zip(now)) {
                for (offset, number) in (0..len).zip(sheets.numbers(0)) {
                    assert_eq!(numbers.place(number), Some(Place { run, offset }));
                    assert!(seen.insert(number), "two blocks have the number {number}");
                }
            }
            assert_eq!(seen.len(), now.iter().sum::<u32>() as usize);
        }
        assert_eq!(numbers.sheets.len(), 10, "sheets given back are used again");
    }
}
