//! What a guest may expect after a power cut, from what it asked for and what it was told.
//!
//! It is the rule of the disk below, one level up: every change makes a version of the sectors that it covers; a change is durable once a flush
//! that began after its end has returned, or it has FUA and has returned itself; what ended before a durable change began is gone.

use std::cell::{Cell, RefCell};
use std::ops::Range;

/// The unit in which guests work here, in bytes.
pub(crate) const SECTOR: u64 = 512;

/// What a sector is filled with by the change with number `tag`: a word that no other change or sector has. 0 is for zeroes.
pub(crate) fn word(salt: u64, tag: u64, sector: u64) -> u64 {
    let mut word = salt ^ (tag << 40) ^ sector.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    word = (word ^ word >> 31).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    word ^ word >> 29 | 1
}

/// The bytes of a range of sectors that is filled so.
pub(crate) fn fill(salt: u64, tag: u64, sectors: Range<u64>) -> Vec<u8> {
    let words = sectors.map(|sector| word(salt, tag, sector).to_le_bytes());
    words.flat_map(|bytes| bytes.repeat(SECTOR as usize / 8)).collect()
}

/// The words of each sector; fails where a sector isn't filled with one.
pub(crate) fn words(bytes: &[u8]) -> Result<Vec<u64>, String> {
    let sectors = bytes.chunks(SECTOR as usize).enumerate();
    let words = sectors.map(|(number, sector)| {
        let mut words = sector.as_chunks::<8>().0.iter();
        let first = words.next().copied().unwrap_or_default();
        match words.all(|word| *word == first) {
            true => Ok(u64::from_le_bytes(first)),
            false => Err(format!("sector {number} of the disk holds a mixture")),
        }
    });
    words.collect()
}

/// What a change does to its sectors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Fill(u64),
    Zero,
    /// Zeroes, or nothing.
    Discard,
}

struct Change {
    kind: Kind,
    sectors: Range<u64>,
    /// The disk's size afterwards, if it changes.
    size: Option<u64>,
    /// It is durable when it has ended.
    fua: bool,
    begun: Instant,
    ended: Cell<Option<Instant>>,
}

impl Change {
    fn precedes(&self, other: &Change) -> bool {
        self.ended.get().is_some_and(|ended| ended.order < other.begun.order)
    }
}

struct Flush {
    begun: Instant,
    ended: Cell<Option<Instant>>,
}

/// When a guest did something: its place among everything that guests do, and the moment of the record.
#[derive(Clone, Copy)]
struct Instant {
    order: u64,
    moment: usize,
}

/// Everything that a guest did.
pub(crate) struct Promises {
    salt: u64,
    /// What the sectors held in the beginning.
    start: Vec<u64>,
    start_size: u64,
    changes: RefCell<Vec<Change>>,
    flushes: RefCell<Vec<Flush>>,
    next: Cell<u64>,
}

/// What may be found at one moment.
pub(crate) struct Allowed {
    pub(crate) sizes: Vec<u64>,
    /// For each sector, the words that it may be filled with.
    pub(crate) sectors: Vec<Vec<u64>>,
    /// It grows whenever something becomes forbidden.
    pub(crate) epoch: usize,
}

impl Promises {
    /// A disk of `size` bytes; sectors past the end of `start` hold zeroes.
    pub(crate) fn new(salt: u64, start: Vec<u64>, size: u64) -> Self {
        Self {
            salt,
            start,
            start_size: size,
            changes: RefCell::default(),
            flushes: RefCell::default(),
            next: Cell::new(0),
        }
    }

    fn instant(&self, moment: usize) -> Instant {
        self.next.set(self.next.get() + 1);
        Instant { order: self.next.get(), moment }
    }

    /// A change begins. Returns its number, for [`Promises::ended`].
    pub(crate) fn begin(
        &self,
        moment: usize,
        kind: Kind,
        sectors: Range<u64>,
        size: Option<u64>,
        fua: bool,
    ) -> usize {
        let begun = self.instant(moment);
        self.changes.borrow_mut().push(Change { kind, sectors, size, fua, begun, ended: Cell::new(None) });
        self.changes.borrow().len() - 1
    }

    /// A change has returned.
    pub(crate) fn ended(&self, change: usize, moment: usize) {
        self.changes.borrow()[change].ended.set(Some(self.instant(moment)));
    }

    /// A flush begins. Returns its number.
    pub(crate) fn begin_flush(&self, moment: usize) -> usize {
        let begun = self.instant(moment);
        self.flushes.borrow_mut().push(Flush { begun, ended: Cell::new(None) });
        self.flushes.borrow().len() - 1
    }

    /// A flush has returned.
    pub(crate) fn flushed(&self, flush: usize, moment: usize) {
        self.flushes.borrow()[flush].ended.set(Some(self.instant(moment)));
    }

    /// How many answers guests had got at a moment: each may forbid something.
    pub(crate) fn epoch(&self, moment: usize) -> usize {
        let over = |ended: Option<Instant>| ended.is_some_and(|ended| ended.moment <= moment);
        let flushes = self.flushes.borrow().iter().filter(|flush| over(flush.ended.get())).count();
        flushes + self.changes.borrow().iter().filter(|change| change.fua && over(change.ended.get())).count()
    }

    /// How much had happened at a moment that allows or forbids something.
    pub(crate) fn stage(&self, moment: usize) -> usize {
        let begun = self.changes.borrow().iter().filter(|change| change.begun.moment <= moment).count();
        begun + self.epoch(moment)
    }

    /// What may be found if the power is cut at this moment.
    pub(crate) fn allowed(&self, moment: usize) -> Allowed {
        let (changes, flushes) = (self.changes.borrow(), self.flushes.borrow());
        let over = |ended: Option<Instant>| ended.filter(|ended| ended.moment <= moment);
        let flushed = flushes.iter().filter(|flush| over(flush.ended.get()).is_some());
        let flushed = flushed.map(|flush| flush.begun.order).max().unwrap_or(0);
        let begun: Vec<&Change> = changes.iter().filter(|change| change.begun.moment <= moment).collect();
        let durable: Vec<&Change> = begun
            .iter()
            .filter(|change| {
                over(change.ended.get()).is_some_and(|ended| change.fua || ended.order < flushed)
                    && change.kind != Kind::Discard
            })
            .copied()
            .collect();
        let sectors = begun.iter().map(|change| change.sectors.end).max().unwrap_or(0);
        let sectors = sectors.max(self.start_size / SECTOR);
        let allowed = (0..sectors).map(|sector| {
            let concerns = |change: &&&Change| change.sectors.contains(&sector);
            let floor: Vec<&Change> = durable.iter().filter(concerns).copied().collect();
            let start = self.start.get(sector as usize).copied().unwrap_or(0);
            let mut words = if floor.is_empty() { vec![start] } else { Vec::new() };
            for change in begun.iter().filter(concerns) {
                if floor.iter().any(|durable| change.precedes(durable)) {
                    continue;
                }
                words.push(match change.kind {
                    Kind::Fill(tag) => word(self.salt, tag, sector),
                    Kind::Zero | Kind::Discard => 0,
                });
            }
            words
        });
        let resizes: Vec<(&&Change, u64)> =
            begun.iter().filter_map(|change| Some((change, change.size?))).collect();
        let floor: Vec<&&Change> = durable.iter().filter(|change| change.size.is_some()).collect();
        let later =
            resizes.iter().filter(|(change, _)| !floor.iter().any(|durable| change.precedes(durable)));
        let start = floor.is_empty().then_some(self.start_size);
        let sizes = start.into_iter().chain(later.map(|(_, size)| *size)).collect();
        Allowed { sizes, sectors: allowed.collect(), epoch: self.epoch(moment) }
    }
}

impl Allowed {
    /// Compares with what was read of a disk.
    pub(crate) fn check(&self, read: &[u64], size: u64) -> Result<(), String> {
        if !self.sizes.contains(&size) {
            return Err(format!("the disk's size is {size}, which is none of {:?}", self.sizes));
        }
        for (sector, word) in read.iter().enumerate() {
            let allowed = self.sectors.get(sector).map_or(&[][..], |words| words);
            if !allowed.contains(word) {
                return Err(format!(
                    "sector {sector} of the disk holds {word:#x}, which is none of {allowed:x?}"
                ));
            }
        }
        Ok(())
    }
}
