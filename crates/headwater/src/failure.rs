//! How a command ends: its exit code and the one line that says why.

use std::fmt;

/// The exit codes, all of them, as the manual lists them.
pub mod code {
    /// Done.
    pub const OK: u8 = 0;
    /// Failed; the message says why.
    pub const FAILED: u8 = 1;
    /// The command line is wrong. `check` uses it for corruption as well, as qemu-img does.
    pub const USAGE: u8 = 2;
    /// `check`: the image has corruptions.
    pub const CORRUPT: u8 = 2;
    /// `check`: the image has leaked clusters, but is correct.
    pub const LEAKS: u8 = 3;
    /// `check`: the format can't be checked.
    pub const UNSUPPORTED: u8 = 63;
    /// `stream`: cancelled with the control command; the overlay is consistent and the same command resumes.
    pub const CANCELLED: u8 = 4;
    /// Interrupted by SIGINT or SIGTERM.
    pub const INTERRUPTED: u8 = 130;
}

/// Why a command didn't end well. Without a message, everything has been said already.
#[derive(Debug)]
pub struct Failure {
    /// The exit code.
    pub code: u8,
    /// One line for people.
    pub message: Option<String>,
    /// Another line: what may be the reason.
    pub hint: Option<String>,
}

impl Failure {
    /// The general failure with this message.
    pub fn new(message: impl fmt::Display) -> Self {
        Self { code: code::FAILED, message: Some(message.to_string()), hint: None }
    }

    /// A wrong command line.
    pub fn usage(message: impl fmt::Display) -> Self {
        Self { code: code::USAGE, message: Some(message.to_string()), hint: None }
    }

    /// Ends with `code`, all being said.
    pub fn silent(code: u8) -> Self {
        Self { code, message: None, hint: None }
    }

    /// The same with a hint, if there is one.
    pub fn with_hint(self, hint: Option<String>) -> Self {
        Self { hint, ..self }
    }
}

impl From<headwater_block::Error> for Failure {
    fn from(err: headwater_block::Error) -> Self {
        Self::new(err)
    }
}

impl From<anyhow::Error> for Failure {
    fn from(err: anyhow::Error) -> Self {
        Self::new(format!("{err:#}"))
    }
}

/// What a command returns.
pub type Outcome<T = ()> = Result<T, Failure>;
