//! Jobs as QMP shows them: their table, their events, their verbs.
//!
//! The work is done by `headwater_job`; here a job gets an id, its hold on the graph, and a voice. Its events leave in the order in which the job
//! had them. What it held in the graph is given back before its end is told, so that whoever hears of it finds the nodes free.
//!
//! - `hold`: what a job holds in the graph. [`stream`], [`commit`], [`mirror`], [`backup`]: how each kind starts, and what it changes in the graph when its work is done. [`create`]: the odd one, which makes a file. [`amend`]: one that
//!   has nothing to do.
//! - [`drive`]: backups and mirrors into files that they make themselves.
//! - [`durable`]: jobs that go on when the daemon is started again.

pub(super) mod amend;
pub(super) mod backup;
pub(super) mod commit;
pub(super) mod create;
mod describe;
pub(super) mod drive;
pub(super) mod durable;
mod hold;
pub(super) mod mirror;
pub(super) mod stream;

use self::durable::Durable;
use self::hold::Hold;
use super::commands::Turn;
use super::events::Events;
use super::failure::{Refusal, brief, generic, no_device};
use super::graph::Graph;
use super::graph::open::{Options, Read};
use crate::cli::reach::parse_patience;
use crate::durable::kept::Kept;
use headwater_block::{LocalFuture, SharedLimiter, TokioClock};
use headwater_job::{Action, Event, JobHandle, OnError, OnErrors, Operation, Outcome, Status};
use serde_json::{Value, json};
use std::cell::{Cell, RefCell};
use std::pin::Pin;
use std::rc::Rc;
use tokio::sync::watch;

/// What all commands that start a job take.
#[derive(Clone)]
pub(super) struct JobArgs {
    pub(super) id: String,
    pub(super) speed: u64,
    pub(super) on_error: OnError,
    pub(super) auto_finalize: bool,
    pub(super) auto_dismiss: bool,
    /// What is written down about it.
    pub(super) kept: Option<Rc<Kept>>,
}

/// A job with a name.
pub(super) struct Job {
    pub(super) id: String,
    pub(super) kind: &'static str,
    pub(super) handle: JobHandle,
    auto_finalize: bool,
    auto_dismiss: bool,
    /// The size in bytes of what it works on.
    len: u64,
    follows: bool,
    /// How far it was last seen: what is told never goes back.
    offset: Cell<u64>,
    hold: RefCell<Option<Hold>>,
    /// The last state that was told.
    told: watch::Sender<Status>,
    /// True once its end was told.
    ended: watch::Sender<bool>,
    /// True once it is in the table no more.
    gone: watch::Sender<bool>,
    was_ready: Cell<bool>,
    kept: Option<Rc<Kept>>,
    write_through: Option<Rc<Cell<bool>>>,
    /// It was cancelled because the daemon ends, not because somebody wanted it.
    interrupted: Cell<bool>,
}

/// What a job is made of, before it is in the table.
pub(super) struct Plan {
    pub(super) kind: &'static str,
    pub(super) args: JobArgs,
    pub(super) len: u64,
    /// It follows a disk that changes, so that only what is to be copied says how far it is.
    pub(super) follows: bool,
    pub(super) hold: Hold,
    pub(super) handle: JobHandle,
    pub(super) work: LocalFuture<'static, Outcome>,
    /// Of a mirror: set, changes go through to the target.
    pub(super) write_through: Option<Rc<Cell<bool>>>,
}

impl Plan {
    /// A job that does `work` as a whole, holds nothing in the graph, and stays until it is dismissed.
    fn task(
        graph: &Rc<Graph>,
        kind: &'static str,
        id: String,
        work: impl Future<Output = headwater_block::Result<()>> + 'static,
    ) -> Self {
        let hold = Hold::new(graph, kind, &id);
        let (handle, work) = headwater_job::task(work, true);
        let (speed, on_error) = (0, OnError::Report);
        let args = JobArgs { id, speed, on_error, auto_finalize: true, auto_dismiss: false, kept: None };
        Self { kind, args, len: 1, follows: false, hold, handle, work: Box::pin(work), write_through: None }
    }

    /// Gives up a job that hasn't started, because something else of its transaction failed.
    pub(super) async fn undo(self, jobs: &Jobs) {
        let Plan { args, hold, work, .. } = self;
        drop(work);
        hold.release().await;
        jobs.tell_undone(&args.id);
    }
}

/// All jobs, in the order in which they were started.
pub(super) struct Jobs {
    events: Rc<Events>,
    turn: Rc<Turn>,
    jobs: RefCell<Vec<Rc<Job>>>,
    durable: Option<Rc<Durable>>,
    /// What all may copy together.
    pub(super) limit: Rc<SharedLimiter>,
}

impl Jobs {
    pub(super) fn new(
        events: Rc<Events>,
        turn: Rc<Turn>,
        durable: Option<Rc<Durable>>,
        limit: u64,
    ) -> Rc<Self> {
        let limit = SharedLimiter::new(limit, Rc::new(TokioClock::new()));
        Rc::new(Self { events, turn, jobs: RefCell::default(), durable, limit })
    }

    /// Checks the id of a job that is to be.
    ///
    /// # Errors
    /// If there is none, it is malformed or taken.
    pub(super) fn check_id<'a>(&self, id: Option<&'a str>) -> Result<&'a str, Refusal> {
        let id = id.unwrap_or_default();
        let sound = id.starts_with(|c: char| c.is_ascii_alphabetic())
            && id.chars().all(|c| c.is_ascii_alphanumeric() || "-._".contains(c));
        if !sound {
            return Err(generic(format!("Invalid job ID '{id}'")));
        }
        if self.jobs.borrow().iter().any(|job| job.id == id) {
            return Err(generic(format!("Job ID '{id}' already in use")));
        }
        Ok(id)
    }

    /// Tells of a job that came to an end before it began.
    pub(super) fn tell_still_born(&self, id: &str) {
        self.tell_states(id, &[Status::Created, Status::Null]);
    }

    /// Tells of a job that came to an end before it began, because something else of its transaction failed.
    pub(super) fn tell_undone(&self, id: &str) {
        self.tell_states(id, &[Status::Created, Status::Aborting, Status::Concluded, Status::Null]);
    }

    fn tell_states(&self, id: &str, states: &[Status]) {
        for status in states {
            self.events.emit("JOB_STATUS_CHANGE", json!({"status": status.to_string(), "id": id}));
        }
    }

    /// Starts a job. Its first events have been told when this returns.
    pub(super) async fn start(self: &Rc<Self>, plan: Plan) {
        let Plan { kind, args, len, follows, hold, handle, mut work, write_through } = plan;
        let job = Rc::new(Job {
            id: args.id,
            kind,
            handle,
            auto_finalize: args.auto_finalize,
            auto_dismiss: args.auto_dismiss,
            len,
            follows,
            offset: Cell::new(0),
            told: watch::Sender::new(Status::Created),
            hold: RefCell::new(Some(hold)),
            ended: watch::Sender::new(false),
            gone: watch::Sender::new(false),
            was_ready: Cell::new(false),
            kept: args.kept,
            write_through,
            interrupted: Cell::new(false),
        });
        if job.kept.as_ref().is_some_and(|kept| kept.record().paused) {
            // It was so when the daemon ended. A job that doesn't exist yet can always be paused.
            let _ = job.handle.pause();
        }
        let recorded = job.kept.as_ref().map(|kept| kept.record());
        let hold = recorded.as_ref().and_then(|record| record.hold.as_deref());
        if let Some(Ok(patience)) = hold.map(parse_patience) {
            // A job that doesn't exist yet isn't over.
            let _ = job.handle.set_patience(patience);
        }
        let weight = recorded.and_then(|record| record.weight);
        job.handle.set_share(self.limit.join(weight.unwrap_or(SharedLimiter::DEFAULT_WEIGHT)));
        self.jobs.borrow_mut().push(job.clone());
        // It gets as far as it gets at once, so that what it tells of its beginning comes before the command's answer.
        let ended =
            std::future::poll_fn(|cx| std::task::Poll::Ready(Pin::as_mut(&mut work).poll(cx).is_ready()))
                .await;
        while let Some(event) = job.handle.try_event() {
            self.tell(&job, &event);
            if matches!(event, Event::Status(Status::Running)) {
                break;
            }
        }
        if !ended {
            tokio::task::spawn_local(work);
        }
        tokio::task::spawn_local(self.clone().follow(job));
    }

    /// Tells what happens to a job until it is no more.
    async fn follow(self: Rc<Self>, job: Rc<Job>) {
        loop {
            let event = job.handle.next_event().await;
            if let Event::Status(Status::Concluded) = event {
                // What the job held in the graph is given back when nobody else is changing the graph.
                let _turn = self.turn.take().await;
                let hold = job.hold.take();
                if let Some(hold) = hold {
                    hold.release().await;
                }
                job.end_record().await;
                self.tell_end(&job);
                self.tell(&job, &event);
                if job.auto_dismiss {
                    let gone = job.handle.next_event().await;
                    self.tell(&job, &gone);
                    self.forget(&job);
                    return;
                }
                job.ended.send_replace(true);
                continue;
            }
            self.tell(&job, &event);
            if let Event::Status(Status::Null) = event {
                return self.forget(&job);
            }
        }
    }

    fn forget(&self, job: &Rc<Job>) {
        self.jobs.borrow_mut().retain(|other| !Rc::ptr_eq(other, job));
        job.ended.send_replace(true);
        job.gone.send_replace(true);
    }

    fn tell(&self, job: &Job, event: &Event) {
        match event {
            Event::Status(status) => {
                tracing::trace!(target: super::trace::TARGET, event = "job_state_transition", id = job.id, state = %status);
                self.events.emit("JOB_STATUS_CHANGE", json!({"status": status.to_string(), "id": job.id}));
                match status {
                    Status::Pending if !job.auto_finalize && job.is_block_job() => {
                        self.events.emit("BLOCK_JOB_PENDING", json!({"type": job.kind, "id": job.id}));
                    }
                    Status::Ready if !job.was_ready.replace(true) => {
                        self.events.emit("BLOCK_JOB_READY", job.numbers());
                    }
                    _ => {}
                }
                job.told.send_replace(*status);
            }
            Event::Error { action, operation, .. } => {
                // A stream of the reference can't tell the two apart.
                let write = *operation == Operation::Write && job.kind != "stream";
                let operation = if write { "write" } else { "read" };
                let action = match action {
                    Action::Report => "report",
                    Action::Ignore => "ignore",
                    Action::Stop => "stop",
                };
                self.events.emit(
                    "BLOCK_JOB_ERROR",
                    json!({"device": job.id, "operation": operation, "action": action}),
                );
            }
            // Events of ours: the reference knows no such thing.
            Event::Waits(wait) => {
                let data =
                    json!({"id": job.id, "reason": wait.what.to_string(), "error": wait.error.to_string()});
                self.events.emit("HEADWATER_JOB_WAITING", data);
            }
            Event::GoesOn(what) => {
                let data = json!({"id": job.id, "reason": what.to_string()});
                self.events.emit("HEADWATER_JOB_GOES_ON", data);
            }
        }
    }

    fn tell_end(&self, job: &Job) {
        if !job.is_block_job() {
            return;
        }
        let mut numbers = job.numbers();
        let name = match job.handle.outcome() {
            Some(Outcome::Cancelled) => "BLOCK_JOB_CANCELLED",
            Some(Outcome::Failed(err)) => {
                if let Value::Object(numbers) = &mut numbers {
                    numbers.insert("error".into(), brief(&err).into());
                }
                "BLOCK_JOB_COMPLETED"
            }
            Some(Outcome::Completed) | None => "BLOCK_JOB_COMPLETED",
        };
        self.events.emit(name, numbers);
    }

    /// The job for a command of the `job-` family.
    ///
    /// # Errors
    /// There is none.
    pub(super) fn find(&self, id: &str) -> Result<Rc<Job>, Refusal> {
        let found = self.jobs.borrow().iter().find(|job| job.id == id).cloned();
        found.ok_or_else(|| generic("Job not found"))
    }

    /// The job for a command of the `block-job-` family.
    ///
    /// # Errors
    /// There is none.
    pub(super) fn find_block_job(&self, device: &str) -> Result<Rc<Job>, Refusal> {
        let found = self.jobs.borrow().iter().find(|job| job.id == device && job.is_block_job()).cloned();
        found.ok_or_else(|| Refusal::device_not_active(format!("Block job '{device}' not found")))
    }

    /// All jobs, the newest first.
    pub(super) fn all(&self) -> Vec<Rc<Job>> {
        self.jobs.borrow().iter().rev().cloned().collect()
    }

    /// What is told of all of them.
    pub(super) fn query(&self) -> Value {
        self.jobs.borrow().iter().rev().map(|job| job.describe()).collect()
    }

    pub(super) fn query_block_jobs(&self) -> Value {
        self.jobs
            .borrow()
            .iter()
            .rev()
            .filter(|job| job.is_block_job())
            .map(|job| job.describe_block_job())
            .collect()
    }

    /// Ends all jobs that can be: the daemon is about to end.
    pub(super) async fn cancel_all(&self) {
        let jobs = self.jobs.borrow().clone();
        for job in jobs {
            job.interrupted.set(true);
            // One that is over, or past its commit point, ends by itself.
            let _ = job.handle.request_cancel();
            job.wait_for_end().await;
        }
    }
}

impl Job {
    fn is_block_job(&self) -> bool {
        !matches!(self.kind, "create" | "amend")
    }

    /// Waits until its end was told.
    pub(super) async fn wait_for_end(&self) {
        let mut ended = self.ended.subscribe();
        // The sender lives as long as the job.
        let _ = ended.wait_for(|ended| *ended).await;
    }

    /// Waits until it is over, or waits for something that isn't its own work.
    pub(super) async fn wait_for_rest(&self) {
        self.handle
            .wait_for(|status| !matches!(status, Status::Pending | Status::Waiting | Status::Aborting))
            .await;
        if self.handle.status().is_over() {
            self.wait_for_end().await;
        }
    }

    /// Waits until a job that was dismissed is forgotten.
    pub(super) async fn wait_for_end_of_dismissed(&self) {
        // The sender lives as long as the job.
        let _ = self.gone.subscribe().wait_for(|gone| *gone).await;
    }

    /// The last state that was told, and a way to wait for the next.
    pub(super) fn told(&self) -> watch::Receiver<Status> {
        self.told.subscribe()
    }

    /// `block-job-change`: the copy mode of a mirror, which may become `write-blocking`.
    ///
    /// # Errors
    /// For other jobs, and for the way back.
    pub(super) fn change(&self, args: &Options) -> Result<(), Refusal> {
        let Some(through) = &self.write_through else {
            return Err(generic("Job type does not support change"));
        };
        match args.text("copy-mode") {
            Some("write-blocking") => through.set(true),
            Some(mode) if through.get() => {
                return Err(generic(format!("Change to copy mode '{mode}' is not implemented")));
            }
            _ => {}
        }
        Ok(())
    }
}

/// Refuses a verb in the words of the job's state.
pub(super) fn refused(job: &Job, illegal: &headwater_job::Illegal) -> Refusal {
    use headwater_job::Illegal;
    match illegal {
        Illegal::State { verb, status } => {
            generic(format!("Job '{}' in state '{status}' cannot accept command verb '{verb}'", job.id))
        }
        Illegal::AlreadyPaused => generic("Job is already paused"),
        Illegal::NotPaused => generic("Can't resume a job that was not paused"),
        Illegal::Paused => generic(format!("The block job for device '{}' is currently paused", job.id)),
        Illegal::Ending => generic(format!("Job '{}' is about to end and can't be completed", job.id)),
    }
}

/// A device that isn't there, for commands that say so by class.
pub(super) fn device_not_found(device: &str) -> Refusal {
    no_device(format!("Device '{device}' not found"))
}

/// The policy that `name` means.
pub(super) fn on_error(name: Option<&str>) -> OnError {
    match name {
        Some("ignore") => OnError::Ignore,
        Some("stop") => OnError::Stop,
        Some("enospc" | "auto") => OnError::Enospc,
        _ => OnError::Report,
    }
}

/// The policies for both ends of a job that copies from one node to another.
pub(super) fn on_errors(args: &Options) -> OnErrors {
    let policy = |key| on_error(args.text(key));
    OnErrors { source: policy("on-source-error"), target: policy("on-target-error") }
}
