//! A vhost-user-blk server whose front end says, and whose guest writes, what they like.
//!
//! Input: a byte that chooses the disk and the features, a byte with the queues' size, and whether there is an honest set-up before what follows;
//! then steps of messages and of the guest: bytes for the socket, with or without descriptors of many kinds; descriptors, tables, rings and requests in
//! the guest's memory; kicks.
//!
//! Asserted: no task panics; when the front end has closed its side, the server closes, without any timer; a disk that is read-only for the
//! guest doesn't change, and none changes its size; nothing is written outside the guest's memory; another export is served in the meantime, and
//! the next client of the same one afterwards.

use super::front_end::*;
use super::runtime;
use crate::Target;
use arbitrary::{Result, Unstructured};
use headwater_block::memory::MemoryNode;
use headwater_block::{Disk, DiskOptions, Edge, Node, TokioClock};
use headwater_export::Listen;
use headwater_export::vhost::{BlkExport, BlkOptions, LogicalBlock, VhostUserBlk};
use rustix::event::{EventfdFlags, eventfd};
use std::cell::Cell;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::rc::Rc;
use std::sync::Once;
use std::time::Duration;
use tokio::task::yield_now;
use tokio::time::timeout;

/// See the module.
pub const TARGET: Target = Target { name: "vhost_user", run, seeds, max_len: 2048 };

/// How long everything may take. Nothing waits for anything but a front end that has closed its side.
const SOON: Duration = Duration::from_secs(4);

/// The disk's size in bytes.
const SIZE: u64 = 256 << 10;

/// The most steps.
const MAX_STEPS: usize = 200;

/// How often the server may work before it is taken for idle.
const TURNS: usize = 24;

/// In the first byte of an input.
mod how {
    pub(super) const RAW: u8 = 1;
    pub(super) const READ_ONLY: u8 = 2;
    pub(super) const WRITETHROUGH: u8 = 4;
    pub(super) const EVENT_IDX: u8 = 8;
    pub(super) const ONE_QUEUE: u8 = 16;
    pub(super) const LARGE_BLOCKS: u8 = 32;
    pub(super) const CONFIG_WCE: u8 = 64;
    pub(super) const NEIGHBOUR: u8 = 128;
}

/// What a step does.
mod step {
    pub(super) const REQUEST: u8 = 0;
    pub(super) const OFFER: u8 = 1;
    pub(super) const KICK: u8 = 2;
    pub(super) const DESCRIPTOR: u8 = 3;
    pub(super) const BYTES: u8 = 4;
    pub(super) const AVAILABLE: u8 = 5;
    pub(super) const MESSAGE: u8 = 6;
    pub(super) const RAW: u8 = 7;
    pub(super) const SPARE: u8 = 8;
    pub(super) const ATTACH: u8 = 9;
    pub(super) const WAIT: u8 = 10;
    pub(super) const COUNT: u8 = 11;
}

thread_local! {
    /// A task panicked, which the runtime keeps to itself.
    static PANICKED: Cell<bool> = const { Cell::new(false) };
}

fn run(data: &[u8]) {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let usual = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            PANICKED.set(true);
            usual(info);
        }));
    });
    let &[how, size, ref script @ ..] = data else { return };
    runtime::run(async {
        let done = timeout(SOON, serve(how, size, script)).await;
        assert!(done.is_ok(), "the server hangs although its client has closed");
    });
    assert!(!PANICKED.get(), "a task of the server panicked");
}

/// What the disk holds from `sector` on, before anybody changes it.
fn contents(mark: u8) -> Vec<u8> {
    (0..SIZE).map(|at| (at / 512) as u8 ^ mark).collect()
}

fn export(name: &[u8], node: &Rc<MemoryNode>, options: BlkOptions) -> VhostUserBlk {
    let disk = Disk::new(node.clone(), Rc::new(TokioClock::default()), DiskOptions::default());
    let export = BlkExport { id: "disk".to_owned(), edge: Edge::new(disk), options };
    let listen = Listen::Abstract { name: name.to_vec(), tight: true };
    VhostUserBlk::start(listen, export).expect("nobody else has this name")
}

async fn serve(how: u8, size: u8, script: &[u8]) {
    let chosen = |bit: u8| how & bit != 0;
    let node = MemoryNode::new("disk", contents(0));
    let block = if chosen(how::LARGE_BLOCKS) { 4096 } else { 512 };
    let options = BlkOptions {
        writable: !chosen(how::READ_ONLY),
        writethrough: chosen(how::WRITETHROUGH),
        queues: QUEUES.into(),
        logical_block: LogicalBlock::new(block).expect("a power of two"),
    };
    let name = format!("headwater-fuzz-vhost-{}", std::process::id()).into_bytes();
    let served = export(&name, &node, options);

    let mut front_end = Hostile::connect(&name, size);
    if !chosen(how::RAW) {
        let mut features = feature::PROTOCOL | feature::VERSION_1 | feature::FLUSH | feature::INDIRECT;
        features |= if chosen(how::EVENT_IDX) { feature::EVENT_IDX } else { 0 };
        if chosen(how::CONFIG_WCE) && !chosen(how::WRITETHROUGH) {
            features |= feature::CONFIG_WCE;
        }
        let count = if chosen(how::ONE_QUEUE) { 1 } else { QUEUES.into() };
        let Hostile { socket, memory, rings, .. } = &front_end;
        assert!(socket.set_up(features, memory, &rings[..count]).await, "an honest set-up is refused");
    }
    // The input ends where it ends.
    let _ = front_end.play(&mut Unstructured::new(script)).await;
    if chosen(how::NEIGHBOUR) {
        let neighbour = [&name[..], b"-neighbour"].concat();
        let node = MemoryNode::new("neighbour", contents(0xff));
        let served = export(&neighbour, &node, BlkOptions::default());
        assert_eq!(read_well(&neighbour, 3, 512).await, &contents(0xff)[3 * 512..4 * 512]);
        served.stop().await;
    }
    let memory = front_end.leave().await;
    assert_eq!(read_well(&name, 8, 4096).await, &node.contents()[4096..8192]);
    served.stop().await;
    memory.check_guards();
    assert_eq!(node.size(), SIZE);
    if chosen(how::READ_ONLY) {
        assert!(node.contents() == contents(0), "a read-only disk changed");
    }
}

/// The front end that does what the input says.
struct Hostile {
    socket: FrontEnd,
    memory: Memory,
    rings: Vec<Ring>,
    /// Memory that messages may hand over.
    spare: File,
    others: Vec<OwnedFd>,
}

impl Hostile {
    fn connect(name: &[u8], size: u8) -> Self {
        let (near, far) = UnixStream::pair().expect("two sockets");
        let (_, alone) = UnixStream::pair().expect("two sockets");
        let endless = eventfd(1 << 31, EventfdFlags::CLOEXEC | EventfdFlags::SEMAPHORE);
        let null = File::open("/dev/null").expect("it is there");
        let others =
            vec![event(), endless.expect("an eventfd"), near.into(), far.into(), alone.into(), null.into()];
        Self {
            socket: FrontEnd::connect(name),
            memory: Memory::new(),
            rings: (0..QUEUES).map(|index| Ring::new(index, 1 << (size % 9))).collect(),
            spare: shared(MEMORY),
            others,
        }
    }

    /// Does what the input says, until it ends or the server has had enough.
    async fn play(&mut self, input: &mut Unstructured<'_>) -> Result<()> {
        for _ in 0..MAX_STEPS {
            if input.is_empty() || self.socket.has_ended() {
                break;
            }
            if !self.step(input).await? {
                break;
            }
        }
        self.rings.iter().for_each(Ring::kick);
        turns().await;
        Ok(())
    }

    /// False if the server has closed.
    async fn step(&mut self, input: &mut Unstructured<'_>) -> Result<bool> {
        let what = input.arbitrary::<u8>()? % step::COUNT;
        let which = if what < step::BYTES || what == step::AVAILABLE || what == step::ATTACH {
            usize::from(input.arbitrary::<u8>()? % QUEUES)
        } else {
            0
        };
        let (ring, memory) = (&mut self.rings[which], &self.memory);
        match what {
            step::REQUEST => request(ring, memory, input.arbitrary()?),
            step::OFFER => ring.offer(memory, input.arbitrary::<u8>()?.into()),
            step::KICK => {
                ring.kick();
                turns().await;
            }
            step::DESCRIPTOR => {
                let (index, at, len, flags, next): (u8, u16, u16, u8, u8) = input.arbitrary()?;
                let bytes = descriptor(place(at), len.into(), flags.into(), next.into());
                memory.write(ring.places()[0] + 16 * u64::from(index), &bytes);
            }
            step::BYTES => {
                let at = input.arbitrary()?;
                memory.write(place(at), bytes(input)?);
            }
            step::AVAILABLE => ring.say_available(memory, input.arbitrary()?),
            step::MESSAGE => {
                let (code, flags, fds): (u8, u8, [u8; 2]) = input.arbitrary()?;
                let said = message(code.into(), u32::from(flags) ^ 1, bytes(input)?);
                return Ok(self.socket.send(&said, &self.descriptors(fds)).await);
            }
            step::RAW => {
                let fds = input.arbitrary()?;
                return Ok(self.socket.send(bytes(input)?, &self.descriptors(fds)).await);
            }
            step::SPARE => {
                let at = input.arbitrary::<u16>()?;
                self.spare.write_all_at(bytes(input)?, at.into()).expect("it is in the file");
            }
            step::ATTACH => {
                for (bytes, fds) in ring.attaching(input.arbitrary()?) {
                    if !self.socket.send(&bytes, &fds).await {
                        return Ok(false);
                    }
                }
            }
            _ => turns().await,
        }
        Ok(true)
    }

    /// As many descriptors as the first byte says, of kinds that the second says.
    fn descriptors(&self, [count, kind]: [u8; 2]) -> Vec<BorrowedFd<'_>> {
        let all: Vec<_> =
            std::iter::once(self.spare.as_fd()).chain(self.others.iter().map(AsFd::as_fd)).collect();
        // The same ones, or all kinds in turn.
        let stride = usize::from(kind >> 7);
        (0..usize::from(count % 9))
            .map(|i| all[(usize::from(kind & 0x7f) + i * stride) % all.len()])
            .collect()
    }

    /// Leaves, and says what was the guest's memory.
    async fn leave(self) -> Memory {
        self.socket.close().await;
        self.memory
    }
}

/// Lets the server work.
async fn turns() {
    for _ in 0..TURNS {
        yield_now().await;
    }
}

/// A place in the guest's memory.
fn place(at: u16) -> u64 {
    u64::from(at) << 4
}

/// As many bytes as a byte says, or what is left.
fn bytes<'a>(input: &mut Unstructured<'a>) -> Result<&'a [u8]> {
    let len = usize::from(input.arbitrary::<u8>()?).min(input.len());
    input.bytes(len)
}

/// A request without a mistake, but for its numbers: what, where, how much, in how many parts and whether in a table of its own.
type Numbers = (u8, u16, u16, u8);

/// Writes a request's chain and offers it.
fn request(ring: &mut Ring, memory: &Memory, (kind, sector, len, how): Numbers) {
    let (header, outcome, table, data) = (FREE, FREE + 32, FREE + 0x1000, FREE + 0x2000);
    memory.write(header, &[words(&[kind.into(), 0]), longs(&[sector.into()])].concat());
    let (parts, in_table) = (u32::from(how % 8), how & 8 != 0);
    // What a guest has for the device, or room that it has.
    let writable = if matches!(kind, 0 | 8) { 2 } else { 0 };
    let mut chain = descriptor(header, 16, 1, 1);
    for part in 0..parts {
        let at = data + u64::from(part) * u64::from(len);
        chain.extend(descriptor(at, len.into(), 1 | writable, part as u16 + 2));
    }
    chain.extend(descriptor(outcome, 1, 2, 0));
    let descriptors = ring.places()[0];
    if in_table {
        memory.write(table, &chain);
        memory.write(descriptors, &descriptor(table, chain.len() as u32, 4, 0));
    } else {
        memory.write(descriptors, &chain);
    }
    ring.offer(memory, 0);
}

fn seeds() -> Vec<Vec<u8>> {
    let ask = |queue: u8, kind: u8, sector: u16, len: u16, how: u8| {
        [&[step::REQUEST, queue, kind][..], &sector.to_le_bytes(), &len.to_le_bytes(), &[how]].concat()
    };
    let kick = |queue: u8| vec![step::KICK, queue];
    let say = |code: u32, body: &[u8], fds: [u8; 2]| {
        [&[step::MESSAGE, code as u8, 0, fds[0], fds[1], body.len() as u8][..], body].concat()
    };
    let write = |at: u64, bytes: &[u8]| {
        [&[step::BYTES][..], &((at >> 4) as u16).to_le_bytes(), &[bytes.len() as u8], bytes].concat()
    };
    let link = |index: u8, at: u64, len: u16, flags: u8, next: u8| {
        let (at, len) = (((at >> 4) as u16).to_le_bytes(), len.to_le_bytes());
        [&[step::DESCRIPTOR, 0, index][..], &at, &len, &[flags, next]].concat()
    };
    let range = [longs(&[8]), words(&[16, 1])].concat();
    // A write, a read, a flush, the name, to discard and to zero, what isn't offered, past the end.
    let requests = [
        [ask(0, 1, 0, 512, 1), kick(0), ask(0, 0, 0, 4096, 3), kick(0)].concat(),
        [ask(1, 4, 0, 0, 0), kick(1), ask(1, 8, 0, 20, 1), kick(1)].concat(),
        [write(FREE + 0x2000, &range), ask(0, 11, 0, 16, 1), kick(0), ask(0, 13, 0, 16, 1), kick(0)].concat(),
        [ask(0, 77, 0, 0, 0), kick(0), ask(0, 1, 511, 1024, 1 | 8), kick(0)].concat(),
    ]
    .concat();
    let record = [words(&[0, 0]), vec![1, 0, 16, 0, 0, 0, 0, 0], vec![1; 64]].concat();
    let told = [longs(&[4096, 0]), vec![1, 0, 16, 0, 0, 0, 0, 0]].concat();
    let region = [longs(&[0]), longs(&[MEMORY, 64 << 10, USER << 1, 0])].concat();
    let table = [words(&[1, 0]), longs(&[0, MEMORY, USER, 0])].concat();
    let attach = |queue: u8, base: u16| [&[step::ATTACH, queue][..], &base.to_le_bytes()].concat();
    let wait = vec![step::WAIT];
    vec![
        [vec![0, 4], requests.clone()].concat(),
        [vec![how::READ_ONLY | how::NEIGHBOUR | how::EVENT_IDX, 4], requests.clone()].concat(),
        [vec![how::LARGE_BLOCKS | how::CONFIG_WCE | how::ONE_QUEUE, 8], requests.clone()].concat(),
        [vec![how::WRITETHROUGH | how::EVENT_IDX, 2], requests.clone(), wait.clone(), requests].concat(),
        // A loop, a table in a table, heads twice and past the end, more than there is room for.
        [vec![0, 4], link(0, FREE, 16, 1, 1), link(1, FREE, 16, 1, 0), vec![step::OFFER, 0, 0], kick(0)]
            .concat(),
        [
            vec![how::NEIGHBOUR, 4],
            write(FREE, &[descriptor(FREE, 32, 4, 0), descriptor(FREE, 8, 3, 1)].concat()),
            link(0, FREE, 32, 4, 0),
            vec![step::OFFER, 0, 0, step::OFFER, 0, 0, step::OFFER, 0, 200],
            kick(0),
        ]
        .concat(),
        [vec![0, 4], ask(0, 0, 0, 512, 1), vec![step::AVAILABLE, 0, 0xff, 0xff], kick(0)].concat(),
        [
            vec![how::RAW, 4],
            say(code::GET_FEATURES, &[], [0; 2]),
            say(code::GET_PROTOCOL_FEATURES, &[], [0; 2]),
            say(code::SET_PROTOCOL_FEATURES, &longs(&[1 | 1 << 3 | 1 << 9]), [0; 2]),
            say(code::GET_QUEUE_NUM, &[], [0; 2]),
            say(code::SET_FEATURES, &longs(&[feature::PROTOCOL | feature::VERSION_1]), [0; 2]),
            say(code::SET_MEM_TABLE, &table, [1, 0]),
            attach(0, 0),
            kick(0),
        ]
        .concat(),
        [
            vec![how::CONFIG_WCE, 4],
            say(code::GET_CONFIG, &[words(&[0, 60, 0]), vec![0; 60]].concat(), [0; 2]),
            say(code::SET_CONFIG, &[words(&[32, 1, 0]), vec![0]].concat(), [0; 2]),
            say(code::SET_BACKEND_REQ_FD, &[], [1, 3]),
            say(code::GET_VRING_BASE, &words(&[0, 0]), [0; 2]),
            attach(0, 3),
            ask(0, 1, 0, 512, 1),
            kick(0),
        ]
        .concat(),
        [
            vec![how::EVENT_IDX, 4],
            [&[step::SPARE, 0, 0, record.len() as u8][..], &record].concat(),
            ask(0, 0, 0, 512, 1),
            say(code::SET_INFLIGHT_FD, &told, [1, 0]),
            attach(0, 0),
            kick(0),
            say(code::GET_INFLIGHT_FD, &[longs(&[0, 0]), vec![2, 0, 16, 0, 0, 0, 0, 0]].concat(), [0; 2]),
            wait,
        ]
        .concat(),
        [
            vec![0, 4],
            say(code::REM_MEM_REG, &region, [0; 2]),
            say(code::ADD_MEM_REG, &region, [1, 0]),
            kick(0),
        ]
        .concat(),
        [
            vec![0, 4],
            ask(0, 0, 0, 512, 1),
            say(code::SET_VRING_CALL, &longs(&[0]), [1, 5]),
            say(code::SET_VRING_KICK, &longs(&[0]), [1, 2]),
            say(code::SET_VRING_ERR, &longs(&[0x101]), [0; 2]),
        ]
        .concat(),
        [&[how::RAW, 0, step::RAW, 8, 0x80, 18][..], b"GET / HTTP/1.1\r\n\r\n"].concat(),
    ]
}
