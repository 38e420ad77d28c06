//! Who wants what guests fetch to be kept.

use super::Disk;
use crate::chain;
use crate::node::Node;
use std::rc::Rc;

/// Someone who wants copy-on-read for a time: a number to tell him by, and the base above which he wants it.
pub(super) type Wanted = (u64, Option<Rc<dyn Node>>);

/// Copy-on-read, switched on for a time.
#[must_use = "copy-on-read ends when this is dropped"]
pub struct CopyOnRead {
    disk: Rc<Disk>,
    id: u64,
}

impl Drop for CopyOnRead {
    fn drop(&mut self) {
        self.disk.copy_on_read.borrow_mut().retain(|(id, _)| *id != self.id);
    }
}

impl Disk {
    /// Switches copy-on-read on for as long as the guard lives, for what lies above `base`; what the user chose comes back with its
    /// end.
    pub fn enable_copy_on_read(self: &Rc<Self>, base: Option<Rc<dyn Node>>) -> CopyOnRead {
        let id = self.next_id.get();
        self.next_id.set(id + 1);
        self.copy_on_read.borrow_mut().push((id, base));
        CopyOnRead { disk: self.clone(), id }
    }

    /// True while what guests fetch from the backing is kept.
    pub fn copies_on_read(&self) -> bool {
        (self.options.get().copy_on_read || !self.copy_on_read.borrow().is_empty()) && !self.is_read_only()
    }

    /// True if what guests read is kept, here or in a layer below.
    pub fn keeps_what_is_read(&self) -> bool {
        self.copies_on_read() || self.top().keeps_what_is_read()
    }

    /// What copy-on-read copies nothing of: only if all who want it agree to leave it out.
    pub(super) fn copy_on_read_base(&self) -> Option<Rc<dyn Node>> {
        let wants = self.copy_on_read.borrow();
        let (_, base) = wants.last().filter(|_| !self.options.get().copy_on_read)?;
        let base = base.as_ref()?;
        let same =
            |(_, other): &Wanted| other.as_ref().is_some_and(|other| chain::is_same_layer(other, base));
        wants.iter().all(same).then(|| base.clone())
    }
}
