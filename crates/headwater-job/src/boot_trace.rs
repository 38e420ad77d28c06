//! Boot traces: which parts of a disk a guest reads first, and in which order. Recorded from one guest, they tell a stream what the next one will
//! want.
//!
//! # Format
//! Text, a line for each range that was read for the first time:
//!
//! ```text
//! headwater boot trace 1
//! 0 0 4096
//! 118 1048576 65536
//! ```
//!
//! milliseconds since the recording began, offset and length in bytes of the guest's disk. Lines that begin with `#` are comments. Times are for people;
//! the order is that of the lines.
//!
//! A trace may come from anybody. Its length is bounded; what lies past the disk's end is ignored; and it decides about nothing but the order in which
//! parts are copied.

use headwater_block::disk::ReadWatch;
use headwater_block::{Clock, Error, ErrorKind, Result};
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::ops::Range;
use std::rc::Rc;
use std::time::Duration;

#[cfg(test)]
mod tests;

/// The first line.
const TITLE: &str = "headwater boot trace 1";

/// How many ranges a trace has at most.
const MOST_RANGES: usize = 1 << 16;

/// The longest text that is read, in bytes: what so many lines of the longest numbers take.
pub const MOST_BYTES: u64 = 64 * MOST_RANGES as u64;

/// What is recorded is rounded out to this many bytes: no guest reads less of a disk.
const UNIT: u64 = 4096;

/// An order of ranges; see the [module](self).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct BootTrace {
    entries: Vec<(Duration, Range<u64>)>,
}

impl BootTrace {
    /// Reads a trace.
    ///
    /// # Errors
    /// `InvalidInput` for what isn't one, with the number of the line. The caller adds the name of the file.
    pub fn parse(text: &str) -> Result<Self> {
        let refuse =
            |line: usize, why: &str| Err(Error::new(ErrorKind::InvalidInput, format!("line {line}: {why}")));
        let mut lines = text.lines().enumerate();
        if lines.next().is_none_or(|(_, first)| first.trim_end() != TITLE) {
            return refuse(1, &format!("a boot trace begins with '{TITLE}'"));
        }
        let mut entries = Vec::new();
        for (at, line) in lines {
            if line.trim().is_empty() || line.starts_with('#') {
                continue;
            }
            let numbers: Vec<Option<u64>> =
                line.split_whitespace().take(4).map(|word| word.parse().ok()).collect();
            let &[Some(time), Some(start), Some(len)] = &numbers[..] else {
                return refuse(at + 1, "expected three numbers: milliseconds, offset, length");
            };
            let Some(end) = start.checked_add(len) else {
                return refuse(at + 1, "the range ends past the largest offset");
            };
            if entries.len() == MOST_RANGES {
                return refuse(at + 1, &format!("a boot trace has at most {MOST_RANGES} ranges"));
            }
            entries.push((Duration::from_millis(time), start..end));
        }
        Ok(Self { entries })
    }

    /// The ranges on a disk of `size` bytes in their order, in whole units of `unit` bytes, each part where it comes first, without what lies past the end.
    pub fn ranges(&self, size: u64, unit: u64) -> Vec<Range<u64>> {
        let mut seen = Seen::default();
        let mut ranges: Vec<Range<u64>> = Vec::new();
        for (_, range) in &self.entries {
            let end = range.end.min(size).checked_next_multiple_of(unit).unwrap_or(size).min(size);
            let start = range.start - range.start % unit;
            if start < end {
                for new in seen.add(start..end) {
                    match ranges.last_mut() {
                        Some(last) if last.end == new.start => last.end = new.end,
                        _ => ranges.push(new),
                    }
                }
            }
        }
        ranges
    }

    /// How many ranges there are.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// True if there are none.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }
}

impl std::fmt::Display for BootTrace {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(f, "{TITLE}")?;
        for (time, range) in &self.entries {
            writeln!(f, "{} {} {}", time.as_millis(), range.start, range.end - range.start)?;
        }
        Ok(())
    }
}

/// A set of bytes as ranges that don't touch: their starts, and their ends.
#[derive(Default)]
struct Seen(BTreeMap<u64, u64>);

impl Seen {
    /// Adds a range; returns the parts of it that are new.
    fn add(&mut self, range: Range<u64>) -> Vec<Range<u64>> {
        let mut new = Vec::new();
        let mut whole = range.clone();
        let mut at = range.start;
        // Those that touch it: at most one that begins before, and all that begin within.
        let before = self.0.range(..range.start).next_back().filter(|(_, end)| **end >= range.start);
        let touching: Vec<(u64, u64)> =
            before.into_iter().chain(self.0.range(range.start..=range.end)).map(|(s, e)| (*s, *e)).collect();
        for (start, end) in touching {
            if at < start {
                new.push(at..start.min(range.end));
            }
            at = at.max(end);
            whole = whole.start.min(start)..whole.end.max(end);
            self.0.remove(&start);
        }
        if at < range.end {
            new.push(at..range.end);
        }
        self.0.insert(whole.start, whole.end);
        new.retain(|part| !part.is_empty());
        new
    }
}

/// Records a trace of a disk's guests: give it to [`headwater_block::Disk::watch_reads`].
pub struct BootRecorder {
    clock: Rc<dyn Clock>,
    begun: Duration,
    seen: RefCell<Seen>,
    entries: RefCell<Vec<(Duration, Range<u64>)>>,
    changed: Cell<bool>,
}

impl BootRecorder {
    /// A recording that begins now.
    pub fn new(clock: Rc<dyn Clock>) -> Rc<Self> {
        let begun = clock.now();
        let (seen, entries) = (RefCell::default(), RefCell::default());
        Rc::new(Self { clock, begun, seen, entries, changed: Cell::new(true) })
    }

    /// What was recorded, if that is more than when it was last asked for.
    pub fn take_changed(&self) -> Option<BootTrace> {
        self.changed.replace(false).then(|| BootTrace { entries: self.entries.borrow().clone() })
    }
}

impl ReadWatch for BootRecorder {
    fn reads(&self, range: &Range<u64>) {
        let mut entries = self.entries.borrow_mut();
        // What comes later than so many ranges is no boot.
        if entries.len() >= MOST_RANGES {
            return;
        }
        let end = range.end.checked_next_multiple_of(UNIT).unwrap_or(range.end);
        let now = self.clock.now().saturating_sub(self.begun);
        for new in self.seen.borrow_mut().add(range.start - range.start % UNIT..end) {
            self.changed.set(true);
            match entries.last_mut() {
                Some((_, last)) if last.end == new.start => last.end = new.end,
                // A read adds a few at most.
                _ => entries.push((now, new)),
            }
        }
    }
}
