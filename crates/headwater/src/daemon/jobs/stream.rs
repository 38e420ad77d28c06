//! `block-stream`: from arguments to a job, and what it changes in the graph when everything was copied.

use super::durable::Work;
use super::{Hold, JobArgs, Jobs, Plan, on_error};
use crate::boot_trace::load;
use crate::daemon::commands::Turn;
use crate::daemon::failure::{Refusal, generic, of_failure};
use crate::daemon::graph::names::has_protocol;
use crate::daemon::graph::open::{Options, Read};
use crate::daemon::graph::rights::Doing;
use crate::daemon::graph::{Graph, GraphNode, Role, layer};
use crate::durable::kept::Kept;
use headwater_block::node::BackingLink;
use headwater_block::{Error, ErrorKind};
use headwater_job::{Base, BootTrace, Link, StreamOptions};
use std::path::{Path, PathBuf};
use std::rc::Rc;

/// Starts a stream job as the arguments of `block-stream` say, for the first time or as it is recorded in `kept`.
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
    for (one, other) in [("base", "base-node"), ("base", "bottom"), ("bottom", "base-node")] {
        if args.contains_key(one) && args.contains_key(other) {
            return Err(generic(format!("'{one}' and '{other}' cannot be specified at the same time")));
        }
    }
    let device = args.text("device").unwrap_or_default();
    let top = graph.any(device)?;
    // The first node that isn't streamed any more.
    let end = end(graph, &top, args)?;
    let part = Graph::part(&top, end.as_ref());
    let over = top.skip_filters();
    // What lies below the disk is only read, which the streams of other disks may do as well.
    let at = part.iter().position(|node| Rc::ptr_eq(node, &over)).map_or(part.len(), |at| at + 1);
    let (own, below) = part.split_at(at);
    let named = args.text("base-node").and_then(|name| graph.find(name));
    // A stream down to the node that stands for a commit leaves that the layers below.
    let beside = named.filter(|named| named.driver == "commit_top").and(end.as_ref());
    graph.check_no_job(&part, at, beside)?;
    if end.is_none() && args.contains_key("backing-file") {
        return Err(generic("backing file specified, but streaming the entire chain"));
    }
    let backing_file = args.text("backing-file").map(str::to_owned);
    let mask = args.flag("backing-mask-protocol").unwrap_or(false);
    let mut job = job_args(jobs, args)?;
    let boot_trace = boot_trace(args, kept.as_deref()).await?;

    let mut hold = Hold::new(graph, "stream", &job.id);
    // What the last one stands on may be another node at the end.
    let kept_links = if end.is_some() { &part[..part.len() - 1] } else { &part[..] };
    let named = match hold.make_writable(&over).await {
        Ok(()) => hold
            .freeze(kept_links)
            .and_then(|()| hold.insert_filter(args.text("filter-node-name"), "copy-on-read", &over)),
        Err(refusal) => Err(refusal),
    };
    if let Err(refusal) = named {
        hold.release().await;
        return Err(refusal);
    }
    let prepared = async {
        speed(args)?;
        let shares = Doing::READ.and(Doing::WRITE).and(Doing::REARRANGE);
        hold.attach(&over, "main node", Doing::READ.and(Doing::REARRANGE), shares).await?;
        for node in part.iter().filter(|node| !Rc::ptr_eq(node, &over) && !node.is_filter()) {
            hold.attach(node, "intermediate node", Doing::READ, Doing::READ.and(Doing::REARRANGE)).await?;
        }
        hold.occupy(own);
        hold.occupy_as_reader(below);
        if kept.is_some() {
            return Ok(kept);
        }
        let work = Work {
            over: over.clone(),
            layers: part
                .iter()
                .filter(|node| !Rc::ptr_eq(node, &over) && !node.is_filter())
                .cloned()
                .collect(),
            target: None,
            becomes: end
                .as_ref()
                .map(|end| link_name(graph, &over, &end.skip_filters(), backing_file.as_deref())),
            boot_trace: boot_trace.as_ref().map(BootTrace::to_string),
        };
        jobs.keep("block-stream", args, &job, &work).await
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
    let finish = {
        let (graph, turn, over, id) = (graph.clone(), turn.clone(), over.clone(), job.id.clone());
        // What the last node that is streamed stands on decides at the end what remains: the chain below may have changed.
        let last = part.last().cloned().unwrap_or_else(|| over.clone());
        let whole = end.is_none();
        Box::new(move || -> headwater_block::LocalFuture<'static, headwater_block::Result<()>> {
            Box::pin(async move {
                let _turn = turn.take().await;
                Hold::thaw(&graph, &id);
                let base = if whole { None } else { last.below() };
                relink(&graph, &over, base.as_ref(), backing_file.as_deref(), mask).await
            })
        })
    };
    let base = end
        .as_ref()
        .map(|node| Base { node: layer(node), link: Link { name: String::new(), format: String::new() } });
    let options = StreamOptions {
        base,
        speed: job.speed,
        on_error: job.on_error,
        patience: over.disk.options().patience,
        detect_zeroes: true,
        wait_for_finalize: !job.auto_finalize,
        wait_for_dismiss: !job.auto_dismiss,
        finish: Some(finish),
        space: graph.space_of(&over),
        boot_trace,
        ..StreamOptions::default()
    };
    let (handle, work) = headwater_job::stream(over.disk.clone(), options);
    // Where nothing can be missing, nothing is what the job works on.
    let lower = over.below().filter(|below| end.as_ref().is_none_or(|end| !Rc::ptr_eq(below, end)));
    let len = lower.map_or(0, |_| over.disk.size());
    let plan = Plan {
        kind: "stream",
        args: job,
        len,
        follows: false,
        hold,
        handle,
        work: Box::pin(work),
        write_through: None,
    };
    tracing::trace!(target: crate::daemon::trace::TARGET, event = "stream_start", job = plan.args.id, node = over.name);
    jobs.start(plan).await;
    Ok(())
}

/// What is to be copied first: as it is recorded, or as the file says that the arguments name.
///
/// # Errors
/// If it is no boot trace, or can't be read.
async fn boot_trace(args: &Options, kept: Option<&Kept>) -> Result<Option<BootTrace>, Refusal> {
    if let Some(kept) = kept {
        let text = kept.record().boot_trace;
        return text
            .map(|text| BootTrace::parse(&text))
            .transpose()
            .map_err(|err| generic(format!("the boot trace in {} is damaged: {err}", kept.shown())));
    }
    let Some(path) = args.text("x-headwater-boot-trace").map(PathBuf::from) else { return Ok(None) };
    let loaded = tokio::task::spawn_blocking(move || load(&path)).await;
    match loaded {
        Ok(Ok(trace)) => Ok(Some(trace)),
        Ok(Err(failure)) => Err(of_failure(failure)),
        Err(lost) => Err(generic(format!("a worker thread has ended: {lost}"))),
    }
}

/// What is common to all commands that start a job.
///
/// # Errors
/// If the id can't be.
pub(super) fn job_args(jobs: &Jobs, args: &Options) -> Result<JobArgs, Refusal> {
    Ok(JobArgs {
        id: jobs.check_id(args.text("job-id"))?.to_owned(),
        speed: args.number("speed").unwrap_or(0),
        on_error: on_error(args.text("on-error")),
        auto_finalize: args.flag("auto-finalize").unwrap_or(true),
        auto_dismiss: args.flag("auto-dismiss").unwrap_or(true),
        kept: None,
    })
}

/// The speed that is asked for, in bytes per second.
///
/// # Errors
/// If it is negative.
pub(in crate::daemon) fn speed(args: &Options) -> Result<u64, Refusal> {
    match args.get("speed").and_then(serde_json::Value::as_i64) {
        Some(speed) if speed < 0 => Err(generic("Parameter 'speed' expects a non-negative value")),
        _ => Ok(args.number("speed").unwrap_or(0)),
    }
}

/// The node in the chain under `top` at which the stream ends: it remains. None if nothing does.
fn end(graph: &Graph, top: &Rc<GraphNode>, args: &Options) -> Result<Option<Rc<GraphNode>>, Refusal> {
    if let Some(name) = args.text("base") {
        let found = graph.names().find_backing(top, name);
        return found.map(Some).ok_or_else(|| generic(format!("Can't find '{name}' in the backing chain")));
    }
    if let Some(name) = args.text("base-node") {
        let base = Graph::behind_shadow(graph.device_or_node("", name)?);
        if Rc::ptr_eq(&base, top) || !Graph::is_in_chain(top, &base) {
            return Err(generic(format!("Node '{name}' is not a backing image of '{}'", top.name)));
        }
        if Rc::ptr_eq(&base.skip_filters(), &top.skip_filters()) {
            // Between them are only filters: there is no link that could lead to it.
            return Err(generic(format!("'{name}' is not in the backing chain of '{}'", top.name)));
        }
        return Ok(Some(base));
    }
    if let Some(name) = args.text("bottom") {
        let bottom = graph.device_or_node("", name)?;
        if bottom.is_filter() {
            return Err(generic(format!("Node '{name}' is a filter, use a non-filter node as 'bottom'")));
        }
        if !Graph::is_in_chain(top, &bottom) {
            return Err(generic(format!("Node '{name}' is not in a chain starting from '{}'", top.name)));
        }
        return Ok(bottom.below());
    }
    Ok(None)
}

/// Makes `base` the backing of `over`, in its header, in memory and in the books.
///
/// # Errors
/// Those of the storage; then all is as it was.
pub(in crate::daemon) async fn relink(
    graph: &Rc<Graph>,
    over: &Rc<GraphNode>,
    base: Option<&Rc<GraphNode>>,
    name: Option<&str>,
    mask: bool,
) -> headwater_block::Result<()> {
    let image = base.map(|base| base.skip_filters());
    let recorded = image.as_ref().map(|image| link_name(graph, over, image, name));
    let format = image.as_ref().map(|image| recorded_format(image, mask));
    let link = recorded.as_ref().zip(format).map(|(name, format)| BackingLink { name, format });
    if over.child(Role::Backing).is_none() && base.is_none() {
        // It stood alone before, and some formats know nothing else.
        return Ok(());
    }
    over.disk.change_backing(link, base.map(|base| base.top())).await?;
    over.inside.borrow_mut().followed = None;
    graph.set_backing(over, base).await.map_err(|refusal| Error::new(ErrorKind::Io, refusal.desc))?;
    // The layers that were dropped may be closed when the job is over.
    graph.let_requests_pass().await;
    Ok(())
}

/// What the header of `over` will call its backing `image`, unless the user gave it a name.
pub(super) fn link_name(
    graph: &Graph,
    over: &GraphNode,
    image: &Rc<GraphNode>,
    given: Option<&str>,
) -> String {
    given.map_or_else(
        || recorded_name(&over.filename(), &graph.names_for_headers().told(image)),
        str::to_owned,
    )
}

/// What a header calls the format of a node. A protocol without a format on it is raw, if the user wants it to be called so.
pub(in crate::daemon) fn recorded_format(image: &GraphNode, mask: bool) -> &'static str {
    let protocol = image.child(Role::File).is_none();
    if protocol && mask { "raw" } else { image.driver }
}

/// What the header of the image at `over` calls the file `name`: names are read from the image's directory.
pub(in crate::daemon) fn recorded_name(over: &str, name: &str) -> String {
    if name.starts_with('/') || has_protocol(name) {
        return name.to_owned();
    }
    let directory = |path: &str| {
        let parent = Path::new(path).parent().filter(|parent| !parent.as_os_str().is_empty());
        parent.unwrap_or(Path::new(".")).to_owned()
    };
    if directory(over) == directory(name) {
        return Path::new(name)
            .file_name()
            .map_or_else(|| name.to_owned(), |name| name.to_string_lossy().into_owned());
    }
    std::fs::canonicalize(name).map_or_else(|_| name.to_owned(), |path| path.to_string_lossy().into_owned())
}
