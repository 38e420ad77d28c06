//! What is counted of a disk.

use std::cell::Cell;
use std::time::Duration;

/// Counters of a disk since it was opened. Bytes are guest bytes.
#[derive(Debug, Default)]
pub struct Stats {
    /// Guest reads, and their bytes.
    pub reads: Cell<u64>,
    /// See `reads`.
    pub read_bytes: Cell<u64>,
    /// Guest writes, and their bytes (zero-writes are counted apart).
    pub writes: Cell<u64>,
    /// See `writes`.
    pub write_bytes: Cell<u64>,
    /// Guest zero-writes and discards.
    pub zeroes_and_discards: Cell<u64>,
    /// Guest flushes.
    pub flushes: Cell<u64>,
    /// Guest reads that went, at least in part, to a layer below the top.
    pub backing_reads: Cell<u64>,
    /// Guest reads whose data could not be kept in the overlay; the guest got them all the same.
    pub copy_on_read_failures: Cell<u64>,
    /// Guest requests in flight right now; those that are held are not.
    pub in_flight: Cell<u32>,
    /// Guest requests that are held right now, because a source can't be reached.
    pub held: Cell<u32>,
    /// Guest requests that were held.
    pub held_in_all: Cell<u64>,
    /// The longest time that one was held.
    pub longest_hold: Cell<Duration>,
    /// How often held requests were tried again.
    pub retries: Cell<u64>,
}

/// Adds to a counter.
pub(super) fn add(counter: &Cell<u64>, n: u64) {
    counter.set(counter.get() + n);
}
