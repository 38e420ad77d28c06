//! Requests over io_uring.
//!
//! Each entry has one command with the kernel, or one request with us: a command stays there until there is a request, and the answer to that is
//! the next command. The kernel copies requests and answers while this thread is in [`Ring::enter`], from and to the entry's memory.

use crate::abi::{COMMIT_AND_FETCH, InHeader, REGISTER, RingCommand};
use crate::answer::Encoded;
use crate::memory::Memory;
use crate::processors::Layout;
use crate::request::Operation;
use io_uring::{EnterFlags, IoUring, cqueue, opcode, squeue};
use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno;
use std::collections::VecDeque;
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, OwnedFd};
use std::rc::Rc;
use std::sync::atomic::{Ordering, fence};
use zerocopy::{FromZeros, IntoBytes};

/// The eventfd is silenced during a turn where setting its flag and looking at the queue afterwards is safe against the kernel's doing the
/// opposite; on other processors its "work is pending" flag has no barrier behind it, and a wake-up might be lost.
const SILENCE: bool = cfg!(target_arch = "x86_64");

/// A ring of which the kernel's FUSE doesn't know yet.
pub(crate) struct Prepared {
    ring: IoUring<squeue::Entry128, cqueue::Entry>,
    ready: OwnedFd,
    memory: Memory,
    layout: Layout,
}

/// See the module. It stays on the thread that made it.
pub(crate) struct Ring {
    /// Goes first: with it the kernel's commands end, and nothing is written into the memory any more. What it hasn't copied when the ring is
    /// closed it gives up, because only this thread copies.
    ring: IoUring<squeue::Entry128, cqueue::Entry>,
    memory: Memory,
    device: Rc<OwnedFd>,
    /// To which queue each entry belongs, and the request that it has: how the kernel finds it again, and its number.
    entries: Vec<(u16, Option<(u64, u64)>)>,
    /// Commands that are completed, by their entries, and how.
    completed: VecDeque<(usize, i32)>,
}

/// A request that arrived.
pub(crate) struct Taken<'a> {
    pub(crate) entry: usize,
    pub(crate) operation: Result<Operation, Errno>,
    pub(crate) data: &'a [u8],
}

impl Prepared {
    /// Whatever can fail for lack of something, before the kernel is told that there will be a ring: from then on it lets nobody in until there is.
    ///
    /// # Errors
    /// If io_uring isn't there, isn't allowed, or is too old for what is needed of it; or there isn't enough memory.
    pub(crate) fn new() -> io::Result<Self> {
        let build = |entries: u32| {
            IoUring::<squeue::Entry128, cqueue::Entry>::builder()
                .setup_single_issuer()
                .setup_defer_taskrun()
                .setup_taskrun_flag()
                .setup_submit_all()
                .build(entries)
        };
        // Where no ring is allowed, nothing else is asked for.
        build(1)?;
        let layout = Layout::of_this_machine()?;
        let entries = u32::try_from(layout.entries()).map_err(|_| io::ErrorKind::OutOfMemory)?;
        let ring = build(entries)?;
        let ready = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        ring.submitter().register_eventfd(ready.as_raw_fd())?;
        let memory = Memory::new(layout.entries(), layout.payload as usize)?;
        Ok(Self { ring, ready, memory, layout })
    }

    /// The longest read or write, in bytes.
    pub(crate) fn payload(&self) -> u32 {
        self.layout.payload
    }

    /// Tells the kernel of all entries, after it has agreed to that. Then it uses the ring.
    ///
    /// # Errors
    /// If the kernel has taken some entries and not others, or none at all: then it must be told that the file system is gone, for it may wait for
    /// the ring.
    pub(crate) fn register(self, device: Rc<OwnedFd>) -> io::Result<Registered> {
        let Self { ring, ready, memory, layout } = self;
        let queue = |(queue, depth): (usize, &u16)| vec![(queue as u16, None); usize::from(*depth)];
        let entries: Vec<_> = layout.depths.iter().enumerate().flat_map(queue).collect();
        let all = entries.len();
        let mut ring = Ring { ring, memory, device, entries, completed: VecDeque::new() };
        // A kernel that doesn't take what we say refuses the first one, and goes on without a ring. Later ones might be refused when others
        // have made the ring ready.
        if let Err(refused) = ring.register(0..1)? {
            return Ok(Registered::Refused(refused));
        }
        ring.register(1..all)??;
        Ok(Registered::Used(Box::new(ring), ready))
    }
}

/// Whether the kernel uses a ring.
pub(crate) enum Registered {
    /// It does. The descriptor becomes readable when there is something to do.
    Used(Box<Ring>, OwnedFd),
    /// It goes on without one.
    Refused(io::Error),
}

impl Ring {
    /// Tells the kernel of some entries; gives why it refuses one.
    fn register(&mut self, entries: Range<usize>) -> io::Result<io::Result<()>> {
        let places: Vec<_> = entries.clone().map(|entry| self.memory.lend(entry)).collect();
        for (entry, place) in entries.zip(&places) {
            self.push(entry, REGISTER, 0, Some(place));
        }
        // The places are read before this returns: a ring carries such commands out when it takes them.
        self.enter()?;
        if !self.ring.submission().is_empty() {
            return Err(io::Error::other("the kernel didn't take all commands"));
        }
        // Requests may have come already.
        self.reap();
        let refused = self.completed.iter().find(|(_, result)| *result < 0 && !is_end(*result));
        Ok(refused.map_or(Ok(()), |(_, error)| Err(io::Error::from_raw_os_error(-error))))
    }

    /// The next request that has arrived, if one has. `None` is an answer for now, until [`Ring::enter`].
    ///
    /// # Errors
    /// If the kernel refuses an entry although the connection is there: it would be without it from now on.
    pub(crate) fn next(&mut self) -> io::Result<Option<Taken<'_>>> {
        loop {
            if self.completed.is_empty() {
                self.reap();
            }
            let Some((entry, result)) = self.completed.pop_front() else { return Ok(None) };
            // SAFETY: the entry's only command is completed.
            unsafe { self.memory.take_back(entry) };
            match result {
                0.. => {
                    let header = self.memory.header(entry);
                    let InHeader { opcode, unique, .. } = header.request();
                    self.entries[entry].1 = Some((header.entry.commit, unique));
                    let data = self.memory.payload(entry, header.entry.payload as usize);
                    let operation = data.ok_or(Errno::INVAL);
                    let operation =
                        operation.and_then(|data| Operation::decode(opcode, &header.arguments, data));
                    return Ok(Some(Taken { entry, operation, data: data.unwrap_or_default() }));
                }
                // The device tells that, too.
                error if is_end(error) => {}
                error => return Err(io::Error::from_raw_os_error(-error)),
            }
        }
    }

    /// Answers the request of an entry. It goes to the kernel with the next [`Ring::enter`].
    ///
    /// # Errors
    /// If there is no room for the answer: then the request fails.
    ///
    /// # Panics
    /// If the entry has no request.
    pub(crate) fn answer(&mut self, entry: usize, answer: Result<Encoded<'_>, Errno>) -> io::Result<()> {
        let (commit, unique) = self.entries[entry].1.take().expect("an entry has a request once");
        let (error, encoded) = match answer {
            Ok(encoded) => (0, encoded),
            Err(error) => (-error.raw_os_error(), Encoded::EMPTY),
        };
        let fits = self.memory.answer(entry, unique, error, [encoded.fixed(), encoded.data]);
        if !fits {
            self.memory.answer(entry, unique, -Errno::IO.raw_os_error(), [&[], &[]]);
        }
        self.memory.lend(entry);
        self.push(entry, COMMIT_AND_FETCH, commit, None);
        if fits { Ok(()) } else { Err(io::ErrorKind::InvalidInput.into()) }
    }

    /// Hands the answers over, and lets the kernel finish what it holds back for this thread. Never waits.
    ///
    /// # Errors
    /// If the ring can't be used any more.
    pub(crate) fn enter(&mut self) -> io::Result<()> {
        loop {
            let queued = self.ring.submission().len();
            if queued == 0 && !self.ring.submission().taskrun() {
                return Ok(());
            }
            // SAFETY: the entries are as in `push`; there is no argument.
            let entered = unsafe {
                self.ring.submitter().enter::<libc::sigset_t>(
                    queued as u32,
                    0,
                    EnterFlags::GETEVENTS.bits(),
                    None,
                )
            };
            match entered {
                Ok(taken) if taken < queued && taken > 0 => {}
                Ok(_) => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// No wake-ups any more: whoever serves looks for himself, until [`Ring::listen`].
    pub(crate) fn silence(&mut self) {
        if SILENCE {
            self.ring.completion().disable_eventfd();
        }
    }

    /// Lets wake-ups come again. True if there may be something to do that came before, of which none will tell: look once more. Only once, because it may only
    /// seem so: the kernel sets its "work is pending" flag after it has put up the work, which may be done by then, and such a flag stays until there is
    /// work again.
    pub(crate) fn listen(&mut self) -> bool {
        if SILENCE {
            self.ring.completion().enable_eventfd();
            // Either the kernel sees the flag that was just cleared, or we see what it put up before it looked.
            fence(Ordering::SeqCst);
        }
        !self.completed.is_empty()
            || !self.ring.submission().is_empty()
            || !self.ring.completion().is_empty()
            || self.ring.submission().taskrun()
    }

    fn reap(&mut self) {
        let done = self.ring.completion().map(|done| (done.user_data() as usize, done.result()));
        self.completed.extend(done);
    }

    /// Puts a command about an entry, which is lent, into the queue.
    fn push(&mut self, entry: usize, command: u32, commit: u64, place: Option<&[libc::iovec; 2]>) {
        let queue = self.entries[entry].0;
        let said = RingCommand { queue, commit, ..RingCommand::new_zeroed() };
        let command = Submission::new(self.device.as_raw_fd(), command, &said, place, entry as u64);
        // SAFETY: the descriptor is open for as long as the ring is there. The memory that is lent is there as long, too, or until the ring is
        // closed; nobody here looks at it until the command is completed. The place itself is there until it was read: see `register`.
        let pushed = unsafe { self.ring.submission().push(&command.into_entry()) };
        pushed.expect("there is room for one command for each entry");
    }
}

/// What commands come back with when the file system is unmounted, aborted, or the ring is closed.
fn is_end(error: i32) -> bool {
    let ends = [Errno::NOTCONN, Errno::CONNABORTED, Errno::CANCELED, Errno::NODEV];
    ends.iter().any(|end| -end.raw_os_error() == error)
}

/// An entry of a submission queue with long entries, as the kernel has it for commands. The crate `io-uring` makes them without the length,
/// which is how FUSE is told that there are two places.
#[repr(C)]
struct Submission {
    opcode: u8,
    flags: u8,
    priority: u16,
    descriptor: i32,
    command: u32,
    padding: u32,
    address: u64,
    len: u32,
    command_flags: u32,
    user_data: u64,
    buffer: u16,
    personality: u16,
    file_index: u32,
    said: [u8; 80],
}

impl Submission {
    fn new(
        descriptor: i32,
        command: u32,
        said: &RingCommand,
        place: Option<&[libc::iovec; 2]>,
        user_data: u64,
    ) -> Self {
        let mut bytes = [0; 80];
        bytes.copy_from_slice(said.as_bytes());
        Self {
            opcode: opcode::UringCmd80::CODE,
            flags: 0,
            priority: 0,
            descriptor,
            command,
            padding: 0,
            address: place.map_or(0, |place| place.as_ptr() as u64),
            len: place.map_or(0, |place| place.len() as u32),
            command_flags: 0,
            user_data,
            buffer: 0,
            personality: 0,
            file_index: 0,
            said: bytes,
        }
    }

    fn into_entry(self) -> squeue::Entry128 {
        // SAFETY: both are the kernel's structure of 128 bytes, without gaps, and any bytes are one.
        unsafe { std::mem::transmute(self) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use io_uring::types;

    /// Field by field as the crate has it, but for the length.
    #[test]
    fn a_command_is_like_the_crates() {
        let said = RingCommand { queue: 5, commit: 7, ..RingCommand::new_zeroed() };
        let ours = Submission::new(3, 2, &said, None, 9).into_entry();
        let theirs = opcode::UringCmd80::new(types::Fd(3), 2).cmd(said.as_bytes().try_into().unwrap());
        let bytes = |entry: squeue::Entry128| {
            // SAFETY: as in `into_entry`.
            unsafe { std::mem::transmute::<squeue::Entry128, [u8; 128]>(entry) }
        };
        let mut theirs = bytes(theirs.addr(Some(0)).build());
        theirs[32..40].copy_from_slice(9u64.as_bytes());
        assert_eq!(bytes(ours), theirs);
        let place = [libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 }; 2];
        let placed = bytes(Submission::new(3, 1, &said, Some(&place), 9).into_entry());
        assert_eq!(placed[16..24], (place.as_ptr() as u64).as_bytes()[..]);
        assert_eq!(placed[24..28], 2u32.as_bytes()[..]);
    }

    #[test]
    fn errors_that_end_the_connection_are_told_from_others() {
        assert!(is_end(-libc::ENOTCONN) && is_end(-libc::ECONNABORTED));
        assert!(!is_end(-libc::EINVAL) && !is_end(-libc::ENOENT));
    }
}
