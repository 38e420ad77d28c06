//! How far a job is, how fast, and how long it will take: pure.

use std::time::Duration;

/// How far a job is. All in bytes of the guest's disk.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Progress {
    /// What really must be copied: data that the source holds and the target lacked when the job came by. An estimate until the
    /// whole disk was looked at, then exact; a job that follows changes adds what was changed.
    pub total: u64,
    /// What of it is done, whoever did it.
    pub done: u64,
    /// True once the whole disk was looked at, so that `total` is exact.
    pub total_is_exact: bool,
    /// What was written into the target as data.
    pub copied: u64,
    /// What became zeroes in the target, which take no space: holes of the source, and zeroes that were found in its data.
    pub zeroes: u64,
    /// What guests had made local between the look and the copy.
    pub skipped: u64,
    /// Parts that failed and will be tried again.
    pub failed: u64,
    /// How many bytes of storage the rest takes, an estimate as long as `total` is.
    pub needs: u64,
    /// How many bytes are free for them and for guests, as last asked; none if that isn't known.
    pub free: Option<u64>,
    /// Bytes per second of `done`, over the last seconds.
    pub rate: u64,
    /// How long it takes until the end at that rate; none if that can't be said.
    pub eta: Option<Duration>,
}

/// The time over which the rate is smoothed.
const SMOOTH: Duration = Duration::from_secs(3);

/// How often the rate is updated at most.
const STEP: Duration = Duration::from_millis(100);

/// Measures a rate that doesn't jump.
#[derive(Debug, Default)]
pub(crate) struct RateMeter {
    last: Option<(Duration, u64)>,
    begun: Duration,
    rate: f64,
}

impl RateMeter {
    /// `done` bytes in all are done at `now`; returns bytes per second.
    pub(crate) fn observe(&mut self, now: Duration, done: u64) -> u64 {
        let Some((then, before)) = self.last else {
            self.last = Some((now, done));
            self.begun = now;
            return 0;
        };
        let elapsed = now.saturating_sub(then);
        if elapsed >= STEP {
            let rate = done.saturating_sub(before) as f64 / elapsed.as_secs_f64();
            // In the beginning all of the time since then counts the same.
            let age = now.saturating_sub(self.begun).min(SMOOTH).max(elapsed);
            let weight = (elapsed.as_secs_f64() / age.as_secs_f64()).min(1.0);
            self.rate += (rate - self.rate) * weight;
            self.last = Some((now, done));
        }
        self.rate as u64
    }

    /// A pause doesn't count.
    pub(crate) fn restart(&mut self, now: Duration) {
        if let Some((then, _)) = &mut self.last {
            *then = now;
        }
    }
}

/// How long the rest takes.
pub(crate) fn eta(total: u64, done: u64, rate: u64) -> Option<Duration> {
    let rest = total.saturating_sub(done);
    if rest == 0 {
        return Some(Duration::ZERO);
    }
    (rate > 0).then(|| Duration::from_secs_f64((rest as f64 / rate as f64).min(1e9)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_follows_and_smooths() {
        let mut meter = RateMeter::default();
        let mut done = 0;
        let mut rate = 0;
        for n in 0..100 {
            rate = meter.observe(Duration::from_millis(100 * n), done);
            done += 1000;
        }
        assert!((9_900..=10_100).contains(&rate), "{rate}");
        let after_a_gap = meter.observe(Duration::from_millis(10_000), done);
        assert!((9_000..=10_100).contains(&after_a_gap), "{after_a_gap}");
        assert_eq!(eta(30_000, 10_000, 10_000), Some(Duration::from_secs(2)));
        assert_eq!(eta(30_000, 10_000, 0), None);
        assert_eq!(eta(10, 10, 0), Some(Duration::ZERO));
    }
}
