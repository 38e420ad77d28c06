//! A front end and a guest's driver in one, made by hand: it can do everything right, and everything wrong.

use std::fs::File;
use std::io::{IoSlice, IoSliceMut, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};

/// How long anything may take.
const LIMIT: Duration = Duration::from_secs(20);

/// Messages, by the numbers that the specification gives them.
pub(crate) mod code {
    pub(crate) const GET_FEATURES: u32 = 1;
    pub(crate) const SET_FEATURES: u32 = 2;
    pub(crate) const SET_OWNER: u32 = 3;
    pub(crate) const SET_MEM_TABLE: u32 = 5;
    pub(crate) const SET_VRING_NUM: u32 = 8;
    pub(crate) const SET_VRING_ADDR: u32 = 9;
    pub(crate) const SET_VRING_BASE: u32 = 10;
    pub(crate) const GET_VRING_BASE: u32 = 11;
    pub(crate) const SET_VRING_KICK: u32 = 12;
    pub(crate) const SET_VRING_CALL: u32 = 13;
    pub(crate) const SET_VRING_ERR: u32 = 14;
    pub(crate) const GET_PROTOCOL_FEATURES: u32 = 15;
    pub(crate) const SET_PROTOCOL_FEATURES: u32 = 16;
    pub(crate) const GET_QUEUE_NUM: u32 = 17;
    pub(crate) const SET_VRING_ENABLE: u32 = 18;
    pub(crate) const SET_BACKEND_REQ_FD: u32 = 21;
    pub(crate) const GET_CONFIG: u32 = 24;
    pub(crate) const SET_CONFIG: u32 = 25;
    pub(crate) const GET_INFLIGHT_FD: u32 = 31;
    pub(crate) const SET_INFLIGHT_FD: u32 = 32;
    pub(crate) const GET_MAX_MEM_SLOTS: u32 = 36;
    pub(crate) const ADD_MEM_REG: u32 = 37;
    pub(crate) const REM_MEM_REG: u32 = 38;
}

/// Features, as bits.
pub(crate) mod feature {
    pub(crate) const SEG_MAX: u64 = 1 << 2;
    pub(crate) const RO: u64 = 1 << 5;
    pub(crate) const BLK_SIZE: u64 = 1 << 6;
    pub(crate) const FLUSH: u64 = 1 << 9;
    pub(crate) const TOPOLOGY: u64 = 1 << 10;
    pub(crate) const CONFIG_WCE: u64 = 1 << 11;
    pub(crate) const MQ: u64 = 1 << 12;
    pub(crate) const DISCARD: u64 = 1 << 13;
    pub(crate) const WRITE_ZEROES: u64 = 1 << 14;
    pub(crate) const INDIRECT: u64 = 1 << 28;
    pub(crate) const EVENT_IDX: u64 = 1 << 29;
    pub(crate) const PROTOCOL: u64 = 1 << 30;
    pub(crate) const VERSION_1: u64 = 1 << 32;
}

/// Protocol features: several queues, replies, backend channel, configuration, inflight, reset, memory slots.
pub(crate) const PROTOCOL_FEATURES: u64 = 1 | 1 << 3 | 1 << 5 | 1 << 9 | 1 << 12 | 1 << 13 | 1 << 15;

/// The guest's memory: two regions of 8 MiB side by side, in one file.
pub(crate) const REGION: u64 = 8 << 20;
/// Where the front end has the guest's address 0.
pub(crate) const USER: u64 = 0x7f00_0000_0000;
/// How many descriptors a queue has.
pub(crate) const QUEUE: u16 = 64;

/// The guest's memory, which outlives connections.
pub(crate) struct Guest {
    pub(crate) file: File,
    pub(crate) memory: GuestMemoryMmap,
}

impl Guest {
    pub(crate) fn new() -> Self {
        let fd = memfd_create("guest", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
        ftruncate(&fd, 2 * REGION).unwrap();
        let file = File::from(fd);
        let whole = FileOffset::new(file.try_clone().unwrap(), 0);
        let ranges = [(GuestAddress(0), 2 * REGION as usize, Some(whole))];
        let memory = GuestMemoryMmap::from_ranges_with_files(ranges).unwrap();
        Self { file, memory }
    }

    pub(crate) fn write(&self, at: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(at)).unwrap();
    }

    pub(crate) fn read(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.read_slice(&mut bytes, GuestAddress(at)).unwrap();
        bytes
    }

    pub(crate) fn word(&self, at: u64) -> u16 {
        self.memory.read_obj(GuestAddress(at)).unwrap()
    }

    pub(crate) fn set_word(&self, at: u64, value: u16) {
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
        self.memory.write_obj(value, GuestAddress(at)).unwrap();
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
    }
}

/// A reply.
#[derive(Debug)]
pub(crate) struct Reply {
    pub(crate) body: Vec<u8>,
    pub(crate) fds: Vec<OwnedFd>,
}

impl Reply {
    pub(crate) fn number(&self) -> u64 {
        u64::from_le_bytes(self.body[..8].try_into().unwrap())
    }
}

/// A connection.
pub(crate) struct Client {
    pub(crate) socket: UnixStream,
}

pub(crate) fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

pub(crate) fn longs(longs: &[u64]) -> Vec<u8> {
    longs.iter().flat_map(|long| long.to_le_bytes()).collect()
}

impl Client {
    /// Connects and says nothing.
    pub(crate) fn connect(path: &Path) -> Self {
        let socket = UnixStream::connect(path).unwrap();
        socket.set_read_timeout(Some(LIMIT)).unwrap();
        socket.set_write_timeout(Some(LIMIT)).unwrap();
        Self { socket }
    }

    /// Sends bytes with descriptors.
    pub(crate) fn send_raw(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> rustix::io::Result<usize> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(64))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            assert!(control.push(SendAncillaryMessage::ScmRights(fds)));
        }
        sendmsg(&self.socket, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL)
    }

    /// Sends a message. With `wants_reply`, one that has none by itself is acknowledged.
    pub(crate) fn send(&self, code: u32, body: &[u8], fds: &[BorrowedFd<'_>], wants_reply: bool) {
        let flags = 1 | if wants_reply { 8 } else { 0 };
        let mut bytes = words(&[code, flags, body.len() as u32]);
        bytes.extend(body);
        assert_eq!(self.send_raw(&bytes, fds).unwrap(), bytes.len());
    }

    /// Receives a reply to `code`; none if the connection is over.
    pub(crate) fn receive(&self, code: u32) -> Option<Reply> {
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
    pub(crate) fn ask(&self, code: u32, body: &[u8]) -> Reply {
        self.send(code, body, &[], false);
        self.receive(code).expect("an answer")
    }

    /// Says something and waits until it is done. False if it was refused.
    pub(crate) fn tell(&self, code: u32, body: &[u8], fds: &[BorrowedFd<'_>]) -> bool {
        self.send(code, body, fds, true);
        self.receive(code).is_some_and(|reply| reply.number() == 0)
    }

    /// True once the other side has closed.
    pub(crate) fn is_cut_off(&self) -> bool {
        let mut rest = [0; 4096];
        loop {
            match (&self.socket).read(&mut rest) {
                Ok(0) => return true,
                Ok(_) => {}
                Err(error) => return error.kind() == std::io::ErrorKind::ConnectionReset,
            }
        }
    }

    /// Agrees on features; everything else needs that.
    pub(crate) fn negotiate(&self, features: u64) {
        let offered = self.ask(code::GET_FEATURES, &[]).number();
        assert_eq!(offered & features, features);
        let protocol = self.ask(code::GET_PROTOCOL_FEATURES, &[]).number();
        assert_eq!(protocol & PROTOCOL_FEATURES, PROTOCOL_FEATURES);
        self.send(code::SET_PROTOCOL_FEATURES, &longs(&[PROTOCOL_FEATURES]), &[], false);
        assert!(self.tell(code::SET_OWNER, &[], &[]));
        assert!(self.tell(code::SET_FEATURES, &longs(&[features]), &[]));
    }

    /// Shares the guest's memory.
    pub(crate) fn share(&self, guest: &Guest) {
        let mut body = words(&[2, 0]);
        body.extend(longs(&[0, REGION, USER, 0]));
        body.extend(longs(&[REGION, REGION, USER + REGION, REGION]));
        let fd = guest.file.as_fd();
        assert!(self.tell(code::SET_MEM_TABLE, &body, &[fd, fd]));
    }

    /// The configuration space.
    pub(crate) fn config(&self) -> Vec<u8> {
        let mut body = words(&[0, 60, 0]);
        body.extend([0; 60]);
        self.ask(code::GET_CONFIG, &body).body[12..].to_vec()
    }

    pub(crate) fn capacity(&self) -> u64 {
        u64::from_le_bytes(self.config()[..8].try_into().unwrap())
    }

    /// Writes the cache mode.
    pub(crate) fn set_wce(&self, wce: u8) -> bool {
        let mut body = words(&[32, 1, 0]);
        body.push(wce);
        self.tell(code::SET_CONFIG, &body, &[])
    }

    /// Everything that a guest's driver does at its start: features, memory, and one queue.
    pub(crate) fn ready(path: &Path, guest: &Guest, features: u64) -> (Self, Ring) {
        let client = Self::connect(path);
        client.negotiate(features | feature::PROTOCOL | feature::VERSION_1);
        client.share(guest);
        let ring = Ring::start(&client, guest, 0, features);
        (client, ring)
    }
}

/// A part of a chain.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Piece {
    pub(crate) at: u64,
    pub(crate) len: u32,
    pub(crate) writable: bool,
}

/// A split virtqueue, as the driver has it.
pub(crate) struct Ring {
    pub(crate) index: u16,
    pub(crate) kick: OwnedFd,
    pub(crate) call: OwnedFd,
    pub(crate) error: OwnedFd,
    event_idx: bool,
    pub(crate) available: u16,
    pub(crate) used: u16,
    next_descriptor: u16,
}

fn event() -> OwnedFd {
    eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap()
}

impl Ring {
    /// A queue at rest.
    pub(crate) fn new(index: u16, features: u64) -> Self {
        let event_idx = features & feature::EVENT_IDX != 0;
        let (kick, call, error) = (event(), event(), event());
        Self { index, kick, call, error, event_idx, available: 0, used: 0, next_descriptor: 0 }
    }

    /// Where its descriptors, its available and its used ring are.
    pub(crate) fn places(&self) -> [u64; 3] {
        let start = u64::from(self.index) << 16;
        [start, start + 0x2000, start + 0x3000]
    }

    /// Sets a queue up and enables it.
    pub(crate) fn start(client: &Client, guest: &Guest, index: u16, features: u64) -> Self {
        let ring = Self::new(index, features);
        guest.write(ring.places()[0], &[0; 0x4000]);
        ring.attach(client, 0);
        ring
    }

    /// Hands a queue over that may have been used before.
    pub(crate) fn attach(&self, client: &Client, base: u16) {
        let index = u32::from(self.index);
        assert!(client.tell(code::SET_VRING_NUM, &words(&[index, QUEUE.into()]), &[]));
        let [descriptors, available, used] = self.places().map(|at| at + USER);
        let mut body = words(&[index, 0]);
        body.extend(longs(&[descriptors, used, available, 0]));
        assert!(client.tell(code::SET_VRING_ADDR, &body, &[]));
        assert!(client.tell(code::SET_VRING_BASE, &words(&[index, base.into()]), &[]));
        let body = longs(&[index.into()]);
        assert!(client.tell(code::SET_VRING_CALL, &body, &[self.call.as_fd()]));
        assert!(client.tell(code::SET_VRING_ERR, &body, &[self.error.as_fd()]));
        assert!(client.tell(code::SET_VRING_KICK, &body, &[self.kick.as_fd()]));
        assert!(client.tell(code::SET_VRING_ENABLE, &words(&[index, 1]), &[]));
    }

    /// Writes one descriptor. Flags: 1 goes on, 2 is written to, 4 is a table.
    pub(crate) fn descriptor(&self, guest: &Guest, index: u16, at: u64, len: u32, flags: u16, next: u16) {
        write_descriptor(guest, self.places()[0] + 16 * u64::from(index), at, len, flags, next);
    }

    /// Writes a chain and gives its head.
    pub(crate) fn chain(&mut self, guest: &Guest, pieces: &[Piece]) -> u16 {
        let head = self.next_descriptor;
        for (count, piece) in pieces.iter().enumerate() {
            let index = self.next_descriptor;
            self.next_descriptor = (index + 1) % QUEUE;
            let last = count + 1 == pieces.len();
            let flags = u16::from(!last) | if piece.writable { 2 } else { 0 };
            self.descriptor(guest, index, piece.at, piece.len, flags, self.next_descriptor);
        }
        head
    }

    /// Writes a chain in a table of its own at `table`, and gives the head of the one descriptor that leads there.
    pub(crate) fn indirect(&mut self, guest: &Guest, table: u64, pieces: &[Piece]) -> u16 {
        for (count, piece) in pieces.iter().enumerate() {
            let last = count + 1 == pieces.len();
            let flags = u16::from(!last) | if piece.writable { 2 } else { 0 };
            let at = table + 16 * count as u64;
            write_descriptor(guest, at, piece.at, piece.len, flags, count as u16 + 1);
        }
        let head = self.next_descriptor;
        self.next_descriptor = (head + 1) % QUEUE;
        self.descriptor(guest, head, table, 16 * pieces.len() as u32, 4, 0);
        head
    }

    /// Offers a chain, without a word.
    pub(crate) fn offer(&mut self, guest: &Guest, head: u16) {
        let [_, available, _] = self.places();
        guest.set_word(available + 4 + 2 * u64::from(self.available % QUEUE), head);
        self.available = self.available.wrapping_add(1);
        if self.event_idx {
            // Wants to hear of the next answer.
            guest.set_word(available + 4 + 2 * u64::from(QUEUE), self.used);
        }
        guest.set_word(available + 2, self.available);
    }

    pub(crate) fn kick(&self) {
        rustix::io::write(&self.kick, &1u64.to_le_bytes()).unwrap();
    }

    /// How far the device has answered.
    pub(crate) fn published(&self, guest: &Guest) -> u16 {
        guest.word(self.places()[2] + 2)
    }

    /// Waits for an answer, by the notification, and gives head and length.
    pub(crate) fn answer(&mut self, guest: &Guest) -> (u32, u32) {
        while self.published(guest) == self.used {
            assert!(rings(&self.call, LIMIT), "nobody answers");
        }
        let at = self.places()[2] + 4 + 8 * u64::from(self.used % QUEUE);
        self.used = self.used.wrapping_add(1);
        if self.event_idx {
            guest.set_word(self.places()[1] + 4 + 2 * u64::from(QUEUE), self.used);
        }
        let entry = guest.read(at, 8);
        let word = |at: usize| u32::from_le_bytes(entry[at..at + 4].try_into().unwrap());
        (word(0), word(4))
    }

    /// Does one request with data that are read by the device, and room for what it writes: gives status and what was written.
    pub(crate) fn request(
        &mut self,
        guest: &Guest,
        kind: u32,
        sector: u64,
        data: &[u8],
        room: u32,
    ) -> (u8, Vec<u8>) {
        let pieces = request_pieces(guest, kind, sector, data, room);
        let head = self.chain(guest, &pieces);
        self.offer(guest, head);
        self.kick();
        let (answered, len) = self.answer(guest);
        assert_eq!((answered, len), (head.into(), room + 1));
        (guest.read(STATUS, 1)[0], guest.read(ROOM, room as usize))
    }
}

/// Where a request's parts are put that is done alone.
pub(crate) const HEADER: u64 = 1 << 20;
pub(crate) const DATA: u64 = 2 << 20;
pub(crate) const ROOM: u64 = REGION - (1 << 20);
pub(crate) const STATUS: u64 = HEADER + 64;

/// Puts a request into memory and gives its chain.
pub(crate) fn request_pieces(guest: &Guest, kind: u32, sector: u64, data: &[u8], room: u32) -> Vec<Piece> {
    let mut header = words(&[kind, 0]);
    header.extend(sector.to_le_bytes());
    guest.write(HEADER, &header);
    guest.write(DATA, data);
    guest.write(STATUS, &[0xee]);
    let mut pieces = vec![Piece { at: HEADER, len: 16, writable: false }];
    if !data.is_empty() {
        pieces.push(Piece { at: DATA, len: data.len() as u32, writable: false });
    }
    if room > 0 {
        pieces.push(Piece { at: ROOM, len: room, writable: true });
    }
    pieces.push(Piece { at: STATUS, len: 1, writable: true });
    pieces
}

pub(crate) fn write_descriptor(guest: &Guest, place: u64, at: u64, len: u32, flags: u16, next: u16) {
    let mut bytes = at.to_le_bytes().to_vec();
    bytes.extend(len.to_le_bytes());
    bytes.extend(flags.to_le_bytes());
    bytes.extend(next.to_le_bytes());
    guest.write(place, &bytes);
}

/// Waits for an eventfd, and empties it.
pub(crate) fn rings(fd: &OwnedFd, limit: Duration) -> bool {
    let mut asked = [PollFd::new(fd, PollFlags::IN)];
    let limit = Timespec::try_from(limit).unwrap();
    if poll(&mut asked, Some(&limit)).unwrap() == 0 {
        return false;
    }
    rustix::io::read(fd, &mut [0; 8]).is_ok()
}
