//! Operations that several requests wait for together.

use futures_util::future::FutureExt;
use headwater_block::{LocalFuture, Result};
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};

/// A future that any number of waiters can await; each gets a clone of the result. Whoever polls drives it, so that a waiter that is
/// dropped stops nobody else.
pub(super) struct Shared<T: Clone>(futures_util::future::Shared<LocalFuture<'static, Result<T>>>);

impl<T: Clone + 'static> Shared<T> {
    /// Shares `future`, which starts when it is first polled.
    pub(super) fn new(future: impl Future<Output = Result<T>> + 'static) -> Self {
        let boxed: LocalFuture<'static, Result<T>> = Box::pin(future);
        Self(boxed.shared())
    }

    /// A handle that doesn't keep the operation alive: it ends with its last waiter.
    pub(super) fn downgrade(&self) -> WeakShared<T> {
        WeakShared(self.0.downgrade())
    }
}

impl<T: Clone> Clone for Shared<T> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<T: Clone> Future for Shared<T> {
    type Output = Result<T>;
    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<T>> {
        self.0.poll_unpin(cx)
    }
}

/// See [`Shared::downgrade`].
pub(super) struct WeakShared<T: Clone>(
    Option<futures_util::future::WeakShared<LocalFuture<'static, Result<T>>>>,
);

impl<T: Clone> WeakShared<T> {
    /// The operation, if anybody still waits for it.
    pub(super) fn upgrade(&self) -> Option<Shared<T>> {
        self.0.as_ref()?.upgrade().map(Shared)
    }
}
