//! Zeroes without data: fallocate in the ways that file systems and devices know, and written zeroes where they know none.

use super::node::FileNode;
use super::op::Request;
use super::open::{Discard, Kind};
use headwater_block::{Buffer, Error, ErrorKind, Result, ZeroFlags};
use std::cell::Cell;
use std::io;
use std::ops::Range;

/// Zeroes are written in pieces of at most this many bytes.
const PIECE: u64 = 2 << 20;

const PUNCH: i32 = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
const ZERO: i32 = libc::FALLOC_FL_ZERO_RANGE;
const ALLOCATE: i32 = 0;

/// What the file system was found not to know.
#[derive(Default)]
pub(super) struct Abilities {
    no_punch: Cell<bool>,
    no_zero: Cell<bool>,
    no_allocate: Cell<bool>,
}

impl FileNode {
    pub(super) async fn zero_bytes(&self, offset: u64, len: u64, flags: ZeroFlags) -> Result<()> {
        let range = self.check_change("zero", offset, len)?;
        if range.is_empty() {
            return Ok(());
        }
        let change = self.change(range.clone());
        let fast = if flags.unmap && self.discards() == Discard::Unmap {
            self.zero_by_hole(&range).await? || self.zero_in_place(&range, flags).await?
        } else {
            self.zero_in_place(&range, flags).await?
        };
        if !fast && flags.fast_only {
            let message = format!(
                "{}: zeroes at {offset} ({len} bytes) would have to be written as data; its file system knows no faster way",
                self.name
            );
            return Err(Error::new(ErrorKind::Unsupported, message));
        }
        if !fast {
            self.write_zero_data(&range).await?;
        }
        self.grow(range.end);
        drop(change);
        if flags.fua { self.flush_changes().await } else { Ok(()) }
    }

    /// Punches a hole. False if that isn't known here.
    async fn zero_by_hole(&self, range: &Range<u64>) -> Result<bool> {
        if !self.allocate(PUNCH, range, &self.abilities.no_punch).await? {
            return Ok(false);
        }
        if range.end > self.size.get() {
            // A hole makes no file longer, and ftruncate might cut off what another request writes further on. A write does neither.
            let last = Buffer::zeroed(self.alignment() as usize);
            self.write_aligned(range.end - last.len() as u64, last, false).await?;
        }
        Ok(true)
    }

    /// Makes zeroes of allocated space. False if that isn't known here.
    async fn zero_in_place(&self, range: &Range<u64>, flags: ZeroFlags) -> Result<bool> {
        // For a block device without offload the kernel writes the zeroes itself, and doesn't say so.
        let may_be_slow = self.kind == Kind::BlockDevice;
        if !(may_be_slow && flags.fast_only) && self.allocate(ZERO, range, &self.abilities.no_zero).await? {
            return Ok(true);
        }
        if self.kind == Kind::BlockDevice || self.abilities.no_allocate.get() {
            return Ok(false);
        }
        // In two steps: both end in zeroes, and the second gives the space back that the first one took.
        Ok(self.allocate(PUNCH, range, &self.abilities.no_punch).await?
            && self.allocate(ALLOCATE, range, &self.abilities.no_allocate).await?)
    }

    /// Calls fallocate. False if the file doesn't know the mode, which `unknown` remembers.
    async fn allocate(&self, mode: i32, range: &Range<u64>, unknown: &Cell<bool>) -> Result<bool> {
        if unknown.get() {
            return Ok(false);
        }
        let len = range.end - range.start;
        let request = Request::Allocate { mode, offset: range.start, len };
        match self.engine.plain(&self.file, request).await {
            Ok(_) => Ok(true),
            Err(err) if is_unknown(&err) => {
                // EINVAL may mean just this range.
                unknown.set(err.raw_os_error() != Some(libc::EINVAL));
                Ok(false)
            }
            Err(err) => Err(self.failed(err, "zero", range.start, len)),
        }
    }

    async fn write_zero_data(&self, range: &Range<u64>) -> Result<()> {
        let zeroes = Buffer::zeroed(PIECE.min(range.end - range.start) as usize);
        let mut at = range.start;
        while at < range.end {
            let len = (range.end - at).min(PIECE);
            self.write_aligned(at, zeroes.slice(0..len as usize), false).await?;
            at += len;
        }
        Ok(())
    }

    /// Gives space back. For block devices, too, as a hole: it reads as zeroes, whereas a bare discard (BLKDISCARD) leaves open what
    /// is read afterwards.
    pub(super) async fn discard_bytes(&self, offset: u64, len: u64) -> Result<()> {
        self.check_open()?;
        if self.discards() == Discard::Ignore {
            return Ok(());
        }
        let end = offset.saturating_add(len).min(self.size.get());
        let align = self.alignment();
        // Inwards to whole blocks: a part of one can't be given back.
        let (Some(start), end) = (offset.checked_next_multiple_of(align), end - end % align) else {
            return Ok(());
        };
        if start >= end {
            return Ok(());
        }
        let range = self.check_change("discard", start, end - start)?;
        let _change = self.change(range.clone());
        self.allocate(PUNCH, &range, &self.abilities.no_punch).await.map(drop)
    }
}

fn is_unknown(err: &io::Error) -> bool {
    matches!(err.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::ENODEV | libc::EINVAL))
}

#[cfg(test)]
impl Abilities {
    pub(super) fn knows_punch(&self) -> bool {
        !self.no_punch.get()
    }

    pub(super) fn forget_all(&self) {
        [&self.no_punch, &self.no_zero, &self.no_allocate].iter().for_each(|unknown| unknown.set(true));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::file::testing::{on_runtime, scratch_file};
    use crate::file::{Engine, FileOptions, IoMode};
    use headwater_block::{BufferMut, Node, WriteFlags};

    #[test]
    fn discards_can_be_ignored_and_flushes_left_out() {
        on_runtime(async {
            let engine = Engine::new(IoMode::Auto).unwrap();
            let scratch = scratch_file();
            let how = FileOptions { discard: Discard::Ignore, no_flush: true, ..FileOptions::default() };
            let node = FileNode::open(&engine, scratch.path(), how).unwrap();
            let read = async |offset, len| node.read(offset, BufferMut::new(len)).await.unwrap().to_vec();
            let data = vec![7; 64 << 10];
            node.write(0, Buffer::copy_of(&data), WriteFlags { fua: true, ..WriteFlags::default() })
                .await
                .unwrap();
            node.discard(0, 64 << 10).await.unwrap();
            assert_eq!(read(0, 64 << 10).await, data);
            let flags = ZeroFlags { unmap: true, ..ZeroFlags::default() };
            node.write_zeroes(0, 32 << 10, flags).await.unwrap();
            assert!(read(0, 32 << 10).await.iter().all(|byte| *byte == 0));
            assert_eq!(read(32 << 10, 32 << 10).await, data[32 << 10..]);
            if node.abilities.knows_punch() {
                use std::os::unix::fs::MetadataExt;
                assert!(
                    scratch.as_file().metadata().unwrap().blocks() * 512 >= 64 << 10,
                    "nothing was given back"
                );
            }
            // A lost write doesn't matter to who never wants to know.
            node.durability.lose(&Error::new(ErrorKind::Io, "lost"));
            node.flush().await.unwrap();
            node.close().await.unwrap();
        });
    }
}
