//! What a guest has asked of the disk, and what may be on the disk after a crash.
//!
//! A change is noted before it is sent, because it may have happened although no answer came, and marked as durable when the answer says so: its own, if it
//! was sent with FUA, or that of a flush that was sent afterwards. After a crash every byte is what the last durable change of it put there, or what a
//! later change did.

use std::collections::BTreeSet;
use std::ops::Range;

/// A change of a part of the disk.
struct Change {
    range: Range<usize>,
    data: Vec<u8>,
    durable: bool,
}

/// The changes of one guest since the disk was last looked at, in their order.
#[derive(Default)]
pub(crate) struct Log(Vec<Change>);

impl Log {
    /// Notes a change that is about to be sent.
    pub(crate) fn begin(&mut self, at: usize, data: Vec<u8>) {
        self.0.push(Change { range: at..at + data.len(), data, durable: false });
    }

    /// The last change was answered, and is durable.
    pub(crate) fn last_is_durable(&mut self) {
        if let Some(last) = self.0.last_mut() {
            last.durable = true;
        }
    }

    /// The last change was a discard: it has zeroed the grains of `grain` bytes that read as zeroes in `found`, and nothing else.
    pub(crate) fn discarded(&mut self, found: &[u8], grain: usize) {
        let Some(Change { range, .. }) = self.0.pop() else { return };
        let mut at = range.start;
        while at < range.end {
            let end = (at - at % grain + grain).min(range.end);
            if found[at - range.start..end - range.start].iter().all(|byte| *byte == 0) {
                self.begin(at, vec![0; end - at]);
            }
            at = end;
        }
    }

    /// A flush was answered: all that was answered before is durable.
    pub(crate) fn flushed(&mut self) {
        self.0.iter_mut().for_each(|change| change.durable = true);
    }

    /// What the disk holds at `range` while it is in use, where `before` is what it held before this log began.
    pub(crate) fn current(&self, before: &[u8], range: Range<usize>) -> Vec<u8> {
        let mut bytes = before[range.clone()].to_vec();
        for change in &self.0 {
            let (start, end) = (change.range.start.max(range.start), change.range.end.min(range.end));
            if start < end {
                bytes[start - range.start..end - range.start]
                    .copy_from_slice(&change.data[start - change.range.start..end - change.range.start]);
            }
        }
        bytes
    }

    /// Compares what was found on the disk after a crash with what may be there, where this guest has changed it. Gives the ranges that it changed.
    pub(crate) fn check(&self, before: &[u8], found: &[u8]) -> Result<Vec<Range<usize>>, String> {
        let cuts: BTreeSet<usize> =
            self.0.iter().flat_map(|change| [change.range.start, change.range.end]).collect();
        let cuts: Vec<usize> = cuts.into_iter().collect();
        let mut changed = Vec::new();
        for cut in cuts.windows(2) {
            let part = cut[0]..cut[1];
            // The later come first, and what came before a durable one is over.
            let covers = |change: &&Change| change.range.start <= part.start && part.end <= change.range.end;
            let mut allowed = Vec::new();
            let mut durable = false;
            for change in self.0.iter().rev().filter(covers) {
                allowed.push(&change.data[part.start - change.range.start..part.end - change.range.start]);
                durable = change.durable;
                if durable {
                    break;
                }
            }
            if allowed.is_empty() {
                continue;
            }
            if !durable {
                allowed.push(&before[part.clone()]);
            }
            changed.push(part.clone());
            let found = &found[part.clone()];
            if allowed.contains(&found) {
                continue;
            }
            for (at, byte) in found.iter().enumerate() {
                if !allowed.iter().any(|bytes| bytes[at] == *byte) {
                    let values: Vec<u8> = allowed.iter().map(|bytes| bytes[at]).collect();
                    return Err(format!(
                        "byte {} is {byte:#04x} and may be one of {values:x?} (durable: {durable})",
                        part.start + at
                    ));
                }
            }
        }
        Ok(changed)
    }
}

#[test]
fn a_crash_may_undo_what_was_not_durable_and_nothing_else() {
    let before = vec![1; 100];
    let disk = |parts: &[(Range<usize>, u8)]| {
        let mut disk = before.clone();
        parts.iter().for_each(|(range, byte)| disk[range.clone()].fill(*byte));
        disk
    };
    let mut log = Log::default();
    log.begin(10, vec![2; 20]);
    for good in [disk(&[]), disk(&[(10..30, 2)]), disk(&[(15..25, 2)])] {
        assert_eq!(log.check(&before, &good).map(|changed| changed[0].clone()), Ok(10..30));
    }
    assert!(log.check(&before, &disk(&[(12..13, 9)])).is_err());
    log.flushed();
    assert!(log.check(&before, &disk(&[])).is_err() && log.check(&before, &disk(&[(10..30, 2)])).is_ok());
    log.begin(20, vec![3; 20]);
    log.last_is_durable();
    log.begin(0, vec![4; 15]);
    assert_eq!(log.current(&before, 12..22), [4, 4, 4, 2, 2, 2, 2, 2, 3, 3]);
    assert!(log.check(&before, &disk(&[(10..20, 2), (20..40, 3)])).is_ok());
    assert!(log.check(&before, &disk(&[(0..15, 4), (15..20, 2), (20..40, 3)])).is_ok());
    assert!(log.check(&before, &disk(&[(10..30, 2), (30..40, 3)])).is_err());
    // Of a discard, what was seen to be zero is, and the rest is what it was.
    log.begin(50, vec![0; 30]);
    log.discarded(&[vec![1; 14], vec![0; 16]].concat(), 8);
    log.flushed();
    let after = disk(&[(0..15, 4), (15..20, 2), (20..40, 3), (64..80, 0)]);
    assert_eq!(log.check(&before, &after).map(|changed| changed.last().cloned()), Ok(Some(72..80)));
    assert!(log.check(&before, &disk(&[(0..15, 4), (15..20, 2), (20..40, 3), (64..79, 0)])).is_err());
}
