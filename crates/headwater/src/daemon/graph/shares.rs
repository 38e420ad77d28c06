//! Sources that are shared: a node over a network is asked once for what several disks need of it (`headwater_block::share`).
//!
//! A node shares from when an image stands on it as its backing, directly or further up, until none does: that is what says that its bytes don't change.
//! Two nodes share with each other if they have one address and the same mark of their contents (an object's ETag or Last-Modified). An NBD
//! export has no such mark: what another node read of it may be older than what this one would be told, so there only the disks on one node share.

use super::open::Built;
use super::{Graph, GraphNode, Role};
use std::collections::HashMap;
use std::rc::Rc;

impl Graph {
    /// Puts what shares in front of a node that was opened just now, unless it can be written.
    pub(super) fn share(&self, built: Built) -> Built {
        if !built.top.is_read_only() {
            return built;
        }
        let node = self.sources.join(built.top.clone(), key(&built), None);
        let inside = super::Inside { share: Some(node.clone()), ..built.inside };
        Built { top: node, inside, ..built }
    }

    /// Counts anew how many disks read from each source.
    pub(super) fn settle_shares(&self) {
        let nodes = self.nodes();
        let mut known = HashMap::new();
        for node in &nodes {
            let share = node.inside.borrow().share.clone();
            if let Some(share) = share {
                let readers = self.readers(node, &mut known);
                if share.readers() != readers {
                    tracing::debug!(node = node.name, readers, "disks that share what is read");
                    share.set_readers(readers);
                }
            }
        }
    }

    /// How many disks read from `node` as from a layer below them.
    fn readers(&self, node: &Rc<GraphNode>, known: &mut HashMap<*const GraphNode, u32>) -> u32 {
        if let Some(readers) = known.get(&Rc::as_ptr(node)) {
            return *readers;
        }
        let mut readers = 0u32;
        for parent in self.parents(node) {
            let above = self.readers(&parent, known);
            for link in parent.links.borrow().iter().filter(|link| Rc::ptr_eq(&link.to, node)) {
                readers = readers.saturating_add(match link.role {
                    // A disk, or a layer that others stand on.
                    Role::Backing => above.max(1),
                    Role::Shadow => 0,
                    _ => above,
                });
            }
        }
        known.insert(Rc::as_ptr(node), readers);
        readers
    }
}

/// By what other nodes with the same bytes are recognised.
fn key(built: &Built) -> Option<String> {
    let marks = built.top.identity().ok()?.contents;
    if marks.is_empty() {
        return None;
    }
    let marks: Vec<String> = marks.iter().map(|(name, value)| format!("{name}: {value}")).collect();
    Some(format!("{}\n{}\n{}", built.filename, built.top.size(), marks.join("\n")))
}
