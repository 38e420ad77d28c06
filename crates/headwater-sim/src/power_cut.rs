//! Power cuts: what files may hold when the power comes back.
//!
//! [`Cuts`] walks through a [`History`], one event at a time. At every moment it knows, for each sector of each file, which **versions** of it
//! the cut may leave; a [`Choice`] of one version for each makes a state, the same moment for all files.
//!
//! # Which versions of a sector may survive
//! - A sector of 512 bytes is written as a whole or not at all. Each operation that has started, whether it has ended or not, makes a version
//!   of the sectors that it covers: what the sector holds after it. Before all of them comes what the sector held durably.
//! - An operation is **durable** once a flush has succeeded that started after its end, or when it had FUA and has succeeded itself.
//! - What ended before a durable operation started can't come back. Every other version may be the one that survives, whatever survives of
//!   other sectors, also of those that the same operation wrote.
//! - Operations that ran at the same time take effect in either order. One that failed makes a version, but is never durable.
//! - A discard makes a version of zeroes, and is never durable: it may have done nothing.
//! - The size of a file is one more thing with versions: an operation that makes a file longer or shorter makes one. It is at least what
//!   the surviving sectors need. What a shorter size cuts off reads as zeroes later.
//!
//! A choice is independent of the order in which sectors were written, so taking all choices covers every subset, reordering and tearing.

mod disk;
#[cfg(test)]
mod tests;

use crate::recorder::{Event, History};
use crate::rng::Rng;
use disk::{Disk, Place, Version};
use std::collections::BTreeMap;
use std::fmt::Write as _;

/// What a disk writes atomically, in bytes.
pub const SECTOR: usize = 512;

/// All moments of a history, one after the other.
pub struct Cuts<'a> {
    history: &'a History,
    moment: usize,
    disks: Vec<Disk>,
    /// Everything that has versions now, by file and place.
    open: Vec<Open>,
}

struct Open {
    file: usize,
    place: Place,
    versions: usize,
}

/// Which version of everything survives: an index for each open place, 0 for the oldest version.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Choice(Vec<usize>);

impl<'a> Cuts<'a> {
    /// The moment before the first event, when nothing is open.
    pub fn new(history: &'a History) -> Self {
        let disks = history.files.iter().map(|(_, bytes)| Disk::new(bytes.clone())).collect();
        Self { history, moment: 0, disks, open: Vec::new() }
    }

    /// How many events have happened.
    pub fn moment(&self) -> usize {
        self.moment
    }

    /// Goes to the next moment. False at the end of the history.
    pub fn advance(&mut self) -> bool {
        let Some((file, event)) = self.history.events.get(self.moment) else { return false };
        match event {
            Event::Started { id, op, range, data, fua } => {
                self.disks[*file].started(self.moment, *id, *op, range.clone(), data.clone(), *fua);
            }
            Event::Ended { id, ok } => self.disks[*file].ended(self.moment, *id, *ok),
        }
        self.moment += 1;
        self.open.clear();
        for (file, disk) in self.disks.iter().enumerate() {
            let places = disk.open().map(|(place, versions)| Open { file, place, versions: versions.len() });
            self.open.extend(places);
        }
        true
    }

    /// How many choices there are; at most `u64::MAX`.
    pub fn combinations(&self) -> u64 {
        self.open.iter().fold(1, |product: u64, open| product.saturating_mul(open.versions as u64))
    }

    /// Every choice.
    pub fn all(&self) -> impl Iterator<Item = Choice> + use<'_, 'a> {
        let mut next = Some(self.oldest());
        std::iter::from_fn(move || {
            let now = next.take()?;
            let mut after = now.clone();
            for (index, open) in after.0.iter_mut().zip(&self.open) {
                *index += 1;
                if *index < open.versions {
                    next = Some(after);
                    break;
                }
                *index = 0;
            }
            Some(now)
        })
    }

    /// Nothing survives that need not.
    pub fn oldest(&self) -> Choice {
        Choice(vec![0; self.open.len()])
    }

    /// Everything survives.
    pub fn newest(&self) -> Choice {
        Choice(self.open.iter().map(|open| open.versions - 1).collect())
    }

    /// A random choice. Many are close to "everything" or "nothing", because that is where an order that is wrong shows: one operation or one
    /// sector is lost although all others survive, or survives alone.
    pub fn sample(&self, rng: &Rng) -> Choice {
        if self.open.is_empty() {
            return self.oldest();
        }
        let (mut some, others) =
            if rng.one_in(2) { (self.newest(), self.oldest()) } else { (self.oldest(), self.newest()) };
        match rng.range(0..8) {
            0 => {}
            1 => {
                let at = rng.index(self.open.len());
                some.0[at] = others.0[at];
            }
            2..5 => {
                // What one operation wrote.
                let at = rng.index(self.open.len());
                let operation = self.operation(at, self.open[at].versions - 1);
                for (index, open) in self.open.iter().enumerate() {
                    let last = open.versions - 1;
                    if open.file == self.open[at].file && self.operation(index, last) == operation {
                        some.0[index] = others.0[index];
                    }
                }
            }
            5 => {
                // One file is quicker than the others.
                let file = self.open[rng.index(self.open.len())].file;
                for (index, open) in self.open.iter().enumerate() {
                    if open.file == file {
                        some.0[index] = others.0[index];
                    }
                }
            }
            _ => {
                let kept = *rng.pick(&[0.1, 0.5, 0.9]);
                for (index, open) in self.open.iter().enumerate() {
                    some.0[index] =
                        if rng.chance(kept) { open.versions - 1 } else { rng.index(open.versions) };
                }
            }
        }
        some
    }

    fn operation(&self, at: usize, version: usize) -> Option<u64> {
        self.version(at, version).operation
    }

    fn version(&self, at: usize, version: usize) -> &Version {
        let open = &self.open[at];
        self.disks[open.file].version(open.place, version)
    }

    /// What tells states apart: equal states have equal numbers, and different ones (but for a chance of one in 2^64) different ones.
    pub fn hash(&self, choice: &Choice) -> u64 {
        let mut hash = 0_u64;
        for (file, disk) in self.disks.iter().enumerate() {
            hash = hash.rotate_left(21) ^ disk.hash(&self.chosen(file, choice));
        }
        hash
    }

    /// What each file holds.
    pub fn files(&self, choice: &Choice) -> Vec<Vec<u8>> {
        let disks = self.disks.iter().enumerate();
        disks.map(|(file, disk)| disk.bytes(&self.chosen(file, choice))).collect()
    }

    fn chosen(&self, file: usize, choice: &Choice) -> Vec<(Place, &Version)> {
        let open = self.open.iter().enumerate().filter(|(_, open)| open.file == file);
        open.map(|(at, open)| (open.place, self.version(at, choice.0[at]))).collect()
    }

    /// A choice that is closer to "everything survives" or "nothing does", whichever takes fewer exceptions, and for which `fails` still
    /// holds, as it does for `choice`.
    pub fn simplify(&self, choice: &Choice, mut fails: impl FnMut(&Choice) -> bool) -> Choice {
        let mut best: Option<(usize, Choice)> = None;
        for plain in [self.newest(), self.oldest()] {
            let mut now = choice.clone();
            let mut step = now.0.len();
            while step > 0 {
                for start in (0..now.0.len()).step_by(step) {
                    let part = start..(start + step).min(now.0.len());
                    if now.0[part.clone()] == plain.0[part.clone()] {
                        continue;
                    }
                    let mut simpler = now.clone();
                    simpler.0[part.clone()].copy_from_slice(&plain.0[part]);
                    if fails(&simpler) {
                        now = simpler;
                    }
                }
                step /= 2;
            }
            let exceptions = now.0.iter().zip(&plain.0).filter(|(a, b)| a != b).count();
            if best.as_ref().is_none_or(|(fewest, _)| exceptions < *fewest) {
                best = Some((exceptions, now));
            }
        }
        best.map_or_else(|| choice.clone(), |(_, choice)| choice)
    }

    /// A choice in words: what of each operation survived.
    pub fn describe(&self, choice: &Choice) -> String {
        let mut operations: BTreeMap<(usize, u64), (Vec<String>, Vec<String>)> = BTreeMap::new();
        for (at, open) in self.open.iter().enumerate() {
            let place = match open.place {
                Place::Size => "the size".to_string(),
                Place::Sector(sector) => format!("{:#x}", sector * SECTOR as u64),
            };
            for version in 0..open.versions {
                let Some(operation) = self.operation(at, version) else { continue };
                let (survived, lost) = operations.entry((open.file, operation)).or_default();
                if version == choice.0[at] { survived } else { lost }.push(place.clone());
            }
        }
        let mut text = String::new();
        for ((file, id), (survived, lost)) in operations {
            let (name, disk) = (&self.history.files[file].0, &self.disks[file]);
            let _ = writeln!(text, "  {name}: {}", disk.describe(id));
            for (what, places) in [("survived", survived), ("lost", lost)] {
                if !places.is_empty() {
                    let shown = places.iter().take(12).cloned().collect::<Vec<_>>().join(" ");
                    let more = if places.len() > 12 {
                        format!(" and {} more", places.len() - 12)
                    } else {
                        String::new()
                    };
                    let _ = writeln!(text, "    {what}: {shown}{more}");
                }
            }
        }
        if text.is_empty() { "  everything is durable\n".to_string() } else { text }
    }
}
