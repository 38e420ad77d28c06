//! Links that lead elsewhere: an image gets another file or another backing, a filter another node to be on.

use crate::daemon::failure::{Refusal, generic, of_error};
use crate::daemon::graph::change::finish;
use crate::daemon::graph::{Graph, GraphNode, Link, Role, Settings};
use headwater_block::drain::Drained;
use std::rc::Rc;

/// A link that is to lead elsewhere.
pub(super) struct Move {
    pub(super) node: Rc<GraphNode>,
    pub(super) key: &'static str,
    pub(super) role: Role,
    pub(super) from: Option<Rc<GraphNode>>,
    pub(super) to: Option<Rc<GraphNode>>,
}

impl Move {
    /// The way back.
    pub(super) fn back(&self) -> Self {
        Self { node: self.node.clone(), from: self.to.clone(), to: self.from.clone(), ..*self }
    }

    /// Lets the books say that the link leads to `to`.
    fn note(&self, to: Option<&Rc<GraphNode>>) {
        let mut links = self.node.links.borrow_mut();
        let at = links.iter().position(|link| link.name == self.key);
        match (at, to) {
            (Some(at), Some(to)) => links[at].to = to.clone(),
            (Some(at), None) => {
                links.remove(at);
            }
            (None, Some(to)) => {
                links.push(Link { name: self.key, role: self.role, to: to.clone(), edge: None });
            }
            (None, None) => {}
        }
    }
}

impl Graph {
    /// Lets all links lead where they should, at once: two images may swap their files. Images whose file is another are opened as `settings_of`
    /// says; if something is in the way all are as before, opened as `old_settings` says.
    pub(super) async fn relink(
        self: &Rc<Self>,
        moves: &[Move],
        settings_of: &dyn Fn(&Rc<GraphNode>) -> Settings,
        old_settings: &dyn Fn(&Rc<GraphNode>) -> Settings,
    ) -> Result<(), Refusal> {
        if moves.is_empty() {
            return Ok(());
        }
        let _held = self.hold_everyone().await;
        // What is opened anew, from below: an image with another file, and what holds that image as its file.
        let mut anew: Vec<Rc<GraphNode>> = Vec::new();
        for moved in moves.iter().filter(|moved| moved.role == Role::File) {
            self.with_holders(&moved.node, &mut anew);
        }
        let mut drained: Vec<(Rc<GraphNode>, Drained)> = Vec::new();
        for node in anew.iter().chain(moves.iter().map(|moved| &moved.node)) {
            if !drained.iter().any(|(known, _)| Rc::ptr_eq(known, node)) {
                drained.push((node.clone(), node.disk.drain().await));
            }
        }
        for node in anew.iter().rev() {
            finish(node).await?;
        }
        moves.iter().for_each(|moved| moved.note(moved.to.as_ref()));
        let result = async {
            self.settle_rights().await?;
            self.follow(moves, &anew, &drained, settings_of).await
        }
        .await;
        if let Err(refusal) = result {
            moves.iter().for_each(|moved| moved.note(moved.from.as_ref()));
            self.settle_rights().await?;
            let back: Vec<_> = moves.iter().map(Move::back).collect();
            self.follow(&back, &anew, &drained, old_settings).await?;
            return Err(refusal);
        }
        Ok(())
    }

    /// Adds `node` and all that hold it as their file, one on top of the other.
    pub(in crate::daemon::graph) fn with_holders(&self, node: &Rc<GraphNode>, all: &mut Vec<Rc<GraphNode>>) {
        all.retain(|known| !Rc::ptr_eq(known, node));
        all.push(node.clone());
        let holds = |holder: &Rc<GraphNode>| {
            let links = holder.links.borrow();
            links
                .iter()
                .any(|link| Rc::ptr_eq(&link.to, node) && matches!(link.role, Role::File | Role::DataFile))
        };
        for holder in self.parents(node).into_iter().filter(holds) {
            self.with_holders(&holder, all);
        }
    }

    /// Lets requests go where the books say.
    async fn follow(
        self: &Rc<Self>,
        moves: &[Move],
        anew: &[Rc<GraphNode>],
        drained: &[(Rc<GraphNode>, Drained)],
        settings_of: &dyn Fn(&Rc<GraphNode>) -> Settings,
    ) -> Result<(), Refusal> {
        for node in anew {
            let guard = drained.iter().find(|(known, _)| Rc::ptr_eq(known, node)).map(|(_, guard)| guard);
            let guard = guard.ok_or_else(|| generic("its requests must be held back"))?;
            self.build_again(node, settings_of(node), guard).await?;
        }
        for moved in moves {
            match moved.role {
                Role::Backing => {
                    let backing = moved.to.as_ref().map(|to| to.top());
                    moved.node.top().set_backing(backing).map_err(|err| of_error(&err))?;
                }
                Role::Filtered => {
                    let edge = moved
                        .node
                        .links
                        .borrow()
                        .iter()
                        .find(|link| link.name == moved.key)
                        .and_then(|link| link.edge.clone());
                    if let (Some(edge), Some(to)) = (edge, &moved.to) {
                        let held = edge.drain().await;
                        edge.replace(&held, to.disk.clone());
                    }
                }
                _ => {}
            }
        }
        for node in anew {
            for parent in self.parents(node) {
                self.follow_backing(&parent)?;
            }
        }
        self.settle_rights().await
    }
}
