//! The ring: requests through io_uring, in batches.
//!
//! **Bounds**: no more requests run at once than the completion queue has entries, so it cannot overflow; the kernel would keep
//! overflown completions (`FEAT_NODROP` is required), but each would cost a call more.
//!
//! **Wake-ups**: the kernel writes the registered eventfd when there is something to reap. While the engine submits and reaps it
//! looks for itself, and the eventfd is off: else each batch would wake the thread once more for what it has seen already.

use super::op::{Call, Completion, Request};
use io_uring::register::Restriction;
use io_uring::{EnterFlags, IoUring, Probe, opcode, squeue, types};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::atomic::{Ordering, fence};

/// Requests per submission, and requests in the kernel at once.
const ENTRIES: u32 = 256;
const RUNNING_MAX: u32 = 1024;

/// The eventfd is silenced during a turn where setting its flag and looking at the queue afterwards is safe against the kernel's
/// doing the opposite; on other processors its "work is pending" flag has no barrier behind it, and a wake-up might be lost.
const SILENCE: bool = cfg!(target_arch = "x86_64");

/// Submission and completion queue of one thread.
pub(super) struct Ring {
    ring: IoUring,
    /// Completions are only made when the thread asks for them.
    deferred: bool,
    /// Calls that were pushed and not reaped.
    running: u32,
}

impl Ring {
    /// A ring that writes the eventfd `ready`. It belongs to the calling thread.
    pub(super) fn new(ready: BorrowedFd<'_>) -> io::Result<Self> {
        let (ring, deferred) = build()?;
        if !ring.params().is_feature_nodrop() {
            return Err(io::Error::new(io::ErrorKind::Unsupported, "the kernel's io_uring is too old"));
        }
        let mut probe = Probe::new();
        ring.submitter().register_probe(&mut probe)?;
        let needed = [opcode::Read::CODE, opcode::Write::CODE, opcode::Fsync::CODE, opcode::Fallocate::CODE];
        if !needed.iter().all(|code| probe.is_supported(*code)) {
            return Err(io::Error::new(io::ErrorKind::Unsupported, "the kernel's io_uring lacks operations"));
        }
        ring.submitter().register_eventfd(ready.as_raw_fd())?;
        // Nothing else is ever asked of it, whoever asks: not to open files, for example, or to connect.
        let flags = Restriction::sqe_flags_allowed(squeue::Flags::ASYNC.bits());
        let mut allowed: Vec<_> = needed.into_iter().map(Restriction::sqe_op).chain([flags]).collect();
        ring.submitter().register_restrictions(&mut allowed)?;
        ring.submitter().register_enable_rings()?;
        Ok(Self { ring, deferred, running: 0 })
    }

    /// True if the call is one for the ring.
    ///
    /// Reads and writes through the page cache are not: they may block for long, so that the kernel hands them to threads of its own
    /// anyway; and under heavy load a kernel 6.18 once never completed one, which our own threads can't do.
    pub(super) fn takes(call: &Call) -> bool {
        match call.request {
            Request::Read { .. } | Request::Write { .. } => call.direct,
            Request::Sync | Request::Allocate { .. } => true,
            Request::SeekData { .. } | Request::SeekHole { .. } | Request::SetSize { .. } => false,
        }
    }

    /// Puts a call that the ring [takes](Ring::takes) into the submission queue; false if there is no room now.
    ///
    /// # Safety
    /// The descriptor stays open, and the memory that the call names valid and untouched by others, until the completion for
    /// `slot` has been reaped. (Dropping the ring does not stop the kernel from using them.)
    pub(super) unsafe fn push(&mut self, slot: u32, call: Call) -> bool {
        if self.running >= RUNNING_MAX {
            return false;
        }
        let fd = types::Fd(call.fd);
        let entry = match call.request {
            Request::Read { ptr, len, offset } => opcode::Read::new(fd, ptr, len).offset(offset).build(),
            Request::Write { ptr, len, offset, durable } => {
                let flags = if durable { libc::RWF_DSYNC } else { 0 };
                opcode::Write::new(fd, ptr, len).offset(offset).rw_flags(flags).build()
            }
            Request::Sync => opcode::Fsync::new(fd).flags(types::FsyncFlags::DATASYNC).build(),
            Request::Allocate { mode, offset, len } => {
                opcode::Fallocate::new(fd, len).offset(offset).mode(mode).build()
            }
            Request::SeekData { .. } | Request::SeekHole { .. } | Request::SetSize { .. } => return false,
        };
        let flags = if call.may_block { squeue::Flags::ASYNC } else { squeue::Flags::empty() };
        let entry = entry.user_data(u64::from(slot)).flags(flags);
        // SAFETY: the caller vouches for what the entry refers to, until its completion.
        let pushed = unsafe { self.ring.submission().push(&entry) }.is_ok();
        self.running += u32::from(pushed);
        pushed
    }

    /// Entries that were pushed and that the kernel hasn't taken.
    fn queued(&mut self) -> u32 {
        self.ring.submission().len() as u32
    }

    /// Hands the queue to the kernel, and lets it make the completions that it holds back; waits until there are at least `wait_for`.
    ///
    /// On `EAGAIN`, `EBUSY` and `EINTR` entries may remain: call again. Any other error means that the ring is unusable.
    fn enter(&mut self, wait_for: u32) -> io::Result<()> {
        loop {
            let queued = self.queued();
            let ask = wait_for > 0 || (self.deferred && self.ring.submission().taskrun());
            let flags = if ask { EnterFlags::GETEVENTS } else { EnterFlags::empty() };
            if queued == 0 && flags.is_empty() {
                return Ok(());
            }
            // SAFETY: the entries are as `push` demands; there is no argument.
            let taken = unsafe {
                self.ring.submitter().enter::<libc::sigset_t>(queued, wait_for, flags.bits(), None)
            }?;
            // The kernel stops early at an entry that it refuses, or when short of memory.
            if taken >= queued as usize || taken == 0 {
                return Ok(());
            }
        }
    }

    /// Submits what was pushed. An error means that the ring is unusable; that it is short of memory or room isn't one.
    pub(super) fn submit(&mut self) -> io::Result<()> {
        if self.running == 0 {
            return Ok(());
        }
        match self.enter(0) {
            Err(err) if is_transient(&err) => Ok(()),
            other => other,
        }
    }

    /// Appends what was completed since the last call.
    pub(super) fn reap(&mut self, into: &mut Vec<Completion>) {
        let before = into.len();
        into.extend(
            self.ring.completion().map(|entry| Completion {
                slot: entry.user_data() as u32,
                result: i64::from(entry.result()),
            }),
        );
        self.running -= (into.len() - before) as u32;
    }

    /// Submits, and blocks the thread until something was completed; only for the end of the engine.
    pub(super) fn wait(&mut self) -> io::Result<()> {
        match self.enter(1) {
            Err(err) if is_transient(&err) => Ok(()),
            other => other,
        }
    }

    /// How many calls are in the kernel or on the way there.
    pub(super) fn running(&self) -> u32 {
        self.running
    }

    /// Entries are still waiting for the kernel, which was short of something.
    pub(super) fn has_unsubmitted(&mut self) -> bool {
        self.queued() > 0
    }

    /// Silences the eventfd: the engine is looking for itself.
    pub(super) fn silence(&mut self) {
        if SILENCE {
            self.ring.completion().disable_eventfd();
        }
    }

    /// Lets the eventfd tell again. True if something came before that, which it won't tell: look once more.
    pub(super) fn listen(&mut self) -> bool {
        if SILENCE {
            self.ring.completion().enable_eventfd();
            // Either the kernel sees the flag that was just cleared, or we see what it put up before it looked.
            fence(Ordering::SeqCst);
        }
        !self.ring.completion().is_empty() || self.ring.submission().taskrun()
    }
}

fn is_transient(err: &io::Error) -> bool {
    matches!(err.raw_os_error(), Some(libc::EAGAIN | libc::EBUSY | libc::EINTR))
}

/// A ring with the best set-up that the kernel knows, not yet enabled, and whether completions are deferred.
///
/// Deferred (Linux 6.1): a completion does not interrupt the thread; it is made when the thread enters the kernel for the next batch.
fn build() -> io::Result<(IoUring, bool)> {
    let deferred = IoUring::builder()
        .setup_cqsize(RUNNING_MAX)
        .setup_submit_all()
        .setup_single_issuer()
        .setup_defer_taskrun()
        .setup_taskrun_flag()
        .setup_r_disabled()
        .build(ENTRIES);
    if let Ok(ring) = deferred {
        return Ok((ring, true));
    }
    let plain = IoUring::builder().setup_cqsize(RUNNING_MAX).setup_r_disabled().build(ENTRIES)?;
    Ok((plain, false))
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::event::{EventfdFlags, eventfd};
    use std::os::fd::AsFd;

    #[test]
    fn the_ring_does_what_the_engine_asks_for_and_nothing_else() {
        let ready = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        let Ok(mut ring) = Ring::new(ready.as_fd()) else { return };
        let mut result = |entry: squeue::Entry| {
            // SAFETY: what the entries name is static, or nothing.
            unsafe { ring.ring.submission().push(&entry) }.unwrap();
            ring.ring.submit_and_wait(1).unwrap();
            ring.ring.completion().next().unwrap().result()
        };
        let open = opcode::OpenAt::new(types::Fd(libc::AT_FDCWD), c"/dev/null".as_ptr()).build();
        assert_eq!(result(open), -libc::EACCES);
        let socket = opcode::Socket::new(libc::AF_UNIX, libc::SOCK_STREAM, 0).build();
        assert_eq!(result(socket), -libc::EACCES);
        let drained = opcode::Fsync::new(types::Fd(-1)).build().flags(squeue::Flags::IO_DRAIN);
        assert_eq!(result(drained), -libc::EACCES);
        // Refused by what it names, not by the ring.
        assert_eq!(result(opcode::Fsync::new(types::Fd(-1)).build()), -libc::EBADF);
    }
}
