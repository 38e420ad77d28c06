//! Following a disk in use: what a job that copies it has to do with the guests who change it meanwhile.
//!
//! Two ways, of which the second can be switched on while the first is used, and not off again:
//!
//! - **Behind.** Changes are marked in a [`DirtyMap`], and copied later. Its module text argues that none is missed. Guests wait for nothing.
//! - **Through.** A guest's change is carried out on the target as well before it is over. It isn't marked, unless that failed, so the target is equal
//!   to the source as soon as the rest has been copied, and stays so.
//!
//! # Why a change that went through needs no mark
//! Nothing older may land on top of it in the target. What could is a copy of the same bytes that was read before the change.
//! - **Copies that begin after the switch** hold the range lock *shared* from the look at the bytes until they are in the target; **changes that were let in
//!   after the switch** hold it *exclusively* until they are through. So one comes after the other, as a whole.
//! - **Copies that began before it** hold no lock for so long. They are counted: while there are any when a change starts to go through, it is marked as
//!   well. After that moment no other can begin.
//! - **Changes that were let in before it** are marked, whatever the switch says when they end.
//!
//! A change that goes through holds the source's range lock and asks for that of the target. So the target must not read from the source.

use crate::abort::Abort;
use crate::buffer::{Buffer, BufferMut};
use crate::chain;
use crate::copy_up::{Copied, Failed, Operation};
use crate::dirty_map::DirtyMap;
use crate::disk::Disk;
use crate::error::Result;
use crate::extent::ExtentKind;
use crate::node::{Node, WriteFlags, ZeroFlags};
use crate::range_lock::{Mode, Token};
use std::cell::Cell;
use std::ops::Range;
use std::rc::Rc;

/// How much of what isn't known one step of a copy moves, in bytes.
const STEP: u64 = 1 << 20;

/// A disk that is followed, and where its changes go; see the module.
pub struct Follower {
    source: Rc<Disk>,
    target: Rc<Disk>,
    /// What this node and those below it hold isn't copied.
    above: Option<Rc<dyn Node>>,
    map: Rc<DirtyMap>,
    through: Rc<Cell<bool>>,
    /// Thrown when nobody wants the copy any more: then what waits for the target is recalled.
    given_up: Rc<Abort>,
    /// Copies in flight that hold no lock.
    unlocked: Cell<usize>,
}

/// How a disk is followed.
#[derive(Default)]
pub struct Following {
    /// What this node and those below it hold isn't copied.
    pub above: Option<Rc<dyn Node>>,
    /// While it is set, which may happen at any time but not be taken back, changes are carried out on the target as well.
    pub through: Rc<Cell<bool>>,
    /// Thrown when nobody wants the copy any more: then what waits for the target is given up, where the target's layers can do that ([`crate::recall`]).
    pub given_up: Rc<Abort>,
}

/// What a guest has done to a range.
#[derive(Debug, Clone)]
pub(crate) enum Changed {
    Data(Buffer),
    Zeroes { unmap: bool },
    Discarded,
}

impl Follower {
    pub(crate) fn new(
        source: &Rc<Disk>,
        target: &Rc<Disk>,
        map: Rc<DirtyMap>,
        Following { above, through, given_up }: Following,
    ) -> Self {
        let (source, target) = (source.clone(), target.clone());
        Self { source, target, above, map, through, given_up, unlocked: Cell::new(0) }
    }

    /// The disk that is followed.
    pub fn source(&self) -> &Rc<Disk> {
        &self.source
    }

    /// What is to be copied.
    pub fn map(&self) -> &Rc<DirtyMap> {
        &self.map
    }

    /// True if changes go through.
    pub fn goes_through(&self) -> bool {
        self.through.get()
    }

    /// Copies a run: what the caller has found there to be data, or zeroes. Gives up with `Cancelled` when `abort` is thrown before anything was
    /// changed. Must be polled to its end.
    ///
    /// # Errors
    /// Those of the source and the target.
    pub async fn copy(&self, run: Range<u64>, zero: bool, abort: &Abort) -> Result<Copied, Failed> {
        if self.through.get() {
            let locked = self.source.range_lock().acquire(Token::for_request(), run.clone(), Mode::Shared);
            let _guard = abort.guard(locked).await.map_err(|error| Operation::Read.failed(error))?;
            // What was found may be out of date, and nobody has marked it.
            // race-mark: follow-second-look
            return self.copy_what_is_there(run, Some(abort)).await;
        }
        let _unlocked = Unlocked::begin(&self.unlocked);
        let data = async {
            if zero { Ok(None) } else { self.source.read_beside_guests(run.clone()).await.map(Some) }
        };
        let data = abort.guard(data).await.and_then(|read| read);
        // race-mark: transfer-read-then-write
        let data = data.map_err(|error| Operation::Read.failed(error))?;
        self.write(run, data).await
    }

    async fn write(&self, range: Range<u64>, data: Option<Buffer>) -> Result<Copied, Failed> {
        let len = range.end - range.start;
        let (copied, written) = match data {
            Some(data) => {
                let copied = Copied { fetched: len, data: len, ..Copied::default() };
                (copied, self.to_target(self.target.write(range.start, data, WriteFlags::default())).await)
            }
            None => {
                let flags = ZeroFlags { unmap: true, ..ZeroFlags::default() };
                let copied = Copied { zero: len, ..Copied::default() };
                (copied, self.to_target(self.target.write_zeroes(range.start, len, flags)).await)
            }
        };
        written.map(|()| copied).map_err(|error| Operation::Write.failed(error))
    }

    /// Carries out a request to the target.
    async fn to_target(&self, request: impl Future<Output = Result<()>>) -> Result<()> {
        self.target.recallable(&self.given_up, request).await
    }

    /// Copies a range that somebody holds the lock over.
    async fn copy_what_is_there(&self, range: Range<u64>, abort: Option<&Abort>) -> Result<Copied, Failed> {
        let top = self.source.top();
        let mut all = Copied::default();
        let mut at = range.start;
        while at < range.end {
            let look = async {
                let extent = chain::status(&top, at..range.end, self.above.as_ref()).await?;
                let end = extent.end().min(range.end);
                let data = extent.kind == ExtentKind::Data;
                let end = if data { end.min(at + STEP) } else { end };
                let read = match data {
                    true => Some(top.read(at, BufferMut::new((end - at) as usize)).await?.freeze()),
                    false => None,
                };
                let absent = extent.kind == ExtentKind::Unallocated && self.above.is_some();
                Ok((end, read, absent))
            };
            let looked = match abort {
                Some(abort) => abort.guard(look).await.and_then(|looked| looked),
                None => look.await,
            };
            let (end, data, absent) = looked.map_err(|error| Operation::Read.failed(error))?;
            if !absent {
                let copied = self.write(at..end, data).await?;
                all.fetched += copied.fetched;
                all.data += copied.data;
                all.zero += copied.zero;
            }
            at = end;
        }
        Ok(all)
    }

    /// Carries out on the target what a guest has done, under his lock. True if it need not be marked.
    pub(crate) async fn pass_on(&self, range: &Range<u64>, changed: Changed) -> bool {
        let none_older = self.unlocked.get() == 0;
        let len = range.end - range.start;
        let done = match changed {
            Changed::Data(data) => {
                self.to_target(self.target.write(range.start, data, WriteFlags::default())).await
            }
            Changed::Zeroes { unmap } => {
                let flags = ZeroFlags { unmap, ..ZeroFlags::default() };
                self.to_target(self.target.write_zeroes(range.start, len, flags)).await
            }
            Changed::Discarded => {
                self.copy_what_is_there(range.clone(), None).await.map(|_| ()).map_err(|failed| failed.error)
            }
        };
        // race-mark: follow-passed-on
        done.is_ok() && none_older
    }
}

/// A copy in flight that holds no lock.
struct Unlocked<'a>(&'a Cell<usize>);

impl<'a> Unlocked<'a> {
    fn begin(count: &'a Cell<usize>) -> Self {
        count.set(count.get() + 1);
        Self(count)
    }
}

impl Drop for Unlocked<'_> {
    fn drop(&mut self) {
        self.0.set(self.0.get() - 1);
    }
}
