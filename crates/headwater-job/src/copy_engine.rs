//! The copy engine: keeps a window of copies in flight over everything that a [`Copier`] finds to copy. All jobs that copy share it.
//!
//! One loop. It does what the job's [`Control`] wishes, starts looks ([`crate::scan`]) and copies until the [`Window`] is full, and waits for
//! whatever happens next: a copy or a look that completes, a command, or leave from the limits (`leave`).
//!
//! - **Pause and cancel** take effect at once: reads of the source are given up through [`Abort`], however slow it is. Copies
//!   that have begun to write are driven to their ends, because half a cluster must never be left. What was given up is
//!   copied again later.
//! - **Guests first**: beside guests, [`crate::guests_first`] says how much of the window is filled.
//! - **Held guests**: a job that holds all guests back to copy the rest gives the engine what holds them. Then no speed limit counts; and a pause
//!   lets them go first.
//! - **A source that can't be reached** makes the job pause itself until it can ([`crate::outage`]), if it has the patience.
//! - **A disk that fills up** makes it do the same before it is full ([`crate::space`]).
//! - **Other failures** are kept apart and tried once more when everything else is done, if the policy says to go on.
//!
//! The engine's future must be polled to its end, like everything that changes a disk.

use crate::control::{Control, Wish};
use crate::copier::Copier;
use crate::guests_first::GuestsFirst;
use crate::progress::{Progress, RateMeter};
use crate::scan::{Scanned, Scanner};
use crate::space::{Room, Space};
use crate::window::{Bounds, Window};
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use headwater_block::chain::Missing;
use headwater_block::copy_up::{Copied, Failed, Operation};
use headwater_block::{Abort, Error, ErrorKind, LocalFuture};
use std::any::Any;
use std::collections::BTreeMap;
use std::future::poll_fn;
use std::ops::Range;
use std::rc::Rc;
use std::task::Poll;
use std::time::Duration;

mod ahead;
mod failures;
mod leave;
mod shortage;
mod show;

use ahead::Ahead;
use failures::Failures;
pub(crate) use failures::{At, Trouble};
use leave::Leaves;

/// Copies in flight at most, however small they are.
const MOST_COPIES: usize = 128;

/// Runs that are known and not begun at most: then the scan waits.
const MOST_FOUND: usize = 4096;

/// The most zeroes that one copy writes, in bytes: its range is locked meanwhile.
const MOST_ZEROES: u64 = 256 << 20;

/// What a copy of zeroes counts for in the window, in bytes: it moves no data.
const ZEROES_WEIGH: u64 = 64 << 10;

/// Why the engine stopped before its work was done.
#[derive(Debug)]
pub(crate) enum Stopped {
    Cancelled,
    Failed(Error),
}

/// What one pass over the disk did.
#[derive(Debug)]
pub(crate) struct Pass {
    /// Something was missing. A pass that finds nothing is the proof that nothing is.
    pub(crate) found_any: bool,
    /// Parts failed, twice, and are still missing; this is the first error.
    pub(crate) failed: Option<Error>,
}

/// A copy that is over.
struct Done {
    what: Missing,
    began: Duration,
    result: Result<Copied, Failed>,
}

enum Happened {
    Command,
    Copied(Done),
    Scanned(Scanned),
    Leave,
    Rested,
}

/// The engine for one job; see the module.
pub(crate) struct Engine {
    copier: Rc<dyn Copier>,
    control: Rc<Control>,
    /// Whether there is room for copies.
    room: Option<Room>,
    unit: u64,
    window: Window,
    guests: GuestsFirst,
    meter: RateMeter,
    /// What is done in passes before this one.
    progress: Progress,
    /// Holds all guests back while it lives.
    held: Option<Box<dyn Any>>,
}

impl Engine {
    pub(crate) fn new(copier: Rc<dyn Copier>, control: &Rc<Control>, bounds: Bounds) -> Self {
        Self {
            unit: copier.unit(),
            guests: GuestsFirst::new(copier.guests(), bounds.far),
            copier,
            control: control.clone(),
            room: None,
            window: Window::new(bounds),
            meter: RateMeter::default(),
            progress: Progress::default(),
            held: None,
        }
    }

    /// The same, but copies leave some space free.
    pub(crate) fn with_space(self, space: Option<Space>) -> Self {
        Self { room: space.map(Room::new), ..self }
    }

    /// Copies what `copier` says in the passes from now on.
    pub(crate) fn change_copier(&mut self, copier: Rc<dyn Copier>) {
        self.copier = copier;
    }

    /// How many bytes are in flight at once.
    pub(crate) fn window(&self) -> u64 {
        self.window.target()
    }

    /// Copies with the guests held back from now on, until [`Engine::let_go`] or a pause.
    pub(crate) fn hold(&mut self, held: Box<dyn Any>) {
        self.held = Some(held);
    }

    /// Lets the guests go.
    pub(crate) fn let_go(&mut self) {
        self.held = None;
    }

    /// True while the guests are held back.
    pub(crate) fn holds(&self) -> bool {
        self.held.is_some()
    }

    /// Goes once, upwards, over everything that there is to do, and copies it.
    pub(crate) async fn pass(&mut self) -> Result<Pass, Stopped> {
        let run = Run {
            scanner: Scanner::new(&self.copier),
            taken: 0,
            found: BTreeMap::new(),
            found_data: 0,
            scanned: 0,
            scanned_data: 0,
            copies: FuturesUnordered::new(),
            in_flight: 0,
            in_flight_data: 0,
            abort: Abort::new(),
            failures: Failures::default(),
            trouble: None,
            ahead: Ahead::default(),
            shortage: None,
            tried_again: false,
            leaves: Leaves::default(),
            copy: self.window.copy(),
            seen: 0,
            found_any: false,
            engine: self,
        };
        run.go().await
    }
}

/// One pass.
struct Run<'a> {
    engine: &'a mut Engine,
    scanner: Scanner,
    /// Up to here what is to be looked through was taken.
    taken: u64,
    /// Known and not begun, by rank and offset.
    found: BTreeMap<(u64, u64), Missing>,
    found_data: u64,
    scanned: u64,
    scanned_data: u64,
    copies: FuturesUnordered<LocalFuture<'static, Done>>,
    /// What is in flight, as the window counts it, and how much of it is data.
    in_flight: u64,
    in_flight_data: u64,
    abort: Rc<Abort>,
    failures: Failures,
    /// What failed because the source can't be reached.
    trouble: Option<Trouble>,
    ahead: Ahead,
    /// There is no room for the next copy.
    shortage: Option<Error>,
    tried_again: bool,
    leaves: Leaves,
    /// The size of copies, in bytes.
    copy: u64,
    seen: u64,
    found_any: bool,
}

fn len(range: &Range<u64>) -> u64 {
    range.end - range.start
}

impl Run<'_> {
    async fn go(mut self) -> Result<Pass, Stopped> {
        loop {
            match self.engine.control.wish() {
                Wish::Go => {}
                Wish::Cancel => {
                    self.withdraw().await;
                    return Err(Stopped::Cancelled);
                }
                Wish::Pause => {
                    self.withdraw().await;
                    self.engine.let_go();
                    self.engine.control.stay_paused().await;
                    self.engine.window.restart();
                    self.engine.meter.restart(self.engine.copier.clock().now());
                    continue;
                }
            }
            if self.trouble.is_some() {
                if let Some(error) = self.wait_out().await {
                    return Err(Stopped::Failed(error));
                }
                continue;
            }
            if self.found.len() < MOST_FOUND {
                self.look_ahead();
            }
            self.fill_ahead();
            self.fill();
            self.show();
            if self.copies.is_empty() && self.shortage.is_some() {
                self.wait_for_room().await;
                continue;
            }
            if self.copies.is_empty() && self.found.is_empty() && self.scanner.is_over() {
                if self.tried_again || self.failures.first.is_none() {
                    self.abort.abort();
                    self.end_ahead().await;
                    return Ok(Pass { found_any: self.found_any, failed: self.failures.first });
                }
                self.try_again();
                continue;
            }
            // Nothing is under way: a limit is what it waits for.
            self.engine.control.set_idle(self.leaves.is_waiting() && self.copies.is_empty());
            let happened = self.next().await;
            self.engine.control.set_idle(false);
            let failed = match happened {
                Happened::Command | Happened::Rested | Happened::Leave => None,
                Happened::Scanned(scanned) => self.take_scanned(scanned),
                Happened::Copied(done) => self.take_done(done),
            };
            if let Some(error) = failed {
                self.withdraw().await;
                return Err(Stopped::Failed(error));
            }
        }
    }

    /// Starts as many looks as may run at once.
    fn look_ahead(&mut self) {
        self.scanner.start();
        while self.scanner.wants_more()
            && let Some(range) = self.engine.copier.take(self.taken)
        {
            self.taken = range.end;
            self.scanner.add(range);
            self.scanner.start();
        }
    }

    /// Waits for what happens next.
    async fn next(&mut self) -> Happened {
        poll_fn(|cx| {
            if self.engine.control.poll_changed(cx, &mut self.seen).is_ready() {
                return Poll::Ready(Happened::Command);
            }
            if self.poll_ahead(cx).is_ready() {
                return Poll::Ready(Happened::Command);
            }
            if let Poll::Ready(scanned) = self.scanner.poll(cx) {
                return Poll::Ready(Happened::Scanned(scanned));
            }
            if let Poll::Ready(Some(done)) = self.copies.poll_next_unpin(cx) {
                return Poll::Ready(Happened::Copied(done));
            }
            if self.leaves.poll(cx).is_ready() {
                return Poll::Ready(Happened::Leave);
            }
            if self.engine.guests.poll(cx).is_ready() {
                return Poll::Ready(Happened::Rested);
            }
            Poll::Pending
        })
        .await
    }

    /// Starts copies until the window is full.
    fn fill(&mut self) {
        let Engine { guests, window, control, copier, held, .. } = &mut *self.engine;
        let beside = held.is_none().then(|| control.guest_latency());
        let left = guests.leave(beside, window, self.copies.len(), &**copier.clock());
        let Some((target, copy)) = left else { return };
        self.copy = copy;
        if self.found.is_empty() && !self.scanner.is_over() {
            self.engine.window.held_back();
        }
        while let Some((&key, first)) = self.found.first_key_value() {
            let what = self.cut(first);
            let weight = if what.zero { ZEROES_WEIGH } else { len(&what.range) };
            let full = self.in_flight + weight > target || self.copies.len() >= MOST_COPIES;
            if full && !self.copies.is_empty() {
                if target < self.engine.window.target() {
                    self.engine.window.held_back();
                }
                return;
            }
            if !what.zero && self.lacks_room(len(&what.range)) {
                self.engine.window.held_back();
                return;
            }
            if !what.zero && !self.has_leave(&what) {
                self.engine.window.held_back();
                return;
            }
            if let Some(mut rest) = self.found.remove(&key) {
                rest.range.start = what.range.end;
                if !rest.range.is_empty() {
                    self.found.insert((key.0, rest.range.start), rest);
                }
            }
            self.start(what, weight);
        }
    }

    /// The first part of a run, as large as one copy.
    fn cut(&self, run: &Missing) -> Missing {
        let most = if run.zero { MOST_ZEROES } else { self.copy_size() };
        let most = (most / self.engine.unit).max(1) * self.engine.unit;
        // Cut at multiples, so that what follows is aligned as well.
        let end = match self.staggers() {
            true => run.range.start.saturating_add(most),
            false => (run.range.start / most + 1).saturating_mul(most),
        };
        let end = end.min(run.range.end);
        Missing { range: run.range.start..end, zero: run.zero }
    }

    fn start(&mut self, what: Missing, weight: u64) {
        self.in_flight += weight;
        if !what.zero {
            self.found_data -= len(&what.range);
            self.in_flight_data += len(&what.range);
            self.engine.window.begins(self.engine.copier.clock().now());
        }
        let copier = self.engine.copier.clone();
        let began = copier.clock().now();
        let copy = copier.copy(what.clone(), self.abort.clone());
        let copy = self.engine.guests.beside(weight, began, copy);
        self.copies.push(Box::pin(async move { Done { what, began, result: copy.await } }));
    }

    /// Adds a run to what is to be done.
    fn put(&mut self, missing: Missing) {
        if !missing.zero {
            self.found_data += len(&missing.range);
        }
        let start = missing.range.start;
        self.found.insert((self.engine.copier.rank(start), start), missing);
    }

    fn take_scanned(&mut self, scanned: Scanned) -> Option<Error> {
        self.scanned += len(&scanned.range);
        for missing in scanned.found {
            if !self.engine.copier.needs(&missing) {
                continue;
            }
            self.found_any = true;
            if !missing.zero {
                self.scanned_data += len(&missing.range);
            }
            self.put(missing);
        }
        let (error, rest) = scanned.error?;
        self.failed(Operation::Read.failed(error), At::Look(rest))
    }

    /// Takes note of a copy that is over. An error that ends the job is returned.
    fn take_done(&mut self, done: Done) -> Option<Error> {
        let Done { what, began, result } = done;
        let bytes = len(&what.range);
        self.in_flight -= if what.zero { ZEROES_WEIGH } else { bytes };
        if !what.zero {
            self.in_flight_data -= bytes;
        }
        match result {
            Ok(copied) => {
                let progress = &mut self.engine.progress;
                progress.copied += copied.data;
                progress.zeroes += copied.zero;
                progress.skipped += bytes.saturating_sub(copied.data + copied.zero);
                if !what.zero {
                    progress.done += bytes;
                    let now = self.engine.copier.clock().now();
                    self.engine.window.completed(bytes, now.saturating_sub(began), now);
                }
                None
            }
            // It was given up, and nothing was changed.
            Err(failed) if failed.error.kind() == ErrorKind::Cancelled && self.abort.is_aborted() => {
                self.put(what);
                None
            }
            Err(failed) => self.failed(failed, At::Copy(what)),
        }
    }

    /// Gives up what can be given up and completes the rest, until nothing is in flight.
    async fn withdraw(&mut self) {
        // race-mark: engine-withdraw
        self.abort.abort();
        self.scanner.withdraw();
        self.leaves = Leaves::default();
        while let Some(done) = self.copies.next().await {
            self.take_done(done);
        }
        self.end_ahead().await;
        self.abort = Abort::new();
        self.show();
    }
}
