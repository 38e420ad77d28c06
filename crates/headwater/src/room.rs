//! Room for what streams into a disk: how much must stay free, and whether all of it will fit.

use crate::display::Display;
use crate::size::human;
use headwater_block::Result;
use headwater_job::{Progress, Space};
use headwater_storage::file_system::FileSystem;
use std::path::Path;
use std::rc::Rc;
use std::time::Duration;

/// What stays free where nothing else is said: this share of the file system, and at most so many bytes.
const SHARE: u64 = 64;
const MOST: u64 = 1 << 30;

/// After so long an estimate must do.
const ESTIMATE: Duration = Duration::from_secs(2);

/// The room for the disk at `path`, of which `low_water` bytes stay free. Without that a share does while somebody is `served`: who isn't there needs none. None if
/// nothing need stay free.
///
/// # Errors
/// What the system says.
pub fn space_for(path: &Path, low_water: Option<u64>, served: bool) -> Result<Option<Space>> {
    let Some(system) = FileSystem::of(path)? else { return Ok(None) };
    let low_water = match low_water {
        Some(low_water) => low_water,
        None if served => (system.size()? / SHARE).min(MOST),
        None => 0,
    };
    let name = path.display().to_string();
    Ok(Some(Space { free: Rc::new(move || system.free()), low_water, name }))
}

/// Tells once whether everything will fit.
pub struct Forecast {
    space: Option<Space>,
}

impl Forecast {
    /// One that has told nothing yet.
    pub fn new(space: Option<Space>) -> Self {
        Self { space }
    }

    /// Tells, if enough is known after `elapsed`.
    pub fn tell(&mut self, progress: &Progress, elapsed: Duration, display: &Display) {
        if !progress.total_is_exact && elapsed < ESTIMATE {
            return;
        }
        let Some(Space { low_water, name, .. }) = &self.space else { return };
        let Some(free) = progress.free else { return };
        let about = if progress.total_is_exact { "" } else { "about " };
        let needs = progress.needs;
        display.say(&format!("{name} needs {about}{} more; {} are free", human(needs), human(free)));
        if needs.saturating_add(*low_water) > free {
            let then = match low_water {
                0 => "copying will fail when the file system is full".to_owned(),
                _ => format!("copying will wait when less than {} are left for others", human(*low_water)),
            };
            display.say(&format!("warning: that doesn't fit: {then}; make room"));
        }
        self.space = None;
    }
}
