//! The mirror job: makes another disk equal to one that guests write meanwhile, follows what they change, and ends on request with the two
//! equal. An active commit is a mirror into one of the source's own layers.
//!
//! # How it goes
//! 1. It *follows*: sweeps over what is dirty ([`crate::transfer`]) until little is left, and from then on it is `ready`.
//! 2. Told to end, it *settles*: it holds the guests back, copies what is still dirty, and flushes the target. Now both are equal, and stay so
//!    as long as the guests are held.
//! 3. If it was told to complete, `finish` puts the target in the source's place, past the commit point and with the guests still held. If it
//!    was told to leave the target as a copy (a soft cancel), nothing more is done.
//!
//! # How long guests wait
//! While it follows: for the read of one copy, if they change the same bytes. (With [`MirrorOptions::write_through`], for the target, too, whenever they change
//! something.) While it settles: for the copying of what one window holds
//! and a flush, because it sweeps until no more is left before it holds them. (One that can't keep up with the guests holds them for longer, after
//! some sweeps: it was told to end.) An error that pauses the job lets them go first, and so does a pause; it settles anew when it is resumed.
//! Nor are they held while it waits to be finalised.

use crate::commit;
use crate::control::{Control, Ending, Outcome, Wish};
use crate::copy_engine::{Engine, Pass, Stopped};
use crate::foretell::foretell;
use crate::handle::JobHandle;
use crate::lifecycle::{self, Finish};
use crate::on_error::OnErrors;
use crate::path::Path;
use crate::state::Status;
use crate::transfer::{Source, Transfer};
use crate::window::Bounds;
use futures_util::future::{Either, select};
use headwater_block::{Clock, DirtyMap, Disk, Error, ErrorKind, Following, LocalFuture, Patience, Result};
use std::any::Any;
use std::cell::Cell;
use std::future::poll_fn;
use std::pin::pin;
use std::rc::Rc;
use std::time::Duration;

/// Holds all guests of the source back, and gives what holds them while it lives. May be called more than once, and dropped while it waits.
/// It must not hold the target: the job still writes to that.
pub type HoldGuests = Box<dyn Fn() -> LocalFuture<'static, Box<dyn Any>>>;

/// How long a job that has caught up lets changes gather before it copies them: those that overwrite each other are copied once.
const GATHER: Duration = Duration::from_millis(100);

/// How often it sweeps, before it holds the guests, in the hope that little is left.
const MOST_SWEEPS: usize = 8;

/// What of the source is copied before what guests change.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum SyncMode {
    /// Everything.
    #[default]
    Full,
    /// What its top layer holds; the target has the rest, by a backing of its own.
    Top,
    /// Nothing.
    None,
}

/// How a mirror job works.
#[derive(Default)]
pub struct MirrorOptions {
    /// What is copied in the beginning. An active commit copies what lies above its base.
    pub sync: SyncMode,
    /// In parts of how many bytes changes are followed, instead of what fits the target.
    pub granularity: Option<u64>,
    /// Set, guests' changes are carried out on the target as well before they are over; it may be set at any time, and not be taken back. For
    /// a mirror only, to a target that doesn't read from the source: such a one would wait for the guest that waits for it.
    pub write_through: Rc<Cell<bool>>,
    /// Bytes per second; 0 is without limit. Doesn't count while guests are held back.
    pub speed: u64,
    /// What to do about errors.
    pub on_error: OnErrors,
    /// For how long the job waits for a source that can't be reached, paused by itself, before `on_error` counts.
    pub patience: Patience,
    /// Waits before the commit point until it is told to finalise.
    pub wait_for_finalize: bool,
    /// Stays after its end until it is dismissed.
    pub wait_for_dismiss: bool,
    /// How much may be in flight, instead of what fits the layers.
    pub bounds: Option<Bounds>,
    /// How the guests are held back, instead of at the source's gate: those who wait there go on to the source afterwards, so a `finish` that
    /// puts another disk in its place needs them held in front of it, at their edges.
    pub hold_guests: Option<HoldGuests>,
    /// Puts the target in the source's place, while the guests are held back. Without it the target is left as a copy.
    pub finish: Option<Finish>,
}

/// What the target is to the source.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Target {
    Other,
    LayerBelow,
}

/// Makes a job that copies `source` to `target`, a disk of the same size. It is created with the call, and works while the future is polled,
/// which must be to its end.
pub fn mirror(
    source: Rc<Disk>,
    target: Rc<Disk>,
    options: MirrorOptions,
) -> (JobHandle, impl Future<Output = Outcome>) {
    start(source, target, Target::Other, options)
}

/// Makes a job that moves what lies above `base` into it while guests write to `top`. `base` is the disk of a layer below `top`'s; if it is
/// smaller, it grows.
pub fn commit_active(
    top: Rc<Disk>,
    base: Rc<Disk>,
    options: MirrorOptions,
) -> (JobHandle, impl Future<Output = Outcome>) {
    start(top, base, Target::LayerBelow, options)
}

fn start(
    source: Rc<Disk>,
    target: Rc<Disk>,
    kind: Target,
    options: MirrorOptions,
) -> (JobHandle, impl Future<Output = Outcome>) {
    let control = Control::new(options.speed, options.on_error);
    control.set_patience(options.patience);
    let handle = JobHandle::new(control.clone());
    let run = async move {
        let dismiss = options.wait_for_dismiss;
        lifecycle::run(&control, dismiss, work(source, target, kind, options, &control)).await
    };
    (handle, run)
}

async fn work(
    source: Rc<Disk>,
    target: Rc<Disk>,
    kind: Target,
    options: MirrorOptions,
    control: &Rc<Control>,
) -> Result<(), Stopped> {
    let granularity =
        options.granularity.unwrap_or_else(|| u64::from(target.limits().allocation_unit).clamp(4096, 65536));
    let above = match kind {
        Target::LayerBelow => Some(target.top()),
        Target::Other => (options.sync == SyncMode::Top).then(|| source.top().backing()).flatten(),
    };
    let following = Following {
        above: above.clone(),
        through: options.write_through,
        given_up: control.given_up().clone(),
    };
    let follower = source.follow(&target, granularity, following).await;
    let map = follower.map().clone();
    let bounds = match kind {
        Target::LayerBelow => commit::prepare(&source.top(), &target).await,
        Target::Other => check(&source, &target),
    };
    let bounds = options.bounds.unwrap_or(bounds.map_err(Stopped::Failed)?);
    if kind == Target::LayerBelow || options.sync != SyncMode::None {
        map.mark(0..source.size());
        foretell(&source.top(), above.as_ref(), bounds, control).await;
    }
    let from = Source::InUse(follower);
    let transfer = Transfer { source: from, above, target: target.clone() };
    let hold_guests = options.hold_guests.unwrap_or_else(|| {
        Box::new(move || {
            let source = source.clone();
            Box::pin(async move { Box::new(source.drain().await) as Box<dyn Any> })
        })
    });
    let mut mirror = Mirror {
        engine: Engine::new(Rc::new(transfer), control, bounds),
        control: control.clone(),
        map,
        target,
        hold_guests,
    };
    let ending = mirror.follow().await?;
    if options.wait_for_finalize {
        lifecycle::wait_for_finalize(control, true).await?;
    }
    mirror.settle().await?;
    if !options.wait_for_finalize {
        lifecycle::wait_for_finalize(control, false).await?;
    }
    let finish = async {
        match options.finish.filter(|_| ending == Ending::Pivot) {
            Some(finish) => finish().await,
            None => Ok(()),
        }
    };
    lifecycle::commit(control, finish).await
}

/// Checks that one disk can become equal to the other. Says how much should be in flight.
fn check(source: &Rc<Disk>, target: &Rc<Disk>) -> Result<Bounds> {
    let refuse = |kind, message| Err(Error::new(kind, message));
    if Rc::ptr_eq(source, target) {
        return refuse(ErrorKind::InvalidInput, format!("{} can't be mirrored to itself", source.name()));
    }
    if target.is_read_only() {
        let message =
            format!("{} is open for reading only; open it for writing to mirror to it", target.name());
        return refuse(ErrorKind::ReadOnly, message);
    }
    if source.size() != target.size() {
        let message = format!(
            "{} has {} bytes and {} has {}; a mirror needs two disks of the same size",
            source.name(),
            source.size(),
            target.name(),
            target.size()
        );
        return refuse(ErrorKind::InvalidInput, message);
    }
    Ok(Path::above(&source.top(), None)?.and(Path::through(&target.top())).bounds())
}

struct Mirror {
    engine: Engine,
    control: Rc<Control>,
    map: Rc<DirtyMap>,
    target: Rc<Disk>,
    hold_guests: HoldGuests,
}

impl Mirror {
    /// One pass over what is dirty.
    async fn sweep(&mut self) -> Result<(), Stopped> {
        match self.engine.pass().await? {
            Pass { failed: Some(error), .. } => Err(Stopped::Failed(error)),
            Pass { failed: None, .. } => Ok(()),
        }
    }

    /// So little is left that guests may wait for it.
    fn little_is_left(&self) -> bool {
        self.map.bytes() <= self.engine.window()
    }

    /// Keeps the target close to the source, and says how it is to end when it is told to.
    async fn follow(&mut self) -> Result<Ending, Stopped> {
        let mut sweeps = 0_u64;
        loop {
            self.sweep().await?;
            sweeps += 1;
            // What is commanded comes first; the next sweep sees to that.
            if self.control.wish() != Wish::Go {
                continue;
            }
            let caught_up = self.map.is_clean() || (sweeps > 1 && self.little_is_left());
            if caught_up && self.control.status() == Status::Running {
                self.control.go(Status::Ready);
            }
            if let Some(ending) = self.control.ending() {
                return Ok(ending);
            }
            if self.map.is_clean() {
                self.control.set_idle(true);
                self.rest().await;
                self.control.set_idle(false);
            }
        }
    }

    /// Waits for changes, and lets them gather; a command ends it.
    async fn rest(&self) {
        let clock = self.clock();
        let changes = async {
            poll_fn(|cx| self.map.poll_dirty(cx)).await;
            clock.sleep_until(clock.now() + GATHER).await;
        };
        let command =
            self.control.wait_until(|control| control.wish() != Wish::Go || control.ending().is_some());
        select(pin!(changes), pin!(command)).await;
    }

    fn clock(&self) -> Rc<dyn Clock> {
        self.target.clock().clone()
    }

    /// Makes the target equal to the source, and durable, with the guests held back.
    async fn settle(&mut self) -> Result<(), Stopped> {
        loop {
            for _ in 0..MOST_SWEEPS {
                self.sweep().await?;
                if self.little_is_left() {
                    break;
                }
            }
            // race-mark: mirror-holds-guests
            if !self.hold().await {
                continue;
            }
            self.sweep().await?;
            // A pause has let the guests go.
            if self.engine.holds() && lifecycle::try_flush(&self.target, &self.control).await? {
                // Commands that came while it was flushed still count: the next state knows no pause.
                if self.map.is_clean() && self.control.wish() == Wish::Go {
                    return Ok(());
                }
            }
            self.engine.let_go();
        }
    }

    /// Holds the guests back. False if a command came first, which the next sweep sees to.
    async fn hold(&mut self) -> bool {
        let held = (self.hold_guests)();
        let command = self.control.wait_until(|control| control.wish() != Wish::Go);
        match select(held, pin!(command)).await {
            Either::Left((held, _)) => {
                self.engine.hold(held);
                true
            }
            Either::Right(_) => false,
        }
    }
}
