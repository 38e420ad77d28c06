//! What the copy engine does when the source can't be reached: the job pauses itself, reads a little of the source now and then, and goes on when
//! that succeeds.
//!
//! Only failures that may pass are waited out ([`headwater_block::ErrorKind::may_pass`]), and only those of the source: a target out of reach may have
//! lost what was written to it.

use crate::control::Control;
use crate::copier::Copier;
use crate::copy_engine::{At, Trouble};
use crate::state::Verb;
use crate::waiting::{Wait, Waiting};
use futures_util::future::select;
use headwater_block::chain::Missing;
use headwater_block::copy_up::{Failed, Operation};
use headwater_block::{Abort, Backoff, Error, ErrorKind};
use std::rc::Rc;
use std::time::Duration;

/// The first and the longest pause before the source is tried again.
const PAUSES: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(5));

/// How it ended.
pub(crate) enum Ended {
    /// The source is back, or a user said something.
    Again,
    /// Patience is at its end, or another error showed up.
    Failed(Failed),
}

/// True if a failure is one to wait out, by a job that may pause now.
pub(crate) fn is_outage(failed: &Failed, control: &Control) -> bool {
    failed.operation == Operation::Read
        && failed.error.kind().may_pass()
        && control.patience().lasts(Duration::ZERO)
        && Verb::Pause.check(control.status()).is_ok()
}

/// Waits until the source can be reached. Nothing is in flight meanwhile but a small read of it.
pub(crate) async fn wait_out(copier: &Rc<dyn Copier>, control: &Control, trouble: &Trouble) -> Ended {
    let since = copier.clock().now();
    let wait = Wait { what: Waiting::Source, error: trouble.failed.error.clone(), since };
    let over = |abort: Rc<Abort>| async move { probe(copier, control, since, &trouble.at, abort).await };
    match control.pause_itself(wait, over).await {
        Some(Err(error)) => Ended::Failed(Operation::Read.failed(error)),
        Some(Ok(())) | None => Ended::Again,
    }
}

/// Tries the source until it answers.
///
/// # Errors
/// The last one when patience is at its end, or one that doesn't pass.
async fn probe(
    copier: &Rc<dyn Copier>,
    control: &Control,
    since: Duration,
    at: &At,
    abort: Rc<Abort>,
) -> Result<(), Error> {
    let clock = copier.clock().clone();
    let mut backoff = Backoff::new(PAUSES.0, PAUSES.1, since.as_nanos() as u64);
    loop {
        let now = clock.now();
        let pause = backoff.pause();
        // The last attempt is made when patience ends, not before.
        let pause = control.patience().rest(now.saturating_sub(since)).map_or(pause, |rest| rest.min(pause));
        abort.guard(select(clock.sleep_until(now + pause), copier.clone().source_back())).await?;
        let tried = match at {
            At::Copy(run) => {
                let end = run.range.end.min(run.range.start + copier.unit());
                let run = Missing { range: run.range.start..end, zero: run.zero };
                copier.clone().probe(run, abort.clone()).await
            }
            At::Look(range) => {
                let look = abort.guard(copier.clone().look(range.clone())).await;
                look.and_then(|found| found).map(drop)
            }
        };
        match tried {
            Err(error) if error.kind() == ErrorKind::Cancelled && abort.is_aborted() => return Err(error),
            Err(error) if error.kind().may_pass() => {
                if !control.patience().lasts(clock.now().saturating_sub(since)) {
                    return Err(error);
                }
                tracing::debug!(%error, attempts = backoff.attempts(), "the source is still out of reach");
            }
            done => return done,
        }
    }
}
