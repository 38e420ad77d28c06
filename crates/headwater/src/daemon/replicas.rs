//! Several sources of one image, and what they must hold, from options: the drivers `replicas` and `verify`.
//!
//! Both stand below a format, and neither is a filter that a job may pass by: what is under them is one of several, or not checked.

use super::failure::{Refusal, cannot_open, generic, of_error};
use super::graph::open::{Built, Read, filter_link};
use super::graph::{Graph, Link, Role, Settings};
use crate::mirrors::read_manifest;
use headwater_block::filter::replicas::{Candidate, MOST_REPLICAS, ReplicasOptions};
use headwater_block::filter::verify::Verification;
use headwater_block::filter::{ReplicasNode, VerifyNode};
use headwater_block::{Edge, LocalFuture, Result as BlockResult, TokioClock};
use serde_json::Value;
use std::path::Path;
use std::rc::Rc;
use std::time::Duration;

/// What the children are called, by their places in the list.
const CHILDREN: [&str; MOST_REPLICAS] = [
    "children.0",
    "children.1",
    "children.2",
    "children.3",
    "children.4",
    "children.5",
    "children.6",
    "children.7",
    "children.8",
    "children.9",
    "children.10",
    "children.11",
    "children.12",
    "children.13",
    "children.14",
    "children.15",
];

/// Opens one of the two and what it is on.
///
/// # Errors
/// Those of the nodes below, a manifest that is no use, and children that don't go together.
pub(super) async fn open(
    graph: &Rc<Graph>,
    driver: &str,
    settings: &mut Settings,
    level: u32,
) -> Result<Built, Refusal> {
    if !settings.read_only && !settings.auto_read_only && settings.options.contains_key("read-only") {
        return Err(generic(format!("A node of driver '{driver}' can only be read")));
    }
    // Their children are opened for reading, too.
    settings.read_only = true;
    match driver {
        "verify" => verify(graph, settings, level).await,
        _ => replicas(graph, settings, level).await,
    }
}

fn edge_of(link: &Link) -> Result<Rc<Edge>, Refusal> {
    link.edge.clone().ok_or_else(|| generic("a filter needs an edge"))
}

async fn verify(graph: &Rc<Graph>, settings: &Settings, level: u32) -> Result<Built, Refusal> {
    let path = settings.options.text("manifest").unwrap_or_default().to_owned();
    let manifest = read_manifest(Path::new(&path)).map_err(|err| cannot_open(&path, &err))?;
    let child = graph.need_child(settings, "file", Role::Compared, level).await?;
    let filename = child.filename();
    let link = filter_link("file", Role::Compared, child);
    let node = VerifyNode::new(edge_of(&link)?, Verification::new(manifest)).map_err(|err| of_error(&err))?;
    Ok(Built::new(node, vec![link], filename))
}

async fn replicas(graph: &Rc<Graph>, settings: &Settings, level: u32) -> Result<Built, Refusal> {
    let references = settings.options.get("children").and_then(Value::as_array).cloned().unwrap_or_default();
    if references.is_empty() || references.len() > CHILDREN.len() {
        return Err(generic(format!("'children' needs 1 to {} nodes", CHILDREN.len())));
    }
    let mut links = Vec::new();
    for (name, reference) in CHILDREN.into_iter().zip(&references) {
        let child = graph.open_reference(settings, reference, Role::Compared, level).await?;
        let child =
            child.ok_or_else(|| generic(format!("A block device must be specified for \"{name}\"")))?;
        links.push(filter_link(name, Role::Compared, child));
    }
    let mut candidates = Vec::new();
    for link in &links {
        let edge = edge_of(link)?;
        let reach = Box::new(move || -> LocalFuture<'static, BlockResult<Rc<Edge>>> {
            let edge = edge.clone();
            Box::pin(async move { Ok(edge) })
        });
        candidates.push(Candidate { name: link.to.filename(), reach });
    }
    let retry = Duration::from_secs(settings.options.number("retry").unwrap_or(0));
    let clock = Rc::new(TokioClock::new());
    let node = ReplicasNode::open(candidates, clock, ReplicasOptions { retry }).await;
    let node = node.map_err(|err| of_error(&err))?;
    tokio::task::spawn_local(ReplicasNode::attend(Rc::downgrade(&node)));
    Ok(Built::new(node, links, settings.options.text("node-name").unwrap_or("replicas").to_owned()))
}
