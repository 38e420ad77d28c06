//! How all jobs begin and end: the way through the states that doesn't depend on what a job does.

use crate::control::{Action, Control, Outcome, Wish};
use crate::copy_engine::Stopped;
use crate::state::Status;
use headwater_block::copy_up::Operation;
use headwater_block::{Disk, LocalFuture, Result};

/// What makes a job's result final, at its commit point: what the graph has to do to be what the job made of it. If it fails, it has
/// changed nothing, and the job fails with its error. It is polled to its end.
pub type Finish = Box<dyn FnOnce() -> LocalFuture<'static, Result<()>>>;

/// Carries out `work`, unless the job is cancelled before it began, and concludes it.
pub(crate) async fn run(
    control: &Control,
    wait_for_dismiss: bool,
    work: impl Future<Output = Result<(), Stopped>>,
) -> Outcome {
    let result = match control.wish() {
        Wish::Cancel => Err(Stopped::Cancelled),
        Wish::Go | Wish::Pause => {
            control.go(Status::Running);
            work.await
        }
    };
    let outcome = match result {
        Ok(()) => Outcome::Completed,
        Err(stopped) => {
            control.give_up();
            control.go(Status::Aborting);
            match stopped {
                Stopped::Cancelled => Outcome::Cancelled,
                Stopped::Failed(error) => Outcome::Failed(error),
            }
        }
    };
    control.conclude(outcome.clone(), !wait_for_dismiss);
    outcome
}

/// Makes everything durable, as often as the policy allows.
pub(crate) async fn flush(disk: &Disk, control: &Control) -> Result<(), Stopped> {
    loop {
        control.stay_paused().await;
        if control.wish() == Wish::Cancel {
            return Err(Stopped::Cancelled);
        }
        if try_flush(disk, control).await? {
            break;
        }
    }
    // Commands that came while it was flushed still count: the next state knows no pause.
    control.stay_paused().await;
    if control.wish() == Wish::Cancel { Err(Stopped::Cancelled) } else { Ok(()) }
}

/// Flushes once. False if that failed and the job is to pause.
pub(crate) async fn try_flush(disk: &Disk, control: &Control) -> Result<bool, Stopped> {
    let Err(error) = disk.recallable(control.given_up(), disk.flush()).await else { return Ok(true) };
    if control.is_recalled(&error) {
        return Err(Stopped::Cancelled);
    }
    // There is nothing to go on with, so ignoring it is no choice.
    let action = match control.action(Operation::Write, error.kind()) {
        Action::Ignore => Action::Report,
        action => action,
    };
    control.report(&Operation::Write.failed(error.clone()), action);
    if action == Action::Report { Err(Stopped::Failed(error)) } else { Ok(false) }
}

/// Waits until the result may be made final, which it may with those of all jobs that end together.
pub(crate) async fn wait_for_finalize(control: &Control, wanted: bool) -> Result<(), Stopped> {
    control.go(Status::Waiting);
    if !control.wait_for_group().await {
        return Err(Stopped::Cancelled);
    }
    control.go(Status::Pending);
    if control.wait_for_finalize(wanted).await { Ok(()) } else { Err(Stopped::Cancelled) }
}

/// Passes the commit point, and makes the result final.
pub(crate) async fn commit(
    control: &Control,
    finish: impl Future<Output = Result<()>>,
) -> Result<(), Stopped> {
    if control.commit() { finish.await.map_err(Stopped::Failed) } else { Err(Stopped::Cancelled) }
}
