//! What is known about which ranges of an export are holes: a map of disjoint runs with a bound on its size.

use std::collections::BTreeMap;
use std::ops::Range;

/// Disjoint runs of bytes, each known to be zero or data.
#[derive(Debug)]
pub(super) struct ExtentMap {
    /// First byte of a run to its end and whether it reads as zeroes. No two neighbours of one kind touch.
    runs: BTreeMap<u64, (u64, bool)>,
    limit: usize,
}

impl ExtentMap {
    /// A map that forgets rather than hold more than `limit` runs.
    pub(super) fn new(limit: usize) -> Self {
        Self { runs: BTreeMap::new(), limit }
    }

    /// How far from `offset` the kind of bytes is the same (the end of the run), and whether they are zeroes.
    pub(super) fn get(&self, offset: u64) -> Option<(u64, bool)> {
        let (_, &(end, zero)) = self.runs.range(..=offset).next_back()?;
        (end > offset).then_some((end, zero))
    }

    /// Forgets what is known of a range.
    pub(super) fn forget(&mut self, range: Range<u64>) {
        if range.is_empty() {
            return;
        }
        if let Some((&start, &(end, zero))) = self.runs.range(..range.start).next_back()
            && end > range.start
        {
            self.runs.insert(start, (range.start, zero));
            if end > range.end {
                self.runs.insert(range.end, (end, zero));
            }
        }
        while let Some((&start, &(end, zero))) = self.runs.range(range.clone()).next() {
            self.runs.remove(&start);
            if end > range.end {
                self.runs.insert(range.end, (end, zero));
            }
        }
    }

    /// Notes the kind of a range, in place of what was known.
    pub(super) fn insert(&mut self, range: Range<u64>, zero: bool) {
        if range.is_empty() {
            return;
        }
        self.forget(range.clone());
        let (mut start, mut end) = (range.start, range.end);
        if let Some((&before, &(before_end, before_zero))) = self.runs.range(..start).next_back()
            && (before_end, before_zero) == (start, zero)
        {
            start = before;
        }
        if let Some(&(after_end, after_zero)) = self.runs.get(&end)
            && after_zero == zero
        {
            self.runs.remove(&end);
            end = after_end;
        }
        self.runs.insert(start, (end, zero));
        while self.runs.len() > self.limit {
            // Whoever walks an export needs what is near; the far end goes.
            let first = self.runs.first_key_value().map(|(&first, _)| first);
            let last = self.runs.last_key_value().map(|(&last, _)| last);
            let (Some(first), Some(last)) = (first, last) else { return };
            let victim = if start - first >= last.saturating_sub(start) { first } else { last };
            self.runs.remove(&victim);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SIZE: u64 = 48;

    #[derive(Debug, Clone)]
    enum Step {
        Insert(Range<u64>, bool),
        Forget(Range<u64>),
    }

    fn step() -> impl Strategy<Value = Step> {
        let range = (0..=SIZE, 0..=SIZE).prop_map(|(a, b)| a.min(b)..a.max(b));
        (range, 0..3).prop_map(|(range, what)| match what {
            0 => Step::Insert(range, true),
            1 => Step::Insert(range, false),
            _ => Step::Forget(range),
        })
    }

    proptest! {
        #[test]
        fn it_knows_what_a_byte_map_knows(steps in prop::collection::vec(step(), 1..40)) {
            let mut map = ExtentMap::new(usize::MAX);
            let mut bytes = [None; SIZE as usize];
            for step in steps {
                match step {
                    Step::Insert(range, zero) => {
                        bytes[range.start as usize..range.end as usize].fill(Some(zero));
                        map.insert(range, zero);
                    }
                    Step::Forget(range) => {
                        bytes[range.start as usize..range.end as usize].fill(None);
                        map.forget(range);
                    }
                }
                for (at, &known) in bytes.iter().enumerate() {
                    let run = bytes[at..].iter().take_while(|&&other| other == known).count();
                    let expected = known.map(|zero| ((at + run) as u64, zero));
                    prop_assert_eq!(map.get(at as u64), expected);
                }
            }
        }

        #[test]
        fn it_stays_within_its_limit_and_keeps_the_newest(starts in prop::collection::vec(0..1000_u64, 1..60)) {
            let mut map = ExtentMap::new(5);
            for start in starts {
                map.insert(start * 3..start * 3 + 1, start % 2 == 0);
                prop_assert!(map.runs.len() <= 5);
                prop_assert_eq!(map.get(start * 3), Some((start * 3 + 1, start % 2 == 0)));
            }
        }
    }
}
