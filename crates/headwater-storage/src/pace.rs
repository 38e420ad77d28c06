//! When a response comes, but too slowly to be waited for.

use std::time::Duration;
use tokio::time::Instant;

/// A response that brings less than this for as long as a server may be silent, in bytes a second, is given up, and the rest asked for anew: a connection may
/// be bad although others are not. What has come is kept, so a line that gives no more isn't asked for the same bytes twice.
const LEAST_RATE: f32 = 4096.0;

/// How fast a response comes.
pub(crate) struct Pace {
    silence: Duration,
    since: Instant,
    bytes: usize,
}

impl Pace {
    /// That of a response that begins now, from a server that may be silent for so long.
    pub(crate) fn new(silence: Duration) -> Self {
        Self { silence, since: Instant::now(), bytes: 0 }
    }

    /// So many bytes came. True if it is too slow.
    pub(crate) fn is_too_slow(&mut self, bytes: usize) -> bool {
        self.bytes += bytes;
        if self.since.elapsed() < self.silence {
            return false;
        }
        let slow = (self.bytes as f32) < LEAST_RATE * self.silence.as_secs_f32();
        *self = Self::new(self.silence);
        slow
    }
}
