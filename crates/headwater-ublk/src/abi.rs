//! What crosses the line to the driver, as `include/uapi/linux/ublk_cmd.h` has it: structures of this machine's byte order.

use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes};

/// The unit of sizes and places on a block device, in bytes.
pub const SECTOR: u64 = 512;

/// Where in the server's side of a device the bytes of requests begin.
const DATA: u64 = 0x8000_0000;

/// The number of a command that takes or gives `size` bytes, as ioctls are numbered; all go both ways or only out of the kernel.
const fn number(out_only: bool, command: u8, size: usize) -> u32 {
    let direction = if out_only { 2 } else { 3 };
    direction << 30 | (size as u32) << 16 | (b'u' as u32) << 8 | command as u32
}

pub(crate) const GET_DEVICE: u32 = number(true, 0x02, size_of::<ControlCommand>());
pub(crate) const ADD: u32 = number(false, 0x04, size_of::<ControlCommand>());
pub(crate) const DELETE: u32 = number(false, 0x05, size_of::<ControlCommand>());
pub(crate) const START: u32 = number(false, 0x06, size_of::<ControlCommand>());
pub(crate) const STOP: u32 = number(false, 0x07, size_of::<ControlCommand>());
pub(crate) const SET_PARAMETERS: u32 = number(false, 0x08, size_of::<ControlCommand>());
pub(crate) const GET_PARAMETERS: u32 = number(true, 0x09, size_of::<ControlCommand>());
pub(crate) const START_RECOVERY: u32 = number(false, 0x10, size_of::<ControlCommand>());
pub(crate) const END_RECOVERY: u32 = number(false, 0x11, size_of::<ControlCommand>());

pub(crate) const FETCH: u32 = number(false, 0x20, size_of::<QueueCommand>());
pub(crate) const ANSWER_AND_FETCH: u32 = number(false, 0x21, size_of::<QueueCommand>());

/// What a fetch comes back with when the device goes.
pub(crate) const GONE: i32 = -libc::ENODEV;

/// Features of a device.
const RECOVERY: u64 = 1 << 3;
const REISSUE: u64 = 1 << 4;
pub(crate) const IOCTL_NUMBERS: u64 = 1 << 6;
pub(crate) const USER_COPY: u64 = 1 << 7;

/// The kinds of parameters that are said.
const BASIC: u32 = 1 << 0;
const DISCARD: u32 = 1 << 1;

/// Attributes among the basic ones.
const READ_ONLY: u32 = 1 << 0;
const VOLATILE_CACHE: u32 = 1 << 2;
const FUA: u32 = 1 << 3;

/// Flags of a request.
const FLAG_FUA: u32 = 1 << 13;
const FLAG_NO_UNMAP: u32 = 1 << 15;

/// A command about a device.
#[derive(FromZeros, IntoBytes, Immutable)]
#[repr(C)]
pub(crate) struct ControlCommand {
    /// Its number; `u32::MAX` is any.
    device: u32,
    queue: u16,
    /// The length and the place of the bytes that it takes or gives.
    len: u16,
    address: u64,
    number: u64,
    path_len: u16,
    padding: u16,
    reserved: u32,
}

impl ControlCommand {
    /// As it stands in the ring, whose room for it is larger.
    pub(crate) fn encode(device: u32, bytes: (u64, u16), number: u64) -> [u8; 80] {
        let (address, len) = bytes;
        // It is about no queue.
        let command =
            Self { device, queue: u16::MAX, len, address, number, path_len: 0, padding: 0, reserved: 0 };
        let mut message = [0; 80];
        message[..size_of::<Self>()].copy_from_slice(command.as_bytes());
        message
    }
}

/// A command about a request.
#[derive(IntoBytes, Immutable)]
#[repr(C)]
pub(crate) struct QueueCommand {
    queue: u16,
    tag: u16,
    result: i32,
    address: u64,
}

impl QueueCommand {
    /// About the request with a tag: how it ended, if it is answered.
    pub(crate) fn encode(tag: u16, result: i32) -> [u8; size_of::<Self>()] {
        zerocopy::transmute!(Self { queue: 0, tag, result, address: 0 })
    }
}

/// What is said and told of a device.
#[derive(Clone, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
pub(crate) struct DeviceInfo {
    queues: u16,
    depth: u16,
    state: u16,
    padding: u16,
    max_request: u32,
    pub(crate) id: u32,
    server: i32,
    padding_too: u32,
    flags: u64,
    server_flags: u64,
    owner: [u32; 2],
    reserved: [u64; 2],
}

/// A device's parameters, up to those for discarding.
#[derive(FromBytes, IntoBytes, Immutable)]
#[repr(C)]
pub(crate) struct Parameters {
    /// Their length; in a question, how much room there is for the answer.
    len: u32,
    kinds: u32,
    attributes: u32,
    /// Powers of two: logical block, physical block, best unit, smallest unit.
    shifts: [u8; 4],
    max_sectors: u32,
    chunk_sectors: u32,
    pub(crate) sectors: u64,
    boundary_mask: u64,
    discard_alignment: u32,
    discard_granularity: u32,
    max_discard_sectors: u32,
    max_zeroes_sectors: u32,
    max_discard_segments: u16,
    reserved: u16,
    /// The first of what follows, which is told only.
    next: u32,
}

impl Parameters {
    /// Room for an answer.
    pub(crate) fn room() -> Self {
        Self { len: size_of::<Self>() as u32, ..Self::new_zeroed() }
    }

    pub(crate) fn is_read_only(&self) -> bool {
        self.attributes & READ_ONLY != 0
    }
}

/// What the driver says of a request.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct Descriptor {
    operation_and_flags: u32,
    sectors: u32,
    start: u64,
    address: u64,
}

/// Most requests that a device has at once.
const DEPTH: std::ops::RangeInclusive<u16> = 1..=4096;

/// What the driver keeps of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Device {
    /// Its number: it is `/dev/ublkbN`, and `/dev/ublkcN` to its server.
    pub id: u32,
    /// How many requests it has at once, 1 to 4096.
    pub depth: u16,
    /// The longest request in bytes, a multiple of the page size.
    pub max_request: u32,
    /// Whether it outlives its server: those who use it wait until another one takes it over, and never hear of the change.
    pub recoverable: bool,
    /// What the driver said of it last.
    pub state: State,
}

/// The state of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Nobody can use it: it hasn't been started, or its server is gone.
    Dead,
    /// It can be used.
    Live,
    /// Its server is gone, and it waits for another one.
    Waiting,
    /// Another one that this program doesn't know.
    Other(u16),
}

impl Device {
    /// As it is said when the device is added; without an id the driver chooses one. The state goes the other way only.
    pub(crate) fn encode(&self, id: Option<u32>) -> DeviceInfo {
        debug_assert!(DEPTH.contains(&self.depth));
        let recovery = if self.recoverable { RECOVERY | REISSUE } else { 0 };
        DeviceInfo {
            queues: 1,
            depth: self.depth,
            max_request: self.max_request,
            id: id.unwrap_or(u32::MAX),
            flags: IOCTL_NUMBERS | USER_COPY | recovery,
            ..DeviceInfo::new_zeroed()
        }
    }

    /// What the driver tells of a device. `None` if it isn't one that this crate serves: with one queue, and with bytes that are copied by the
    /// server.
    pub(crate) fn decode(told: &DeviceInfo) -> Option<Self> {
        let state = match told.state {
            0 => State::Dead,
            1 => State::Live,
            2 => State::Waiting,
            other => State::Other(other),
        };
        let device = Self {
            id: told.id,
            depth: told.depth,
            max_request: told.max_request,
            recoverable: told.flags & RECOVERY != 0,
            state,
        };
        let served = told.queues == 1 && told.flags & USER_COPY != 0 && DEPTH.contains(&told.depth);
        served.then_some(device)
    }
}

/// How a device looks to those who use it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Its size in sectors of 512 bytes.
    pub sectors: u64,
    /// Whether it is for reading only.
    pub read_only: bool,
    /// Whether what is answered may be lost until it is flushed. Then it is flushed, and what must be durable at once is marked.
    pub volatile_cache: bool,
    /// The unit of requests in bytes, a power of two from 512 to 4096.
    pub logical_block: u32,
    /// What is written without reading before, in bytes: a power of two, at least a logical block.
    pub physical_block: u32,
    /// The unit that suits it best, in bytes: a power of two, at least a physical block.
    pub preferred: u32,
    /// The longest range that is discarded or zeroed by one request, in sectors; 0 if none is.
    pub max_range: u32,
}

impl Shape {
    /// The parameters of a device whose longest request has `max_request` bytes.
    pub(crate) fn encode(&self, max_request: u32) -> Parameters {
        let mut attributes = 0;
        if self.read_only {
            attributes |= READ_ONLY;
        }
        if self.volatile_cache {
            attributes |= VOLATILE_CACHE | FUA;
        }
        let shift = |bytes: u32| bytes.trailing_zeros() as u8;
        Parameters {
            kinds: BASIC | DISCARD,
            attributes,
            shifts: [self.logical_block, self.physical_block, self.preferred, self.physical_block].map(shift),
            max_sectors: max_request / SECTOR as u32,
            sectors: self.sectors,
            discard_granularity: self.physical_block,
            max_discard_sectors: self.max_range,
            max_zeroes_sectors: self.max_range,
            max_discard_segments: u16::from(self.max_range > 0),
            ..Parameters::room()
        }
    }
}

/// What a request wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Bytes of the disk.
    Read,
    /// Bytes onto the disk.
    Write {
        /// They must be durable when it is answered.
        durable: bool,
    },
    /// What was answered before is to be durable.
    Flush,
    /// The range's contents don't matter any more.
    Discard,
    /// The range is to read as zeroes.
    WriteZeroes {
        /// Storage may be given back.
        unmap: bool,
        /// It must be durable when it is answered.
        durable: bool,
    },
    /// Another one, which this program doesn't know.
    Other(u8),
}

/// A request, as its descriptor has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// What it wants.
    pub operation: Operation,
    /// Where, in bytes from the start of the disk. Wraps if the driver says nonsense, which then lies outside of the disk.
    pub offset: u64,
    /// How many bytes.
    pub len: u64,
}

impl Request {
    pub(crate) fn decode(told: Descriptor) -> Self {
        let word = told.operation_and_flags;
        // The header counts the flags' places in the whole word.
        let durable = word & FLAG_FUA != 0;
        let operation = match word as u8 {
            0 => Operation::Read,
            1 => Operation::Write { durable },
            2 => Operation::Flush,
            3 => Operation::Discard,
            5 => Operation::WriteZeroes { unmap: word & FLAG_NO_UNMAP == 0, durable },
            other => Operation::Other(other),
        };
        let offset = told.start.wrapping_mul(SECTOR);
        Self { operation, offset, len: u64::from(told.sectors) * SECTOR }
    }
}

/// Where in the server's side of a device the byte `at` of the request with a tag is.
pub(crate) fn data_offset(tag: u16, at: u32) -> u64 {
    debug_assert!(at < 1 << 25);
    DATA + (u64::from(tag) << 25 | u64::from(at))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_have_the_numbers_of_the_header() {
        // As a C compiler gives them on x86 and ARM.
        assert_eq!(ADD, 0xc020_7504);
        assert_eq!(GET_DEVICE, 0x8020_7502);
        assert_eq!(ANSWER_AND_FETCH, 0xc010_7521);
    }

    #[test]
    fn structures_are_as_long_as_the_headers() {
        assert_eq!(size_of::<ControlCommand>(), 32);
        assert_eq!(size_of::<QueueCommand>(), 16);
        assert_eq!(size_of::<DeviceInfo>(), 64);
        assert_eq!(size_of::<Descriptor>(), 24);
        assert_eq!(std::mem::offset_of!(Parameters, next), 60);
    }

    #[test]
    fn a_device_is_told_as_it_was_said() {
        let said = Device { id: 7, depth: 64, max_request: 1 << 19, recoverable: true, state: State::Dead };
        let told = said.encode(Some(7));
        assert_eq!(Device::decode(&told), Some(said));
        let waiting = Device::decode(&DeviceInfo { state: 2, ..told.clone() });
        assert_eq!(waiting, Some(Device { state: State::Waiting, ..said }));
        assert_eq!(said.encode(None).id, u32::MAX);
        assert_eq!(Device::decode(&DeviceInfo { queues: 2, ..told.clone() }), None);
        let copied_by_the_kernel = DeviceInfo { flags: IOCTL_NUMBERS, ..told };
        assert_eq!(Device::decode(&copied_by_the_kernel), None);
    }

    #[test]
    fn a_request_is_what_its_descriptor_says() {
        let request = |operation_and_flags: u32, sectors: u32, start: u64| {
            Request::decode(Descriptor { operation_and_flags, sectors, start, address: 0 })
        };
        let read = Request { operation: Operation::Read, offset: 1024, len: 4096 };
        assert_eq!(request(0, 8, 2), read);
        assert_eq!(
            request(1 | 1 << 13, 8, 2),
            Request { operation: Operation::Write { durable: true }, ..read }
        );
        let zeroes = |unmap| Operation::WriteZeroes { unmap, durable: false };
        assert_eq!(request(5 | 1 << 15, 8, 2).operation, zeroes(false));
        assert_eq!(request(5, 8, 2).operation, zeroes(true));
        assert_eq!(request(4, 8, 2).operation, Operation::Other(4));
        assert_eq!(request(0, u32::MAX, u64::MAX).len, u64::from(u32::MAX) * 512, "nonsense is no panic");
    }

    #[test]
    fn a_shape_is_in_the_drivers_units() {
        let shape = Shape {
            sectors: 1 << 21,
            read_only: true,
            volatile_cache: true,
            logical_block: 512,
            physical_block: 4096,
            preferred: 65536,
            max_range: 4 << 20,
        };
        let said = shape.encode(1 << 19);
        assert_eq!((said.shifts, said.max_sectors, said.max_discard_segments), ([9, 12, 16, 12], 1024, 1));
        assert!(said.is_read_only());
        assert_eq!(Shape { max_range: 0, ..shape }.encode(1 << 19).max_discard_segments, 0);
    }

    #[test]
    fn bytes_of_different_requests_dont_overlap() {
        assert_eq!(data_offset(0, 0), 0x8000_0000);
        assert_eq!(data_offset(1, 0) - data_offset(0, (1 << 25) - 1), 1);
    }
}
