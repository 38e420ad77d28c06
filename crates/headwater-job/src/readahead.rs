//! Reading ahead of guests whose reads miss: a guest that reads on and on waits for the source at each step, unless what it will want next is there
//! already.
//!
//! The policy is that of an operating system's page cache. A miss where the last reads ended is part of a *run*; a run has a **window**, which is copied ahead of it. It
//! begins small, doubles each time that the guest has come half-way through, up to a bound, and halves, for all runs, with every miss that
//! belongs to none. A few runs are remembered, because guests do several things at once.
//!
//! What is wanted is copied by the engine, as everything else is: through copy-up, within a bound of what is in flight, at the job's speed limit, and given up
//! and forgotten at a pause, a cancel, or the end. If it fails nothing is lost: the guest asks itself, and the job comes by later.

use headwater_block::copy_up::CopyUpOptions;
use headwater_block::disk::ReadWatch;
use headwater_block::{Abort, Disk, LocalFuture, Node};
use std::cell::RefCell;
use std::collections::VecDeque;
use std::ops::Range;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

/// The first window of a run, in bytes.
const FIRST: u64 = 128 << 10;

/// How many runs are remembered.
const RUNS: usize = 8;

/// The largest copy that is made ahead, in bytes: large enough for a good rate, small enough that its start is soon there.
const COPY: u64 = 512 << 10;

/// The policy: pure.
#[derive(Debug)]
struct Policy {
    most: u64,
    /// The one that was used last at the end.
    runs: Vec<GuestRun>,
}

/// Reads of a guest that follow each other.
#[derive(Debug)]
struct GuestRun {
    /// Where it reads next.
    next: u64,
    /// Up to here is, or was, copied ahead.
    until: u64,
    window: u64,
}

impl Policy {
    fn new(most: u64) -> Self {
        Self { most, runs: Vec::new() }
    }

    /// A guest reads `range`; what is to be copied ahead of it.
    fn reads(&mut self, range: &Range<u64>) -> Option<Range<u64>> {
        let at = self.runs.iter().position(|run| run.next == range.start)?;
        let mut run = self.runs.remove(at);
        run.next = range.end;
        run.until = run.until.max(range.end);
        let half_way = run.window > 0 && run.until - run.next <= run.window / 2;
        let wanted = half_way.then(|| run.grow(self.most));
        self.runs.push(run);
        wanted
    }

    /// The read of `range`, which was told of before, has missed.
    fn misses(&mut self, range: &Range<u64>) -> Option<Range<u64>> {
        match self.runs.iter_mut().find(|run| run.next == range.end) {
            // The second miss in a row: it is a run.
            Some(run) if run.window == 0 => Some(run.grow(self.most)),
            Some(_) => None,
            None => {
                self.runs.iter_mut().for_each(|run| run.window /= 2);
                if self.runs.len() == RUNS {
                    self.runs.remove(0);
                }
                self.runs.push(GuestRun { next: range.end, until: range.end, window: 0 });
                None
            }
        }
    }
}

impl GuestRun {
    fn grow(&mut self, most: u64) -> Range<u64> {
        self.window = (self.window * 2).clamp(FIRST.min(most), most);
        let from = self.until;
        self.until = self.until.max(self.next.saturating_add(self.window));
        from..self.until
    }
}

struct State {
    policy: Policy,
    wanted: VecDeque<Range<u64>>,
    waker: Option<Waker>,
}

/// What a stream copies ahead of its disk's guests; see the [module](self).
pub(crate) struct Readahead {
    disk: Rc<Disk>,
    base: Option<Rc<dyn Node>>,
    detect_zeroes: bool,
    most: u64,
    state: RefCell<State>,
}

impl Readahead {
    /// For the guests of `disk`, with at most `most` bytes ahead.
    pub(crate) fn start(
        disk: &Rc<Disk>,
        base: Option<Rc<dyn Node>>,
        detect_zeroes: bool,
        most: u64,
    ) -> Rc<Self> {
        let state = State { policy: Policy::new(most), wanted: VecDeque::new(), waker: None };
        let this =
            Rc::new(Self { disk: disk.clone(), base, detect_zeroes, most, state: RefCell::new(state) });
        let watch: Rc<dyn ReadWatch> = this.clone();
        disk.watch_reads(&watch);
        this
    }

    /// How much may be in flight, in bytes.
    pub(crate) fn most(&self) -> u64 {
        self.most
    }

    /// The next range to copy.
    pub(crate) fn take(&self) -> Option<Range<u64>> {
        let mut state = self.state.borrow_mut();
        let first = state.wanted.front_mut()?;
        let end = (first.start / COPY + 1).saturating_mul(COPY).min(first.end);
        let taken = first.start..end;
        first.start = end;
        if first.is_empty() {
            state.wanted.pop_front();
        }
        Some(taken)
    }

    /// Forgets what is wanted.
    pub(crate) fn forget(&self) {
        self.state.borrow_mut().wanted.clear();
    }

    /// Ready when something is wanted.
    pub(crate) fn poll_wanted(&self, cx: &mut Context<'_>) -> Poll<()> {
        let mut state = self.state.borrow_mut();
        if !state.wanted.is_empty() {
            return Poll::Ready(());
        }
        state.waker = Some(cx.waker().clone());
        Poll::Pending
    }

    /// Copies `range` when it has leave. Is polled to its end.
    pub(crate) fn copy(
        self: Rc<Self>,
        range: Range<u64>,
        leave: impl Future<Output = ()> + 'static,
        abort: Rc<Abort>,
    ) -> LocalFuture<'static, ()> {
        Box::pin(async move {
            if abort.guard(leave).await.is_err() {
                return;
            }
            let options = CopyUpOptions {
                base: self.base.clone(),
                detect_zeroes: self.detect_zeroes,
                abort: Some(abort),
                known: None,
            };
            if let Err(failed) = self.disk.copy_up(range, &options).await {
                tracing::debug!("reading ahead of a guest: {}", failed.error);
            }
        })
    }

    fn want(&self, decide: impl FnOnce(&mut Policy) -> Option<Range<u64>>) {
        let mut state = self.state.borrow_mut();
        let Some(wanted) = decide(&mut state.policy) else { return };
        let size = self.disk.size();
        let wanted = wanted.start.min(size)..wanted.end.min(size);
        let waiting: u64 = state.wanted.iter().map(|range| range.end - range.start).sum();
        // Guests that are faster than the source don't make it longer and longer.
        if wanted.is_empty() || waiting >= self.most {
            return;
        }
        state.wanted.push_back(wanted);
        if let Some(waker) = state.waker.take() {
            waker.wake();
        }
    }
}

impl ReadWatch for Readahead {
    fn reads(&self, range: &Range<u64>) {
        self.want(|policy| policy.reads(range));
    }

    fn misses(&self, range: &Range<u64>) {
        self.want(|policy| policy.misses(range));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KIB: u64 = 1 << 10;

    /// A guest reads and misses.
    fn miss(policy: &mut Policy, range: Range<u64>) -> Option<Range<u64>> {
        let wanted = policy.reads(&range);
        wanted.or(policy.misses(&range))
    }

    #[test]
    fn a_run_has_a_window_that_doubles_up_to_the_bound() {
        let mut policy = Policy::new(400 * KIB);
        assert_eq!(miss(&mut policy, 0..4 * KIB), None);
        assert_eq!(miss(&mut policy, 4 * KIB..8 * KIB), Some(8 * KIB..136 * KIB));
        // Nothing until half of it has been read.
        assert_eq!(policy.reads(&(8 * KIB..68 * KIB)), None);
        assert_eq!(policy.reads(&(68 * KIB..72 * KIB)), Some(136 * KIB..(72 + 256) * KIB));
        assert_eq!(policy.reads(&(72 * KIB..300 * KIB)), Some(328 * KIB..700 * KIB));
        assert_eq!(policy.reads(&(300 * KIB..650 * KIB)), Some(700 * KIB..1050 * KIB));
    }

    #[test]
    fn misses_here_and_there_want_nothing_and_shrink_what_there_is() {
        let mut policy = Policy::new(8 << 20);
        for at in [50, 3, 99, 7, 1000, 2000, 4000, 8000, 16000] {
            assert_eq!(miss(&mut policy, at << 20..(at << 20) + 4096), None);
        }
        assert_eq!(policy.runs.len(), RUNS);
        let mut policy = Policy::new(8 << 20);
        miss(&mut policy, 0..KIB);
        miss(&mut policy, KIB..2 * KIB);
        miss(&mut policy, 7 << 20..(7 << 20) + KIB);
        assert_eq!(policy.runs.iter().map(|run| run.window).max(), Some(FIRST / 2));
    }
}
