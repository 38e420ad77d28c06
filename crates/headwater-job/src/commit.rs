//! The commit job: moves what the layers from `top` down to `base`, which is left out, hold into `base`.
//!
//! Here `top` is a layer that nobody writes, because it lies below others. If guests write to it, it is an active commit, which is a mirror
//! whose target is one of the source's own layers: [`crate::mirror::commit_active`].
//!
//! Until the end nobody needs what is written to `base`: whoever reads those bytes finds them in a layer above it. So the job may fail or
//! be cancelled anywhere. At the end `base` is flushed, and then [`CommitOptions::finish`] puts it in `top`'s place; an error there leaves
//! the chain as it was.

use crate::control::{Control, Outcome};
use crate::copy_engine::{Engine, Pass, Stopped};
use crate::foretell::foretell;
use crate::handle::JobHandle;
use crate::lifecycle::{self, Finish};
use crate::on_error::OnError;
use crate::path::Path;
use crate::transfer::{Source, Transfer};
use crate::window::Bounds;
use headwater_block::chain::is_same_layer;
use headwater_block::{Disk, Error, ErrorKind, Node, Patience, Result};
use std::rc::Rc;

/// How a commit job works.
#[derive(Default)]
pub struct CommitOptions {
    /// Bytes per second; 0 is without limit.
    pub speed: u64,
    /// What to do about errors.
    pub on_error: OnError,
    /// For how long the job waits for a source that can't be reached, paused by itself, before `on_error` counts.
    pub patience: Patience,
    /// Waits before the commit point until it is told to finalise.
    pub wait_for_finalize: bool,
    /// Stays after its end until it is dismissed.
    pub wait_for_dismiss: bool,
    /// How much may be in flight, instead of what fits the layers.
    pub bounds: Option<Bounds>,
    /// Puts `base` in the place of `top`. Without it the data are copied, and the chain stays as it is.
    pub finish: Option<Finish>,
}

/// Makes a commit job. It is created with the call, and works while the future is polled, which must be to its end.
///
/// `base` is the disk of a layer below `top`; if it is smaller than `top`, it grows.
pub fn commit(
    top: Rc<dyn Node>,
    base: Rc<Disk>,
    options: CommitOptions,
) -> (JobHandle, impl Future<Output = Outcome>) {
    let control = Control::new(options.speed, options.on_error);
    control.set_patience(options.patience);
    let handle = JobHandle::new(control.clone());
    let run = async move {
        let dismiss = options.wait_for_dismiss;
        lifecycle::run(&control, dismiss, work(top, base, options, &control)).await
    };
    (handle, run)
}

async fn work(
    top: Rc<dyn Node>,
    base: Rc<Disk>,
    options: CommitOptions,
    control: &Rc<Control>,
) -> Result<(), Stopped> {
    let bounds = prepare(&top, &base).await.map_err(Stopped::Failed)?;
    let above = Some(base.top());
    let bounds = options.bounds.unwrap_or(bounds);
    foretell(&top, above.as_ref(), bounds, control).await;
    let transfer = Transfer { source: Source::Still(top), above, target: base.clone() };
    let mut engine = Engine::new(Rc::new(transfer), control, bounds);
    if let Pass { failed: Some(error), .. } = engine.pass().await? {
        return Err(Stopped::Failed(error));
    }
    lifecycle::flush(&base, control).await?;
    lifecycle::wait_for_finalize(control, options.wait_for_finalize).await?;
    let finish = async {
        match options.finish {
            Some(finish) => finish().await,
            None => Ok(()),
        }
    };
    lifecycle::commit(control, finish).await
}

/// Checks that what is above `base` can be moved into it, and makes it large enough. Says how much should be in flight.
pub(crate) async fn prepare(top: &Rc<dyn Node>, base: &Rc<Disk>) -> Result<Bounds> {
    let into = base.top();
    if is_same_layer(top, &into) {
        let message = format!("{} can't be committed into itself", top.name());
        return Err(Error::new(ErrorKind::InvalidInput, message));
    }
    let path = Path::above(top, Some(&into))?.and(Path::through(&into));
    if base.is_read_only() {
        let message =
            format!("{} is open for reading only; open it for writing to commit into it", base.name());
        return Err(Error::new(ErrorKind::ReadOnly, message));
    }
    if base.size() < top.size() {
        base.resize(top.size()).await?;
    }
    Ok(path.bounds())
}
