//! The one source of chance of a simulated run.

use rand::rngs::SmallRng;
use rand::{Rng as _, SeedableRng};
use std::cell::RefCell;
use std::ops::Range;
use std::rc::Rc;
use std::time::Duration;

/// A seeded generator that is shared by cloning it: everything in a run draws from one sequence.
#[derive(Clone)]
pub struct Rng(Rc<RefCell<SmallRng>>);

impl Rng {
    /// The generator of a run.
    pub fn new(seed: u64) -> Self {
        Self(Rc::new(RefCell::new(SmallRng::seed_from_u64(seed))))
    }

    /// Any number of the range, which is not empty.
    pub fn range(&self, range: Range<u64>) -> u64 {
        self.0.borrow_mut().random_range(range)
    }

    /// An index of a list of `len` entries, which is not empty.
    pub fn index(&self, len: usize) -> usize {
        self.0.borrow_mut().random_range(0..len)
    }

    /// True once in `n` times.
    pub fn one_in(&self, n: u64) -> bool {
        n > 0 && self.range(0..n) == 0
    }

    /// True with probability `p` (0 to 1).
    pub fn chance(&self, p: f64) -> bool {
        p > 0.0 && self.0.borrow_mut().random_bool(p.min(1.0))
    }

    /// One of the entries.
    pub fn pick<'a, T>(&self, of: &'a [T]) -> &'a T {
        &of[self.index(of.len())]
    }

    /// A time between the two, both included.
    pub fn duration(&self, least: Duration, most: Duration) -> Duration {
        let nanos = u64::try_from((most.saturating_sub(least)).as_nanos()).unwrap_or(u64::MAX - 1);
        least + Duration::from_nanos(self.range(0..nanos + 1))
    }

    /// A range of bytes within `0..size`, 1 to `most` long; one in four begins and ends on multiples of `unit` if that fits.
    pub fn byte_range(&self, size: u64, most: u64, unit: u64) -> Range<u64> {
        let start = self.range(0..size);
        let end = (start + self.range(1..most + 1)).min(size);
        let (low, high) = (start / unit * unit, end / unit * unit);
        if low < high && self.one_in(4) { low..high } else { start..end }
    }
}
