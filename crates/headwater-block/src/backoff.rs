//! Trying again: how long to pause before it, and for how long to go on with it. Pure.

use std::time::Duration;

/// For how long something that may pass is waited out.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Patience {
    /// It isn't: the first failure counts.
    #[default]
    None,
    /// So long after the first failure; then the last one counts.
    For(Duration),
    /// Until it has passed.
    Forever,
}

impl Patience {
    /// True if it still lasts when something has been waited for so long.
    pub fn lasts(self, waited: Duration) -> bool {
        self.rest(waited).is_none_or(|rest| !rest.is_zero())
    }

    /// How much of it is left; none if that is without end.
    pub fn rest(self, waited: Duration) -> Option<Duration> {
        match self {
            Patience::None => Some(Duration::ZERO),
            Patience::For(bound) => Some(bound.saturating_sub(waited)),
            Patience::Forever => None,
        }
    }
}

/// The pauses between attempts: each up to twice as long as the one before, with jitter, so that those who failed together don't all come
/// back together.
#[derive(Debug, Clone)]
pub struct Backoff {
    first: Duration,
    longest: Duration,
    attempts: u32,
    random: u64,
}

impl Backoff {
    /// Pauses from `first` to `longest`. What `seed` is doesn't matter, as long as it differs.
    pub fn new(first: Duration, longest: Duration, seed: u64) -> Self {
        Self { first, longest, attempts: 0, random: seed }
    }

    /// How long to pause before the next attempt: between a half and the whole of what has grown so far.
    pub fn pause(&mut self) -> Duration {
        let whole = self.first.saturating_mul(1 << self.attempts.min(16)).min(self.longest);
        self.attempts = self.attempts.saturating_add(1);
        // One step of splitmix64.
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.random ^ (self.random >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        let share = (mixed >> 40) as f64 / (1_u64 << 24) as f64;
        whole.mul_f64(0.5 + share / 2.0)
    }

    /// How many pauses there were since the beginning or the last [`Backoff::restart`].
    pub fn attempts(&self) -> u32 {
        self.attempts
    }

    /// Something succeeded: the next failure is a first one.
    pub fn restart(&mut self) {
        self.attempts = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_to_their_bound_and_no_two_parties_keep_step() {
        let (first, longest) = (Duration::from_millis(100), Duration::from_secs(2));
        let mut seen = Vec::new();
        for seed in 0..50 {
            let mut backoff = Backoff::new(first, longest, seed);
            for n in 0..100 {
                let whole = first.saturating_mul(1 << n.min(16)).min(longest);
                let pause = backoff.pause();
                assert!(whole / 2 <= pause && pause <= whole, "{seed}, {n}: {pause:?}");
                if n == 10 {
                    seen.push(pause);
                }
            }
            backoff.restart();
            assert!(backoff.pause() <= first);
        }
        seen.sort();
        seen.dedup();
        assert!(seen.len() > 45, "{seen:?}");
    }

    #[test]
    fn patience_ends_where_it_says() {
        let bound = Duration::from_secs(5);
        assert!(!Patience::None.lasts(Duration::ZERO));
        assert!(
            Patience::For(bound).lasts(Duration::from_millis(4999)) && !Patience::For(bound).lasts(bound)
        );
        assert!(Patience::Forever.lasts(Duration::MAX));
    }
}
