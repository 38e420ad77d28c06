//! What files go through, in one order: the record from which power cuts are simulated.

use crate::faults::Op;
use crate::file::SimFile;
use headwater_block::{Buffer, Node};
use std::cell::RefCell;
use std::ops::Range;
use std::rc::Rc;

/// Something that a file went through.
#[derive(Debug, Clone)]
pub enum Event {
    /// An operation was asked for. `data` are the bytes of a write.
    Started {
        /// Tells the operations of a file apart.
        id: u64,
        /// What it is.
        op: Op,
        /// The bytes that it covers; for a flush, all of them; for a change of the size, an empty range at the new end.
        range: Range<u64>,
        /// What is written; none if it isn't data.
        data: Option<Buffer>,
        /// It is durable when it ends, by itself.
        fua: bool,
    },
    /// The operation with this number succeeded (or failed).
    Ended {
        /// As in `Started`.
        id: u64,
        /// It succeeded.
        ok: bool,
    },
}

/// Keeps the record of several files. A **moment** is the number of events before it.
#[derive(Default)]
pub struct Recorder {
    files: Vec<(String, Vec<u8>)>,
    events: RefCell<Vec<(usize, Event)>>,
}

impl Recorder {
    /// Starts to record what `files` go through, which nobody uses at this moment. All that they hold counts as durable.
    pub fn start(files: &[&SimFile]) -> Rc<Self> {
        let contents = files.iter().map(|file| {
            let content = file.content();
            let mut bytes = vec![0; content.size() as usize];
            content.read(0, &mut bytes);
            (file.name().to_string(), bytes)
        });
        let recorder = Rc::new(Self { files: contents.collect(), events: RefCell::default() });
        for (number, file) in files.iter().enumerate() {
            file.record_to(recorder.clone(), number);
        }
        recorder
    }

    /// This moment.
    pub fn now(&self) -> usize {
        self.events.borrow().len()
    }

    /// Everything so far.
    pub fn history(&self) -> History {
        History { files: self.files.clone(), events: self.events.borrow().clone() }
    }

    pub(crate) fn events_of(&self, file: usize) -> Vec<Event> {
        let events = self.events.borrow();
        events.iter().filter(|(of, _)| *of == file).map(|(_, event)| event.clone()).collect()
    }

    pub(crate) fn push(&self, file: usize, event: Event) {
        self.events.borrow_mut().push((file, event));
    }
}

/// What files went through.
#[derive(Debug, Clone, Default)]
pub struct History {
    /// Each file's name, and what it held durably in the beginning.
    pub files: Vec<(String, Vec<u8>)>,
    /// What happened, with the number of the file that it happened to.
    pub events: Vec<(usize, Event)>,
}
