//! The backup job: another disk gets what a disk held when the job began, while guests go on writing to it.
//!
//! # How it goes
//! 1. Before the job there is a [`PointInTime`]: from that moment on, whatever guests change goes to the target first. Its module text argues
//!    that the target gets what was there then, and nothing else.
//! 2. The job copies the rest, in one pass, and takes no notice of what guests have saved before it came by.
//! 3. It flushes the target, and is done at its commit point. Nothing changes in the graph.
//!
//! A job that is told to copy nothing itself (QEMU's sync mode `none`) only keeps the moment, until it is cancelled.
//!
//! # How long guests wait
//! Whoever changes a granule that isn't saved waits for the copy of that granule to the target, or for the copy of the engine that is about it; reads
//! wait for nobody but such a change. A pause of the job doesn't change that: guests save what they are about to change, and a speed limit
//! doesn't count for it.

use crate::control::{Control, Outcome, Wish};
use crate::copier::Copier;
use crate::copy_engine::{Engine, Pass, Stopped};
use crate::foretell::foretell;
use crate::group::Group;
use crate::handle::JobHandle;
use crate::lifecycle;
use crate::on_error::OnErrors;
use crate::path::Path;
use crate::progress::Progress;
use crate::window::Bounds;
use futures_util::future::select;
use headwater_block::chain::Missing;
use headwater_block::copy_up::{Copied, Failed};
use headwater_block::{Abort, Clock, GuestLatency, LocalFuture, Patience, PointInTime, Result};
use std::ops::Range;
use std::pin::pin;
use std::rc::Rc;

/// How a backup job works.
#[derive(Default)]
pub struct BackupOptions {
    /// Nothing is copied but what guests are about to change; the job ends only by a cancel.
    pub only_changes: bool,
    /// Bytes per second; 0 is without limit. What guests save doesn't count.
    pub speed: u64,
    /// What to do about errors, when the job meets them. A guest's change that can't be saved fails, whatever is said here.
    pub on_error: OnErrors,
    /// For how long the job waits for a source that can't be reached, paused by itself, before `on_error` counts.
    pub patience: Patience,
    /// Waits before the commit point until it is told to finalise.
    pub wait_for_finalize: bool,
    /// Stays after its end until it is dismissed.
    pub wait_for_dismiss: bool,
    /// The jobs that it ends with: all of them well, or none.
    pub group: Option<Rc<Group>>,
    /// The disk that is copied shows this moment of another one, and what of it has been copied is forgotten there ([`PointInTime::forget`]).
    pub forgets: Option<Rc<PointInTime>>,
    /// How many bytes one copy takes at most.
    pub most: Option<u64>,
    /// How much may be in flight, instead of what fits the layers.
    pub bounds: Option<Bounds>,
}

/// Makes a job that completes `point`. It is created with the call, and works while the future is polled, which must be to its end.
/// With the job, the point in time ends as well.
pub fn backup(point: Rc<PointInTime>, options: BackupOptions) -> (JobHandle, impl Future<Output = Outcome>) {
    let control = Control::with_switch(options.speed, options.on_error, point.give_to_job());
    control.set_patience(options.patience);
    if let Some(group) = &options.group {
        group.join(&control, options.wait_for_finalize);
    }
    let handle = JobHandle::new(control.clone());
    let run = async move {
        let dismiss = options.wait_for_dismiss;
        let whole = async {
            let result = work(&point, options, &control).await;
            point.end().await;
            result
        };
        let outcome = lifecycle::run(&control, dismiss, whole).await;
        // One that was cancelled before it began has not done so.
        point.end().await;
        outcome
    };
    (handle, run)
}

async fn work(point: &Rc<PointInTime>, options: BackupOptions, control: &Rc<Control>) -> Result<(), Stopped> {
    if options.only_changes {
        keep(point, control).await;
        return Err(Stopped::Cancelled);
    }
    let bounds = match options.bounds {
        Some(bounds) => bounds,
        None => {
            let from = Path::above(&point.source().top(), None).map_err(Stopped::Failed)?;
            from.and(Path::through(&point.target().top())).bounds()
        }
    };
    let bounds = options.most.map_or(bounds, |most| bounds.with_copies_up_to(most));
    foretell(&point.source().top(), point.above(), bounds, control).await;
    let given_up = control.given_up().clone();
    let rest = Rest { point: point.clone(), forgets: options.forgets, given_up };
    let mut engine = Engine::new(Rc::new(rest), control, bounds);
    if let Pass { failed: Some(error), .. } = engine.pass().await? {
        return Err(Stopped::Failed(error));
    }
    debug_assert_eq!(point.pending(), 0);
    lifecycle::flush(point.target(), control).await?;
    lifecycle::wait_for_finalize(control, options.wait_for_finalize).await?;
    lifecycle::commit(control, std::future::ready(Ok(()))).await
}

/// Keeps the moment until the job is cancelled, and shows how much guests have saved.
async fn keep(point: &PointInTime, control: &Control) {
    let show = async {
        let total = point.source().size();
        loop {
            let pending = point.pending();
            let done = total.saturating_sub(pending);
            control.set_progress(Progress { total, done, copied: done, ..Progress::default() });
            point.wait_until(|point| point.pending() != pending).await;
        }
    };
    let obey = async {
        while control.wish() != Wish::Cancel {
            control.stay_paused().await;
            control.set_idle(true);
            control.wait_until(|control| control.wish() != Wish::Go).await;
            control.set_idle(false);
        }
    };
    select(pin!(obey), pin!(show)).await;
}

/// What guests have not saved yet.
struct Rest {
    point: Rc<PointInTime>,
    forgets: Option<Rc<PointInTime>>,
    given_up: Rc<Abort>,
}

impl Copier for Rest {
    fn clock(&self) -> &Rc<dyn Clock> {
        self.point.target().clock()
    }

    fn size(&self) -> u64 {
        self.point.source().size()
    }

    fn unit(&self) -> u64 {
        self.point.granularity()
    }

    fn guests(&self) -> Option<&Rc<GuestLatency>> {
        Some(self.point.source().guest_latency())
    }

    fn take(&self, from: u64) -> Option<Range<u64>> {
        self.point.next_pending(from)
    }

    fn untaken(&self) -> u64 {
        0
    }

    fn look(self: Rc<Self>, range: Range<u64>) -> LocalFuture<'static, Result<Option<Missing>>> {
        Box::pin(async move { self.point.look(range).await })
    }

    fn needs(&self, _run: &Missing) -> bool {
        true
    }

    fn copy(self: Rc<Self>, run: Missing, abort: Rc<Abort>) -> LocalFuture<'static, Result<Copied, Failed>> {
        Box::pin(async move {
            let copied = self.point.copy(run.range.clone(), &abort).await?;
            if let Some(moment) = &self.forgets {
                let forget = moment.forget(run.range, &abort);
                if let Err(error) = moment.target().recallable(&self.given_up, forget).await {
                    tracing::debug!(%error, "what was copied is kept all the same");
                }
            }
            Ok(copied)
        })
    }

    fn probe(self: Rc<Self>, run: Missing, abort: Rc<Abort>) -> LocalFuture<'static, Result<()>> {
        Box::pin(
            async move { abort.guard(self.point.source().read_beside_guests(run.range)).await?.map(drop) },
        )
    }

    fn source_back(self: Rc<Self>) -> LocalFuture<'static, ()> {
        // What guests read of the source says nothing of the layers that it is read through here.
        Box::pin(std::future::pending())
    }
}
