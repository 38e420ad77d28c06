//! What a job does about errors: a policy that its user chooses, and may change while it runs.

use crate::control::Action;
use headwater_block::ErrorKind;
use headwater_block::copy_up::Operation;

/// What to do about an error.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum OnError {
    /// End the job with the error.
    #[default]
    Report,
    /// Go on with the rest; try that part again at the end, and end with the error if it fails again.
    Ignore,
    /// Pause; try again when resumed.
    Stop,
    /// Pause if no space is left, otherwise end the job.
    Enospc,
}

impl OnError {
    pub(crate) fn action(self, kind: ErrorKind) -> Action {
        match (self, kind) {
            // To try these again can't help, and to go on could mix the data of two sources.
            (_, ErrorKind::SourceChanged | ErrorKind::Closed | ErrorKind::ReadOnly) => Action::Report,
            (OnError::Ignore, _) => Action::Ignore,
            (OnError::Stop, _) | (OnError::Enospc, ErrorKind::NoSpace) => Action::Stop,
            (OnError::Report | OnError::Enospc, _) => Action::Report,
        }
    }
}

/// What to do about errors of each end of a copy.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct OnErrors {
    /// When reading fails.
    pub source: OnError,
    /// When writing fails.
    pub target: OnError,
}

impl From<OnError> for OnErrors {
    /// The same for both ends.
    fn from(both: OnError) -> Self {
        Self { source: both, target: both }
    }
}

impl OnErrors {
    pub(crate) fn action(self, operation: Operation, kind: ErrorKind) -> Action {
        let policy = match operation {
            Operation::Read => self.source,
            Operation::Write => self.target,
        };
        policy.action(kind)
    }
}
