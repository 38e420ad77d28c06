//! `headwater boot SOURCE [DISK] [-- QEMU ARGUMENTS]`.

use super::reach::{ReachArgs, parse_patience};
use super::stream::{MirrorArgs, OnErrorArg, StreamArgs};
use super::{FormatArg, OpenArgs};
use crate::failure::Outcome;
use crate::size::parse_size;
use clap::Args;
use headwater_block::Patience;
use headwater_job::GuestLatencyGoal;
use headwater_storage::cache_dir::CACHE_SIZE;
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
    /// Copy at most RATE bytes a second (200M); 0 is without limit.
    #[arg(long, value_name = "RATE", default_value = "0", value_parser = parse_size)]
    pub rate: u64,
    /// Copy only as fast as lets the machine's requests take at most TIME longer (500us, 2ms), 99 in 100 of them. Without it, half of them take at
    /// most 1.5 times what they take otherwise, and 99 in 100 twice.
    #[arg(long, value_name = "TIME", default_value = "default", hide_default_value = true, value_parser = crate::guest_latency::parse)]
    pub guest_latency: GuestLatencyGoal,
    /// Take commands at this Unix socket; see `headwater ctl`.
    #[arg(long, value_name = "PATH")]
    pub control: Option<PathBuf>,
    /// Leave so much of the disk's file system free: copying waits before it is less, and goes on when there is room again. Without it: a 64th, at
    /// most 1G.
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub low_water: Option<u64>,
    /// Copy first what this boot trace names, in its order: what another machine read first from the same image.
    #[arg(long, value_name = "FILE")]
    pub boot_trace: Option<PathBuf>,
    /// Record in which order the machine reads its disk for the first time, for --boot-trace.
    #[arg(long, value_name = "FILE")]
    pub record_boot_trace: Option<PathBuf>,
    /// Keep what is read of a remote SOURCE in this directory, for other machines; see `headwater stream`.
    #[arg(long, value_name = "DIR")]
    pub cache_dir: Option<PathBuf>,
    /// SOURCE's format; without it, SOURCE's first bytes tell.
    #[arg(long, value_enum)]
    pub source_format: Option<FormatArg>,
    /// For how long copying waits, paused, when SOURCE can't be reached, before it ends: a number of seconds, or `forever`. It goes on
    /// by itself. 0 waits for nothing.
    #[arg(long, value_name = "SECONDS|forever", default_value = "forever", value_parser = parse_patience)]
    pub wait: Patience,
    /// How SOURCE is reached.
    #[command(flatten)]
    pub reach: ReachArgs,
    /// Where else SOURCE's bytes are, and what they must be.
    #[command(flatten)]
    pub mirrors: MirrorArgs,
    /// How files are opened.
    #[command(flatten)]
    pub open: OpenArgs,
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
            rate: self.rate,
            guest_latency: self.guest_latency,
            base: None,
            detect_zeroes: None,
            on_error: OnErrorArg::Report,
            exit_when_done: false,
            json: false,
            control: self.control.clone(),
            state_dir: None,
            low_water: self.low_water,
            boot_trace: self.boot_trace.clone(),
            record_boot_trace: self.record_boot_trace.clone(),
            cache_dir: self.cache_dir.clone(),
            cache_size: CACHE_SIZE,
            source_format: self.source_format,
            wait: self.wait,
            reach: self.reach.clone(),
            cluster_size: 64 << 10,
            mirrors: self.mirrors.clone(),
            open: self.open.clone(),
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
