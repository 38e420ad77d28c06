//! How long guests' requests take, with copies in flight beside them and without: what a job needs to know to get out of their way.
//!
//! A meter counts each request in one of a fixed number of buckets by the logarithm of its time. That costs two looks at the clock and one
//! addition; while nobody watches, a branch. It says nothing about single requests and remembers no order.
//!
//! A request is *quiet* if no copy was in flight from its start to its end. What quiet requests take is what the storage and the source
//! take without us; only by comparison with that does it mean anything what the others take.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::task::{Context, Waker};
use std::time::Duration;

/// Buckets for each doubling: neighbours differ by 9 %.
const PER_DOUBLING: usize = 8;

/// Below 4 us and above 68 s nothing is told apart.
const DOUBLINGS: std::ops::Range<u32> = 12..36;

/// How many buckets there are.
const BUCKETS: usize = (DOUBLINGS.end - DOUBLINGS.start) as usize * PER_DOUBLING;

/// How requests are told apart, because they take different times.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A read of what the top holds.
    Read,
    /// A read of what a layer below supplies.
    Miss,
    /// A write.
    Write,
}

impl Kind {
    /// All of them.
    pub const ALL: [Kind; 3] = [Kind::Read, Kind::Miss, Kind::Write];
}

/// Times, counted in buckets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Histogram {
    counts: [u32; BUCKETS],
    total: u32,
}

impl Default for Histogram {
    fn default() -> Self {
        Self { counts: [0; BUCKETS], total: 0 }
    }
}

impl Histogram {
    /// Which bucket a time is in.
    fn bucket(time: Duration) -> usize {
        let nanos = u64::try_from(time.as_nanos())
            .unwrap_or(u64::MAX)
            .clamp(1 << DOUBLINGS.start, (1 << DOUBLINGS.end) - 1);
        let doubling = nanos.ilog2();
        let part = (nanos >> (doubling - PER_DOUBLING.ilog2())) as usize % PER_DOUBLING;
        (doubling - DOUBLINGS.start) as usize * PER_DOUBLING + part
    }

    /// The times in a bucket are shorter than this.
    fn end(bucket: usize) -> Duration {
        let doubling = DOUBLINGS.start + (bucket / PER_DOUBLING) as u32;
        let part = (bucket % PER_DOUBLING) as u64 + 1;
        Duration::from_nanos((1 << doubling) + (part << (doubling - PER_DOUBLING.ilog2())))
    }

    /// Counts a time.
    pub fn add(&mut self, time: Duration) {
        let count = &mut self.counts[Self::bucket(time)];
        *count = count.saturating_add(1);
        self.total = self.total.saturating_add(1);
    }

    /// Counts all that another one has counted.
    pub fn add_all(&mut self, other: &Histogram) {
        for (count, more) in self.counts.iter_mut().zip(&other.counts) {
            *count = count.saturating_add(*more);
        }
        self.total = self.total.saturating_add(other.total);
    }

    /// How many times were counted.
    pub fn len(&self) -> u32 {
        self.total
    }

    /// True if none was.
    pub fn is_empty(&self) -> bool {
        self.total == 0
    }

    /// How many of them are longer than `limit`. Those in its own bucket are not.
    pub fn over(&self, limit: Duration) -> u32 {
        self.counts[Self::bucket(limit) + 1..].iter().sum()
    }

    /// The time that `part` (of 1) of them don't exceed, rounded up by 9 % at most. None if nothing was counted.
    pub fn quantile(&self, part: f64) -> Option<Duration> {
        let rank = ((f64::from(self.total) * part).ceil() as u32).max(1);
        let mut below = 0;
        let bucket = self.counts.iter().position(|count| {
            below += count;
            below >= rank
        })?;
        Some(Self::end(bucket))
    }

    /// Halves every count, so that what is counted from now on weighs more.
    pub fn fade(&mut self) {
        self.total = 0;
        for count in &mut self.counts {
            *count /= 2;
            self.total += *count;
        }
    }
}

/// What a meter has counted since it was last asked, by [`Kind`].
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Seen {
    /// Requests during which no copy was in flight.
    pub quiet: [Histogram; 3],
    /// The others.
    pub busy: [Histogram; 3],
    /// Requests that came, of any sort, counted or not.
    pub came: u32,
    /// Requests that ended.
    pub went: u32,
}

/// The meter of one disk; see the module.
#[derive(Default)]
pub struct GuestLatency {
    watchers: Cell<u32>,
    copies: Cell<u32>,
    /// Copies that ever began.
    begun: Cell<u64>,
    seen: RefCell<Seen>,
    waiting: Cell<Option<Waker>>,
}

/// The start of a request, as [`GuestLatency`] remembers it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Start {
    at: Duration,
    /// No copy was in flight; how many had begun.
    quiet: Option<u64>,
}

impl GuestLatency {
    /// Counts from now on, until the answer is dropped.
    pub fn watch(self: &Rc<Self>) -> Watching {
        if self.watchers.get() == 0 {
            self.seen.take();
        }
        self.watchers.set(self.watchers.get() + 1);
        Watching(self.clone())
    }

    /// True if somebody watches: only then need the clock be asked.
    pub(crate) fn is_watched(&self) -> bool {
        self.watchers.get() > 0
    }

    /// A guest's request comes.
    pub(crate) fn comes(&self, now: Duration) -> Start {
        self.seen.borrow_mut().came += 1;
        Start { at: now, quiet: (self.copies.get() == 0).then(|| self.begun.get()) }
    }

    /// A guest's request goes. Those of no kind are not measured.
    pub(crate) fn goes(&self, kind: Option<Kind>, start: Start, now: Duration) {
        let mut seen = self.seen.borrow_mut();
        seen.went += 1;
        if let Some(kind) = kind {
            let quiet = start.quiet == Some(self.begun.get());
            let side = if quiet { &mut seen.quiet } else { &mut seen.busy };
            side[kind as usize].add(now.saturating_sub(start.at));
        }
        drop(seen);
        if let Some(waker) = self.waiting.take() {
            waker.wake();
        }
    }

    /// A copy is in flight for as long as the answer lives.
    pub fn copying(self: &Rc<Self>) -> Copying {
        self.copies.set(self.copies.get() + 1);
        self.begun.set(self.begun.get() + 1);
        Copying(self.clone())
    }

    /// What was counted since the last time.
    pub fn take(&self) -> Seen {
        // Most of the time nothing was, and a look is cheaper than a copy of all buckets.
        let mut seen = self.seen.borrow_mut();
        if seen.came == 0 && seen.went == 0 { Seen::default() } else { std::mem::take(&mut *seen) }
    }

    /// True if a request went since the last time.
    pub fn has_news(&self) -> bool {
        self.seen.borrow().went > 0
    }

    /// Wakes the caller's task when the next request goes. One task at a time waits.
    pub fn wake_when_one_goes(&self, cx: &Context<'_>) {
        self.waiting.set(Some(cx.waker().clone()));
    }
}

/// Somebody watches; see [`GuestLatency::watch`].
#[must_use = "nothing is counted when this is dropped"]
pub struct Watching(Rc<GuestLatency>);

impl Watching {
    /// What is watched.
    pub fn meter(&self) -> &Rc<GuestLatency> {
        &self.0
    }
}

impl Drop for Watching {
    fn drop(&mut self) {
        self.0.watchers.set(self.0.watchers.get() - 1);
    }
}

/// A copy is in flight; see [`GuestLatency::copying`].
#[must_use = "the copy is over when this is dropped"]
pub struct Copying(Rc<GuestLatency>);

impl Drop for Copying {
    fn drop(&mut self) {
        self.0.copies.set(self.0.copies.get() - 1);
    }
}

#[cfg(test)]
mod tests;
