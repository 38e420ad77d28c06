//! A connection, and what a front end says over it.

use std::io::{IoSlice, IoSliceMut, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};

use crate::protocol::{PROTOCOL_FEATURES, code, feature, longs, message, words};
use crate::{Guest, LIMIT, REGION, Ring, USER};

/// A reply.
#[derive(Debug)]
pub struct Reply {
    /// What follows the header.
    pub body: Vec<u8>,
    /// The descriptors that came with it.
    pub fds: Vec<OwnedFd>,
}

impl Reply {
    /// The number that it consists of.
    pub fn number(&self) -> u64 {
        u64::from_le_bytes(self.body[..8].try_into().unwrap())
    }
}

/// A connection.
pub struct Client {
    /// For what isn't a whole message.
    pub socket: UnixStream,
}

impl Client {
    /// Connects and says nothing.
    pub fn connect(path: &Path) -> Self {
        let socket = UnixStream::connect(path).unwrap();
        socket.set_read_timeout(Some(LIMIT)).unwrap();
        socket.set_write_timeout(Some(LIMIT)).unwrap();
        Self { socket }
    }

    /// Sends bytes with descriptors, and gives how many bytes went.
    ///
    /// # Errors
    /// What the system says: the other side may have closed.
    pub fn send_raw(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> rustix::io::Result<usize> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(64))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            assert!(control.push(SendAncillaryMessage::ScmRights(fds)));
        }
        sendmsg(&self.socket, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL)
    }

    /// Sends a message. With `wants_reply`, one that has none by itself is acknowledged.
    pub fn send(&self, code: u32, body: &[u8], fds: &[BorrowedFd<'_>], wants_reply: bool) {
        let flags = 1 | if wants_reply { 8 } else { 0 };
        let bytes = message(code, flags, body);
        assert_eq!(self.send_raw(&bytes, fds).unwrap(), bytes.len());
    }

    /// Receives a reply to `code`; none if the connection is over.
    pub fn receive(&self, code: u32) -> Option<Reply> {
        let mut head = [0; 12];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::WAITALL;
        let got = recvmsg(&self.socket, &mut [IoSliceMut::new(&mut head)], &mut control, flags);
        match got {
            Ok(got) if got.bytes == 0 => return None,
            Err(rustix::io::Errno::CONNRESET) => return None,
            got => assert_eq!(got.unwrap().bytes, head.len()),
        }
        let word = |at: usize| u32::from_le_bytes(head[at..at + 4].try_into().unwrap());
        assert_eq!((word(0), word(4) & 7), (code, 5), "a reply to the message, version 1");
        let mut body = vec![0; word(8) as usize];
        (&self.socket).read_exact(&mut body).unwrap();
        let fds = control.drain().flat_map(|message| match message {
            RecvAncillaryMessage::ScmRights(fds) => fds.collect(),
            _ => Vec::new(),
        });
        Some(Reply { body, fds: fds.collect() })
    }

    /// Asks for something.
    pub fn ask(&self, code: u32, body: &[u8]) -> Reply {
        self.send(code, body, &[], false);
        self.receive(code).expect("an answer")
    }

    /// Says something and waits until it is done. False if it was refused.
    pub fn tell(&self, code: u32, body: &[u8], fds: &[BorrowedFd<'_>]) -> bool {
        self.send(code, body, fds, true);
        self.receive(code).is_some_and(|reply| reply.number() == 0)
    }

    /// True once the other side has closed.
    pub fn is_cut_off(&self) -> bool {
        let mut rest = [0; 4096];
        loop {
            match (&self.socket).read(&mut rest) {
                Ok(0) => return true,
                Ok(_) => {}
                Err(error) => return error.kind() == std::io::ErrorKind::ConnectionReset,
            }
        }
    }

    /// Agrees on features and all of [`PROTOCOL_FEATURES`]; everything else needs that.
    pub fn negotiate(&self, features: u64) {
        self.negotiate_some(features, PROTOCOL_FEATURES);
    }

    /// As [`Client::negotiate`], with the protocol's features `protocol`.
    pub fn negotiate_some(&self, features: u64, protocol: u64) {
        let offered = self.ask(code::GET_FEATURES, &[]).number();
        assert_eq!(offered & features, features);
        let offered = self.ask(code::GET_PROTOCOL_FEATURES, &[]).number();
        assert_eq!(offered & protocol, protocol);
        self.send(code::SET_PROTOCOL_FEATURES, &longs(&[protocol]), &[], false);
        assert!(self.tell(code::SET_OWNER, &[], &[]));
        assert!(self.tell(code::SET_FEATURES, &longs(&[features]), &[]));
    }

    /// Shares the guest's memory.
    pub fn share(&self, guest: &Guest) {
        let mut body = words(&[2, 0]);
        body.extend(longs(&[0, REGION, USER, 0]));
        body.extend(longs(&[REGION, REGION, USER + REGION, REGION]));
        let fd = guest.file.as_fd();
        assert!(self.tell(code::SET_MEM_TABLE, &body, &[fd, fd]));
    }

    /// The configuration space.
    pub fn config(&self) -> Vec<u8> {
        let mut body = words(&[0, 60, 0]);
        body.extend([0; 60]);
        self.ask(code::GET_CONFIG, &body).body[12..].to_vec()
    }

    /// The disk's size in sectors.
    pub fn capacity(&self) -> u64 {
        u64::from_le_bytes(self.config()[..8].try_into().unwrap())
    }

    /// Writes the cache mode.
    pub fn set_wce(&self, wce: u8) -> bool {
        let mut body = words(&[32, 1, 0]);
        body.push(wce);
        self.tell(code::SET_CONFIG, &body, &[])
    }

    /// Everything that a guest's driver does at its start: features, memory, and one queue.
    pub fn ready(path: &Path, guest: &Guest, features: u64) -> (Self, Ring) {
        let client = Self::connect(path);
        client.negotiate(features | feature::PROTOCOL | feature::VERSION_1);
        client.share(guest);
        let ring = Ring::start(&client, guest, 0, features);
        (client, ring)
    }
}
