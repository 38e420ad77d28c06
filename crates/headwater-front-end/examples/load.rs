//! Puts a vhost-user-blk back end under load, as a Linux guest's driver would: one queue with event-idx and indirect tables, interrupts off while
//! answers are taken. Prints one line of JSON.
//!
//!     load SOCKET WORK BLOCK DEPTH SECONDS
//!
//! WORK is `read` or `write` (from the start of the disk on, and again), `randread` or `randwrite` (anywhere), or `touch`: one block is written at
//! the start of every 64 KiB, once. BLOCK is a number of bytes, DEPTH that of requests under way.

#![expect(clippy::disallowed_methods, reason = "what it measures is real time")]

use std::collections::VecDeque;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use headwater_front_end::protocol::{code, feature, words};
use headwater_front_end::{Client, Guest, Piece, QUEUE, REGION, Ring};

/// The longest block in bytes, and the most requests under way: their data fit into the guest's second half.
const MAX_BLOCK: u64 = 128 << 10;
const MAX_DEPTH: u16 = 32;

/// Protocol features: replies and configuration are needed, a record of what is in flight is kept where that is offered, as QEMU does.
const PROTOCOL: u64 = 1 << 3 | 1 << 9;
const INFLIGHT: u64 = 1 << 12;

/// How far the blocks of `touch` are apart.
const STRIDE: u64 = 64 << 10;

/// Where a slot's header, outcome and table are, each slot at its own multiple of this.
const SLOTS: u64 = 1 << 20;
const SLOT: u64 = 256;
const OUTCOME: u64 = 32;
const TABLE: u64 = 64;

/// What is to be done.
struct Load {
    block: u64,
    blocks: u64,
    work: Work,
    done: u64,
    random: u64,
}

#[derive(Clone, Copy, PartialEq)]
enum Work {
    Sequential,
    Random,
    Touch,
}

impl Load {
    /// The offset of the next request; none if there is nothing left to do.
    fn next(&mut self) -> Option<u64> {
        let at = self.done;
        self.done += 1;
        match self.work {
            Work::Sequential => Some(at % self.blocks * self.block),
            Work::Random => {
                // xorshift64: any order will do, as long as both programs get the same.
                self.random ^= self.random << 13;
                self.random ^= self.random >> 7;
                self.random ^= self.random << 17;
                Some(self.random % self.blocks * self.block)
            }
            Work::Touch => Some(at * STRIDE).filter(|offset| *offset < self.blocks * self.block),
        }
    }
}

/// Keeps a record of the requests in flight.
fn track(client: &Client) -> OwnedFd {
    let mut body = vec![0; 16];
    body.extend(1u16.to_le_bytes());
    body.extend(QUEUE.to_le_bytes());
    body.extend([0; 4]);
    let mut reply = client.ask(code::GET_INFLIGHT_FD, &body);
    let fd = reply.fds.remove(0);
    assert!(client.tell(code::SET_INFLIGHT_FD, &reply.body, &[fd.as_fd()]), "what is kept was made there");
    fd
}

fn main() {
    let words_of = std::env::args().skip(1).collect::<Vec<_>>();
    let [socket, work, block, depth, seconds] = &words_of[..] else {
        eprintln!("usage: load SOCKET read|write|randread|randwrite|touch BLOCK DEPTH SECONDS");
        std::process::exit(2);
    };
    let (block, depth) = (block.parse::<u64>().expect("bytes"), depth.parse::<u16>().expect("a number"));
    let limit = Duration::from_secs_f64(seconds.parse().expect("seconds"));
    assert!(
        block <= MAX_BLOCK && block % 512 == 0 && (1..=MAX_DEPTH).contains(&depth),
        "more than there is room for"
    );
    let reads = work.ends_with("read");
    let work = match &work[..] {
        "read" | "write" => Work::Sequential,
        "randread" | "randwrite" => Work::Random,
        "touch" => Work::Touch,
        other => panic!("{other:?} is no work"),
    };

    let guest = Guest::new();
    let features = feature::FLUSH | feature::INDIRECT | feature::EVENT_IDX;
    let client = Client::connect(&PathBuf::from(socket));
    client.ask(code::GET_FEATURES, &[]);
    let tracks = client.ask(code::GET_PROTOCOL_FEATURES, &[]).number() & INFLIGHT;
    client.negotiate_some(features | feature::PROTOCOL | feature::VERSION_1, PROTOCOL | tracks);
    let _record = (tracks != 0).then(|| track(&client));
    client.share(&guest);
    let mut load = Load { block, blocks: client.capacity() * 512 / block, work, done: 0, random: 1 };
    let mut ring = Ring::start(&client, &guest, 0, features);
    for slot in 0..depth {
        let (at, data) = (SLOTS + u64::from(slot) * SLOT, REGION + u64::from(slot) * MAX_BLOCK);
        guest.write(at, &words(&[u32::from(!reads), 0]));
        guest.write(data, &vec![slot as u8 + 1; block as usize]);
        let part = |at, len, writable| Piece { at, len, writable };
        let pieces = [part(at, 16, false), part(data, block as u32, reads), part(at + OUTCOME, 1, true)];
        assert_eq!(ring.indirect(&guest, at + TABLE, &pieces), slot);
    }

    let mut free: VecDeque<u16> = (0..depth).collect();
    let (mut answered, mut running) = (0u64, 0u16);
    let since = Instant::now();
    loop {
        let before = ring.available;
        if since.elapsed() < limit {
            while let Some(slot) = free.front().copied()
                && let Some(offset) = load.next()
            {
                free.pop_front();
                let at = SLOTS + u64::from(slot) * SLOT;
                guest.write(at + 8, &(offset / 512).to_le_bytes());
                guest.write(at + OUTCOME, &[0xee]);
                ring.add(&guest, slot);
                running += 1;
            }
        }
        if running == 0 {
            break;
        }
        if ring.available != before {
            ring.kick_if_wanted(&guest, before);
        }
        ring.listen(&guest);
        ring.wait(&guest);
        while let Some((slot, _)) = ring.take(&guest) {
            let at = SLOTS + u64::from(slot) * SLOT;
            assert_eq!(guest.read(at + OUTCOME, 1), [0], "the request has failed");
            free.push_back(slot as u16);
            answered += 1;
            running -= 1;
        }
    }
    println!("{{\"requests\":{answered},\"seconds\":{}}}", since.elapsed().as_secs_f64());
}
