//! The memory in which the driver describes requests.

use crate::abi::{Descriptor, Request};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use std::ffi::c_void;
use std::fs::File;
use std::io;
use std::ptr::NonNull;

/// One descriptor for each tag, in pages of the kernel's that this process can only read.
#[derive(Debug)]
pub(crate) struct Descriptors {
    start: NonNull<c_void>,
    /// Whole pages, as the driver demands.
    mapped: usize,
    depth: u16,
}

impl Descriptors {
    /// Maps those of the only queue of a device, of which `device` is the server's side.
    pub(crate) fn map(device: &File, depth: u16) -> io::Result<Self> {
        let mapped =
            (usize::from(depth) * size_of::<Descriptor>()).next_multiple_of(rustix::param::page_size());
        // SAFETY: a new mapping, at a place that the kernel chooses.
        let start =
            unsafe { mmap(std::ptr::null_mut(), mapped, ProtFlags::READ, MapFlags::SHARED, device, 0) }?;
        let start = NonNull::new(start).expect("nothing is mapped at 0");
        Ok(Self { start, mapped, depth })
    }

    /// The request with this tag. It must have arrived and not been answered: the driver writes descriptors at other times.
    ///
    /// # Panics
    /// If there is no such tag.
    pub(crate) fn request(&self, tag: u16) -> Request {
        assert!(tag < self.depth, "the queue has {} tags", self.depth);
        let descriptor = self.start.cast::<Descriptor>();
        // SAFETY: it lies in the mapping, which begins with a page, and whatever is there is a descriptor. Volatile because somebody else writes it.
        Request::decode(unsafe { descriptor.add(usize::from(tag)).read_volatile() })
    }
}

impl Drop for Descriptors {
    fn drop(&mut self) {
        // SAFETY: mapped by `map` with this length, and nothing refers into it. It can't fail for a mapping that is there.
        let _ = unsafe { munmap(self.start.as_ptr(), self.mapped) };
    }
}
