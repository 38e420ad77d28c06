//! A job's state machine: which states there are, which verbs each allows, and which state may follow which.
//!
//! The states, their names and the two tables are QEMU's, so that management tools find what they know. Pure: nothing here waits,
//! and nobody else decides whether something is legal.

use std::fmt;

/// Where a job is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Status {
    /// It exists and hasn't started.
    Created,
    /// It works.
    Running,
    /// It was told to pause, or paused by itself at an error.
    Paused,
    /// It has caught up and could be completed (jobs that follow a moving target).
    Ready,
    /// Ready, and told to pause.
    Standby,
    /// It has done its work and waits for others of its transaction.
    Waiting,
    /// It waits to be finalised: the last moment at which it can be cancelled.
    Pending,
    /// It was cancelled or failed, and undoes what it must.
    Aborting,
    /// It is over, for better or worse; its result can be asked for.
    Concluded,
    /// It was dismissed: it no longer exists.
    Null,
}

/// All states, in the order of the tables.
pub const STATUSES: [Status; 10] = [
    Status::Created,
    Status::Running,
    Status::Paused,
    Status::Ready,
    Status::Standby,
    Status::Waiting,
    Status::Pending,
    Status::Aborting,
    Status::Concluded,
    Status::Null,
];

/// What a user can ask of a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Verb {
    /// Give up.
    Cancel,
    /// Stop working until resumed.
    Pause,
    /// Go on.
    Resume,
    /// Change how many bytes per second it may copy.
    SetSpeed,
    /// End a job that is ready.
    Complete,
    /// Commit a job that is pending.
    Finalize,
    /// Forget a job that is concluded.
    Dismiss,
}

/// All verbs, in the order of the table.
pub const VERBS: [Verb; 7] =
    [Verb::Cancel, Verb::Pause, Verb::Resume, Verb::SetSpeed, Verb::Complete, Verb::Finalize, Verb::Dismiss];

/// Which verbs are legal in which state. `x` is legal.
///
/// Columns: created running paused ready standby waiting pending aborting concluded null.
#[rustfmt::skip]
const LEGAL: [(Verb, &str); 7] = [
    //                C R P Y S W D X E N
    (Verb::Cancel,   "x x x x x x x . . ."),
    (Verb::Pause,    "x x x x x . . . . ."),
    (Verb::Resume,   "x x x x x . . . . ."),
    (Verb::SetSpeed, "x x x x x . . . . ."),
    (Verb::Complete, ". . . x x . . . . ."),
    (Verb::Finalize, ". . . . . . x . . ."),
    (Verb::Dismiss,  ". . . . . . . . x ."),
];

/// Which state may follow which. Rows: from; columns: to, in the same order.
#[rustfmt::skip]
const FOLLOWS: [(Status, &str); 10] = [
    //                    C R P Y S W D X E N
    (Status::Created,   ". x . . . . . x . x"),
    (Status::Running,   ". . x x . x . x . ."),
    (Status::Paused,    ". x . . . . . . . ."),
    (Status::Ready,     ". . . . x x . x . ."),
    (Status::Standby,   ". . . x . . . . . ."),
    (Status::Waiting,   ". . . . . . x x . ."),
    (Status::Pending,   ". . . . . . . x x ."),
    (Status::Aborting,  ". . . . . . . . x ."),
    (Status::Concluded, ". . . . . . . . . x"),
    (Status::Null,      ". . . . . . . . . ."),
];

/// Why a request is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Illegal {
    /// The job's state doesn't allow it.
    State {
        /// What was asked.
        verb: Verb,
        /// The state in which it was asked.
        status: Status,
    },
    /// It was told to pause before, or has paused at an error.
    AlreadyPaused,
    /// There is nothing to resume.
    NotPaused,
    /// It must be resumed before it can end well.
    Paused,
    /// It was told to end in another way before.
    Ending,
}

impl fmt::Display for Illegal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Illegal::State { verb, status } => write!(f, "a job that is {status} doesn't take `{verb}`"),
            Illegal::AlreadyPaused => f.write_str("the job is already paused"),
            Illegal::NotPaused => f.write_str("the job isn't paused"),
            Illegal::Paused => f.write_str("the job is paused; resume it first"),
            Illegal::Ending => f.write_str("the job was told to end in another way"),
        }
    }
}

impl std::error::Error for Illegal {}

/// True at a column of a row of a table.
fn marked(row: &str, column: usize) -> bool {
    row.as_bytes().get(2 * column) == Some(&b'x')
}

impl Verb {
    /// Whether a job in `status` takes this verb.
    ///
    /// # Errors
    /// [`Illegal`], which says why not.
    pub fn check(self, status: Status) -> Result<(), Illegal> {
        let (verb, row) = LEGAL[self as usize];
        debug_assert_eq!(verb, self);
        if marked(row, status as usize) { Ok(()) } else { Err(Illegal::State { verb: self, status }) }
    }
}

impl Status {
    /// True if a job in this state may go to `next`.
    pub fn may_become(self, next: Status) -> bool {
        let (from, row) = FOLLOWS[self as usize];
        debug_assert_eq!(from, self);
        marked(row, next as usize)
    }

    /// True once the job's work is over.
    pub fn is_over(self) -> bool {
        matches!(self, Status::Concluded | Status::Null)
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Status::Created => "created",
            Status::Running => "running",
            Status::Paused => "paused",
            Status::Ready => "ready",
            Status::Standby => "standby",
            Status::Waiting => "waiting",
            Status::Pending => "pending",
            Status::Aborting => "aborting",
            Status::Concluded => "concluded",
            Status::Null => "null",
        })
    }
}

impl fmt::Display for Verb {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Verb::Cancel => "cancel",
            Verb::Pause => "pause",
            Verb::Resume => "resume",
            Verb::SetSpeed => "set-speed",
            Verb::Complete => "complete",
            Verb::Finalize => "finalize",
            Verb::Dismiss => "dismiss",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tables_rows_stand_in_the_order_of_the_enums() {
        for (at, status) in STATUSES.into_iter().enumerate() {
            assert_eq!(status as usize, at);
            assert_eq!(FOLLOWS[at].0, status);
            assert_eq!(FOLLOWS[at].1.len(), 19);
        }
        for (at, verb) in VERBS.into_iter().enumerate() {
            assert_eq!((verb as usize, LEGAL[at].0), (at, verb));
            assert_eq!(LEGAL[at].1.len(), 19);
        }
    }

    #[test]
    fn every_job_can_end_and_none_begins_anew() {
        for status in STATUSES {
            let mut reached = vec![status];
            let mut at = 0;
            while let Some(from) = reached.get(at).copied() {
                at += 1;
                for next in STATUSES {
                    if from.may_become(next) && !reached.contains(&next) {
                        reached.push(next);
                    }
                }
            }
            assert!(reached.contains(&Status::Null), "{status} never ends");
            assert!(!status.may_become(Status::Created) && !status.may_become(status));
        }
    }

    #[test]
    fn what_can_be_cancelled_can_abort_and_nothing_else_can() {
        for status in STATUSES {
            let direct = status.may_become(Status::Aborting);
            // Whoever is paused goes back to work first, and finds there that it was cancelled.
            let woken = [Status::Running, Status::Ready]
                .iter()
                .any(|s| status.may_become(*s) && s.may_become(Status::Aborting));
            let cancel = Verb::Cancel.check(status);
            assert_eq!(cancel.is_ok(), direct || woken, "{status}");
        }
        let illegal = Verb::Finalize.check(Status::Running).unwrap_err();
        assert_eq!(illegal.to_string(), "a job that is running doesn't take `finalize`");
    }
}
