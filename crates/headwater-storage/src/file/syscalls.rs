//! The plain system calls behind [`Request`], for worker threads: one call, no continuation, no retry.

use super::op::{Call, Request};
use std::io;

/// Does the call and waits for it: a result of at least 0, or an errno, negated.
///
/// # Safety
/// The descriptor is open, and the memory that the request names is valid for it (to write for a read, to read for a write),
/// for all of the call.
pub(super) unsafe fn perform(call: Call) -> i64 {
    let fd = call.fd;
    let result = match call.request {
        Request::Read { ptr, len, offset } => {
            // SAFETY: the caller vouches for `len` bytes at `ptr`.
            let count = unsafe { libc::pread64(fd, ptr.cast(), len as usize, offset as i64) };
            count as i64
        }
        Request::Write { ptr, len, offset, durable: false } => {
            // SAFETY: as above.
            let count = unsafe { libc::pwrite64(fd, ptr.cast(), len as usize, offset as i64) };
            count as i64
        }
        Request::Write { ptr, len, offset, durable: true } => {
            let part = libc::iovec { iov_base: ptr.cast_mut().cast(), iov_len: len as usize };
            // SAFETY: `part` outlives the call; the caller vouches for the memory that it names, which is only read.
            let count = unsafe { libc::pwritev2(fd, &raw const part, 1, offset as i64, libc::RWF_DSYNC) };
            count as i64
        }
        Request::Sync => {
            // SAFETY: no memory is involved.
            i64::from(unsafe { libc::fdatasync(fd) })
        }
        Request::Allocate { mode, offset, len } => {
            // SAFETY: no memory is involved.
            i64::from(unsafe { libc::fallocate64(fd, mode, offset as i64, len as i64) })
        }
        Request::SeekData { offset } => {
            // SAFETY: no memory is involved, and nobody uses the file position.
            unsafe { libc::lseek64(fd, offset as i64, libc::SEEK_DATA) }
        }
        Request::SeekHole { offset } => {
            // SAFETY: as above.
            unsafe { libc::lseek64(fd, offset as i64, libc::SEEK_HOLE) }
        }
        Request::SetSize { size } => {
            // SAFETY: no memory is involved.
            i64::from(unsafe { libc::ftruncate64(fd, size as i64) })
        }
    };
    if result >= 0 {
        return result;
    }
    let errno = io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO);
    -i64::from(errno)
}
