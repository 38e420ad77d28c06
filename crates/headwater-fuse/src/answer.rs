//! What the kernel is answered, to bytes.

use crate::abi::{
    AttrOut, LseekOut, OPEN_DIRECT_IO, OPEN_PARALLEL_DIRECT_WRITES, OpenOut, StatfsOut, WriteOut,
};
use std::ops::Deref;
use std::time::{SystemTime, UNIX_EPOCH};
use zerocopy::{FromZeros, IntoBytes};

/// The number of the only file, which is also the root of its file system.
const ROOT: u64 = 1;

/// How a request ended, if it didn't fail.
#[derive(Clone, Debug)]
pub enum Answer<Data> {
    /// It is done, and there is nothing to say.
    Done,
    /// The file is open: it is read and written past the kernel's cache, by several at once.
    Opened,
    /// What the file is like. Not to be believed for any time, because it may change from elsewhere.
    Attributes(Attributes),
    /// What was read: not more than was asked for, and less only at the end of the file.
    Read(Data),
    /// How many bytes were written.
    Written(u32),
    /// What was looked for is there, in bytes.
    Found(u64),
    /// How large the file system is.
    Space(Space),
}

/// What a file is like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attributes {
    /// In bytes.
    pub size: u64,
    /// Of any kind.
    pub time: SystemTime,
    /// With the bits of the kind of file.
    pub mode: u32,
    /// The owner.
    pub uid: u32,
    /// The group.
    pub gid: u32,
    /// What it is best read and written in, in bytes.
    pub block_size: u32,
}

/// The size of a file system, in which all is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Space {
    /// In bytes.
    pub size: u64,
    /// Its unit, in bytes.
    pub block_size: u32,
}

/// The longest part of an answer that isn't data.
const FIXED: usize = size_of::<AttrOut>();

/// An answer as it is sent: its beginning, and the data.
pub(crate) struct Encoded<'a> {
    fixed: [u8; FIXED],
    len: usize,
    pub(crate) data: &'a [u8],
}

impl Encoded<'_> {
    /// Nothing.
    pub(crate) const EMPTY: Self = Encoded { fixed: [0; FIXED], len: 0, data: &[] };

    pub(crate) fn fixed(&self) -> &[u8] {
        &self.fixed[..self.len]
    }

    /// Of both parts.
    pub(crate) fn len(&self) -> usize {
        self.len + self.data.len()
    }

    fn of(bytes: &[u8]) -> Self {
        let mut fixed = [0; FIXED];
        fixed[..bytes.len()].copy_from_slice(bytes);
        Self { fixed, len: bytes.len(), data: &[] }
    }
}

impl<Data: Deref<Target = [u8]>> Answer<Data> {
    pub(crate) fn encode(&self) -> Encoded<'_> {
        match self {
            Self::Done => Encoded::EMPTY,
            Self::Opened => {
                let flags = OPEN_DIRECT_IO | OPEN_PARALLEL_DIRECT_WRITES;
                Encoded::of(OpenOut { handle: 0, flags, backing: 0 }.as_bytes())
            }
            Self::Attributes(attributes) => Encoded::of(attributes.encode().as_bytes()),
            Self::Read(data) => Encoded { data, ..Encoded::EMPTY },
            Self::Written(size) => Encoded::of(WriteOut { size: *size, padding: 0 }.as_bytes()),
            Self::Found(offset) => Encoded::of(LseekOut { offset: *offset }.as_bytes()),
            Self::Space(Space { size, block_size }) => Encoded::of(
                StatfsOut {
                    blocks: size / u64::from(*block_size),
                    files: 1,
                    block_size: *block_size,
                    name_length: 255,
                    fragment_size: *block_size,
                    ..StatfsOut::new_zeroed()
                }
                .as_bytes(),
            ),
        }
    }
}

impl Attributes {
    fn encode(&self) -> AttrOut {
        // A file from before 1970 is shown as one from then.
        let time = self.time.duration_since(UNIX_EPOCH).unwrap_or_default();
        AttrOut {
            node: ROOT,
            size: self.size,
            blocks: self.size.div_ceil(512),
            times: [time.as_secs(); 3],
            nanoseconds: [time.subsec_nanos(); 3],
            mode: self.mode,
            links: 1,
            uid: self.uid,
            gid: self.gid,
            block_size: self.block_size,
            ..AttrOut::new_zeroed()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn each_answer_has_the_length_that_the_kernel_wants() {
        let len = |answer: Answer<&[u8]>| answer.encode().len();
        let attributes =
            Attributes { size: 513, time: UNIX_EPOCH, mode: 0o100_600, uid: 1, gid: 2, block_size: 4096 };
        assert_eq!(len(Answer::Done), 0);
        assert_eq!(len(Answer::Opened), 16);
        assert_eq!(len(Answer::Attributes(attributes)), 104);
        assert_eq!(len(Answer::Read(b"bytes")), 5);
        assert_eq!(len(Answer::Written(5)), 8);
        assert_eq!(len(Answer::Found(5)), 8);
        assert_eq!(len(Answer::Space(Space { size: 4096, block_size: 512 })), 80);
    }

    #[test]
    fn attributes_are_in_the_kernels_units() {
        let time = UNIX_EPOCH + Duration::new(5, 7);
        let attributes = Attributes { size: 513, time, mode: 0o100_600, uid: 1, gid: 2, block_size: 4096 };
        let said = attributes.encode();
        assert_eq!((said.blocks, said.times[1], said.nanoseconds[2]), (2, 5, 7));
        let old = Attributes { time: UNIX_EPOCH - Duration::from_secs(1), ..attributes };
        assert_eq!(old.encode().times, [0; 3]);
    }
}
