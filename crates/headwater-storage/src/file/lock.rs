//! Image locks, as QEMU takes them: two processes that both want to write one image are told so, whichever of the two is headwater.
//!
//! A user of an image declares what it does (its permissions) and what it doesn't tolerate of others, each as a shared lock on one
//! byte of the file, far before any data matter: 100 + i says "I do i", 200 + i says "others must not do i". Then it looks whether
//! any other holds the opposite. The locks are open file description locks: they belong to our descriptor, end with it (also when
//! the process dies), and hold off another descriptor of the same process, too.

use super::node::FileNode;
use headwater_block::{Error, ErrorKind, Result};
use std::fmt;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::time::Duration;

/// "I do this" and "nobody else may do this": the first bytes of the two rows.
const DOES: i64 = 100;
const FORBIDS: i64 = 200;

/// A permission; the value is its byte in each row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Permission {
    ConsistentRead = 0,
    Write = 1,
    Resize = 3,
}

const ALL: [Permission; 3] = [Permission::ConsistentRead, Permission::Write, Permission::Resize];

impl fmt::Display for Permission {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Permission::ConsistentRead => "consistent read",
            Permission::Write => "write",
            Permission::Resize => "resize",
        })
    }
}

/// How an image is going to be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Use {
    /// Read and written; nobody else may write or resize.
    Write,
    /// Read; nobody else may write or resize.
    Read,
    /// Read, whoever writes.
    ReadShared,
}

impl Use {
    fn does(self) -> &'static [Permission] {
        match self {
            Use::Write => &ALL,
            Use::Read | Use::ReadShared => &[Permission::ConsistentRead],
        }
    }

    fn forbids(self) -> &'static [Permission] {
        match self {
            Use::Write | Use::Read => &[Permission::Write, Permission::Resize],
            Use::ReadShared => &[],
        }
    }
}

/// How often, and how long after each other, locks are asked for that somebody else holds. A process that was killed keeps its locks
/// until the kernel has taken its ring down, some milliseconds after the process is gone: to start again at once must work.
const ATTEMPTS: u32 = 25;
const BETWEEN_ATTEMPTS: Duration = Duration::from_millis(20);

/// Takes the locks for `usage` on the file behind `fd`, which must be open for reading; `name` is for messages. `Ok(false)`: the file
/// system has no such locks. Blocks for up to half a second if others hold them. Errors: `InUse`, with no lock held.
pub(super) fn acquire(fd: BorrowedFd<'_>, name: &str, usage: Use) -> Result<bool> {
    let mut attempts = 1;
    loop {
        match try_acquire(fd, name, usage) {
            Err(err) if err.kind() == ErrorKind::InUse && attempts < ATTEMPTS => {
                attempts += 1;
                std::thread::sleep(BETWEEN_ATTEMPTS);
            }
            result => return result,
        }
    }
}

fn try_acquire(fd: BorrowedFd<'_>, name: &str, usage: Use) -> Result<bool> {
    let result = match declare(fd, name, usage) {
        Ok(true) => check(fd, name, usage).map(|()| true),
        other => other,
    };
    if !matches!(result, Ok(true)) {
        release(fd);
    }
    result
}

/// Changes the locks of `fd` from what `old` takes to what `new` takes, without waiting for others. When that fails, those for `old` are
/// held again; `Ok(false)`: the file system has no such locks.
pub(super) fn change(fd: BorrowedFd<'_>, name: &str, old: Option<Use>, new: Option<Use>) -> Result<bool> {
    let Some(usage) = new else {
        release(fd);
        return Ok(true);
    };
    let changed = try_acquire(fd, name, usage);
    if matches!(changed, Ok(true)) {
        for permission in ALL {
            for (row, wanted) in [(DOES, usage.does()), (FORBIDS, usage.forbids())] {
                if !wanted.contains(&permission) {
                    let mut byte = lock_range(libc::F_UNLCK, row + permission as i64, 1);
                    // An unlock fails only where there are no locks.
                    let _ = fcntl(fd, libc::F_OFD_SETLK, &mut byte);
                }
            }
        }
    } else if let Some(old) = old {
        // We held these until just now. If somebody was quicker, the next change will meet him.
        let _ = try_acquire(fd, name, old);
    }
    changed
}

impl FileNode {
    /// Changes what the image locks say that this file is used for; `None` takes them off. For a file that was opened with
    /// [`Locking::Off`](super::Locking::Off) by someone who knows better what becomes of it. Doesn't wait for other processes. A file system without
    /// locks is no error.
    ///
    /// # Errors
    /// `InUse` if another process, or another descriptor of this one, is in the way; the locks are as before then.
    pub fn change_locks(&self, usage: Option<Use>) -> Result<()> {
        if self.usage.get() == usage {
            return Ok(());
        }
        let held = change(self.file.fd.as_fd(), &self.name, self.usage.get(), usage)?;
        self.locked.set(held && usage.is_some());
        self.usage.set(usage);
        Ok(())
    }
}

/// Gives all locks of `fd` back.
pub(super) fn release(fd: BorrowedFd<'_>) {
    let mut rows = lock_range(libc::F_UNLCK, DOES, FORBIDS - DOES + 100);
    // An unlock fails only where there are no locks.
    let _ = fcntl(fd, libc::F_OFD_SETLK, &mut rows);
}

fn declare(fd: BorrowedFd<'_>, name: &str, usage: Use) -> Result<bool> {
    let does = usage.does().iter().map(|p| (DOES, *p));
    let forbids = usage.forbids().iter().map(|p| (FORBIDS, *p));
    for (row, permission) in does.chain(forbids) {
        let mut byte = lock_range(libc::F_RDLCK, row + permission as i64, 1);
        if let Err(err) = fcntl(fd, libc::F_OFD_SETLK, &mut byte) {
            return match err.raw_os_error() {
                Some(libc::EAGAIN | libc::EACCES) => Err(in_use(name, permission, usage)),
                Some(libc::ENOLCK | libc::EINVAL | libc::EOPNOTSUPP | libc::ENOSYS) => Ok(false),
                _ => Err(Error::from_io(err, format_args!("lock {name}"))),
            };
        }
    }
    Ok(true)
}

/// Both sides declare before they look, so that of two that come at once at least one sees the other.
fn check(fd: BorrowedFd<'_>, name: &str, usage: Use) -> Result<()> {
    let does = usage.does().iter().map(|p| (FORBIDS, *p));
    let forbids = usage.forbids().iter().map(|p| (DOES, *p));
    for (row, permission) in does.chain(forbids) {
        // Others hold shared locks, which an exclusive one would meet. Our own locks don't count.
        let mut byte = lock_range(libc::F_WRLCK, row + permission as i64, 1);
        fcntl(fd, libc::F_OFD_GETLK, &mut byte)
            .map_err(|err| Error::from_io(err, format_args!("look up the locks of {name}")))?;
        if i32::from(byte.l_type) != libc::F_UNLCK {
            return Err(in_use(name, permission, usage));
        }
    }
    Ok(())
}

fn in_use(name: &str, permission: Permission, usage: Use) -> Error {
    let message = match usage {
        Use::Write => format!(
            "{name}: another process uses this image (its lock \"{permission}\" is taken); writing to it, too, would destroy it. \
             Stop the other process (lsof {name} names it)"
        ),
        Use::Read | Use::ReadShared => format!(
            "{name}: another process writes this image (its lock \"{permission}\" is taken), so that it would change while it is read. \
             Stop the other process (lsof {name} names it)"
        ),
    };
    Error::new(ErrorKind::InUse, message)
}

fn lock_range(kind: i32, start: i64, len: i64) -> libc::flock64 {
    // SAFETY: a plain C structure of integers, for which zeroes are valid. (Its padding differs between systems, so that it can't be
    // written out here.) The process number must be 0 for this kind of lock.
    let mut range: libc::flock64 = unsafe { std::mem::zeroed() };
    range.l_type = kind as i16;
    range.l_whence = libc::SEEK_SET as i16;
    range.l_start = start;
    range.l_len = len;
    range
}

fn fcntl(fd: BorrowedFd<'_>, command: i32, range: &mut libc::flock64) -> io::Result<()> {
    // SAFETY: the descriptor is open, and for these commands the kernel reads and writes one `flock64`.
    let result = unsafe { libc::fcntl(fd.as_raw_fd(), command, std::ptr::from_mut(range)) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests;
