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

use crate::control::{Action, Control, Outcome, Wish};
use crate::copy_engine::{Engine, OnError, Pass, Stopped, Work};
use crate::handle::JobHandle;
use crate::state::Status;
use crate::window::Bounds;
use headwater_block::chain::is_same_layer;
use headwater_block::node::BackingLink;
use headwater_block::{Disk, Error, ErrorKind, Node, Result};
use std::rc::Rc;

/// Passes over the disk before it counts as one that can't be completed. The first copies, the second proves.
const MOST_PASSES: usize = 8;

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
#[derive(Clone, Default)]
pub struct StreamOptions {
    /// Streams only what lies above this, which remains the backing. None streams everything.
    pub base: Option<Base>,
    /// Bytes per second; 0 is without limit.
    pub speed: u64,
    /// What to do about errors.
    pub on_error: OnError,
    /// Zeroes found in the source's data become zeroes that take no space.
    pub detect_zeroes: bool,
    /// Waits before the commit point until it is told to finalise.
    pub wait_for_finalize: bool,
    /// Stays after its end until it is dismissed.
    pub wait_for_dismiss: bool,
    /// How much may be in flight, instead of what fits the source.
    pub bounds: Option<Bounds>,
}

/// Makes a stream job for `disk`. It is created with the call, and works while the future is polled, which must be to its end.
pub fn stream(disk: Rc<Disk>, options: StreamOptions) -> (JobHandle, impl Future<Output = Outcome>) {
    let control = Control::new(options.speed);
    let handle = JobHandle::new(control.clone());
    (handle, run(disk, options, control))
}

async fn run(disk: Rc<Disk>, options: StreamOptions, control: Rc<Control>) -> Outcome {
    let dismiss = !options.wait_for_dismiss;
    let result = match control.wish() {
        Wish::Cancel => Err(Stopped::Cancelled),
        Wish::Go | Wish::Pause => {
            control.go(Status::Running);
            // What guests fetch need not be fetched again. What the job switched on ends with it.
            let _copy_on_read = disk.enable_copy_on_read(options.base.as_ref().map(|base| base.node.clone()));
            work(&disk, &options, &control).await
        }
    };
    let outcome = match result {
        Ok(()) => Outcome::Completed,
        Err(stopped) => {
            control.go(Status::Aborting);
            match stopped {
                Stopped::Cancelled => Outcome::Cancelled,
                Stopped::Failed(error) => Outcome::Failed(error),
            }
        }
    };
    control.conclude(outcome.clone(), dismiss);
    outcome
}

async fn work(disk: &Rc<Disk>, options: &StreamOptions, control: &Rc<Control>) -> Result<(), Stopped> {
    let bounds = check(disk, options).map_err(Stopped::Failed)?;
    let base = options.base.as_ref().map(|base| base.node.clone());
    let work = Work {
        base: base.clone(),
        detect_zeroes: options.detect_zeroes,
        on_error: options.on_error,
        bounds: options.bounds.unwrap_or(bounds),
    };
    let mut engine = Engine::new(disk, control, work);
    copy_everything(disk, &mut engine).await?;
    flush(disk, options, control).await?;
    control.go(Status::Waiting);
    control.go(Status::Pending);
    if options.wait_for_finalize && !control.wait_for_finalize().await {
        return Err(Stopped::Cancelled);
    }
    if !control.commit() {
        return Err(Stopped::Cancelled);
    }
    let link =
        options.base.as_ref().map(|base| BackingLink { name: &base.link.name, format: &base.link.format });
    disk.change_backing(link, base).await.map_err(Stopped::Failed)
}

/// Checks what was asked, and says how much should be in flight for this chain.
fn check(disk: &Disk, options: &StreamOptions) -> Result<Bounds> {
    if disk.is_read_only() {
        let message =
            format!("{} is open for reading only; open it for writing to stream into it", disk.name());
        return Err(Error::new(ErrorKind::ReadOnly, message));
    }
    let base = options.base.as_ref().map(|base| &base.node);
    let mut remote = false;
    let mut most = u64::from(disk.limits().max_transfer);
    let mut at = disk.top().backing();
    while let Some(node) = at {
        if base.is_some_and(|base| is_same_layer(base, &node)) {
            let bounds = if remote { Bounds::REMOTE } else { Bounds::LOCAL };
            return Ok(bounds.with_copies_up_to(most));
        }
        let mut layer = Some(node.clone());
        while let Some(part) = layer {
            remote |= part.limits().remote;
            most = most.min(u64::from(part.limits().max_transfer));
            layer = part.file();
        }
        at = node.backing();
    }
    match base {
        Some(base) => {
            let message = format!("{} isn't in the backing chain of {}", base.name(), disk.name());
            Err(Error::new(ErrorKind::InvalidInput, message))
        }
        None => Ok(if remote { Bounds::REMOTE } else { Bounds::LOCAL }.with_copies_up_to(most)),
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

/// Makes everything durable, as often as the policy allows.
async fn flush(disk: &Disk, options: &StreamOptions, control: &Control) -> Result<(), Stopped> {
    loop {
        control.stay_paused().await;
        if control.wish() == Wish::Cancel {
            return Err(Stopped::Cancelled);
        }
        let Err(error) = disk.flush().await else { break };
        // There is nothing to go on with, so ignoring it is no choice.
        let action = match options.on_error.action(error.kind()) {
            Action::Ignore => Action::Report,
            action => action,
        };
        control.report(&error, action);
        if action == Action::Report {
            return Err(Stopped::Failed(error));
        }
    }
    // Commands that came while it was flushed still count: the next state knows no pause.
    control.stay_paused().await;
    if control.wish() == Wish::Cancel { Err(Stopped::Cancelled) } else { Ok(()) }
}
