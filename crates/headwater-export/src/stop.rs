//! The order to finish: given once, heard by everybody who serves an export's clients.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

/// Gives the order; dropping it gives it too, so that nothing outlives an export that is gone.
#[derive(Debug, Default)]
pub(crate) struct Stop(Rc<State>);

#[derive(Debug, Default)]
struct State {
    ordered: Cell<bool>,
    next_listener: Cell<u64>,
    waiting: RefCell<BTreeMap<u64, Waker>>,
}

impl Stop {
    /// No order yet.
    pub(crate) fn new() -> Self {
        Self::default()
    }

    /// Gives the order.
    pub(crate) fn order(&self) {
        self.0.ordered.set(true);
        for waker in self.0.waiting.take().into_values() {
            waker.wake();
        }
    }

    /// One who hears the order.
    pub(crate) fn listener(&self) -> StopListener {
        StopListener::new(&self.0)
    }
}

impl Drop for Stop {
    fn drop(&mut self) {
        self.order();
    }
}

/// Hears the order of a [`Stop`].
#[derive(Debug)]
pub(crate) struct StopListener {
    state: Rc<State>,
    id: u64,
}

impl StopListener {
    fn new(state: &Rc<State>) -> Self {
        let id = state.next_listener.get();
        state.next_listener.set(id + 1);
        Self { state: state.clone(), id }
    }

    /// Another one who hears the same order.
    pub(crate) fn another(&self) -> Self {
        Self::new(&self.state)
    }

    /// Ready once the order was given.
    pub(crate) fn poll(&self, cx: &mut Context<'_>) -> Poll<()> {
        if self.state.ordered.get() {
            return Poll::Ready(());
        }
        let mut waiting = self.state.waiting.borrow_mut();
        match waiting.get_mut(&self.id) {
            Some(waker) => waker.clone_from(cx.waker()),
            None => {
                waiting.insert(self.id, cx.waker().clone());
            }
        }
        Poll::Pending
    }
}

impl Drop for StopListener {
    fn drop(&mut self) {
        self.state.waiting.borrow_mut().remove(&self.id);
    }
}
