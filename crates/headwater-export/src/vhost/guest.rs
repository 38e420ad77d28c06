//! A guest's memory, as its front end shares it.

use std::fs::File;
use std::sync::Arc;

use rustix::fs::{SealFlags, fcntl_add_seals, fcntl_get_seals};
use vhost::vhost_user::message::VhostUserMemoryRegion;
use vhost::vhost_user::{Error, Result};
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestRegionMmap, MmapRegion,
};

/// Most regions that a guest's memory may have. Each holds a descriptor, of which other exports need some as well.
pub(crate) const MAX_REGIONS: usize = 128;

/// Most memory that a guest may have, in bytes: 16 TiB. A file without contents can be said to be as large as all of our address space, and
/// then there would be none left for others.
const MAX_MEMORY: u64 = 16 << 40;

/// What a queue and its requests hold while they use the memory.
pub(crate) type Memory = Arc<GuestMemoryMmap>;

/// One region, as the front end described it.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Place {
    guest: u64,
    user: u64,
    size: u64,
}

impl Place {
    fn of(region: &VhostUserMemoryRegion) -> Self {
        Self { guest: region.guest_phys_addr, user: region.user_addr, size: region.memory_size }
    }
}

/// All regions. A change makes a new [`Memory`]; requests that run keep the one that they started with.
#[derive(Default)]
pub(crate) struct Table {
    places: Vec<Place>,
    memory: Memory,
}

impl Table {
    /// Maps `regions`, each from its file.
    ///
    /// # Errors
    /// If one can't be mapped, reaches past the end of its file, or overlaps another.
    pub(crate) fn new(regions: &[VhostUserMemoryRegion], files: Vec<File>) -> Result<Self> {
        let mut table = Self::default();
        for (region, file) in regions.iter().zip(files) {
            table.add(region, file)?;
        }
        Ok(table)
    }

    /// The memory as it is now.
    pub(crate) fn memory(&self) -> Memory {
        self.memory.clone()
    }

    /// Maps one region more.
    ///
    /// # Errors
    /// As [`Table::new`]; then nothing has changed.
    pub(crate) fn add(&mut self, region: &VhostUserMemoryRegion, file: File) -> Result<()> {
        if self.places.len() >= MAX_REGIONS {
            return Err(Error::InvalidOperation("there are too many memory regions"));
        }
        let (guest, size) = (region.guest_phys_addr, region.memory_size);
        let before: u64 = self.places.iter().map(|place| place.size).sum();
        if size > MAX_MEMORY - before {
            return Err(Error::InvalidOperation("there is too much memory"));
        }
        let mapping = map(file, region.mmap_offset, size)?;
        let mapped = GuestRegionMmap::new(mapping, GuestAddress(guest)).ok_or(Error::InvalidParam)?;
        // Regions that overlap or touch the end of the address space are refused here.
        let memory = self.memory.insert_region(Arc::new(mapped)).map_err(|_| Error::InvalidParam)?;
        self.memory = Arc::new(memory);
        self.places.push(Place::of(region));
        Ok(())
    }

    /// Gives one region up.
    ///
    /// # Errors
    /// If it isn't there.
    pub(crate) fn remove(&mut self, region: &VhostUserMemoryRegion) -> Result<()> {
        let place = Place::of(region);
        let at = self.places.iter().position(|other| *other == place).ok_or(Error::InvalidParam)?;
        let removed = self.memory.remove_region(GuestAddress(place.guest), place.size);
        let (memory, _) = removed.map_err(|_| Error::InvalidParam)?;
        self.memory = Arc::new(memory);
        self.places.swap_remove(at);
        Ok(())
    }

    /// Where the guest has what the front end has at `user`.
    ///
    /// # Errors
    /// If it is in no region.
    pub(crate) fn translate(&self, user: u64) -> Result<GuestAddress> {
        let found = self.places.iter().find_map(|place| {
            let offset = user.checked_sub(place.user).filter(|offset| *offset < place.size)?;
            Some(GuestAddress(place.guest + offset))
        });
        found.ok_or(Error::InvalidOperation("the address of a ring is in no memory region"))
    }
}

/// Maps a part of a file for reading and writing, such that the front end can't take it away afterwards, if the kernel lets us.
pub(crate) fn map(file: File, offset: u64, size: u64) -> Result<MmapRegion> {
    // It fails for files that can't be sealed; those that were sealed before are fine as well.
    let sealed = fcntl_add_seals(&file, SealFlags::SHRINK).is_ok()
        || fcntl_get_seals(&file).is_ok_and(|seals| seals.contains(SealFlags::SHRINK));
    if !sealed {
        tracing::debug!("shared memory is in a file that can't be sealed: the front end must not shorten it");
    }
    let size = usize::try_from(size).map_err(|_| Error::InvalidParam)?;
    let end = offset.checked_add(size as u64).ok_or(Error::InvalidParam)?;
    let length = file.metadata().map_err(Error::ReqHandlerError)?.len();
    if size == 0 || end > length {
        return Err(Error::InvalidOperation("a memory region reaches past the end of its file"));
    }
    MmapRegion::from_file(FileOffset::new(file, offset), size)
        .map_err(|err| Error::ReqHandlerError(std::io::Error::other(err)))
}

/// A run of a request's bytes in the guest's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Part {
    pub(crate) start: GuestAddress,
    pub(crate) len: u32,
}

/// A request's bytes in the guest's memory, in order. That the parts lie within the memory was checked, and is again when they are used.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(crate) struct Parts {
    parts: Vec<Part>,
    len: u64,
}

impl Parts {
    pub(crate) fn push(&mut self, part: Part) {
        if part.len > 0 {
            self.len += u64::from(part.len);
            self.parts.push(part);
        }
    }

    /// How many bytes they are.
    pub(crate) fn len(&self) -> u64 {
        self.len
    }

    /// The parts that remain after the first `count` bytes, which are cut off. `None` if there are fewer.
    pub(crate) fn cut_front(&mut self, count: u64) -> Option<()> {
        let mut left = count.min(self.len);
        let short = count > self.len;
        self.len -= left;
        let mut whole = 0;
        for part in &mut self.parts {
            if left < u64::from(part.len) {
                part.start = GuestAddress(part.start.0 + left);
                part.len -= left as u32;
                break;
            }
            left -= u64::from(part.len);
            whole += 1;
        }
        self.parts.drain(..whole);
        (!short).then_some(())
    }

    /// Cuts the last byte off and says where it is. `None` if there is none.
    pub(crate) fn cut_last_byte(&mut self) -> Option<GuestAddress> {
        let last = self.parts.last_mut()?;
        last.len -= 1;
        self.len -= 1;
        let at = GuestAddress(last.start.0 + u64::from(last.len));
        if last.len == 0 {
            self.parts.pop();
        }
        Some(at)
    }

    /// Fills `into` with the bytes from `offset` on.
    ///
    /// # Errors
    /// If they are fewer, or the memory is gone.
    pub(crate) fn read(
        &self,
        memory: &GuestMemoryMmap,
        offset: u64,
        into: &mut [u8],
    ) -> std::result::Result<(), Gone> {
        let mut done = 0;
        for Part { start, len } in self.from(offset, into.len()) {
            memory.read_slice(&mut into[done..done + len as usize], start).map_err(|_| Gone)?;
            done += len as usize;
        }
        if done == into.len() { Ok(()) } else { Err(Gone) }
    }

    /// Puts `data` over the bytes from `offset` on.
    ///
    /// # Errors
    /// As [`Parts::read`].
    pub(crate) fn write(
        &self,
        memory: &GuestMemoryMmap,
        offset: u64,
        data: &[u8],
    ) -> std::result::Result<(), Gone> {
        let mut done = 0;
        for Part { start, len } in self.from(offset, data.len()) {
            memory.write_slice(&data[done..done + len as usize], start).map_err(|_| Gone)?;
            done += len as usize;
        }
        if done == data.len() { Ok(()) } else { Err(Gone) }
    }

    /// What lies from `offset` on, at most `count` bytes.
    fn from(&self, offset: u64, count: usize) -> impl Iterator<Item = Part> {
        let (mut skip, mut left) = (offset, count);
        self.parts.iter().filter_map(move |part| {
            let skipped = skip.min(part.len.into());
            skip -= skipped;
            let len = (part.len as usize - skipped as usize).min(left);
            left -= len;
            let start = GuestAddress(part.start.0 + skipped);
            (len > 0).then_some(Part { start, len: len as u32 })
        })
    }
}

/// Memory that was there when a request was checked isn't any more.
#[derive(Debug)]
pub(crate) struct Gone;

/// True if `len` bytes at `start` are in the memory, also across regions that touch.
pub(crate) fn contains(memory: &GuestMemoryMmap, start: GuestAddress, len: u32) -> bool {
    GuestMemoryBackend::check_range(memory, start, len as usize)
}
