//! Watching for writes past an offset: who keeps disks on thin storage wants to know before it is full.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

/// What is called when a write goes past the threshold, with the bytes by which it does.
pub type Exceeded = Rc<dyn Fn(u64)>;

/// A threshold that tells once, and is then off.
#[derive(Default)]
pub struct WriteWatch {
    /// In bytes; 0 is off.
    threshold: Cell<u64>,
    exceeded: RefCell<Option<Exceeded>>,
}

impl WriteWatch {
    /// Calls `exceeded` at the first write that ends past `threshold` bytes; 0 switches it off.
    pub fn set(&self, threshold: u64, exceeded: Exceeded) {
        self.threshold.set(threshold);
        self.exceeded.replace(Some(exceeded));
    }

    /// The threshold in bytes; 0 if it is off.
    pub fn threshold(&self) -> u64 {
        self.threshold.get()
    }

    /// A write ends at `end`.
    #[inline]
    pub fn writes_until(&self, end: u64) {
        let threshold = self.threshold.get();
        if threshold > 0 && end > threshold {
            self.tell(end - threshold);
        }
    }

    #[cold]
    fn tell(&self, by: u64) {
        self.threshold.set(0);
        let exceeded = self.exceeded.take();
        if let Some(exceeded) = exceeded {
            exceeded(by);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_tells_once_by_how_much() {
        let told = Rc::new(Cell::new(0));
        let watch = WriteWatch::default();
        let tell = told.clone();
        watch.set(100, Rc::new(move |by| tell.set(tell.get() + by)));
        watch.writes_until(100);
        assert_eq!((told.get(), watch.threshold()), (0, 100));
        watch.writes_until(130);
        watch.writes_until(500);
        assert_eq!((told.get(), watch.threshold()), (30, 0));
    }
}
