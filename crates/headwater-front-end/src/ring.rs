//! A virtqueue, as the guest's driver has it.

use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::protocol::{code, descriptor, event, feature, longs, words};
use crate::{Client, Guest, LIMIT, REGION, USER};

/// How many descriptors a queue has.
pub const QUEUE: u16 = 64;

/// A part of a chain.
#[derive(Debug, Clone, Copy)]
pub struct Piece {
    /// Where its bytes are in the guest's memory.
    pub at: u64,
    /// How many.
    pub len: u32,
    /// Whether the device writes them; else it reads them.
    pub writable: bool,
}

/// A split virtqueue, as the driver has it.
pub struct Ring {
    /// Which queue it is.
    pub index: u16,
    /// Tells the device that something is offered.
    pub kick: OwnedFd,
    /// Tells the driver that something is answered.
    pub call: OwnedFd,
    /// Tells the driver that the queue is broken.
    pub error: OwnedFd,
    event_idx: bool,
    /// How much was offered so far.
    pub available: u16,
    /// How many answers were taken so far.
    pub used: u16,
    next_descriptor: u16,
}

impl Ring {
    /// A queue at rest.
    pub fn new(index: u16, features: u64) -> Self {
        let event_idx = features & feature::EVENT_IDX != 0;
        let (kick, call, error) = (event(), event(), event());
        Self { index, kick, call, error, event_idx, available: 0, used: 0, next_descriptor: 0 }
    }

    /// Where its descriptors, its available and its used ring are.
    pub fn places(&self) -> [u64; 3] {
        let start = u64::from(self.index) << 16;
        [start, start + 0x2000, start + 0x3000]
    }

    /// Sets a queue up and enables it.
    pub fn start(client: &Client, guest: &Guest, index: u16, features: u64) -> Self {
        let ring = Self::new(index, features);
        guest.write(ring.places()[0], &[0; 0x4000]);
        ring.attach(client, 0);
        ring
    }

    /// Hands a queue over that may have been used before.
    pub fn attach(&self, client: &Client, base: u16) {
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
    pub fn descriptor(&self, guest: &Guest, index: u16, at: u64, len: u32, flags: u16, next: u16) {
        guest.write(self.places()[0] + 16 * u64::from(index), &descriptor(at, len, flags, next));
    }

    /// Writes a chain and gives its head.
    pub fn chain(&mut self, guest: &Guest, pieces: &[Piece]) -> u16 {
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
    pub fn indirect(&mut self, guest: &Guest, table: u64, pieces: &[Piece]) -> u16 {
        for (count, piece) in pieces.iter().enumerate() {
            let last = count + 1 == pieces.len();
            let flags = u16::from(!last) | if piece.writable { 2 } else { 0 };
            let at = table + 16 * count as u64;
            guest.write(at, &descriptor(piece.at, piece.len, flags, count as u16 + 1));
        }
        let head = self.next_descriptor;
        self.next_descriptor = (head + 1) % QUEUE;
        self.descriptor(guest, head, table, 16 * pieces.len() as u32, 4, 0);
        head
    }

    /// Offers a chain, and wants to hear of the next answer.
    pub fn offer(&mut self, guest: &Guest, head: u16) {
        if self.event_idx {
            self.listen(guest);
        }
        self.add(guest, head);
    }

    /// Offers a chain, without a word.
    pub fn add(&mut self, guest: &Guest, head: u16) {
        let available = self.places()[1];
        guest.set_word(available + 4 + 2 * u64::from(self.available % QUEUE), head);
        self.available = self.available.wrapping_add(1);
        guest.set_word(available + 2, self.available);
    }

    /// Tells the device that something is offered.
    pub fn kick(&self) {
        rustix::io::write(&self.kick, &1u64.to_le_bytes()).unwrap();
    }

    /// Tells the device what was offered since there had been `before`, if it wants to hear of that.
    pub fn kick_if_wanted(&self, guest: &Guest, before: u16) {
        let used = self.places()[2];
        let wanted = if self.event_idx {
            let event = guest.word(used + 4 + 8 * u64::from(QUEUE));
            self.available.wrapping_sub(event).wrapping_sub(1) < self.available.wrapping_sub(before)
        } else {
            guest.word(used) & 1 == 0
        };
        if wanted {
            self.kick();
        }
    }

    /// How far the device has answered.
    pub fn published(&self, guest: &Guest) -> u16 {
        guest.word(self.places()[2] + 2)
    }

    /// Wants to hear of the next answer. There may be one already.
    pub fn listen(&self, guest: &Guest) {
        guest.set_word(self.places()[1] + 4 + 2 * u64::from(QUEUE), self.used);
    }

    /// Waits until there is an answer, by the notification.
    pub fn wait(&self, guest: &Guest) {
        while self.published(guest) == self.used {
            assert!(rings(&self.call, LIMIT), "nobody answers");
        }
    }

    /// Takes the next answer if there is one, and gives head and length.
    pub fn take(&mut self, guest: &Guest) -> Option<(u32, u32)> {
        if self.published(guest) == self.used {
            return None;
        }
        let at = self.places()[2] + 4 + 8 * u64::from(self.used % QUEUE);
        self.used = self.used.wrapping_add(1);
        let entry = guest.read(at, 8);
        let word = |at: usize| u32::from_le_bytes(entry[at..at + 4].try_into().unwrap());
        Some((word(0), word(4)))
    }

    /// Waits for an answer, by the notification, and gives head and length.
    pub fn answer(&mut self, guest: &Guest) -> (u32, u32) {
        self.wait(guest);
        let answer = self.take(guest).expect("there is one");
        if self.event_idx {
            self.listen(guest);
        }
        answer
    }

    /// Does one request with data that are read by the device, and room for what it writes: gives status and what was written.
    pub fn request(
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

/// Where the header of a request is put that is done alone.
pub const HEADER: u64 = 1 << 20;
/// Where its outcome comes.
pub const STATUS: u64 = HEADER + 64;
/// Where its data are put.
pub const DATA: u64 = 2 << 20;
/// Where the device puts data, across the border of the memory's regions if there are many.
pub const ROOM: u64 = REGION - (1 << 20);

/// Puts a request into memory and gives its chain.
pub fn request_pieces(guest: &Guest, kind: u32, sector: u64, data: &[u8], room: u32) -> Vec<Piece> {
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

/// Waits for an eventfd, and empties it.
pub fn rings(fd: &OwnedFd, limit: Duration) -> bool {
    let mut asked = [PollFd::new(fd, PollFlags::IN)];
    let limit = Timespec::try_from(limit).unwrap();
    if poll(&mut asked, Some(&limit)).unwrap() == 0 {
        return false;
    }
    rustix::io::read(fd, &mut [0; 8]).is_ok()
}
