//! Those who watch what guests read.

use super::Disk;
use std::ops::Range;
use std::rc::{Rc, Weak};

/// Is told of guests' reads, where they begin. Reads of jobs are not told.
pub trait ReadWatch {
    /// A guest reads this range (bytes, not empty).
    fn reads(&self, range: &Range<u64>);

    /// A guest's read of this range has found that it must be fetched from a layer below, and fetches it.
    fn misses(&self, _range: &Range<u64>) {}
}

impl Disk {
    /// Tells `watch` of guests' reads from now on, for as long as it lives.
    pub fn watch_reads(&self, watch: &Rc<dyn ReadWatch>) {
        let mut watches = self.read_watches.borrow_mut();
        watches.retain(|watch| watch.strong_count() > 0);
        watches.push(Rc::downgrade(watch));
    }

    /// Calls `tell` for all who watch.
    pub(super) fn tell_watches(&self, tell: impl Fn(&dyn ReadWatch)) {
        // Most disks have none, and who is told may begin to watch.
        if self.read_watches.borrow().is_empty() {
            return;
        }
        let watches: Vec<_> = self.read_watches.borrow().iter().filter_map(Weak::upgrade).collect();
        watches.iter().for_each(|watch| tell(&**watch));
    }
}
