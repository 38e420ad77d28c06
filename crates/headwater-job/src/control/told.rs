//! What a job tells those who command it.

use crate::state::Status;
use crate::waiting::{Wait, Waiting};
use headwater_block::Error;
use headwater_block::copy_up::Operation;

/// How a job ended.
#[derive(Debug, Clone)]
pub enum Outcome {
    /// It did all of its work, durably.
    Completed,
    /// It was cancelled before its commit point. What it has copied stays; nothing else has changed.
    Cancelled,
    /// It gave up with this error. What it has copied stays; nothing else has changed.
    Failed(Error),
}

/// What was done about an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// The job ends with it.
    Report,
    /// The job goes on elsewhere, and tries that part again at the end.
    Ignore,
    /// The job has paused; when it is resumed it tries again.
    Stop,
}

/// Something that happened to a job.
#[derive(Debug, Clone)]
pub enum Event {
    /// It went to another state.
    Status(Status),
    /// A part of its work failed.
    Error {
        /// What failed.
        error: Error,
        /// What is done about it.
        action: Action,
        /// Whether the source failed or the target.
        operation: Operation,
    },
    /// It has paused itself.
    Waits(Wait),
    /// What it waited for is over, or a user's command has ended the wait.
    GoesOn(Waiting),
}

/// Whether an error holds the job up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IoStatus {
    /// None does.
    Ok,
    /// It has paused at an error.
    Failed,
    /// It has paused because no space is left.
    NoSpace,
}
