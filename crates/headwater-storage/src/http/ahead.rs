//! What is asked for before anybody wants it: the part of an object with which a job is about to begin.
//!
//! A source that is far away costs a round trip before its first byte comes, and several where connections must be made. Whoever knows early that an object will be read
//! ([`headwater_block::Node::expect`]) has that time pass while other things are done: the first requests are on their way, each on a connection of its own, and
//! find it open when they are made in earnest.
//!
//! - **Readers take what came instead of asking again.** What hasn't come yet they wait for.
//! - **What fails is no error here**: its reader asks itself, and meets whatever there is to be met.
//! - **What nobody reads** is forgotten when some time has passed since all came. It takes memory until then, as much as was asked for.
//! - **The first parts differ in size**, in equal steps: parts of one size that share a line end together, and then the line stands still for a round trip. Those that
//!   wait for their connections begin apart in any case. They are large, or the line would have had them before the next ones come.

use super::{BLOCK, PIECE, RangeSource};
use futures_util::FutureExt;
use futures_util::future::{Shared, join_all, try_join_all};
use headwater_block::{Buffer, BufferMut, Clock, LocalFuture, Result};
use std::cell::{Cell, RefCell};
use std::ops::Range;
use std::rc::Rc;
use std::time::Duration;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

/// How long what nobody has read is kept: a job begins sooner, if it begins.
pub(super) const KEPT: Duration = Duration::from_secs(10);

/// The size of the smallest part, in bytes.
const LEAST: u64 = 128 << 10;

/// Bytes that are on their way.
pub(super) struct Coming {
    /// Which.
    pub(super) range: Range<u64>,
    /// They, or none if that fails.
    pub(super) data: LocalFuture<'static, Option<Buffer>>,
}

/// A part that was asked for.
struct Part {
    range: Range<u64>,
    /// None if that failed.
    data: Shared<oneshot::Receiver<Option<Buffer>>>,
    /// How many bytes nobody has read.
    unread: Cell<u64>,
}

/// The way to an object's bytes, past what was asked for ahead; see the [module](self).
pub(super) struct Ahead {
    source: Rc<dyn RangeSource>,
    clock: Rc<dyn Clock>,
    parts: RefCell<Vec<Rc<Part>>>,
    tasks: RefCell<Vec<JoinHandle<()>>>,
    /// Somebody has asked, and of that something is left.
    asked: Cell<bool>,
    kept: Duration,
}

impl Drop for Ahead {
    fn drop(&mut self) {
        self.forget();
    }
}

impl Ahead {
    /// What nobody has read is kept for the time of `kept` after all came.
    pub(super) fn new(source: Rc<dyn RangeSource>, clock: Rc<dyn Clock>, kept: Duration) -> Rc<Self> {
        let (parts, tasks) = (RefCell::default(), RefCell::default());
        Rc::new(Self { source, clock, parts, tasks, asked: Cell::new(false), kept })
    }

    /// Keeps what is on its way for its readers.
    pub(super) fn comes(self: &Rc<Self>, coming: impl IntoIterator<Item = Coming>) {
        let mut all = Vec::new();
        let mut tasks = self.tasks.borrow_mut();
        tasks.retain(|task| !task.is_finished());
        for Coming { range, data: coming } in coming {
            let (sender, receiver) = oneshot::channel();
            let unread = Cell::new(range.end - range.start);
            all.push(Rc::new(Part { unread, range, data: receiver.shared() }));
            tasks.push(tokio::task::spawn_local(async move {
                // Nobody waits for it if it was forgotten meanwhile.
                let _ = sender.send(coming.await);
            }));
        }
        self.parts.borrow_mut().extend(all.iter().cloned());
        let (this, clock, kept) = (Rc::downgrade(self), self.clock.clone(), self.kept);
        tasks.push(tokio::task::spawn_local(async move {
            join_all(all.iter().map(|part| part.data.clone())).await;
            clock.sleep_until(clock.now() + kept).await;
            if let Some(this) = this.upgrade() {
                this.parts.borrow_mut().retain(|part| !all.iter().any(|old| Rc::ptr_eq(old, part)));
            }
        }));
    }

    /// Asks for what isn't on its way of `range`, in at most `requests` parts at once. Nothing happens while something is left of what was asked for before.
    pub(super) fn ask(self: &Rc<Self>, range: Range<u64>, requests: u32) {
        let known = self.parts.borrow().iter().map(|part| part.range.end).max();
        let range = range.start.max(known.unwrap_or(0))..range.end;
        if range.is_empty() || self.asked.replace(true) && known.is_some() {
            return;
        }
        let parts = match known {
            Some(_) => pieces(range, requests),
            None => parts(range, requests).collect(),
        };
        self.comes(parts.into_iter().map(|range| {
            let (source, whole) = (self.source.clone(), range.clone());
            let data = Box::pin(async move {
                // At most `PIECE`.
                let len = (range.end - range.start) as usize;
                let done = source.fetch(range.start, BufferMut::new(len)).await;
                if let Err(error) = &done {
                    tracing::debug!(%error, "what was asked for ahead doesn't come");
                }
                done.ok().map(BufferMut::freeze)
            });
            Coming { range: whole, data }
        }));
    }

    /// Gives up what hasn't come, and forgets what has.
    pub(super) fn forget(&self) {
        self.parts.borrow_mut().clear();
        self.tasks.borrow().iter().for_each(JoinHandle::abort);
    }

    /// Fills `buf` from `offset`.
    ///
    /// # Errors
    /// Those of the source.
    pub(super) async fn fetch(&self, offset: u64, mut buf: BufferMut) -> Result<BufferMut> {
        if self.parts.borrow().is_empty() {
            return self.source.fetch(offset, buf).await;
        }
        let mut pieces = Vec::new();
        let mut at = offset;
        while !buf.is_empty() {
            let part = self.part_at(at);
            let end = match &part {
                Some(part) => part.range.end,
                None => self.next_start(at).unwrap_or(u64::MAX),
            };
            // At most the buffer's length.
            let rest = buf.split_off((end - at).min(buf.len() as u64) as usize);
            let piece = std::mem::replace(&mut buf, rest);
            let len = piece.len() as u64;
            pieces.push(self.fetch_piece(part, at, piece));
            at += len;
        }
        let done = try_join_all(pieces).await?;
        // `buf` is the empty rest after the last piece.
        Ok(done.into_iter().reduce(BufferMut::join).unwrap_or(buf))
    }

    /// Fills `buf`, all of which lies within `part`, or outside of all.
    async fn fetch_piece(&self, part: Option<Rc<Part>>, at: u64, mut buf: BufferMut) -> Result<BufferMut> {
        let Some(part) = part else { return self.source.fetch(at, buf).await };
        let data = part.data.clone().await.ok().flatten();
        let left = part.unread.get().saturating_sub(buf.len() as u64);
        part.unread.set(left);
        if data.is_none() || left == 0 {
            self.parts.borrow_mut().retain(|other| !Rc::ptr_eq(other, &part));
        }
        let Some(data) = data else { return self.source.fetch(at, buf).await };
        // What is within the part is within what came.
        let from = (at - part.range.start) as usize;
        let len = buf.len();
        buf.copy_from_slice(&data[from..from + len]);
        Ok(buf)
    }

    fn part_at(&self, at: u64) -> Option<Rc<Part>> {
        self.parts.borrow().iter().find(|part| part.range.contains(&at)).cloned()
    }

    fn next_start(&self, at: u64) -> Option<u64> {
        self.parts.borrow().iter().map(|part| part.range.start).filter(|start| *start > at).min()
    }
}

/// `range` in at most `count` parts that grow from the first to the last, of which none is longer than a piece.
pub(super) fn parts(range: Range<u64>, count: u32) -> impl Iterator<Item = Range<u64>> {
    let step = PIECE as u64 / u64::from(count.max(1));
    let mut at = range.start;
    (1..=u64::from(count)).map_while(move |number| {
        let start = at;
        at = range.end.min(start + (number * step).next_multiple_of(BLOCK).max(LEAST).min(PIECE as u64));
        (start < at).then_some(start..at)
    })
}

/// The beginning of `range` in at most `count` pieces.
fn pieces(range: Range<u64>, count: u32) -> Vec<Range<u64>> {
    let starts = range.clone().step_by(PIECE).take(count as usize);
    starts.map(|start| start..range.end.min(start + PIECE as u64)).collect()
}

#[cfg(test)]
mod interleavings;
#[cfg(test)]
mod tests;
