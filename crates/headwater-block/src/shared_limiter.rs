//! One limit that several flows share by their weights: of all jobs of a daemon, say.
//!
//! The rate is kept by one [`RateLimiter`]; here it is decided who passes next. Each flow has a [`Share`] of the limit, and asks it for leave.
//!
//! # Rules
//! - **Fairness.** Those who wait pass in proportion to their weights. Each share has a *tag*: what it was given so far, divided by its weight. Who would have the
//!   lowest tag after its next request goes first, and within a share the order of arrival counts. So of two shares that always have somebody waiting neither is ever
//!   ahead by more than one request of each, whatever the sizes; and a share that waits is passed by each other share, newcomers included, only in that
//!   proportion: nobody starves.
//! - **Nothing is saved up.** A share that comes after a time without waiting begins where the last one is that passed. What it doesn't use, the others have.
//! - **Nothing is owed for long.** When nobody waits and the limit has something left, all tags are equal again.
//! - **Cancellation.** A request that leaves while it waits counts nowhere. One that was given leave counts, whether it is used or not.
//! - **Changes.** A new rate counts at once, for those that wait, too. A new weight counts from now on; by how much a share is ahead of the others, or behind, is measured with it anew.
//! - **The limit** is over by no more than its burst (100 ms) and one request, and a burst for each change of the rate.

use crate::clock::Clock;
use crate::node::LocalFuture;
use crate::rate_limiter::RateLimiter;
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::poll_fn;
use std::ops::RangeInclusive;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

/// What a share of weight 1 is charged for one unit: enough for the tags of large weights to tell units apart.
const SCALE: u128 = 1 << 20;

/// A limit that several share; see the [module](self).
pub struct SharedLimiter {
    limiter: Rc<RateLimiter>,
    clock: Rc<dyn Clock>,
    lines: RefCell<Vec<Line>>,
    /// The tag of whoever passed last: where those begin that come.
    tag: Cell<u128>,
    /// Numbers shares and requests.
    next: Cell<u64>,
}

/// The requests of one share that wait, in order.
struct Line {
    share: u64,
    weight: u32,
    tag: u128,
    waiting: VecDeque<Waiting>,
}

struct Waiting {
    id: u64,
    units: u64,
    waker: Option<Waker>,
}

impl Line {
    /// The tag after the next request; none if none waits.
    fn next_tag(&self) -> Option<u128> {
        self.waiting.front().map(|waiting| self.tag + self.cost(waiting.units))
    }

    /// What `units` add to the tag.
    fn cost(&self, units: u64) -> u128 {
        u128::from(units) * SCALE / u128::from(self.weight)
    }
}

impl SharedLimiter {
    /// The weights that there are.
    pub const WEIGHTS: RangeInclusive<u32> = 1..=10_000;

    /// The weight of a share for which nobody has said one.
    pub const DEFAULT_WEIGHT: u32 = 100;

    /// A limit of `rate` units per second; 0 is without limit.
    pub fn new(rate: u64, clock: Rc<dyn Clock>) -> Rc<Self> {
        Rc::new(Self {
            limiter: RateLimiter::new(rate),
            clock,
            lines: RefCell::default(),
            tag: Cell::new(0),
            next: Cell::new(0),
        })
    }

    /// The rate in units per second; 0 is without limit.
    pub fn rate(&self) -> u64 {
        self.limiter.rate()
    }

    /// Changes the rate, at once.
    pub fn set_rate(&self, rate: u64) {
        if rate != self.rate() {
            self.limiter.set_rate(rate);
            self.wake_head();
        }
    }

    /// A share of the limit. `weight` is brought into [`SharedLimiter::WEIGHTS`].
    pub fn join(self: &Rc<Self>, weight: u32) -> Share {
        let (share, weight) = (self.number(), clamp(weight));
        self.lines.borrow_mut().push(Line { share, weight, tag: 0, waiting: VecDeque::new() });
        Share { limiter: self.clone(), id: share }
    }

    fn number(&self) -> u64 {
        self.next.replace(self.next.get() + 1)
    }

    /// The request that is next.
    fn head(&self) -> Option<u64> {
        let lines = self.lines.borrow();
        let (_, first) =
            lines.iter().filter_map(|line| Some((line.next_tag()?, line))).min_by_key(|(tag, _)| *tag)?;
        first.waiting.front().map(|waiting| waiting.id)
    }

    fn wake_head(&self) {
        let Some(head) = self.head() else { return };
        let mut lines = self.lines.borrow_mut();
        let waiting = lines.iter_mut().flat_map(|line| &mut line.waiting).find(|waiting| waiting.id == head);
        if let Some(waker) = waiting.and_then(|waiting| waiting.waker.as_ref()) {
            waker.wake_by_ref();
        }
    }

    /// Ready when the request may pass.
    fn poll_turn(
        &self,
        cx: &mut Context<'_>,
        id: u64,
        sleep: &mut Option<(Duration, LocalFuture<'static, ()>)>,
    ) -> Poll<()> {
        loop {
            let mut lines = self.lines.borrow_mut();
            let mut waiting = lines.iter_mut().flat_map(|line| &mut line.waiting);
            if let Some(waiting) = waiting.find(|waiting| waiting.id == id) {
                waiting.waker = Some(cx.waker().clone());
            }
            drop(lines);
            if self.head() != Some(id) {
                return Poll::Pending;
            }
            let now = self.clock.now();
            let ready = self.limiter.ready(now);
            if ready <= now {
                return Poll::Ready(());
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
}

fn clamp(weight: u32) -> u32 {
    weight.clamp(*SharedLimiter::WEIGHTS.start(), *SharedLimiter::WEIGHTS.end())
}

/// A share of a limit. It ends when it is dropped.
pub struct Share {
    limiter: Rc<SharedLimiter>,
    id: u64,
}

impl Share {
    /// Its weight.
    pub fn weight(&self) -> u32 {
        self.with_line(|line| line.weight)
    }

    /// Changes its weight, which is brought into [`SharedLimiter::WEIGHTS`].
    pub fn set_weight(&self, weight: u32) {
        let tag = self.limiter.tag.get();
        self.with_line(|line| {
            let (old, new) = (u128::from(line.weight), u128::from(clamp(weight)));
            let away = line.tag.abs_diff(tag) * old / new;
            line.tag = if line.tag > tag { tag + away } else { tag.saturating_sub(away) };
            line.weight = clamp(weight);
        });
        self.limiter.wake_head();
    }

    /// The rate of the limit, for all; 0 is without limit.
    pub fn limit(&self) -> u64 {
        self.limiter.rate()
    }

    /// How many units per second are its own while those go on that wait now; 0 is without limit.
    pub fn rate(&self) -> u64 {
        let lines = self.limiter.lines.borrow();
        let counts = |line: &&Line| line.share == self.id || !line.waiting.is_empty();
        let all: u64 = lines.iter().filter(counts).map(|line| u64::from(line.weight)).sum();
        let own = lines.iter().find(|line| line.share == self.id).map_or(0, |line| line.weight);
        let limit = self.limiter.rate();
        let rate = u128::from(limit) * u128::from(own) / u128::from(all.max(1));
        u64::try_from(rate).unwrap_or(u64::MAX).max(limit.min(1))
    }

    /// Waits until `units` may pass. May be dropped.
    pub async fn acquire(&self, units: u64) {
        let limiter = &*self.limiter;
        if limiter.rate() == 0 {
            return;
        }
        let now = limiter.clock.now();
        if limiter.head().is_none() && limiter.limiter.ready(now) <= now {
            let most = limiter.lines.borrow().iter().map(|line| line.tag).max().unwrap_or_default();
            limiter.tag.set(most.max(limiter.tag.get()));
            return self.count(units);
        }
        let queued = Queued { share: self, id: limiter.number() };
        self.with_line(|line| {
            if line.waiting.is_empty() {
                line.tag = line.tag.max(limiter.tag.get());
            }
            line.waiting.push_back(Waiting { id: queued.id, units, waker: None });
        });
        let mut sleep = None;
        poll_fn(|cx| limiter.poll_turn(cx, queued.id, &mut sleep)).await;
        limiter.limiter.reserve(units, limiter.clock.now());
        limiter.tag.set(self.with_line(|line| {
            line.tag += line.cost(units);
            line.tag
        }));
        drop(queued);
    }

    /// Counts `units` that pass without leave: they are more urgent than any limit.
    pub fn count(&self, units: u64) {
        let limiter = &*self.limiter;
        limiter.limiter.reserve(units, limiter.clock.now());
        self.with_line(|line| line.tag = line.tag.max(limiter.tag.get()) + line.cost(units));
    }

    fn with_line<T>(&self, does: impl FnOnce(&mut Line) -> T) -> T {
        let mut lines = self.limiter.lines.borrow_mut();
        let line = lines.iter_mut().find(|line| line.share == self.id);
        does(line.expect("a share has its line for as long as it lives"))
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.limiter.lines.borrow_mut().retain(|line| line.share != self.id);
    }
}

/// A request that waits; it leaves when this is dropped.
struct Queued<'a> {
    share: &'a Share,
    id: u64,
}

impl Drop for Queued<'_> {
    fn drop(&mut self) {
        self.share.with_line(|line| line.waiting.retain(|waiting| waiting.id != self.id));
        self.share.limiter.wake_head();
    }
}
