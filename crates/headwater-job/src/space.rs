//! Room for what a job writes: how much it needs, and a job that pauses itself before the disk is full, because guests need the rest.
//!
//! What is free is asked of a closure, because jobs do no I/O: it asks the system, quickly. It is asked again after so many bytes or so much time, and what was
//! begun since counts as taken. So copies never go below the **low-water mark**, whatever the file system does late; guests may.
//!
//! At the mark nothing new is begun. When nothing is in flight any more the job pauses itself ([`crate::waiting`]), and what guests read isn't kept either
//! ([`crate::copier::Copier::keep_reads`]). It looks every second, and goes on when there is an eighth more than the mark.

use crate::copier::Copier;
use headwater_block::{Abort, Clock, Error, ErrorKind, Result};
use std::rc::Rc;
use std::time::Duration;

/// How long an answer counts, and for how many bytes.
const COUNTS: (Duration, u64) = (Duration::from_millis(250), 16 << 20);

/// How often a job that waits looks again.
const LOOK: Duration = Duration::from_secs(1);

/// What an image needs for each of its units beside the data, in bytes: an entry of a table and a reference count.
const OVERHEAD: u64 = 16;

/// Where a job writes to, and how much it leaves.
#[derive(Clone)]
pub struct Space {
    /// How many bytes are free there now.
    pub free: Rc<dyn Fn() -> Result<u64>>,
    /// Copies leave at least so many bytes free.
    pub low_water: u64,
    /// How messages call the place.
    pub name: String,
}

/// What was last known.
pub(crate) struct Room {
    space: Space,
    free: u64,
    asked: Option<Duration>,
    /// Bytes of data that copies have begun to write since then.
    begun: u64,
}

impl Room {
    pub(crate) fn new(space: Space) -> Self {
        Self { space, free: 0, asked: None, begun: 0 }
    }

    /// Begins a copy of `bytes` beside `in_flight` others, if there is room.
    ///
    /// # Errors
    /// `NoSpace` if there is none. If the system doesn't say what is free, there is.
    pub(crate) fn take(&mut self, bytes: u64, in_flight: u64, clock: &dyn Clock) -> Result<()> {
        let now = clock.now();
        let known = self.asked.is_some_and(|asked| now < asked + COUNTS.0) && self.begun + bytes <= COUNTS.1;
        if !known {
            self.free = (self.space.free)().unwrap_or_else(|err| {
                tracing::debug!("{err}");
                u64::MAX
            });
            self.asked = Some(now);
            // What is in flight may or may not have been taken from what is free.
            self.begun = in_flight;
        }
        if self.free.saturating_sub(self.begun + bytes) < self.space.low_water {
            // The next one asks.
            self.asked = None;
            return Err(self.error());
        }
        self.begun += bytes;
        Ok(())
    }

    /// What is free, as last asked.
    pub(crate) fn free(&self) -> Option<u64> {
        (self.free != u64::MAX && (self.free > 0 || self.asked.is_some())).then_some(self.free)
    }

    fn error(&self) -> Error {
        let message = format!(
            "{}: {} bytes are free on its file system, and copies leave {} (the low-water mark); make room",
            self.space.name, self.free, self.space.low_water
        );
        Error::new(ErrorKind::NoSpace, message)
    }

    pub(crate) fn space(&self) -> Space {
        self.space.clone()
    }
}

/// Waits until there is room again.
///
/// # Errors
/// `Cancelled` when the switch is thrown.
pub(crate) async fn wait_for_room(copier: &Rc<dyn Copier>, space: Space, abort: Rc<Abort>) -> Result<()> {
    let clock = copier.clock().clone();
    loop {
        abort.guard(clock.sleep_until(clock.now() + LOOK)).await?;
        match (space.free)() {
            Ok(free) if free < space.low_water.saturating_add(space.low_water / 8) => {}
            _ => return Ok(()),
        }
    }
}

/// How many bytes of storage it takes to write `data` bytes, in units of `unit`.
pub(crate) fn needed(data: u64, unit: u64) -> u64 {
    data.saturating_add(data.div_ceil(unit).saturating_mul(OVERHEAD))
}
