//! The two tables that are wholly in memory: the active L1 table and the refcount table.

use headwater_block::{Buffer, BufferMut, Node, Result};
use std::collections::BTreeSet;

/// The largest read or write of a part of a table, in bytes.
const MAX_PIECE: usize = 1 << 20;

/// A table of 64-bit entries, with a memory of which parts of it must be written.
pub(super) struct Table {
    /// Where it lies in the file, in bytes.
    pub(super) offset: u64,
    entries: Vec<u64>,
    /// How many of the entries lie within the table that is at `offset`; more exist while the table grows.
    stored: usize,
    /// Blocks of `block` bytes that differ from what is on the disk.
    dirty: BTreeSet<usize>,
    /// The unit of writing in bytes: a sector, or what the file needs.
    block: usize,
    /// Where the table was before it moved, until the header that points to its new place is durable: offset and length in bytes.
    moved_from: Vec<(u64, u64)>,
}

/// A piece of a table to be written.
pub(super) type Piece = (u64, Buffer);

impl Table {
    /// Reads a table of `len` entries.
    pub(super) async fn read(file: &dyn Node, offset: u64, len: usize, block: usize) -> Result<Self> {
        let mut entries = Vec::new();
        while entries.len() < len {
            let bytes = ((len - entries.len()) * 8).min(MAX_PIECE);
            let bytes = file.read(offset + entries.len() as u64 * 8, BufferMut::new(bytes)).await?;
            entries.extend(bytes.as_chunks::<8>().0.iter().map(|word| u64::from_be_bytes(*word)));
        }
        Ok(Self { offset, entries, stored: len, dirty: BTreeSet::new(), block, moved_from: Vec::new() })
    }

    /// How many entries there are in memory.
    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    /// How many entries the table on the disk has room for.
    pub(super) fn stored(&self) -> usize {
        self.stored
    }

    /// The entry at `index`; 0, which means "none" in both tables, past the end.
    pub(super) fn get(&self, index: usize) -> u64 {
        self.entries.get(index).copied().unwrap_or(0)
    }

    /// All entries.
    pub(super) fn entries(&self) -> &[u64] {
        &self.entries
    }

    /// Changes an entry.
    pub(super) fn set(&mut self, index: usize, entry: u64) {
        self.entries[index] = entry;
        self.dirty.insert(index * 8 / self.block);
    }

    /// Makes room for `len` entries in memory. They can be written only after [`Table::move_to`].
    pub(super) fn extend(&mut self, len: usize) {
        self.entries.resize(len.max(self.entries.len()), 0);
    }

    /// Moves the table, with all its entries, to a new place. The header must be changed to point there.
    pub(super) fn move_to(&mut self, offset: u64) {
        self.moved_from.push((self.offset, self.stored as u64 * 8));
        self.offset = offset;
        self.stored = self.entries.len();
        self.dirty.clear();
    }

    /// True if the header must be changed.
    pub(super) fn has_moved(&self) -> bool {
        !self.moved_from.is_empty()
    }

    /// True if something must be written.
    pub(super) fn is_dirty(&self) -> bool {
        self.has_moved() || self.dirty.range(..self.stored_blocks()).next().is_some()
    }

    fn stored_blocks(&self) -> usize {
        (self.stored * 8).div_ceil(self.block)
    }

    fn piece(&self, first_block: usize, blocks: usize) -> Piece {
        let mut buf = BufferMut::zeroed(blocks * self.block);
        let start = (first_block * self.block / 8).min(self.stored);
        let end = ((first_block + blocks) * self.block / 8).min(self.stored);
        for (to, entry) in buf.as_chunks_mut::<8>().0.iter_mut().zip(&self.entries[start..end]) {
            *to = entry.to_be_bytes();
        }
        (self.offset + (first_block * self.block) as u64, buf.freeze())
    }

    /// Takes what must be written: all of a table that has moved, else the dirty blocks, neighbours together.
    pub(super) fn take_dirty(&mut self) -> TakenTable {
        let blocks = self.stored_blocks();
        let rest = self.dirty.split_off(&blocks);
        let dirty = std::mem::replace(&mut self.dirty, rest);
        if self.has_moved() {
            let step = (MAX_PIECE / self.block).max(1);
            let pieces = (0..blocks).step_by(step).map(|first| self.piece(first, step.min(blocks - first)));
            return TakenTable {
                dirty,
                pieces: pieces.collect(),
                moved: self.moved_from.len(),
                place: (self.offset, self.stored),
            };
        }
        let mut pieces = Vec::new();
        let mut run: Option<(usize, usize)> = None;
        for block in &dirty {
            run = match run {
                Some((first, end)) if end == *block => Some((first, end + 1)),
                other => {
                    pieces.extend(other.map(|(first, end)| self.piece(first, end - first)));
                    Some((*block, *block + 1))
                }
            };
        }
        pieces.extend(run.map(|(first, end)| self.piece(first, end - first)));
        TakenTable { dirty, pieces, moved: 0, place: (self.offset, self.stored) }
    }

    /// What was taken could not be written.
    pub(super) fn put_back(&mut self, taken: TakenTable) {
        self.dirty.extend(taken.dirty);
    }

    /// What was taken is durable, and the header points to the table's place. Returns the places (offset and length in bytes) that nothing
    /// refers to any more.
    pub(super) fn done(&mut self, taken: &TakenTable) -> Vec<(u64, u64)> {
        self.moved_from.drain(..taken.moved).collect()
    }
}

/// What a commit cycle writes of a table.
pub(super) struct TakenTable {
    dirty: BTreeSet<usize>,
    /// What to write where.
    pub(super) pieces: Vec<Piece>,
    moved: usize,
    /// Where the table is, in bytes, and how many entries it has.
    pub(super) place: (u64, usize),
}

impl TakenTable {
    /// The header must be changed once the pieces are durable.
    pub(super) fn has_moved(&self) -> bool {
        self.moved > 0
    }
}
