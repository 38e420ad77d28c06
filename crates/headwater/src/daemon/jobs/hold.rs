//! What a job holds in the graph while it exists: nodes that nobody else may work on, links that stay as they are, images that were opened for
//! writing, and a node that stands for the job.

use super::stream::relink;
use crate::daemon::commands::Turn;
use crate::daemon::failure::{Refusal, generic};
use crate::daemon::graph::rights::{Doing, Rights};
use crate::daemon::graph::{Busy, Graph, GraphNode, Part, Root, used_by};
use headwater_block::{DiskOptions, Error, ErrorKind};
use headwater_job::{Finish, HoldGuests};
use std::any::Any;
use std::cell::Cell;
use std::rc::Rc;

/// What a job holds in the graph: given back at its end, by [`Hold::release`].
pub(in crate::daemon) struct Hold {
    graph: Rc<Graph>,
    kind: &'static str,
    id: String,
    roots: Vec<Rc<Root>>,
    busy: Vec<Rc<GraphNode>>,
    frozen: Vec<Rc<GraphNode>>,
    /// Nodes that were made writable for the job.
    read_only_again: Vec<Rc<GraphNode>>,
    /// They stay writable: one of them is somebody's disk now.
    keep_writable: Rc<Cell<bool>>,
    /// The node that stands for the job in the graph.
    filter: Option<Rc<GraphNode>>,
    /// The overlay that shows a moment of what it stands on.
    shows_moment: Option<Rc<GraphNode>>,
}

impl Hold {
    pub(super) fn new(graph: &Rc<Graph>, kind: &'static str, id: &str) -> Self {
        Self {
            graph: graph.clone(),
            kind,
            id: id.to_owned(),
            roots: Vec::new(),
            busy: Vec::new(),
            frozen: Vec::new(),
            read_only_again: Vec::new(),
            keep_writable: Rc::default(),
            filter: None,
            shows_moment: None,
        }
    }

    /// Lets the job write to `node`.
    pub(super) async fn make_writable(&mut self, node: &Rc<GraphNode>) -> Result<(), Refusal> {
        if self.graph.make_writable(node, true).await? {
            self.read_only_again.push(node.clone());
        }
        Ok(())
    }

    /// Makes the job a user of `node`.
    pub(super) async fn attach(
        &mut self,
        node: &Rc<GraphNode>,
        child: &'static str,
        does: Doing,
        bears: Doing,
    ) -> Result<(), Refusal> {
        let user = self.user();
        let root = self.graph.attach(node, (&user, child), Rights { does, bears }, false).await?;
        self.roots.push(root);
        Ok(())
    }

    /// How messages call the job.
    pub(super) fn user(&self) -> String {
        format!("{} job '{}'", self.kind, self.id)
    }

    /// Keeps other jobs and commands away from `nodes`.
    pub(super) fn occupy(&mut self, nodes: &[Rc<GraphNode>]) {
        nodes.iter().for_each(|node| self.make_busy(node, Part::Works));
    }

    /// Keeps those away from `nodes` who do more than to read them.
    pub(super) fn occupy_as_reader(&mut self, nodes: &[Rc<GraphNode>]) {
        nodes.iter().for_each(|node| self.make_busy(node, Part::Reads));
    }

    /// Keeps all but other backups away from `node`.
    pub(super) fn occupy_to_back_up(&mut self, node: &Rc<GraphNode>) {
        self.make_busy(node, Part::BacksUp);
    }

    /// Keeps others away from `node`, which will stand on another at the job's end.
    pub(super) fn occupy_for_relinking(&mut self, node: &Rc<GraphNode>) {
        self.make_busy(node, Part::Relinks);
    }

    fn make_busy(&mut self, node: &Rc<GraphNode>, part: Part) {
        let why = used_by(self.kind);
        node.busy.borrow_mut().push(Busy { job: self.id.clone(), why, part });
        self.busy.push(node.clone());
    }

    /// Keeps the links of `nodes` to what is below them as they are.
    ///
    /// # Errors
    /// If another job has done so, unless it only reads them.
    pub(super) fn freeze(&mut self, nodes: &[Rc<GraphNode>]) -> Result<(), Refusal> {
        for node in nodes {
            let busy = node.busy.borrow();
            let reads = |job: &String| busy.iter().any(|busy| busy.job == *job && busy.part == Part::Reads);
            if let (false, Some(below)) = (node.frozen.borrow().iter().all(reads), node.below()) {
                let link = if node.is_filter() { "file" } else { "backing" };
                return Err(generic(format!("Cannot freeze '{link}' link to '{}'", below.name)));
            }
        }
        self.freeze_beside_others(nodes);
        Ok(())
    }

    /// As [`Hold::freeze`], where other jobs that do so are known to want the same.
    pub(super) fn freeze_beside_others(&mut self, nodes: &[Rc<GraphNode>]) {
        for node in nodes {
            node.frozen.borrow_mut().push(self.id.clone());
            self.frozen.push(node.clone());
        }
    }

    /// Puts a node that stands for the job into the graph, on top of `on`, under the name that the user chose if he did.
    ///
    /// # Errors
    /// If the name is taken.
    pub(super) fn insert_filter(
        &mut self,
        name: Option<&str>,
        driver: &'static str,
        on: &Rc<GraphNode>,
    ) -> Result<(), Refusal> {
        let made = self.graph.add_shadow(name, driver, on);
        let inserted = matches!(driver, "copy-on-read" | "copy-before-write");
        let cannot = |err: Refusal| {
            if inserted { generic(format!("Could not create node: {}", err.desc)) } else { err }
        };
        let made = made.map_err(cannot)?;
        self.filter = Some(made);
        Ok(())
    }

    /// The overlay `node` is about to show a moment of what it stands on ([`Graph::part_from_backing`]).
    ///
    /// # Errors
    /// See there.
    pub(super) async fn part_from_backing(&mut self, node: &Rc<GraphNode>) -> Result<(), Refusal> {
        self.graph.part_from_backing(node).await?;
        self.shows_moment = Some(node.clone());
        Ok(())
    }

    /// The links may be changed again: the job is about to do so.
    pub(super) fn thaw(graph: &Graph, id: &str) {
        for node in graph.nodes() {
            node.frozen.borrow_mut().retain(|job| job != id);
        }
    }

    /// Lets `over` stand on `base` at the end of the commit `id`, which has emptied what is between them. It may be another node than the one that stood there
    /// when the job began.
    ///
    /// # Errors
    /// Those of the storage; then all is as it was.
    pub(super) async fn relink_for_commit(
        graph: &Rc<Graph>,
        id: &str,
        (over, base): (&Rc<GraphNode>, &Rc<GraphNode>),
        (name, mask): (Option<&str>, bool),
    ) -> headwater_block::Result<()> {
        let failed = |refusal: Refusal| Error::new(ErrorKind::Io, refusal.desc);
        if over.busy.borrow().iter().all(|busy| busy.job != id) {
            over.busy.borrow_mut().push(Busy {
                job: id.to_owned(),
                why: used_by("commit"),
                part: Part::Relinks,
            });
        }
        let opened = graph.make_writable(over, true).await.map_err(failed)?;
        let linked = relink(graph, over, Some(base), name, mask).await;
        if opened {
            graph.make_writable(over, false).await.map_err(failed)?;
        }
        linked
    }

    /// Gives everything back.
    pub(super) async fn release(mut self) {
        self.roots.clear();
        for node in self.busy.drain(..).chain(self.graph.nodes()) {
            node.busy.borrow_mut().retain(|busy| busy.job != self.id);
        }
        for node in self.frozen.drain(..) {
            node.frozen.borrow_mut().retain(|job| *job != self.id);
        }
        if let Some(filter) = self.filter.take() {
            self.graph.remove_shadow(&filter);
        }
        if let Some(node) = self.shows_moment.take() {
            self.graph.back_to_backing(&node).await;
        }
        self.graph.collect().await;
        if self.keep_writable.get() {
            return;
        }
        for node in self.read_only_again.drain(..) {
            let there = self.graph.find(&node.name).is_some_and(|found| Rc::ptr_eq(&found, &node));
            let written = self.graph.together(&node).does.has(Doing::WRITE.and(Doing::REARRANGE));
            if there
                && !written
                && let Err(refusal) = self.graph.make_writable(&node, false).await
            {
                tracing::warn!(node = node.name, "cannot be opened read-only again: {}", refusal.desc);
            }
        }
    }
}

/// What the target of a job is otherwise once it is the disk.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct AsDisk {
    /// It stands on the node whose place it takes. Until then nobody may read it, because it lacks what nobody has changed.
    pub(super) stands_on_source: bool,
    /// What becomes of discards.
    pub(super) ignores_discards: Option<bool>,
}

/// How a job that follows `from` ends: its users are held back, and when it is completed `to` takes its place.
pub(super) fn pivot_hooks(
    hold: &Hold,
    turn: &Rc<Turn>,
    from: &Rc<GraphNode>,
    to: &Rc<GraphNode>,
    as_disk: AsDisk,
) -> (HoldGuests, Finish) {
    let graph = hold.graph.clone();
    let hold_guests: HoldGuests = {
        let (graph, from) = (graph.clone(), from.clone());
        Box::new(move || {
            let (graph, from) = (graph.clone(), from.clone());
            Box::pin(async move { Box::new(graph.hold_users(&from).await) as Box<dyn Any> })
        })
    };
    let finish: Finish = {
        let (turn, from, to) = (turn.clone(), from.clone(), to.clone());
        let (id, user, keep_writable) = (hold.id.clone(), hold.user(), hold.keep_writable.clone());
        Box::new(move || {
            Box::pin(async move {
                let _turn = turn.take().await;
                Hold::thaw(&graph, &id);
                let pivoted = graph.pivot(&from, &to, &user, as_disk.stands_on_source).await;
                keep_writable.set(pivoted.is_ok());
                if let (true, Some(ignore_discards)) = (pivoted.is_ok(), as_disk.ignores_discards) {
                    to.disk.set_options(DiskOptions { ignore_discards, ..to.disk.options() });
                }
                pivoted.map_err(|refusal| {
                    // The event has only an error number's text for it.
                    tracing::warn!(
                        "{user} can't put {} in the place of {}: {}",
                        to.name,
                        from.name,
                        refusal.desc
                    );
                    Error::from_io(std::io::Error::from_raw_os_error(libc::EPERM), refusal.desc)
                })
            })
        })
    };
    (hold_guests, finish)
}
