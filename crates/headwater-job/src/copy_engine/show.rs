//! What the engine shows of its progress.

use super::{Run, Trouble, len};
use crate::progress::eta;
use crate::space::{Room, needed};

impl Run<'_> {
    /// Shows how far the job is.
    pub(super) fn show(&mut self) {
        let (waits, unseen) = self.trouble.as_ref().map_or((0, 0), Trouble::bytes);
        let rest = self.scanner.rest() + self.engine.copier.untaken() + unseen;
        // Where nothing was looked at yet, there is as much as where something was.
        let guess = match self.scanned {
            0 => rest,
            scanned => {
                let guess = u128::from(rest) * u128::from(self.scanned_data) / u128::from(scanned);
                u64::try_from(guess).unwrap_or(u64::MAX)
            }
        };
        let failed: u64 = self.failures.copies.iter().filter(|m| !m.zero).map(|m| len(&m.range)).sum();
        let engine = &mut *self.engine;
        let progress = &mut engine.progress;
        progress.total = progress.done + self.found_data + self.in_flight_data + waits + failed + guess;
        progress.total_is_exact = rest == 0 && self.failures.looks.is_empty();
        progress.failed = self.failures.bytes();
        progress.needs = needed(progress.total.saturating_sub(progress.done), engine.unit);
        progress.free = engine.room.as_ref().and_then(Room::free);
        progress.rate = engine.meter.observe(engine.copier.clock().now(), progress.done);
        progress.eta = eta(progress.total, progress.done, progress.rate);
        engine.control.set_progress(*progress);
    }
}
