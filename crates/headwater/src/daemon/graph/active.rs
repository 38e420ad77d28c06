//! Inactive nodes: images that are left to another process for a while, as when a virtual machine moves to another host.
//!
//! An inactive node can be read, and nobody writes to it here; what stands on it is inactive too. What was held in memory is in the file before
//! a node becomes inactive, and is read anew when it is active again: somebody else may have written meanwhile.

use super::change::finish;
use super::{Graph, GraphNode, Role};
use crate::daemon::failure::{Refusal, generic};
use headwater_block::{DiskOptions, LocalFuture};
use std::rc::Rc;

impl Graph {
    /// Makes `node` active, and all that it stands on.
    ///
    /// # Errors
    /// If others are in the way, or a file can't be opened or read; then it is as inactive as before.
    pub(in crate::daemon) fn activate(
        self: &Rc<Self>,
        node: &Rc<GraphNode>,
    ) -> LocalFuture<'static, Result<(), Refusal>> {
        let (graph, node) = (self.clone(), node.clone());
        Box::pin(async move {
            for child in node.children() {
                graph.activate(&child).await?;
            }
            if node.active.get() {
                return Ok(());
            }
            node.set_active(true);
            let done = async {
                graph.settle_rights().await?;
                graph.read_anew(&node).await
            }
            .await;
            if let Err(refusal) = done {
                node.set_active(false);
                graph.settle_rights().await?;
                return Err(refusal);
            }
            Ok(())
        })
    }

    /// Makes `node` inactive, and what only it uses.
    ///
    /// # Errors
    /// If what stands on it is active, or somebody writes to it who doesn't give way; and what writing back says.
    pub(in crate::daemon) async fn inactivate(self: &Rc<Self>, node: &Rc<GraphNode>) -> Result<(), Refusal> {
        if self.has_active_parents(node) {
            return Err(generic("Node has active parent node"));
        }
        self.inactivate_down(node).await
    }

    fn inactivate_down(self: &Rc<Self>, node: &Rc<GraphNode>) -> LocalFuture<'static, Result<(), Refusal>> {
        let (graph, node) = (self.clone(), node.clone());
        Box::pin(async move {
            if !node.active.get() || graph.has_active_parents(&node) {
                return Ok(());
            }
            if graph.roots_of(&node).iter().any(|root| root.insists_on_writing()) {
                return Err(generic("Failed to inactivate node: Operation not permitted"));
            }
            let drained = node.disk.drain().await;
            finish(&node).await?;
            node.set_active(false);
            drop(drained);
            graph.settle_rights().await?;
            for child in node.children() {
                graph.inactivate_down(&child).await?;
            }
            Ok(())
        })
    }

    /// Makes all nodes active, or inactive.
    ///
    /// # Errors
    /// Those of the first that can't be.
    pub(in crate::daemon) async fn set_all_active(self: &Rc<Self>, active: bool) -> Result<(), Refusal> {
        for node in self.nodes() {
            if active {
                self.activate(&node).await?;
            } else if !self.has_active_parents(&node) {
                let all = |_| generic("Failed to inactivate all nodes: Operation not permitted");
                self.inactivate_down(&node).await.map_err(all)?;
            }
        }
        Ok(())
    }

    fn has_active_parents(&self, node: &Rc<GraphNode>) -> bool {
        self.parents(node).iter().any(|parent| parent.active.get())
    }

    /// Forgets what is known of the node's contents, and of those of images in it.
    async fn read_anew(self: &Rc<Self>, node: &Rc<GraphNode>) -> Result<(), Refusal> {
        let _held = self.hold_everyone().await;
        // Also the file, which has another size perhaps.
        let lowest = std::iter::successors(Some(node.clone()), |node| node.child(Role::File)).last();
        let mut anew = Vec::new();
        self.with_holders(lowest.as_ref().unwrap_or(node), &mut anew);
        for node in &anew {
            let drained = node.disk.drain().await;
            let settings = node.settings.borrow().clone();
            self.build_again(node, settings, &drained).await?;
        }
        for node in &anew {
            for parent in self.parents(node) {
                self.follow_backing(&parent)?;
            }
        }
        self.settle_rights().await
    }
}

impl GraphNode {
    /// What it stands on.
    fn children(&self) -> Vec<Rc<GraphNode>> {
        let links = self.links.borrow();
        links.iter().filter(|link| link.role != Role::Shadow).map(|link| link.to.clone()).collect()
    }

    fn set_active(&self, active: bool) {
        self.active.set(active);
        let read_only = !active || self.is_read_only();
        self.disk.set_options(DiskOptions { read_only, ..self.disk.options() });
    }
}
