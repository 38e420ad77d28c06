//! Jobs that end together: all of them well, or none.
//!
//! Each waits, when its work is done, for the others to have done theirs; then all are pending, and whoever finalises one finalises all. They have one
//! commit point: the first that comes to it passes it for all, unless one of them was cancelled, and what any of them does afterwards to make its result final
//! must not fail. One that fails or is cancelled cancels the others, wherever they are before that point.

use crate::control::Control;
use crate::state::Status;
use std::cell::{Cell, RefCell};
use std::rc::{Rc, Weak};

/// A group of jobs. They must all have joined before the first works.
#[derive(Debug, Default)]
pub struct Group {
    members: RefCell<Vec<Weak<Control>>>,
    /// One of them waits to be finalised, and so do all.
    waits: Cell<bool>,
}

impl Group {
    /// One without members.
    pub fn new() -> Rc<Self> {
        Rc::default()
    }

    /// Makes a job a member; `waits` says whether it waits to be finalised.
    pub(crate) fn join(self: &Rc<Self>, control: &Rc<Control>, waits: bool) {
        self.members.borrow_mut().push(Rc::downgrade(control));
        self.waits.set(self.waits.get() || waits);
        control.set_group(self.clone());
    }

    /// Its members. One that is gone was never started, or is over.
    pub(crate) fn members(&self) -> Vec<Rc<Control>> {
        self.members.borrow().iter().filter_map(Weak::upgrade).collect()
    }

    /// True if one of them waits to be finalised.
    pub(crate) fn waits_for_finalize(&self) -> bool {
        self.waits.get()
    }

    /// True once all have done their work.
    pub(crate) fn have_all_done(&self) -> bool {
        self.members().iter().all(|member| matches!(member.status(), Status::Waiting | Status::Pending))
    }
}
