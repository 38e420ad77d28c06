//! What jobs need of the graph beyond what commands do to it: a node that stands for a job, guests held back, one node in another's place at a
//! job's end; and the watch for writes past an offset.

use super::rights::{Doing, Rights};
use super::{Busy, Graph, GraphNode, Link, Part, Role, Root, Settings};
use crate::daemon::events::Events;
use crate::daemon::failure::{Refusal, generic};
use headwater_block::drain::Drained;
use headwater_job::Space;
use serde_json::json;
use std::cell::{Cell, RefCell};
use std::rc::Rc;

impl Graph {
    /// Tells of the first write to `node` past `threshold` bytes; 0 is no longer.
    pub(in crate::daemon) fn watch_writes(&self, node: &Rc<GraphNode>, threshold: u64, events: &Rc<Events>) {
        let (events, name) = (events.clone(), node.name.clone());
        let tell = Rc::new(move |by: u64| {
            let data = json!({"node-name": name, "amount-exceeded": by, "write-threshold": threshold});
            events.emit("BLOCK_WRITE_THRESHOLD", data);
        });
        // An image writes to its file directly, everyone else through the disk.
        match &node.inside.borrow().file {
            Some(file) => file.write_watch().set(threshold, tell),
            None => node.disk.write_watch().set(threshold, tell),
        }
    }

    /// The room for what a job writes to the image `node`, if jobs are to leave some.
    pub(in crate::daemon) fn space_of(&self, node: &Rc<GraphNode>) -> Option<Space> {
        let low_water = self.low_water.get();
        if low_water == 0 {
            return None;
        }
        let mut holder = node.clone();
        // The data are in a file of their own, or in the image's.
        while let Some(below) =
            [Role::DataFile, Role::File, Role::Filtered].into_iter().find_map(|role| holder.child(role))
        {
            holder = below;
        }
        let file = holder.inside.borrow().file.clone()?;
        match file.file_system() {
            Ok(system) => {
                let system = system?;
                let free = Rc::new(move || system.free());
                Some(Space { free, low_water, name: holder.filename() })
            }
            Err(err) => {
                tracing::warn!("{err}; the stream doesn't look how much is left");
                None
            }
        }
    }

    /// A node that stands for a job on top of `on`. Requests don't pass it.
    ///
    /// # Errors
    /// If the name can't be had.
    pub(in crate::daemon) fn add_shadow(
        &self,
        name: Option<&str>,
        driver: &'static str,
        on: &Rc<GraphNode>,
    ) -> Result<Rc<GraphNode>, Refusal> {
        if !on.active.get() {
            let above = name.map_or_else(|| self.invent_name(), str::to_owned);
            let child =
                if matches!(driver, "copy-on-read" | "copy-before-write") { "file" } else { "backing" };
            return Err(generic(format!(
                "Inactive '{}' can't be a {child} child of active '{above}'",
                on.name
            )));
        }
        let node = Rc::new(GraphNode {
            name: match name {
                Some(name) => self.check_name(name)?.to_owned(),
                None => self.invent_name(),
            },
            driver,
            disk: on.disk.clone(),
            own_filename: on.filename(),
            links: RefCell::new(vec![Link { name: "file", role: Role::Shadow, to: on.clone(), edge: None }]),
            owned: Cell::new(true),
            settings: RefCell::new(Settings { read_only: on.is_read_only(), ..Settings::default() }),
            inside: RefCell::default(),
            busy: RefCell::default(),
            frozen: RefCell::default(),
            active: Cell::new(true),
        });
        self.enter(&node, None);
        Ok(node)
    }

    /// The layer that is meant by the name of `node`: what it is on, if it stands for a job.
    pub(in crate::daemon) fn behind_shadow(node: Rc<GraphNode>) -> Rc<GraphNode> {
        node.child(Role::Shadow).unwrap_or(node)
    }

    /// The node that a job has put on top of `node`.
    pub(super) fn shadow_on(&self, node: &Rc<GraphNode>) -> Option<Rc<GraphNode>> {
        let stands =
            |parent: &Rc<GraphNode>| parent.child(Role::Shadow).is_some_and(|on| Rc::ptr_eq(&on, node));
        self.parents(node).into_iter().find(stands)
    }

    /// Refuses a job on `nodes`, a part of a chain, if others are in its way; those from `own` on it only reads.
    ///
    /// What another job works on is told before what it only relinks at its end, which doesn't count at all of the commit that is under way on the node
    /// `beside`. Who comes from above meets the node that stands for that job, if the user gave it a name, before the layer below it.
    ///
    /// # Errors
    /// Names the node and the job.
    pub(in crate::daemon) fn check_no_job(
        &self,
        nodes: &[Rc<GraphNode>],
        own: usize,
        beside: Option<&Rc<GraphNode>>,
    ) -> Result<(), Refusal> {
        let leaves = |busy: &Busy| {
            busy.part == Part::Relinks
                && beside.is_some_and(|on| on.busy.borrow().iter().any(|other| other.job == busy.job))
        };
        let named_shadow = |node| self.shadow_on(node).filter(|shadow| !shadow.name.starts_with('#'));
        for relinks in [false, true] {
            for (at, node) in nodes.iter().enumerate() {
                let busy = node.busy.borrow();
                if at >= own && busy.iter().all(|busy| busy.part == Part::Reads) {
                    continue;
                }
                let wanted = |busy: &&Busy| (busy.part == Part::Relinks) == relinks && !leaves(busy);
                let Some(busy) = busy.iter().find(wanted) else {
                    continue;
                };
                let below = node.below();
                if let (true, Some(shadow)) = (relinks, below.as_ref().and_then(named_shadow)) {
                    return Err(generic(format!("Cannot freeze 'backing' link to '{}'", shadow.name)));
                }
                let told = if at > 0 { named_shadow(node) } else { None };
                let name = &told.as_ref().unwrap_or(node).name;
                return Err(generic(format!("Node '{name}' is busy: {}", busy.why)));
            }
        }
        Ok(())
    }

    /// Takes away what [`Graph::add_shadow`] made.
    pub(in crate::daemon) fn remove_shadow(&self, node: &Rc<GraphNode>) {
        self.nodes.borrow_mut().retain(|other| !Rc::ptr_eq(other, node));
        node.links.borrow_mut().clear();
    }

    /// Holds back all whose requests can reach `node`, until the guards are dropped.
    ///
    /// They are held where they come in, at the roots' edges, of which none lies behind another. To close an edge further in, and then wait for
    /// one in front of it, would never end: a request waits at the inner one with the outer one in hand. Whoever waits for several edges while
    /// others may hold some keeps to roots.
    pub(in crate::daemon) async fn hold_users(&self, node: &Rc<GraphNode>) -> Vec<Drained> {
        let roots: Vec<_> =
            self.roots().into_iter().filter(|root| reaches(&root.node.borrow(), node)).collect();
        hold(&roots).await
    }

    /// Holds everybody back, until the guards are dropped; see [`Graph::hold_users`].
    pub(in crate::daemon) async fn hold_everyone(&self) -> Vec<Drained> {
        hold(&self.roots()).await
    }

    /// Waits until every request that is on its way now is over: after this nobody reads through a link that was changed before.
    pub(in crate::daemon) async fn let_requests_pass(&self) {
        drop(self.hold_everyone().await);
    }

    /// The job that calls itself `user` needs nothing more of the nodes that it still holds: another job's end may come before it gives them back.
    pub(in crate::daemon) fn renounce(&self, user: &str) {
        for root in self.roots().iter().filter(|root| root.user == user) {
            root.rights.set(Rights { does: Doing::NOTHING, bears: Doing::ALL });
        }
    }

    /// Puts `base` in the place of `top`, for all who use that, at the end of the job that calls itself `user` and still holds both. With `over` it stands
    /// on `top` from then on: not before, because somebody writes to that as long as it is a disk. Nobody's request is let in between.
    ///
    /// # Errors
    /// If the users of both don't agree; then nothing has changed.
    pub(in crate::daemon) async fn pivot(
        &self,
        top: &Rc<GraphNode>,
        base: &Rc<GraphNode>,
        user: &str,
        over: bool,
    ) -> Result<(), Refusal> {
        let own: Vec<_> = self.roots().into_iter().filter(|root| root.user == user).collect();
        let was: Vec<Rights> = own.iter().map(|root| root.rights.get()).collect();
        // From here on the job needs nothing of them.
        for root in &own {
            root.rights.set(Rights { does: Doing::NOTHING, bears: Doing::ALL });
        }
        // The one that becomes the disk stays writable.
        let mut replaced = self.replace(top, base).await;
        if replaced.is_ok() && over {
            replaced = self.set_backing(base, Some(&top.skip_filters())).await;
            if replaced.is_err() {
                self.replace(base, top).await?;
            }
        }
        if replaced.is_err() {
            for (root, rights) in own.iter().zip(was) {
                root.rights.set(rights);
            }
        }
        replaced
    }
}

/// True if requests to `from` can come to `node`.
fn reaches(from: &Rc<GraphNode>, node: &Rc<GraphNode>) -> bool {
    Rc::ptr_eq(from, node) || from.links.borrow().iter().any(|link| reaches(&link.to, node))
}

async fn hold(roots: &[Rc<Root>]) -> Vec<Drained> {
    let mut held = Vec::new();
    for root in roots {
        held.push(root.edge.drain().await);
    }
    held
}
