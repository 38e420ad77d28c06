//! A front end and a guest's driver in one, by hand: what a well-behaved one says, and whatever else its owner wants it to say.
//!
//! It lives on the server's thread, which is why it isn't `headwater_front_end`'s. So nothing here waits in a system call, and whoever waits lets the server work.

use headwater_front_end::protocol::PROTOCOL_FEATURES;
pub(super) use headwater_front_end::protocol::{code, descriptor, event, feature, longs, message, words};
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::io::Errno;
use rustix::net::{
    RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, Shutdown, recv, sendmsg, shutdown,
};
use std::fs::File;
use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::FileExt;
use std::os::unix::net::{SocketAddr, UnixStream};
use tokio::task::yield_now;

/// The size of each of the guest's two regions, which touch, in bytes.
const REGION: u64 = 512 << 10;
/// The size of the guest's memory in bytes.
pub(super) const MEMORY: u64 = 2 * REGION;
/// What lies in the file in front of the guest's memory and behind it, in bytes.
const GUARD: u64 = 64 << 10;
/// Where the front end has the guest's address 0.
pub(super) const USER: u64 = 0x7f00_0000_0000;
/// How many queues there are.
pub(super) const QUEUES: u8 = 2;
/// Where the guest's memory holds no queues.
pub(super) const FREE: u64 = 1 << 16;

/// Memory that can be handed over, of so many bytes.
pub(super) fn shared(size: u64) -> File {
    let fd = memfd_create("guest", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING);
    let file = File::from(fd.expect("a file in memory"));
    file.set_len(size).expect("there is memory");
    file
}

/// The guest's memory, in the middle of a file.
pub(super) struct Memory(File);

impl Memory {
    pub(super) fn new() -> Self {
        let file = shared(GUARD + MEMORY + GUARD);
        for page in Self::guards() {
            file.write_all_at(&[0xa5; 64], page).expect("it is in the file");
        }
        Self(file)
    }

    /// Some places that the guest doesn't have.
    fn guards() -> [u64; 4] {
        [0, GUARD - 64, GUARD + MEMORY, GUARD + MEMORY + GUARD - 64]
    }

    /// Asserts that nothing was written outside the guest's memory.
    pub(super) fn check_guards(&self) {
        for place in Self::guards() {
            let mut bytes = [0; 64];
            self.0.read_exact_at(&mut bytes, place).expect("it is in the file");
            assert_eq!(bytes, [0xa5; 64], "the server wrote outside the guest's memory, at {place:#x}");
        }
    }

    /// Writes what lies in the memory of `bytes` at the guest's address `at`.
    pub(super) fn write(&self, at: u64, bytes: &[u8]) {
        let len = (bytes.len() as u64).min(MEMORY.saturating_sub(at)) as usize;
        self.0.write_all_at(&bytes[..len], GUARD + at).expect("it is in the file");
    }

    pub(super) fn read(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.0.read_exact_at(&mut bytes, GUARD + at).expect("it is in the file");
        bytes
    }

    pub(super) fn word(&self, at: u64) -> u16 {
        let bytes = self.read(at, 2);
        u16::from_le_bytes([bytes[0], bytes[1]])
    }
}

/// A split virtqueue, as the driver has it.
pub(super) struct Ring {
    index: u8,
    size: u16,
    pub(super) kick: OwnedFd,
    call: OwnedFd,
    error: OwnedFd,
    available: u16,
}

impl Ring {
    pub(super) fn new(index: u8, size: u16) -> Self {
        Self { index, size, kick: event(), call: event(), error: event(), available: 0 }
    }

    /// Where its descriptors, its available and its used ring are.
    pub(super) fn places(&self) -> [u64; 3] {
        let start = u64::from(self.index) << 14;
        [start, start + 0x1000, start + 0x2000]
    }

    /// The messages that hand it over, with the descriptors that go along.
    pub(super) fn attaching(&self, base: u16) -> Vec<(Vec<u8>, Vec<BorrowedFd<'_>>)> {
        let index = u32::from(self.index);
        let [descriptors, available, used] = self.places().map(|at| at + USER);
        let addresses = [words(&[index, 0]), longs(&[descriptors, used, available, 0])].concat();
        let which = longs(&[index.into()]);
        vec![
            (message(code::SET_VRING_NUM, 1, &words(&[index, self.size.into()])), vec![]),
            (message(code::SET_VRING_ADDR, 1, &addresses), vec![]),
            (message(code::SET_VRING_BASE, 1, &words(&[index, base.into()])), vec![]),
            (message(code::SET_VRING_CALL, 1, &which), vec![self.call.as_fd()]),
            (message(code::SET_VRING_ERR, 1, &which), vec![self.error.as_fd()]),
            (message(code::SET_VRING_KICK, 1, &which), vec![self.kick.as_fd()]),
            (message(code::SET_VRING_ENABLE, 1, &words(&[index, 1])), vec![]),
        ]
    }

    /// Puts a chain into the available ring.
    pub(super) fn offer(&mut self, memory: &Memory, head: u16) {
        let available = self.places()[1];
        memory.write(available + 4 + 2 * u64::from(self.available % self.size), &head.to_le_bytes());
        self.say_available(memory, self.available.wrapping_add(1));
    }

    /// Says how far the available ring is filled.
    pub(super) fn say_available(&mut self, memory: &Memory, available: u16) {
        self.available = available;
        memory.write(self.places()[1] + 2, &available.to_le_bytes());
    }

    pub(super) fn kick(&self) {
        // One that was kicked so often that it is full has been kicked.
        let _ = rustix::io::write(&self.kick, &1u64.to_le_bytes());
    }
}

/// A connection.
pub(super) struct FrontEnd(UnixStream);

impl FrontEnd {
    /// Connects to an abstract address, and says nothing.
    pub(super) fn connect(name: &[u8]) -> Self {
        let address = SocketAddr::from_abstract_name(name).expect("a short name");
        let socket = UnixStream::connect_addr(&address).expect("the server listens");
        socket.set_nonblocking(true).expect("a socket");
        Self(socket)
    }

    /// Sends bytes, and descriptors with the first of them. False if the server has closed.
    pub(super) async fn send(&self, mut bytes: &[u8], mut fds: &[BorrowedFd<'_>]) -> bool {
        while !bytes.is_empty() {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            if !fds.is_empty() {
                assert!(control.push(SendAncillaryMessage::ScmRights(fds)), "more descriptors than fit");
            }
            let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
            match sendmsg(&self.0, &[IoSlice::new(bytes)], &mut control, flags) {
                Ok(sent) => (bytes, fds) = (&bytes[sent..], &[]),
                Err(Errno::AGAIN) => {
                    if self.has_ended() {
                        return false;
                    }
                    yield_now().await;
                }
                Err(_) => return false,
            }
        }
        true
    }

    /// Reads all that the server has said, without minding it; true if the server has closed. Descriptors in it are closed by the system.
    pub(super) fn has_ended(&self) -> bool {
        let mut bytes = [0; 4096];
        loop {
            match recv(&self.0, &mut bytes[..], RecvFlags::DONTWAIT) {
                Ok((_, 0)) => return true,
                Ok(_) => {}
                Err(error) => return error != Errno::AGAIN,
            }
        }
    }

    /// Says goodbye, and waits for the server to do so too.
    pub(super) async fn close(self) {
        // One that the server has closed needs no goodbye.
        let _ = shutdown(&self.0, Shutdown::Write);
        while !self.has_ended() {
            yield_now().await;
        }
    }

    /// Does all that comes before a request: features, memory, queues. False if the server has closed.
    pub(super) async fn set_up(&self, features: u64, memory: &Memory, rings: &[Ring]) -> bool {
        let regions = [0, REGION].map(|start| longs(&[start, REGION, USER + start, GUARD + start])).concat();
        let table = [words(&[2, 0]), regions].concat();
        let file = memory.0.as_fd();
        let mut said = vec![
            (message(code::GET_FEATURES, 1, &[]), vec![]),
            (message(code::GET_PROTOCOL_FEATURES, 1, &[]), vec![]),
            (message(code::SET_PROTOCOL_FEATURES, 1, &longs(&[PROTOCOL_FEATURES])), vec![]),
            (message(code::SET_OWNER, 1, &[]), vec![]),
            (message(code::SET_FEATURES, 1, &longs(&[features])), vec![]),
            (message(code::SET_MEM_TABLE, 1, &table), vec![file, file]),
        ];
        said.extend(rings.iter().flat_map(|ring| ring.attaching(0)));
        for (bytes, fds) in said {
            if !self.send(&bytes, &fds).await {
                return false;
            }
        }
        true
    }
}

/// A well-behaved guest reads `len` bytes from `sector` on, and leaves.
pub(super) async fn read_well(name: &[u8], sector: u64, len: u32) -> Vec<u8> {
    let (client, memory) = (FrontEnd::connect(name), Memory::new());
    let mut rings = [Ring::new(0, 16)];
    let (data, outcome) = (FREE + 64, FREE + 32);
    memory.write(FREE, &[words(&[0, 0]), longs(&[sector])].concat());
    memory.write(outcome, &[0xee]);
    let chain = [descriptor(FREE, 16, 1, 1), descriptor(data, len, 3, 2), descriptor(outcome, 1, 2, 0)];
    memory.write(rings[0].places()[0], &chain.concat());
    rings[0].offer(&memory, 0);
    rings[0].kick();
    let used = rings[0].places()[2];
    let features = feature::PROTOCOL | feature::VERSION_1 | feature::FLUSH;
    assert!(client.set_up(features, &memory, &rings).await, "a well-behaved front end is cut off");
    while memory.word(used + 2) == 0 {
        assert!(!client.has_ended(), "a well-behaved guest gets no answer");
        yield_now().await;
    }
    assert_eq!(memory.read(used + 4, 8), words(&[0, len + 1]), "which answer, and how long");
    assert_eq!(memory.read(outcome, 1), [0], "a well-behaved guest's request fails");
    let bytes = memory.read(data, len as usize);
    client.close().await;
    bytes
}
