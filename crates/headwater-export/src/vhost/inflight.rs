//! The record of requests that were taken and not answered, in memory that the front end keeps.
//!
//! If this process dies, the guest's driver still waits for those. The front end hands the record to whoever serves the queues next, who
//! does them again, in the order in which they were taken. The layout and the steps are those of the vhost-user specification for split rings,
//! so that the next one may be another program.
//!
//! What is stored in which order is what makes it right: a kill may come between any two stores. A request is entered before anything is
//! done for it. When it is answered, the record first says that its answer is the next to be published, then the used ring publishes it, then
//! the entry is cleared; if the used index in the record differs from the ring's, the answer was published but not cleared.
//!
//! Behind the records stands something of our own: the cache mode that the guest's driver chose. A front end doesn't say it again to a successor,
//! who would otherwise let writes stay in memory that the guest takes for durable.
//!
//! The memory is shared with the front end and may hold anything. It can't make us do more than ask the guest's queue for a chain.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::rc::Rc;
use std::sync::atomic::Ordering;

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use vhost::vhost_user::message::VhostUserInflight;
use vhost::vhost_user::{Error, Result};
use vm_memory::{AtomicAccess, Bytes, MmapRegion, VolatileMemory};

use super::chain::{Broken, MAX_DESCRIPTORS};
use super::config::MAX_QUEUES;
use super::guest::map;

/// The layout that we know.
const VERSION: u16 = 1;

/// The sizes in bytes of what stands in front of a queue's entries, of an entry, and of the unit in which queues are laid out.
const HEADER: usize = 16;
const ENTRY: usize = 16;
const UNIT: usize = 64;

/// Fields of the header.
const HEADER_VERSION: usize = 8;
const HEADER_COUNT: usize = 10;
const HEADER_LAST_HEAD: usize = 12;
const HEADER_USED: usize = 14;

/// Fields of an entry.
const ENTRY_TAKEN: usize = 0;
const ENTRY_NEXT: usize = 6;
const ENTRY_COUNTER: usize = 8;

/// What stands behind the records: a word to know it by, and the cache mode.
const OWN_MARK: u64 = u64::from_le_bytes(*b"hwblkwce");
const OWN_WCE: usize = 8;

fn check_extent(queues: u16, queue_size: u16) -> Result<()> {
    if queues > MAX_QUEUES || u32::from(queue_size) > MAX_DESCRIPTORS {
        return Err(Error::InvalidOperation("records of more or longer queues than there may be"));
    }
    Ok(())
}

/// The records of all queues.
pub(crate) struct Inflight {
    memory: Rc<MmapRegion>,
    queues: u16,
    queue_size: u16,
    /// Where our own part starts, if the memory was made by us.
    own: Option<usize>,
}

fn stride(queue_size: u16) -> usize {
    (HEADER + ENTRY * usize::from(queue_size)).next_multiple_of(UNIT)
}

impl Inflight {
    /// Makes empty records, for the front end to keep.
    ///
    /// # Errors
    /// If they are more or longer than there may be, or there is no memory for them.
    pub(crate) fn create(queues: u16, queue_size: u16, wce: bool) -> Result<(VhostUserInflight, File)> {
        check_extent(queues, queue_size)?;
        let own = stride(queue_size) * usize::from(queues);
        let size = (own + UNIT) as u64;
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = memfd_create("headwater-inflight", flags).map_err(|_| Error::MemFdCreateError)?;
        ftruncate(&file, size).map_err(|_| Error::FileTruncateError)?;
        fcntl_add_seals(&file, SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL)
            .map_err(|_| Error::MemFdSealError)?;
        let file = File::from(file);
        file.write_all_at(&OWN_MARK.to_le_bytes(), own as u64).map_err(Error::ReqHandlerError)?;
        file.write_all_at(&[wce.into()], (own + OWN_WCE) as u64).map_err(Error::ReqHandlerError)?;
        Ok((VhostUserInflight::new(size, 0, queues, queue_size), file))
    }

    /// Takes over the records that a front end kept.
    ///
    /// # Errors
    /// If they can't be mapped or are too small for the queues that they are said to be of.
    pub(crate) fn adopt(told: &VhostUserInflight, file: File) -> Result<Self> {
        check_extent(told.num_queues, told.queue_size)?;
        let needed = stride(told.queue_size) * usize::from(told.num_queues);
        if told.mmap_size < needed as u64 {
            return Err(Error::InvalidOperation("the record of requests in flight is too small"));
        }
        let memory = Rc::new(map(file, told.mmap_offset, told.mmap_size.min((needed + UNIT) as u64))?);
        let mark = memory.as_volatile_slice().load(needed, Ordering::Acquire).map(u64::from_le);
        let own = (told.mmap_size >= (needed + UNIT) as u64 && mark.is_ok_and(|mark| mark == OWN_MARK))
            .then_some(needed);
        Ok(Self { memory, queues: told.num_queues, queue_size: told.queue_size, own })
    }

    /// Keeps the cache mode that the guest's driver chose.
    pub(crate) fn remember_wce(&self, wce: bool) {
        if let Some(own) = self.own {
            let stored =
                self.memory.as_volatile_slice().store(u8::from(wce), own + OWN_WCE, Ordering::Release);
            debug_assert!(stored.is_ok(), "the memory was mapped in whole");
        }
    }

    /// The cache mode that was kept, if it was.
    pub(crate) fn remembered_wce(&self) -> Option<bool> {
        let wce: u8 = self.memory.as_volatile_slice().load(self.own? + OWN_WCE, Ordering::Acquire).ok()?;
        Some(wce != 0)
    }

    /// The record of one queue; `None` if it is of fewer or shorter queues.
    pub(crate) fn of_queue(&self, index: u16, size: u16) -> Option<Record> {
        (index < self.queues && size <= self.queue_size).then(|| Record {
            memory: self.memory.clone(),
            start: stride(self.queue_size) * usize::from(index),
            size,
            counter: 0,
        })
    }
}

/// The record of one queue.
pub(crate) struct Record {
    memory: Rc<MmapRegion>,
    start: usize,
    size: u16,
    counter: u64,
}

impl Record {
    /// Reads what is left of an earlier life, of which the ring has published answers up to `used`: the heads of what was taken and not
    /// answered, in the order in which it was taken. `None` if there was no earlier life.
    ///
    /// # Errors
    /// If the record contradicts itself.
    pub(crate) fn recover(&mut self, used: u16) -> std::result::Result<Option<Vec<u16>>, Broken> {
        let version: u16 = self.load(HEADER_VERSION);
        let count: u16 = self.load(HEADER_COUNT);
        // A driver that starts anew may choose another size, as a machine's firmware and its system do.
        let other_size = version == VERSION && count != self.size && self.taken().is_empty();
        if version == 0 || other_size {
            self.store(HEADER_COUNT, self.size);
            self.store(HEADER_USED, used);
            self.store(HEADER_VERSION, VERSION);
            return Ok(None);
        }
        if version != VERSION || count != self.size {
            let message =
                format!("the record of requests in flight is version {version} for {count} entries");
            return Err(Broken::new(message));
        }
        // Answers that were published, but whose entries are still there.
        let published = used.wrapping_sub(self.load(HEADER_USED));
        if published > self.size {
            return Err(Broken::new(format!(
                "the record of requests in flight is {published} answers behind"
            )));
        }
        let mut head: u16 = self.load(HEADER_LAST_HEAD);
        for _ in 0..published {
            if head >= self.size {
                return Err(Broken::new(format!("the record of requests in flight names descriptor {head}")));
            }
            self.store(self.entry(head) + ENTRY_TAKEN, 0u8);
            head = self.load(self.entry(head) + ENTRY_NEXT);
        }
        self.store(HEADER_USED, used);
        let taken = self.taken();
        self.counter = taken.last().map_or(0, |(counter, _)| counter.wrapping_add(1));
        Ok(Some(taken.into_iter().map(|(_, head)| head).collect()))
    }

    /// What was taken and not answered, with the numbers by which it was counted, in their order.
    fn taken(&self) -> Vec<(u64, u16)> {
        let mut taken: Vec<(u64, u16)> = (0..self.size)
            .filter(|head| self.load::<u8>(self.entry(*head) + ENTRY_TAKEN) == 1)
            .map(|head| (self.load(self.entry(head) + ENTRY_COUNTER), head))
            .collect();
        taken.sort_unstable();
        taken
    }

    /// A request is taken.
    pub(crate) fn take(&mut self, head: u16) {
        let entry = self.entry(head);
        self.store(entry + ENTRY_COUNTER, self.counter);
        self.counter = self.counter.wrapping_add(1);
        self.store(entry + ENTRY_TAKEN, 1u8);
    }

    /// The answer to a request is about to be published.
    pub(crate) fn answering(&self, head: u16) {
        self.store(self.entry(head) + ENTRY_NEXT, self.load::<u16>(HEADER_LAST_HEAD));
        self.store(HEADER_LAST_HEAD, head);
    }

    /// The answer has been published; the ring has published them up to `used`.
    pub(crate) fn answered(&self, head: u16, used: u16) {
        self.store(self.entry(head) + ENTRY_TAKEN, 0u8);
        self.store(HEADER_USED, used);
    }

    /// Where the entry of a head is, which is below the queue's size.
    fn entry(&self, head: u16) -> usize {
        HEADER + ENTRY * usize::from(head)
    }

    fn load<T: AtomicAccess + Default>(&self, at: usize) -> T {
        // The memory was mapped in whole, so that there is no place in it that can't be read.
        self.memory.as_volatile_slice().load(self.start + at, Ordering::Acquire).unwrap_or_default()
    }

    fn store<T: AtomicAccess>(&self, at: usize, value: T) {
        let stored = self.memory.as_volatile_slice().store(value, self.start + at, Ordering::Release);
        debug_assert!(stored.is_ok(), "the memory was mapped in whole");
    }
}

#[cfg(test)]
mod tests;
