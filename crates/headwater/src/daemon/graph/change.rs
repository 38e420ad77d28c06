//! Changes of the graph: a node takes another's place, an image is opened again in another way, nodes go.

use super::open::{self, Read};
use super::{Graph, GraphNode, Link, Role, Settings};
use crate::daemon::failure::{Refusal, generic, of_error};
use headwater_block::DiskOptions;
use headwater_block::drain::Drained;
use headwater_image::raw::{RawNode, RawOptions};
use std::rc::Rc;

impl Graph {
    /// Lets everything that stands on `from`, but for `to` itself, stand on `to` from now on. Requests that are on their way are waited for, and none
    /// is let in meanwhile, so that none that is meant for one node goes to the other.
    ///
    /// # Errors
    /// If the users of both don't agree; then nothing has changed.
    pub(in crate::daemon) async fn replace(
        &self,
        from: &Rc<GraphNode>,
        to: &Rc<GraphNode>,
    ) -> Result<(), Refusal> {
        let parents: Vec<_> =
            self.parents(from).into_iter().filter(|parent| !Rc::ptr_eq(parent, to)).collect();
        for parent in &parents {
            parent.check_not_frozen()?;
            if parent.links.borrow().iter().any(|link| {
                Rc::ptr_eq(&link.to, from) && matches!(link.role, Role::File | Role::DataFile | Role::Target)
            }) {
                return Err(generic(format!(
                    "Node '{}' is the file of node '{}', which keeps it",
                    from.name, parent.name
                )));
            }
        }
        let roots: Vec<_> = self.roots_of(from).into_iter().filter(|root| root.follows).collect();
        let relink = |one: &Rc<GraphNode>, other: &Rc<GraphNode>| {
            for parent in &parents {
                let mut links = parent.links.borrow_mut();
                // What shows a moment needs the one that keeps it.
                let others = links.iter_mut().filter(|link| link.role != Role::Moment);
                for link in others.filter(|link| Rc::ptr_eq(&link.to, one)) {
                    link.to = other.clone();
                }
            }
            for root in &roots {
                root.node.replace(other.clone());
            }
        };
        relink(from, to);
        if let Err(refusal) = self.settle_rights().await {
            relink(to, from);
            self.settle_rights().await?;
            return Err(refusal);
        }
        let mut edges: Vec<_> = roots.iter().map(|root| root.edge.clone()).collect();
        for parent in &parents {
            let links = parent.links.borrow();
            edges.extend(
                links.iter().filter(|link| Rc::ptr_eq(&link.to, to)).filter_map(|link| link.edge.clone()),
            );
        }
        // All are held before the first leads elsewhere: no two of them may write to both nodes.
        let mut held = Vec::new();
        for edge in &edges {
            held.push(edge.drain().await);
        }
        for (edge, drained) in edges.iter().zip(&held) {
            edge.replace(drained, to.disk.clone());
        }
        for parent in &parents {
            self.follow_backing(parent)?;
        }
        Ok(())
    }

    /// Tells an image which node its backing is now.
    pub(super) fn follow_backing(&self, parent: &Rc<GraphNode>) -> Result<(), Refusal> {
        match parent.child(Role::Backing) {
            Some(backing) => parent.top().set_backing(Some(backing.top())).map_err(|err| of_error(&err)),
            None => Ok(()),
        }
    }

    /// Puts `backing` below `over`, in the books and in the image, not in its header.
    ///
    /// # Errors
    /// If their users don't agree; then nothing has changed.
    pub(in crate::daemon) async fn set_backing(
        &self,
        over: &Rc<GraphNode>,
        backing: Option<&Rc<GraphNode>>,
    ) -> Result<(), Refusal> {
        let old = over.child(Role::Backing);
        let relink = |to: Option<&Rc<GraphNode>>| {
            let mut links = over.links.borrow_mut();
            links.retain(|link| link.role != Role::Backing);
            links.extend(to.map(|to| Link {
                name: "backing",
                role: Role::Backing,
                to: to.clone(),
                edge: None,
            }));
        };
        relink(backing);
        if let Err(refusal) = self.settle_rights().await {
            relink(old.as_ref());
            self.settle_rights().await?;
            return Err(refusal);
        }
        over.top().set_backing(backing.map(|node| node.top())).map_err(|err| of_error(&err))
    }

    /// Removes a node that a command made.
    ///
    /// # Errors
    /// If there is none, or something uses it.
    pub(in crate::daemon) async fn remove(&self, name: &str) -> Result<(), Refusal> {
        let node = self.node(name)?;
        if self.roots_of(&node).iter().any(|root| root.follows) {
            return Err(generic(format!("Node {name} is in use")));
        }
        if node.child(Role::Shadow).is_some() {
            return Err(generic(format!("Node {name} is in use")));
        }
        node.check_idle()?;
        self.check_not_backing(&node)?;
        if !node.owned.get() {
            return Err(generic(format!("Node {name} is not owned by the monitor")));
        }
        if !self.parents(&node).is_empty() {
            return Err(generic(format!("Block device {name} is in use")));
        }
        node.owned.set(false);
        self.collect().await;
        Ok(())
    }

    /// Closes the nodes that nobody needs any more.
    pub(in crate::daemon) async fn collect(&self) {
        loop {
            let unused = self.nodes().into_iter().rev().find(|node| !node.owned.get() && !self.is_used(node));
            let Some(node) = unused else { break };
            self.nodes.borrow_mut().retain(|other| !Rc::ptr_eq(other, &node));
            if let Err(err) = close(&node).await {
                tracing::error!(node = node.name, "closing failed: {err}");
            }
            node.links.borrow_mut().clear();
        }
        // Locks that were needed for those who left are not any more; weaker ones are never refused.
        let _ = self.settle_rights().await;
    }

    /// Storage that is out of reach isn't waited for any more, by whomever: the program ends.
    pub(in crate::daemon) fn stop_waiting(&self) {
        self.objects.ending().abort();
        for node in self.nodes() {
            node.top().stop_waiting();
        }
    }

    /// Writes back what all nodes hold in memory: the end of the program.
    pub(in crate::daemon) async fn close_all(&self) {
        for node in self.nodes() {
            node.owned.set(false);
        }
        self.collect().await;
        if let Some(cache) = &self.sources.cache {
            cache.settle().await;
        }
    }

    /// Lets `node` be written, with the files below it, if it isn't writable yet. True if that changed something.
    ///
    /// # Errors
    /// If a file can't be opened for writing, or somebody is in the way.
    pub(in crate::daemon) async fn make_writable(
        self: &Rc<Self>,
        node: &Rc<GraphNode>,
        writable: bool,
    ) -> Result<bool, Refusal> {
        let node = node.skip_filters();
        if node.is_read_only() != writable {
            return Ok(false);
        }
        let old = node.settings.borrow().clone();
        if writable && is_told_to_be_read_only(&node) {
            return Err(generic("Block node is read-only"));
        }
        let file_settings = goes_along(&node, writable);
        self.open_again(&node, Settings { read_only: !writable, ..old }, file_settings).await?;
        Ok(true)
    }

    /// Opens a node again, as `settings` say, and its file as `file_settings` do, if given. Its requests are held back meanwhile.
    ///
    /// An image holds its file itself, and what it has in memory is written before the file is opened anew: a file that is in use by an image is
    /// opened again only here, with the image. Otherwise the new file would know a size that the image has since made larger.
    ///
    /// # Errors
    /// What opening says. The node is then open as it was, unless even that fails.
    pub(in crate::daemon) async fn open_again(
        self: &Rc<Self>,
        node: &Rc<GraphNode>,
        settings: Settings,
        file_settings: Option<Settings>,
    ) -> Result<(), Refusal> {
        let old = node.settings.borrow().clone();
        let file = held(node).zip(file_settings);
        let file_was = file.as_ref().map(|(file, _)| file.settings.borrow().clone());
        let drained = node.disk.drain().await;
        finish(node).await?;
        let mut file_changed = false;
        let result = async {
            if settings.read_only {
                // It stops writing before its file can't be written any more.
                node.settings.replace(settings.clone());
            }
            if let Some((file, wanted)) = &file {
                let below = goes_along(file, !wanted.read_only).filter(|_| file.is_filter());
                Box::pin(self.open_again(file, wanted.clone(), below)).await?;
                file_changed = true;
            }
            node.settings.replace(settings.clone());
            self.build_again(node, settings.clone(), &drained).await?;
            self.settle_rights().await
        }
        .await;
        if result.is_err() {
            node.settings.replace(old.clone());
            if let (Some((file, _)), Some(was), true) = (&file, file_was, file_changed) {
                let below = goes_along(file, !was.read_only).filter(|_| file.is_filter());
                Box::pin(self.open_again(file, was, below)).await?;
            }
            self.build_again(node, old, &drained).await?;
            self.settle_rights().await?;
        }
        drop(drained);
        // Whatever became of it, what was on top of it before is gone.
        for parent in self.parents(node) {
            self.follow_backing(&parent)?;
        }
        result
    }

    /// Opens a node again whose options were changed, with the image that holds it as its file, if one does.
    pub(super) async fn open_changed(
        self: &Rc<Self>,
        node: &Rc<GraphNode>,
        settings: Settings,
    ) -> Result<(), Refusal> {
        let holds = |parent: &Rc<GraphNode>, of: &Rc<GraphNode>| {
            let links = parent.links.borrow();
            links.iter().find(|link| Rc::ptr_eq(&link.to, of)).map(|link| link.role)
        };
        let is_file = |role: &Role| matches!(role, Role::File | Role::DataFile);
        let users_of = |node: &Rc<GraphNode>| -> Vec<_> {
            let parents = self.parents(node).into_iter();
            parents
                .filter_map(|parent| holds(&parent, node).filter(is_file).map(|role| (parent, role)))
                .collect()
        };
        let users = users_of(node);
        match &users[..] {
            [] => self.open_again(node, settings, None).await,
            [(image, Role::File)] if users_of(image).is_empty() => {
                image.check_idle()?;
                let unchanged = image.settings.borrow().clone();
                self.open_again(image, unchanged, Some(settings)).await
            }
            [(user, _), ..] => Err(generic(format!(
                "Node '{}' is in use by node '{}', which can't be opened again with it",
                node.name, user.name
            ))),
        }
    }

    /// Makes the inside of a node anew. The caller holds its requests back.
    pub(super) async fn build_again(
        self: &Rc<Self>,
        node: &Rc<GraphNode>,
        mut settings: Settings,
        drained: &Drained,
    ) -> Result<(), Refusal> {
        match node.driver {
            "qcow2" => {
                let file = node.child(Role::File).ok_or_else(|| generic("an image needs a file"))?;
                let (backing, data) = (node.child(Role::Backing), node.child(Role::DataFile));
                let image = open::open_image(&settings, &file, backing.as_ref(), data.as_ref()).await?;
                node.disk.replace_top(drained, image.clone());
                node.inside.borrow_mut().image = Some(image);
            }
            "raw" => {
                let file = node.child(Role::File).ok_or_else(|| generic("an image needs a file"))?;
                let options = RawOptions {
                    read_only: settings.read_only,
                    offset: settings.options.number("offset").unwrap_or(0),
                    size: settings.options.number("size"),
                };
                let raw = RawNode::new(file.top(), options).map_err(|err| of_error(&err))?;
                node.disk.replace_top(drained, raw);
            }
            "file" | "host_device" => {
                let built = self.build(&node.name, node.driver, &mut settings, 0).await?;
                if let Some(file) = node.inside.replace(built.inside).file {
                    // The new one asks for locks of its own, which those of the old one would refuse.
                    let _ = file.change_locks(None);
                }
                node.disk.replace_top(drained, built.top);
            }
            _ => {}
        }
        let options = node.disk.options();
        node.disk.set_options(DiskOptions { read_only: settings.read_only || !node.active.get(), ..options });
        node.settings.replace(settings);
        Ok(())
    }
}

/// What holds the bytes of a node: its file, or what a filter is on.
fn held(node: &GraphNode) -> Option<Rc<GraphNode>> {
    node.child(Role::File).or_else(|| node.child(Role::Filtered))
}

/// True if the user asked for what holds the bytes of `node` never to be written.
fn is_told_to_be_read_only(node: &GraphNode) -> bool {
    held(node).is_some_and(|held| {
        held.settings.borrow().options.flag("read-only") == Some(true)
            || held.is_filter() && is_told_to_be_read_only(&held)
    })
}

/// How what holds the bytes of `node` is opened when that becomes writable, or is so no more; none if nothing changes there.
fn goes_along(node: &GraphNode, writable: bool) -> Option<Settings> {
    let held = held(node)?;
    let was = held.settings.borrow().clone();
    // What was opened with the node goes back with it.
    let changes = if writable { was.read_only } else { !held.owned.get() && !was.read_only };
    changes.then_some(Settings { read_only: !writable, ..was })
}

/// Makes what a node holds in memory durable.
pub(super) async fn finish(node: &Rc<GraphNode>) -> Result<(), Refusal> {
    let image = node.inside.borrow().image.clone();
    let top = node.top();
    let done = match image {
        Some(image) => image.finish().await,
        None if top.is_read_only() => Ok(()),
        None => top.flush().await,
    };
    done.map_err(|err| of_error(&err))
}

/// Closes a node that nobody uses. What it stands on is not its own.
async fn close(node: &Rc<GraphNode>) -> Result<(), headwater_block::Error> {
    let _drained = node.disk.drain().await;
    let point = node.inside.borrow().point.clone();
    if let Some(point) = point {
        // Whoever changes the source needs nothing saved any more, and nothing touches the target from here on.
        point.end().await;
    }
    let image = node.inside.borrow().image.clone();
    let top = node.top();
    match image {
        Some(image) => image.finish().await,
        None if node.links.borrow().is_empty() => top.close().await,
        None if top.is_read_only() => Ok(()),
        None => top.flush().await,
    }
}
