//! Where an export has holes, asked with long requests and remembered.
//!
//! One request covers up to 4 GiB, or 16 TiB with extended headers, so that a walk over a large sparse disk costs few round trips. Several who ask for the same
//! area share one request, which is made by a task of its own: any of them may lose interest.
//!
//! What is remembered must never say "zero" of bytes that this node has written since. Each change of the export bumps a
//! generation when it starts and when it ends; an answer is remembered, and shared with those who come later, only if the
//! generation is still the one at which it was asked for, and no change is under way.

use super::connection::{Answer, LONGEST_COMPACT};
use super::extent_map::ExtentMap;
use super::pool::Pool;
use super::{Attempts, NbdNode, misplaced, settle};
use futures_util::FutureExt;
use futures_util::future::Shared;
use headwater_block::{Error, ErrorKind, Extent, ExtentKind, Result};
use headwater_nbd::ServerOffer;
use headwater_nbd::negotiate::BASE_ALLOCATION;
use headwater_nbd::reply::{STATE_ZERO, StatusExtent};
use std::cell::{Cell, RefCell};
use std::ops::Range;
use std::rc::Rc;
use std::time::Duration;
use tokio::sync::oneshot;

/// How many runs are remembered; each takes about 40 bytes.
const RUNS: usize = 128 << 10;

/// How many runs of one answer are remembered, so that those which are asked for next don't push each other out.
const RUNS_OF_ONE: usize = RUNS / 2;

/// The length of the first request and the shortest, and of the longest with extended headers, in bytes. A server may answer with an
/// extent for each 512 bytes, and one that breaks off when it has sent a million of them is of no use.
const SHORTEST_ASK: u64 = 64 << 20;
const LONGEST_ASK: u64 = 1 << 44;

/// Fewer runs in an answer: ask for four times as much next time. More: for half.
const FEW: usize = 4096;
const MANY: usize = 32 << 10;

/// An answer: runs that follow each other, and whether each is zero.
type Runs = Rc<[(Range<u64>, bool)]>;

struct Pending {
    range: Range<u64>,
    generation: u64,
    answer: Shared<oneshot::Receiver<Result<Runs>>>,
}

/// See the [module](self).
pub(super) struct Statuses {
    supported: bool,
    longest_ask: u64,
    size: u64,
    map: RefCell<ExtentMap>,
    pending: RefCell<Vec<Pending>>,
    generation: Cell<u64>,
    changes: Cell<u32>,
    ask: Cell<u64>,
}

/// Marks a change of a range as under way; dropped when it ends.
pub(super) struct ChangeMark<'a> {
    statuses: &'a Statuses,
    range: Range<u64>,
}

impl Drop for ChangeMark<'_> {
    fn drop(&mut self) {
        self.statuses.changes.set(self.statuses.changes.get() - 1);
        self.statuses.forget(self.range.clone());
    }
}

impl Statuses {
    pub(super) fn new(offer: &ServerOffer) -> Rc<Self> {
        Rc::new(Self {
            supported: offer.headers.are_structured() && offer.context(BASE_ALLOCATION).is_some(),
            longest_ask: if offer.headers.are_extended() { LONGEST_ASK } else { LONGEST_COMPACT },
            size: offer.size,
            map: RefCell::new(ExtentMap::new(RUNS)),
            pending: RefCell::default(),
            generation: Cell::new(0),
            changes: Cell::new(0),
            ask: Cell::new(SHORTEST_ASK),
        })
    }

    /// The end of the run at `offset` and whether it is zero, if it is remembered.
    pub(super) fn known(&self, offset: u64) -> Option<(u64, bool)> {
        self.map.borrow().get(offset)
    }

    /// Whether all of a range is known to be zero.
    pub(super) fn known_zero(&self, range: Range<u64>) -> bool {
        self.known(range.start).is_some_and(|(end, zero)| zero && end >= range.end)
    }

    /// To be called before a change is sent.
    pub(super) fn change(&self, range: Range<u64>) -> ChangeMark<'_> {
        self.changes.set(self.changes.get() + 1);
        self.forget(range.clone());
        ChangeMark { statuses: self, range }
    }

    fn forget(&self, range: Range<u64>) {
        self.generation.set(self.generation.get() + 1);
        self.map.borrow_mut().forget(range);
    }

    /// The runs of an answer to a request for `asked`. The server may tell less, and of what follows the request as well.
    fn runs(&self, asked: &Range<u64>, extents: &[StatusExtent]) -> Runs {
        let mut runs: Vec<(Range<u64>, bool)> = Vec::new();
        let mut at = asked.start;
        for extent in extents {
            let end = at.saturating_add(extent.length).min(self.size);
            let zero = extent.flags & STATE_ZERO != 0;
            match runs.last_mut() {
                Some((last, same)) if *same == zero => last.end = end,
                _ if at < end => runs.push((at..end, zero)),
                _ => {}
            }
            at = end;
        }
        runs.into()
    }

    fn learn(&self, asked: &Range<u64>, generation: u64, runs: &Runs) {
        if runs.len() > MANY {
            self.ask.set((self.ask.get() / 2).max(SHORTEST_ASK));
        } else if runs.len() < FEW && asked.end - asked.start >= self.ask.get() {
            self.ask.set((self.ask.get() * 4).min(self.longest_ask));
        }
        if generation == self.generation.get() && self.changes.get() == 0 {
            let mut map = self.map.borrow_mut();
            for (range, zero) in runs.iter().take(RUNS_OF_ONE) {
                map.insert(range.clone(), *zero);
            }
        }
    }

    /// The answer that is under way for `offset` (and `false`), or that of a new request (and `true`). `start` is `offset` rounded down to what the server takes.
    fn request(
        self: &Rc<Self>,
        offset: u64,
        start: u64,
        pool: &Rc<Pool>,
        retry: Duration,
    ) -> (Shared<oneshot::Receiver<Result<Runs>>>, bool) {
        let generation = self.generation.get();
        let mut pending = self.pending.borrow_mut();
        let same = pending.iter().find(|p| p.range.contains(&offset) && p.generation == generation);
        if let Some(same) = same {
            return (same.answer.clone(), false);
        }
        let (sender, receiver) = oneshot::channel();
        let answer = receiver.shared();
        let range = start..start.saturating_add(self.ask.get()).min(self.size);
        pending.push(Pending { range: range.clone(), generation, answer: answer.clone() });
        let (statuses, pool) = (self.clone(), pool.clone());
        tokio::task::spawn_local(async move {
            let found = statuses.ask(&pool, range.clone(), retry).await;
            if let Ok(runs) = &found {
                statuses.learn(&range, generation, runs);
            }
            statuses.pending.borrow_mut().retain(|p| p.range != range || p.generation != generation);
            let _ = sender.send(found);
        });
        (answer, true)
    }

    async fn ask(&self, pool: &Rc<Pool>, mut range: Range<u64>, retry: Duration) -> Result<Runs> {
        let mut attempts = Attempts::new(retry);
        loop {
            let connection = pool.acquire().await?;
            let length = range.end - range.start;
            let failure = match settle(connection.block_status(range.start, length)).await {
                Ok(Answer::Extents(extents)) => return Ok(self.runs(&range, &extents)),
                Ok(_) => return Err(misplaced()),
                Err(failure) => failure,
            };
            if !attempts.again(&failure).await {
                return Err(failure.error);
            }
            if failure.error.kind() == ErrorKind::Corrupt {
                // It may have been a longer reply than we take.
                self.ask.set(SHORTEST_ASK);
                range.end = range.end.min(range.start + SHORTEST_ASK);
            }
        }
    }
}

impl NbdNode {
    /// The status of the start of `range`.
    pub(super) async fn find_status(&self, range: Range<u64>) -> Result<Extent> {
        let extent = |end: u64, zero: bool| {
            // What follows the end of the export is zero as well.
            let end = if zero && end >= self.size { range.end } else { end.min(range.end) };
            let kind = if zero { ExtentKind::Zero } else { ExtentKind::Data };
            let mut extent = Extent::new(range.start, end - range.start, kind);
            extent.host_offset = (!zero).then_some(range.start);
            extent
        };
        if range.start >= self.size {
            return Ok(extent(range.end, true));
        }
        if !self.statuses.supported {
            return Ok(extent(self.size, false));
        }
        loop {
            if let Some((end, zero)) = self.statuses.known(range.start) {
                return Ok(extent(end, zero));
            }
            let start = self.round_out(range.start..range.start + 1).start;
            let (answer, fresh) = self.statuses.request(range.start, start, &self.pool, self.retry);
            let closed = |_| Err(Error::new(ErrorKind::Closed, "the node was closed"));
            let runs = answer
                .await
                .unwrap_or_else(closed)
                .map_err(|e| self.refused(e, "block status", range.start, range.end - range.start))?;
            let here = runs.iter().position(|(run, _)| run.contains(&range.start));
            if let Some(here) = here {
                let zero = runs[here].1;
                return Ok(extent(runs[here].0.end, zero));
            }
            // A shared answer may be shorter than what was asked for: ask from here. One's own must say something.
            if fresh {
                let e = Error::new(ErrorKind::Corrupt, "the server's answer does not reach the offset");
                return Err(self.refused(e, "block status", range.start, range.end - range.start));
            }
        }
    }
}
