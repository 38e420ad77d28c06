//! Which parts of a disk have changed since somebody looked: what a job follows that copies a disk in use.
//!
//! # Why no change is lost
//! - A change marks its range **after it has ended**, whether it succeeded or failed.
//! - The copier **clears a part, and then looks at it**: at its status, then at its data.
//!
//! Let a change end at E, and mark at M, not before E. Let the copier clear the part at C and look at it at L, after C. If L is after E, the
//! copier has seen the change. Otherwise C is before L, L before E, and E not after M: the mark is set after it was cleared, the part
//! is dirty again, and the copier will come back. So whenever the map is clean, no change runs, and all that was taken has been copied,
//! the copy equals the disk. It needs no lock that a guest would wait for.
//!
//! # Memory
//! One bit for each granule. Granules are as large as asked for, and larger on a disk of which the bits would need more than 1 MiB.

use std::cell::{Cell, RefCell};
use std::ops::Range;
use std::task::{Context, Poll, Waker};

/// The most granules that a map tells apart: 1 MiB of bits.
const MOST_GRANULES: u64 = 1 << 23;

/// The bits of a word.
const WORD: u64 = u64::BITS as u64;

/// A map of what has changed; see the module.
pub struct DirtyMap {
    size: u64,
    granularity: u64,
    words: RefCell<Vec<u64>>,
    /// How many granules are dirty.
    dirty: Cell<u64>,
    waiting: RefCell<Vec<Waker>>,
}

impl DirtyMap {
    /// A clean map of `size` bytes with granules of at least `granularity` bytes, rounded up to a power of two.
    pub fn new(size: u64, granularity: u64) -> Self {
        let least = size.div_ceil(MOST_GRANULES).max(granularity).max(1);
        let granularity = least.checked_next_power_of_two().unwrap_or(1 << 63);
        let words = size.div_ceil(granularity).div_ceil(WORD);
        Self {
            size,
            granularity,
            words: RefCell::new(vec![0; words as usize]),
            dirty: Cell::new(0),
            waiting: RefCell::default(),
        }
    }

    /// The size of a granule in bytes.
    pub fn granularity(&self) -> u64 {
        self.granularity
    }

    /// How many bytes are dirty, in whole granules.
    pub fn bytes(&self) -> u64 {
        self.dirty.get().saturating_mul(self.granularity).min(self.size)
    }

    /// True if nothing is dirty.
    pub fn is_clean(&self) -> bool {
        self.dirty.get() == 0
    }

    /// Marks the granules that `range` touches; what of it lies past the end is left out.
    pub fn mark(&self, range: Range<u64>) {
        let range = range.start..range.end.min(self.size);
        if range.is_empty() {
            return;
        }
        let end = range.end.div_ceil(self.granularity);
        let mut at = range.start / self.granularity;
        let mut words = self.words.borrow_mut();
        while at < end {
            let until = end.min((at / WORD + 1) * WORD);
            let word = &mut words[(at / WORD) as usize];
            let mask = (u64::MAX >> (WORD - (until - at))) << (at % WORD);
            self.dirty.set(self.dirty.get() + u64::from((mask & !*word).count_ones()));
            *word |= mask;
            at = until;
        }
        drop(words);
        for waker in self.waiting.take() {
            waker.wake();
        }
    }

    /// Clears the first dirty run at or after `from`, and gives its bytes: no more than `most` of them, but at least one granule.
    pub fn take(&self, from: u64, most: u64) -> Option<Range<u64>> {
        let from = from.checked_next_multiple_of(self.granularity)?;
        let run = self.first(from..self.size, most)?;
        self.clear(run.clone());
        Some(run)
    }

    /// The first dirty run in the granules that `range` (if it isn't empty) touches, in whole granules: no more than `most` bytes of it, but at least one
    /// granule.
    pub fn first(&self, range: Range<u64>, most: u64) -> Option<Range<u64>> {
        if range.is_empty() {
            return None;
        }
        let words = self.words.borrow();
        let end = range.end.min(self.size).div_ceil(self.granularity);
        let start = find(&words, range.start / self.granularity, end, true)?;
        let end = end.min(start + (most / self.granularity).max(1));
        let end = find(&words, start, end, false).unwrap_or(end);
        Some(start * self.granularity..end.saturating_mul(self.granularity).min(self.size))
    }

    /// Clears the granules that `range` (if it isn't empty) touches.
    pub fn clear(&self, range: Range<u64>) {
        if range.is_empty() {
            return;
        }
        let end = range.end.min(self.size).div_ceil(self.granularity);
        let mut at = range.start / self.granularity;
        let mut words = self.words.borrow_mut();
        while at < end {
            let until = end.min((at / WORD + 1) * WORD);
            let word = &mut words[(at / WORD) as usize];
            let mask = (u64::MAX >> (WORD - (until - at))) << (at % WORD);
            self.dirty.set(self.dirty.get() - u64::from((mask & *word).count_ones()));
            *word &= !mask;
            at = until;
        }
    }

    /// Ready when something is dirty.
    pub fn poll_dirty(&self, cx: &mut Context<'_>) -> Poll<()> {
        if !self.is_clean() {
            return Poll::Ready(());
        }
        let mut waiting = self.waiting.borrow_mut();
        if !waiting.iter().any(|waker| waker.will_wake(cx.waker())) {
            waiting.push(cx.waker().clone());
        }
        Poll::Pending
    }
}

/// The first granule in `from..end` that is dirty, or that is clean.
fn find(words: &[u64], from: u64, end: u64, dirty: bool) -> Option<u64> {
    let mut at = from;
    while at < end {
        let word = words[(at / WORD) as usize];
        let wanted = if dirty { word } else { !word } >> (at % WORD);
        if wanted != 0 {
            return Some(at + u64::from(wanted.trailing_zeros())).filter(|found| *found < end);
        }
        at = (at / WORD + 1) * WORD;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[derive(Debug, Clone)]
    enum Op {
        Mark(Range<u64>),
        Take(u64, u64),
        First(Range<u64>, u64),
        Clear(Range<u64>),
    }

    fn op() -> impl Strategy<Value = Op> {
        let number = 0..5000_u64;
        prop_oneof![
            (number.clone(), 0..700_u64).prop_map(|(at, len)| Op::Mark(at..at + len)),
            (number.clone(), 1..3000_u64).prop_map(|(from, most)| Op::Take(from, most)),
            (number.clone(), 0..700_u64, 1..3000_u64)
                .prop_map(|(at, len, most)| Op::First(at..at + len, most)),
            (number, 0..700_u64).prop_map(|(at, len)| Op::Clear(at..at + len)),
        ]
    }

    proptest! {
        #[test]
        fn behaves_as_a_list_of_flags(ops in prop::collection::vec(op(), 1..80), size in 1..5000_u64, power in 0..8_u32) {
            let granule = 1 << power;
            let map = DirtyMap::new(size, granule);
            let mut flags = vec![false; size.div_ceil(granule) as usize];
            let touched = |range: &Range<u64>, all: usize| {
                let end = if range.is_empty() { 0 } else { range.end.div_ceil(granule) as usize };
                ((range.start / granule) as usize).min(all)..end.min(all)
            };
            for op in ops {
                match op {
                    Op::Mark(range) => {
                        map.mark(range.clone());
                        for (at, flag) in flags.iter_mut().enumerate() {
                            let start = at as u64 * granule;
                            *flag |= start < range.end.min(size) && range.start < (start + granule).min(size) && !range.is_empty();
                        }
                    }
                    Op::Take(from, most) => {
                        let from_granule = from.div_ceil(granule) as usize;
                        let start = (from_granule..flags.len()).find(|at| flags[*at]);
                        let expected = start.map(|start| {
                            let clean = (start..flags.len()).find(|at| !flags[*at]).unwrap_or(flags.len());
                            let end = clean.min(start + (most / granule).max(1) as usize);
                            flags[start..end].fill(false);
                            start as u64 * granule..(end as u64 * granule).min(size)
                        });
                        prop_assert_eq!(map.take(from, most), expected);
                    }
                    Op::First(range, most) => {
                        let within = touched(&range, flags.len());
                        let start = within.clone().find(|at| flags[*at]);
                        let expected = start.map(|start| {
                            let clean = (start..within.end).find(|at| !flags[*at]).unwrap_or(within.end);
                            let end = clean.min(start + (most / granule).max(1) as usize);
                            start as u64 * granule..(end as u64 * granule).min(size)
                        });
                        prop_assert_eq!(map.first(range, most), expected);
                    }
                    Op::Clear(range) => {
                        for at in touched(&range, flags.len()) {
                            flags[at] = false;
                        }
                        map.clear(range);
                    }
                }
                let dirty = flags.iter().filter(|flag| **flag).count() as u64;
                prop_assert_eq!(map.bytes(), (dirty * granule).min(size));
                prop_assert_eq!(map.is_clean(), dirty == 0);
            }
        }
    }

    #[test]
    fn memory_is_bounded_whatever_the_size() {
        for size in [0, 1, 1 << 40, 1 << 50, u64::MAX] {
            let map = DirtyMap::new(size, 512);
            assert!(map.words.borrow().len() as u64 <= MOST_GRANULES / WORD, "{size}");
            map.mark(0..size);
            assert_eq!(map.bytes(), size);
        }
        assert_eq!(DirtyMap::new(1 << 40, 512).granularity(), 128 << 10);
    }
}
