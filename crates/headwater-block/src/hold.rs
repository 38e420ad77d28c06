//! Held requests: what clients ask of a disk while a source can't be reached waits instead of failing.
//!
//! # The way of a held request
//! 1. [`Client`] carries a request out as ever: through the edge, past the disk's gate, under the range lock. If it fails in a way that may pass
//!    ([`crate::ErrorKind::may_pass`]) and the disk has the patience ([`crate::DiskOptions::patience`]), it is held.
//! 2. **A held request holds nothing**: it has left the range lock, the fetch lock, the gate and the edge. So no drain, no snapshot and no job's end
//!    waits for it, and the graph may put another disk in its place meanwhile. That is why requests are held here, in front of the edge, and
//!    not in the disk: below a filter, the disks above would have let it in.
//! 3. It tries the whole way again after a pause that grows, with jitter; at once when somebody else's read of the source succeeds; and a last
//!    time when patience ends. Then its last error is the client's.
//!
//! # Which requests
//! - **Reads and questions for the status**, whichever layer failed.
//! - **Changes**, for what they must read: parts of a block or of a cluster that they don't cover. The bytes needed are first brought up into the
//!   overlay ([`crate::copy_up`]), which takes no lock of the guests' while it reads, and then the change is made anew. A change is only held if
//!   the top layer isn't remote itself: what a target out of reach had acknowledged may be lost, and the client must hear of it. To make a change
//!   twice is harmless: until it was answered, nobody may rely on what it left.
//!
//! # Fairness and cancellation
//! All who are held are woken together, and go on in the order in which they are polled; no one waits behind another. When the client leaves
//! ([`Client`] is given an [`Abort`]), its held requests end at once with the error that they have, and so do reads of the source for its sake. They
//! must be driven to their ends all the same: the attempt of the moment may change the overlay.

use crate::abort::Abort;
use crate::backoff::Backoff;
use crate::buffer::Buffer;
use crate::copy_up::{CopyUpOptions, Operation};
use crate::disk::Disk;
use crate::edge::{Edge, Entered};
use crate::error::{Error, Result};
use crate::extent::Extent;
use crate::node::{LocalFuture, WriteFlags, ZeroFlags};
use futures_util::future::select;
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::future::poll_fn;
use std::ops::Range;
use std::pin::pin;
use std::rc::Rc;
use std::task::{Poll, Waker};
use std::time::Duration;

/// The first and the longest pause before a held request is tried again.
const PAUSES: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(2));

/// Whether a disk's source can be reached, and who waits for that.
#[derive(Debug, Default)]
pub struct Outage {
    since: Cell<Option<Duration>>,
    outages: Cell<u64>,
    next: Cell<u64>,
    waiting: RefCell<BTreeMap<u64, Waker>>,
}

impl Outage {
    /// Since when it can't be reached, by the disk's clock; none if nothing is known to be wrong.
    pub fn since(&self) -> Option<Duration> {
        self.since.get()
    }

    /// How often it was out of reach.
    pub fn outages(&self) -> u64 {
        self.outages.get()
    }

    /// Takes note of how a read of the source failed.
    pub(crate) fn note(&self, error: &Error, now: Duration) {
        if error.kind().may_pass() && self.since.get().is_none() {
            self.since.set(Some(now));
            self.outages.set(self.outages.get() + 1);
        }
    }

    /// A read of the source has succeeded.
    pub(crate) fn ends(&self) {
        if self.since.take().is_some() {
            // race-mark: outage-ends
            for waker in std::mem::take(&mut *self.waiting.borrow_mut()).into_values() {
                waker.wake();
            }
        }
    }

    /// Completes when a read of the source has succeeded. At once if nothing is known to be wrong.
    pub async fn over(&self) {
        /// Forgets a waiter's waker when it goes.
        struct Registration<'a>(&'a Outage, u64);
        impl Drop for Registration<'_> {
            fn drop(&mut self) {
                self.0.waiting.borrow_mut().remove(&self.1);
            }
        }
        let id = self.next.get();
        self.next.set(id + 1);
        let registration = Registration(self, id);
        // Whoever comes later in an outage waits for its end, and one that begins anew before this is polled counts as the same.
        poll_fn(|cx| {
            if self.since.get().is_none() {
                return Poll::Ready(());
            }
            self.waiting.borrow_mut().insert(registration.1, cx.waker().clone());
            Poll::Pending
        })
        .await;
    }
}

/// How a client's requests reach a disk; see the module.
pub struct Client {
    edge: Rc<Edge>,
    leaves: Rc<Abort>,
}

/// A request that is held: counted as long as this lives.
struct Held {
    disk: Rc<Disk>,
    since: Duration,
}

impl Held {
    fn new(disk: Rc<Disk>) -> Self {
        let stats = disk.stats();
        stats.held.set(stats.held.get() + 1);
        stats.held_in_all.set(stats.held_in_all.get() + 1);
        let since = disk.clock().now();
        Self { disk, since }
    }

    fn waited(&self) -> Duration {
        self.disk.clock().now().saturating_sub(self.since)
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let stats = self.disk.stats();
        stats.held.set(stats.held.get() - 1);
        stats.longest_hold.set(stats.longest_hold.get().max(self.waited()));
    }
}

impl Client {
    /// A client of the disk that `edge` leads to. Its requests are held until `leaves` is thrown.
    pub fn new(edge: Rc<Edge>, leaves: Rc<Abort>) -> Self {
        Self { edge, leaves }
    }

    /// The disk of the moment: to ask what it is, not for requests.
    pub fn disk(&self) -> Rc<Disk> {
        self.edge.disk()
    }

    /// Lets a request in that is never held, and gives it the disk that it is for.
    pub async fn enter(&self) -> Entered {
        self.edge.enter().await
    }

    /// As [`Disk::read`], and must be driven to its end as that.
    ///
    /// # Errors
    /// As there.
    pub async fn read(&self, offset: u64, len: u64) -> Result<Buffer> {
        let data = self.read_unless_zero(offset, len).await?;
        Ok(data.unwrap_or_else(|| Buffer::zeroed(len as usize)))
    }

    /// As [`Disk::read_unless_zero`], and must be driven to its end as that.
    ///
    /// # Errors
    /// As there.
    pub async fn read_unless_zero(&self, offset: u64, len: u64) -> Result<Option<Buffer>> {
        let leaves = Some(&self.leaves);
        // Not within the match, where it would stay in the edge while it is held.
        let done = self.edge.enter().await.read_until(offset, len, leaves).await;
        match done {
            Err(error) if error.kind().may_pass() => {
                self.hold(error, async move |disk| disk.read_until(offset, len, leaves).await).await
            }
            done => done,
        }
    }

    /// As [`Disk::block_status`].
    ///
    /// # Errors
    /// As there.
    pub async fn block_status(&self, range: Range<u64>, max: usize) -> Result<Vec<Extent>> {
        // Not within the match, where it would stay in the edge while it is held.
        let done = self.edge.enter().await.block_status(range.clone(), max).await;
        match done {
            Err(error) if error.kind().may_pass() => {
                self.hold(error, async |disk| disk.block_status(range.clone(), max).await).await
            }
            done => done,
        }
    }

    /// As [`Disk::write`], and must be driven to its end as that.
    ///
    /// # Errors
    /// As there.
    pub async fn write(&self, offset: u64, data: Buffer, flags: WriteFlags) -> Result<()> {
        let range = offset..offset.saturating_add(data.len() as u64);
        // Not within the match, where it would stay in the edge while it is held.
        let done = self.edge.enter().await.write(offset, data.clone(), flags).await;
        match done {
            Err(error) if self.may_hold_change(&error) => {
                self.hold_change(error, range, async |disk| disk.write(offset, data.clone(), flags).await)
                    .await
            }
            done => done,
        }
    }

    /// As [`Disk::write_zeroes`], and must be driven to its end as that.
    ///
    /// # Errors
    /// As there.
    pub async fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> Result<()> {
        let range = offset..offset.saturating_add(len);
        // Not within the match, where it would stay in the edge while it is held.
        let done = self.edge.enter().await.write_zeroes(offset, len, flags).await;
        match done {
            Err(error) if self.may_hold_change(&error) => {
                self.hold_change(error, range, async |disk| disk.write_zeroes(offset, len, flags).await).await
            }
            done => done,
        }
    }

    /// As [`Disk::settle`], for what this client has changed.
    ///
    /// # Errors
    /// As there.
    pub async fn settle(&self, range: Range<u64>) -> Result<()> {
        if range.is_empty() || self.disk().top().is_settled(range.clone()) {
            return Ok(());
        }
        self.edge.enter().await.settle(range).await
    }

    /// True if a change that failed may have failed for what it must read.
    fn may_hold_change(&self, error: &Error) -> bool {
        let top = self.disk().top();
        error.kind().may_pass() && !top.limits().remote && top.backing().is_some()
    }

    /// Holds a change that failed with `error`, until what it needs of the source was brought up and it ends otherwise.
    async fn hold_change(
        &self,
        error: Error,
        range: Range<u64>,
        attempt: impl AsyncFn(&Rc<Disk>) -> Result<()>,
    ) -> Result<()> {
        let attempt = async |disk: &Rc<Disk>| {
            // Of what lies below a filter, only the disk there has the locks.
            if disk.top().filtered().is_none() {
                disk.bring_up_edges(range.clone(), &self.leaves).await?;
            }
            // race-mark: held-change-again
            attempt(disk).await
        };
        self.hold(error, attempt).await
    }

    /// Holds a request that failed with `error`, until `attempt` ends otherwise. Apart from the way that requests take as a rule, and boxed,
    /// because its state would make theirs larger.
    fn hold<'a, T: 'a>(
        &'a self,
        mut error: Error,
        attempt: impl AsyncFn(&Rc<Disk>) -> Result<T> + 'a,
    ) -> LocalFuture<'a, Result<T>> {
        Box::pin(async move {
            if !self.disk().options().patience.lasts(Duration::ZERO) {
                return Err(error);
            }
            let held = Held::new(self.disk());
            let mut backoff = Backoff::new(PAUSES.0, PAUSES.1, held.disk.stats().held_in_all.get());
            loop {
                // The graph may have put another one here.
                let disk = self.disk();
                let (patience, waited) = (disk.options().patience, held.waited());
                if !patience.lasts(waited) || self.leaves.is_aborted() {
                    return Err(held_for(error, waited));
                }
                let now = disk.clock().now();
                disk.outage().note(&error, now);
                let pause = backoff.pause();
                // The last attempt is made when patience ends, not before.
                let pause = patience.rest(waited).map_or(pause, |rest| rest.min(pause));
                // race-mark: request-held
                let over = pin!(disk.outage().over());
                let again = select(disk.clock().sleep_until(now + pause), over);
                if self.leaves.guard(again).await.is_err() {
                    return Err(held_for(error, held.waited()));
                }
                let retries = &held.disk.stats().retries;
                retries.set(retries.get() + 1);
                error = match attempt(&*self.edge.enter().await).await {
                    Err(error) if error.kind().may_pass() => error,
                    Ok(done) => {
                        disk.outage().ends();
                        return Ok(done);
                    }
                    failed => return failed,
                }
            }
        })
    }
}

/// Adds how long a request was held.
fn held_for(error: Error, waited: Duration) -> Error {
    if waited.is_zero() {
        return error;
    }
    Error::new(error.kind(), format!("{error} (held for {:.1} s)", waited.as_secs_f32()))
}

impl Disk {
    /// Brings up what a change of `range` needs of the layers below, so that it no longer needs them: the units at its ends that it doesn't
    /// cover. Must be driven to its end.
    ///
    /// # Errors
    /// Those of the source, and `Cancelled` if the client leaves. That of the overlay is left for the change itself to meet.
    async fn bring_up_edges(self: &Rc<Self>, range: Range<u64>, leaves: &Rc<Abort>) -> Result<()> {
        let options =
            CopyUpOptions { detect_zeroes: true, abort: Some(leaves.clone()), ..CopyUpOptions::default() };
        let units = self.whole_units(range.clone());
        let unit = u64::from(self.limits().allocation_unit);
        let first = units.start..(units.start + unit).min(units.end);
        let last = (range.end - range.end % unit).max(units.start)..units.end;
        let mut edges = Vec::new();
        if units.start != range.start || first.end > range.end {
            edges.push(first.clone());
        }
        if last != first && last.start < range.end && units.end != range.end {
            edges.push(last);
        }
        for edge in edges {
            match self.copy_up(edge, &options).await {
                Err(failed) if failed.operation == Operation::Read => return Err(failed.error),
                _ => {}
            }
        }
        Ok(())
    }
}
