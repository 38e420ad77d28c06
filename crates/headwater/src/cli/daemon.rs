//! `headwater daemon`: the storage daemon. Its options are QEMU's, and read by [`crate::daemon`].

use crate::failure::Outcome;
use clap::Args;
use std::ffi::OsString;

/// Arguments of `daemon`.
#[derive(Debug, Args)]
pub struct DaemonArgs {
    /// Options as qemu-storage-daemon takes them; `headwater daemon --help` lists them.
    #[arg(value_name = "OPTIONS", trailing_var_arg = true, allow_hyphen_values = true)]
    pub options: Vec<OsString>,
}

/// Runs the daemon.
///
/// # Errors
/// See [`crate::daemon::run`].
pub fn run(args: DaemonArgs) -> Outcome {
    crate::daemon::run(args.options)
}
