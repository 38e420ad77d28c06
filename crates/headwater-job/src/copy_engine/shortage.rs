//! What the engine does when there is no room for the next copy: it lets those in flight end, and waits.

use super::Run;
use crate::space::wait_for_room;
use crate::waiting::{Wait, Waiting};

impl Run<'_> {
    /// True if there is no room for a copy of `bytes`.
    pub(super) fn lacks_room(&mut self, bytes: u64) -> bool {
        let Some(room) = &mut self.engine.room else { return false };
        let clock = self.engine.copier.clock();
        self.shortage = room.take(bytes, self.in_flight_data + self.ahead.bytes(), &**clock).err();
        self.shortage.is_some()
    }

    /// Waits, paused, until there is room, or a user says something. Nothing is in flight.
    pub(super) async fn wait_for_room(&mut self) {
        self.withdraw().await;
        let (Some(error), Some(room)) = (self.shortage.take(), &self.engine.room) else { return };
        let copier = self.engine.copier.clone();
        let wait = Wait { what: Waiting::Space, error, since: copier.clock().now() };
        copier.keep_reads(false);
        let space = room.space();
        // How it ended makes no difference: the next copy asks for room again.
        self.engine.control.pause_itself(wait, |abort| wait_for_room(&copier, space, abort)).await;
        copier.keep_reads(true);
        self.engine.window.restart();
        self.engine.meter.restart(copier.clock().now());
    }
}
