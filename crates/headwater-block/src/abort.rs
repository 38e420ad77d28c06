//! Giving up reads of a source that are in flight, at once and however slow it is.

use crate::error::{Error, ErrorKind, Result};
use futures_util::future::{Either, select};
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::future::{Future, poll_fn};
use std::pin::pin;
use std::rc::Rc;
use std::task::{Poll, Waker};

/// A switch that its owner throws once, to make operations that only read give up.
///
/// Operations that change a disk look at it before their first change and never after, so that what they do is done
/// whole or not at all.
#[derive(Default)]
pub struct Abort {
    thrown: Cell<bool>,
    next: Cell<u64>,
    waiting: RefCell<BTreeMap<u64, Waker>>,
}

/// Forgets a waiter's waker when it goes.
struct Registration<'a> {
    abort: &'a Abort,
    id: u64,
}

impl Drop for Registration<'_> {
    fn drop(&mut self) {
        self.abort.waiting.borrow_mut().remove(&self.id);
    }
}

impl Abort {
    /// A switch that hasn't been thrown.
    pub fn new() -> Rc<Self> {
        Rc::new(Self::default())
    }

    /// Throws the switch: everything that runs under it gives up with `Cancelled`.
    pub fn abort(&self) {
        self.thrown.set(true);
        for waker in std::mem::take(&mut *self.waiting.borrow_mut()).into_values() {
            waker.wake();
        }
    }

    /// True once the switch has been thrown.
    pub fn is_aborted(&self) -> bool {
        self.thrown.get()
    }

    /// Completes when the switch is thrown.
    pub async fn wait(&self) {
        let id = self.next.get();
        self.next.set(id + 1);
        let registration = Registration { abort: self, id };
        poll_fn(|cx| {
            if self.thrown.get() {
                return Poll::Ready(());
            }
            self.waiting.borrow_mut().insert(registration.id, cx.waker().clone());
            Poll::Pending
        })
        .await;
    }

    /// Runs `work`, which must be safe to drop, until it completes or the switch is thrown.
    ///
    /// # Errors
    /// `Cancelled` if the switch was thrown first.
    pub async fn guard<T>(&self, work: impl Future<Output = T>) -> Result<T> {
        if self.thrown.get() {
            return Err(cancelled());
        }
        match select(pin!(work), pin!(self.wait())).await {
            Either::Left((done, _)) => Ok(done),
            Either::Right(((), _)) => Err(cancelled()),
        }
    }
}

fn cancelled() -> Error {
    Error::new(ErrorKind::Cancelled, "the operation was cancelled before it changed anything")
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt;

    #[test]
    fn throwing_the_switch_ends_all_who_run_under_it() {
        let abort = Abort::new();
        let mut first = Box::pin(abort.guard(std::future::pending::<()>()));
        let mut second = Box::pin(abort.guard(std::future::pending::<()>()));
        assert!(first.as_mut().now_or_never().is_none());
        assert!(second.as_mut().now_or_never().is_none());
        drop(second);
        assert_eq!(abort.waiting.borrow().len(), 1, "who leaves is forgotten");
        abort.abort();
        assert_eq!(first.now_or_never().expect("aborted").unwrap_err().kind(), ErrorKind::Cancelled);
        assert!(abort.guard(async {}).now_or_never().expect("at once").is_err());
    }
}
