//! The handle by which a job is commanded and watched, from the job's own thread.

use crate::budget::GuestLatencyGoal;
use crate::control::{Control, Event, IoStatus, Outcome};
use crate::on_error::OnError;
use crate::progress::Progress;
use crate::state::{Illegal, Status, Verb};
use crate::waiting::Wait;
use headwater_block::{Error, Patience, Share};
use std::cell::RefCell;
use std::rc::Rc;

/// A job, from outside. Clones are the same job. It stays usable after the job's end.
#[derive(Clone)]
pub struct JobHandle(Rc<Control>);

impl JobHandle {
    pub(crate) fn new(control: Rc<Control>) -> Self {
        Self(control)
    }

    /// Where the job is.
    pub fn status(&self) -> Status {
        self.0.status()
    }

    /// How far it is.
    pub fn progress(&self) -> Progress {
        self.0.progress()
    }

    /// The error that made it pause, as long as it wasn't resumed or still waits.
    pub fn trouble(&self) -> Option<Error> {
        self.0.trouble()
    }

    /// What it has paused itself for, as long as it waits for that.
    pub fn waits_for(&self) -> Option<Wait> {
        self.0.wait()
    }

    /// Whether an error holds it up, until it is resumed.
    pub fn io_status(&self) -> IoStatus {
        self.0.io_status()
    }

    /// True if it was told to pause, or paused at an error: at once, while the status follows when nothing is in flight any more.
    pub fn is_paused(&self) -> bool {
        self.0.is_paused()
    }

    /// True if it could be completed.
    pub fn is_ready(&self) -> bool {
        matches!(self.status(), Status::Ready | Status::Standby)
    }

    /// True while it has something to do.
    pub fn is_busy(&self) -> bool {
        self.0.is_busy()
    }

    /// How it ended, once it has.
    pub fn outcome(&self) -> Option<Outcome> {
        self.0.outcome()
    }

    /// How many bytes per second it may copy; 0 is without limit.
    pub fn speed(&self) -> u64 {
        self.0.limiter().rate()
    }

    /// Stops the work until [`JobHandle::resume`]. Reads of the source that are in flight are given up; writes to the overlay are
    /// completed. The job is paused when its status says so: [`Status::Standby`] if it was ready.
    ///
    /// # Errors
    /// If the job's state doesn't allow it, or it is paused.
    pub fn pause(&self) -> Result<(), Illegal> {
        self.0.ask(Verb::Pause)
    }

    /// Goes on; after an error, tries again. One that has paused itself tries again at once.
    ///
    /// # Errors
    /// If it isn't paused.
    pub fn resume(&self) -> Result<(), Illegal> {
        self.0.ask(Verb::Resume)
    }

    /// Limits the job to so many bytes per second from now on; 0 is without limit.
    ///
    /// # Errors
    /// If the job's state doesn't allow it.
    pub fn set_speed(&self, bytes_per_second: u64) -> Result<(), Illegal> {
        Verb::SetSpeed.check(self.0.status())?;
        self.0.limiter().set_rate(bytes_per_second);
        self.0.ask(Verb::SetSpeed)
    }

    /// Has the job keep to a limit that it shares with others, beside its own speed. To be said before it is polled.
    pub fn set_share(&self, share: Share) {
        self.0.set_share(share);
    }

    /// The job's weight among those with which it shares a limit; none if it shares none.
    pub fn weight(&self) -> Option<u32> {
        self.0.share().map(|share| share.weight())
    }

    /// Changes the job's weight, from 1 to 10000 ([`headwater_block::SharedLimiter::WEIGHTS`]). Nothing happens if it shares no limit.
    ///
    /// # Errors
    /// If the job is over.
    pub fn set_weight(&self, weight: u32) -> Result<(), Illegal> {
        Verb::SetSpeed.check(self.0.status())?;
        if let Some(share) = self.0.share() {
            share.set_weight(weight);
        }
        Ok(())
    }

    /// What guests are promised while it copies.
    pub fn guest_latency(&self) -> GuestLatencyGoal {
        self.0.guest_latency()
    }

    /// Changes what guests are promised while it copies.
    ///
    /// # Errors
    /// If the job is over.
    pub fn set_guest_latency(&self, goal: GuestLatencyGoal) -> Result<(), Illegal> {
        Verb::SetSpeed.check(self.0.status())?;
        self.0.set_guest_latency(goal);
        Ok(())
    }

    /// For how long it waits for a source that can't be reached.
    pub fn patience(&self) -> Patience {
        self.0.patience()
    }

    /// Changes for how long it waits for a source that can't be reached; also while it waits, from the next time on that it tries the source.
    ///
    /// # Errors
    /// If the job is over.
    pub fn set_patience(&self, patience: Patience) -> Result<(), Illegal> {
        Verb::SetSpeed.check(self.0.status())?;
        self.0.set_patience(patience);
        Ok(())
    }

    /// Changes what is done about errors from now on.
    pub fn set_on_error(&self, on_error: OnError) {
        self.0.set_on_error(on_error);
    }

    /// Ends a job that is ready, with the target in the source's place. One that is paused does so when it is resumed.
    ///
    /// # Errors
    /// If it isn't ready, or was told to end without that.
    pub fn complete(&self) -> Result<(), Illegal> {
        self.0.ask(Verb::Complete)
    }

    /// Lets a pending job make its result final.
    ///
    /// # Errors
    /// If the job isn't pending.
    pub fn finalize(&self) -> Result<(), Illegal> {
        self.0.ask(Verb::Finalize)
    }

    /// Forgets a job that is concluded.
    ///
    /// # Errors
    /// If it isn't.
    pub fn dismiss(&self) -> Result<(), Illegal> {
        self.0.ask(Verb::Dismiss)
    }

    /// Ends a job that is ready as completed, with the target left as a copy of the source at that moment; any other gives up. (This is
    /// what QMP's `block-job-cancel` does without `force`.)
    ///
    /// # Errors
    /// If it is paused, over, or about to be.
    pub fn request_soft_cancel(&self) -> Result<(), Illegal> {
        self.0.ask_softly()
    }

    /// Asks the job to give up, without waiting for the answer; see [`JobHandle::cancel`].
    ///
    /// # Errors
    /// If the job's state doesn't allow it: it is over, or about to be.
    pub fn request_cancel(&self) -> Result<(), Illegal> {
        self.0.ask(Verb::Cancel)
    }

    /// Cancels the job, and says how it really ended: `Cancelled` if this came before the commit point, otherwise what became of
    /// the commit. The job must be running (its future polled) while this waits.
    ///
    /// # Errors
    /// If the job's state doesn't allow it: it is over, or about to be.
    pub async fn cancel(&self) -> Result<Outcome, Illegal> {
        self.request_cancel()?;
        Ok(self.wait().await)
    }

    /// Waits for the end.
    pub async fn wait(&self) -> Outcome {
        let outcome = RefCell::new(None);
        self.0
            .wait_until(|control| {
                outcome.replace(control.outcome());
                outcome.borrow().is_some()
            })
            .await;
        outcome.take().expect("that is what was waited for")
    }

    /// Waits until the job's status fulfils a condition.
    pub async fn wait_for(&self, condition: impl Fn(Status) -> bool) {
        self.0.wait_until(|control| condition(control.status())).await;
    }

    /// The next event, oldest first. Every event is given once, to whoever asks first; the oldest of more than 1024 are lost.
    pub async fn next_event(&self) -> Event {
        let event = RefCell::new(None);
        self.0
            .wait_until(|control| {
                event.replace(control.take_event());
                event.borrow().is_some()
            })
            .await;
        event.take().expect("that is what was waited for")
    }

    /// The next event, if there is one.
    pub fn try_event(&self) -> Option<Event> {
        self.0.take_event()
    }
}
