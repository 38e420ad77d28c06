//! How much copies may have in flight beside guests: a policy without I/O and without a clock; it is told what guests' requests took and when.
//!
//! Copies cost a guest time wherever both queue: in the device, on the source's line, on this thread. How much in flight is too much depends on
//! the device and on the guest, and changes; so it is not known but steered, by what guests' requests take.
//!
//! - **What it costs** is told by comparison with *quiet* requests, beside which no copy ran. A *lull*, in which no copy starts until a few
//!   requests were quiet, sees to it that there are some. Lulls take 3 % of the time, however long each has to be.
//! - **The steps.** Each request moves the budget by a little: up if it was within its limits, down if not, and by so much that both balance
//!   where as many requests are over a limit as may be: half of them for the median's, one in a hundred for that of the 99th percentile. No
//!   quantile of requests beside copies is ever computed, and a busy guest steers faster than one that asks for little.
//! - **Fractions.** A budget of less than one smallest copy is a copy and then a rest, as long as makes it so much on the average. It ends at a
//!   sixteenth: whatever the guests do, copies go on.
//! - **Silence.** The longer no guest asks for anything, the more copies may take, up to all. The first request that comes then ends that.

use headwater_block::guest_latency::{Histogram, Kind, Seen};
use std::time::Duration;

/// The smallest copy beside a guest, in bytes. Smaller ones cost a disk more than they give a guest.
const LEAST_COPY: u64 = 64 << 10;

/// What copies have beside a guest at first, in bytes.
const START: u64 = 256 << 10;

/// The least part of a copy that is in flight on the average.
const LEAST_PART: f64 = 1.0 / 16.0;

/// By how much (of itself) a request that was within its limits lets the budget grow. A guest with 5000 requests a second doubles it in 35 ms.
const STEP: f64 = 1.0 / 256.0;

/// A request that is over its limit for the 99th percentile weighs so many steps. In the balance with both limits, 1 in 100 is over it while
/// 30 in 100 are over the median's.
const TAIL_WEIGHS: f64 = 40.0;

/// The same where there is no other limit: then 1 in 100 is over it.
const TAIL_WEIGHS_ALONE: f64 = 99.0;

/// The budget's logarithm changes by no more than this at once, whatever was seen.
const MOST_AT_ONCE: f64 = 1.4;

/// After so long without a request, what copies may have doubles, and again each time this passes.
const SILENCE: Duration = Duration::from_millis(200);

/// Quiet requests that make a lull long enough.
const LULL_WANTS: u32 = 16;

/// How long a lull waits for copies to end, and then for quiet requests.
const LULL_MOST: (Duration, Duration) = (Duration::from_millis(100), Duration::from_millis(20));

/// A lull is followed by so many times its length without one.
const LULLS_APART: u32 = 32;

/// From so many quiet requests on, their median and their 99th percentile count.
const ENOUGH: (u32, u32) = (8, 200);

/// With so many quiet requests, older ones fade.
const REMEMBERED: u32 = 1000;

/// What guests are promised while copies run.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum GuestLatencyGoal {
    /// Requests take 1.5 times what they would without copies, in the median, and twice in the 99th percentile.
    #[default]
    Relative,
    /// The 99th percentile is at most this longer than it would be without copies.
    Added(Duration),
}

/// What copies may do now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Allowance {
    /// What the window says.
    All,
    /// So many bytes in flight (or one copy), in copies of so many bytes.
    Some {
        /// Bytes in flight.
        target: u64,
        /// Bytes of a copy, at most.
        copy: u64,
    },
    /// No copy starts before this moment, or before a guest's request ends.
    Rest(Duration),
}

/// A time without copies; see the module.
#[derive(Debug, Clone, Copy)]
struct Lull {
    since: Duration,
    /// Since when no copy is in flight.
    still: Option<Duration>,
    quiet: u32,
}

/// The policy; see the module.
#[derive(Debug)]
pub struct Budget {
    goal: GuestLatencyGoal,
    /// Bytes in flight beside a guest.
    beside: f64,
    /// What quiet requests took, by [`Kind`].
    quiet: [Histogram; 3],
    /// What others took, where no quiet ones are to be had.
    busy: [Histogram; 3],
    /// When a guest's request last came or went.
    guest_at: Option<Duration>,
    lull: Option<Lull>,
    next_lull: Duration,
    /// Until when copies rest.
    rest: Duration,
}

impl Budget {
    /// A budget that has seen no guest.
    pub fn new(goal: GuestLatencyGoal) -> Self {
        Self {
            goal,
            beside: START as f64,
            quiet: Default::default(),
            busy: Default::default(),
            guest_at: None,
            lull: None,
            next_lull: Duration::ZERO,
            rest: Duration::ZERO,
        }
    }

    /// Changes what guests are promised.
    pub fn set_goal(&mut self, goal: GuestLatencyGoal) {
        self.goal = goal;
    }

    /// How many bytes copies may have in flight beside a guest, on the average.
    pub fn beside(&self) -> f64 {
        self.beside
    }

    /// Guests' requests were seen, up to `now`, with so many copies in flight now.
    pub fn observe(&mut self, seen: &Seen, copies: usize, now: Duration) {
        if seen.came + seen.went > 0 {
            self.guest_at = Some(now);
            let step: f64 = Kind::ALL.iter().map(|kind| self.step(*kind as usize, seen)).sum();
            self.beside *= step.clamp(-MOST_AT_ONCE, MOST_AT_ONCE / 2.0).exp();
        }
        self.lull(seen.quiet.iter().map(Histogram::len).sum(), copies, now);
    }

    /// The change of the budget's logarithm by requests of one kind.
    fn step(&mut self, kind: usize, seen: &Seen) -> f64 {
        let quiet = &mut self.quiet[kind];
        quiet.add_all(&seen.quiet[kind]);
        if quiet.len() > REMEMBERED {
            quiet.fade();
        }
        let busy = &seen.busy[kind];
        if busy.is_empty() {
            return 0.0;
        }
        let limits = self.limits(kind, busy);
        let count = f64::from(busy.len());
        match limits {
            None => 0.0,
            Some((None, tail)) => (count - (1.0 + TAIL_WEIGHS_ALONE) * f64::from(busy.over(tail))) * STEP,
            Some((Some(median), tail)) => {
                let over = f64::from(busy.over(median));
                (count - 2.0 * over - TAIL_WEIGHS * f64::from(busy.over(tail))) * STEP
            }
        }
    }

    /// What half of the requests of a kind may exceed, if that counts, and what one in a hundred may. None if nothing is known to compare
    /// them with.
    fn limits(&mut self, kind: usize, busy: &Histogram) -> Option<(Option<Duration>, Duration)> {
        let quiet = &self.quiet[kind];
        let (median, tail) = if quiet.len() >= ENOUGH.0 {
            let tail = if quiet.len() >= ENOUGH.1 { quiet.quantile(0.99) } else { None };
            (quiet.quantile(0.5)?, tail)
        } else {
            // Requests that take longer than a lull: the quickest are as near to quiet as can be seen.
            let busy_so_far = &mut self.busy[kind];
            busy_so_far.add_all(busy);
            if busy_so_far.len() < 2 * ENOUGH.0 {
                return None;
            }
            if busy_so_far.len() > REMEMBERED {
                busy_so_far.fade();
            }
            (busy_so_far.quantile(0.1)?, None)
        };
        // Until a 99th percentile is known. And a device that is steadier than this needn't be held to that: one small copy ahead would be too much.
        let tail = tail.unwrap_or_default().max(median * 2);
        Some(match self.goal {
            // A bucket less than half as much again, because limits count with the whole of their bucket.
            GuestLatencyGoal::Relative => (Some(median * 11 / 8), tail * 2),
            GuestLatencyGoal::Added(most) => (None, tail.saturating_add(most)),
        })
    }

    /// Begins and ends lulls.
    fn lull(&mut self, quiet: u32, copies: usize, now: Duration) {
        let Some(lull) = &mut self.lull else {
            let guest_is_there = self.guest_at.is_some_and(|at| now.saturating_sub(at) < SILENCE / 4);
            if guest_is_there && now >= self.next_lull {
                self.lull = Some(Lull { since: now, still: (copies == 0).then_some(now), quiet: 0 });
            }
            return;
        };
        lull.quiet += quiet;
        if copies == 0 {
            lull.still.get_or_insert(now);
        }
        let ends = lull.ends();
        if lull.quiet >= LULL_WANTS || now >= ends {
            self.next_lull = now + now.saturating_sub(lull.since) * LULLS_APART;
            self.lull = None;
        }
    }

    /// A copy that took so long ended at `now`. `copies` are still in flight.
    pub fn copied(&mut self, took: Duration, now: Duration) {
        let part = self.part();
        if part < 1.0 {
            self.rest = now + took.min(LULL_MOST.0).mul_f64(1.0 / part - 1.0);
        }
    }

    /// The part of the smallest copy that the budget is, at most 1.
    fn part(&self) -> f64 {
        (self.beside / LEAST_COPY as f64).min(1.0)
    }

    /// What copies may do at `now`, where the window would have `target` bytes in flight in copies of `copy` bytes.
    pub fn allowance(&mut self, target: u64, copy: u64, now: Duration) -> Allowance {
        let (least, most) = (LEAST_COPY as f64 * LEAST_PART, target.max(LEAST_COPY) as f64);
        self.beside = self.beside.clamp(least, most);
        let Some(guest_at) = self.guest_at else { return Allowance::All };
        if let Some(lull) = &self.lull {
            return Allowance::Rest(lull.ends());
        }
        let silence = now.saturating_sub(guest_at).as_secs_f64() / SILENCE.as_secs_f64();
        let eased = if silence < 1.0 { self.beside } else { self.beside * silence.min(64.0).exp2() };
        if eased >= target as f64 {
            return Allowance::All;
        }
        if eased < LEAST_COPY as f64 && now < self.rest {
            return Allowance::Rest(self.rest);
        }
        // Two at least, where that is possible: one reads while the other writes.
        let half = (eased / 2.0) as u64;
        let size = if half.is_power_of_two() { half } else { half.next_power_of_two() / 2 };
        let copy = size.max(LEAST_COPY).min(copy);
        Allowance::Some { target: (eased as u64).max(copy), copy }
    }
}

impl Lull {
    fn ends(&self) -> Duration {
        self.still.map_or(self.since + LULL_MOST.0, |still| still + LULL_MOST.1)
    }
}

#[cfg(test)]
mod tests;
