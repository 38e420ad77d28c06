//! Requests through /dev/fuse: each is read in one piece, and each answer written in one.

use crate::abi::{InHeader, OutHeader, opcode};
use crate::answer::Encoded;
use crate::processors::MAX_PAYLOAD;
use crate::request::{Operation, WRITE_ARGUMENTS};
use rustix::fs::OFlags;
use rustix::io::Errno;
use std::io::{self, IoSlice};
use std::os::fd::OwnedFd;
use std::rc::Rc;
use zerocopy::{FromBytes, IntoBytes};

/// The longest request: a write, and what comes before its bytes.
const ROOM: usize = MAX_PAYLOAD as usize + 4096;

/// See the module.
pub(crate) struct Device {
    file: Rc<OwnedFd>,
    room: Box<[u8]>,
    /// There may be something to read.
    look: bool,
    over: bool,
}

/// A request that arrived.
pub(crate) struct Taken<'a> {
    pub(crate) unique: u64,
    pub(crate) operation: Result<Operation, Errno>,
    pub(crate) data: &'a [u8],
}

/// A message of the kernel.
#[derive(Debug, PartialEq, Eq)]
enum Message {
    Request {
        unique: u64,
        operation: Result<Operation, Errno>,
        /// Where in the message the bytes of a write begin.
        data: usize,
    },
    /// Another request, whose answer would be of no use any more.
    Interrupt(u64),
    /// What needs no answer.
    Remark,
}

impl Device {
    /// The kernel's end of a file system, after the first exchange.
    pub(crate) fn new(file: Rc<OwnedFd>) -> io::Result<Self> {
        rustix::fs::fcntl_setfl(&file, rustix::fs::fcntl_getfl(&file)? | OFlags::NONBLOCK)?;
        Ok(Self { file, room: vec![0; ROOM].into(), look: true, over: false })
    }

    /// It has become readable.
    pub(crate) fn kick(&mut self) {
        self.look = true;
    }

    /// Whether the file system is unmounted.
    pub(crate) fn is_over(&self) -> bool {
        self.over
    }

    /// The next request, if there is one.
    ///
    /// # Errors
    /// `InvalidData` if the kernel's messages make no sense, and those of the system.
    pub(crate) fn next(&mut self) -> io::Result<Option<Taken<'_>>> {
        while self.look {
            match rustix::io::read(&*self.file, &mut self.room[..]) {
                Ok(len) => match Message::decode(&self.room[..len])? {
                    Message::Request { unique, operation, data } => {
                        return Ok(Some(Taken { unique, operation, data: &self.room[data..len] }));
                    }
                    // The kernel is told that there is no need to say that again.
                    Message::Interrupt(unique) => self.answer(unique, Err(Errno::NOSYS))?,
                    Message::Remark => {}
                },
                Err(Errno::AGAIN) => self.look = false,
                // What was to be read was given up meanwhile.
                Err(Errno::INTR | Errno::NOENT) => {}
                Err(Errno::NODEV | Errno::CONNABORTED) => (self.look, self.over) = (false, true),
                Err(error) => return Err(error.into()),
            }
        }
        Ok(None)
    }

    /// Answers the request with this number.
    ///
    /// # Errors
    /// If the kernel doesn't take the answer; but not if nobody waits for it any more.
    pub(crate) fn answer(&self, unique: u64, answer: Result<Encoded<'_>, Errno>) -> io::Result<()> {
        let (error, encoded) = match answer {
            Ok(encoded) => (0, encoded),
            Err(error) => (-error.raw_os_error(), Encoded::EMPTY),
        };
        let len = (size_of::<OutHeader>() + encoded.len()) as u32;
        let header = OutHeader { len, error, unique };
        let parts = [header.as_bytes(), encoded.fixed(), encoded.data].map(IoSlice::new);
        loop {
            match rustix::io::writev(&*self.file, &parts) {
                Ok(_) | Err(Errno::NOENT | Errno::NODEV) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

impl Message {
    fn decode(message: &[u8]) -> io::Result<Self> {
        let nonsense = |why: String| {
            let message = format!("a message of the kernel has {} bytes and {why}", message.len());
            io::Error::new(io::ErrorKind::InvalidData, message)
        };
        let (header, rest) = InHeader::read_from_prefix(message)
            .map_err(|_| nonsense("can't hold a header of 40".to_owned()))?;
        if usize::try_from(header.len) != Ok(message.len()) {
            return Err(nonsense(format!("says that it has {}", header.len)));
        }
        Ok(match header.opcode {
            opcode::FORGET | opcode::BATCH_FORGET => Self::Remark,
            opcode::INTERRUPT => Self::Interrupt(header.unique),
            code => {
                let arguments = if code == opcode::WRITE { WRITE_ARGUMENTS } else { rest.len() };
                let (arguments, data) = rest.split_at(arguments.min(rest.len()));
                let operation = Operation::decode(code, arguments, data);
                Self::Request { unique: header.unique, operation, data: message.len() - data.len() }
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::abi::TransferIn;
    use proptest::prelude::*;
    use zerocopy::FromZeros;

    fn message(opcode: u32, body: &[&[u8]]) -> Vec<u8> {
        let body = body.concat();
        let header = InHeader { len: 40 + body.len() as u32, opcode, unique: 5, ..InHeader::new_zeroed() };
        [header.as_bytes(), &body].concat()
    }

    #[test]
    fn a_write_is_taken_with_its_bytes() {
        let arguments = TransferIn { offset: 7, size: 3, ..TransferIn::new_zeroed() };
        let operation = Ok(Operation::Write { offset: 7, durable: false });
        let whole = message(opcode::WRITE, &[arguments.as_bytes(), b"new"]);
        let request = Message::Request { unique: 5, operation, data: whole.len() - 3 };
        assert_eq!(Message::decode(&whole).unwrap(), request);
        for len in 0..whole.len() {
            assert!(Message::decode(&whole[..len]).is_err(), "{len}");
        }
        let short = message(opcode::WRITE, &[arguments.as_bytes(), b"ne"]);
        let refused = Message::Request { unique: 5, operation: Err(Errno::INVAL), data: short.len() - 2 };
        assert_eq!(Message::decode(&short).unwrap(), refused, "it is answered");
    }

    #[test]
    fn what_needs_no_answer_gets_none() {
        assert_eq!(Message::decode(&message(opcode::FORGET, &[&[0; 8]])).unwrap(), Message::Remark);
        assert_eq!(Message::decode(&message(opcode::INTERRUPT, &[&[0; 8]])).unwrap(), Message::Interrupt(5));
        let unknown = message(999, &[]);
        let refused = Message::Request { unique: 5, operation: Err(Errno::NOSYS), data: unknown.len() };
        assert_eq!(Message::decode(&unknown).unwrap(), refused);
    }

    proptest! {
        #[test]
        fn nonsense_is_no_panic(bytes: Vec<u8>, code in 0u32..60, body: Vec<u8>) {
            let _ = Message::decode(&bytes);
            let _ = Message::decode(&message(code, &[&body]));
        }
    }
}
