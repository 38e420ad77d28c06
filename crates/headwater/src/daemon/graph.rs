//! The graph: named nodes, what they stand on, who uses them, and who may do what.
//!
//! A [`GraphNode`] is a [`Disk`] with a name and with links to the nodes below it. Users from outside (exports, jobs) hold a [`Root`]. The books
//! kept here say who is linked to whom; the links themselves are where requests pass: an [`Edge`] under a filter or an export,
//! `set_backing` of an image, the file that an image was opened with.
//!
//! - [`rights`]: what each user of a node does to it and bears of others; a change of the books that leads to a conflict is taken back.
//! - [`open`]: from options to nodes. [`header`]: the nodes that an image's header names.
//! - [`change`]: a node takes another's place, images are opened again, nodes go. `reopen`: as a user says.
//! - `active`: nodes that are left to another process for a while.
//! - `shares`: sources that several disks read from are asked once.
//! - `holds`: for how long each node's clients wait for a source.
//! - `for_jobs`: what jobs need of it. [`describe`]: what is told of a node; `names`: what it is called.
//!
//! Commands that change the graph are carried out one at a time (see `commands`), so that no lock is needed here: what is awaited in between is
//! I/O of nodes, not another command.

mod active;
pub(super) mod change;
pub(super) mod describe;
mod for_jobs;
pub(super) mod header;
pub(super) mod holds;
pub(super) mod names;
pub(super) mod open;
mod reopen;
pub(super) mod rights;
mod settings;
pub(super) mod shares;

use self::rights::{Doing, Rights};
use self::shares::Sources;
use super::failure::{Refusal, generic};
use super::objects::Objects;
use headwater_block::filter::throttle::ThrottleNode;
use headwater_block::share::ShareNode;
use headwater_block::{Clock, Disk, Edge, Node, PointInTime, TokioClock, chain};
use headwater_image::qcow2::Qcow2Node;
use headwater_image::qcow2::snapshots::SnapshotInfo;
use headwater_storage::file::{Engine, FileNode};
use serde_json::{Map, Value};
use std::cell::{Cell, RefCell};
use std::rc::{Rc, Weak};

/// What a node is to the one above it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Role {
    /// It holds the bytes of an image.
    File,
    /// It holds the guest's data beside an image that holds the metadata.
    DataFile,
    /// It supplies what an overlay lacks.
    Backing,
    /// A filter passes requests to it.
    Filtered,
    /// The second disk of a filter that compares two.
    Compared,
    /// A filter saves to it what is about to be changed.
    Target,
    /// What it keeps of a moment is shown; requests don't pass there.
    Moment,
    /// A job has the node's place in the books; requests don't pass there.
    Shadow,
}

/// A link from a node to one below it.
pub(super) struct Link {
    /// What the child is called in options and messages ("file", "backing").
    pub(super) name: &'static str,
    pub(super) role: Role,
    pub(super) to: Rc<GraphNode>,
    /// Where requests pass, under a filter.
    pub(super) edge: Option<Rc<Edge>>,
}

/// How a node was opened, as far as all kinds have it in common.
#[derive(Debug, Clone, Default)]
pub(super) struct Settings {
    pub(super) read_only: bool,
    pub(super) auto_read_only: bool,
    pub(super) direct: bool,
    pub(super) no_flush: bool,
    pub(super) force_share: bool,
    /// It was not to be written when it was opened.
    pub(super) inactive: bool,
    /// The options that the node was made with, for when it is opened again.
    pub(super) options: Map<String, Value>,
}

/// What else an open node is, that only this program knows.
#[derive(Clone, Default)]
pub(super) struct Inside {
    /// The file behind it, whose locks follow what it is used for.
    pub(super) file: Option<Rc<FileNode>>,
    /// The image that it is.
    pub(super) image: Option<Rc<Qcow2Node>>,
    /// What its backing was called when it was opened because the header names it; none when the header has been changed since, or doesn't decide.
    pub(super) followed: Option<String>,
    /// The internal snapshots of that.
    pub(super) snapshots: Vec<SnapshotInfo>,
    /// The throttle filter that it is.
    pub(super) throttle: Option<Rc<ThrottleNode>>,
    /// The moment that it keeps.
    pub(super) point: Option<Rc<PointInTime>>,
    /// What shares its reads with others, in front of a source.
    pub(super) share: Option<Rc<ShareNode>>,
}

/// Why a node is busy that a job of this kind uses.
pub(super) fn used_by(kind: &str) -> String {
    format!("block device is in use by block job: {kind}")
}

/// A job that a node is part of.
pub(super) struct Busy {
    /// The job's id.
    pub(super) job: String,
    /// Why the node is busy, for messages.
    pub(super) why: String,
    pub(super) part: Part,
}

/// What a job does with a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Part {
    /// It moves its bytes, or those of others into it.
    Works,
    /// It only reads it: others may do the same.
    Reads,
    /// It copies what the node held at one moment: other backups may do the same.
    BacksUp,
    /// At its end the node stands on another.
    Relinks,
}

/// A node with a name.
pub(super) struct GraphNode {
    pub(super) name: String,
    pub(super) driver: &'static str,
    pub(super) disk: Rc<Disk>,
    /// What people call it if nothing below it has a name: see [`GraphNode::filename`].
    pub(super) own_filename: String,
    pub(super) links: RefCell<Vec<Link>>,
    /// Made by a command, and there until a command removes it.
    pub(super) owned: Cell<bool>,
    pub(super) settings: RefCell<Settings>,
    pub(super) inside: RefCell<Inside>,
    /// The jobs that it is part of.
    pub(super) busy: RefCell<Vec<Busy>>,
    /// The jobs that need its link to its backing as it is.
    pub(super) frozen: RefCell<Vec<String>>,
    pub(super) active: Cell<bool>,
}

impl GraphNode {
    /// The node itself, as requests see it now.
    pub(super) fn top(&self) -> Rc<dyn Node> {
        self.disk.top()
    }

    /// The child in `role`.
    pub(super) fn child(&self, role: Role) -> Option<Rc<GraphNode>> {
        self.links.borrow().iter().find(|link| link.role == role).map(|link| link.to.clone())
    }

    /// What people call it: the name of the file that holds its bytes, or an address.
    pub(super) fn filename(&self) -> String {
        let holder = [Role::File, Role::Filtered, Role::Shadow].into_iter().find_map(|role| self.child(role));
        holder.map_or_else(|| self.own_filename.clone(), |holder| holder.filename())
    }

    /// Makes the child in one role one in another.
    pub(super) fn change_role(&self, from: Role, to: Role) {
        for link in self.links.borrow_mut().iter_mut().filter(|link| link.role == from) {
            link.role = to;
        }
    }

    pub(super) fn is_filter(&self) -> bool {
        self.links.borrow().iter().any(|link| link.role == Role::Filtered)
    }

    /// What lies below all filters.
    pub(super) fn skip_filters(self: &Rc<Self>) -> Rc<GraphNode> {
        let mut node = self.clone();
        while let Some(below) = node.child(Role::Filtered) {
            node = below;
        }
        node
    }

    /// True of an image that has `node`, or a filter on it, as backing.
    fn stands_on(&self, node: &Rc<GraphNode>) -> bool {
        self.child(Role::Backing).is_some_and(|backing| {
            let filters = backing.chain().take_while(|n| n.is_filter());
            filters.chain([backing.skip_filters()]).any(|n| Rc::ptr_eq(&n, node))
        })
    }

    /// The next node of the chain: what a filter is on, or an image's backing.
    pub(super) fn below(&self) -> Option<Rc<GraphNode>> {
        self.child(Role::Filtered).or_else(|| self.child(Role::Backing))
    }

    /// The node, what it filters or has as backing, and so on.
    pub(super) fn chain(self: &Rc<Self>) -> impl Iterator<Item = Rc<GraphNode>> {
        std::iter::successors(Some(self.clone()), |node| node.below())
    }

    /// Refuses what a job is in the way of.
    ///
    /// # Errors
    /// Names the node and the job.
    pub(super) fn check_idle(&self) -> Result<(), Refusal> {
        match self.busy.borrow().first() {
            Some(busy) => Err(generic(format!("Node '{}' is busy: {}", self.name, busy.why))),
            None => Ok(()),
        }
    }

    /// As [`GraphNode::check_idle`], but other backups may copy the node, too.
    ///
    /// # Errors
    /// See there.
    pub(super) fn check_may_be_backed_up(&self) -> Result<(), Refusal> {
        match self.busy.borrow().iter().find(|busy| busy.part != Part::BacksUp) {
            Some(busy) => Err(generic(format!("Node '{}' is busy: {}", self.name, busy.why))),
            None => Ok(()),
        }
    }

    /// Refuses changes of a link that a job needs.
    ///
    /// So does a moment that is kept need it.
    ///
    /// # Errors
    /// Names both ends.
    pub(super) fn check_not_frozen(&self) -> Result<(), Refusal> {
        if let (Some(_), Some(below)) = (&self.inside.borrow().point, self.below()) {
            return Err(generic(format!(
                "Cannot change frozen 'file' link from '{}' to '{}'",
                self.name, below.name
            )));
        }
        match (self.frozen.borrow().first(), self.below()) {
            (Some(job), Some(below)) => {
                let link = if self.is_filter() { "file" } else { "backing" };
                tracing::debug!(node = self.name, "job {job} needs the link as it is");
                Err(generic(format!(
                    "Cannot change frozen '{link}' link from '{}' to '{}'",
                    self.name, below.name
                )))
            }
            _ => Ok(()),
        }
    }

    pub(super) fn is_read_only(&self) -> bool {
        self.settings.borrow().read_only
    }
}

/// Somebody outside of the graph who uses a node: an export, a job.
pub(super) struct Root {
    /// How messages call it.
    pub(super) user: String,
    /// And what it calls the node.
    child: &'static str,
    pub(super) node: RefCell<Rc<GraphNode>>,
    pub(super) rights: Cell<Rights>,
    pub(super) edge: Rc<Edge>,
    /// Goes along when another node takes the place of its own.
    follows: bool,
    /// Only reads while the node is inactive.
    yields: bool,
}

impl Root {
    /// True if its node can't become inactive.
    fn insists_on_writing(&self) -> bool {
        !self.yields && self.rights.get().does.has(Doing::WRITE.and(Doing::REARRANGE))
    }
}

/// All nodes and all who use them. Belongs to the thread of its disks.
pub(super) struct Graph {
    pub(super) engine: Rc<Engine>,
    pub(super) clock: Rc<dyn Clock>,
    pub(super) objects: Rc<Objects>,
    sources: Sources,
    /// How many bytes streams leave free where they write; with 0 they don't look.
    pub(super) low_water: Cell<u64>,
    /// In the order in which they were made.
    nodes: RefCell<Vec<Rc<GraphNode>>>,
    roots: RefCell<Vec<Weak<Root>>>,
    next_name: Cell<u32>,
}

impl Graph {
    pub(super) fn new(engine: Rc<Engine>, objects: Rc<Objects>, sources: Sources) -> Rc<Self> {
        Rc::new(Self {
            engine,
            clock: Rc::new(TokioClock::new()),
            objects,
            sources,
            low_water: Cell::new(0),
            nodes: RefCell::default(),
            roots: RefCell::default(),
            next_name: Cell::new(0),
        })
    }

    /// All nodes, the oldest first.
    pub(super) fn nodes(&self) -> Vec<Rc<GraphNode>> {
        self.nodes.borrow().clone()
    }

    /// All users from outside.
    fn roots(&self) -> Vec<Rc<Root>> {
        self.roots.borrow().iter().filter_map(Weak::upgrade).collect()
    }

    pub(super) fn find(&self, name: &str) -> Option<Rc<GraphNode>> {
        self.nodes.borrow().iter().find(|node| node.name == name).cloned()
    }

    /// The node of that name, for commands that call it a node.
    ///
    /// # Errors
    /// There is none.
    pub(super) fn node(&self, name: &str) -> Result<Rc<GraphNode>, Refusal> {
        self.find(name).ok_or_else(|| generic(format!("Failed to find node with node-name='{name}'")))
    }

    /// The node of that name, for commands that would take a device's name as well, of which there are none here.
    ///
    /// # Errors
    /// There is none.
    pub(super) fn device_or_node(&self, device: &str, node: &str) -> Result<Rc<GraphNode>, Refusal> {
        let name = if node.is_empty() { device } else { node };
        self.find(name)
            .ok_or_else(|| generic(format!("Cannot find device='{device}' nor node-name='{node}'")))
    }

    /// The node of that name, for commands that have one argument for devices and nodes.
    ///
    /// # Errors
    /// There is none.
    pub(super) fn any(&self, name: &str) -> Result<Rc<GraphNode>, Refusal> {
        self.find(name).ok_or_else(|| generic(format!("Cannot find device='{name}' nor node-name='{name}'")))
    }

    /// Refuses what isn't done to a node that is the backing of another.
    ///
    /// # Errors
    /// Names both.
    pub(super) fn check_not_backing(&self, node: &Rc<GraphNode>) -> Result<(), Refusal> {
        let over = self.parents(node).into_iter().find(|parent| {
            parent.links.borrow().iter().any(|link| link.role == Role::Backing && Rc::ptr_eq(&link.to, node))
        });
        match over {
            Some(over) => Err(generic(format!(
                "Node '{}' is busy: node is used as backing hd of '{}'",
                node.name, over.name
            ))),
            None => Ok(()),
        }
    }

    /// A name for a node that nobody named.
    fn invent_name(&self) -> String {
        loop {
            let number = self.next_name.get();
            self.next_name.set(number + 1);
            let name = format!("#block{number:03}");
            if self.find(&name).is_none() {
                return name;
            }
        }
    }

    /// Puts a node into the table, at `place` or at the end.
    fn enter(&self, node: &Rc<GraphNode>, place: Option<usize>) {
        let mut nodes = self.nodes.borrow_mut();
        let place = place.unwrap_or(nodes.len()).min(nodes.len());
        nodes.insert(place, node.clone());
    }

    /// The nodes that have a link to `node`.
    pub(super) fn parents(&self, node: &Rc<GraphNode>) -> Vec<Rc<GraphNode>> {
        let has =
            |parent: &&Rc<GraphNode>| parent.links.borrow().iter().any(|link| Rc::ptr_eq(&link.to, node));
        self.nodes.borrow().iter().filter(has).cloned().collect()
    }

    fn roots_of(&self, node: &Rc<GraphNode>) -> Vec<Rc<Root>> {
        self.roots().into_iter().filter(|root| Rc::ptr_eq(&root.node.borrow(), node)).collect()
    }

    /// True if something stands on the node or uses it.
    pub(super) fn is_used(&self, node: &Rc<GraphNode>) -> bool {
        !self.parents(node).is_empty() || !self.roots_of(node).is_empty()
    }

    /// Makes `user`, who calls it `child`, a user of `node` with these rights; it is one for as long as the root lives. With `follows` it goes along when another
    /// node takes the place of this one.
    ///
    /// # Errors
    /// If others bear it not, or do what it doesn't bear.
    pub(super) async fn attach(
        &self,
        node: &Rc<GraphNode>,
        (user, child): (&str, &'static str),
        rights: Rights,
        follows: bool,
    ) -> Result<Rc<Root>, Refusal> {
        self.enter_root(node, (user, child), rights, (follows, false)).await
    }

    /// Makes an export a user of `node`, which goes along when another node takes its place. One that `yields` only reads while the node is inactive.
    ///
    /// # Errors
    /// See [`Graph::attach`].
    pub(super) async fn attach_export(
        &self,
        node: &Rc<GraphNode>,
        rights: Rights,
        yields: bool,
    ) -> Result<Rc<Root>, Refusal> {
        self.enter_root(node, ("an unnamed block device", "root"), rights, (true, yields)).await
    }

    async fn enter_root(
        &self,
        node: &Rc<GraphNode>,
        (user, child): (&str, &'static str),
        rights: Rights,
        (follows, yields): (bool, bool),
    ) -> Result<Rc<Root>, Refusal> {
        let root = Rc::new(Root {
            user: user.to_owned(),
            child,
            node: RefCell::new(node.clone()),
            rights: Cell::new(rights),
            edge: Edge::new(node.disk.clone()),
            follows,
            yields,
        });
        self.roots.borrow_mut().retain(|root| root.strong_count() > 0);
        self.roots.borrow_mut().push(Rc::downgrade(&root));
        self.settle_rights().await?;
        Ok(root)
    }

    /// The nodes of the chain under `top` down to `until`, which isn't part of it; the whole chain without it.
    pub(super) fn part(top: &Rc<GraphNode>, until: Option<&Rc<GraphNode>>) -> Vec<Rc<GraphNode>> {
        top.chain().take_while(|node| until.is_none_or(|until| !Rc::ptr_eq(node, until))).collect()
    }

    /// True if `below` is in the chain under `top`, which counts as well.
    pub(super) fn is_in_chain(top: &Rc<GraphNode>, below: &Rc<GraphNode>) -> bool {
        top.chain().any(|node| Rc::ptr_eq(&node, below))
    }

    /// The lowest node whose link leads towards `node`, in the chain under `top`: what has it, or a filter on it, as backing.
    pub(super) fn overlay_of(top: &Rc<GraphNode>, node: &Rc<GraphNode>) -> Option<Rc<GraphNode>> {
        top.chain().find(|over| over.stands_on(node))
    }

    /// All images that have `node`, or a filter on it, as backing.
    pub(super) fn overlays_of(&self, node: &Rc<GraphNode>) -> Vec<Rc<GraphNode>> {
        self.nodes().into_iter().filter(|over| over.stands_on(node)).collect()
    }
}

/// The layer of the chain that requests see for a node, whatever filters are on top of it.
pub(super) fn layer(node: &Rc<GraphNode>) -> Rc<dyn Node> {
    chain::skip_filters(&node.top())
}
