//! Time, from where a test can put its own.

use crate::node::LocalFuture;
use std::time::Duration;

/// A monotonic clock. Code below an export reads time nowhere else.
pub trait Clock {
    /// The time since an arbitrary start.
    fn now(&self) -> Duration;

    /// Completes when [`Clock::now`] is at or past `deadline`.
    fn sleep_until(&self, deadline: Duration) -> LocalFuture<'static, ()>;
}

/// The clock of a tokio runtime. Its futures must be polled within one.
#[derive(Debug, Clone)]
pub struct TokioClock {
    start: tokio::time::Instant,
}

impl TokioClock {
    /// A clock that starts now.
    pub fn new() -> Self {
        Self { start: tokio::time::Instant::now() }
    }
}

impl Default for TokioClock {
    fn default() -> Self {
        Self::new()
    }
}

impl Clock for TokioClock {
    fn now(&self) -> Duration {
        self.start.elapsed()
    }

    fn sleep_until(&self, deadline: Duration) -> LocalFuture<'static, ()> {
        Box::pin(tokio::time::sleep_until(self.start + deadline))
    }
}
