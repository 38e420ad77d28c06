//! `block-commit`: from arguments to a job, and what it changes in the graph when everything was moved.
//!
//! A commit of an intermediate layer ends by itself: the layer above gets a new backing. A commit of the active layer becomes ready, and when
//! it is completed, all who used that layer use the base instead.

use super::durable::Work;
use super::hold::{AsDisk, Hold, pivot_hooks};
use super::stream::{job_args, link_name, speed};
use super::{Jobs, Plan, device_not_found};
use crate::daemon::commands::Turn;
use crate::daemon::failure::{Refusal, generic};
use crate::daemon::graph::open::{Options, Read};
use crate::daemon::graph::rights::Doing;
use crate::daemon::graph::{Graph, GraphNode};
use crate::durable::kept::Kept;
use headwater_block::LocalFuture;
use headwater_job::{CommitOptions, MirrorOptions};
use std::rc::Rc;

/// What is to be moved where.
struct Scope {
    device: Rc<GraphNode>,
    /// The uppermost layer that is moved.
    top: Rc<GraphNode>,
    base: Rc<GraphNode>,
    active: bool,
}

/// Starts a commit job as the arguments of `block-commit` say, for the first time or as it is recorded in `kept`.
///
/// # Errors
/// If they don't fit together or don't fit the graph, or something else is at work there.
pub(in crate::daemon) async fn start(
    graph: &Rc<Graph>,
    jobs: &Rc<Jobs>,
    turn: &Rc<Turn>,
    args: &Options,
    kept: Option<Rc<Kept>>,
) -> Result<(), Refusal> {
    let scope = scope(graph, args)?;
    let Scope { device, top, base, active } = &scope;
    let part = Graph::part(top, None);
    let nodes: Vec<_> = part.iter().take_while(|node| !Rc::ptr_eq(node, base)).cloned().collect();
    let over = if *active { None } else { Graph::overlay_of(device, top) };
    let touched: Vec<_> = nodes.iter().chain([base]).cloned().collect();
    graph.check_no_job(&touched, touched.len(), None)?;
    over.iter().try_for_each(|over| over.check_idle())?;
    if *active && args.contains_key("backing-file") {
        return Err(generic("'backing-file' specified, but 'top' is the active layer"));
    }
    let backing_file = args.text("backing-file").map(str::to_owned);
    let mask = args.flag("backing-mask-protocol").unwrap_or(false);
    let mut job = job_args(jobs, args)?;
    let target = base.skip_filters();
    let mut hold = Hold::new(graph, "commit", &job.id);
    let frozen: Vec<_> = over.iter().chain(&nodes).cloned().collect();
    let named = hold.freeze(&frozen).and_then(|()| {
        let driver = if *active { "mirror_top" } else { "commit_top" };
        hold.insert_filter(args.text("filter-node-name"), driver, top)
    });
    if let Err(refusal) = named {
        hold.release().await;
        return Err(refusal);
    }
    let prepared = async {
        speed(args)?;
        hold.make_writable(&target).await?;
        if let Some(over) = &over {
            hold.make_writable(over).await?;
            // Its header will change.
            let shares = Doing::READ.and(Doing::WRITE).and(Doing::REARRANGE);
            hold.attach(over, "overlay", Doing::READ.and(Doing::REARRANGE), shares).await?;
        }
        let layers = nodes.iter().filter(|node| !node.is_filter()).cloned().collect::<Vec<_>>();
        hold.occupy(&nodes);
        hold.occupy(std::slice::from_ref(base));
        over.iter().for_each(|over| hold.occupy_for_relinking(over));
        // What is written to the base is not seen by those above, who find the same bytes in a layer that is nearer. Another image on the base
        // would see it.
        let does = Doing::READ.and(Doing::WRITE);
        hold.attach(&target, "base", does, Doing::READ.and(Doing::REARRANGE)).await?;
        for node in &layers {
            // The top reads as before, and the base becomes the same; what is between them reads a mixture.
            let shares = match Rc::ptr_eq(node, &top.skip_filters()) {
                true if *active => Doing::READ.and(Doing::WRITE).and(Doing::REARRANGE),
                true => Doing::READ.and(Doing::REARRANGE),
                false => Doing::REARRANGE,
            };
            hold.attach(node, "intermediate node", Doing::READ, shares).await?;
        }
        match &over {
            Some(over) if kept.is_none() => {
                let becomes = Some(link_name(graph, over, &target, backing_file.as_deref()));
                let target = Some(target.clone());
                let work = Work { over: over.clone(), layers, target, becomes, boot_trace: None };
                jobs.keep("block-commit", args, &job, &work).await
            }
            _ => Ok(kept),
        }
    }
    .await;
    match prepared {
        Ok(kept) => job.kept = kept,
        Err(refusal) => {
            hold.release().await;
            jobs.tell_still_born(&job.id);
            return Err(refusal);
        }
    }
    let len = top.disk.size();
    let (kind, id) = ("commit", job.id.clone());
    let (handle, work): (_, LocalFuture<'static, _>) = if *active {
        let (hold_guests, finish) = pivot_hooks(&hold, turn, top, base, AsDisk::default());
        let options = MirrorOptions {
            speed: job.speed,
            on_error: job.on_error.into(),
            patience: top.disk.options().patience,
            wait_for_finalize: !job.auto_finalize,
            wait_for_dismiss: !job.auto_dismiss,
            hold_guests: Some(hold_guests),
            finish: Some(finish),
            ..MirrorOptions::default()
        };
        let (handle, work) =
            headwater_job::commit_active(top.skip_filters().disk.clone(), target.disk.clone(), options);
        (handle, Box::pin(work))
    } else {
        let options = CommitOptions {
            speed: job.speed,
            on_error: job.on_error,
            patience: top.disk.options().patience,
            wait_for_finalize: !job.auto_finalize,
            wait_for_dismiss: !job.auto_dismiss,
            finish: Some({
                let (graph, turn, top, base) = (graph.clone(), turn.clone(), top.clone(), base.clone());
                let user = hold.user();
                Box::new(move || {
                    Box::pin(async move {
                        let _turn = turn.take().await;
                        Hold::thaw(&graph, &id);
                        // Whoever stands there by now.
                        for over in graph.overlays_of(&top) {
                            let link = (backing_file.as_deref(), mask);
                            Hold::relink_for_commit(&graph, &id, (&over, &base), link).await?;
                        }
                        graph.renounce(&user);
                        Ok(())
                    })
                })
            }),
            ..CommitOptions::default()
        };
        let (handle, work) = headwater_job::commit(top.top(), target.disk.clone(), options);
        (handle, Box::pin(work))
    };
    let follows = *active;
    tracing::trace!(target: crate::daemon::trace::TARGET, event = "commit_start", job = job.id, top = top.name, base = base.name);
    jobs.start(Plan { kind, args: job, len, follows, hold, handle, work, write_through: None }).await;
    Ok(())
}

fn scope(graph: &Graph, args: &Options) -> Result<Scope, Refusal> {
    for (one, other) in [("top-node", "top"), ("base-node", "base")] {
        if args.contains_key(one) && args.contains_key(other) {
            return Err(generic(format!("'{one}' and '{other}' are mutually exclusive")));
        }
    }
    let name = args.text("device").unwrap_or_default();
    let device = graph.find(name).ok_or_else(|| device_not_found(name))?;
    if !graph.parents(&device).is_empty() {
        return Err(generic("Need a root block node"));
    }
    let top = match (args.text("top-node"), args.text("top")) {
        (Some(name), _) => {
            let top = Graph::behind_shadow(graph.device_or_node("", name)?);
            if !Graph::is_in_chain(&device, &top) {
                return Err(generic(format!("'{name}' is not in this backing file chain")));
            }
            top
        }
        (None, Some(name)) => {
            let names = graph.names();
            let own = (names.told(&device) == name).then(|| device.clone());
            let found = own.or_else(|| names.find_backing(&device, name));
            found.ok_or_else(|| generic(format!("Top image file {name} not found")))?
        }
        (None, None) => device.clone(),
    };
    let base = match (args.text("base-node"), args.text("base")) {
        (Some(name), _) => {
            let base = Graph::behind_shadow(graph.device_or_node("", name)?);
            if !Graph::is_in_chain(&top, &base) {
                return Err(generic(format!("'{name}' is not in this backing file chain")));
            }
            base
        }
        (None, Some(name)) => {
            let found = graph.names().find_backing(&top, name);
            found.ok_or_else(|| generic(format!("Can't find '{name}' in the backing chain")))?
        }
        (None, None) => {
            let bottom = device.chain().filter(|node| !node.is_filter()).last();
            bottom.ok_or_else(|| generic("There is no backing image"))?
        }
    };
    if Rc::ptr_eq(&top.skip_filters(), &base.skip_filters()) {
        return Err(generic("cannot commit an image into itself"));
    }
    let active = Rc::ptr_eq(&top.skip_filters(), &device.skip_filters());
    Ok(Scope { device, top, base, active })
}
