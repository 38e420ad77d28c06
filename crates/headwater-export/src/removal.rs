//! How an export goes.

use std::pin::Pin;
use std::task::{Context, Poll};

/// What becomes of the clients of an export that is removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Removal {
    /// There must be none.
    Safe,
    /// They are sent away, once the requests that were received from them are done.
    Hard,
}

/// An export that was removed: completes when its last client is gone, and with it the last request. It goes all the same if nobody
/// waits.
pub struct Removed(Pin<Box<dyn Future<Output = ()>>>);

impl Removed {
    /// Complete when `gone` is.
    pub(crate) fn when(gone: impl Future<Output = ()> + 'static) -> Self {
        Self(Box::pin(gone))
    }
}

impl Future for Removed {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        self.0.as_mut().poll(cx)
    }
}
