//! How much the copy engine keeps in flight: a policy without I/O and without a clock; it is told what happened and when.
//!
//! A source that is far away needs many copies in flight, a near one a few; too many only queue up somewhere, where guest
//! requests wait behind them and memory is held.
//!
//! The window goes on *trial* with another size, and the rate decides:
//! - **up**, half as much again: it stays if copying became faster;
//! - **down**, to what the path holds by its rate and its least latency (which is what queues add nothing to): it stays if copying is
//!   as fast as before. The latency only proposes, so that a few quick answers from a cache can't mislead.
//!
//! Trials that fail make the next one wait longer; a rate that changes by itself makes it come at once.
//!
//! Copies from a far source that begin together, as the first ones do, are *staggered*: of different sizes, in equal steps down from the full one. Connections that share a
//! link share it evenly, so that copies of one size which began together end together, and the link then stands still for a round trip, again and again: they never
//! come apart by themselves. Any disturbance may bring them together again: this process needn't have had the processor for a while, and finds all of them done.
//!
//! An *epoch* is as long as it takes to copy one window. After a change one passes unmeasured, for what was begun before it. Epochs
//! in which something else held the engine back (a speed limit, a pause, a guest) say nothing and are left out.

use std::collections::VecDeque;
use std::time::Duration;

/// How many epochs the least latency is remembered for.
const MEMORY: usize = 8;

/// How many epochs pass between two trials: at first, and at most.
const PATIENCE: (u32, u32) = (4, 32);

/// Copies begin together if no more than such a part of a copy's latency lies between each and the next. Those that don't are a window's length apart, divided by
/// how many there are.
const TOGETHER: u32 = 64;

/// A copy should take no more than about this share of a second of the source's bandwidth, so that a guest's read that
/// arrives behind it doesn't wait for long: 1/16.
const COPIES_PER_SECOND: u64 = 16;

/// Between which limits the window moves; all in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bounds {
    /// The smallest copy that is worth a request of its own.
    pub least_copy: u64,
    /// The largest copy.
    pub most_copy: u64,
    /// How many copies are in flight at least.
    pub least_copies: u64,
    /// What is in flight before anything was measured.
    pub start: u64,
    /// The most that is ever in flight.
    pub most: u64,
    /// What is in flight is on its way most of the time, so that copies are staggered; see the [module](self) and [`crate::budget`].
    pub far: bool,
}

impl Bounds {
    /// For local files: 16 copies of 1 MiB keep a disk busy with reading and writing at once.
    pub const LOCAL: Bounds = Bounds {
        least_copy: 256 << 10,
        most_copy: 1 << 20,
        least_copies: 8,
        start: 16 << 20,
        most: 32 << 20,
        far: false,
    };

    /// For what is reached over a network: starts with 16 copies of 2 MiB, enough for 1.6 GB/s at 20 ms.
    pub const REMOTE: Bounds = Bounds {
        least_copy: 128 << 10,
        most_copy: 2 << 20,
        least_copies: 4,
        start: 32 << 20,
        most: 64 << 20,
        far: true,
    };

    /// The same with no copy larger than `bytes`, and all of it kept in order.
    pub fn with_copies_up_to(self, bytes: u64) -> Bounds {
        let most_copy = self.most_copy.min(bytes).max(1);
        Bounds { most_copy, least_copy: self.least_copy.min(most_copy), ..self }
    }

    /// The same with no more than `bytes` in flight (at least one copy).
    pub fn with_at_most(self, bytes: u64) -> Bounds {
        let most = self.most.min(bytes).max(1);
        Bounds { most, start: self.start.min(most), ..self.with_copies_up_to(most) }
    }
}

/// What is on trial.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Trial {
    None,
    Up { from: u64, before: u64 },
    Down { from: u64, before: u64 },
}

/// The epoch that runs.
#[derive(Debug, Clone, Copy)]
struct Epoch {
    since: Duration,
    bytes: u64,
    least_latency: Duration,
    /// Nothing but the window limited it.
    full: bool,
}

/// Copies that began together.
#[derive(Debug, Clone, Copy)]
struct Burst {
    last: Duration,
    copies: u64,
}

/// The window; see the module.
#[derive(Debug)]
pub struct Window {
    bounds: Bounds,
    target: u64,
    copy: u64,
    epoch: Option<Epoch>,
    latencies: VecDeque<Duration>,
    trial: Trial,
    /// The next epoch isn't measured.
    settling: bool,
    next_is_up: bool,
    /// The rate of the last epoch that was measured outside a trial.
    rate: u64,
    wait: u32,
    patience: u32,
    /// Those that began last.
    burst: Option<Burst>,
    /// What the last copy took; none since the start.
    latency: Option<Duration>,
}

impl Window {
    /// A window that has measured nothing yet.
    pub fn new(bounds: Bounds) -> Self {
        Self {
            bounds,
            target: bounds.start.clamp(1, bounds.most),
            copy: bounds.most_copy,
            epoch: None,
            latencies: VecDeque::with_capacity(MEMORY),
            trial: Trial::None,
            settling: false,
            next_is_up: true,
            rate: 0,
            wait: 0,
            patience: PATIENCE.0,
            burst: None,
            latency: None,
        }
    }

    /// The size of the copy that begins at `now`, where it would be `copy` bytes if it weren't staggered.
    pub fn staggered(&self, copy: u64, now: Duration) -> u64 {
        let copies = self.target / copy.max(1);
        let before = self.together(now).map_or(0, |burst| burst.copies);
        // Those beyond one window wait for others to end, and so come apart.
        if !self.bounds.far || before >= copies {
            return copy;
        }
        let size = u128::from(copy) * u128::from(copies - before) / u128::from(copies);
        let size = u64::try_from(size).unwrap_or(copy).max(1);
        size.checked_next_multiple_of(self.bounds.least_copy).map_or(copy, |size| size.min(copy))
    }

    /// True if copies are staggered, so that they end anywhere.
    pub fn staggers(&self) -> bool {
        self.bounds.far
    }

    /// A copy of data begins.
    pub fn begins(&mut self, now: Duration) {
        let copies = self.together(now).map_or(0, |burst| burst.copies);
        self.burst = Some(Burst { last: now, copies: copies + 1 });
    }

    /// Those together with which a copy would begin now.
    fn together(&self, now: Duration) -> Option<Burst> {
        let most = self.latency.map_or(Duration::MAX, |latency| latency / TOGETHER);
        self.burst.filter(|burst| now.saturating_sub(burst.last) <= most)
    }

    /// How many bytes should be in flight now.
    pub fn target(&self) -> u64 {
        self.target
    }

    /// How many bytes the next copy should have, at most.
    pub fn copy(&self) -> u64 {
        self.copy
    }

    /// Less than this is not worth a trial.
    fn floor(&self) -> u64 {
        self.bounds.least_copies.saturating_mul(self.copy).min(self.bounds.most)
    }

    /// Something else than the window holds the engine back in this epoch.
    pub fn held_back(&mut self) {
        if let Some(epoch) = &mut self.epoch {
            epoch.full = false;
        }
    }

    /// The engine starts after a pause: what was measured in the epoch so far means nothing.
    pub fn restart(&mut self) {
        self.epoch = None;
        (self.burst, self.latency) = (None, None);
    }

    /// A copy of `bytes` that took `latency` completed at `now`.
    pub fn completed(&mut self, bytes: u64, latency: Duration, now: Duration) {
        self.latency = Some(latency);
        let fresh = Epoch { since: now, bytes: 0, least_latency: latency, full: true };
        let Some(epoch) = &mut self.epoch else {
            // The first completion only sets the mark that rates are measured from.
            self.epoch = Some(fresh);
            return;
        };
        epoch.bytes = epoch.bytes.saturating_add(bytes);
        epoch.least_latency = epoch.least_latency.min(latency);
        let ended = *epoch;
        let elapsed = now.saturating_sub(ended.since);
        if ended.bytes < self.target || elapsed.is_zero() {
            return;
        }
        self.epoch = Some(Epoch { least_latency: Duration::MAX, ..fresh });
        if self.latencies.len() == MEMORY {
            self.latencies.pop_front();
        }
        self.latencies.push_back(ended.least_latency);
        if ended.full && !std::mem::take(&mut self.settling) {
            let rate = u128::from(ended.bytes) * 1_000_000_000 / elapsed.as_nanos();
            self.measured(u64::try_from(rate).unwrap_or(u64::MAX));
        }
    }

    /// An epoch passed at `rate` bytes per second.
    fn measured(&mut self, rate: u64) {
        let percent_of = |percent: u64, rate: u64| u128::from(percent) * u128::from(rate) / 100;
        let at_least = |percent, before| u128::from(rate) >= percent_of(percent, before);
        match self.trial {
            Trial::None => {
                if !at_least(70, self.rate) || (self.rate > 0 && at_least(140, self.rate)) {
                    (self.wait, self.patience) = (0, PATIENCE.0);
                    self.next_is_up = true;
                }
                self.rate = rate;
            }
            Trial::Up { from, before } => {
                if at_least(105, before) {
                    self.rate = rate;
                } else {
                    self.change(from);
                    self.next_is_up = false;
                }
            }
            Trial::Down { from, before } => {
                if at_least(93, before) {
                    self.rate = rate;
                } else {
                    self.change(from);
                    self.give_up();
                }
            }
        }
        self.trial = Trial::None;
        let copy = (rate / COPIES_PER_SECOND).max(1);
        let copy = if copy.is_power_of_two() { copy } else { copy.next_power_of_two() / 2 };
        self.copy = copy.clamp(self.bounds.least_copy, self.bounds.most_copy);
        match self.wait.checked_sub(1) {
            Some(rest) => self.wait = rest,
            None => self.propose(),
        }
    }

    /// What the path holds by its rate and its least latency, in bytes: so much is in flight where nothing queues. 0 if nothing was measured.
    pub fn held(&self) -> u64 {
        let latency = self.latencies.iter().min().copied().unwrap_or_default();
        let held = u128::from(self.rate) * latency.as_nanos() / 1_000_000_000;
        u64::try_from(held).unwrap_or(u64::MAX)
    }

    /// Starts the next trial.
    fn propose(&mut self) {
        let (from, before) = (self.target, self.rate);
        if self.next_is_up {
            let more = from.saturating_add(from / 2).max(self.floor()).min(self.bounds.most);
            if more > from {
                self.trial = Trial::Up { from, before };
                return self.change(more);
            }
            self.next_is_up = false;
        }
        let held = self.held();
        // A quarter more than the path holds, and two copies, because copies end in lumps.
        let enough = held.saturating_add(held / 4).saturating_add(2 * self.copy);
        let less = enough.max(from / 4).max(self.floor());
        if less < from - from / 10 {
            self.trial = Trial::Down { from, before };
            self.change(less);
        } else {
            self.give_up();
        }
    }

    /// Nothing better was found: the next trial can wait.
    fn give_up(&mut self) {
        self.next_is_up = true;
        self.wait = self.patience;
        self.patience = (self.patience * 2).min(PATIENCE.1);
    }

    fn change(&mut self, target: u64) {
        self.target = target;
        self.settling = true;
    }
}

#[cfg(test)]
mod tests;
