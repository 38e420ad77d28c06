//! `headwater serve IMAGE`: an export without a stream.

use super::reach::ReachArgs;
use super::stream::MirrorArgs;
use super::{FormatArg, OpenArgs};
use crate::address::Address;
use crate::boot_trace::Recording;
use crate::confine::Writes;
use crate::exports::Exports;
use crate::failure::{Failure, Outcome};
use crate::mirrors::Mirrors;
use crate::opener::{Access, Opener};
use crate::runtime::{self, Interrupts};
use clap::Args;
use headwater_block::{Disk, DiskOptions, TokioClock};
use std::path::PathBuf;
use std::rc::Rc;

/// Arguments of `serve`.
#[derive(Debug, Clone, Args)]
pub struct ServeArgs {
    /// The image: a file, or behind nbd://, nbd+unix://, nbds:// (TLS), http://, https://, s3://, gs:// or az://.
    #[arg(value_parser = crate::source::parse)]
    pub image: String,
    /// Where to serve it: nbd+unix:///NAME?socket=PATH or nbd://ADDRESS:PORT/NAME; with TLS, nbds://ADDRESS:PORT/NAME?tls-certificates=DIR,
    /// with ca-cert.pem, server-cert.pem and server-key.pem in DIR, or ?tls-psk-file=FILE with the keys of users in FILE. To a virtual machine:
    /// vhost-user-blk:PATH[?num-queues=N&logical-block-size=SIZE&writethrough=on]. As a file: fuse:PATH[?growable&allow-other]. As a
    /// block device of this machine: ublk:NUMBER[?recover&logical-block-size=SIZE], or ublk: for any number. At a socket
    /// that systemd listens on: nbd+fd:///NAME[?socket=SOCKET]. May be given several times.
    #[arg(long, value_name = "ADDRESS", required = true)]
    pub serve: Vec<Address>,
    /// Refuse changes.
    #[arg(long)]
    pub read_only: bool,
    /// Keep what clients read from the backing.
    #[arg(long, conflicts_with = "read_only")]
    pub copy_on_read: bool,
    /// Record in which order clients read the disk for the first time, for `headwater stream --boot-trace`.
    #[arg(long, value_name = "FILE")]
    pub record_boot_trace: Option<PathBuf>,
    /// The image's format; without it, its first bytes tell.
    #[arg(long, value_enum)]
    pub format: Option<FormatArg>,
    /// How a remote image is reached.
    #[command(flatten)]
    pub reach: ReachArgs,
    /// Where else the image's bytes are, and what they must be. Needs --read-only.
    #[command(flatten)]
    pub mirrors: MirrorArgs,
    /// How files are opened.
    #[command(flatten)]
    pub open: OpenArgs,
}

/// Serves until it is interrupted.
///
/// # Errors
/// If the image can't be opened or the addresses can't be had.
pub fn run(args: ServeArgs) -> Outcome {
    let writes = Writes::default().addresses(&args.serve).optional(args.record_boot_trace.as_deref());
    let writes = match args.read_only {
        true => writes,
        false => writes.file(&args.image).allowed(&args.open.allow_backing),
    };
    writes.confine();
    runtime::run(async move {
        let mut interrupts = Interrupts::catch()?;
        let access = if args.read_only { Access::Read } else { Access::Write };
        let retry = args.reach.retry(&[args.reach.hold]);
        let mirrors = Mirrors::new(&args.image, &args.mirrors)?;
        if mirrors.is_some() && !args.read_only {
            return Err(Failure::usage(
                "--mirror and --verify need --read-only: copies elsewhere can't be changed",
            ));
        }
        let opener = Opener::new(&args.open)?.with_retry(retry, args.reach.timeout()).with_mirrors(mirrors);
        let top = opener.open(&args.image, args.format.map(Into::into), access).await?;
        let options = DiskOptions {
            copy_on_read: args.copy_on_read,
            read_only: args.read_only,
            patience: args.reach.hold,
            ..DiskOptions::default()
        };
        let disk = Disk::new(top, Rc::new(TokioClock::new()), options);
        let recording =
            args.record_boot_trace.as_deref().map(|path| Recording::start(path, &disk)).transpose()?;
        let exports = Exports::start(&args.serve, &disk, !args.read_only).await?;
        for address in exports.addresses() {
            eprintln!("serving {} at {address}", disk.name());
        }
        interrupts.next().await;
        exports.stop().await;
        let recorded = match recording {
            Some(recording) => recording.finish().await,
            None => Ok(()),
        };
        disk.close().await?;
        recorded
    })
}
