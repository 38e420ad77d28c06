//! The memory that the ring's entries are in. The kernel reads and writes it by itself, so each entry is at any time the kernel's or ours:
//! what is the kernel's, nobody here looks at.

use crate::abi::{InHeader, OutHeader, RingEntry, RingHeader};
use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};
use std::io;
use std::ops::Range;
use std::ptr::NonNull;
use zerocopy::{FromBytes, FromZeros, IntoBytes};

/// One mapping: the headers of all entries, then their payloads, each of which begins with a page.
#[derive(Debug)]
pub(crate) struct Memory {
    start: NonNull<u8>,
    mapped: usize,
    payload: usize,
    payloads: usize,
    /// Whose each entry is.
    lent: Box<[bool]>,
}

impl Memory {
    /// Memory for as many entries, all ours, with payloads of as many bytes. It is taken from the system where it is first used.
    pub(crate) fn new(entries: usize, payload: usize) -> io::Result<Self> {
        let page = rustix::param::page_size();
        let too_much = || io::Error::from(io::ErrorKind::OutOfMemory);
        let payload = payload.checked_next_multiple_of(page).ok_or_else(too_much)?;
        let headers = entries.checked_mul(size_of::<RingHeader>()).ok_or_else(too_much)?;
        let payloads = headers.checked_next_multiple_of(page).ok_or_else(too_much)?;
        let mapped = entries
            .checked_mul(payload)
            .and_then(|all| all.checked_add(payloads))
            .filter(|mapped| isize::try_from(*mapped).is_ok())
            .ok_or_else(too_much)?;
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: a new mapping, at a place that the kernel chooses.
        let start = unsafe { mmap_anonymous(std::ptr::null_mut(), mapped, protection, flags) }?;
        let start = NonNull::new(start.cast()).expect("nothing is mapped at 0");
        Ok(Self { start, mapped, payload, payloads, lent: vec![false; entries].into() })
    }

    /// Makes an entry the kernel's; gives where its header and its payload are.
    ///
    /// # Panics
    /// If it is the kernel's, or there is no such entry.
    pub(crate) fn lend(&mut self, entry: usize) -> [libc::iovec; 2] {
        self.must_be_ours(entry);
        self.lent[entry] = true;
        [self.header_range(entry), self.payload_range(entry)]
            .map(|range| libc::iovec { iov_base: self.at(&range).as_ptr().cast(), iov_len: range.len() })
    }

    /// An entry is ours again.
    ///
    /// # Safety
    /// The kernel has said so: the last command that it was lent with is completed.
    pub(crate) unsafe fn take_back(&mut self, entry: usize) {
        self.lent[entry] = false;
    }

    /// What the kernel wrote before the payload.
    ///
    /// # Panics
    /// If the entry is the kernel's, or there is none.
    pub(crate) fn header(&self, entry: usize) -> RingHeader {
        let mut header = RingHeader::new_zeroed();
        header.as_mut_bytes().copy_from_slice(self.bytes(entry, self.header_range(entry)));
        header
    }

    /// The first bytes of the payload: `None` if it isn't so long.
    ///
    /// # Panics
    /// If the entry is the kernel's, or there is none.
    pub(crate) fn payload(&self, entry: usize, len: usize) -> Option<&[u8]> {
        self.bytes(entry, self.payload_range(entry)).get(..len)
    }

    /// Writes an answer: parts, one after the other, into the payload, and how long they are; false if there isn't so much room.
    ///
    /// # Panics
    /// If the entry is the kernel's, or there is none.
    pub(crate) fn answer(&mut self, entry: usize, unique: u64, error: i32, parts: [&[u8]; 2]) -> bool {
        let mut rest = self.bytes_mut(entry, self.payload_range(entry));
        let mut len = 0;
        for part in parts {
            let Some((room, behind)) = rest.split_at_mut_checked(part.len()) else { return false };
            room.copy_from_slice(part);
            (rest, len) = (behind, len + part.len());
        }
        let out = OutHeader { len: (size_of::<OutHeader>() + len) as u32, error, unique };
        let header = self.bytes_mut(entry, self.header_range(entry));
        header[..size_of::<OutHeader>()].copy_from_slice(out.as_bytes());
        let entry = RingEntry { payload: len as u32, ..RingEntry::new_zeroed() };
        header[std::mem::offset_of!(RingHeader, entry)..].copy_from_slice(entry.as_bytes());
        true
    }

    fn header_range(&self, entry: usize) -> Range<usize> {
        let start = entry * size_of::<RingHeader>();
        start..start + size_of::<RingHeader>()
    }

    fn payload_range(&self, entry: usize) -> Range<usize> {
        let start = self.payloads + entry * self.payload;
        start..start + self.payload
    }

    fn must_be_ours(&self, entry: usize) {
        assert!(!self.lent[entry], "entry {entry} is the kernel's");
    }

    fn at(&self, range: &Range<usize>) -> NonNull<u8> {
        assert!(range.end <= self.mapped, "{range:?} of {} bytes", self.mapped);
        // SAFETY: within the mapping.
        unsafe { self.start.add(range.start) }
    }

    /// Bytes that belong to an entry.
    fn bytes(&self, entry: usize, range: Range<usize>) -> &[u8] {
        self.must_be_ours(entry);
        // SAFETY: mapped for as long as `self` is there, never uninitialised, and written by nobody while this borrow lasts: the entry is ours, and
        // making it the kernel's takes `&mut self`.
        unsafe { std::slice::from_raw_parts(self.at(&range).as_ptr(), range.len()) }
    }

    /// The same, to be written.
    fn bytes_mut(&mut self, entry: usize, range: Range<usize>) -> &mut [u8] {
        self.must_be_ours(entry);
        // SAFETY: as above; and it is the only borrow.
        unsafe { std::slice::from_raw_parts_mut(self.at(&range).as_ptr(), range.len()) }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: mapped by `new` with this length, and nothing refers into it. It can't fail for a mapping that is there.
        let _ = unsafe { munmap(self.start.as_ptr().cast(), self.mapped) };
    }
}

impl RingHeader {
    /// What comes before each request.
    pub(crate) fn request(&self) -> InHeader {
        let (header, _) = InHeader::read_from_prefix(&self.in_out).expect("there is room for it");
        header
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::panic::{AssertUnwindSafe, catch_unwind};

    #[test]
    fn entries_have_bytes_of_their_own() {
        let mut memory = Memory::new(3, 5000).unwrap();
        for entry in 0..3 {
            let bytes = vec![entry as u8 + 1; 8192];
            assert!(memory.answer(entry, entry as u64, -5, [&bytes[..100], &bytes[100..]]));
        }
        for entry in 0..3 {
            assert!(memory.payload(entry, 8192).unwrap().iter().all(|byte| *byte == entry as u8 + 1));
            let header = memory.header(entry);
            let (out, _) = OutHeader::read_from_prefix(&header.in_out).unwrap();
            assert_eq!((out.unique, out.error, out.len), (entry as u64, -5, 8208));
            assert_eq!(header.entry.payload, 8192);
        }
        let places = memory.lend(2);
        assert_eq!(places.map(|place| place.iov_len), [288, 8192]);
        assert_eq!(places[1].iov_base as usize % 4096, 0);
    }

    #[test]
    fn no_more_is_read_or_written_than_there_is() {
        let mut memory = Memory::new(2, 4096).unwrap();
        let payload = memory.payload(0, 0).unwrap().len() + rustix::param::page_size();
        assert!(memory.payload(0, payload + 1).is_none() && memory.payload(0, usize::MAX).is_none());
        assert!(memory.payload(0, payload).is_some());
        assert!(!memory.answer(0, 1, 0, [&[1], &vec![1; payload]]));
        assert!(memory.answer(0, 1, 0, [&[], &vec![1; payload]]));
        assert!(Memory::new(usize::MAX, 4096).is_err() && Memory::new(2, usize::MAX - 5).is_err());
    }

    #[test]
    fn what_is_the_kernels_is_not_looked_at() {
        let mut memory = Memory::new(2, 4096).unwrap();
        memory.lend(1);
        let panics = |work: &mut dyn FnMut()| catch_unwind(AssertUnwindSafe(work)).is_err();
        assert!(panics(&mut || _ = memory.header(1)));
        assert!(panics(&mut || _ = memory.payload(1, 1)));
        assert!(panics(&mut || _ = memory.answer(1, 1, 0, [&[], &[]])));
        assert!(panics(&mut || _ = memory.lend(1)));
        assert!(panics(&mut || _ = memory.header(2)), "there is none");
        memory.header(0);
        // SAFETY: no kernel has it.
        unsafe { memory.take_back(1) };
        memory.header(1);
    }
}
