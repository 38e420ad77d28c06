//! `blockdev-backup`: from arguments to a job that makes another node hold what a node holds now. Of `drive-backup` what both have in common.

use super::hold::Hold;
use super::stream::{job_args, speed};
use super::{Jobs, Plan, on_errors};
use crate::daemon::failure::{Refusal, generic};
use crate::daemon::fleecing;
use crate::daemon::graph::open::{Options, Read};
use crate::daemon::graph::rights::Doing;
use crate::daemon::graph::{Graph, GraphNode, Role};
use headwater_block::PointInTime;
use headwater_block::copy_before_write::Policy;
use headwater_job::{BackupOptions, Group};
use serde_json::Value;
use std::rc::Rc;

/// What is copied in one piece, in bytes, if the target doesn't need more.
const GRANULE: u64 = 64 << 10;

/// What `x-perf` asks for.
struct Perf {
    /// The least size of what is copied in one piece.
    granule: u64,
    /// The most that one copy takes; none is no limit.
    most: Option<u64>,
}

/// Plans a backup job as the arguments of `blockdev-backup` say, which ends with the others of `group`. From now on guests save what they change; the
/// job has only to be started.
///
/// # Errors
/// If the arguments don't fit together or don't fit the graph, or something else is at work there.
pub(in crate::daemon) async fn plan(
    graph: &Rc<Graph>,
    jobs: &Rc<Jobs>,
    args: &Options,
    group: Option<&Rc<Group>>,
) -> Result<Plan, Refusal> {
    let source = graph.any(args.text("device").unwrap_or_default())?;
    let target = graph.any(args.text("target").unwrap_or_default())?;
    // Others may read the target meanwhile, but whoever writes to it would have his disk overwritten.
    plan_between(graph, jobs, args, source, (target, Doing::READ.and(Doing::REARRANGE)), group).await
}

/// As [`plan`], for a target of which the job bears `bears` that others do.
///
/// # Errors
/// See there.
pub(super) async fn plan_between(
    graph: &Rc<Graph>,
    jobs: &Rc<Jobs>,
    args: &Options,
    source: Rc<GraphNode>,
    (target, bears): (Rc<GraphNode>, Doing),
    group: Option<&Rc<Group>>,
) -> Result<Plan, Refusal> {
    let text = |key: &str| args.text(key).unwrap_or_default();
    check_bitmap(args)?;
    let forgets = forgets(args, &source)?;
    if Rc::ptr_eq(&source.skip_filters(), &target.skip_filters()) {
        return Err(generic("Source and target cannot be the same"));
    }
    source.check_may_be_backed_up()?;
    target.check_idle()?;
    let compressed = args.flag("compress").unwrap_or(false);
    if compressed && target.top().compressed_unit().is_none() {
        return Err(no_compression(&target.name));
    }
    let mut perf = perf(args, &target)?;
    if let Some(moment) = &forgets {
        // Only whole granules of it are given back.
        perf.granule = perf.granule.max(moment.granularity());
    }
    if source.disk.size() != target.disk.size() {
        return Err(generic("Source and target image have different sizes"));
    }
    let only_changes = text("sync") == "none";
    let own_overlay = only_changes && is_overlay_of(&target, &source);
    if leads_to(&target, &source) && !own_overlay {
        return Err(generic(format!(
            "'{}' stands on '{}'; only a backup with sync 'none' goes into the node's own overlay",
            target.name, source.name
        )));
    }
    let job = job_args(jobs, args)?;
    let mut hold = Hold::new(graph, "backup", &job.id);
    if let Err(refusal) = hold.insert_filter(args.text("filter-node-name"), "copy-before-write", &source) {
        hold.release().await;
        return Err(refusal);
    }
    let prepared = async {
        if own_overlay {
            hold.part_from_backing(&target).await?;
        }
        let shares = Doing::READ.and(Doing::WRITE).and(Doing::REARRANGE);
        hold.attach(&source, "file", Doing::READ, shares).await?;
        hold.attach(&target, "target", Doing::READ.and(Doing::WRITE), bears).await?;
        hold.freeze_beside_others(std::slice::from_ref(&source));
        hold.occupy_to_back_up(&source);
        hold.occupy(std::slice::from_ref(&target));
        Ok(())
    }
    .await;
    if let Err(refusal) = prepared {
        hold.release().await;
        return Err(refusal);
    }
    if let Err(refusal) = speed(args) {
        hold.release().await;
        jobs.tell_still_born(&job.id);
        return Err(refusal);
    }
    let disk = source.skip_filters().disk.clone();
    let above = if text("sync") == "top" { disk.top().backing() } else { None };
    let point = if own_overlay {
        fleecing::begin_in_overlay(&disk, &target, perf.granule).await?
    } else {
        disk.begin_point_in_time(&target.disk, perf.granule, above).await
    };
    point.set_policy(Policy { compressed, ..Policy::default() });
    let options = BackupOptions {
        only_changes,
        speed: job.speed,
        on_error: on_errors(args),
        patience: source.disk.options().patience,
        wait_for_finalize: !job.auto_finalize,
        wait_for_dismiss: !job.auto_dismiss,
        group: group.cloned(),
        forgets,
        most: perf.most,
        ..BackupOptions::default()
    };
    let (handle, work) = headwater_job::backup(point, options);
    tracing::trace!(target: crate::daemon::trace::TARGET, event = "backup_start", job = job.id, source = source.name, target = target.name);
    Ok(Plan {
        kind: "backup",
        args: job,
        len: disk.size(),
        follows: false,
        hold,
        handle,
        work: Box::pin(work),
        write_through: None,
    })
}

/// True if the layer of `over` is one right on top of the layer of `under`.
fn is_overlay_of(over: &Rc<GraphNode>, under: &Rc<GraphNode>) -> bool {
    let backing = over.child(Role::Backing);
    backing.is_some_and(|backing| Rc::ptr_eq(&backing.skip_filters(), &under.skip_filters()))
}

/// The moment of which what was copied is to be given back, if `discard-source` says so.
///
/// # Errors
/// If the source shows none: then guests still need what it holds.
pub(super) fn forgets(args: &Options, source: &Rc<GraphNode>) -> Result<Option<Rc<PointInTime>>, Refusal> {
    let shown = source.skip_filters();
    let ignores = |node: &GraphNode| node.disk.options().ignore_discards;
    // Nodes ignore discards unless their options say otherwise.
    if !args.flag("discard-source").unwrap_or(false) || ignores(source) || ignores(&shown) {
        return Ok(None);
    }
    let filter = (shown.driver == "snapshot-access").then(|| shown.child(Role::Moment)).flatten();
    let moment = filter.and_then(|filter| filter.inside.borrow().point.clone());
    moment.map(Some).ok_or_else(|| {
        generic(format!(
            "Option 'discard-source' is for the copy of a snapshot-access node: guests still need what '{}' holds",
            source.name
        ))
    })
}

/// Why a target can't have compressed data.
pub(super) fn no_compression(target: &str) -> Refusal {
    generic(format!("Compression is not supported for this drive {target}"))
}

/// There are no dirty bitmaps, so none can be found.
///
/// # Errors
/// If one is asked for.
pub(super) fn check_bitmap(args: &Options) -> Result<(), Refusal> {
    let sync = args.text("sync").unwrap_or_default();
    match args.text("bitmap") {
        Some(name) => Err(generic(format!("Bitmap '{name}' could not be found"))),
        None if matches!(sync, "bitmap" | "incremental") => {
            Err(generic(format!("must provide a valid bitmap name for '{sync}' sync mode")))
        }
        None if args.contains_key("bitmap-mode") => {
            Err(generic("Cannot specify bitmap sync mode without a bitmap"))
        }
        None => Ok(()),
    }
}

fn perf(args: &Options, target: &GraphNode) -> Result<Perf, Refusal> {
    let asked = args.object("x-perf").cloned().unwrap_or_default();
    let number = |key: &str| asked.get(key).and_then(Value::as_i64);
    if number("max-workers").is_some_and(|workers| !(1..=i64::from(i32::MAX)).contains(&workers)) {
        return Err(generic("max-workers must be between 1 and 2147483647"));
    }
    let most = match number("max-chunk") {
        Some(most) if most < 0 => {
            return Err(generic("max-chunk must be zero (which means no limit) or positive"));
        }
        most => most.map(i64::unsigned_abs).filter(|most| *most > 0),
    };
    let granule = check_granule(&asked, target).map_err(|err| {
        generic(format!("Could not create node: Cannot create block-copy-state: {}", err.desc))
    })?;
    match most {
        Some(most) if most < granule => {
            Err(generic(format!("Required max-chunk ({most}) is less than backup cluster size ({granule})")))
        }
        most => Ok(Perf { granule, most }),
    }
}

/// What is copied to `target` in one piece, in bytes, with `min-cluster-size` of the options.
///
/// # Errors
/// If that is no power of two.
pub(in crate::daemon) fn check_granule(options: &Options, target: &GraphNode) -> Result<u64, Refusal> {
    let least = options.number("min-cluster-size").unwrap_or(0);
    if least > 0 && !least.is_power_of_two() {
        return Err(generic("min-cluster-size needs to be a power of 2"));
    }
    let unit = target.disk.limits().allocation_unit.max(target.top().compressed_unit().unwrap_or(1));
    Ok(least.max(GRANULE).max(u64::from(unit)))
}

/// True if reads of `from` may come to `node`.
pub(in crate::daemon) fn leads_to(from: &Rc<GraphNode>, node: &Rc<GraphNode>) -> bool {
    let layer = node.skip_filters();
    from.chain().any(|below| Rc::ptr_eq(&below, node) || Rc::ptr_eq(&below, &layer))
}
