//! How long a read of one replica will take, from how long others took.
//!
//! The model is a pipe with a latency and a rate: a read is done after the latency, once all bytes that were asked for before it and its own
//! have passed. Both follow what was measured by an eighth of the difference each time. The rate of a read is what the replica delivered between its start and its end,
//! whoever it was for, over that time. A read that doesn't fill the pipe says only that the rate is no lower.
//!
//! Beside the model stands how far it was wrong of late, as a ratio: when a read takes longer than nearly all others did by that measure, the replica is slow.

use std::time::Duration;

/// Reads of fewer bytes say nothing of the rate.
const TELLS_RATE: u64 = 64 << 10;

/// How much a new measurement counts.
const WEIGHT: f64 = 0.125;

/// How many ratios are remembered, and how many of them must be there before they say something.
const REMEMBERED: usize = 64;
const ENOUGH: usize = 8;

/// A read is slow when it takes longer than this share of reads.
const QUANTILE: f64 = 0.95;

/// A replica of which nothing is known, in seconds and in bytes a second.
const UNKNOWN: (f64, f64) = (0.05, 50e6);

/// What has been measured of one replica.
#[derive(Debug, Default)]
pub(super) struct Pace {
    /// In seconds.
    latency: Option<f64>,
    /// In bytes a second.
    rate: Option<f64>,
    /// Bytes that were asked for and have not come.
    in_flight: u64,
    /// Bytes that have come so far.
    delivered: u64,
    /// How long the latest reads took, as multiples of what was expected.
    ratios: Vec<f64>,
    next_ratio: usize,
}

/// A read that has started.
#[derive(Debug, Clone, Copy)]
pub(super) struct Started {
    at: Duration,
    len: u64,
    /// How long it was expected to take, in seconds.
    expected: f64,
    /// With its own bytes.
    in_flight: u64,
    delivered: u64,
}

impl Started {
    /// When it started.
    pub(super) fn at(&self) -> Duration {
        self.at
    }
}

impl Pace {
    /// In how many seconds a read of `len` bytes that starts now will be done. One that was never measured and isn't being measured is tried at once.
    pub(super) fn expected(&self, len: u64) -> f64 {
        let untried = self.latency.is_none() || (self.rate.is_none() && len >= TELLS_RATE);
        if untried && self.in_flight == 0 {
            return 0.0;
        }
        let (latency, rate) = (self.latency.unwrap_or(UNKNOWN.0), self.rate.unwrap_or(UNKNOWN.1));
        latency + (self.in_flight + len) as f64 / rate
    }

    /// A read starts; [`Pace::ended`] must follow.
    pub(super) fn start(&mut self, len: u64, now: Duration) -> Started {
        let expected = self.expected(len);
        self.in_flight += len;
        Started { at: now, len, expected, in_flight: self.in_flight, delivered: self.delivered }
    }

    /// The read isn't in flight any more, however it ended.
    pub(super) fn ended(&mut self, read: &Started) {
        self.in_flight -= read.len;
    }

    /// It brought its bytes. A request for none (a status) may be answered from memory, and says nothing.
    pub(super) fn succeeded(&mut self, read: &Started, now: Duration) {
        if read.len == 0 {
            return;
        }
        self.delivered += read.len;
        let seconds = (now.saturating_sub(read.at)).as_secs_f64().max(1e-6);
        self.note_ratio(seconds, read.expected);
        let rate = (self.delivered - read.delivered) as f64 / seconds;
        let filled = match (self.latency, self.rate) {
            (Some(latency), Some(known)) => read.in_flight as f64 >= known * latency,
            _ => true,
        };
        if read.len >= TELLS_RATE {
            self.rate = Some(match self.rate {
                Some(known) if filled || rate > known => known + (rate - known) * WEIGHT,
                Some(known) => known,
                None => rate,
            });
        }
        if read.len <= TELLS_RATE || self.latency.is_none() {
            // Of a long read the latency is the small difference of two large numbers.
            let transfer = self.rate.map_or(0.0, |rate| read.in_flight as f64 / rate);
            self.note_latency((seconds - transfer).max(0.0));
        }
    }

    /// It was overtaken by another replica's: it takes at least so long.
    pub(super) fn overtaken(&mut self, read: &Started, now: Duration) {
        let seconds = now.saturating_sub(read.at).as_secs_f64();
        if seconds > read.expected {
            self.note_ratio(seconds, read.expected);
            let transfer = self.rate.map_or(0.0, |rate| read.in_flight as f64 / rate);
            if seconds - transfer > self.latency.unwrap_or(0.0) {
                self.note_latency(seconds - transfer);
            }
        }
    }

    fn note_latency(&mut self, seconds: f64) {
        self.latency = Some(self.latency.map_or(seconds, |known| known + (seconds - known) * WEIGHT));
    }

    fn note_ratio(&mut self, seconds: f64, expected: f64) {
        if expected <= 0.0 {
            return;
        }
        let ratio = seconds / expected;
        if self.ratios.len() < REMEMBERED {
            self.ratios.push(ratio);
        } else {
            self.ratios[self.next_ratio] = ratio;
            self.next_ratio = (self.next_ratio + 1) % REMEMBERED;
        }
    }

    /// After how much time a read is slower than nearly all were. None while that isn't known.
    pub(super) fn slow_after(&self, read: &Started) -> Option<Duration> {
        if self.ratios.len() < ENOUGH || read.expected <= 0.0 {
            return None;
        }
        let mut sorted = self.ratios.clone();
        sorted.sort_by(f64::total_cmp);
        let at = ((sorted.len() as f64 * QUANTILE) as usize).min(sorted.len() - 1);
        Some(Duration::from_secs_f64((sorted[at] * read.expected).min(60.0)))
    }

    /// How long it was expected to take.
    pub(super) fn expected_of(read: &Started) -> Duration {
        Duration::from_secs_f64(read.expected.min(3600.0))
    }

    /// In seconds.
    pub(super) fn latency(&self) -> f64 {
        self.latency.unwrap_or(0.0)
    }

    /// In bytes a second.
    pub(super) fn rate(&self) -> f64 {
        self.rate.unwrap_or(0.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(n: u64) -> Duration {
        Duration::from_millis(n)
    }

    #[test]
    fn the_model_finds_latency_and_rate() {
        // 10 ms away, 100 MB/s: reads of two sizes, one after the other.
        let mut pace = Pace::default();
        let mut now = Duration::ZERO;
        for n in 0..400 {
            let len = if n % 2 == 0 { 4096 } else { 10_000_000 };
            let read = pace.start(len, now);
            now += ms(10) + Duration::from_secs_f64(len as f64 / 100e6);
            pace.ended(&read);
            pace.succeeded(&read, now);
        }
        let small = pace.expected(4096);
        assert!((0.008..0.025).contains(&small), "{small}");
        let large = pace.expected(10_000_000);
        assert!((0.09..0.15).contains(&large), "{large}");
        // What waits already comes first.
        pace.start(10_000_000, now);
        assert!(pace.expected(4096) > 0.09);
    }

    #[test]
    fn a_read_is_slow_when_nearly_all_were_faster() {
        let mut pace = Pace::default();
        let mut now = Duration::ZERO;
        for n in 0..100 {
            let read = pace.start(4096, now);
            now += if n % 50 == 49 { ms(300) } else { ms(10) };
            pace.ended(&read);
            pace.succeeded(&read, now);
        }
        let read = pace.start(4096, now);
        let slow = pace.slow_after(&read).unwrap();
        assert!(slow >= ms(5) && slow < ms(120), "{slow:?}");
        let before = pace.latency();
        pace.overtaken(&read, now + ms(500));
        assert!(pace.latency() > before, "who is overtaken is slow");
    }
}
