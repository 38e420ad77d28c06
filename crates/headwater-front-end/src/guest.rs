//! A guest's memory.

use std::fs::File;
use std::sync::atomic::{Ordering, fence};

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};

/// The guest's memory: two regions of 8 MiB side by side, in one file.
pub const REGION: u64 = 8 << 20;
/// Where the front end has the guest's address 0.
pub const USER: u64 = 0x7f00_0000_0000;

/// The guest's memory, which outlives connections.
pub struct Guest {
    /// What is handed over.
    pub file: File,
    /// The same, mapped here.
    pub memory: GuestMemoryMmap,
}

impl Guest {
    /// Memory full of zeroes.
    #[expect(clippy::new_without_default, reason = "it takes memory, which is worth a word")]
    pub fn new() -> Self {
        let fd = memfd_create("guest", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
        ftruncate(&fd, 2 * REGION).unwrap();
        let file = File::from(fd);
        let whole = FileOffset::new(file.try_clone().unwrap(), 0);
        let ranges = [(GuestAddress(0), 2 * REGION as usize, Some(whole))];
        let memory = GuestMemoryMmap::from_ranges_with_files(ranges).unwrap();
        Self { file, memory }
    }

    /// Writes bytes at the guest's address `at`.
    pub fn write(&self, at: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(at)).unwrap();
    }

    /// Reads `len` bytes at the guest's address `at`.
    pub fn read(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.read_slice(&mut bytes, GuestAddress(at)).unwrap();
        bytes
    }

    /// Reads a word of a ring.
    pub fn word(&self, at: u64) -> u16 {
        self.memory.read_obj(GuestAddress(at)).unwrap()
    }

    /// Writes a word of a ring, after all that was written before and before all that is read afterwards.
    pub fn set_word(&self, at: u64, value: u16) {
        fence(Ordering::SeqCst);
        self.memory.write_obj(value, GuestAddress(at)).unwrap();
        fence(Ordering::SeqCst);
    }
}
