//! One file: what it holds durably, and the versions of what isn't decided.

use super::SECTOR;
use crate::faults::Op;
use headwater_block::Buffer;
use std::cell::Cell;
use std::collections::BTreeMap;
use std::ops::Range;
use std::rc::Rc;

/// Something of a file that has versions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Place {
    /// How long the file is.
    Size,
    /// A sector, by its number.
    Sector(u64),
}

/// What a place may hold after the cut.
pub(super) struct Version {
    /// The operation that made it; none if it was there durably.
    pub(super) operation: Option<u64>,
    started: Option<usize>,
    /// How long the file is at least if this version survives.
    reach: u64,
    value: Value,
    hash: u64,
}

enum Value {
    Size(u64),
    Bytes(Box<[u8; SECTOR]>),
}

/// An operation that changes something.
struct Operation {
    id: u64,
    op: Op,
    range: Range<u64>,
    data: Option<Buffer>,
    fua: bool,
    started: usize,
    ended: Cell<Option<usize>>,
    durable: Cell<bool>,
}

impl Operation {
    /// True if this one was over before the other began.
    fn precedes(&self, other: &Operation) -> bool {
        self.ended.get().is_some_and(|ended| ended < other.started)
    }
}

/// A place with the operations that concern it, in the order in which they started.
struct Open {
    operations: Vec<Rc<Operation>>,
    versions: Vec<Version>,
}

/// A file.
pub(super) struct Disk {
    /// What is durable, where nothing is open; zeroes past the end of these bytes.
    settled: Vec<u8>,
    settled_size: u64,
    settled_hash: u64,
    open: BTreeMap<Place, Open>,
    /// How long the file is for those who use it.
    size: u64,
    /// By number. Flushes are here as well.
    operations: BTreeMap<u64, Rc<Operation>>,
}

impl Disk {
    pub(super) fn new(settled: Vec<u8>) -> Self {
        let size = settled.len() as u64;
        let sectors = 0..size.div_ceil(SECTOR as u64);
        let settled_hash = sectors.map(|n| hash_sector(n, &sector(&settled, n))).fold(0, u64::wrapping_add);
        Self {
            settled,
            settled_size: size,
            settled_hash,
            open: BTreeMap::new(),
            size,
            operations: BTreeMap::new(),
        }
    }

    pub(super) fn open(&self) -> impl Iterator<Item = (Place, &[Version])> {
        self.open.iter().map(|(place, open)| (*place, &open.versions[..]))
    }

    pub(super) fn version(&self, place: Place, version: usize) -> &Version {
        &self.open[&place].versions[version]
    }

    pub(super) fn started(
        &mut self,
        moment: usize,
        id: u64,
        op: Op,
        range: Range<u64>,
        data: Option<Buffer>,
        fua: bool,
    ) {
        let operation = Operation {
            id,
            op,
            range: range.clone(),
            data,
            fua,
            started: moment,
            ended: Cell::new(None),
            durable: Cell::new(false),
        };
        let operation = Rc::new(operation);
        self.operations.insert(id, operation.clone());
        let touched = match op {
            Op::Write | Op::WriteZeroes => range.clone(),
            Op::Discard => range.start..range.end.min(self.size),
            // What a shorter size cuts off.
            Op::Header => range.start..self.size.max(range.start),
            Op::Flush | Op::Read | Op::Status => return,
        };
        if op == Op::Header || op != Op::Discard && touched.end > self.settled_size.min(self.size) {
            self.size = if op == Op::Header { range.end } else { self.size.max(range.end) };
            self.touch(Place::Size, &operation);
        }
        if !touched.is_empty() {
            let sectors = touched.start / SECTOR as u64..touched.end.div_ceil(SECTOR as u64);
            sectors.for_each(|sector| self.touch(Place::Sector(sector), &operation));
        }
    }

    fn touch(&mut self, place: Place, operation: &Rc<Operation>) {
        let open =
            self.open.entry(place).or_insert_with(|| Open { operations: Vec::new(), versions: Vec::new() });
        open.operations.push(operation.clone());
        self.look_again(place);
    }

    pub(super) fn ended(&mut self, moment: usize, id: u64, ok: bool) {
        let Some(operation) = self.operations.get(&id).cloned() else { return };
        operation.ended.set(Some(moment));
        if operation.op == Op::Flush {
            self.operations.remove(&id);
            if ok {
                self.flushed(&operation);
            }
            return;
        }
        if !ok {
            // It may have done any part of its work, now or earlier, and no flush is known to cover it.
            operation.ended.set(None);
        } else if operation.fua {
            operation.durable.set(true);
        }
        let concerned = |open: &Open| open.operations.iter().any(|one| one.id == id);
        self.look_again_where(concerned);
    }

    fn flushed(&mut self, flush: &Operation) {
        for operation in self.operations.values() {
            if operation.op != Op::Discard && operation.precedes(flush) {
                operation.durable.set(true);
            }
        }
        self.look_again_where(|_| true);
        let open = &self.open;
        let needed = |id: u64| open.values().any(|open| open.operations.iter().any(|one| one.id == id));
        self.operations.retain(|id, operation| operation.ended.get().is_none() || needed(*id));
    }

    fn look_again_where(&mut self, concerned: impl Fn(&Open) -> bool) {
        let places: Vec<Place> =
            self.open.iter().filter(|(_, open)| concerned(open)).map(|(place, _)| *place).collect();
        places.into_iter().for_each(|place| self.look_again(place));
    }

    /// Works the versions of a place out, and settles it if only one is left.
    fn look_again(&mut self, place: Place) {
        let Some(open) = self.open.get(&place) else { return };
        let versions = self.versions(place, &open.operations);
        // While one is in flight, it may come to be overtaken by others.
        let over = open.operations.iter().all(|operation| operation.ended.get().is_some());
        if let ([only], true) = (&versions[..], over) {
            match &only.value {
                Value::Size(size) => self.settled_size = *size,
                Value::Bytes(bytes) => {
                    let Place::Sector(number) = place else { return };
                    let before = hash_sector(number, &sector(&self.settled, number));
                    self.settled_hash = self.settled_hash.wrapping_sub(before).wrapping_add(only.hash);
                    let start = number as usize * SECTOR;
                    let bytes = **bytes;
                    if self.settled.len() < start + SECTOR {
                        self.settled.resize(start + SECTOR, 0);
                    }
                    self.settled[start..start + SECTOR].copy_from_slice(&bytes);
                }
            }
            self.open.remove(&place);
        } else if let Some(open) = self.open.get_mut(&place) {
            open.versions = versions;
        }
    }

    fn versions(&self, place: Place, operations: &[Rc<Operation>]) -> Vec<Version> {
        let gone = |one: &Operation| operations.iter().any(|d| d.durable.get() && one.precedes(d));
        let mut versions: Vec<Version> = Vec::new();
        let mut add = |operation: Option<&Operation>, value: Value| {
            let hash = match (&value, place) {
                (Value::Bytes(bytes), Place::Sector(number)) => hash_sector(number, bytes),
                (Value::Size(size), _) => *size,
                _ => 0,
            };
            // The same bytes again are no new version; the younger one stands for both.
            versions.retain(|version| version.hash != hash);
            let reach = match (operation, place) {
                (Some(Operation { op: Op::Write | Op::WriteZeroes, range, .. }), Place::Sector(number)) => {
                    range.end.min((number + 1) * SECTOR as u64)
                }
                _ => 0,
            };
            versions.push(Version {
                operation: operation.map(|operation| operation.id),
                started: operation.map(|operation| operation.started),
                reach,
                value,
                hash,
            });
        };
        let content = |last: Option<&Operation>| match place {
            Place::Size => {
                // A longer size may be known without the others, but not without those that are durable.
                let counts = |one: &&Rc<Operation>| {
                    let itself = last.is_some_and(|last| one.id == last.id);
                    let before = last.is_some_and(|last| one.started < last.started);
                    itself || one.durable.get() || before && one.op == Op::Header
                };
                let mut size = self.settled_size;
                for one in operations.iter().filter(counts) {
                    size = if one.op == Op::Header { one.range.end } else { size.max(one.range.end) };
                }
                Value::Size(size)
            }
            Place::Sector(number) => Value::Bytes(self.sector_after(number, operations, last)),
        };
        if !operations.iter().any(|operation| operation.durable.get()) {
            add(None, content(None));
        }
        for operation in operations.iter().filter(|one| !gone(one)) {
            add(Some(operation), content(Some(operation)));
        }
        versions
    }

    /// What a sector holds if `last` is the last operation whose effect on it survives.
    fn sector_after(
        &self,
        number: u64,
        operations: &[Rc<Operation>],
        last: Option<&Operation>,
    ) -> Box<[u8; SECTOR]> {
        let mut bytes = Box::new(sector(&self.settled, number));
        let Some(last) = last else { return bytes };
        for one in operations {
            let before = one.started < last.started && one.op != Op::Discard || one.durable.get();
            if before && one.id != last.id {
                apply(one, number, &mut bytes);
            }
        }
        apply(last, number, &mut bytes);
        bytes
    }

    /// How long the file is if these versions survive.
    fn size_of(&self, chosen: &[(Place, &Version)]) -> u64 {
        let size = chosen.iter().find(|(place, _)| *place == Place::Size).map(|(_, version)| version);
        let (size, when) = size.map_or((self.settled_size, None), |version| (version.hash, version.started));
        let later = chosen.iter().filter(|(_, version)| version.started > when);
        later.map(|(_, version)| version.reach).fold(size, u64::max)
    }

    pub(super) fn hash(&self, chosen: &[(Place, &Version)]) -> u64 {
        let size = self.size_of(chosen);
        let mut hash = self.settled_hash.wrapping_add(mix(size));
        for (place, version) in chosen {
            let Place::Sector(number) = place else { continue };
            hash = hash.wrapping_sub(hash_sector(*number, &sector(&self.settled, *number)));
            if number * (SECTOR as u64) < size {
                hash = hash.wrapping_add(version.hash);
            }
        }
        hash
    }

    pub(super) fn bytes(&self, chosen: &[(Place, &Version)]) -> Vec<u8> {
        let size = self.size_of(chosen) as usize;
        let mut bytes = self.settled[..size.min(self.settled.len())].to_vec();
        bytes.resize(size, 0);
        for (place, version) in chosen {
            let (Place::Sector(number), Value::Bytes(sector)) = (place, &version.value) else { continue };
            let start = (*number as usize * SECTOR).min(size);
            let len = SECTOR.min(size - start);
            bytes[start..start + len].copy_from_slice(&sector[..len]);
        }
        bytes
    }

    pub(super) fn describe(&self, id: u64) -> String {
        let Some(operation) = self.operations.get(&id) else { return format!("operation {id}") };
        let Range { start, end } = operation.range;
        let state = match (operation.durable.get(), operation.ended.get()) {
            (true, _) => "durable",
            (false, Some(_)) => "ended",
            (false, None) => "in flight",
        };
        let fua = if operation.fua { ", FUA" } else { "" };
        format!(
            "{:?} of {start:#x}..{end:#x} ({state}{fua}, started as event {})",
            operation.op, operation.started
        )
    }
}

/// The effect of an operation on a sector.
fn apply(operation: &Operation, number: u64, bytes: &mut [u8; SECTOR]) {
    let from = number * SECTOR as u64;
    let to = from + SECTOR as u64;
    let Range { start, end } = operation.range;
    let end = if operation.op == Op::Header { u64::MAX } else { end };
    let part = start.max(from)..end.min(to);
    if part.is_empty() {
        return;
    }
    let target = &mut bytes[(part.start - from) as usize..(part.end - from) as usize];
    match &operation.data {
        Some(data) => {
            target.copy_from_slice(&data[(part.start - start) as usize..(part.end - start) as usize])
        }
        None => target.fill(0),
    }
}

/// A sector of a file, with zeroes past its end.
fn sector(bytes: &[u8], number: u64) -> [u8; SECTOR] {
    let mut sector = [0; SECTOR];
    let start = (number as usize * SECTOR).min(bytes.len());
    let end = (start + SECTOR).min(bytes.len());
    sector[..end - start].copy_from_slice(&bytes[start..end]);
    sector
}

fn mix(value: u64) -> u64 {
    let mixed = (value ^ value >> 31).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (mixed ^ mixed >> 29).wrapping_mul(0xbf58_476d_1ce4_e5b9)
}

/// 0 for zeroes, so that sectors that were never written need not be known.
fn hash_sector(number: u64, bytes: &[u8; SECTOR]) -> u64 {
    let words = bytes.as_chunks::<8>().0.iter().map(|word| u64::from_le_bytes(*word));
    let mut hash = 0_u64;
    for word in words {
        hash = (hash ^ word).wrapping_mul(0x2545_f491_4f6c_dd1d).rotate_left(29);
    }
    if hash == 0 { 0 } else { mix(hash ^ mix(number + 1)) }
}
