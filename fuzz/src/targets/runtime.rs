//! Where targets run that talk over sockets: a runtime of its own for each input, so that nothing of one is left for the next.

use std::future::Future;
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::LocalSet;

/// Runs `future`, which may spawn tasks that stay on this thread.
pub(super) fn run<T>(future: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    LocalSet::new().block_on(&runtime, async {
        // A program whose main isn't Rust's dies of a write to a socket that was closed.
        let _listens = signal(SignalKind::pipe());
        future.await
    })
}
