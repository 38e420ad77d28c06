//! Chains of descriptors, as a guest's driver writes them, and the requests that they are.
//!
//! Everything here comes from the guest. Each descriptor is read once, because its memory may change at any time, and then checked: within the
//! table, no loops, no tables within tables, what is read before what is written, inside the guest's memory.

use std::fmt;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES,
};
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryMmap};

use super::guest::{Part, Parts, contains};

/// Most descriptors in a chain: the longest queue that there may be.
pub(crate) const MAX_DESCRIPTORS: u32 = 1024;

/// The size of a descriptor in bytes.
const DESCRIPTOR: u32 = 16;

/// The size in bytes of what stands in front of each request.
const HEADER: usize = 16;

/// Why a queue can't be gone on with.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Broken(pub(crate) String);

impl fmt::Display for Broken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Broken {
    pub(crate) fn new(why: impl Into<String>) -> Self {
        Self(why.into())
    }
}

/// A request with the places of its data.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Request {
    pub(crate) kind: Kind,
    /// Where it is about, in sectors of 512 bytes.
    pub(crate) sector: u64,
    /// Where the outcome goes.
    pub(crate) status: GuestAddress,
    /// How many bytes the guest made room for, the outcome included: what it is told were used.
    pub(crate) room: u32,
}

/// What a request wants.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Read the disk into these.
    Read(Parts),
    /// Write these to the disk.
    Write(Parts),
    /// Make durable what was written.
    Flush,
    /// Tell what the disk is called.
    GetId(Parts),
    /// Forget what is in the ranges that are listed here.
    Discard(Parts),
    /// Make the ranges that are listed here read as zeroes.
    WriteZeroes(Parts),
    /// Something that isn't offered.
    Other(u32),
}

impl Kind {
    /// How many bytes of data there are.
    pub(crate) fn data_len(&self) -> u64 {
        match self {
            Self::Read(parts) | Self::Write(parts) => parts.len(),
            Self::GetId(_) | Self::Discard(_) | Self::WriteZeroes(_) | Self::Flush | Self::Other(_) => 0,
        }
    }
}

/// Where a queue's descriptors are.
#[derive(Clone, Copy)]
pub(crate) struct Descriptors {
    pub(crate) start: GuestAddress,
    pub(crate) count: u32,
}

impl Descriptors {
    fn get(self, memory: &GuestMemoryMmap, index: u16) -> Result<Descriptor, Broken> {
        if u32::from(index) >= self.count {
            return Err(Broken::new(format!("descriptor {index} is past the end of {}", self.count)));
        }
        let offset = u64::from(index) * u64::from(DESCRIPTOR);
        let at = self.start.checked_add(offset).ok_or_else(|| Broken::new("a table of descriptors wraps"))?;
        memory.read_obj(at).map_err(|_| Broken::new(format!("descriptor at {:#x} is outside memory", at.0)))
    }

    /// The request that starts at `head`.
    pub(crate) fn request(self, memory: &GuestMemoryMmap, head: u16) -> Result<Request, Broken> {
        let (mut readable, mut writable) = self.walk(memory, head)?;
        let room = u32::try_from(writable.len()).unwrap_or(u32::MAX);
        let mut header = [0; HEADER];
        let whole = readable.read(memory, 0, &mut header).is_ok();
        if !whole || readable.cut_front(HEADER as u64).is_none() {
            return Err(Broken::new(format!("a request of {} bytes has no header", readable.len())));
        }
        let status = writable.cut_last_byte();
        let status = status.ok_or_else(|| Broken::new("a request has no room for its outcome"))?;
        let [kind, _priority, low, high] = [0, 4, 8, 12].map(|at| {
            let word = [header[at], header[at + 1], header[at + 2], header[at + 3]];
            u32::from_le_bytes(word)
        });
        let kind = match kind {
            VIRTIO_BLK_T_IN => Kind::Read(writable),
            VIRTIO_BLK_T_OUT => Kind::Write(readable),
            VIRTIO_BLK_T_FLUSH => Kind::Flush,
            VIRTIO_BLK_T_GET_ID => Kind::GetId(writable),
            VIRTIO_BLK_T_DISCARD => Kind::Discard(readable),
            VIRTIO_BLK_T_WRITE_ZEROES => Kind::WriteZeroes(readable),
            other => Kind::Other(other),
        };
        let sector = u64::from(high) << 32 | u64::from(low);
        Ok(Request { kind, sector, status, room })
    }

    /// What the guest's driver has to be read, and where it lets us write.
    fn walk(self, memory: &GuestMemoryMmap, head: u16) -> Result<(Parts, Parts), Broken> {
        let (mut readable, mut writable) = (Parts::default(), Parts::default());
        let (mut table, mut index, mut left) = (self, head, self.count.min(MAX_DESCRIPTORS));
        let mut indirect = false;
        loop {
            if left == 0 {
                return Err(Broken::new(format!("the chain at {head} has a loop")));
            }
            left -= 1;
            let descriptor = table.get(memory, index)?;
            let (start, len) = (descriptor.addr(), descriptor.len());
            if descriptor.refers_to_indirect_table() {
                if indirect || descriptor.has_next() {
                    return Err(Broken::new(format!("the chain at {head} goes on beside an indirect table")));
                }
                if len == 0 || !len.is_multiple_of(DESCRIPTOR) || len / DESCRIPTOR > MAX_DESCRIPTORS {
                    return Err(Broken::new(format!("an indirect table has {len} bytes")));
                }
                table = Descriptors { start, count: len / DESCRIPTOR };
                (index, left, indirect) = (0, table.count, true);
                continue;
            }
            if !contains(memory, start, len) {
                let message = format!("{len} bytes at {:#x} are outside the guest's memory", start.0);
                return Err(Broken::new(message));
            }
            let part = Part { start, len };
            if descriptor.is_write_only() {
                writable.push(part);
            } else if writable.len() > 0 {
                return Err(Broken::new(format!(
                    "the chain at {head} has bytes to read after those to write"
                )));
            } else {
                readable.push(part);
            }
            if readable.len() + writable.len() > u32::MAX.into() {
                return Err(Broken::new(format!("the chain at {head} is longer than 4 GiB")));
            }
            if !descriptor.has_next() {
                return Ok((readable, writable));
            }
            index = descriptor.next();
        }
    }
}

#[cfg(test)]
mod tests;
