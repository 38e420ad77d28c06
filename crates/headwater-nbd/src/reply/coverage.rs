//! Whether the chunks of a structured read reply cover the read, exactly once.

use std::ops::Range;

use crate::error::ProtocolError;

/// Tracks which bytes of one read were answered. A server must answer each byte once, in any order; one that answers
/// less would leave old bytes in the caller's buffer, and one that answers beyond would write outside it.
#[derive(Clone, Debug)]
pub struct ReadCoverage {
    offset: u64,
    length: u32,
    /// Answered ranges relative to `offset`: sorted, disjoint, none touching the next. Servers answer in order, so
    /// this is one range nearly always.
    answered: Vec<Range<u32>>,
}

impl ReadCoverage {
    /// Nothing of the read of `length` bytes at `offset` is answered.
    pub fn new(offset: u64, length: u32) -> Self {
        Self { offset, length, answered: Vec::new() }
    }

    /// Records a data or hole chunk and says where in the read's buffer it belongs.
    ///
    /// # Errors
    /// [`ProtocolError::Malformed`] if the chunk reaches outside the read or overlaps an earlier chunk. The chunk is
    /// not recorded and must not be stored.
    pub fn answer(&mut self, offset: u64, length: u32) -> Result<Range<usize>, ProtocolError> {
        let start = offset.checked_sub(self.offset).and_then(|start| u32::try_from(start).ok());
        let range = start.and_then(|start| Some(start..start.checked_add(length)?));
        let Some(range) = range.filter(|range| range.end <= self.length && !range.is_empty()) else {
            return Err(self.malformed(offset, length, "is not inside the read"));
        };
        let next = self.answered.partition_point(|known| known.start < range.start);
        let overlaps_next = self.answered.get(next).is_some_and(|known| known.start < range.end);
        let previous = next.checked_sub(1);
        let previous_end = previous.map(|index| self.answered[index].end);
        if overlaps_next || previous_end.is_some_and(|end| end > range.start) {
            return Err(self.malformed(offset, length, "was answered before"));
        }
        let joins_next = self.answered.get(next).is_some_and(|known| known.start == range.end);
        match (previous.filter(|_| previous_end == Some(range.start)), joins_next) {
            (Some(previous), true) => {
                self.answered[previous].end = self.answered[next].end;
                self.answered.remove(next);
            }
            (Some(previous), false) => self.answered[previous].end = range.end,
            (None, true) => self.answered[next].start = range.start,
            (None, false) => self.answered.insert(next, range.clone()),
        }
        Ok(range.start as usize..range.end as usize)
    }

    /// Whether every byte was answered.
    pub fn is_complete(&self) -> bool {
        self.length == 0 || self.answered.first() == Some(&(0..self.length))
    }

    /// To be called when the last chunk has come.
    ///
    /// # Errors
    /// [`ProtocolError::Malformed`] naming the first byte that was not answered.
    pub fn finish(&self) -> Result<(), ProtocolError> {
        if self.is_complete() {
            return Ok(());
        }
        let missing = match self.answered.first() {
            Some(first) if first.start == 0 => first.end,
            _ => 0,
        };
        let at = self.offset.saturating_add(missing.into());
        Err(self.malformed(at, 1, "was not answered"))
    }

    fn malformed(&self, offset: u64, length: u32, what: &str) -> ProtocolError {
        let (read, asked) = (self.offset, self.length);
        let why = format!("range {offset}+{length} {what} (of {asked} bytes at {read})");
        ProtocolError::malformed("the reply to a read", why)
    }
}
