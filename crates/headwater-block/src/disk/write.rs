//! The way of a guest's changes.

use super::{DetectZeroes, Disk, add};
use crate::buffer::{Buffer, BufferMut};
use crate::error::Result;
use crate::node::{Access, Change, WriteFlags, ZeroFlags};
use crate::range_lock::{Guard, Mode, Token};
use crate::zero::is_zero;
use std::ops::Range;

impl Disk {
    /// Writes `data` at `offset`; any alignment. Must be driven to its end.
    ///
    /// # Errors
    /// `OutOfRange`, `ReadOnly`, `NoSpace`, and those of the storage. The range then holds old and new bytes in any mixture.
    pub async fn write(&self, offset: u64, data: Buffer, flags: WriteFlags) -> Result<()> {
        let range = self.check(offset, data.len() as u64)?;
        self.check_writable()?;
        if data.is_empty() {
            return Ok(());
        }
        if self.options.detect_zeroes != DetectZeroes::Off && is_zero(&data) {
            let unmap = self.options.detect_zeroes == DetectZeroes::Unmap;
            return self
                .write_zeroes(
                    offset,
                    data.len() as u64,
                    ZeroFlags { fua: flags.fua, unmap, fast_only: false },
                )
                .await;
        }
        let _admitted = self.admit().await;
        add(&self.stats.writes, 1);
        add(&self.stats.write_bytes, data.len() as u64);
        let aligned = self.aligned(&range);
        let _guard = self.lock_for(&range, &aligned, Change::Write).await;
        let unfinished = self.must_finish()?;
        let result = self.write_within(range, data, flags).await;
        unfinished.finished();
        result
    }

    /// Makes a range read as zeroes; any alignment. Must be driven to its end.
    ///
    /// # Errors
    /// As for [`Disk::write`]; `Unsupported` if `fast_only` was asked for and the storage can only write zeroes as data.
    pub async fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> Result<()> {
        let range = self.check(offset, len)?;
        self.check_writable()?;
        if len == 0 {
            return Ok(());
        }
        let _admitted = self.admit().await;
        add(&self.stats.zeroes_and_discards, 1);
        let aligned = self.aligned(&range);
        let _guard = self.lock_for(&range, &aligned, Change::Zero { unmap: flags.unmap }).await;
        let unfinished = self.must_finish()?;
        let result = self.zero_within(range, flags).await;
        unfinished.finished();
        result
    }

    /// Tells that a range's contents are no longer needed; see [`crate::Node::discard`]. Must be driven to its end.
    ///
    /// # Errors
    /// As for [`Disk::write`].
    pub async fn discard(&self, offset: u64, len: u64) -> Result<()> {
        let range = self.check(offset, len)?;
        self.check_writable()?;
        // Advisory: only whole aligned blocks are passed on.
        let alignment = u64::from(self.top.limits().write_alignment);
        let at_end = range.end == self.size();
        let start = range.start.next_multiple_of(alignment);
        let end =
            if at_end { range.end.next_multiple_of(alignment) } else { range.end - range.end % alignment };
        if start >= end {
            return Ok(());
        }
        let _admitted = self.admit().await;
        add(&self.stats.zeroes_and_discards, 1);
        let inner = start..end;
        let _guard = self.lock_for(&inner, &inner, Change::Discard).await;
        let unfinished = self.must_finish()?;
        let result = self.top.discard(start, end - start).await;
        unfinished.finished();
        result
    }

    /// `range` widened to the alignment that the top node needs of writes.
    fn aligned(&self, range: &Range<u64>) -> Range<u64> {
        let alignment = u64::from(self.top.limits().write_alignment);
        range.start - range.start % alignment..range.end.next_multiple_of(alignment)
    }

    /// Locks what a change of `range` needs. Shared if the bytes can be overwritten where they are; exclusive if the mapping
    /// changes or neighbouring bytes must be read and written back (`aligned` is then wider than `range`).
    async fn lock_for(&self, range: &Range<u64>, aligned: &Range<u64>, change: Change) -> Guard {
        let mut token = Token::for_request();
        let mut exclusive = match self.top.access(aligned.clone(), change) {
            Access::Exclusive(wide) => Some(wide),
            Access::Shared => (range != aligned).then(|| aligned.clone()),
        };
        loop {
            let Some(wide) = exclusive.take() else {
                let guard = self.lock.acquire(token, aligned.clone(), Mode::Shared).await;
                // The mapping may have changed while this waited; what is true now stays true while the lock is held.
                match self.top.access(aligned.clone(), change) {
                    Access::Shared => return guard,
                    Access::Exclusive(wide) => {
                        // race-mark: write-access-changed
                        token = guard.release();
                        exclusive = Some(wide);
                        continue;
                    }
                }
            };
            let union = wide.start.min(aligned.start)..wide.end.max(aligned.end);
            return self.lock.acquire(token, union, Mode::Exclusive).await;
        }
    }

    /// Writes under the lock, with read-modify-write where the alignment needs it.
    async fn write_within(&self, range: Range<u64>, data: Buffer, flags: WriteFlags) -> Result<()> {
        let aligned = self.aligned(&range);
        if aligned == range {
            return self.top.write(range.start, data, flags).await;
        }
        let mut block = BufferMut::new((aligned.end - aligned.start) as usize);
        let alignment = u64::from(self.top.limits().write_alignment) as usize;
        let (head, tail) = ((range.start - aligned.start) as usize, (aligned.end - range.end) as usize);
        if block.len() <= 2 * alignment {
            block = self.top.read(aligned.start, block).await?;
        } else {
            // Only the blocks at the ends hold bytes that must be kept.
            if head > 0 {
                let edge = self.top.read(aligned.start, BufferMut::new(alignment)).await?;
                block[..alignment].copy_from_slice(&edge);
            }
            if tail > 0 {
                let at = block.len() - alignment;
                let edge = self.top.read(aligned.end - alignment as u64, BufferMut::new(alignment)).await?;
                block[at..].copy_from_slice(&edge);
            }
        }
        block[head..head + data.len()].copy_from_slice(&data);
        self.top.write(aligned.start, block.freeze(), flags).await
    }

    /// Zeroes under the lock: whole aligned blocks as zeroes, the rest as data.
    pub(super) async fn zero_within(&self, range: Range<u64>, flags: ZeroFlags) -> Result<()> {
        let alignment = u64::from(self.top.limits().write_alignment);
        let start = range.start.next_multiple_of(alignment);
        let end = if range.end == self.size() {
            range.end.next_multiple_of(alignment)
        } else {
            range.end - range.end % alignment
        };
        let as_data = |part: Range<u64>| {
            let data = Buffer::zeroed((part.end - part.start) as usize);
            self.write_within(part, data, WriteFlags { fua: flags.fua })
        };
        if start >= end {
            return as_data(range).await;
        }
        if range.start < start {
            as_data(range.start..start).await?;
        }
        self.top.write_zeroes(start, end - start, flags).await?;
        if end < range.end {
            as_data(end..range.end).await?;
        }
        Ok(())
    }
}
