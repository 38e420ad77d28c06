//! A guest that uses the disk at random until the daemon dies under it.

use super::client::{Client, Command, FUA, NO_HOLE};
use super::log::Log;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::io::{ErrorKind, Result};
use std::ops::Range;
use std::sync::Arc;

/// The disk is dealt out to the guests in slices of this size in bytes: no multiple of anything, so that guests share clusters and
/// even sectors.
const SLICE: usize = 77_777;

/// The longest request, in bytes.
const LONGEST: usize = 100_000;

/// The grain in which a discard's effect is looked for, in bytes.
const GRAIN: usize = 512;

/// See the module.
pub(crate) struct Guest {
    client: Client,
    rng: StdRng,
    log: Log,
    /// What the disk held when the daemon was started.
    before: Arc<Vec<u8>>,
    number: usize,
    guests: usize,
}

impl Guest {
    /// Guest `number` of `guests`.
    pub(crate) fn new(client: Client, seed: u64, before: Arc<Vec<u8>>, number: usize, guests: usize) -> Self {
        Self { client, rng: StdRng::seed_from_u64(seed), log: Log::default(), before, number, guests }
    }

    /// Works until the daemon is gone, and gives what it has asked for.
    ///
    /// # Panics
    /// If a byte isn't what it must be, or a request fails.
    pub(crate) fn run(mut self) -> Log {
        loop {
            if let Err(err) = self.step() {
                assert!(
                    !matches!(err.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut),
                    "guest {}: a request isn't answered",
                    self.number
                );
                return self.log;
            }
        }
    }

    fn step(&mut self) -> Result<()> {
        let range = self.choose();
        let (at, len) = (range.start as u64, range.len());
        match self.rng.random_range(0..100) {
            0..15 => {
                let found = self.client.ask(Command::Read, 0, at, len, &[])?;
                let expected = self.log.current(&self.before, range.clone());
                let wrong = found.iter().zip(&expected).position(|(a, b)| a != b);
                assert_eq!(wrong, None, "guest {}: read of {len} bytes at {at}", self.number);
            }
            15..60 => {
                let fua = self.rng.random_bool(0.5);
                let data: Vec<u8> = std::iter::repeat_with(|| self.rng.random()).take(len).collect();
                self.log.begin(range.start, data.clone());
                self.client.ask(Command::Write, if fua { FUA } else { 0 }, at, len, &data)?;
                if fua {
                    self.log.last_is_durable();
                }
            }
            60..75 => {
                let fua = self.rng.random_bool(0.5);
                let flags = if fua { FUA } else { 0 } | if self.rng.random() { NO_HOLE } else { 0 };
                self.log.begin(range.start, vec![0; len]);
                self.client.ask(Command::WriteZeroes, flags, at, len, &[])?;
                if fua {
                    self.log.last_is_durable();
                }
            }
            75..85 => {
                self.log.begin(range.start, vec![0; len]);
                self.client.ask(Command::Trim, 0, at, len, &[])?;
                let found = self.client.ask(Command::Read, 0, at, len, &[])?;
                self.log.discarded(&found, GRAIN);
                let expected = self.log.current(&self.before, range);
                assert!(found == expected, "guest {}: after a trim of {len} bytes at {at}", self.number);
            }
            _ => {
                self.client.ask(Command::Flush, 0, 0, 0, &[])?;
                self.log.flushed();
            }
        }
        Ok(())
    }

    /// A range within one of its slices.
    fn choose(&mut self) -> Range<usize> {
        let size = self.before.len();
        let rounds = size.div_ceil(SLICE * self.guests);
        loop {
            let slice = self.rng.random_range(0..rounds) * self.guests + self.number;
            let (start, end) = (slice * SLICE, ((slice + 1) * SLICE).min(size));
            if start < end {
                let from = self.rng.random_range(start..end);
                // Short requests are the common ones.
                let longest = LONGEST >> self.rng.random_range(0..9u32);
                return from..(from + self.rng.random_range(1..=longest)).min(end);
            }
        }
    }
}
