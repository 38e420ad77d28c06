//! What crosses the line to the kernel, as `include/uapi/linux/fuse.h` has it: structures of this machine's byte order.

use zerocopy::{FromBytes, Immutable, IntoBytes};

/// The protocol's version. The kernel's major number is this one since 2006.
pub(crate) const MAJOR: u32 = 7;
/// The newest minor number whose words are said here, and the oldest that has all that is needed (Linux 3.15).
pub(crate) const MINOR: u32 = 42;
pub(crate) const OLDEST_MINOR: u32 = 23;

/// Operations.
pub(crate) mod opcode {
    pub(crate) const FORGET: u32 = 2;
    pub(crate) const GETATTR: u32 = 3;
    pub(crate) const SETATTR: u32 = 4;
    pub(crate) const OPEN: u32 = 14;
    pub(crate) const READ: u32 = 15;
    pub(crate) const WRITE: u32 = 16;
    pub(crate) const STATFS: u32 = 17;
    pub(crate) const RELEASE: u32 = 18;
    pub(crate) const FSYNC: u32 = 20;
    pub(crate) const FLUSH: u32 = 25;
    pub(crate) const INIT: u32 = 26;
    pub(crate) const INTERRUPT: u32 = 36;
    pub(crate) const BATCH_FORGET: u32 = 42;
    pub(crate) const FALLOCATE: u32 = 43;
    pub(crate) const LSEEK: u32 = 46;
}

/// What both sides can do.
pub(crate) mod capability {
    pub(crate) const ASYNC_READ: u64 = 1 << 0;
    pub(crate) const BIG_WRITES: u64 = 1 << 5;
    pub(crate) const ASYNC_DIO: u64 = 1 << 15;
    pub(crate) const MAX_PAGES: u64 = 1 << 22;
    /// There are more than 32.
    pub(crate) const INIT_EXT: u64 = 1 << 30;
    pub(crate) const DIRECT_IO_ALLOW_MMAP: u64 = 1 << 36;
    pub(crate) const OVER_IO_URING: u64 = 1 << 41;
}

/// Which attributes are set.
pub(crate) mod valid {
    pub(crate) const MODE: u32 = 1 << 0;
    pub(crate) const UID: u32 = 1 << 1;
    pub(crate) const GID: u32 = 1 << 2;
    pub(crate) const SIZE: u32 = 1 << 3;
}

/// How an open file is read and written: past the kernel's cache, and by several at once.
pub(crate) const OPEN_DIRECT_IO: u32 = 1 << 0;
pub(crate) const OPEN_PARALLEL_DIRECT_WRITES: u32 = 1 << 6;

/// Before each request.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
pub(crate) struct InHeader {
    /// Of the whole message, in bytes.
    pub(crate) len: u32,
    pub(crate) opcode: u32,
    pub(crate) unique: u64,
    pub(crate) node: u64,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) pid: u32,
    pub(crate) extensions: u16,
    pub(crate) padding: u16,
}

/// Before each answer.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
pub(crate) struct OutHeader {
    pub(crate) len: u32,
    /// 0, or an error number that is negative.
    pub(crate) error: i32,
    pub(crate) unique: u64,
}

/// The kernel's part of the first exchange, as old kernels have it.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
pub(crate) struct InitIn {
    pub(crate) major: u32,
    pub(crate) minor: u32,
    pub(crate) max_readahead: u32,
    pub(crate) flags: u32,
}

/// Our part of the first exchange.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
pub(crate) struct InitOut {
    pub(crate) major: u32,
    pub(crate) minor: u32,
    pub(crate) max_readahead: u32,
    pub(crate) flags: u32,
    pub(crate) max_background: u16,
    pub(crate) congestion_threshold: u16,
    pub(crate) max_write: u32,
    pub(crate) time_granularity: u32,
    pub(crate) max_pages: u16,
    pub(crate) map_alignment: u16,
    pub(crate) flags_high: u32,
    pub(crate) max_stack_depth: u32,
    pub(crate) unused: [u16; 12],
}

#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
pub(crate) struct SetAttrIn {
    pub(crate) valid: u32,
    pub(crate) padding: u32,
    pub(crate) handle: u64,
    pub(crate) size: u64,
    pub(crate) lock_owner: u64,
    pub(crate) times: [u64; 3],
    pub(crate) nanoseconds: [u32; 3],
    pub(crate) mode: u32,
    pub(crate) unused: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) unused_too: u32,
}

#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
pub(crate) struct OpenIn {
    pub(crate) flags: u32,
    pub(crate) open_flags: u32,
}

/// Of a read and of a write alike; a write's bytes follow.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
pub(crate) struct TransferIn {
    pub(crate) handle: u64,
    pub(crate) offset: u64,
    pub(crate) size: u32,
    pub(crate) how: u32,
    pub(crate) lock_owner: u64,
    /// With which the file is open.
    pub(crate) flags: u32,
    pub(crate) padding: u32,
}

#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
pub(crate) struct FallocateIn {
    pub(crate) handle: u64,
    pub(crate) offset: u64,
    pub(crate) length: u64,
    pub(crate) mode: u32,
    pub(crate) padding: u32,
}

#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
pub(crate) struct LseekIn {
    pub(crate) handle: u64,
    pub(crate) offset: u64,
    pub(crate) whence: u32,
    pub(crate) padding: u32,
}

/// A file's attributes, and for how long they may be believed.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
pub(crate) struct AttrOut {
    pub(crate) believed_seconds: u64,
    pub(crate) believed_nanoseconds: u32,
    pub(crate) unused: u32,
    pub(crate) node: u64,
    pub(crate) size: u64,
    pub(crate) blocks: u64,
    /// Of the last access, of the last change of the contents, and of the last change of all.
    pub(crate) times: [u64; 3],
    pub(crate) nanoseconds: [u32; 3],
    pub(crate) mode: u32,
    pub(crate) links: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) device: u32,
    pub(crate) block_size: u32,
    pub(crate) flags: u32,
}

#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
pub(crate) struct OpenOut {
    pub(crate) handle: u64,
    pub(crate) flags: u32,
    pub(crate) backing: i32,
}

#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
pub(crate) struct WriteOut {
    pub(crate) size: u32,
    pub(crate) padding: u32,
}

#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
pub(crate) struct StatfsOut {
    pub(crate) blocks: u64,
    pub(crate) free: u64,
    pub(crate) available: u64,
    pub(crate) files: u64,
    pub(crate) free_files: u64,
    pub(crate) block_size: u32,
    pub(crate) name_length: u32,
    pub(crate) fragment_size: u32,
    pub(crate) padding: u32,
    pub(crate) spare: [u32; 6],
}

#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
pub(crate) struct LseekOut {
    pub(crate) offset: u64,
}

/// Commands of the ring.
pub(crate) const REGISTER: u32 = 1;
pub(crate) const COMMIT_AND_FETCH: u32 = 2;

/// What an entry of the ring has besides its payload.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
pub(crate) struct RingHeader {
    /// An [`InHeader`] on the way here, an [`OutHeader`] on the way back.
    pub(crate) in_out: [u8; 128],
    /// The arguments of the operation.
    pub(crate) arguments: [u8; 128],
    pub(crate) entry: RingEntry,
}

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
pub(crate) struct RingEntry {
    pub(crate) flags: u64,
    /// By which the answer names the request.
    pub(crate) commit: u64,
    /// How much of the payload counts, in bytes.
    pub(crate) payload: u32,
    pub(crate) padding: u32,
    pub(crate) reserved: u64,
}

/// What a command says, in the ring's long entries.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
pub(crate) struct RingCommand {
    pub(crate) flags: u64,
    pub(crate) commit: u64,
    pub(crate) queue: u16,
    pub(crate) padding: [u8; 6],
    /// The room that is left.
    pub(crate) unused: [u8; 56],
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn structures_are_as_long_as_the_headers() {
        assert_eq!((size_of::<InHeader>(), size_of::<OutHeader>()), (40, 16));
        assert_eq!((size_of::<InitIn>(), size_of::<InitOut>()), (16, 64));
        assert_eq!((size_of::<SetAttrIn>(), size_of::<AttrOut>()), (88, 104));
        assert_eq!((size_of::<OpenIn>(), size_of::<OpenOut>()), (8, 16));
        assert_eq!((size_of::<TransferIn>(), size_of::<WriteOut>()), (40, 8));
        assert_eq!((size_of::<FallocateIn>(), size_of::<LseekIn>()), (32, 24));
        assert_eq!((size_of::<StatfsOut>(), size_of::<LseekOut>()), (80, 8));
        assert_eq!(
            (size_of::<RingHeader>(), size_of::<RingEntry>(), size_of::<RingCommand>()),
            (288, 32, 80)
        );
    }
}
