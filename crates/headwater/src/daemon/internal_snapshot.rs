//! Internal snapshots: `blockdev-snapshot-internal-sync` and `blockdev-snapshot-delete-internal-sync`.

use super::events::now;
use super::failure::{Refusal, generic, of_error};
use super::graph::open::{Options, Read};
use super::graph::{Graph, GraphNode};
use headwater_image::qcow2::Qcow2Node;
use headwater_image::qcow2::snapshots::{NewSnapshot, SnapshotInfo};
use serde_json::{Value, json};
use std::rc::Rc;
use std::time::Duration;

/// A snapshot that was taken, so that it can be taken back.
pub(super) struct Taken {
    holder: Rc<GraphNode>,
    image: Rc<Qcow2Node>,
    id: String,
}

/// Takes a snapshot as the arguments of `blockdev-snapshot-internal-sync` say.
///
/// # Errors
/// If the device can't have it, or one of that name.
pub(super) async fn take(graph: &Graph, args: &Options) -> Result<Taken, Refusal> {
    let (device, name) = (args.text("device").unwrap_or_default(), args.text("name").unwrap_or_default());
    let holder = find(graph, device)?;
    if holder.is_read_only() {
        return Err(generic(format!("Device '{device}' is read only")));
    }
    let Some(image) = image(&holder) else {
        return Err(generic(format!(
            "Block format '{}' used by device '{device}' does not support internal snapshots",
            holder.driver
        )));
    };
    if name.is_empty() {
        return Err(generic("Name is empty"));
    }
    if listed(&image).await?.iter().any(|one| one.name == name) {
        return Err(generic(format!("Snapshot with name '{name}' already exists on device '{device}'")));
    }
    // No machine runs here that could tell how long it has.
    let new = NewSnapshot { name: name.to_owned(), date: now(), vm_clock: Duration::ZERO };
    let taken = holder.disk.alone(image.take_snapshot(&new)).await.map_err(|err| of_error(&err));
    remember(&holder, &image).await;
    Ok(Taken { id: taken?.id, holder, image })
}

/// Takes a snapshot back, because something else of its transaction failed.
pub(super) async fn undo(taken: Taken) {
    let Taken { holder, image, id } = taken;
    if let Err(err) = holder.disk.alone(image.delete_snapshot(&id)).await {
        tracing::error!(node = holder.name, "a snapshot could not be taken back: {err}");
    }
    remember(&holder, &image).await;
}

/// Deletes a snapshot as the arguments of `blockdev-snapshot-delete-internal-sync` say. Tells what it was.
///
/// # Errors
/// If there is no such snapshot.
pub(super) async fn delete(graph: &Graph, args: &Options) -> Result<Value, Refusal> {
    let device = args.text("device").unwrap_or_default();
    let holder = find(graph, device)?;
    let (id, name) = (args.text("id"), args.text("name"));
    if id.is_none() && name.is_none() {
        return Err(generic("Name or id must be provided"));
    }
    let Some(image) = image(&holder) else {
        return Err(generic("Failed to get a snapshot list: Operation not supported"));
    };
    let meant =
        |one: &SnapshotInfo| id.is_none_or(|id| one.id == id) && name.is_none_or(|name| one.name == name);
    let Some(found) = listed(&image).await?.into_iter().find(meant) else {
        return Err(generic(format!(
            "Snapshot with id '{}' and name '{}' does not exist on device '{device}'",
            id.unwrap_or("null"),
            name.unwrap_or("null")
        )));
    };
    if holder.is_read_only() {
        return Err(generic(format!("Device '{device}' is read only")));
    }
    let gone = holder.disk.alone(image.delete_snapshot(&found.id)).await.map_err(|err| of_error(&err));
    remember(&holder, &image).await;
    Ok(json!(gone?))
}

/// The node below all filters, if nobody but clients uses it.
fn find(graph: &Graph, device: &str) -> Result<Rc<GraphNode>, Refusal> {
    let node = graph.any(device)?;
    if !graph.parents(&node).is_empty() {
        return Err(generic("Need a root block node"));
    }
    let holder = node.skip_filters();
    node.check_idle()?;
    holder.check_idle()?;
    Ok(holder)
}

fn image(holder: &GraphNode) -> Option<Rc<Qcow2Node>> {
    holder.inside.borrow().image.clone()
}

async fn listed(image: &Qcow2Node) -> Result<Vec<SnapshotInfo>, Refusal> {
    image.snapshots().await.map_err(|err| of_error(&err))
}

/// What there is now is what is told of the node.
async fn remember(holder: &GraphNode, image: &Qcow2Node) {
    match image.snapshots().await {
        Ok(snapshots) => holder.inside.borrow_mut().snapshots = snapshots,
        Err(err) => tracing::warn!(node = holder.name, "the internal snapshots can't be listed: {err}"),
    }
}
