//! What all simulated storage has in common: it takes its time, fails, stalls, and counts.

use crate::executor::Sim;
use crate::faults::{Fault, Faults, Op};
use headwater_block::{Clock, Result, recall};
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::future::poll_fn;
use std::ops::Range;
use std::task::{Poll, Waker};
use std::time::Duration;

/// How fast storage is.
#[derive(Debug, Clone, Copy)]
pub struct Pace {
    /// The least time that an operation takes.
    pub least: Duration,
    /// The most time that it takes, unless it stalls or waits for bandwidth.
    pub most: Duration,
    /// How many bytes of data pass per second, over all operations; 0 is without limit.
    pub bandwidth: u64,
}

impl Pace {
    /// Up to 200 microseconds and no limit of bandwidth: mixes well, and time passes quickly.
    pub const QUICK: Pace = Pace { least: Duration::ZERO, most: Duration::from_micros(200), bandwidth: 0 };
}

#[derive(Debug, Default, Clone, Copy)]
struct Count {
    started: u64,
    bytes: u64,
    bytes_in_flight: u64,
    peak_bytes: u64,
}

/// The part of a simulated node that decides when and whether an operation succeeds.
pub struct Device {
    sim: Sim,
    name: String,
    pace: Cell<Pace>,
    faults: RefCell<Faults>,
    stalled: RefCell<Vec<Op>>,
    held: Cell<usize>,
    waiting: RefCell<Vec<Waker>>,
    busy_until: Cell<Duration>,
    counts: RefCell<BTreeMap<Op, Count>>,
    /// How many operations pass before one takes so long.
    slow: Cell<Option<(u64, Duration)>>,
}

impl Device {
    pub(crate) fn new(sim: &Sim, name: &str) -> Self {
        Self {
            sim: sim.clone(),
            name: name.to_string(),
            pace: Cell::new(Pace::QUICK),
            faults: RefCell::default(),
            stalled: RefCell::default(),
            held: Cell::new(0),
            waiting: RefCell::default(),
            busy_until: Cell::new(Duration::ZERO),
            counts: RefCell::default(),
            slow: Cell::new(None),
        }
    }

    pub(crate) fn sim(&self) -> &Sim {
        &self.sim
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Changes how fast it is.
    pub fn set_pace(&self, pace: Pace) {
        self.pace.set(pace);
    }

    /// Adds a rule for what fails.
    pub fn fail(&self, fault: Fault) {
        self.faults.borrow_mut().add(fault);
    }

    /// Nothing fails any more.
    pub fn repair(&self) {
        self.faults.borrow_mut().clear();
    }

    /// How many operations have failed.
    pub fn failures(&self) -> u64 {
        self.faults.borrow().hits()
    }

    /// The `n`-th operation from now (from 0), of whatever kind, takes this long.
    pub fn delay_nth(&self, n: u64, time: Duration) {
        self.slow.set(Some((n, time)));
    }

    /// How many operations of all kinds have started.
    pub fn operations(&self) -> u64 {
        self.counts.borrow().values().map(|count| count.started).sum()
    }

    /// From now on operations of these kinds don't complete, until [`Device::release`].
    pub fn stall(&self, ops: &[Op]) {
        *self.stalled.borrow_mut() = ops.to_vec();
        self.wake();
    }

    /// Ends a stall.
    pub fn release(&self) {
        self.stall(&[]);
    }

    /// Completes when at least `n` operations are held by the stall.
    pub async fn holds(&self, n: usize) {
        self.wait_until(|device| device.held.get() >= n).await;
    }

    /// How many operations of this kind have started.
    pub fn started(&self, op: Op) -> u64 {
        self.count(op).started
    }

    /// How many bytes the operations of this kind that have started were for.
    pub fn bytes(&self, op: Op) -> u64 {
        self.count(op).bytes
    }

    /// The most bytes that operations of this kind were for at once.
    pub fn peak_bytes(&self, op: Op) -> u64 {
        self.count(op).peak_bytes
    }

    fn count(&self, op: Op) -> Count {
        self.counts.borrow().get(&op).copied().unwrap_or_default()
    }

    /// Counts an operation until the guard is dropped.
    pub(crate) fn enter(&self, op: Op, range: &Range<u64>) -> InFlight<'_> {
        let mut counts = self.counts.borrow_mut();
        let count = counts.entry(op).or_default();
        count.started += 1;
        count.bytes += range.end - range.start;
        count.bytes_in_flight += range.end - range.start;
        count.peak_bytes = count.peak_bytes.max(count.bytes_in_flight);
        InFlight { device: self, op, bytes: range.end - range.start }
    }

    /// Takes the time of an operation and says whether it fails.
    pub(crate) async fn serve(&self, op: Op, range: &Range<u64>) -> Result<()> {
        let pace = self.pace.get();
        if self.sim.rng().one_in(2) {
            self.sim.yield_now().await;
        }
        let time = self.sim.rng().duration(pace.least, pace.most);
        if !time.is_zero() && (!pace.least.is_zero() || self.sim.rng().one_in(2)) {
            self.sim.sleep(time).await;
        }
        if pace.bandwidth > 0 && matches!(op, Op::Read | Op::Write) {
            let bytes = u128::from(range.end - range.start);
            let nanos = bytes * 1_000_000_000 / u128::from(pace.bandwidth);
            let start = self.busy_until.get().max(self.sim.clock().now());
            self.busy_until.set(start + Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX)));
            self.sim.clock().sleep_until(self.busy_until.get()).await;
        }
        match self.slow.take() {
            Some((0, time)) => self.sim.sleep(time).await,
            rest => self.slow.set(rest.map(|(n, time)| (n - 1, time))),
        }
        if self.stalled.borrow().contains(&op) {
            let _held = Held::new(self);
            recall::wait(self.wait_until(|device| !device.stalled.borrow().contains(&op))).await?;
        }
        self.faults.borrow_mut().check(self.sim.rng(), &self.name, op, range)
    }

    async fn wait_until(&self, condition: impl Fn(&Self) -> bool) {
        poll_fn(|cx| {
            if condition(self) {
                return Poll::Ready(());
            }
            self.waiting.borrow_mut().push(cx.waker().clone());
            Poll::Pending
        })
        .await;
    }

    fn wake(&self) {
        for waker in self.waiting.take() {
            waker.wake();
        }
    }
}

/// An operation that a stall holds.
struct Held<'a>(&'a Device);

impl<'a> Held<'a> {
    fn new(device: &'a Device) -> Self {
        device.held.set(device.held.get() + 1);
        device.wake();
        Self(device)
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        self.0.held.set(self.0.held.get() - 1);
    }
}

/// An operation in flight.
pub(crate) struct InFlight<'a> {
    device: &'a Device,
    op: Op,
    bytes: u64,
}

impl Drop for InFlight<'_> {
    fn drop(&mut self) {
        if let Some(count) = self.device.counts.borrow_mut().get_mut(&self.op) {
            count.bytes_in_flight -= self.bytes;
        }
    }
}
