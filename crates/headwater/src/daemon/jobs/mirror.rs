//! `blockdev-mirror`: from arguments to a job that copies a disk to another node while it is in use, and then puts that in its place.

use super::hold::{Hold, pivot_hooks};
use super::stream::{job_args, speed};
use super::{Jobs, Plan, on_errors};
use crate::daemon::commands::Turn;
use crate::daemon::failure::{Refusal, generic};
use crate::daemon::graph::Graph;
use crate::daemon::graph::open::{Options, Read};
use crate::daemon::graph::rights::Doing;
use headwater_job::{MirrorOptions, SyncMode};
use std::rc::Rc;

/// Starts a mirror job as the arguments of `blockdev-mirror` say.
///
/// # Errors
/// If they don't fit together or don't fit the graph, or something else is at work there.
pub(in crate::daemon) async fn start(
    graph: &Rc<Graph>,
    jobs: &Rc<Jobs>,
    turn: &Rc<Turn>,
    args: &Options,
) -> Result<(), Refusal> {
    let text = |key: &str| args.text(key).unwrap_or_default();
    let source = graph.any(text("device"))?;
    let target = graph.any(text("target"))?;
    source.check_idle()?;
    target.check_idle()?;
    if args.contains_key("replaces") {
        return Err(generic("Option 'replaces' is not supported: the mirror takes the place of the device"));
    }
    if args.text("copy-mode") == Some("write-blocking") {
        return Err(generic(
            "copy-mode 'write-blocking' is not supported: changes are followed in the background",
        ));
    }
    if Rc::ptr_eq(&source.skip_filters(), &target.skip_filters()) {
        return Err(generic("Can't mirror node into itself"));
    }
    let sync = match text("sync") {
        "full" => SyncMode::Full,
        "top" => SyncMode::Top,
        "none" => SyncMode::None,
        other => return Err(generic(format!("Sync mode '{other}' not supported"))),
    };
    if source.disk.size() != target.disk.size() {
        return Err(generic("Source and target image have different sizes"));
    }
    let job = job_args(jobs, args)?;
    let mut hold = Hold::new(graph, "mirror", &job.id);
    if let Err(refusal) = hold.insert_filter(args.text("filter-node-name"), "mirror_top", &source) {
        hold.release().await;
        return Err(refusal);
    }
    let prepared = async {
        speed(args)?;
        hold.make_writable(&target).await?;
        let shares = Doing::READ.and(Doing::WRITE).and(Doing::REARRANGE);
        hold.attach(&source, "source", Doing::READ, shares).await?;
        hold.attach(&target, "target", Doing::READ.and(Doing::WRITE), Doing::READ).await?;
        hold.freeze(std::slice::from_ref(&source))?;
        hold.occupy(&[source.clone(), target.clone()]);
        Ok(())
    }
    .await;
    if let Err(refusal) = prepared {
        hold.release().await;
        jobs.tell_still_born(&job.id);
        return Err(refusal);
    }
    let (hold_guests, finish) = pivot_hooks(&hold, turn, &source, &target);
    let options = MirrorOptions {
        sync,
        granularity: args.number("granularity"),
        speed: job.speed,
        on_error: on_errors(args),
        patience: source.disk.options().patience,
        wait_for_finalize: !job.auto_finalize,
        wait_for_dismiss: !job.auto_dismiss,
        hold_guests: Some(hold_guests),
        finish: Some(finish),
        ..MirrorOptions::default()
    };
    let len = source.disk.size();
    let (handle, work) =
        headwater_job::mirror(source.skip_filters().disk.clone(), target.disk.clone(), options);
    tracing::trace!(target: crate::daemon::trace::TARGET, event = "mirror_start", job = job.id, source = source.name, target = target.name);
    jobs.start(Plan {
        kind: "mirror",
        args: job,
        len,
        follows: sync != SyncMode::Full,
        hold,
        handle,
        work: Box::pin(work),
    })
    .await;
    Ok(())
}
