//! L2 tables and refcount blocks in memory, as slices of at most a few KiB, bounded.
//!
//! A slice is known by its offset in the file. Whoever needs one holds an `Rc` to it; only slices that nobody but the cache holds are
//! evicted (second chance, which approximates LRU with one store per hit). Dirty slices are held by the list of dirty ones, and
//! those that are being written by the metadata writer, so neither can be lost. The bound is therefore a soft one: what
//! requests hold right now may exceed it, and [`SliceCache::is_pressed`] tells when a commit cycle should make slices clean.

use super::events::Events;
use super::shared::{Shared, WeakShared};
use headwater_block::{Buffer, BufferMut, DebugEvent, Node, Result};
use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::ops::Range;
use std::rc::Rc;

/// A hasher for offsets: one multiplication, folded, because the low bits of offsets say nothing.
#[derive(Default, Clone, Copy)]
pub(super) struct OffsetHasher(u64);

impl Hasher for OffsetHasher {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u64(u64::from(*byte));
        }
    }
    fn write_u64(&mut self, value: u64) {
        let mixed = (self.0 ^ value).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.0 = mixed ^ (mixed >> 32);
    }
}

/// A map or set keyed by offsets or cluster numbers.
pub(super) type OffsetMap<T> = HashMap<u64, T, BuildHasherDefault<OffsetHasher>>;

/// What a slice is a part of, which decides its rank on the way to the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// A refcount block.
    Refcounts,
    /// An L2 table.
    L2,
}

/// A part of a table, in the byte order of the disk.
pub(super) struct Slice {
    /// Where it lies in the file.
    pub(super) offset: u64,
    kind: Kind,
    bytes: RefCell<Box<[u8]>>,
    dirty: Cell<bool>,
    /// The file holds what is in memory; it may not be durable yet.
    written: Cell<bool>,
    used: Cell<bool>,
}

impl Slice {
    /// The big-endian word at `index` (in units of 8 bytes).
    pub(super) fn word(&self, index: usize) -> u64 {
        let bytes = self.bytes.borrow();
        let mut word = [0; 8];
        word.copy_from_slice(&bytes[index * 8..index * 8 + 8]);
        u64::from_be_bytes(word)
    }

    /// Looks at the bytes.
    pub(super) fn with<T>(&self, f: impl FnOnce(&[u8]) -> T) -> T {
        f(&self.bytes.borrow())
    }

    /// A copy of the bytes as they are now.
    pub(super) fn snapshot(&self) -> Buffer {
        Buffer::copy_of(&self.bytes.borrow())
    }
}

/// The cache of one image.
pub(super) struct SliceCache {
    file: Rc<dyn Node>,
    events: Events,
    slice_len: usize,
    /// How many slices the bound on memory allows.
    capacity: usize,
    inner: RefCell<Inner>,
    loading: RefCell<OffsetMap<(u64, WeakShared<Rc<Slice>>)>>,
    next_load: Cell<u64>,
}

#[derive(Default)]
struct Inner {
    map: OffsetMap<usize>,
    slots: Vec<Rc<Slice>>,
    hand: usize,
    dirty: Vec<Rc<Slice>>,
}

/// How many slots one insertion looks at for something to evict.
const MAX_EVICTION_STEPS: usize = 128;
/// The least number of slices that a cache holds, however small its bound.
const MIN_SLICES: usize = 8;

impl SliceCache {
    /// A cache of slices of `slice_len` bytes in at most about `bytes` of memory.
    pub(super) fn new(file: Rc<dyn Node>, events: Events, slice_len: usize, bytes: u64) -> Rc<Self> {
        let capacity = usize::try_from(bytes / slice_len as u64).unwrap_or(usize::MAX).max(MIN_SLICES);
        Rc::new(Self {
            file,
            events,
            slice_len,
            capacity,
            inner: RefCell::default(),
            loading: RefCell::default(),
            next_load: Cell::new(0),
        })
    }

    /// The size of a slice in bytes.
    pub(super) fn slice_len(&self) -> usize {
        self.slice_len
    }

    /// The slice at `offset`, if it is in memory.
    pub(super) fn get(&self, offset: u64) -> Option<Rc<Slice>> {
        let inner = self.inner.borrow();
        let slice = &inner.slots[*inner.map.get(&offset)?];
        slice.used.set(true);
        Some(slice.clone())
    }

    /// The slice at `offset`, read if need be. Those who ask for the same slice share one read.
    pub(super) async fn load(self: &Rc<Self>, offset: u64, kind: Kind) -> Result<Rc<Slice>> {
        if let Some(slice) = self.get(offset) {
            return Ok(slice);
        }
        let waiting = self.loading.borrow().get(&offset).and_then(|(_, load)| load.upgrade());
        let load = waiting.unwrap_or_else(|| {
            let id = self.next_load.replace(self.next_load.get() + 1);
            let load = Shared::new(self.clone().read(offset, kind, id));
            self.loading.borrow_mut().insert(offset, (id, load.downgrade()));
            load
        });
        load.await
    }

    async fn read(self: Rc<Self>, offset: u64, kind: Kind, id: u64) -> Result<Rc<Slice>> {
        self.events.tell(match kind {
            Kind::Refcounts => DebugEvent::RefblockLoad,
            Kind::L2 => DebugEvent::L2Load,
        });
        let read = self.file.read(offset, BufferMut::new(self.slice_len)).await;
        // If `forget` came in between, what was read is out of date: it isn't kept, and who asked looks again.
        let current = self.loading.borrow().get(&offset).is_some_and(|(current, _)| *current == id);
        if current {
            self.loading.borrow_mut().remove(&offset);
        }
        let slice = Rc::new(Slice {
            offset,
            kind,
            bytes: RefCell::new(read?.to_vec().into_boxed_slice()),
            dirty: Cell::new(false),
            written: Cell::new(true),
            used: Cell::new(true),
        });
        if current && self.get(offset).is_none() {
            self.insert(slice.clone());
        }
        Ok(slice)
    }

    fn insert(&self, slice: Rc<Slice>) {
        let mut inner = self.inner.borrow_mut();
        let mut steps = 0;
        while inner.slots.len() >= self.capacity && steps < MAX_EVICTION_STEPS {
            steps += 1;
            inner.hand = if inner.hand + 1 < inner.slots.len() { inner.hand + 1 } else { 0 };
            let at = inner.hand;
            if Rc::strong_count(&inner.slots[at]) == 1 && !inner.slots[at].used.take() {
                inner.remove(at);
            }
        }
        let at = inner.slots.len();
        let old = inner.map.insert(slice.offset, at);
        assert!(old.is_none(), "a slice is in the cache once");
        inner.slots.push(slice);
    }

    /// Changes a slice; it becomes dirty. No await may lie between looking the slice up (or loading it) and this, unless the
    /// caller knows that the table it belongs to hasn't moved.
    pub(super) fn change(&self, slice: &Rc<Slice>, f: impl FnOnce(&mut [u8])) {
        f(&mut slice.bytes.borrow_mut());
        self.mark_dirty(slice);
    }

    /// Puts a slice on the list of those to be written.
    pub(super) fn mark_dirty(&self, slice: &Rc<Slice>) {
        slice.written.set(false);
        if !slice.dirty.replace(true) {
            self.inner.borrow_mut().dirty.push(slice.clone());
        }
    }

    /// Takes the dirty slices of one kind; they count as clean from now on, and stay in memory while the caller holds them.
    pub(super) fn take_dirty(&self, kind: Kind) -> Vec<Rc<Slice>> {
        let mut inner = self.inner.borrow_mut();
        let all = std::mem::take(&mut inner.dirty);
        let (mut taken, rest): (Vec<_>, Vec<_>) = all.into_iter().partition(|slice| slice.kind == kind);
        inner.dirty = rest;
        for slice in &taken {
            slice.dirty.set(false);
        }
        taken.sort_unstable_by_key(|slice| slice.offset);
        taken
    }

    /// Slices that were taken have been written. Those that were changed meanwhile are to be written again.
    pub(super) fn written(&self, taken: &[Rc<Slice>]) {
        for slice in taken.iter().filter(|slice| !slice.dirty.get()) {
            slice.written.set(true);
        }
    }

    /// True if the file holds the slice at `offset` as it is now.
    pub(super) fn is_written(&self, offset: u64) -> bool {
        let inner = self.inner.borrow();
        // What isn't in memory hasn't been changed.
        inner.map.get(&offset).is_none_or(|at| inner.slots[*at].written.get())
    }

    /// True if the slice at `offset` was changed since it was last taken.
    pub(super) fn is_dirty(&self, offset: u64) -> bool {
        let inner = self.inner.borrow();
        inner.map.get(&offset).is_some_and(|at| inner.slots[*at].dirty.get())
    }

    /// True if there is anything to write.
    pub(super) fn has_dirty(&self) -> bool {
        !self.inner.borrow().dirty.is_empty()
    }

    /// True if so many slices are dirty that a commit cycle should make room.
    pub(super) fn is_pressed(&self) -> bool {
        self.inner.borrow().dirty.len() > self.capacity / 2
    }

    /// Drops what is known of a range of the file, because it will be used for something else. Nothing in it may be dirty.
    pub(super) fn forget(&self, range: Range<u64>) {
        let mut inner = self.inner.borrow_mut();
        let mut offset = range.start;
        while offset < range.end {
            self.loading.borrow_mut().remove(&offset);
            if let Some(at) = inner.map.get(&offset).copied() {
                debug_assert!(!inner.slots[at].dirty.get(), "a dirty slice at {offset:#x} is forgotten");
                inner.remove(at);
            }
            offset += self.slice_len as u64;
        }
    }
}

impl Inner {
    fn remove(&mut self, at: usize) {
        let gone = self.slots.swap_remove(at);
        self.map.remove(&gone.offset);
        if let Some(moved) = self.slots.get(at) {
            self.map.insert(moved.offset, at);
        }
    }
}
