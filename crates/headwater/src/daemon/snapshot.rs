//! Snapshots: an overlay takes the place of a node, and stands on it. Alone, or in a [`super::transaction`].
//!
//! Nobody sees a half of it: all who use the nodes are held back until everything is done, or undone.

use super::failure::{Refusal, generic, of_error};
use super::graph::open::{Options, Read};
use super::graph::rights::Doing;
use super::graph::{Graph, GraphNode, Role};
use super::new_image;
use headwater_block::node::BackingLink;
use serde_json::{Value, json};
use std::rc::Rc;

/// What was done, so that it can be undone.
pub(super) struct Done {
    node: Rc<GraphNode>,
    overlay: Rc<GraphNode>,
    /// The overlay was opened for this, and a file made for it.
    made: bool,
    file: Option<String>,
    was_writable: bool,
}

/// One snapshot.
///
/// # Errors
/// If it can't be taken; then nothing has changed.
pub(super) async fn single(graph: &Rc<Graph>, name: &str, args: &Options) -> Result<(), Refusal> {
    let mut done = Vec::new();
    let taken = take(graph, name, args, &mut done).await;
    finish(graph, taken, done).await
}

/// Undoes what was done if something failed.
///
/// # Errors
/// What failed.
pub(super) async fn finish(
    graph: &Rc<Graph>,
    taken: Result<(), Refusal>,
    done: Vec<Done>,
) -> Result<(), Refusal> {
    if taken.is_ok() {
        for one in &done {
            // What lies below an overlay isn't written; that it can't be is a safety, not a need.
            if let Err(refusal) = graph.make_writable(&one.node, false).await {
                tracing::warn!(node = one.node.name, "stays open for writing: {}", refusal.desc);
            }
        }
        graph.collect().await;
        return taken;
    }
    for one in done.into_iter().rev() {
        let undo = async {
            graph.replace(&one.overlay, &one.node).await?;
            graph.set_backing(&one.overlay, None).await?;
            if one.was_writable {
                graph.make_writable(&one.node, true).await?;
            }
            Ok::<_, Refusal>(())
        };
        if let Err(refusal) = undo.await {
            tracing::error!(node = one.node.name, "a snapshot could not be undone: {}", refusal.desc);
            continue;
        }
        if one.made {
            one.overlay.owned.set(false);
        }
        graph.collect().await;
        if let Some(file) = one.file {
            // Ours, made for this.
            let _ = std::fs::remove_file(file);
        }
    }
    graph.collect().await;
    taken
}

/// Takes a snapshot as the arguments of the command `kind` say, and adds it to what was done. The caller finishes.
///
/// # Errors
/// If it can't be taken.
pub(super) async fn take(
    graph: &Rc<Graph>,
    kind: &str,
    args: &Options,
    done: &mut Vec<Done>,
) -> Result<(), Refusal> {
    let text = |key: &str| args.text(key).unwrap_or_default();
    let sync = kind == "blockdev-snapshot-sync";
    let node = if sync {
        graph.device_or_node(text("device"), text("node-name"))?
    } else {
        graph.any(text("node"))?
    };
    node.check_idle()?;
    graph.check_not_backing(&node)?;
    let mut file = None;
    let overlay = if sync {
        if args.contains_key("node-name") && !args.contains_key("snapshot-node-name") {
            return Err(generic("New overlay node-name missing"));
        }
        if graph.find(text("snapshot-node-name")).is_some() {
            return Err(generic("New overlay node-name already in use"));
        }
        let existing = args.text("mode") == Some("existing");
        if !existing {
            let (filename, format) = (text("snapshot-file"), args.text("format").unwrap_or("qcow2"));
            new_image::make(graph, filename, format, node.disk.size(), Some(&node)).await?;
            file = Some(filename.to_owned());
        }
        let opened = open_overlay(graph, args).await;
        if opened.is_err()
            && let Some(file) = &file
        {
            let _ = std::fs::remove_file(file);
        }
        opened?
    } else {
        graph.any(text("overlay"))?
    };
    if !node.active.get() && overlay.active.get() && !graph.is_used(&overlay) {
        // Whoever prepared the overlay need not have known that the disk is inactive.
        graph.inactivate(&overlay).await?;
    }
    let checked = check(graph, &node, &overlay);
    let was_writable = !node.is_read_only();
    let linked = match checked {
        Ok(()) => {
            async {
                // What comes after the flush comes to the overlay, whose own flushes don't reach what is below it.
                let _held = graph.hold_users(&node).await;
                node.disk.flush().await.map_err(|err| of_error(&err))?;
                graph.set_backing(&overlay, Some(&node)).await?;
                if let Err(refusal) = graph.replace(&node, &overlay).await {
                    graph.set_backing(&overlay, None).await?;
                    return Err(refusal);
                }
                Ok(())
            }
            .await
        }
        Err(refusal) => Err(refusal),
    };
    match linked {
        Ok(()) => {
            done.push(Done { node, overlay, made: sync, file, was_writable });
            Ok(())
        }
        Err(refusal) => {
            if sync {
                overlay.owned.set(false);
                graph.collect().await;
            }
            if let Some(file) = file {
                let _ = std::fs::remove_file(file);
            }
            Err(refusal)
        }
    }
}

fn check(graph: &Graph, node: &Rc<GraphNode>, overlay: &Rc<GraphNode>) -> Result<(), Refusal> {
    if overlay.child(Role::Backing).is_some() {
        return Err(generic("The overlay already has a backing image"));
    }
    if overlay.driver != "qcow2" {
        return Err(generic("The overlay does not support backing images"));
    }
    // A job may write to it, which doesn't mind what is below.
    if graph.together(overlay).does.has(Doing::READ) || !graph.parents(overlay).is_empty() {
        return Err(generic("The overlay is already in use"));
    }
    if Rc::ptr_eq(node, overlay) || Graph::is_in_chain(node, overlay) {
        return Err(generic(format!(
            "Making '{}' a backing child of '{}' would create a cycle",
            node.name, overlay.name
        )));
    }
    Ok(())
}

async fn open_overlay(graph: &Rc<Graph>, args: &Options) -> Result<Rc<GraphNode>, Refusal> {
    let mut options = json!({
        "driver": args.text("format").unwrap_or("qcow2"),
        "backing": null,
        "file": {"driver": "file", "filename": args.text("snapshot-file")},
    });
    if let (Value::Object(options), Some(name)) = (&mut options, args.text("snapshot-node-name")) {
        options.insert("node-name".into(), name.into());
    }
    match options {
        // It stays for as long as somebody uses it.
        Value::Object(options) => graph.add(options, false).await,
        _ => Err(generic("no options")),
    }
}

/// `change-backing-file`: another name for the backing file in an image's header; the node stays.
///
/// # Errors
/// If there is no such image below the device, or it can't be written.
pub(super) async fn change_backing_file(graph: &Rc<Graph>, args: &Options) -> Result<(), Refusal> {
    let text = |key: &str| args.text(key).unwrap_or_default();
    let device = graph.any(text("device"))?;
    let image = graph
        .node(text("image-node-name"))
        .map_err(|_| generic(format!("Cannot find device='' nor node-name='{}'", text("image-node-name"))))?;
    if !Graph::is_in_chain(&device, &image) {
        return Err(generic(format!("'{}' and image file are not in the same chain", text("device"))));
    }
    let Some(backing) = image.child(Role::Backing) else {
        return Err(generic("not allowing backing file change on an image without a backing file"));
    };
    image.check_idle()?;
    let changed = graph.make_writable(&image, true).await?;
    let link = BackingLink { name: text("backing-file"), format: backing.skip_filters().driver };
    let written =
        image.disk.change_backing(Some(link), Some(backing.top())).await.map_err(|err| of_error(&err));
    if written.is_ok() {
        image.inside.borrow_mut().followed = None;
    }
    if changed {
        graph.make_writable(&image, false).await?;
    }
    written
}
