//! What lseek said lately about data and holes, so that walking over a file costs two calls an extent, not two a question.

use std::ops::Range;

/// How many extents are remembered: one for each of a few walks at once.
const REMEMBERED: usize = 8;

/// A run of bytes that is all data or all hole.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Run {
    pub(super) range: Range<u64>,
    pub(super) hole: bool,
}

/// The extents that were looked up last, less what was changed since.
#[derive(Debug, Default)]
pub(super) struct Holes {
    runs: Vec<Run>,
    /// Where the next run goes when all places are taken.
    next: usize,
    changes: u64,
}

impl Holes {
    /// The remembered run that `offset` lies in.
    pub(super) fn find(&self, offset: u64) -> Option<Run> {
        self.runs.iter().find(|run| run.range.contains(&offset)).cloned()
    }

    /// How many changes were told of so far: who looks up a run compares it before and after.
    pub(super) fn changes(&self) -> u64 {
        self.changes
    }

    /// Remembers a run that was looked up when [`Holes::changes`] was `asked_at`. Nothing is remembered, and false comes back, if
    /// anything was changed since: the answer may be older than the change.
    pub(super) fn remember(&mut self, run: Run, asked_at: u64) -> bool {
        if self.changes != asked_at {
            return false;
        }
        if run.range.is_empty() {
            return true;
        }
        if self.runs.len() < REMEMBERED {
            self.runs.push(run);
        } else {
            self.runs[self.next] = run;
            self.next = (self.next + 1) % REMEMBERED;
        }
        true
    }

    /// A change of `range` begins or ends.
    pub(super) fn change(&mut self, range: &Range<u64>) {
        self.changes += 1;
        self.runs.retain(|run| run.range.end <= range.start || range.end <= run.range.start);
        self.next = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(range: Range<u64>) -> Run {
        Run { range, hole: true }
    }

    #[test]
    fn a_change_forgets_what_it_touches() {
        let mut holes = Holes::default();
        assert!(holes.remember(run(0..100), 0));
        assert!(holes.remember(run(100..200), 0));
        holes.change(&(150..160));
        assert_eq!(holes.find(50), Some(run(0..100)));
        assert_eq!(holes.find(120), None);
    }

    #[test]
    fn an_answer_older_than_a_change_is_not_kept() {
        let mut holes = Holes::default();
        let asked_at = holes.changes();
        holes.change(&(0..10));
        assert!(!holes.remember(run(0..100), asked_at));
        assert_eq!(holes.find(50), None);
    }

    #[test]
    fn memory_is_bounded() {
        let mut holes = Holes::default();
        for i in 0..100 {
            assert!(holes.remember(run(i * 10..i * 10 + 10), 0));
        }
        assert_eq!(holes.runs.len(), REMEMBERED);
        assert_eq!(holes.find(995), Some(run(990..1000)));
    }
}
