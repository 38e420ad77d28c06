//! One mounted file system's other end: both ways for requests, as one.

use crate::answer::Answer;
use crate::device::Device;
use crate::init;
use crate::processors::MAX_PAYLOAD;
use crate::request::Operation;
use crate::ring::{Prepared, Registered, Ring};
use rustix::io::Errno;
use std::io;
use std::ops::Deref;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::rc::Rc;

/// How to speak with the kernel.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Over io_uring, if that is possible.
    pub over_ring: bool,
}

/// See the module. Dropped, it leaves a mount behind that gives errors to whoever uses it. It stays on the thread that made it.
pub struct Connection {
    /// Goes first: it has commands for the device.
    ring: Option<Box<Ring>>,
    device: Device,
    file: Rc<OwnedFd>,
    no_ring: Option<io::Error>,
}

/// A request that arrived.
pub struct Arrived<'a> {
    /// What it is answered with.
    pub ticket: Ticket,
    /// What is wanted; or what it must be answered, if that is nothing that we can do.
    pub operation: Result<Operation, Errno>,
    /// The bytes of a write.
    pub data: &'a [u8],
}

/// The right to answer a request, and the duty: whoever made it waits for that.
#[derive(Debug)]
#[must_use]
pub struct Ticket(Way);

#[derive(Debug)]
enum Way {
    /// The request's number.
    Device(u64),
    /// The entry that it is in.
    Ring(usize),
}

impl Connection {
    /// Makes the first exchange with the kernel, at the other end of a file system that was just mounted: doesn't wait. What is returned beside it
    /// becomes readable when there is something to do, if requests come over io_uring.
    ///
    /// # Errors
    /// `Unsupported` if the kernel is too old, `InvalidData` if it makes no sense, and those of the system.
    pub fn open(file: OwnedFd, options: Options) -> io::Result<(Self, Option<OwnedFd>)> {
        let prepared = if options.over_ring { Prepared::new() } else { Err(no("it isn't wanted")) };
        let payload = prepared.as_ref().map_or(MAX_PAYLOAD, Prepared::payload);
        let agreed = init::exchange(file.as_fd(), payload, prepared.is_ok())?;
        let file = Rc::new(file);
        let device = Device::new(file.clone())?;
        let registered = match prepared {
            Ok(prepared) if agreed => prepared.register(file.clone())?,
            Ok(_) => Registered::Refused(no("the kernel doesn't offer it (Linux 6.14, fuse.enable_uring=1)")),
            Err(error) => Registered::Refused(error),
        };
        let (ring, ready, no_ring) = match registered {
            Registered::Used(ring, ready) => (Some(ring), Some(ready), None),
            Registered::Refused(why) => (None, None, Some(why)),
        };
        Ok((Self { ring, device, file, no_ring }, ready))
    }

    /// Why requests don't come over io_uring; `None` if they do.
    pub fn why_no_ring(&self) -> Option<&io::Error> {
        self.no_ring.as_ref()
    }

    /// The file that becomes readable, or has an error, when there is something to do: [`Connection::kick`]. Also where most requests come over
    /// io_uring.
    pub fn file(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// The file has become readable.
    pub fn kick(&mut self) {
        self.device.kick();
    }

    /// Hands answers over, and gives the requests that have arrived, as many as there is `room` for. Never waits; false if the file system is
    /// unmounted, so that no more can come.
    ///
    /// # Errors
    /// If the connection can't be used any more.
    pub fn poll(&mut self, mut room: usize, mut give: impl FnMut(Arrived<'_>)) -> io::Result<bool> {
        if let Some(ring) = &mut self.ring {
            ring.enter()?;
            while room > 0
                && let Some(taken) = ring.next()?
            {
                give(Arrived {
                    ticket: Ticket(Way::Ring(taken.entry)),
                    operation: taken.operation,
                    data: taken.data,
                });
                room -= 1;
            }
        }
        while room > 0
            && let Some(taken) = self.device.next()?
        {
            give(Arrived {
                ticket: Ticket(Way::Device(taken.unique)),
                operation: taken.operation,
                data: taken.data,
            });
            room -= 1;
        }
        Ok(!self.device.is_over())
    }

    /// Answers a request.
    ///
    /// # Errors
    /// If the kernel can't take the answer; but not if nobody waits for it any more.
    pub fn answer<Data: Deref<Target = [u8]>>(
        &mut self,
        ticket: Ticket,
        answer: &Result<Answer<Data>, Errno>,
    ) -> io::Result<()> {
        let encoded = answer.as_ref().map(Answer::encode).map_err(|error| *error);
        match (ticket.0, &mut self.ring) {
            (Way::Ring(entry), Some(ring)) => ring.answer(entry, encoded),
            (Way::Device(unique), _) => self.device.answer(unique, encoded),
            (Way::Ring(_), None) => Err(no("it is gone")),
        }
    }

    /// Before a turn of looking for requests: no wake-ups come until [`Connection::listen`].
    pub fn silence(&mut self) {
        if let Some(ring) = &mut self.ring {
            ring.silence();
        }
    }

    /// Before waiting: lets wake-ups come. True if there may be something to do of which none will tell, so that [`Connection::poll`] must look
    /// once more, without silence. That may find nothing; then it is time to wait.
    pub fn listen(&mut self) -> bool {
        self.ring.as_mut().is_some_and(|ring| ring.listen())
    }
}

impl Ticket {
    /// Whether the request came over io_uring.
    pub fn is_of_ring(&self) -> bool {
        matches!(self.0, Way::Ring(_))
    }
}

fn no(why: &str) -> io::Error {
    io::Error::new(io::ErrorKind::Unsupported, why)
}
