//! Copies ahead of guests ([`crate::readahead`]), beside those that are the job's own: they are no part of its progress, like what guests fetch themselves.

use super::{Run, len};
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use headwater_block::LocalFuture;
use std::task::{Context, Poll};

/// What is in flight.
#[derive(Default)]
pub(super) struct Ahead {
    /// Each tells how many bytes it was for.
    copies: FuturesUnordered<LocalFuture<'static, u64>>,
    bytes: u64,
}

impl Ahead {
    /// How many bytes are in flight.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }
}

impl Run<'_> {
    /// Starts what is wanted and fits.
    pub(super) fn fill_ahead(&mut self) {
        let Some(readahead) = self.engine.copier.readahead() else { return };
        while self.ahead.bytes < readahead.most()
            && let Some(range) = readahead.take()
        {
            let bytes = len(&range);
            if self.lacks_room(bytes) {
                // That is for the job's own copies to wait for.
                self.shortage = None;
                return;
            }
            let leave = self.leave_ahead(&range);
            let copy = readahead.clone().copy(range, leave, self.abort.clone());
            self.ahead.bytes += bytes;
            self.ahead.copies.push(Box::pin(async move {
                copy.await;
                bytes
            }));
        }
    }

    /// Ready when there is something to be started.
    pub(super) fn poll_ahead(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        while let Poll::Ready(Some(bytes)) = self.ahead.copies.poll_next_unpin(cx) {
            self.ahead.bytes -= bytes;
        }
        match self.engine.copier.readahead() {
            Some(readahead) if self.ahead.bytes < readahead.most() => readahead.poll_wanted(cx),
            _ => Poll::Pending,
        }
    }

    /// Forgets what is wanted, and waits until nothing is in flight; what can be given up was told to.
    pub(super) async fn end_ahead(&mut self) {
        if let Some(readahead) = self.engine.copier.readahead() {
            readahead.forget();
        }
        while self.ahead.copies.next().await.is_some() {}
        self.ahead.bytes = 0;
    }
}
