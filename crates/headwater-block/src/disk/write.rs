//! The way of a guest's changes.

use super::{DetectZeroes, Disk, add};
use crate::buffer::{Buffer, BufferMut};
use crate::debug_event::DebugEvent;
use crate::error::Result;
use crate::follow::{Changed, Follower};
use crate::guest_latency::Kind;
use crate::node::{Access, Change, WriteFlags, ZeroFlags};
use crate::range_lock::{Guard, Mode, Token};
use crate::zero::is_zero;
use std::ops::Range;
use std::rc::Rc;

/// What a change holds while it is carried out.
struct Locked {
    _guard: Guard,
    /// Those to whom it goes through.
    through: Vec<Rc<Follower>>,
}

impl Locked {
    fn goes_through(&self) -> bool {
        !self.through.is_empty()
    }
}

impl Disk {
    /// Writes `data` at `offset`; any alignment. Must be driven to its end.
    ///
    /// # Errors
    /// `OutOfRange`, `ReadOnly`, `NoSpace`, and those of the storage. The range then holds old and new bytes in any mixture.
    pub async fn write(&self, offset: u64, data: Buffer, flags: WriteFlags) -> Result<()> {
        let len = data.len() as u64;
        if data.is_empty() {
            return self.check_change(offset, len).map(drop);
        }
        let detect = self.options.get().detect_zeroes;
        if detect != DetectZeroes::Off && is_zero(&data) {
            let unmap = detect == DetectZeroes::Unmap;
            return self
                .write_zeroes(offset, len, ZeroFlags { fua: flags.fua, unmap, fast_only: false })
                .await;
        }
        let admitted = self.admit().await;
        // Only now: while requests were held back, the disk may have been opened anew in another way.
        let range = self.check_change(offset, len)?;
        admitted.is(Kind::Write);
        tracing::trace!(target: "qemu", event = "bdrv_co_pwritev_part", node = self.name(), offset, bytes = data.len());
        add(&self.stats.writes, 1);
        self.write_watch.writes_until(range.end);
        add(&self.stats.write_bytes, len);
        let aligned = self.aligned(&range);
        let kind = if flags.compressed { Change::Compress } else { Change::Write };
        let locked = self.lock_for(&range, &aligned, kind).await;
        self.save_before_change(&range).await?;
        let unfinished = self.must_finish()?;
        let change = self.changing(&range);
        let copy = locked.goes_through().then(|| data.clone());
        let result = self.write_within(range, data, flags).await;
        unfinished.finished();
        if let (Some(data), Ok(())) = (copy, &result) {
            change.pass_on(&locked.through, Changed::Data(data)).await;
        }
        result
    }

    /// Makes a range read as zeroes; any alignment. Must be driven to its end.
    ///
    /// # Errors
    /// As for [`Disk::write`]; `Unsupported` if `fast_only` was asked for and the storage can only write zeroes as data.
    pub async fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> Result<()> {
        if len == 0 {
            return self.check_change(offset, len).map(drop);
        }
        let _admitted = self.admit().await;
        let range = self.check_change(offset, len)?;
        add(&self.stats.zeroes_and_discards, 1);
        tracing::trace!(target: "qemu", event = "bdrv_co_pwrite_zeroes", node = self.name(), offset, bytes = len);
        let flags = ZeroFlags { unmap: flags.unmap && !self.options.get().ignore_discards, ..flags };
        let aligned = self.aligned(&range);
        let locked = self.lock_for(&range, &aligned, Change::Zero { unmap: flags.unmap }).await;
        self.save_before_change(&range).await?;
        let unfinished = self.must_finish()?;
        let change = self.changing(&range);
        let result = self.zero_within(range, flags).await;
        unfinished.finished();
        if result.is_ok() && locked.goes_through() {
            change.pass_on(&locked.through, Changed::Zeroes { unmap: flags.unmap }).await;
        }
        result
    }

    /// Tells that a range's contents are no longer needed; see [`crate::Node::discard`]. Must be driven to its end.
    ///
    /// # Errors
    /// As for [`Disk::write`].
    pub async fn discard(&self, offset: u64, len: u64) -> Result<()> {
        let _admitted = self.admit().await;
        let range = self.check_change(offset, len)?;
        // Advisory: only whole aligned blocks are passed on.
        let alignment = u64::from(self.top().limits().write_alignment);
        let at_end = range.end == self.size();
        let start = range.start.next_multiple_of(alignment);
        let end =
            if at_end { range.end.next_multiple_of(alignment) } else { range.end - range.end % alignment };
        if start >= end || self.options.get().ignore_discards {
            return Ok(());
        }
        tracing::trace!(target: "qemu", event = "bdrv_co_pdiscard", node = self.name(), offset, bytes = len);
        add(&self.stats.zeroes_and_discards, 1);
        let inner = start..end;
        let locked = self.lock_for(&inner, &inner, Change::Discard).await;
        self.save_before_change(&inner).await?;
        let unfinished = self.must_finish()?;
        let change = self.changing(&inner);
        let result = self.top().discard(start, end - start).await;
        unfinished.finished();
        if result.is_ok() && locked.goes_through() {
            change.pass_on(&locked.through, Changed::Discarded).await;
        }
        result
    }

    /// `range` widened to the alignment that the top node needs of writes.
    fn aligned(&self, range: &Range<u64>) -> Range<u64> {
        let alignment = u64::from(self.top().limits().write_alignment);
        range.start - range.start % alignment..range.end.next_multiple_of(alignment)
    }

    /// Locks what a change of `range` needs. Shared if the bytes can be overwritten where they are; exclusive if the mapping
    /// changes, what is there must be saved, a job wants it carried out elsewhere too, or neighbouring bytes must be read and written back (`aligned` is then wider than `range`).
    async fn lock_for(&self, range: &Range<u64>, aligned: &Range<u64>, change: Change) -> Locked {
        let mut token = Token::for_request();
        let mut needed = self.needs_alone(range, aligned, change);
        loop {
            let (locked, mode) = match &needed {
                Some(wide) => (wide.clone(), Mode::Exclusive),
                None => (aligned.clone(), Mode::Shared),
            };
            let guard = self.lock.acquire(token, locked.clone(), mode).await;
            // The mapping may have changed while this waited, so that more is needed than was asked for; what is true now
            // stays true while the lock is held.
            needed = self.needs_alone(range, aligned, change);
            match &needed {
                None => return Locked { _guard: guard, through: Vec::new() },
                Some(wide)
                    if mode == Mode::Exclusive && locked.start <= wide.start && wide.end <= locked.end =>
                {
                    return Locked { _guard: guard, through: self.followers_through() };
                }
                // race-mark: write-access-changed
                Some(_) => token = guard.release(),
            }
        }
    }

    /// Locks what storing a copy-up of `range`, whole allocation units, needs. That may be more than its units: subclusters of one cluster
    /// share a mapping.
    pub(crate) async fn lock_for_copy_up(&self, range: &Range<u64>) -> Guard {
        let mut token = Token::for_request();
        let needed = || {
            let changes = [Change::Write, Change::Zero { unmap: true }];
            changes.into_iter().fold(range.clone(), |all, change| {
                match self.top().access(range.clone(), change) {
                    Access::Shared => all,
                    Access::Exclusive(wide) => all.start.min(wide.start)..all.end.max(wide.end),
                }
            })
        };
        loop {
            let locked = needed();
            let guard = self.lock.acquire(token, locked.clone(), Mode::Exclusive).await;
            let now = needed();
            if locked.start <= now.start && now.end <= locked.end {
                return guard;
            }
            token = guard.release();
        }
    }

    /// The range, around `aligned`, that a change must have for itself; none if it can be shared.
    fn needs_alone(&self, range: &Range<u64>, aligned: &Range<u64>, change: Change) -> Option<Range<u64>> {
        let mut wide = (range != aligned).then(|| aligned.clone());
        let mut add = |access| {
            if let Access::Exclusive(more) = access {
                let one = wide.take().unwrap_or_else(|| aligned.clone());
                wide = Some(one.start.min(more.start)..one.end.max(more.end));
            }
        };
        add(self.top().access(aligned.clone(), change));
        if range != aligned && !matches!(change, Change::Write | Change::Compress) {
            // What of the first and last block lies outside the range is written back as data.
            add(self.top().access(aligned.clone(), Change::Write));
        }
        if let Some(more) = self.needs_to_save(aligned) {
            add(Access::Exclusive(more));
        }
        if !self.followers_through().is_empty() {
            add(Access::Exclusive(aligned.clone()));
        }
        wide
    }

    /// Writes under the lock, with read-modify-write where the alignment needs it.
    async fn write_within(&self, range: Range<u64>, data: Buffer, flags: WriteFlags) -> Result<()> {
        let aligned = self.aligned(&range);
        if aligned == range {
            return self.top().write(range.start, data, flags).await;
        }
        let mut block = BufferMut::new((aligned.end - aligned.start) as usize);
        let alignment = u64::from(self.top().limits().write_alignment) as usize;
        let (head, tail) = ((range.start - aligned.start) as usize, (aligned.end - range.end) as usize);
        if block.len() <= 2 * alignment {
            let (before, after) = if head > 0 {
                (DebugEvent::PwritevRmwHead, DebugEvent::PwritevRmwAfterHead)
            } else {
                (DebugEvent::PwritevRmwTail, DebugEvent::PwritevRmwAfterTail)
            };
            self.top().debug_event(before);
            block = self.top().read(aligned.start, block).await?;
            self.top().debug_event(after);
        } else {
            // Only the blocks at the ends hold bytes that must be kept.
            if head > 0 {
                self.top().debug_event(DebugEvent::PwritevRmwHead);
                let edge = self.top().read(aligned.start, BufferMut::new(alignment)).await?;
                self.top().debug_event(DebugEvent::PwritevRmwAfterHead);
                block[..alignment].copy_from_slice(&edge);
            }
            if tail > 0 {
                let at = block.len() - alignment;
                self.top().debug_event(DebugEvent::PwritevRmwTail);
                let edge = self.top().read(aligned.end - alignment as u64, BufferMut::new(alignment)).await?;
                self.top().debug_event(DebugEvent::PwritevRmwAfterTail);
                block[at..].copy_from_slice(&edge);
            }
        }
        block[head..head + data.len()].copy_from_slice(&data);
        self.top().write(aligned.start, block.freeze(), flags).await
    }

    /// Zeroes under the lock: whole aligned blocks as zeroes, the rest as data.
    pub(super) async fn zero_within(&self, range: Range<u64>, flags: ZeroFlags) -> Result<()> {
        let alignment = u64::from(self.top().limits().write_alignment);
        let start = range.start.next_multiple_of(alignment);
        let end = if range.end == self.size() {
            range.end.next_multiple_of(alignment)
        } else {
            range.end - range.end % alignment
        };
        let as_data = |part: Range<u64>| {
            let data = Buffer::zeroed((part.end - part.start) as usize);
            self.write_within(part, data, WriteFlags { fua: flags.fua, ..WriteFlags::default() })
        };
        if start >= end {
            return as_data(range).await;
        }
        if range.start < start {
            as_data(range.start..start).await?;
        }
        self.top().write_zeroes(start, end - start, flags).await?;
        if end < range.end {
            as_data(end..range.end).await?;
        }
        Ok(())
    }
}
