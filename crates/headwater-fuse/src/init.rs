//! The first exchange: what the kernel can do, and what of it is used.

use crate::abi::{InHeader, InitIn, InitOut, MAJOR, MINOR, OLDEST_MINOR, OutHeader, capability, opcode};
use rustix::io::Errno;
use std::io::{self, IoSlice};
use std::os::fd::BorrowedFd;
use zerocopy::{FromBytes, FromZeros, IntoBytes};

/// How many requests the kernel has on their way that nobody waits for (readahead, asynchronous direct I/O).
const MAX_BACKGROUND: u16 = 64;

/// The longest first message, and the least that the kernel takes as room for any.
const ROOM: usize = 8192;

/// Takes the kernel's first message, which is there since the file system was mounted, and answers it. `payload` is the longest read or write
/// in bytes, `ring` whether requests can be taken over io_uring; gives whether that was agreed upon.
///
/// # Errors
/// `Unsupported` if the kernel is too old, `InvalidData` if it makes no sense, and those of the system.
pub(crate) fn exchange(device: BorrowedFd<'_>, payload: u32, ring: bool) -> io::Result<bool> {
    let mut room = vec![0; ROOM];
    let len = loop {
        match rustix::io::read(device, &mut room) {
            Ok(len) => break len,
            Err(Errno::INTR | Errno::NOENT) => {}
            Err(error) => return Err(error.into()),
        }
    };
    let told = Told::decode(&room[..len])?;
    let agreed = told.agree(payload, ring, rustix::param::page_size());
    let (error, body) = match &agreed {
        Ok((said, _)) => (0, said.as_bytes()),
        Err(_) => (-Errno::PROTO.raw_os_error(), &[][..]),
    };
    let header = OutHeader { len: (size_of::<OutHeader>() + body.len()) as u32, error, unique: told.unique };
    rustix::io::writev(device, &[IoSlice::new(header.as_bytes()), IoSlice::new(body)])?;
    agreed.map(|(_, ring)| ring)
}

/// The kernel's first message.
#[derive(Clone, Copy, Debug)]
struct Told {
    unique: u64,
    version: (u32, u32),
    max_readahead: u32,
    capabilities: u64,
}

impl Told {
    fn decode(message: &[u8]) -> io::Result<Self> {
        let nonsense = |why: &str| {
            let message = format!("the kernel's first message has {} bytes and {why}", message.len());
            io::Error::new(io::ErrorKind::InvalidData, message)
        };
        let (header, rest) =
            InHeader::read_from_prefix(message).map_err(|_| nonsense("can't hold a header of 40"))?;
        if usize::try_from(header.len) != Ok(message.len()) {
            return Err(nonsense(&format!("says that it has {}", header.len)));
        }
        if header.opcode != opcode::INIT {
            return Err(nonsense(&format!("is operation {}, not the first one, 26", header.opcode)));
        }
        let (init, rest) =
            InitIn::read_from_prefix(rest).map_err(|_| nonsense("can't hold the 56 of a first one"))?;
        let mut capabilities = u64::from(init.flags);
        if capabilities & capability::INIT_EXT != 0 {
            let (high, _) =
                u32::read_from_prefix(rest).map_err(|_| nonsense("lacks the capabilities that it has"))?;
            capabilities |= u64::from(high) << 32;
        }
        Ok(Self {
            unique: header.unique,
            version: (init.major, init.minor),
            max_readahead: init.max_readahead,
            capabilities,
        })
    }

    /// What is answered, and whether requests come over io_uring then.
    fn agree(&self, payload: u32, ring: bool, page: usize) -> io::Result<(InitOut, bool)> {
        let (major, minor) = self.version;
        if major != MAJOR || minor < OLDEST_MINOR {
            let message = format!(
                "the kernel speaks version {major}.{minor} of FUSE's protocol, not {MAJOR}.{OLDEST_MINOR} or later"
            );
            return Err(io::Error::new(io::ErrorKind::Unsupported, message));
        }
        let mut wanted = capability::ASYNC_READ
            | capability::BIG_WRITES
            | capability::ASYNC_DIO
            | capability::MAX_PAGES
            | capability::INIT_EXT
            | capability::DIRECT_IO_ALLOW_MMAP;
        if ring {
            wanted |= capability::OVER_IO_URING;
        }
        let both = wanted & self.capabilities;
        let said = InitOut {
            major: MAJOR,
            minor: MINOR,
            max_readahead: self.max_readahead,
            flags: both as u32,
            max_background: MAX_BACKGROUND,
            congestion_threshold: MAX_BACKGROUND * 3 / 4,
            max_write: payload,
            time_granularity: 1,
            max_pages: (payload as usize / page) as u16,
            flags_high: (both >> 32) as u32,
            ..InitOut::new_zeroed()
        };
        Ok((said, both & capability::OVER_IO_URING != 0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// As Linux 6.18 says it, or an older one.
    fn message(minor: u32, capabilities: u64) -> Vec<u8> {
        let new = capabilities & capability::INIT_EXT != 0;
        let len = if new { 104 } else { 56 };
        let header = InHeader { len, opcode: opcode::INIT, unique: 2, ..InHeader::new_zeroed() };
        let init = InitIn { major: 7, minor, max_readahead: 131_072, flags: capabilities as u32 };
        let mut bytes = [header.as_bytes(), init.as_bytes()].concat();
        if new {
            bytes.extend(((capabilities >> 32) as u32).as_bytes());
        }
        bytes.resize(len as usize, 0);
        bytes
    }

    const ALL: u64 = u64::MAX >> 8;

    #[test]
    fn what_both_can_is_agreed_upon() {
        let agree = |minor, capabilities, ring| {
            Told::decode(&message(minor, capabilities)).unwrap().agree(1 << 20, ring, 4096).unwrap()
        };
        let (said, ring) = agree(44, ALL, true);
        assert!(ring);
        assert_eq!((said.max_write, said.max_pages, said.max_readahead), (1 << 20, 256, 131_072));
        assert_eq!(
            u64::from(said.flags_high) << 32,
            capability::DIRECT_IO_ALLOW_MMAP | capability::OVER_IO_URING
        );
        let (said, ring) = agree(44, ALL, false);
        assert!(!ring && u64::from(said.flags_high) << 32 == capability::DIRECT_IO_ALLOW_MMAP);
        assert!(!agree(44, ALL & !capability::OVER_IO_URING, true).1, "the kernel doesn't offer it");
        let old = agree(31, ALL & !capability::INIT_EXT & u64::from(u32::MAX), true);
        assert!(!old.1 && old.0.flags_high == 0);
    }

    #[test]
    fn a_kernel_that_is_too_old_is_refused() {
        for version in [22, 8] {
            let told = Told::decode(&message(version, 0)).unwrap();
            assert_eq!(told.agree(1 << 20, true, 4096).unwrap_err().kind(), io::ErrorKind::Unsupported);
        }
    }

    #[test]
    fn a_first_message_that_makes_no_sense_is_refused() {
        let good = message(44, ALL);
        for len in 0..good.len() {
            assert!(Told::decode(&good[..len]).is_err(), "{len}");
        }
        let mut cut = message(44, ALL);
        cut.truncate(56);
        cut[0] = 56;
        assert!(Told::decode(&cut).is_err(), "more capabilities than it has");
        let mut other = message(44, ALL);
        other[4] = 3;
        assert!(Told::decode(&other).is_err());
    }

    proptest! {
        #[test]
        fn nonsense_is_no_panic(message: Vec<u8>) {
            let _ = Told::decode(&message);
        }
    }
}
