//! How long storage itself goes on with a request that fails: the short part. What is longer, clients' requests and jobs wait out above
//! ([`headwater_block::hold`], and a job that pauses itself), where waiting holds no locks; so with those the budget here is best a second or two.

use headwater_block::{Backoff, Error, Result};
use std::cell::Cell;
use std::time::Duration;
use tokio::time::Instant;

/// The first and the longest pause before a request is made again.
const PAUSES: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));

/// The longest rest that a server is given if it asks for one.
const LONGEST_REST: Duration = Duration::from_secs(60);

thread_local! {
    /// Tells those apart that fail together.
    static SEED: Cell<u64> = const { Cell::new(0) };
}

/// The attempts at one request.
pub(crate) struct Retry {
    budget: Duration,
    deadline: Option<Instant>,
    backoff: Backoff,
}

impl Retry {
    /// A request that is tried for so long after it has failed first.
    pub(crate) fn new(budget: Duration) -> Self {
        let seed = SEED.get();
        SEED.set(seed.wrapping_add(1));
        Self { budget, deadline: None, backoff: Backoff::new(PAUSES.0, PAUSES.1, seed) }
    }

    /// Something came: the next failure is a first one.
    pub(crate) fn restart(&mut self) {
        self.deadline = None;
        self.backoff.restart();
    }

    /// Pauses before the next attempt: for as long as the server wants, if it said so.
    ///
    /// # Errors
    /// The failure, if the next attempt would come too late.
    pub(crate) async fn pause(&mut self, error: Error, wanted: Option<Duration>) -> Result<()> {
        let now = Instant::now();
        let deadline = *self.deadline.get_or_insert(now + self.budget);
        let pause = wanted.unwrap_or_else(|| self.backoff.pause());
        if now.checked_add(pause).is_none_or(|end| end >= deadline) {
            let seconds = self.budget.as_secs_f32();
            let why = match wanted {
                Some(wanted) => format!("it wants {} s of rest, the limit is {seconds} s", wanted.as_secs()),
                None => format!("gave up after {seconds} s and {} attempts", self.backoff.attempts()),
            };
            return Err(Error::new(error.kind(), format!("{error} ({why})")));
        }
        tokio::time::sleep(pause).await;
        Ok(())
    }
}

/// A server's wish to be left alone for a while, which counts for all requests to it.
#[derive(Default)]
pub(crate) struct Rest(Cell<Option<Instant>>);

impl Rest {
    /// The server wants so much rest from now on.
    pub(crate) fn wanted(&self, time: Duration) {
        self.0.set(Some(Instant::now() + time.min(LONGEST_REST)));
    }

    /// How much of it is left.
    pub(crate) fn left(&self) -> Option<Duration> {
        let left = self.0.get()?.saturating_duration_since(Instant::now());
        if left.is_zero() {
            self.0.set(None);
            return None;
        }
        Some(left)
    }
}
