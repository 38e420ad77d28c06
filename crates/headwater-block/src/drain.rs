//! Drain: no request in flight below here, and none starts.
//!
//! # Rules
//! - Every request enters through [`Gate::enter`] and holds its [`Pass`] until it is over.
//! - While at least one [`Drained`] exists, entering waits; [`Gate::drain`] completes when the last pass is gone.
//! - **Fairness.** Requests that wait are let in all at once, in the order of their polls.
//! - **Cancellation.** Dropping a waiting `enter` or `drain` has no effect on others; dropping `Drained` opens the gate.
//! - Whoever holds a pass never drains: it would wait for itself.
//! - A drain doesn't wait for a rate limit: [`Hurry`] lifts the limits of those inside for as long as it waits.

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::rc::Rc;
use std::task::{Poll, Waker};

/// Somebody waits for all requests of a node: while this lives, the node lets those pass at once that it makes wait for a limit.
/// Nodes hand it out ([`crate::Node::hurry`]); the limits count what passed, so that the rate holds again afterwards.
#[must_use = "the limits hold again when this is dropped"]
pub struct Hurry(Rc<Cell<u32>>);

impl Hurry {
    /// One more that is in a hurry; `count` is how many are.
    pub fn new(count: &Rc<Cell<u32>>) -> Self {
        count.set(count.get() + 1);
        Self(count.clone())
    }
}

impl Drop for Hurry {
    fn drop(&mut self) {
        self.0.set(self.0.get() - 1);
    }
}

/// The gate that a disk's requests pass.
#[derive(Default)]
pub struct Gate {
    inside: Cell<usize>,
    closed: Cell<usize>,
    waiting: RefCell<Vec<Waker>>,
}

impl Gate {
    /// An open gate with no one inside.
    pub fn new() -> Rc<Self> {
        Rc::new(Self::default())
    }

    /// Waits until the gate is open, and goes in.
    pub async fn enter(self: &Rc<Self>) -> Pass {
        if self.closed.get() > 0 {
            self.wait_until(|gate| gate.closed.get() == 0).await;
        }
        self.inside.set(self.inside.get() + 1);
        Pass(self.clone())
    }

    /// Lets no one in from now on, and waits until no one is inside.
    pub async fn drain(self: &Rc<Self>) -> Drained {
        self.closed.set(self.closed.get() + 1);
        let drained = Drained(self.clone());
        self.wait_until(|gate| gate.inside.get() == 0).await;
        drained
    }

    /// True while someone drains: entering would wait.
    pub fn is_closed(&self) -> bool {
        self.closed.get() > 0
    }

    /// How many requests are inside.
    pub fn inside(&self) -> usize {
        self.inside.get()
    }

    async fn wait_until(&self, condition: impl Fn(&Self) -> bool) {
        poll_fn(|cx| {
            if condition(self) {
                return Poll::Ready(());
            }
            self.waiting.borrow_mut().push(cx.waker().clone());
            Poll::Pending
        })
        .await;
    }

    fn wake_all(&self) {
        for waker in self.waiting.take() {
            waker.wake();
        }
    }
}

/// A request's stay inside the gate.
#[must_use = "dropping a pass leaves the gate"]
pub struct Pass(Rc<Gate>);

impl Drop for Pass {
    fn drop(&mut self) {
        self.0.inside.set(self.0.inside.get() - 1);
        if self.0.inside.get() == 0 {
            self.0.wake_all();
        }
    }
}

/// The gate is closed and empty for as long as this lives.
#[must_use = "dropping it opens the gate"]
pub struct Drained(Rc<Gate>);

impl Drop for Drained {
    fn drop(&mut self) {
        self.0.closed.set(self.0.closed.get() - 1);
        if self.0.closed.get() == 0 {
            self.0.wake_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt;

    #[test]
    fn draining_waits_for_those_inside_and_holds_back_the_rest() {
        let gate = Gate::new();
        let pass = gate.enter().now_or_never().expect("open");
        let mut drain = Box::pin(gate.drain());
        assert!(drain.as_mut().now_or_never().is_none());
        let mut enter = Box::pin(gate.enter());
        assert!(enter.as_mut().now_or_never().is_none(), "the gate is closed while someone drains");
        drop(pass);
        let drained = drain.now_or_never().expect("the last one left");
        assert!(enter.as_mut().now_or_never().is_none());
        drop(drained);
        assert!(enter.now_or_never().is_some());
    }

    #[test]
    fn a_drain_given_up_opens_the_gate() {
        let gate = Gate::new();
        let _pass = gate.enter().now_or_never();
        let mut drain = Box::pin(gate.drain());
        assert!(drain.as_mut().now_or_never().is_none());
        drop(drain);
        assert!(gate.enter().now_or_never().is_some());
    }
}
