//! Copy before write: another disk gets what a disk held at one moment, however it is changed afterwards.
//!
//! A [`PointInTime`] stands for that moment. What isn't in the target yet is *pending*, in granules. The one who made it copies all of it in his
//! own time ([`PointInTime::copy`]); a guest's change of pending bytes waits until the old ones are in the target ([`Disk`] sees to it).
//!
//! # Why the target gets what was there at that moment
//! - **It begins between changes.** [`Disk::begin_point_in_time`] lets no change in and waits for those that run, marks everything as pending,
//!   and lets them in again. So a change is wholly before the moment, or finds its bytes pending.
//! - **Pending bytes are as they were.** Whoever changes the disk holds the range lock over what he changes. [`Disk`] widens it to whole granules,
//!   *exclusively*, if any of them is pending, and asks again once it is held. Under the lock the old bytes go to the target, then the
//!   granules are no longer pending, and only then they are changed.
//! - **The copier looks again under the lock.** It holds the range lock *shared* over the granules that it copies, from the look at the map until
//!   they are in the target. Against each other the two are exclusive: so no bytes change between a copier's read and its note that they are saved,
//!   and an old copy can't land on top of a newer one. Guests may read meanwhile, and change what isn't pending.
//! - **Nothing becomes pending again.** A copy that failed, or was given up half-way, leaves its granules pending; the target gets them anew.
//!
//! Copy-ups, and whatever else moves bytes without changing what is read, need not wait: what a granule reads as is the same before and after.
//!
//! # Locks
//! A holder of the source's range lock asks for that of the target. The other way round there must be none: so the target's layers must not lead to
//! the source. (A target with the source as its backing would also read mappings of the source that are being changed.)
//!
//! # When it can't be copied
//! The guest's change fails with that error, and changes nothing. (QEMU calls that `break-guest-write`; it is what its backup job does.) The copy stays
//! whole, and its maker finds out when it comes by itself. Or, with [`OnUnsaved::BreakCopy`], the change is made and the copy is worth nothing from then on.
//!
//! With a time limit ([`Policy::timeout`]) the same happens when saving takes longer. A write to the target that is under way can't be dropped: it is kept, and
//! driven on by the next change that has something to save ([`PointInTime::end`] at the latest). Its granules are still pending, so nothing is changed there before.
//!
//! How it is read: `reading`.

mod reading;

use crate::abort::Abort;
use crate::buffer::{Buffer, BufferMut};
use crate::chain::{self, Missing};
use crate::copy_up::{Copied, Failed, Operation};
use crate::dirty_map::DirtyMap;
use crate::disk::Disk;
use crate::error::{Error, ErrorKind, Result};
use crate::extent::ExtentKind;
use crate::node::{LocalFuture, Node, WriteFlags, ZeroFlags};
use crate::range_lock::{Mode, Token};
use futures_util::future::{Either, Shared, select};
use futures_util::{FutureExt, StreamExt, stream};
use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::ops::Range;
use std::pin::pin;
use std::rc::Rc;
use std::task::{Poll, Waker};
use std::time::Duration;

/// How much one step of what a guest waits for moves, in bytes.
const STEP: u64 = 1 << 20;

/// How many of them are done at once.
const STEPS_AT_ONCE: usize = 8;

/// The most that a copier is given at once, in bytes: guests' changes of it wait meanwhile.
const MOST: u64 = 1 << 30;

/// What is done if bytes that a guest is about to change can't be saved.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum OnUnsaved {
    /// The change fails.
    #[default]
    RefuseChange,
    /// The change is made; the copy is worth nothing any more, and reading it fails.
    BreakCopy,
}

/// How the copy is made, and guests' changes are treated.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Policy {
    /// What is done if saving fails, or takes too long.
    pub on_unsaved: OnUnsaved,
    /// How long a change waits for what it saves; none is without limit.
    pub timeout: Option<Duration>,
    /// The target is asked to keep the copy compressed.
    pub compressed: bool,
}

/// A write to the target that outlives those who wait for it.
type Kept = Shared<LocalFuture<'static, Result<()>>>;

/// How a part of the disk is copied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Data,
    Zeroes,
    /// The target has it by itself.
    Nothing,
}

/// What a disk held at one moment; see the module.
pub struct PointInTime {
    source: Rc<Disk>,
    target: Rc<Disk>,
    /// What this node and those below it hold isn't copied.
    above: Option<Rc<dyn Node>>,
    pending: DirtyMap,
    /// What nobody reads any more.
    forgotten: DirtyMap,
    policy: Cell<Policy>,
    /// Thrown when guests need not save anything any more. If it is a job's, what still waits for the target is recalled.
    over: Rc<Abort>,
    of_job: Cell<bool>,
    /// Why the copy is worth nothing.
    broken: RefCell<Option<Error>>,
    /// Writes to the target that may be waited for no longer.
    writes: RefCell<Vec<Kept>>,
    /// How many guests' changes are saving right now.
    saving: Cell<usize>,
    waiting: RefCell<Vec<Waker>>,
}

impl PointInTime {
    /// All of `source` is pending. The caller makes it known to the source, while no change runs.
    pub(crate) fn new(
        source: &Rc<Disk>,
        target: &Rc<Disk>,
        granularity: u64,
        above: Option<Rc<dyn Node>>,
    ) -> Rc<Self> {
        let unit = u64::from(target.limits().allocation_unit);
        let pending = DirtyMap::new(source.size(), granularity.max(unit));
        pending.mark(0..source.size());
        let forgotten = DirtyMap::new(source.size(), pending.granularity());
        Rc::new(Self {
            source: source.clone(),
            target: target.clone(),
            above,
            pending,
            forgotten,
            policy: Cell::default(),
            over: Abort::new(),
            of_job: Cell::new(false),
            broken: RefCell::default(),
            writes: RefCell::default(),
            saving: Cell::new(0),
            waiting: RefCell::default(),
        })
    }

    /// The disk that is copied.
    pub fn source(&self) -> &Rc<Disk> {
        &self.source
    }

    /// What this node and those below it hold isn't copied.
    pub fn above(&self) -> Option<&Rc<dyn Node>> {
        self.above.as_ref()
    }

    /// Where the copy is made.
    pub fn target(&self) -> &Rc<Disk> {
        &self.target
    }

    /// Goes on otherwise from now on.
    pub fn set_policy(&self, policy: Policy) {
        self.policy.set(policy);
    }

    /// Makes it a job's, which sees to it that the target is durable when it ends well. The answer ends it at once when it is thrown, as [`PointInTime::end`] does, but without
    /// waiting: guests save nothing more, and what waits for the target is given up where the target's layers can do that ([`crate::recall`]).
    pub fn give_to_job(&self) -> Rc<Abort> {
        self.of_job.set(true);
        self.over.clone()
    }

    fn is_over(&self) -> bool {
        self.over.is_aborted()
    }

    /// Why the copy is worth nothing, if it isn't.
    pub fn broken(&self) -> Option<Error> {
        self.broken.borrow().clone()
    }

    /// The size of a granule in bytes, a power of two.
    pub fn granularity(&self) -> u64 {
        self.pending.granularity()
    }

    /// How many bytes aren't in the target yet, in whole granules.
    pub fn pending(&self) -> u64 {
        self.pending.bytes()
    }

    /// The first pending run at or after `from`, in whole granules. It stays pending until it has been copied.
    pub fn next_pending(&self, from: u64) -> Option<Range<u64>> {
        self.pending.first(from..self.source.size(), MOST)
    }

    /// The first run in `range`, granules that [`PointInTime::next_pending`] has given, that a copy has something to do about. What needs no
    /// copy, because no layer that counts holds it, is noted as done. May be dropped.
    ///
    /// # Errors
    /// Those of the layers asked.
    pub async fn look(&self, range: Range<u64>) -> Result<Option<Missing>> {
        let top = self.source.top();
        let mut at = range.start;
        while let Some(run) = self.pending.first(at..range.end, MOST) {
            let (part, kind) = self.part(&top, run).await?;
            if kind != Kind::Nothing {
                return Ok(Some(Missing { range: part, zero: kind == Kind::Zeroes }));
            }
            at = part.end;
            // As long as it is pending nobody has written there: so it was so at that moment.
            self.pending.clear(part);
            self.changed();
        }
        Ok(None)
    }

    /// The first part of a run of granules that is copied in one way. Always whole granules, those of several kinds as data: so the target, whose
    /// units of allocation are no larger, never needs what it held before.
    async fn part(&self, top: &Rc<dyn Node>, run: Range<u64>) -> Result<(Range<u64>, Kind)> {
        let extent = chain::status(top, run.clone(), self.above.as_ref()).await?;
        let granule = self.granularity();
        let kind = match extent.kind {
            ExtentKind::Data => Kind::Data,
            ExtentKind::Unallocated if self.above.is_some() => Kind::Nothing,
            ExtentKind::Unallocated | ExtentKind::Zero => Kind::Zeroes,
        };
        let end = extent.end();
        if end >= run.end {
            return Ok((run, kind));
        }
        let whole = end - end % granule;
        if kind != Kind::Data && whole > run.start {
            return Ok((run.start..whole, kind));
        }
        Ok((run.start..end.next_multiple_of(granule).min(run.end), Kind::Data))
    }

    /// Copies what of `range`, whole granules, is still pending. Gives up with `Cancelled` when `abort` is thrown. Must be polled to its end.
    ///
    /// # Errors
    /// Those of the source and the target. What was not copied is still pending.
    pub async fn copy(&self, range: Range<u64>, abort: &Abort) -> Result<Copied, Failed> {
        let locked = self.source.range_lock().acquire(Token::for_request(), range.clone(), Mode::Shared);
        let _guard = abort.guard(locked).await.map_err(|error| Operation::Read.failed(error))?;
        let mut all = Copied::default();
        // race-mark: point-in-time-second-look
        while let Some(run) = self.pending.first(range.clone(), range.end - range.start) {
            let copied = self.save(run, Some(abort)).await?;
            all.fetched += copied.fetched;
            all.data += copied.data;
            all.zero += copied.zero;
        }
        Ok(all)
    }

    /// The granules of `range` if any of them is pending: what a change needs for itself.
    pub(crate) fn needs(&self, range: &Range<u64>) -> Option<Range<u64>> {
        if self.is_over() {
            return None;
        }
        self.pending.first(range.clone(), 1)?;
        let granule = self.granularity();
        let end = range.end.checked_next_multiple_of(granule).unwrap_or(range.end);
        Some(range.start - range.start % granule..end)
    }

    /// Saves what of `range` is pending. The caller has the granules for himself.
    pub(crate) async fn before_change(&self, range: &Range<u64>) -> Result<()> {
        if self.needs(range).is_none() {
            return Ok(());
        }
        let _saving = Saving::begin(self);
        let saved = match self.policy.get().timeout {
            None => self.save_all(range).await,
            Some(timeout) => {
                let clock = self.target.clock();
                let late = pin!(clock.sleep_until(clock.now() + timeout));
                match select(pin!(self.save_all(range)), late).await {
                    Either::Left((saved, _)) => saved,
                    Either::Right(_) => {
                        let message = format!("it takes longer than {} s", timeout.as_secs());
                        Err(Error::new(ErrorKind::TimedOut, message))
                    }
                }
            }
        };
        let error = match saved {
            Err(error) if !self.is_over() => error,
            // It is there, or nobody needs the copy any more.
            _ => return Ok(()),
        };
        if self.policy.get().on_unsaved == OnUnsaved::BreakCopy {
            self.broken.replace(Some(error));
            self.over.abort();
            return Ok(());
        }
        let message = format!(
            "{}: not changed, because what is there could not be copied to {} before: {error}",
            self.source.name(),
            self.target.name()
        );
        Err(Error::new(error.kind(), message))
    }

    async fn save_all(&self, range: &Range<u64>) -> Result<()> {
        self.drive_on().await;
        let mut at = range.start;
        let steps = std::iter::from_fn(|| {
            let run = self.pending.first(at..range.end, STEP).filter(|_| !self.is_over())?;
            at = run.end;
            Some(run)
        });
        // All are driven to their ends, also those beside one that failed.
        let first = stream::iter(steps)
            .map(|run| self.save(run, None))
            .buffer_unordered(STEPS_AT_ONCE)
            .fold(None, async |first: Option<Failed>, saved| first.or(saved.err()))
            .await;
        first.map_or(Ok(()), |failed| Err(failed.error))
    }

    /// Drives writes to their ends that nobody waits for any more. What became of them doesn't count: what they wrote is still pending.
    async fn drive_on(&self) {
        loop {
            let kept = self.writes.borrow().iter().find(|kept| kept.strong_count() == Some(1)).cloned();
            let Some(kept) = kept else { return };
            let _ = kept.clone().await;
            self.forget_write(&kept);
        }
    }

    fn forget_write(&self, write: &Kept) {
        self.writes.borrow_mut().retain(|other| !other.ptr_eq(write));
    }

    /// Writes to the target, or makes it read as zeroes without data. Dropped under a time limit it is kept.
    async fn write(&self, at: u64, len: u64, data: Option<Buffer>) -> Result<()> {
        let (target, over) = (self.target.clone(), self.of_job.get().then(|| self.over.clone()));
        let compressed = self.policy.get().compressed;
        let write = async move {
            let write = async {
                match data {
                    Some(data) => {
                        target.write(at, data, WriteFlags { compressed, ..WriteFlags::default() }).await
                    }
                    None => {
                        let flags = ZeroFlags { unmap: true, ..ZeroFlags::default() };
                        target.write_zeroes(at, len, flags).await
                    }
                }
            };
            match over {
                Some(over) => target.recallable(&over, write).await,
                None => write.await,
            }
        };
        if self.policy.get().timeout.is_none() {
            return write.await;
        }
        let write: LocalFuture<'static, Result<()>> = Box::pin(write);
        let write = write.shared();
        self.writes.borrow_mut().push(write.clone());
        let written = write.clone().await;
        self.forget_write(&write);
        written
    }

    /// Copies a pending run of whole granules. Somebody holds the lock over it.
    async fn save(&self, run: Range<u64>, abort: Option<&Abort>) -> Result<Copied, Failed> {
        let top = self.source.top();
        let mut copied = Copied::default();
        let mut at = run.start;
        while at < run.end {
            let look = async {
                let (part, kind) = self.part(&top, at..run.end).await?;
                let len = part.end - part.start;
                let data = match kind {
                    Kind::Data => Some(top.read(at, BufferMut::new(len as usize)).await?.freeze()),
                    Kind::Zeroes | Kind::Nothing => None,
                };
                Ok((kind, len, data))
            };
            let looked = match abort {
                Some(abort) => abort.guard(look).await.and_then(|looked| looked),
                None => look.await,
            };
            let (kind, len, data) = looked.map_err(|error| Operation::Read.failed(error))?;
            // race-mark: point-in-time-read-then-write
            let written = match data {
                Some(data) => {
                    copied.fetched += len;
                    copied.data += len;
                    self.write(at, len, Some(data)).await
                }
                None if kind == Kind::Zeroes => {
                    copied.zero += len;
                    self.write(at, len, None).await
                }
                None => Ok(()),
            };
            written.map_err(|error| Operation::Write.failed(error))?;
            at += len;
        }
        self.pending.clear(run);
        self.changed();
        Ok(copied)
    }

    /// Lets guests change what they like from now on, and waits for those who are saving something: nothing touches the target afterwards.
    pub async fn end(&self) {
        self.over.abort();
        // race-mark: point-in-time-ends
        self.wait_until(|point| point.saving.get() == 0).await;
        self.drive_on().await;
    }

    /// Waits until a condition is fulfilled, which depends on what is pending.
    pub async fn wait_until(&self, condition: impl Fn(&Self) -> bool) {
        poll_fn(|cx| {
            if condition(self) {
                return Poll::Ready(());
            }
            let mut waiting = self.waiting.borrow_mut();
            if !waiting.iter().any(|waker| waker.will_wake(cx.waker())) {
                waiting.push(cx.waker().clone());
            }
            Poll::Pending
        })
        .await;
    }

    fn changed(&self) {
        for waker in self.waiting.take() {
            waker.wake();
        }
    }
}

/// A guest's change that saves what was there.
struct Saving<'a>(&'a PointInTime);

impl<'a> Saving<'a> {
    fn begin(point: &'a PointInTime) -> Self {
        point.saving.set(point.saving.get() + 1);
        Self(point)
    }
}

impl Drop for Saving<'_> {
    fn drop(&mut self) {
        self.0.saving.set(self.0.saving.get() - 1);
        self.0.changed();
    }
}
