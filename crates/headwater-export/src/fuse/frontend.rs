//! What the kernel asks, on the thread that reads it: turned into [`Request`]s for the disk's thread.

use fuser::{
    FileHandle, Filesystem, FopenFlags, INodeNo, InitFlags, KernelConfig, LockOwner, OpenAccMode, OpenFlags,
    ReplyAttr, ReplyData, ReplyEmpty, ReplyLseek, ReplyOpen, ReplyStatfs, ReplyWrite, TimeOrNow,
    WriteFlags as FuseWriteFlags,
};
use rustix::fs::{FallocateFlags, OFlags};
use std::io;
use std::time::SystemTime;
use tokio::sync::mpsc;

/// Longest read or write, in bytes: more than this the kernel splits.
pub(crate) const MAX_PAYLOAD: u32 = 1 << 20;

/// How many requests the kernel has on their way that nobody waits for (readahead, asynchronous direct I/O).
const MAX_BACKGROUND: u16 = 64;

/// One request, with the way to answer it. A dropped answer becomes EIO.
pub(crate) enum Request {
    Attributes(ReplyAttr),
    SetAttributes(NewAttributes, ReplyAttr),
    Read { offset: u64, length: u32, reply: ReplyData },
    Write { offset: u64, data: Vec<u8>, durable: bool, reply: ReplyWrite },
    Flush(ReplyEmpty),
    Allocate { offset: u64, length: u64, mode: FallocateFlags, reply: ReplyEmpty },
    Seek { offset: u64, to: SeekTo, reply: ReplyLseek },
    Space(ReplyStatfs),
}

/// What `lseek` looks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SeekTo {
    Data,
    Hole,
}

/// What `truncate`, `chmod` and `chown` change.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct NewAttributes {
    pub(crate) size: Option<u64>,
    pub(crate) mode: Option<u32>,
    pub(crate) uid: Option<u32>,
    pub(crate) gid: Option<u32>,
}

/// The file system, as far as it answers by itself: one file, which is also the root.
pub(crate) struct Frontend {
    /// Bounded: while the disk's thread has its hands full, nothing more is read from the kernel.
    pub(crate) requests: mpsc::Sender<Request>,
    pub(crate) writable: bool,
}

impl Frontend {
    /// Hands a request over. If the disk's thread is gone the answer is dropped with it.
    fn pass(&self, request: Request) {
        let _ = self.requests.blocking_send(request);
    }
}

impl Filesystem for Frontend {
    fn init(&mut self, _req: &fuser::Request, config: &mut KernelConfig) -> io::Result<()> {
        let wanted = InitFlags::FUSE_ASYNC_READ
            | InitFlags::FUSE_ASYNC_DIO
            | InitFlags::FUSE_BIG_WRITES
            | InitFlags::FUSE_MAX_PAGES
            | InitFlags::FUSE_DIRECT_IO_ALLOW_MMAP;
        let there = wanted & config.capabilities();
        // What was just found to be there is not refused, and these numbers are within the bounds.
        let _ = config.add_capabilities(there);
        let _ = config.set_max_write(MAX_PAYLOAD);
        let _ = config.set_max_background(MAX_BACKGROUND);
        Ok(())
    }

    fn getattr(&self, _req: &fuser::Request, _ino: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        self.pass(Request::Attributes(reply));
    }

    fn setattr(
        &self,
        _req: &fuser::Request,
        _ino: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        _atime: Option<TimeOrNow>,
        _mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        _fh: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<fuser::BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        self.pass(Request::SetAttributes(NewAttributes { size, mode, uid, gid }, reply));
    }

    fn open(&self, _req: &fuser::Request, _ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        if !self.writable && flags.acc_mode() != OpenAccMode::O_RDONLY {
            return reply.error(fuser::Errno::EROFS);
        }
        let how = FopenFlags::FOPEN_DIRECT_IO | FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES;
        reply.opened(FileHandle(0), how);
    }

    fn read(
        &self,
        _req: &fuser::Request,
        _ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        length: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        self.pass(Request::Read { offset, length, reply });
    }

    fn write(
        &self,
        _req: &fuser::Request,
        _ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        data: &[u8],
        _write_flags: FuseWriteFlags,
        flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let flags = OFlags::from_bits_retain(flags.0.cast_unsigned());
        let durable = flags.intersects(OFlags::SYNC | OFlags::DSYNC);
        self.pass(Request::Write { offset, data: data.to_vec(), durable, reply });
    }

    /// At each `close`: what an image is copied with often ends with that, and looks at its result.
    fn flush(
        &self,
        _req: &fuser::Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _lock_owner: LockOwner,
        reply: ReplyEmpty,
    ) {
        self.pass(Request::Flush(reply));
    }

    fn fsync(
        &self,
        _req: &fuser::Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _datasync: bool,
        reply: ReplyEmpty,
    ) {
        self.pass(Request::Flush(reply));
    }

    fn fallocate(
        &self,
        _req: &fuser::Request,
        _ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        let mode = FallocateFlags::from_bits_retain(mode.cast_unsigned());
        self.pass(Request::Allocate { offset, length, mode, reply });
    }

    fn lseek(
        &self,
        _req: &fuser::Request,
        _ino: INodeNo,
        _fh: FileHandle,
        offset: i64,
        whence: i32,
        reply: ReplyLseek,
    ) {
        // The kernel does the others by itself.
        const SEEK_DATA: i32 = 3;
        const SEEK_HOLE: i32 = 4;
        let to = match whence {
            SEEK_DATA => SeekTo::Data,
            SEEK_HOLE => SeekTo::Hole,
            _ => return reply.error(fuser::Errno::EINVAL),
        };
        match u64::try_from(offset) {
            Ok(offset) => self.pass(Request::Seek { offset, to, reply }),
            Err(_) => reply.error(fuser::Errno::EINVAL),
        }
    }

    fn statfs(&self, _req: &fuser::Request, _ino: INodeNo, reply: ReplyStatfs) {
        self.pass(Request::Space(reply));
    }
}
