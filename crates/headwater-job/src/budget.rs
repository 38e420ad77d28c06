//! How much copies may have in flight beside guests: a policy without I/O and without a clock; it is told what guests' requests took and when.
//!
//! Copies cost a guest time wherever both queue: in the device, on the source's line, on this thread. How much in flight is too much depends on
//! the device and on the guest, and changes; so it is not known but steered, by what guests' requests take.
//!
//! - **What it costs** is told by comparison with *quiet* requests, beside which no copy ran. A *lull*, in which no copy starts until a few
//!   requests were quiet, sees to it that there are some. Lulls take 3 % of the time, however long each has to be.
//! - **Two knobs.** Copies go in *bursts*, with rests in between. The *depth* is how much a burst has in flight: it decides how long a request may
//!   wait that meets one, and follows the requests that are far over what quiet ones take. The *duty* is the part of the time that bursts take: it
//!   decides how many requests meet one, and follows the median. Where a burst costs nearly nothing, duty becomes 1 and there are no rests.
//! - **Steps.** Each request moves both by a little: up if it was within the limit, down if not, and by so much that it balances where as many
//!   requests are over the limit as may be. No quantile of requests beside copies is ever computed, and a busy guest steers faster than one that
//!   asks for little.
//! - **A source that is far away** is another matter: what is in flight is on the way most of the time and costs nobody anything, until it queues in front of the
//!   line. Several copies share the depth, there are no rests, and the depth follows the median as well as the tail: so it settles where the line is full and hardly
//!   anything queues; each kind of requests has a depth of its own, and the least counts. It begins with what the way was seen to hold before a guest came. A guest that boots asks for little, and much of what it asks is here already and takes
//!   a time that is scattered anyway: so the first steps are large, and as many requests more may be over a limit as are without copies.
//! - **Bounds.** A burst is one smallest copy at least, and bursts take a sixteenth of the time at least: whatever the guests do, copies go on.
//! - **Silence.** The longer no guest asks for anything, the more copies may take, up to all. The first request that comes then ends that.

mod far;

use far::FarDepth;
use headwater_block::guest_latency::{Histogram, Kind, Seen};
use std::time::Duration;

/// The smallest copy beside a guest, in bytes. Smaller ones cost a disk more than they give a guest.
const LEAST_COPY: u64 = 64 << 10;

/// The depth and the duty at first.
const START: (f64, f64) = (262_144.0, 0.5);

/// The least part of the time that bursts take, and the part from which on there are no rests.
const DUTY: (f64, f64) = (1.0 / 16.0, 0.95);

/// By how much (of itself) a request that was within its limit lets a knob grow. A guest with 5000 requests a second doubles it in 35 ms.
const STEP: f64 = 1.0 / 256.0;

/// How many copies share the depth, if the source is far.
const FAR_COPIES: u64 = 4;

/// The part of requests that may be over the duty's limit. Half of them would be the median itself, which then jumps between what a request takes
/// that meets a burst and one that meets none.
const OVER_MEDIAN: f64 = 0.4;

/// The part of requests that copies may bring over the depth's limit.
const TAIL: f64 = 0.01;

/// What is assumed of quiet requests before any was seen: so many, of which half a one is over that limit; and so many if the source is far.
const ASSUMED: (f64, f64) = (100.0, 10.0);

/// A knob's logarithm changes by no more than this at once, whatever was seen.
const MOST_AT_ONCE: f64 = 1.4;

/// After so long without a request, what copies may have doubles, and again each time this passes.
pub(crate) const SILENCE: Duration = Duration::from_millis(200);

/// Quiet requests that make a lull long enough.
const LULL_WANTS: u32 = 16;

/// How long a lull waits for copies to end, and then for quiet requests.
const LULL_MOST: (Duration, Duration) = (Duration::from_millis(100), Duration::from_millis(20));

/// How long it waits for quiet requests if the source is far and too few are known.
const FIRST_LULL: Duration = Duration::from_millis(100);

/// A lull is followed by so many times its length without one.
const LULLS_APART: u32 = 32;

/// From so many quiet requests on, their median and their 99th percentile count.
const ENOUGH: (u32, u32) = (8, 200);

/// With so many quiet requests, older ones fade.
const REMEMBERED: u32 = 1000;

/// What guests are promised while copies run.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum GuestLatencyGoal {
    /// Requests take 1.5 times what they would without copies, in the median, and no more than one in a hundred is brought over four times that.
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
    /// How long it waits for quiet requests.
    patience: Duration,
}

/// A time with copies, up to the depth.
#[derive(Debug, Clone, Copy)]
struct Burst {
    since: Duration,
    bytes: u64,
}

/// The policy; see the module.
#[derive(Debug)]
pub struct Budget {
    goal: GuestLatencyGoal,
    /// The source is far away: then this is the depth.
    far: Option<FarDepth>,
    /// Bytes in flight in a burst.
    depth: f64,
    /// The part of the time that bursts take.
    duty: f64,
    burst: Option<Burst>,
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
    /// A budget that has seen no guest, for copies from a source that is `far` away or not.
    pub fn new(goal: GuestLatencyGoal, far: bool) -> Self {
        Self {
            goal,
            far: far.then(FarDepth::new),
            depth: START.0,
            duty: if far { 1.0 } else { START.1 },
            burst: None,
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

    /// The way is known to hold so many bytes, with nothing queueing anywhere. Counts until a guest comes.
    pub fn way_holds(&mut self, bytes: u64) {
        if let Some(far) = self.far.as_mut().filter(|_| self.guest_at.is_none()) {
            far.begin_with(bytes);
        }
    }

    /// How many bytes copies may have in flight beside a guest, and for what part of the time.
    pub fn knobs(&self) -> (u64, f64) {
        (self.depth as u64, self.duty)
    }

    /// Guests' requests were seen, up to `now`, with so many copies in flight now.
    pub fn observe(&mut self, seen: &Seen, copies: usize, now: Duration) {
        if seen.came + seen.went > 0 {
            self.guest_at = Some(now);
            let mut steps = [0.0; 2];
            for kind in Kind::ALL {
                let Some((count, within)) = self.within(kind as usize, seen) else { continue };
                match &mut self.far {
                    Some(far) => far.moves(kind as usize, count, within[0].min(within[1])),
                    None => steps = [0, 1].map(|knob| steps[knob] + within[knob] * STEP),
                }
            }
            let [depth, duty] = steps.map(|step| step.clamp(-MOST_AT_ONCE, MOST_AT_ONCE / 2.0).exp());
            self.depth = (self.depth * depth).max(LEAST_COPY as f64);
            self.duty = (self.duty * duty).clamp(DUTY.0, 1.0);
        }
        self.burst_ends(copies, now);
        self.lull(seen.quiet.iter().map(Histogram::len).sum(), copies, now);
    }

    /// How many requests of one kind were seen, and by how many more than must be they were within the limits of depth and duty.
    fn within(&mut self, kind: usize, seen: &Seen) -> Option<(f64, [f64; 2])> {
        let quiet = &mut self.quiet[kind];
        quiet.add_all(&seen.quiet[kind]);
        if quiet.len() > REMEMBERED {
            quiet.fade();
        }
        let (median, tail) = self.limits(kind, &seen.busy[kind])?;
        let over = |limit| f64::from(seen.busy[kind].over(limit));
        // Where copies rest, many requests meet none, and those count as well; but not those of a lull, which meet none in any case.
        let mut count = f64::from(seen.busy[kind].len());
        let (mut over_median, mut over_tail) = (median.map_or(0.0, over), over(tail));
        if self.lull.is_none() {
            count += f64::from(seen.quiet[kind].len());
            over_median += median.map_or(0.0, |median| f64::from(seen.quiet[kind].over(median)));
            over_tail += f64::from(seen.quiet[kind].over(tail));
        }
        // Some are over it without us.
        let quiet = &self.quiet[kind];
        let assumed = if self.far.is_some() { ASSUMED.1 } else { ASSUMED.0 };
        let may_be = TAIL + (f64::from(quiet.over(tail)) + 0.5) / (f64::from(quiet.len()) + assumed);
        let anyway = median.filter(|_| self.far.is_some() && quiet.len() >= ENOUGH.0);
        let anyway = anyway.map_or(0.0, |median| f64::from(quiet.over(median)) / f64::from(quiet.len()));
        let half_may_be = anyway + (1.0 - anyway) * OVER_MEDIAN;
        Some((count, [count - over_tail / may_be, count - over_median / half_may_be]))
    }

    /// What half of the requests of a kind may exceed, if that counts, and what one in a hundred may. None if nothing is known to compare
    /// them with.
    fn limits(&mut self, kind: usize, busy: &Histogram) -> Option<(Option<Duration>, Duration)> {
        let quiet = &self.quiet[kind];
        let (median, tail) = if quiet.len() >= ENOUGH.0 {
            let tail = if quiet.len() >= ENOUGH.1 { quiet.quantile(0.99) } else { None };
            // The median of a few may be far from the median of all.
            let unsure = if self.far.is_some() { f64::from(quiet.len()).sqrt().recip() } else { 0.0 };
            (quiet.quantile(0.5 + unsure)?, tail)
        } else {
            // Requests that take longer than a lull: the quickest are as near to quiet as can be seen.
            let busy_so_far = &mut self.busy[kind];
            busy_so_far.add_all(busy);
            if busy_so_far.len() > REMEMBERED {
                busy_so_far.fade();
            }
            let enough = busy_so_far.len() >= 2 * ENOUGH.0;
            let quickest = busy_so_far.quantile(0.1).filter(|_| enough)?;
            if self.far.is_some() && quickest < LULL_MOST.1 / 2 {
                // They are not too long: there just were few.
                return None;
            }
            (quickest, None)
        };
        Some(match self.goal {
            // Two buckets less than half as much again: both the median and the limit count with the whole of theirs. A burst may cost three times what a request
            // takes: then requests take less than twice as long on the average, and most devices have one in a hundred that takes that long anyway.
            GuestLatencyGoal::Relative => (Some(median * 5 / 4), median * 4),
            GuestLatencyGoal::Added(most) => (None, tail.unwrap_or(median * 2).saturating_add(most)),
        })
    }

    /// Begins and ends lulls.
    fn lull(&mut self, quiet: u32, copies: usize, now: Duration) {
        let Some(lull) = &mut self.lull else {
            let guest_is_there = self.guest_at.is_some_and(|at| now.saturating_sub(at) < SILENCE / 4);
            if guest_is_there && now >= self.next_lull {
                let known: u32 = self.quiet.iter().map(Histogram::len).sum();
                let patience = if self.far.is_some() && known < ENOUGH.0 { FIRST_LULL } else { LULL_MOST.1 };
                let still = (copies == 0).then_some(now);
                self.lull = Some(Lull { since: now, still, quiet: 0, patience });
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

    /// A copy of `bytes` begins.
    pub fn begun(&mut self, bytes: u64, now: Duration) {
        let burst = self.burst.get_or_insert(Burst { since: now, bytes: 0 });
        burst.bytes += bytes;
    }

    /// Ends a burst when it had its bytes, and nothing is in flight any more.
    fn burst_ends(&mut self, copies: usize, now: Duration) {
        if let Some(Burst { since, bytes }) = self.burst
            && copies == 0
        {
            self.burst = None;
            // One that had less had nothing more to copy.
            if bytes as f64 > self.depth / 2.0 && self.duty < DUTY.1 {
                let took = now.saturating_sub(since).min(LULL_MOST.0);
                self.rest = now + took.mul_f64(1.0 / self.duty - 1.0);
            }
        }
    }

    /// What copies may do at `now`, where the window would have `target` bytes in flight in copies of `copy` bytes.
    pub fn allowance(&mut self, target: u64, copy: u64, now: Duration) -> Allowance {
        let most = target.max(LEAST_COPY) as f64;
        self.depth = match &mut self.far {
            Some(far) => far.least(most),
            None => self.depth.min(most),
        };
        let Some(guest_at) = self.guest_at else { return Allowance::All };
        if let Some(lull) = &self.lull {
            return Allowance::Rest(lull.ends());
        }
        let silence = now.saturating_sub(guest_at).as_secs_f64() / SILENCE.as_secs_f64();
        let mut depth = self.depth;
        if silence >= 1.0 {
            depth *= silence.min(64.0).exp2();
        } else if self.duty < DUTY.1 && now < self.rest {
            return Allowance::Rest(self.rest);
        }
        let rests = silence < 1.0 && self.duty < DUTY.1;
        if depth >= target as f64 && !rests {
            return Allowance::All;
        }
        // On a disk, one large copy before several: it moves more than two of half its size, and a guest's read waits less for it.
        let depth = depth.min(target.max(LEAST_COPY) as f64);
        let size = depth as u64 / if self.far.is_some() { FAR_COPIES } else { 1 };
        let size = if size.is_power_of_two() { size } else { size.next_power_of_two() / 2 };
        let copy = size.max(LEAST_COPY).min(copy);
        if rests && self.burst.is_some_and(|burst| (burst.bytes + copy) as f64 > depth) {
            // It had all its bytes, and ends with its last copy.
            return Allowance::Rest(now + SILENCE);
        }
        Allowance::Some { target: (depth as u64).max(copy), copy }
    }
}

impl Lull {
    fn ends(&self) -> Duration {
        self.still.map_or(self.since + LULL_MOST.0, |still| still + self.patience)
    }
}

#[cfg(test)]
mod tests;
