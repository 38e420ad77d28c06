//! What a job and those who command it share: commands in, state and events out. One thread, so plain cells.
//!
//! All changes of a job's state go through [`Control`], which asks the tables of [`crate::state`].
//!
//! # The commit point
//! [`Control::commit`] decides, in one step without an await, whether the job may make its result final. A cancel that was asked for
//! before it wins; one that comes later has lost and is told what became of the job. So the reply to a cancel is always true. Jobs of a [`Group`] have
//! one such point together.
//!
//! # Pausing
//! One flag, which a user sets and an error that stops the job. To set it twice is refused, and so is to clear it when it isn't set; it
//! is seen at once, while the state says `paused` when nothing is in flight any more. A job that pauses itself ([`crate::waiting`]) has a state like that
//! without the flag.

use crate::budget::GuestLatencyGoal;
use crate::group::Group;
use crate::on_error::{OnError, OnErrors};
use crate::progress::Progress;
use crate::state::{Illegal, Status, Verb};
use crate::waiting::Wait;
use headwater_block::copy_up::{Failed, Operation};
use headwater_block::{Abort, Error, ErrorKind, Patience, RateLimiter, Share};
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::poll_fn;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

mod told;

pub use self::told::{Action, Event, IoStatus, Outcome};

/// How many events are kept for someone who doesn't fetch them; then the oldest are dropped.
const MOST_EVENTS: usize = 1024;

/// How a job that is ready was told to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ending {
    /// The target takes the source's place.
    Pivot,
    /// The target is left as a copy.
    Leave,
}

/// What a job is to do now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Wish {
    Go,
    Pause,
    Cancel,
}

/// The state that is shared; see the module.
pub(crate) struct Control {
    status: Cell<Status>,
    paused: Cell<bool>,
    cancelled: Cell<bool>,
    /// Thrown with that: what waits for a target out of reach is given up.
    given_up: Rc<Abort>,
    finalized: Cell<bool>,
    group: RefCell<Option<Rc<Group>>>,
    committed: Cell<bool>,
    ending: Cell<Option<Ending>>,
    on_error: Cell<OnErrors>,
    /// A ready job has nothing to do.
    idle: Cell<bool>,
    limiter: Rc<RateLimiter>,
    /// Of a limit for several jobs.
    share: RefCell<Option<Rc<Share>>>,
    guest_latency: Cell<GuestLatencyGoal>,
    /// For how long a source that can't be reached is waited for.
    patience: Cell<Patience>,
    progress: Cell<Progress>,
    /// What the job has paused itself for.
    wait: RefCell<Option<Wait>>,
    /// The error that made the job pause until it is resumed.
    trouble: RefCell<Option<Error>>,
    outcome: RefCell<Option<Outcome>>,
    events: RefCell<VecDeque<Event>>,
    /// Goes up with every change that someone may wait for.
    version: Cell<u64>,
    waiting: RefCell<Vec<Waker>>,
}

impl Control {
    pub(crate) fn new(speed: u64, on_error: impl Into<OnErrors>) -> Rc<Self> {
        Self::with_switch(speed, on_error, Abort::new())
    }

    /// As [`Control::new`]; a cancel throws this switch.
    pub(crate) fn with_switch(speed: u64, on_error: impl Into<OnErrors>, given_up: Rc<Abort>) -> Rc<Self> {
        Rc::new(Self {
            status: Cell::new(Status::Created),
            paused: Cell::new(false),
            cancelled: Cell::new(false),
            given_up,
            finalized: Cell::new(false),
            group: RefCell::default(),
            committed: Cell::new(false),
            ending: Cell::new(None),
            on_error: Cell::new(on_error.into()),
            idle: Cell::new(false),
            limiter: RateLimiter::new(speed),
            share: RefCell::default(),
            guest_latency: Cell::default(),
            patience: Cell::default(),
            progress: Cell::default(),
            wait: RefCell::default(),
            trouble: RefCell::default(),
            outcome: RefCell::default(),
            events: RefCell::new(VecDeque::from([Event::Status(Status::Created)])),
            version: Cell::new(0),
            waiting: RefCell::default(),
        })
    }

    /// Makes it one of several that end together.
    pub(crate) fn set_group(&self, group: Rc<Group>) {
        self.group.replace(Some(group));
    }

    /// Those that it ends with, itself as well; none if it ends alone.
    fn group(&self) -> Option<Rc<Group>> {
        self.group.borrow().clone()
    }

    pub(crate) fn status(&self) -> Status {
        self.status.get()
    }

    /// What guests are promised meanwhile.
    pub(crate) fn guest_latency(&self) -> GuestLatencyGoal {
        self.guest_latency.get()
    }

    /// Changes what guests are promised.
    pub(crate) fn set_guest_latency(&self, goal: GuestLatencyGoal) {
        self.guest_latency.set(goal);
        self.changed();
    }

    /// For how long a source that can't be reached is waited for.
    pub(crate) fn patience(&self) -> Patience {
        self.patience.get()
    }

    /// Changes it. A wait that is under way learns of it the next time it tries the source.
    pub(crate) fn set_patience(&self, patience: Patience) {
        self.patience.set(patience);
    }

    pub(crate) fn limiter(&self) -> &Rc<RateLimiter> {
        &self.limiter
    }

    pub(crate) fn share(&self) -> Option<Rc<Share>> {
        self.share.borrow().clone()
    }

    /// It may not copy as fast as it can.
    pub(crate) fn is_limited(&self) -> bool {
        self.limiter.rate() > 0 || self.share.borrow().as_ref().is_some_and(|share| share.limit() > 0)
    }

    pub(crate) fn set_share(&self, share: Share) {
        self.share.replace(Some(Rc::new(share)));
    }

    pub(crate) fn progress(&self) -> Progress {
        self.progress.get()
    }

    pub(crate) fn set_progress(&self, progress: Progress) {
        self.progress.set(progress);
    }

    pub(crate) fn set_on_error(&self, on_error: OnError) {
        self.on_error.set(on_error.into());
    }

    pub(crate) fn is_paused(&self) -> bool {
        self.paused.get()
    }

    /// How it is to end, if it was told.
    pub(crate) fn ending(&self) -> Option<Ending> {
        self.ending.get()
    }

    pub(crate) fn set_idle(&self, idle: bool) {
        self.idle.set(idle);
    }

    pub(crate) fn is_busy(&self) -> bool {
        match self.status.get() {
            Status::Running | Status::Ready => !self.idle.get(),
            Status::Aborting => true,
            _ => false,
        }
    }

    pub(crate) fn io_status(&self) -> IoStatus {
        match self.trouble().as_ref().map(Error::kind) {
            None => IoStatus::Ok,
            Some(ErrorKind::NoSpace) => IoStatus::NoSpace,
            Some(_) => IoStatus::Failed,
        }
    }

    /// The error that holds it up.
    pub(crate) fn trouble(&self) -> Option<Error> {
        self.trouble.borrow().clone().or_else(|| self.wait().map(|wait| wait.error))
    }

    pub(crate) fn wait(&self) -> Option<Wait> {
        self.wait.borrow().clone()
    }

    pub(crate) fn set_wait(&self, wait: Option<Wait>) {
        self.wait.replace(wait);
    }

    pub(crate) fn outcome(&self) -> Option<Outcome> {
        self.outcome.borrow().clone()
    }

    pub(crate) fn take_event(&self) -> Option<Event> {
        self.events.borrow_mut().pop_front()
    }

    /// Asks for a verb.
    pub(crate) fn ask(&self, verb: Verb) -> Result<(), Illegal> {
        if verb == Verb::Resume && !self.paused.get() && self.wait.borrow().is_none() {
            return Err(Illegal::NotPaused);
        }
        verb.check(self.status.get())?;
        match verb {
            Verb::Cancel => self.cancel(),
            Verb::Pause if self.paused.get() => return Err(Illegal::AlreadyPaused),
            Verb::Pause => self.paused.set(true),
            Verb::Resume => {
                self.paused.set(false);
                self.trouble.replace(None);
                self.set_wait(None);
            }
            Verb::Complete => self.end(Ending::Pivot)?,
            Verb::Finalize => {
                self.finalized.set(true);
                self.each_of_group(|member| member.finalized.set(true));
            }
            Verb::Dismiss => self.go(Status::Null),
            Verb::SetSpeed => {}
        }
        self.changed();
        Ok(())
    }

    /// Asks a job that is ready to leave its target as a copy, and any other to give up.
    pub(crate) fn ask_softly(&self) -> Result<(), Illegal> {
        Verb::Cancel.check(self.status.get())?;
        if self.paused.get() {
            return Err(Illegal::Paused);
        }
        // Standby is still told while a job that was resumed has not seen it yet.
        if !matches!(self.status.get(), Status::Ready | Status::Standby) {
            return self.ask(Verb::Cancel);
        }
        // One that was told to complete does that: it ends well either way.
        let _completes = self.end(Ending::Leave);
        self.changed();
        Ok(())
    }

    /// Whoever says first how the job ends is heard.
    fn end(&self, ending: Ending) -> Result<(), Illegal> {
        let first = self.ending.get().unwrap_or(ending);
        self.ending.set(Some(first));
        if first == ending { Ok(()) } else { Err(Illegal::Ending) }
    }

    /// What the job is to do now.
    pub(crate) fn wish(&self) -> Wish {
        match (self.cancelled.get(), self.paused.get()) {
            (true, _) => Wish::Cancel,
            (false, true) => Wish::Pause,
            (false, false) => Wish::Go,
        }
    }

    /// Goes to another state.
    ///
    /// # Panics
    /// If the table has no such step: a mistake in this crate.
    pub(crate) fn go(&self, next: Status) {
        let now = self.status.get();
        assert!(now.may_become(next), "a job that is {now} can't become {next}");
        self.status.set(next);
        self.tell(Event::Status(next));
    }

    pub(crate) fn tell(&self, event: Event) {
        let mut events = self.events.borrow_mut();
        if events.len() == MOST_EVENTS {
            events.pop_front();
        }
        events.push_back(event);
        drop(events);
        self.changed();
    }

    /// What is done now about an error of this kind in such an operation.
    pub(crate) fn action(&self, operation: Operation, kind: ErrorKind) -> Action {
        match self.on_error.get().action(operation, kind) {
            // A job that is pending can't pause any more.
            Action::Stop if Verb::Pause.check(self.status.get()).is_err() => Action::Report,
            action => action,
        }
    }

    /// Reports an error, and pauses the job if that is what is done about it.
    pub(crate) fn report(&self, failed: &Failed, action: Action) {
        let Failed { operation, error } = failed.clone();
        if action == Action::Stop {
            self.trouble.replace(Some(error.clone()));
            self.paused.set(true);
        }
        self.tell(Event::Error { error, action, operation });
    }

    /// Stays in state paused (or standby, if it was ready) until the job is resumed or cancelled.
    pub(crate) async fn stay_paused(&self) {
        if self.wish() != Wish::Pause {
            return;
        }
        let worked = self.status.get();
        self.go(if worked == Status::Ready { Status::Standby } else { Status::Paused });
        self.wait_until(|control| control.wish() != Wish::Pause).await;
        self.go(worked);
    }

    // race-mark: cancel-recalls
    fn cancel(&self) {
        self.cancelled.set(true);
        self.given_up.abort();
    }

    /// What is thrown when the job is cancelled.
    pub(crate) fn given_up(&self) -> &Rc<Abort> {
        &self.given_up
    }

    /// True if a request has failed because the job is cancelled.
    pub(crate) fn is_recalled(&self, error: &Error) -> bool {
        self.cancelled.get() && error.kind() == ErrorKind::Cancelled
    }

    /// Gives up, together with all those that it ends with.
    pub(crate) fn give_up(&self) {
        self.each_of_group(Control::cancel);
        self.changed();
    }

    /// Whether it is cancelled, or past the commit point, is settled.
    fn is_decided(&self) -> bool {
        self.cancelled.get() || self.committed.get()
    }

    /// Another of its group may have passed the commit point for it, and a cancel that comes then is too late.
    // race-mark: group-commit-point
    fn may_go_on(&self) -> bool {
        self.committed.get() || !self.cancelled.get()
    }

    /// Waits until all those that it ends with have done their work. False if it was cancelled instead.
    pub(crate) async fn wait_for_group(&self) -> bool {
        if let Some(group) = self.group() {
            self.wait_until(|control| control.is_decided() || group.have_all_done()).await;
        }
        self.may_go_on()
    }

    /// Waits to be finalised, if it or one of those that it ends with was `wanted` to. False if the job was cancelled instead.
    pub(crate) async fn wait_for_finalize(&self, wanted: bool) -> bool {
        if !wanted && !self.group().is_some_and(|group| group.waits_for_finalize()) {
            return true;
        }
        self.wait_until(|control| control.finalized.get() || control.is_decided()).await;
        self.may_go_on()
    }

    /// The commit point. True if the job may make its result final, which from now on no cancel prevents.
    pub(crate) fn commit(&self) -> bool {
        // race-mark: commit-point
        let members = self.group().map_or(Vec::new(), |group| group.members());
        if !self.cancelled.get() && members.iter().all(|member| !member.cancelled.get()) {
            self.committed.set(true);
            members.iter().for_each(|member| member.committed.set(true));
        }
        self.committed.get()
    }

    /// The job is over.
    pub(crate) fn conclude(&self, outcome: Outcome, dismiss: bool) {
        debug_assert!(self.committed.get() || !matches!(outcome, Outcome::Completed));
        self.outcome.replace(Some(outcome));
        self.go(Status::Concluded);
        if dismiss {
            self.go(Status::Null);
        }
    }

    fn each_of_group(&self, what: impl Fn(&Control)) {
        self.group().iter().flat_map(|group| group.members()).for_each(|member| what(&member));
    }

    /// Tells everyone who waits to look again, also for those that it ends with.
    pub(crate) fn changed(&self) {
        self.wake();
        self.each_of_group(Control::wake);
    }

    fn wake(&self) {
        self.version.set(self.version.get() + 1);
        for waker in self.waiting.take() {
            waker.wake();
        }
    }

    /// Ready when something changed since `seen`, which it updates.
    pub(crate) fn poll_changed(&self, cx: &mut Context<'_>, seen: &mut u64) -> Poll<()> {
        if *seen != self.version.get() {
            *seen = self.version.get();
            return Poll::Ready(());
        }
        let mut waiting = self.waiting.borrow_mut();
        if !waiting.iter().any(|waker| waker.will_wake(cx.waker())) {
            waiting.push(cx.waker().clone());
        }
        Poll::Pending
    }

    pub(crate) async fn wait_until(&self, condition: impl Fn(&Self) -> bool) {
        let mut seen = self.version.get();
        poll_fn(|cx| {
            loop {
                if condition(self) {
                    return Poll::Ready(());
                }
                if self.poll_changed(cx, &mut seen).is_pending() {
                    return Poll::Pending;
                }
            }
        })
        .await;
    }
}
