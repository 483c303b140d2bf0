//! A run: consecutive blocks of one prompt, stored side by side, and who holds which part of it.

use smallvec::SmallVec;

use crate::kvcache::block::BlockKey;

/// Capacity is given back once less than one part in this many is used.
const SHRINK_BELOW: usize = 4;

/// Blocks `start..end` of a run are held by a column, in one tier and cache group, in equally many
/// copies, 255 standing for more. A prefix, whatever its length, is one span.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Span {
    pub(super) column: u32,
    pub(super) start: u32,
    pub(super) end: u32,
    pub(super) tier: u8,
    pub(super) group: u8,
    pub(super) copies: u8,
}

/// A request was sent to the column, which will hold `start..end` unless the deadline passes first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Expected {
    pub(super) column: u32,
    pub(super) start: u32,
    pub(super) end: u32,
    pub(super) deadline_ms: u64,
}

/// Which copies an event is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Plane {
    pub(super) column: u32,
    pub(super) tier: u8,
    pub(super) group: u8,
}

impl Span {
    pub(super) fn plane(&self) -> Plane {
        Plane {
            column: self.column,
            tier: self.tier,
            group: self.group,
        }
    }

    fn part(&self, start: u32, end: u32, copies: u8) -> Self {
        Self {
            start,
            end,
            copies,
            ..*self
        }
    }
}

/// Consecutive blocks. Every key commits to the blocks before it, so a run is entered at its first
/// block only, and two lists that agree at one place agree before it.
#[derive(Debug, Default)]
#[repr(align(64))]
pub(super) struct Run {
    pub(super) keys: Vec<BlockKey>,
    /// Ordered by plane, then start; spans of a plane do not overlap.
    pub(super) spans: Vec<Span>,
    /// Ordered by column. They change seldom, and a run is one line of the processors' caches.
    pub(super) expected: Box<[Expected]>,
}

impl Run {
    /// How many keys of `wanted` the run has from `offset` on, in order. Cost: one comparison when all of
    /// them agree, else logarithmic.
    pub(super) fn common(&self, offset: usize, wanted: &[BlockKey]) -> usize {
        let own = self.keys.get(offset..).unwrap_or_default();
        let n = own.len().min(wanted.len());
        let same = |i: usize| own.get(i).zip(wanted.get(i)).is_some_and(|(a, b)| a == b);
        if n == 0 || same(n - 1) {
            return n;
        }
        let (mut agreed, mut differs) = (0, n - 1);
        while agreed < differs {
            let middle = agreed.midpoint(differs);
            if same(middle) {
                agreed = middle + 1;
            } else {
                differs = middle;
            }
        }
        agreed
    }

    /// One more copy of `start..end`.
    pub(super) fn store(&mut self, plane: Plane, start: u32, end: u32, idempotent: bool) {
        let (from, to) = self.of_plane(plane);
        let new = Span {
            column: plane.column,
            start,
            end,
            tier: plane.tier,
            group: plane.group,
            copies: 1,
        };
        if let Some(last) = self.spans.get_mut(from..to).and_then(<[Span]>::last_mut) {
            if last.end == start && last.copies == 1 {
                last.end = end;
                return;
            }
        } else {
            self.spans.insert(from, new);
            return;
        }
        let mut spans = Spans::default();
        let mut cursor = start;
        for old in self.spans.get(from..to).unwrap_or_default() {
            if old.start >= end && cursor < end {
                spans.push(new.part(cursor, end, 1));
                cursor = end;
            }
            if old.end <= start || old.start >= end {
                spans.push(*old);
                continue;
            }
            let more = u8::from(!idempotent);
            let copies = old.copies.saturating_add(more);
            spans.push(new.part(cursor, old.start, 1));
            spans.push(old.part(old.start, start, old.copies));
            spans.push(old.part(old.start.max(start), old.end.min(end), copies));
            spans.push(old.part(end, old.end, old.copies));
            cursor = old.end.min(end);
        }
        spans.push(new.part(cursor, end, 1));
        self.spans.splice(from..to, spans.0);
    }

    /// One copy less of the block at `offset`; false when there is none.
    pub(super) fn remove(&mut self, plane: Plane, offset: u32) -> bool {
        let (from, to) = self.of_plane(plane);
        let own = self.spans.get(from..to).unwrap_or_default();
        let at = from + own.partition_point(|span| span.end <= offset);
        let Some(span) = self.spans.get(at).copied() else {
            return false;
        };
        if at >= to || span.start > offset {
            return false;
        }
        let end = offset + 1;
        if span.copies == 1 && span.end == end && span.start < offset {
            if let Some(span) = self.spans.get_mut(at) {
                span.end = offset;
            }
            return true;
        }
        let mut spans = Spans::default();
        for old in self.spans.get(from..at).unwrap_or_default() {
            spans.push(*old);
        }
        spans.push(span.part(span.start, offset, span.copies));
        if span.copies > 1 {
            spans.push(span.part(offset, end, span.copies - 1));
        }
        spans.push(span.part(end, span.end, span.copies));
        for old in self.spans.get(at + 1..to).unwrap_or_default() {
            spans.push(*old);
        }
        self.spans.splice(from..to, spans.0);
        true
    }

    /// The column has a copy of the block at `offset` in the plane.
    pub(super) fn has(&self, plane: Plane, offset: u32) -> bool {
        let (from, to) = self.of_plane(plane);
        let own = self.spans.get(from..to).unwrap_or_default();
        let at = own.partition_point(|span| span.end <= offset);
        own.get(at).is_some_and(|span| span.start <= offset)
    }

    /// The column has at least one copy of the block at `offset`.
    pub(super) fn holds(&self, column: u32, offset: u32) -> bool {
        self.of_column(column)
            .iter()
            .any(|span| span.start <= offset && offset < span.end)
    }

    /// The column's spans.
    pub(super) fn of_column(&self, column: u32) -> &[Span] {
        let from = self.spans.partition_point(|span| span.column < column);
        let own = self.spans.get(from..).unwrap_or_default();
        let n = own.partition_point(|span| span.column == column);
        own.get(..n).unwrap_or_default()
    }

    /// Adds a prediction in place of those of its column that it covers and outlives.
    pub(super) fn expect(&mut self, new: Expected) {
        self.change_expected(|expected| {
            expected.retain(|old| {
                old.column != new.column
                    || old.start < new.start
                    || old.end > new.end
                    || old.deadline_ms > new.deadline_ms
            });
            insert(expected, new);
        });
    }

    /// The column's predictions.
    pub(super) fn expected_of(&self, column: u32) -> &[Expected] {
        let from = self.expected.partition_point(|e| e.column < column);
        let own = self.expected.get(from..).unwrap_or_default();
        let n = own.partition_point(|e| e.column == column);
        own.get(..n).unwrap_or_default()
    }

    fn change_expected(&mut self, change: impl FnOnce(&mut Vec<Expected>)) {
        let mut expected = std::mem::take(&mut self.expected).into_vec();
        change(&mut expected);
        self.expected = expected.into();
    }

    /// Predictions for `start..end` of the column came true.
    pub(super) fn confirm(&mut self, column: u32, start: u32, end: u32) {
        self.change_expected(|list| {
            let mut rest: SmallVec<[Expected; 2]> = SmallVec::new();
            list.retain_mut(|expected| {
                if expected.column != column || expected.end <= start || expected.start >= end {
                    return true;
                }
                let old = *expected;
                expected.end = old.end.min(start);
                if old.end > end {
                    rest.push(Expected { start: end, ..old });
                }
                expected.start < expected.end
            });
            for expected in rest {
                insert(list, expected);
            }
        });
    }

    /// Nothing of the column is here.
    pub(super) fn lacks(&self, column: u32) -> bool {
        self.of_column(column).is_empty() && self.expected_of(column).is_empty()
    }

    /// Forgets the column.
    pub(super) fn clear(&mut self, column: u32) {
        let from = self.spans.partition_point(|span| span.column < column);
        let to = self.spans.partition_point(|span| span.column <= column);
        self.spans.drain(from..to);
        self.change_expected(|list| list.retain(|expected| expected.column != column));
    }

    /// Forgets what the column holds in the tier.
    pub(super) fn clear_tier(&mut self, column: u32, tier: u8) {
        self.spans
            .retain(|span| span.column != column || span.tier != tier);
    }

    /// Drops predictions whose deadline has passed.
    pub(super) fn expire(&mut self, now_ms: u64) {
        self.change_expected(|list| list.retain(|expected| expected.deadline_ms > now_ms));
    }

    /// Blocks up to the last one somebody holds or is expected to hold.
    pub(super) fn held(&self) -> usize {
        let spans = self.spans.iter().map(|span| span.end);
        let expected = self.expected.iter().map(|expected| expected.end);
        spans.chain(expected).max().unwrap_or(0) as usize
    }

    /// Cuts the run to `len` blocks.
    pub(super) fn truncate(&mut self, len: usize) {
        shorten(&mut self.keys, len);
    }

    fn of_plane(&self, plane: Plane) -> (usize, usize) {
        let from = self.spans.partition_point(|span| span.plane() < plane);
        let own = self.spans.get(from..).unwrap_or_default();
        (
            from,
            from + own.partition_point(|span| span.plane() == plane),
        )
    }
}

/// Adds a prediction behind those of its column.
fn insert(list: &mut Vec<Expected>, expected: Expected) {
    let at = list.partition_point(|e| e.column <= expected.column);
    list.insert(at, expected);
}

/// Truncates, and gives memory back once most of it is unused.
pub(super) fn shorten<T>(list: &mut Vec<T>, len: usize) {
    list.truncate(len);
    if list.capacity() / SHRINK_BELOW > len {
        list.shrink_to(2 * len);
    }
}

/// Spans of one plane being put together in order; neighbours with equally many copies become one.
#[derive(Default)]
struct Spans(SmallVec<[Span; 8]>);

impl Spans {
    fn push(&mut self, span: Span) {
        if span.start >= span.end {
            return;
        }
        match self.0.last_mut() {
            Some(last) if last.end == span.start && last.copies == span.copies => {
                last.end = span.end;
            }
            _ => self.0.push(span),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLANE: Plane = Plane {
        column: 3,
        tier: 0,
        group: 0,
    };

    fn shape(run: &Run) -> Vec<(u32, u32, u8)> {
        run.spans
            .iter()
            .map(|s| (s.start, s.end, s.copies))
            .collect()
    }

    #[test]
    fn prefix_growth_stays_one_span() {
        let mut run = Run::default();
        run.store(PLANE, 0, 4, false);
        run.store(PLANE, 4, 5, false);
        assert_eq!(shape(&run), [(0, 5, 1)]);
        assert!(run.remove(PLANE, 4));
        assert_eq!(shape(&run), [(0, 4, 1)]);
    }

    #[test]
    fn copies_are_counted_where_they_overlap() {
        let mut run = Run::default();
        run.store(PLANE, 2, 4, false);
        run.store(PLANE, 6, 8, false);
        run.store(PLANE, 0, 7, false);
        assert_eq!(
            shape(&run),
            [(0, 2, 1), (2, 4, 2), (4, 6, 1), (6, 7, 2), (7, 8, 1)]
        );
        assert!(run.remove(PLANE, 2) && run.remove(PLANE, 3) && run.remove(PLANE, 6));
        assert_eq!(shape(&run), [(0, 8, 1)]);
        assert!(run.remove(PLANE, 3));
        assert!(!run.remove(PLANE, 3));
        assert_eq!(shape(&run), [(0, 3, 1), (4, 8, 1)]);
    }

    #[test]
    fn copies_stop_at_255_and_idempotent_stores_do_not_count() {
        let mut run = Run::default();
        for _ in 0..300 {
            run.store(PLANE, 0, 1, false);
        }
        assert_eq!(shape(&run), [(0, 1, 255)]);
        let mut run = Run::default();
        for _ in 0..3 {
            run.store(PLANE, 0, 2, true);
        }
        assert_eq!(shape(&run), [(0, 2, 1)]);
    }

    #[test]
    fn common_prefix_ends_at_the_first_difference() {
        let run = Run {
            keys: (0..100).map(BlockKey).collect(),
            ..Run::default()
        };
        for n in 0..=100_u64 {
            let wanted: Vec<_> = (0..n).chain(1000..1010).map(BlockKey).collect();
            assert_eq!(run.common(0, &wanted) as u64, n);
        }
        let wanted: Vec<_> = (40..60).map(BlockKey).collect();
        assert_eq!(run.common(40, &wanted), 20);
        assert_eq!(run.common(200, &wanted), 0);
    }

    #[test]
    fn a_prediction_replaces_those_it_covers_and_outlives() {
        let mut run = Run::default();
        let expected = |column, end, deadline_ms| Expected {
            column,
            start: 0,
            end,
            deadline_ms,
        };
        for new in [
            (5, 4, 1),
            (3, 9, 2),
            (5, 8, 2),
            (5, 8, 3),
            (5, 6, 4),
            (5, 6, 3),
        ] {
            run.expect(expected(new.0, new.1, new.2));
        }
        let kept = [
            expected(3, 9, 2),
            expected(5, 8, 3),
            expected(5, 6, 4),
            expected(5, 6, 3),
        ];
        assert_eq!(*run.expected, kept);
        assert_eq!(run.expected_of(5), &kept[1..]);
        assert!(run.expected_of(4).is_empty());
    }

    #[test]
    fn confirmed_predictions_leave_their_ends() {
        let mut run = Run::default();
        let expected = |start, end| Expected {
            column: 3,
            start,
            end,
            deadline_ms: 9,
        };
        run.expect(expected(0, 10));
        run.confirm(3, 4, 6);
        assert_eq!(*run.expected, [expected(0, 4), expected(6, 10)]);
        run.confirm(3, 0, 10);
        assert!(run.expected.is_empty());
    }
}
