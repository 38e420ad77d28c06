//! Fleecing: the filter copy-before-write, which saves to another node what guests are about to change, and the node snapshot-access, which shows what was there when the
//! filter was made.
//!
//! The older way is a backup with sync mode `none` into an overlay of the disk itself: the overlay shows the moment as long as the job runs. What is read of the
//! disk through it must be read under the disk's lock, and not while the overlay's is held; so its own disk shows the moment meanwhile, and the job writes to
//! its image through another, which nobody else has.
//!
//! The moment belongs to the disk below all filters, which keeps it for as long as the filter is there; so the filter's link to what is below it stays as it is.

use super::failure::{Refusal, generic, of_error};
use super::filters::edge_of;
use super::graph::open::{Built, Read, filter_link};
use super::graph::{Graph, GraphNode, Inside, Link, Role, Settings};
use super::jobs::backup::{check_granule, leads_to};
use headwater_block::copy_before_write::{OnUnsaved, Policy};
use headwater_block::filter::{CopyBeforeWriteNode, SnapshotAccessNode};
use headwater_block::{Disk, Node, PointInTime};
use std::rc::Rc;
use std::time::Duration;

/// Opens a copy-before-write filter, the node that it is on, and the one that it saves to.
///
/// # Errors
/// Those of the nodes below, and nodes that don't go together.
pub(super) async fn open_filter(
    graph: &Rc<Graph>,
    settings: &mut Settings,
    level: u32,
) -> Result<Built, Refusal> {
    let child = graph.need_child(settings, "file", Role::Filtered, level).await?;
    let target = graph.need_child(settings, "target", Role::Target, level).await?;
    let options = &settings.options;
    if let Some(bitmap) = options.object("bitmap") {
        let name = bitmap.text("name").unwrap_or_default();
        graph.any(bitmap.text("node").unwrap_or_default())?;
        return Err(generic(format!("Dirty bitmap '{name}' not found")));
    }
    let source = child.skip_filters();
    if Rc::ptr_eq(&source, &target.skip_filters()) {
        return Err(generic("Source and target cannot be the same"));
    }
    if leads_to(&target, &child) {
        return Err(generic(format!(
            "'{}' stands on '{}', which is read through it while it is changed; give a target without that backing, and read both through a \
             snapshot-access node",
            target.name, child.name
        )));
    }
    target.check_idle()?;
    if source.disk.size() != target.disk.size() {
        return Err(generic("Source and target image have different sizes"));
    }
    if target.is_read_only() {
        return Err(generic("Block node is read-only"));
    }
    let granule = check_granule(options, &target)
        .map_err(|err| generic(format!("Cannot create block-copy-state: {}", err.desc)))?;
    settings.read_only = child.is_read_only();
    let timeout = options.number("cbw-timeout").filter(|seconds| *seconds > 0).map(Duration::from_secs);
    let on_unsaved = match options.text("on-cbw-error") {
        Some("break-snapshot") => OnUnsaved::BreakCopy,
        _ => OnUnsaved::RefuseChange,
    };
    let point = source.disk.begin_point_in_time(&target.disk, granule, None).await;
    point.set_policy(Policy { on_unsaved, timeout, ..Policy::default() });
    let filename = child.filename();
    let link = filter_link("file", Role::Filtered, child);
    let node = CopyBeforeWriteNode::new(edge_of(&link)?, point.clone());
    let saved = Link { name: "target", role: Role::Target, to: target, edge: None };
    let inside = Inside { point: Some(point), ..Inside::default() };
    Ok(Built { inside, ..Built::new(node, vec![link, saved], filename) })
}

/// Opens a node that shows what a copy-before-write filter keeps.
///
/// # Errors
/// If it isn't on such a filter.
pub(super) async fn open_access(
    graph: &Rc<Graph>,
    settings: &mut Settings,
    level: u32,
) -> Result<Built, Refusal> {
    let filter = graph.need_child(settings, "file", Role::Moment, level).await?;
    let Some(point) = filter.inside.borrow().point.clone() else {
        return Err(generic(format!(
            "Node '{}' keeps nothing that could be shown: snapshot-access goes on a copy-before-write node",
            filter.name
        )));
    };
    settings.read_only = true;
    let filename = filter.filename();
    let link = Link { name: "file", role: Role::Moment, to: filter, edge: None };
    Ok(Built::new(SnapshotAccessNode::new(point), vec![link], filename))
}

/// Begins a moment of `source` that is saved to the image `overlay`, which has been [parted](Graph::part_from_backing) from it, and lets that show it.
///
/// # Errors
/// If it is no image.
pub(super) async fn begin_in_overlay(
    source: &Rc<Disk>,
    overlay: &Rc<GraphNode>,
    granule: u64,
) -> Result<Rc<PointInTime>, Refusal> {
    let image = overlay.inside.borrow().image.clone();
    let image = image.ok_or_else(|| generic(format!("Node '{}' is no image", overlay.name)))?;
    // Nobody reads it between the one and the other.
    let drained = overlay.disk.drain().await;
    image.set_backing(None).map_err(|err| of_error(&err))?;
    let saved_to = Disk::new(image, overlay.disk.clock().clone(), overlay.disk.options());
    let point = source.begin_point_in_time(&saved_to, granule, None).await;
    overlay.disk.replace_top(&drained, SnapshotAccessNode::new(point.clone()));
    overlay.inside.borrow_mut().point = Some(point.clone());
    Ok(point)
}

impl Graph {
    /// Keeps `overlay` on what it stands on, in the books, but lets that be written: a moment of it is about to be shown instead.
    ///
    /// # Errors
    /// If somebody is in the way; then nothing has changed.
    pub(super) async fn part_from_backing(&self, overlay: &Rc<GraphNode>) -> Result<(), Refusal> {
        overlay.change_role(Role::Backing, Role::Moment);
        let settled = self.settle_rights().await;
        if settled.is_err() {
            overlay.change_role(Role::Moment, Role::Backing);
            self.settle_rights().await?;
        }
        settled
    }

    /// The moment is over: `overlay` is what its image is again. As long as somebody reads it and somebody else writes to what it stands on, that would be a mixture
    /// of old and new; then it stays as it is, and reading it fails.
    pub(super) async fn back_to_backing(&self, overlay: &Rc<GraphNode>) {
        let point = overlay.inside.borrow().point.clone();
        if let Some(point) = point {
            // The image is written through one disk at a time.
            point.end().await;
        }
        overlay.change_role(Role::Moment, Role::Backing);
        if let Err(refusal) = self.settle_rights().await {
            overlay.change_role(Role::Backing, Role::Moment);
            // Weaker rights are never refused.
            let _ = self.settle_rights().await;
            tracing::warn!(node = overlay.name, "shows nothing until it is removed: {}", refusal.desc);
            return;
        }
        let (image, backing) = (overlay.inside.borrow().image.clone(), overlay.child(Role::Backing));
        let (Some(image), Some(backing)) = (image, backing) else { return };
        let drained = overlay.disk.drain().await;
        if let Err(err) = image.set_backing(Some(backing.top())) {
            tracing::error!(node = overlay.name, "is not put on '{}' again: {err}", backing.name);
            return;
        }
        overlay.disk.replace_top(&drained, image);
        overlay.inside.borrow_mut().point = None;
    }
}
