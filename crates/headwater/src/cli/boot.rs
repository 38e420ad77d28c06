//! `headwater boot SOURCE [DISK] [-- QEMU ARGUMENTS]`.

use super::stream::{CopyArgs, OnErrorArg, StreamArgs};
use crate::failure::Outcome;
use crate::size::parse_size;
use clap::Args;
use std::ffi::OsString;
use std::path::PathBuf;

/// Arguments of `boot`.
#[derive(Debug, Clone, Args)]
#[command(after_long_help = AFTER)]
pub struct BootArgs {
    /// Where the data are: a raw or qcow2 image in a file or behind nbd://, nbd+unix://, nbds:// (TLS), http://, https://, s3://, gs:// or az://.
    #[arg(value_parser = crate::source::parse)]
    pub source: String,
    /// The qcow2 image that becomes the machine's own disk; made if it isn't there. Without it: SOURCE's name with `.local.qcow2` at its end, in the working
    /// directory.
    pub disk: Option<PathBuf>,
    /// The machine's memory.
    #[arg(short, long, value_name = "SIZE", default_value = "2G", value_parser = parse_size)]
    pub memory: u64,
    /// How many processors it has.
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=64))]
    pub cpus: u16,
    /// QEMU's program; without it, qemu-system for this processor is looked for.
    #[arg(long, value_name = "PROGRAM")]
    pub qemu: Option<PathBuf>,
    /// How the data are copied.
    #[command(flatten)]
    pub copy: CopyArgs,
    /// More arguments for QEMU; what they say of the console or the display counts.
    #[arg(last = true, value_name = "QEMU ARGUMENTS")]
    pub machine: Vec<OsString>,
}

const AFTER: &str = "\
The machine starts at once, on data that are fetched as it asks for them; all others stream in behind it. When it ends, so does this: the disk keeps what
has been copied, and the same command goes on. Without arguments for QEMU the machine's console is this terminal (Ctrl-A X ends it).";

impl BootArgs {
    /// The stream that goes with it.
    pub(crate) fn stream(&self, disk: PathBuf) -> StreamArgs {
        StreamArgs {
            source: self.source.clone(),
            disk,
            serve: Vec::new(),
            base: None,
            detect_zeroes: None,
            on_error: OnErrorArg::Report,
            exit_when_done: false,
            json: false,
            state_dir: None,
            cluster_size: 64 << 10,
            copy: self.copy.clone(),
        }
    }
}

/// Boots.
///
/// # Errors
/// If the disk can't be had, or the machine fails.
pub fn run(args: BootArgs) -> Outcome {
    crate::boot::run(args)
}
