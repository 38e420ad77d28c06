//! Tells the file below what is about to be done to it, for fault injection (blkdebug).

use headwater_block::{DebugEvent, Node};
use std::rc::Rc;

/// To whom the events of an image go.
#[derive(Clone)]
pub(super) struct Events {
    file: Rc<dyn Node>,
    /// Learnt when the image is opened, so that nobody else pays for events.
    heard: bool,
}

impl Events {
    pub(super) fn of(file: &Rc<dyn Node>) -> Self {
        Self { file: file.clone(), heard: file.hears_debug_events() }
    }

    /// True if somebody wants to know.
    pub(super) fn are_heard(&self) -> bool {
        self.heard
    }

    #[inline]
    pub(super) fn tell(&self, event: DebugEvent) {
        if self.heard {
            self.file.debug_event(event);
        }
    }
}
