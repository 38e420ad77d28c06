//! The one rate limiter: job speed, throttle groups and sources all use it.
//!
//! A token bucket without I/O and without a clock of its own: it is told the time and says how long to wait. The bucket
//! may go into debt, so that a request larger than the bucket passes at once and those behind it wait it off; in the long run the
//! rate holds exactly. What a pause saves up, the burst, is 100 ms of the rate unless [`RateLimiter::set_burst`] says otherwise.
//!
//! # Rules
//! - **Fairness.** Those who wait are served in the order in which they reserved.
//! - **Cancellation.** What was reserved is not given back: a waiter that leaves makes the others go no faster than the rate.

use crate::clock::Clock;
use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

/// How much may pass at once after a pause, as a time at the given rate; and how often [`RateLimiter::acquire`] looks for a new rate.
const BURST: Duration = Duration::from_millis(100);

/// Limits a flow to a number of units (bytes, requests) per second.
pub struct RateLimiter {
    /// Units per second; 0 is without limit.
    rate: Cell<u64>,
    /// How much may pass at once after a pause, as a time at the rate.
    burst: Cell<Duration>,
    /// When everything reserved so far is paid for, and the whole burst saved up again.
    full_at: Cell<Duration>,
}

impl RateLimiter {
    /// A limiter of `rate` units per second; 0 is without limit.
    pub fn new(rate: u64) -> Rc<Self> {
        Rc::new(Self { rate: Cell::new(rate), burst: Cell::new(BURST), full_at: Cell::new(Duration::ZERO) })
    }

    /// The rate in units per second; 0 is without limit.
    pub fn rate(&self) -> u64 {
        self.rate.get()
    }

    /// Changes the rate. Debts made at the old rate are forgotten, so that a raised limit takes effect at once; those who already
    /// wait are asked again by [`RateLimiter::acquire`] within 100 ms.
    pub fn set_rate(&self, rate: u64) {
        self.rate.set(rate);
        self.full_at.set(Duration::ZERO);
    }

    /// Changes how much may pass at once after a pause: `units` more than the rate allows. What was used of the old burst is forgotten.
    pub fn set_burst(&self, units: u64) {
        self.burst.set(self.cost(units));
        self.full_at.set(Duration::ZERO);
    }

    /// When the next units may pass, however many, if they are reserved at `now` (at or before `now` is at once).
    pub fn ready(&self, now: Duration) -> Duration {
        if self.rate.get() == 0 { now } else { self.full_at.get().max(now).saturating_sub(self.burst.get()) }
    }

    /// The time that `units` take at the rate.
    fn cost(&self, units: u64) -> Duration {
        let nanos = u128::from(units) * 1_000_000_000;
        nanos.checked_div(u128::from(self.rate.get())).map_or(Duration::ZERO, |nanos| {
            Duration::new(
                u64::try_from(nanos / 1_000_000_000).unwrap_or(u64::MAX),
                (nanos % 1_000_000_000) as u32,
            )
        })
    }

    /// Reserves `units` at time `now` and returns when they may pass (at or before `now` is at once).
    pub fn reserve(&self, units: u64, now: Duration) -> Duration {
        let ready = self.ready(now);
        if self.rate.get() > 0 {
            self.full_at.set(self.full_at.get().max(now).saturating_add(self.cost(units)));
        }
        ready
    }

    /// Waits until `units` may pass.
    pub async fn acquire(&self, units: u64, clock: &dyn Clock) {
        let mut rate = self.rate.get();
        let mut until = self.reserve(units, clock.now());
        while until > clock.now() {
            clock.sleep_until(until.min(clock.now() + BURST)).await;
            if self.rate.get() != rate {
                rate = self.rate.get();
                until = self.reserve(units, clock.now());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn the_long_run_rate_is_exact() {
        let limiter = RateLimiter::new(1000);
        let mut now = SECOND;
        for _ in 0..100 {
            now = now.max(limiter.reserve(500, now));
        }
        // 100 * 500 units at 1000/s take 50 s; the last reservation starts half a second before its end, a burst earlier.
        let took = now - SECOND;
        assert!(took <= SECOND * 50 && took >= SECOND * 49, "{took:?}");
    }

    #[test]
    fn no_limit_never_waits_and_a_pause_saves_up_only_a_burst() {
        let limiter = RateLimiter::new(0);
        assert_eq!(limiter.reserve(u64::MAX, SECOND), SECOND);
        limiter.set_rate(10);
        let later = SECOND * 100;
        assert!(limiter.reserve(10, later) <= later);
        assert!(limiter.reserve(10, later) > later, "an idle hour is not a credit");
    }

    #[test]
    fn a_burst_of_its_own_is_there_from_the_start_and_comes_back_at_the_rate() {
        let limiter = RateLimiter::new(10);
        limiter.set_burst(50);
        let passes = |now| {
            (0..1000).take_while(|_| limiter.ready(now) <= now && limiter.reserve(1, now) <= now).count()
        };
        // The one that empties the bucket still passes.
        assert_eq!(passes(Duration::ZERO), 51);
        assert_eq!(passes(SECOND), 10);
        assert_eq!(passes(SECOND * 100), 51);
        limiter.set_rate(0);
        assert_eq!(passes(SECOND * 100), 1000);
    }

    #[test]
    fn huge_requests_do_not_overflow() {
        let limiter = RateLimiter::new(1);
        limiter.reserve(u64::MAX, SECOND);
        limiter.reserve(u64::MAX, SECOND);
    }
}
