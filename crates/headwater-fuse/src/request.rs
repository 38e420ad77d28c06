//! What the kernel asks, from bytes.

use crate::abi::{FallocateIn, LseekIn, OpenIn, SetAttrIn, TransferIn, opcode, valid};
use rustix::fs::{FallocateFlags, OFlags};
use rustix::io::Errno;
use zerocopy::FromBytes;

/// One request. There is one file, so that none says which.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// The file's attributes.
    GetAttributes,
    /// Changes attributes; answered with all of them.
    SetAttributes(NewAttributes),
    /// Opens the file.
    Open {
        /// Not only to read.
        for_writing: bool,
    },
    /// Forgets an open file.
    Release,
    /// Bytes of the file.
    Read {
        /// Where, in bytes.
        offset: u64,
        /// How many, at most.
        len: u32,
    },
    /// Bytes that came with the request, into the file.
    Write {
        /// Where, in bytes.
        offset: u64,
        /// They must be durable when it is answered.
        durable: bool,
    },
    /// What was answered before is to be durable: fsync, and close, because whoever copies an image often ends with that and looks at its result.
    Flush,
    /// `fallocate`.
    Allocate {
        /// Where, in bytes.
        offset: u64,
        /// How many bytes.
        len: u64,
        /// What is to become of them.
        mode: FallocateFlags,
    },
    /// `lseek`, as far as the kernel can't do it by itself.
    Seek {
        /// From where, in bytes.
        offset: u64,
        /// What is looked for.
        to: SeekTo,
    },
    /// How large the file system is.
    Space,
}

/// What `lseek` looks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SeekTo {
    /// The next bytes that aren't in a hole.
    Data,
    /// The next hole.
    Hole,
}

/// What `truncate`, `chmod` and `chown` change.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NewAttributes {
    /// The size in bytes.
    pub size: Option<u64>,
    /// The mode, with the bits of the kind of file.
    pub mode: Option<u32>,
    /// The owner.
    pub uid: Option<u32>,
    /// The group.
    pub gid: Option<u32>,
}

/// How long the arguments of a write are: its bytes follow them where both come in one piece.
pub(crate) const WRITE_ARGUMENTS: usize = size_of::<TransferIn>();

impl Operation {
    /// What an operation's number and arguments mean; `data` are the bytes that come with it, if it is a write.
    ///
    /// # Errors
    /// What the kernel is to be answered: `NOSYS` if it isn't among ours, and `INVAL` if it makes no sense.
    pub(crate) fn decode(code: u32, arguments: &[u8], data: &[u8]) -> Result<Self, Errno> {
        let operation = match code {
            opcode::GETATTR => Self::GetAttributes,
            opcode::SETATTR => {
                let SetAttrIn { valid, size, mode, uid, gid, .. } = take(arguments)?;
                let given = |bit| valid & bit != 0;
                Self::SetAttributes(NewAttributes {
                    size: given(valid::SIZE).then_some(size),
                    mode: given(valid::MODE).then_some(mode),
                    uid: given(valid::UID).then_some(uid),
                    gid: given(valid::GID).then_some(gid),
                })
            }
            opcode::OPEN => {
                let OpenIn { flags, .. } = take(arguments)?;
                Self::Open { for_writing: OFlags::from_bits_retain(flags).intersects(OFlags::ACCMODE) }
            }
            opcode::RELEASE => Self::Release,
            opcode::READ => {
                let TransferIn { offset, size, .. } = take(arguments)?;
                Self::Read { offset, len: size }
            }
            opcode::WRITE => {
                let TransferIn { offset, size, flags, .. } = take(arguments)?;
                if usize::try_from(size) != Ok(data.len()) {
                    return Err(Errno::INVAL);
                }
                let durable = OFlags::from_bits_retain(flags).intersects(OFlags::SYNC | OFlags::DSYNC);
                Self::Write { offset, durable }
            }
            opcode::FSYNC | opcode::FLUSH => Self::Flush,
            opcode::FALLOCATE => {
                let FallocateIn { offset, length, mode, .. } = take(arguments)?;
                Self::Allocate { offset, len: length, mode: FallocateFlags::from_bits_retain(mode) }
            }
            opcode::LSEEK => {
                let LseekIn { offset, whence, .. } = take(arguments)?;
                if i64::try_from(offset).is_err() {
                    return Err(Errno::INVAL);
                }
                let to = match i32::try_from(whence) {
                    Ok(libc::SEEK_DATA) => SeekTo::Data,
                    Ok(libc::SEEK_HOLE) => SeekTo::Hole,
                    // The kernel does the others by itself.
                    _ => return Err(Errno::INVAL),
                };
                Self::Seek { offset, to }
            }
            opcode::STATFS => Self::Space,
            _ => return Err(Errno::NOSYS),
        };
        Ok(operation)
    }
}

fn take<T: FromBytes>(arguments: &[u8]) -> Result<T, Errno> {
    T::read_from_prefix(arguments).map(|(arguments, _)| arguments).map_err(|_| Errno::INVAL)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use zerocopy::{FromZeros, IntoBytes};

    fn transfer(offset: u64, size: u32, flags: OFlags) -> TransferIn {
        TransferIn { offset, size, flags: flags.bits(), ..TransferIn::new_zeroed() }
    }

    #[test]
    fn reads_and_writes_are_what_they_say() {
        let arguments = transfer(4096, 3, OFlags::RDWR | OFlags::DSYNC);
        let decode = |code, data: &[u8]| Operation::decode(code, arguments.as_bytes(), data);
        assert_eq!(decode(opcode::READ, &[]), Ok(Operation::Read { offset: 4096, len: 3 }));
        assert_eq!(decode(opcode::WRITE, b"new"), Ok(Operation::Write { offset: 4096, durable: true }));
        let plain = transfer(0, 0, OFlags::RDWR);
        assert_eq!(
            Operation::decode(opcode::WRITE, plain.as_bytes(), &[]),
            Ok(Operation::Write { offset: 0, durable: false })
        );
    }

    #[test]
    fn a_write_has_the_bytes_that_it_says() {
        for data in [&b""[..], b"ne", b"newer"] {
            let arguments = transfer(0, 3, OFlags::RDWR);
            assert_eq!(Operation::decode(opcode::WRITE, arguments.as_bytes(), data), Err(Errno::INVAL));
        }
    }

    #[test]
    fn only_what_is_marked_is_set() {
        let arguments = SetAttrIn {
            valid: valid::SIZE | valid::GID,
            size: 7,
            gid: 8,
            mode: 9,
            uid: 10,
            ..SetAttrIn::new_zeroed()
        };
        let new = NewAttributes { size: Some(7), gid: Some(8), mode: None, uid: None };
        assert_eq!(
            Operation::decode(opcode::SETATTR, arguments.as_bytes(), &[]),
            Ok(Operation::SetAttributes(new))
        );
    }

    #[test]
    fn who_opens_to_write_says_so() {
        for (flags, for_writing) in [(OFlags::RDONLY, false), (OFlags::WRONLY, true), (OFlags::RDWR, true)] {
            let arguments = OpenIn { flags: (flags | OFlags::DIRECT).bits(), open_flags: 0 };
            let opened = Operation::decode(opcode::OPEN, arguments.as_bytes(), &[]);
            assert_eq!(opened, Ok(Operation::Open { for_writing }));
        }
    }

    #[test]
    fn a_place_is_looked_for_in_the_file_only() {
        let seek = |offset, whence| {
            let arguments = LseekIn { offset, whence, ..LseekIn::new_zeroed() };
            Operation::decode(opcode::LSEEK, arguments.as_bytes(), &[])
        };
        assert_eq!(seek(5, 3), Ok(Operation::Seek { offset: 5, to: SeekTo::Data }));
        assert_eq!(seek(5, 4), Ok(Operation::Seek { offset: 5, to: SeekTo::Hole }));
        for (offset, whence) in [(5, 0), (5, 5), (5, u32::MAX), (1 << 63, 3)] {
            assert_eq!(seek(offset, whence), Err(Errno::INVAL));
        }
    }

    #[test]
    fn arguments_that_are_too_short_are_refused() {
        let lengths = [
            (opcode::SETATTR, size_of::<SetAttrIn>()),
            (opcode::OPEN, size_of::<OpenIn>()),
            (opcode::READ, size_of::<TransferIn>()),
            (opcode::WRITE, size_of::<TransferIn>()),
            (opcode::FALLOCATE, size_of::<FallocateIn>()),
        ];
        for (code, len) in lengths {
            for len in 0..len {
                assert_eq!(Operation::decode(code, &vec![0; len], &[]), Err(Errno::INVAL), "{code}, {len}");
            }
            assert!(Operation::decode(code, &vec![0; len], &[]).is_ok(), "{code}");
        }
    }

    proptest! {
        #[test]
        fn nonsense_is_no_panic(code in 0u32..70, arguments: Vec<u8>, data: Vec<u8>) {
            let _ = Operation::decode(code, &arguments, &data);
        }
    }
}
