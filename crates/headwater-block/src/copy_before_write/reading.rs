//! Reading what a disk held at one moment.
//!
//! Saved granules are read from the target, pending ones from the source, under the range lock like every read. A change of pending bytes needs the lock for itself, before it
//! saves them; so while a reader holds it, what is pending stays so, and is as it was.
//!
//! A reader who has got what he wanted may say so ([`PointInTime::forget`]): then guests needn't save it, and the target needn't keep it. Whoever reads it afterwards gets an
//! error, never something else.

use super::PointInTime;
use crate::abort::Abort;
use crate::buffer::BufferMut;
use crate::chain;
use crate::error::{Error, ErrorKind, Result};
use crate::extent::{Extent, ExtentKind};
use crate::range_lock::{Mode, Token};
use std::ops::Range;

impl PointInTime {
    /// Fills `buf` with what the disk held at that moment from `offset`, of which nothing lies past its end. As a request to the source it waits for a drain of
    /// that. May be dropped.
    ///
    /// # Errors
    /// If the copy is worth nothing any more; those of the source and the target.
    pub async fn read(&self, offset: u64, mut buf: BufferMut) -> Result<BufferMut> {
        let range = offset..offset + buf.len() as u64;
        let _pass = self.source.gate().enter().await;
        let _guard =
            self.source.range_lock().acquire(Token::for_request(), range.clone(), Mode::Shared).await;
        let top = self.source.top();
        let mut at = range.start;
        while at < range.end {
            let (end, pending) = self.where_it_is(at..range.end)?;
            if at == range.start && end == range.end {
                return if pending { top.read(at, buf).await } else { self.target.read_into(at, buf).await };
            }
            let part = BufferMut::new((end - at) as usize);
            let part =
                if pending { top.read(at, part).await? } else { self.target.read_into(at, part).await? };
            let start = (at - range.start) as usize;
            buf[start..start + part.len()].copy_from_slice(&part);
            at = end;
        }
        Ok(buf)
    }

    /// What the start of `range`, which isn't empty, read as at that moment: data or zeroes. As for [`PointInTime::read`].
    ///
    /// # Errors
    /// See there.
    pub async fn status(&self, range: Range<u64>) -> Result<Extent> {
        let _pass = self.source.gate().enter().await;
        let _guard =
            self.source.range_lock().acquire(Token::for_request(), range.clone(), Mode::Shared).await;
        let (end, pending) = self.where_it_is(range.clone())?;
        let top = if pending { self.source.top() } else { self.target.top() };
        let found = chain::status(&top, range.start..end, None).await?;
        let kind = match found.kind {
            ExtentKind::Data => ExtentKind::Data,
            ExtentKind::Zero | ExtentKind::Unallocated => ExtentKind::Zero,
        };
        Ok(Extent::new(range.start, found.end().min(end) - range.start, kind))
    }

    /// Nobody reads `range` any more: whole granules of it are no longer saved, their space in the target is given back, and reading them fails. Must be driven to its end; gives up
    /// with `Cancelled` when `abort` is thrown before anything was changed.
    ///
    /// # Errors
    /// Those of the target, which then keeps what it needn't.
    pub async fn forget(&self, range: Range<u64>, abort: &Abort) -> Result<()> {
        let (granule, size) = (self.granularity(), self.source.size());
        let end = if range.end >= size { size } else { range.end - range.end % granule };
        let whole = range.start.next_multiple_of(granule)..end;
        if whole.is_empty() {
            return Ok(());
        }
        // Exclusively: nobody is reading there, or saving.
        let lock = self.source.range_lock().acquire(Token::for_request(), whole.clone(), Mode::Exclusive);
        let _guard = abort.guard(lock).await?;
        if self.is_over() {
            return Ok(());
        }
        // race-mark: point-in-time-forgets
        self.forgotten.mark(whole.clone());
        self.pending.clear(whole.clone());
        self.changed();
        self.target.discard(whole.start, whole.end - whole.start).await
    }

    /// How far the start of a range is pending, or saved. The caller holds the lock over it.
    fn where_it_is(&self, range: Range<u64>) -> Result<(u64, bool)> {
        if let Some(error) = self.broken() {
            let message = format!(
                "{}: what it held at that moment is lost, because it could not be copied to {}: {error}",
                self.source.name(),
                self.target.name()
            );
            return Err(Error::new(ErrorKind::Io, message));
        }
        if self.is_over() {
            let message = format!("{}: what it held at a moment is kept no more", self.source.name());
            return Err(Error::new(ErrorKind::Closed, message));
        }
        if self.forgotten.first(range.clone(), 1).is_some() {
            let message = format!(
                "{}: what it held at that moment in {range:?} is kept no more, because somebody has copied and discarded it",
                self.source.name()
            );
            return Err(Error::new(ErrorKind::NotAllowed, message));
        }
        // race-mark: point-in-time-read
        Ok(match self.pending.first(range.clone(), range.end - range.start) {
            Some(run) if run.start <= range.start => (run.end.min(range.end), true),
            Some(run) => (run.start, false),
            None => (range.end, false),
        })
    }
}
