//! `headwater stream SOURCE DISK`.

use super::reach::{ReachArgs, parse_patience};
use super::{FormatArg, OnOff, OpenArgs};
use crate::address::Address;
use crate::failure::Outcome;
use crate::size::parse_size;
use clap::{Args, ValueEnum};
use headwater_block::Patience;
use headwater_job::GuestLatencyGoal;
use std::path::PathBuf;

/// Arguments of `stream`.
#[derive(Debug, Clone, Args)]
#[command(after_long_help = AFTER)]
pub struct StreamArgs {
    /// Where the data are: a raw or qcow2 image in a file or behind nbd://, nbd+unix://, nbds:// (TLS), http://, https://, s3://, gs:// or az://.
    #[arg(value_parser = crate::source::parse)]
    pub source: String,
    /// The qcow2 image that the data stream into. Made if it isn't there; otherwise work goes on where it stopped.
    pub disk: PathBuf,
    /// Serve the disk here, from before the first byte is streamed: nbd+unix:///NAME?socket=PATH or
    /// nbd://ADDRESS:PORT/NAME; with TLS, nbds://ADDRESS:PORT/NAME?tls-certificates=DIR, with ca-cert.pem, server-cert.pem and
    /// server-key.pem in DIR, or ?tls-psk-file=FILE with the keys of users in FILE. To a virtual machine:
    /// vhost-user-blk:PATH[?num-queues=N&logical-block-size=SIZE&writethrough=on]. As a
    /// file: fuse:PATH[?growable&allow-other]; growable means that writing past the end makes it larger. As a block device of this machine:
    /// ublk:NUMBER[?recover&logical-block-size=SIZE], or ublk: for any number; with recover it outlives this program, and whoever uses it waits until the command runs
    /// again. At a socket that systemd listens on: nbd+fd:///NAME[?socket=SOCKET]. May be given several times.
    #[arg(long, value_name = "ADDRESS")]
    pub serve: Vec<Address>,
    /// Stream only what lies above this image of SOURCE's chain; it remains the disk's backing.
    #[arg(long, value_name = "FILE")]
    pub base: Option<String>,
    /// Zero bytes take no space: `on` those of the source and those that clients write, `off` neither. Without it, those of the
    /// source.
    #[arg(long, value_enum, value_name = "ON|OFF", num_args = 0..=1, require_equals = true, default_missing_value = "on")]
    pub detect_zeroes: Option<OnOff>,
    /// What to do when something can't be copied.
    #[arg(long, value_enum, default_value = "report")]
    pub on_error: OnErrorArg,
    /// End when the copying ends, even if clients are served.
    #[arg(long)]
    pub exit_when_done: bool,
    /// Print progress as JSON to standard output, one object a line; the last has a `result`.
    #[arg(long)]
    pub json: bool,
    /// Remember in this directory, which is made, what the next run needs: SOURCE's identity, the rate that was set, and whether it is
    /// paused. By default that is kept beside DISK, as .DISK.headwater, until everything has been copied.
    #[arg(long, value_name = "DIR")]
    pub state_dir: Option<PathBuf>,
    /// The cluster size of a disk that is made: a power of two from 512 to 2M.
    #[arg(long, value_name = "SIZE", default_value = "64K", value_parser = parse_cluster_size)]
    pub cluster_size: u64,
    /// How the data are copied.
    #[command(flatten)]
    pub copy: CopyArgs,
}

/// How data are copied from SOURCE, by whatever command that copies beside clients.
#[derive(Debug, Clone, Args)]
pub struct CopyArgs {
    /// Copy at most RATE bytes a second (200M); 0 is without limit. `headwater ctl` changes it while the stream runs, and
    /// the same command keeps to that afterwards.
    #[arg(long, value_name = "RATE", default_value = "0", value_parser = parse_size)]
    pub rate: u64,
    /// Copy only as fast as lets clients' requests take at most TIME longer (500us, 2ms), 99 in 100 of them. Without it, half of them take at
    /// most 1.5 times what they take otherwise, and 99 in 100 twice.
    #[arg(long, value_name = "TIME", default_value = "default", hide_default_value = true, value_parser = crate::guest_latency::parse)]
    pub guest_latency: GuestLatencyGoal,
    /// Take commands at this Unix socket; see `headwater ctl`.
    #[arg(long, value_name = "PATH")]
    pub control: Option<PathBuf>,
    /// Leave so much of DISK's file system free: copying waits before it is less, and goes on when there is room again. Without it: a 64th, at most
    /// 1G, if the disk is served, and nothing otherwise. 0 is nothing.
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub low_water: Option<u64>,
    /// Copy first what this boot trace names, in its order: what another guest read first from the same image.
    #[arg(long, value_name = "FILE")]
    pub boot_trace: Option<PathBuf>,
    /// Record in which order clients read the disk for the first time, for --boot-trace.
    #[arg(long, value_name = "FILE")]
    pub record_boot_trace: Option<PathBuf>,
    /// Keep what is read of a remote SOURCE in this directory, which is made, for other disks from the same SOURCE: then or later, by this
    /// process or others. Only of sources whose contents have a mark (an ETag), so that one that changed is read anew.
    #[arg(long, value_name = "DIR")]
    pub cache_dir: Option<PathBuf>,
    /// Let the directory take at most SIZE bytes; what was unused the longest goes first.
    #[arg(long, value_name = "SIZE", default_value = "32G", value_parser = parse_size)]
    pub cache_size: u64,
    /// SOURCE's format; without it, SOURCE's first bytes tell.
    #[arg(long, value_enum)]
    pub source_format: Option<FormatArg>,
    /// For how long copying waits, paused, when SOURCE can't be reached, before that counts as an error: a number of seconds, or `forever`. It
    /// goes on by itself. 0 waits for nothing.
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
}

/// Several sources for one image, and what its bytes must be.
#[derive(Debug, Clone, Default, Args)]
pub struct MirrorArgs {
    /// Where the same file is as well: a path or an address, as for SOURCE. The fastest is used; one that fails or is slow is left and returned
    /// to; one that can't be reached at the start is used when it can. May be given up to 15 times.
    #[arg(long, value_name = "SOURCE", value_parser = crate::source::parse)]
    pub mirror: Vec<String>,
    /// Check every chunk of SOURCE's file against this manifest, which `headwater digest` made, before it is used. A mirror that gives other
    /// bytes is named and never asked again.
    #[arg(long, value_name = "MANIFEST")]
    pub verify: Option<PathBuf>,
}

const AFTER: &str = "\
Interrupt it at any time: DISK stays a valid image that reads as the source with the clients' changes, and the same command goes
on where it stopped, at the rate that was last set, provided that SOURCE is still what it was. When everything has been copied, DISK stands alone and SOURCE may go. If copying ends with an error, clients
keep their disk until headwater is interrupted, unless --exit-when-done was given.";

/// What to do when something can't be copied.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum OnErrorArg {
    /// Stop copying for good and fail. Clients keep the disk until headwater is interrupted, unless --exit-when-done is given.
    Report,
    /// Go on with the rest; the disk keeps its source.
    Ignore,
    /// Pause until `headwater ctl PATH resume`.
    Stop,
    /// Pause when space runs out, end at other errors.
    Enospc,
}

fn parse_cluster_size(text: &str) -> Result<u64, String> {
    let size = parse_size(text)?;
    if size.is_power_of_two() && (512..=2 << 20).contains(&size) {
        Ok(size)
    } else {
        Err(format!("'{text}' is not a power of two from 512 to 2M"))
    }
}

/// Streams.
///
/// # Errors
/// See the exit codes.
pub fn run(args: StreamArgs) -> Outcome {
    crate::stream::run(args)
}
