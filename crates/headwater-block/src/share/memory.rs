//! What was fetched a little while ago, within a bound. No I/O.

use super::source::Piece;
use crate::buffer::Buffer;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

/// The share of the bound that pieces may take which every reader has had.
const PASSED_SHARE: u64 = 4;

struct Kept {
    data: Buffer,
    /// When it came: the lower, the longer ago.
    ticket: u64,
    /// How many of its bytes were given to readers, each time counted.
    served: u64,
    passed: bool,
}

/// Pieces of all sources; see the parent module for what is kept and what goes.
pub(super) struct Memory {
    bound: u64,
    used: u64,
    passed_bytes: u64,
    next_ticket: u64,
    /// By source and offset; those of one source don't overlap.
    pieces: BTreeMap<(u64, u64), Kept>,
    /// By ticket: those that some reader still lacks, and those that all have had.
    wanted: BTreeMap<u64, (u64, u64)>,
    passed: BTreeMap<u64, (u64, u64)>,
}

impl Memory {
    /// Memory for `bound` bytes.
    pub(super) fn new(bound: u64) -> Self {
        let (pieces, wanted, passed) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
        Self { bound, used: 0, passed_bytes: 0, next_ticket: 0, pieces, wanted, passed }
    }

    /// Bytes that are kept.
    pub(super) fn used(&self) -> u64 {
        self.used
    }

    /// The piece that holds the start of `range`, which a reader now has had as far as the piece goes.
    pub(super) fn get(&mut self, source: u64, range: &Range<u64>, readers: u32) -> Option<Piece> {
        let (offset, data) = self.find(source, range.start)?;
        self.served(source, range, readers);
        Some(Piece { offset, data })
    }

    /// Up to where the bytes from `at` on are kept in one piece; none if they aren't.
    pub(super) fn kept_until(&self, source: u64, at: u64) -> Option<u64> {
        self.find(source, at).map(|(offset, data)| offset + data.len() as u64)
    }

    fn find(&self, source: u64, at: u64) -> Option<(u64, Buffer)> {
        let ((_, offset), kept) = self.pieces.range((source, 0)..=(source, at)).next_back()?;
        (offset + kept.data.len() as u64 > at).then(|| (*offset, kept.data.clone()))
    }

    /// Where the first piece after `at` begins.
    pub(super) fn next_after(&self, source: u64, at: u64) -> Option<u64> {
        self.pieces.range((source, at)..=(source, u64::MAX)).next().map(|((_, offset), _)| *offset)
    }

    /// One of so many readers has had the start of `range`, as far as the piece there goes.
    pub(super) fn served(&mut self, source: u64, range: &Range<u64>, readers: u32) {
        let Some((key, kept)) = self.pieces.range_mut((source, 0)..=(source, range.start)).next_back() else {
            return;
        };
        let len = kept.data.len() as u64;
        let end = range.end.min(key.1 + len);
        kept.served += end.saturating_sub(range.start);
        if !kept.passed && kept.served >= len.saturating_mul(readers.into()) {
            kept.passed = true;
            self.passed_bytes += len;
            self.wanted.remove(&kept.ticket);
            self.passed.insert(kept.ticket, *key);
        }
        while self.passed_bytes > self.bound / PASSED_SHARE {
            self.evict();
        }
    }

    /// Keeps what was fetched for one of so many readers.
    pub(super) fn insert(&mut self, source: u64, offset: u64, data: &Buffer, readers: u32) {
        let len = data.len() as u64;
        if len > self.bound {
            return;
        }
        let ticket = self.next_ticket;
        self.next_ticket += 1;
        let key = (source, offset);
        let kept = Kept { data: data.clone(), ticket, served: 0, passed: false };
        let before = self.pieces.insert(key, kept);
        debug_assert!(before.is_none(), "what is in memory is not fetched");
        self.wanted.insert(ticket, key);
        self.used += len;
        self.served(source, &(offset..offset + len), readers);
        while self.used > self.bound {
            self.evict();
        }
    }

    /// Lets one piece go: the oldest that all have had, or else the oldest.
    fn evict(&mut self) {
        let next = self.passed.values().next().or_else(|| self.wanted.values().next()).copied();
        if let Some(key) = next {
            self.remove(key);
        }
    }

    fn remove(&mut self, key: (u64, u64)) {
        let Some(kept) = self.pieces.remove(&key) else { return };
        let len = kept.data.len() as u64;
        self.used -= len;
        if kept.passed {
            self.passed_bytes -= len;
            self.passed.remove(&kept.ticket);
        } else {
            self.wanted.remove(&kept.ticket);
        }
    }

    /// Lets all pieces of a source go.
    pub(super) fn forget(&mut self, source: u64) {
        let keys: BTreeSet<_> =
            self.pieces.range((source, 0)..=(source, u64::MAX)).map(|(key, _)| *key).collect();
        keys.into_iter().for_each(|key| self.remove(key));
    }
}
