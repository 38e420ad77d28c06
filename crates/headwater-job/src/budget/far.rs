//! The depth beside a source that is far away: one for each kind of requests, of which the least counts. So a guest most of whose reads find what
//! they want here still has its misses looked after.

use super::{LEAST_COPY, MOST_AT_ONCE, START, STEP};

/// The first request of a kind moves its depth by one part in so many, the next by one part in one more, until it is [`STEP`]: 100 that are
/// within their limits let it grow to the thirteenfold.
const FIRST_STEP: f64 = 8.0;

/// See the module.
#[derive(Debug)]
pub(super) struct FarDepth {
    first: f64,
    kinds: [Option<Depth>; 3],
}

#[derive(Debug, Clone, Copy)]
struct Depth {
    bytes: f64,
    /// Requests that moved it.
    steps: f64,
}

impl FarDepth {
    pub(super) fn new() -> Self {
        Self { first: START.0, kinds: [None; 3] }
    }

    /// Where the depths begin, in bytes.
    pub(super) fn begin_with(&mut self, bytes: u64) {
        self.first = START.0.max(bytes as f64);
    }

    /// So many requests of a kind were seen, and by so many more than must be they were within their limits.
    pub(super) fn moves(&mut self, kind: usize, count: f64, within: f64) {
        let depth = self.kinds[kind].get_or_insert(Depth { bytes: self.first, steps: 0.0 });
        let step = STEP.max(1.0 / (FIRST_STEP + depth.steps));
        depth.steps += count;
        let change = (within * step).clamp(-MOST_AT_ONCE, MOST_AT_ONCE / 2.0);
        depth.bytes = (depth.bytes * change.exp()).max(LEAST_COPY as f64);
    }

    /// What may be in flight, of at most `most` bytes.
    pub(super) fn least(&mut self, most: f64) -> f64 {
        let kinds = self.kinds.iter_mut().flatten();
        let least = kinds.map(|depth| {
            depth.bytes = depth.bytes.min(most);
            depth.bytes
        });
        least.reduce(f64::min).unwrap_or(self.first).min(most)
    }
}
