//! Requests of one read that run at once, each of one replica; those that are left when one has brought what was wanted are dropped.

use crate::node::LocalFuture;
use std::future::poll_fn;
use std::task::Poll;

/// What runs; each with the number of its replica.
pub(super) struct Attempts<'a, T> {
    running: Vec<(usize, LocalFuture<'a, T>)>,
}

impl<'a, T> Attempts<'a, T> {
    pub(super) fn new() -> Self {
        Self { running: Vec::new() }
    }

    pub(super) fn push(&mut self, replica: usize, attempt: LocalFuture<'a, T>) {
        self.running.push((replica, attempt));
    }

    pub(super) fn is_empty(&self) -> bool {
        self.running.is_empty()
    }

    /// The replicas that are still at work.
    pub(super) fn replicas(&self) -> impl Iterator<Item = usize> + '_ {
        self.running.iter().map(|(replica, _)| *replica)
    }

    /// The next that ends. Never, if none runs.
    pub(super) async fn next(&mut self) -> (usize, T) {
        poll_fn(|cx| {
            for at in 0..self.running.len() {
                if let Poll::Ready(done) = self.running[at].1.as_mut().poll(cx) {
                    let (replica, _) = self.running.swap_remove(at);
                    return Poll::Ready((replica, done));
                }
            }
            Poll::Pending
        })
        .await
    }
}
