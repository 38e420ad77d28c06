//! The stream job: moves what a disk's overlay lacks up into it, from the whole chain or from what lies above `base`, and
//! then drops the link to what is no longer needed.
//!
//! # When the link is changed
//! Only if all of these hold, in this order:
//! 1. A pass over the whole disk found nothing missing. What is local stays local: no guest can make it missing again. (When no backing
//!    remains, what the layers below call zeroes isn't missing: it reads as zeroes without them.)
//! 2. Everything is flushed.
//! 3. The job reached its commit point before it was cancelled ([`Control::commit`]).
//!
//! Then the overlay changes its header, in one atomic, durable step. An error there leaves the old link, and the job failed.
//! Errors that were ignored leave something missing, and so end the job with an error, as does every other.
//!
//! # Errors, compared with QEMU
//! - **Ignored errors.** QEMU 10 goes on, never comes back to that part, and fails the job at its end even if the error was a passing one. Here the
//!   part is tried again when all else is done; if that succeeds nothing is missing and the job completes, and otherwise it fails.
//!   In no case does either drop the link while something is missing.
//! - **Which half failed.** QEMU calls every error of a stream a `read`; here it is said whether the overlay failed.

use crate::boot_order::BootOrder;
use crate::boot_trace::BootTrace;
use crate::budget::GuestLatencyGoal;
use crate::control::{Control, Outcome};
use crate::copier::Copier;
use crate::copy_engine::{Engine, Pass, Stopped};
use crate::foretell::foretell;
use crate::handle::JobHandle;
use crate::lifecycle::{self, Finish};
use crate::on_error::OnError;
use crate::path::Path;
use crate::readahead::Readahead;
use crate::space::Space;
use crate::window::Bounds;
use headwater_block::chain::{self, Missing};
use headwater_block::copy_up::{Copied, CopyUpOptions, Failed, Supply};
use headwater_block::disk::CopyOnRead;
use headwater_block::node::BackingLink;
use headwater_block::{
    Abort, Clock, Disk, Error, ErrorKind, GuestLatency, LocalFuture, Node, Patience, Result,
};
use std::cell::RefCell;
use std::ops::Range;
use std::rc::Rc;

/// Passes over the disk before it counts as one that can't be completed. The first copies, the second proves.
const MOST_PASSES: usize = 8;

/// What is copied ahead of a guest's run at most, in bytes: four round trips of 20 ms at 100 MB/s.
const READAHEAD: u64 = 8 << 20;

/// The name and format of a base, as the overlay's header will hold them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    /// The file name or URI.
    pub name: String,
    /// The format's name.
    pub format: String,
}

/// A node that remains the backing, and how the overlay's header is to call it.
#[derive(Clone)]
pub struct Base {
    /// The node, somewhere below the top.
    pub node: Rc<dyn Node>,
    /// What is written to the header.
    pub link: Link,
}

/// How a stream job works.
#[derive(Default)]
pub struct StreamOptions {
    /// Streams only what lies above this, which remains the backing. None streams everything.
    pub base: Option<Base>,
    /// Bytes per second; 0 is without limit.
    pub speed: u64,
    /// What guests are promised meanwhile.
    pub guest_latency: GuestLatencyGoal,
    /// What to do about errors.
    pub on_error: OnError,
    /// For how long the job waits for a source that can't be reached, paused by itself, before `on_error` counts.
    pub patience: Patience,
    /// Zeroes found in the source's data become zeroes that take no space.
    pub detect_zeroes: bool,
    /// Waits before the commit point until it is told to finalise.
    pub wait_for_finalize: bool,
    /// Stays after its end until it is dismissed.
    pub wait_for_dismiss: bool,
    /// Where it writes to, and how much it leaves free; none: it doesn't look.
    pub space: Option<Space>,
    /// How many bytes are copied at most ahead of guests whose reads miss; 0 is none. Without it: 8 MiB if the source is remote, else none.
    pub readahead: Option<u64>,
    /// What is copied first, and in which order.
    pub boot_trace: Option<BootTrace>,
    /// How much may be in flight, instead of what fits the source.
    pub bounds: Option<Bounds>,
    /// Drops the link in the caller's way. Without it the job tells the disk to ([`Disk::change_backing`]).
    pub finish: Option<Finish>,
}

/// Makes a stream job for `disk`. It is created with the call, and works while the future is polled, which must be to its end.
pub fn stream(disk: Rc<Disk>, options: StreamOptions) -> (JobHandle, impl Future<Output = Outcome>) {
    let control = Control::new(options.speed, options.on_error);
    control.set_guest_latency(options.guest_latency);
    control.set_patience(options.patience);
    let handle = JobHandle::new(control.clone());
    let run = async move {
        let dismiss = options.wait_for_dismiss;
        lifecycle::run(&control, dismiss, work(disk, options, &control)).await
    };
    (handle, run)
}

async fn work(disk: Rc<Disk>, options: StreamOptions, control: &Rc<Control>) -> Result<(), Stopped> {
    let base = options.base.as_ref().map(|base| base.node.clone());
    let path = check(&disk, base.as_ref()).map_err(Stopped::Failed)?;
    let bounds = options.bounds.unwrap_or(path.bounds());
    let detect_zeroes = options.detect_zeroes;
    if options.boot_trace.is_none() {
        foretell(&disk.top(), base.as_ref(), bounds, control).await;
    }
    let ahead = options.readahead.unwrap_or(if path.is_remote() { READAHEAD } else { 0 });
    let readahead = (ahead > 0).then(|| Readahead::start(&disk, base.clone(), detect_zeroes, ahead));
    let from_below: Rc<dyn Copier> = Rc::new(FromBelow {
        disk: disk.clone(),
        base: base.clone(),
        detect_zeroes,
        readahead,
        keeps: RefCell::default(),
    });
    // What guests fetch need not be fetched again. What the job switched on ends with it.
    from_below.keep_reads(true);
    let mut engine = Engine::new(from_below.clone(), control, bounds).with_space(options.space);
    if let Some(trace) = &options.boot_trace {
        let order = BootOrder::new(trace, from_below.clone(), disk.clone(), base.clone(), detect_zeroes);
        engine.change_copier(Rc::new(order));
        // What failed was reported, and is still missing: the passes over the whole disk find it.
        engine.pass().await?;
        engine.change_copier(from_below);
    }
    copy_everything(&disk, &mut engine).await?;
    lifecycle::flush(&disk, control).await?;
    lifecycle::wait_for_finalize(control, options.wait_for_finalize).await?;
    let drop_link = async {
        if let Some(finish) = options.finish {
            return finish().await;
        }
        let link = options
            .base
            .as_ref()
            .map(|base| BackingLink { name: &base.link.name, format: &base.link.format });
        disk.change_backing(link, base).await
    };
    lifecycle::commit(control, drop_link).await
}

/// Checks what was asked, and says which way the data take.
fn check(disk: &Disk, base: Option<&Rc<dyn Node>>) -> Result<Path> {
    if disk.is_read_only() {
        let message =
            format!("{} is open for reading only; open it for writing to stream into it", disk.name());
        return Err(Error::new(ErrorKind::ReadOnly, message));
    }
    Path::above(&disk.top(), base)
}

/// What a disk lacks, copied up from the layers below it and above `base`.
struct FromBelow {
    disk: Rc<Disk>,
    base: Option<Rc<dyn Node>>,
    detect_zeroes: bool,
    readahead: Option<Rc<Readahead>>,
    /// Keeps what guests fetch.
    keeps: RefCell<Option<CopyOnRead>>,
}

impl Copier for FromBelow {
    fn clock(&self) -> &Rc<dyn Clock> {
        self.disk.clock()
    }

    fn size(&self) -> u64 {
        self.disk.size()
    }

    fn unit(&self) -> u64 {
        u64::from(self.disk.limits().allocation_unit)
    }

    fn guests(&self) -> Option<&Rc<GuestLatency>> {
        Some(self.disk.guest_latency())
    }

    fn take(&self, from: u64) -> Option<Range<u64>> {
        (from < self.size()).then(|| from..self.size())
    }

    fn untaken(&self) -> u64 {
        0
    }

    fn look(self: Rc<Self>, range: Range<u64>) -> LocalFuture<'static, Result<Option<Missing>>> {
        Box::pin(async move { self.disk.next_missing(range, self.base.as_ref()).await })
    }

    fn needs(&self, run: &Missing) -> bool {
        // When no backing remains, what nobody holds reads as zeroes: it need not be written, and takes no metadata.
        !run.zero || self.base.is_some()
    }

    fn is_at_hand(&self, range: &Range<u64>) -> bool {
        self.disk.top().backing().is_some_and(|backing| chain::is_at_hand(&backing, range.clone()))
    }

    fn copy(self: Rc<Self>, run: Missing, abort: Rc<Abort>) -> LocalFuture<'static, Result<Copied, Failed>> {
        tracing::trace!(target: "qemu", event = "stream_one_iteration", offset = run.range.start, end = run.range.end);
        let options = CopyUpOptions {
            base: self.base.clone(),
            detect_zeroes: self.detect_zeroes,
            abort: Some(abort),
            known: Some(if run.zero { Supply::Zeroes } else { Supply::Data }),
        };
        Box::pin(async move { self.disk.copy_up(run.range, &options).await })
    }

    fn source_back(self: Rc<Self>) -> LocalFuture<'static, ()> {
        Box::pin(async move { self.disk.outage().over().await })
    }

    fn readahead(&self) -> Option<Rc<Readahead>> {
        self.readahead.clone()
    }

    fn keep_reads(&self, keep: bool) {
        self.keeps.replace(keep.then(|| self.disk.enable_copy_on_read(self.base.clone())));
    }

    fn probe(self: Rc<Self>, run: Missing, abort: Rc<Abort>) -> LocalFuture<'static, Result<()>> {
        let options =
            CopyUpOptions { base: self.base.clone(), abort: Some(abort), ..CopyUpOptions::default() };
        Box::pin(async move { self.disk.try_source(run.range, &options).await })
    }
}

/// Copies until a pass finds nothing missing.
async fn copy_everything(disk: &Rc<Disk>, engine: &mut Engine) -> Result<(), Stopped> {
    for _ in 0..MOST_PASSES {
        match engine.pass().await? {
            Pass { failed: Some(error), .. } => return Err(Stopped::Failed(error)),
            Pass { found_any: false, .. } => return Ok(()),
            Pass { .. } => {}
        }
    }
    let message = format!(
        "{}: after {MOST_PASSES} passes the image still lacks parts that were copied into it; check it before it is used",
        disk.name()
    );
    Err(Stopped::Failed(Error::new(ErrorKind::Corrupt, message)))
}
