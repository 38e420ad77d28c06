//! `drive-backup` and `drive-mirror`: as `blockdev-backup` and `blockdev-mirror`, into a file that they make and open themselves.
//!
//! Names are the operator's here: a path, or the address of an NBD export (also in QEMU's old spelling, `nbd:HOST:PORT:exportname=NAME`). What the target stands on
//! follows from `sync`. A new image with `top` stands on the source's own backing node, whatever its name; an image that exists, on what its header
//! names, if that may be opened. With `none` it stands on the source, but in its header only, until a mirror has taken the source's place: a node that
//! guests write to can't be a backing. Until then nobody else may use it.

use super::hold::AsDisk;
use super::mirror::Target;
use super::{Jobs, Plan, backup, mirror};
use crate::daemon::commands::Turn;
use crate::daemon::failure::{Refusal, generic, of_error};
use crate::daemon::graph::open::{Options, Read};
use crate::daemon::graph::rights::Doing;
use crate::daemon::graph::{Graph, GraphNode, Role, header};
use crate::daemon::new_image;
use headwater_block::{BufferMut, DiskOptions};
use headwater_image::open_gate::Location;
use headwater_image::probe::{self, Format};
use headwater_job::Group;
use serde_json::{Value, json};
use std::path::Path;
use std::rc::Rc;

/// What a target is opened on.
enum Backing {
    /// What its header names.
    OfHeader,
    Nothing,
    Node(Rc<GraphNode>),
}

/// Plans a backup job as the arguments of `drive-backup` say; see [`backup::plan`].
///
/// # Errors
/// If the target can't be made or opened, and those of [`backup::plan`].
pub(in crate::daemon) async fn plan_backup(
    graph: &Rc<Graph>,
    jobs: &Rc<Jobs>,
    args: &Options,
    group: Option<&Rc<Group>>,
) -> Result<Plan, Refusal> {
    let source = graph.any(args.text("device").unwrap_or_default())?;
    source.check_may_be_backed_up()?;
    // Before a file that is there is made empty.
    backup::check_bitmap(args)?;
    backup::forgets(args, &source)?;
    let is_made = args.text("mode") != Some("existing");
    if is_made && args.flag("compress") == Some(true) && format_of(args, &source) != "qcow2" {
        return Err(backup::no_compression(args.text("target").unwrap_or_default()));
    }
    let mut args = args.clone();
    let lower = full_without_lower(&source, &mut args);
    let none = args.text("sync") == Some("none");
    let existing = args.text("mode") == Some("existing");
    make(graph, &source, &args, lower.as_ref()).await?;
    let backing = match lower {
        _ if none => Backing::Nothing,
        Some(lower) if args.text("sync") == Some("top") && !existing => Backing::Node(lower),
        _ => Backing::OfHeader,
    };
    let more = json!({"discard": "unmap", "detect-zeroes": "unmap"});
    let target = open(graph, &source, &args, backing, more).await?;
    let bears = if none { Doing::NOTHING } else { Doing::READ };
    let planned = backup::plan_between(graph, jobs, &args, source, (target, bears), group).await;
    if planned.is_err() {
        graph.collect().await;
    }
    planned
}

/// Starts a mirror job as the arguments of `drive-mirror` say; see [`mirror::start`].
///
/// # Errors
/// If the target can't be made or opened, and those of [`mirror::start`].
pub(in crate::daemon) async fn start_mirror(
    graph: &Rc<Graph>,
    jobs: &Rc<Jobs>,
    turn: &Rc<Turn>,
    args: &Options,
) -> Result<(), Refusal> {
    let source = graph.any(args.text("device").unwrap_or_default())?;
    source.check_idle()?;
    // Before a file that is there is made empty.
    mirror::check_arguments(args)?;
    let mut args = args.clone();
    let lower = full_without_lower(&source, &mut args);
    if args.contains_key("replaces") && !args.contains_key("node-name") {
        return Err(generic("a node-name must be provided when replacing a named node of the graph"));
    }
    make(graph, &source, &args, lower.as_ref()).await?;
    let existing = args.text("mode") == Some("existing");
    let mut as_disk = AsDisk::default();
    let backing = match (args.text("sync"), lower) {
        (Some("none"), _) => {
            as_disk.stands_on_source = true;
            Backing::Nothing
        }
        (Some("top"), Some(lower)) if !existing => Backing::Node(lower),
        _ => Backing::OfHeader,
    };
    let ignores = source.disk.options().ignore_discards;
    let more = json!({"discard": if ignores { "ignore" } else { "unmap" }});
    let node = open(graph, &source, &args, backing, more).await?;
    if as_disk.stands_on_source && !names_as_backing(&node, &source) {
        let target = node.filename();
        drop(node);
        graph.collect().await;
        return Err(generic(format!(
            "{target}: its header doesn't name {} as backing file, as sync 'none' needs: what isn't copied would be missing later",
            source.filename()
        )));
    }
    if args.flag("unmap") == Some(false) {
        // While it is copied to.
        node.disk.set_options(DiskOptions { ignore_discards: true, ..node.disk.options() });
        as_disk.ignores_discards = Some(ignores);
    }
    let begun = mirror::begin(graph, jobs, turn, &args, source, Target { node, as_disk }).await;
    if begun.is_err() {
        graph.collect().await;
    }
    begun
}

/// What is to stand below a new target, if anything. Without a backing, `top` is everything.
fn full_without_lower(source: &Rc<GraphNode>, args: &mut Options) -> Option<Rc<GraphNode>> {
    let lower = source.skip_filters().child(Role::Backing);
    match args.text("sync") {
        Some("top") if lower.is_none() => {
            args.insert("sync".into(), "full".into());
            None
        }
        Some("top") => lower,
        Some("none") => Some(source.clone()),
        _ => None,
    }
}

/// The format of a new target.
fn format_of<'a>(args: &'a Options, source: &GraphNode) -> &'a str {
    args.text("format").unwrap_or(source.driver)
}

/// Makes the target's image, unless it is said to exist.
async fn make(
    graph: &Rc<Graph>,
    source: &GraphNode,
    args: &Options,
    backing: Option<&Rc<GraphNode>>,
) -> Result<(), Refusal> {
    if args.text("mode") == Some("existing") {
        return Ok(());
    }
    let name = args.text("target").unwrap_or_default();
    let format = format_of(args, source);
    match location(name) {
        Location::Path(path) => {
            new_image::make(graph, &path.to_string_lossy(), format, source.disk.size(), backing).await
        }
        Location::Uri(_) => Err(generic(format!(
            "{name}: only files are made here; give an image that is there with mode 'existing'"
        ))),
    }
}

/// Opens the target. It is there for as long as somebody uses it.
async fn open(
    graph: &Rc<Graph>,
    source: &GraphNode,
    args: &Options,
    backing: Backing,
    more: Value,
) -> Result<Rc<GraphNode>, Refusal> {
    let opened = open_layers(graph, source, args, backing, more).await;
    if opened.is_err() {
        graph.collect().await;
    }
    opened
}

async fn open_layers(
    graph: &Rc<Graph>,
    source: &GraphNode,
    args: &Options,
    backing: Backing,
    more: Value,
) -> Result<Rc<GraphNode>, Refusal> {
    let (direct, no_flush) = {
        let settings = source.settings.borrow();
        (settings.direct, settings.no_flush)
    };
    let cache = json!({"direct": direct, "no-flush": no_flush});
    let mut below = file_options(args.text("target").unwrap_or_default())?;
    below.insert("cache".into(), cache.clone());
    let protocol = below.text("driver").unwrap_or_default().to_owned();
    let mut options = Options::new();
    if let Value::Object(more) = more {
        options.extend(more);
    }
    if let Some(name) = args.text("node-name") {
        options.insert("node-name".into(), name.into());
    }
    let existing = args.text("mode") == Some("existing");
    let format = args.text("format").or((!existing).then_some(source.driver));
    if format == Some(protocol.as_str()) {
        below.extend(options);
        return graph.add(below, false).await;
    }
    let file = graph.add(below, false).await?;
    let format = match format {
        Some(format) => format.to_owned(),
        None => probe(&file).await?.to_string(),
    };
    options.insert("driver".into(), format.into());
    options.insert("cache".into(), cache);
    options.insert("file".into(), file.name.as_str().into());
    match backing {
        _ if options.text("driver") != Some("qcow2") => {}
        Backing::OfHeader => {}
        Backing::Nothing => drop(options.insert("backing".into(), Value::Null)),
        Backing::Node(node) => drop(options.insert("backing".into(), node.name.as_str().into())),
    }
    graph.add(options, false).await
}

/// True if the header of `over` says that it stands on the image `under`.
fn names_as_backing(over: &GraphNode, under: &Rc<GraphNode>) -> bool {
    let image = over.inside.borrow().image.clone();
    let Some(name) = image.and_then(|image| image.header().backing_name.clone()) else { return false };
    let over_name = over.filename();
    let directory = Path::new(&over_name).parent().unwrap_or(Path::new(""));
    let (named, there) = (directory.join(name), under.skip_filters().filename());
    match (std::fs::canonicalize(&named), std::fs::canonicalize(&there)) {
        (Ok(named), Ok(there)) => named == there,
        _ => named.to_string_lossy() == there,
    }
}

/// The format of an image that exists: what it looks like.
async fn probe(file: &GraphNode) -> Result<Format, Refusal> {
    let size = file.disk.size().min(probe::PROBE_LEN as u64);
    let len = usize::try_from(size).unwrap_or(probe::PROBE_LEN);
    let head = file.top().read(0, BufferMut::new(len)).await.map_err(|err| of_error(&err))?;
    probe::probe(&head, &file.filename()).map_err(|err| of_error(&err))
}

/// Where a name leads.
pub(in crate::daemon) fn location(name: &str) -> Location {
    match name.strip_prefix("file:") {
        Some(path) if !path.starts_with("//") => Location::Path(path.into()),
        _ if name.starts_with("nbd:") || name.starts_with("blkdebug:") => Location::Uri(name.to_owned()),
        _ => Location::of_operator(name),
    }
}

/// How to open it.
///
/// # Errors
/// If it is an address of a kind that isn't known.
pub(in crate::daemon) fn file_options(name: &str) -> Result<Options, Refusal> {
    if let Some((config, image)) = name.strip_prefix("blkdebug:").and_then(|rest| rest.split_once(':')) {
        let mut options = Options::new();
        options.insert("driver".into(), "blkdebug".into());
        if !config.is_empty() {
            options.insert("config".into(), config.into());
        }
        options.insert("image".into(), file_options(image)?.into());
        return Ok(options);
    }
    match old_nbd_options(name) {
        Some(options) => Ok(options),
        None => header::file_options(&location(name)),
    }
}

/// `nbd:HOST:PORT` or `nbd:unix:PATH`, with `:exportname=NAME` or without.
fn old_nbd_options(name: &str) -> Option<Options> {
    let rest = name.strip_prefix("nbd:").filter(|rest| !rest.starts_with("//"))?;
    let (address, export) = rest.split_once(":exportname=").unwrap_or((rest, ""));
    let server = match address.strip_prefix("unix:") {
        Some(path) => json!({"type": "unix", "path": path}),
        None => {
            let (host, port) = address.rsplit_once(':')?;
            json!({"type": "inet", "host": host, "port": port})
        }
    };
    let mut options = Options::new();
    options.insert("driver".into(), "nbd".into());
    options.insert("server".into(), server);
    options.insert("export".into(), export.into());
    Some(options)
}
