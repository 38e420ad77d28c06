//! What the kernel is asked to do, and the slab of operations that it is doing.
//!
//! **An operation owns what the kernel touches**: the buffer and the open file. The future that waits for it holds nothing but its
//! slot, so that dropping the future frees nothing that is still being written.

use super::lock;
use headwater_block::{Buffer, BufferMut};
use std::cell::Cell;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::rc::Rc;
use std::task::Waker;

/// How often an operation is started again because it was interrupted, before its error is believed.
const MAX_RETRIES: u16 = 1000;

/// The most bytes that are asked of the kernel at once, in bytes; it takes 2 GiB less a page, and says so by a short count.
const MAX_AT_ONCE: usize = 1 << 30;

/// An open file, and what its mode asks of requests.
pub(super) struct OpenFile {
    /// The descriptor. The image locks belong to its open file description, too.
    pub(super) fd: OwnedFd,
    /// Offsets and lengths must be multiples of this, in bytes; 1 without O_DIRECT.
    pub(super) alignment: Cell<u32>,
    /// Addresses must be multiples of this, in bytes; 1 without O_DIRECT.
    pub(super) memory_alignment: Cell<u32>,
    /// The file system says what the page cache has.
    pub(super) tells_cached: Cell<bool>,
}

impl OpenFile {
    /// A file that was opened, and what its mode asks of offsets and of memory.
    pub(super) fn new(fd: OwnedFd, alignment: u32, memory_alignment: u32) -> Self {
        let (alignment, memory_alignment) = (Cell::new(alignment), Cell::new(memory_alignment));
        Self { fd, alignment, memory_alignment, tells_cached: Cell::new(true) }
    }
}

impl Drop for OpenFile {
    fn drop(&mut self) {
        // To close the descriptor isn't enough: the open file lives on for a while in a child that was forked and doesn't run its own program yet,
        // and in the kernel's workers. No request is in flight any more, because each of them holds this.
        lock::release(self.fd.as_fd());
    }
}

/// One call of the kernel.
#[derive(Debug, Clone, Copy)]
pub(super) enum Request {
    /// pread.
    Read { ptr: *mut u8, len: u32, offset: u64 },
    /// pwrite; with `durable`, RWF_DSYNC.
    Write { ptr: *const u8, len: u32, offset: u64, durable: bool },
    /// fdatasync.
    Sync,
    /// fallocate.
    Allocate { mode: i32, offset: u64, len: u64 },
    /// lseek to the next data (`SEEK_DATA`).
    SeekData { offset: u64 },
    /// lseek to the next hole (`SEEK_HOLE`).
    SeekHole { offset: u64 },
    /// ftruncate.
    SetSize { size: u64 },
}

/// A request to one descriptor.
#[derive(Debug, Clone, Copy)]
pub(super) struct Call {
    pub(super) fd: RawFd,
    pub(super) request: Request,
    /// It came back with EAGAIN before: let it block in a worker of the kernel.
    pub(super) may_block: bool,
    /// The file is open with O_DIRECT.
    pub(super) direct: bool,
}

/// What came of the call for `slot`: a result of at least 0, or an errno, negated.
#[derive(Debug, Clone, Copy)]
pub(super) struct Completion {
    pub(super) slot: u32,
    pub(super) result: i64,
}

/// The work of one operation; buffers are here as long as the kernel may touch them.
pub(super) enum Work {
    /// Read into the buffer until `want` bytes are there or the file ends.
    Read { buf: BufferMut, offset: u64, want: usize },
    /// Write all of the buffer.
    Write { data: Buffer, offset: u64, durable: bool },
    /// Anything that carries no memory; never `Read` or `Write`.
    Plain(Request),
}

/// One operation, from its start until its result is taken.
pub(super) struct Op {
    work: Work,
    file: Rc<OpenFile>,
    /// The address of the buffer, if there is one.
    ptr: *mut u8,
    /// Bytes that are done already.
    done: usize,
    retries: u16,
    /// The kernel or a worker has it.
    pub(super) running: bool,
    /// It is the ring that has it, or had it last: the file's mode may have changed since.
    pub(super) in_ring: bool,
    /// The future was dropped: nobody wants the result.
    pub(super) abandoned: bool,
    /// Nobody knows whether the kernel still has it: its memory must stay for ever.
    lost: bool,
    pub(super) waker: Option<Waker>,
    pub(super) result: Option<io::Result<u64>>,
}

impl Op {
    /// The operation that does `work`, of which `done` bytes are done already.
    pub(super) fn new(file: Rc<OpenFile>, mut work: Work, done: usize) -> Self {
        let ptr = match &mut work {
            Work::Read { buf, .. } => buf.as_mut_ptr(),
            // Only ever read through; the type is common to both directions.
            Work::Write { data, .. } => data.as_ptr().cast_mut(),
            Work::Plain(_) => std::ptr::null_mut(),
        };
        Self {
            work,
            file,
            ptr,
            done,
            retries: 0,
            running: false,
            in_ring: false,
            abandoned: false,
            lost: false,
            waker: None,
            result: None,
        }
    }

    /// The kernel (through the ring) or a worker has it now.
    pub(super) fn run(&mut self, in_ring: bool) {
        (self.running, self.in_ring) = (true, in_ring);
    }

    /// True if nothing is lost when it is never started.
    pub(super) fn is_harmless_to_drop(&self) -> bool {
        matches!(
            self.work,
            Work::Read { .. } | Work::Plain(Request::SeekData { .. } | Request::SeekHole { .. })
        )
    }

    /// The call that does what is left of the work. Its addresses stay valid as long as the operation lives.
    pub(super) fn call(&self) -> Call {
        let piece = |len: usize| (len - self.done).min(MAX_AT_ONCE) as u32;
        // `done` is at most the buffer's length.
        let ptr = self.ptr.wrapping_add(self.done);
        let request = match &self.work {
            Work::Read { buf, offset, .. } => {
                Request::Read { ptr, len: piece(buf.len()), offset: offset + self.done as u64 }
            }
            Work::Write { data, offset, durable } => Request::Write {
                ptr,
                len: piece(data.len()),
                offset: offset + self.done as u64,
                durable: *durable,
            },
            Work::Plain(request) => *request,
        };
        let direct = self.file.alignment.get() > 1;
        Call { fd: self.file.fd.as_raw_fd(), request, may_block: self.retries > 0, direct }
    }

    /// Takes the result of a call: true if the operation is at its end, false if another call must follow.
    pub(super) fn advance(&mut self, result: i64) -> bool {
        let Ok(count) = u64::try_from(result) else {
            let errno = i32::try_from(-result).unwrap_or(libc::EIO);
            if (errno == libc::EINTR || errno == libc::EAGAIN) && self.retries < MAX_RETRIES {
                self.retries += 1;
                return false;
            }
            self.result = Some(Err(io::Error::from_raw_os_error(errno)));
            return true;
        };
        let align = self.file.alignment.get() as usize;
        let result = match &self.work {
            Work::Plain(_) => Ok(count),
            Work::Read { want, .. } => {
                self.done += count as usize;
                // With O_DIRECT only the end of the file makes a count that is no multiple of the alignment.
                let at_end = count == 0 || !self.done.is_multiple_of(align);
                if self.done < *want && !at_end {
                    return false;
                }
                Ok(self.done as u64)
            }
            Work::Write { data, .. } => {
                let done = self.done + count as usize;
                if done < data.len() {
                    // What is left must start aligned again, so that a part may be written twice.
                    let kept = done - done % align;
                    if kept > self.done {
                        self.done = kept;
                        return false;
                    }
                    Err(io::Error::new(io::ErrorKind::WriteZero, "the system wrote less than it was given"))
                } else {
                    self.done = done;
                    Ok(done as u64)
                }
            }
        };
        self.result = Some(result);
        true
    }

    /// Gives up on a call that runs: the operation fails with `errno`, and what it owns is never freed.
    pub(super) fn lose(&mut self, errno: i32) {
        self.lost = true;
        self.result = Some(Err(io::Error::from_raw_os_error(errno)));
    }
}

/// Operations by slot. Slots are used again, so that a steady load allocates nothing.
#[derive(Default)]
pub(super) struct Slab {
    ops: Vec<Option<Op>>,
    free: Vec<u32>,
}

impl Slab {
    pub(super) fn insert(&mut self, op: Op) -> u32 {
        if let Some(slot) = self.free.pop() {
            self.ops[slot as usize] = Some(op);
            return slot;
        }
        self.ops.push(Some(op));
        u32::try_from(self.ops.len() - 1).expect("fewer operations than memory has buffers")
    }

    pub(super) fn get(&mut self, slot: u32) -> &mut Op {
        self.ops[slot as usize].as_mut().expect("a slot in use")
    }

    pub(super) fn remove(&mut self, slot: u32) -> Op {
        let op = self.ops[slot as usize].take().expect("a slot in use");
        self.free.push(slot);
        op
    }

    /// The work, and so the buffer, of an operation that is at its end; an error if it was lost, which keeps them here.
    pub(super) fn reclaim(&mut self, slot: u32) -> io::Result<Work> {
        if self.get(slot).lost {
            return Err(io::Error::other("the file engine has failed"));
        }
        let op = self.remove(slot);
        debug_assert!(!op.running, "the kernel still has it");
        Ok(op.work)
    }

    /// All operations.
    pub(super) fn iter_mut(&mut self) -> impl Iterator<Item = &mut Op> {
        self.ops.iter_mut().flatten()
    }
}
