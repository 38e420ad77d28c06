//! The thread of a disk: one tokio runtime for its sockets, timers and file engine, and the signals that end it.

use crate::failure::{Failure, Outcome};
use std::future::Future;
use std::pin::Pin;
use tokio::runtime::LocalOptions;
use tokio::signal::unix::{Signal, SignalKind, signal};

/// Runs `work` to its end on this thread, with everything that it starts.
///
/// # Errors
/// Those of `work`, and of a system without room for another event queue.
pub fn run<T>(work: impl Future<Output = Outcome<T>>) -> Outcome<T> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build_local(LocalOptions::default())
        .map_err(|err| Failure::new(format!("cannot start: {err}")))?;
    runtime.block_on(async {
        // Caught so that a limit on the size of files is an error that names the file (ENOSPC's like), not a death without a word.
        let _caught = signal(SignalKind::from_raw(rustix::process::Signal::XFSZ.as_raw()))
            .map_err(|err| Failure::new(format!("cannot catch signals: {err}")))?;
        work.await
    })
}

/// SIGINT and SIGTERM, caught.
pub struct Interrupts {
    signals: [Signal; 2],
}

impl Interrupts {
    /// Catches them from now on.
    ///
    /// # Errors
    /// If the system refuses.
    pub fn catch() -> Outcome<Self> {
        let catch = |kind| signal(kind).map_err(|err| Failure::new(format!("cannot catch signals: {err}")));
        Ok(Self { signals: [catch(SignalKind::interrupt())?, catch(SignalKind::terminate())?] })
    }

    /// Completes at the next one. Dropping this future loses none.
    pub async fn next(&mut self) {
        std::future::poll_fn(|cx| {
            let ready = self.signals.iter_mut().any(|s| Pin::new(s).poll_recv(cx).is_ready());
            if ready { std::task::Poll::Ready(()) } else { std::task::Poll::Pending }
        })
        .await;
    }
}
