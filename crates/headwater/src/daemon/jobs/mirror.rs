//! `blockdev-mirror`: from arguments to a job that copies a disk to another node while it is in use, and then puts that in its place. Of
//! `drive-mirror` what both have in common.

use super::backup::leads_to;
use super::hold::{AsDisk, Hold, pivot_hooks};
use super::stream::{job_args, speed};
use super::{Jobs, Plan, on_errors};
use crate::daemon::commands::Turn;
use crate::daemon::failure::{Refusal, generic};
use crate::daemon::graph::open::{Options, Read};
use crate::daemon::graph::rights::Doing;
use crate::daemon::graph::{Graph, GraphNode};
use headwater_block::{Error, ErrorKind, LocalFuture};
use headwater_job::{MirrorOptions, SyncMode};
use std::cell::Cell;
use std::future::ready;
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
    let source = graph.any(args.text("device").unwrap_or_default())?;
    let target = graph.any(args.text("target").unwrap_or_default())?;
    begin(graph, jobs, turn, args, source, Target { node: target, as_disk: AsDisk::default() }).await
}

/// Where a mirror goes.
pub(super) struct Target {
    pub(super) node: Rc<GraphNode>,
    pub(super) as_disk: AsDisk,
}

/// As [`start`], between these nodes.
///
/// # Errors
/// See there.
pub(super) async fn begin(
    graph: &Rc<Graph>,
    jobs: &Rc<Jobs>,
    turn: &Rc<Turn>,
    args: &Options,
    source: Rc<GraphNode>,
    Target { node: target, as_disk }: Target,
) -> Result<(), Refusal> {
    if !graph.parents(&source).is_empty() {
        // The target takes its place at the end: under an image whose header names another file, or as the file of one, which keeps it.
        return Err(generic("Need a root block node"));
    }
    source.check_idle()?;
    target.check_idle()?;
    let sync = check_arguments(args)?;
    if Rc::ptr_eq(&source.skip_filters(), &target.skip_filters()) {
        return Err(generic("Can't mirror node into itself"));
    }
    let through = args.text("copy-mode") == Some("write-blocking");
    let on_the_source = as_disk.stands_on_source;
    // A change that goes through is written as it is, and the rest of its cluster would have to come from the source.
    let may_go_through = !on_the_source && !leads_to(&target, &source);
    if through && !may_go_through {
        return Err(generic(format!(
            "copy-mode 'write-blocking' is not possible: '{}' stands on '{}'",
            target.name, source.name
        )));
    }
    let replaced = replaced(graph, &source, args.text("replaces"))?;
    let job = job_args(jobs, args)?;
    let mut hold = Hold::new(graph, "mirror", &job.id);
    if let Err(refusal) = hold.insert_filter(args.text("filter-node-name"), "mirror_top", &source) {
        hold.release().await;
        return Err(refusal);
    }
    let prepared = async {
        speed(args)?;
        let shares = Doing::READ.and(Doing::WRITE).and(Doing::REARRANGE);
        hold.attach(&source, "source", Doing::READ, shares).await?;
        // What it holds so far is no use to anybody, and needn't stay.
        let bears = if on_the_source { Doing::NOTHING } else { Doing::REARRANGE };
        hold.attach(&target, "target", Doing::WRITE, bears).await?;
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
    let (hold_guests, finish) = pivot_hooks(&hold, turn, &replaced, &target, as_disk);
    let write_through = Rc::new(Cell::new(through));
    let options = MirrorOptions {
        sync,
        write_through: write_through.clone(),
        granularity: granularity(args, &target, on_the_source),
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
    let (handle, work): (_, LocalFuture<'static, _>) = if len == target.disk.size() {
        let (handle, work) =
            headwater_job::mirror(source.skip_filters().disk.clone(), target.disk.clone(), options);
        (handle, Box::pin(work))
    } else {
        // The job says so, not the command.
        let different = Error::new(ErrorKind::InvalidInput, "Source and target image have different sizes");
        let (handle, work) = headwater_job::task(ready(Err(different)), !job.auto_dismiss);
        (handle, Box::pin(work))
    };
    tracing::trace!(target: crate::daemon::trace::TARGET, event = "mirror_start", job = job.id, source = source.name, target = target.name);
    jobs.start(Plan {
        kind: "mirror",
        args: job,
        len,
        follows: sync != SyncMode::Full,
        hold,
        handle,
        work,
        write_through: may_go_through.then_some(write_through),
    })
    .await;
    Ok(())
}

/// In parts of how many bytes changes are followed; none is what fits the target. Those of a target that doesn't stand on the source yet are whole clusters,
/// because nothing else would fill the rest of one.
fn granularity(args: &Options, target: &GraphNode, on_the_source: bool) -> Option<u64> {
    let given = args.number("granularity").filter(|granularity| *granularity > 0);
    let unit = u64::from(target.disk.limits().allocation_unit);
    if on_the_source { Some(given.unwrap_or(unit).max(unit).max(4096)) } else { given }
}

/// Refuses what no mirror can do, into whatever target, and says what is copied.
///
/// # Errors
/// Modes that aren't there, and numbers out of their ranges.
pub(super) fn check_arguments(args: &Options) -> Result<SyncMode, Refusal> {
    check_numbers(args)?;
    match args.text("sync").unwrap_or_default() {
        "full" => Ok(SyncMode::Full),
        "top" => Ok(SyncMode::Top),
        "none" => Ok(SyncMode::None),
        other => Err(generic(format!("Sync mode '{other}' not supported"))),
    }
}

fn check_numbers(args: &Options) -> Result<(), Refusal> {
    let number = |key: &str| args.get(key).and_then(serde_json::Value::as_i64);
    match number("granularity") {
        // Whatever fits the target.
        None | Some(0) => {}
        Some(granularity) if !(512..=64 << 20).contains(&granularity) => {
            return Err(generic("Parameter 'granularity' expects a value in range [512B, 64MB]"));
        }
        Some(granularity) if granularity & (granularity - 1) != 0 => {
            return Err(generic("Parameter 'granularity' expects a power of 2"));
        }
        Some(_) => {}
    }
    // How much is in flight follows from what was measured; a size is only checked.
    if number("buf-size").is_some_and(|size| size < 0) {
        return Err(generic("Invalid parameter 'buf-size'"));
    }
    Ok(())
}

/// The node whose place the target takes: the source, or the one called `name`, which must show the same data: it is below filters of the source.
fn replaced(graph: &Graph, source: &Rc<GraphNode>, name: Option<&str>) -> Result<Rc<GraphNode>, Refusal> {
    let Some(name) = name else { return Ok(source.clone()) };
    let node =
        graph.find(name).ok_or_else(|| generic(format!("Failed to find node with node-name='{name}'")))?;
    let layer = source.skip_filters();
    let between = source.chain().take_while(|below| !Rc::ptr_eq(below, &layer));
    if between.chain([layer.clone()]).any(|below| Rc::ptr_eq(&below, &node)) {
        return Ok(node);
    }
    Err(generic(format!(
        "Cannot replace '{name}' by a node mirrored from '{}', because it cannot be guaranteed that doing so would not lead to an abrupt \
         change of visible data",
        source.name
    )))
}
