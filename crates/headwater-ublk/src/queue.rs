//! Where the requests of a device arrive and are answered.
//!
//! For each tag there is one command with the driver, or one request with us: a fetch stays with the driver until there is a request with its
//! tag, and the answer to that is the next fetch. The driver wants all of them from one thread.

use crate::abi::{ANSWER_AND_FETCH, Device, FETCH, GONE, QueueCommand, Request};
use crate::data::DataPort;
use crate::descriptors::Descriptors;
use io_uring::{EnterFlags, IoUring, opcode, types};
use rustix::event::{EventfdFlags, eventfd};
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::rc::Rc;

/// A request that arrived.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Arrived {
    /// Its number among those that are there at once.
    pub tag: u16,
    /// What is wanted.
    pub request: Request,
}

/// The queue of one device, open for as long as it is there; others find the device without a server when it is gone. It stays on the
/// thread that opened it.
pub struct Queue {
    /// Goes first: it has commands for the device.
    ring: IoUring,
    device: Rc<File>,
    descriptors: Descriptors,
    depth: u16,
    /// Tags whose command is with the driver, or on its way there.
    with_driver: u16,
    /// Tags that have come to their end.
    ended: u16,
}

impl Queue {
    /// Opens the queue of a device that was added, or whose recovery has begun, and asks for requests. What is returned beside it becomes
    /// readable when [`Queue::poll`] is to be called.
    ///
    /// # Errors
    /// If the device is gone or has a server, or the kernel lacks what is needed of io_uring.
    pub fn open(device: &Device) -> io::Result<(Self, OwnedFd)> {
        let depth = device.depth;
        let path = format!("/dev/ublkc{}", device.id);
        let device = Rc::new(File::options().read(true).write(true).open(path)?);
        let ring = IoUring::builder()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .setup_cqsize(u32::from(depth) * 2)
            .build(depth.into())?;
        let ready = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        ring.submitter().register_eventfd(ready.as_raw_fd())?;
        let descriptors = Descriptors::map(&device, depth)?;
        let mut queue = Self { ring, device, descriptors, depth, with_driver: 0, ended: 0 };
        for tag in 0..depth {
            queue.push(FETCH, tag, 0);
        }
        queue.enter()?;
        Ok((queue, ready))
    }

    /// Moves the bytes of this queue's requests.
    pub fn data(&self) -> DataPort {
        DataPort::new(self.device.clone())
    }

    /// Answers the request with this tag: a number of bytes, or an error number that is negative. It goes to the driver with the next
    /// [`Queue::poll`].
    ///
    /// # Panics
    /// If no request with this tag is unanswered.
    pub fn answer(&mut self, tag: u16, result: i32) {
        assert!(tag < self.depth && self.with_driver + self.ended < self.depth, "tag {tag} has no request");
        self.push(ANSWER_AND_FETCH, tag, result);
    }

    /// Hands the answers over, and appends the requests that have arrived. Never waits.
    ///
    /// # Errors
    /// If the ring can't be used any more, or the driver refuses to be asked for requests.
    pub fn poll(&mut self, into: &mut Vec<Arrived>) -> io::Result<()> {
        self.enter()?;
        let mut refused = None;
        for entry in self.ring.completion() {
            let tag = entry.user_data() as u16;
            self.with_driver -= 1;
            match entry.result() {
                0.. => into.push(Arrived { tag, request: self.descriptors.request(tag) }),
                GONE => self.ended += 1,
                error => {
                    self.ended += 1;
                    refused = Some(io::Error::from_raw_os_error(-error));
                }
            }
        }
        refused.map_or(Ok(()), Err)
    }

    /// Whether the device has gone: there will be no more requests, and what isn't answered needs no answer.
    pub fn is_over(&self) -> bool {
        self.ended > 0 && self.with_driver == 0
    }

    fn push(&mut self, command: u32, tag: u16, result: i32) {
        let entry = opcode::UringCmd16::new(types::Fd(self.device.as_raw_fd()), command)
            .cmd(QueueCommand::encode(tag, result))
            .build()
            .user_data(tag.into());
        // SAFETY: the command refers to no memory, and the descriptor is open for as long as the ring is there.
        let pushed = unsafe { self.ring.submission().push(&entry) };
        pushed.expect("there is room for one command for each tag");
        self.with_driver += 1;
    }

    /// Submits what was pushed and lets the kernel finish what it holds back for this thread.
    fn enter(&mut self) -> io::Result<()> {
        loop {
            let queued = self.ring.submission().len() as u32;
            // SAFETY: the entries are as in `push`; there is no argument.
            let entered = unsafe {
                self.ring.submitter().enter::<libc::sigset_t>(queued, 0, EnterFlags::GETEVENTS.bits(), None)
            };
            match entered {
                Ok(taken) if taken < queued as usize && taken > 0 => {}
                Ok(_) => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }
}
