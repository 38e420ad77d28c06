//! The system calls of this crate that nothing wraps safely: fork, a seccomp filter with a listener, and the calls of that listener.

use rustix::io::Errno;
use rustix::process::Pid;
use seccompiler::sock_filter;
use std::io;
use std::mem;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// Makes a copy of this process; gives the copy's number to the original, and nothing to the copy. Errors: `Unsupported` if there is more
/// than one thread.
pub(crate) fn fork() -> io::Result<Option<Pid>> {
    if threads()? != 1 {
        return Err(io::Error::new(io::ErrorKind::Unsupported, "this process has threads already"));
    }
    // SAFETY: no other thread exists, so that nothing in the copy is in a state which only a thread that isn't there could end.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        pid => Ok(Pid::from_raw(pid)),
    }
}

/// How many threads this process has.
pub(crate) fn threads() -> io::Result<usize> {
    Ok(std::fs::read_dir("/proc/self/task")?.count())
}

/// From now on the signals with which people and systems end a program do nothing.
pub(crate) fn ignore_endings() {
    for number in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGQUIT] {
        // SAFETY: to ignore a signal runs no code of ours, and these numbers exist, so that it can't fail.
        unsafe { libc::signal(number, libc::SIG_IGN) };
    }
}

/// What a filter that hands calls to somebody else must be installed with: it gives the listener's descriptor, and a call that the
/// listener has taken isn't broken off by a signal, to be made again although it was made.
const LISTEN: libc::c_ulong =
    libc::SECCOMP_FILTER_FLAG_NEW_LISTENER | libc::SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV;

/// Whether the kernel has filters with a listener as we need them (Linux 5.19).
pub(crate) fn has_listeners() -> bool {
    // SAFETY: without a program nothing is installed: the kernel looks at the flags, and then finds that the program is missing.
    let done = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            LISTEN,
            std::ptr::null::<libc::sock_fprog>(),
        )
    };
    done == -1 && io::Error::last_os_error().raw_os_error() == Some(libc::EFAULT)
}

/// Puts this thread, and those that it starts, under a filter that hands calls to the listener that this gives. The thread must have given
/// up new privileges before.
pub(crate) fn install_with_listener(program: &[sock_filter]) -> io::Result<Listener> {
    let len = u16::try_from(program.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    let program = libc::sock_fprog { len, filter: program.as_ptr().cast_mut().cast() };
    // SAFETY: the program has `len` instructions, of the layout that the kernel defines (both crates mirror it); it is only read.
    let fd = unsafe {
        libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, LISTEN, &raw const program)
    };
    let fd = i32::try_from(fd).ok().filter(|fd| *fd >= 0).ok_or_else(io::Error::last_os_error)?;
    // SAFETY: the call gave a new descriptor, which nobody else knows.
    Ok(Listener(unsafe { OwnedFd::from_raw_fd(fd) }))
}

/// A call that stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Stopped {
    /// By which the kernel knows it.
    pub(crate) id: u64,
    /// The number of the system call.
    pub(crate) number: i64,
    pub(crate) args: [u64; 6],
}

/// The end of a filter at which stopped calls arrive.
pub(crate) struct Listener(OwnedFd);

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl From<OwnedFd> for Listener {
    fn from(fd: OwnedFd) -> Self {
        Self(fd)
    }
}

impl Listener {
    /// Waits for the next call that stops. Errors: `Interrupted` and `NotFound` if there was one, but it is gone.
    pub(crate) fn receive(&self) -> io::Result<Stopped> {
        // SAFETY: the structure is made of numbers, for which zero is a value; the kernel demands it to be zero.
        let mut call: libc::seccomp_notif = unsafe { mem::zeroed() };
        // SAFETY: the kernel writes one structure of this type, which is what the request's number says.
        let done = unsafe { libc::ioctl(self.0.as_raw_fd(), libc::SECCOMP_IOCTL_NOTIF_RECV, &raw mut call) };
        if done < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Stopped { id: call.id, number: i64::from(call.data.nr), args: call.data.args })
    }

    /// Ends a stopped call with a result. Errors: `NotFound` if its caller is gone.
    pub(crate) fn answer(&self, id: u64, result: Result<i64, Errno>) -> io::Result<()> {
        let (val, error) = match result {
            Ok(value) => (value, 0),
            Err(errno) => (0, -errno.raw_os_error()),
        };
        let mut answer = libc::seccomp_notif_resp { id, val, error, flags: 0 };
        // SAFETY: the kernel reads one structure of this type.
        let done =
            unsafe { libc::ioctl(self.0.as_raw_fd(), libc::SECCOMP_IOCTL_NOTIF_SEND, &raw mut answer) };
        if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// Gives the caller of a stopped call a copy of `fd`, and ends the call with the copy's number. Errors: `NotFound` if the caller is gone, and
    /// what it has no room for.
    pub(crate) fn hand_over(&self, id: u64, fd: BorrowedFd<'_>, cloexec: bool) -> io::Result<()> {
        let mut given = libc::seccomp_notif_addfd {
            id,
            flags: libc::SECCOMP_ADDFD_FLAG_SEND as u32,
            srcfd: fd.as_raw_fd().cast_unsigned(),
            newfd: 0,
            newfd_flags: if cloexec { libc::O_CLOEXEC.cast_unsigned() } else { 0 },
        };
        // SAFETY: the kernel reads one structure of this type, and copies a descriptor that is borrowed for the call.
        let done =
            unsafe { libc::ioctl(self.0.as_raw_fd(), libc::SECCOMP_IOCTL_NOTIF_ADDFD, &raw mut given) };
        if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}
