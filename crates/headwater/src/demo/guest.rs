//! A guest that uses the disk at random through NBD and knows what every byte must be.

use super::client::Client;
use super::model::{Fill, Model, Source};
use headwater_nbd::NbdUri;
use rand::{Rng, SeedableRng, rngs::StdRng};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// The disk is dealt out to the guests in slices of this size in bytes: no multiple of anything, so that guests share clusters
/// and even sectors.
const SLICE: u64 = 333_333;

/// The longest request, in bytes.
const LONGEST: u64 = 150_000;

/// The grain in which a discard's effect is looked for, in bytes.
const GRAIN: u64 = 512;

/// What all guests did, for everyone to see.
#[derive(Debug, Default)]
pub struct Tally {
    /// Reads whose every byte was right.
    pub reads: AtomicU64,
    /// Bytes of those.
    pub read_bytes: AtomicU64,
    /// Writes.
    pub writes: AtomicU64,
    /// Zero-writes.
    pub zeroes: AtomicU64,
    /// Discards, each read back at once.
    pub discards: AtomicU64,
    /// Flushes.
    pub flushes: AtomicU64,
    /// Set to end the guests.
    pub stop: AtomicBool,
}

/// One guest and the slices of the disk that are its own.
pub struct Guest {
    client: Client,
    model: Model,
    rng: StdRng,
    tally: Arc<Tally>,
    number: u64,
    guests: u64,
    writes: u64,
}

impl Guest {
    /// Guest `number` of `guests`.
    ///
    /// # Errors
    /// If the disk can't be reached, or has another size than the source.
    pub fn connect(
        uri: &NbdUri,
        source: Source,
        number: u64,
        guests: u64,
        tally: Arc<Tally>,
    ) -> std::io::Result<Self> {
        let client = Client::connect(uri)?;
        if client.size() != source.size {
            let text = format!("the disk has {} bytes, its source {}", client.size(), source.size);
            return Err(std::io::Error::other(text));
        }
        let rng = StdRng::seed_from_u64(source.seed ^ (number + 1));
        Ok(Self { client, model: Model::new(source), rng, tally, number, guests, writes: 0 })
    }

    /// Works until told to stop, and gives what it knows of the disk then.
    ///
    /// # Errors
    /// The first thing that isn't as it must be.
    pub fn run(mut self) -> Result<Model, String> {
        while !self.tally.stop.load(Ordering::Relaxed) {
            let range = self.choose();
            let done = match self.rng.random_range(0..100) {
                0..55 => self.read(range),
                55..80 => self.write(range),
                80..90 => self.zero(range),
                90..98 => self.discard(range),
                _ => self.client.flush().map_err(text).map(|()| count(&self.tally.flushes)),
            };
            done.map_err(|why| format!("guest {}: {why}", self.number))?;
        }
        Ok(self.model)
    }

    /// A range within one of its slices.
    fn choose(&mut self) -> Range<u64> {
        let size = self.client.size();
        let rounds = size.div_ceil(SLICE * self.guests).max(1);
        loop {
            let slice = self.rng.random_range(0..rounds) * self.guests + self.number;
            let start = slice * SLICE;
            let end = (start + SLICE).min(size);
            if start >= end {
                continue;
            }
            let from = self.rng.random_range(start..end);
            // Short requests are the common ones.
            let longest = LONGEST >> self.rng.random_range(0..10u32);
            let to = (from + self.rng.random_range(1..=longest)).min(end);
            return from..to;
        }
    }

    fn read(&mut self, range: Range<u64>) -> Result<(), String> {
        let (found, expected) = self.look(&range)?;
        compare(&range, &found, &expected)?;
        count(&self.tally.reads);
        self.tally.read_bytes.fetch_add(range.end - range.start, Ordering::Relaxed);
        Ok(())
    }

    /// What the disk holds and what it should.
    fn look(&mut self, range: &Range<u64>) -> Result<(Vec<u8>, Vec<u8>), String> {
        let mut found = vec![0; (range.end - range.start) as usize];
        self.client.read(range.start, &mut found).map_err(text)?;
        let mut expected = vec![0; found.len()];
        self.model.expect(range.start, &mut expected);
        Ok((found, expected))
    }

    fn write(&mut self, range: Range<u64>) -> Result<(), String> {
        self.writes += 1;
        let fill = Fill::Seed(self.writes * self.guests + self.number);
        let mut data = vec![0; (range.end - range.start) as usize];
        fill.fill(range.start, &mut data);
        self.client.write(range.start, &data).map_err(text)?;
        self.model.write(range, fill);
        count(&self.tally.writes);
        Ok(())
    }

    fn zero(&mut self, range: Range<u64>) -> Result<(), String> {
        let keep = self.rng.random();
        self.client.write_zeroes(range.start, (range.end - range.start) as usize, keep).map_err(text)?;
        self.model.write(range, Fill::Zero);
        count(&self.tally.zeroes);
        Ok(())
    }

    /// A discard may leave bytes as they were or make them zero, which only reading tells; from then on it holds.
    fn discard(&mut self, range: Range<u64>) -> Result<(), String> {
        self.client.trim(range.start, (range.end - range.start) as usize).map_err(text)?;
        let (found, expected) = self.look(&range)?;
        let mut at = range.start;
        while at < range.end {
            let part = at..(at - at % GRAIN + GRAIN).min(range.end);
            at = part.end;
            let inside = (part.start - range.start) as usize..(part.end - range.start) as usize;
            if found[inside.clone()].iter().all(|byte| *byte == 0) {
                self.model.write(part, Fill::Zero);
            } else {
                compare(&part, &found[inside.clone()], &expected[inside])?;
            }
        }
        count(&self.tally.discards);
        Ok(())
    }
}

fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

fn text(err: std::io::Error) -> String {
    err.to_string()
}

/// Both are what the disk holds at `range`.
pub(super) fn compare(range: &Range<u64>, found: &[u8], expected: &[u8]) -> Result<(), String> {
    match found.iter().zip(expected).position(|(a, b)| a != b) {
        None => Ok(()),
        Some(at) => Err(format!(
            "byte {} is {:#04x} and must be {:#04x} (read {} bytes at {})",
            range.start + at as u64,
            found[at],
            expected[at],
            found.len(),
            range.start
        )),
    }
}
