//! What the demonstration's disk must hold, byte for byte, without holding it: every byte follows from its offset and from the
//! number of the write that put it there.

use std::collections::BTreeMap;
use std::ops::Range;

/// Where bytes come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fill {
    /// Zeroes.
    Zero,
    /// Pseudo-random bytes that depend on this number and on the offset.
    Seed(u64),
}

impl Fill {
    /// The bytes at `offset`.
    pub fn fill(self, offset: u64, buf: &mut [u8]) {
        let Fill::Seed(seed) = self else { return buf.fill(0) };
        let mut offset = offset;
        let mut buf = buf;
        while !buf.is_empty() {
            let word = word(seed, offset / 8).to_le_bytes();
            let skip = (offset % 8) as usize;
            let len = buf.len().min(8 - skip);
            let (now, rest) = buf.split_at_mut(len);
            now.copy_from_slice(&word[skip..skip + len]);
            offset += len as u64;
            buf = rest;
        }
    }
}

/// Eight bytes that are never all zero: the last is odd.
fn word(seed: u64, index: u64) -> u64 {
    let mut x = seed ^ index.wrapping_mul(0x9E37_79B9_7F4A_7C15);
    x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    (x ^ (x >> 31)) | 1
}

/// The unit in which the source's contents change their kind, in bytes: no multiple of a cluster, so that kinds meet within clusters.
const PIECE: u64 = 1_200_000;

/// The source: runs of data, of zeroes written as data, and of holes.
#[derive(Debug, Clone, Copy)]
pub struct Source {
    /// Its size in bytes.
    pub size: u64,
    /// What its contents depend on.
    pub seed: u64,
}

/// What a run of the source is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Bytes that mean something.
    Data,
    /// Zero bytes that the source stores all the same.
    WrittenZeroes,
    /// Nothing.
    Hole,
}

impl Source {
    /// The runs of the source in order.
    pub fn pieces(self) -> impl Iterator<Item = (Range<u64>, Kind)> {
        (0..self.size.div_ceil(PIECE)).map(move |index| {
            let range = index * PIECE..((index + 1) * PIECE).min(self.size);
            (range, self.kind(index))
        })
    }

    /// 5 of 8 pieces hold data, 1 written zeroes, 2 nothing.
    fn kind(self, index: u64) -> Kind {
        match word(self.seed ^ 0x5EED, index) >> 32 & 7 {
            0..5 => Kind::Data,
            5 => Kind::WrittenZeroes,
            _ => Kind::Hole,
        }
    }

    /// The bytes at `offset`, which lie within the source.
    pub fn fill(self, offset: u64, buf: &mut [u8]) {
        let mut offset = offset;
        let mut buf = buf;
        while !buf.is_empty() {
            let index = offset / PIECE;
            let len = ((index + 1) * PIECE - offset).min(buf.len() as u64);
            let (now, rest) = buf.split_at_mut(len as usize);
            match self.kind(index) {
                Kind::Data => Fill::Seed(self.seed).fill(offset, now),
                Kind::WrittenZeroes | Kind::Hole => now.fill(0),
            }
            offset += len;
            buf = rest;
        }
    }
}

/// The source with what was written over it.
#[derive(Debug, Clone)]
pub struct Model {
    source: Source,
    /// Start to end and contents of what was written; the ranges don't overlap.
    written: BTreeMap<u64, (u64, Fill)>,
}

impl Model {
    /// Nothing has been written yet.
    pub fn new(source: Source) -> Self {
        Self { source, written: BTreeMap::new() }
    }

    /// Notes that `range` now holds `fill`.
    pub fn write(&mut self, range: Range<u64>, fill: Fill) {
        let overlapping: Vec<(u64, u64, Fill)> = self
            .written
            .range(..range.end)
            .rev()
            .take_while(|(_, (end, _))| *end > range.start)
            .map(|(start, (end, fill))| (*start, *end, *fill))
            .collect();
        for (start, end, old) in overlapping {
            self.written.remove(&start);
            if start < range.start {
                self.written.insert(start, (range.start, old));
            }
            if end > range.end {
                self.written.insert(range.end, (end, old));
            }
        }
        self.written.insert(range.start, (range.end, fill));
    }

    /// What the disk must hold at `offset`.
    pub fn expect(&self, offset: u64, buf: &mut [u8]) {
        self.source.fill(offset, buf);
        let end = offset + buf.len() as u64;
        for (start, (stop, fill)) in
            self.written.range(..end).rev().take_while(|(_, (stop, _))| *stop > offset)
        {
            let part = (*start).max(offset)..(*stop).min(end);
            fill.fill(part.start, &mut buf[(part.start - offset) as usize..(part.end - offset) as usize]);
        }
    }

    /// Takes over what `other`, which has the same source, saw written. The two must have written different places.
    pub fn merge(&mut self, other: &Model) {
        for (start, (end, fill)) in &other.written {
            self.write(*start..*end, *fill);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::{Rng, SeedableRng, rngs::StdRng};

    #[test]
    fn the_model_agrees_with_a_plain_array() {
        let source = Source { size: 3_000_000, seed: 7 };
        let mut array = vec![0; source.size as usize];
        source.fill(0, &mut array);
        let mut model = Model::new(source);
        let mut rng = StdRng::seed_from_u64(1);
        for step in 0..500 {
            let start = rng.random_range(0..source.size);
            let end = rng.random_range(start..=source.size.min(start + 200_000));
            let fill = if step % 3 == 0 { Fill::Zero } else { Fill::Seed(step) };
            fill.fill(start, &mut array[start as usize..end as usize]);
            if start < end {
                model.write(start..end, fill);
            }
        }
        let mut all = vec![1; array.len()];
        model.expect(0, &mut all);
        assert!(all == array);
        let mut part = vec![1; 12345];
        model.expect(777_777, &mut part);
        assert!(part == array[777_777..777_777 + 12345]);
    }

    #[test]
    fn the_source_has_runs_of_each_kind() {
        let source = Source { size: 64 << 20, seed: 1 };
        let of = |kind| source.pieces().filter(|(_, k)| *k == kind).count();
        assert!(of(Kind::Data) > of(Kind::Hole) && of(Kind::Hole) > 0 && of(Kind::WrittenZeroes) > 0);
        assert_eq!(source.pieces().last().map(|(range, _)| range.end), Some(source.size));
    }
}
