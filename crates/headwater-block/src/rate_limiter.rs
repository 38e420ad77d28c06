//! The one rate limiter: job speed, throttle groups and sources all use it.
//!
//! A token bucket without I/O and without a clock of its own: it is told the time and says how long to wait. The bucket
//! may go into debt, so that a request larger than the bucket passes at once and those behind it wait it off; in the long run the
//! rate holds exactly.
//!
//! # Rules
//! - **Fairness.** Those who wait are served in the order in which they reserved.
//! - **Cancellation.** What was reserved is not given back: a waiter that leaves makes the others go no faster than the rate.

use crate::clock::Clock;
use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

/// How much may pass at once after a pause, as a time at the given rate.
const BURST: Duration = Duration::from_millis(100);

/// Limits a flow to a number of units (bytes, requests) per second.
pub struct RateLimiter {
    /// Units per second; 0 is without limit.
    rate: Cell<u64>,
    /// When everything reserved so far will have passed, at the rate.
    paid_until: Cell<Duration>,
}

impl RateLimiter {
    /// A limiter of `rate` units per second; 0 is without limit.
    pub fn new(rate: u64) -> Rc<Self> {
        Rc::new(Self { rate: Cell::new(rate), paid_until: Cell::new(Duration::ZERO) })
    }

    /// The rate in units per second; 0 is without limit.
    pub fn rate(&self) -> u64 {
        self.rate.get()
    }

    /// Changes the rate. Debts made at the old rate are forgotten, so that a raised limit takes effect at once; those who already
    /// wait are asked again by [`RateLimiter::acquire`] within 100 ms.
    pub fn set_rate(&self, rate: u64) {
        self.rate.set(rate);
        self.paid_until.set(Duration::ZERO);
    }

    /// Reserves `units` at time `now` and returns when they may pass (at or before `now` is at once).
    pub fn reserve(&self, units: u64, now: Duration) -> Duration {
        let rate = self.rate.get();
        if rate == 0 {
            return now;
        }
        let start = self.paid_until.get().max(now.saturating_sub(BURST));
        let nanos = u128::from(units) * 1_000_000_000 / u128::from(rate);
        let cost = Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX));
        self.paid_until.set(start.saturating_add(cost));
        start
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
    fn huge_requests_do_not_overflow() {
        let limiter = RateLimiter::new(1);
        limiter.reserve(u64::MAX, SECOND);
        limiter.reserve(u64::MAX, SECOND);
    }
}
