//! A throttle group: who may pass when.
//!
//! Each limit is a bucket of the one [`RateLimiter`] type, two if bursts have a length: one for the long run, whose burst is the whole burst, and one that
//! keeps the burst's own rate. A request passes when all buckets that it counts in say so, and only then counts in them.
//!
//! # Rules
//! - **Fairness.** In each direction (reads; writes, zero-writes and discards) members take turns, and the requests of one member pass in the order in
//!   which they came. Where the two directions share a limit, the one that has waited longer for its turn goes first.
//! - **Cancellation.** A request that leaves while it waits counts nowhere.
//! - **Drain.** Requests of a member that is drained pass at once ([`crate::drain::Hurry`]), and count: the rate holds again afterwards.
//! - **Changes.** New limits take effect at once, with empty buckets, for those that wait, too.

use super::limits::{Directions, Limit, ThrottleLimits};
use crate::clock::Clock;
use crate::error::Result;
use crate::node::LocalFuture;
use crate::rate_limiter::RateLimiter;
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::poll_fn;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

/// What one request counts as in buckets of requests: there are fractions of a request, if it is counted by its size.
const ONE_REQUEST: u64 = 1000;

/// Which limits a request counts in, besides those for all.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Direction {
    Read,
    Write,
}

impl Direction {
    fn other(self) -> Self {
        match self {
            Direction::Read => Direction::Write,
            Direction::Write => Direction::Read,
        }
    }
}

/// One limit.
struct Bucket {
    long_run: Rc<RateLimiter>,
    /// Without limit unless bursts have a length of more than a second: what lasts a second may as well come at once.
    burst: Rc<RateLimiter>,
}

impl Bucket {
    fn new() -> Self {
        Self { long_run: RateLimiter::new(0), burst: RateLimiter::new(0) }
    }

    /// `unit` is what one byte or request counts as.
    fn configure(&self, limit: &Limit, unit: u64) {
        let (rate, max) = (limit.rate * unit, limit.max * unit);
        self.long_run.set_rate(rate);
        self.long_run.set_burst(if max > 0 { max * limit.length() } else { rate / 10 });
        self.burst.set_rate(if limit.length() > 1 { max } else { 0 });
        self.burst.set_burst(max / 10);
    }

    fn is_limited(&self) -> bool {
        self.long_run.rate() > 0
    }

    fn ready(&self, now: Duration) -> Duration {
        self.long_run.ready(now).max(self.burst.ready(now))
    }

    fn count(&self, units: u64, now: Duration) {
        self.long_run.reserve(units, now);
        self.burst.reserve(units, now);
    }
}

/// The limits of one kind.
struct Buckets {
    total: Bucket,
    read: Bucket,
    write: Bucket,
}

impl Buckets {
    fn new() -> Self {
        Self { total: Bucket::new(), read: Bucket::new(), write: Bucket::new() }
    }

    fn configure(&self, limits: &Directions, unit: u64) {
        self.total.configure(&limits.total, unit);
        self.read.configure(&limits.read, unit);
        self.write.configure(&limits.write, unit);
    }

    fn of(&self, direction: Direction) -> [&Bucket; 2] {
        [&self.total, if direction == Direction::Read { &self.read } else { &self.write }]
    }
}

/// Those that wait, of one direction.
#[derive(Default)]
struct Queue {
    /// The members that have requests here; the first one's turn it is.
    lines: VecDeque<Line>,
    /// When the turn last went on, as a number that grows.
    turned: u64,
}

/// The requests of one member that wait, in order.
struct Line {
    member: u64,
    waiting: VecDeque<Waiting>,
}

struct Waiting {
    id: u64,
    waker: Option<Waker>,
}

impl Queue {
    fn head(&self) -> Option<&Waiting> {
        self.lines.front()?.waiting.front()
    }

    fn push(&mut self, member: u64, id: u64) {
        let waiting = Waiting { id, waker: None };
        match self.lines.iter_mut().find(|line| line.member == member) {
            Some(line) => line.waiting.push_back(waiting),
            None => self.lines.push_back(Line { member, waiting: VecDeque::from([waiting]) }),
        }
    }

    fn find(&mut self, id: u64) -> Option<&mut Waiting> {
        self.lines.iter_mut().flat_map(|line| &mut line.waiting).find(|waiting| waiting.id == id)
    }

    /// Takes a request out. If it has `passed`, its member's turn is over.
    fn remove(&mut self, id: u64, passed: bool) {
        let Some(at) = self.lines.iter().position(|line| line.waiting.iter().any(|waiting| waiting.id == id))
        else {
            return;
        };
        let line = &mut self.lines[at];
        line.waiting.retain(|waiting| waiting.id != id);
        let is_empty = line.waiting.is_empty();
        if is_empty || (passed && at == 0) {
            let line = self.lines.remove(at);
            self.lines.extend(line.filter(|_| !is_empty));
        }
    }

    fn wake_head(&self) {
        if let Some(waker) = self.head().and_then(|head| head.waker.as_ref()) {
            waker.wake_by_ref();
        }
    }
}

/// Limits that several nodes share.
pub struct ThrottleGroup {
    name: Box<str>,
    clock: Rc<dyn Clock>,
    limits: Cell<ThrottleLimits>,
    bytes: Buckets,
    requests: Buckets,
    reads: RefCell<Queue>,
    writes: RefCell<Queue>,
    /// Numbers members, requests and turns.
    next: Cell<u64>,
    members: Cell<usize>,
}

impl ThrottleGroup {
    /// A group without members. `name` is for messages and for whoever lists groups.
    ///
    /// # Errors
    /// Those of [`ThrottleLimits::check`].
    pub fn new(name: &str, clock: Rc<dyn Clock>, limits: ThrottleLimits) -> Result<Rc<Self>> {
        let group = Rc::new(Self {
            name: name.into(),
            clock,
            limits: Cell::default(),
            bytes: Buckets::new(),
            requests: Buckets::new(),
            reads: RefCell::default(),
            writes: RefCell::default(),
            next: Cell::new(0),
            members: Cell::new(0),
        });
        group.set_limits(limits)?;
        Ok(group)
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What it is limited to.
    pub fn limits(&self) -> ThrottleLimits {
        self.limits.get()
    }

    /// Limits it to something else from now on, those that wait included.
    ///
    /// # Errors
    /// Those of [`ThrottleLimits::check`]; then the old limits stand.
    pub fn set_limits(&self, limits: ThrottleLimits) -> Result<()> {
        limits.check().map_err(|err| err.context(format_args!("throttle group {}", self.name)))?;
        self.limits.set(limits);
        self.bytes.configure(&limits.bps, 1);
        self.requests.configure(&limits.iops, ONE_REQUEST);
        self.wake_heads();
        Ok(())
    }

    /// How many nodes are in it.
    pub fn members(&self) -> usize {
        self.members.get()
    }

    pub(super) fn join(&self) -> u64 {
        self.members.set(self.members.get() + 1);
        self.number()
    }

    pub(super) fn leave(&self, member: u64) {
        self.members.set(self.members.get() - 1);
        self.wake_member(member);
    }

    /// Has the requests of a member look again whether they still have to wait.
    pub(super) fn wake_member(&self, member: u64) {
        for queue in [&self.reads, &self.writes] {
            let queue = queue.borrow();
            let waiting =
                queue.lines.iter().filter(|line| line.member == member).flat_map(|line| &line.waiting);
            waiting.filter_map(|waiting| waiting.waker.as_ref()).for_each(Waker::wake_by_ref);
        }
    }

    /// Waits until a request of `len` bytes may pass, and counts it. `excused` tells that it needn't wait any longer: in what way, is what it returns,
    /// and then whether it counts all the same.
    pub(super) async fn pass<T>(
        &self,
        member: u64,
        direction: Direction,
        len: u64,
        excused: impl Fn() -> Option<(T, bool)>,
    ) -> Option<T> {
        let now = self.clock.now();
        if self.queue(direction).borrow().head().is_none() && self.ready(direction, now) <= now {
            self.count(direction, len, now);
            return None;
        }
        let mut queued = Queued { group: self, direction, id: self.number(), passed: false };
        self.queue(direction).borrow_mut().push(member, queued.id);
        self.note_turn(direction);
        let mut sleep: Option<(Duration, LocalFuture<'static, ()>)> = None;
        let result = poll_fn(|cx| {
            if let Some((why, counts)) = excused() {
                if counts {
                    self.count(direction, len, self.clock.now());
                }
                return Poll::Ready(Some(why));
            }
            self.poll_turn(cx, &queued, &mut sleep).map(|now| {
                self.count(direction, len, now);
                None
            })
        })
        .await;
        queued.passed = true;
        result
    }

    /// Ready with the time when the request may pass.
    fn poll_turn(
        &self,
        cx: &mut Context<'_>,
        queued: &Queued<'_>,
        sleep: &mut Option<(Duration, LocalFuture<'static, ()>)>,
    ) -> Poll<Duration> {
        let direction = queued.direction;
        loop {
            if let Some(waiting) = self.queue(direction).borrow_mut().find(queued.id) {
                waiting.waker = Some(cx.waker().clone());
            }
            if self.queue(direction).borrow().head().is_none_or(|head| head.id != queued.id) {
                return Poll::Pending;
            }
            let now = self.clock.now();
            let ready = self.ready(direction, now);
            if ready <= now {
                let other = self.queue(direction.other()).borrow();
                let waits_longer =
                    other.head().is_some() && other.turned < self.queue(direction).borrow().turned;
                if !waits_longer || self.ready(direction.other(), now) > now {
                    return Poll::Ready(now);
                }
                other.wake_head();
                return Poll::Pending;
            }
            if sleep.as_ref().is_none_or(|(until, _)| *until != ready) {
                *sleep = Some((ready, self.clock.sleep_until(ready)));
            }
            match sleep.as_mut().map(|(_, sleep)| sleep.as_mut().poll(cx)) {
                Some(Poll::Pending) => return Poll::Pending,
                _ => *sleep = None,
            }
        }
    }

    /// When the next request of a direction may pass, if nobody else comes first.
    fn ready(&self, direction: Direction, now: Duration) -> Duration {
        let buckets = self.bytes.of(direction).into_iter().chain(self.requests.of(direction));
        buckets.filter(|bucket| bucket.is_limited()).map(|bucket| bucket.ready(now)).max().unwrap_or(now)
    }

    fn count(&self, direction: Direction, len: u64, now: Duration) {
        let requests = match self.limits.get().iops_size {
            0 => ONE_REQUEST,
            size => {
                let parts = u128::from(len) * u128::from(ONE_REQUEST) / u128::from(size);
                u64::try_from(parts).unwrap_or(u64::MAX).max(ONE_REQUEST)
            }
        };
        self.bytes.of(direction).into_iter().for_each(|bucket| bucket.count(len, now));
        self.requests.of(direction).into_iter().for_each(|bucket| bucket.count(requests, now));
    }

    fn queue(&self, direction: Direction) -> &RefCell<Queue> {
        if direction == Direction::Read { &self.reads } else { &self.writes }
    }

    fn number(&self) -> u64 {
        self.next.replace(self.next.get() + 1)
    }

    /// Remembers when a direction's turn began, if it has just begun.
    fn note_turn(&self, direction: Direction) {
        let mut queue = self.queue(direction).borrow_mut();
        if queue.lines.len() == 1 && queue.lines[0].waiting.len() == 1 {
            queue.turned = self.number();
        }
    }

    fn wake_heads(&self) {
        self.reads.borrow().wake_head();
        self.writes.borrow().wake_head();
    }
}

/// A request in the queue; it leaves when this is dropped.
struct Queued<'a> {
    group: &'a ThrottleGroup,
    direction: Direction,
    id: u64,
    passed: bool,
}

impl Drop for Queued<'_> {
    fn drop(&mut self) {
        let mut queue = self.group.queue(self.direction).borrow_mut();
        let was_head = queue.head().is_some_and(|head| head.id == self.id);
        queue.remove(self.id, self.passed);
        if was_head {
            queue.turned = self.group.number();
        }
        drop(queue);
        // The other direction may share what this one left.
        self.group.wake_heads();
    }
}
