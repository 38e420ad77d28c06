//! `headwater ctl PATH COMMAND`: the client of a stream's control socket.

use crate::control::Command;
use crate::failure::{Failure, Outcome};
use clap::{Args, Subcommand};
use headwater_job::GuestLatencyGoal;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

/// Arguments of `ctl`.
#[derive(Debug, Args)]
pub struct CtlArgs {
    /// The socket that `headwater stream --control PATH` made.
    pub path: PathBuf,
    /// What to tell it.
    #[command(subcommand)]
    pub command: CtlCommand,
}

/// What a running stream can be told.
#[derive(Debug, Clone, Subcommand)]
pub enum CtlCommand {
    /// Copy at most RATE bytes a second from now on; 0 is without limit.
    Rate {
        /// Bytes a second (50M).
        #[arg(value_parser = crate::size::parse_size)]
        rate: u64,
    },
    /// Let copies add at most TIME to clients' requests from now on, 99 in 100 of them.
    GuestLatency {
        /// A time (500us, 2ms), or `default`.
        #[arg(value_parser = crate::guest_latency::parse)]
        time: GuestLatencyGoal,
    },
    /// Stop copying; the disk stays served.
    Pause,
    /// Copy on.
    Resume,
    /// Give up; what was copied stays, and the same command resumes.
    Cancel,
    /// Print one line of JSON on how far it is.
    Status,
}

/// Sends the command and prints the answer.
///
/// # Errors
/// If nobody listens at the path, or the stream refuses.
pub fn run(args: CtlArgs) -> Outcome {
    let path = args.path.display();
    let stream = UnixStream::connect(&args.path).map_err(|err| {
        Failure::new(format!(
            "cannot connect to {path}: {err}; is 'headwater stream --control {path}' running?"
        ))
    })?;
    let lost = |err| Failure::new(format!("{path}: the connection was lost: {err}"));
    let command: Command = args.command.into();
    (&stream).write_all(format!("{command}\n").as_bytes()).map_err(lost)?;
    let mut answer = String::new();
    BufReader::new(&stream).read_line(&mut answer).map_err(lost)?;
    match answer.trim_end().split_once(' ') {
        Some(("ok", text)) => crate::output::print(format!("{text}\n").as_bytes()),
        Some(("error", text)) => Err(Failure::new(format!("{path}: {text}"))),
        _ if answer.trim_end() == "ok" => Ok(()),
        _ => Err(Failure::new(format!("{path}: no answer; has the stream ended?"))),
    }
}

impl From<CtlCommand> for Command {
    fn from(command: CtlCommand) -> Self {
        match command {
            CtlCommand::Rate { rate } => Self::Rate(rate),
            CtlCommand::GuestLatency { time } => Self::GuestLatency(time),
            CtlCommand::Pause => Self::Pause,
            CtlCommand::Resume => Self::Resume,
            CtlCommand::Cancel => Self::Cancel,
            CtlCommand::Status => Self::Status,
        }
    }
}
